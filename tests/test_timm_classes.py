"""Every attention class of timm, patched, against an oracle that replaces torch's functions in the unpatched module."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from oracle_mode import ForgettingSoftmax
from timm_classes import CASES, made
from torch import Tensor
from vits import FUNC_DS

import lwpf_patch
from lwpf_patch.forgetting import make_func_d
from lwpf_patch.hosts import HOSTS
from lwpf_patch.hosts import timm_folding as fold


def outcome(module, inputs, weights=None) -> list[Tensor]:
    """The output of a module, and the gradients of its first input and of its parameters."""
    first = inputs[0].detach().clone().requires_grad_()
    module.zero_grad()
    out = module(first, *inputs[1:])
    out = out[0] if isinstance(out, tuple) else out
    torch.manual_seed(7)
    parameters = [p for name, p in module.named_parameters() if "feature_map" not in name]
    found = torch.autograd.grad((out * torch.randn_like(out)).sum(), [first, *parameters], allow_unused=True)
    return [out, *(gradient for gradient in found if gradient is not None)]


def branches(module):
    """Sets each branch of a module in turn."""
    for fused in (True, False) if hasattr(module, "fused_attn") else (False,):
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
        for einsum in (True, False) if hasattr(module, "einsum") else (None,):
            if einsum is not None:
                module.einsum = einsum and not fused
            yield fused


def assert_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9 * max(1.0, float(other.abs().max())))


@pytest.mark.drawn(cases=12)
@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_oracle(name):
    module, inputs = made(name)
    case = CASES[name]
    wanted, plain = {func_d: [] for func_d in FUNC_DS}, []
    for _ in branches(module):
        plain.append(outcome(module, inputs))
        for func_d, forgetting in FUNC_DS.items():
            with ForgettingSoftmax(forgetting, case.hidden, halves=case.halves) as oracle:
                wanted[func_d].append(outcome(module, inputs))
            assert oracle.calls
    lwpf_patch.apply("timm")
    changed = False
    for func_d, outcomes in {**wanted, "none": plain}.items():
        module.func_d = make_func_d(func_d)
        for expected, unchanged, _ in zip(outcomes, plain, branches(module), strict=True):
            found = outcome(module, inputs)
            assert_close(found, expected)
            changed = changed or not torch.allclose(found[0], unchanged[0])
    assert changed
    del module.func_d
    lwpf_patch.revert()
    for unchanged, _ in zip(plain, branches(module), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outcome(module, inputs), unchanged, strict=True))


MAPPED = {
    site.name.removeprefix("timm."): site.feature_map
    for site in HOSTS["timm"].sites
    if site.feature_map is not None and site.name.removeprefix("timm.") in CASES
}


@pytest.mark.drawn(cases=7)
@pytest.mark.parametrize("name", MAPPED)
def test_u_hop_maps_queries_and_folds_where_it_can(name):
    """With the maps as they could be after Stage I; what cannot be folded says why, and stays as it is."""
    module, inputs = made(name)
    lwpf_patch.apply("timm", uhop="on")
    weight = module.feature_map.weight
    torch.nn.init.normal_(weight, std=0.3)
    module.feature_map.steps.fill_(1)
    module.feature_map.take_settings(module.feature_map.settings)
    matrix = torch.eye(weight.shape[-1], dtype=weight.dtype) + weight.detach()
    gram = matrix.transpose(-2, -1) @ matrix
    module.func_d = make_func_d("relu")
    found = [outcome(module, inputs) for _ in branches(module)]
    original = copy.deepcopy(module)
    folds = MAPPED[name].folding.parameters is fold.projections and name != "layers.attention.Attention"
    with contextlib.nullcontext() if folds else pytest.raises(lwpf_patch.FoldError, match="cannot become part of"):
        lwpf_patch.fold(module)
    for expected, _ in zip(found, branches(module), strict=True):
        assert_close(outcome(module, inputs)[:2], expected[:2])  # the gradients of what was folded are others
    del original.func_d, module.func_d, module.feature_map, original.feature_map
    lwpf_patch.revert()
    for expected, _ in zip(found, branches(original), strict=True):
        with ForgettingSoftmax(FUNC_DS["relu"], CASES[name].hidden, gram, halves=CASES[name].halves):
            assert_close(expected, outcome(original, inputs))


def test_every_class_has_a_case():
    known = {site.name.removeprefix("timm.") for site in HOSTS["timm"].sites if site.owner and not site.required}
    assert known >= set(CASES) - {"layers.attention.Attention"}
    old = {name for name in known if name.startswith("models.layers.") or name == "models.levit.AttentionSubsample"}
    assert known - old == set(CASES) - {"layers.attention.Attention"}
