"""The verb ``lwpf models``: which of timm's registered models are patched whole, in part, or not at all, and why."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TypedDict

from ..comparing.command import Subparsers
from ..errors import SettingsError
from ..hosts import HOSTS
from ..patching import registry


class ModelReport(TypedDict):
    """What is told of a model.

    Attributes:
        name: Its registered name.
        state: ``"whole"``, ``"partly"``, ``"refused"``, ``"nothing to patch"``, or ``"unknown"``: it cannot be made.
        patched: How many modules of each class are patched.
        plain: How many modules of each class with a softmax are left as they are.
        why: Why, for each of these classes; for one that cannot be made, under its own name.
        without_map: The patched classes that have no feature map of U-Hop.
    """

    name: str
    state: str
    patched: dict[str, int]
    plain: dict[str, int]
    why: dict[str, str]
    without_map: list[str]


def add_parser(commands: Subparsers) -> None:
    """Add the verb."""
    parser = commands.add_parser(
        "models",
        help="show which of timm's models are patched whole, in part, or not at all",
        description="Make each of timm's registered models whose name matches, without memory for its weights, and "
        "show which of its attention is patched. All 1,400 names take ten minutes; a pattern is quicker.",
    )
    parser.add_argument("patterns", nargs="+", metavar="GLOB", help="glob patterns over registered names: 'swin*'")
    parser.add_argument("--json", action="store_true", help="print plain data: a JSON object a line")
    parser.set_defaults(command=_models)


def _models(options: argparse.Namespace) -> int:
    HOSTS["timm"].root()  # raises where it is not installed
    registry.apply("timm", uhop="on", partial="allow")
    try:
        import timm

        names = list(dict.fromkeys(name for pattern in options.patterns for name in timm.list_models(pattern)))
        if not names:
            raise SettingsError(
                f"no model of timm matches {', '.join(map(repr, options.patterns))}; timm.list_models() has all names"
            )
        states: dict[str, int] = {}
        for number, report in enumerate(_reports(names), start=1):
            states[report["state"]] = states.get(report["state"], 0) + 1
            print(json.dumps(report) if options.json else _line(report), flush=True)
            if number % 100 == 0:
                print(f"{number} of {len(names)} models", file=sys.stderr)
        if not options.json:
            print(f"{len(names)} models: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}")
    finally:
        registry.revert("timm")
    return 0


def _reports(names: list[str]) -> Iterator[ModelReport]:
    import timm
    import torch

    from ..patching.coverage import Coverage, coverage_of
    from ..patching.state import PATCHED

    for name in names:
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), torch.device("meta"):
                warnings.simplefilter("ignore")
                model: Any = timm.create_model(name)
            found, state = coverage_of(model, PATCHED["timm"]), ""
        except Exception as error:  # whatever the code of a model raises: the others can be told of
            found, state = Coverage(why={name: f"{type(error).__name__}: {error}"}), "unknown"
        yield {
            "name": name,
            "state": state or found.state(),
            "patched": dict(found.patched),
            "plain": dict(found.plain),
            "why": found.why,
            "without_map": sorted(found.without_map),
        }


def _line(report: ModelReport) -> str:
    parts = [f"{number} {_short(name)}" for name, number in report["patched"].items()]
    parts += [f"not {number} {_short(name)}: {report['why'][name]}" for name, number in report["plain"].items()]
    parts += list(report["why"].values()) if report["state"] == "unknown" else []
    if without := report["without_map"]:
        parts.append(f"no feature map in {', '.join(map(_short, without))}")
    return f"{report['name']:<50} {report['state']:<17}" + "; ".join(parts)


def _short(name: str) -> str:
    return name.removeprefix("timm.").removeprefix("models.").removeprefix("layers.")
