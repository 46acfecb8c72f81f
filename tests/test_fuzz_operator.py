"""The operator against the oracle, and its refusals against SDPA's, over random calls.

Figures lie on a grid, so that scores are exact in every dtype and equal ones are equal in every order of summation:
what is above a threshold, and which score is the median, is the same for the oracle in float64 as for float16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from unittest import mock

import fuzzing
import oracle
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import Forgetting
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lwpf_patch import PFU, FuncD, ReLU, lwpf_attention
from lwpf_patch.backends import cpu, cpu_native, cpu_scores

pytestmark = fuzzing.timeout

NAN, INF = math.nan, math.inf
EXACT = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
RELU = Forgetting("relu")
WAYS = ("eager", "cpu, by tiles", "cpu, native")


@dataclass(frozen=True)
class Put:
    """A figure that is put somewhere into a tensor: "query", "key" or "value"."""

    tensor: str
    place: int
    figure: float


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: in which order its dimensions, every how-manieth, and whether batches are real."""

    turned: bool = False
    step: int = 1
    expanded: bool = False


@dataclass(frozen=True)
class Call:
    """A call of the operator."""

    way: str = "eager"
    func_d: Forgetting = RELU
    empty_rows: str = "zero"
    masking: str = "exclude"
    dtype: torch.dtype = torch.float64
    batch: tuple[int, ...] = ()
    own: tuple[tuple[bool, ...], ...] = ((), (), ())  # which batch dimensions query, key and value have, and not 1
    heads_share: int = 0  # how many heads of the query share one; 0: enable_gqa is not set
    length: int = 1
    keys: int = 1
    features: int = 1
    values: int = 1
    scale: float | None = 1.0
    n: float = 0.0  # of softmax_n
    mask: str = "none"  # or "causal", "boolean", "additive"
    mask_shape: tuple[int, ...] = ()
    of_mask: torch.dtype = torch.float32
    hidden: float = 0.3
    layouts: tuple[Layout, ...] = (Layout(),) * 4
    spread: int = 8  # figures are whole numbers from -spread to spread, divided by 4
    puts: tuple[Put, ...] = ()
    seed: int = 0

    def __repr__(self) -> str:
        """Show what is not as usual."""
        shown = {each.name: getattr(self, each.name) for each in fields(self)}
        return f"Call({', '.join(f'{n}={v!r}' for n, v in shown.items() if v != getattr(Call, n))})"

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:
        printer.text(repr(self))  # type: ignore[attr-defined]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Make query, key, value and mask in float64; what a mask hides with is what its own dtype has for it."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = ((self.length, self.features), (self.keys, self.features), (self.keys, self.values))
        made = {}
        for name, own, size in zip(("query", "key", "value"), self.own, sizes, strict=True):
            batch = [extent if kept else 1 for extent, kept in zip(self.batch, own, strict=True)]
            if self.heads_share and name != "query":
                batch[-1] = self.batch[-1] // self.heads_share
            made[name] = self._figures((*batch, *size), generator)
        for put in self.puts:
            flat = made[put.tensor].view(-1)
            if len(flat):
                flat[put.place % len(flat)] = put.figure
        mask = None
        if self.mask == "boolean":
            mask = torch.rand(self.mask_shape, generator=generator) >= self.hidden
        elif self.mask == "additive":
            mask = self._figures(self.mask_shape, generator)
            hides = torch.rand(self.mask_shape, generator=generator) < self.hidden
            lowest = torch.tensor([-INF, torch.finfo(self.of_mask).min], dtype=torch.float64)
            which = torch.randint(2, self.mask_shape, generator=generator)
            mask = torch.where(hides, lowest[which], mask)
        return made["query"], made["key"], made["value"], mask

    def _figures(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randint(-self.spread, self.spread + 1, shape, generator=generator).double() / 4

    def batch_of_scores(self) -> tuple[int, ...]:
        """Return the batch dimensions of the scores: not those of the value alone."""
        return tuple(
            extent if self.own[0][place] or self.own[1][place] or self.heads_share else 1
            for place, extent in enumerate(self.batch)
        )

    def factor(self) -> float:
        return (self.features or 1) ** -0.5 if self.scale is None else self.scale

    def module(self) -> FuncD:
        if self.func_d.kind == "relu":
            return ReLU(empty_rows=self.empty_rows)
        return PFU(mu=self.func_d.mu, bias=self.func_d.bias, sigma=0, empty_rows=self.empty_rows)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    way = draw(st.sampled_from(WAYS))
    dtype = draw(st.sampled_from(list(EXACT)))
    numbers = st.sampled_from([0.0, 0.5, -0.5, 1.0])
    kind = draw(st.sampled_from(["relu", "pfu"]))
    func_d = Forgetting(kind)
    if kind == "pfu":
        mu = draw(st.one_of(st.just("dmedian"), numbers))
        func_d = Forgetting("pfu", mu, draw(st.one_of(st.just("mu"), numbers)))
    batch = draw(st.sampled_from([(), (1,), (2,), (3, 1), (1, 2), (2, 2), (0,), (2, 0), (2, 1, 2)]))
    heads_share = draw(st.sampled_from([0, 0, 1, 2])) if batch and batch[-1] % 2 == 0 else 0
    own = tuple(tuple(draw(st.booleans()) for _ in batch) for _ in range(3))
    if heads_share:
        own = ((True,) * len(batch), *own[1:])
    # Of what no tensor has, the others cannot know.
    batch = tuple(
        extent if any(each[place] for each in own) or (heads_share and place == len(batch) - 1) else 1
        for place, extent in enumerate(batch)
    )
    length, keys = draw(st.integers(0, 6)), draw(st.integers(0, 7))
    mask = draw(st.sampled_from(["none", "causal", "boolean", "additive"]))
    shape: tuple[int, ...] = ()
    if mask in ("boolean", "additive"):
        full = (*Call(batch=batch, own=own, heads_share=heads_share).batch_of_scores(), length, keys)
        whole = tuple(draw(st.sampled_from([extent, extent, 1])) for extent in full)
        shape = whole[draw(st.integers(0, len(whole))) :]
    features = draw(st.sampled_from([1, 2, 4, 0]))
    scales = [1.0, 0.5, -1.0, 2.0, 0.0, *([None] if features != 2 else [])]
    call = Call(
        way=way,
        func_d=func_d,
        empty_rows=draw(st.sampled_from(["zero", "keep"])) if way == "eager" else "zero",
        masking=draw(st.sampled_from(["exclude", "paper"])) if way == "eager" else "exclude",
        dtype=dtype,
        batch=batch,
        own=own,
        heads_share=heads_share,
        length=length,
        keys=keys,
        features=features,
        values=draw(st.sampled_from([1, 2, 3, 0])),
        scale=draw(st.sampled_from(scales)),
        n=draw(st.sampled_from([0.0, 0.0, 1.0, 0.25, 30.0])),
        mask=mask,
        mask_shape=shape,
        of_mask=draw(st.sampled_from([torch.float32, dtype])),
        hidden=draw(st.sampled_from([0.3, 0.0, 0.7, 1.0])),
        layouts=tuple(draw(st.builds(Layout, st.booleans(), st.sampled_from([1, 2]), st.booleans())) for _ in range(4)),
        spread=draw(st.sampled_from([8, 1, 0])),
        seed=draw(st.integers(0, 2**16)),
    )
    tensors = (
        ["query", "key", "value"] if mask == "none" else ["query", "key"]
    )  # what hides a key hides no NaN of its value
    puts = st.builds(Put, st.sampled_from(tensors), st.integers(0, 20), st.sampled_from([NAN, INF, -INF]))
    return replace(call, puts=tuple(draw(st.lists(puts, max_size=2)))) if draw(st.booleans()) else call


def place(tensor: Tensor, layout: Layout, batch: tuple[int, ...]) -> Tensor:
    """Lay figures out in memory in another way."""
    if layout.expanded and tensor.dim() == len(batch) + 2:
        tensor = tensor.expand(*batch, *tensor.shape[-2:])
    if layout.step > 1 and tensor.dim():
        room = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] * layout.step)
        room[..., :: layout.step] = tensor
        tensor = room[..., :: layout.step]
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0) if layout.turned and tensor.dim() > 1 else tensor


def compute(call: Call) -> tuple[Tensor, list[Tensor]]:
    """Call the operator; returns its output and its inputs."""
    *figures, mask = call.tensors()
    inputs = [
        place(each.to(call.dtype), layout, call.batch if not call.heads_share else ()).requires_grad_()
        for each, layout in zip(figures, call.layouts[:3], strict=True)
    ]
    if mask is not None:
        mask = place(
            mask if mask.dtype == torch.bool else mask.to(call.of_mask), call.layouts[3], call.batch_of_scores()
        )
        if mask.dtype != torch.bool:
            inputs.append(mask.requires_grad_())
    backend, *_ = call.way.split(", ")
    with (
        mock.patch.object(cpu_scores, "TILE", 8),
        mock.patch.object(cpu_scores, "ROWS", 2),
        mock.patch.object(cpu, "_native_is_there", return_value="native" in call.way and cpu_native.is_there()),
    ):
        out = lwpf_attention(
            *inputs[:3], mask, is_causal=call.mask == "causal", scale=call.scale, func_d=call.module(), training=False,
            masking=call.masking, backend=backend, enable_gqa=call.heads_share > 0, sep=f"softmax_n:n={call.n}",
        )  # fmt: skip
        return out, [out, *gradients(out, inputs)]


def specify(call: Call) -> tuple[Tensor, list[Tensor]]:
    """Compute the same with the oracle."""
    *figures, mask = call.tensors()
    inputs = [each.requires_grad_() for each in figures]
    if mask is not None and mask.dtype != torch.bool:
        inputs.append(mask.requires_grad_())
    query, key, value = inputs[:3]
    if call.heads_share:
        key, value = (each.repeat_interleave(call.heads_share, -3) for each in (key, value))

    def attend(func_d: Forgetting, value: Tensor) -> Tensor:
        return oracle.attention(
            query, key, value, func_d=func_d, attn_mask=mask, is_causal=call.mask == "causal", scale=call.factor(),
            masking=call.masking, excluded_below=torch.finfo(call.of_mask).min / 2, n=call.n,
        )  # fmt: skip

    out = attend(call.func_d, value)
    if call.empty_rows == "keep":  # a row that keeps nothing is that of ordinary attention
        ones = torch.ones(*value.shape[:-1], 1, dtype=torch.float64)
        out = torch.where(attend(call.func_d, ones).detach() == 0, attend(Forgetting("none"), value), out)
    return out, [out, *gradients(out, inputs)]


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients under a cotangent that has no symmetry."""
    cotangent = (torch.arange(out.numel(), dtype=torch.float64) % 5 - 1.5).reshape(out.shape).to(out.dtype)
    out = out + sum(each.sum() * 0 for each in inputs if not each.numel())  # of all inputs, also where none has a part
    if not out.requires_grad:
        return tuple(torch.zeros_like(each) for each in inputs)
    return torch.autograd.grad(out, inputs, cotangent, allow_unused=True, materialize_grads=True)


def scores_of(call: Call) -> Tensor:
    """Return the scores that are not hidden, for what is said of NaN and infinities."""
    query, key, _, mask = call.tensors()
    if call.heads_share:
        key = key.repeat_interleave(call.heads_share, -3)
    scores = (call.factor() * query.unsqueeze(-2) * key.unsqueeze(-3)).sum(-1)
    if mask is not None:
        lowest = torch.finfo(call.of_mask).min / 2
        shown, scores = torch.broadcast_tensors(mask if mask.dtype == torch.bool else mask > lowest, scores)
        return scores[shown]
    if call.mask == "causal":
        return scores[torch.ones_like(scores, dtype=torch.bool).tril()]
    return scores.flatten()


@fuzzing.fuzz(150)
@given(call=calls())
def test_the_operator_equals_the_oracle(call):
    scores = scores_of(call)
    finite = bool(scores.isfinite().all())
    got, wanted = compute(call)[1], specify(call)[1]
    assert got[0].dtype == call.dtype
    if call.masking == "paper" and not wanted[0].numel():
        finite = False  # the median may be infinite, and no output shows it
    finite = finite and not call.puts and all(bool(each.isfinite().all()) for each in wanted)
    for ours, expected in zip(got if finite else got[:1], wanted, strict=finite):
        if ours.shape != expected.shape:  # an expanded input: its gradient is that of all its copies
            ours = ours.sum_to_size(expected.shape)
        largest = [float(each.detach().abs().max()) for each in wanted if finite and each.numel()]
        tolerance = max(EXACT[call.dtype], EXACT[ours.dtype]) * max([1.0, *largest])
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@dataclass(frozen=True)
class Anything:
    """The shapes and dtypes of a call that may or may not make sense."""

    query: tuple[int, ...] = (2, 3)
    key: tuple[int, ...] = (2, 3)
    value: tuple[int, ...] = (2, 3)
    mask: tuple[int, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3
    of_mask: torch.dtype = torch.bool
    options: tuple[tuple[str, object], ...] = ()

    def make(self) -> tuple[tuple[Tensor | None, ...], dict[str, object]]:
        shapes = (self.query, self.key, self.value)
        tensors = [torch.ones(shape, dtype=dtype) for shape, dtype in zip(shapes, self.dtypes, strict=True)]
        mask = None if self.mask is None else torch.ones(self.mask).to(self.of_mask)
        return (*tensors, mask), dict(self.options)


@st.composite
def anything(draw: st.DrawFn) -> Anything:
    """Draw a call that makes sense, and change some sizes of it."""
    batch = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 0]), max_size=3)))
    length, keys, features, values = (draw(st.sampled_from([2, 3, 1, 0])) for _ in range(4))
    shapes = [(*batch, length, features), (*batch, keys, features), (*batch, keys, values), (*batch, length, keys)]
    for _ in range(draw(st.integers(0, 3))):
        which = draw(st.integers(0, 3))
        shape = list(shapes[which])
        change = draw(st.sampled_from(["size", "fewer", "more"]))
        if change == "fewer":
            shape = shape[draw(st.integers(0, 2)) :]
        elif change == "more":
            shape = [draw(st.sampled_from([1, 2])), *shape]
        elif shape:
            shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([1, 2, 4, 0]))
        shapes[which] = tuple(shape)
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    dtype = draw(st.sampled_from(dtypes))
    other = draw(st.sampled_from([dtype] * 6 + [torch.float32, torch.int64, torch.bool]))
    options = {
        "is_causal": st.sampled_from([False, True, 1]),
        "scale": st.sampled_from([None, 1, 0.5, 1e300, NAN, "1", [1.0], True]),
        "enable_gqa": st.sampled_from([True, True, True, 0]),
        "dropout_p": st.sampled_from([0, 0.0, 1.0, 2.0, "0", None]),
    }
    chosen = draw(st.lists(st.sampled_from(list(options)), max_size=2, unique=True))
    return Anything(
        *shapes[:3],
        mask=shapes[3] if draw(st.booleans()) else None,
        dtypes=(dtype, dtype, other),
        of_mask=draw(st.sampled_from([torch.bool, torch.bool, *dtypes, torch.int64])),
        options=tuple((name, draw(options[name])) for name in chosen),
    )


@fuzzing.fuzz(300)
@given(call=anything(), backend=st.sampled_from(["eager", "cpu"]))
def test_sdpa_and_the_operator_refuse_alike(call, backend):
    options = dict(call.options)
    # Where a tensor is empty, SDPA takes the query's batch for the output's and does not broadcast; where there are no
    # heads to be shared, a division by 0 may end its process.
    shapes = (call.query, call.key, call.value)
    assume(all(0 not in s for s in shapes) or (len({s[:-2] for s in shapes}) == 1 and "enable_gqa" not in options))
    results = []
    for attend in (F.scaled_dot_product_attention, lwpf_attention):
        tensors, options = call.make()
        if attend is lwpf_attention:
            options.update(func_d="relu", backend=backend)
        try:
            with sdpa_kernel(SDPBackend.MATH):  # which checks all that the others leave to chance
                results.append(attend(*tensors, **options).shape)
        except (RuntimeError, TypeError, IndexError, ValueError, OverflowError) as error:
            results.append(error)
    sdpa, ours = results
    if isinstance(sdpa, Exception):
        # Of several faults one is told, and not always the same; but types come first.
        assert isinstance(ours, Exception), sdpa
        assert isinstance(ours, TypeError) == isinstance(sdpa, TypeError), (sdpa, ours)
    elif isinstance(ours, Exception):
        # SDPA compares no shapes where there is nothing to compute.
        assert isinstance(ours, RuntimeError), ours
        assert 0 in (*call.query, *call.key, *call.value), ours
    else:
        assert ours == sdpa
