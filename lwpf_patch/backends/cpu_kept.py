"""CPU, short sequences: the weights of the forward pass are kept for the backward pass.

Where the scores take no more memory than query, key, value and output, keeping them leaves memory linear, and saves the
backward pass a product of matrices and the exponentials. With P the weights of the kept keys, 0 elsewhere, and
G = dO V^T (times the dropout mask)::

    forward    P = [s > a] softmax(D(s)), or softmax_n(D(s))    out = P V
    backward   dS = P (G - rowsum(P G)), which is the backward of both;   dQ = scale dS K, dK = scale dS^T Q

The gradient of the threshold is that of :mod:`lwpf_patch.backends.cpu`, whose tiles these are too: what is computed of
a tile one step after another stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cpu_median import TIES, median
from .cpu_primitives import keep, raise_to, softmax, softmax_backward
from .cpu_products import add_product, product
from .cpu_steps import KeySum, add_to_mask, add_to_ties, dropout, gradients_again, numbers
from .operators import DirectOperator
from .tiles import TiledScores


def suits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether the scores take no more memory than query, key, value and output together."""
    length, keys = query.shape[1], key.shape[1]
    return length * keys <= (length + keys) * (query.shape[2] + value.shape[2])


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
    """Return the output; the weights; rho of each row; the threshold with and without noise; and the ties.

    The arguments, rho and the ties are those of ``cpu_attention``.
    """
    tiled = TiledScores(query, key, scale, mask, heads, is_causal, tile_size, threads, onednn)
    # With is_causal no tile reaches the last keys of the first rows.
    new = query.new_zeros if is_causal else query.new_empty
    weights = new(query.shape[0], query.shape[1], key.shape[1])
    ties = torch.zeros(TIES + 1, dtype=torch.int64)
    scratch = tiled.scratch()
    if mu is None:
        for tile in tiled.tiles():
            tiled.scores(tile, out=weights)
        tiled = tiled._replace(made=weights)
    centre = torch.full((), median(tiled, ties, scratch) if mu is None else mu, dtype=query.dtype)
    threshold = centre + eps
    a, b = numbers(threshold, bias)
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    rho = query.new_zeros(query.shape[:2])
    for tile in tiled.tiles():
        scores, excluded = tiled.scores(tile, out=weights if mu is not None else None)
        if excluded is not None:
            scores.masked_fill_(excluded, -math.inf)  # not above the threshold, so not kept
        # Unless b is above a, D(s) may take the place of s: what is above the threshold stays it, and nothing else is.
        free = scratch[: scores.numel()].view(scores.shape)
        changed = raise_to(scores, a, b, out=scores if b <= a else free)
        if excluded is not None:
            changed.masked_fill_(excluded, -math.inf)
        highest = changed.amax(-1, keepdim=True) if n > 0 and tile.keys else None
        normalised = softmax(changed, out=free)  # slower in place
        if highest is not None:
            normalised *= _share_of_keys(highest, normalised, n)
            normalised.masked_fill_(highest == -math.inf, 0)  # all of the row is n's
        if excluded is not None:
            normalised.masked_fill_(excluded, 0)  # and a row with no key left, which is NaN, gives 0
        kept = keep(normalised, scores, a, out=scores)
        if not abs(b) < math.inf:  # a row may be NaN by what it forgets, and the weights that are kept must tell
            kept += 0 * normalised.sum(-1, keepdim=True)
        if mu is None:
            rho[tile.batch, tile.rows] = (1 if n == 0 else normalised.sum(-1)) - kept.sum(-1)
        if dropout_p > 0:
            kept = kept * dropout(kept, dropout_p, seed, tile)
        product(kept, value[tile.batch, : tile.keys], tiled.uses_onednn, out=out[tile.batch, tile.rows])
    return out, weights, rho, threshold, centre, ties


def _share_of_keys(highest: Tensor, weights: Tensor, n: float) -> Tensor:
    """Return what the keys of each row have of the denominator of softmax_n, Z / (Z + n), where Z is that of softmax.

    Args:
        highest: (..., 1): the highest score, which tells Z: its weight is ``exp(highest) / Z``.
        weights: (..., S): the softmax.
        n: Above 0.
    """
    return (highest - weights.amax(-1, keepdim=True).log_() - math.log(n)).sigmoid_()


_registered = torch.library.custom_op("lwpf_patch::cpu_kept_attention", _forward, mutates_args=(), device_types="cpu")


@_registered.register_fake
def _(query, key, value, scale, mask, heads, dropout_p, is_causal, tile_size, threads, onednn, mu, bias, n, eps, seed):  # type: ignore[no-untyped-def]
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    weights = query.new_empty(query.shape[0], query.shape[1], key.shape[1])
    ties = torch.empty(TIES + 1, dtype=torch.int64, device=query.device)
    return out, weights, query.new_empty(query.shape[:2]), query.new_empty(()), query.new_empty(()), ties


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    out: Tensor,
    weights: Tensor,
    rho: Tensor,
    centre: Tensor,
    ties: Tensor,
    seed: Tensor,
    heads: int,
    dropout_p: float,
    is_causal: bool,
    tile_size: int,
    threads: int,
    onednn: bool,
    median_has_gradient: bool,
    mask_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and, if it is wanted, of the mask."""
    tiled = TiledScores(query, key, scale, mask, heads, is_causal, tile_size, threads, onednn)
    new = torch.empty_like if query.shape[1] else torch.zeros_like  # without a query, no tile writes them
    grad_query, grad_key, grad_value = new(query), new(key), new(value)
    key_sum, value_sum = KeySum(grad_key, tiled), KeySum(grad_value, tiled)
    grad_mask = torch.zeros_like(mask) if mask is not None and mask_needs_grad else query.new_zeros(0)
    scratch = tiled.scratch()
    for tile in tiled.tiles():
        kept = weights[tile.batch, tile.rows, : tile.keys]
        tile_grad, tile_keys = grad[tile.batch, tile.rows], slice(0, tile.keys)
        inner = scratch[: kept.numel()].view(kept.shape)
        product(tile_grad, value[tile.batch, tile_keys].mT, tiled.uses_onednn, out=inner)
        used = kept
        if dropout_p > 0:
            dropped = dropout(kept, dropout_p, seed, tile)
            inner *= dropped
            used = kept * dropped
        value_sum.add(tile, used, tile_grad)
        if tile.keys:
            softmax_backward(inner, kept, out=inner)
        add_product(
            grad_query[tile.batch, tile.rows], inner, key[tile.batch, tile_keys], tiled.uses_onednn, True, scale
        )
        key_sum.add(tile, inner, query[tile.batch, tile.rows], scale)
        if grad_mask.numel():
            add_to_mask(grad_mask, tiled, tile, inner)
    if median_has_gradient:
        share = -(rho * (grad * out).sum(-1)).sum() / ties[0].clamp(min=1)
        add_to_ties(tiled, centre, ties, share, grad_query, grad_key, grad_mask)
    return grad_query, grad_key, grad_value, grad_mask


_registered_backward = torch.library.custom_op(
    "lwpf_patch::cpu_kept_attention_backward", _backward, mutates_args=(), device_types="cpu"
)


@_registered_backward.register_fake
def _(grad, query, key, value, scale, mask, *rest):  # type: ignore[no-untyped-def]
    grad_mask = torch.empty_like(mask) if mask is not None and rest[-1] else query.new_empty(0)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), grad_mask


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, scale, mask, heads, dropout_p, is_causal, tile_size, threads, onednn, mu, bias, n, eps, seed = (
        inputs
    )
    out, weights, rho, _, centre, ties = output
    ctx.save_for_backward(query, key, value, mask, eps, out, weights, rho, centre, ties, seed)
    ctx.scale = scale
    ctx.set_materialize_grads(False)  # of the outputs only the first has a gradient, and the weights are large
    ctx.options = (heads, dropout_p, is_causal, tile_size, threads, onednn, mu, bias, n)
    ctx.mask_needs_grad = mask is not None and ctx.needs_input_grad[4]


def _gradients(ctx: Any, grad: Tensor, backward: Callable[..., Any]) -> tuple[Any, ...]:
    query, key, value, mask, _, *saved = ctx.saved_tensors
    *options, mu, bias, _ = ctx.options
    grads = backward(
        grad.contiguous(), query, key, value, ctx.scale, mask, *saved, *options, mu is None and bias is None,
        ctx.mask_needs_grad,
    )  # fmt: skip
    grad_mask = grads[3] if ctx.mask_needs_grad else None
    return *grads[:3], None, grad_mask, *[None] * 11


operator = DirectOperator(
    (_registered, _registered_backward), (_forward, _backward), _setup_context, _gradients, gradients_again
)
