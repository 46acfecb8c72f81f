"""timm's Attention and AttentionRope, patched, against the oracle; and through everything that people do to a model."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import oracle
import pytest
import torch
from oracle import Forgetting
from seps import SEPS
from timm.layers import Attention, AttentionRope
from torch import nn
from vits import FUNC_DS, MODELS, images, set_fused, vit

import lwpf_patch

INF = float("inf")
NOTHING = "pfu:mu=-inf,bias=0,sigma=0"  # forgets nothing

both_branches = pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
every_func_d = pytest.mark.parametrize("func_d", FUNC_DS)
both_models = pytest.mark.parametrize("model_name", MODELS)


def gradients(output: torch.Tensor, module: nn.Module, x: torch.Tensor, cotangent: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(output, [x, *module.parameters()], cotangent))


def compare(module: nn.Module, x: torch.Tensor, options: dict, fused: bool, **more) -> None:
    set_fused(module, fused)
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    ours = module(x, **options)
    torch.manual_seed(seed)
    if module.training and module.attn_drop.p:
        shape = (x.shape[0], module.num_heads, x.shape[1], x.shape[1])
        more["dropout_keep"] = nn.functional.dropout(torch.ones(shape, dtype=x.dtype), module.attn_drop.p) != 0
    expected = oracle.timm_attention(module, x, **options, excluded_below=torch.finfo(x.dtype).min / 2, **more)
    oracle.assert_equal(ours, expected)
    cotangent = torch.randn_like(ours)
    for got, wanted in zip(
        gradients(ours, module, x, cotangent), gradients(expected, module, x, cotangent), strict=True
    ):
        oracle.assert_equal(got, wanted)


def _masks(batch: int, length: int) -> dict[str, dict]:
    boolean = (torch.rand(batch, 1, length, length) < 0.7) | torch.eye(length, dtype=torch.bool)
    bias = torch.randn(length, length, dtype=torch.float64)
    return {
        "none": {},
        "boolean": {"attn_mask": boolean},
        "boolean with an empty row": {"attn_mask": boolean & (torch.arange(length) > 0)[:, None]},
        "additive": {"attn_mask": bias},
        "additive with -inf": {"attn_mask": bias.masked_fill(~boolean, -INF)},
        "additive with finfo.min": {"attn_mask": bias.masked_fill(~boolean, torch.finfo(bias.dtype).min)},
        "causal": {"is_causal": True},
    }


@pytest.mark.drawn(cases=12)
@both_branches
@pytest.mark.parametrize("mask", _masks(2, 7))
@every_func_d
def test_attention_equals_the_oracle(func_d, mask, fused):
    lwpf_patch.apply("timm", func_d=func_d)
    module = Attention(12, num_heads=3, qkv_bias=True).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    compare(module, x, _masks(2, 7)[mask], fused, func_d=FUNC_DS[func_d])


@pytest.mark.drawn(cases=8)
@both_branches
@pytest.mark.parametrize(
    "options",
    [
        dict(qk_norm=True, norm_layer=nn.LayerNorm),
        dict(scale_norm=True, norm_layer=nn.LayerNorm, gated=True, attn_head_dim=6, dim_out=8),
        dict(attn_drop=0.4),
    ],
    ids=["qk_norm", "scale_norm, gated, sizes", "dropout"],
)
@every_func_d
def test_the_options_of_attention(func_d, options, fused):
    backend = "eager" if "attn_drop" in options else "auto"  # its dropout is that of torch.nn.functional
    lwpf_patch.apply("timm", func_d=func_d, backend=backend)
    module = Attention(12, num_heads=3, **options).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    compare(module, x, {}, fused, func_d=FUNC_DS[func_d])


@pytest.mark.drawn(cases=12)
@both_branches
@pytest.mark.parametrize(
    "options",
    [
        dict(qkv_fused=True),
        dict(qkv_fused=False, qk_norm=True, norm_layer=nn.LayerNorm, rotate_half=True),
        dict(scale_norm=True, norm_layer=nn.LayerNorm, gated=True, num_prefix_tokens=0, attn_drop=0.3),
    ],
    ids=["fused qkv", "separate qkv, qk_norm", "gated, dropout"],
)
@pytest.mark.parametrize("mask", ["none", "boolean", "causal"])
@every_func_d
def test_attention_rope_equals_the_oracle(func_d, mask, options, fused):
    backend = "eager" if "attn_drop" in options else "auto"
    lwpf_patch.apply("timm", func_d=func_d, backend=backend)
    module = AttentionRope(24, num_heads=3, **options).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    rotation = torch.randn(7 - module.num_prefix_tokens, 16, dtype=torch.float64)
    compare(module, x, {"rope": rotation, **_masks(2, 7)[mask]}, fused, func_d=FUNC_DS[func_d])


@both_branches
@pytest.mark.parametrize("mask", ["none", "boolean", "additive with -inf", "causal"])
def test_paper_masking_equals_the_oracle(mask, fused):
    lwpf_patch.apply("timm", masking="paper")
    module = Attention(12, num_heads=3).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    compare(module, x, _masks(2, 7)[mask], fused, func_d=Forgetting("relu"), masking="paper")


@both_branches
def test_the_noise_of_training(fused):
    lwpf_patch.apply("timm", func_d="pfu:mu=0.1,bias=mu,sigma=0.8")
    module = Attention(12, num_heads=3).double()
    set_fused(module, fused)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.manual_seed(3)
    noisy = module(x)
    torch.manual_seed(3)
    eps = float(torch.randn(1) * 0.8**2)
    expected = oracle.timm_attention(module, x, func_d=Forgetting("pfu", 0.1, "mu", eps))
    torch.testing.assert_close(noisy, expected, rtol=0, atol=1e-12)
    expected = oracle.timm_attention(module, x, func_d=Forgetting("pfu", 0.1, "mu"))
    torch.testing.assert_close(module.eval()(x), expected, rtol=0, atol=1e-12)


@both_models
def test_forgetting_nothing_is_the_unpatched_eager_model_bit_for_bit(model_name):
    model, x = MODELS[model_name](attn_drop_rate=0.2), images()
    set_fused(model, False)
    torch.manual_seed(0)
    plain = model(x)
    with lwpf_patch.patched("timm", func_d=NOTHING, backend="eager"):
        for fused in (False, True):
            set_fused(model, fused)
            torch.manual_seed(0)
            assert torch.equal(model(x), plain)
    set_fused(model, False)
    torch.manual_seed(0)
    assert torch.equal(model(x), plain)


@both_models
@both_branches
def test_none_is_the_unpatched_model_bit_for_bit(model_name, fused):
    model, x = MODELS[model_name](), images()
    set_fused(model, fused)
    plain = model(x)
    lwpf_patch.apply("timm", func_d="none")
    assert torch.equal(model(x), plain)


# --- what people do to models ---------------------------------------------------------------------------------------


def scripted(model, x):
    return torch.jit.script(model)


def scripted_and_saved(model, x):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


def compiled(model, x):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def exported(model, x):
    return torch.export.export(model, (x,)).module()


def deep_copied(model, x):
    return copy.deepcopy(model)


def pickled(model, x):
    return pickle.loads(pickle.dumps(model))


def saved(model, x):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


TRANSFORMATIONS = [scripted, scripted_and_saved, compiled, exported, deep_copied, pickled, saved]


@pytest.mark.drawn(cases=5)
@both_branches
@both_models
@pytest.mark.parametrize("transform", TRANSFORMATIONS, ids=lambda function: function.__name__)
def test_a_transformed_model_computes_the_same(transform, model_name, fused):
    """Each of two func_ds in each branch, of one of the models."""
    lwpf_patch.apply("timm", func_d="relu" if fused == (model_name == next(iter(MODELS))) else "pfu:sigma=0")
    model, x = MODELS[model_name]().eval(), images()
    set_fused(model, fused)
    with lwpf_patch.patched("timm", func_d="none"):
        plain = model(x)
    expected = model(x)
    assert not torch.allclose(expected, plain, atol=1e-4)
    torch.testing.assert_close(transform(model, x)(x), expected)
    assert lwpf_patch.status()["hosts"]["timm"]["called"]


@pytest.mark.drawn(days=2)
def test_compiled_by_inductor_with_gradients():
    lwpf_patch.apply("timm", func_d="pfu:mu=dmedian,bias=mu,sigma=0")
    model, x = vit(), images()
    expected = model(x)
    wanted = torch.autograd.grad(expected.sum(), model.parameters())
    torch._dynamo.reset()
    output = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(output, expected)
    got = torch.autograd.grad(output.sum(), model.parameters())
    torch.testing.assert_close(got, wanted)


@pytest.mark.drawn(cases=5)
@both_branches
@pytest.mark.parametrize("extractor", ["timm", "torchvision"])
@every_func_d
def test_feature_extractors(extractor, func_d, fused):
    lwpf_patch.apply("timm", func_d=func_d)
    model, x = vit().eval(), images()
    set_fused(model, fused)
    if extractor == "timm":
        from timm.models._features_fx import create_feature_extractor

        features = create_feature_extractor(model, {"blocks.1": "out"})(x)
    else:
        from torchvision.models.feature_extraction import create_feature_extractor

        features = create_feature_extractor(model, {"blocks.1": "out"})(x)
    found = features["out"] if isinstance(features, dict) else features[0]
    torch.testing.assert_close(model.forward_head(model.norm(found)), model(x))


@both_branches
def test_a_traced_model_follows_train_and_eval(fused):
    """What PFU needs at run time is not frozen when torch.fx traces."""
    from torchvision.models.feature_extraction import create_feature_extractor

    lwpf_patch.apply("timm", func_d="pfu:mu=0,bias=mu,sigma=2")
    model, x = vit(), images()
    set_fused(model, fused)
    traced = create_feature_extractor(model, ["blocks.1"])
    assert torch.equal(traced.eval()(x)["blocks.1"], traced(x)["blocks.1"])
    assert not torch.equal(traced.train()(x)["blocks.1"], traced(x)["blocks.1"])


@both_models
def test_gradient_checkpointing(model_name):
    lwpf_patch.apply("timm", func_d="pfu:sigma=0.7")
    model, x = MODELS[model_name](attn_drop_rate=0.2), images()
    results = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        output = model(x)
        results.append([output, *torch.autograd.grad(output.sum(), model.parameters())])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.drawn(cases=6)
@both_branches
@both_models
@every_func_d
@pytest.mark.parametrize("mode", ["autocast", "pure"])
def test_bfloat16(mode, func_d, model_name, fused):
    model, x = MODELS[model_name]().float(), images(dtype=torch.float32)
    set_fused(model, fused)
    lwpf_patch.apply("timm", func_d=func_d)
    if mode == "pure":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        output = model(x)
        output.float().square().mean().backward()
        with lwpf_patch.patched("timm", func_d="none"):
            assert output.dtype == model(x).dtype == torch.bfloat16
    assert output.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    # A score near the threshold may fall on the other side of it in bfloat16; in one layer few do.
    attention, tokens = model.blocks[0].attn, torch.randn(3, 17, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        narrow = attention(tokens.bfloat16() if mode == "pure" else tokens)
    wide = copy.deepcopy(attention).float()(tokens)
    assert (narrow.float() - wide).abs().mean() < 0.1 * wide.abs().mean()


def test_the_meta_device():
    lwpf_patch.apply("timm", func_d="pfu")
    with torch.device("meta"):
        assert vit()(images()).shape == (3, 5)


@pytest.mark.drawn(days=2)
def test_a_model_scripted_or_compiled_after_another_of_its_class_is_patched():
    x = images()
    before = vit().eval()
    torch.jit.script(before)
    torch.compile(before, backend="eager")(x)
    lwpf_patch.apply("timm")
    after = vit().eval()
    patched_output = after(x)
    for transformed in (torch.jit.script(after), torch.compile(after, backend="eager")):
        torch.testing.assert_close(transformed(x), patched_output)
    lwpf_patch.revert()
    plain = after(x)
    assert not torch.allclose(plain, patched_output, atol=1e-4)
    for transformed in (torch.jit.script(after), torch.compile(after, backend="eager")):
        torch.testing.assert_close(transformed(x), plain)


def test_a_model_compiled_before_the_patch_is_patched():
    model, x = vit().eval(), images()
    compiled_before = torch.compile(model, backend="eager")
    plain = compiled_before(x)
    lwpf_patch.apply("timm")
    assert not torch.allclose(compiled_before(x), plain, atol=1e-4)
    torch.testing.assert_close(compiled_before(x), model(x))


@both_models
def test_state_dicts_do_not_change(model_name):
    plain = MODELS[model_name]()
    lwpf_patch.apply("timm", func_d="pfu")
    model = MODELS[model_name]()
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]


def test_a_whole_model_saved_plain_is_patched_when_loaded():
    model, x = vit().eval(), images()
    plain, data = model(x), pickle.dumps(model)
    lwpf_patch.apply("timm")
    loaded = pickle.loads(data)
    assert isinstance(loaded.blocks[0].attn.func_d.rule, lwpf_patch.ReLU)
    assert not torch.allclose(loaded(x), plain, atol=1e-4)


def test_a_func_d_of_ones_own_in_a_block():
    """Any func_d may be put in one block by hand."""
    lwpf_patch.apply("timm")
    model, x = vit().eval(), images()
    relu = model(x)
    model.blocks[1].attn.func_d = lwpf_patch.PFU(mu=0.2, bias=0.0)
    assert not torch.equal(model(x), relu)
    lwpf_patch.apply("timm", func_d="pfu")
    assert repr(model.blocks[0].attn.func_d) == "PFU(mu=dmedian, bias=mu, sigma=0.01)"
    assert repr(model.blocks[1].attn.func_d) == "PFU(mu=0.2, bias=0.0, sigma=0.01)"


def soft_threshold(scores):
    """A func_d as a user writes it."""
    return (scores - 0.1).relu(), scores > 0.1


@both_branches
def test_a_callable_as_func_d(fused):
    lwpf_patch.apply("timm", func_d=soft_threshold)
    model, x = vit().eval(), images()
    set_fused(model, fused)
    expected = model(x)
    for transform in (compiled, exported, deep_copied, pickled):
        torch.testing.assert_close(transform(model, x)(x), expected)
    assert "soft_threshold" in repr(model.blocks[0].attn)


@both_models
def test_training_learns(model_name):
    lwpf_patch.apply("timm")
    model, x, y = MODELS[model_name](), images(8), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_naflexvit_masks_with_a_finite_sentinel():
    """Padding patches of a NaFlexViT change nothing: their keys are masked with finfo.min and stay out."""
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    lwpf_patch.apply("timm")
    config = NaFlexVitCfg(patch_size=4, embed_dim=24, depth=2, num_heads=3, global_pool="avg", reg_tokens=0)
    model = NaFlexVit(config, num_classes=5).eval()
    grid = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"), -1).reshape(1, 9, 2)
    patches = torch.randn(1, 9, 48)
    valid = torch.ones(1, 9, dtype=torch.bool)
    short = model(patches, patch_coord=grid, patch_valid=valid)
    longer = model(
        torch.cat([patches, torch.randn(1, 5, 48)], 1),
        patch_coord=torch.cat([grid, torch.zeros(1, 5, 2, dtype=grid.dtype)], 1),
        patch_valid=torch.cat([valid, torch.zeros(1, 5, dtype=torch.bool)], 1),
    )
    torch.testing.assert_close(longer, short, rtol=1e-4, atol=1e-5)


# --- normalisations ---------------------------------------------------------------------------------------------------

every_sep = pytest.mark.parametrize("sep", SEPS)


@pytest.mark.drawn(cases=10)
@both_branches
@pytest.mark.parametrize("mask", ["none", "boolean with an empty row", "additive with finfo.min"])
@pytest.mark.parametrize("func_d", [None, "pfu:mu=dmedian,bias=mu,sigma=0"])
@every_sep
def test_every_normalisation_equals_the_oracle(sep, func_d, mask, fused):
    lwpf_patch.apply("timm", func_d=func_d, sep=sep)
    module = Attention(12, num_heads=3, qkv_bias=True).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    # Without a func_d nothing is forgotten.
    compare(module, x, _masks(2, 7)[mask], fused, func_d=FUNC_DS.get(func_d, Forgetting("none")), **SEPS[sep])


@pytest.mark.drawn(cases=3)
@both_branches
@every_sep
def test_a_normalisation_with_rotary_embedding_and_dropout(sep, fused):
    lwpf_patch.apply("timm", func_d="relu", sep=sep)
    module = AttentionRope(12, num_heads=3, attn_drop=0.3).double().train()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    compare(module, x, {}, fused, func_d=FUNC_DS["relu"], **SEPS[sep])


@pytest.mark.drawn(cases=3)
@both_branches
@every_sep
def test_a_normalisation_with_feature_maps(sep, fused):
    """They are folded, as the tests of folding compare with a float64 product, and the folded layer is the oracle's."""
    lwpf_patch.apply("timm", sep=sep, uhop="on")
    module = Attention(12, num_heads=3, qkv_bias=True).double().eval()
    set_fused(module, fused)
    nn.init.normal_(module.feature_map.weight, std=0.3)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    mapped = module(x)
    lwpf_patch.fold(module)
    torch.testing.assert_close(module(x), mapped)
    oracle.assert_equal(module(x), oracle.timm_attention(module, x, func_d=Forgetting("none"), **SEPS[sep]))


@pytest.mark.drawn(cases=4)
@pytest.mark.parametrize("transform", TRANSFORMATIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize(("sep", "fused"), [("softmax_n:n=3", True), ("entmax15", False)])
def test_a_transformed_model_keeps_its_normalisation(sep, fused, transform):
    if sep == "entmax15" and transform in (scripted, scripted_and_saved):
        lwpf_patch.apply("timm", sep=sep)
        with pytest.raises(lwpf_patch.SettingsError, match=r"sep entmax15: torch\.jit\.script cannot compile"):
            transform(vit().eval(), images())
        return
    lwpf_patch.apply("timm", func_d="relu", sep=sep)
    model, x = vit().eval(), images()
    set_fused(model, fused)
    expected = model(x)
    with lwpf_patch.patched("timm", func_d="relu"):
        assert not torch.allclose(expected, model(x), atol=1e-4)
    torch.testing.assert_close(transform(model, x)(x), expected)


@both_branches
@pytest.mark.parametrize("sep", ["softmax_n:n=3", "entmax15"])
def test_feature_extractors_keep_the_normalisation(sep, fused):
    from torchvision.models.feature_extraction import create_feature_extractor

    lwpf_patch.apply("timm", func_d="pfu:sigma=0", sep=sep)
    model, x = vit().eval(), images()
    set_fused(model, fused)
    found = create_feature_extractor(model, {"blocks.1": "out"})(x)["out"]
    torch.testing.assert_close(model.forward_head(model.norm(found)), model(x))


@pytest.mark.drawn(cases=4)
@both_branches
@pytest.mark.parametrize("mode", ["autocast", "pure"])
@every_sep
def test_a_normalisation_in_bfloat16(sep, mode, fused):
    """The weights are those of float32, rounded."""
    lwpf_patch.apply("timm", sep=sep)
    model, x = vit().float().eval(), images(dtype=torch.float32)
    set_fused(model, fused)
    wide = model(x)
    if mode == "pure":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        narrow = model(x)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=0.1, atol=0.1 * float(wide.detach().abs().max()))


def test_a_normalisation_can_be_set_for_one_layer():
    lwpf_patch.apply("timm", func_d="relu")
    model, x = vit().eval(), images()
    usual = model(x)
    func_d = model.blocks[1].attn.func_d
    func_d.sep = "softmax_n:n=2"
    assert "sep=softmax_n:n=2" in repr(model.blocks[1].attn)
    assert "sep" not in repr(model.blocks[0].attn)
    assert not torch.allclose(model(x), usual)
    model.blocks[1].attn.func_d = lwpf_patch.PFU(mu=0.1)
    assert model.blocks[1].attn.func_d.sep == (1.0, 2.0)
    model.blocks[1].attn.func_d = lwpf_patch.ReLU()
    func_d.sep = "softmax"
    assert torch.equal(model(x), usual)
    with pytest.raises(lwpf_patch.SettingsError, match=r"'softmax_m'.*func_d\.sep = "):
        func_d.sep = "softmax_m"


def test_the_operator_takes_the_normalisation_of_a_layer():
    lwpf_patch.apply("timm", func_d="relu", sep="sparsemax")
    func_d = vit().blocks[0].attn.func_d
    query, key, value = torch.randn(3, 2, 5, 8).unbind(0)
    wanted = lwpf_patch.lwpf_attention(query, key, value, func_d="relu", sep="sparsemax")
    assert torch.equal(lwpf_patch.lwpf_attention(query, key, value, func_d=func_d), wanted)
    usual = lwpf_patch.lwpf_attention(query, key, value, func_d="relu")
    assert torch.equal(lwpf_patch.lwpf_attention(query, key, value, func_d=func_d, sep="softmax"), usual)


def test_patch_model_with_a_normalisation():
    model, x = vit().eval(), images()
    plain = model(x)
    lwpf_patch.patch_model(model, sep="sparsemax")
    with lwpf_patch.patched("timm", sep="sparsemax"):
        wanted = copy.deepcopy(model)(x)
    assert torch.equal(model(x), wanted)
    assert not torch.allclose(wanted, plain)
    lwpf_patch.unpatch_model(model)
    assert torch.equal(model(x), plain)


SCRIPT = """
import timm, torch
import lwpf_patch
torch.manual_seed(0)
model = timm.create_model("test_vit", num_classes=3)
print(lwpf_patch.status()["hosts"]["timm"]["settings"]["sep"], model.blocks[0].attn.func_d)
print(model(torch.randn(1, 3, 160, 160)).tolist())
"""


@pytest.mark.drawn(days=3)
def test_every_way_in_takes_a_normalisation(python, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    plain = python("train.py", LWPF_PATCH="timm", LWPF_FUNC_D="none")
    by_variable = python("train.py", LWPF_PATCH="timm", LWPF_SEP=" softmax_n : n = 5 ")
    assert by_variable.stdout.startswith("softmax_n:n=5 NoForgetting(sep=softmax_n:n=5)")
    assert "func_d none, sep softmax_n:n=5, masking exclude" in by_variable.stderr
    assert by_variable.stdout.splitlines()[1] != plain.stdout.splitlines()[1]
    by_command = python("-m", "lwpf_patch", "run", "--sep", "softmax_n:n=5", "train.py")
    assert by_command.stdout == by_variable.stdout
    by_apply = python(code="import lwpf_patch\nlwpf_patch.apply('timm', sep='softmax_n:n=5')\n" + SCRIPT)
    assert by_apply.stdout == by_variable.stdout
    wrong = python("train.py", LWPF_PATCH="timm", LWPF_SEP="sparse", check=False)
    assert "'sparse' (from LWPF_SEP)" in wrong.stderr
    assert not wrong.stdout


def test_a_normalisation_whose_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "entmax", None)
    with pytest.raises(lwpf_patch.SettingsError, match=r"sep sparsemax \(from apply\(sep=...\)\).*pip install"):
        lwpf_patch.apply("timm", sep="sparsemax")
    assert lwpf_patch.status()["hosts"]["timm"]["state"] == "off"
    lwpf_patch.apply("timm", sep="softmax_n")
