"""The verb ``lwpf compare``: its options, and a comparison from the first run to the report.

What is heavy (scipy, matplotlib) is imported when it is needed: `lwpf run` reads this file, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import SettingsError

if TYPE_CHECKING:
    from types import FrameType

    from .metrics import Series
    from .report import Comparison
    from .runs import Run

#: Where the command has its verbs.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

EXTRA = "lwpf_patch[compare]"
MANIFEST = "comparison.json"
FAILED, INTERRUPTED = 1, 128
#: So many digits, all the same under two seeds, are no chance.
TELLING = 8
SEED_IGNORED = "the script ignores the seed"

DESCRIPTION = """\
Runs an unmodified script with several kinds of attention (arms) and several
seeds, and says which arm is better and how sure that is. Runs that have
finished are not repeated: after Ctrl-C, or with more arms or seeds, the same
command goes on.
"""
EPILOG = """\
arms:
  --arm plain                          the script as it is, unpatched
  --arm pfu:mu=dmedian,sigma=0.01      a func_d: the script under lwpf run
  --arm 'mine: --func-d relu --uhop on'   a label, and options of lwpf run
  --arm 'reg4: plain -- --model vit_...'   a label, unpatched; behind --, here
                                       or behind options of lwpf run: more
                                       arguments of the script
  An arm with U-Hop gets a control, 'LABEL (control)': the same parameters,
  which the task trains in the same way, but a Stage I that moves nothing. What
  the arm has over its control is what Stage I gives. (Where train=false the
  control is the arm without U-Hop.) Arms that differ in Stage I alone share
  one. --no-control leaves it out.

placeholders in the command, in --env and in the FILE of a metric:
  {seed}     the seed; it has to stand somewhere
  {output}   a folder of the run's own
  {arm}      the label, fit for a file name

metrics:
  'top-1: ([0-9.]+)'                   a regular expression over the output, the
                                       figure in parentheses; (?P<value>...) and
                                       (?P<step>...) name figure and step
  csv:FILE:COLUMN                      such as timm's summary.csv
  json:FILE:KEY  jsonl:FILE:KEY        a.b.c for nested keys; a list is a curve
  events:FOLDER:TAG                    TensorBoard (needs tensorboard)
  A FILE may be a pattern, {output}/*/summary.csv. Where a run has several
  values they are drawn as a curve, and --value says which of them counts.
  --better, --value and --name belong to the --metric before them.

times:
  The report has the mean time of a run, and how many times that of the
  baseline's run of the same seed it is, the median over the seeds. --time
  'trained for ([0-9.]+) s' or --time json:{output}/run.json:seconds leaves out
  what the script does besides.

report, in the output folder: runs.csv, report.md, report.json, curves.png; and
in runs/ the log of each run. Exit code: 0; 1 if a run failed; 2 for a wrong
request; 130 after Ctrl-C.

examples:
  lwpf compare --arm plain --arm relu --seeds 5 --metric 'top-1: ([0-9.]+)' \\
      -- python train.py --seed {seed}
  lwpf compare --arm plain --arm relu --arm pfu --seeds 5 --jobs 2 \\
      --metric 'csv:{output}/*/summary.csv:eval_top1' --value best \\
      --metric 'csv:{output}/*/summary.csv:eval_loss' --better lower \\
      -- python train.py --seed {seed} --output {output} --model vit_tiny_patch16_224 ...
  lwpf compare --arm plain --arm 'uhop: --uhop iters=100,every=500' \\
      --seeds 0-9 --gpus 0,1,2,3 --metric 'acc ([0-9.]+)' -- -m mylab.train --seed {seed}
  lwpf compare --arm plain --arm relu --seeds 20 --metric 'acc ([0-9.]+)' \\
      --submitit slurm_partition=gpu,gpus_per_node=1,timeout_min=240 \\
      -- python train.py --seed {seed}
"""


class _InOrder(argparse.Action):
    """Keeps what is said of metrics in its order: an option belongs to the metric before it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.figures = [*namespace.figures, (self.dest, values)]


def add_parser(commands: Subparsers, run: argparse.ArgumentParser, require_hook: Callable[[], None]) -> None:
    """Add the verb.

    Args:
        commands: The verbs of ``lwpf``.
        run: The parser of ``lwpf run``, which reads the options of arms.
        require_hook: Raises where ``lwpf run`` would have no effect.
    """
    parser = commands.add_parser(
        "compare",
        usage="lwpf compare --arm ARM --arm ARM --metric METRIC [options] -- python script.py --seed {seed} ...",
        help="run a script with several kinds of attention and seeds, and say which is better",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arm", action="append", default=[], metavar="ARM", help="what is compared; twice or more")
    parser.add_argument("--baseline", metavar="LABEL", help="what the others are compared with (default: plain, or "
                        "else the first arm)")  # fmt: skip
    parser.add_argument("--no-control", action="store_true", help="no control for arms with U-Hop")
    parser.add_argument("--patch", default="timm", metavar="HOSTS", help="hosts to patch in the arms that do not say "
                        "it themselves (default: timm)")  # fmt: skip
    parser.add_argument("--seeds", default="5", metavar="N", help="how many, from 0 on, or which: 0,1,7 or 10-19 "
                        "(default: 5)")  # fmt: skip
    parser.add_argument("--metric", action=_InOrder, metavar="METRIC", help="a figure of merit; the verdicts are "
                        "spelt out for the first")  # fmt: skip
    parser.add_argument("--better", action=_InOrder, metavar="higher|lower", help="which direction is good (default: "
                        "higher; has to be said of what is called a loss or an error)")  # fmt: skip
    parser.add_argument("--value", action=_InOrder, metavar="last|best|first|mean|N", help="which value of a run "
                        "counts: the last, best, first, their mean, or that at step N (default: last)")  # fmt: skip
    parser.add_argument("--name", action=_InOrder, metavar="TEXT", help="what the report calls it")
    parser.add_argument("--time", metavar="METRIC", help="the seconds that a run took, as it says itself (default: "
                        "from the start to the end of its process)")  # fmt: skip
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable for the runs")
    parser.add_argument("--in-output", action="store_true", help="each run works in its own {output}, for scripts that "
                        "write to where they are; write the paths of data in full")  # fmt: skip
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: 1, or one for each of --gpus)")
    parser.add_argument("--gpus", metavar="LIST", help="GPUs that runs take turns on, as in 0,1,2,3; 0+1,2+3 gives "
                        "each run two")  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="OMP_NUM_THREADS of each run (default: the script's "
                        "own, or with --jobs an equal part of the cores)")  # fmt: skip
    parser.add_argument("--submitit", metavar="OPTIONS", help="run as jobs of SLURM, through submitit: parameters of "
                        "its executor, as in slurm_partition=gpu,gpus_per_node=1; the output folder must be one that "
                        "all machines see. cluster=local: a try on this machine")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("comparison"), metavar="DIR", help="where runs and report "
                        "go (default: %(default)s)")  # fmt: skip
    parser.add_argument("--report-only", action="store_true", help="run nothing; report on what has finished so far")
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="-- command", help="the script as it is run by "
                        "hand, without lwpf run: python script.py ..., or python -m module ...")  # fmt: skip
    parser.set_defaults(figures=[], command=lambda options: _compare(options, run, require_hook))


def _compare(options: argparse.Namespace, run: argparse.ArgumentParser, require_hook: Callable[[], None]) -> int:
    started = time.monotonic()
    comparison, parameters, gpus = _settle(options, run, require_hook)
    with _output_folder(options.output, comparison, options.report_only) as folder, _terminated_is_interrupted():
        session = _Session(comparison, sys.stderr.isatty())
        try:
            _go(session, options, parameters, gpus, folder)
        except KeyboardInterrupt as interrupt:
            number = interrupt.args[0] if interrupt.args else signal.SIGINT
            done = len(comparison.series)
            session.say(
                f"interrupted: {done} of {len(comparison.runs)} runs have finished, and are kept; the same command "
                "goes on with the rest, and --report-only shows what there is"
            )
            return INTERRUPTED + int(number)
        finally:
            session.close()
        if not comparison.series:
            session.say(f"no run has finished: there is nothing to report. Logs are in {folder / 'runs'}")
            return FAILED
        _note_equals(comparison)
        _note_commits(comparison)
        from . import files, report

        paths = [os.path.relpath(path) for path in files.write(comparison, folder)]
    code = FAILED if comparison.problems else 0
    with contextlib.suppress(BrokenPipeError):  # a reader that has left, as in `| head`, changes no result
        print(report.terminal(comparison))
        print(f"\nWrote {', '.join(paths)} ({_duration(time.monotonic() - started)})", flush=True)
        return code
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _settle(
    options: argparse.Namespace, run: argparse.ArgumentParser, require_hook: Callable[[], None]
) -> tuple[Comparison, dict[str, Any] | None, list[str]]:
    """Check the request as a whole, before anything is run.

    Returns:
        The comparison without its results, the parameters of submitit, and the GPUs.
    """
    from ..settings import OTHER_VARIABLES
    from . import metrics, scheduling
    from .arms import PLAIN, read_arms
    from .report import Comparison
    from .runs import plan_run, read_command

    ours = [n for n, v in os.environ.items() if n.startswith("LWPF_") and v.strip() and n not in OTHER_VARIABLES]
    if ours:
        raise SettingsError(
            f"{', '.join(ours)} is set, and would reach no run: an arm says itself how it is patched. Write it into "
            "the arms, as in --arm 'label: --masking paper', and unset it"
        )
    words = options.script[1:] if options.script[:1] == ["--"] else options.script
    command = read_command(words, options.env, options.in_output)
    figures = metrics.settle(metrics.read_metrics(options.figures), options.in_output)
    time_taken = metrics.read_time(options.time, options.in_output)
    arms = read_arms(options.arm, run, options.patch, not options.no_control)
    labels = [arm.label for arm in arms]
    baseline = options.baseline or (PLAIN if PLAIN in labels else labels[0])
    if baseline not in labels:
        raise SettingsError(f"--baseline {baseline!r} is none of the arms: {', '.join(labels)}")
    for name in ("jobs", "threads"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise SettingsError(f"--{name} {number} is not at least 1")
    gpus = scheduling.read_gpus(options.gpus)
    if options.submitit is not None and gpus:
        raise SettingsError("--gpus is for this machine; with --submitit write gpus_per_node=1 into its options")
    parameters = scheduling.read_parameters(options.submitit) if options.submitit is not None else None
    seeds = _read_seeds(options.seeds)
    _require_extra()
    if any(arm.options is not None for arm in arms):
        require_hook()
    hashes: dict[str, str] = {}
    folder = options.output.absolute() / "runs"
    # All arms of a seed come before the next seed: pairs are complete early, and what disturbs the machine meanwhile
    # disturbs them all.
    runs = {(arm.label, seed): plan_run(command, arm, seed, folder, hashes) for seed in seeds for arm in arms}
    return Comparison(command, arms, seeds, figures, baseline, runs, time_taken), parameters, gpus


def _require_extra() -> None:
    import importlib.util

    missing = [name for name in ("scipy", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"lwpf compare needs {' and '.join(missing)}: pip install '{EXTRA}'")


def _read_seeds(text: str) -> list[int]:
    """Read ``--seeds``: a number of them, or which."""
    try:
        if text.strip().isdigit():
            seeds = list(range(int(text)))
        else:
            seeds = []
            for part in filter(None, (part.strip() for part in text.split(","))):
                first, dash, last = part.partition("-")
                seeds += range(int(first), int(last) + 1) if dash else [int(part)]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise SettingsError(f"--seeds {text!r}: write how many, as in 5, or which, each once, as in 0,1,7 or 10-19")
    return seeds


@contextlib.contextmanager
def _output_folder(path: Path, comparison: Comparison, report_only: bool) -> Iterator[Path]:
    """Make the output folder, check that it is this comparison's, and hold it.

    Raises:
        SettingsError: There is to be a comparison in it, and it is not there.
        SettingsError: It cannot be written to, holds a comparison of another command, or another process is at it.
    """
    if report_only and not path.is_dir():
        raise SettingsError(f"--report-only: there is no comparison in {path}, which --output names")
    try:
        folder = path.absolute()
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise SettingsError(f"--output {path} cannot be written to: {error}") from None
    with lock:
        if not _locked(lock):
            raise SettingsError(f"another lwpf compare is at work in {path}: wait for it, or give another --output")
        _check_manifest(path, str(comparison.command))
        yield folder


def _check_manifest(path: Path, command: str) -> None:
    """Check that a folder holds no finished run of another command, and note the command in it."""
    manifest = path / MANIFEST
    try:
        before = json.loads(manifest.read_text(encoding="utf-8"))["command"] if manifest.exists() else command
        finished = before != command and any(
            not json.loads(result.read_text(encoding="utf-8"))["problem"] for result in path.glob("runs/*/run.json")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} is damaged ({error!r}): delete it, or give another --output") from None
    if finished:
        raise SettingsError(
            f"{path} holds a comparison of another command; it was\n  {before}\nand is now\n  {command}\nGive another "
            "--output, or delete this one"
        )
    manifest.write_text(json.dumps({"command": command}, indent=2) + "\n", encoding="utf-8")


def _locked(file: Any) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Make SIGTERM and a lost terminal end the runs as Ctrl-C does, and not leave them behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows knows no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            with contextlib.suppress(ValueError):  # not in the main thread
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Session:
    """A comparison while its runs come in: reads their figures, tells people, and notices what cannot be right."""

    def __init__(self, comparison: Comparison, terminal: bool) -> None:
        self.comparison = comparison
        self._times: list[float] = []
        self._told: set[str] = set()
        self._bar: Any = None
        if terminal:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(total=len(comparison.runs), unit="run", bar_format="{l_bar}{bar}| {n}/{total} runs "
                                 "[{elapsed}{postfix}]")  # fmt: skip

    def say(self, text: str) -> None:
        """Tell people something, above the bar if there is one."""
        line = f"lwpf compare: {text}"
        with contextlib.suppress(OSError):  # a reader that has left, or a full disk, ends no run
            if self._bar is not None:
                self._bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def tick(self) -> None:
        """Show that time passes."""
        if self._bar is not None:
            self._bar.refresh()

    def take(self, run: Run, problem: str, slots: int, fresh: bool = True) -> None:
        """Take in a run that is over.

        Args:
            run: The run.
            problem: What went wrong; empty: nothing.
            slots: How many runs take place at a time.
            fresh: Whether it ended just now, and not before this comparison began.

        Raises:
            SettingsError: It ended well, has no such figure, and no run before it had; or the seed changes nothing.
        """
        comparison, place = self.comparison, (run.arm, run.seed)
        record = run.ended()
        if record is not None:
            comparison.records[place] = record
        series: dict[str, Series] = {}
        seconds = record["seconds"] if record is not None else None
        if not problem:
            from .metrics import MetricError

            try:
                series, said = self.read(run)
                seconds = seconds if said is None else said
            except MetricError as error:
                if not comparison.series:
                    raise SettingsError(f"{run.name}, has finished, but {error}{_tail(run)}") from None
                problem = str(error)
        if fresh:
            self._check_files(run)
        if problem:
            comparison.problems[place] = problem
            self.say(f"{self._count()} {run.name}: FAILED: {problem}{_tail(run)}")
        else:
            comparison.series[place] = series
            if seconds is not None:
                comparison.seconds[place] = seconds
            if record is not None:
                self._times.append(record["seconds"])
            self._messages(run)
            if fresh:
                figures = ", ".join(f"{m.name} {m.choose(series[m.name]):g}" for m in comparison.metrics)
                took = f" ({_duration(record['seconds'])})" if record else ""
                self.say(f"{self._count()} {run.name}: {figures}{took}{self._left(slots)}")
            self._check_seed(run, fresh)
            self._check_arm(run)
        if self._bar is not None:
            self._bar.set_postfix_str(self._left(slots).lstrip("; "), refresh=False)
            self._bar.update()

    def read(self, run: Run) -> tuple[dict[str, Series], float | None]:
        """Return what a run that ended well has of each metric, and the seconds that it says it took.

        Raises:
            MetricError: It lacks a figure.
        """
        comparison = self.comparison
        series = {metric.name: metric.read(run) for metric in comparison.metrics}
        return series, None if comparison.time is None else comparison.time.choose(comparison.time.read(run))

    def _count(self) -> str:
        done = len(self.comparison.series) + len(self.comparison.problems)
        return f"[{done}/{len(self.comparison.runs)}]"

    def _left(self, slots: int) -> str:
        left = len(self.comparison.runs) - len(self.comparison.series) - len(self.comparison.problems)
        if not left or not self._times:
            return ""
        rounds = -(-left // slots)
        return f"; about {_duration(rounds * sum(self._times) / len(self._times))} left"

    def _messages(self, run: Run) -> None:
        """Pass on what lwpf_patch said in the first run of an arm."""
        from .runs import IDLE, OURS, said

        if run.arm in self.comparison.said:
            return
        (arm,) = (each for each in self.comparison.arms if each.label == run.arm)
        self.comparison.said[run.arm] = [line for line in said(run) if not (arm.control_of and IDLE in line)]
        for line in self.comparison.said[run.arm]:
            if line not in self._told:
                self._told.add(line)
                self.say(f"{run.arm}: {line.removeprefix(OURS)}")

    def _check_seed(self, run: Run, fresh: bool) -> None:
        """Notice that a script ignores the seed, as soon as an arm has two."""
        from .statistics import ignored_seed

        places = [place for place in self.comparison.series if place[0] == run.arm]
        if len(places) != 2:
            return
        alike = ignored_seed([{n: s.values for n, s in self.comparison.series[place].items()} for place in places])
        seeds = " and ".join(str(seed) for _, seed in places)
        if alike >= TELLING and fresh and SEED_IGNORED not in self._told:
            raise SettingsError(
                f"seeds {seeds} of {run.arm} give the same figures throughout ({alike} digits): {SEED_IGNORED}. "
                "Without it there is nothing to tell an effect from chance by; check what it does with "
                f"{{seed}}, and that it seeds its data and its model. The logs are in {run.folder.parent}. If it is "
                "chance, the same command goes on"
            )
        if alike >= TELLING:
            self._told.add(SEED_IGNORED)  # said once, it holds nobody up
        if alike:
            self.say(f"WARNING: seeds {seeds} of {run.arm} give the same figures: does the script use the seed?")

    def _check_files(self, run: Run) -> None:
        """Notice that a file that the command names is not what it was when this comparison began."""
        for name in run.changed():
            key = f"changed {name}"
            if key in self._told:
                continue
            self._told.add(key)
            note = (
                f"{name}, which the command names, has changed or appeared meanwhile: runs of this comparison may "
                "differ in it, and the next call repeats them. What a script writes belongs into {output}"
            )
            self.comparison.notes.append(note)
            self.say(f"WARNING: {note}")

    def _check_arm(self, run: Run) -> None:
        """Notice that patching changes nothing, as soon as an arm and its baseline have a seed."""
        series, baseline = self.comparison.series, self.comparison.baseline
        if (baseline, run.seed) not in series:
            return
        for (arm, seed), found in list(series.items()):
            key = f"equal {arm}"
            if seed == run.seed and arm != baseline and run.arm in (arm, baseline) and key not in self._told:
                self._told.add(key)  # the first seed of each arm tells
                if all(str(found[name].values) == str(series[baseline, seed][name].values) for name in found):
                    self.say(
                        f"WARNING: {arm} gives exactly the figures of {baseline} at seed {seed}: does what it changes "
                        "have a part in them?"
                    )


def _go(
    session: _Session, options: argparse.Namespace, parameters: dict[str, Any] | None, gpus: list[str], folder: Path
) -> None:
    """Take in the runs that have finished before, and run the others."""
    from . import scheduling

    comparison = session.comparison
    every = list(comparison.runs.values())
    finished, lacking = _finished(session, every)
    rest = [run for run in every if run not in finished]
    slots = options.jobs or len(gpus) or (len(rest) or 1 if parameters is not None else 1)
    seeds = len(comparison.seeds)
    kept = f"; {len(finished)} have finished before" if finished else ""
    session.say(
        f"{len(comparison.arms)} arms x {seeds} seed{'s' * (seeds != 1)} = {len(every)} runs{kept}; by {sys.executable}"
    )
    stale = sum(1 for path in (folder / "runs").iterdir() if path.is_dir() and path not in {r.folder for r in every})
    if stale:
        session.say(
            f"{stale} runs in {folder / 'runs'} are not used: of other arms or seeds, or from before the script, a "
            "file that the command names, or a version changed"
        )
    if lacking and not options.report_only:
        session.say(f"repeated, since they ended well and lack a figure: {'; '.join(lacking)}")
    for run in finished:
        session.take(run, "", slots, fresh=False)
    if options.report_only:
        for run in rest:
            record = run.ended()
            if record is not None:
                session.take(run, record["problem"] or lacking[run.name], slots, fresh=False)
        return
    if not rest:
        return
    if parameters is not None:
        progress = scheduling.submitted(rest, options.jobs, parameters, folder / "submitit", options.threads)
    else:
        progress = scheduling.here(rest, slots, gpus, options.threads)
    shown = time.monotonic()
    with contextlib.closing(progress):  # whatever happens, no run is left behind
        for ended in progress:
            if ended is not None:
                session.take(ended.run, ended.problem, slots)
            elif time.monotonic() - shown > 1:
                shown = time.monotonic()
                session.tick()


def _finished(session: _Session, every: list[Run]) -> tuple[list[Run], dict[str, str]]:
    """Return the runs that have ended well before and have their figures, and what the others that ended well lack.

    Raises:
        SettingsError: None has its figures, so that the metrics are at fault.
    """
    from .metrics import MetricError

    finished: list[Run] = []
    lacking: dict[str, str] = {}
    first = None
    for run in every:
        if run.finished():
            try:
                session.read(run)
                finished.append(run)
            except MetricError as error:
                lacking[run.name] = str(error)
                first = first or run
    if first is not None and not finished:
        raise SettingsError(f"{first.name}, has finished, but {lacking[first.name]}{_tail(first)}")
    return finished, lacking


def _note_equals(comparison: Comparison) -> None:
    """Note the arms whose figures do not depend on the seed: statistics over seeds mean nothing then."""
    for arm in comparison.arms:
        for metric in comparison.metrics:
            figures = comparison.figures(arm.label, metric)
            if len(figures) > 1 and len({str(value) for value in figures.values()}) == 1:
                comparison.notes.append(
                    f"{metric.name} of {arm.label} is the same at all {len(figures)} seeds: either the script ignores "
                    "the seed, and the intervals mean nothing, or the figure is too coarse"
                )


def _note_commits(comparison: Comparison) -> None:
    """Note that runs were made of several commits: what the script imports is not looked at one by one."""
    arms: dict[str, set[str]] = {}
    for (arm, seed), record in comparison.records.items():
        if (arm, seed) in comparison.series and record.get("commit"):
            arms.setdefault(record["commit"], set()).add(arm)
    if len(arms) > 1:
        which = "; ".join(f"{commit}: {', '.join(sorted(labels))}" for commit, labels in sorted(arms.items()))
        comparison.notes.append(f"the runs are of several commits, of which none was repeated: {which}")


def _tail(run: Run) -> str:
    """Return where a run's log is, and its end."""
    from .runs import read_log

    try:
        lines = [_cut(line) for line in read_log(run.log).rstrip().split("\n")[-8:]]
    except OSError:
        return f"; it left no log in {run.folder}"
    return "\n".join([f"; the end of {run.log}:", *(f"  | {line}" for line in lines)])


def _cut(line: str) -> str:
    return line if len(line) <= 300 else f"{line[:300]}..."


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
