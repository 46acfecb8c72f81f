"""The implementations of the operator, and the choice among them.

``eager`` is the specification, written to be read beside the papers; every other backend is compared with it. ``cpu``
needs memory that is linear in the number of keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SettingsError, unknown_value
from ..settings import BACKENDS

if TYPE_CHECKING:
    import torch

    from ..forgetting import FuncD


#: From so many scores on, "auto" takes the backend of the CPU. Below, with several threads, the eager one is faster.
MANY_SCORES = 1 << 22


def describe(requested: str) -> str:
    """Returns, in words, what a request for a backend comes to."""
    return "auto (eager; cpu for many scores on the CPU)" if requested == "auto" else requested


def choose(requested: str, func_d: FuncD, query: torch.Tensor, key: torch.Tensor, masking: str) -> str:
    """Picks the backend that computes.

    Args:
        requested: ``"auto"`` or the name of a backend.
        func_d: The forgetting function.
        query: The query, for its device, dtype and size.
        key: The key, for its size.
        masking: ``"exclude"`` or ``"paper"``.

    Returns:
        The name of the backend.

    Raises:
        SettingsError: There is no such backend, or it cannot do what is asked; the error says why.
    """
    if requested not in BACKENDS:
        raise unknown_value("backend", requested, "backend", BACKENDS)
    if requested == "eager":
        return requested
    if requested == "auto" and query.shape[:-1].numel() * key.shape[-2] < MANY_SCORES:
        return "eager"
    reason = _why_not_cpu(func_d, query, masking)
    if reason is None:
        return "cpu"
    if requested == "cpu":
        raise SettingsError(f"backend 'cpu' cannot do what is asked: {reason}; use backend 'auto' or 'eager'")
    return "eager"


def _why_not_cpu(func_d: FuncD, query: torch.Tensor, masking: str) -> str | None:
    import torch

    from . import cpu

    if query.device.type != "cpu":
        return f"the tensors are on {query.device}"
    if type(query) not in (torch.Tensor, torch.nn.Parameter):
        return f"the query is a {type(query).__name__}"
    if not cpu.supports(query.dtype):
        return f"it does not compute in {query.dtype}"
    if func_d.threshold_form() is None:
        return f"{func_d} is not of the form s > a"
    if func_d.empty != "zero":
        return "empty='plain' needs a row's scores together"
    if masking != "exclude":
        return f"masking {masking!r} is computed as the official code does it, by the eager backend only"
    # An exported program shall run without this package, and on other devices.
    exporting = getattr(torch.compiler, "is_exporting", None)
    return "the program is being exported" if exporting is not None and exporting() else None
