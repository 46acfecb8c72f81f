"""The report of the gpu benchmark: what its steps have written so far, and verdicts against a table of goals."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import reporting
from .attention import PASSES
from .reporting import Row

#: The GPUs and the dtype that the goals are for, and what stands in their place for "the fastest anchor".
GPUS = ("H100", "H200")
DTYPE = "bfloat16"
FASTEST = "the fastest anchor"
FLASH, CUDNN = "SDPA flash", "SDPA cudnn"


@dataclasses.dataclass
class State:
    """How far a step is.

    Attributes:
        name: Of the step.
        state: ``"waiting"``, ``"running"``, ``"finished"``, ``"cut"``, ``"crashed"`` or ``"left out"``.
        why: What there is to say about it.
        seconds: How long it ran.
        limit: How long it might have.
    """

    name: str
    state: str = "waiting"
    why: str = ""
    seconds: float = 0.0
    limit: float = 0.0


@dataclasses.dataclass(frozen=True)
class Goal:
    """A ratio that must not be exceeded.

    Attributes:
        step: The step with its rows, or how the names of several begin.
        select: What is equal in the row that it is for.
        figure: ``"forward"``, ``"both"``, ``"peak"`` or ``"step"``.
        limit: What the median may be.
        against: What the ratio is taken to.
    """

    step: str
    select: dict[str, Any]
    figure: str
    limit: float
    against: str

    def __str__(self) -> str:
        what = {**PASSES, "peak": "peak memory", "step": "training step"}[self.figure]
        where = f"{self.select.get('model')}, {'compiled' if self.select.get('compile') else 'eager'}"
        if "length" in self.select:
            where = f"N {self.select['length']}, d {self.select['width']}"
        return f"{self.select['variant']}: {what}, {where}"


def _attention_goals() -> Iterator[Goal]:
    flash = ((4096, 64), (4096, 128))
    for name in ("ReLU, ours", "PFU, ours"):
        at = {"variant": name, "length": 197, "width": 64}
        yield Goal("attention", at, "forward", 1.15, FASTEST)
        yield Goal("attention", at, "both", 1.2, FASTEST)
        for length, width in flash:
            at = {"variant": name, "length": length, "width": width}
            yield Goal("attention", at, "forward", 1.15, FLASH)
            yield Goal("attention", at, "both", 1.25, FLASH)
    shapes = ((197, 64), *flash)
    for length, width in shapes:
        at = {"variant": "dmedian, ours", "length": length, "width": width}
        yield Goal("attention", at, "both", 1.5, FASTEST)
    for name in ("ReLU, ours", "PFU, ours", "dmedian, ours"):
        for length, width in shapes:
            yield Goal("attention", {"variant": name, "length": length, "width": width}, "peak", 1.05, FLASH)


GOALS = [
    *_attention_goals(),
    *(
        Goal("train_step", {"variant": "relu", "model": "vit_base_patch16_224", "compile": how}, "step", 1.05, "plain")
        for how in (False, True)
    ),
]


# --- gathering --------------------------------------------------------------------------------------------------------


def gather(folder: Path, states: list[State], **facts: Any) -> dict[str, Any]:
    """Read what the steps have written so far.

    Args:
        folder: Where it is.
        states: How far the steps are.
        **facts: What else the report shall have.

    Returns:
        The report: the facts, ``environment``, ``tests``, ``results`` by step, ``verdicts`` and ``steps``.
    """
    results = {}
    for state in states:
        if state.name not in ("environment", "tests") and (found := _read(folder / f"{state.name}.json")):
            kept = ("arguments", "left_out", "beaten", "rows")
            results[state.name] = {name: found[name] for name in kept if name in found}
    environment = _read(folder / "environment.json") or {}
    return {
        **facts,
        "steps": [dataclasses.asdict(state) for state in states],
        "environment": environment,
        "tests": tests_of(folder / "tests.jsonl"),
        "verdicts": verdicts({name: found["rows"] for name, found in results.items()}, _gpu(environment)),
        "results": results,
    }


def _read(path: Path) -> Any:
    """Return what a JSON file holds, None if it is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _gpu(environment: dict[str, Any]) -> str:
    return environment.get("gpu", {}).get("name") or environment.get("machine", {}).get("device", "an unknown device")


def tests_of(path: Path) -> dict[str, Any]:
    """Count outcomes of tests.

    Args:
        path: What :mod:`.pytest_results` has written.

    Returns:
        ``passed``, ``failed``, ``skipped``; ``failures``: ``id``, ``seed``, ``error`` and ``inner`` of each; and
        ``unfinished``, the tests that have no outcome: what was running when the process ended.
    """
    outcomes: dict[str, dict[str, Any]] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        text = ""
    for line in text.splitlines():
        try:
            one = json.loads(line)
        except ValueError:  # the last one, of a process that was killed
            continue
        if outcomes.get(one["id"], {}).get("outcome") != "failed":  # a test that passed may fail at its end
            outcomes[one["id"]] = one
    counts = Counter(one["outcome"] for one in outcomes.values())
    failures = [
        {name: one.get(name) for name in ("id", "seed", "error", "inner")}
        for one in outcomes.values()
        if one["outcome"] == "failed"
    ]
    unfinished = [name for name, one in outcomes.items() if one["outcome"] == "started"]
    counted = {name: counts[name] for name in ("passed", "failed", "skipped")}
    return {**counted, "failures": failures, "unfinished": unfinished}


def failed(report: dict[str, Any]) -> bool:
    """Return whether a test failed or a step crashed."""
    return bool(report["tests"]["failed"]) or any(step["state"] == "crashed" for step in report["steps"])


# --- verdicts ---------------------------------------------------------------------------------------------------------


def verdicts(results: dict[str, list[Row]], gpu: str) -> list[dict[str, Any]]:
    """Compare results to the goals.

    Args:
        results: The rows of each step.
        gpu: What they were measured on; on one that the goals are not for, nothing is met or missed.

    Returns:
        For each goal: ``goal``, ``limit``, ``against``, ``verdict`` (``"met"``, ``"missed"`` or ``"not measured"``),
        ``figure`` (a ratio, or its quartiles, or None), ``cudnn`` (the same against cuDNN) and ``why``.
    """
    found = []
    for goal in GOALS:
        row = _row_of(goal, results)
        figure, against, why = _figure(goal, row, results)
        verdict = "not measured"
        if figure is not None:
            median = figure[1] if isinstance(figure, list) else figure
            if not any(re.search(rf"\b{name}\b", gpu) for name in GPUS):
                why = f"on {gpu}; the goals are for {' and '.join(GPUS)}"
            elif goal.step == "attention" and row.get("output_matches") is None:
                why = "the output was not compared to the reference"
            elif row.get("output_matches") is False:
                verdict, why = "missed", "the output does not match the reference"
            else:
                verdict = "met" if median <= goal.limit else "missed"
        found.append(
            {
                "goal": str(goal),
                "limit": goal.limit,
                "against": against,
                "verdict": verdict,
                "figure": figure,
                "cudnn": (row or {}).get(f"{goal.figure}_ratios", {}).get(CUDNN),
                "why": why,
            }
        )
    return found


def _row_of(goal: Goal, results: dict[str, list[Row]]) -> Row | None:
    wanted = {**goal.select, "dtype": DTYPE}
    for step, rows in results.items():
        if step.startswith(goal.step):
            for row in rows:
                if all(row.get(name) == value for name, value in wanted.items()):
                    return row
    return None


def _figure(goal: Goal, row: Row | None, results: dict[str, list[Row]]) -> tuple[list[float] | float | None, str, str]:
    """Return the ratio that a goal is for, what it is taken to, and why there is none."""
    if row is None:
        return None, goal.against, "no result"
    if reason := row["failures"].get("memory" if goal.figure == "peak" else goal.figure):
        return None, goal.against, reason
    if goal.figure in ("step", "peak"):  # their base is what the goal is against
        figure = row.get(f"{goal.figure}_ratio")
        return figure, goal.against, "" if figure is not None else "no result for the base"
    ratios = row.get(f"{goal.figure}_ratios", {})
    against = goal.against
    if against == FASTEST and ratios:
        against = max(ratios, key=lambda name: ratios[name][1])  # the larger the ratio to it, the faster it is
    figure = ratios.get(against)
    return figure, against, "" if figure is not None else f"no result for {against}"


# --- writing ----------------------------------------------------------------------------------------------------------


def write(report: dict[str, Any], folder: Path) -> None:
    """Write report.json and report.md.

    Args:
        report: What `gather` returned.
        folder: Where to.
    """
    reporting.replace_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    reporting.replace_text(folder / "report.md", markdown(report))


def summary(report: dict[str, Any]) -> str:
    """Return a few lines for the terminal."""
    states, counts = (
        Counter(one[what] for one in report[where]) for what, where in (("state", "steps"), ("verdict", "verdicts"))
    )
    of_tests = report["tests"]
    return "\n".join(
        [
            f"steps: {_counts(states)}",
            f"tests: {', '.join(f'{of_tests[name]} {name}' for name in ('passed', 'failed', 'skipped'))}",
            f"goals: {_counts(counts)}",
        ]
    )


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def gave(report: dict[str, Any], step: str) -> str:
    """Return in a few words what a step gave."""
    if step == "environment":
        return _gpu(report["environment"])
    if step == "tests":
        return ", ".join(f"{report['tests'][name]} {name}" for name in ("passed", "failed", "skipped"))
    found = report["results"].get(step)
    return f"{len(found['rows'])} results" if found else "no results"


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    blocks = [
        "# GPU benchmark",
        f"`{' '.join(report['command'])}`, started {report['started']}, for {report['minutes']:g} minutes.",
        "```\n" + summary(report) + "\n```",
        "## Steps",
        _table(
            ["step", "state", "seconds", "limit", "remark"],
            (
                [step["name"], step["state"], f"{step['seconds']:.0f}", f"{step['limit']:.0f}", step["why"]]
                for step in report["steps"]
            ),
        ),
        *_environment(report["environment"]),
        *_tests(report["tests"]),
        *_verdicts(report["verdicts"]),
    ]
    states = {step["name"]: step for step in report["steps"]}
    for name, found in report["results"].items():
        blocks.append(f"## {name}")
        if states[name]["state"] != "finished":
            blocks.append(f"The step was {states[name]['state']} ({states[name]['why'] or 'no end yet'}): a part only.")
        blocks += _results(name, found)
    return "\n\n".join(blocks) + "\n"


def _environment(environment: dict[str, Any]) -> list[str]:
    facts = {
        **{name: value for name, value in environment.get("gpu", {}).items() if name != "name"},
        **environment.get("nvidia_smi", {}),
        **environment.get("machine", {}),
        **environment.get("versions", {}),
    }
    lines = [[name, str(value)] for name, value in facts.items()]
    return ["## Environment", _table(["", ""], lines) if lines else "Not known."]


def _tests(tests: dict[str, Any]) -> list[str]:
    blocks = ["## Tests", ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped")) + "."]
    blocks += [f"`{name}` has no outcome: it was running when the step ended." for name in tests["unfinished"]]
    if tests["failures"]:
        lines = [
            [f"`{one['id']}`", str(one["seed"]), one["error"] or "", "; ".join(one["inner"] or ())]
            for one in tests["failures"]
        ]
        blocks.append(_table(["test", "TESTS_SEED", "error", "failures of a pytest that it ran"], lines))
    return blocks


def _verdicts(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        [
            one["goal"],
            f"<= {one['limit']:g}",
            one["against"],
            _ratio(one["figure"]),
            f"**{one['verdict']}**",
            _ratio(one["cudnn"]),
            one["why"],
        ]
        for one in found
    ]
    headings = ["", "goal", "against", "ratio (quartiles)", "verdict", "against cuDNN", "remark"]
    return ["## Goals", f"In {DTYPE}, on {' or '.join(GPUS)}; medians count.", _table(headings, lines)]


def _results(step: str, found: dict[str, Any]) -> list[str]:
    rows, blocks = found["rows"], []
    if left_out := found.get("left_out"):
        blocks.append("\n".join(f"- {name} is left out: {why}" for name, why in left_out.items()))
    if step.startswith("attention"):
        for shape in dict.fromkeys(row["shape"] for row in rows):
            own = [row for row in rows if row["shape"] == shape]
            blocks.append(f"B,H,N,E = {shape}, {own[0]['dtype']}; ratios to {found['arguments']['base']}")
            blocks.append(_table(*_attention(own)))
    elif step.startswith("train_step"):
        blocks.append(_table(*_train_step(rows)))
    elif step.startswith("tiles"):
        blocks += _tiles(rows, found.get("beaten", []))
    else:
        lines = [[r["variant"], reporting.spread(r["seconds"], 1e3), _ratio(r["ratio"])] for r in rows]
        blocks.append(_table(["", "ms (quartiles)", "ratio (quartiles)"], lines))
    failures = [f"- {row['variant']}, {what}: {why}" for row in rows for what, why in row.get("failures", {}).items()]
    return [*blocks, *(["Failed:\n\n" + "\n".join(dict.fromkeys(failures))] if failures else [])]


def _attention(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    headings = [""]
    for title in PASSES.values():
        headings += [f"{title}, ms (quartiles)", "ratio (quartiles)", "TFLOP/s", "GB/s"]
    lines = []
    for row in rows:
        cells = [row["variant"]]
        for which in PASSES:
            cells += [reporting.spread(row.get(f"{which}_seconds"), 1e3, 3), _ratio(row.get(f"{which}_ratio"))]
            cells += [_number(row.get(f"{which}_{rate}")) for rate in ("tflops", "gbps")]
        matches = {True: "yes", False: "**no**", None: "-"}[row.get("output_matches")]
        error = f" ({row['output_error']:.1e})" if row.get("output_error") is not None else ""
        lines.append([*cells, _memory(row), matches + error])
    return [*headings, "peak memory, MB (ratio)", "output matches (error)"], lines


def _train_step(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    lines = [
        [row["variant"], reporting.spread(row.get("step_seconds"), 1e3), _ratio(row.get("step_ratio")), _memory(row)]
        for row in rows
    ]
    return ["", "step, ms (quartiles)", "ratio to plain (quartiles)", "peak memory, MB (ratio)"], lines


def _tiles(rows: list[Row], beaten: list[dict[str, Any]]) -> list[str]:
    lines = []
    for key in dict.fromkeys((row["shape"], row["kernel"]) for row in rows):
        own = [row for row in rows if (row["shape"], row["kernel"]) == key and "time_ratio" in row]
        if own:
            best = min(own, key=lambda row: row["time_ratio"][1])
            lines.append([*key, best["current"], best["variant"], _ratio(best["time_ratio"]), str(len(own))])
    headings = ["shape", "kernel", "current tile", "fastest", "ratio (quartiles)", "candidates that ran"]
    told = [
        f"- `{one['table']}`, {one['kernel']}, width {one['width']}: ({one['better']}) in place of ({one['current']}): "
        + "; ".join(f"{_ratio(ratio)} on {shape}" for shape, ratio in one["ratios"].items())
        for one in beaten
    ]
    says = "Beaten, with quartiles that do not overlap (tiles.tables.txt has the tables):\n\n" + "\n".join(told)
    return [_table(headings, lines), says if told else "No tile is beaten with quartiles that do not overlap."]


def _memory(row: Row) -> str:
    size, ratio = row.get("peak_bytes"), row.get("peak_ratio")
    return "-" if size is None else f"{size / 2**20:.1f}" + (f" ({ratio:.3f})" if ratio is not None else "")


def _ratio(figure: Sequence[float] | float | None) -> str:
    return f"{figure:.3f}" if isinstance(figure, (int, float)) else reporting.spread(figure, decimals=3)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    texts = [headings, ["---"] * len(headings), *lines]
    # A line end or a bar would end the cell.
    return "\n".join(
        "| " + " | ".join(re.sub(r"\s+", " ", t).replace("|", "\\|") for t in line) + " |" for line in texts
    )
