"""How a call of the operator is computed: checked, cast, handed to a backend, and noted."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import autocasting, backends, compiling, reporting
from ..backends import Call
from .checks import check_inputs, with_fitting_mask

# While torch.compile traces, a note is made once, at tracing, and leaves neither a node nor a guard.
mark_used = compiling.constant(reporting.mark_used)
note_backend = compiling.constant(reporting.note_backend)


def attend(call: Call, backend: str, host: str) -> Tensor:
    """Compute a call of the operator.

    Args:
        call: The call, not yet checked.
        backend: ``"auto"`` or the name of a backend.
        host: The host whose attention calls; empty if it is none.

    Returns:
        The output, (..., L, Ev).

    Raises:
        SettingsError: The backend cannot do what is asked.
        RuntimeError: Shapes, dtypes or devices that do not go together.
        TypeError: Something else than a tensor, a number or a boolean where one is wanted.
    """
    mark_used(host)
    if call.is_plain():  # PyTorch's own attention checks and casts for itself
        return _compute(call, backend, host)
    call = with_fitting_mask(call)
    check_inputs(call)
    device = call.query.device.type
    if not autocasting.in_autocast(device):
        return _compute(call, backend, host)
    dtype = torch.get_autocast_dtype(device)
    query, key, value = (autocasting.cast(tensor, dtype) for tensor in (call.query, call.key, call.value))
    with autocasting.without_autocast(device):
        return _compute(call._replace(query=query, key=key, value=value), backend, host)


def _compute(call: Call, backend: str, host: str) -> Tensor:
    chosen, why = backends.choose(backend, call)
    note_backend(host, chosen.name, why)
    return chosen.compute(call)
