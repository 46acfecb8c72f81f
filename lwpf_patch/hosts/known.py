"""The sources that the tests have passed with: data, which ``tests/record_sources.py`` writes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("known.json")


@functools.cache
def _recorded() -> dict[str, dict[str, dict[str, list[str]]]]:
    recorded: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return recorded


def sources(host: str, function: str) -> dict[str, str]:
    """Return the known sources of one function.

    Args:
        host: The host's name.
        function: The key of its site, such as ``"timm.models.beit.Attention.forward"``.

    Returns:
        For the hash of each known syntax tree the versions that have it, in words: ``"1.0.28 to 1.0.31"``.
    """
    recorded = _recorded().get(host, {}).get(function, {})
    return {
        digest: versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"
        for digest, versions in recorded.items()
    }


def add(host: str, function: str, digest: str, version: str) -> None:
    """Record that a version of a host has a function of a certain syntax tree, and write the file."""
    recorded = _recorded()
    of_function = recorded.setdefault(host, {}).setdefault(function, {})
    of_function[digest] = sorted({*of_function.get(digest, ()), version}, key=_order)
    recorded[host][function] = dict(sorted(of_function.items(), key=lambda item: _order(item[1][0])))
    _FILE.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")


def _order(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
