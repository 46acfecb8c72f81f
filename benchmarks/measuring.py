"""Time and memory of several variants in one process, in turn; what the benchmarks that compute have in common.

Repeat after repeat every variant runs once, so that drift of the machine hits all alike; ratios are taken within each
repeat. A variant that fails says why and does not stop the others.

On the CPU the clock on the wall counts. On CUDA it is the device's own time, between two events: before each
measurement the cache is flushed and the device is held up for as long as the host needs to launch the work, as in
training, where the host runs ahead. What the host spends is kept as a figure of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import reporting
from .reporting import Row, say

_CACHE_BYTES = 1 << 28  # more than the second cache of any GPU of today
_CYCLES_A_SECOND = 2e9  # no less than any GPU of today makes
_LONGEST_PAUSE = 0.05


@dataclass(frozen=True)
class Subject:
    """What is measured under one name.

    Attributes:
        forward: Computes; what it returns is what `backward` needs.
        backward: The rest of the whole.
        passes: What is timed, by name.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]
    passes: dict[str, Callable[[], Any]]

    def whole(self) -> None:
        """Run all of it."""
        self.backward(self.forward())


@dataclass
class _Timing:
    label: str
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    pause: float = 0.0
    failure: str = ""

    def clock(self, stopwatch: _Stopwatch, work: Callable[[], Any], device: str) -> tuple[float, float] | None:
        """Measure once; None if it fails, or has failed before."""
        if self.failure:
            return None
        clocked, self.failure = attempt(functools.partial(stopwatch.clock, work, self.pause), device)
        if self.failure:
            say(f"{self.label}, failed: {self.failure}")
        return clocked


def settle(options: argparse.Namespace, repeats: dict[str, int]) -> None:
    """Settle what depends on the machine.

    Args:
        options: The command line, which is changed.
        repeats: The default of each device.
    """
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks: --device cuda: torch finds no CUDA device here")
    options.repeats = options.repeats or (reporting.QUICK_REPEATS if options.quick else repeats[options.device])
    if options.threads:
        torch.set_num_threads(options.threads)


def chosen(options: argparse.Namespace, base: str, known: dict[str, Any]) -> dict[str, Any]:
    """Return the variants that were asked for.

    Args:
        options: The command line.
        base: The variant that ratios are taken to, which is always among them.
        known: All variants that can run here.

    Raises:
        SystemExit: There is no such variant.
    """
    for name in (base, *(options.only or ())):
        if name not in known:
            sys.exit(f"benchmarks: no variant {name!r} here; there are: {', '.join(map(repr, known))}")
    return {name: known[name] for name in known if not options.only or name in (base, *options.only)}


def compare(
    options: argparse.Namespace,
    subjects: dict[str, Subject],
    base: str,
    *overrides: str,
    others: Sequence[str] = (),
) -> list[Row]:
    """Measure all subjects.

    Args:
        options: The command line.
        subjects: What to measure, by name.
        base: Which of them the ratios are taken to.
        *overrides: What of the command line is different in the child that measures memory on the CPU.
        others: Subjects that ratios of time are taken to as well.

    Returns:
        For each subject, for each of its passes: ``{pass}_seconds`` and ``{pass}_ratio``, with `others`
        ``{pass}_ratios``, by their names, on CUDA
        ``{pass}_host_seconds``; ``peak_bytes`` and ``peak_ratio``, on CUDA also ``activation_bytes`` and
        ``activation_ratio``, on the CPU ``growth_bytes`` and ``growth_ratio``, of the first run of a process; and
        ``failures``, what failed and why.
    """
    with _busy_processes(options.load):
        timings = _times_in_turn(subjects, options.repeats, options.device)
    rows: dict[str, Row] = {}
    for name, passes in timings.items():
        row: Row = {"variant": name, "failures": {}}
        for which, timing in passes.items():
            if timing.failure:
                row["failures"][which] = timing.failure
                continue
            row[f"{which}_seconds"] = reporting.quartiles(timing.seconds)
            if options.device == "cuda":
                row[f"{which}_host_seconds"] = reporting.quartiles(timing.host_seconds)
            if not timings[base][which].failure:
                row[f"{which}_ratio"] = _ratio(timing, timings[base][which])
            if others:
                row[f"{which}_ratios"] = {
                    other: _ratio(timing, timings[other][which])
                    for other in others
                    if not timings[other][which].failure
                }
        if not options.no_memory and not row["failures"]:  # it would fail for the same reason
            measured, failure = _memory_of(options, name, subjects[name], overrides)
            row |= measured or {"failures": {"memory": failure}}
        rows[name] = row
    for row in rows.values():
        for what in ("peak", "activation", "growth"):
            own, other = (each.get(f"{what}_bytes") for each in (row, rows[base]))
            if own is not None and other:
                row[f"{what}_ratio"] = own / other
    return list(rows.values())


def _ratio(timing: _Timing, other: _Timing) -> list[float]:
    """Return the quartiles of the ratios of two timings, repeat by repeat."""
    return reporting.quartiles([one / two for one, two in zip(timing.seconds, other.seconds, strict=True)])


def memory(subject: Subject, device: str) -> dict[str, int]:
    """Measure the memory of a subject that ran before, beyond what is there when it starts.

    Args:
        subject: The subject.
        device: ``"cpu"``: the process should do nothing else.

    Returns:
        ``peak_bytes``; on CUDA also ``activation_bytes``, what is held between forward and backward, the output
        included.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        between = subject.forward()
        held = torch.cuda.memory_allocated() - before
        subject.backward(between)
        return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "activation_bytes": held}
    return {"peak_bytes": _growth(subject)}


def print_memory(subject: Subject, device: str) -> None:
    """Measure one subject, as the child process on the CPU does: its first run, and a later one."""
    growth = _growth(subject)  # what libraries and compilers need is in it
    print(json.dumps({**memory(subject, device), "growth_bytes": growth}))


def _growth(subject: Subject) -> int:
    """Return by how many bytes the process is larger while a subject runs than it was before."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew, from what is there now
    before = _resident("VmRSS")
    subject.whole()
    return _resident("VmHWM") - before


def lines_of(rows: list[Row], passes: dict[str, str], device: str) -> tuple[list[str], list[list[str]]]:
    """Return the headings and cells of a table of what `compare` measured.

    Args:
        rows: The results.
        passes: The heading of each pass.
        device: ``"cpu"`` or ``"cuda"``.
    """
    other = {"activation": "activation memory"} if device == "cuda" else {"growth": "memory of the first run"}
    memories = {"peak": "peak memory"} | other
    headings = ["variant", *passes.values(), *memories.values()]
    lines = []
    for row in rows:
        cells = [row["variant"]]
        for which in passes:
            cells.append("failed" if which in row["failures"] else reporting.spread(row.get(f"{which}_ratio")))
        for what in memories:
            size, ratio = row.get(f"{what}_bytes"), row.get(f"{what}_ratio")
            text = "failed" if "memory" in row["failures"] else "-"
            if size is not None:
                text = f"{size / 2**20:.1f} MB" + (f" {ratio:.3f}" if ratio is not None else "")
            cells.append(text)
        lines.append(cells)
    return headings, lines


def failures_of(rows: list[Row]) -> list[str]:
    """Return a line for each thing that failed."""
    return [f"{row['variant']}, {what}: {why}" for row in rows for what, why in row["failures"].items()]


def _times_in_turn(subjects: dict[str, Subject], repeats: int, device: str) -> dict[str, dict[str, _Timing]]:
    stopwatch = _CudaStopwatch() if device == "cuda" else _Stopwatch()
    timings = {
        name: {which: _Timing(f"{name}, {which}") for which in subject.passes} for name, subject in subjects.items()
    }
    for name, subject in subjects.items():
        say(f"{name}: warming up")
        for which, work in subject.passes.items():
            for _ in range(3):  # the first compiles, the second still allocates, the third tells how long launches take
                timing = timings[name][which]
                clocked = timing.clock(stopwatch, work, device)
                if clocked is None:
                    break
                timing.pause = clocked[1]
    told = time.monotonic()
    for repeat in range(repeats):
        for name, subject in subjects.items():
            for which, work in subject.passes.items():
                timing = timings[name][which]
                clocked = timing.clock(stopwatch, work, device)
                if clocked is not None:
                    timing.seconds.append(clocked[0])
                    timing.host_seconds.append(clocked[1])
        if time.monotonic() - told > 10:
            say(f"repeat {repeat + 1} of {repeats}")
            told = time.monotonic()
    return timings


def attempt(measure: Callable[[], Any], device: str) -> tuple[Any, str]:
    """Return what was measured and empty text, or None and why it could not be."""
    try:
        return measure(), ""
    except Exception as error:
        failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    # Only here is the error gone, and with it the tensors of all the frames that it went through.
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return None, failure


class _Stopwatch:
    def clock(self, work: Callable[[], Any], pause: float) -> tuple[float, float]:
        """Return the seconds that some work takes, and those that the host spends on it."""
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        return seconds, seconds


class _CudaStopwatch(_Stopwatch):
    def __init__(self) -> None:
        self.cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(self, work: Callable[[], Any], pause: float) -> tuple[float, float]:
        self.cache.zero_()
        torch.cuda.synchronize()
        # Half as long again, so that the device never waits for the host; work that makes the host wait is not helped.
        torch.cuda._sleep(int(1.5 * min(pause, _LONGEST_PAUSE) * _CYCLES_A_SECOND) + 1)
        self.start.record()
        start = time.perf_counter()
        work()
        host_seconds = time.perf_counter() - start
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end) / 1e3, host_seconds


@contextlib.contextmanager
def _busy_processes(number: int) -> Iterator[None]:
    """Have other processes compute meanwhile, each on one core, as data loaders do."""
    # They end by themselves too, if this process is killed.
    code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**5))"
    children = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(number)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def _memory_of(
    options: argparse.Namespace, name: str, subject: Subject, overrides: tuple[str, ...]
) -> tuple[dict[str, int] | None, str]:
    """Return what `memory` measures and empty text, or None and why it could not be measured."""
    say(f"{name}: memory")
    if options.device == "cuda":
        return attempt(functools.partial(memory, subject, options.device), options.device)
    # A process of its own, as other variants leave memory behind that would be used again. glibc gives what was
    # allocated in one piece back to the system, so that a second run needs it anew, if this threshold is fixed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, "-m", "benchmarks", *options.command_line, *overrides, "--memory-of", name]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        last_line = child.stderr.strip().rpartition("\n")[2]
        return None, f"its process ended with {child.returncode}: {last_line}"
    return json.loads(child.stdout.splitlines()[-1]), ""


def _resident(which: str) -> int:
    """Return the bytes of this process that are in memory (VmRSS), or were at most (VmHWM)."""
    (line,) = (text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(f"{which}:"))
    return int(line.split()[1]) * 1024
