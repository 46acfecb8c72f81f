"""Steps on tiles that the operators of the CPU share: the one that makes scores again, the one that keeps weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu_median import TIES
from .cpu_products import add_product
from .tiles import Problem, Tile


def keep(weights: Tensor, scores: Tensor, a: float, out: Tensor) -> Tensor:
    """Copies to out, which may be one of the others, the weights of the scores above the threshold, and 0 elsewhere.

    Several times as fast as where().
    """
    return torch.ops.aten.threshold_backward.grad_input(weights, scores, a, grad_input=out)


def dropout(like: Tensor, p: float, seed: Tensor, tile: Tile) -> Tensor:
    """Makes the dropout mask of a tile, the same in both passes."""
    place = tile.batch.start * 2**31 + tile.rows.start
    generator = torch.Generator().manual_seed((int(seed) + place) % 2**62)
    return torch.empty_like(like).bernoulli_(1 - p, generator=generator).div_(max(1 - p, 1e-30))


def add_to_query_and_key(
    problem: Problem, tile: Tile, inner: Tensor, grad_query: Tensor, grad_key: Tensor, first: bool, first_query: bool
) -> None:
    """Adds what a tile's gradient of the scores gives query and key.

    Args:
        problem: The problem.
        tile: The tile.
        inner: The gradient of its scores.
        grad_query: (B H, L, E).
        grad_key: (B H, E, S), which is faster than transposing the scores.
        first: Whether this is the first tile of its keys, whose gradient is not there yet.
        first_query: The same for the queries.
    """
    query, key = problem.query[tile.batch, tile.rows], problem.key[tile.batch, : tile.keys]
    own, shared = grad_query[tile.batch, tile.rows], grad_key[tile.batch, :, : tile.keys]
    add_product(own, inner, key, problem.uses_onednn, first_query, problem.scale)
    add_product(shared, query.mT, inner, problem.uses_onednn, first, problem.scale)


def add_to_mask(grad_mask: Tensor, problem: Problem, tile: Tile, inner: Tensor) -> None:
    """Adds a tile's gradient of the scores to that of the mask."""
    part = grad_mask[problem.mask_index(tile)]
    part += inner.sum_to_size(part.shape)


def add_to_ties(
    problem: Problem,
    centre: Tensor,
    ties: Tensor,
    share: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_mask: Tensor,
) -> None:
    """Gives each score that is equal to the median its share of the threshold's gradient."""
    if ties[0] > TIES or ties[1] < 0:  # they were not noted: look again
        for tile in problem.tiles():
            scores, excluded = problem.scores(tile)
            equal = scores == centre
            if excluded is not None:
                equal &= ~excluded
            inner = equal.to(scores.dtype).mul_(share)
            add_to_query_and_key(problem, tile, inner, grad_query, grad_key, first=False, first_query=False)
            if grad_mask.numel():
                add_to_mask(grad_mask, problem, tile, inner)
        return
    length, keys = problem.query.shape[1], problem.key.shape[1]
    for position in ties[1 : 1 + int(ties[0])].tolist():
        batch, row, column = position // (length * keys), position // keys % length, position % keys
        grad_query[batch, row] += share * problem.scale * problem.key[batch, column]
        grad_key[batch, :, column] += share * problem.scale * problem.query[batch, row]
        if grad_mask.numel():
            tile = Tile(slice(batch, batch + 1), slice(row, row + 1), keys)
            grad_mask[problem.mask_index(tile)][..., column] += share
