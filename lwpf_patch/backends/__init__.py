"""The backends of the operator, and the choice among them.

``eager`` is the specification, ``plain`` the attention of PyTorch for a func_d that forgets nothing. ``cpu`` and
``triton`` are fused: for a func_d with a threshold, and in memory that is linear in the number of keys. What transforms
of PyTorch's ask of them they leave to ``eager``: in forward mode, in torch.func, and for second derivatives. A further
backend is a file of its own and a line in :data:`BACKENDS`.
"""

from __future__ import annotations

from .. import tracing, transforms
from ..errors import SettingsError, unknown_value
from .base import Backend, Call, Threshold
from .cpu import CPU
from .eager import Eager
from .plain import Plain
from .triton import Triton

__all__ = ["BACKENDS", "Backend", "Call", "Threshold", "choose"]

_EAGER, _PLAIN = Eager(), Plain()
#: All backends; "auto" takes the first that is made for the device and suits the call, and else the eager one.
BACKENDS: tuple[Backend, ...] = (_PLAIN, Triton(), CPU(), _EAGER)


def choose(requested: str, call: Call) -> tuple[Backend, str]:
    """Pick the backend that computes a call.

    Args:
        requested: ``"auto"`` or the name of a backend.
        call: The call.

    Returns:
        The backend, and why it is that one, in words.

    Raises:
        SettingsError: There is no such backend, or it cannot do what is asked; the error says why.
    """
    backend: Backend | None = None
    for each in BACKENDS:
        if each.name == requested:
            backend = each
    if backend is None and requested != "auto":
        raise unknown_value("backend", requested, "backend", ["auto", *(each.name for each in BACKENDS)])
    if call.is_plain():  # whatever was asked for: the other ones compute what forgets
        return _PLAIN, "nothing is forgotten"
    if backend is None:
        return _choose_automatically(call)
    reason = backend.why_not(call)
    if reason is not None:
        raise SettingsError(f"backend {requested!r} cannot do what is asked: {reason}; use backend 'auto' or 'eager'")
    return _unless_transformed(backend, "as asked")


def _choose_automatically(call: Call) -> tuple[Backend, str]:
    if tracing.is_exporting() or tracing.is_jit_tracing():
        return _EAGER, "the program is being exported"
    why_eager = "no other is made for this device"
    for backend in BACKENDS:
        if backend.device != call.query.device.type:
            continue
        why_eager = backend.why_rather_not(call) or ""
        if why_eager:
            continue
        reason = backend.why_not(call)
        if reason is None:
            return _unless_transformed(backend, "the fastest that does what is asked here")
        why_eager = f"{backend.name} cannot do what is asked: {reason}"
    return _EAGER, why_eager


def _unless_transformed(backend: Backend, why: str) -> tuple[Backend, str]:
    if backend.can_be_transformed or not transforms.are_active():
        return backend, why
    return _EAGER, f"{backend.name} has no other derivatives than those of backward(), and no transforms"
