"""What the start-up hook costs: its line with no variable set, and the start of an interpreter.

Interpreters are started in turn, so that drift of the machine hits both alike; the cost of the hook's line itself,
which is far below the noise of a start, is measured inside one interpreter.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from . import reporting
from .reporting import Row

HOOK = reporting.ROOT / "lwpf_patch" / "lwpf_patch.pth"

# exec is what site does with the line of a .pth file.
_INSIDE = """
import sys, time
line = sys.argv[1]
for _ in range(200):
    start = time.perf_counter()
    exec(line)
    print(time.perf_counter() - start)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--starts", type=int, help="interpreters started of each kind (default: 40; 3 with --quick)")


def run(options: argparse.Namespace) -> None:
    """Measures and prints."""
    options.starts = options.starts or (3 if options.quick else 40)
    plain = {k: v for k, v in os.environ.items() if not k.startswith("LWPF_")}
    variants = {"start, no variable set": plain, "start, LWPF_PATCH=timm": {**plain, "LWPF_PATCH": "timm"}}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.starts):
        for name, environment in variants.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", ""], env=environment, check=True, stderr=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    base, *_ = seconds.values()
    rows: list[Row] = []
    for name, own in seconds.items():
        ratios = [one / other for one, other in zip(own, base, strict=True)]
        rows.append({"variant": name, "seconds": reporting.quartiles(own), "ratio": reporting.quartiles(ratios)})
    out = subprocess.run(
        [sys.executable, "-c", _INSIDE, HOOK.read_text()], env=plain, check=True, capture_output=True, text=True
    )
    line = [float(text) for text in out.stdout.split()]
    rows.append({"variant": "the hook's line alone", "seconds": reporting.quartiles(line)})
    headings = ["variant", "milliseconds (quartiles)", "ratio (quartiles)"]
    cells = [[r["variant"], reporting.spread(r["seconds"], 1e3, 4), reporting.spread(r.get("ratio"))] for r in rows]
    print(reporting.table(headings, cells))
    reporting.write(options, rows)
