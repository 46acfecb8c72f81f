"""CPU: tiles of scores that stay in the cache and are made again in the backward pass, in linear memory.

For the threshold form of func_d (ReLU, PFU): ``D(s) = s`` where ``s > a``, else ``b``. Nothing the size of all scores
is ever allocated, for the median neither. Each step over a tile is one of torch's own vectorised functions, which share
it among the threads: tiles in threads of Python's own would hand its lock over at every step.

With R the kept keys, Z the denominator (n of softmax_n included), L = log Z + the row's maximum, and G = dO V^T (times
the dropout mask):

    forward    P = [R] exp(s - L)          out = P V
    backward   dS = P (G - delta), delta = rowsum(dO * out);   dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO
    threshold  db = -sum over rows of rho * delta, where rho = 1 - n / Z - rowsum(P) is what the forgotten keys weigh

A forgotten key has no gradient of its own. Where b is the threshold a, and a the median, db goes to the scores that are
equal to the median, shared evenly.

:mod:`lwpf_patch.backends.cpu_native` computes the same in C++ where there is a compiler, and comes first. What is left
are dropout and gradients of masks; of these, short sequences, whose weights may be kept in that memory too, go to
:mod:`lwpf_patch.backends.cpu_kept`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import compiling
from . import cpu_kept, cpu_native, cpu_products
from .arguments import batch_shape, flat_mask, representable_factor, widen_mask
from .base import Call, FusedBackend
from .cpu_median import TIES, median
from .cpu_primitives import keep, raise_to
from .cpu_products import add_product, product
from .cpu_steps import KeySum, add_to_mask, add_to_ties, dropout, gradients_again, numbers
from .eager_form import repeat_heads
from .operators import DirectOperator
from .tiles import TiledScores

#: From so many scores on, "auto" takes this backend. Below, its calls cost more than they save.
MANY_SCORES = 1 << 19
#: Scores in a tile for each thread: few enough for the caches, enough rows for products of matrices to be fast.
TILE = 1 << 19
#: Scores no larger than this need no maximum taken off before their exponentials, which are far from any limit.
BOUND = 60.0


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
        few = call.query.shape[:-1].numel() * call.key.shape[-2] < MANY_SCORES
        return "there are few scores" if few else None

    def compute_threshold(self, call: Call, mu: float | None, bias: float | None, eps: Tensor | None) -> Tensor:
        """Compute a call; see :meth:`FusedBackend.compute_threshold`."""
        key, value = call.key, call.value
        if call.enable_gqa:
            key, value = repeat_heads(call.query, key), repeat_heads(call.query, value)
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
    flat = [
        tensor.expand(*lead, *tensor.shape[-2:]).reshape(lead.numel(), *tensor.shape[-2:])
        for tensor in (query, key, value)
    ]
    mask = None
    if attn_mask is not None:
        mask = widen_mask(flat_mask(attn_mask, lead), flat[0].dtype)
        if mask.shape[-1] == 1:
            mask = mask.expand(*mask.shape[:-1], key.shape[-2])
    seed = torch.randint(2**62, ()) if dropout_p > 0 else torch.zeros((), dtype=torch.int64)
    noise = torch.zeros((), dtype=flat[0].dtype) if eps is None else eps.to(flat[0].dtype)
    onednn = _onednn_suits(flat[0].dtype)
    heads = max(1, lead[-1]) if lead else 1
    mask_needs_grad = mask is not None and mask.requires_grad
    if cpu_native.suits(flat, dropout_p, mask_needs_grad) and _native_is_there():
        chosen = native_operator
    else:
        chosen = cpu_kept.operator if cpu_kept.suits(*flat) else operator
    out = chosen(*flat, factor, mask, heads, dropout_p, is_causal, TILE, _threads(), onednn, mu, bias, n, noise, seed)
    return out.reshape(*lead, *out.shape[-2:]).to(dtype)


@compiling.constant
def _threads() -> int:
    return min(torch.get_num_threads(), 32)


@compiling.constant
def _native_is_there() -> bool:
    return cpu_native.is_there()


@compiling.constant
def _onednn_suits(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and cpu_products.onednn_is_faster()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    heads: int,
    dropout_p: float,
    is_causal: bool,
    tile_size: int,
    threads: int,
    onednn: bool,
    mu: float | None,
    bias: float | None,
    n: float,
    eps: Tensor,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output; L and rho of each row; the threshold with and without noise; and the ties.

    The ties are the number of scores that are equal to the median, and the positions of some of them.
    """
    tiled = TiledScores(query, key, scale, mask, heads, is_causal, tile_size, threads, onednn)
    ties = torch.zeros(TIES + 1, dtype=torch.int64)
    scratch = tiled.scratch()
    centre = torch.full((), median(tiled, ties, scratch) if mu is None else mu, dtype=query.dtype)
    threshold = centre + eps
    a, b = numbers(threshold, bias)
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    log_sum = query.new_empty(query.shape[:2])
    rho = query.new_zeros(query.shape[:2])
    small = _are_small(tiled, b, n)
    log_n = math.log(n) if n > 0 else -math.inf
    for tile in tiled.tiles():
        scores, excluded = tiled.scores(tile)
        if excluded is not None:
            scores.masked_fill_(excluded, a)  # not above the threshold, so not kept
        weights = raise_to(scores, a, b, out=scratch[: scores.numel()].view(scores.shape))
        if small:
            weights.exp_()
        else:
            if excluded is not None:
                weights.masked_fill_(excluded, -math.inf)
            highest = weights.amax(-1, keepdim=True)  # -inf, and the row NaN, where no score is higher
            if n:
                highest.clamp_(min=log_n)
            _exp_(weights.sub_(highest))
        if excluded is not None:
            weights.masked_fill_(excluded, 0)
        total = weights.sum(-1, keepdim=True)
        if excluded is not None or not tile.keys:
            total.masked_fill_(total == 0, 1)  # a row with no key left gives 0
        kept = keep(weights, scores, a, out=weights)
        added = 0.0 if n == 0 else n if small else (log_n - highest).exp_()
        total += added
        if mu is None:
            rho[tile.batch, tile.rows] = 1 - ((kept.sum(-1, keepdim=True) + added) / total).squeeze(-1)
        if dropout_p > 0:
            kept *= dropout(kept, dropout_p, seed, tile)
        product(kept, value[tile.batch, : tile.keys], tiled.uses_onednn, out=out[tile.batch, tile.rows]).div_(total)
        log_total = total.log_() if small else total.log_().add_(highest)
        log_sum[tile.batch, tile.rows] = log_total.squeeze(-1)
    return out, log_sum, rho, threshold, centre, ties


def _are_small(tiled: TiledScores, b: float, n: float) -> bool:
    """Return whether the exponentials of all scores and of b may be taken as they are, and n be added to them.

    Then nothing need be subtracted from a tile, in neither pass. No score is larger than the norms of its query and of
    its key make it.
    """
    if not tiled.query.shape[:2].numel() or not tiled.key.shape[1]:
        return True  # there is none
    if tiled.mask is not None and tiled.mask.dtype != torch.bool:
        return False
    largest = tiled.query.norm(dim=-1).amax() * tiled.key.norm(dim=-1).amax()
    # With a and b of -inf, no score is forgotten.
    return largest.item() * abs(tiled.scale) <= BOUND and (abs(b) <= BOUND or b == -math.inf) and n <= math.exp(BOUND)


def _exp_(x: Tensor) -> Tensor:
    """Take the exponentials in place, none of them denormal: that takes a processor up to 200 times as long."""
    return x.clamp_(min=-87.0 if x.dtype == torch.float32 else -700.0).exp_()


_registered = torch.library.custom_op("lwpf_patch::cpu_attention", _forward, mutates_args=(), device_types="cpu")


@_registered.register_fake
def _fake(query, key, value, *rest):  # type: ignore[no-untyped-def]
    rows = query.new_empty(query.shape[:2])
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    ties = torch.empty(TIES + 1, dtype=torch.int64, device=query.device)
    return out, rows, torch.empty_like(rows), query.new_empty(()), query.new_empty(()), ties


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    rho: Tensor,
    threshold: Tensor,
    centre: Tensor,
    ties: Tensor,
    seed: Tensor,
    heads: int,
    dropout_p: float,
    is_causal: bool,
    tile_size: int,
    threads: int,
    onednn: bool,
    mu: float | None,
    bias: float | None,
    n: float,
    mask_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and, if it is wanted, of the mask."""
    tiled = TiledScores(query, key, scale, mask, heads, is_causal, tile_size, threads, onednn)
    a = threshold.item()
    if math.isnan(a) or (bias is None and a == math.inf):
        a = -math.inf  # all weights are NaN, and stay it
    new = torch.empty_like if query.shape[1] else torch.zeros_like  # without a query, no tile writes them
    grad_query, grad_key, grad_value = new(query), new(key), new(value)
    key_sum, value_sum = KeySum(grad_key, tiled), KeySum(grad_value, tiled)
    grad_mask = torch.zeros_like(mask) if mask is not None and mask_needs_grad else query.new_zeros(0)
    delta = (grad * out).sum(-1, keepdim=True)
    small = _are_small(tiled, a if bias is None else bias, n)
    if small:  # exp(s - L) = exp(s) exp(-L), and exp(-L) can multiply rows of features in place of scores
        row = (-log_sum).exp_()[..., None]
        grad, row_delta = grad * row, delta * row
    scratch = tiled.scratch()
    for tile in tiled.tiles():
        scores, excluded = tiled.scores(tile)
        if excluded is not None:
            scores.masked_fill_(excluded, a)
        weights = scratch[: scores.numel()].view(scores.shape)
        if small:
            torch.exp(scores, out=weights)
        else:
            _exp_(torch.sub(scores, log_sum[tile.batch, tile.rows, None], out=weights))
        weights = keep(weights, scores, a, out=weights)
        tile_grad, tile_keys = grad[tile.batch, tile.rows], slice(0, tile.keys)
        reusable = None if tiled.uses_onednn else scores
        inner = product(tile_grad, value[tile.batch, tile_keys].mT, tiled.uses_onednn, out=reusable)
        if dropout_p > 0:
            dropped = dropout(weights, dropout_p, seed, tile)
            inner *= dropped
            used = weights * dropped
        else:
            used = weights
        value_sum.add(tile, used, tile_grad)
        inner.sub_((row_delta if small else delta)[tile.batch, tile.rows]).mul_(weights)
        add_product(
            grad_query[tile.batch, tile.rows], inner, key[tile.batch, tile_keys], tiled.uses_onednn, True, scale
        )
        key_sum.add(tile, inner, query[tile.batch, tile.rows], scale)
        if grad_mask.numel():
            add_to_mask(grad_mask, tiled, tile, inner)
    if mu is None and bias is None:
        # The forgotten scores become the threshold, and pass their gradient on to it; the comparison has none.
        share = -(rho * delta.squeeze(-1)).sum() / ties[0].clamp(min=1)
        add_to_ties(tiled, centre, ties, share, grad_query, grad_key, grad_mask)
    return grad_query, grad_key, grad_value, grad_mask


_registered_backward = torch.library.custom_op(
    "lwpf_patch::cpu_attention_backward", _backward, mutates_args=(), device_types="cpu"
)


@_registered_backward.register_fake
def _fake_backward(grad, query, key, value, scale, mask, *rest):  # type: ignore[no-untyped-def]
    grad_mask = torch.empty_like(mask) if mask is not None and rest[-1] else query.new_empty(0)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), grad_mask


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, scale, mask, heads, dropout_p, is_causal, tile_size, threads, onednn, mu, bias, n, eps, seed = (
        inputs
    )
    ctx.save_for_backward(query, key, value, mask, eps, *output, seed)
    ctx.scale = scale
    ctx.set_materialize_grads(False)  # of the outputs only the first has a gradient
    ctx.options = (heads, dropout_p, is_causal, tile_size, threads, onednn, mu, bias, n)
    ctx.mask_needs_grad = mask is not None and ctx.needs_input_grad[4]


def _gradients(ctx: Any, grad: Tensor, backward: Callable[..., Any]) -> tuple[Any, ...]:
    query, key, value, mask, _, *saved = ctx.saved_tensors
    grads = backward(grad.contiguous(), query, key, value, ctx.scale, mask, *saved, *ctx.options, ctx.mask_needs_grad)
    grad_mask = grads[3] if ctx.mask_needs_grad else None
    return *grads[:3], None, grad_mask, *[None] * 11


operator = DirectOperator(
    (_registered, _registered_backward), (_forward, _backward), _setup_context, _gradients, gradients_again
)


def _native_or(tiled: Callable[..., Any], native: Callable[..., Any]) -> Callable[..., Any]:
    """Return a pass that is computed natively, or tile by tile where what was compiled does not do what it should."""

    @functools.wraps(tiled)
    def compute(*arguments: Any) -> Any:
        return (native if cpu_native.why_not() is None else tiled)(*arguments)

    return compute


_native_passes = _native_or(_forward, cpu_native.forward), _native_or(_backward, cpu_native.backward)
_registered_native = torch.library.custom_op(
    "lwpf_patch::cpu_native_attention", _native_passes[0], mutates_args=(), device_types="cpu"
)
_registered_native_backward = torch.library.custom_op(
    "lwpf_patch::cpu_native_attention_backward", _native_passes[1], mutates_args=(), device_types="cpu"
)
_registered_native.register_fake(_fake)
_registered_native_backward.register_fake(_fake_backward)
native_operator = DirectOperator(
    (_registered_native, _registered_native_backward), _native_passes, _setup_context, _gradients, gradients_again
)
