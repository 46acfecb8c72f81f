"""Maps of attention: the weights against oracles that run unpatched models in float64, choices, no trace, errors."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from conftest import require_host
from oracle import Forgetting
from oracle_hflayers import hopfield_core
from oracle_mode import ForgettingSoftmax
from oracle_transformers import eager_attention, modeling_files
from torch import nn

import lwpf_patch
from lwpf_patch import SettingsError, UnsupportedError, watching

require_host("timm")
from timm_classes import CASES, made  # noqa: E402
from vits import FUNC_DS, images, set_fused, vit  # noqa: E402

RULES = {**FUNC_DS, "none": Forgetting("none")}


class Recording(ForgettingSoftmax):
    """Notes the weights of every softmax, and which keys it saw."""

    def __init__(self, func_d, hidden=None, halves=False):
        super().__init__(func_d, hidden, halves=halves)
        self.found = []

    def weights(self, scores):
        seen = scores > torch.finfo(scores.dtype).min
        seen = seen if self.hidden is None else seen & ~self.hidden
        weights = scores.softmax(-1) if self.func_d.kind == "none" else super().weights(scores)
        kept = seen if self.func_d.kind == "none" else weights != 0
        self.found.append((weights.detach(), kept, seen & ~kept))
        return weights


def by_hand(model, rule, *inputs, **more):
    """What each softmax of an unpatched model gives, in the order of the calls."""
    with torch.no_grad(), Recording(rule, **more) as oracle:
        model(*inputs)
    return oracle.found


def assert_maps(maps, wanted, reshape=lambda weights: weights, atol=1e-9) -> None:
    assert len(maps) == len(wanted)
    for found, (weights, kept, forgotten) in zip(maps.values(), wanted, strict=True):
        torch.testing.assert_close(found.weights, reshape(weights), rtol=0, atol=atol)
        assert torch.equal(found.kept, reshape(kept.expand_as(weights)))
        assert torch.equal(found.forgotten, reshape(forgotten.expand_as(weights)))


# --- the weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("text", RULES)
def test_a_vit(text, fused):
    model, x = vit(), images()
    set_fused(model, fused)
    wanted = by_hand(model.eval(), RULES[text], x)
    lwpf_patch.patch_model(model, func_d=text)
    maps = lwpf_patch.attention_maps(model, x)
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn"]
    assert maps["blocks.1.attn"].weights.shape == (3, 3, 17, 17)
    assert_maps(maps, wanted)


#: How the scores of classes are laid out that have them in another order than items, heads, queries, keys.
LAYOUTS = {
    "layers.attention2d.MultiQueryAttentionV2": lambda w: w.transpose(1, 2),
    "layers.bottleneck_attn.BottleneckAttn": lambda w: w.reshape(2, 3, 16, 16),
    "layers.halo_attn.HaloAttn": lambda w: w.reshape(2, 3, 4, 4, 16).transpose(1, 2).reshape(8, 3, 4, 16),
    "models.hiera.MaskUnitAttention": lambda w: w.transpose(1, 2).reshape(4, 3, 4, 8),
    "models.nest.Attention": lambda w: w.transpose(1, 2).reshape(4, 3, 16, 16),
    "models.twins.LocallyGroupedAttn": lambda w: w.reshape(8, 3, 4, 4),
    "models.vision_transformer_sam.Attention": lambda w: w.reshape(2, 3, 16, 16),
    "models.volo.OutlookAttention": lambda w: w.transpose(1, 2).reshape(32, 3, 9, 9),
    **dict.fromkeys(
        (
            "layers.non_local_attn.NonLocalAttn",
            "models.efficientvit_msra.CascadedGroupAttention",
            "models.iformer.SHMA",
            "models.shvit.SHSA",
        ),
        lambda w: w.reshape(2, 1, 16, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_class_of_timm(name):
    module, inputs = made(name)
    case, text = CASES[name], "pfu:mu=dmedian,bias=mu,sigma=0"
    reshape = LAYOUTS.get(name, lambda w: w)
    branches = [True, False] if hasattr(module, "fused_attn") else [False]
    patched = copy.deepcopy(module)
    lwpf_patch.patch_model(patched, func_d=text)
    for fused in branches:
        for each in (module, patched):
            each.fused_attn = fused
        module.eval()  # some return nothing
        wanted = by_hand(module, FUNC_DS[text], *inputs, hidden=case.hidden, halves=case.halves and not fused)
        maps = lwpf_patch.attention_maps(patched, tuple(inputs))
        assert_maps(maps, wanted, reshape)
        assert list(maps) == [type(module).__name__ + ("" if n == 1 else f"#{n}") for n in range(1, len(wanted) + 1)]


def test_masks_of_windows_hide_keys_in_a_plain_layer_too():
    module, inputs = made("models.swin_transformer.WindowAttention")
    lwpf_patch.patch_model(module, func_d="none")
    hidden = CASES["models.swin_transformer.WindowAttention"].hidden
    for fused in (True, False):
        module.fused_attn = fused
        (found,) = lwpf_patch.attention_maps(module, tuple(inputs)).values()
        assert not found.forgotten.any()
        assert (found.weights[hidden.expand_as(found.weights)] < 1e-30).all()


def multihead(module, x, rule, hidden=None):
    """What nn.MultiheadAttention computes of self-attention, from its parameters: the output, and its map."""
    heads, width = module.num_heads, module.head_dim
    query, key, value = (
        (x @ weight.T + bias).unflatten(-1, (heads, width)).transpose(1, 2)
        for weight, bias in zip(module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True)
    )
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(width)
    oracle = Recording(rule)
    weights = oracle.weights(scores if hidden is None else scores.masked_fill(hidden, -math.inf))
    out = torch.einsum("bhqk,bhkd->bqhd", weights, value).flatten(2)
    return module.out_proj(out), oracle.found


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("text", ["pfu:mu=dmedian,bias=mu,sigma=0", "none"])
def test_multihead_attention(text, need_weights):
    module = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with torch.no_grad():
        _, wanted = multihead(module, x, RULES[text], mask)
    lwpf_patch.patch_model(module, func_d=text)
    assert_maps(lwpf_patch.attention_maps(module, (x, x, x, None, need_weights, mask)), wanted)


@pytest.mark.parametrize("text", ["relu", "none"])
def test_an_encoder_of_torch_past_its_fast_paths(text):
    layer = nn.TransformerEncoderLayer(12, 3, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x = y = torch.randn(2, 5, 12, dtype=torch.float64)
    wanted = []
    with torch.no_grad():
        for layer in model.layers:
            out, found = multihead(layer.self_attn, y, RULES[text])
            wanted += found
            y = layer.norm1(y + out)
            y = layer.norm2(y + layer.linear2(layer.linear1(y).relu()))
    lwpf_patch.patch_model(model, func_d=text)
    maps = lwpf_patch.attention_maps(model, x)
    assert list(maps) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert_maps(maps, wanted)


def _transformers_model(name):
    import transformers as hf

    widths = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 20, "head_dim": 6,
              "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
    tokens = {"input_ids": torch.randint(3, 40, (2, 6))}
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    if name == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**widths)), {**tokens, "attention_mask": padding}
    if name == "gemma2":
        more = {"sliding_window": 3, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 6}
        return hf.Gemma2ForCausalLM(hf.Gemma2Config(**widths, **more)), tokens
    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 3, "experts_implementation": "eager"}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**widths, **more)), tokens


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_models_of_transformers(name, asked, monkeypatch):
    """With padding, softcap, sinks, grouped queries; and where transformers is asked for the weights itself."""
    require_host("transformers")
    model, inputs = _transformers_model(name)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    plain = copy.deepcopy(model)
    lwpf_patch.patch_model(model, func_d="pfu:sigma=0")
    maps = lwpf_patch.attention_maps(model, {**inputs, "output_attentions": True} if asked else inputs)
    plain.set_attn_implementation("eager")
    for file in modeling_files(plain):
        monkeypatch.setattr(file, "eager_attention_forward", eager_attention(Forgetting("pfu", "dmedian", "mu")))
    with torch.no_grad():
        wanted = plain(**inputs, output_attentions=True).attentions
    assert [name.rpartition("layers.")[2] for name in maps] == ["0.self_attn", "1.self_attn"]
    for found, weights in zip(maps.values(), wanted, strict=True):
        torch.testing.assert_close(found.weights.double(), weights.double(), rtol=0, atol=2e-5)
        assert torch.equal(found.kept, weights != 0)
        visible = found.kept | found.forgotten
        assert not visible.triu(1).any()
        if name == "llama":
            assert not visible[0, :, :, :2].any()


def test_the_last_iteration_of_hflayers():
    require_host("hflayers")
    import hflayers

    model = hflayers.Hopfield(
        input_size=8, num_heads=2, hidden_size=4, update_steps_max=3, update_steps_eps=1e-12, batch_first=False
    ).double()  # fmt: skip
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    seen = []
    core = model.association_core
    hook = core.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model.eval()(x)
    hook.remove()
    ((_, kwargs),) = seen
    options = {key: kwargs[key] for key in ("query", "key", "value", "scaling", "update_steps_max", "update_steps_eps")}
    with torch.no_grad():
        _, wanted, _, _ = hopfield_core(core, **options, func_d=Forgetting("relu"))
    lwpf_patch.patch_model(model, func_d="relu")
    maps = lwpf_patch.attention_maps(model, x)
    assert list(maps) == ["association_core"]
    assert maps["association_core"].weights.shape == (2, 2, 5, 5)
    torch.testing.assert_close(maps["association_core"].weights.mean(1), wanted, rtol=0, atol=1e-9)


def test_half_precision_and_autocast():
    model, x = vit().float().eval(), images(dtype=torch.float32)
    lwpf_patch.patch_model(model, func_d="relu")
    exact = lwpf_patch.attention_maps(model, x)["blocks.0.attn"]
    for fused in (True, False):
        set_fused(model, fused)
        with torch.autocast("cpu", torch.bfloat16):
            found = lwpf_patch.attention_maps(model, x)["blocks.0.attn"]
        assert found.weights.dtype == torch.float32
        assert (found.weights - exact.weights).abs().mean() < 0.01


def test_sep_and_an_own_rule_are_those_of_the_layer():
    model, x = vit().eval(), images()
    lwpf_patch.patch_model(model, func_d=lambda s: (s.clamp(min=0.1), s > 0.1), sep="softmax_n:n=2")
    fused = lwpf_patch.attention_maps(model, x, layers="blocks.0.*")["blocks.0.attn"]
    set_fused(model, False)
    eager = lwpf_patch.attention_maps(model, x, layers="blocks.0.*")["blocks.0.attn"]
    attn = model.blocks[0].attn
    with torch.no_grad():
        y = model.blocks[0].norm1(model._pos_embed(model.patch_embed(x)))
        q, k, _ = attn.qkv(y).reshape(3, 17, 3, 3, 8).permute(2, 0, 3, 1, 4)
    s = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(8)
    e = s.clamp(min=0.1).exp()
    for found in (fused, eager):
        torch.testing.assert_close(found.weights, e * (s > 0.1) / (2 + e.sum(-1, keepdim=True)), rtol=0, atol=1e-9)


# --- choices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("text", ["relu", "pfu:sigma=0"])
def test_chosen_places_are_those_of_the_whole(text, fused):
    model, x = vit().eval(), images()
    set_fused(model, fused)
    lwpf_patch.patch_model(model, func_d=text)
    whole = lwpf_patch.attention_maps(model, x)["blocks.1.attn"]
    part = lwpf_patch.attention_maps(model, x, layers=["*.1.attn"], items=-1, heads=[2, 0], queries=slice(3, None, 5))
    assert list(part) == ["blocks.1.attn"]
    for found, all_of_it in zip(part["blocks.1.attn"], whole, strict=True):
        expected = all_of_it[-1:][:, [2, 0]][:, :, 3::5]
        assert found.shape == (1, 2, 3, 17)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "blocks.7.*"}, r"layers pattern 'blocks.7.\*' .* they are 'blocks.0.attn', 'blocks.1.attn'"),
        ({"items": 3}, "items=3 .*blocks.0.attn has 3 items, its windows included"),
        ({"heads": [0, -4]}, "heads=-4 .*blocks.0.attn has 3 heads"),
        ({"queries": 17}, "queries=17 .*has 17 queries"),
        ({"queries": "cls"}, "queries='cls' .*no whole number"),
        ({"heads": True}, "heads=True"),
        ({"heads": []}, r"heads=\[\]"),
    ],
)
def test_wrong_choices(options, message):
    model = vit()
    lwpf_patch.patch_model(model)
    with pytest.raises(SettingsError, match=message):
        lwpf_patch.attention_maps(model, images(), **options)
    assert not watching.on


def test_what_has_no_maps():
    with pytest.raises(SettingsError, match=r"VisionTransformer has no patched attention module: call .*apply\(\)"):
        lwpf_patch.attention_maps(vit(), images())
    with pytest.raises(SettingsError, match=r"model=3 \(from attention_maps"):
        lwpf_patch.attention_maps(3, images())
    model = vit()
    lwpf_patch.patch_model(model)
    model.blocks = nn.Sequential(nn.Identity())
    model.unused = vit().blocks
    lwpf_patch.patch_model(model)
    with pytest.raises(UnsupportedError, match="VisionTransformer ran, but none of its patched attention layers"):
        lwpf_patch.attention_maps(model, images())
    with pytest.raises(UnsupportedError, match="compiled"):
        lwpf_patch.attention_maps(torch.compile(model), images())


def test_scripted_layers_are_told_of(caplog, monkeypatch):
    model = vit().eval()
    lwpf_patch.patch_model(model, func_d="relu")
    model.blocks[0] = torch.jit.trace(model.blocks[0], torch.randn(1, 17, 24, dtype=torch.float64))
    maps = lwpf_patch.attention_maps(model, images())
    assert list(maps) == ["blocks.1.attn"]


# --- no trace -------------------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    model = vit(attn_drop_rate=0.5, drop_path_rate=0.5, norm_layer=nn.LayerNorm)
    model.bn = nn.BatchNorm2d(3).double()
    model.patch_embed.proj = nn.Sequential(model.bn, model.patch_embed.proj)
    model.train()
    model.blocks[1].eval()
    lwpf_patch.patch_model(model, func_d="pfu:sigma=0.5")
    model(images()).sum().backward()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    before = torch.get_rng_state()
    x = images()
    torch.set_rng_state(before)
    with lwpf_patch.observe(model) as seen:
        lwpf_patch.attention_maps(model, x)
        lwpf_patch.attention_maps(model, x, layers="blocks.0.attn")
        assert torch.equal(torch.get_rng_state(), before)
        assert not seen.records
        after = copy.deepcopy(model.state_dict())
        model(images())
    assert [r["step"] for r in seen.records] == [1, 1]
    assert [m.training for m in model.modules()] == modes
    for before, parameter in zip(grads, model.parameters(), strict=True):
        assert parameter.grad is None if before is None else torch.equal(parameter.grad, before)
    assert all(torch.equal(state[key], after[key]) for key in state)
    assert not watching.on


def test_an_error_in_the_model_leaves_no_trace():
    model = vit().train()
    lwpf_patch.patch_model(model)
    with contextlib.suppress(Exception):
        lwpf_patch.attention_maps(model, torch.zeros(1, 3, 7, 7))
    assert model.training
    assert model.blocks[0].attn.training
    assert not watching.on
