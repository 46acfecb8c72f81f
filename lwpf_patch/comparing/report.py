"""What came out: tables and sentences for people, and every figure with its provenance for programs."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median
from typing import Any

from . import statistics
from .arms import Arm
from .metrics import Metric, Series
from .runs import Command, Run
from .statistics import Difference, Summary

#: Smaller figures are written with an exponent.
MOST_DECIMALS = 8


@dataclass
class Comparison:
    """A comparison, as far as its runs have come.

    Attributes:
        command: The command.
        arms: The arms; the controls among them.
        seeds: The seeds.
        metrics: The figures of merit; verdicts are on each, sentences on the first.
        baseline: The label of the arm that the others are compared with.
        runs: Every run, by arm and seed.
        time: Where a run says how long it took; None: the time of its process counts.
        records: What each run that has ended left behind.
        series: What each run has of each metric, by name.
        seconds: How long each of these runs took.
        problems: What went wrong, of those that failed.
        said: By arm, what lwpf_patch said in its first run.
        notes: What people have to know before they believe the figures.
    """

    command: Command
    arms: list[Arm]
    seeds: list[int]
    metrics: list[Metric]
    baseline: str
    runs: dict[tuple[str, int], Run]
    time: Metric | None = None
    records: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    series: dict[tuple[str, int], dict[str, Series]] = field(default_factory=dict)
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)
    problems: dict[tuple[str, int], str] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def figures(self, arm: str, metric: Metric) -> dict[int, float]:
        """Return the figures of an arm, by seed, as far as they are there."""
        found = {seed: self.series.get((arm, seed), {}).get(metric.name) for seed in self.seeds}
        return {seed: metric.choose(series) for seed, series in found.items() if series is not None}

    def times(self, arm: str) -> dict[int, float]:
        """Return how long the runs of an arm took, by seed, as far as they are there."""
        return {seed: self.seconds[arm, seed] for seed in self.seeds if (arm, seed) in self.seconds}

    def slowdowns(self, arm: str) -> dict[int, float]:
        """Return by seed how many times as long as the baseline's run that of an arm took."""
        return statistics.ratios(self.times(arm), self.times(self.baseline))

    @cached_property
    def results(self) -> list[Result]:
        """What came out, metric by metric; the runs are over by then."""
        return [self._result(metric) for metric in self.metrics]

    def _result(self, metric: Metric) -> Result:
        figures = {arm.label: self.figures(arm.label, metric) for arm in self.arms}
        pairs = [(arm.label, self.baseline) for arm in self.arms if arm.label != self.baseline]
        pairs += [(own, arm.label) for arm in self.arms for own in arm.control_of]
        return Result(
            metric,
            {label: statistics.summarise(values) for label, values in figures.items()},
            {
                (own, other): statistics.compare(figures[own], figures[other], metric.lower)
                for own, other in pairs
                if own != other
            },
        )


@dataclass(frozen=True)
class Result:
    """What came out in one metric.

    Attributes:
        metric: Which one.
        summaries: By arm.
        differences: By arm and what it is compared with: each arm with the baseline, then those with a control with it.
    """

    metric: Metric
    summaries: dict[str, Summary]
    differences: dict[tuple[str, str], Difference]

    @property
    def decimals(self) -> int:
        """How many decimals tell its values apart: two digits of their spread, or else four of the values."""
        spreads = [s.deviation for s in self.summaries.values() if s.deviation]
        means = [abs(s.mean) for s in self.summaries.values() if s.mean]
        if not spreads and not means:
            return 2
        digits, scale = (2, min(spreads)) if spreads else (4, max(means))
        return max(0, digits - 1 - math.floor(math.log10(scale)))

    def text(self, value: float | None, sign: bool = False) -> str:
        """Return a value with these decimals."""
        if value is None:
            return "-"
        digits = f".{self.decimals}f" if self.decimals <= MOST_DECIMALS else ".3g"
        return f"{value:{'+' if sign else ''}{digits}}"


def _interval(result: Result, interval: tuple[float, float] | None) -> str:
    return f"[{result.text(interval[0], True)}, {result.text(interval[1], True)}]" if interval else "-"


def cells(comparison: Comparison, result: Result, plus_minus: str) -> tuple[list[str], list[list[str]]]:
    """Return the headings and lines of a metric's table."""
    headings = ["arm", "runs", "mean", "difference", "95 % interval", "P(better)", "seeds won", "seconds", "x baseline",
                "verdict"]  # fmt: skip
    lines = []
    for arm in comparison.arms:
        summary = result.summaries[arm.label]
        mean = result.text(summary.mean)
        if summary.deviation is not None:
            mean += f" {plus_minus} {result.text(summary.deviation)}"
        *compared, verdict = _compared(result, result.differences.get((arm.label, comparison.baseline)))
        lines.append([arm.label, str(len(summary.values)), mean, *compared, *_times(comparison, arm.label), verdict])
        for (own, other), against in result.differences.items():
            if own == arm.label and other != comparison.baseline:
                *compared, verdict = _compared(result, against)
                lines.append([f"  against {other}", "", "", *compared, "", "", verdict])
    return headings, lines


def _times(comparison: Comparison, arm: str) -> list[str]:
    """Return the mean time of an arm's runs, and how many times the baseline's it is."""
    times, slowdowns = comparison.times(arm).values(), comparison.slowdowns(arm).values()
    return [
        f"{fmean(times):.1f}" if times else "-",
        f"{median(slowdowns):.2f}" if slowdowns else "-",
    ]


def _compared(result: Result, difference: Difference | None) -> list[str]:
    if difference is None:
        return ["", "", "", "", "baseline"]
    improvement = "-" if difference.improvement is None else f"{difference.improvement:.2f}"
    seeds = len(difference.seeds)
    verdict = difference.verdict
    if verdict == "open":
        needed = difference.seeds_to_settle
        verdict += f": about {needed} seeds" if needed else f": more than {statistics.MOST_SEEDS:,} seeds"
    return [
        result.text(difference.mean, True),
        _interval(result, difference.bootstrap),
        improvement,
        f"{difference.won:g} of {seeds}" if seeds else "-",
        verdict,
    ]


def sentences(comparison: Comparison, result: Result) -> list[str]:
    """Return for each arm what a metric says about it."""
    return [
        f"{own} against {other}: {_sentence(result, difference)}"
        for (own, other), difference in result.differences.items()
    ]


def _sentence(result: Result, found: Difference) -> str:
    seeds, name = len(found.seeds), result.metric.name
    if found.mean is None:
        return "no seed has a figure of both, so that nothing is known."
    start = f"{name} {result.text(found.mean, True)}"
    if found.verdict == "equal":
        return f"the same {name} at each of {seeds} seeds."
    if found.verdict == "one seed":
        return f"{start} in one seed, which cannot show whether that is more than chance; there is no interval."
    if found.verdict == "no spread":
        return f"{start} at each of {seeds} seeds. Differences without spread give no interval; take a finer figure."
    intervals = f"95 % interval {_interval(result, found.bootstrap)}, after Student {_interval(result, found.student)}"
    if found.verdict != "open":
        return f"{found.verdict}. {start} ({intervals}; {seeds} seeds)."
    needed = found.seeds_to_settle
    more = f"about {needed} seeds" if needed else f"more than {statistics.MOST_SEEDS:,} seeds"
    return f"open. {start} ({intervals}), which {seeds} seeds cannot tell from chance; {more} would settle it."


def terminal(comparison: Comparison) -> str:
    """Return the report for a terminal."""
    parts = []
    for result in comparison.results:
        headings, lines = cells(comparison, result, "+-")
        table = [headings, *lines]
        widths = [max(len(line[column]) for line in table) for column in range(len(headings))]
        texts = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        title = f"{result.metric.name} ({result.metric.describe()})"
        parts.append("\n".join(["", title, texts[0], "-" * max(map(len, texts)), *texts[1:]]))
    return "\n".join([*parts, "", *_remarks(comparison)])


def _remarks(comparison: Comparison) -> list[str]:
    """Return the sentences on the first metric, and what has to be known of the others."""
    return [
        *sentences(comparison, comparison.results[0]),
        *(f"NOTE: {note}" for note in [*comparison.notes, *left_out(comparison)]),
    ]


def left_out(comparison: Comparison) -> list[str]:
    """Return what the statistics do not count."""
    notes = []
    for result in comparison.results:
        for label, summary in result.summaries.items():
            if summary.strange:
                which = ", ".join(map(str, summary.strange))
                notes.append(
                    f"{result.metric.name} of {label} is not a finite number at seed {which}, which is left out: the "
                    "figures of the rest flatter an arm that diverges"
                )
    for arm in comparison.arms:
        missing = [seed for seed in comparison.seeds if (arm.label, seed) not in comparison.series]
        if missing:
            failed = {seed: comparison.problems.get((arm.label, seed)) for seed in missing}
            which = ", ".join(f"{seed} ({why})" if why else str(seed) for seed, why in failed.items())
            notes.append(f"{arm.label} has no figures at seed {which}; differences are over the seeds that both have")
    return notes


def _markdown_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    def row(line: Sequence[str]) -> str:
        return (
            "| " + " | ".join(cell.replace("|", "\\|").replace("  against", "&nbsp; against") for cell in line) + " |"
        )

    return [row(headings), "|" + "---|" * len(headings), *(row(line) for line in lines)]


def markdown(comparison: Comparison, provenance: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    seeds = len(comparison.seeds)
    lines = [
        f"# {comparison.metrics[0].name}: {' / '.join(arm.label for arm in comparison.arms)}",
        "",
        "```console",
        f"$ {comparison.command}",
        "```",
        "",
        f"Run for {seeds} seed{'s' * (seeds != 1)} ({', '.join(map(str, comparison.seeds))}) with each arm; the "
        f"differences are seed by seed, against {comparison.baseline}.",
    ]
    for result in comparison.results:
        lines += ["", f"## {result.metric.name}", "", f"{result.metric.describe().capitalize()}.", ""]
        lines += _markdown_table(*cells(comparison, result, "±"))
    lines += ["", *(f"- {remark}" for remark in _remarks(comparison)), "", "![curves](curves.png)", "", "## Arms", ""]
    for arm in comparison.arms:
        how = "the script as it is" if arm.options is None else f"`lwpf run {' '.join(arm.options)}`"
        if arm.more:
            how += f", with `{shlex.join(arm.more)}`"
        if arm.control_of:
            whose = " and ".join(arm.control_of)
            how += f"; the control of {whose}: as many parameters that are trained, but no Stage I"
        lines.append(f"- **{arm.label}**: {how}")
        lines += [f"    - `{line}`" for line in comparison.said.get(arm.label, [])]
    lines += [
        "",
        "## How to read it",
        "",
        "- *mean*: over the seeds, ± the standard deviation; *difference*: the mean of arm minus "
        f"{comparison.baseline} at the same seed.",
        "- *95 % interval*: percentile bootstrap of these differences. With few seeds it is too narrow (of 5 seeds it "
        "holds the truth in 83 % of comparisons), so a verdict needs Student's interval to exclude 0 as well.",
        "- *P(better)*: how probable it is that a run of the arm beats one of the other, whatever their seeds; a tie "
        "counts half. *seeds won*: at how many seeds it does.",
        "- *seconds*: the mean time of a run, "
        + ("from the start to the end of its process" if comparison.time is None else f"as `{comparison.time.text}`")
        + f"; *x baseline*: how many times that of {comparison.baseline} at the same seed, the median over the seeds. "
        "Runs that take place side by side share the machine, and their times tell less.",
        "- *open: about N seeds*: that many find a difference as large as the one seen in 80 % of "
        "comparisons (paired t-test, 5 %). It is itself an estimate, from few seeds a rough one.",
    ]
    tested = sum(found.bootstrap is not None for result in comparison.results for found in result.differences.values())
    if tested > 1:
        lines.append(
            f"- {tested} differences were looked at: where there is nothing to be found, one in 20 of them still has a "
            "verdict."
        )
    if any(metric.value == "best" for metric in comparison.metrics):
        lines.append(
            "- *best value of a run*: chosen by the figures that are reported, so it is better than the truth."
        )
    lines += ["", "## Provenance", ""]
    lines += [f"- {name}: {_flat(value)}" for name, value in provenance.items() if value]
    return "\n".join(lines) + "\n"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(part)}" for name, part in value.items() if part)
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)
