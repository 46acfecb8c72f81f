"""The files of a comparison: its report, every figure with its provenance for programs, and the curves."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from . import statistics
from .metrics import COLUMNS
from .plots import draw
from .provenance import machine, versions
from .report import Comparison, left_out, markdown, sentences
from .runs import Run

#: Written as they are asked for: a report is complete, or an error says why not.
FILES = ("runs.csv", "report.md", "report.json", "curves.png")


def provenance(comparison: Comparison) -> dict[str, Any]:
    """Return what the figures depend on besides the arms."""
    found = {**versions()}
    for name in ("scipy", "matplotlib"):
        found[name] = metadata.version(name)
    files: dict[str, str] = {}
    for run in comparison.runs.values():
        files |= run.files
    commits = {record.get("commit") for place, record in comparison.records.items() if place in comparison.series}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "interpreter": sys.executable,
        "folder": os.getcwd(),
        "versions": found,
        "files": files,
        "commit": " and ".join(sorted(filter(None, commits))) or None,
        "machine": machine() | {"ran on": sorted({record["machine"] for record in comparison.records.values()})},
    }


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the files of the report.

    Returns:
        Their paths.
    """
    known = provenance(comparison)
    makers: dict[str, Callable[[Path], Any]] = {
        "runs.csv": lambda path: _write_runs(comparison, path),
        "report.md": lambda path: path.write_text(markdown(comparison, known), encoding="utf-8"),
        "report.json": lambda path: path.write_text(
            json.dumps(_plain(_data(comparison, known)), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        ),
        "curves.png": lambda path: draw(comparison).savefig(path, dpi=130, format="png"),
    }
    paths = []
    for name in FILES:
        path, unfinished = folder / name, folder / f".{name}.tmp"
        makers[name](unfinished)
        unfinished.replace(path)
        paths.append(path)
    return paths


def _write_runs(comparison: Comparison, path: Path) -> None:
    names = [metric.name for metric in comparison.metrics]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *names], extrasaction="ignore")
        writer.writeheader()
        for (arm, seed), run in comparison.runs.items():
            writer.writerow({**comparison.records.get((arm, seed), {}), **_state(comparison, run)})


def _state(comparison: Comparison, run: Run) -> dict[str, Any]:
    place = (run.arm, run.seed)
    problem = comparison.problems.get(place, "")
    state = "failed" if problem else "finished" if place in comparison.series else "missing"
    series = comparison.series.get(place, {})
    figures = {m.name: m.choose(series[m.name]) for m in comparison.metrics if m.name in series}
    return {"arm": run.arm, "seed": run.seed, "state": state, "problem": problem, "key": run.key,
            "log": str(run.log), **figures}  # fmt: skip


def _data(comparison: Comparison, provenance: dict[str, Any]) -> dict[str, Any]:
    arms = [
        {"label": arm.label, "options": arm.options, "more": arm.more, "settings": arm.settings, "hosts": arm.hosts,
         "sites": arm.sites, "control_of": arm.control_of, "said": comparison.said.get(arm.label, []),
         "times": _times(comparison, arm.label)}
        for arm in comparison.arms
    ]  # fmt: skip
    metrics = [
        {
            **dataclasses.asdict(result.metric),
            "arms": {label: dataclasses.asdict(summary) for label, summary in result.summaries.items()},
            "differences": [
                {"arm": own, "against": other, **dataclasses.asdict(difference)}
                for (own, other), difference in result.differences.items()
            ],
        }
        for result in comparison.results
    ]
    runs = []
    for place, run in comparison.runs.items():
        curves = {name: dataclasses.asdict(series) for name, series in comparison.series.get(place, {}).items()}
        runs.append({**comparison.records.get(place, {}), **_state(comparison, run), "curves": curves})
    return {
        "command": dataclasses.asdict(comparison.command) | {"text": str(comparison.command)},
        "seeds": comparison.seeds,
        "baseline": comparison.baseline,
        "time": comparison.time and comparison.time.text,
        "arms": arms,
        "metrics": metrics,
        "verdicts": sentences(comparison, comparison.results[0]),
        "notes": [*comparison.notes, *left_out(comparison)],
        "statistics": {"confidence": statistics.CONFIDENCE, "bootstrap": "percentile, of paired differences",
                       "resamples": statistics.RESAMPLES, "power": statistics.POWER},
        "provenance": provenance,
        "runs": runs,
    }  # fmt: skip


def _times(comparison: Comparison, arm: str) -> dict[str, Any]:
    slowdowns = comparison.slowdowns(arm)
    return {
        "seconds": comparison.times(arm),
        "times_baseline": slowdowns,
        "times_baseline_median": median(slowdowns.values()) if slowdowns else None,
    }


def _plain(value: Any) -> Any:
    """Return data as JSON has it, which knows no number that is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
