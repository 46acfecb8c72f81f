"""Triton: one kernel forward and a few backward on the GPU, with the scores in its registers, in linear memory.

For the threshold form of func_d (ReLU, PFU); the formulas are those of :mod:`.cpu`. The kernels are in
:mod:`.triton_kernels` and :mod:`.triton_median`, which import Triton and are themselves imported by the first call.

With the variable TRITON_INTERPRET=1, set before anything imports Triton, they run on the CPU, slowly: for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import compiling, transforms
from . import eager_form, verifying
from .arguments import batch_shape, flat_mask, representable_factor, widen_mask
from .base import Call, FusedBackend, Threshold
from .eager_form import lowest, repeat_heads
from .operators import DirectOperator
from .verifying import Case, Part

#: Features per head that the tiles hold at most.
WIDEST = 256
LOG2_E = 1 / math.log(2)
#: The kernels' tests pass with this one and later ones. The interpreters of earlier ones cannot run them.
OLDEST_TRITON = (3, 5)


def why_no_triton() -> str | None:
    """Return why the kernels are not used here, whatever the device; None: they can be."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = _triton_version()
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton is of version {version}, and the kernels are tested from {oldest} on (PyTorch 2.9)"
    return None


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build of another name
        return importlib.import_module("triton").__version__


@functools.lru_cache
def _why_not_on_device(kind: str, index: int | None) -> str | None:
    """Return why the backend cannot compute on a device, None if it can."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if kind != "cuda" and not (kind == "cpu" and interpreted):
        return f"the tensors are on {kind}"
    if (reason := why_no_triton()) is not None:
        return reason
    if interpreted:
        return None
    if torch.version.hip is not None:
        return "it is made for NVIDIA's devices"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the device is of capability {major}.{minor}, and 8.0 is needed"
    return None


# While torch.compile traces, what a device can do is a constant. It does not look into a cached function by itself.
why_not_on: Callable[[str, int | None], str | None] = compiling.constant(
    lambda kind, index: _why_not_on_device(kind, index)
)


class Triton(FusedBackend):
    """Computes on NVIDIA's GPUs with kernels of its own."""

    name = "triton"
    device = "cuda"

    def why_not_here(self, call: Call) -> str | None:
        """Return why it cannot compute with such tensors, or not on this machine; None: it can."""
        query = call.query
        if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"it does not compute in {query.dtype}"
        width = max(query.shape[-1], call.value.shape[-1])
        if width > WIDEST:
            return f"it holds up to {WIDEST} features per head, not {width}"
        return why_not_on(query.device.type, query.device.index)

    def why_not_trusted(self, call: Call, threshold: Threshold) -> str | None:
        """Return why the kernels are not to be trusted with a call; None: they are."""
        if call.verify == "off" or transforms.are_active():  # then the eager form computes
            return None
        if not call.query.numel() or not call.key.numel() or not call.value.numel():  # there is nothing to be wrong
            return None
        case = verifying.case_of(call, threshold, standing_for(call.query.shape[-2]), standing_for(call.key.shape[-2]))
        if torch.compiler.is_compiling():  # what is traced has no figures
            return _problem_when_traced(*case)

        def part() -> Part:
            return verifying.part_of(*_prepared(call)[:4])

        return verifying.problem_of(case, part, call.verify == "always", self.name, _compute_part, _dropout)

    def compute_threshold(self, call: Call, mu: float | None, bias: float | None, eps: Tensor | None) -> Tensor:
        """Compute a call; see :meth:`FusedBackend.compute_threshold`."""
        query, key, value, mask, is_causal, factor, lead = _prepared(call)
        # Drawn where it is used, so that a CUDA graph draws anew at every replay.
        seed = torch.randint(2**62, (), device=query.device) if call.dropout_p > 0 else None
        out = operator(query, key, value, mask, call.dropout_p, is_causal, factor, mu, bias, call.sep.n, eps, seed)
        return out.reshape(*lead, *out.shape[-2:])


class Arguments(NamedTuple):
    """Arguments of the operator as kernels take them.

    Attributes:
        query: (B, H, L, E).
        key: (B, H or fewer, S, E).
        value: (B, H or fewer, S, Ev).
        mask: (B or 1, H or 1, L or 1, S or 1), boolean or additive, or None.
        is_causal: Whether query i sees the keys 0 to i only.
        factor: Of the scores.
        lead: The batch dimensions of the output.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    factor: float
    lead: torch.Size


def _prepared(call: Call) -> Arguments:
    return prepare(call.query, call.key, call.value, call.attn_mask, call.is_causal, call.scale, call.enable_gqa)


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Arguments:
    """Bring arguments to the form that kernels take.

    Args:
        query: (..., L, E).
        key: (..., S, E).
        value: (..., S, Ev).
        attn_mask: Broadcastable to (..., L, S), boolean or additive.
        is_causal: Whether query i sees the keys 0 to i only.
        scale: Factor of the scores, None for ``E ** -0.5``.
        enable_gqa: Whether neighbouring heads of the query share a head of the key and value.

    Raises:
        RuntimeError: Shapes that do not go together.
    """
    factor = representable_factor(query, scale, torch.float32)
    if query.shape[-1] == 0:  # a feature of zeros makes the same scores
        query, key = F.pad(query, (0, 1)), F.pad(key, (0, 1))
    if enable_gqa and not (key.shape[-3] == value.shape[-3] > 0 and query.shape[-3] > 0):
        key, value, enable_gqa = repeat_heads(query, key), repeat_heads(query, value), False
    of_query, of_key, of_value = query.shape[:-2], key.shape[:-2], value.shape[:-2]
    shared = enable_gqa and of_key[-1] != of_query[-1]
    if shared:
        of_key = of_value = torch.Size((*of_key[:-1], of_query[-1]))
    lead = batch_shape(of_query, of_key, of_value)
    heads = lead[-1] if lead else 1
    query = _flat(query, lead, heads)
    key = _flat(key, lead, key.shape[-3] if shared else heads)
    value = _flat(value, lead, value.shape[-3] if shared else heads)
    mask = None
    if attn_mask is not None:
        mask = flat_mask(attn_mask, lead)
        if mask.dtype == torch.float64:
            mask = widen_mask(mask, torch.float32)
    return Arguments(query, key, value, mask, is_causal, factor, lead)


def _compute_part(case: Case, part: Part, noise: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute a part of a case by the kernels; see :data:`verifying.Compute`."""
    out, _, _, centre, _ = torch.ops.lwpf_patch.triton_attention(
        *part, case.dropout_p, case.is_causal, case.scale, case.mu, case.bias, case.n, noise, seed
    )
    kernels = _Call(*part, noise, seed, case.dropout_p, case.is_causal, case.scale, case.mu, case.bias)
    return out, centre * case.scale if kernels.unscaled else centre


# The kernels run while torch.compile traces, by figures that are drawn, so that nothing of it is in the graph.
@compiling.constant
def _problem_when_traced(*fields: Any) -> str | None:
    case = Case(*fields)
    part = functools.partial(verifying.drawn_part, case, case.length, case.keys)
    return verifying.problem_of(case, part, False, Triton.name, _compute_part, _dropout)


def check_device(device: str) -> Iterator[tuple[str, str | None]]:
    """Check the kernels on a device by typical cases; yield each in words, and what is wrong with it (None: nothing).

    Args:
        device: Such as ``"cuda:0"``.
    """
    for case, keys in verifying.typical_cases(device):
        part = functools.partial(verifying.drawn_part, case, keys, keys)
        yield f"{case}, {keys} keys", verifying.problem_of(case, part, True, Triton.name, _compute_part, _dropout)


def _flat(tensor: Tensor, lead: torch.Size, heads: int) -> Tensor:
    """Bring to (B, heads, rows, features): a view, unless there are more batch dimensions, broadcast unevenly."""
    batch = lead[:-1]
    return tensor.expand(*batch, *((heads,) if lead else ()), *tensor.shape[-2:]).reshape(
        batch.numel(), heads, *tensor.shape[-2:]
    )


class _Call(NamedTuple):
    """What the kernels are told, alike in both passes.

    Attributes:
        query: (B, H, L, E), its features next to each other; so are those of the others.
        key: (B, H or fewer, S, E).
        value: (B, H or fewer, S, Ev).
        mask: (B or 1, H or 1, L or 1, S or 1), boolean or additive, or None.
        noise: Added to the threshold, or None.
        seed: Of dropout, or None.
        dropout_p: Probability that a weight is dropped.
        is_causal: Whether query i sees the keys 0 to i only.
        scale: Factor of the scores.
        mu: The threshold without noise; None: the median.
        bias: What a forgotten score becomes; None: the threshold.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    noise: Tensor | None
    seed: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float
    mu: float | None
    bias: float | None

    @property
    def same(self) -> bool:
        """Whether a forgotten score becomes the threshold."""
        return self.bias is None or (self.noise is None and self.bias == self.mu)

    @property
    def ties(self) -> bool:
        """Whether the threshold passes its gradient on, to the scores that are equal to the median."""
        return self.mu is None and self.bias is None

    @property
    def unscaled(self) -> bool:
        """Whether the kernels take the bare products of queries and keys for the scores; the unit has the factor.

        Not with a constant threshold, where that could tell scores that are equal to it from it; but 0 and -inf stay
        what they are.
        """
        plain = self.mu is None or (self.mu in (0, -math.inf) and self.noise is None)
        return plain and self.scale > 1e-30 and (self.mask is None or self.mask.dtype == torch.bool)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return query, key, value and mask; the query in place of a mask that there is not."""
        mask = self.query if self.mask is None else self.mask
        return self.query, self.key, self.value, mask.view(torch.uint8) if mask.dtype == torch.bool else mask

    def mask_strides(self) -> tuple[int, ...]:
        """Return the strides of the mask, 0 where it is broadcast."""
        if self.mask is None:
            return 0, 0, 0, 0
        return tuple(
            0 if size == 1 else stride for size, stride in zip(self.mask.shape, self.mask.stride(), strict=True)
        )

    def sizes(self) -> tuple[int, int, int, int, int]:
        """Return batch items, heads, heads that share a key, queries, keys."""
        batches, heads, length, _ = self.query.shape
        return batches, heads, heads // max(1, self.key.shape[1]), length, self.key.shape[2]

    def lowest(self) -> float:
        """Return the value at and below which the mask excludes a key."""
        return 0.0 if self.mask is None else lowest(self.mask.dtype)

    def threshold(self) -> tuple[float, float]:
        """Return the constant threshold, and what to multiply the noise by, in the measure of the kernels."""
        return 0.0 if self.mu is None else self.mu, 1 / self.scale if self.unscaled else 1.0

    def unit(self) -> float:
        """Return what to multiply a kernel's score by, for an exponent to the base of 2."""
        return self.scale * LOG2_E if self.unscaled else LOG2_E

    def dropout(self) -> tuple[float, float]:
        """Return the probability that a weight is dropped, and what to multiply the others by."""
        return self.dropout_p, 1 / (1 - self.dropout_p) if self.dropout_p < 1 else 0.0

    def of_scores(self) -> dict[str, Any]:
        """Return the constants of compilation by which scores are made."""
        features = self.query.shape[3]
        masked = 0 if self.mask is None else 1 if self.mask.dtype == torch.bool else 2
        return {"UNSCALED": self.unscaled, "MASKED": masked, "FEATURES": features, "BLOCK_FEATURES": _block(features)}

    def flags(self) -> dict[str, Any]:
        """Return the other constants of compilation."""
        values = self.value.shape[3]
        return {
            **self.of_scores(),
            "MEDIAN": self.mu is None,
            "NOISY": self.noise is not None,
            "DROPOUT": self.dropout_p > 0,
            "VALUES": values,
            "BLOCK_VALUES": _block(values),
        }

    @property
    def in_one_pass(self) -> bool:
        """Whether one kernel makes the gradients of queries, keys and values, reading each tensor once.

        Otherwise two do. What it depends on is in a :class:`verifying.Case`, and the same for the part that is checked.
        """
        _, heads, length, features = self.query.shape
        return (
            max(length, self.key.shape[2]) <= LARGEST_HEAD
            and self.key.shape[1] == heads
            and capability(self.query.device) in ROOMY
            # Others would spill registers.
            and features == self.value.shape[3] and features in WIDTHS_OF_HEAD
            and self.query.dtype != torch.float32
            and (length <= _LARGE or self.mask is None or self.dropout_p == 0)
        )  # fmt: skip

    def tile(self, kernel: str) -> dict[str, int]:
        """Return the size of a kernel's tiles, and how it is compiled."""
        width = max(_block(self.query.shape[3]), _block(self.value.shape[3]))
        # The kernel for whole heads has few registers left: the numbers of dropout take as many as a mask.
        crowded = self.mask is not None or (kernel == "head" and self.dropout_p > 0)
        return tile_of(
            kernel, self.query.dtype, width, capability(self.query.device), crowded, self.query.shape[2],
            self.key.shape[2],
        )  # fmt: skip


def _block(width: int) -> int:
    """Return the width of a tile that holds so many features."""
    return max(16, 1 << (width - 1).bit_length())


#: Rows of queries and of keys in a tile, warps and stages, for each kernel and width.
_Tiles = dict[str, dict[int, tuple[int, int, int, int]]]

#: The most queries and keys of which one program makes all gradients of a head, and how many features they may have.
LARGEST_HEAD, WIDTHS_OF_HEAD = 256, (16, 32, 64)
#: The capabilities of devices with the shared memory for that, 163 and 227 KB, for which it is known to spill nothing.
ROOMY = ((8, 0), (9, 0))

# Those of the kernel for whole heads are by their rows, not by the width.
#
# Of those that spill no register on Hopper, in half precision, up to width 128 and without dropout, the ones with few
# instructions a score. With dropout the kernel for keys spills up to 56 bytes a thread, on Hopper and Ampere, and on
# Ampere that for queries 16, at width 128 with the median. All take no more shared memory than the smallest Ampere has.
_TILES: _Tiles = {
    "forward": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "query": {64: (128, 64, 8, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 1)},
    "key": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (16, 64, 8, 1)},
    "head": {64: (64, 32, 4, 1), 128: (128, 32, 8, 1), 256: (256, 32, 8, 1)},
    "mask": {64: (64, 64, 8, 1), 128: (64, 32, 8, 1), 256: (64, 32, 8, 1)},
    "median": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 4, 2)},
}
# Where others are wanted: with a mask, whose entries and their places take registers; before Hopper; and for both
# reasons. In bfloat16 and up to width 128 none is spilled then, with dropout or without, but a few by the search for
# the median.
_TILES_MASKED: _Tiles = {
    "forward": {64: (64, 64, 8, 2), 128: (64, 32, 8, 2)},
    "query": {64: (64, 64, 8, 2), 128: (64, 16, 8, 2)},
    "key": {64: (32, 128, 8, 2), 128: (16, 64, 8, 2)},
    "head": {64: (64, 16, 4, 1), 128: (128, 16, 8, 1), 256: (256, 16, 8, 1)},
    "median": {128: (64, 32, 4, 2)},
}
# For long sequences: fewer instructions a score, but more keys are left over.
_TILES_LONG: _Tiles = {"forward": {64: (128, 128, 8, 2)}}
KEYS_OF_LONG = 1024
_TILES_BEFORE_HOPPER: _Tiles = {
    "forward": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2)},
    "query": {128: (64, 64, 8, 2)},
    "key": {128: (64, 64, 8, 2)},
    "head": {64: (64, 16, 4, 1), 128: (128, 16, 4, 1), 256: (256, 16, 8, 1)},
    "mask": {64: (64, 32, 8, 1)},
}
_TILES_MASKED_BEFORE_HOPPER: _Tiles = {
    "forward": {64: (64, 32, 8, 2)},
    "query": {64: (64, 32, 8, 2)},
    "key": {64: (16, 128, 8, 2)},
    "head": {128: (128, 16, 8, 1)},
}
# Products of float32 are made without the units for matrices, and take many registers: some spill a few.
_TILES_FLOAT32: _Tiles = {
    "forward": {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 4, 1)},
    "query": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 4, 1)},
    "key": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 4, 1)},
    "mask": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 4, 1)},
    "median": {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 32, 4, 1)},
}


#: Which rows each program of a kernel has for itself, those of queries or of keys; other kernels have neither.
OWN = {"forward": "ROWS", "query": "ROWS", "key": "KEYS"}
#: How many of them, in the tiles that are halved where few are left over.
_LARGE = 128


def halves(rows: int) -> bool:
    """Return whether half as large tiles of a program's own leave less than nine tenths of the scores to compute."""
    small = _LARGE // 2
    return 10 * small * -(-rows // small) < 9 * _LARGE * -(-rows // _LARGE)


def standing_for(rows: int) -> int:
    """Return a number of queries or keys with the kernels and tiles of another: one of seven, whatever the other is.

    Each leaves a part of a tile.

    A number that torch.compile leaves open becomes a plain one.
    """
    if rows >= KEYS_OF_LONG:
        return KEYS_OF_LONG + 1
    if rows > LARGEST_HEAD:
        return 257 if halves(rows) else 325
    return next(most - 15 for most in range(_LARGE // 2, LARGEST_HEAD + 1, _LARGE // 2) if rows <= most)


def entry_of(kernel: str, width: int, length: int) -> int:
    """Return under which number a kernel's tiles are in the tables.

    Args:
        kernel: Which kernel.
        width: The features that a tile holds, a power of 2.
        length: How many queries there are.
    """
    if kernel == "head":
        return max(64, _block(length))
    return max(64, width)


def tile_of(
    kernel: str, dtype: torch.dtype, width: int, device: tuple[int, int], masked: bool, length: int, keys: int
) -> dict[str, int]:
    """Return the size of a kernel's tiles, and how it is compiled.

    Args:
        kernel: Which kernel.
        dtype: What it computes in.
        width: The features that a tile holds, a power of 2.
        device: The device's capability.
        masked: Whether there is a mask, or what takes as many registers.
        length: How many queries there are.
        keys: How many keys.
    """
    entry, before_hopper = entry_of(kernel, width, length), device < (9, 0)
    tile = _TILES[kernel][entry]
    for table, wanted in (
        (_TILES_LONG, keys >= KEYS_OF_LONG),
        (_TILES_BEFORE_HOPPER, before_hopper),
        (_TILES_MASKED, masked),
        (_TILES_MASKED_BEFORE_HOPPER, masked and before_hopper),
        (_TILES_FLOAT32, dtype == torch.float32),
    ):
        if wanted:
            tile = table.get(kernel, {}).get(entry, tile)
    found = dict(zip(("ROWS", "KEYS", "num_warps", "num_stages"), tile, strict=True))
    own = OWN.get(kernel)
    # Not with a mask: the kernel for keys would spill, and there the others have small tiles as it is.
    if own is not None and not masked and found[own] == _LARGE and halves(length if own == "ROWS" else keys):
        found |= {own: _LARGE // 2, "num_warps": found["num_warps"] // 2}
    return found


def capability(device: torch.device) -> tuple[int, int]:
    """Return the capability of a device; for the interpreter, that of Hopper."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def _dense(tensor: Tensor) -> Tensor:
    """Return the tensor with its features next to each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    mu: float | None,
    bias: float | None,
    n: float,
    eps: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output; L and rho of each row; the median, and how many scores are equal to it."""
    from . import triton_kernels, triton_median

    call = _Call(_dense(query), _dense(key), _dense(value), mask, eps, seed, dropout_p, is_causal, scale, mu, bias)
    out, log_sum, rho, centre, ties = _results(query, value, mu, bias)
    tensors, sizes = call.tensors(), call.sizes()
    with _on(query.device):
        if mu is None:
            centre, ties = triton_median.find(
                (tensors[0], tensors[1], tensors[3]), (*_strides(*tensors[:2]), *call.mask_strides()), sizes, scale,
                call.lowest(), {**call.of_scores(), "CAUSAL": is_causal}, call.tile("median"),
            )  # fmt: skip
        tile = call.tile("forward")
        triton_kernels.launch(
            triton_kernels.forward_kernel, sizes[0] * sizes[1] * -(-sizes[3] // tile["ROWS"]),
            *tensors, centre, eps, seed, out, log_sum, rho,
            *_strides(*tensors[:3]), *call.mask_strides(), *_strides(out), *sizes[1:], scale, call.unit(),
            *call.threshold(), (bias or 0.0) * LOG2_E, math.log2(n) if n > 0 else 0.0, call.lowest(), *call.dropout(),
            **call.flags(), CAUSAL=is_causal, SAME=call.same, COUNT=mu is None or not call.same, ADDED=n > 0, **tile,
        )  # fmt: skip
    return out, log_sum, rho, centre, ties


def _results(
    query: Tensor, value: Tensor, mu: float | None, bias: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate what the forward pass returns; without elements what is not wanted."""
    batches, heads, length, _ = query.shape
    # Heads next to each other, as hosts will want them when they join them.
    out = query.new_empty(batches, length, heads, value.shape[3]).transpose(1, 2)
    log_sum = query.new_empty(batches, heads, length, dtype=torch.float32)
    rho = query.new_empty((batches, heads, length) if mu is None and bias is None else (0,), dtype=torch.float32)
    centre, ties = (query.new_empty(() if mu is None else (0,), dtype=torch.float32) for _ in range(2))
    return out, log_sum, rho, centre, ties


def _on(device: torch.device) -> Any:
    """Return a context in which the tensors' device is the current one, on which Triton starts its kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


_registered = torch.library.custom_op(
    "lwpf_patch::triton_attention", _forward, mutates_args=(), device_types=("cuda", "cpu")
)


@_registered.register_fake
def _(query, key, value, mask, dropout_p, is_causal, scale, mu, bias, n, eps, seed):  # type: ignore[no-untyped-def]
    return _results(query, value, mu, bias)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    eps: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    rho: Tensor,
    centre: Tensor,
    ties: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    mu: float | None,
    bias: float | None,
    mask_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and, if it is wanted, of the mask."""
    from . import triton_kernels

    call = _Call(_dense(query), _dense(key), _dense(value), mask, eps, seed, dropout_p, is_causal, scale, mu, bias)
    grads = grad_query, grad_key, grad_value, grad_mask = _gradients(query, key, value, mask, mask_needs_grad)
    grad, out = _dense(grad), _dense(out)
    tensors, sizes = call.tensors(), call.sizes()
    batches, heads, _, length, count = sizes
    flags = {**call.flags(), "TIES": call.ties}
    strides = (*_strides(*tensors[:3]), *call.mask_strides(), *_strides(grad))
    numbers = (scale, call.unit(), *call.threshold(), call.lowest(), *call.dropout())
    launch = triton_kernels.launch
    with _on(query.device):
        delta, in_one_pass = torch.empty_like(log_sum), call.in_one_pass
        # Delta is wanted before where the threshold has a gradient, and by the kernel for the mask.
        own_delta = in_one_pass and not call.ties and not grad_mask.numel()
        if not own_delta:
            launch(
                triton_kernels.delta_kernel, batches * heads * -(-length // 64), grad, out, delta, *_strides(grad, out),
                heads, length, VALUES=flags["VALUES"], BLOCK_VALUES=flags["BLOCK_VALUES"], ROWS=64,
            )  # fmt: skip
        # The forgotten scores become the threshold, and pass their gradient on to it; the comparison has none.
        shares = -(rho * delta).sum() / ties.clamp(min=1) if call.ties else rho
        inputs = (*tensors, centre, eps, seed, grad, log_sum, delta, shares)
        if in_one_pass:
            launch(
                triton_kernels.head_kernel, batches * heads, *inputs, out, grad_query, grad_key, grad_value, *strides,
                *_strides(out, grad_query, grad_key, grad_value), heads, length, count, *numbers, **flags,
                DELTA=own_delta, CAUSAL=is_causal, **call.tile("head"),
            )  # fmt: skip
        else:
            tile = call.tile("query")
            launch(
                triton_kernels.query_kernel, batches * heads * -(-length // tile["ROWS"]), *inputs, grad_query,
                *strides, *_strides(grad_query), *sizes[1:], *numbers, **flags, CAUSAL=is_causal, **tile,
            )  # fmt: skip
            tile = call.tile("key")
            launch(
                triton_kernels.key_kernel, batches * key.shape[1] * -(-count // tile["KEYS"]), *inputs, grad_key,
                grad_value, *strides, *_strides(grad_key, grad_value), *sizes[1:], *numbers, **flags, CAUSAL=is_causal,
                **tile,
            )  # fmt: skip
        if grad_mask.numel():
            tile = call.tile("mask")
            shape = grad_mask.shape
            programs = shape[0] * shape[1] * -(-shape[2] // tile["ROWS"]) * -(-shape[3] // tile["KEYS"])
            launch(
                triton_kernels.mask_kernel, programs, *inputs, grad_mask, *strides, *sizes, *shape, *numbers, **flags,
                **tile,
            )  # fmt: skip
    return grads


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, mask_needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the gradients; without elements that of a mask, where none is wanted."""
    grad_mask = mask.new_empty(mask.shape) if mask is not None and mask_needs_grad else query.new_empty(0)
    return _like(query), _like(key), _like(value), grad_mask


def _like(tensor: Tensor) -> Tensor:
    """Allocate a tensor with the strides of another, its features next to each other whatever those are."""
    result = torch.empty_like(tensor)
    return result if result.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


_registered_backward = torch.library.custom_op(
    "lwpf_patch::triton_attention_backward", _backward, mutates_args=(), device_types=("cuda", "cpu")
)


@_registered_backward.register_fake
def _(grad, query, key, value, mask, *rest):  # type: ignore[no-untyped-def]
    return _gradients(query, key, value, mask, rest[-1])


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, mask, dropout_p, is_causal, scale, mu, bias, n, eps, seed = inputs
    ctx.save_for_backward(query, key, value, mask, eps, seed, *output)
    ctx.options, ctx.n = (dropout_p, is_causal, scale, mu, bias), n
    ctx.mask_needs_grad = mask is not None and ctx.needs_input_grad[3]


def _gradients_of(ctx: Any, grad: Tensor, backward: Callable[..., Any]) -> tuple[Any, ...]:
    grads = backward(grad, *ctx.saved_tensors, *ctx.options, ctx.mask_needs_grad)
    return *grads[:3], grads[3] if ctx.mask_needs_grad else None, *[None] * 8


def _gradients_again(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients of all arguments, in a form that can be differentiated and transformed."""
    query, key, value, mask, eps, seed, *_ = ctx.saved_tensors
    dropout_p, is_causal, scale, mu, bias = ctx.options
    dropped = None if seed is None else _dropout(query, key, dropout_p, seed)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        heads, dtype = query.shape[1], query.dtype
        query, key, value = query.float(), key.float(), value.float()
        if key.shape[1] != heads:
            key, value = repeat_heads(query, key), repeat_heads(query, value)
        return eager_form.above_threshold(
            query, key, value, mask, is_causal, scale, mu, bias, ctx.n, eps, dropped
        ).to(dtype)  # fmt: skip

    *grads, grad_mask = transforms.gradients(attend, (query, key, value, mask), ctx.needs_input_grad[:4], grad)
    return *grads, grad_mask, *[None] * 8


@torch.no_grad()
def _dropout(query: Tensor, key: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Make the dropout mask of all scores, (B, H, L, S), by asking the kernel which weights it keeps.

    With all scores 0 and above the threshold, and unit vectors for values, its output is the weights.
    """
    batches, heads, length, _ = query.shape
    count = key.shape[2]
    same, alike = query.new_zeros(batches, heads, length, 16), key.new_zeros(batches, heads, count, 16)
    unit = torch.eye(count, dtype=query.dtype, device=query.device).expand(batches, heads, count, count)
    kept = [
        _registered(same, alike, part, None, dropout_p, False, 1.0, -1.0, 0.0, 0.0, None, seed)[0] > 0
        for part in torch.split(unit, WIDEST, -1)
    ]
    made = torch.cat(kept, -1) if kept else query.new_zeros(batches, heads, length, count)
    return made.float() / max(1 - dropout_p, 1e-30)


operator = DirectOperator(
    (_registered, _registered_backward), (_forward, _backward), _setup_context, _gradients_of, _gradients_again
)
