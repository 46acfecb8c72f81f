"""A plugin of pytest's that writes the outcome of each test to a file at once, so that a run that is cut keeps them.

``python -m pytest -p benchmarks.pytest_results --results FILE`` writes a JSON object a line: ``id``, ``outcome``, which
is first ``started``, and for a failure ``seed`` (the TESTS_SEED of its inputs), ``error`` (its first line) and
``inner``, failures of a pytest that the test itself ran.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_path: Path | None = None


def pytest_addoption(parser: Any) -> None:
    """Add the option that names the file."""
    parser.addoption("--results", help="a file for outcomes, one JSON object a line")


def pytest_configure(config: Any) -> None:
    """Start the file."""
    global _path
    if name := config.getoption("--results"):
        _path = Path(name)
        _path.write_text("")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Write that a test starts, so that one at which the process ends is known."""
    _append({"id": nodeid, "outcome": "started"})


def pytest_runtest_logreport(report: Any) -> None:
    """Write the outcome of a test, or of its set-up or end where these fail or skip."""
    if report.when == "call" or not report.passed:
        _write(report)


def pytest_collectreport(report: Any) -> None:
    """Write that a module cannot be imported; one that skips itself does not count as a test."""
    if report.failed:
        _write(report)


def _write(report: Any) -> None:
    line: dict[str, Any] = {"id": report.nodeid, "outcome": report.outcome}
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        said = report.capstdout
        seeds = re.findall(r"^TESTS_SEED=(\d+)$", said, re.MULTILINE)
        line |= {
            "seed": int(seeds[0]) if seeds else None,
            "error": (crash.message if crash else str(report.longrepr)).strip().partition("\n")[0][:300],
            "inner": re.findall(r"^(?:FAILED|ERROR) (\S+::.*)$", said, re.MULTILINE),
        }
    _append(line)


def _append(line: dict[str, Any]) -> None:
    if _path is not None:
        with _path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
