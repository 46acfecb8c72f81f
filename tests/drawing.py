"""The cases of a day: of the tests marked `drawn`, a part is run, another one every day.

`drawn(cases=9)` stands for nine of them, as different as may be; `drawn` for as many as have each value of each
parameter at least once; `drawn(days=3)` for all of them on one day in three, with `cases` for so many on that day. All
cases run with --cases all, and where tests are chosen by name, -k or -m.
"""

from __future__ import annotations

import datetime
import os
import random
from collections import defaultdict

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases",
        choices=("day", "all"),
        help="of the tests marked drawn, run the cases that are drawn for the day (which TESTS_DAY sets), or all; the "
        "default is all where tests are chosen by name, -k or -m, and else day",
    )


def pytest_configure(config: pytest.Config) -> None:
    # The processes of xdist inherit it, so that all draw the same.
    os.environ.setdefault("TESTS_DAY", datetime.date.today().isoformat())


def are_drawn(config: pytest.Config) -> bool:
    """Tells whether only the day's cases run."""
    chosen = config.option.keyword or config.option.markexpr or any("::" in each for each in config.args)
    return (config.option.cases or ("all" if chosen else "day")) == "day"


def pytest_report_header(config: pytest.Config) -> str | None:
    if not are_drawn(config):
        return None
    return f"cases drawn for the day: TESTS_DAY={os.environ['TESTS_DAY']} (--cases all runs all of them)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not are_drawn(config):
        return
    groups = defaultdict(list)
    for item in items:
        if marker := item.get_closest_marker("drawn"):
            groups[item.nodeid.split("[")[0]].append((item, marker.kwargs))
    left: set[pytest.Item] = set()
    for name, group in groups.items():
        cases, (options, *_) = zip(*group, strict=True)
        left |= {*cases} - {*draw(list(cases), f"{os.environ['TESTS_DAY']} {name}", **options)}
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


def draw(items: list[pytest.Item], seed: str, cases: int = 0, days: int = 1) -> list[pytest.Item]:
    """Draws cases of a test; see above."""
    drawing = random.Random(seed)
    if drawing.randrange(days):
        return []
    if days > 1 and not cases:
        return items
    seen: set[tuple[str, int]] = set()
    needed, others = [], []
    for item in drawing.sample(items, len(items)):
        values = {*item.callspec.indices.items()} if hasattr(item, "callspec") else set()
        (others if values <= seen else needed).append(item)
        seen |= values
    return (needed + others)[:cases] if cases else needed
