"""One run of a script: its command, environment, log and result, and whether it is there already."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..observing.writing import SAMPLE
from .arms import Arm
from .provenance import commit_of, named_paths, sources, versions

SEED, OUTPUT, ARM = PLACEHOLDERS = ("{seed}", "{output}", "{arm}")
#: What the process of a patched run says when it ends and what was asked for had no part in it.
WITHOUT_EFFECT = ("nothing ran with partial forgetting", "but Stage I never ran")
#: What Stage I warns of when it moves nothing, which is what a control is for.
IDLE = "it separated nothing"
#: How the lines begin that are lwpf_patch's.
OURS = "lwpf_patch: "
#: Seconds that a run has to end by itself, once it is asked to.
GRACE = 10.0


@dataclass(frozen=True)
class Command:
    """The command of a script, as it is run from arm to arm.

    Attributes:
        flags: Those of the interpreter.
        module: Whether the target is a module, as in ``python -m``.
        words: The script or module, and its arguments; with placeholders.
        variables: Environment variables besides the caller's, with placeholders.
        in_output: Whether each run works in its own ``{output}``, or else where the caller is.
    """

    flags: tuple[str, ...]
    module: bool
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()
    in_output: bool = False

    def __str__(self) -> str:
        variables = [f"{name}={value}" for name, value in self.variables]
        text = " ".join(
            word if word in PLACEHOLDERS else shlex.quote(word)
            for word in [*variables, "python", *self.flags, *(["-m"] if self.module else []), *self.words]
        )
        return f"{text} (in {OUTPUT})" if self.in_output else text


@dataclass(frozen=True)
class Run:
    """One run: everything that is needed to start it, also on another machine.

    Attributes:
        arm: The label of its arm.
        seed: Its seed.
        key: The hash of all that its result depends on.
        folder: Its own, an absolute path: log, result, and ``output``.
        words: What is executed.
        variables: Environment variables besides the caller's.
        directory: Where it works.
        replaced: What stands for each placeholder.
        named: The paths that its command may name, by the words that do.
        files: The hashes of those that were files when it was planned; part of the key.
    """

    arm: str
    seed: int
    key: str
    folder: Path
    words: tuple[str, ...]
    variables: dict[str, str]
    directory: Path
    replaced: dict[str, str]
    named: dict[str, Path] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def log(self) -> Path:
        """The file with all that it wrote to stdout and stderr."""
        return self.folder / "log.txt"

    @property
    def result(self) -> Path:
        """The file that is there when it has ended by itself."""
        return self.folder / "run.json"

    def fill(self, text: str) -> str:
        """Return text with its placeholders replaced."""
        return _fill(text, self.replaced)

    def ended(self) -> dict[str, Any] | None:
        """Return what is known of this run if it has ended before, well or not."""
        try:
            found: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("key") == self.key else None

    def finished(self) -> bool:
        """Return whether it has ended well, and need not be repeated."""
        found = self.ended()
        return found is not None and not found["problem"]

    def changed(self) -> list[str]:
        """Return which files that its command names have appeared or changed since it was planned."""
        now = sources(self.named, {})
        return [name for name, value in now.items() if value != self.files.get(name)]


def read_command(words: Sequence[str], variables: Iterable[str], in_output: bool) -> Command:
    """Read the command behind ``--``.

    Args:
        words: ``[python [flags]] script [arguments]``, or with ``-m module``.
        variables: ``NAME=VALUE`` each.
        in_output: As in :class:`Command`.

    Raises:
        SettingsError: It is none that this interpreter can run both patched and unpatched, the script is not there,
            or there is no place for the seed.
    """
    words = list(words)
    if words and (_is_python(words[0])):
        _require_this_interpreter(words.pop(0))
    flags: list[str] = []
    while words and words[0].startswith("-") and words[0] != "-m":
        flag = words.pop(0)
        if flag == "-" or flag.startswith(("-c", "-m")):
            raise SettingsError(f"the command cannot be patched with {flag!r}: write 'python script.py' or '-m module'")
        flags.append(flag)
        if flag in ("-W", "-X", "--check-hash-based-pycs") and words:
            flags.append(words.pop(0))
    module = words[:1] == ["-m"]
    words = words[module:]
    if not words:
        raise SettingsError("no command is given: write it behind --, as in -- python train.py --seed {seed}")
    if not module:
        _require_script(words[0])
        if in_output:
            words[0] = str(Path(words[0]).absolute())
    pairs = []
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not equals or not name or name.startswith("LWPF_"):
            raise SettingsError(f"--env {variable!r} is not of the form NAME=VALUE, or names a variable of lwpf_patch")
        pairs.append((name, value))
    if not any(SEED in text for text in [*words, *(value for _, value in pairs)]):
        raise SettingsError(
            f"the command has no place for the seed: write {SEED} where it belongs, as in --seed {SEED}, or give it as "
            f"a variable, --env NAME={SEED}. The command is: {shlex.join(words)}"
        )
    return Command(tuple(flags), module, tuple(words), tuple(pairs), in_output)


def _is_python(word: str) -> bool:
    return re.fullmatch(r"(python|pypy)[0-9.]*(\.exe)?", Path(word).name) is not None


def _require_this_interpreter(word: str) -> None:
    """Check that a word means the interpreter that lwpf_patch is installed in, which runs all arms."""
    # Not resolved: a virtual environment's python is a link to that of its base, and another one's may be as well.
    if os.sep in word and Path(word).absolute().parent != Path(sys.executable).parent:
        raise SettingsError(
            f"the command begins with {word}, but lwpf_patch is installed in {sys.executable}, which runs all arms: "
            "write 'python'"
        )


def _require_script(script: str) -> None:
    if Path(script).is_file() or any(placeholder in script for placeholder in PLACEHOLDERS):
        return
    if shutil.which(script) and os.sep not in script:
        raise SettingsError(
            f"{script!r} is a program and no Python script, so that it cannot be patched: write it as a module, as in "
            "-- python -m torch.distributed.run ... in place of torchrun"
        )
    raise SettingsError(f"there is no script {script!r} in {Path.cwd()}; write -m before the name of a module")


def plan_run(command: Command, arm: Arm, seed: int, folder: Path, hashes: dict[str, str]) -> Run:
    """Return a run of an arm.

    Args:
        command: The command.
        arm: The arm.
        seed: The seed.
        folder: Where the folders of all runs lie.
        hashes: Those of files that are known already, by path; others are added.
    """
    known = {SEED: str(seed), ARM: arm.slug}
    all_words = (*command.words, *arm.more)
    words = [_fill(word, known) for word in all_words]
    named = named_paths(words, command.module)
    files = sources(named, hashes)
    identity = {
        "command": [*command.flags, *(["-m"] if command.module else []), *words],
        "variables": {name: _fill(value, known) for name, value in command.variables},
        "in_output": command.in_output,
        "directory": None if command.in_output else os.getcwd(),
        "arm": [arm.label, arm.options],
        "seed": seed,
        "versions": dict(versions(patched=arm.options is not None)),
        "files": files,
        "sites": arm.sites,
    }
    text = json.dumps(identity, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    own = folder / f"{arm.slug}-seed{seed}-{key[:10]}"
    replaced = known | {OUTPUT: str(own / "output")}
    patched = ["-m", "lwpf_patch", "run", *arm.options] if arm.options is not None else []
    target = [*(["-m"] if command.module else []), *(_fill(word, replaced) for word in all_words)]
    return Run(
        arm.label,
        seed,
        key,
        own,
        (sys.executable, *command.flags, *patched, *target),
        _module_path(command) | {name: _fill(value, replaced) for name, value in command.variables},
        own / "output" if command.in_output else Path.cwd(),
        replaced,
        named,
        files,
    )


def _module_path(command: Command) -> dict[str, str]:
    """Return what has a run that works in its own folder find the module where the caller is."""
    if not (command.module and command.in_output):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))}


def _fill(text: str, replaced: Mapping[str, str]) -> str:
    for placeholder, value in replaced.items():
        text = text.replace(placeholder, value)
    return text


@dataclass
class Process:
    """A run that is under way.

    Attributes:
        run: Which one.
        child: Its process, the first of a group of its own.
        started: When, in seconds since the epoch.
        began: The same on a clock that nobody sets.
        extra: The variables that depend on where it runs.
    """

    run: Run
    child: subprocess.Popen[bytes]
    started: float
    began: float
    extra: dict[str, str] = field(default_factory=dict)

    def signal(self, number: int) -> None:
        """Send a signal to the process and to all that it has started."""
        try:
            os.killpg(self.child.pid, number)
        except (ProcessLookupError, PermissionError):
            return

    def end(self) -> str:
        """Write down how it ended.

        Returns:
            What went wrong; empty: nothing.
        """
        code = self.child.wait()
        problem = _problem(code) or _without_effect(self.run)
        record = {
            "key": self.run.key,
            "arm": self.run.arm,
            "seed": self.run.seed,
            "problem": problem,
            "exit_code": code,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.monotonic() - self.began, 3),
            "command": list(self.run.words),
            "variables": self.run.variables | self.extra,
            "machine": platform.node(),
            "commit": commit_of(next((path.parent for path in self.run.named.values()), Path.cwd())),
        }
        unfinished = self.run.result.with_suffix(".tmp")
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.run.result)  # it is there as a whole, or not at all
        return problem


def start(run: Run, extra: Mapping[str, str]) -> Process:
    """Start a run, in a folder where nothing is left of an earlier try.

    Args:
        run: The run.
        extra: The variables that depend on where it runs, such as the GPU.
    """
    shutil.rmtree(run.folder, ignore_errors=True)
    (run.folder / "output").mkdir(parents=True)
    # No setting of ours from outside: an arm says what it is, and "plain" is unpatched.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LWPF_")}
    # The log of a run that is killed shall hold what it said.
    environment = {**inherited, "PYTHONUNBUFFERED": "1", **extra, **run.variables}
    with run.log.open("wb") as log:
        # A group of its own: what interrupts us at the terminal is not to interrupt it, and it goes with its children.
        child = subprocess.Popen(
            run.words,
            env=environment,
            cwd=run.directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Process(run, child, time.time(), time.monotonic(), dict(extra))


def stop(processes: Sequence[Process]) -> None:
    """End runs that are under way: politely, and after a while not so."""
    for process in processes:
        process.signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    try:
        for process in processes:
            try:
                process.child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
    finally:  # also if the user asks a second time
        for process in processes:
            process.signal(signal.SIGKILL)  # workers that outlive the script, too
            process.child.wait()


def execute(run: Run, extra: Mapping[str, str]) -> str:
    """Start a run and wait for it, as a job elsewhere does.

    Returns:
        What went wrong; empty: nothing.
    """
    process = start(run, extra)
    try:
        process.child.wait()
    except BaseException:
        stop([process])
        raise
    return process.end()


def _problem(code: int) -> str:
    if not code:
        return ""
    if code > 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _without_effect(run: Run) -> str:
    """Return what the log says if a patched run is none: its figures are those of another arm."""
    return next((line for line in said(run) if any(words in line for words in WITHOUT_EFFECT)), "")


def said(run: Run) -> list[str]:
    """Return what lwpf_patch says in a run's log, line by line, but for the samples of ``--observe``: they are many."""
    # Not at the start of a line alone: what a script wrote before it may have ended without one.
    lines = [line[line.index(OURS) :] for line in read_log(run.log).split("\n") if OURS in line]
    return [line for line in lines if not SAMPLE.match(line, len(OURS))]


def said_by_script(run: Run) -> str:
    """Return a run's log without what lwpf_patch says in it."""
    return "\n".join(line.partition(OURS)[0] for line in read_log(run.log).split("\n"))


def read_log(path: Path) -> str:
    """Return a log as text: without colours, and what a progress bar overwrites on lines of its own."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n").replace("\r", "\n")
