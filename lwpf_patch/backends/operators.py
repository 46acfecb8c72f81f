"""Operators of PyTorch's that need not pass through its dispatcher.

``torch.library.custom_op`` makes one operator of a backend that torch.compile, torch.export, vmap and so on see as a
whole. In plain eager code nothing looks, and its Python takes as long as a twentieth of a vision transformer's
attention on a CPU: there the same functions are called by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import CustomOpDef

#: What PyTorch is asked. No part of its public interface: should one be gone, all goes through the dispatcher.
_QUESTIONS = ("_are_functorch_transforms_active", "_len_torch_dispatch_stack", "_get_tracing_state")
_CAN_ASK = all(hasattr(torch._C, name) for name in _QUESTIONS)


class Operator:
    """An operator with a gradient, of which the first result is what counts.

    Args:
        registered: What ``torch.library.custom_op`` made of the forward and of the backward pass; the gradient of the
            first is registered here.
        direct: The two passes by themselves.
        setup_context: Saves what the backward pass needs, as ``register_autograd`` wants it.
        gradients: Returns the gradients of all arguments; takes the context, the gradient of the first result, and the
            backward pass in either form.
    """

    def __init__(
        self,
        registered: tuple[CustomOpDef, CustomOpDef],
        direct: tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]],
        setup_context: Callable[..., None],
        gradients: Callable[..., tuple[Any, ...]],
    ) -> None:
        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Tensor:
                results = direct[0](*arguments)
                setup_context(ctx, arguments, results)
                return results[0]

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
                return gradients(ctx, grad, direct[1])

        def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
            return gradients(ctx, grad, registered[1])

        registered[0].register_autograd(backward, setup_context=setup_context)
        self._registered, self._direct = registered[0], Direct

    def __call__(self, *arguments: Any) -> Tensor:
        """Returns the first result."""
        if torch.compiler.is_compiling() or _are_seen(arguments):
            return self._registered(*arguments)[0]
        return self._direct.apply(*arguments)


def _are_seen(arguments: tuple[Any, ...]) -> bool:
    """Returns whether something that works with operators is at work: a transform, a mode, a tracer, a subclass."""
    return (
        not _CAN_ASK
        or any(getattr(torch._C, name)() for name in _QUESTIONS)
        or any(isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter) for x in arguments)
    )
