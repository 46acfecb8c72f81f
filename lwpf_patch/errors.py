"""The errors that lwpf_patch raises.

None of them is an ``ImportError``: a script that guards ``import timm`` with ``except ImportError`` must not go on
unpatched because a request to patch could not be met.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LwpfError(RuntimeError):
    """Base class: a request to patch that could not be met."""


class SettingsError(LwpfError, ValueError):
    """A value that the user gave is not allowed; the message names it, its origin and what is allowed."""


class HostNotInstalledError(LwpfError):
    """The library to be patched is not installed."""


class RewriteError(LwpfError):
    """A function does not have the shape that its edits need; nothing was patched."""


class CoverageError(LwpfError):
    """A model holds attention that is not patched, where whole models alone were asked for."""


class FoldError(RewriteError):
    """A feature map cannot become part of the projections of its module; nothing was folded."""


class StageOneError(LwpfError):
    """Stage I of U-Hop failed; the feature maps are what they were, and it is tried again after the next step."""


class ConflictError(LwpfError):
    """Someone else's patch stands where ours should be applied or reverted."""


class UnsupportedError(LwpfError):
    """Something that cannot be computed in this way; the message says what can."""


def unknown_value(what: str, value: object, origin: str, allowed: Iterable[str]) -> SettingsError:
    """Build the error for a name that is not in a list of names.

    Args:
        what: What the name stands for, such as ``"func_d"``.
        value: The name as given.
        origin: Where it came from, such as ``"LWPF_FUNC_D"``.
        allowed: The names that would have been right.

    Returns:
        The error, which names the nearest match when there is one.
    """
    names = sorted(allowed)
    lower = {name.lower(): name for name in names}
    text = value if isinstance(value, str) else shown(value)
    nearest = difflib.get_close_matches(text.lower(), lower, n=1, cutoff=0.5)
    hint = f"; did you mean {lower[nearest[0]]!r}?" if nearest else ""
    return SettingsError(f"unknown {what} {shown(value)} (from {origin}): allowed are {', '.join(names)}{hint}")


def shown(value: object) -> str:
    """Return a value as an error message shows it, also where it cannot be written, as an int of 5,000 digits."""
    try:
        return repr(value)
    except Exception:  # whatever an object's own code raises
        return f"an object of type {type(value).__name__}"
