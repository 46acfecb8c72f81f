"""Folding: Φ becomes part of the projections, exactly, or is refused by name and reason and nothing changes."""

from __future__ import annotations

import pytest
import torch
from timm.layers.attention import Attention
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from vits import feature_maps, images, randomise_maps, rope, vit

import lwpf_patch

pytestmark = pytest.mark.drawn(days=3)


def _model(make=vit, **settings):
    lwpf_patch.apply("timm", **{"uhop": "iters=5,lr=0.5,samples=32", **settings})
    return make()


def _bits(model):
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return {name: value.clone() for name, value in tensors.items() if not value.is_meta and not value.is_quantized}


def _assert_unchanged(model, before):
    after = _bits(model)
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value.contiguous().flatten().view(torch.uint8), before[name].flatten().view(torch.uint8))


def _refused(model, message):
    before = _bits(model)
    with pytest.raises(lwpf_patch.FoldError, match=rf"(?s)^fold: the feature map of .*{message}.*Nothing was folded"):
        lwpf_patch.fold(model)
    _assert_unchanged(model, before)


# --- what can be folded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("func_d", ["none", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_model_gives_the_same_and_is_an_ordinary_one(func_d, bias):
    model = _model(lambda: vit(qkv_bias=bias), func_d=func_d).eval()
    randomise_maps(model)
    x = images()
    expected = model(x)
    assert lwpf_patch.fold(model) == ["blocks.0.attn", "blocks.1.attn"]
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(lwpf_patch.SettingsError, match="no feature map"):
        lwpf_patch.fold(model)
    state = model.state_dict()
    lwpf_patch.revert()
    lwpf_patch.apply("timm", func_d=func_d)
    plain = vit(qkv_bias=bias).eval()
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain(x), model(x))


def test_folding_is_exact_to_rounding():
    model = _model().double().eval()
    randomise_maps(model)
    x = images().double()
    expected = model(x)
    lwpf_patch.fold(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.drawn(cases=2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "singular", "large", "biased"])
def test_rounding_is_no_reason_to_refuse(dtype, kind):
    for _ in range(10):
        model = _model().to(dtype)
        for each in feature_maps(model):
            nn.init.normal_(each.weight, std=0.2)
            if kind == "large":
                each.weight.data.mul_(50)
            if kind == "singular":  # as Stage I leaves it where all keys share a direction
                direction = F.normalize(torch.randn(8, dtype=torch.float64), dim=0)
                each.weight.data.copy_(-torch.outer(direction, direction))
        if kind == "biased":
            for block in model.blocks:
                nn.init.constant_(block.attn.qkv.bias, 30.0)
        assert len(lwpf_patch.fold(model)) == 2


def test_a_folded_model_can_have_a_new_map():
    model = _model()
    randomise_maps(model)
    lwpf_patch.fold(model)
    lwpf_patch.apply("timm", uhop="iters=3")
    assert len(feature_maps(model)) == 2
    assert not feature_maps(model)[0].weight.any()
    lwpf_patch.patch_model(model, uhop="on")
    lwpf_patch.fold(model)
    lwpf_patch.patch_model(model, uhop="on")
    assert len(feature_maps(model)) == 2


def test_a_block_that_is_used_twice_is_folded_once():
    model = _model().eval()
    model.blocks[1] = model.blocks[0]
    randomise_maps(model)
    x = images()
    expected = model(x)
    assert lwpf_patch.fold(model) == ["blocks.0.attn"]
    torch.testing.assert_close(model(x), expected)


def test_nothing_runs_behind_the_scores(monkeypatch):
    """The comparison draws no noise of dropout, and does not count as a use of the model."""
    model = _model().train()
    randomise_maps(model)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    monkeypatch.setattr(nn.Dropout, "forward", None)
    assert len(lwpf_patch.fold(model)) == 2


# --- what stands between --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [(lambda: vit(qk_norm=True), "its q_norm stands between"), (rope, "a rotary embedding stands between")],
)
def test_what_the_host_puts_between(make, reason):
    model = _model(make).eval()
    x = images()
    expected = model(x)
    randomise_maps(model)
    _refused(model, reason)
    for each in feature_maps(model):
        nn.init.zeros_(each.weight)
    lwpf_patch.fold(model)  # the identity only has to be taken away
    torch.testing.assert_close(model(x), expected)


class LoRA(nn.Module):
    """An adapter of the shape that peft's have: what it wraps is reached as ``base_layer``, and by its attributes."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, rank, bias=False).double()
        self.up = nn.Linear(rank, base.out_features, bias=False).double()

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    @property
    def in_features(self):
        return self.base_layer.in_features

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


class Tensor(torch.Tensor):
    pass


def _put(attention, layer):
    attention.qkv = layer


def _same_class(attention, cls):
    attention.qkv.__class__ = cls


def _of_subclass(attention):
    attention.qkv.weight = nn.Parameter(attention.qkv.weight.detach().as_subclass(Tensor))


def _replace_forward(module):
    forward = module.forward
    module.forward = lambda *args, **options: forward(*args, **options)


def _quantize(attention):
    torch.ao.quantization.quantize_dynamic(attention.float(), {nn.Linear}, inplace=True)


BETWEEN = {
    "LoRA": (lambda a: _put(a, LoRA(a.qkv)), r"its qkv is a test_folding\.LoRA and no plain torch\.nn\.Linear.*peft"),
    "a subclass": (lambda a: _same_class(a, Scaled), r"its qkv is a test_folding\.Scaled and no plain"),
    "Sequential": (lambda a: _put(a, nn.Sequential(a.qkv)), r"its qkv is a .*\.Sequential and no plain"),
    "quantized": (_quantize, r"its qkv is a torch.ao.nn.quantized.dynamic.*Linear and no plain"),
    "none": (lambda a: _put(a, None), r"its qkv is NoneType"),
    "weight_norm": (
        lambda a: parametrizations.weight_norm(a.qkv),
        r"its qkv\.weight is parametrized \(_WeightNorm\).*remove_parametrizations",
    ),
    "spectral_norm": (lambda a: parametrizations.spectral_norm(a.qkv), r"its qkv\.weight is parametrized"),
    "a parametrized bias": (
        lambda a: nn.utils.parametrize.register_parametrization(a.qkv, "bias", nn.Tanh()),
        r"its qkv\.bias is parametrized \(Tanh\)",
    ),
    "old weight_norm": (lambda a: nn.utils.weight_norm(a.qkv), r"its qkv\.weight is no parameter.*\(WeightNorm\)"),
    "old spectral_norm": (lambda a: nn.utils.spectral_norm(a.qkv), r"its qkv\.weight is no parameter.*SpectralNorm"),
    "pruning": (lambda a: prune.l1_unstructured(a.qkv, "weight", 0.5), r"its qkv\.weight is no parameter.*L1Unstr"),
    "a hook": (lambda a: a.qkv.register_forward_hook(lambda *_: None), r"its qkv has forward hooks \(.*<lambda>\)"),
    "a pre-hook": (lambda a: a.qkv.register_forward_pre_hook(lambda *_: None), r"its qkv has forward hooks"),
    "a hook of the module": (lambda a: a.register_forward_pre_hook(lambda *_: None), r": it has forward hooks"),
    "a forward of the projection": (lambda a: _replace_forward(a.qkv), r"its qkv has a forward of its own"),
    "a forward of the module": (_replace_forward, r": it has a forward of its own"),
    "meta": (lambda a: a.qkv.to("meta"), r"its qkv\.weight is on the device meta"),
    "a map on meta": (lambda a: a.feature_map.to("meta"), r"its feature map is on the device meta"),
    "float8": (lambda a: a.qkv.to(torch.float8_e4m3fn), r"its qkv\.weight is of dtype torch\.float8_e4m3fn"),
    "a tensor subclass": (_of_subclass, r"its qkv\.weight is a Tensor and no ordinary parameter"),
    "a hook of the map": (
        lambda a: a.feature_map.register_forward_hook(lambda *_: None),
        r"its feature map has forward hooks",
    ),
    "a parametrized map": (lambda a: parametrizations.orthogonal(a.feature_map), r"its feature_map.weight is paramet"),
    "a broken map": (lambda a: a.feature_map.weight.data[0].fill_(torch.nan), r"its feature map holds NaN"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", BETWEEN)
def test_what_the_script_puts_between(case):
    model = _model()
    randomise_maps(model)
    change, reason = BETWEEN[case]
    change(model.blocks[1].attn)
    _refused(model, rf"blocks\.1\.attn .*{reason}")


TIED = {
    "parameters": (lambda a, b: setattr(b.qkv, "weight", a.qkv.weight), r"blocks\.0\.attn\.qkv\.weight"),
    "memory": (
        lambda a, b: setattr(b.qkv, "weight", nn.Parameter(a.qkv.weight.detach()[:])),
        r"blocks\.0\.attn\.qkv\.weight has its memory in common with blocks\.1\.attn\.qkv\.weight",
    ),
    "a part": (
        lambda a, b: b.proj.register_buffer("other", a.qkv.weight.detach()[-3:]),
        r"blocks\.0\.attn\.qkv\.weight has its memory in common with blocks\.1\.attn\.proj\.other",
    ),
    "modules": (lambda a, b: setattr(b, "qkv", a.qkv), r"used in several places \(blocks\.0\.attn\.qkv, blocks\.1\.a"),
}


@pytest.mark.parametrize("case", TIED)
def test_weights_that_others_use_are_refused(case):
    model = _model()
    randomise_maps(model)
    tie, reason = TIED[case]
    tie(model.blocks[0].attn, model.blocks[1].attn)
    _refused(model, reason)


def test_peft():
    peft = pytest.importorskip("peft")
    model = _model()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)).eval()
    randomise_maps(adapted)
    _refused(adapted, r"its qkv is a peft\.tuners\.lora\.layer\.Linear.*merge_and_unload")
    x = images()
    expected = adapted(x)
    merged = adapted.merge_and_unload()
    lwpf_patch.fold(merged)
    torch.testing.assert_close(merged(x), expected)


# --- what no list of names foresees ---------------------------------------------------------------------------------


class Identity(nn.Module):
    """None, in spite of its name."""

    def forward(self, x):
        return x.tanh()


class OtherInputs(Attention):
    def forward(self, x, rotation):
        return super().forward(x * rotation)


class OfItsOwn(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MoreAround(Attention):
    def forward(self, x, **options):
        return super().forward(2 * x) + x


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: setattr(a, "q_norm", Identity()), "the scores of a random input moved by .* rounding explains"),
        (lambda a: setattr(a, "__class__", OtherInputs), "a call with a random input.*missing 1 required positional"),
        (lambda a: setattr(a, "__class__", OfItsOwn), "the forward of OfItsOwn does not call its feature map"),
    ],
)
def test_the_scores_are_compared(change, reason):
    model = _model()
    randomise_maps(model)
    change(model.blocks[1].attn)
    _refused(model, rf"blocks\.1\.attn .*{reason}")


def test_what_does_not_move_the_scores_is_folded():
    model = _model().eval()
    randomise_maps(model)
    model.blocks[1].attn.__class__ = MoreAround
    model.blocks[1].attn.proj = parametrizations.weight_norm(model.blocks[1].attn.proj)
    x = images()
    expected = model(x)
    lwpf_patch.fold(model)
    torch.testing.assert_close(model(x), expected)


def test_weights_come_back_bit_for_bit_where_writing_fails(monkeypatch):
    model = _model()
    randomise_maps(model)
    before = _bits(model)
    folding = lwpf_patch.patching.models.site_of(Attention)[1].feature_map.folding
    multiply, calls = folding.multiply, []

    def interrupted(module, matrix):
        multiply(module, matrix)
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setitem(vars(folding), "multiply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lwpf_patch.fold(model)
    assert len(feature_maps(model)) == 2
    _assert_unchanged(model, before)
