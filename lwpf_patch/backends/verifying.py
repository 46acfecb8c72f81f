"""The check of a fused backend against the eager form: at the first call of each case, by a small part of that call.

What a kernel depends on beside its inputs is a :class:`Case`. A case that was computed right once is trusted; one that
was not is computed by another backend from then on, or is an error.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reporting, tracing
from ..compiling import real, whole
from . import eager_form
from .arguments import representable_factor
from .base import Call, Threshold

#: At most so many queries of a part, and so many heads.
ROWS, HEADS = 512, 2
#: How far the output, and a gradient, may be from those of float64: the norm of the difference by that of the whole.
#: Some times what rounding makes of it: in the interpreter 2e-7, 3e-4 and 6e-3 (which cuts bfloat16 off, a GPU rounds).
BOUNDS = {torch.float32: (2e-5, 1e-4), torch.float16: (1e-3, 2e-3), torch.bfloat16: (9e-3, 1.2e-2)}
#: And so many times what the rounding of the scores' gradient makes of that of query and key, where terms cancel.
ROUNDING = 4
#: Scores nearer to the threshold than this, of the largest, may be on either side of it.
NEAR = 1e-5


class Case(NamedTuple):
    """What a kernel is compiled for, and which kernels there are.

    Attributes:
        device: Where it runs, such as ``"cuda:0"``.
        dtype: Of query, key and value.
        features: Of a query.
        values: Features of a value.
        mu: The threshold, if it is a constant; None: the median.
        bias: What a forgotten score becomes; None: the threshold.
        n: Of softmax_n.
        deviation: Of the noise; 0: there is none.
        mask: The dtype of the mask; None: there is none.
        dropout_p: Probability that a weight is dropped.
        is_causal: Whether query i sees the keys 0 to i only.
        scale: Factor of the scores.
        shared: Whether heads share keys.
        length: A number of queries that has the same tiles as that of the call.
        keys: The same of keys.
        backward: Whether gradients are wanted.
        of_mask: Whether that of the mask is, too.
    """

    device: str
    dtype: torch.dtype
    features: int
    values: int
    mu: float | None
    bias: float | None
    n: float
    deviation: float
    mask: torch.dtype | None
    dropout_p: float
    is_causal: bool
    scale: float
    shared: bool
    length: int
    keys: int
    backward: bool
    of_mask: bool

    def __str__(self) -> str:
        """Put it into words."""
        width = self.features if self.features == self.values else f"{self.features} and {self.values}"
        threshold = "the median" if self.mu is None else f"{self.mu:g}"
        parts = [
            str(self.dtype).removeprefix("torch."),
            f"width {width}",
            f"threshold {threshold}, bias {'the threshold' if self.bias is None else format(self.bias, 'g')}",
            "no mask" if self.mask is None else f"a mask of {str(self.mask).removeprefix('torch.')}",
            *(["causal"] if self.is_causal else []),
            *([f"dropout {self.dropout_p:g}"] if self.dropout_p else []),
            *(["noise"] if self.deviation else []),
            *([f"n {self.n:g}"] if self.n else []),
            *(["shared keys"] if self.shared else []),
            "forward and backward" if self.backward else "forward",
        ]
        return ", ".join(parts)


class Part(NamedTuple):
    """Arguments of the operator in the form that kernels take, of a few heads of one batch item.

    Attributes:
        query: (1, H, L, E).
        key: (1, H or fewer, S, E).
        value: (1, H or fewer, S, Ev).
        mask: (1, H or 1, L or 1, S or 1), boolean or additive; None: there is none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None


#: Computes a part of a case: the output, and the median (without elements where it is a constant).
Compute = Callable[[Case, Part, "Tensor | None", "Tensor | None"], "tuple[Tensor, Tensor]"]
#: Makes the mask of dropout, (1, H, L, S): what each weight is multiplied with.
Dropout = Callable[[Tensor, Tensor, float, Tensor], Tensor]

#: What `lwpf doctor` checks: dtype, width, threshold, bias, dtype of the mask, dropout, causality, and number of keys.
TYPICAL: list[tuple[torch.dtype, int, float | None, float | None, torch.dtype | None, float, bool, int]] = [
    (dtype, width, *rest)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for width, *rest in (
        (64, 0.0, 0.0, None, 0.0, False, 197),
        (64, None, None, None, 0.0, False, 197),
        (64, 0.0, 0.0, None, 0.0, False, 257),
        (64, 0.1, -0.3, torch.bool, 0.0, False, 197),
        (64, None, None, torch.float32, 0.0, False, 197),
        (64, 0.0, 0.0, None, 0.1, True, 197),
        (64, 0.0, 0.0, None, 0.0, False, 1024),
        (64, None, None, None, 0.0, True, 1024),
        (128, 0.0, 0.0, None, 0.0, False, 577),
        (128, None, None, None, 0.0, False, 577),
    )
]

_lock = threading.RLock()
_problems: dict[Case, str | None] = {}


def forget_cases() -> None:
    """Trust no case any more, and mistrust none."""
    with _lock:
        _problems.clear()


def case_of(call: Call, threshold: Threshold, length: int, keys: int) -> Case:
    """Return the case of a call.

    Args:
        call: The call.
        threshold: That of its rule.
        length: A number of queries that has the same tiles.
        keys: The same of keys.
    """
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    backward = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (query, key, value, mask)
    )
    # torch.compile may leave these numbers open, and a case is a constant.
    features, values = whole(query.shape[-1]), whole(value.shape[-1])
    scale = features**-0.5 if call.scale is None else call.scale
    shared = False
    if call.enable_gqa:
        of_query, of_key, of_value = (whole(tensor.shape[-3]) for tensor in (query, key, value))
        shared = of_query != of_key == of_value
    of_mask = None if mask is None else torch.float32 if mask.dtype == torch.float64 else mask.dtype
    mu, bias = (None if number is None else real(number) for number in (threshold.mu, threshold.bias))
    return Case(
        str(query.device), query.dtype, features, values, mu, bias, real(call.sep.n),
        real(threshold.deviation) if call.training else 0.0, of_mask, real(call.dropout_p), call.is_causal,
        real(representable_factor(query, scale, torch.float32)), shared, length, keys, backward,
        backward and mask is not None and mask.requires_grad,
    )  # fmt: skip


def problem_of(
    case: Case, part: Callable[[], Part], always: bool, name: str, compute: Compute, dropout: Dropout
) -> str | None:
    """Return why a backend is not to be trusted with a case, in words that follow a colon; None: it is.

    Args:
        case: The case.
        part: Returns what to check it by.
        always: Whether to check it although it was checked before.
        name: The name of the backend.
        compute: How the backend computes.
        dropout: Which weights it drops.
    """
    with _lock:
        if case in _problems and (not always or _problems[case] is not None):
            return _problems[case]
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # a graph is captured after a first run
        try:
            with _undisturbed():
                checked = part()
                found, is_sharp = _compare(case, checked, compute, dropout)
                if found is None and not is_sharp:  # its figures cancel so far that they tell little
                    found, _ = _compare(case, _drawn_like(case, checked), compute, dropout)
        except torch.OutOfMemoryError:
            return None  # the next call is the first one, then
        except Exception as error:  # the compiler's, or the driver's
            found = f"it failed with {type(error).__name__}: {error}"
        if found is None:
            _problems[case] = None
            return None
        _problems[case] = f"its first run of this case was not right ({case}): {found}"
    reporting.warn(
        f"backend {name} is not used for this case any more, since its check against the eager form failed ({case}): "
        f"{found}. {_where(case.device)}. Please report this line. The eager form computes the case; "
        "verify='off' (LWPF_VERIFY=off) trusts the kernels without a check"
    )
    return _problems[case]


def typical_cases(device: str) -> Iterator[tuple[Case, int]]:
    """Yield cases that are typical of models, each with a number of queries and keys."""
    for dtype, width, mu, bias, mask, dropout_p, is_causal, keys in TYPICAL:
        yield Case(
            device, dtype, width, width, mu, bias, 0.0, 0.0, mask, dropout_p, is_causal, width**-0.5, False,
            keys, keys, True, mask is not None and mask != torch.bool,
        ), keys  # fmt: skip


def part_of(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Part:
    """Return a small part of a call whose tensors have four dimensions.

    Args:
        query: (B, H, L, E).
        key: (B, H or fewer, S, E).
        value: (B, H or fewer, S, Ev).
        mask: (B or 1, H or 1, L or 1, S or 1), or None.
    """
    group = query.shape[1] // max(1, key.shape[1])
    heads = group if group > 1 else HEADS
    kept = mask if mask is None else mask[:1, :heads, :ROWS]
    return Part(query[:1, :heads, :ROWS], key[:1, : heads // group], value[:1, : heads // group], kept)


def drawn_part(case: Case, length: int, keys: int) -> Part:
    """Draw a part of a case, where no call is at hand: the same at every time.

    Args:
        case: The case.
        length: How many queries a call has.
        keys: How many keys.
    """
    length = min(length, ROWS)
    generator = torch.Generator().manual_seed(keys)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.device, case.dtype)

    mask = None
    if case.mask == torch.bool:
        mask = torch.rand(1, 1, length, keys, generator=generator).to(case.device) < 0.8
    elif case.mask is not None:
        mask = torch.randn(1, 1, length, keys, generator=generator).to(case.device, case.mask)
    shared = 1 if case.shared else HEADS
    return Part(
        draw(1, HEADS, length, case.features), draw(1, shared, keys, case.features),
        draw(1, shared, keys, case.values), mask,
    )  # fmt: skip


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Compute outside of autocast, of inference mode and of a trace, with gradients on."""
    with tracing.not_recorded(), torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
        for device in ("cuda", "cpu"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _drawn_like(case: Case, part: Part) -> Part:
    return drawn_part(case, max(1, part.query.shape[2]), max(1, min(part.key.shape[2], 4 * ROWS)))


def _compare(case: Case, part: Part, compute: Compute, dropout: Dropout) -> tuple[str | None, bool]:
    """Compute a part in both ways.

    Returns:
        Where they differ, in words, None if they do not; and whether a small difference would have been seen.
    """
    if not all(tensor.isfinite().all() for tensor in part[:3]):
        part = _drawn_like(case, part)
    clear = _clear_rows(case, part)
    if clear.rows.sum() < clear.rows.numel() / 4:
        part = _drawn_like(case, part)
        clear = _clear_rows(case, part)
    device = part.query.device
    noise = torch.full((), 0.5 * case.deviation, device=device) if case.deviation else None
    seed = torch.full((), 20261128, dtype=torch.int64, device=device) if case.dropout_p else None

    def leaves(dtype: torch.dtype | None) -> list[Tensor]:
        found = [t for t in part if t is not None and (t.dtype != torch.bool)]
        return [(t.detach().clone() if dtype is None else _widened(t)).requires_grad_(case.backward) for t in found]

    ours, wide = leaves(None), leaves(torch.float64)
    of_mask = [] if part.mask is None or part.mask.dtype != torch.bool else [part.mask]
    out, centre = compute(case, Part(ours[0], ours[1], ours[2], [*ours[3:], *of_mask, None][0]), noise, seed)
    dropped = None if seed is None else dropout(ours[0].detach(), ours[1].detach(), case.dropout_p, seed).double()
    query, key, value = wide[:3]
    # All that a mask and causality do, as numbers that are added to the scores: their gradient is that of the scores.
    added = torch.zeros_like(clear.scores).requires_grad_(case.backward)
    mask = added + wide[3] if len(wide) > 3 else added
    mask = mask.masked_fill(clear.scores.isnan(), -math.inf)
    if key.shape[1] != query.shape[1]:
        repeated = (eager_form.repeat_heads(query, key), eager_form.repeat_heads(query, value))
    else:
        repeated = (key, value)
    wanted = eager_form.above_threshold(
        query, *repeated, mask, False, case.scale, case.mu, case.bias, case.n, noise, dropped
    )  # fmt: skip
    forward, backward = BOUNDS[case.dtype]
    wrong = []
    if case.mu is None and (found := _count(clear, centre)):
        wrong.append(found)
    if seed is not None and dropped is not None:
        share = float((dropped == 0).double().mean())
        if abs(share - case.dropout_p) > 6 * math.sqrt(0.25 / dropped.numel()):
            wrong.append(f"dropout takes {share:.4f} of the weights and not {case.dropout_p:g}")
    wrong += _far("the output", out, wanted, clear.rows[..., None], forward)
    is_sharp = True
    if case.backward:
        generator = torch.Generator().manual_seed(7)
        cotangent = torch.randn(out.shape, generator=generator).to(device, out.dtype)
        cotangent = cotangent.masked_fill(~clear.rows[..., None], 0)
        counted = slice(4 if case.of_mask else 3)
        got = torch.autograd.grad(out, ours[counted], cotangent)
        *theirs, of_scores = torch.autograd.grad(
            wanted, [*wide[counted], added], cotangent.double(), materialize_grads=True
        )
        kept = (clear.of_query[..., None], clear.of_key[..., None], None, None)
        of_delta = (cotangent.double() * wanted.detach()).norm(dim=-1)
        rounding = (*_rounding(case, query.detach(), repeated[0].detach(), of_scores, of_delta), 0.0, 0.0)
        is_sharp = all(r <= backward * float(g.norm()) for r, g in zip(rounding, theirs, strict=False))
        names = ("query", "key", "value", "mask")
        for name, a, b, where, cancelled in zip(names, got, theirs, kept, rounding, strict=False):
            if name == "mask" and not bool(clear.of_query.all()):
                continue  # its entries may be sums over rows of both kinds
            wrong += _far(f"the gradient of the {name}", a, b, where, backward, cancelled)
    return "; ".join(wrong) or None, is_sharp


def _widened(tensor: Tensor) -> Tensor:
    wide = tensor.detach().double()
    return wide.masked_fill(tensor <= eager_form.lowest(tensor.dtype), -math.inf)


def _rounding(case: Case, query: Tensor, key: Tensor, of_scores: Tensor, of_delta: Tensor) -> tuple[float, float]:
    """Return what becomes of the gradients of query and key by rounding, as norms.

    Args:
        case: The case.
        query: (1, H, L, E).
        key: (1, H, S, E).
        of_scores: The gradient of the scores, (1, H, L, S), which is rounded before it meets query and key.
        of_delta: (1, H, L): the norm of the terms of delta, the inner product of a row's gradient and its output,
            which is rounded.
    """
    squares, of_rows = of_scores.square(), of_delta.square()
    norms, of_keys = query.square().sum(-1), key.square().sum(-1)
    for_query = (squares @ of_keys[..., None]).sum() + (of_rows * of_keys.amax(-1, keepdim=True)).sum()
    for_key = (squares.sum(-1) * norms).sum() + (of_rows * norms).sum()
    factor = ROUNDING * torch.finfo(case.dtype).eps * abs(case.scale)
    return factor * float(for_query.sqrt()), factor * float(for_key.sqrt())


class _Clear(NamedTuple):
    """What rounding decides nothing about.

    Attributes:
        scores: In float64, NaN where excluded: (1, H, L, S).
        near: How near to each other two scores may be told apart.
        rows: Rows (1, H, L) without a score that may be on either side of the threshold.
        of_query: Rows whose query has a gradient that is sure; fewer where it is not sure which score is the median.
        of_key: The same of keys, (1, H or fewer, S).
    """

    scores: Tensor
    near: float
    rows: Tensor
    of_query: Tensor
    of_key: Tensor


@torch.no_grad()
def _clear_rows(case: Case, part: Part) -> _Clear:
    query, key = part.query.double(), part.key.double()
    shared = key.shape[1]
    if shared != query.shape[1]:
        key = eager_form.repeat_heads(query, key)
    mask = part.mask if part.mask is None or part.mask.dtype == torch.bool else _widened(part.mask)
    scores, excluded = eager_form.attention_scores(query, key, mask, case.is_causal, case.scale)
    if excluded is not None:
        scores = scores.masked_fill(excluded, math.nan)
    finite = scores[scores.isfinite()]
    near = NEAR * max(1e-3, float(finite.abs().max()) if finite.numel() else 0.0)
    threshold = scores.nanmedian() if case.mu is None else torch.full_like(scores[0, 0, 0, 0], case.mu)
    threshold = threshold + 0.5 * case.deviation
    close = (scores - threshold).abs() <= near
    exact = (scores == threshold) if not case.deviation else torch.zeros_like(close)
    doubtful = close & ~exact
    rows = ~doubtful.any(-1)
    if case.mu is None and case.bias is None and bool(doubtful.any()):
        of_query, of_key = ~close.any(-1), ~close.any(-2)
    else:
        of_query, of_key = torch.ones_like(rows), torch.ones_like(close[..., 0, :])
    if shared != of_key.shape[1]:
        of_key = of_key.reshape(1, shared, -1, of_key.shape[-1]).all(2)
    return _Clear(scores, near, rows, of_query, of_key)


def _count(clear: _Clear, centre: Tensor) -> str | None:
    """Count the scores below the median that was found, and at it; return what is wrong about that."""
    scores = clear.scores[~clear.scores.isnan()]
    if not scores.numel():
        return None
    found = float(centre.detach())
    below, upto = int((scores < found - clear.near).sum()), int((scores <= found + clear.near).sum())
    if below <= (scores.numel() - 1) // 2 < upto:
        return None
    return f"of {scores.numel()} scores {below} are below its median {found:g} and {upto} are not above it"


def _far(
    name: str, got: Tensor, wanted: Tensor, where: Tensor | None, bound: float, cancelled: float = 0.0
) -> list[str]:
    """Return what differs by more than a bound, and by more than is left where terms cancel, in words."""
    got, wanted = got.detach().double(), wanted.detach().double()
    difference = got - wanted
    if where is not None:
        difference, wanted = difference.masked_fill(~where, 0), wanted.masked_fill(~where, 0)
    size = max(float(wanted.norm()), 1e-6 * wanted.numel() ** 0.5)
    error, bound = float(difference.norm()) / size, bound + cancelled / size
    return [] if error <= bound else [f"{name} differs by {error:.2g} of its norm, {bound:.2g} is allowed"]


def _where(device: str) -> str:
    """Return the device and the versions, in words."""
    from importlib import metadata

    versions = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    for package in ("triton", "lwpf_patch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    kind = torch.device(device)
    name = "the interpreter"
    if kind.type == "cuda":
        major, minor = torch.cuda.get_device_capability(kind)
        name = f"{torch.cuda.get_device_name(kind)} ({major}.{minor})"
    return f"On {name}, {', '.join(versions)}"
