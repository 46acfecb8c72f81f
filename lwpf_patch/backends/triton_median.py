"""The exact median of all scores on the GPU, without all scores and without asking the GPU anything.

A sample of the scores, sorted, gives a bracket in which the median lies, all but surely. One pass over the tiles counts
what lies below it and within, and collects what lies within. Among those a radix select finds the median, eight bits of
its number at a time. If the bracket missed it, or more was collected than there is room for, the same select goes over
all tiles again: slower, and as exact. Which of these it is, each program reads from the counters, so that no number
travels to the CPU and a CUDA graph can hold it all.

The rank is that of ``torch.median``: the lower of two middle values. -0 is 0, and one NaN that counts makes the median
NaN. Without any score it is 0.

Importing this module imports Triton.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_kernels
from .triton_kernels import INTERPRETED, REST, head_of, not_, rows_of, score_products, scores_of

#: The size of the sample is this power of the number of scores, rounded to a power of 2.
SAMPLED_POWER = 0.58
#: With no more scores than this, all are collected and none is sampled.
COLLECT_ALL = 1 << 20
#: Room for this many collected scores at most.
MOST_COLLECTED = 1 << 25
#: Scores that are sampled: at least, and at most. Powers of 2.
LEAST_SAMPLED, MOST_SAMPLED = 1 << 12, 1 << 18
#: As many programs go over the tiles; each takes every so manieth.
PROGRAMS = 1 << 11
#: Half the width of the bracket, in square roots of the sample's size: 3.5 standard deviations of the median's rank, so
#: that one bracket in 2,000 misses it.
MARGIN = 1.75

#: The counters: scores that count, rows with a NaN among them, scores up to the bracket's lower end, whether it holds a
#: single value, and samples that count.
COUNTED, NANS, UP_TO_LOW, FLAT, SAMPLED = (tl.constexpr(i) for i in range(5))
COUNTERS = 8
#: What is collected lies in so many parts, each with a counter of its own (int32, this far apart): one for all would
#: have every program wait for the others. It counts what lies within the bracket, also what finds no room.
PARTS, APART = tl.constexpr(128), tl.constexpr(32)
#: Digits of a score's number: how many, and how many values of one.
DIGITS, VALUES = tl.constexpr(4), tl.constexpr(256)
CHUNK = tl.constexpr(4096)


@triton.jit
def number_of(scores):
    """Turn each float32 score into a whole number, of the same order."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def score_of(number):
    """Return the score of a number."""
    bits = number.to(tl.int32, bitcast=True)
    return (bits ^ ((~bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def bracket_of(sample, counters, margin, SAMPLES: tl.constexpr):
    """Read the bracket from the sorted sample.

    Returns:
        Its ends, strictly between which the median should lie; a value within; and whether that is the only one.
    """
    low, high = tl.full([], float("-inf"), tl.float32), tl.full([], float("inf"), tl.float32)
    least, flat = tl.full([], 0.0, tl.float32), tl.full([], False, tl.int1)
    if SAMPLES > 0:
        sampled = tl.load(counters + SAMPLED).to(tl.int32)
        middle = (sampled - 1) // 2
        steps = (margin * tl.sqrt(sampled.to(tl.float32))).to(tl.int32) + 1
        inside = steps <= middle
        least = tl.load(sample + tl.where(inside, middle - steps, 0))
        most = tl.load(sample + tl.where(inside, middle + steps, 0))
        below = number_of(least) - tl.where(least == 0, 2, 1).to(tl.uint32)  # next to 0 is -0, which is the same
        low = tl.where(inside, score_of(below), low)
        high = tl.where(inside, score_of(number_of(most) + 1), high)
        flat = inside & (least == most)
    return low, high, least, flat


@triton.jit
def plan(counters, filled, room):
    """Read from the counters where the median is.

    Returns:
        Whether it is NaN, is the bracket's only value, or is among the scores collected (elsewhere it is found from all
        scores); and its rank there.
    """
    rank = tl.maximum(tl.load(counters + COUNTED) - 1, 0) // 2
    broken = tl.load(counters + NANS) > 0
    up_to_low = tl.load(counters + UP_TO_LOW)
    many = tl.load(filled + tl.arange(0, PARTS) * APART)
    within = (up_to_low <= rank) & (rank < up_to_low + tl.sum(many.to(tl.int64), 0))
    only = within & (tl.load(counters + FLAT) > 0)
    inside = within & not_(only) & (tl.max(many, 0) <= room)
    return broken, only, inside, tl.where(inside, rank - up_to_low, rank)


@triton.jit
def digits_found(histograms, rank, DIGIT: tl.constexpr):
    """Follow the rank through the histograms of the digits before DIGIT.

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
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw BLOCK scores, each anywhere; NaN stands for one that does not count."""
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
        lowest, UNSCALED, MASKED, False, CAUSAL,
    )  # fmt: skip
    valid = valid & (scores == scores)
    tl.store(sample + numbers, tl.where(valid, scores, float("nan")))
    tl.atomic_add(counters + SAMPLED, tl.sum(valid.to(tl.int32), 0).to(tl.int64))


@functools.lru_cache
def collecting(number: int) -> tuple[str, str]:
    """Write, in the words of the GPU, how a thread collects those of its scores that lie between two numbers.

    In Triton's words each score would first travel to another thread, and an address be made for each, for the few that
    there are to collect.

    Args:
        number: How many scores a thread has.

    Returns:
        The instructions; and their operands: a result that means nothing, the score, the two numbers, the place of the
        counter and that of the memory, and how many fit there; each so many times.
    """
    every = range(number)
    score, above, below, filled, part, room = ([f"${number * (1 + which) + i}" for i in every] for which in range(6))
    lines = [
        f".reg .pred in<{number}>, some;",
        ".reg .u32 many, place;",
        ".reg .u64 address;",
        "mov.u32 many, 0;",
        *(f"setp.gt.f32 in{i}, {score[i]}, {above[0]};" for i in every),
        *(f"setp.lt.and.f32 in{i}, {score[i]}, {below[0]}, in{i};" for i in every),
        *(f"@in{i} add.u32 many, many, 1;" for i in every),
        "setp.ne.u32 some, many, 0;",
        "@!some bra DONE;",
        f"atom.relaxed.gpu.global.add.u32 place, [{filled[0]}], many;",
        "add.u32 many, place, many;",
        f"setp.le.u32 some, many, {room[0]};",
        "@!some bra DONE;",
        f"mad.wide.u32 address, place, 4, {part[0]};",
        *(f"@in{i} st.global.f32 [address], {score[i]}; @in{i} add.u64 address, address, 4;" for i in every),
    ]
    operands = ["=r", "f", "f", "f", "l", "l", "r"]
    return "{" + " ".join(lines) + " DONE: }", ",".join(kind for kind in operands for _ in every)


@triton.jit
def greatest(one, other):
    """Return the greater of two numbers, or NaN."""
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def count_tiles(
    up_to_low, counted, worst, queries, key_head, mask_head, stride_key_row, stride_mask_row,
    stride_mask_key, start_row, first, last, length, count, scale, lowest, low, high, filled, part, room,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, BOUNDS: tl.constexpr, CAUSAL: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, COLLECT: tl.constexpr,
    OPERANDS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Go over the keys from ``first`` to ``last`` for one tile of queries; see :func:`count_kernel`."""
    rows, keys = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
    there = start_row + rows < length
    for start in range(first, last, KEYS):
        key_rows = rows_of(key_head, stride_key_row, start, count, BOUNDS, KEYS, FEATURES, BLOCK_FEATURES)
        scores, valid = scores_of(
            score_products(queries, tl.trans(key_rows)), start_row, start, rows, keys, length, count, mask_head,
            stride_mask_row, stride_mask_key, scale, lowest, UNSCALED, MASKED, BOUNDS, CAUSAL,
        )  # fmt: skip
        valid = valid & there
        scores = tl.where(valid, scores, float("inf"))  # which is in no bracket, and is no NaN
        worst = greatest(worst, tl.reduce(scores, 1, greatest))
        if MASKED:
            counted += tl.sum(valid.to(tl.int32), 1)
        above = scores > low
        up_to_low += tl.sum(not_(above).to(tl.int32), 1)
        if INTERPRETED:
            within = above & (scores < high)
            places = tl.atomic_add(filled + tl.zeros([ROWS, KEYS], tl.int32), 1, mask=within)
            tl.store(part + places, scores, mask=within & (places < room))
        else:
            tl.inline_asm_elementwise(
                COLLECT, OPERANDS, [scores, low, high, tl.cast(filled, tl.int64), tl.cast(part, tl.int64), room],
                dtype=tl.int32, is_pure=False, pack=TOGETHER,
            )  # fmt: skip
    return up_to_low, counted, worst


@triton.jit
def count_kernel(
    query, key, mask, sample, counters, filled, collected,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_key,
    batches, heads, group, length, count, scale, lowest, margin, room, known,
    UNSCALED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, SAMPLES: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, COLLECT: tl.constexpr,
    OPERANDS: tl.constexpr, TOGETHER: tl.constexpr, COLLECT_REST: tl.constexpr, OPERANDS_REST: tl.constexpr,
    TOGETHER_REST: tl.constexpr,
):  # fmt: skip
    """Count all scores, and collect those strictly within the bracket.

    ``known`` is how many scores count, where no mask decides.
    """
    low, high, _, flat = bracket_of(sample, counters, margin, SAMPLES)
    tiles = tl.cdiv(length, ROWS)
    number = tl.program_id(0) % PARTS
    own, part = filled + number * APART, collected + tl.cast(number, tl.int64) * room
    up_to_low, counted = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    worst = tl.full([ROWS], float("-inf"), tl.float32)
    for unit in range(tl.program_id(0), batches * heads * tiles, tl.num_programs(0)):
        head, start_row = unit // tiles, unit % tiles * ROWS
        batch, query_head = head // heads, head % heads
        queries = rows_of(
            head_of(query, batch, query_head, stride_query_batch, stride_query_head), stride_query_row, start_row,
            length, True, ROWS, FEATURES, BLOCK_FEATURES,
        )  # fmt: skip
        key_head = head_of(key, batch, query_head // group, stride_key_batch, stride_key_head)
        mask_head = head_of(mask, batch, query_head, stride_mask_batch, stride_mask_head)
        STEP: tl.constexpr = KEYS if CAUSAL else REST
        end = count
        whole = count // KEYS * KEYS
        if CAUSAL:
            end = tl.minimum(count, start_row + ROWS)
            whole = tl.minimum(start_row, count) // KEYS * KEYS
        up_to_low, counted, worst = count_tiles(
            up_to_low, counted, worst, queries, key_head, mask_head, stride_key_row, stride_mask_row,
            stride_mask_key, start_row, 0, whole, length, count, scale, lowest, low, high, own, part, room,
            UNSCALED, MASKED, False, False, FEATURES, BLOCK_FEATURES, ROWS, KEYS, COLLECT, OPERANDS, TOGETHER,
        )  # fmt: skip
        up_to_low, counted, worst = count_tiles(
            up_to_low, counted, worst, queries, key_head, mask_head, stride_key_row, stride_mask_row,
            stride_mask_key, start_row, whole, end, length, count, scale, lowest, low, high, own, part, room,
            UNSCALED, MASKED, True, CAUSAL, FEATURES, BLOCK_FEATURES, ROWS, STEP, COLLECT if CAUSAL else COLLECT_REST,
            OPERANDS if CAUSAL else OPERANDS_REST, TOGETHER if CAUSAL else TOGETHER_REST,
        )  # fmt: skip
    tl.atomic_add(counters + UP_TO_LOW, tl.sum(up_to_low.to(tl.int64), 0))
    tl.atomic_add(counters + NANS, tl.sum((worst != worst).to(tl.int64), 0))
    if MASKED:
        tl.atomic_add(counters + COUNTED, tl.sum(counted.to(tl.int64), 0))
    if tl.program_id(0) == 0:
        if not MASKED:
            tl.store(counters + COUNTED, known)
        tl.store(counters + FLAT, flat.to(tl.int64))


@triton.jit
def histogram_of(scores, valid, prefix, DIGIT: tl.constexpr, SIZE: tl.constexpr):
    """Count the values of a digit among the scores whose digits before it are the prefix."""
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
    query, key, mask, counters, filled, collected, histograms,
    stride_query_batch, stride_query_head, stride_query_row,
    stride_key_batch, stride_key_head, stride_key_row,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_key,
    batches, heads, group, length, count, scale, lowest, room,
    DIGIT: tl.constexpr, UNSCALED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Make the histogram of one digit, over the scores collected or over all."""
    broken, only, inside, rank = plan(counters, filled, room)
    prefix, rank, _ = digits_found(histograms, rank, DIGIT)
    totals = tl.zeros([VALUES], tl.int64)
    found = broken | only
    if inside & not_(found):
        # A part for several programs, or several for one.
        sharing = tl.maximum(tl.num_programs(0) // PARTS, 1)
        for number in range(tl.program_id(0) // sharing, PARTS, tl.cdiv(tl.num_programs(0), sharing)):
            many = tl.load(filled + number * APART)
            part = collected + tl.cast(number, tl.int64) * room
            for start in range(tl.program_id(0) % sharing * CHUNK, many, sharing * CHUNK):
                places = start + tl.arange(0, CHUNK)
                scores = tl.load(part + places, mask=places < many, other=0.0)
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
                    stride_mask_row, stride_mask_key, scale, lowest, UNSCALED, MASKED, True, CAUSAL,
                )  # fmt: skip
                valid = valid & (start_row + rows < length)
                totals += histogram_of(scores, valid, prefix, DIGIT, ROWS * KEYS)
    places = histograms + DIGIT * VALUES + tl.arange(0, VALUES)
    tl.atomic_add(places, totals, mask=totals > 0)


@triton.jit
def result_kernel(sample, counters, filled, histograms, median, ties, margin, room, SAMPLES: tl.constexpr):
    """Write the median, and how many scores are equal to it."""
    _, _, value, _ = bracket_of(sample, counters, margin, SAMPLES)
    broken, only, _, rank = plan(counters, filled, room)
    number, _, many = digits_found(histograms, rank, DIGITS)
    within = tl.sum(tl.load(filled + tl.arange(0, PARTS) * APART).to(tl.int64), 0)
    many = tl.where(only, within, many)
    result = tl.where(only, value, score_of(number))
    result = tl.where(result == 0, 0.0, result)  # -0 is 0
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
    """Find the median.

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
    rows = tile["ROWS"]
    total = batches * heads * length * count
    diagonal = min(length, count)  # with causality, query i sees min(i + 1, S) keys
    seen = diagonal * (diagonal + 1) // 2 + (length - diagonal) * count if flags["CAUSAL"] else length * count
    samples, programs, room = extent(batches * heads, length, count, rows)
    device = query.device
    counters = torch.zeros(COUNTERS + DIGITS.value * VALUES.value, dtype=torch.int64, device=device)
    histograms = counters[COUNTERS:]
    filled = torch.zeros(PARTS.value * APART.value, dtype=torch.int32, device=device)
    median, ties = (torch.empty((), dtype=torch.float32, device=device) for _ in range(2))
    collected = torch.empty(min(programs, PARTS.value) * room, dtype=torch.float32, device=device)
    sample = counters
    numbers = (*strides, *sizes, scale, lowest)
    if samples:
        drawn = torch.empty(samples, dtype=torch.float32, device=device)
        launch(sample_kernel, samples // 128, *tensors, drawn, counters, *numbers, **flags, BLOCK=128)
        sample = drawn.sort().values  # NaN comes last
    if total:
        # The scores of a thread, in tiles of full width and in those of the rest.
        together, together_rest = (
            rows * keys // (32 * tile["num_warps"]) for keys in (tile["KEYS"], triton_kernels.REST.value)
        )
        (collect, operands), (collect_rest, operands_rest) = collecting(together), collecting(together_rest)
        launch(
            count_kernel, programs, *tensors, sample, counters, filled, collected, *numbers, MARGIN, room,
            batches * heads * seen, **flags, **tile, SAMPLES=samples, COLLECT=collect, OPERANDS=operands,
            TOGETHER=together, COLLECT_REST=collect_rest, OPERANDS_REST=operands_rest, TOGETHER_REST=together_rest,
        )  # fmt: skip
        for digit in range(DIGITS.value):
            launch(
                digit_kernel, programs, *tensors, counters, filled, collected, histograms, *numbers, room, **flags,
                **tile, DIGIT=digit,
            )  # fmt: skip
    launch(result_kernel, 1, sample, counters, filled, histograms, median, ties, MARGIN, room, SAMPLES=samples)
    return median, ties


def extent(heads: int, length: int, count: int, rows: int) -> tuple[int, int, int]:
    """Settle how much is done and kept.

    Args:
        heads: Heads of all batch items.
        length: Queries.
        count: Keys.
        rows: Queries in a tile, of which each program takes every so manieth.

    Returns:
        How many scores to sample, none if all can be collected; how many programs go over the tiles; and how many
        scores to have room for in each part of those collected, of which there are no more than programs.
    """
    total = heads * length * count
    tiles = heads * triton.cdiv(length, rows)
    programs = min(PROGRAMS, tiles)
    # What falls to one part at most: a tile has no more queries than there are.
    most = triton.cdiv(tiles, min(programs, PARTS.value) or 1) * min(rows, length) * count
    if total <= COLLECT_ALL:
        return 0, programs, max(1, most)
    wanted = int(total**SAMPLED_POWER)
    samples = max(LEAST_SAMPLED, min(MOST_SAMPLED, 1 << wanted.bit_length()))
    expected = int(2 * MARGIN * total / samples**0.5)  # fewer where keys are excluded
    return samples, programs, min(most, MOST_COLLECTED // PARTS.value, 4096 + 2 * expected // PARTS.value)
