"""The exact median of all scores on the GPU, without all scores and without asking the GPU anything.

A sample of the scores, sorted, gives a bracket in which the median lies, all but surely. One pass over the tiles counts
what lies below, at and above its two ends, and collects what lies strictly between them. The median is one of the ends,
or it is among those collected: a radix select finds it there, eight bits of its number at a time. If the bracket missed
it, or more was collected than there is room for, the same select goes over all tiles again: slower, and as exact.
Which of these it is, each program reads from the counters, so that no number travels to the CPU and a CUDA graph
can hold it all.

The rank is that of ``torch.median``: the lower of two middle values. -0 is 0, and one NaN that counts makes the median
NaN. Without any score it is 0.

Importing this module imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_kernels
from .triton_kernels import head_of, not_, rows_of, score_products, scores_of

#: With no more scores than this, all are collected and none is sampled.
COLLECT_ALL = 1 << 20
#: Room for this many collected scores at most.
MOST_COLLECTED = 1 << 24
#: Scores that are sampled: at least, and at most. Powers of 2.
LEAST_SAMPLED, MOST_SAMPLED = 1 << 12, 1 << 18
#: As many programs go over the tiles; each takes every so manieth.
PROGRAMS = 1 << 11
#: Half the width of the bracket, in square roots of the sample's size: five standard deviations of the median's rank.
MARGIN = 2.5

#: The counters: scores that count, NaNs among them, scores below and up to the bracket's ends, those collected, and
#: samples that count.
COUNTED, NANS, BELOW_LOW, UP_TO_LOW, BELOW_HIGH, UP_TO_HIGH, COLLECTED, SAMPLED = (tl.constexpr(i) for i in range(8))
COUNTERS = 8
#: Digits of a score's number: how many, and how many values of one.
DIGITS, VALUES = tl.constexpr(4), tl.constexpr(256)
CHUNK = tl.constexpr(4096)


@triton.jit
def bracket_of(sample, counters, margin, SAMPLES: tl.constexpr):
    """Reads the bracket's ends from the sorted sample."""
    low, high = tl.full([], float("-inf"), tl.float32), tl.full([], float("inf"), tl.float32)
    if SAMPLES > 0:
        sampled = tl.load(counters + SAMPLED).to(tl.int32)
        middle = (sampled - 1) // 2
        steps = (margin * tl.sqrt(sampled.to(tl.float32))).to(tl.int32) + 1
        inside = steps <= middle
        first, last = tl.where(inside, middle - steps, 0), tl.where(inside, middle + steps, 0)
        low = tl.where(inside, tl.load(sample + first), low)
        high = tl.where(inside, tl.load(sample + last), high)
    return low, high


@triton.jit
def plan(counters, room):
    """Reads from the counters where the median is.

    Returns:
        Whether it is NaN, is the bracket's lower end, is its upper end, or is among the scores collected (elsewhere it
        is found from all scores); and its rank there.
    """
    counted = tl.load(counters + COUNTED)
    rank = tl.maximum(counted - 1, 0) // 2
    broken = tl.load(counters + NANS) > 0
    below_low, up_to_low = tl.load(counters + BELOW_LOW), tl.load(counters + UP_TO_LOW)
    below_high, up_to_high = tl.load(counters + BELOW_HIGH), tl.load(counters + UP_TO_HIGH)
    is_low = (below_low <= rank) & (rank < up_to_low)
    is_high = (below_high <= rank) & (rank < up_to_high)
    inside = (up_to_low <= rank) & (rank < below_high) & (tl.load(counters + COLLECTED) <= room)
    return broken, is_low, is_high, inside, tl.where(inside, rank - up_to_low, rank)


@triton.jit
def number_of(scores):
    """Numbers scores in their order: a whole number for each float32."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def score_of(number):
    """Returns the score of a number."""
    bits = number.to(tl.int32, bitcast=True)
    return (bits ^ ((~bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def digits_found(histograms, rank, DIGIT: tl.constexpr):
    """Follows the rank through the histograms of the digits before DIGIT.

    Returns:
        The number that these digits make, the rank among the scores that have them, and how many these are.
    """
    values = tl.arange(0, VALUES)
    prefix = tl.full([], 0, tl.uint32)
    many = tl.full([], 0, tl.int64)
    for digit in tl.static_range(DIGIT):
        histogram = tl.load(histograms + digit * VALUES + values)
        up_to = tl.cumsum(histogram, 0)
        value = tl.minimum(tl.sum((up_to <= rank).to(tl.int32), 0), VALUES - 1)
        rank -= tl.sum(tl.where(values < value, histogram, 0), 0)
        many = tl.sum(tl.where(values == value, histogram, 0), 0)
        prefix = (prefix << 8) | value.to(tl.uint32)
    return prefix, rank, many


@triton.jit
def sample_kernel(
    query, key, mask, sample, counters,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_key,
    batches, heads, group, length, count, scale, lowest,
    FOLD: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draws BLOCK scores, each anywhere; NaN stands for one that does not count."""
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The same draw at every call, and none of the script's.
    one, two, three, _ = tl.randint4x(0, numbers)
    head = (one.to(tl.uint32, bitcast=True) % tl.cast(batches * heads, tl.uint32)).to(tl.int32)
    row = (two.to(tl.uint32, bitcast=True) % tl.cast(length, tl.uint32)).to(tl.int32)
    column = (three.to(tl.uint32, bitcast=True) % tl.cast(count, tl.uint32)).to(tl.int32)
    batch, query_head = head // heads, head % heads
    features = tl.arange(0, BLOCK_FEATURES)[None, :]
    query_row = head_of(query, batch, query_head, stride_query_batch, stride_query_head)
    query_row += row.to(tl.int64) * stride_query_row
    key_row = head_of(key, batch, query_head // group, stride_key_batch, stride_key_head)
    key_row += column.to(tl.int64) * stride_key_row
    queries = tl.load(query_row[:, None] + features, mask=features < FEATURES, other=0.0).to(tl.float32)
    keys = tl.load(key_row[:, None] + features, mask=features < FEATURES, other=0.0).to(tl.float32)
    scores, valid = scores_of(
        tl.sum(queries * keys, 1), 0, 0, row.to(tl.int64), column.to(tl.int64), length, count,
        head_of(mask, batch, query_head, stride_mask_batch, stride_mask_head), stride_mask_row, stride_mask_key, scale,
        lowest, FOLD, MASKED, False, CAUSAL,
    )  # fmt: skip
    valid = valid & (scores == scores)
    tl.store(sample + numbers, tl.where(valid, scores, float("nan")))
    tl.atomic_add(counters + SAMPLED, tl.sum(valid.to(tl.int32), 0).to(tl.int64))


@triton.jit
def count_kernel(
    query, key, mask, sample, counters, collected,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_key,
    batches, heads, group, length, count, scale, lowest, margin, room,
    FOLD: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, SAMPLES: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Counts all scores, and collects those strictly within the bracket."""
    low, high = bracket_of(sample, counters, margin, SAMPLES)
    tiles = tl.cdiv(length, ROWS)
    rows, keys = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
    zero = tl.full([], 0, tl.int64)
    counted, nans, below_low, up_to_low, below_high, up_to_high = zero, zero, zero, zero, zero, zero
    for unit in range(tl.program_id(0), batches * heads * tiles, tl.num_programs(0)):
        head, start_row = unit // tiles, unit % tiles * ROWS
        batch, query_head = head // heads, head % heads
        queries = rows_of(
            head_of(query, batch, query_head, stride_query_batch, stride_query_head), stride_query_row, start_row,
            length, True, ROWS, FEATURES, BLOCK_FEATURES,
        )  # fmt: skip
        key_head = head_of(key, batch, query_head // group, stride_key_batch, stride_key_head)
        mask_head = head_of(mask, batch, query_head, stride_mask_batch, stride_mask_head)
        end = count
        if CAUSAL:
            end = tl.minimum(count, start_row + ROWS)
        for start in range(0, end, KEYS):
            key_rows = rows_of(key_head, stride_key_row, start, count, True, KEYS, FEATURES, BLOCK_FEATURES)
            scores, valid = scores_of(
                score_products(queries, tl.trans(key_rows)), start_row, start, rows, keys, length, count, mask_head,
                stride_mask_row, stride_mask_key, scale, lowest, FOLD, MASKED, True, CAUSAL,
            )  # fmt: skip
            counted += tl.sum(tl.sum(valid.to(tl.int32), 1), 0)
            nans += tl.sum(tl.sum((valid & (scores != scores)).to(tl.int32), 1), 0)
            below_low += tl.sum(tl.sum((valid & (scores < low)).to(tl.int32), 1), 0)
            up_to_low += tl.sum(tl.sum((valid & (scores <= low)).to(tl.int32), 1), 0)
            below_high += tl.sum(tl.sum((valid & (scores < high)).to(tl.int32), 1), 0)
            up_to_high += tl.sum(tl.sum((valid & (scores <= high)).to(tl.int32), 1), 0)
            within = valid & (scores > low) & (scores < high)
            chosen = within.to(tl.int32)
            in_row = tl.sum(chosen, 1)
            before = tl.atomic_add(counters + COLLECTED, tl.sum(in_row, 0).to(tl.int64))
            place = before + (tl.cumsum(in_row, 0) - in_row)[:, None] + tl.cumsum(chosen, 1) - chosen
            tl.store(collected + place, scores, mask=within & (place < room))
    tl.atomic_add(counters + COUNTED, counted)
    tl.atomic_add(counters + NANS, nans)
    tl.atomic_add(counters + BELOW_LOW, below_low)
    tl.atomic_add(counters + UP_TO_LOW, up_to_low)
    tl.atomic_add(counters + BELOW_HIGH, below_high)
    tl.atomic_add(counters + UP_TO_HIGH, up_to_high)


@triton.jit
def histogram_of(scores, valid, prefix, DIGIT: tl.constexpr, SIZE: tl.constexpr):
    """Counts the values of a digit among the scores whose digits before it are the prefix."""
    numbers = tl.reshape(number_of(scores), [SIZE])
    matching = tl.reshape(valid, [SIZE])
    if DIGIT > 0:
        matching = matching & ((numbers >> (32 - 8 * DIGIT)) == prefix)
    digits = ((numbers >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
    histogram = tl.histogram(tl.where(matching, digits, 0), VALUES)
    others = SIZE - tl.sum(matching.to(tl.int32), 0)  # they were counted as zeros
    return (histogram - tl.where(tl.arange(0, VALUES) == 0, others, 0)).to(tl.int64)


@triton.jit
def digit_kernel(
    query, key, mask, counters, collected, histograms,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_key,
    batches, heads, group, length, count, scale, lowest, room,
    DIGIT: tl.constexpr, FOLD: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Makes the histogram of one digit, over the scores collected or over all."""
    broken, is_low, is_high, inside, rank = plan(counters, room)
    prefix, rank, _ = digits_found(histograms, rank, DIGIT)
    totals = tl.zeros([VALUES], tl.int64)
    found = broken | is_low | is_high
    if inside & not_(found):
        many = tl.load(counters + COLLECTED).to(tl.int32)
        for start in range(tl.program_id(0) * CHUNK, many, tl.num_programs(0) * CHUNK):
            places = start + tl.arange(0, CHUNK)
            scores = tl.load(collected + places, mask=places < many, other=0.0)
            totals += histogram_of(scores, places < many, prefix, DIGIT, CHUNK)
    if not_(inside) & not_(found):
        tiles = tl.cdiv(length, ROWS)
        rows, keys = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
        for unit in range(tl.program_id(0), batches * heads * tiles, tl.num_programs(0)):
            head, start_row = unit // tiles, unit % tiles * ROWS
            batch, query_head = head // heads, head % heads
            queries = rows_of(
                head_of(query, batch, query_head, stride_query_batch, stride_query_head), stride_query_row, start_row,
                length, True, ROWS, FEATURES, BLOCK_FEATURES,
            )  # fmt: skip
            key_head = head_of(key, batch, query_head // group, stride_key_batch, stride_key_head)
            mask_head = head_of(mask, batch, query_head, stride_mask_batch, stride_mask_head)
            end = count
            if CAUSAL:
                end = tl.minimum(count, start_row + ROWS)
            for start in range(0, end, KEYS):
                key_rows = rows_of(key_head, stride_key_row, start, count, True, KEYS, FEATURES, BLOCK_FEATURES)
                scores, valid = scores_of(
                    score_products(queries, tl.trans(key_rows)), start_row, start, rows, keys, length, count, mask_head,
                    stride_mask_row, stride_mask_key, scale, lowest, FOLD, MASKED, True, CAUSAL,
                )  # fmt: skip
                totals += histogram_of(scores, valid, prefix, DIGIT, ROWS * KEYS)
    places = histograms + DIGIT * VALUES + tl.arange(0, VALUES)
    tl.atomic_add(places, totals, mask=totals > 0)


@triton.jit
def result_kernel(sample, counters, histograms, median, ties, margin, room, SAMPLES: tl.constexpr):
    """Writes the median, and how many scores are equal to it."""
    low, high = bracket_of(sample, counters, margin, SAMPLES)
    broken, is_low, is_high, _, rank = plan(counters, room)
    number, _, many = digits_found(histograms, rank, DIGITS)
    result = score_of(number)
    many = tl.where(is_high, tl.load(counters + UP_TO_HIGH) - tl.load(counters + BELOW_HIGH), many)
    result = tl.where(is_high, high, result)
    many = tl.where(is_low, tl.load(counters + UP_TO_LOW) - tl.load(counters + BELOW_LOW), many)
    result = tl.where(is_low, low, result)
    result = tl.where(broken, float("nan"), result)
    result = tl.where(tl.load(counters + COUNTED) == 0, 0.0, result)
    tl.store(median, result)
    tl.store(ties, many.to(tl.float32))


def find(
    tensors: tuple[Tensor, Tensor, Tensor],
    strides: tuple[int, ...],
    sizes: tuple[int, int, int, int, int],
    scale: float,
    lowest: float,
    flags: dict[str, Any],
    tile: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """Finds the median.

    Args:
        tensors: Query, key and mask.
        strides: Theirs, as the kernels take them.
        sizes: Batch items, heads, heads that share a key, queries, keys.
        scale: Factor of the scores.
        lowest: At and below which an additive mask excludes a key.
        flags: What the scores are made of, and how wide the features are.
        tile: The tile's size, and how it is compiled.

    Returns:
        The median in the measure of the kernels, and how many scores are equal to it; both of no dimension, float32.
    """
    launch = triton_kernels.launch
    query = tensors[0]
    batches, heads, _, length, count = sizes
    total = batches * heads * length * count
    samples, room = _extent(total)
    device = query.device
    counters = torch.zeros(COUNTERS + DIGITS.value * VALUES.value, dtype=torch.int64, device=device)
    histograms = counters[COUNTERS:]
    median, ties = (torch.empty((), dtype=torch.float32, device=device) for _ in range(2))
    collected = torch.empty(room, dtype=torch.float32, device=device)
    sample = counters
    numbers = (*strides, *sizes, scale, lowest)
    if samples:
        drawn = torch.empty(samples, dtype=torch.float32, device=device)
        launch(sample_kernel, samples // 128, *tensors, drawn, counters, *numbers, **flags, BLOCK=128)
        sample = drawn.sort().values  # NaN comes last
    programs = min(PROGRAMS, batches * heads * triton.cdiv(length, tile["ROWS"]))
    if total:
        launch(
            count_kernel, programs, *tensors, sample, counters, collected, *numbers, MARGIN, room, **flags, **tile,
            SAMPLES=samples,
        )  # fmt: skip
        for digit in range(DIGITS.value):
            launch(
                digit_kernel, programs, *tensors, counters, collected, histograms, *numbers, room, **flags, **tile,
                DIGIT=digit,
            )  # fmt: skip
    launch(result_kernel, 1, sample, counters, histograms, median, ties, MARGIN, room, SAMPLES=samples)
    return median, ties


def _extent(total: int) -> tuple[int, int]:
    """Returns how many of so many scores to sample, none if all can be collected, and how many to have room for."""
    if total <= COLLECT_ALL:
        return 0, max(1, total)
    wanted = int(total**0.65)
    samples = max(LEAST_SAMPLED, min(MOST_SAMPLED, 1 << wanted.bit_length()))
    expected = int(2 * MARGIN * total / samples**0.5)  # fewer where keys are excluded
    return samples, min(total, MOST_COLLECTED, max(COLLECT_ALL, 2 * expected))
