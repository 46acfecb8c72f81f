"""Attention with partial forgetting, written out as the specification of the tests.

It calls nothing of the package and is written to be unlike it: one query row at a time, only the keys that are left
gathered by index, exponentials and denominator spelled out. Slow and float64 only; gradients are autograd's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Forgetting:
    """A forgetting function as plain data.

    Args:
        kind: "relu", "pfu" or "none" (forgets nothing).
        mu: For pfu, the threshold before the noise: a number or "dmedian".
        bias: For pfu, the value of a forgotten score: a number or "mu", the threshold including the noise.
        eps: For pfu, the noise of this one call; 0 in evaluation.
    """

    kind: str = "none"
    mu: float | str = "dmedian"
    bias: float | str = "mu"
    eps: float = 0.0

    def __post_init__(self) -> None:
        """Refuses misspelt settings, which would otherwise test something else."""
        if self.kind not in ("relu", "pfu", "none"):
            raise ValueError(f"unknown kind {self.kind!r}")
        if isinstance(self.mu, str) and self.mu != "dmedian":
            raise ValueError(f"unknown mu {self.mu!r}")
        if isinstance(self.bias, str) and self.bias != "mu":
            raise ValueError(f"unknown bias {self.bias!r}")


@dataclass
class _Row:
    """One query row: which keys are in the softmax, and their scores."""

    batch: int
    keys: list[int]
    scores: Tensor


def assert_equal(got: Tensor, wanted: Tensor, *others: Tensor, allowed: float = 0.0) -> None:
    """Asserts that float64 figures are the same to 1e-12, of the largest among them where that is above 1.

    Others are figures that were computed along with them, and whose rounding is in them too. Where the computation
    multiplies its rounding, allowed is the error that this may give.
    """
    largest = (float(figures.detach().abs().max()) for figures in (wanted, *others) if figures.numel())
    torch.testing.assert_close(got, wanted, rtol=0, atol=max([1e-12, allowed, *(1e-12 * each for each in largest)]))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    func_d: Forgetting,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_keep: Tensor | None = None,
    dropout_p: float = 0.0,
    masking: str = "exclude",
    excluded_below: float | None = None,
    alpha: float = 1.0,
    n: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention whose scores are partially forgotten.

    Args:
        query: Shape (..., L, E), float64. Leading dimensions of all tensors broadcast.
        key: Shape (..., S, E).
        value: Shape (..., S, Ev).
        func_d: What is forgotten.
        attn_mask: Boolean (True attends) or additive, broadcastable to (..., L, S).
        is_causal: Excludes key j from query i when j > i, in addition to attn_mask.
        scale: Factor of the dot products; None is E ** -0.5.
        dropout_keep: Boolean, of the shape of the weights; None is no dropout.
        dropout_p: The rate: kept weights are divided by 1 - p.
        masking: "exclude" takes excluded keys out; "paper" puts them in as scores of -inf, as the official code does.
        excluded_below: Additive entries <= this exclude their key too. Of no effect in "paper".
        alpha: The normalisation is that of `entmax`; 1 is the softmax.
        n: Added to the denominator of the softmax.

    Returns:
        Shape (..., L, Ev).
    """
    if masking not in ("exclude", "paper"):
        raise ValueError(f"unknown masking {masking!r}")
    if {query.dtype, key.dtype, value.dtype} != {torch.float64}:
        raise TypeError("the oracle wants float64")
    n_query, n_key = query.shape[-2], key.shape[-2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    # Copies made by broadcasting are harmless to the median: repeating every score leaves the lower median alone, and
    # the equal shares of the copies add up to the share of the one.
    parts = [query, key, value] + [extra for extra in (attn_mask, dropout_keep) if extra is not None]
    lead = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
    queries = _flat(query, lead, query.shape[-2:])
    keys = _flat(key, lead, key.shape[-2:])
    values = _flat(value, lead, value.shape[-2:])
    masks = None if attn_mask is None else _flat(attn_mask, lead, (n_query, n_key))
    keeps = None if dropout_keep is None else _flat(dropout_keep, lead, (n_query, n_key))

    # The scores of all rows come first: dmedian needs all of them before any row can go on.
    rows = []
    for batch, batch_queries in enumerate(queries):
        for i, one_query in enumerate(batch_queries.unbind(0)):
            mask = None if masks is None else masks[batch][i]
            hidden = _hidden(mask, i if is_causal else None, n_key, excluded_below if masking == "exclude" else None)
            present = [j for j in range(n_key) if masking == "paper" or not hidden[j]]
            scores = scale * dots(keys[batch][present], one_query)
            if mask is not None and mask.dtype != torch.bool:
                scores = scores + mask[present].to(scores.dtype)
            if masking == "paper" and (mask is None or mask.dtype == torch.bool):  # an additive one has done it
                scores = scores.masked_fill(torch.tensor(hidden, dtype=torch.bool), -math.inf)
            rows.append(_Row(batch, present, scores))

    if not rows:
        return query.new_zeros(*lead, n_query, value.shape[-1])
    threshold, forgotten_value = resolve_threshold(func_d, [row.scores for row in rows])
    outputs = []
    for number, row in enumerate(rows):
        forgotten, indicator = forget(func_d, row.scores, threshold, forgotten_value, masking)
        weights = normalised(forgotten, alpha, n)
        if keeps is not None:
            keep = keeps[row.batch][number % n_query].tolist()
            # No division when nothing is kept, so that p = 1 gives 0 and not 0 * inf.
            weights = weights * weights.new_tensor([1.0 / (1.0 - dropout_p) if keep[j] else 0.0 for j in row.keys])
        weights = weights * indicator
        outputs.append((weights[:, None] * values[row.batch][row.keys]).sum(0))
    return torch.stack(outputs).reshape(*lead, n_query, value.shape[-1])


def timm_attention(
    module: nn.Module,
    x: Tensor,
    *,
    func_d: Forgetting,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    rope: Tensor | None = None,
    dropout_keep: Tensor | None = None,
    masking: str = "exclude",
    excluded_below: float | None = None,
    alpha: float = 1.0,
    n: float = 0.0,
) -> Tensor:
    """What timm's Attention or AttentionRope gives for x, with `attention` in its middle.

    Args:
        module: The timm module, float64. Its norms are called, its linear layers only read; proj_drop is taken to be 0.
        x: Shape (B, N, C).
        func_d: What is forgotten.
        attn_mask: As in `attention`; ignored when is_causal, which in timm takes precedence.
        is_causal: As in `attention`.
        rope: Rotary embedding of the tokens after the prefix.
        dropout_keep: Shape (B, heads, N, N); its rate is that of module.attn_drop. None is no dropout.
        masking: As in `attention`.
        excluded_below: As in `attention`.
        alpha: As in `attention`.
        n: As in `attention`.

    Returns:
        Shape (B, N, dim of the output).
    """
    heads = module.num_heads
    width = module.proj.in_features // heads  # not every version stores head_dim
    if getattr(module, "qkv", None) is not None:
        # The rows of the one projection are in three blocks: all heads of q, then of k, then of v.
        projected = _linear(module.qkv, x).chunk(3, dim=-1)
    else:
        projected = tuple(_linear(layer, x) for layer in (module.q_proj, module.k_proj, module.v_proj))
    query, key, value = (torch.stack(part.split(width, dim=-1), dim=1) for part in projected)

    query, key = _apply(module, "q_norm", query), _apply(module, "k_norm", key)
    if rope is not None:
        query, key = _rotate(module, query, rope), _rotate(module, key, rope)
    # Grouped queries: neighbouring heads share a head of keys and values.
    shared_by = heads // key.shape[1]
    source = [head // shared_by for head in range(heads)]
    key, value = key[:, source], value[:, source]

    mixed = attention(
        query,
        key,
        value,
        func_d=func_d,
        attn_mask=None if is_causal else attn_mask,
        is_causal=is_causal,
        scale=width**-0.5,
        dropout_keep=dropout_keep,
        dropout_p=0.0 if dropout_keep is None else module.attn_drop.p,
        masking=masking,
        excluded_below=excluded_below,
        alpha=alpha,
        n=n,
    )
    mixed = torch.cat(mixed.unbind(1), dim=-1)
    mixed = _apply(module, "norm", mixed)
    gate = getattr(module, "gate", None)
    if gate is not None:
        mixed = mixed * torch.sigmoid(_linear(gate, x))
    return _linear(module.proj, mixed)


def _flat(tensor: Tensor, lead: Sequence[int], matrix: Sequence[int]) -> tuple[Tensor, ...]:
    """Broadcasts to (*lead, *matrix) and returns the matrices one by one."""
    return tensor.expand(*lead, *matrix).reshape(math.prod(lead), *matrix).unbind(0)


def dots(keys: Tensor, one_query: Tensor) -> Tensor:
    """Dot products of the rows of keys with one query."""
    # Added up feature by feature in a fixed order: equal inputs then give bitwise equal scores wherever they stand,
    # which a matrix product does not promise, and ties are part of what is specified.
    total = keys.new_zeros(keys.shape[0])
    for column in (keys * one_query).unbind(1):
        total = total + column
    return total


def _hidden(mask: Tensor | None, query: int | None, n_key: int, excluded_below: float | None) -> list[bool]:
    """Tells for each key of a row whether a mask excludes it; query is the row's number if causality counts."""
    entries = [True] * n_key if mask is None else mask.detach().tolist()
    if mask is None or mask.dtype == torch.bool:
        hidden = [not attends for attends in entries]
    else:
        limit = -math.inf if excluded_below is None else excluded_below
        hidden = [entry <= limit for entry in entries]
    return [out or (query is not None and j > query) for j, out in enumerate(hidden)]


def resolve_threshold(func_d: Forgetting, scores: list[Tensor]) -> tuple[float, Tensor | float]:
    """Returns the threshold as a number, and the value of a forgotten score with its gradient."""
    if func_d.kind != "pfu":
        return 0.0, 0.0
    gradient: Tensor | float = 0.0
    if func_d.mu == "dmedian":
        median, gradient = _lower_median(torch.cat(scores))
        threshold = median + func_d.eps
    else:
        threshold = float(func_d.mu) + func_d.eps
    if func_d.bias == "mu":
        return threshold, gradient + threshold
    return threshold, float(func_d.bias)


def _lower_median(scores: Tensor) -> tuple[float, Tensor | float]:
    """Returns the lower median as a number, and a zero that carries its gradient."""
    numbers = scores.detach().tolist()
    if not numbers:
        return 0.0, 0.0  # no key is left in any row: nothing is compared with it
    if any(math.isnan(number) for number in numbers):
        return math.nan, 0.0  # no score is above it, and all that is computed with it is NaN
    median = sorted(numbers)[(len(numbers) - 1) // 2]
    tied = scores[[n for n, number in enumerate(numbers) if number == median]]
    if math.isinf(median):
        return median, 0.0
    # A mean of equal numbers may round; the mean of zeros does not, and has the same gradient.
    return median, (tied - tied.detach()).mean()


def forget(
    func_d: Forgetting,
    scores: Tensor,
    threshold: float,
    forgotten_value: Tensor | float,
    masking: str = "paper",
) -> tuple[Tensor, Tensor]:
    """Returns D(s) and D'(s) of one row; masking makes a difference to infinite scores only."""
    numbers = scores.detach().tolist()
    if func_d.kind == "none":
        return scores, scores.new_ones(len(numbers))
    # Strictly greater: a tie is forgotten. Made from numbers, the indicator has no gradient.
    indicator = scores.new_tensor([1.0 if number > threshold else 0.0 for number in numbers])
    if func_d.kind == "pfu" and masking == "exclude":
        # Chosen one by one: what is forgotten of a score of -inf is its value.
        chosen = [s if n > threshold or math.isnan(n) else None for n, s in zip(numbers, scores.unbind(0), strict=True)]
        value = scores.new_zeros(()) + (math.nan if math.isnan(threshold) else forgotten_value)
        return torch.stack([value if s is None else s for s in chosen]) if chosen else scores, indicator
    if func_d.kind == "pfu":
        # As the official code writes it: 0 * -inf is NaN in "paper". Where scores are finite it selects exactly.
        return indicator * scores + (1.0 - indicator) * forgotten_value, indicator
    if not numbers:
        return scores, indicator
    # Chosen one by one and not by a product: ReLU(-inf) is 0.
    zero = scores.new_zeros(())
    return torch.stack([zero if n <= 0.0 else s for n, s in zip(numbers, scores.unbind(0), strict=True)]), indicator


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """The affine map of a linear layer's parameters."""
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def _apply(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """Applies a submodule that not every version of timm has."""
    layer = getattr(module, name, None)
    return x if layer is None else layer(x)


def _rotate(module: nn.Module, x: Tensor, rope: Tensor) -> Tensor:
    """Rotates all tokens of x but the prefix."""
    from timm.layers import apply_rot_embed_cat

    # Older versions of timm know neither the layout nor its argument.
    layout = {"half": True} if getattr(module, "rotate_half", False) else {}
    prefix = getattr(module, "num_prefix_tokens", 0)
    rotated = apply_rot_embed_cat(x[..., prefix:, :], rope, **layout)
    return torch.cat([x[..., :prefix, :], rotated.to(x.dtype)], dim=-2)


def separation_loss(patterns: Tensor, t: float, kind: str) -> Tensor:
    """The separation loss of patterns (M, d): one row of pairs at a time, from differences."""
    directions = patterns / patterns.square().sum(1, keepdim=True).sqrt()
    rows = []
    for u in range(len(directions)):
        others = torch.cat([directions[:u], directions[u + 1 :]])
        rows.append(-t * (directions[u] - others).square().sum(1))
    exponents = torch.cat(rows)
    if kind == "maximum":
        return exponents.amax()
    return exponents.logsumexp(0) - math.log(len(exponents))


def normalised(scores: Tensor, alpha: float, n: float) -> Tensor:
    """The weights of one row (S,) of scores: those of `softmax_n`, or with another alpha than 1 those of `entmax`."""
    return softmax_n(scores, n) if alpha == 1.0 or not len(scores) else entmax(scores, alpha)


def softmax_n(scores: Tensor, n: float) -> Tensor:
    """The exponentials of one row (S,), divided by n and their sum."""
    # No key at all: everything is empty and sums to 0, in the backward pass too; only a maximum is missing.
    top = float(scores.detach().max()) if len(scores) else 0.0
    if n == 0:
        exponentials = (scores - top).exp()
        return exponentials / exponentials.sum()
    top = max(top, 0.0)  # which is NaN where the first is
    exponentials = (scores - top).exp()
    return exponentials / (n * math.exp(-top) + exponentials.sum())


def entmax(scores: Tensor, alpha: float) -> Tensor:
    """Sep_alpha of one row (S,) of finite scores, with its derivative.

    Weights are max(0, (alpha - 1) s - tau) ** (1 / (alpha - 1)). The threshold tau is found by halving, to the last
    digit, and refined by two steps of Newton that also give it its derivatives: the first from d(sum of the weights) =
    0, and those up to the third because a step squares what is wrong.
    """
    if alpha == 1:
        exponentials = (scores - scores.detach().max()).exp()
        return exponentials / exponentials.sum()
    power = 1 / (alpha - 1)
    numbers = (alpha - 1) * scores
    plain = numbers.detach()
    low, high = plain.max() - 1, plain.max()  # the sum of the weights is at least 1, and 0
    for _ in range(80):
        middle = (low + high) / 2
        enough = (plain - middle).clamp(min=0).pow(power).sum() >= 1
        low, high = (middle, high) if enough else (low, middle)
    kept = torch.nonzero(plain > low).flatten()
    base, tau = numbers[kept] - low, scores.new_zeros(())
    for _ in range(2):
        slope = power * (base - tau) ** (power - 1)
        tau = tau + ((base - tau).pow(power).sum() - 1) / slope.sum()
    return torch.zeros_like(scores).index_put((kept,), (base - tau).pow(power))
