"""What a patched attention layer owns beside its forgetting function, and what a function put into it must keep."""

from __future__ import annotations

import copy
import pickle

import oracle
import pytest
import torch
from oracle import Forgetting
from timm.layers.attention import Attention
from vits import images, vit

import lwpf_patch
from lwpf_patch import SettingsError, reporting

SETTINGS = {"masking": "paper", "backend": "eager"}


@pytest.mark.parametrize("way", ["apply", "patch_model"])
def test_another_function_in_a_layer_keeps_its_settings(way):
    if way == "apply":
        lwpf_patch.apply("timm", func_d="relu", **SETTINGS)
    model = vit()
    if way == "patch_model":
        lwpf_patch.patch_model(model, func_d="relu", **SETTINGS)
    seen = []
    for block in model.blocks:
        block.attn.func_d.register_forward_hook(lambda *arguments: seen.append(arguments))
        block.attn.fused_attn = False
    model.blocks[1].attn.func_d = lwpf_patch.PFU(mu=0.1)
    assert repr(model.blocks[0].attn.func_d) == "ReLU(masking=paper, backend=eager)"
    assert repr(model.blocks[1].attn.func_d) == "PFU(mu=0.1, bias=mu, sigma=0.01, masking=paper, backend=eager)"
    assert "(func_d): PFU(mu=0.1" in repr(model)
    shared = lwpf_patch.PFU(mu=0.2)
    for block in model.blocks:
        block.attn.func_d = shared
    reporting.reset_use("timm")
    model.eval()(images())
    assert len(seen) == len(model.blocks)  # the monitor of a host is such a hook
    assert reporting.was_used("timm")
    assert not shared.training
    copied = copy.deepcopy(model)
    assert repr(copied.blocks[1].attn.func_d) == repr(model.blocks[1].attn.func_d)


def test_an_assigned_function_is_what_is_computed():
    lwpf_patch.apply("timm", func_d="relu", backend="eager")
    module = Attention(12, num_heads=3).double()
    module.func_d = lwpf_patch.PFU(mu=0.1, sigma=0)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    oracle.assert_equal(module(x), oracle.timm_attention(module, x, func_d=Forgetting("pfu", 0.1, "mu")))


def test_a_masking_or_backend_that_there_is_not():
    lwpf_patch.apply("timm")
    func_d = Attention(12, num_heads=3).func_d
    with pytest.raises(SettingsError, match=r"unknown masking 'papr' \(from func_d.masking = ...\).*'paper'"):
        func_d.masking = "papr"
    with pytest.raises(SettingsError, match="unknown backend 'gpu'"):
        func_d.backend = "gpu"
    assert repr(func_d) == "ReLU()"


class Swish(lwpf_patch.FuncD):
    """A subclass whose D is NaN at -inf, and whose D' carries a gradient if nobody detaches it."""

    def forget(self, scores, excluded, training):
        return scores * scores.sigmoid(), scores.sigmoid()


def test_a_subclass_is_protected_as_a_callable_is():
    query, key, value = (torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5))
    mask = torch.rand(4, 5) < 0.6
    results = []
    for func_d in (Swish(), lambda scores: (scores * scores.sigmoid(), scores.sigmoid())):
        out = lwpf_patch.lwpf_attention(query, key, value, mask, func_d=func_d)
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    for of_subclass, of_callable in zip(*results, strict=True):
        assert of_subclass.isfinite().all()
        torch.testing.assert_close(of_subclass, of_callable)

    class Wrong(lwpf_patch.FuncD):
        def forget(self, scores, excluded, training):
            return scores.sum(-1), scores > 0

    with pytest.raises(RuntimeError, match="func_d must return"):
        lwpf_patch.lwpf_attention(query, key, value, func_d=Wrong())


class Above(lwpf_patch.FuncD):
    """A subclass with a threshold of its own, which the fused backends may compute."""

    def forget(self, scores, excluded, training):
        return torch.where(scores > 0.3, scores, -0.5), scores > 0.3

    def threshold(self):
        return lwpf_patch.Threshold(mu=0.3, bias=-0.5, deviation=0.0)


def test_a_subclass_with_a_threshold_is_fused():
    query, key, value = (torch.randn(2, 3, n, 6, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5))
    out = lwpf_patch.lwpf_attention(query, key, value, func_d=Above(), backend="cpu")
    expected = oracle.attention(query, key, value, func_d=Forgetting("pfu", 0.3, -0.5))
    oracle.assert_equal(out, expected)


def test_what_was_assigned_by_hand_stays():
    """Through other settings, through a revert, and when the host is patched again; all else is that of the patch."""
    lwpf_patch.apply("timm")
    module, other = Attention(12, num_heads=3), Attention(12, num_heads=3)
    mine = lwpf_patch.PFU(mu=0.1)
    module.func_d = mine
    lwpf_patch.apply("timm", func_d="pfu", masking="paper")
    assert repr(module.func_d) == "PFU(mu=0.1, bias=mu, sigma=0.01, masking=paper)"
    assert repr(other.func_d) == "PFU(mu=dmedian, bias=mu, sigma=0.01, masking=paper)"
    lwpf_patch.revert()
    assert module.func_d is mine
    assert not hasattr(other, "func_d")
    lwpf_patch.apply("timm", masking="paper")
    assert module.func_d.rule is mine
    assert repr(module.func_d) == "PFU(mu=0.1, bias=mu, sigma=0.01, masking=paper)"
    loaded = pickle.loads(pickle.dumps(module))
    assert repr(loaded.func_d) == repr(module.func_d)


def test_a_function_that_was_there_before_the_patch():
    module = Attention(12, num_heads=3).double()
    module.func_d = lwpf_patch.PFU(mu=0.1, sigma=0)
    lwpf_patch.apply("timm", func_d="relu")
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for module.fused_attn in (True, False):
        oracle.assert_equal(module(x), oracle.timm_attention(module, x, func_d=Forgetting("pfu", 0.1, "mu")))


class Learnt(torch.nn.Module):
    """A callable with a parameter."""

    def __init__(self):
        super().__init__()
        self.mu = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, scores):
        return torch.where(scores > self.mu, scores, self.mu), scores > self.mu


def test_a_module_of_ones_own_in_a_layer():
    lwpf_patch.apply("timm", masking="paper")
    module = Attention(12, num_heads=3)
    mine = module.func_d = Learnt()
    module(torch.randn(2, 5, 12)).sum().backward()
    assert mine.mu.grad is not None
    assert module.func_d.masking == "paper"
    assert "(func_d): CustomFuncD" in repr(module)
    with pytest.raises(TypeError):
        module.func_d = "relu"


def test_a_wrapper_around_what_a_layer_owns():
    """Such as that of activation checkpointing, which is put around every module of a model by default."""
    wrappers = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    lwpf_patch.apply("timm", masking="paper")
    model = vit()
    x = images()
    expected = model(x)
    wrappers.apply_activation_checkpointing(model)
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
