"""The kernels of the Triton backend: forward, and backward for queries, keys and values, and for an additive mask.

The backward pass of short sequences is one kernel, of others one for queries and one for keys and values.

The formulas are those of :mod:`.cpu`, tile by tile. What a kernel calls scores is a score up to a positive factor,
``unit``, times the natural logarithm of 2: with UNSCALED the plain product ``q k^T``, whose factor holds the scale, so
that no multiplication is spent on it; the threshold is in the same measure. ``L`` is kept to the base of 2.

Every kernel makes the scores in the same way: one product of matrices over all features, in pieces of the same depth
and with float32 sums, then at most one rounding, which :func:`scores_of` writes as one operation so that no compiler
can fuse it here and not there. All that differs is which of the two matrices stands on the left. So what one kernel
finds equal to the median, the others do too. The tiles are at least 64 wide on the side that decides whether Hopper
takes its own instruction, for the same reason.

Importing this module imports Triton.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl

#: Triton's interpreter multiplies the bits of a bfloat16, and a float16 with sums of float16; there we widen first.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
#: Below every score, and finite, so that differences are numbers.
BOTTOM = tl.constexpr(-1.0e30)

#: What is left over by tiles of full width is gone over in steps of so many keys, or queries: a vision transformer's
#: sequence is often a few longer than some squares.
REST = tl.constexpr(16)

#: What MASKED says of the mask.
NO_MASK, BOOLEAN, ADDITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Start a kernel."""
    if programs:
        kernel[(programs,)](*arguments, **options)


@triton.jit
def score_products(left, right):
    """Multiply queries and keys, in either order, with float32 sums, and float32 factors unrounded.

    The interpreter's products depend on the shapes of the tiles in their last bit, the GPU's do not. It takes them in
    float64, which leaves no trace of that.
    """
    if INTERPRETED:
        return tl.dot(left.to(tl.float64), right.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(left, right, input_precision="ieee")


@triton.jit
def product(left, right):
    """Multiply matrices, as :func:`score_products` does but for what it is careful about."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(left, right, input_precision="ieee")


@triton.jit
def add_product(total, left, right):
    """Add a product of matrices to a total."""
    if INTERPRETED:
        return total + tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def head_of(tensor, batch, head, stride_batch, stride_head):
    """Return where a head starts; batches may hold more elements than 32 bits count."""
    return tensor + tl.cast(batch, tl.int64) * stride_batch + tl.cast(head, tl.int64) * stride_head


@triton.jit
def rows_of(
    head, stride, start, count, BOUNDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Load a tile (ROWS, BLOCK) of a head's rows, with zeros where there is nothing."""
    rows, features = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    places = head + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + features[None, :]
    if BOUNDS:
        if WIDTH == BLOCK:
            return tl.load(places, mask=(start + rows < count)[:, None], other=0.0)
        else:
            return tl.load(places, mask=(start + rows < count)[:, None] & (features < WIDTH)[None, :], other=0.0)
    else:
        if WIDTH == BLOCK:
            return tl.load(places)
        else:
            return tl.load(places, mask=(features < WIDTH)[None, :], other=0.0)


@triton.jit
def put_rows(head, stride, start, count, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile (ROWS, BLOCK) into a head's rows."""
    rows, features = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    places = head + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + features[None, :]
    there = (start + rows < count)[:, None] & (features < WIDTH)[None, :]
    tl.store(places, tile.to(head.dtype.element_ty), mask=there)


@triton.jit
def scores_of(
    products, start_row, start_key, rows, keys, length, count, mask, stride_row, stride_key, scale, lowest,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, BOUNDS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Make the scores of a tile, and say which of them count.

    Args:
        products: Of queries and keys, in a tile of any orientation.
        start_row: The tile's first query.
        start_key: Its first key.
        rows: The numbers of its queries within it, along their dimension.
        keys: The numbers of its keys within it, along theirs.
        length: How many queries there are.
        count: How many keys there are.
        mask: Where the head's part of the mask starts.
        stride_row: The mask's stride from query to query; 0 where it is the same for all.
        stride_key: From key to key.
        scale: Factor of the scores.
        lowest: At and below which an additive mask excludes a key.
        UNSCALED: Whether scores are the bare products.
        MASKED: Which kind of mask there is.
        BOUNDS: Whether the tile may reach beyond the last key.
        CAUSAL: Whether it may hold keys that come after their query.

    Returns:
        The scores, and whether each counts; queries beyond the last are not told from others.
    """
    valid = tl.full(products.shape, True, tl.int1)
    if BOUNDS:
        valid = valid & (start_key + keys < count)
    if CAUSAL:
        valid = valid & (start_key + keys <= start_row + rows)
    scores = products
    if MASKED == NO_MASK:
        if not UNSCALED:
            scores = products * scale
    else:
        first = mask + tl.cast(start_row, tl.int64) * stride_row + tl.cast(start_key, tl.int64) * stride_key
        there = (start_row + rows < length) & (start_key + keys < count)
        entries = tl.load(first + rows * stride_row + keys * stride_key, mask=there, other=0)
        if MASKED == BOOLEAN:
            valid = valid & (entries != 0)
            if not UNSCALED:
                scores = products * scale
        else:
            bias = entries.to(tl.float32)
            valid = valid & not_(bias <= lowest)  # a NaN is not hidden
            scores = tl.fma(products, scale, bias)
    return scores, valid


@triton.jit
def not_(condition):
    """Negates; written as a comparison, which the compiler joins with the one it negates."""
    return condition == 0


@triton.jit
def threshold_of(centre, noise, mu, noise_unit, MEDIAN: tl.constexpr, NOISY: tl.constexpr):
    """Return the threshold without and with noise, in the measure of the scores."""
    middle = tl.full([], 0.0, tl.float32) + mu
    if MEDIAN:
        middle = tl.load(centre)
    threshold = middle
    if NOISY:
        threshold = tl.fma(tl.load(noise), noise_unit, middle)
    return middle, threshold


@triton.jit
def survives(seed, head, rows, keys, dropout_p):
    """Draw which weights dropout keeps: of the place of a weight alone, so that it is the same in every kernel."""
    key_number = keys + rows * 0
    row_number = rows + keys * 0
    head_number = row_number * 0 + head
    random, _, _, _ = tl.philox(seed, key_number, row_number, head_number, head_number * 0)
    return tl.uint_to_uniform_float(random) >= dropout_p


@triton.jit
def forward_tiles(
    out, highest, total, forgotten_count, query, key_head, value_head, mask_head, stride_key, stride_value,
    stride_mask_row, stride_mask_key, start_row, first, last, length, count, head, threshold, seed, scale, unit, lowest,
    dropout_p, keep_factor,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, BOUNDS: tl.constexpr, CAUSAL: tl.constexpr, SAME: tl.constexpr,
    COUNT: tl.constexpr, DROPOUT: tl.constexpr, FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    VALUES: tl.constexpr, BLOCK_VALUES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Go over the keys from ``first`` to ``last`` for one tile of queries; see :func:`forward_kernel`."""
    rows, keys = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
    for start in range(first, last, KEYS):
        key = rows_of(key_head, stride_key, start, count, BOUNDS, KEYS, FEATURES, BLOCK_FEATURES)
        value = rows_of(value_head, stride_value, start, count, BOUNDS, KEYS, VALUES, BLOCK_VALUES)
        scores, valid = scores_of(
            score_products(query, tl.trans(key)), start_row, start, rows, keys, length, count, mask_head,
            stride_mask_row, stride_mask_key, scale, lowest, UNSCALED, MASKED, BOUNDS, CAUSAL,
        )  # fmt: skip
        low = scores <= threshold
        kept = valid & not_(low)  # what is not at most the threshold: a NaN is not hidden
        # Where forgotten scores become the threshold, no score below it is a maximum, and no select is needed.
        candidates = tl.where(valid if SAME else kept, scores, BOTTOM)
        higher = tl.maximum(highest, tl.max(candidates, 1))
        shrink = tl.exp2((highest - higher) * unit)
        weights = tl.exp2(tl.fma(scores, unit, -(higher * unit)[:, None]))
        if COUNT:
            forgotten_count += tl.sum((valid & low).to(tl.int32), 1)
            weights = tl.where(kept, weights, 0.0)
            total = total * shrink + tl.sum(weights, 1)
        else:
            weight_of_forgotten = tl.exp2((threshold - higher) * unit)
            everything = tl.where(low, weight_of_forgotten[:, None], weights)
            total = total * shrink + tl.sum(tl.where(valid, everything, 0.0), 1)
            weights = tl.where(kept, weights, 0.0)
        if DROPOUT:
            weights = tl.where(survives(seed, head, start_row + rows, start + keys, dropout_p), weights, 0.0)
            weights = weights * keep_factor
        out = add_product(out * shrink[:, None], weights.to(value.dtype), value)
        highest = higher
    return out, highest, total, forgotten_count


@triton.jit
def forward_kernel(
    query, key, value, mask, centre, noise, seeds, out, log_sum, rho,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_value_batch, stride_value_head, stride_value_row,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_key,
    stride_out_batch, stride_out_head, stride_out_row,
    heads, group, length, count, scale, unit, mu, noise_unit, bias, log_n, lowest, dropout_p, keep_factor,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, MEDIAN: tl.constexpr, NOISY: tl.constexpr,
    SAME: tl.constexpr, COUNT: tl.constexpr, ADDED: tl.constexpr, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, VALUES: tl.constexpr, BLOCK_VALUES: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of queries' output, (ROWS, VALUES), their L, and what the forgotten keys weigh, rho.

    SAME says that a forgotten score becomes the threshold. Then the forgotten keys are added to the denominator as they
    come. Elsewhere, and where rho is wanted because the threshold has a gradient, they are counted (COUNT) and added
    last. So is n of softmax_n, where there is one (ADDED); ``log_n`` is its logarithm to the base of 2.
    """
    tiles = tl.cdiv(length, ROWS)
    head = tl.program_id(0) // tiles
    start_row = tl.program_id(0) % tiles * ROWS
    batch, query_head = head // heads, head % heads
    key_head = head_of(key, batch, query_head // group, stride_key_batch, stride_key_head)
    value_head = head_of(value, batch, query_head // group, stride_value_batch, stride_value_head)
    mask_head = head_of(mask, batch, query_head, stride_mask_batch, stride_mask_head)
    queries = rows_of(
        head_of(query, batch, query_head, stride_query_batch, stride_query_head), stride_query_row, start_row, length,
        True, ROWS, FEATURES, BLOCK_FEATURES,
    )  # fmt: skip
    _, threshold = threshold_of(centre, noise, mu, noise_unit, MEDIAN, NOISY)
    seed = 0
    if DROPOUT:
        seed = tl.load(seeds)

    outs = tl.zeros([ROWS, BLOCK_VALUES], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    forgotten = tl.zeros([ROWS], tl.int32)
    highest = tl.full([ROWS], BOTTOM, tl.float32)
    if SAME:
        highest = tl.maximum(highest, threshold)
    STEP: tl.constexpr = KEYS if CAUSAL else REST
    end = count
    whole = count // KEYS * KEYS
    if CAUSAL:
        end = tl.minimum(count, start_row + ROWS)
        whole = tl.minimum(start_row, count) // KEYS * KEYS
    outs, highest, total, forgotten = forward_tiles(
        outs, highest, total, forgotten, queries, key_head, value_head, mask_head, stride_key_row, stride_value_row,
        stride_mask_row, stride_mask_key, start_row, 0, whole, length, count, head, threshold, seed, scale, unit,
        lowest, dropout_p, keep_factor, UNSCALED, MASKED, False, False, SAME, COUNT, DROPOUT, FEATURES, BLOCK_FEATURES,
        VALUES, BLOCK_VALUES, ROWS, KEYS,
    )  # fmt: skip
    outs, highest, total, forgotten = forward_tiles(
        outs, highest, total, forgotten, queries, key_head, value_head, mask_head, stride_key_row, stride_value_row,
        stride_mask_row, stride_mask_key, start_row, whole, end, length, count, head, threshold, seed, scale, unit,
        lowest, dropout_p, keep_factor, UNSCALED, MASKED, True, CAUSAL, SAME, COUNT, DROPOUT, FEATURES, BLOCK_FEATURES,
        VALUES, BLOCK_VALUES, ROWS, STEP,
    )  # fmt: skip

    rows = start_row + tl.arange(0, ROWS)
    place = tl.cast(head, tl.int64) * length + rows
    shift = highest * unit
    if COUNT:
        level = threshold * unit
        if not SAME:
            level = tl.full([], 0.0, tl.float32) + bias
        some = forgotten > 0
        raised = tl.where(some, tl.maximum(shift, level), shift)
        shrink = tl.where(some, tl.exp2(shift - raised), 1.0)
        weight = tl.where(some, forgotten * tl.exp2(level - raised), 0.0)
        total = total * shrink + weight
        outs = outs * shrink[:, None]
        shift = raised
    empty = total == 0  # no key is left: the row gives 0
    if ADDED:
        raised = tl.maximum(shift, log_n)
        shrink = tl.exp2(shift - raised)
        total = total * shrink + tl.exp2(log_n - raised)
        outs = outs * shrink[:, None]
        if COUNT:
            weight = weight * shrink
        shift = raised
    divisor = tl.where(empty, 1.0, total)
    if COUNT and SAME:
        tl.store(rho + place, weight / divisor, mask=rows < length)
    outs = outs / divisor[:, None]
    relevant = tl.where(empty, 0.0, threshold)
    outs = tl.where((relevant == relevant)[:, None], outs, float("nan"))
    tl.store(log_sum + place, tl.where(empty, float("inf"), shift + tl.log2(total)), mask=rows < length)
    put_rows(
        head_of(out, batch, query_head, stride_out_batch, stride_out_head), stride_out_row, start_row, length, outs,
        ROWS, VALUES, BLOCK_VALUES,
    )  # fmt: skip


@triton.jit
def delta_kernel(
    grad, out, delta, stride_grad_batch, stride_grad_head, stride_grad_row,
    stride_out_batch, stride_out_head, stride_out_row, heads, length,
    VALUES: tl.constexpr, BLOCK_VALUES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute delta, the inner product of each row's output and its gradient."""
    tiles = tl.cdiv(length, ROWS)
    head = tl.program_id(0) // tiles
    start = tl.program_id(0) % tiles * ROWS
    batch, inner = head // heads, head % heads
    grads = rows_of(
        head_of(grad, batch, inner, stride_grad_batch, stride_grad_head), stride_grad_row, start, length,
        True, ROWS, VALUES, BLOCK_VALUES,
    )  # fmt: skip
    outs = rows_of(
        head_of(out, batch, inner, stride_out_batch, stride_out_head), stride_out_row, start, length,
        True, ROWS, VALUES, BLOCK_VALUES,
    )  # fmt: skip
    rows = start + tl.arange(0, ROWS)
    products = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(delta + tl.cast(head, tl.int64) * length + rows, products, mask=rows < length)


@triton.jit
def backward_tile(
    products, inner, log_sums, deltas, start_row, start_key, rows, keys, length, count, mask_head, stride_mask_row,
    stride_mask_key, head, middle, threshold, share, seed, scale, unit, lowest, dropout_p, keep_factor,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, BOUNDS: tl.constexpr, CAUSAL: tl.constexpr, TIES: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Make, in a tile of any orientation, the weights as they met the values, and the gradient of the scores.

    ``products`` are of queries and keys, ``inner`` of the output's gradient and the values; ``log_sums`` and ``deltas``
    lie along the queries. ``share`` is what each score that is equal to the median, ``middle``, has of the threshold's
    gradient. Both results are float32.
    """
    scores, valid = scores_of(
        products, start_row, start_key, rows, keys, length, count, mask_head, stride_mask_row, stride_mask_key, scale,
        lowest, UNSCALED, MASKED, BOUNDS, CAUSAL,
    )  # fmt: skip
    kept = valid & not_(scores <= threshold)
    weights = tl.where(kept, tl.exp2(tl.fma(scores, unit, -log_sums)), 0.0)
    met = weights
    if DROPOUT:
        survivors = survives(seed, head, start_row + rows, start_key + keys, dropout_p)
        met = tl.where(survivors, weights * keep_factor, 0.0)
        inner = tl.where(survivors, inner * keep_factor, 0.0)
    grads = weights * (inner - deltas)
    if TIES:
        grads = tl.where(valid & (scores == middle), grads + share, grads)
    return met, grads


@triton.jit
def query_tiles(
    totals, query, grads, log_sums, deltas, key_head, value_head, mask_head, stride_key, stride_value, stride_mask_row,
    stride_mask_key, start_row, first, last, length, count, head, middle, threshold, share, seed, scale, unit, lowest,
    dropout_p, keep_factor,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, BOUNDS: tl.constexpr, CAUSAL: tl.constexpr, TIES: tl.constexpr,
    DROPOUT: tl.constexpr, FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr, VALUES: tl.constexpr,
    BLOCK_VALUES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Go over the keys from ``first`` to ``last`` for one tile of queries; see :func:`query_kernel`."""
    rows, keys = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
    for start in range(first, last, KEYS):
        key = rows_of(key_head, stride_key, start, count, BOUNDS, KEYS, FEATURES, BLOCK_FEATURES)
        value = rows_of(value_head, stride_value, start, count, BOUNDS, KEYS, VALUES, BLOCK_VALUES)
        _, of_scores = backward_tile(
            score_products(query, tl.trans(key)), product(grads, tl.trans(value)), log_sums[:, None], deltas[:, None],
            start_row, start, rows, keys, length, count, mask_head, stride_mask_row, stride_mask_key, head, middle,
            threshold, share, seed, scale, unit, lowest, dropout_p, keep_factor, UNSCALED, MASKED, BOUNDS, CAUSAL, TIES,
            DROPOUT,
        )  # fmt: skip
        totals = add_product(totals, of_scores.to(key.dtype), key)
    return totals


@triton.jit
def query_kernel(
    query, key, value, mask, centre, noise, seeds, grad, log_sum, delta, shares, grad_query,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_value_batch, stride_value_head, stride_value_row,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_key,
    stride_grad_batch, stride_grad_head, stride_grad_row,
    stride_result_batch, stride_result_head, stride_result_row,
    heads, group, length, count, scale, unit, mu, noise_unit, lowest, dropout_p, keep_factor,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, MEDIAN: tl.constexpr, NOISY: tl.constexpr,
    TIES: tl.constexpr, DROPOUT: tl.constexpr, FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    VALUES: tl.constexpr, BLOCK_VALUES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a tile of queries."""
    tiles = tl.cdiv(length, ROWS)
    head = tl.program_id(0) // tiles
    start_row = tl.program_id(0) % tiles * ROWS
    batch, query_head = head // heads, head % heads
    key_head = head_of(key, batch, query_head // group, stride_key_batch, stride_key_head)
    value_head = head_of(value, batch, query_head // group, stride_value_batch, stride_value_head)
    mask_head = head_of(mask, batch, query_head, stride_mask_batch, stride_mask_head)
    queries = rows_of(
        head_of(query, batch, query_head, stride_query_batch, stride_query_head), stride_query_row, start_row, length,
        True, ROWS, FEATURES, BLOCK_FEATURES,
    )  # fmt: skip
    grads = rows_of(
        head_of(grad, batch, query_head, stride_grad_batch, stride_grad_head), stride_grad_row, start_row, length,
        True, ROWS, VALUES, BLOCK_VALUES,
    )  # fmt: skip
    rows = start_row + tl.arange(0, ROWS)
    place = tl.cast(head, tl.int64) * length + rows
    log_sums = tl.load(log_sum + place, mask=rows < length, other=float("inf"))
    deltas = tl.load(delta + place, mask=rows < length, other=0.0)
    middle, threshold = threshold_of(centre, noise, mu, noise_unit, MEDIAN, NOISY)
    seed = 0
    if DROPOUT:
        seed = tl.load(seeds)
    share = 0.0
    if TIES:
        share = tl.load(shares)

    totals = tl.zeros([ROWS, BLOCK_FEATURES], tl.float32)
    STEP: tl.constexpr = KEYS if CAUSAL else REST
    end = count
    whole = count // KEYS * KEYS
    if CAUSAL:
        end = tl.minimum(count, start_row + ROWS)
        whole = tl.minimum(start_row, count) // KEYS * KEYS
    totals = query_tiles(
        totals, queries, grads, log_sums, deltas, key_head, value_head, mask_head, stride_key_row, stride_value_row,
        stride_mask_row, stride_mask_key, start_row, 0, whole, length, count, head, middle, threshold, share, seed,
        scale, unit, lowest, dropout_p, keep_factor, UNSCALED, MASKED, False, False, TIES, DROPOUT, FEATURES,
        BLOCK_FEATURES, VALUES, BLOCK_VALUES, ROWS, KEYS,
    )  # fmt: skip
    totals = query_tiles(
        totals, queries, grads, log_sums, deltas, key_head, value_head, mask_head, stride_key_row, stride_value_row,
        stride_mask_row, stride_mask_key, start_row, whole, end, length, count, head, middle, threshold, share, seed,
        scale, unit, lowest, dropout_p, keep_factor, UNSCALED, MASKED, True, CAUSAL, TIES, DROPOUT, FEATURES,
        BLOCK_FEATURES, VALUES, BLOCK_VALUES, ROWS, STEP,
    )  # fmt: skip
    put_rows(
        head_of(grad_query, batch, query_head, stride_result_batch, stride_result_head), stride_result_row, start_row,
        length, totals * scale, ROWS, FEATURES, BLOCK_FEATURES,
    )  # fmt: skip


@triton.jit
def key_tiles(
    grad_keys, grad_values, key, value, query_head, grad_head, log_sum, delta, mask_head, stride_query, stride_grad,
    stride_mask_row, stride_mask_key, start_key, first, last, length, count, head, middle, threshold, share, seed,
    scale, unit, lowest, dropout_p, keep_factor,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, BOUNDS: tl.constexpr, CAUSAL: tl.constexpr, TIES: tl.constexpr,
    DROPOUT: tl.constexpr, FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr, VALUES: tl.constexpr,
    BLOCK_VALUES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Go over the queries from ``first`` to ``last`` for one tile of keys; see :func:`key_kernel`."""
    rows, keys = tl.arange(0, ROWS)[None, :], tl.arange(0, KEYS)[:, None]
    numbers = tl.arange(0, ROWS)
    for start in range(first, last, ROWS):
        query = rows_of(query_head, stride_query, start, length, BOUNDS, ROWS, FEATURES, BLOCK_FEATURES)
        grad = rows_of(grad_head, stride_grad, start, length, BOUNDS, ROWS, VALUES, BLOCK_VALUES)
        if BOUNDS:
            # Queries beyond the last are zeros with an infinite L: their weights are 0. Keys beyond are not stored.
            log_sums = tl.load(log_sum + start + numbers, mask=start + numbers < length, other=float("inf"))
            deltas = tl.load(delta + start + numbers, mask=start + numbers < length, other=0.0)
        else:
            log_sums = tl.load(log_sum + start + numbers)
            deltas = tl.load(delta + start + numbers)
        met, of_scores = backward_tile(
            score_products(key, tl.trans(query)), product(value, tl.trans(grad)), log_sums[None, :], deltas[None, :],
            start, start_key, rows, keys, length, count, mask_head, stride_mask_row, stride_mask_key, head, middle,
            threshold, share, seed, scale, unit, lowest, dropout_p, keep_factor, UNSCALED, MASKED, False, CAUSAL, TIES,
            DROPOUT,
        )  # fmt: skip
        grad_values = add_product(grad_values, met.to(grad.dtype), grad)
        grad_keys = add_product(grad_keys, of_scores.to(query.dtype), query)
    return grad_keys, grad_values


@triton.jit
def key_kernel(
    query, key, value, mask, centre, noise, seeds, grad, log_sum, delta, shares, grad_key, grad_value,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_value_batch, stride_value_head, stride_value_row,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_key,
    stride_grad_batch, stride_grad_head, stride_grad_row,
    stride_result_batch, stride_result_head, stride_result_row,
    stride_second_batch, stride_second_head, stride_second_row,
    heads, group, length, count, scale, unit, mu, noise_unit, lowest, dropout_p, keep_factor,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, MEDIAN: tl.constexpr, NOISY: tl.constexpr,
    TIES: tl.constexpr, DROPOUT: tl.constexpr, FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    VALUES: tl.constexpr, BLOCK_VALUES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a tile of keys and values, with the keys along the rows of every tile.

    It adds up over all heads of queries that share them, in their order.
    """
    tiles = tl.cdiv(count, KEYS)
    shared = tl.program_id(0) // tiles
    start_key = tl.program_id(0) % tiles * KEYS
    batch, inner = shared // (heads // group), shared % (heads // group)
    keys = rows_of(
        head_of(key, batch, inner, stride_key_batch, stride_key_head), stride_key_row, start_key, count,
        True, KEYS, FEATURES, BLOCK_FEATURES,
    )  # fmt: skip
    values = rows_of(
        head_of(value, batch, inner, stride_value_batch, stride_value_head), stride_value_row, start_key, count,
        True, KEYS, VALUES, BLOCK_VALUES,
    )  # fmt: skip
    middle, threshold = threshold_of(centre, noise, mu, noise_unit, MEDIAN, NOISY)
    seed = 0
    if DROPOUT:
        seed = tl.load(seeds)
    share = 0.0
    if TIES:
        share = tl.load(shares)

    whole = length // ROWS * ROWS
    grad_keys = tl.zeros([KEYS, BLOCK_FEATURES], tl.float32)
    grad_values = tl.zeros([KEYS, BLOCK_VALUES], tl.float32)
    for member in range(0, group):
        query_head = inner * group + member
        head = batch * heads + query_head
        rows_before = tl.cast(head, tl.int64) * length
        first = 0
        if CAUSAL:  # the tiles on the diagonal
            first = tl.minimum(start_key // ROWS * ROWS, length)
            past = tl.minimum(tl.cdiv(start_key + KEYS, ROWS) * ROWS, length)
            grad_keys, grad_values = key_tiles(
                grad_keys, grad_values, keys, values,
                head_of(query, batch, query_head, stride_query_batch, stride_query_head),
                head_of(grad, batch, query_head, stride_grad_batch, stride_grad_head),
                log_sum + rows_before, delta + rows_before,
                head_of(mask, batch, query_head, stride_mask_batch, stride_mask_head),
                stride_query_row, stride_grad_row, stride_mask_row, stride_mask_key, start_key, first, past, length,
                count, head, middle, threshold, share, seed, scale, unit, lowest, dropout_p, keep_factor, UNSCALED,
                MASKED, True, True, TIES, DROPOUT, FEATURES, BLOCK_FEATURES, VALUES, BLOCK_VALUES, ROWS, KEYS,
            )  # fmt: skip
            first = past
        grad_keys, grad_values = key_tiles(
            grad_keys, grad_values, keys, values,
            head_of(query, batch, query_head, stride_query_batch, stride_query_head),
            head_of(grad, batch, query_head, stride_grad_batch, stride_grad_head),
            log_sum + rows_before, delta + rows_before,
            head_of(mask, batch, query_head, stride_mask_batch, stride_mask_head),
            stride_query_row, stride_grad_row, stride_mask_row, stride_mask_key, start_key, first, whole, length,
            count, head, middle, threshold, share, seed, scale, unit, lowest, dropout_p, keep_factor, UNSCALED, MASKED,
            False, False, TIES, DROPOUT, FEATURES, BLOCK_FEATURES, VALUES, BLOCK_VALUES, ROWS, KEYS,
        )  # fmt: skip
        grad_keys, grad_values = key_tiles(
            grad_keys, grad_values, keys, values,
            head_of(query, batch, query_head, stride_query_batch, stride_query_head),
            head_of(grad, batch, query_head, stride_grad_batch, stride_grad_head),
            log_sum + rows_before, delta + rows_before,
            head_of(mask, batch, query_head, stride_mask_batch, stride_mask_head),
            stride_query_row, stride_grad_row, stride_mask_row, stride_mask_key, start_key, tl.maximum(first, whole),
            length, length, count, head, middle, threshold, share, seed, scale, unit, lowest, dropout_p, keep_factor,
            UNSCALED, MASKED, True, False, TIES, DROPOUT, FEATURES, BLOCK_FEATURES, VALUES, BLOCK_VALUES, REST, KEYS,
        )  # fmt: skip
    put_rows(
        head_of(grad_key, batch, inner, stride_result_batch, stride_result_head), stride_result_row, start_key, count,
        grad_keys * scale, KEYS, FEATURES, BLOCK_FEATURES,
    )  # fmt: skip
    put_rows(
        head_of(grad_value, batch, inner, stride_second_batch, stride_second_head), stride_second_row, start_key, count,
        grad_values, KEYS, VALUES, BLOCK_VALUES,
    )  # fmt: skip


@triton.jit
def head_tiles(
    totals, queries, grads, log_sums, deltas, key_head, value_head, grad_key_head, grad_value_head, mask_head,
    stride_key, stride_value, stride_grad_key, stride_grad_value, stride_mask_row, stride_mask_key, length, count, head,
    middle, threshold, share, seed, scale, unit, lowest, dropout_p, keep_factor,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, TIES: tl.constexpr, DROPOUT: tl.constexpr,
    FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr, VALUES: tl.constexpr, BLOCK_VALUES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Go over all keys for all queries of a head; see :func:`head_kernel`."""
    rows, keys = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
    # Each tile is loaded while the one before is computed. Triton's own stages take more instructions for that.
    next_key = rows_of(key_head, stride_key, 0, count, True, KEYS, FEATURES, BLOCK_FEATURES)
    next_value = rows_of(value_head, stride_value, 0, count, True, KEYS, VALUES, BLOCK_VALUES)
    for start in range(0, count, KEYS):
        key, value = next_key, next_value
        next_key = rows_of(key_head, stride_key, start + KEYS, count, True, KEYS, FEATURES, BLOCK_FEATURES)
        next_value = rows_of(value_head, stride_value, start + KEYS, count, True, KEYS, VALUES, BLOCK_VALUES)
        met, of_scores = backward_tile(
            score_products(queries, tl.trans(key)), product(grads, tl.trans(value)), log_sums[:, None],
            deltas[:, None], 0, start, rows, keys, length, count, mask_head, stride_mask_row, stride_mask_key, head,
            middle, threshold, share, seed, scale, unit, lowest, dropout_p, keep_factor, UNSCALED, MASKED, True, CAUSAL,
            TIES, DROPOUT,
        )  # fmt: skip
        met, of_scores = met.to(grads.dtype), of_scores.to(key.dtype)
        # With the features along the rows, of which Hopper's own instruction takes no fewer than 64.
        of_values = tl.trans(product(tl.trans(grads), met))
        put_rows(grad_value_head, stride_grad_value, start, count, of_values, KEYS, VALUES, BLOCK_VALUES)
        of_keys = tl.trans(product(tl.trans(queries), of_scores)) * scale
        put_rows(grad_key_head, stride_grad_key, start, count, of_keys, KEYS, FEATURES, BLOCK_FEATURES)
        totals = add_product(totals, of_scores, key)
    return totals


@triton.jit
def head_kernel(
    query, key, value, mask, centre, noise, seeds, grad, log_sum, delta, shares, out, grad_query, grad_key, grad_value,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_value_batch, stride_value_head, stride_value_row,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_key,
    stride_grad_batch, stride_grad_head, stride_grad_row,
    stride_out_batch, stride_out_head, stride_out_row,
    stride_result_batch, stride_result_head, stride_result_row,
    stride_second_batch, stride_second_head, stride_second_row,
    stride_third_batch, stride_third_head, stride_third_row,
    heads, length, count, scale, unit, mu, noise_unit, lowest, dropout_p, keep_factor,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, MEDIAN: tl.constexpr, NOISY: tl.constexpr,
    TIES: tl.constexpr, DELTA: tl.constexpr, DROPOUT: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, VALUES: tl.constexpr, BLOCK_VALUES: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a head's queries, keys and values, whose keys no other head shares.

    One tile, (ROWS, FEATURES), holds all queries, and the keys are gone over once. So the gradients of a tile of keys
    and values are complete when it has been computed, and only those of the queries are summed, in registers. With
    DELTA the kernel computes delta, too, which nothing else needs then.
    """
    head = tl.program_id(0)
    batch, inner = head // heads, head % heads
    queries = rows_of(
        head_of(query, batch, inner, stride_query_batch, stride_query_head), stride_query_row, 0, length,
        True, ROWS, FEATURES, BLOCK_FEATURES,
    )  # fmt: skip
    grads = rows_of(
        head_of(grad, batch, inner, stride_grad_batch, stride_grad_head), stride_grad_row, 0, length,
        True, ROWS, VALUES, BLOCK_VALUES,
    )  # fmt: skip
    rows = tl.arange(0, ROWS)
    place = tl.cast(head, tl.int64) * length + rows
    # Queries beyond the last are zeros with an infinite L: their weights are 0.
    log_sums = tl.load(log_sum + place, mask=rows < length, other=float("inf"))
    if DELTA:
        outs = rows_of(
            head_of(out, batch, inner, stride_out_batch, stride_out_head), stride_out_row, 0, length,
            True, ROWS, VALUES, BLOCK_VALUES,
        )  # fmt: skip
        deltas = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    else:
        deltas = tl.load(delta + place, mask=rows < length, other=0.0)
    middle, threshold = threshold_of(centre, noise, mu, noise_unit, MEDIAN, NOISY)
    seed = 0
    if DROPOUT:
        seed = tl.load(seeds)
    share = 0.0
    if TIES:
        share = tl.load(shares)

    totals = head_tiles(
        tl.zeros([ROWS, BLOCK_FEATURES], tl.float32), queries, grads, log_sums, deltas,
        head_of(key, batch, inner, stride_key_batch, stride_key_head),
        head_of(value, batch, inner, stride_value_batch, stride_value_head),
        head_of(grad_key, batch, inner, stride_second_batch, stride_second_head),
        head_of(grad_value, batch, inner, stride_third_batch, stride_third_head),
        head_of(mask, batch, inner, stride_mask_batch, stride_mask_head),
        stride_key_row, stride_value_row, stride_second_row, stride_third_row, stride_mask_row, stride_mask_key, length,
        count, head, middle, threshold, share, seed, scale, unit, lowest, dropout_p, keep_factor, UNSCALED, MASKED,
        CAUSAL, TIES, DROPOUT, FEATURES, BLOCK_FEATURES, VALUES, BLOCK_VALUES, ROWS, KEYS,
    )  # fmt: skip
    put_rows(
        head_of(grad_query, batch, inner, stride_result_batch, stride_result_head), stride_result_row, 0, length,
        totals * scale, ROWS, FEATURES, BLOCK_FEATURES,
    )  # fmt: skip


@triton.jit
def mask_kernel(
    query, key, value, mask, centre, noise, seeds, grad, log_sum, delta, shares, grad_mask,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_value_batch, stride_value_head, stride_value_row,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_key,
    stride_grad_batch, stride_grad_head, stride_grad_row,
    batches, heads, group, length, count, mask_batches, mask_heads, mask_rows, mask_keys,
    scale, unit, mu, noise_unit, lowest, dropout_p, keep_factor,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, MEDIAN: tl.constexpr, NOISY: tl.constexpr,
    TIES: tl.constexpr, DROPOUT: tl.constexpr, FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    VALUES: tl.constexpr, BLOCK_VALUES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the gradient of an additive mask, (mask_batches, mask_heads, mask_rows, mask_keys).

    Where the mask is the same for several batch items, heads, queries or keys, it adds up over them, in their order:
    the sum is the same every time, and nothing larger than the mask is allocated.
    """
    row_tiles, key_tiles_ = tl.cdiv(mask_rows, ROWS), tl.cdiv(mask_keys, KEYS)
    tile = tl.program_id(0)
    key_tile = tile % key_tiles_
    row_tile = tile // key_tiles_ % row_tiles
    mask_head = tile // key_tiles_ // row_tiles % mask_heads
    mask_batch = tile // key_tiles_ // row_tiles // mask_heads
    # How many tiles of scores lie under this one, along each dimension: all of them where the mask has but one entry.
    over_batches = batches // mask_batches
    over_heads = heads // mask_heads
    over_rows = tl.cdiv(length, ROWS) // row_tiles
    over_keys = tl.cdiv(count, KEYS) // key_tiles_
    middle, threshold = threshold_of(centre, noise, mu, noise_unit, MEDIAN, NOISY)
    seed = 0
    if DROPOUT:
        seed = tl.load(seeds)
    share = 0.0
    if TIES:
        share = tl.load(shares)
    rows, keys = tl.arange(0, ROWS), tl.arange(0, KEYS)
    totals = tl.zeros([ROWS, KEYS], tl.float32)
    for number in range(0, over_batches * over_heads * over_rows * over_keys):
        start_key = (key_tile + number % over_keys) * KEYS
        start_row = (row_tile + number // over_keys % over_rows) * ROWS
        query_head = mask_head + number // over_keys // over_rows % over_heads
        batch = mask_batch + number // over_keys // over_rows // over_heads
        head = batch * heads + query_head
        queries = rows_of(
            head_of(query, batch, query_head, stride_query_batch, stride_query_head), stride_query_row, start_row,
            length, True, ROWS, FEATURES, BLOCK_FEATURES,
        )  # fmt: skip
        grads = rows_of(
            head_of(grad, batch, query_head, stride_grad_batch, stride_grad_head), stride_grad_row, start_row,
            length, True, ROWS, VALUES, BLOCK_VALUES,
        )  # fmt: skip
        key_rows = rows_of(
            head_of(key, batch, query_head // group, stride_key_batch, stride_key_head), stride_key_row, start_key,
            count, True, KEYS, FEATURES, BLOCK_FEATURES,
        )  # fmt: skip
        value_rows = rows_of(
            head_of(value, batch, query_head // group, stride_value_batch, stride_value_head), stride_value_row,
            start_key, count, True, KEYS, VALUES, BLOCK_VALUES,
        )  # fmt: skip
        place = tl.cast(head, tl.int64) * length + start_row + rows
        log_sums = tl.load(log_sum + place, mask=start_row + rows < length, other=float("inf"))
        deltas = tl.load(delta + place, mask=start_row + rows < length, other=0.0)
        _, of_scores = backward_tile(
            score_products(queries, tl.trans(key_rows)), product(grads, tl.trans(value_rows)), log_sums[:, None],
            deltas[:, None], start_row, start_key, rows[:, None], keys[None, :], length, count,
            head_of(mask, batch, query_head, stride_mask_batch, stride_mask_head), stride_mask_row, stride_mask_key,
            head, middle, threshold, share, seed, scale, unit, lowest, dropout_p, keep_factor, UNSCALED, MASKED, True,
            False, TIES, DROPOUT,
        )  # fmt: skip
        totals += tl.where((start_row + rows < length)[:, None], of_scores, 0.0)
    if mask_rows == 1:
        totals = tl.where(rows[:, None] == 0, tl.sum(totals, 0)[None, :], 0.0)
    if mask_keys == 1:
        totals = tl.where(keys[None, :] == 0, tl.sum(totals, 1)[:, None], 0.0)
    mask_row, mask_key = row_tile * ROWS + rows[:, None], key_tile * KEYS + keys[None, :]
    first = (tl.cast(mask_batch, tl.int64) * mask_heads + mask_head) * mask_rows * mask_keys
    tl.store(
        grad_mask + first + tl.cast(mask_row, tl.int64) * mask_keys + mask_key,
        totals.to(grad_mask.dtype.element_ty),
        mask=(mask_row < mask_rows) & (mask_key < mask_keys),
    )
