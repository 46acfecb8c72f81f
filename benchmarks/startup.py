"""What the start-up hook costs: its line with no variable set, and the start of an interpreter.

Interpreters are started in turn, so that drift of the machine hits both alike; the cost of the hook's line itself,
which is far below the noise of a start, is measured inside one interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HOOK = Path(__file__).parent.parent / "lwpf_patch" / "lwpf_patch.pth"

# exec is what site does with the line of a .pth file.
_INSIDE = """
import sys, time, statistics
line = sys.argv[1]
times = []
for _ in range(200):
    start = time.perf_counter()
    exec(line)
    times.append(time.perf_counter() - start)
print(*statistics.quantiles(times, n=4))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--starts", type=int, default=40, help="interpreters started of each kind (default: 40)")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")


def run(options: argparse.Namespace) -> None:
    """Measures and prints."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("LWPF_")}
    variants = {"hook, no variable": plain, "LWPF_PATCH=timm, nothing imported": {**plain, "LWPF_PATCH": "timm"}}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.starts):
        for name, environment in variants.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", ""], env=environment, check=True, stderr=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    line = HOOK.read_text()
    out = subprocess.run([sys.executable, "-c", _INSIDE, line], env=plain, check=True, capture_output=True, text=True)
    hook = [float(text) for text in out.stdout.split()]
    results = {
        "python": platform.python_version(),
        "processor_count": os.cpu_count(),
        "hook_line_unset_seconds_quartiles": hook,
        "start_seconds_quartiles": {name: statistics.quantiles(times, n=4) for name, times in seconds.items()},
    }
    print(
        f"the hook's line, no variable set: {hook[1] * 1e6:.1f} us (quartiles {hook[0] * 1e6:.1f}, {hook[2] * 1e6:.1f})"
    )
    for name, (low, median, high) in results["start_seconds_quartiles"].items():
        print(f"{name:<40} {median * 1e3:6.1f} ms (quartiles {low * 1e3:.1f}, {high * 1e3:.1f})")
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")
