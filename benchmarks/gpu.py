"""All that a GPU is rented for, in one command: its tests, its tiles, the benchmarks, and a report with verdicts.

Each step is a process of its own with a limit of time, so that neither a crash nor a hang loses the others. What a step
wrote before it was cut counts. DIR/report.md and DIR/report.json are written anew after every step; beside them are
the files of each step, and what it printed, in DIR/<step>.log. The exit status is 1 if a test failed or a step
crashed, whatever the goals. With --device cpu --quick all of it runs in Triton's interpreter, to see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import gpu_report
from .reporting import ROOT, say

OUTPUT_HELP = "the folder for the report and the files of each step (default: build/gpu)"

#: What of the time each step is for. What a step leaves over goes to the later ones, in proportion.
SHARES = {
    "environment": 0.03,
    "tests": 0.20,
    "tiles": 0.12,
    "attention-bfloat16": 0.20,
    "attention-float16": 0.05,
    "attention-compiled": 0.05,
    "train_step-vit_base-eager": 0.07,
    "train_step-vit_base-compiled": 0.10,
    "train_step-vit_small-eager": 0.04,
    "train_step-vit_small-compiled": 0.06,
    "train_step-vit_base-compiled-others": 0.05,
    "separation": 0.03,
}
#: What each step has at least, as long as there is so much: importing torch from a cold disk alone can take half of it.
LEAST_SECONDS = 30.0

#: Those that the goals are for come first.
SHAPES = [
    "256,12,197,64", "8,12,4096,64", "8,12,4096,128", "32,12,1024,64",
    "64,12,577,64", "256,12,197,128", "32,12,1024,128", "64,12,577,128",
]  # fmt: skip
OURS = ["ReLU, ours", "PFU, ours", "dmedian, ours"]
#: Beside ours in each process, so that the fastest of them can be what a ratio is taken to.
ANCHORS = [
    "SDPA flash", "SDPA cudnn", "SDPA efficient", "FlashAttention 4", "FlexAttention", "eager softmax",
    "eager softmax, compiled",
]  # fmt: skip
#: What takes the longest to compile has a step of its own.
COMPILED = [
    "ReLU, FlexAttention", "ReLU by hand, compiled", "dmedian by hand, compiled",
    "ReLU, ours, compiled", "PFU, ours, compiled", "dmedian, ours, compiled",
]  # fmt: skip
QUICK_TESTS = "tests/test_triton.py -k on_the_cpu_it_says"


@dataclasses.dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: Of its files, and in `SHARES`.
        command: Its arguments, the interpreter excluded.
        variables: What it has in its environment beside ours, of which it has no LWPF_* and no TRITON_INTERPRET.
    """

    name: str
    command: list[str]
    variables: dict[str, str] = dataclasses.field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    parser.add_argument("--minutes", type=float, default=8, help="for all of it (default: %(default)s)")
    parser.add_argument(
        "--tests",
        metavar="ARGUMENTS",
        help="what pytest is given (default: -m gpu, and the files that have such tests)",
    )


def run(options: argparse.Namespace) -> None:
    """Run all steps, write the report, and exit with 1 if a test failed or a step crashed."""
    folder = Path(options.output or "build/gpu").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    command = ["benchmarks", *options.command_line]
    # So that no step goes on alone.
    former = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        report = run_steps(steps(options, folder), folder, options.minutes, command)
    finally:
        signal.signal(signal.SIGTERM, former)
    print(gpu_report.summary(report))
    print(f"{folder / 'report.md'}")
    if gpu_report.failed(report):
        sys.exit(1)


def steps(options: argparse.Namespace, folder: Path) -> list[Step]:
    """Return the steps in their order.

    Args:
        options: The command line.
        folder: Where results go.
    """
    device = options.device
    common = ["--device", device, "--no-plot", *(["--quick"] if options.quick else [])]
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}

    def bench(step: str, benchmark: str, *arguments: str, **variables: str) -> Step:
        command = ["-m", "benchmarks", benchmark, *common, *arguments, "--output", str(folder / step)]
        return Step(step, command, variables)

    def attention(step: str, dtype: str, only: list[str], *arguments: str, **variables: str) -> Step:
        # Those that a device lacks would be refused; --if-there leaves them out.
        chosen = ("--dtype", dtype, "--if-there", "--only", *only)
        return bench(step, "attention", *chosen, *arguments, "--backend", "triton", **variables)

    # One seed for all, also for tests that run pytest themselves; what fails can be repeated with it.
    seed = os.environ.get("TESTS_SEED", str(random.SystemRandom().randrange(2**31)))
    found = [
        Step("environment", ["-m", "benchmarks.gpu_environment", device, str(folder / "environment.json")]),
        Step("tests", [*_pytest(options), "--results", str(folder / "tests.jsonl")], {"TESTS_SEED": seed}),
    ]
    if options.quick:
        shapes = ("--shapes", "1,1,16,16", "--base", "eager softmax", "--no-memory")
        return [
            *found,
            bench("tiles", "tiles", "--near", "--kernels", "forward", "--shapes", "1,1,16,16", **interpreted),
            attention("attention-float32", "float32", ["SDPA flash", *OURS], *shapes, **interpreted),
            bench("train_step-test_vit-eager", "train_step", "--batch", "1", "--only", "relu", "uhop", "--no-memory"),
            bench("separation", "separation", "--batch", "2"),
        ]
    repeats = ("--repeats", "20")
    found += [
        bench("tiles", "tiles", "--near", *repeats, **interpreted),
        attention("attention-bfloat16", "bfloat16", [*ANCHORS, *OURS], "--shapes", *SHAPES, *repeats, **interpreted),
        attention("attention-float16", "float16", [*ANCHORS, *OURS], "--shapes", *SHAPES, *repeats, **interpreted),
        attention("attention-compiled", "bfloat16", COMPILED, "--shapes", *SHAPES, *repeats, **interpreted),
    ]
    others = ("pfu, dmedian", "uhop")
    for model, how, only in (
        ("vit_base", "eager", ("relu", *others)),
        ("vit_base", "compiled", ("relu",)),  # alone, as each is compiled for long
        ("vit_small", "eager", ("relu", *others)),
        ("vit_small", "compiled", ("relu", *others)),
        ("vit_base", "compiled-others", others),
    ):
        arguments = ["--model", f"{model}_patch16_224", "--batch", "128", "--dtype", "bfloat16", "--repeats", "12"]
        arguments += ["--compile"] if how.startswith("compiled") else []
        found.append(bench(f"train_step-{model}-{how}", "train_step", *arguments, "--only", *only))
    return [*found, bench("separation", "separation")]


def _pytest(options: argparse.Namespace) -> list[str]:
    if options.tests is not None:
        selected = shlex.split(options.tests)
    elif options.quick and options.device == "cpu":
        selected = shlex.split(QUICK_TESTS)
    else:  # only these files: others may import what a rented machine has not
        files = sorted(ROOT.glob("tests/**/test_*.py"))
        marked = [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
        # The kernels' own tests first.
        selected = [*sorted(marked, key=lambda name: "triton" not in name), "-m", "gpu"]
    return ["-m", "pytest", "-p", "benchmarks.pytest_results", "-p", "no:cacheprovider", *selected]


def run_steps(steps: list[Step], folder: Path, minutes: float, command: list[str]) -> dict[str, Any]:
    """Run steps one after another and write the report after each.

    Args:
        steps: What to run.
        folder: Where their results are, and the report goes.
        minutes: For all of them.
        command: The command line, for the report.

    Returns:
        The report.
    """
    end = time.monotonic() + 60 * minutes
    for step in steps:  # those of an earlier run must not pass for results of this one
        for path in (*folder.glob(f"{step.name}.*"), *folder.glob("report.*")):
            path.unlink()
    states = [gpu_report.State(step.name) for step in steps]
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")

    def write() -> dict[str, Any]:
        report = gpu_report.gather(folder, states, started=started, minutes=minutes, command=command)
        gpu_report.write(report, folder)
        return report

    for number, (step, state) in enumerate(zip(steps, states, strict=True)):
        left = end - time.monotonic()
        if left < 1:
            state.state, state.why = "left out", "no time was left"
            say(f"{step.name}: left out: no time was left")
            continue
        shares = [SHARES.get(other.name, 0.1) for other in steps[number:]]
        state.limit = min(left, max(LEAST_SECONDS, left * shares[0] / sum(shares)))
        state.state = "running"
        write()
        say(f"step {number + 1} of {len(steps)}, {step.name}: up to {state.limit:.0f} s, {left:.0f} s are left for all")
        _run(step, state, folder)
        report = write()
        gave = gpu_report.gave(report, step.name)
        reason = f" ({state.why})" if state.why else ""
        say(f"{step.name}: {state.state}{reason} after {state.seconds:.0f} s; {gave}")
        if step.name == "environment" and state.state == "crashed":  # there is nothing to be measured on
            for later in states[number + 1 :]:
                later.state, later.why = "left out", "the device cannot be used"
            break
    return write()


def _run(step: Step, state: gpu_report.State, folder: Path) -> None:
    """Run a step, at most until its limit, and say in its state what became of it."""
    log = folder / f"{step.name}.log"
    ours = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("LWPF_")}
    environment = {**ours, **step.variables}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        # A group of its own, so that its children end with it.
        child = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = child.wait(timeout=state.limit)
        except subprocess.TimeoutExpired:
            state.state, state.why = "cut", f"at its limit of {state.limit:.0f} s"
        else:
            # pytest ends with 1 if tests failed, which is no crash.
            state.state = "finished" if status == 0 or (step.name == "tests" and status == 1) else "crashed"
            if state.state == "crashed":
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
                state.why = f"status {status}: {lines[-1][:300]}"
        finally:
            _end(child)
            state.seconds = time.monotonic() - start


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child and its own children; one that the driver holds up is left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=10)
