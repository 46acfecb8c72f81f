"""The implementations of the operator, and the choice among them.

``eager`` is the specification, written to be read beside the papers; every other backend is compared with it. ``cpu``
and ``triton`` are fused: for the threshold form of func_d, and in memory that is linear in the number of keys. What
transforms of PyTorch's ask of them they leave to ``eager``: in forward mode, in torch.func, and for second derivatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SettingsError, unknown_value
from ..settings import BACKENDS

if TYPE_CHECKING:
    import torch

    from ..forgetting import FuncD


#: From so many scores on, "auto" takes the backend of the CPU. Below, its calls cost more than they save.
MANY_SCORES = 1 << 19


def describe(requested: str) -> str:
    """Returns, in words, what a request for a backend comes to."""
    if requested != "auto":
        return requested
    return "auto (triton on CUDA of capability 8.0 and later; cpu for many scores on the CPU; eager otherwise)"


def choose(
    requested: str,
    func_d: FuncD,
    query: torch.Tensor,
    key: torch.Tensor,
    masking: str,
    value: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> tuple[str, str]:
    """Picks the backend that computes.

    Args:
        requested: ``"auto"`` or the name of a backend.
        func_d: The forgetting function.
        query: The query, for its device, dtype and size.
        key: The key, for its size.
        masking: ``"exclude"`` or ``"paper"``.
        value: The value, for its width; None: that of the query.
        alpha: Of the normalisation Sep; 1 is the softmax.

    Returns:
        The name of the backend, and why it is that one, in words.

    Raises:
        SettingsError: There is no such backend, or it cannot do what is asked; the error says why.
    """
    if requested not in BACKENDS:
        raise unknown_value("backend", requested, "backend", BACKENDS)
    if requested == "eager":
        return requested, "as asked"
    if requested == "auto" and (_is_exporting() or _is_tracing()):
        return "eager", "the program is being exported"
    fused = _fused_for(query, key) if requested == "auto" else requested
    if fused is None:
        return "eager", "there are few scores" if query.device.type == "cpu" else "no other is made for this device"
    reason = _why_not(fused, func_d, query, value, masking, alpha)
    if reason is None:
        from .. import transforms

        if transforms.are_active():
            return "eager", f"{fused} has no other derivatives than those of backward(), and no transforms"
        return fused, "as asked" if requested == fused else "the fastest that does what is asked here"
    if requested == fused:
        raise SettingsError(f"backend {fused!r} cannot do what is asked: {reason}; use backend 'auto' or 'eager'")
    return "eager", f"{fused} cannot do what is asked: {reason}"


def _fused_for(query: torch.Tensor, key: torch.Tensor) -> str | None:
    """Returns which fused backend suits the tensors' device and size, None if none does."""
    if query.device.type == "cuda":
        return "triton"
    if query.device.type == "cpu" and query.shape[:-1].numel() * key.shape[-2] >= MANY_SCORES:
        return "cpu"
    return None


def _why_not(
    fused: str, func_d: FuncD, query: torch.Tensor, value: torch.Tensor | None, masking: str, alpha: float
) -> str | None:
    """Returns why a fused backend cannot do what is asked, None if it can."""
    import torch

    from . import cpu, triton

    if alpha != 1.0:
        return "sep other than 'softmax' needs a row's scores together"
    if _is_exporting() or (_is_tracing() and torch.onnx.is_in_onnx_export()):
        # Such a program shall run without this package, on other devices, and for other sizes: none is looked at.
        return "the program is being exported"
    if type(query) not in (torch.Tensor, torch.nn.Parameter):
        return f"the query is a {type(query).__name__}"
    reason = cpu.why_not(query) if fused == "cpu" else triton.why_not(query, value)
    if reason is not None:
        return reason
    if func_d.threshold_form() is None:
        return f"{func_d} is not of the form s > a"
    if func_d.empty != "zero":
        return "empty='plain' needs a row's scores together"
    if masking != "exclude":
        return f"masking {masking!r} is computed as the official code does it, by the eager backend only"
    return None


def _is_exporting() -> bool:
    import torch

    exporting = getattr(torch.compiler, "is_exporting", None)  # since 2.7
    return exporting is not None and exporting()


def _is_tracing() -> bool:
    import torch

    return not torch.compiler.is_compiling() and torch.jit.is_tracing()  # type: ignore[no-untyped-call]
