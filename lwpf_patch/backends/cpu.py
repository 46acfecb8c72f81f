"""CPU: tiles of scores that stay in the cache and are made again in the backward pass, in linear memory.

For the threshold form of func_d (ReLU, PFU): ``D(s) = s`` where ``s > a``, else ``b``. Nothing the size of all scores
is ever allocated, for the median neither. :mod:`lwpf_patch.backends.cpu_native` computes in C++; where it cannot,
:mod:`lwpf_patch.backends.cpu_tiles` does, by PyTorch's operators.

With R the kept keys, Z the denominator (n of softmax_n included), L = log Z + the row's maximum, and G = dO V^T (times
the dropout mask):

    forward    P = [R] exp(s - L)          out = P V
    backward   dS = P (G - delta), delta = rowsum(dO * out);   dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO
    threshold  db = -sum over rows of rho * delta, where rho = 1 - n / Z - rowsum(P) is what the forgotten keys weigh

A forgotten key has no gradient of its own. Where b is the threshold a, and a the median, db goes to the scores that are
equal to the median, shared evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import compiling, transforms
from . import cpu_native, cpu_tiles, eager_form
from .arguments import batch_shape, flat_mask, representable_factor, widen_mask
from .base import Call, FusedBackend
from .cpu_dropout import dropout
from .cpu_scores import Given
from .operators import DirectOperator

#: From so many scores on, "auto" takes this backend. Below, its calls cost more than they save.
MANY_SCORES = 1 << 19
#: The same where the C++ is compiled: see :func:`lwpf_patch.backends.cpu_native.is_worth_it`.
MANY_SCORES_NATIVELY = 1 << 10


class CPU(FusedBackend):
    """Computes on the CPU, tile by tile."""

    name = "cpu"
    device = "cpu"

    def why_not_here(self, call: Call) -> str | None:
        """Return why it cannot compute with such tensors; None: it can."""
        query = call.query
        if query.device.type != "cpu":
            return f"the tensors are on {query.device}"
        if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"it does not compute in {query.dtype}"
        return None

    def why_rather_not(self, call: Call) -> str | None:
        """Return that there are too few scores for it to be worth it; None: there are enough."""
        scores = call.query.shape[:-1].numel() * call.key.shape[-2]
        if scores >= MANY_SCORES or (scores >= MANY_SCORES_NATIVELY and _native_is_worth_it()):
            return None
        return "there are few scores"

    def compute_threshold(self, call: Call, mu: float | None, bias: float | None, eps: Tensor | None) -> Tensor:
        """Compute a call; see :meth:`FusedBackend.compute_threshold`."""
        key, value = call.key, call.value
        if call.enable_gqa:
            key, value = eager_form.repeat_heads(call.query, key), eager_form.repeat_heads(call.query, value)
        return attention(
            call.query, key, value, call.attn_mask, call.dropout_p, call.is_causal, call.scale, mu, bias, call.sep.n,
            eps,
        )  # fmt: skip


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    mu: float | None,
    bias: float | None,
    n: float,
    eps: Tensor | None,
) -> Tensor:
    """Attention with the threshold form of partial forgetting.

    Args:
        query: (..., L, E).
        key: (..., S, E).
        value: (..., S, Ev).
        attn_mask: Broadcastable to (..., L, S), boolean or additive.
        dropout_p: Probability that a weight is dropped.
        is_causal: Whether query i sees the keys 0 to i only.
        scale: Factor of the scores, None for ``E ** -0.5``.
        mu: The threshold without noise; None: the median of all scores.
        bias: What a forgotten score becomes; None: the threshold.
        n: What is added to the denominator.
        eps: Noise that is added to the threshold, of one element; None: none.

    Returns:
        (..., L, Ev), of the query's dtype.
    """
    lead = batch_shape(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    factor = representable_factor(query, scale, query.dtype)
    four = (lead[:-1].numel(), lead[-1]) if lead else (1, 1)
    query, key, value = (_four_dimensions(tensor, lead, four) for tensor in (query, key, value))
    mask = None
    if attn_mask is not None:
        mask = widen_mask(flat_mask(attn_mask, lead), query.dtype)
        if mask.shape[-1] == 1:
            mask = mask.expand(*mask.shape[:-1], key.shape[2])
    seed = torch.randint(2**62, (), device="cpu") if dropout_p > 0 else None
    native = query.numel() * key.numel() * value.numel() > 0 and _native_is_there()
    out = operator(
        query, key, value, factor, mask, dropout_p, is_causal, native, _threads(), mu, bias, n, eps, seed
    )  # fmt: skip
    return out.reshape(*lead, *out.shape[-2:]).to(dtype)


def _four_dimensions(tensor: Tensor, lead: torch.Size, four: tuple[int, int]) -> Tensor:
    """Return (B, H, rows, features), where the heads are the last of the batch dimensions."""
    if tensor.dim() == 4 and tensor.shape[:2] == lead:
        return tensor
    return tensor.expand(*lead, *tensor.shape[-2:]).reshape(*four, *tensor.shape[-2:])


@compiling.constant
def _threads() -> int:
    return min(torch.get_num_threads(), 32)


@compiling.constant
def _native_is_worth_it() -> bool:
    return cpu_native.is_worth_it()


@compiling.constant
def _native_is_there() -> bool:
    return cpu_native.is_there()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    native: bool,
    threads: int,
    mu: float | None,
    bias: float | None,
    n: float,
    eps: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the forward pass.

    Args:
        query: (B, H, L, E), of float32 or float64, as are the others.
        key: (B, H, S, E).
        value: (B, H, S, Ev).
        scale: As the next ones, see :class:`lwpf_patch.backends.cpu_scores.Given`.
        mask: Of the scores.
        dropout_p: Of the weights.
        is_causal: Of the scores.
        native: Whether the C++ computes, if it is what it should be.
        threads: How many threads it takes at most.
        mu: As the next two, see there.
        bias: Of the forgotten scores.
        n: Of softmax_n.
        eps: The noise of the threshold, (); None: none.
        seed: Of dropout.

    Returns:
        The output, (B, H, L, Ev); L and rho of each row, (2, B, H, L); and, in float64, the threshold with and without
        noise and the number of scores that are equal to the median.
    """
    given = Given(scale, mask, dropout_p, is_causal, mu, bias, n, seed)
    if native and cpu_native.why_not() is None:
        return cpu_native.forward(query, key, value, given, eps, threads)
    return cpu_tiles.forward(query, key, value, given, eps)


_registered = torch.library.custom_op("lwpf_patch::cpu_attention", _forward, mutates_args=(), device_types="cpu")


@_registered.register_fake
def _fake(query, key, value, *rest):  # type: ignore[no-untyped-def]
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(2, *query.shape[:3]), query.new_empty(3, dtype=torch.float64)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    out: Tensor,
    rows: Tensor,
    found: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    native: bool,
    threads: int,
    mu: float | None,
    bias: float | None,
    n: float,
    mask_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and, if it is wanted, of the mask."""
    given = Given(scale, mask, dropout_p, is_causal, mu, bias, n, seed)
    if native and cpu_native.why_not() is None:
        return cpu_native.backward(grad, query, key, value, given, out, rows, found, mask_needs_grad, threads)
    return cpu_tiles.backward(grad, query, key, value, given, out, rows, found, mask_needs_grad)


_registered_backward = torch.library.custom_op(
    "lwpf_patch::cpu_attention_backward", _backward, mutates_args=(), device_types="cpu"
)


@_registered_backward.register_fake
def _fake_backward(grad, query, key, value, scale, mask, *rest):  # type: ignore[no-untyped-def]
    grad_mask = query.new_empty(mask.shape if mask is not None and rest[-1] else 0)
    return (*(x.new_empty(x.shape) for x in (query, key, value)), grad_mask)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, scale, mask, dropout_p, is_causal, native, threads, mu, bias, n, eps, seed = inputs
    ctx.save_for_backward(query, key, value, mask, eps, *output, seed)
    ctx.scale = scale
    ctx.set_materialize_grads(False)  # of the outputs only the first has a gradient
    ctx.options = (dropout_p, is_causal, native, threads, mu, bias, n)
    ctx.mask_needs_grad = mask is not None and ctx.needs_input_grad[4]


def _gradients(ctx: Any, grad: Tensor, backward: Callable[..., Any]) -> tuple[Any, ...]:
    query, key, value, mask, _, *saved = ctx.saved_tensors
    grads = backward(grad, query, key, value, ctx.scale, mask, *saved, *ctx.options, ctx.mask_needs_grad)
    return *grads[:3], None, grads[3] if ctx.mask_needs_grad else None, *[None] * 9


def _gradients_again(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients of all arguments in a form that can be differentiated and transformed."""
    query, key, value, mask, eps, *_, seed = ctx.saved_tensors
    dropout_p, is_causal, _, _, mu, bias, n = ctx.options
    dropped = None
    if seed is not None:
        rows = torch.arange(query.shape[:3].numel(), device="cpu").view(query.shape[:3])
        dropped = dropout(int(seed), dropout_p, rows, key.shape[2], query.dtype)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return eager_form.above_threshold(query, key, value, mask, is_causal, ctx.scale, mu, bias, n, eps, dropped)

    needed = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[4])
    *grads, grad_mask = transforms.gradients(attend, (query, key, value, mask), needed, grad)
    return *grads, None, grad_mask, *[None] * 9


operator = DirectOperator(
    (_registered, _registered_backward), (_forward, _backward), _setup_context, _gradients, _gradients_again
)
