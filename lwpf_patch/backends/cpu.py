"""CPU: tiles of scores that stay in the cache and are made again in the backward pass, in linear memory.

For the threshold form of func_d (ReLU, PFU): ``D(s) = s`` where ``s > a``, else ``b``. Nothing the size of all scores
is ever allocated, for the median neither. Each step over a tile is one of torch's own vectorised functions.

With R the kept keys, Z the denominator, L = log Z + the row's maximum, and G = dO V^T (times the dropout mask):

    forward    P = [R] exp(s - L)          out = P V
    backward   dS = P (G - delta), delta = rowsum(dO * out);   dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO
    threshold  db = -sum over rows of rho * delta, where rho = 1 - rowsum(P) is what the forgotten keys weigh

A forgotten key has no gradient of its own. Where b is the threshold a, and a the median, db goes to the scores that are
equal to the median, shared evenly.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .eager import lowest

#: Scores in a tile: small enough for a core's second cache, large enough that the calls of torch do not count.
TILE = 1 << 17
#: As many positions of scores that are equal to the median are kept for the backward pass; with more, it looks again.
TIES = 64


class _Problem(NamedTuple):
    """What both passes compute with; q is scaled already.

    Attributes:
        query: (B H, L, E).
        key: (B H, S, E).
        mask: (B or 1, H or 1, L or 1, S or 1), boolean or additive, or None.
        heads: H.
        is_causal: Whether query i sees the keys 0 to i only.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    heads: int
    is_causal: bool

    def groups(self) -> list[list[_Tile]]:
        """Returns the tiles, those of the same batch items and heads together.

        They are always of the same shapes, so that scores made again are the same bit by bit.
        """
        batch, length, keys = self.query.shape[0], self.query.shape[1], self.key.shape[1]
        rows = min(length, max(16, TILE // max(keys, 1)))
        group = max(1, TILE // max(rows * keys, 1))
        varies = self.mask is not None and self.mask.shape[:2].numel() > 1
        groups = []
        for start in range(0, batch, self.heads) if varies else (0,):
            end = start + self.heads if varies else batch
            for first in range(start, end, group):
                which = slice(first, min(first + group, end))
                stops = [(row, min(row + rows, length)) for row in range(0, length, rows)]
                groups.append(
                    [_Tile(which, slice(row, stop), min(keys, stop) if self.is_causal else keys) for row, stop in stops]
                )
        return groups

    def tiles(self) -> Iterator[_Tile]:
        """Yields the tiles."""
        return itertools.chain.from_iterable(self.groups())

    def mask_index(self, tile: _Tile) -> tuple[slice | int, ...]:
        """Returns which part of the mask lies over a tile."""
        assert self.mask is not None
        batch, heads, rows, _ = self.mask.shape
        start = tile.batch.start
        inside = slice(start % self.heads, start % self.heads + tile.batch.stop - start)
        return (
            start // self.heads if batch > 1 else 0,
            inside if heads > 1 else slice(0, 1),
            tile.rows if rows > 1 else slice(0, 1),
            slice(0, tile.keys),
        )

    def scores(self, tile: _Tile) -> tuple[Tensor, Tensor | None]:
        """Makes the scores of a tile, and the mask of the keys that are excluded."""
        query, key = self.query[tile.batch, tile.rows], self.key[tile.batch, : tile.keys]
        scores = torch.bmm(query, key.transpose(1, 2))
        excluded = None
        if self.mask is not None:
            mask = self.mask[self.mask_index(tile)]
            if mask.dtype == torch.bool:
                excluded = ~mask
            else:
                scores += mask
                excluded = mask <= lowest(mask.dtype)
        elif self.is_causal:
            rows = torch.arange(tile.rows.start, tile.rows.stop)
            excluded = torch.arange(tile.keys) > rows[:, None]
        return scores, excluded


class _Tile(NamedTuple):
    batch: slice
    rows: slice
    keys: int


# Each thread computes groups of its own, with torch's functions on that one thread. Handing every function to all
# threads would have them wait for each other at every step; where others use the processor too, most of the time.
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            started = threading.Barrier(threads + 1)
            pool = ThreadPoolExecutor(threads, "lwpf_patch-cpu", _use_one_thread)
            for _ in range(threads):
                pool.submit(started.wait)
            started.wait()
            torch.set_num_threads(threads)  # what the threads set is theirs, but for what later threads start with
            _pools[threads] = pool
        return _pools[threads]


def _use_one_thread() -> None:
    torch.zeros(1).add_(1)  # torch sets up a thread when it is first used
    torch.set_num_threads(1)


def _for_each_group(problem: _Problem, work: Callable[[Iterable[list[_Tile]], int], None]) -> None:
    """Has the groups worked on by all threads that torch may use.

    Args:
        problem: The problem.
        work: Called for each thread with its groups and its number; writes to what belongs to them alone.
    """
    groups = problem.groups()
    threads = min(torch.get_num_threads(), len(groups))
    if threads <= 1:
        work(groups, 0)
        return

    def in_thread(number: int) -> None:
        with torch.no_grad():
            work(groups[number::threads], number)

    for future in [_pool(torch.get_num_threads()).submit(in_thread, number) for number in range(threads)]:
        future.result()


def supports(dtype: torch.dtype) -> bool:
    """Returns whether the backend computes in a dtype."""
    return dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
        eps: Noise that is added to the threshold, of one element; None: none.

    Returns:
        (..., L, Ev), of the query's dtype.
    """
    lead: torch.Size = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        query.shape[:-2], key.shape[:-2], value.shape[:-2]
    )
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    flat = [
        tensor.expand(*lead, *tensor.shape[-2:]).reshape(-1, *tensor.shape[-2:])
        for tensor in (query * factor, key, value)
    ]
    mask = None
    if attn_mask is not None:
        mask = attn_mask.reshape((1,) * (len(lead) + 2 - attn_mask.dim()) + attn_mask.shape)
        fits = mask.dim() == len(lead) + 2
        if not fits or any(size not in (1, extent) for size, extent in zip(mask.shape, lead, strict=False)):
            raise RuntimeError(
                f"lwpf_attention: attn_mask of shape {list(attn_mask.shape)} cannot be broadcast to the batch "
                f"dimensions {list(lead)}"
            )
        outer = mask.shape[:-3]
        if outer.numel() > 1:  # batch dimensions before the last are one to us
            mask = mask.expand(*lead[:-1], *mask.shape[-3:])
        mask = mask.reshape(-1, *(1, 1, 1, *mask.shape)[-3:])
        if mask.dtype != torch.bool:
            mask = mask if mask.dtype == flat[0].dtype else _widen(mask, flat[0].dtype)
        if mask.shape[-1] == 1:
            mask = mask.expand(*mask.shape[:-1], key.shape[-2])
    seed = torch.randint(2**62, ()) if dropout_p > 0 else torch.zeros((), dtype=torch.int64)
    noise = torch.zeros((), dtype=flat[0].dtype) if eps is None else eps.to(flat[0].dtype)
    out, *_ = torch.ops.lwpf_patch.cpu_attention(
        *flat, mask, lead[-1] if lead else 1, dropout_p, is_causal, mu, bias, noise, seed
    )
    return out.reshape(*lead, *out.shape[-2:]).to(dtype)


def _widen(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts an additive mask so that what excludes a key in its own dtype does so in another."""
    return mask.to(dtype).masked_fill(mask <= lowest(mask.dtype), -math.inf)


@torch.library.custom_op("lwpf_patch::cpu_attention", mutates_args=(), device_types="cpu")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    heads: int,
    dropout_p: float,
    is_causal: bool,
    mu: float | None,
    bias: float | None,
    eps: Tensor,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the output; L and rho of each row; the threshold with and without noise; and the ties.

    The ties are the number of scores that are equal to the median, and the positions of some of them.
    """
    problem = _Problem(query, key, mask, heads, is_causal)
    ties = torch.zeros(TIES + 1, dtype=torch.int64)
    centre = torch.full((), _median(problem, ties) if mu is None else mu, dtype=query.dtype)
    threshold = centre + eps
    a = threshold.item()
    b = a if bias is None else bias
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    log_sum = query.new_empty(query.shape[:2])
    rho = query.new_zeros(query.shape[:2])

    def work(groups: Iterable[list[_Tile]], thread: int) -> None:
        for tile in itertools.chain.from_iterable(groups):
            scores, excluded = problem.scores(tile)
            forgotten = F.threshold(scores, a, b)
            if excluded is not None:
                scores.masked_fill_(excluded, -math.inf)
                forgotten.masked_fill_(excluded, -math.inf)
            highest = forgotten.amax(-1, keepdim=True).clamp_(min=torch.finfo(query.dtype).min)
            weights = _exp_(forgotten.sub_(highest))
            if excluded is not None:
                weights.masked_fill_(excluded, 0)
            total = weights.sum(-1, keepdim=True)
            total.masked_fill_(total == 0, 1)  # a row with no key left gives 0
            # threshold_backward passes on what belongs to a score above the threshold, and puts 0 elsewhere.
            kept = torch.ops.aten.threshold_backward(weights, scores, a)
            if mu is None:
                rho[tile.batch, tile.rows] = 1 - (kept.sum(-1, keepdim=True) / total).squeeze(-1)
            if dropout_p > 0:
                kept *= _dropout(kept, dropout_p, seed, tile)
            out[tile.batch, tile.rows] = torch.bmm(kept, value[tile.batch, : tile.keys]).div_(total)
            log_sum[tile.batch, tile.rows] = (total.log_() + highest).squeeze(-1)

    _for_each_group(problem, work)
    return out, log_sum, rho, threshold, centre, ties


def _exp_(x: Tensor) -> Tensor:
    """Takes the exponentials in place, none of them denormal: that takes a processor up to 200 times as long."""
    return x.clamp_(min=-87.0 if x.dtype == torch.float32 else -700.0).exp_()


def _dropout(like: Tensor, p: float, seed: Tensor, tile: _Tile) -> Tensor:
    """Makes the dropout mask of a tile, the same in both passes."""
    place = tile.batch.start * 2**31 + tile.rows.start
    generator = torch.Generator().manual_seed((int(seed) + place) % 2**62)
    return torch.empty_like(like).bernoulli_(1 - p, generator=generator).div_(max(1 - p, 1e-30))


@_forward.register_fake
def _(query, key, value, mask, heads, dropout_p, is_causal, mu, bias, eps, seed):  # type: ignore[no-untyped-def]
    rows = query.new_empty(query.shape[:2])
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    ties = torch.empty(TIES + 1, dtype=torch.int64, device=query.device)
    return out, rows, torch.empty_like(rows), query.new_empty(()), query.new_empty(()), ties


@torch.library.custom_op("lwpf_patch::cpu_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    mu: float | None,
    bias: float | None,
    mask_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key, value and, if it is wanted, of the mask."""
    problem = _Problem(query, key, mask, heads, is_causal)
    a = threshold.item()
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    grad_mask = torch.zeros_like(mask) if mask is not None and mask_needs_grad else query.new_zeros(0)
    delta = (grad * out).sum(-1, keepdim=True)
    mask_parts: dict[int, Tensor] = {}

    def work(groups: Iterable[list[_Tile]], thread: int) -> None:
        if grad_mask.numel():
            mask_parts[thread] = torch.zeros_like(grad_mask)
        for tile in itertools.chain.from_iterable(groups):
            scores, excluded = problem.scores(tile)
            if excluded is not None:
                scores.masked_fill_(excluded, -math.inf)
            weights = _exp_(scores - log_sum[tile.batch, tile.rows, None])
            weights = torch.ops.aten.threshold_backward(weights, scores, a)
            tile_grad, tile_keys = grad[tile.batch, tile.rows], slice(0, tile.keys)
            inner = torch.bmm(tile_grad, value[tile.batch, tile_keys].transpose(1, 2))
            if dropout_p > 0:
                keep = _dropout(weights, dropout_p, seed, tile)
                inner *= keep
                grad_value[tile.batch, tile_keys].baddbmm_((weights * keep).transpose(1, 2), tile_grad)
            else:
                grad_value[tile.batch, tile_keys].baddbmm_(weights.transpose(1, 2), tile_grad)
            inner.sub_(delta[tile.batch, tile.rows]).mul_(weights)
            torch.bmm(inner, key[tile.batch, tile_keys], out=grad_query[tile.batch, tile.rows])
            grad_key[tile.batch, tile_keys].baddbmm_(inner.transpose(1, 2), query[tile.batch, tile.rows])
            if grad_mask.numel():
                _add_to_mask(mask_parts[thread], problem, tile, inner)

    _for_each_group(problem, work)
    _add_up(grad_mask, mask_parts)
    if mu is None and bias is None:
        # The forgotten scores become the threshold, and pass their gradient on to it; the comparison has none.
        share = -(rho * delta.squeeze(-1)).sum() / ties[0].clamp(min=1)
        _add_to_ties(problem, centre, ties, share, grad_query, grad_key, grad_mask)
    return grad_query, grad_key, grad_value, grad_mask


def _add_to_mask(grad_mask: Tensor, problem: _Problem, tile: _Tile, inner: Tensor) -> None:
    part = grad_mask[problem.mask_index(tile)]
    part += inner.sum_to_size(part.shape)


def _add_up(grad_mask: Tensor, parts: dict[int, Tensor]) -> None:
    for number in sorted(parts):  # in a fixed order, so that sums are the same every time
        grad_mask += parts[number]


def _add_to_ties(
    problem: _Problem,
    centre: Tensor,
    ties: Tensor,
    share: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_mask: Tensor,
) -> None:
    """Gives each score that is equal to the median its share of the threshold's gradient."""
    if ties[0] > TIES:  # more than were noted: look again
        mask_parts: dict[int, Tensor] = {}

        def work(groups: Iterable[list[_Tile]], thread: int) -> None:
            if grad_mask.numel():
                mask_parts[thread] = torch.zeros_like(grad_mask)
            for tile in itertools.chain.from_iterable(groups):
                scores, excluded = problem.scores(tile)
                equal = scores == centre
                if excluded is not None:
                    equal &= ~excluded
                inner = equal.to(scores.dtype).mul_(share)
                grad_query[tile.batch, tile.rows].baddbmm_(inner, problem.key[tile.batch, : tile.keys])
                grad_key[tile.batch, : tile.keys].baddbmm_(inner.transpose(1, 2), problem.query[tile.batch, tile.rows])
                if grad_mask.numel():
                    _add_to_mask(mask_parts[thread], problem, tile, inner)

        _for_each_group(problem, work)
        _add_up(grad_mask, mask_parts)
        return
    length, keys = problem.query.shape[1], problem.key.shape[1]
    for position in ties[1 : 1 + int(ties[0])].tolist():
        batch, row, column = position // (length * keys), position // keys % length, position % keys
        grad_query[batch, row] += share * problem.key[batch, column]
        grad_key[batch, column] += share * problem.query[batch, row]
        if grad_mask.numel():
            tile = _Tile(slice(batch, batch + 1), slice(row, row + 1), keys)
            grad_mask[problem.mask_index(tile)][..., column] += share


@_backward.register_fake
def _(grad, query, key, value, mask, *rest):  # type: ignore[no-untyped-def]
    grad_mask = torch.empty_like(mask) if mask is not None and rest[-1] else query.new_empty(0)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), grad_mask


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, mask, heads, dropout_p, is_causal, mu, bias, _, seed = inputs
    ctx.save_for_backward(query, key, value, mask, *output, seed)
    ctx.options = (heads, dropout_p, is_causal, mu, bias)
    ctx.mask_needs_grad = mask is not None and ctx.needs_input_grad[3]


def _autograd(ctx, grad, *unused):  # type: ignore[no-untyped-def]
    query, key, value, mask, out, log_sum, rho, threshold, centre, ties, seed = ctx.saved_tensors
    grads = torch.ops.lwpf_patch.cpu_attention_backward(
        grad.contiguous(), query, key, value, mask, out, log_sum, rho, threshold, centre, ties, seed, *ctx.options,
        ctx.mask_needs_grad,
    )  # fmt: skip
    grad_mask = grads[3] if ctx.mask_needs_grad else None
    return *grads[:3], grad_mask, None, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


# The exact median of all scores, without all scores: a sample tells roughly where it is, and one pass over the tiles
# counts what lies below and collects what lies there.


_Place = tuple[int, int]


class _Count(NamedTuple):
    """What was found in a tile: scores that count, those below the bracket, those within, and these themselves."""

    valid: int
    below: int
    within: int
    values: Tensor | None


def _median(problem: _Problem, ties: Tensor) -> float:
    """Finds the median, the lower of two middle values, and notes in ``ties`` which scores are equal to it."""
    sample = _sample(problem)
    for attempt in range(8):
        margin = 2.5 * math.sqrt(len(sample)) * 4**attempt if attempt < 7 else math.inf
        low, high, flat = _bracket(sample, margin)
        found = _count(problem, low, high, keep=not flat)
        total, below = sum(count.valid for count in found.values()), sum(count.below for count in found.values())
        if total == 0:
            return 0.0
        rank = (total - 1) // 2 - below
        if not 0 <= rank < sum(count.within for count in found.values()):
            continue
        if flat:
            value = sample[(len(sample) - 1) // 2].item()
            equal = {place: count.within for place, count in found.items()}
        else:
            inside = {place: count.values for place, count in found.items() if count.values is not None}
            value = torch.cat([inside[place] for place in sorted(inside)]).kthvalue(rank + 1).values.item()
            equal = {place: int((values == value).count_nonzero()) for place, values in inside.items()}
        _note_ties(problem, value, equal, ties)
        return value
    return math.nan  # only where scores are NaN


def _count(problem: _Problem, low: float, high: float, keep: bool) -> dict[_Place, _Count]:
    """Counts the scores of each tile below and strictly within a bracket, and keeps those within."""
    found: dict[_Place, _Count] = {}

    def work(groups: Iterable[list[_Tile]], thread: int) -> None:
        ones = problem.query.new_ones(0)
        for tile in itertools.chain.from_iterable(groups):
            scores, excluded = problem.scores(tile)
            valid = scores.numel()
            if excluded is not None:
                scores.masked_fill_(excluded, -math.inf)  # in no bracket
                valid -= int(excluded.expand_as(scores).count_nonzero())
            if ones.shape != scores.shape:
                ones = torch.ones_like(scores)
            # These two count several times as fast as comparisons do: 1 for what is > low, 1 for what is in between.
            above = torch.ops.aten.threshold_backward(ones, scores, low)
            within = torch.ops.aten.hardtanh_backward(ones, scores, low, high)
            count, values = int(within.sum(dtype=torch.float64)), None
            if count and keep:
                values = scores.flatten()[within.flatten().nonzero().squeeze(1)]
            below = valid - int(above.sum(dtype=torch.float64))
            found[tile.batch.start, tile.rows.start] = _Count(valid, below, count, values)

    _for_each_group(problem, work)
    return found


def _sample(problem: _Problem) -> Tensor:
    """Draws some scores, sorted."""
    batch, length, keys = problem.query.shape[0], problem.query.shape[1], problem.key.shape[1]
    size = int((batch * length * keys) ** 0.6)
    generator = torch.Generator().manual_seed(batch * length * keys)  # of its own: the script's draws stay the same
    b, i, j = (torch.randint(high, (size,), generator=generator) for high in (batch, length, keys))
    scores = (problem.query[b, i] * problem.key[b, j]).sum(-1)
    if problem.is_causal:
        scores = scores[j <= i]
    elif problem.mask is not None:
        mask = problem.mask
        at = (b // problem.heads, b % problem.heads, i, j)
        drawn = mask[tuple(index if extent > 1 else 0 for index, extent in zip(at, mask.shape, strict=True))]
        drawn = drawn.expand(size)
        scores = scores[drawn] if mask.dtype == torch.bool else (scores + drawn)[drawn > lowest(mask.dtype)]
    return scores.sort().values


def _bracket(sample: Tensor, margin: float) -> tuple[float, float, bool]:
    """Returns bounds strictly between which the median lies, most likely.

    Args:
        sample: Scores, sorted.
        margin: How many of them to go to either side from the middle one.

    Returns:
        The bounds, and whether they hold one value only: then most scores are the same, and need not be collected.
    """
    middle = (len(sample) - 1) // 2
    if not len(sample) or margin > middle:
        return -math.inf, math.inf, False
    low, high = sample[math.floor(middle - margin)], sample[math.ceil(middle + margin)]
    infinity = torch.full_like(low, math.inf)
    return low.nextafter(-infinity).item(), high.nextafter(infinity).item(), bool(low == high)


def _note_ties(problem: _Problem, value: float, equal: dict[_Place, int], ties: Tensor) -> None:
    ties[0] = sum(equal.values())
    if ties[0] > TIES:
        return
    length, keys = problem.query.shape[1], problem.key.shape[1]
    positions: list[int] = []

    def work(groups: Iterable[list[_Tile]], thread: int) -> None:
        for tile in itertools.chain.from_iterable(groups):
            if equal.get((tile.batch.start, tile.rows.start)):
                scores, excluded = problem.scores(tile)
                if excluded is not None:
                    scores.masked_fill_(excluded, math.nan)
                for b, i, j in (scores == value).nonzero().tolist():
                    positions.append(((tile.batch.start + b) * length + tile.rows.start + i) * keys + j)

    _for_each_group(problem, work)
    ties[1 : 1 + len(positions)] = torch.tensor(sorted(positions), dtype=torch.int64)
