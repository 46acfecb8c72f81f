"""The Triton backend against the oracle: on the GPU, or in Triton's interpreter with the variable TRITON_INTERPRET=1.

Not collected by itself: tests/test_triton.py runs it in a process of its own. The variable has to be set before
anything imports Triton, and then holds for all that the process does with it, torch.compile included.
"""

from __future__ import annotations

import math
import os
import random

import oracle
import pytest
import sdpa_inputs
import torch
from oracle import Forgetting

import lwpf_patch
from lwpf_patch import PFU, NoForgetting, ReLU, lwpf_attention, settings
from lwpf_patch.attention import HostFuncD
from lwpf_patch.backends import triton as backend
from lwpf_patch.backends import triton_kernels, triton_median

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
INF = float("inf")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter: exp2 of an infinity

FUNC_DS = {
    "relu": (ReLU(), Forgetting("relu")),
    "pfu constant": (PFU(mu=0.1, bias=-0.3, sigma=0), Forgetting("pfu", 0.1, -0.3)),
    "pfu constant, high bias": (PFU(mu=0.1, bias=40, sigma=0), Forgetting("pfu", 0.1, 40.0)),
    "pfu constant, bias mu": (PFU(mu=-0.2, bias="mu", sigma=0), Forgetting("pfu", -0.2, "mu")),
    "pfu dmedian": (PFU(), Forgetting("pfu", "dmedian", "mu")),
    "pfu dmedian, bias constant": (PFU(mu="dmedian", bias=0.25), Forgetting("pfu", "dmedian", 0.25)),
    "pfu dmedian, noisy": (PFU(sigma=0.3), Forgetting("pfu", "dmedian", "mu")),
    "pfu constant, noisy": (PFU(mu=0.2, bias=0.1, sigma=0.3), Forgetting("pfu", 0.2, 0.1)),
}
NOTHING = {"none": (NoForgetting(), Forgetting())}
MASKS = ["none", "causal", "boolean", "padding", "empty rows", "additive", "additive with -inf", "additive with min"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _no_check_beside(monkeypatch):
    """What is compared here need not be compared twice; tests/verify_cases.py is about the check."""
    monkeypatch.setitem(settings.DEFAULTS, "verify", "off")


def pick(options):
    return options[int(torch.randint(len(options), ()))]


def dealt(options):
    """Yields the options in an order that is drawn, every one of them before any comes again."""
    while True:
        yield from random.sample(options, len(options))


#: What the comparisons with the oracle take in turn, so that few of them hold everything there is.
NEXT_DTYPE, NEXT_MASK, NEXT_WIDTH = dealt(DTYPES), dealt(MASKS), dealt([16, 40, 64, 72, 96, 128])


def number(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def make_mask(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """Makes a mask for scores of a shape (B, H, L, S), of any shape that can be broadcast to it."""
    batch, heads, length, keys = shape
    if kind in ("none", "causal"):
        return None
    part = (pick([1, batch]), pick([1, heads]), pick([1, length, length]), pick([1, keys, keys]))
    if kind == "boolean":
        return torch.rand(part) < 0.7
    if kind == "padding":
        return torch.arange(keys) < torch.randint(1, keys + 1, (batch, 1, 1, 1))
    if kind == "empty rows":
        mask = torch.rand(shape) < 0.7
        mask[..., 0, :] = False
        return mask
    mask = torch.randn(part[number(0, 2) :]).to(pick([dtype, torch.float32]))
    if kind != "additive":
        hidden = -INF if kind.endswith("inf") else torch.finfo(mask.dtype).min
        mask = mask.masked_fill(torch.rand(mask.shape) < 0.3, hidden)
    return mask.requires_grad_()


def scores_of(query, key, mask, causal, scale):
    """Returns all scores in float64, NaN where excluded."""
    key = key.double().repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = scale * (query.double() @ key.transpose(-2, -1))
    if mask is not None and mask.dtype == torch.bool:
        return scores.masked_fill(~mask, math.nan)
    if mask is not None:
        return (scores + mask).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, math.nan)
    if causal:
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), math.nan)
    return scores


def is_clear(scores: torch.Tensor, forgetting: Forgetting) -> bool:
    """Says whether no score is so near the threshold that rounding decides which side it is on."""
    threshold = scores.nanmedian() if forgetting.mu == "dmedian" else torch.tensor(float(forgetting.mu))
    if forgetting.kind == "none":
        return True
    if forgetting.kind == "relu":
        threshold = torch.zeros(())
    near = scores - threshold
    far = (near - forgetting.eps).abs()
    if forgetting.mu == "dmedian":  # which score is the median must be clear too, and it is on no side of itself
        apart = near[(near != 0) & ~near.isnan()].abs()
        if apart.numel() and apart.min() < 3e-6:
            return False
        far = far[near != 0] if forgetting.eps == 0 else far
    far = far[~far.isnan()]
    return not far.numel() or bool(far.min() > 3e-6)


def attend(query, key, value, mask, seed, which, options):
    torch.manual_seed(seed)
    if DEVICE == "cuda":
        torch.cuda.manual_seed(seed)
    return lwpf_attention(query, key, value, mask, backend=which, **options)


def worst(ours: torch.Tensor, expected: torch.Tensor, least: float) -> float:
    """Returns the largest error, of the largest figure, or of what it would be did its terms not cancel."""
    if not expected.numel():
        return 0.0
    assert torch.isfinite(ours).all()
    ours, expected = ours.detach().double().cpu(), expected.detach()
    return float((ours - expected).abs().max() / expected.abs().max().clamp(min=max(least, 1e-3)))


#: The worst errors so far, of each dtype: of the output and of the gradients.
WORST: dict[torch.dtype, list[float]] = {}


@pytest.fixture(scope="module", autouse=True)
def _errors():
    yield
    for dtype, errors in WORST.items():
        print(f"worst errors in {dtype}: " + ", ".join(f"{error:.1e}" for error in errors))


def record(dtype: torch.dtype, errors: list[float]) -> None:
    before = WORST.setdefault(dtype, [0.0] * 5)
    for place, error in enumerate(errors):
        before[place] = max(before[place], error)


def check(func, dtype, query, key, value, mask, *, causal=False, scale=None, dropout_p=0.0, n=0.0) -> list[float]:
    """Compares the output and all gradients with the oracle; errors may be a small factor of the eager form's.

    Args:
        func: A name of FUNC_DS or NOTHING.
        dtype: Of the inputs, which are given as float64 figures that it can hold.
        query: (B, H, L, E).
        key: (B, H or fewer, S, E).
        value: (B, H or fewer, S, Ev).
        mask: Or None.
        causal: Whether is_causal is set.
        scale: The factor of the scores, or None.
        dropout_p: The rate.
        n: Of softmax_n.

    Returns:
        The worst error of the output and of each gradient.
    """
    func_d, forgetting = {**FUNC_DS, **NOTHING}[func]
    noisy = func.endswith("noisy")
    group = query.shape[-3] // key.shape[-3]
    options = dict(func_d=func_d, training=noisy, is_causal=causal, scale=scale, enable_gqa=group > 1)
    options["sep"] = f"softmax_n:n={n}"
    seed = number(0, 2**31 - 1)
    if noisy:
        attend_seed = torch.Generator(DEVICE).manual_seed(seed)
        eps = float(torch.randn(1, generator=attend_seed, device=DEVICE) * 0.09)
        forgetting = Forgetting(forgetting.kind, forgetting.mu, forgetting.bias, eps)
    factor_of_scores = query.shape[-1] ** -0.5 if scale is None else scale
    if not is_clear(scores_of(query, key, mask, causal, factor_of_scores), forgetting):
        return []
    inputs = [t.detach().to(DEVICE, dtype).requires_grad_() for t in (query, key, value)]
    placed = None if mask is None else mask.detach().to(DEVICE)
    if mask is not None and mask.requires_grad:
        placed.requires_grad_()
        inputs.append(placed)
    wide = [t.detach().double().requires_grad_() for t in (query, key, value)]
    wide_mask = mask
    if mask is not None and mask.requires_grad:
        wide_mask = mask.detach().double().masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -INF).requires_grad_()
        wide.append(wide_mask)
    keep = None
    if dropout_p:
        options["dropout_p"] = dropout_p
        unit = torch.eye(key.shape[-2], device=DEVICE, dtype=dtype).expand(*key.shape[:-1], key.shape[-2])
        kept = attend(*inputs[:2], unit, placed, seed, "triton", options)
        plain = attend(*inputs[:2], unit, placed, seed, "triton", options | {"dropout_p": 0.0})
        keep = ((kept != 0) | (plain == 0)).cpu()
    ours = attend(*inputs[:3], placed, seed, "triton", options)
    assert ours.dtype == dtype
    repeated = [t.repeat_interleave(group, -3) for t in wide[1:3]]
    expected = oracle.attention(
        wide[0], *repeated, func_d=forgetting, attn_mask=wide_mask, is_causal=causal, scale=scale,
        dropout_keep=keep, dropout_p=dropout_p, excluded_below=-1e300, n=n,
    )  # fmt: skip
    cotangent = torch.randn(expected.shape).to(dtype).double()
    wanted = [expected, *torch.autograd.grad(expected, wide, cotangent, materialize_grads=True)]
    got = [ours, *torch.autograd.grad(ours, inputs, cotangent.to(DEVICE, dtype))]
    # As in every flash backward, delta is of a rounded output: of terms that cancel to 0, so much is left.
    term = float((cotangent @ repeated[1].detach().transpose(-2, -1)).abs().max())
    rows = 1 if mask is None else max(1, query.shape[:-1].numel() / mask.numel())  # at least, under an entry
    least = [1e-3, abs(factor_of_scores) * term, abs(factor_of_scores) * term, 1e-3, rows * term]
    names, least = (each[: len(got)] for each in (("output", "query", "key", "value", "mask"), least))
    errors = [worst(*figures) for figures in zip(got, wanted, least, strict=True)]
    floor = torch.finfo(dtype).eps
    if INTERPRETED and dtype == torch.bfloat16:
        floor *= 4  # the interpreter cuts bfloat16 off where the GPU rounds
    # Gradients are sums over keys and features in another order, of terms that may cancel: some units of rounding.
    allowed = [16 * floor] * len(errors)
    if not dropout_p and not noisy:  # the eager form draws otherwise
        eager = attend(*inputs[:3], placed, seed, "eager", options)
        theirs = [eager, *torch.autograd.grad(eager, inputs, cotangent.to(DEVICE, dtype))]
        allowed = [8 * (worst(*figures) + floor) for figures in zip(theirs, wanted, least, strict=True)]
    record(dtype, errors)
    for name, error, most in zip(names, errors, allowed, strict=True):
        assert error <= most, f"{name}: error {error:.2e}, allowed {most:.2e}"
    return errors


def rounded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).double()


@pytest.mark.drawn(cases=5)
@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("func", FUNC_DS)
def test_equals_the_oracle(func, turn):
    """Width, mask and dtype are dealt; sizes, grouping, scale and dropout are drawn. One turn is with softmax_n."""
    dtype, mask_name, width = next(NEXT_DTYPE), next(NEXT_MASK), next(NEXT_WIDTH)
    n = pick([1.0, 0.2, 30.0]) if turn == 1 else 0.0
    for _ in range(20):
        heads = pick([1, 2, 4])
        group = pick([1, 1, heads])
        most = 100 if heads == 1 else 60 // heads
        length, keys, batch = number(1, most), number(1, most), pick([1, 2])
        query = rounded((batch, heads, length, width), dtype)
        key = rounded((batch, heads // group, keys, width), dtype)
        value = rounded((batch, heads // group, keys, pick([width, 24])), dtype)
        mask = make_mask(mask_name, (batch, heads, length, keys), dtype)
        errors = check(
            func, dtype, query, key, value, mask, causal=mask_name == "causal", scale=pick([None, None, 0.3]),
            dropout_p=pick([0.0, 0.0, 0.3]), n=n,
        )  # fmt: skip
        if errors:
            return
    pytest.fail("no case was drawn whose threshold is clear")


@pytest.fixture
def started(monkeypatch):
    """The names of the kernels that were started."""
    names = []
    launch = triton_kernels.launch

    def launch_and_tell(kernel, *arguments, **options):
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(triton_kernels, "launch", launch_and_tell)
    return names


@pytest.mark.drawn(cases=3)
@pytest.mark.parametrize("func", FUNC_DS)
def test_heads_in_one_pass(func, started):
    """The backward kernel for whole heads, of sequences of all lengths it is for; the interpreter is slow."""
    dtype, mask_name, width = pick([torch.float16, torch.bfloat16]), next(NEXT_MASK), pick([16, 32, 64])
    dropout_p = pick([0.0, 0.0, 0.3])
    most = 80 if dropout_p else 256
    for _ in range(20):
        length, keys, heads = number(1, most), number(1, most), pick([1, 2])
        query, key, value = (rounded((1, heads, rows, width), dtype) for rows in (length, keys, keys))
        mask = make_mask(mask_name, (1, heads, length, keys), dtype)
        started.clear()
        errors = check(
            func, dtype, query, key, value, mask, causal=mask_name == "causal", scale=pick([None, 0.3]),
            dropout_p=dropout_p, n=pick([0.0, 1.0]),
        )  # fmt: skip
        if errors:
            in_one_pass = backend.capability(torch.device(DEVICE)) in backend.ROOMY
            assert ("head_kernel" in started) == in_one_pass
            assert in_one_pass != bool({"query_kernel", "key_kernel"} & set(started))
            return
    pytest.fail("no case was drawn whose threshold is clear")


@pytest.mark.drawn(days=3)
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}, {"enable_gqa": True}], ids=str)
def test_one_pass_and_two_compute_the_same(options, started, monkeypatch):
    """With the same weights dropped; and twice the same, bit by bit. Shared keys take two passes in any case."""
    length, keys = number(65, 256), number(65, 256)
    shared = 1 if options.get("enable_gqa") else 2
    inputs = [
        rounded((2, heads, rows, 32), torch.float16).to(DEVICE, torch.float16).requires_grad_()
        for heads, rows in ((2, length), (shared, keys), (shared, keys))
    ]
    out = attend(*inputs, None, 5, "triton", dict(func_d="relu", training=False, **options))
    cotangent = torch.randn_like(out)
    grads = []
    for roomy in (backend.ROOMY, backend.ROOMY, ()):
        monkeypatch.setattr(backend, "ROOMY", roomy)
        started.clear()
        grads.append(torch.autograd.grad(out, inputs, cotangent, retain_graph=True))
        in_one_pass = shared == 2 and backend.capability(torch.device(DEVICE)) in roomy
        assert ("head_kernel" in started) == in_one_pass
    for one, again, two in zip(*grads, strict=True):
        assert torch.equal(one, again)
        torch.testing.assert_close(one, two, rtol=1e-2, atol=2e-3 * float(two.abs().max()))


@pytest.mark.drawn(cases=1)
@pytest.mark.parametrize("func", ["relu", "pfu dmedian"])
def test_the_attention_of_a_vision_transformer(func):
    dtype = next(NEXT_DTYPE)
    while not check(func, dtype, *(rounded((1, 1, 197, 64), dtype) for _ in range(3)), None):
        pass


@pytest.mark.drawn(cases=3)
@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("func", ["pfu constant", "relu", "pfu dmedian"])
def test_any_scale(func, scale):
    query, key, value = (rounded((1, 2, 33, 16), torch.float32) for _ in range(3))
    while not check(func, torch.float32, query, key, value, None, scale=scale):
        query = rounded(query.shape, torch.float32)


@pytest.mark.parametrize("mask_name", ["none", "causal", "empty rows"])
def test_softmax_n_forgetting_nothing(mask_name):
    query, key, value = (rounded((1, 2, 33, 16), torch.float32) for _ in range(3))
    mask = make_mask(mask_name, (1, 2, 33, 33), torch.float32)
    check("none", torch.float32, query, key, value, mask, causal=mask_name == "causal", n=1.0)


@pytest.mark.parametrize("level", [-200.0, 200.0])
@pytest.mark.parametrize("func", ["none", "pfu dmedian", "pfu constant, high bias"])
def test_softmax_n_of_very_high_and_very_low_scores(func, level):
    """A row without a key among others; the median NaN, which is no matter of a row that sees nothing."""
    n = pick([1e-38, 1.0, 1e38])
    query, key = (torch.randint(-4, 5, (1, 1, rows, 16)).double() / 4 for rows in (20, 24))
    query[..., 0], key[..., 0] = 1.0, level  # the scores are exact
    value, seen = torch.randn(1, 1, 24, 16).double(), torch.rand(20, 24) < 0.7
    seen[2] = False
    inputs = [t.to(DEVICE, torch.float32) for t in (query, key, value)]
    options = dict(func_d=FUNC_DS.get(func, NOTHING["none"])[0], training=False, scale=1.0, sep=f"softmax_n:n={n}")
    ours = lwpf_attention(*inputs, seen.to(DEVICE), backend="triton", **options).cpu()
    forgetting = {**FUNC_DS, **NOTHING}[func][1]
    wanted = oracle.attention(query, key, value, func_d=forgetting, attn_mask=seen, scale=1.0, n=n)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()) + 1e-35)
    inputs[0][0, 0, 0, 0] = math.nan
    ours = lwpf_attention(*inputs, seen.to(DEVICE), backend="triton", **options).cpu()
    assert not ours[0, 0, 2].any()
    assert ours[0, 0, 0].isnan().all()


@pytest.mark.parametrize("shapes", [((5, 16), (6, 16)), ((3, 5, 16), (3, 6, 16)), ((1, 2, 5, 16), (3, 1, 6, 16))])
def test_batch_dimensions(shapes):
    query, key = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    value = torch.randn(*shapes[1][:-1], 3, dtype=torch.float64, requires_grad=True)
    expected = oracle.attention(query, key, value, func_d=Forgetting("relu"))
    inputs = [t.detach().to(DEVICE, torch.float32).requires_grad_() for t in (query, key, value)]
    ours = lwpf_attention(*inputs, func_d="relu", backend="triton")
    assert ours.shape == expected.shape
    cotangent = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad(expected, [query, key, value], cotangent)]
    got = [ours, *torch.autograd.grad(ours, inputs, cotangent.to(ours))]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=0, atol=2e-5)


def test_strides_are_taken_as_they_are():
    """Heads between tokens and features, as in every vision transformer; and features that are not side by side."""
    packed = torch.randn(2, 9, 3, 4, 16, device=DEVICE, requires_grad=True)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    ours = lwpf_attention(query, key, value, func_d="relu", backend="triton")
    (grad,) = torch.autograd.grad(ours.square().sum(), packed)
    eager = lwpf_attention(query, key, value, func_d="relu", backend="eager")
    (wanted,) = torch.autograd.grad(eager.square().sum(), packed)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)
    assert ours.transpose(1, 2).is_contiguous()
    inputs = [t.detach().transpose(-2, -1).contiguous().transpose(-2, -1).requires_grad_() for t in packed.unbind(2)]
    results = []
    for which in ("triton", "eager"):
        out = lwpf_attention(*inputs, func_d="relu", backend=which)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_views_of_one_projection_are_not_copied():
    """As hosts make them, (B, L, 3, H, E) and then apart: only results are allocated, in both passes."""
    projected = torch.randn(2, 33, 3, 2, 16, device=DEVICE, requires_grad=True)
    query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
    allocated = []
    sizes = {"forward": lambda: lwpf_attention(query, key, value, func_d="relu", backend="triton")}
    out = sizes["forward"]()  # compiled and imported
    cotangent = torch.randn_like(out)
    sizes["backward"] = lambda: torch.autograd.grad(out, (query, key, value), cotangent)
    for compute in sizes.values():
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            compute()
        memory = [event.self_cpu_memory_usage for event in profile.events()]
        allocated.append(sum(size for size in memory if size > 0))
    rows = query[..., 0].numel() * 4
    small = 512  # counts, scalars
    assert allocated[0] <= out.nbytes + 2 * rows + small, allocated  # and the log-sum-exp and rho of each row
    assert allocated[1] <= 3 * query.nbytes + rows + small, allocated  # three gradients, and delta


def test_no_queries_and_no_keys():
    for length, keys in ((0, 5), (5, 0), (0, 0)):
        for func_d in ("relu", "pfu", "pfu:mu=0.1,bias=0"):
            query, key, value = (
                torch.randn(2, n, 16, device=DEVICE, requires_grad=True) for n in (length, keys, keys)
            )  # fmt: skip
            out = lwpf_attention(query, key, value, func_d=func_d, backend="triton")
            assert torch.equal(out, torch.zeros_like(query))
            for grad in torch.autograd.grad(out.sum(), [query, key, value]):
                assert torch.equal(grad, torch.zeros_like(grad))


def test_dropout_drops_as_often_as_it_says():
    query, key = torch.randn(1, 2, 60, 16, device=DEVICE), torch.randn(1, 2, 70, 16, device=DEVICE)
    unit = torch.eye(70, device=DEVICE).expand(1, 2, 70, 70)
    options = dict(func_d=PFU(mu=-INF, bias=0, sigma=0), training=False, dropout_p=0.3)
    kept, again, other = (attend(query, key, unit, None, seed, "triton", options) != 0 for seed in (5, 5, 6))
    assert abs(kept.double().mean() - 0.7) < 0.02
    assert torch.equal(kept, again)
    assert not torch.equal(kept, other)
    assert not torch.equal(kept[0, 0], kept[0, 1])
    assert not attend(query, key, unit, None, 5, "triton", options | {"dropout_p": 1.0}).any()


def test_a_nan_is_not_hidden():
    query, key, value = torch.randn(1, 5, 16), torch.randn(1, 6, 16), torch.randn(1, 6, 3)
    query[0, 2] = math.nan
    mask = torch.rand(5, 6) < 0.8
    mask[:, 0] = True
    for func_d in ("relu", "pfu", "pfu:mu=0.1", "pfu:mu=0.1,bias=0"):
        for attn_mask in (None, mask.to(DEVICE)):
            inputs = (t.to(DEVICE) for t in (query, key, value))
            out = lwpf_attention(*inputs, attn_mask, func_d=func_d, backend="triton")
            assert out[0, 2].isnan().all(), func_d
            if func_d == "pfu":  # the median is of all scores
                assert out.isnan().all()
            else:
                assert not out[0, [0, 1, 3, 4]].isnan().any()


# --- the median ---------------------------------------------------------------------------------------------------


def exact(shape: tuple[int, ...], spread: int) -> torch.Tensor:
    """Draws figures whose inner products, of 16 features, every dtype computes without rounding."""
    return torch.randint(-spread, spread + 1, shape).float() / 128


#: How the median is found: from all scores, in the bracket of a sample, and by the digits of all where that fails.
WAYS = {
    "collected": {},
    "sampled": {"COLLECT_ALL": 0, "LEAST_SAMPLED": 512},
    "missed": {"COLLECT_ALL": 0, "LEAST_SAMPLED": 128, "MARGIN": 0.0},
    "overflowing": {"MOST_COLLECTED": 4 * 128, "COLLECT_ALL": 0},
}


NEXT_SPREAD = dealt([128, 1, 0])


@pytest.mark.drawn(cases=6)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mask_name", ["none", "causal", "boolean", "additive"])
def test_the_median_is_exact(mask_name, way, monkeypatch):
    """Value and number of equal scores: few of them, many, and all."""
    spread = next(NEXT_SPREAD)
    for name, setting in WAYS[way].items():
        monkeypatch.setattr(triton_median, name, setting)
    dtype = pick(DTYPES)
    batch, heads, length, keys = pick([1, 2]), pick([1, 2]), number(1, 60), number(1, 60)
    query = exact((batch, heads, length, 16), spread).to(DEVICE, dtype)
    key = exact((batch, heads, keys, 16), spread).to(DEVICE, dtype)
    scores, mask = query.double() @ key.double().transpose(-2, -1), None
    if mask_name == "boolean":
        mask = torch.rand(1, 1, length, keys, device=DEVICE) < 0.6
        scores = scores[mask.expand_as(scores)]
    elif mask_name == "additive":
        mask = torch.randn(1, heads, length, keys, device=DEVICE).round()
        mask = mask.masked_fill(torch.rand(mask.shape, device=DEVICE) < 0.3, -INF)
        scores = (scores + mask)[(mask > -INF).expand_as(scores)]
    elif mask_name == "causal":
        scores = scores[torch.ones_like(scores, dtype=torch.bool).tril()]
    *_, median, ties = torch.ops.lwpf_patch.triton_attention(
        query, key, key, mask, 0.0, mask_name == "causal", 1.0, None, None, 0.0, None, None
    )
    if scores.numel() == 0:
        assert float(median) == 0
        return
    expected = scores.flatten().sort().values[(scores.numel() - 1) // 2]
    assert float(median) == float(expected)
    assert math.copysign(1, float(median)) == 1 or float(median) != 0  # -0 is 0
    assert int(ties) == int((scores == expected).sum())


def test_room_for_what_is_collected():
    """Where all scores are, each part has room for those of its programs; and there is little more than is wanted."""
    parts, rows = triton_median.PARTS.value, 64
    for heads, length, count in ((1, 1, 1 << 20), (1000, 1, 1000), (300, 50, 60), (12, 197, 197), (1, 1000, 1000)):
        samples, programs, room = triton_median.extent(heads, length, count, rows)
        assert samples == 0
        held = [0] * parts
        for tile in range(heads * -(-length // rows)):
            first = tile % -(-length // rows) * rows
            held[tile % programs % parts] += min(rows, length - first) * count
        assert max(held) <= room
        assert min(programs, parts) * room <= 4 * heads * length * count
    for heads, length, count in ((3072, 197, 197), (96, 4096, 4096), (100_000, 1, 5000)):
        samples, programs, room = triton_median.extent(heads, length, count, rows)
        assert samples > 0
        assert min(programs, parts) * room <= heads * length * count / 8


@pytest.mark.drawn(cases=2)
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_a_median_with_many_ties(way, monkeypatch):
    for name, setting in WAYS[way].items():
        monkeypatch.setattr(triton_median, name, setting)
    query, key, value = (torch.randint(-1, 2, (1, 2, 30, 16)).double().requires_grad_() for _ in range(3))
    mask = torch.rand(30, 30) < 0.8 if pick([False, True]) else None
    expected = oracle.attention(
        query, key, value, func_d=Forgetting("pfu", "dmedian", "mu"), attn_mask=mask, scale=0.25
    )  # fmt: skip
    inputs = [t.detach().to(DEVICE, torch.float32).requires_grad_() for t in (query, key, value)]
    placed = None if mask is None else mask.to(DEVICE)
    ours = lwpf_attention(*inputs, placed, func_d=PFU(sigma=0), scale=0.25, training=False, backend="triton")
    cotangent = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad(expected, [query, key, value], cotangent)]
    got = [ours, *torch.autograd.grad(ours, inputs, cotangent.to(ours))]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=0, atol=1e-5 * float(other.detach().abs().max()))


# --- how it is exposed --------------------------------------------------------------------------------------------


@pytest.mark.drawn(days=4)
@pytest.mark.parametrize(("dropout_p", "mu", "bias"), [(0.0, 0.0, 0.0), (0.3, None, None)])
def test_opcheck(dropout_p, mu, bias):
    """With a mask that has a gradient, and with one that has none."""
    query, key, value = (torch.randn(1, 2, 9, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    seed = torch.tensor(3, device=DEVICE) if dropout_p else None
    eps = None if mu == 0 else torch.tensor(0.1, device=DEVICE)
    mask = torch.randn(1, 1, 9, 9, device=DEVICE, requires_grad=True)
    mask, n = (mask, 0.6) if dropout_p else (mask > 0, 0.0)
    arguments = (query, key, value, mask, dropout_p, False, 0.25, mu, bias, n, eps, seed)
    torch.library.opcheck(torch.ops.lwpf_patch.triton_attention, arguments)


@pytest.mark.drawn(days=4)
@pytest.mark.parametrize(("func_d", "dynamic"), [("pfu", True), (PFU(mu=0.1, bias=0.0), False)], ids=str)
def test_compiled_without_graph_breaks(func_d, dynamic):
    def attend(query, key, value, mask):
        return lwpf_attention(query, key, value, mask, func_d=func_d, training=False, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(
        attend, fullgraph=True, dynamic=dynamic, backend="aot_eager" if INTERPRETED else "inductor"
    )
    for length in (5, 9):
        packed = torch.randn(2, length, 3, 2, 16, device=DEVICE, requires_grad=True)
        mask = torch.rand(length, length, device=DEVICE) < 0.8
        one, two = (f(*packed.permute(2, 0, 3, 1, 4).unbind(0), mask) for f in (compiled, attend))
        assert one.stride() == two.stride()
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), packed)[0] for out in (one, two)))


@pytest.mark.drawn(days=3)
def test_training_with_noise_and_dropout_compiles():
    module = HostFuncD(PFU(sigma=0.5), "", backend="triton")
    compiled = torch.compile(
        lambda q: module.scaled_dot_product_attention(q, q, q, dropout_p=0.2), fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    query = torch.randn(1, 2, 9, 16, device=DEVICE, requires_grad=True)
    out = compiled(query)
    (grad,) = torch.autograd.grad(out.square().sum(), query)
    assert torch.isfinite(grad).all()
    assert not torch.equal(out, compiled(query))


@pytest.mark.parametrize(
    ("func_d", "sep"),
    [("relu", "softmax"), ("pfu:mu=0.1,bias=-0.2,sigma=0", "softmax_n:n=2"), ("pfu:sigma=0.5", "softmax")],
)
def test_second_derivatives(func_d, sep):
    """With noise too: the one that the first pass drew."""
    tensors = [torch.randn(2, 3, 16, device=DEVICE, requires_grad=True) for _ in range(3)]

    def derivatives(backend):
        torch.manual_seed(3)
        out = lwpf_attention(*tensors, func_d=func_d, sep=sep, training=True, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)

    for ours, expected in zip(derivatives("triton"), derivatives("eager"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_second_derivatives_keep_the_dropout_mask_of_the_forward_pass():
    tensors = [torch.randn(2, 5, 16, device=DEVICE) for _ in range(3)]
    directions = [torch.randn_like(tensor) for tensor in tensors]

    def gradients(step, **options):
        moved = [(t + step * d).requires_grad_() for t, d in zip(tensors, directions, strict=True)]
        torch.manual_seed(0)  # the same mask in every call
        # Keeps all scores, so that none crosses the threshold in between.
        out = lwpf_attention(*moved, dropout_p=0.5, func_d="pfu:mu=-50,bias=-50,sigma=0", backend="triton")
        return moved, torch.autograd.grad(out.square().sum(), moved, **options)

    moved, grads = gradients(0.0, create_graph=True)
    products = sum((grad * d).sum() for grad, d in zip(grads, directions, strict=True))
    ours = torch.autograd.grad(products, moved)
    for got, above, below in zip(ours, gradients(0.01)[1], gradients(-0.01)[1], strict=True):
        torch.testing.assert_close(got, (above - below) / 0.02, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(func_d=lambda s: (s, s > 0)), "is not of the form s > a"),
        (dict(func_d="relu:empty_rows=keep"), "empty_rows='keep' needs a row's scores together"),
        (dict(func_d="relu", masking="paper"), "masking 'paper' is computed as the official code does it"),
        (dict(func_d="relu", dtype=torch.float64), "it does not compute in torch.float64"),
        (dict(func_d="relu", width=257), "it holds up to 256 features per head, not 257"),
    ],
)
def test_what_it_cannot_do(options, reason):
    dtype, width = options.pop("dtype", torch.float32), options.pop("width", 16)
    query, key, value = (torch.randn(n, w, device=DEVICE, dtype=dtype) for n, w in ((5, 16), (6, 16), (6, width)))
    with pytest.raises(lwpf_patch.SettingsError, match=f"backend 'triton' cannot do what is asked: .*{reason}"):
        lwpf_attention(query, key, value, backend="triton", **options)
    eager = lwpf_attention(query, key, value, backend="eager", **options)
    assert torch.equal(lwpf_attention(query, key, value, **options), eager)


# Of what SDPA computes: what has few scores, and what the arguments are changed for. The interpreter is slow.
FEW = [name for name in sdpa_inputs.COMPUTED if name.startswith(("no ", "an empty"))]
FEW += ["shared keys and values, of other numbers", "a mask over queries", "a scale in a tensor"]


@pytest.mark.drawn(cases=6)
@pytest.mark.skipif(not INTERPRETED, reason="the calls are on the CPU")
@pytest.mark.parametrize("case", FEW)
def test_what_sdpa_computes_is_computed(case):
    sdpa_inputs.check_computed(sdpa_inputs.COMPUTED[case], "triton", func_ds=())


@pytest.mark.skipif(not INTERPRETED, reason="the calls are on the CPU")
def test_scores_that_overflow_are_computed():
    sdpa_inputs.check_overflowing(sdpa_inputs.OVERFLOWING["scale 1e+300"], "triton")


@pytest.mark.skipif(not INTERPRETED, reason="the calls are on the CPU")
@pytest.mark.parametrize("case", sdpa_inputs.REFUSED)
def test_what_sdpa_refuses_is_refused(case):
    sdpa_inputs.check_refused(sdpa_inputs.REFUSED[case], "triton")


def test_the_oldest_graphics_processor_that_it_runs_on(monkeypatch):
    why_not_on = backend._why_not_on_device.__wrapped__
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert why_not_on("cpu", None) == "the tensors are on cpu"
    assert "of capability 7.5, and 8.0 is needed" in why_not_on("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    assert why_not_on("cuda", 0) is None
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert why_not_on("cuda", 0) == "Triton is not installed"
