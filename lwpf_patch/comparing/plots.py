"""The picture of a comparison: how each metric goes over the steps, and where each run ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .report import Comparison, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which colour-blind people can tell apart, for the arms but plain.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("--", "-.", ":")  # for those who see no colours


def draw(comparison: Comparison) -> Figure:
    """Draw a row for each metric: on the left its curves, if runs have more than one value of it; on the right runs."""
    from matplotlib.figure import Figure

    results = comparison.results
    # What differs in the value that counts alone has the same curve.
    sources = [(result.metric.source, result.metric.file, result.metric.key) for result in results]
    curves = [
        _has_curve(comparison, result) and source not in sources[:place]
        for place, (result, source) in enumerate(zip(results, sources, strict=True))
    ]
    columns = 2 if any(curves) else 1
    height = max(3.6, 1.4 + 0.42 * len(comparison.arms))
    figure = Figure(figsize=(11 if columns == 2 else 7, height * len(results) + 0.4), layout="constrained")
    rows = figure.subplots(len(results), columns, squeeze=False, width_ratios=[3, 2] if columns == 2 else None)
    looks = _looks(comparison)
    for result, row, curve in zip(results, rows, curves, strict=True):
        if curve:
            _draw_curves(row[0], comparison, result, looks)
        elif columns == 2:
            row[0].set_axis_off()
        _draw_runs(row[-1], comparison, result, looks)
    seeds = len(comparison.seeds)
    of = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(_plain(f"{' / '.join(metric.name for metric in comparison.metrics)} ({of})"), fontsize=11)
    return figure


def _looks(comparison: Comparison) -> dict[str, tuple[str, str]]:
    looks: dict[str, tuple[str, str]] = {comparison.baseline: ("#000000", "-")}
    others = [arm.label for arm in comparison.arms if arm.label != comparison.baseline]
    for order, label in enumerate(others):
        looks[label] = (COLOURS[order % len(COLOURS)], STYLES[order % len(STYLES)])
    return looks


def _has_curve(comparison: Comparison, result: Result) -> bool:
    return any(len(run[result.metric.name].steps) > 1 for run in comparison.series.values())


def _draw_curves(axes: Axes, comparison: Comparison, result: Result, looks: dict[str, tuple[str, str]]) -> None:
    name, units, late = result.metric.name, set(), []
    for arm in comparison.arms:
        runs = [comparison.series[place][name] for place in comparison.series if place[0] == arm.label]
        if not runs:
            continue
        units |= {run.unit for run in runs}
        by_step: dict[float, list[float]] = {}
        for run in runs:
            for step, value in zip(run.steps, run.values, strict=True):
                if math.isfinite(value):
                    by_step.setdefault(step, []).append(value)
        # Where a run has no value, the mean would jump: only steps that all runs have, if there are such.
        shared = {step: values for step, values in by_step.items() if len(values) == len(runs)} or by_step
        steps = sorted(shared)
        colour, style = looks[arm.label]
        low, high = ([pick(shared[step]) for step in steps] for pick in (min, max))
        mean = [sum(shared[step]) / len(shared[step]) for step in steps]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, mean, color=colour, linestyle=style, linewidth=1.8, label=_short(arm.label))
        late += [value for bound in (low, high) for value in bound[len(bound) // 2 :]]
    axes.set(xlabel=" or ".join(sorted(units)), ylabel=_plain(name))
    _zoom(axes, late)
    _tidy(axes)
    axes.legend(fontsize=8)


def _zoom(axes: Axes, late: list[float]) -> None:
    """Show the range of the second half of the steps, if what comes first would hide its differences."""
    if not late:
        return
    low, high = min(late), max(late)
    bottom, top = axes.get_ylim()
    if 0 < high - low < 0.2 * (top - bottom):
        margin = 0.6 * (high - low)
        axes.set_ylim(max(bottom, low - margin), min(top, high + margin))
        axes.set_title("the axis shows the range of the second half", fontsize=8, loc="right")


def _draw_runs(axes: Axes, comparison: Comparison, result: Result, looks: dict[str, tuple[str, str]]) -> None:
    positions = {arm.label: -place for place, arm in enumerate(comparison.arms)}
    # A line through the arms for each seed: the pairs that are compared.
    for seed in comparison.seeds:
        points = [(s.values[seed], positions[label]) for label, s in result.summaries.items() if seed in s.values]
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), color="#999999", linewidth=0.6, alpha=0.7, zorder=1)
    for label, summary in result.summaries.items():
        values = list(summary.values.values())
        colour: Any = looks[label][0]
        axes.scatter(values, [positions[label]] * len(values), s=22, color=colour, alpha=0.75, linewidth=0, zorder=2)
        if summary.mean is not None:
            axes.plot(
                [summary.mean] * 2, [positions[label] - 0.22, positions[label] + 0.22], color=colour, linewidth=2.5
            )
    axes.set_yticks(list(positions.values()), [_short(label) for label in positions], fontsize=8)
    axes.set_ylim(min(positions.values()) - 0.6, 0.6)
    axes.set_xlabel(_plain(f"{result.metric.name}\n({result.metric.counted}; {result.metric.better} is better)"))
    _tidy(axes)


def _short(label: str) -> str:
    return _plain(label if len(label) <= 36 else label[:33] + "...")


def _plain(text: str) -> str:
    """Return text as matplotlib shows it as it is: what stands between dollar signs is a formula there."""
    return text.replace("$", r"\$")


def _tidy(axes: Axes) -> None:
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
