"""Transforms of PyTorch's that a fused computation cannot follow, and derivatives of what has a first one only.

A fused forward and backward pass know one derivative, in reverse. Whatever else is asked is computed from a plain form
of the same function: by operators of PyTorch's that can be transformed, and differentiated without end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import compiling


def _ask() -> bool:
    # No part of PyTorch's public interface, either of the two.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _can_ask() -> bool:
    """Return whether the question gets the answers expected."""
    answers = []

    def ask(x: Tensor) -> Tensor:
        answers.append(_ask())
        return x

    try:
        torch.func.vmap(ask)(torch.zeros(1, device="cpu"))
        with forward_ad.dual_level():
            ask(torch.zeros(1, device="cpu"))
    except Exception:  # whatever it is, it is not what is expected
        return False
    return answers == [True, True]


_CAN_ASK = _can_ask()


# torch.compile may take it for a constant: transforms in the code that it traces are at work then, and where those
# around it change, it traces again.
@compiling.constant
def asked() -> bool:
    """Return what :func:`are_active` does, unless torch.compile traced this with forward mode off."""
    return not _CAN_ASK or _ask()


def are_active() -> bool:
    """Return whether a transform of torch.func, or differentiation in forward mode, is at work.

    True too where this PyTorch cannot be asked: then nothing is computed by what could be wrong.
    """
    # torch.compile has to see the level that it takes for granted, or it would not trace again at another.
    return asked() or forward_ad._current_level >= 0


def recompute(grad: Tensor) -> bool:
    """Return whether a backward pass is itself to be differentiated, or transformed: see :func:`gradients`.

    Args:
        grad: The gradient that it gets.
    """
    return torch.is_grad_enabled() or are_active() or (not torch.compiler.is_compiling() and _is_batched(grad))


# Of torch.autograd.grad(is_grads_batched=True), which has a vmap of its own. If the question is gone, PyTorch raises.
_is_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda grad: False)


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Return gradients that can be differentiated in their turn.

    Args:
        function: The plain form of a function.
        inputs: Its arguments.
        needed: Whether the gradient of each is wanted.
        grad: The gradient of its result.

    Returns:
        The gradients of the inputs, None where it is not needed. With grad mode on they are functions of the inputs
        and of ``grad``.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, because one input may have been computed from another, or be the same.
        aliases = [x if x is None else x.view_as(x) for x in inputs]
        wanted = [x for x, need in zip(aliases, needed, strict=True) if need and x is not None]
        found = torch.autograd.grad(function(*aliases), wanted, grad, create_graph=create_graph, materialize_grads=True)
    each = iter(found)
    return [next(each) if need and x is not None else None for x, need in zip(inputs, needed, strict=True)]
