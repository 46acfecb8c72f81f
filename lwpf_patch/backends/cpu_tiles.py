"""CPU: both passes tile by tile, by PyTorch's operators: where the C++ of :mod:`lwpf_patch.backends.cpu_native` is not.

The formulas are those of :mod:`lwpf_patch.backends.cpu`. Nothing the size of all scores is allocated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cpu_median import median
from .cpu_scores import Given, Scores, Tile


def forward(
    query: Tensor, key: Tensor, value: Tensor, given: Given, eps: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the forward pass; arguments and results are those of ``cpu_attention``."""
    all_scores, mu, bias, n = Scores(query, key, given), given.mu, given.bias, given.n
    centre, ties = (mu, 0) if mu is not None else median(all_scores)
    threshold = torch.full((), centre, dtype=query.dtype, device="cpu")
    a = (threshold if eps is None else threshold + eps.to(query.dtype)).item()
    found = torch.tensor([a, threshold.item(), ties], dtype=torch.float64, device="cpu")
    # With a threshold that is NaN all scores are forgotten, and become NaN.
    a, b = (math.inf, math.nan) if math.isnan(a) else (a, a if bias is None else bias)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    rows = query.new_zeros(2, *query.shape[:3])
    log_n = math.log(n) if n > 0 else -math.inf
    for tile in all_scores.tiles():
        scores, excluded = all_scores.make(tile)
        forgotten = scores <= a
        weights = scores.masked_fill_(forgotten, b)
        if excluded is not None:
            forgotten |= excluded
            weights.masked_fill_(excluded, -math.inf)
        # It is -inf, and the row NaN, where no score is higher.
        highest = weights.amax(-1, keepdim=True) if weights.shape[-1] else weights.new_zeros(*weights.shape[:-1], 1)
        highest.clamp_(min=log_n)
        weights.sub_(highest).exp_()
        if excluded is not None:
            weights.masked_fill_(excluded, 0)
        total = weights.sum(-1, keepdim=True)
        if excluded is not None or not weights.shape[-1]:
            total.masked_fill_(total == 0, 1)  # a row with no key left gives 0
        added = (log_n - highest).exp_() if n > 0 else 0.0
        total += added
        weights.masked_fill_(forgotten, 0)
        if mu is None:
            rows[1][tile.rows] = 1 - ((weights.sum(-1, keepdim=True) + added) / total).squeeze(-1)
        dropped = all_scores.dropout(tile)
        if dropped is not None:
            weights *= dropped
        out[tile.rows] = (weights @ value[tile.seen]).div_(total)
        rows[0][tile.rows] = total.log_().add_(highest).squeeze(-1)
    return out, rows, found


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, given: Given, out: Tensor, rows: Tensor, found: Tensor,
    mask_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the backward pass; arguments and results are those of ``cpu_attention_backward``."""
    all_scores, bias = Scores(query, key, given), given.bias
    a, centre, ties = found.tolist()
    if math.isnan(a) or (bias is None and a == math.inf):
        a = -math.inf  # all weights are NaN, and stay it
    log_sum, rho = rows.unbind()
    gradients = _Gradients(all_scores, value, mask_needs_grad)
    delta = (grad * out).sum(-1)
    for tile in all_scores.tiles():
        scores, excluded = all_scores.make(tile)
        forgotten = scores <= a
        if excluded is not None:
            forgotten |= excluded
        weights = scores.sub_(log_sum[tile.rows].unsqueeze(-1)).exp_().masked_fill_(forgotten, 0)
        inner = grad[tile.rows] @ value[tile.seen].mT
        used = weights
        dropped = all_scores.dropout(tile)
        if dropped is not None:
            inner *= dropped
            used = weights * dropped
        gradients.value[tile.seen] += used.mT @ grad[tile.rows]
        gradients.add(tile, inner.sub_(delta[tile.rows].unsqueeze(-1)).mul_(weights))
    if given.mu is None and bias is None and ties:
        # The forgotten scores become the threshold, and pass their gradient on to it; the comparison has none.
        share = -(rho * delta).sum() / ties
        for tile in all_scores.tiles():
            scores, excluded = all_scores.make(tile)
            equal = scores == centre
            if excluded is not None:
                equal &= ~excluded
            gradients.add(tile, equal * share)
    return gradients.query, gradients.key, gradients.value, gradients.mask


class _Gradients:
    """The gradients, added up over tiles."""

    def __init__(self, scores: Scores, value: Tensor, mask_needs_grad: bool) -> None:
        def zeros(like: Tensor) -> Tensor:
            return like.new_zeros(like.shape)

        self.scores, mask = scores, scores.given.mask
        self.query, self.key, self.value = zeros(scores.query), zeros(scores.key), zeros(value)
        self.mask = zeros(mask) if mask is not None and mask_needs_grad else value.new_zeros(0)

    def add(self, tile: Tile, inner: Tensor) -> None:
        """Add what the gradient of the scores of a tile gives."""
        scores = self.scores
        self.query[tile.rows] += (inner @ scores.key[tile.seen]).mul_(scores.given.scale)
        self.key[tile.seen] += (inner.mT @ scores.query[tile.rows]).mul_(scores.given.scale)
        if self.mask.numel():
            part = scores.of_tile(self.mask, tile)
            part += inner.sum_to_size(part.shape)
