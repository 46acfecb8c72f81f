"""In which order and where the runs of a comparison take place: here, side by side, or as jobs through submitit."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import SettingsError
from .runs import Process, Run, execute, start, stop

_PAUSE = 0.05


@dataclass(frozen=True)
class Ended:
    """A run that is over.

    Attributes:
        run: Which one.
        problem: What went wrong; empty: nothing.
    """

    run: Run
    problem: str


#: Yields each run when it has ended, and None every now and then meanwhile. Closing it ends what is under way.
Progress = Generator[Ended | None, None, None]


def read_gpus(text: str | None) -> list[str]:
    """Read ``--gpus``: GPUs by number or name, separated by commas; ``0+1`` gives a run two of them.

    Returns:
        The ``CUDA_VISIBLE_DEVICES`` of each place where a run can take place; none where nothing is said.

    Raises:
        SettingsError: An entry is empty, or stands there twice.
    """
    if text is None:
        return []
    groups = [group.strip() for group in text.split(",")]
    single = [gpu.strip() for group in groups for gpu in group.split("+")]
    if not all(single) or len(set(single)) < len(single):
        raise SettingsError(f"--gpus {text!r}: name each GPU once, as in 0,1,2,3, or 0+1,2+3 for two GPUs a run")
    return [",".join(gpu.strip() for gpu in group.split("+")) for group in groups]


def here(runs: Sequence[Run], jobs: int, gpus: Sequence[str], threads: int | None) -> Progress:
    """Run on this machine.

    Args:
        runs: What to run, in this order.
        jobs: How many at a time.
        gpus: What `read_gpus` returns; runs take turns on them.
        threads: Of each run; None: where several runs share the cores, their equal part.

    Returns:
        The progress.
    """
    waiting = list(reversed(runs))
    under_way: dict[int, Process] = {}
    if threads is None and jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, _cores() // jobs)
    try:
        while waiting or under_way:
            for place in range(jobs):
                if place not in under_way and waiting:
                    extra = {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}
                    extra |= {"OMP_NUM_THREADS": str(threads)} if threads is not None else {}
                    with _uninterrupted():
                        under_way[place] = start(waiting.pop(), extra)
            time.sleep(_PAUSE)
            for place, process in list(under_way.items()):
                if process.child.poll() is not None:
                    problem = process.end()
                    del under_way[place]
                    yield Ended(process.run, problem)
            yield None
    finally:
        for process in under_way.values():
            if process.child.poll() is not None:  # it has finished in time, and is not to be lost
                process.end()
        stop([process for process in under_way.values() if process.child.returncode is None])


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off what would interrupt, so that no process is started and then forgotten."""
    held: list[tuple[int, FrameType | None]] = []
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):
            handler = None if number is None else signal.getsignal(number)
            if number is not None and callable(handler):
                signal.signal(number, lambda *given: held.append(given))
                before[number] = handler
    except ValueError:  # not in the main thread, which alone is interrupted
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, frame in held[:1]:
        before[number](number, frame)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_parameters(text: str) -> dict[str, Any]:
    """Read ``--submitit``: ``name=value,...``, the parameters of a submitit executor, and ``cluster``.

    Raises:
        SettingsError: It is not of that form, or submitit is not installed.
    """
    if importlib.util.find_spec("submitit") is None:
        raise SettingsError("--submitit needs submitit, which is not installed: pip install 'lwpf_patch[compare]'")
    parameters: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name or not value:
            raise SettingsError(f"{item!r} in --submitit {text!r} is not of the form name=value")
        parameters[name] = int(value) if value.isdigit() else value
    return parameters


def submitted(
    runs: Sequence[Run], jobs: int | None, parameters: dict[str, Any], folder: Path, threads: int | None
) -> Progress:
    """Run as jobs through submitit: on SLURM, or with ``cluster=local`` as processes here.

    Args:
        runs: What to run.
        jobs: How many at a time; None: as many as the cluster gives.
        parameters: What `read_parameters` returns.
        folder: Where submitit keeps its files.
        threads: Of each run.

    Returns:
        The progress.

    Raises:
        SettingsError: submitit refuses the parameters, or finds no cluster.
    """
    import submitit

    options = dict(parameters)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=options.pop("cluster", "slurm"))
        if jobs is not None and executor.cluster == "slurm":
            options.setdefault("slurm_array_parallelism", jobs)
        executor.update_parameters(**options)
        extra = {"OMP_NUM_THREADS": str(threads)} if threads is not None else {}
        with executor.batch():
            waiting = {executor.submit(execute, run, extra): run for run in runs}
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise SettingsError(f"--submitit: {type(error).__name__}: {error}") from None
    try:
        while waiting:
            for job in [job for job in waiting if job.done()]:
                run = waiting.pop(job)
                lost = job.exception()
                yield Ended(run, f"job {job.job_id}: {str(lost).strip()}" if lost is not None else job.result())
            yield None
            time.sleep(1.0)
    finally:
        for job in waiting:
            job.cancel(check=False)
