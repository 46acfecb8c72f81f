"""The separation loss, the feature map and Stage I, against a direct computation in float64."""

from __future__ import annotations

import copy
import math
import pickle

import oracle
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lwpf_patch
from lwpf_patch import FeatureMap, separation_loss
from lwpf_patch.uhop import separation
from lwpf_patch.uhop.separation import KINDS, separation_gradient


@pytest.fixture(params=["tiles", "whole"], autouse=True)
def tile(request, monkeypatch):
    """Tiles so small that there are many, of uneven height; and all pairs in one."""
    if request.param == "tiles":
        monkeypatch.setattr(separation, "TILE", 7 * 23 + 1)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def compare(patterns, t, kind):
    """Compares loss and gradient, item by item of the batch."""
    loss = separation_loss(patterns, t, kind)
    assert loss.shape == patterns.shape[:-2]
    factors = torch.randn_like(loss)
    (gradient,) = torch.autograd.grad(loss, patterns, factors)
    flat = patterns.detach().reshape(-1, *patterns.shape[-2:])
    for i, item in enumerate(flat):
        item.requires_grad_()
        expected = oracle.separation_loss(item, t, kind)
        oracle.assert_equal(loss.flatten()[i], expected)
        (wanted,) = torch.autograd.grad(expected, item, factors.flatten()[i])
        oracle.assert_equal(gradient.reshape(flat.shape)[i], wanted)
    oracle.assert_equal(separation_loss(patterns.detach(), t, kind), loss.detach())  # another path without a gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.3, 2.0, 50.0, 300.0])
@pytest.mark.parametrize("shape", [(2, 5), (23, 4), (40, 60), (3, 9, 4), (2, 3, 7, 5), (1, 2, 2), (0, 3, 2)], ids=str)
def test_loss_and_gradient_equal_the_oracle(shape, t, kind):
    compare(normal(*shape), t, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_of_any_length_and_close_together(kind):
    lengths = torch.randn(20, 1, dtype=torch.float64).exp() ** 5
    compare((normal(20, 6) * lengths).detach().requires_grad_(), 2.0, kind)
    patterns = normal(20, 6).detach()
    for factor in (1e-30, 1e30):  # the squares are no ordinary numbers of float32
        extreme = separation_loss((factor * patterns).float(), kind=kind)
        torch.testing.assert_close(extreme.double(), separation_loss(patterns, kind=kind), rtol=0, atol=2e-6)
    close = 1 + 1e-3 * normal(20, 6)
    compare(close.detach().requires_grad_(), 2.0, kind)


def test_ties_share_the_gradient_of_the_maximum():
    # In float64 the squares of these differences are exact: the three pairs of unit vectors are nearest, at distance 2.
    unit = torch.eye(3, dtype=torch.float64)
    patterns = torch.cat([unit, -unit])[[0, 4, 2, 1]].requires_grad_()
    compare(patterns, 2.0, "maximum")
    twins = torch.cat([normal(5, 3)] * 3).detach().requires_grad_()
    loss = separation_loss(twins, 2.0, "maximum")
    assert loss == 0
    assert not torch.autograd.grad(loss, twins)[0].any()
    compare(twins, 2.0, "average")


@pytest.mark.parametrize("kind", KINDS)
def test_float32_keeps_its_digits_for_near_duplicates(kind):
    single = (1 + torch.randn(30, 50) * 10 ** -torch.rand(30, 1).mul(4)).requires_grad_()
    double = single.detach().double().requires_grad_()
    for t in (2.0, 200.0):
        ours, wanted = separation_loss(single, t, kind), oracle.separation_loss(double, t, kind)
        assert abs(ours - wanted) < 2e-6 * max(1, t)
        (gradient,), (expected,) = torch.autograd.grad(ours, single), torch.autograd.grad(wanted, double)
        assert (gradient - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, kind):
    half = torch.randn(2, 9, 5).to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    loss, wide = separation_loss(half, kind=kind), separation_loss(single, kind=kind)
    assert torch.equal(loss, wide)
    loss.sum().backward()
    wide.sum().backward()
    assert half.grad.dtype == dtype
    assert torch.equal(half.grad, single.grad.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(separation_loss(single, kind=kind), wide)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pattern_of_zeros_is_at_distance_1_and_stays(kind):
    patterns = normal(6, 4)
    with torch.no_grad():
        patterns[2] = 0
    directions = nn.functional.normalize(patterns.detach(), dim=1)
    distances = (directions[:, None] - directions).square().sum(-1)[~torch.eye(6, dtype=torch.bool)]
    exponents = -2 * distances
    expected = exponents.max() if kind == "maximum" else exponents.exp().mean().log()
    loss = separation_loss(patterns, kind=kind)
    oracle.assert_equal(loss.detach(), expected)
    loss.backward()
    assert patterns.grad.isfinite().all()
    assert not patterns.grad[2].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_nan_or_an_infinity_is_not_hidden(wrong, kind):
    patterns = normal(2, 8, 4)
    with torch.no_grad():
        patterns[0, 3, 1] = wrong
    loss = separation_loss(patterns, kind=kind)
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False]
    assert patterns.grad[0].isnan().all()
    assert patterns.grad[1].isfinite().all()


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_linear_in_the_number_of_patterns(kind, monkeypatch):
    monkeypatch.setattr(separation, "TILE", 1 << 16)
    for patterns in (torch.randn(4000, 8), torch.ones(500, 8)):  # of the latter all pairs are nearest
        patterns.requires_grad_()
        with Largest() as largest:
            separation_loss(patterns, kind=kind).backward()
        assert largest.elements <= 3 * max(1 << 16, patterns.numel())  # the numbers of a tile's pairs are three each


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [2.0, 50.0])
def test_second_derivatives_equal_the_oracles(t, kind):
    """Also where something else is added to the loss, through which there is a second way to the patterns."""
    patterns = normal(2, 7, 3)
    results = []
    for losses in (
        separation_loss(patterns, t, kind),
        torch.stack([oracle.separation_loss(item, t, kind) for item in patterns]),
    ):
        first = torch.autograd.grad(losses.square().sum() + patterns.pow(3).sum(), patterns, create_graph=True)
        results.append([*first, *torch.autograd.grad(first[0].pow(3).sum(), patterns)])
    for got, wanted in zip(*results, strict=True):
        oracle.assert_equal(got, wanted)
    item = patterns[0].detach().requires_grad_()
    torch.autograd.gradcheck(lambda x: separation_loss(x, t, kind), item, check_forward_ad=True)
    torch.autograd.gradgradcheck(lambda x: separation_loss(x, t, kind), item)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_can_be_differentiated_are_the_same(kind):
    """With ties, a pattern of zeros, extreme lengths, in half precision, and with a NaN in one item of the batch."""
    unit = torch.eye(4, dtype=torch.float64)
    cases = [torch.cat([unit, -unit])[[0, 5, 2, 1]], torch.cat([normal(4, 3)] * 2), normal(6, 4)]
    cases += [normal(6, 4).bfloat16()]
    cases += [torch.cat([normal(5, 3), torch.zeros(1, 3)]), 1e-30 * normal(6, 4), 1e30 * normal(6, 4), normal(2, 6, 4)]
    cases[-1] = cases[-1].detach()
    cases[-1][0, 1, 2] = math.nan
    for patterns in cases:
        patterns = patterns.detach().requires_grad_()
        plain, again = (
            torch.autograd.grad(separation_loss(patterns, kind=kind).sum(), patterns, create_graph=graph)[0]
            for graph in (False, True)
        )
        assert again.dtype == patterns.dtype
        digits = 1e-12 if patterns.dtype == torch.float64 else 1e-2
        # The closest pair can be one with the pattern of zeros: then the gradient is 0, and all that comes is rounding.
        rounding = 16 * torch.finfo(torch.float64).eps / float(patterns.detach().nan_to_num().abs().max())
        limit = max(digits * float(plain.nan_to_num().abs().max()), rounding)
        torch.testing.assert_close(again.detach(), plain, rtol=0, atol=limit, equal_nan=True)


# --- the feature map ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_identity_at_the_start_bit_for_bit(dtype):
    for phi, x in (
        (FeatureMap(6, dtype=dtype), torch.randn(2, 3, 6, dtype=dtype)),
        (FeatureMap(6, heads=4, dtype=dtype), torch.randn(3, 4, 5, 6, dtype=dtype)),
    ):
        assert torch.equal(phi(x), x)
        assert torch.equal(x @ phi.gram(), x)
        assert torch.equal(phi.matrix(), torch.eye(6, dtype=dtype).expand(phi.weight.shape))
        assert torch.equal(torch.jit.script(phi)(x), x)


@pytest.mark.parametrize("heads", [None, 3])
def test_map_matrix_and_gram(heads):
    phi = FeatureMap(5, heads, dtype=torch.float64)
    nn.init.normal_(phi.weight)
    query, key = normal(2, 3, 4, 5).detach(), normal(2, 3, 7, 5).detach()
    mapped = torch.einsum("...ij,...nj->...ni", torch.eye(5) + phi.weight, key)
    oracle.assert_equal(phi(key), mapped)
    oracle.assert_equal(key @ phi.matrix().mT, mapped)
    oracle.assert_equal(query @ phi.gram() @ key.mT, phi(query) @ phi(key).mT)
    assert torch.equal(torch.jit.script(phi)(key), phi(key))
    assert torch.equal(pickle.loads(pickle.dumps(phi))(key), phi(key))
    assert set(phi.state_dict()) == {"weight"}
    assert str(phi) == ("FeatureMap(5)" if heads is None else "FeatureMap(5, heads=3)")
    phi.reset_parameters()
    assert torch.equal(phi(key), key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [None, 3])
def test_the_gradient_of_the_weight_is_autograds(heads, kind):
    lead = () if heads is None else (heads,)
    weight, patterns = normal(*lead, 4, 4), normal(*lead, 9, 4)
    loss, gradient = separation_gradient(weight, patterns, 1.5, kind)
    assert weight.grad is None
    assert not gradient.requires_grad
    mapped = patterns + patterns @ weight.mT
    expected = [oracle.separation_loss(item, 1.5, kind) for item in mapped.reshape(-1, 9, 4)]
    oracle.assert_equal(loss.reshape(-1), torch.stack(expected).detach())
    oracle.assert_equal(gradient, torch.autograd.grad(sum(expected), weight)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("count", [12, 3])  # a step is computed in another way where there are few patterns
def test_stage_i_is_plain_gradient_descent(heads, kind, count):
    lead = () if heads is None else (heads,)
    phi = FeatureMap(6, heads, dtype=torch.float64)
    nn.init.normal_(phi.weight, std=0.1)
    patterns = normal(*lead, count, 6)
    weight = phi.weight.detach().clone().requires_grad_()
    losses = phi.separate(patterns, iters=20, t=1.3, lr=0.05, kind=kind)
    optimizer = torch.optim.SGD([weight], lr=0.05)
    expected = []
    for step in range(21):
        mapped = patterns.detach() + patterns.detach() @ weight.mT
        each = torch.stack([oracle.separation_loss(item, 1.3, kind) for item in mapped.reshape(-1, count, 6)])
        expected.append(each.detach().reshape(lead))
        if step < 20:
            optimizer.zero_grad()
            each.sum().backward()
            optimizer.step()
    torch.testing.assert_close(phi.weight.detach(), weight.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(losses, torch.stack(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(10, 30), (30, 10), (4, 9, 12)], ids=str)
def test_stage_i_lowers_the_loss_at_every_step(shape):
    patterns = torch.randn(shape, dtype=torch.float64) + torch.randn(shape[-1], dtype=torch.float64)
    phi = FeatureMap(shape[-1], shape[0] if len(shape) == 3 else None, dtype=torch.float64)
    losses = phi.separate(patterns, iters=60, lr=0.01)
    assert losses.shape == (61, *shape[:-2])
    assert (losses.diff(dim=0) < 0).all()
    again = phi.separate(patterns, iters=1, lr=0.01)  # it goes on from where it is
    oracle.assert_equal(again[0], losses[-1])


@pytest.mark.parametrize("surroundings", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_stage_i_changes_nothing_but_the_weight(surroundings):
    model = nn.ModuleDict({"phi": FeatureMap(5), "other": nn.Linear(5, 5)})
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    patterns = torch.randn(8, 5, requires_grad=True)
    before = copy.deepcopy(model)
    gradients = [p.grad.clone() for p in model.parameters()]
    was, generator = patterns.detach().clone(), torch.get_rng_state()
    with surroundings(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model["phi"].separate(patterns, iters=3)
    frozen = copy.deepcopy(before).requires_grad_(False)
    frozen["phi"].separate(patterns, iters=3)
    assert torch.equal(frozen["phi"].weight, model["phi"].weight)
    assert not frozen["phi"].weight.requires_grad
    assert not losses.requires_grad
    assert patterns.grad is None
    assert torch.equal(patterns, was)
    assert torch.equal(torch.get_rng_state(), generator)
    for (name, p), q, gradient in zip(model.named_parameters(), before.parameters(), gradients, strict=True):
        assert torch.equal(p, q) == (name != "phi.weight")
        assert p.requires_grad
        assert torch.equal(p.grad, gradient)


def test_stage_i_in_half_precision_descends_in_float32():
    patterns = torch.rand(10, 20).bfloat16()
    half, single = FeatureMap(20, dtype=torch.bfloat16), FeatureMap(20)
    losses = half.separate(patterns, iters=10, lr=0.01)
    assert torch.equal(losses, single.separate(patterns.float(), iters=10, lr=0.01))
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight, single.weight.bfloat16())


def test_a_progress_bar_on_request(capsys):
    pytest.importorskip("tqdm")
    phi = FeatureMap(4)
    phi.separate(torch.randn(5, 4), iters=2)
    assert capsys.readouterr().err == ""
    phi.separate(torch.randn(5, 4), iters=2, progress=True)
    assert "Stage I: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: separation_loss(x, kind="averge"),
            r"unknown kind 'averge' \(from separation_loss\(kind=.*'average'",
        ),
        (lambda x: separation_loss(x, t=0), r"t=0 \(from separation_loss\(t=\.\.\.\)\): t must be a number above 0"),
        (lambda x: separation_loss(x, t="two"), "t='two'"),
        (lambda x: FeatureMap(0), r"dim=0 \(from FeatureMap\(dim=\.\.\.\)\): .*whole number of at least 1"),
        (lambda x: FeatureMap(3, heads=1.5), "heads=1.5"),
        (lambda x: FeatureMap(3).separate(x, iters=-1), r"iters=-1 \(from separate.* of at least 0"),
        (lambda x: FeatureMap(3).separate(x, lr=math.nan), r"lr=nan \(from separate"),
        (lambda x: FeatureMap(3).separate(x, kind="max"), "unknown kind 'max'.*did you mean 'maximum'"),
        (lambda x: FeatureMap(3).separate(x, t=-1.0), "t=-1.0"),
    ],
)
def test_wrong_options_are_named(call, message):
    with pytest.raises(lwpf_patch.SettingsError, match=message):
        call(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: separation_loss(torch.randn(1, 3)), r"M at least 2, a pair to separate; got shape \[1, 3\]"),
        (lambda: separation_loss(torch.randn(3)), r"got shape \[3\]"),
        (lambda: separation_loss(torch.ones(5, 3, dtype=torch.int64)), "floating dtype, got torch.int64"),
        (lambda: FeatureMap(4).separate(torch.randn(5, 3)), r"must be of shape \(M, 4\), got \[5, 3\]"),
        (lambda: FeatureMap(3, 2).separate(torch.randn(5, 3)), r"must be of shape \(2, M, 3\), got \[5, 3\]"),
        (lambda: FeatureMap(3, device="meta").separate(torch.randn(5, 3)), "W is on meta, patterns on cpu"),
    ],
)
def test_wrong_patterns_raise(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_a_weight_is_never_made_nan():
    phi, patterns = FeatureMap(3), torch.randn(5, 3)
    patterns[1, 1] = math.nan
    with pytest.raises(RuntimeError, match="patterns hold a NaN or an infinity; W is left as it was"):
        phi.separate(patterns)
    assert not phi.weight.any()
    nn.init.constant_(phi.weight, 3e38)
    with pytest.raises(RuntimeError, match=r"W is too large, or became so at lr=0.1; W is left as it was"):
        phi.separate(torch.full((5, 3), 2.0))
    assert (phi.weight == 3e38).all()
