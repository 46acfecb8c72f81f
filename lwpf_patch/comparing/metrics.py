"""A figure of merit: where a run has it, which direction is good, and which of several values counts."""

from __future__ import annotations

import csv
import glob
import importlib.util
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import SettingsError, unknown_value
from .runs import OUTPUT, Run, said_by_script

BETTER = ("higher", "lower")
#: A whole number besides: the value at this step.
VALUES = ("last", "best", "first", "mean")
#: What runs.csv has of a run besides its figures.
COLUMNS = ("arm", "seed", "state", "problem", "exit_code", "seconds", "started", "machine", "key", "log")
#: The columns and keys that count, in the order in which they are looked for.
STEPS = ("epoch", "step", "global_step", "iteration", "iter")
_LIKE_A_LOSS = re.compile(
    r"loss|error|perplexity|(?<![a-z])(err|ppl|nll|mse|rmse|mae|mape|fid|bpb|bpc|wer|cer|eer|lpips)(?![a-z])", re.I
)


class MetricError(SettingsError):
    """A run that ended well has no such figure."""


@dataclass(frozen=True)
class Series:
    """What one run has of a metric.

    Attributes:
        unit: What is counted: ``"epoch"`` or another of `STEPS`, or ``"order"`` where values are merely counted.
        steps: At which steps; rising.
        values: The figures there.
    """

    unit: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Metric:
    """A figure of merit.

    Attributes:
        text: As the user wrote it.
        name: What tables call it.
        source: ``"output"``, or one of `FILES`.
        key: The pattern, column, key or tag.
        file: Where, with placeholders; empty for the output.
        better: One of `BETTER`; empty: not said.
        value: One of `VALUES`, or the number of a step.
        option: The option that it was given by.
    """

    text: str
    name: str
    source: str
    key: str
    file: str = ""
    better: str = ""
    value: str = "last"
    option: str = "--metric"

    @property
    def origin(self) -> str:
        """What an error calls it."""
        return f"{self.option} {self.text!r}"

    @property
    def lower(self) -> bool:
        """Whether lower is better."""
        return self.better == "lower"

    def describe(self) -> str:
        """Return what a report has to say of it."""
        return f"{self.better} is better; {self.counted}"

    @property
    def counted(self) -> str:
        """Which value of a run counts, in words."""
        if self.value.isdigit():
            return f"value of a run at step {self.value}"
        return "mean over a run" if self.value == "mean" else f"{self.value} value of a run"

    def read(self, run: Run) -> Series:
        """Read what a run has of it.

        Raises:
            MetricError: It has none, or none at the step that counts.
        """
        where = str(run.log) if self.source == "output" else self._file(run)
        try:
            # What comes later at the same step replaces what came before, as after a restart.
            if self.source == "output":
                unit = "step" if "?P<step>" in self.key else ""
                values = dict(_from_output(self.key, said_by_script(run)))
            else:
                found, unit = FILES[self.source](where, self.key)
                values = dict(found)
        except (OSError, OverflowError, csv.Error) as error:
            raise MetricError(f"{self.origin} cannot be read from {where}: {error}") from None
        if not values:
            what = "matches nothing" if self.source == "output" else f"finds no {self.key!r}"
            raise MetricError(f"{self.origin} {what} in {where}{_hint(self, where)}")
        steps = sorted(values)
        if self.value.isdigit() and int(self.value) not in steps:
            raise MetricError(
                f"{self.origin} --value {self.value}: there is none at this step in {where}, but {len(steps)} from "
                f"{unit or 'value'} {steps[0]:g} to {steps[-1]:g}"
            )
        return Series(unit or "order", tuple(steps), tuple(values[step] for step in steps))

    def choose(self, series: Series) -> float:
        """Return the figure that counts."""
        if self.value.isdigit():
            return series.values[series.steps.index(int(self.value))]
        if self.value == "mean":
            return statistics.fmean(series.values)
        if self.value == "best":
            numbers = [value for value in series.values if not math.isnan(value)]
            return (min if self.lower else max)(numbers, default=math.nan)
        return series.values[0 if self.value == "first" else -1]

    def _file(self, run: Run) -> str:
        pattern = str(run.directory / run.fill(self.file))
        # The run's own folder may have characters in its name that mean something in a pattern.
        pattern = pattern.replace(str(run.folder), glob.escape(str(run.folder)))
        found = sorted(glob.glob(pattern, recursive=True))
        if len(found) != 1:
            which = f"several files: {', '.join(found[:4])}" if found else "no file"
            raise MetricError(f"{self.origin}: {run.fill(self.file)} is {which}")
        return found[0]


def read_metric(text: str, option: str = "--metric") -> Metric:
    """Read a metric as the command line has it.

    Args:
        text: A regular expression over the output, or ``"csv:FILE:COLUMN"``, ``"json:FILE:KEY"``,
            ``"jsonl:FILE:KEY"``, ``"events:FOLDER:TAG"``.
        option: The option that it was given by.

    Raises:
        SettingsError: It is none of these.
    """
    origin = f"{option} {text!r}"
    source, _, rest = text.partition(":")
    if source in FILES:
        file, _, key = rest.partition(":")
        if not file or not key:
            raise SettingsError(f"{origin} is not of the form {source}:FILE:NAME")
        return Metric(text, key, source, key, file, option=option)
    pattern = rest if source == "re" else text
    try:
        groups = re.compile(pattern, re.M)
    except re.error as error:
        raise SettingsError(f"{origin} is no regular expression: {error}") from None
    if groups.groups != 1 and "value" not in groups.groupindex:
        raise SettingsError(
            f"{origin} has {groups.groups} groups: put the figure, and nothing else, into parentheses, as in "
            "'top-1: ([0-9.]+)', or name it, as in '(?P<value>[0-9.]+)'"
        )
    name = re.sub(r"\(\?P<step>[^)]*\)|\\.|[^\w%@/ .-]", " ", re.split(r"\((?!\?P<step>)", pattern)[0])
    name = " ".join(name.split()).strip(" .-/") or pattern
    return Metric(text, name, "output", pattern, option=option)


def read_metrics(said: Iterable[tuple[str, str]]) -> list[Metric]:
    """Read what the command line says of metrics.

    Args:
        said: In its order, ``("metric", text)``, and of the metric before it ``("better", direction)``,
            ``("value", which)`` and ``("name", text)``.

    Raises:
        SettingsError: A text is no metric, a value is not allowed, or there is no metric before it.
    """
    metrics: list[Metric] = []
    for option, text in said:
        if option == "metric":
            metrics.append(read_metric(text))
            continue
        allowed = {"better": BETTER, "value": VALUES}.get(option)
        is_step = option == "value" and text.isdigit()
        if allowed is not None and text not in allowed and not is_step:
            raise unknown_value(option, text, f"--{option}", allowed)
        if not metrics:
            raise SettingsError(f"--{option} {text} belongs to the --metric before it, and there is none")
        metrics[-1] = replace(metrics[-1], **{option: text})
    return metrics


def read_time(text: str | None, in_output: bool) -> Metric | None:
    """Read ``--time``: where a run says how many seconds it took.

    Args:
        text: As for `read_metric`; None: nothing is said.
        in_output: Whether each run works in its own folder.

    Raises:
        SettingsError: As of `read_metric` and `settle`.
    """
    if text is None:
        return None
    return settle([replace(read_metric(text, "--time"), better="lower")], in_output)[0]


def settle(metrics: Iterable[Metric], in_output: bool) -> list[Metric]:
    """Check the metrics of a comparison, and fill in what was not said.

    Args:
        metrics: The metrics.
        in_output: Whether each run works in its own folder.

    Raises:
        SettingsError: There is none; two have one name, or one that is taken; the direction has to be said; the file
            is not in the folder of a run.
        SettingsError: What reads a file is not installed.
    """
    settled: list[Metric] = []
    for metric in metrics:
        if metric.name in COLUMNS and metric.option == "--metric":
            raise SettingsError(
                f"{metric.origin} is called {metric.name!r}, as a column of runs.csv is: give it another name, by "
                "--name behind --metric"
            )
        if metric.name in (other.name for other in settled):
            raise SettingsError(f"two metrics are called {metric.name!r}: tell them apart by --name behind --metric")
        if not metric.better and _LIKE_A_LOSS.search(metric.name):
            raise SettingsError(
                f"{metric.origin} looks like one of which lower is better: write --better lower behind it, or "
                "--better higher"
            )
        if metric.file and OUTPUT not in metric.file and not (in_output and not Path(metric.file).is_absolute()):
            raise SettingsError(
                f"{metric.origin}: runs would read one another's file, or that of an earlier one. Let the script write "
                f"to {OUTPUT}, the folder of a run, and name the file by it, as in "
                f"{metric.source}:{OUTPUT}/{Path(metric.file).name}:{metric.key}; a script that writes to where it is "
                "can be run there by --in-output"
            )
        if metric.source == "events" and importlib.util.find_spec("tensorboard") is None:
            raise SettingsError(
                f"{metric.origin} needs tensorboard, which is not installed: pip install 'lwpf_patch[compare]'"
            )
        settled.append(replace(metric, better=metric.better or "higher"))
    if not settled:
        raise SettingsError("no figure to compare is given: name it by --metric, as in --metric 'top-1: ([0-9.]+)'")
    return settled


_Found = Iterable[tuple[float, float]]


def _number(value: Any) -> float:
    """Return a value as a number.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or value is None:
        raise ValueError(value)
    # A pattern such as [0-9.]+ takes the full stop of a sentence with it.
    return float(value.strip().rstrip(".,;%")) if isinstance(value, str) else float(value)


def _from_output(pattern: str, text: str) -> Iterator[tuple[float, float]]:
    compiled = re.compile(pattern, re.M)
    group: str | int = "value" if "value" in compiled.groupindex else 1
    for order, match in enumerate(compiled.finditer(text), start=1):
        try:
            step = _number(match["step"]) if "step" in compiled.groupindex else order
            yield step, _number(match[group])
        except (ValueError, AttributeError):
            raise MetricError(
                f"the pattern {pattern!r} matches {match[0]!r}, where {match[group]!r} is no number"
            ) from None


def _from_rows(rows: Iterable[Any], key: str, where: str) -> tuple[_Found, str]:
    """Return the figures of rows that have them, and what counts the rows."""
    found: list[tuple[float, float]] = []
    unit = None
    for order, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or row.get(key) in (None, ""):
            continue
        if unit is None:
            unit = next((name for name in STEPS if row.get(name) not in (None, "")), "")
        try:
            found.append((_number(row[unit]) if unit else order, _number(row[key])))
        except (ValueError, TypeError, KeyError):
            raise MetricError(f"{where}: {key!r} is {row[key]!r}, which is no number (or its {unit} is none)") from None
    return found, unit or ""


def _text_of(where: str) -> str:
    """Return the text of a file, with or without a byte order mark; what is no UTF-8 is replaced."""
    return Path(where).read_text(encoding="utf-8-sig", errors="replace")


def _from_csv(where: str, key: str) -> tuple[_Found, str]:
    return _from_rows(csv.DictReader(io.StringIO(_text_of(where)), skipinitialspace=True), key, where)


def _from_jsonl(where: str, key: str) -> tuple[_Found, str]:
    rows = []
    for number, line in enumerate(io.StringIO(_text_of(where)), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise MetricError(f"{where}, line {number}, is no JSON: {error}") from None
    *way, last = key.split(".")
    return _from_rows((_at(row, way) for row in rows), last, where)


def _from_json(where: str, key: str) -> tuple[_Found, str]:
    try:
        data = json.loads(_text_of(where))
    except ValueError as error:
        raise MetricError(f"{where} is no JSON: {error}") from None
    *way, last = key.split(".")
    parent = _at(data, way)
    if isinstance(parent, list) and not last.lstrip("-").isdigit():
        return _from_rows(parent, last, where)
    value = _at(parent, [last])
    try:
        return [(order, _number(v)) for order, v in enumerate(value if isinstance(value, list) else [value], 1)], ""
    except (ValueError, TypeError, AttributeError):
        return [], ""


def _at(data: Any, way: Iterable[str]) -> Any:
    """Follow keys into JSON; a number counts in a list. None: it does not lead anywhere."""
    for name in way:
        if isinstance(data, dict):
            data = data.get(name)
        elif isinstance(data, list) and name.lstrip("-").isdigit() and -len(data) <= int(name) < len(data):
            data = data[int(name)]
        else:
            return None
    return data


def _from_events(where: str, key: str) -> tuple[_Found, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(where, size_guidance={"scalars": 0, "tensors": 0})  # 0: all of them
    events.Reload()
    tags = events.Tags()
    if key in tags["scalars"]:
        return [(event.step, event.value) for event in events.Scalars(key)], "step"
    if key in tags["tensors"]:  # as TensorFlow writes scalars today
        from tensorboard.util import tensor_util

        tensors = events.Tensors(key)
        return [(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in tensors], "step"
    return [], ""


#: What reads the figures of a file: a function of its name and of the column, key or tag.
FILES: dict[str, Callable[[str, str], tuple[_Found, str]]] = {
    "csv": _from_csv,
    "json": _from_json,
    "jsonl": _from_jsonl,
    "events": _from_events,
}


def _hint(metric: Metric, where: str) -> str:
    """Return what a file has in place of what was looked for."""
    names: list[str] = []
    if metric.source == "csv":
        names = next(csv.reader(io.StringIO(_text_of(where)), skipinitialspace=True), [])
    elif metric.source == "events":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(where)
        events.Reload()
        names = [*events.Tags()["scalars"], *events.Tags()["tensors"]]
    elif metric.source == "json":
        data = json.loads(_text_of(where))
        names = list(data) if isinstance(data, dict) else []
    return f", which has {', '.join(map(repr, names[:20]))}" if names else ""
