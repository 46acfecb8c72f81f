"""Operators of PyTorch's that need not pass through its dispatcher.

``torch.library.custom_op`` makes one operator of a backend that torch.compile, torch.export, modes and so on see as a
whole. In plain eager code nothing looks, and its Python takes as long as a twentieth of a vision transformer's
attention on a CPU: there the same functions are called by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode

from .. import transforms


class DirectOperator:
    """An operator with a gradient, of which the first result is what counts.

    Its gradient has one too, where it is asked for: that of the plain form, computed again.

    Args:
        registered: What ``torch.library.custom_op`` made of the forward and of the backward pass; the gradient of the
            first is registered here.
        direct: The two passes by themselves.
        setup_context: Saves what the backward pass needs, as ``register_autograd`` wants it.
        gradients: Returns the gradients of all arguments; takes the context, the gradient of the first result, and the
            backward pass in either form.
        gradients_again: Returns the same in a form that can be differentiated and transformed; takes the context and
            the gradient of the first result.
    """

    def __init__(
        self,
        registered: tuple[CustomOpDef, CustomOpDef],
        direct: tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]],
        setup_context: Callable[..., None],
        gradients: Callable[..., tuple[Any, ...]],
        gradients_again: Callable[..., tuple[Any, ...]],
    ) -> None:
        def differentiate(ctx: Any, grad: Tensor | None, backward: Callable[..., Any]) -> tuple[Any, ...]:
            if grad is None:  # something between this and the loss has no gradient
                return (None,) * len(ctx.needs_input_grad)
            return gradients_again(ctx, grad) if transforms.recompute(grad) else gradients(ctx, grad, backward)

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Tensor:
                results = direct[0](*arguments)
                setup_context(ctx, arguments, results)
                return results[0]

            @staticmethod
            def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
                return differentiate(ctx, grad, direct[1])

        def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
            return differentiate(ctx, grad, registered[1])

        registered[0].register_autograd(backward, setup_context=setup_context)
        self._registered, self._direct = registered[0], Direct

    def __call__(self, *arguments: Any) -> Tensor:
        """Return the first result."""
        if torch.compiler.is_compiling() or _are_seen(arguments):
            return self._registered(*arguments)[0]
        return self._direct.apply(*arguments)


def _can_ask() -> bool:
    """Return whether the one question that is no part of PyTorch's public interface gets the answer expected."""

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    try:
        before = torch._C._len_torch_dispatch_stack()
        with Mode():  # type: ignore[no-untyped-call]
            return torch._C._len_torch_dispatch_stack() == before + 1
    except Exception:  # whatever it is, it is not what is expected
        return False


_CAN_ASK = _can_ask()


def _are_seen(arguments: tuple[Any, ...]) -> bool:
    """Return whether something that works with operators is at work: a transform, a mode, a tracer, a subclass."""
    return (
        not _CAN_ASK
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        or transforms.are_active()
        or any(isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter) for x in arguments)
    )
