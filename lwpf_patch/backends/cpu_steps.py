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


def forget(scores: Tensor, a: float, b: float, out: Tensor) -> Tensor:
    """Copies to out, which may be the scores, those above the threshold, and b elsewhere."""
    return torch.ops.aten.threshold.out(scores, a, b, out=out)


def softmax_backward(inner: Tensor, weights: Tensor) -> Tensor:
    """Puts the gradient of the scores, P (G - rowsum(P G)), in the place of G, that of the weights P."""
    if _softmax_backward_is_right:
        return torch.ops.aten._softmax_backward_data.out(inner, weights, -1, inner.dtype, grad_input=inner)
    return inner.sub_((weights * inner).sum(-1, keepdim=True)).mul_(weights)


# PyTorch does not promise what these functions of its own do to memory that they both read and write, or to tiles that
# are a part of each row: it is seen here, in numbers that are exact.


def _threshold_is_right() -> bool:
    scores = _part_of_rows([[-1.0, 2.0], [1.0, 3.0]])
    try:
        kept = keep(_part_of_rows([[3.0, 4.0], [5.0, 6.0]]), scores, 1.0, out=scores)
        changed = forget(_part_of_rows([[-1.0, 2.0], [1.0, 3.0]]), 1.0, 0.5, out=torch.empty_like(kept))
        again = forget(changed, 2.0, 0.25, out=changed)
        return kept.tolist() == [[0.0, 4.0], [0.0, 6.0]] and again.tolist() == [[0.25, 0.25], [0.25, 3.0]]
    except (AttributeError, RuntimeError):
        return False


def _softmax_backward_is_right_here() -> bool:
    inner, weights = _part_of_rows([[1.0, 3.0], [4.0, 8.0]]).contiguous(), _part_of_rows([[0.5, 0.5], [0.25, 0.75]])
    try:
        torch.ops.aten._softmax_backward_data.out(inner, weights, -1, inner.dtype, grad_input=inner)
        return inner.tolist() == [[-0.5, 0.5], [-0.75, 0.75]]  # not so in PyTorch 2.5
    except (AttributeError, RuntimeError):
        return False


def _part_of_rows(numbers: list[list[float]]) -> Tensor:
    return torch.tensor([[*row, 9.0] for row in numbers], dtype=torch.float32, device="cpu")[:, :-1]


#: Whether the first two functions here do what is said of them; the backend cannot compute otherwise.
THRESHOLD_IS_RIGHT = _threshold_is_right()
_softmax_backward_is_right = _softmax_backward_is_right_here()


def dropout(like: Tensor, p: float, seed: Tensor, tile: Tile) -> Tensor:
    """Makes the dropout mask of a tile, the same in both passes."""
    place = tile.batch.start * 2**31 + tile.rows.start
    generator = torch.Generator().manual_seed((int(seed) + place) % 2**62)
    return torch.empty_like(like).bernoulli_(1 - p, generator=generator).div_(max(1 - p, 1e-30))


class KeySum:
    """Adds up a gradient of keys or values over the tiles of their queries.

    oneDNN is slow where it reads scores across. For it the features lie along the rows, in a sum that holds the batch
    items of one tile and is turned into the gradient with the last of their tiles.

    Args:
        total: (B H, S, E), where the gradient is to lie.
        problem: The problem.
    """

    def __init__(self, total: Tensor, problem: Problem) -> None:
        self._total, self._problem = total, problem
        self._turned = total.new_empty(0)

    def add(self, tile: Tile, scores: Tensor, rows: Tensor, factor: float = 1.0) -> None:
        """Adds ``factor * scores^T rows``.

        Args:
            tile: The tile.
            scores: (G, rows, keys): its weights, or the gradient of its scores.
            rows: (G, rows, E): what they are multiplied with.
            factor: Factor of the product.
        """
        problem, total = self._problem, self._total[tile.batch]
        first = tile.rows.start == 0
        if first and problem.uses_onednn:
            self._turned = total.new_empty(total.mT.shape)
        turned = self._turned if problem.uses_onednn else total.mT
        if first and problem.is_causal:  # its keys are not all: later queries see more
            turned.zero_()
            first = False
        if problem.uses_onednn:
            add_product(turned[..., : tile.keys], rows.mT, scores, True, first, factor)
            if tile.rows.stop == problem.query.shape[1]:
                total.copy_(turned.mT)
        else:
            add_product(total[:, : tile.keys], scores.mT, rows, False, first, factor)


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
            query, key = problem.query[tile.batch, tile.rows], problem.key[tile.batch, : tile.keys]
            grad_query[tile.batch, tile.rows].baddbmm_(inner, key, alpha=problem.scale)
            grad_key[tile.batch, : tile.keys].baddbmm_(inner.mT, query, alpha=problem.scale)
            if grad_mask.numel():
                add_to_mask(grad_mask, problem, tile, inner)
        return
    length, keys = problem.query.shape[1], problem.key.shape[1]
    for position in ties[1 : 1 + int(ties[0])].tolist():
        batch, row, column = position // (length * keys), position // keys % length, position % keys
        grad_query[batch, row] += share * problem.scale * problem.key[batch, column]
        grad_key[batch, column] += share * problem.scale * problem.query[batch, row]
        if grad_mask.numel():
            tile = Tile(slice(batch, batch + 1), slice(row, row + 1), keys)
            grad_mask[problem.mask_index(tile)][..., column] += share
