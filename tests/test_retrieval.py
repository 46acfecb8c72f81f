"""The normalisations Sep and the retrieval, against direct computations in float64."""

from __future__ import annotations

import itertools
import math
import sys

import oracle
import pytest
import torch

import lwpf_patch
from lwpf_patch import FeatureMap, retrieve
from lwpf_patch.normalising import normalise
from lwpf_patch.specs import Sep, parse_sep

pytest.importorskip("entmax")

SEPS = {
    "softmax": Sep(), "sparsemax": Sep(2.0), "entmax15": Sep(1.5), 1.2: Sep(1.2), 1.8: Sep(1.8),
    "softmax_n": Sep(n=1.0), "softmax_n:n=0.3": Sep(n=0.3),
}  # fmt: skip


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def specified(scores, sep):
    """The weights of one row."""
    return oracle.softmax_n(scores, sep.n) if sep.alpha == 1 else oracle.entmax(scores, sep.alpha)


def direct(memory, query, beta, steps, sep, matrix=None):
    """The retrieval for one memory (M, d) and one query (d,)."""
    matrix = torch.eye(len(query), dtype=torch.float64) if matrix is None else matrix
    for _ in range(steps):
        similarities = torch.stack([(matrix @ pattern) @ (matrix @ query) for pattern in memory])
        weights = specified(beta * similarities, sep)
        query = sum(weight * pattern for weight, pattern in zip(weights, memory, strict=True))
    return query


@pytest.mark.parametrize("sep", [*map(Sep, [1.0, 1.1, 1.5, 1.7, 2.0]), Sep(n=1.0), Sep(n=1e-3), Sep(n=1e9)], ids=str)
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_normalisations_equal_the_oracle(sep, spread):
    scores = (spread * normal(3, 5, 9)).detach().requires_grad_()
    weights = normalise(scores, *sep)
    cotangent = torch.randn_like(weights)
    (gradient,) = torch.autograd.grad(weights, scores, cotangent)
    for i, j in itertools.product(range(3), range(5)):
        row = scores[i, j].detach().requires_grad_()
        expected = specified(row, sep)
        oracle.assert_equal(weights[i, j], expected)
        (wanted,) = torch.autograd.grad(expected, row, cotangent[i, j])
        oracle.assert_equal(gradient[i, j], wanted)


@pytest.mark.parametrize("sep", [*map(Sep, [1.0, 1.3, 1.5, 2.0]), Sep(n=1.0)], ids=str)
def test_hidden_keys_and_empty_rows(sep):
    scores = normal(6, 8).detach()
    hidden = torch.rand(6, 8) < 0.5
    hidden[:, 0], hidden[2], hidden[3, 1:] = False, True, True
    masked = scores.masked_fill(hidden, -math.inf).requires_grad_()
    weights = normalise(masked, *sep)
    (gradient,) = torch.autograd.grad(weights, masked, torch.randn_like(weights))
    assert not weights[hidden].any()
    assert not gradient[hidden].any()
    for i in range(6):
        if i != 2:
            oracle.assert_equal(weights[i][~hidden[i]], specified(scores[i][~hidden[i]], sep))
    assert normalise(torch.empty(3, 0), *sep).shape == (3, 0)


@pytest.mark.parametrize("sep", [*map(Sep, [1.0, 1.3, 1.5, 2.0]), Sep(n=1.0)], ids=str)
def test_scores_far_apart_and_nan(sep):
    scores = torch.tensor([[1e6, 1e6 - 0.25, -1e30, 3.0], [0.0, math.nan, 1.0, 2.0]])
    weights = normalise(scores, *sep)
    wanted = oracle.entmax(torch.tensor([0.25, 0.0], dtype=torch.float64), sep.alpha)  # n is nothing beside exp(1e6)
    torch.testing.assert_close(weights[0, :2].double(), wanted, rtol=0, atol=1e-5)
    assert weights[0, 2:].tolist() == [0, 0]
    assert weights[1].isnan().all()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", SEPS)
def test_retrieval_equals_the_direct_computation(name, mapped):
    memory, query, sep = normal(7, 4), normal(2, 3, 4), SEPS[name]
    phi = FeatureMap(4, dtype=torch.float64)
    torch.nn.init.normal_(phi.weight)
    matrix = torch.eye(4) + phi.weight
    for beta, steps in ((1.0, 1), (0.3, 3)):
        ours = retrieve(memory, query, beta, steps, name, phi if mapped else None)
        expected = [direct(memory, one, beta, steps, sep, matrix if mapped else None) for one in query.view(-1, 4)]
        expected = torch.stack(expected).view(2, 3, 4)
        oracle.assert_equal(ours, expected)
        inputs = [memory, query, *([phi.weight] if mapped else [])]
        cotangent = torch.randn_like(expected)
        got, wanted = (torch.autograd.grad(out, inputs, cotangent) for out in (ours, expected))
        for one, other in zip(got, wanted, strict=True):
            oracle.assert_equal(one, other)


@pytest.mark.parametrize("name", ["softmax", "sparsemax"])
def test_many_memories_and_heads(name):
    memory, query = normal(2, 3, 6, 4), normal(2, 3, 5, 4)
    phi = FeatureMap(4, heads=3, dtype=torch.float64)
    torch.nn.init.normal_(phi.weight)
    ours = retrieve(memory, query, sep=name, feature_map=phi)
    single = retrieve(memory, query[:, :, 0], sep=name, feature_map=phi)
    assert single.shape == (2, 3, 4)
    for i, j, k in itertools.product(range(2), range(3), range(5)):
        matrix = torch.eye(4) + phi.weight[j]
        oracle.assert_equal(ours[i, j, k], direct(memory[i, j], query[i, j, k], 1.0, 1, SEPS[name], matrix))
    oracle.assert_equal(single, ours[:, :, 0])


def test_the_identity_map_changes_nothing():
    memory, query = torch.randn(20, 9), torch.randn(5, 9)
    for name in SEPS:
        plain = retrieve(memory, query, 2.0, 2, name)
        assert torch.equal(plain, retrieve(memory, query, 2.0, 2, name, FeatureMap(9)))


def test_a_stored_pattern_is_its_own_retrieval():
    memory = torch.nn.functional.normalize(torch.randn(10, 200), dim=1)
    noisy = memory + 0.3 * torch.nn.functional.normalize(torch.randn(10, 200), dim=1)
    assert torch.equal(retrieve(memory, noisy, beta=50.0, sep="sparsemax"), memory)
    torch.testing.assert_close(retrieve(memory, noisy, beta=100.0), memory, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    memory, query = torch.randn(9, 5).to(dtype), torch.randn(4, 5).to(dtype)
    for name in SEPS:
        half = retrieve(memory, query, 0.5, 2, name)
        assert torch.equal(half, retrieve(memory.float(), query.float(), 0.5, 2, name).to(dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sep="sparse"), r"unknown sep 'sparse' \(from retrieve\(sep=\.\.\.\)\).*did you mean 'sparsemax'"),
        (dict(sep=2.5), "sep 2.5 .*from 1 .softmax. to 2"),
        (dict(sep=None), "unknown sep None"),
        (dict(sep=math.nan), "sep nan"),
        (dict(beta=0), r"beta=0 \(from retrieve\(beta=\.\.\.\)\): beta must be a number above 0"),
        (dict(beta="1"), "beta='1'"),
        (dict(steps=0), r"steps=0 \(from retrieve\(steps=\.\.\.\)\): .*at least 1"),
        (dict(steps=1.5), "steps=1.5"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(lwpf_patch.SettingsError, match=message):
        retrieve(torch.randn(5, 3), torch.randn(3), **options)


@pytest.mark.parametrize(
    ("memory", "query", "message"),
    [
        (torch.zeros(5, 3), torch.zeros(4), r"agree in d, got memory \[5, 3\], query \[4\]"),
        (torch.zeros(3), torch.zeros(3), "must agree in d"),
        (torch.zeros(2, 5, 3), torch.zeros(3, 3), r"agree in B, got memory \[2, 5, 3\], query \[3, 3\]"),
        (torch.zeros(0, 3), torch.zeros(3), "the memory is empty"),
        (torch.zeros(5, 3), torch.zeros(3, dtype=torch.float64), "memory torch.float32, query torch.float64"),
        (torch.zeros(5, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "same floating dtype"),
        (torch.zeros(5, 3), torch.zeros(3, device="meta"), "memory is on cpu, query on meta"),
    ],
)
def test_wrong_tensors_raise(memory, query, message):
    with pytest.raises(RuntimeError, match=message):
        retrieve(memory, query)


def test_the_text_forms_of_sep():
    forms = ("softmax", " sparsemax ", "entmax15", "1.25", 1, 2)
    assert [parse_sep(text) for text in forms] == [Sep(alpha) for alpha in (1, 2, 1.5, 1.25, 1, 2)]
    for text in ("softmax_n", "softmax_n:n=1", " softmax_n : n = 1.0 "):
        assert parse_sep(text) == Sep(1.0, 1.0)
    assert parse_sep("softmax_n:n=0") == parse_sep("softmax")
    assert parse_sep("softmax_n:n=2.5e-3") == Sep(n=0.0025)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((f"softmax_n:n={n}", "n must be a number of at least 0") for n in ("-1", "nan", "inf", "1e39", "two", "1_0")),
        ("softmax_n:m=1", "unknown option of softmax_n 'm'"),
        ("softmax_n:", "no option follows the colon"),
        ("softmax_n:1", "'1' in 'softmax_n:1' .* is not of the form option=value"),
        ("softmax_n:n=1,n=2", "option 'n' stands twice"),
        ("softmax:n=1", "'softmax' takes no options"),
        ("sparsemax:", "'sparsemax' takes no options"),
        ("softmaxn", "unknown sep 'softmaxn'.*did you mean 'softmax_n'"),
    ],
)
def test_wrong_options_of_sep_are_named(text, message):
    with pytest.raises(lwpf_patch.SettingsError, match=message) as raised:
        retrieve(torch.randn(5, 3), torch.randn(3), sep=text)
    assert "(from retrieve(sep=...))" in str(raised.value)


def test_without_entmax_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "entmax", None)
    memory, query = torch.randn(5, 3), torch.randn(3)
    retrieve(memory, query)
    message = r"the package entmax.*pip install 'lwpf_patch\[entmax\]'"
    with pytest.raises(lwpf_patch.SettingsError, match=message):
        retrieve(memory, query, sep="sparsemax")
    with pytest.raises(lwpf_patch.SettingsError, match=message):
        lwpf_patch.lwpf_attention(memory, memory, memory, func_d="relu", sep="entmax15")
