"""The implementations of the operator, and the choice among them.

``eager`` is the specification, written to be read beside the papers; every other backend is compared with it.
"""

from __future__ import annotations

from ..errors import unknown_value
from ..settings import BACKENDS


def choose(requested: str) -> tuple[str, str]:
    """Picks the backend that computes.

    Args:
        requested: ``"auto"`` or the name of a backend.

    Returns:
        The name of the backend and why it was chosen, in words.

    Raises:
        SettingsError: There is no such backend.
    """
    if requested not in BACKENDS:
        raise unknown_value("backend", requested, "backend", BACKENDS)
    if requested == "auto":
        return "eager", "the readable reference; no other backend is in this version"
    return requested, "asked for"
