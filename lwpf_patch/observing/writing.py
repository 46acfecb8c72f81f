"""Where the figures go: a file of JSON lines, the log, TensorBoard; and the warning of layers that are dead."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from .. import reporting
from ..specs import Observe

#: The log gets a line at most once in so many seconds.
SECONDS = 30.0
#: A layer is dead that forgets every row in so many training samples, one after the other.
DEAD = 50
NAMES = ("forgotten", "empty_rows", "entropy", "forgotten_weight")
#: How a line of the log begins that has the means of a sample.
SAMPLE = re.compile(r"step \d+(, evaluation)?: forgotten ")

Record = dict[str, Any]


class Writer:
    """Writes records.

    Args:
        asked: What was asked for; its path is an absolute one, or None.

    Attributes:
        problem: Why nothing could be written; empty: it could.
    """

    def __init__(self, asked: Observe) -> None:
        self.asked = asked
        self.problem = ""
        self._process = 0
        self._said = -SECONDS
        self._rows_empty: dict[tuple[str, str], int] = {}
        self._not_numbers: set[tuple[str, str]] = set()
        self._board: Any = None

    def takes_part(self) -> bool:
        """Return whether this process writes: the first of all ranks does, and processes that have no rank."""
        return _rank() == 0

    def path(self) -> Path | None:
        """Return the file: a process that multiprocessing has started, and that has no rank, has one of its own."""
        if self.asked.path is None:
            return None
        path = Path(self.asked.path)
        multiprocessing = sys.modules.get("multiprocessing")
        is_child = multiprocessing is not None and multiprocessing.parent_process() is not None
        if is_child and not _is_distributed():
            return path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")
        return path

    def write(self, records: list[Record]) -> None:
        """Write the records of one step; in the file they are whole lines, whatever happens next."""
        if self._process != os.getpid():  # the first ones, or those of a process that was forked
            self._begin()
        self._to_file(records)
        self._to_board(records)
        self._to_log(records)
        self._look_for_dead(records)
        self._look_for_nan(records)

    def close(self) -> None:
        """End what is open."""
        if self._board is not None and self._process == os.getpid():
            with contextlib.suppress(OSError):  # all that was to be written is
                self._board.close()
        self._board = None

    def _begin(self) -> None:
        self._process = os.getpid()
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._to_file([{"lwpf_patch": _version(), "observe": str(self.asked), "time": now, "pid": os.getpid()}])
        self._board = self._open_board()

    def _to_file(self, lines: list[Record]) -> None:
        path = self.path()
        if path is None:
            return
        text = "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines)
        try:
            cut_off = _is_cut_off(path)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"\n{text}" if cut_off else text)
        except OSError as error:
            if not self.problem:
                reporting.warn(f"observe: {path} cannot be written ({error}); what is found is not kept")
            self.problem = str(error)

    def _to_log(self, records: list[Record]) -> None:
        now = time.monotonic()
        if now - self._said < SECONDS:
            return
        self._said = now
        path = self.path()
        shown = [f"{name.replace('_', ' ')} {_shown(_means(records, name))}" for name in NAMES]
        when = f"step {records[0]['step']}" + ("" if records[0]["training"] else ", evaluation")
        reporting.info(
            f"{when}: {', '.join(shown)} (means of {len(records)} layers of {records[0]['model']}"
            + (f"; {path})" if path else ")")
        )

    def _look_for_dead(self, records: list[Record]) -> None:
        dead = []
        for record in records:
            if not record["training"]:
                continue
            layer = record["model"], record["layer"]
            # Of scores that are NaN none is kept either.
            is_empty = all(share == 1.0 for share in record["empty_rows"]) and None not in record["forgotten_weight"]
            self._rows_empty[layer] = self._rows_empty.get(layer, 0) + 1 if is_empty else 0
            if self._rows_empty[layer] == DEAD:
                dead.append(record["layer"])
        if dead:
            reporting.warn(
                f"observe: {', '.join(dead)} of {records[0]['model']} forgot every key of every row in the last {DEAD} "
                "training steps that were looked at: a layer in this state gives 0, and its scores get no gradient. "
                "Remedies: func_d 'relu:empty_rows=keep' or 'pfu', or another seed"
            )

    def _look_for_nan(self, records: list[Record]) -> None:
        new = []
        for record in records:
            layer = record["model"], record["layer"]
            broken = [
                weight is None and share is not None
                for weight, share in zip(record["forgotten_weight"], record["empty_rows"], strict=True)
            ]
            if any(broken) and layer not in self._not_numbers:
                self._not_numbers.add(layer)
                new.append(record["layer"])
        if new:
            reporting.warn(
                f"observe: the attention weights of {', '.join(new)} of {records[0]['model']} are NaN at step "
                f"{records[0]['step']}: it has scores that are NaN or infinite"
            )

    # --- TensorBoard ---

    def _open_board(self) -> Any:
        path = self.path()
        if path is None or not self.asked.tensorboard:
            return None
        try:
            from .board import Board
        except Exception as error:  # it is not installed; or else its protobuf does not fit, or it has changed
            if importlib.util.find_spec("tensorboard") is not None:
                self._miss_board("TensorBoard's file", error)
            return None
        folder = path.with_suffix(".tensorboard")
        try:
            return Board(folder)
        except Exception as error:
            self._miss_board(folder, error)
            return None

    def _to_board(self, records: list[Record]) -> None:
        if self._board is None:
            return
        values = {
            f"{'' if record['training'] else 'evaluation/'}{name}/{record['model']}/{record['layer']}": mean
            for record in records
            for name in NAMES
            if (mean := _mean(record[name])) is not None
        }
        try:
            self._board.add(values, records[0]["step"])
        except Exception as error:
            self.close()
            self._miss_board("TensorBoard's file", error)

    def _miss_board(self, what: object, error: Exception) -> None:
        if not self.problem:  # else the same was said of the file
            reporting.warn(f"observe: {what} cannot be written ({error}); TensorBoard gets nothing any more")


def _is_cut_off(path: Path) -> bool:
    """Return whether the last line of a file has no end: the process died that wrote it, or the disk was full."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _version() -> str:
    # An import of the package would be one of what lies above.
    return str(vars(sys.modules[__name__.partition(".")[0]])["__version__"])


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def _means(records: list[Record], name: str) -> float | None:
    return _mean([_mean(record[name]) for record in records])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _is_distributed() -> bool:
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _rank() -> int:
    """Return the number of this process among all of one training."""
    if _is_distributed():
        distributed: Any = sys.modules["torch.distributed"]
        return int(distributed.get_rank())
    return int(any(os.environ.get(variable, "").strip() not in ("", "0") for variable in reporting.RANKS))


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Return the records of the last process that has written to a file; lines that were cut off are left out."""
    lines = []
    for number, text in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text) if text else {}
        except ValueError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            reporting.warn(f"observe: line {number} of {path} was cut off, and is left out")
    starts = [number for number, line in enumerate(lines) if "lwpf_patch" in line]
    return [line for line in lines[starts[-1] if starts else 0 :] if "layer" in line]
