"""The operator against the oracle, in float64: output and every gradient to 1e-12."""

from __future__ import annotations

import contextlib
import itertools

import oracle
import pytest
import sdpa_inputs
import torch
from oracle import Forgetting
from torch.nn import functional as F

import lwpf_patch
from lwpf_patch import PFU, NoForgetting, ReLU, backends, lwpf_attention, transforms
from lwpf_patch.attention import HostFuncD
from lwpf_patch.backends import cpu, cpu_median, cpu_native, cpu_scores, eager_form, operators
from lwpf_patch.specs import parse_sep

INF = float("inf")

FUNC_DS = {
    "relu": (ReLU(), Forgetting("relu")),
    "pfu constant": (PFU(mu=0.1, bias=-0.3, sigma=0), Forgetting("pfu", 0.1, -0.3)),
    "pfu constant, bias mu": (PFU(mu=-0.2, bias="mu", sigma=0), Forgetting("pfu", -0.2, "mu")),
    "pfu dmedian": (PFU(), Forgetting("pfu", "dmedian", "mu")),
    "pfu dmedian, bias constant": (PFU(mu="dmedian", bias=0.25), Forgetting("pfu", "dmedian", 0.25)),
}


@pytest.fixture(params=["eager", "cpu, native", "cpu, by tiles"])
def backend(request, monkeypatch):
    """Every backend; both ways of the CPU's, with tiles so small that there are many."""
    name, *way = request.param.split(", ")
    if way:
        take(way[0], monkeypatch)
    return name


@pytest.fixture(params=["native", "by tiles"])
def way(request, monkeypatch):
    """Both ways of the CPU's backend."""
    take(request.param, monkeypatch)
    return request.param


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the CPU's backend compute in one of its ways."""
    if way == "native" and cpu_native.why_not() is not None:
        pytest.skip(cpu_native.why_not())
    monkeypatch.setattr(cpu, "_native_is_there", lambda: way == "native")
    monkeypatch.setattr(cpu_scores, "TILE", 64)
    monkeypatch.setattr(cpu_scores, "ROWS", 2)


def _padding(shape):
    mask = torch.ones(shape[0], *(1 for _ in shape[1:-1]), shape[-1], dtype=torch.bool)
    mask[0, ..., -2:] = False
    return mask


def _some_rows_empty(shape):
    mask = torch.rand(shape) < 0.7
    mask[..., 0, :] = False
    return mask


def _additive(shape, hidden):
    bias = torch.randn(shape, dtype=torch.float64)
    if hidden is not None:
        bias = bias.masked_fill(torch.rand(shape) < 0.3, hidden)
    return bias.requires_grad_()


MASKS = {
    "none": lambda shape: None,
    "boolean": lambda shape: torch.rand(shape) < 0.7,
    "padding": _padding,
    "empty rows": _some_rows_empty,
    "additive": lambda shape: _additive(shape[-2:], None),
    "additive with -inf": lambda shape: _additive(shape, -INF),
    "additive with finfo.min": lambda shape: _additive(shape, torch.finfo(torch.float64).min),
}


def compare(ours: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Compares an output and the gradients of all inputs under a random cotangent."""
    assert ours.shape == expected.shape
    oracle.assert_equal(ours, expected)
    cotangent = torch.randn_like(expected)
    got = torch.autograd.grad(ours, inputs, cotangent)
    # Where every score is forgotten, no query has a part in the oracle's output.
    wanted = torch.autograd.grad(expected, inputs, cotangent, materialize_grads=True)
    for ours_grad, oracle_grad in zip(got, wanted, strict=True):
        oracle.assert_equal(ours_grad, oracle_grad)


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def dropout_mask(query, key, mask, p, options) -> torch.Tensor:
    """Reads which weights a call keeps, off its outputs for the unit vectors as values."""
    unit = torch.eye(key.shape[-2], dtype=torch.float64).expand(*key.shape[:-1], key.shape[-2])
    seed = torch.initial_seed()
    kept = lwpf_attention(query, key, unit, mask, p, **options)
    torch.manual_seed(seed)
    return (kept != 0) | (lwpf_attention(query, key, unit, mask, **options) == 0)


@pytest.mark.drawn(cases=100)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("name", FUNC_DS)
def test_exclude_equals_the_oracle(name, mask_name, dropout_p, backend):
    func_d, forgetting = FUNC_DS[name]
    shape = (2, 3, 5, 6)
    query, key, value = tensors((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7))
    mask = MASKS[mask_name](shape)
    inputs = [query, key, value, *([mask] if mask is not None and mask.requires_grad else [])]
    options = dict(func_d=func_d, training=False, backend=backend)
    torch.manual_seed(int(torch.randint(2**31, ())))
    keep = dropout_mask(query, key, mask, dropout_p, options) if dropout_p else None
    torch.manual_seed(torch.initial_seed())
    ours = lwpf_attention(query, key, value, mask, dropout_p, **options)
    sentinel = torch.finfo(torch.float64).min / 2
    expected = oracle.attention(
        query, key, value, func_d=forgetting, attn_mask=mask, dropout_keep=keep, dropout_p=dropout_p,
        excluded_below=sentinel,
    )  # fmt: skip
    compare(ours, expected, inputs)


def test_dropout_drops_as_often_as_it_says(backend):
    query, key = torch.randn(4, 60, 4, dtype=torch.float64), torch.randn(4, 70, 4, dtype=torch.float64)
    options = dict(func_d=PFU(mu=-INF, bias=0, sigma=0), training=False, backend=backend)
    torch.manual_seed(5)
    kept = dropout_mask(query, key, None, 0.3, options)
    assert abs(kept.double().mean() - 0.7) < 0.02
    assert not torch.equal(kept[0], kept[1])
    torch.manual_seed(5)
    assert torch.equal(kept, dropout_mask(query, key, None, 0.3, options))


@pytest.mark.parametrize("name", FUNC_DS)
@pytest.mark.parametrize(
    ("query_shape", "key_shape"),
    [
        ((5, 4), (6, 4)),
        ((3, 5, 4), (3, 6, 4)),
        ((1, 2, 5, 4), (3, 1, 6, 4)),
        ((7, 8), (7, 8)),
        ((4, 1, 4), (4, 9, 4)),
    ],
)
def test_shapes_scale_and_causality(name, query_shape, key_shape, backend):
    func_d, forgetting = FUNC_DS[name]
    query, key, value = tensors(query_shape, key_shape, (*key_shape[:-1], 3))
    for scale, is_causal in itertools.product((None, 1.7), (False, True)):
        options = dict(func_d=func_d, training=False, backend=backend)
        ours = lwpf_attention(query, key, value, is_causal=is_causal, scale=scale, **options)
        expected = oracle.attention(query, key, value, func_d=forgetting, is_causal=is_causal, scale=scale)
        compare(ours, expected, [query, key, value])


@pytest.mark.parametrize("name", [name for name in FUNC_DS if name.startswith("pfu")])
@pytest.mark.parametrize(("masking", "backend"), [("exclude", "eager"), ("exclude", "cpu"), ("paper", "eager")])
def test_the_noise_of_training(name, masking, backend):
    _, forgetting = FUNC_DS[name]
    func_d = PFU(mu=forgetting.mu, bias=forgetting.bias, sigma=0.9)
    query, key, value = tensors((2, 5, 4), (2, 6, 4), (2, 6, 3))
    torch.manual_seed(5)
    ours = lwpf_attention(query, key, value, func_d=func_d, training=True, masking=masking, backend=backend)
    torch.manual_seed(5)
    eps = float(torch.randn(1) * 0.9**2)
    noisy = Forgetting("pfu", forgetting.mu, forgetting.bias, eps)
    expected = oracle.attention(query, key, value, func_d=noisy)
    if masking == "paper":  # the official draw is float32, and makes the threshold so
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    else:
        compare(ours, expected, [query, key, value])
    quiet = lwpf_attention(query, key, value, func_d=func_d.eval())
    assert torch.equal(quiet, lwpf_attention(query, key, value, func_d=func_d, training=False))


@pytest.mark.parametrize("mask_name", ["none", "boolean", "padding", "additive", "additive with -inf"])
@pytest.mark.parametrize("name", FUNC_DS)
def test_paper_masking_equals_the_oracle(name, mask_name):
    func_d, forgetting = FUNC_DS[name]
    query, key, value = tensors((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7))
    mask = MASKS[mask_name]((2, 3, 5, 6))
    ours = lwpf_attention(query, key, value, mask, func_d=func_d, training=False, masking="paper")
    expected = oracle.attention(query, key, value, func_d=forgetting, attn_mask=mask, masking="paper")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12, equal_nan=True)
    if not ours.isnan().any():
        compare(ours, expected, [query, key, value])


def test_padding_in_the_official_recipe_and_in_ours():
    """Hidden keys change the official output and never ours."""
    query, key, value = tensors((2, 5, 4), (2, 6, 4), (2, 6, 3))
    longer = [torch.cat([t, torch.randn_like(t)], dim=1) for t in (key, value)]
    mask = torch.arange(12) < 6
    for func_d in ("relu", "pfu:mu=0.1,bias=0", "pfu"):
        short = lwpf_attention(query, key, value, func_d=func_d)
        padded = lwpf_attention(query, *longer, mask, func_d=func_d)
        torch.testing.assert_close(padded, short, rtol=0, atol=1e-12)
    leaking = lwpf_attention(query, *longer, mask, func_d="relu", masking="paper")
    plain = lwpf_attention(query, key, value, func_d="relu")
    assert (leaking - plain).norm() > 0.1 * plain.norm()


def test_a_median_with_ties_shares_its_gradient():
    scores = torch.tensor([[2.0, 1.0, 1.0, 3.0], [0.0, 1.0, 5.0, -INF]], dtype=torch.float64, requires_grad=True)
    forgotten, mask = PFU(sigma=0)(scores)
    assert mask.tolist() == [[True, False, False, True], [False, False, True, False]]
    # The median of the seven is 1, and three of them are 1; forgotten are those and the 0.
    (gradient,) = torch.autograd.grad(forgotten[:, :3].sum() + forgotten[0, 3], scores)
    third = 4 / 3
    expected = torch.tensor([[1, third, third, 1], [0, third, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNC_DS)
def test_half_precision_is_computed_in_float32(name, dtype, backend):
    func_d, _ = FUNC_DS[name]
    query, key, value = (t.detach().to(dtype) for t in tensors((2, 3, 17, 8), (2, 3, 17, 8), (2, 3, 17, 8)))
    hidden = torch.zeros(17, 17, dtype=dtype).masked_fill(torch.rand(17, 17) < 0.3, torch.finfo(dtype).min)
    for mask in (None, hidden, hidden == 0):
        options = dict(func_d=func_d, training=False, backend=backend)
        half = lwpf_attention(query, key, value, mask, **options)
        wide = None if mask is None else (mask if mask.dtype == torch.bool else mask == 0)
        single = lwpf_attention(query.float(), key.float(), value.float(), wide, **options)
        assert half.dtype == dtype
        unit = torch.finfo(dtype).eps  # rounding once more, of figures that an additive mask may round otherwise
        torch.testing.assert_close(half, single.to(dtype), rtol=unit, atol=1e-6)


def test_autocast_casts_as_it_does_for_sdpa():
    query, key, value = (t.detach().float() for t in tensors((2, 9, 8), (2, 9, 8), (2, 9, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lwpf_attention(query, key, value, func_d="relu")
        assert out.dtype == F.scaled_dot_product_attention(query, key, value).dtype == torch.bfloat16
    expected = lwpf_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), func_d="relu")
    assert torch.equal(out, expected)


def test_grouped_queries(backend):
    query, key, value = tensors((2, 6, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4))
    ours = lwpf_attention(query, key, value, func_d="relu", enable_gqa=True, backend=backend)
    repeated = [t.repeat_interleave(2, dim=1) for t in (key, value)]
    compare(ours, oracle.attention(query, *repeated, func_d=Forgetting("relu")), [query, key, value])


@pytest.mark.parametrize("mask_name", MASKS)
def test_forgetting_nothing_is_softmax_attention_bit_for_bit(mask_name):
    query, key, value = (t.detach().float() for t in tensors((2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8)))
    mask = MASKS[mask_name]((2, 3, 9, 9))
    scores = (query * 8**-0.5) @ key.transpose(-2, -1)
    if mask is not None:
        mask = mask.detach() if mask.dtype == torch.bool else mask.detach().float()
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
    eager = scores.softmax(-1).nan_to_num(0) @ value
    everything = PFU(mu=-INF, bias=0, sigma=0)
    assert torch.equal(lwpf_attention(query, key, value, mask, func_d=everything, backend="eager"), eager)
    plain = F.scaled_dot_product_attention(query, key, value, mask)
    assert torch.equal(lwpf_attention(query, key, value, mask, func_d="none"), plain)


@pytest.mark.drawn(cases=30)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("name", [*FUNC_DS, "none"])
@pytest.mark.parametrize(("sep", "alpha"), [("sparsemax", 2.0), ("entmax15", 1.5), (1.25, 1.25)])
def test_other_normalisations_equal_the_oracle(name, mask_name, dropout_p, sep, alpha):
    pytest.importorskip("entmax")
    func_d, forgetting = (NoForgetting(), Forgetting("none")) if name == "none" else FUNC_DS[name]
    query, key, value = tensors((2, 3, 5, 4), (2, 1, 6, 4), (2, 3, 6, 7))
    mask = MASKS[mask_name]((2, 3, 5, 6))
    inputs = [query, key, value, *([mask] if mask is not None and mask.requires_grad else [])]
    options = dict(func_d=func_d, training=False, sep=sep)
    torch.manual_seed(int(torch.randint(2**31, ())))
    keep = dropout_mask(query, key.expand(2, 3, 6, 4), mask, dropout_p, options) if dropout_p else None
    torch.manual_seed(torch.initial_seed())
    ours = lwpf_attention(query, key, value, mask, dropout_p, **options)
    expected = oracle.attention(
        query, key, value, func_d=forgetting, attn_mask=mask, dropout_keep=keep, dropout_p=dropout_p,
        excluded_below=torch.finfo(torch.float64).min / 2, alpha=alpha,
    )  # fmt: skip
    compare(ours, expected, inputs)


@pytest.mark.drawn(cases=60)
@pytest.mark.parametrize("mask_name", [*MASKS, "causal"])
@pytest.mark.parametrize("name", [*FUNC_DS, "none"])
def test_softmax_n_equals_the_oracle(name, mask_name, backend):
    """With n, dropout and the number of heads drawn."""
    func_d, forgetting = (NoForgetting(), Forgetting("none")) if name == "none" else FUNC_DS[name]
    n, dropout_p, heads = (drawn[int(torch.randint(2, ()))] for drawn in ((1.0, 40.0), (0.0, 0.4), (1, 2)))
    query, key, value = tensors((2, 2, 5, 4), (2, heads, 6, 4), (2, heads, 6, 3))
    causal = mask_name == "causal"
    mask = None if causal else MASKS[mask_name]((2, 2, 5, 6))
    inputs = [query, key, value, *([mask] if mask is not None and mask.requires_grad else [])]
    options = dict(func_d=func_d, training=False, backend=backend, is_causal=causal, enable_gqa=heads == 1)
    options["sep"] = "softmax_n" if n == 1 else f"softmax_n:n={n}"
    torch.manual_seed(int(torch.randint(2**31, ())))
    keep = dropout_mask(query, key, mask, dropout_p, options) if dropout_p else None
    torch.manual_seed(torch.initial_seed())
    ours = lwpf_attention(query, key, value, mask, dropout_p, **options)
    expected = oracle.attention(
        query, key, value, func_d=forgetting, attn_mask=mask, is_causal=causal, dropout_keep=keep, dropout_p=dropout_p,
        excluded_below=torch.finfo(torch.float64).min / 2, n=n,
    )  # fmt: skip
    compare(ours, expected, inputs)


@pytest.mark.parametrize("level", [-200.0, -85.0, -50.0, 0.0, 50.0, 85.0, 200.0])
@pytest.mark.parametrize("name", ["relu", "pfu", "none"])
def test_softmax_n_of_very_high_and_very_low_scores(name, level, backend):
    """In float32, where no exponential of such scores fits; and a row without a key."""
    n = (1e-38, 1e-30, 1.0, 1e30, 1e38)[int(torch.randint(5, ()))]
    query, key, value = torch.randint(-4, 5, (2, 5, 3)) / 4, torch.randint(-4, 5, (2, 6, 3)) / 4, torch.randn(2, 6, 3)
    query[..., 0], key[..., 0] = 1.0, level  # the scores are exact
    seen = torch.rand(2, 5, 6) < 0.7
    seen[:, 2] = False
    cotangent, results = torch.randn(2, 5, 3), []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        if dtype == torch.float32:
            out = lwpf_attention(*inputs, seen, func_d=name, scale=1.0, backend=backend, sep=f"softmax_n:n={n}")
        else:
            out = oracle.attention(*inputs, func_d=Forgetting(name), attn_mask=seen, scale=1.0, n=n)
        results.append([out, *torch.autograd.grad(out, inputs, cotangent.to(dtype), materialize_grads=True)])
    assert not results[0][0][:, 2].any()
    for got, wanted in zip(*results, strict=True):
        # The gradient of a query is a sum of keys as large as the level, which cancel.
        allowed = 2e-6 * (10 + abs(level)) * float(wanted.detach().abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=allowed + 1e-33)


def test_softmax_n_chooses_the_backend(monkeypatch):
    query = torch.randn(5, 4)
    monkeypatch.setattr(cpu, "MANY_SCORES", 0)
    for func_d in (ReLU(), NoForgetting()):
        call = backends.Call(query, query, query, func_d, sep=parse_sep("softmax_n"))
        assert backends.choose("auto", call)[0].name == backends.choose("cpu", call)[0].name == "cpu"
        assert backends.choose("eager", call)[0].name == "eager"
        with pytest.raises(lwpf_patch.SettingsError, match="backend 'plain' cannot"):
            backends.choose("plain", call)
        softmax = lwpf_attention(query, query, query, func_d=func_d, sep="softmax_n:n=0")
        assert torch.equal(softmax, lwpf_attention(query, query, query, func_d=func_d))


def test_a_normalisation_chooses_the_backend(monkeypatch):
    pytest.importorskip("entmax")
    query, key, value = torch.randn(5, 4), torch.randn(6, 4), torch.randn(6, 3)
    monkeypatch.setattr(cpu, "MANY_SCORES", 0)
    for func_d in ("relu", NoForgetting()):
        automatic = lwpf_attention(query, key, value, func_d=func_d, sep="sparsemax")
        eager = lwpf_attention(query, key, value, func_d=func_d, sep="sparsemax", backend="eager")
        assert torch.equal(automatic, eager)
        assert not torch.equal(eager, lwpf_attention(query, key, value, func_d=func_d, backend="eager"))
        with pytest.raises(lwpf_patch.SettingsError, match=r"backend 'cpu' cannot .*: sep other than 'softmax' and 's"):
            lwpf_attention(query, key, value, func_d=func_d, sep="sparsemax", backend="cpu")
        for name in ("softmax", 1):
            plain = lwpf_attention(query, key, value, func_d=func_d)
            assert torch.equal(plain, lwpf_attention(query, key, value, func_d=func_d, sep=name))


@pytest.mark.drawn(cases=2)
@pytest.mark.parametrize("sep", ["sparsemax", "entmax15", 1.3, "softmax_n", "softmax_n:n=0.3"])
def test_other_normalisations_compile_without_graph_breaks(sep):
    pytest.importorskip("entmax")

    def attend(query, key, value, mask):
        return lwpf_attention(query, key, value, mask, func_d="relu", sep=sep)

    torch._dynamo.reset()
    query, key, value = tensors((2, 5, 4), (2, 6, 4), (2, 6, 3))
    mask = torch.rand(5, 6) < 0.7
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    compare(compiled(query, key, value, mask), attend(query, key, value, mask), [query, key, value])


class _WithSoftmaxN(torch.nn.Module):
    def forward(self, query, key, value):
        return lwpf_attention(query, key, value, func_d="relu", sep="softmax_n:n=0.5")


def _for_softmax_n(batch):
    arguments = tuple(torch.randn(batch, rows, 4) for rows in (5, 6, 6))
    return arguments, oracle.attention(*(x.double() for x in arguments), func_d=Forgetting("relu"), n=0.5)


def test_softmax_n_is_exported():
    """With torch.export, and as torch.jit.script reads it."""
    batch, (example, _), (arguments, wanted) = torch.export.Dim("batch"), _for_softmax_n(3), _for_softmax_n(4)
    exported = torch.export.export(_WithSoftmaxN(), example, dynamic_shapes=({0: batch},) * 3, strict=True)
    torch.testing.assert_close(exported.module()(*arguments).double(), wanted, rtol=0, atol=1e-5)
    script = torch.jit.script(eager_form.retrieve)
    scores = (arguments[0] / 2) @ arguments[1].mT
    out = script(scores.relu(), scores > 0, arguments[2], 0.0, 1.0, 0.5)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.drawn(days=3)
@pytest.mark.skipif(torch.__version__ < (2, 10), reason="PyTorch's exporter before 2.10 fails with today's onnx_ir")
def test_softmax_n_in_onnx():
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    batch, (example, _), (arguments, wanted) = torch.export.Dim("batch"), _for_softmax_n(3), _for_softmax_n(4)
    made = torch.onnx.export(_WithSoftmaxN(), example, dynamic_shapes=({0: batch},) * 3, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {x.name: t.numpy() for x, t in zip(session.get_inputs(), arguments, strict=True)})
    torch.testing.assert_close(torch.from_numpy(out).double(), wanted, rtol=0, atol=1e-5)


def test_other_normalisations_under_autocast_and_in_half_precision():
    pytest.importorskip("entmax")
    query, key, value = (t.detach().float() for t in tensors((2, 9, 8), (2, 9, 8), (2, 9, 8)))
    halves = [t.bfloat16() for t in (query, key, value)]
    for options in ({"sep": "sparsemax"}, {"sep": "softmax_n"}, {"sep": "softmax_n", "backend": "cpu"}):
        half = lwpf_attention(*halves, func_d="relu", **options)
        assert torch.equal(half, lwpf_attention(*(t.float() for t in halves), func_d="relu", **options).bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(lwpf_attention(query, key, value, func_d="relu", **options), half)


def test_a_nan_is_not_hidden(backend):
    query, key, value = (t.detach() for t in tensors((1, 5, 4), (1, 6, 4), (1, 6, 3)))
    query[0, 2] = float("nan")
    mask = torch.rand(5, 6) < 0.8
    mask[:, 0] = True
    for func_d, attn_mask in itertools.product(("relu", "pfu", "pfu:mu=0.1"), (None, mask)):
        out = lwpf_attention(query, key, value, attn_mask, func_d=func_d, backend=backend)
        assert out[0, 2].isnan().all(), func_d


@pytest.mark.parametrize("masked", ["no", "empty rows", "additive", "causal"])
@pytest.mark.parametrize("func_d", ["pfu", "pfu:bias=0.25", "pfu:empty_rows=keep"])
@pytest.mark.parametrize("wrong", ["one nan", "a nan in a mask", "all nan", "all inf", "nearly all inf"])
def test_a_median_that_is_no_number_makes_everything_nan(wrong, func_d, masked, backend):
    query, key, value = (t.abs().detach().requires_grad_() for t in tensors((2, 5, 4), (2, 6, 4), (2, 6, 3)))
    mask = {"empty rows": torch.arange(5)[:, None].expand(5, 6) != 2, "additive": torch.randn(5, 6).double()}.get(
        masked
    )
    if wrong == "a nan in a mask":
        mask = torch.zeros(5, 6, dtype=torch.float64)
        mask[0, 0] = torch.nan
        masked = "additive"
    with torch.no_grad():
        if wrong == "one nan":
            query[0, 1, 0] = torch.nan
            key[0, 1:] *= 0.5  # so that ties do not matter
        elif wrong.startswith("all"):
            query[:] = float(wrong.split()[1])
        elif wrong != "a nan in a mask":
            query[:, 1:] = INF
    backend = "eager" if "keep" in func_d else backend
    out = lwpf_attention(query, key, value, mask, func_d=func_d, is_causal=masked == "causal", backend=backend)
    empty = torch.zeros(5, dtype=torch.bool)
    if masked == "empty rows":
        empty[2] = True
        assert torch.equal(out[:, empty], torch.zeros(2, 1, 3).double())  # there is nothing to forget
    if "nan" in wrong or func_d == "pfu":
        assert out[:, ~empty].isnan().all()
        (grad,) = torch.autograd.grad(out.sum(), value)
        assert grad[:, : 5 if masked == "causal" else 6].isnan().all()  # the last key is seen by no query then
    elif "bias" in func_d:
        assert not out.any()  # all is forgotten, and becomes 0.25


@pytest.mark.parametrize("mask_name", ["none", "boolean", "empty rows", "additive with -inf"])
@pytest.mark.parametrize("name", ["relu", "pfu:mu=0.1,bias=-0.2,sigma=0"])
def test_rows_that_would_forget_everything_can_forget_nothing(name, mask_name):
    forgetting = Forgetting("relu") if name == "relu" else Forgetting("pfu", 0.1, -0.2)
    query, key, value = tensors((2, 9, 4), (2, 6, 4), (2, 6, 3))
    with torch.no_grad():  # whole rows below the threshold, others not
        key.abs_()
        query[:, ::2] = -query[:, ::2].abs()
    mask = MASKS[mask_name]((2, 9, 6))
    empty = name.replace(":", ":empty_rows=keep,") if ":" in name else f"{name}:empty_rows=keep"
    ours = lwpf_attention(query, key, value, mask, func_d=empty)
    some = oracle.attention(query, key, value, func_d=forgetting, attn_mask=mask)
    none = oracle.attention(query, key, value, func_d=Forgetting("none"), attn_mask=mask)
    kept = oracle.attention(query, key, torch.ones_like(value), func_d=forgetting, attn_mask=mask) > 0
    assert kept.any()
    assert not kept.all()
    compare(ours, torch.where(kept, some, none), [query, key, value])


def test_a_func_d_of_ones_own():
    def soft(scores):
        return scores.clamp(min=0.5), scores > 0.5

    query, key, value = tensors((2, 5, 4), (2, 6, 4), (2, 6, 3))
    mask = torch.rand(5, 6) < 0.7
    ours = lwpf_attention(query, key, value, mask, func_d=soft)
    expected = oracle.attention(query, key, value, func_d=Forgetting("pfu", 0.5, 0.5), attn_mask=mask)
    compare(ours, expected, [query, key, value])
    with pytest.raises(RuntimeError, match=r"must return \(D\(s\), D'\(s\)\).*\[2, 5\]"):
        lwpf_attention(query, key, value, func_d=lambda scores: (scores, scores.sum(-1)))


def test_a_registered_func_d():
    class Shift(torch.nn.Module):
        def __init__(self, by: float, kind: str = "plain") -> None:
            super().__init__()
            self.by, self.kind = by, kind

        def forward(self, scores):
            return (scores - self.by).relu(), scores > self.by

    lwpf_patch.register_func_d("shift", Shift)
    lwpf_patch.register_func_d("shift", Shift)  # again the same: no harm
    query, key, value = tensors((5, 4), (6, 4), (6, 3))
    by_text = lwpf_attention(query, key, value, func_d="shift:by=0.25,kind=odd")
    assert torch.equal(by_text, lwpf_attention(query, key, value, func_d=Shift(0.25)))
    with pytest.raises(lwpf_patch.SettingsError, match=r"unknown option of shift 'bi'.*did you mean 'by'"):
        lwpf_attention(query, key, value, func_d="shift:bi=1")
    with pytest.raises(lwpf_patch.SettingsError, match="its factory raised TypeError"):
        lwpf_attention(query, key, value, func_d="shift")
    for name in ("shift", "relu"):
        with pytest.raises(lwpf_patch.SettingsError, match=f"the name '{name}' is taken"):
            lwpf_patch.register_func_d(name, lambda: None)


WRONG = {
    "dtype": (
        dict(key=torch.zeros(6, 4, dtype=torch.float64)),
        "same dtype, got query torch.float32, key torch.float64",
    ),
    "device": (dict(value=torch.zeros(6, 3, device="meta")), "same device, got query on cpu.*value on meta"),
    "width": (dict(key=torch.zeros(6, 5)), r"agree in E and S, got query \[5, 4\], key \[6, 5\]"),
    "length": (dict(value=torch.zeros(7, 3)), r"agree in E and S.*value \[7, 3\]"),
    "dimensions": (dict(query=torch.zeros(4)), r"query must have at least 2 dimensions, got shape \[4\]"),
    "integer": (dict(query=torch.zeros(5, 4, dtype=torch.int64)), "query must be of a floating dtype, got torch.int64"),
    "mask dtype": (
        dict(attn_mask=torch.zeros(5, 6, dtype=torch.uint8)),
        "boolean, float32 or of the query's dtype torch.float32, got torch.uint8",
    ),
    "mask shape": (
        dict(attn_mask=torch.zeros(5, 7)),
        r"broadcastable to the scores, \(..., L, S\) = \(..., 5, 6\), got shape \[5, 7\]",
    ),
    "both masks": (dict(attn_mask=torch.zeros(5, 6), is_causal=True), "exclude each other"),
    "dropout": (dict(dropout_p=1.5), "probability, got 1.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_raise_as_in_sdpa(case):
    change, message = WRONG[case]
    good = dict(query=torch.zeros(5, 4), key=torch.zeros(6, 4), value=torch.zeros(6, 3))
    with pytest.raises(RuntimeError, match=message):
        lwpf_attention(**{**good, **change}, func_d="relu")


@pytest.mark.parametrize("case", sdpa_inputs.COMPUTED)
def test_what_sdpa_computes_is_computed(case, backend):
    sdpa_inputs.check_computed(sdpa_inputs.COMPUTED[case], backend)


@pytest.mark.parametrize("case", sdpa_inputs.OVERFLOWING)
def test_scores_that_overflow_are_computed(case, backend):
    sdpa_inputs.check_overflowing(sdpa_inputs.OVERFLOWING[case], backend)


@pytest.mark.parametrize("case", sdpa_inputs.REFUSED)
def test_what_sdpa_refuses_is_refused(case, backend):
    sdpa_inputs.check_refused(sdpa_inputs.REFUSED[case], backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_mask", [torch.bool, torch.float16, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_masks_have_the_dtypes_of_sdpa(dtype, of_mask, autocast):
    query, key, mask = torch.randn(2, 5, 4, dtype=dtype), torch.randn(2, 6, 4, dtype=dtype), torch.ones(5, 6)
    raised = []
    for attend in (F.scaled_dot_product_attention, lambda *tensors: lwpf_attention(*tensors, func_d="relu")):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            try:
                attend(query, key, key, mask.to(of_mask))
            except RuntimeError:
                raised.append(True)
            else:
                raised.append(False)
    assert raised[0] == raised[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(func_d="rleu"), r"unknown func_d 'rleu' \(from lwpf_attention\(func_d=...\)\).*did you mean 'relu'"),
        (dict(func_d=3), "func_d 3 .* is neither text"),
        (dict(func_d="relu", masking="papr"), "unknown masking 'papr'.*did you mean 'paper'"),
        (
            dict(func_d="relu", sep="entmax"),
            r"unknown sep 'entmax' \(from lwpf_attention\(sep=.*did you mean 'entmax15'",
        ),
        (dict(func_d="relu", sep=0.5), "sep 0.5 .*alpha must be a number from 1"),
        (
            dict(func_d="relu", sep="softmax_n:n=-1"),
            r"n='-1' in 'softmax_n:n=-1' \(from lwpf.*: n must be a number of at",
        ),
        (dict(func_d="relu", backend="cuda"), "unknown backend 'cuda'.*allowed are auto, cpu, eager"),
    ],
)
def test_wrong_options(options, message):
    query, key, value = torch.zeros(5, 4), torch.zeros(6, 4), torch.zeros(6, 3)
    with pytest.raises(lwpf_patch.SettingsError, match=message):
        lwpf_attention(query, key, value, **options)


def _written_out(query, key, value, mask, func_d, dim=-1, **options):
    """Attention whose softmax is written out, with the two lines of the paper; over the keys, which lie along dim."""
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, -INF)
    if dim == -2:
        scores = scores.mT
    scores, kept = lwpf_patch.partial_forgetting(scores, func_d=func_d, dim=dim, **options)
    assert not kept.requires_grad
    weights = kept * scores.softmax(dim)
    return (weights if dim == -1 else weights.mT) @ value


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", [*FUNC_DS, "none", "text", "of a layer", "a callable", "with noise"])
def test_partial_forgetting_around_a_softmax_equals_the_oracle(name, dim):
    inputs = tensors((2, 5, 4), (2, 6, 4), (2, 6, 3))
    mask = torch.rand(2, 5, 6) < 0.7
    mask[0, 0] = False
    options, masking = {}, "exclude"
    if name in FUNC_DS:
        func_d, forgetting = FUNC_DS[name]
        options = {"training": False}
    elif name == "none":
        func_d, forgetting = "none", Forgetting("none")
        mask[..., 0] |= ~mask.any(-1)  # nothing is done to a row without keys: it is NaN, as in plain attention
    elif name == "text":  # which draws no noise
        func_d, forgetting = "pfu:bias=0.25,sigma=9", Forgetting("pfu", "dmedian", 0.25)
    elif name == "of a layer":
        func_d, forgetting, masking = HostFuncD(ReLU(), "", masking="paper"), Forgetting("relu"), "paper"
    elif name == "a callable":
        func_d, forgetting = lambda s: (s.clamp(min=0.5), s > 0.5), Forgetting("pfu", 0.5, 0.5)
    else:
        func_d = PFU(mu=0.1, sigma=0.5)  # in training, as it was made
        torch.manual_seed(5)
        forgetting = Forgetting("pfu", 0.1, "mu", eps=float(torch.randn(1)) * 0.25)
        torch.manual_seed(5)
    ours = _written_out(*inputs, mask, func_d, dim, **options)
    compare(ours, oracle.attention(*inputs, func_d=forgetting, attn_mask=mask, masking=masking), inputs)


def test_partial_forgetting_refuses():
    for func_d in ("rleu", None, 3, ReLU):
        with pytest.raises(lwpf_patch.SettingsError, match=r"func_d .*\(from partial_forgetting\(func_d=...\)\)"):
            lwpf_patch.partial_forgetting(torch.zeros(2, 2), func_d=func_d)


def test_overriding_leaves_the_func_d_alone():
    func_d = HostFuncD(PFU(sigma=0.5), "")
    query, key, value = tensors((5, 4), (6, 4), (6, 3))
    lwpf_attention(query, key, value, func_d=func_d, training=False, masking="paper", backend="eager")
    assert (func_d.training, func_d.masking, func_d.backend) == (True, "exclude", "auto")


@pytest.mark.drawn(cases=3)
@pytest.mark.parametrize(("func_d", "dynamic"), [("relu", False), ("pfu", True)])
def test_compiled_without_graph_breaks(func_d, dynamic, backend):
    sep = "softmax_n:n=0.5" if func_d == "pfu" else "softmax"

    def attend(query, key, value, mask):
        return lwpf_attention(query, key, value, mask, func_d=func_d, training=False, backend=backend, sep=sep)

    torch._dynamo.reset()  # the recompilations of the other cases would count
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (5, 9, 12):
        query, key, value = tensors((2, length, 4), (2, length, 4), (2, length, 4))
        mask = torch.rand(length, length) < 0.8
        compare(compiled(query, key, value, mask), attend(query, key, value, mask), [query, key, value])


@pytest.mark.drawn(cases=12)
@pytest.mark.parametrize("name", [*FUNC_DS, "sparsemax", "entmax15", "1.3", "softmax_n:n=2"])
def test_second_derivatives_are_those_of_finite_differences(name, backend):
    """In forward mode too, and with arguments that depend on each other."""
    options = {"func_d": FUNC_DS[name][0]} if name in FUNC_DS else {"func_d": "relu", "sep": name}
    if name not in FUNC_DS and "softmax_n" not in name:
        pytest.importorskip("entmax")
        backend = "auto"

    def attend(x, bias):
        return lwpf_attention(x, 2 * x.flip(0), x, bias, training=False, backend=backend, **options)

    x, bias = tensors((3, 2), (3, 3))
    torch.autograd.gradcheck(attend, (x, bias), check_forward_ad=True)
    torch.autograd.gradgradcheck(attend, (x, bias))


@pytest.mark.parametrize(("dropout_p", "n"), [(0.0, 0.0), (0.4, 0.0), (0.0, 1.0), (0.4, 3.0)])
@pytest.mark.parametrize("name", FUNC_DS)
def test_second_derivatives_equal_the_oracles(name, dropout_p, n, backend):
    """With the very noise and dropout of the forward pass."""
    _, forgetting = FUNC_DS[name]
    func_d = ReLU() if name == "relu" else PFU(mu=forgetting.mu, bias=forgetting.bias, sigma=0.7)
    query, key, value, mask = *tensors((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 3)), _additive((2, 2, 5, 6), -INF)
    options = dict(func_d=func_d, training=True, backend=backend, sep=f"softmax_n:n={n}")
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    eps = float(torch.randn(1) * 0.7**2) if name != "relu" else 0.0
    torch.manual_seed(seed)
    keep = dropout_mask(query, key, mask, dropout_p, options) if dropout_p else None
    torch.manual_seed(seed)
    ours = lwpf_attention(query, key, value, mask, dropout_p, **options)
    expected = oracle.attention(
        query, key, value, func_d=Forgetting(forgetting.kind, forgetting.mu, forgetting.bias, eps), attn_mask=mask,
        dropout_keep=keep, dropout_p=dropout_p, n=n,
    )  # fmt: skip
    inputs, cotangent = [query, key, value, mask], torch.randn_like(expected).requires_grad_()
    results = []
    for out in (ours, expected):
        first = torch.autograd.grad(out, inputs, cotangent, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), [*inputs, cotangent])
        results.append([*first, *second])
    for got, wanted in zip(*results, strict=True):
        oracle.assert_equal(got, wanted)


def test_many_scores_have_every_derivative():
    """Of a size at which "auto" takes the backend of the CPU."""
    query, key, value, tangent = (torch.randn(8, 16, 64, 16) for _ in range(4))

    def attend(query, backend="auto"):
        return lwpf_attention(query, key, value, func_d="relu", backend=backend)

    for backend in ("auto", "cpu"):
        out, along = torch.func.jvp(lambda q, b=backend: attend(q, b), (query,), (tangent,))
        expected, expected_along = torch.func.jvp(lambda q: attend(q, "eager"), (query,), (tangent,))
        assert torch.equal(out, expected)
        assert torch.equal(along, expected_along)
    gradient = torch.func.vmap(torch.func.grad(lambda q, k, v: lwpf_attention(q, k, v, func_d="relu").square().sum()))
    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attend(leaf).square().sum(), leaf, create_graph=True)
    torch.testing.assert_close(gradient(query, key, value), expected.detach())
    (second,) = torch.autograd.grad(expected.square().sum(), leaf)
    assert second.abs().sum() > 0


def test_nothing_is_differentiated_where_a_gradient_is_missing(backend):
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    query, key, value = tensors((3, 2), (4, 2), (4, 2))
    out = Cut.apply(lwpf_attention(query, key, value, func_d="relu", backend=backend))
    assert torch.autograd.grad(out.sum(), query, allow_unused=True) == (None,)


# --- the backend of the CPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "whole numbers", "all 0", "mostly 0", "float64"])
@pytest.mark.parametrize("mask_name", ["none", "boolean", "additive"])
def test_the_median_is_exact(kind, mask_name, monkeypatch):
    """Rank, value and number of equal scores, over sizes on both sides of a tile."""
    monkeypatch.setattr(cpu_scores, "TILE", 1 << 11)
    for _ in range(20):
        batch, length, keys = (int(torch.randint(1, high, ())) for high in (4, 90, 90))
        query, key = torch.randn(batch, 1, length, 4), torch.randn(batch, 1, keys, 4)
        if kind == "whole numbers":
            query, key = query.round(), key.round()
        elif kind == "all 0":
            query = 0 * query
        elif kind == "mostly 0":
            query = query * (torch.rand(batch, 1, length, 1) < 0.4)
        elif kind == "float64":
            query, key = query.double(), key.double()
        mask = None
        if mask_name == "boolean":
            mask = torch.rand(1, 1, length, keys) < 0.6
        elif mask_name == "additive":
            mask = torch.randn(1, 1, length, keys, dtype=query.dtype).round()
            mask = mask.masked_fill(torch.rand(mask.shape) < 0.3, -INF)
        made = cpu_scores.Scores(query, key, cpu_scores.Given(0.5, mask, 0.0, False, None, None, 0.0, None))
        scores = []
        for tile in made.tiles():  # their very values: another product of matrices would round differently
            part, excluded = made.make(tile)
            scores.append(part.flatten() if excluded is None else part[~excluded.expand_as(part)])
        scores = torch.cat(scores)
        if len(scores) == 0:
            continue
        expected = sorted(scores.tolist())[(len(scores) - 1) // 2]
        assert cpu_median.median(made) == (expected, int((scores == expected).sum()))


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_a_median_with_many_ties(masked, way):
    """More scores are equal to the median than positions are noted; whole numbers, so that ties are exact."""
    query, key, value = (torch.randint(-1, 2, (2, 20, 3)).double().requires_grad_() for _ in range(3))
    mask = torch.rand(20, 20) < 0.8 if masked else None
    options = dict(func_d=PFU(sigma=0), scale=1.0, training=False)
    ours = lwpf_attention(query, key, value, mask, backend="cpu", **options)
    expected = oracle.attention(
        query, key, value, func_d=Forgetting("pfu", "dmedian", "mu"), attn_mask=mask, scale=1.0
    )  # fmt: skip
    compare(ours, expected, [query, key, value])


def test_no_tensor_of_the_size_of_all_scores(way, monkeypatch):
    """Peak memory, by what torch allocates, in both passes and for the median."""
    from torch.profiler import ProfilerActivity, profile

    monkeypatch.setattr(cpu_scores, "TILE", 1 << 16)
    query, key, value = (torch.randn(1, 2, 900, 16, requires_grad=True) for _ in range(3))
    mask = torch.randn(2, 1, 900, requires_grad=True)
    for func_d in ("relu", "pfu"):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            lwpf_attention(query, key, value, mask, 0.1, func_d=func_d, backend="cpu").sum().backward()
        largest = max(event.cpu_memory_usage for event in profiled.events())
        assert largest < 0.5 * 2 * 900 * 900 * 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(func_d=lambda s: (s, s > 0)), "is not of the form s > a"),
        (dict(func_d="relu:empty_rows=keep"), "empty_rows='keep' needs a row's scores together"),
        (dict(func_d="relu", masking="paper"), "masking 'paper' is computed as the official code does it"),
    ],
)
def test_what_the_backend_of_the_cpu_cannot_do(options, reason, monkeypatch):
    query, key, value = torch.randn(5, 4), torch.randn(6, 4), torch.randn(6, 3)
    with pytest.raises(lwpf_patch.SettingsError, match=f"backend 'cpu' cannot do what is asked: .*{reason}"):
        lwpf_attention(query, key, value, backend="cpu", **options)
    monkeypatch.setattr(cpu, "MANY_SCORES", 0)
    automatic = lwpf_attention(query, key, value, backend="auto", **options)
    assert torch.equal(automatic, lwpf_attention(query, key, value, backend="eager", **options))


def test_auto_takes_the_backend_of_the_cpu_for_many_scores(monkeypatch):
    query, key, value = torch.randn(2, 50, 4), torch.randn(2, 60, 4), torch.randn(2, 60, 3)
    few = 2 * 50 * 60 + 1
    for many, natively, is_worth_it, expected in (
        (few - 1, few, False, "cpu"), (few, few - 1, False, "eager"), (few, few - 1, True, "cpu"),
        (few, few, True, "eager"),
    ):  # fmt: skip
        monkeypatch.setattr(cpu, "MANY_SCORES", many)
        monkeypatch.setattr(cpu, "MANY_SCORES_NATIVELY", natively)
        monkeypatch.setattr(cpu, "_native_is_worth_it", lambda is_worth_it=is_worth_it: is_worth_it)
        assert backends.choose("auto", backends.Call(query, key, key, ReLU()))[0].name == expected
        automatic = lwpf_attention(query, key, value, func_d="relu")
        assert torch.equal(automatic, lwpf_attention(query, key, value, func_d="relu", backend=expected))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_compute_the_same_every_time(threads, way, monkeypatch):
    monkeypatch.setattr(cpu_scores, "TILE", 1 << 14)
    # In float64: rounding in float32 may make a neighbour of the median the median.
    query, key, value = (torch.randn(8, 300, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.randn(300, 300, dtype=torch.float64, requires_grad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for _ in range(2):
            out = lwpf_attention(query, key, value, mask, func_d=PFU(sigma=0), training=False, backend="cpu")
            results.append([out, *torch.autograd.grad(out.square().sum(), [query, key, value, mask])])
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
        eager = lwpf_attention(query, key, value, mask, func_d=PFU(sigma=0), training=False, backend="eager")
        torch.testing.assert_close(results[0][0], eager)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("masked", ["no", "boolean", "causal"])
@pytest.mark.parametrize("func_d", ["relu", "pfu:sigma=0"])
@pytest.mark.parametrize(("batch", "length", "keys"), [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 4)])
def test_where_there_are_no_scores(batch, length, keys, func_d, masked, backend):
    query, key, value = (torch.randn(batch, n, 8, requires_grad=True) for n in (length, keys, keys))
    mask = torch.ones(length, keys, dtype=torch.bool) if masked == "boolean" else None
    out = lwpf_attention(query, key, value, mask, is_causal=masked == "causal", func_d=func_d, backend=backend)
    assert torch.equal(out, torch.zeros(batch, length, 8))
    for grad in torch.autograd.grad(out.sum(), (query, key, value), materialize_grads=True):
        assert not grad.any()


@pytest.mark.drawn(cases=2)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("func_d", ["relu", "pfu:sigma=0.5"])
def test_opcheck(func_d, dropout_p):
    query, key, value = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(3))
    mu, bias, _ = lwpf_patch.forgetting.make_func_d(func_d).threshold()
    seed, eps = torch.tensor(3) if dropout_p else None, torch.tensor(0.1)
    mask = torch.randn(1, 1, 9, 9, requires_grad=True)
    for m, native in itertools.product((None, mask, mask > 0), (False, True)):
        arguments = (query, key, value, 0.5, m, dropout_p, False, native, 2, mu, bias, 1.0, eps, seed)
        torch.library.opcheck(torch.ops.lwpf_patch.cpu_attention, arguments)


def test_a_mode_sees_the_operator(way):
    """In plain eager code the CPU's operators are called past the dispatcher; what watches sees them nevertheless."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    query, key, value = tensors((3, 2), (4, 2), (4, 2))
    results = []
    for watched in (False, True):
        with Watch() if watched else contextlib.nullcontext():
            out = lwpf_attention(query, key, value, func_d="pfu", training=False, backend="cpu")
            results.append([out, *torch.autograd.grad(out.sum(), [query, key, value])])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    name = "lwpf_patch::cpu_attention"
    assert [one for one in seen if one.startswith("lwpf")] == [name, f"{name}_backward"]


# --- what rests on something private of PyTorch's ----------------------------------------------------------------


def test_where_pytorch_cannot_be_asked(way, monkeypatch):
    query, key, value = tensors((3, 2), (4, 2), (4, 2))

    def results():
        out = lwpf_attention(query, key, value, func_d="pfu", training=False, backend="cpu")
        return [out, *torch.autograd.grad(out.sum(), [query, key, value])]

    direct = results()
    monkeypatch.setattr(operators, "_CAN_ASK", False)  # then all goes through the dispatcher
    assert all(torch.equal(one, two) for one, two in zip(direct, results(), strict=True))
    call = backends.Call(query, key, value, ReLU())
    assert backends.choose("cpu", call)[0].name == "cpu"
    monkeypatch.setattr(transforms, "_CAN_ASK", False)
    assert backends.choose("cpu", call)[0].name == "eager"
    for module in (operators, transforms):
        assert module._can_ask()
        monkeypatch.setattr(torch._C, "_are_functorch_transforms_active", lambda: False)
        monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
        assert not module._can_ask()
        monkeypatch.undo()


@pytest.mark.parametrize("func_d", ["relu", "pfu:mu=-inf", "pfu:mu=-inf,bias=0", "pfu:mu=0.1"])
@pytest.mark.parametrize("hidden", [False, True])
def test_rows_whose_scores_overflow_are_what_they_are_in_eager(func_d, hidden, way):
    """A score that is -inf by overflow is no key that a mask hides: with nothing above it the row is NaN."""
    key, value = torch.ones(2, 5, 4), torch.randn(2, 5, 3)
    query = torch.randn(2, 6, 4)
    query[0, 1], query[1, 2] = -2e38, 2e38
    mask = torch.rand(6, 5) < 0.7 if hidden else None
    if hidden:
        mask[3] = False  # and one row has no key
    results = []
    for backend in ("eager", "cpu"):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        out = lwpf_attention(*inputs, mask, scale=1.0, func_d=func_d, training=False, backend=backend)
        finite = out.detach().isfinite().all(-1)
        grads = torch.autograd.grad(out[finite].sum(), inputs)
        results.append((out, grads[0][finite]))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("func_d", ["relu", "pfu:mu=1,bias=100", "pfu"])
def test_no_key_or_no_feature(func_d, way):
    """With a mask of each kind; without features all scores are 0, whatever a forgotten one becomes."""
    for keys, features in ((0, 4), (5, 0), (0, 0)):
        query, key, value = torch.randn(2, 3, features), torch.randn(2, keys, features), torch.randn(2, keys, 4)
        for mask in (None, torch.zeros(3, keys), torch.ones(3, keys, dtype=torch.bool)):
            outs = [
                lwpf_attention(query, key, value, mask, func_d=func_d, training=False, backend=backend)
                for backend in ("eager", "cpu")
            ]
            torch.testing.assert_close(*outs, equal_nan=True)
