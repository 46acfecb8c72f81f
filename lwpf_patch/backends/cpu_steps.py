"""Steps on tiles that the operators of the CPU share: the one that makes scores again, the one that keeps weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from . import eager_form
from .cpu_median import TIES
from .cpu_products import add_product
from .tiles import Tile, TiledScores


def dropout(like: Tensor, p: float, seed: Tensor, tile: Tile) -> Tensor:
    """Make the dropout mask of a tile, the same in both passes."""
    place = tile.batch.start * 2**31 + tile.rows.start
    generator = torch.Generator().manual_seed((int(seed) + place) % 2**62)
    return torch.empty_like(like).bernoulli_(1 - p, generator=generator).div_(max(1 - p, 1e-30))


def numbers(threshold: Tensor, bias: float | None) -> tuple[float, float]:
    """Return the threshold and what a forgotten score becomes, for the forward pass.

    With a threshold that is NaN all scores are forgotten, and become NaN.
    """
    a = threshold.item()
    return (math.inf, math.nan) if math.isnan(a) else (a, a if bias is None else bias)


def all_dropout(tiled: TiledScores, p: float, seed: Tensor) -> Tensor:
    """Make the dropout mask of all scores, (B H, L, S): that of both passes, tile by tile."""
    made = tiled.query.new_zeros(*tiled.query.shape[:2], tiled.key.shape[1])
    for tile in tiled.tiles():
        part = made[tile.batch, tile.rows, : tile.keys]
        part.copy_(dropout(part, p, seed, tile))
    return made


class KeySum:
    """Adds up a gradient of keys or values over the tiles of their queries.

    oneDNN is slow where it reads scores across. For it the features lie along the rows, in a sum that holds the batch
    items of one tile and is turned into the gradient with the last of their tiles.

    Args:
        total: (B H, S, E), where the gradient is to lie.
        tiled: The scores.
    """

    def __init__(self, total: Tensor, tiled: TiledScores) -> None:
        self._total, self._tiled = total, tiled
        self._turned = total.new_empty(0)

    def add(self, tile: Tile, scores: Tensor, rows: Tensor, factor: float = 1.0) -> None:
        """Add ``factor * scores^T rows``.

        Args:
            tile: The tile.
            scores: (G, rows, keys): its weights, or the gradient of its scores.
            rows: (G, rows, E): what they are multiplied with.
            factor: Factor of the product.
        """
        tiled, total = self._tiled, self._total[tile.batch]
        first = tile.rows.start == 0
        if first and tiled.uses_onednn:
            self._turned = total.new_empty(total.mT.shape)
        turned = self._turned if tiled.uses_onednn else total.mT
        if first and tiled.is_causal:  # its keys are not all: later queries see more
            turned.zero_()
            first = False
        if tiled.uses_onednn:
            add_product(turned[..., : tile.keys], rows.mT, scores, True, first, factor)
            if tile.rows.stop == tiled.query.shape[1]:
                total.copy_(turned.mT)
        else:
            add_product(total[:, : tile.keys], scores.mT, rows, False, first, factor)


def add_to_mask(grad_mask: Tensor, tiled: TiledScores, tile: Tile, inner: Tensor) -> None:
    """Add a tile's gradient of the scores to that of the mask."""
    part = grad_mask[tiled.mask_index(tile)]
    part += inner.sum_to_size(part.shape)


def add_to_ties(
    tiled: TiledScores,
    centre: Tensor,
    ties: Tensor,
    share: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_mask: Tensor,
) -> None:
    """Give each score that is equal to the median its share of the threshold's gradient."""
    if ties[0] > TIES or ties[1] < 0:  # they were not noted: look again
        for tile in tiled.tiles():
            scores, excluded = tiled.scores(tile)
            equal = scores == centre
            if excluded is not None:
                equal &= ~excluded
            inner = equal.to(scores.dtype).mul_(share)
            query, key = tiled.query[tile.batch, tile.rows], tiled.key[tile.batch, : tile.keys]
            grad_query[tile.batch, tile.rows].baddbmm_(inner, key, alpha=tiled.scale)
            grad_key[tile.batch, : tile.keys].baddbmm_(inner.mT, query, alpha=tiled.scale)
            if grad_mask.numel():
                add_to_mask(grad_mask, tiled, tile, inner)
        return
    length, keys = tiled.query.shape[1], tiled.key.shape[1]
    for position in ties[1 : 1 + int(ties[0])].tolist():
        batch, row, column = position // (length * keys), position // keys % length, position % keys
        grad_query[batch, row] += share * tiled.scale * tiled.key[batch, column]
        grad_key[batch, column] += share * tiled.scale * tiled.query[batch, row]
        if grad_mask.numel():
            tile = Tile(slice(batch, batch + 1), slice(row, row + 1), keys)
            grad_mask[tiled.mask_index(tile)][..., column] += share


def gradients_again(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients of all arguments of an operator, in a form that can be differentiated and transformed.

    Args:
        ctx: The operator's, with its arguments as both operators save them.
        grad: The gradient of the output.
    """
    query, key, value, mask, eps, *_, seed = ctx.saved_tensors
    heads, dropout_p, is_causal, tile_size, threads, onednn, mu, bias, n = ctx.options
    dropped = None
    if dropout_p > 0:
        with torch.no_grad():
            tiled = TiledScores(query, key, ctx.scale, mask, heads, is_causal, tile_size, threads, onednn)
            dropped = all_dropout(tiled, dropout_p, seed)
    heads = max(heads, 1)

    def split(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] // heads, heads, *x.shape[1:])

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = eager_form.above_threshold(
            split(query), split(key), split(value), mask, is_causal, ctx.scale, mu, bias, n, eps,
            None if dropped is None else split(dropped),
        )  # fmt: skip
        return out.flatten(0, 1)

    needed = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[4])
    *grads, grad_mask = transforms.gradients(attend, (query, key, value, mask), needed, grad)
    return *grads, None, grad_mask, *[None] * 11
