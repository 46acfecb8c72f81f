"""Maps of attention: the weights against oracles that run unpatched models in float64, choices, no trace, errors."""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import math
import re

import numpy
import pytest
import torch
from conftest import require_host
from oracle import Forgetting
from oracle_hflayers import hopfield_core
from oracle_mode import ForgettingSoftmax
from oracle_transformers import eager_attention, modeling_files
from PIL import Image
from torch import nn

import lwpf_patch
from lwpf_patch import SettingsError, UnsupportedError, watching
from lwpf_patch.cli import main
from lwpf_patch.inspecting import drawing
from lwpf_patch.inspecting.tokens import Geometry, Tokens

require_host("timm")
import timm  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
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


@pytest.mark.drawn(cases=4)
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


@pytest.mark.drawn(cases=15)
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


@pytest.mark.drawn(cases=3)
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


@pytest.mark.parametrize("steps", [3, (0, 4)])
def test_the_last_iteration_of_hflayers(steps):
    """Also where the heads make different numbers of iterations."""
    require_host("hflayers")
    import hflayers

    options = {"update_steps_max": steps if steps == 3 else torch.tensor(steps), "update_steps_eps": 1e-12}
    model = hflayers.Hopfield(input_size=8, num_heads=2, hidden_size=4, batch_first=False, **options).double()
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


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("compiler", [lambda each, x: torch.jit.trace(each, x), lambda each, x: torch.jit.script(each)])
def test_layers_that_torch_jit_hides_are_told_of(compiler, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lwpf_patch"), "propagate", True)
    model = vit().eval()
    lwpf_patch.patch_model(model, func_d="relu")
    model.blocks[0] = compiler(model.blocks[0], torch.randn(1, 17, 24, dtype=torch.float64))
    assert list(lwpf_patch.attention_maps(model, images())) == ["blocks.1.attn"]
    assert "the maps of VisionTransformer are not all there: blocks.0.attn were compiled by torch.jit" in caplog.text


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


# --- timm's own extraction ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hook", "fx"])
def test_attention_extract_of_timm_shows_the_weights_after_the_mask(method):
    utils = pytest.importorskip("timm.utils")
    model, x = vit().eval(), images()
    set_fused(model, False)
    wanted = by_hand(model, RULES["relu"], x)
    lwpf_patch.patch_model(model, func_d="relu")
    found = utils.AttentionExtract(model, method=method)(x)
    assert list(found) == [f"blocks.{n}.attn.{'attn_drop' if method == 'hook' else 'softmax'}" for n in (0, 1)]
    for weights, (expected, *_) in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-9)


def test_attention_extract_of_timm_finds_nothing_in_the_fused_branch_patched_or_not():
    utils = pytest.importorskip("timm.utils")
    for patched in (False, True):
        model = vit().eval()
        set_fused(model, True)
        if patched:
            lwpf_patch.patch_model(model, func_d="relu")
        assert not utils.AttentionExtract(model, method="hook")(images())
        with pytest.raises(RuntimeError, match="No node names found"):
            utils.AttentionExtract(model, method="fx")


# --- the command ----------------------------------------------------------------------------------------------------

TINY = ("--model", "vit_tiny_patch16_224", "--img-size", "64")


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    code = main(["inspect", *arguments])
    return code, *capsys.readouterr()


def test_the_command_in_a_fresh_process(python, tmp_path):
    found = python("-m", "lwpf_patch", "inspect", *TINY, "--func-d", "pfu:sigma=0", "--output", "maps.png")
    assert "weights: RANDOM (seed 0): nothing of this was learned" in found.stdout
    assert "image:   the drawn scene, 64 x 64 pixels, 4 x 4 patches" in found.stdout
    assert "blocks.11.attn, class token: forgotten " in found.stdout
    assert "written: maps.png" in found.stdout
    with Image.open(tmp_path / "maps.png") as picture:
        picture.load()
        assert picture.size[0] > 800


def test_the_command_reads_checkpoints_as_timm_writes_them(tmp_path, capsys, monkeypatch):
    """Of another number of classes, with arguments beside the weights, of EMA first, and of a wrapped model."""
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"state_dict": other, "state_dict_ema": state, "args": argparse.Namespace(lr=1)}, "timm.pth")
    drawn: list = []
    monkeypatch.setattr(drawing, "draw", lambda rows, *more: drawn.append((rows, more)) or Figure())
    chosen = ("--layer", "blocks.0.*,blocks.3.attn", "--query", "class", "--query", "1,2", "--head", "2,0")
    code, out, err = run(*TINY, "--checkpoint", "timm.pth", *chosen, "--output", "x.svg", capsys=capsys)
    assert (code, err) == (0, "")
    assert "weights: timm.pth (state_dict_ema)\n" in out
    ((rows, (heads, image, rule, title, weights, is_random)),) = drawn
    assert (heads, rule, weights, is_random) == ([2, 0], "relu", "timm.pth (state_dict_ema)", False)
    assert title == "vit_tiny_patch16_224: attention plain and with relu"
    names = ["blocks.0.attn", "blocks.0.attn", "blocks.3.attn", "blocks.3.attn"]
    assert [(row.layer, row.query) for row in rows] == list(zip(names, ["class token", "patch 1, 2"] * 2, strict=True))
    # The oracle: the model itself, unpatched, in float64, on the same pixels.
    model = model.eval().double()
    set_fused(model, False)
    options = timm.data.resolve_data_config({"input_size": (3, 64, 64)}, model=model)
    mean, deviation = (torch.tensor(options[name], dtype=torch.float64)[:, None, None] for name in ("mean", "std"))
    pixels = ((torch.from_numpy(image).double().permute(2, 0, 1) - mean) / deviation)[None]
    plain, relu = (by_hand(model, RULES[name], pixels) for name in ("none", "relu"))
    for row, layer, place in zip(rows, (0, 0, 3, 3), (0, 7, 0, 7), strict=True):
        weights, _, _ = plain[layer]
        assert abs(torch.from_numpy(row.plain) - weights[0, [2, 0], place]).max() < 1e-4
        weights, _, forgotten = relu[layer]
        assert abs(torch.from_numpy(row.patched) - weights[0, [2, 0], place]).max() < 1e-4
        assert (torch.from_numpy(row.forgotten) == forgotten[0, [2, 0], place]).float().mean() > 0.9


def test_the_image_size_is_named_where_it_is_all_that_a_checkpoint_differs_in(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for size, width, hinted in ((96, 192, True), (96, 48, False)):
        other = timm.create_model("vit_tiny_patch16_224", img_size=size, embed_dim=width, depth=12)
        torch.save(other.state_dict(), "other.pth")
        code, _, err = run(*TINY, "--checkpoint", "other.pth", capsys=capsys)
        assert code == 2
        assert "'other.pth' (from --checkpoint) is not of vit_tiny_patch16_224" in err
        assert ("with --img-size the model is made for other images" in err) == hinted


def test_a_single_query_is_no_patch(tmp_path, capsys, monkeypatch):
    """A grid of 4 x 4 patches, as one of 16 x 16, can be merged into one."""
    monkeypatch.chdir(tmp_path)
    drawn: list = []
    monkeypatch.setattr(drawing, "draw", lambda rows, *more: drawn.extend(rows) or Figure())
    model = ("--model", "cait_xxs24_224", "--img-size", "64", "--layer", "blocks_token_only.0.attn")
    code, out, err = run(*model, capsys=capsys)
    assert (code, err) == (0, "")
    assert [(row.query, row.patch) for row in drawn] == [("the only query", None)]
    assert "blocks_token_only.0.attn, the only query: forgotten" in out


def test_the_picture_of_registers_and_of_a_grid_that_is_not_square():
    tokens = Tokens(("class token", "register 1"), (2, 5))
    weights = numpy.random.default_rng(0).random((3, 12))
    rows = [
        drawing.Row("layer", tokens.name(place), tokens.patch(place), (2, 5), tokens, weights, weights, weights > 0.5)
        for place in (1, 9)
    ]
    assert [row.query for row in rows] == ["register 1", "patch 1, 2"]
    assert (tokens.find("register1"), tokens.find("1, 2"), tokens.sensible()) == (1, 9, [0, 9, 3])
    image = numpy.zeros((20, 50, 3))
    figure = drawing.draw(rows, [0, 1, 4], image, "relu", "title", "weights", False)
    figure.canvas.draw()
    shown = [text.get_text() for axes in figure.axes for text in (axes.title, axes.xaxis.label)]
    assert f"{(weights[2] > 0.5).mean():.0%} forgotten" in shown
    assert "head 4" in shown
    laid, blank = drawing._laid_out(weights[0], tokens)
    assert laid.shape == (4, 5)
    assert blank.tolist() == [[False] * 2 + [True] * 3, [True] * 5, [False] * 5, [False] * 5]
    assert (laid[2:].ravel() == weights[0, 2:]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--img-size", "0"], r"timm cannot make .* with images of 0 pixels \(--img-size\)"),
        (["--query", "5,1"], r"unknown query '5,1' .*'class', 'ROW,COLUMN' of its 4 x 4 patches"),
        (["--head", "3"], r"head 3 \(from --head\): there are 3, from 0"),
        (["--head", "x"], r"'x' \(from --head\) is no whole number"),
        (["--layer", "stages*"], r"pattern 'stages\*' \(from --layer\) .*they are blocks.0.attn"),
        (["--output", "a.xyz"], "its ending is not one of .*png"),
        (["--output", "no/a.png"], "there is no folder 'no'"),
        (["--func-d", "relo"], "unknown func_d 'relo' .*did you mean 'relu'"),
        (["--image", "no.png"], r"there is no file 'no.png' \(from --image\)"),
        (["--checkpoint", "no.pth"], r"there is no file 'no.pth' \(from --checkpoint\)"),
        (["--checkpoint", "text.pth"], r"'text.pth' \(from --checkpoint\)"),
        (["--checkpoint", "code.pth"], "holds something else than weights"),
        (["--checkpoint", "other.pth"], "is not of vit_tiny_patch16_224: .* are missing, such as 'cls_token'"),
        (["--checkpoint", "empty.pth"], "has no weights where timm keeps them .* the keys 'epoch'"),
        (["--checkpoint", "other.pth", "--pretrained"], "--pretrained and --checkpoint"),
    ],
)  # fmt: skip
def test_wrong_requests_of_the_command(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"state_dict": {}, "code": Recording}, "code.pth")
    torch.save({"a.weight": torch.zeros(1)}, "other.pth")
    torch.save({"epoch": 3}, "empty.pth")
    code, _, err = run(*TINY, *arguments, capsys=capsys)
    assert code == 2
    assert re.search(message, err), err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.drawn(cases=1)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (("swin_tiny_patch4_window7_224", "--layer", "layers.0.blocks.0.attn"), "it attends within 64 windows"),
        (
            ("vit_smal_patch16_224",),
            "timm has no model 'vit_smal_patch16_224' .*similar names are vit_small_patch16_224",
        ),
        (
            ("test_vit", "--img-size", "33"),
            r"'test_vit' cannot compute images of 33 pixels \(--img-size\): .*\(33\) should be divisible",
        ),
        (
            ("resnet18",),
            "resnet18 .*no attention module that can be patched|resnet18 cannot be drawn: it has no patch_embed",
        ),
    ],
)
def test_models_that_the_command_refuses(model, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("--model", *model, capsys=capsys)
    assert code == 2
    assert re.search(message, err), err


def test_where_tokens_lie():
    model = nn.Module()
    model.patch_embed = nn.Module()
    model.patch_embed.grid_size, model.num_prefix_tokens, model.cls_token = (4, 8), 3, 1
    geometry = Geometry(model, "m")
    assert geometry.tokens(35) == Tokens(("class token", "register 1", "register 2"), (4, 8))
    assert geometry.tokens(32) == Tokens((), (4, 8))
    assert geometry.tokens(8) == Tokens((), (2, 4))
    assert geometry.tokens(9) is None
    assert geometry.why_not(1, 35, 35) is None
    assert "within 4 windows" in geometry.why_not(4, 9, 9)
    assert "its 9 keys are not the 3 + 4 x 8 tokens" in geometry.why_not(1, 35, 9)
