"""The setting ``blocks``: which attention modules of a model forget, against models whose layers were set by hand."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading

import pytest
import timm
import torch
from conftest import require_host
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint
from vits import feature_maps, images, randomise_maps

import lwpf_patch
from lwpf_patch import LwpfError, SettingsError, patch_model, unpatch_model
from lwpf_patch.attention import HostFuncD
from lwpf_patch.blocks import parse_blocks

pytestmark = pytest.mark.drawn(days=2)

DEPTH = 4


# --- models, and the same with each layer set by hand -----------------------------------------------------------------


def _deep(depth=DEPTH):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, num_classes=5, embed_dim=24, depth=depth, num_heads=3)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.double().eval()


def _swin():
    torch.manual_seed(0)
    return SwinTransformer(
        img_size=16, patch_size=2, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4, num_classes=5
    ).double().eval()  # fmt: skip


def _encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, DEPTH).eval()


def _hopfield():
    require_host("hflayers")
    from hflayers import Hopfield

    torch.manual_seed(0)
    return nn.Sequential(*(Hopfield(24, num_heads=3, batch_first=True) for _ in range(DEPTH))).double().eval()


def _hf():
    require_host("transformers")
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=DEPTH, num_attention_heads=3,
        intermediate_size=20,
    )  # fmt: skip
    model = transformers.ViTModel(config, add_pooling_layer=False).double().eval()
    return _Output(model)


class _Output(nn.Module):
    """A model of transformers that returns one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).last_hidden_state


HOSTS = {"timm": _deep, "torch": _encoder, "hflayers": _hopfield, "transformers": _hf}


def _inputs(host="timm", count=3):
    images_ = host in ("timm", "transformers", "swin")
    return images(count) if images_ else torch.randn(count, 6, 24, dtype=torch.float64)


def _layers(model):
    return [module for module in model.modules() if isinstance(module._modules.get("func_d"), HostFuncD)]


def _by_hand(chosen, make=_deep, host="timm"):
    """A patched model whose layers forget if they were chosen, each set by hand."""
    lwpf_patch.apply(host, func_d="none")
    model = make()
    for number, layer in enumerate(_layers(model)):
        if number in chosen:
            layer.func_d = lwpf_patch.ReLU()
    return model


def _run(model, x):
    """What a model gives, and the gradient of all its parameters."""
    out = model(x)
    loss = out.square().sum()
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [out.detach(), *(each for each in gradients if each is not None)]


def _same(found, expected, exactly=True):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if exactly:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def _which(model):
    """For each layer whether it forgets."""
    return [not layer.func_d.is_plain() for layer in _layers(model)]


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text", "of_12"),
    [
        ("6-", "6-", range(6, 12)),
        ("-5", "0-5", range(6)),
        (" 0 , 3,8 - 11", "0,3,8-11", [0, 3, 8, 9, 10, 11]),
        ("last", "last", [11]),
        ("LAST 4,0", "last 4,0", [0, 8, 9, 10, 11]),
        ("8-99", "8-99", range(8, 12)),
        ("0-", "0-", range(12)),
        (3, "3", [3]),
        (range(6, 8), "6,7", [6, 7]),
        ([0, "last2"], "0,last 2", [0, 10, 11]),
        (torch.tensor(3), "3", [3]),
        (["0,1", "1"], "0,1", [0, 1]),
    ],
)
def test_what_blocks_mean(given, text, of_12):
    blocks = parse_blocks(given)
    assert str(blocks) == text
    assert blocks.of(12) == set(of_12)
    assert parse_blocks(text) == parse_blocks(blocks) == blocks


@pytest.mark.parametrize("given", [None, "", "  ", "all", " All ", ["all"]])
def test_all_blocks(given):
    assert parse_blocks(given) is None


@pytest.mark.parametrize(
    "given",
    ["x", "-", "3-1", "1 2", "1--3", "last 0", "last -1", "all,3", "٣", "1_0", "1.0", "6-last", "9" * 5000, -1, True,
     1.5, [], [3, -1], [None], b"3", object(), {"a": 1}],
)  # fmt: skip
def test_what_no_blocks_are(given):
    with pytest.raises(SettingsError, match=r"\(from LWPF_BLOCKS\)"):
        parse_blocks(given, "LWPF_BLOCKS")


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.drawn(cases=4)
@pytest.mark.parametrize("blocks", ["2-", "-0", "0,last"])
@pytest.mark.parametrize("host", HOSTS)
def test_only_these_blocks_forget(host, blocks):
    chosen, x = parse_blocks(blocks).of(DEPTH), _inputs(host)
    make = HOSTS[host]
    expected = _run(_by_hand(chosen, make, host), x)
    lwpf_patch.revert()
    early = make()  # from before the host is patched
    lwpf_patch.apply(host, blocks=blocks)
    model = make()
    assert "in some blocks only" in repr(model)
    for each in (model, early):
        _same(_run(each, x), expected)
        assert _which(each) == [number in chosen for number in range(DEPTH)]
    assert "ReLU(block=0)" in repr(model) or "NoForgetting(block=0)" in repr(model)
    lwpf_patch.revert()
    assert "block=" not in repr(model)


def test_without_gradients_the_encoder_takes_no_fast_path_around_a_block_that_forgets():
    x = _inputs("torch")
    with torch.no_grad():
        expected = _by_hand({1}, _encoder, "torch")(x)
        lwpf_patch.apply("torch", blocks=1)
        assert torch.equal(_encoder()(x), expected)


def test_blocks_of_a_hierarchical_model_are_counted_through(caplog):
    x, chosen = _inputs(), {1, 2}
    expected = _run(_by_hand(chosen, _swin), x)
    lwpf_patch.apply("timm", blocks="1-2")
    model = _swin()
    _same(_run(model, x), expected)
    names = ["layers.0.blocks.1.attn", "layers.1.blocks.0.attn"]
    assert lwpf_patch.status()["hosts"]["timm"]["blocks"] == {"SwinTransformer": names}
    assert f"2 of the 4 attention modules of SwinTransformer forget, blocks 1-2: {', '.join(names)}" in caplog.text


def test_other_settings_come_with_it():
    """A sep, a masking and a backend, for the blocks alone."""
    x, settings = _inputs(), {"func_d": "pfu:mu=0.05,sigma=0", "sep": "softmax_n", "backend": "cpu"}
    by_hand = _by_hand(())
    patch_model(by_hand, include="blocks.3.*", **settings)
    expected = _run(by_hand, x)
    lwpf_patch.apply("timm", blocks="last", **settings)
    _same(_run(_deep(), x), expected)


# --- how it is first called -------------------------------------------------------------------------------------------


class _Two(nn.Module):
    """Two models in one module, such as a student and a teacher."""

    def __init__(self, make):
        super().__init__()
        self.first, self.second = make(), make()

    def forward(self, x):
        return self.first(x) + self.second(x)


def _features(model, x):
    return model.forward_features(x)


def _a_block(model, x):
    return model.blocks[2](torch.randn(2, 17, 24, dtype=torch.float64))


def _a_sequential(model, x):
    return nn.Sequential(*model.blocks[2:])(torch.randn(2, 17, 24, dtype=torch.float64))


def _recomputed(model, x):
    model.set_grad_checkpointing()
    return model(x)


def _without_call(model, x):
    return model.blocks[3].attn.forward(torch.randn(2, 17, 24, dtype=torch.float64))


@pytest.mark.drawn(cases=2)
@pytest.mark.parametrize("how", [_features, _a_block, _a_sequential, _recomputed, _without_call])
def test_whatever_part_is_called_first(how):
    x = _inputs()
    expected = _run(_by_hand({2, 3}), x)
    lwpf_patch.apply("timm", blocks="2-")
    model = _deep()
    how(model.train(), x)
    assert _which(model) == [False, False, True, True]
    _same(_run(model.eval(), x), expected)


@pytest.mark.drawn(days=2)
def test_frozen_objects_and_lists_of_models():
    """A list is no model, and gc.freeze() hides what owns a layer."""
    x = _inputs()
    expected = _by_hand({2, 3})(x)
    lwpf_patch.apply("timm", blocks="2-")
    models = nn.ModuleList([_deep(), _deep()])
    gc.freeze()
    try:
        assert all(torch.equal(model(x), expected) for model in models)
    finally:
        gc.unfreeze()


def test_models_of_create_model_are_counted_by_themselves():
    def make():
        return timm.create_model("test_vit", img_size=32, patch_size=16, num_classes=5).double().eval()

    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    lwpf_patch.apply("timm", blocks="4-")
    both = _Two(make)
    both(x)
    assert _which(both) == 2 * [False, False, False, False, True, True]
    assert list(lwpf_patch.status()["hosts"]["timm"]["blocks"]) == ["VisionTransformer (test_vit)"]
    lwpf_patch.apply("timm", blocks="6-")
    others = _Two(_deep)  # timm knows nothing of these as models: they are counted through
    others(_inputs())
    assert _which(others) == 6 * [False] + 2 * [True]


def test_a_model_that_is_left_out_does_not_count():
    lwpf_patch.apply("timm", blocks="3-", exclude_models="*Swin*")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.student = _swin(), _deep()

    both, x = Both(), _inputs()
    both.teacher(x)
    both.student(x)
    assert _which(both) == 7 * [False] + [True]


def test_threads_that_call_a_model_at_once():
    x = _inputs()
    expected = _by_hand({2, 3})(x)
    lwpf_patch.apply("timm", blocks="2-")
    model, outputs = _deep(), []
    threads = [threading.Thread(target=lambda: outputs.append(model(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 4
    assert all(torch.equal(each, expected) for each in outputs)


# --- compiled, traced, distributed ------------------------------------------------------------------------------------


def _compiled_model(model):
    return torch.compile(model, fullgraph=True, backend="eager")


def _compiled_in_place(model):
    model.compile(fullgraph=True, backend="eager")
    return model


def _compiled_function(model):
    return torch.compile(lambda x: model(x), fullgraph=True, backend="eager")


def _compiled_blocks(model):
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    return model


def _exported(model):
    return torch.export.export(model, (images(),)).module()


def _traced_by_fx(model):
    return torch.fx.symbolic_trace(model)


def _traced_by_jit(model):
    return torch.jit.trace(model, images(), check_trace=False)


def _scripted(model):
    return torch.jit.script(model)


def _checkpointed(model):
    return lambda x: checkpoint(model, x, use_reentrant=False)


@pytest.mark.drawn(cases=3)
@pytest.mark.parametrize(
    "how",
    [_compiled_model, _compiled_in_place, _compiled_function, _compiled_blocks, _exported, _traced_by_fx,
     _traced_by_jit, _scripted, _checkpointed],
)  # fmt: skip
def test_the_first_call_is_compiled_or_traced(how):
    x = _inputs()
    expected = _by_hand({1, 3})(x)
    lwpf_patch.apply("timm", blocks="1,3")
    model = _deep()
    rtol = 1e-6 if how is _traced_by_jit else 1e-9  # torch.jit.trace computes the default scale in float32
    torch.testing.assert_close(how(model)(x), expected, rtol=rtol, atol=rtol / 100)
    other = _deep()  # of the same code, and not called yet
    torch.testing.assert_close(how(other)(x), expected, rtol=rtol, atol=rtol / 100)
    model(x)  # torch.export gives a model back the attributes that it had before
    assert _which(model) == [False, True, False, True]


def test_blocks_that_are_compiled_each_by_itself_share_what_was_compiled():
    lwpf_patch.apply("timm", blocks="4-")
    model, graphs = _deep(12), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    x = _inputs()
    model(x)
    model(x)
    assert len(graphs) <= 3  # of blocks that stay plain, and of those that forget


def test_compiled_blocks_that_are_missing():
    lwpf_patch.apply("timm", blocks="9-")
    with pytest.raises(Exception, match=r"blocks='9-' \(from apply\(blocks=...\)\) matches no block of VisionTr"):
        _compiled_model(_deep())(_inputs())


def test_wrapped_by_ddp(tmp_path):
    x = _inputs()
    expected = _run(_by_hand({2, 3}), x)
    lwpf_patch.apply("timm", blocks="2-")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(_deep())
        model(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert _which(model) == [False, False, True, True]
    found = [each.grad for each in model.parameters() if each.grad is not None]
    _same(found, expected[1:], exactly=False)
    assert list(lwpf_patch.status()["hosts"]["timm"]["blocks"]) == ["VisionTransformer"]


def test_replicas_of_data_parallel_are_refused():
    lwpf_patch.apply("timm", blocks="2-")
    model = _deep()
    replica = model.blocks[0].attn.func_d._replicate_for_data_parallel()
    with pytest.raises(LwpfError, match=r"nn\.DataParallel .* call the model once"):
        replica.softmax(torch.randn(2, 3))


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.drawn(cases=2)
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(how, called):
    x = _inputs()
    expected = _by_hand({2, 3})(x)
    lwpf_patch.apply("timm", blocks="2-")
    model = _deep()
    if called:
        model(x)
    model.average = how(model)  # within the model, where it would be counted after it
    if not called:
        model(x)
        assert _which(model)[DEPTH:] == DEPTH * [True]  # blocks 4 to 7 of one model
        return
    assert torch.equal(model.average(x), expected)
    assert _which(model) == 2 * [False, False, True, True]


def test_a_copy_that_is_called_first():
    x = _inputs()
    expected = _by_hand({2, 3})(x)
    lwpf_patch.apply("timm", blocks="2-")
    model = _deep()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), expected)
    assert torch.equal(model(x), expected)


def test_a_pickle_under_other_settings():
    x = _inputs()
    lwpf_patch.apply("timm", blocks="2-")
    model = _deep()
    model(x)
    saved = pickle.dumps(model)
    lwpf_patch.apply("timm", blocks=0)
    loaded = pickle.loads(saved)
    loaded(x)
    assert _which(loaded) == [True, False, False, False]


def test_checkpoints_are_the_ordinary_ones():
    plain = _deep().state_dict()
    lwpf_patch.apply("timm", blocks="2-")
    model = _deep()
    assert list(model.state_dict()) == list(plain)
    model(_inputs())
    assert list(model.state_dict()) == list(plain)
    model.load_state_dict(plain)


# --- by hand, and again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("called", [False, True])
def test_a_layer_that_is_set_by_hand_forgets(called):
    x, rule = _inputs(), lwpf_patch.PFU(mu=0.1, sigma=0)
    by_hand = _by_hand({3})
    by_hand.blocks[0].attn.func_d = copy.deepcopy(rule)
    expected = by_hand(x)
    lwpf_patch.apply("timm", blocks="last")
    model = _deep()
    if called:
        model(x)
    model.blocks[0].attn.func_d = rule
    assert torch.equal(model(x), expected)
    lwpf_patch.apply("timm", blocks="1,3")
    model(x)
    assert _which(model) == [True, True, False, True]
    assert model.blocks[0].attn.func_d.rule is rule


@pytest.mark.parametrize("called", [False, True])
def test_a_sep_that_is_set_by_hand_counts(called):
    lwpf_patch.apply("timm", func_d="none", sep="softmax_n", blocks="last")
    model, x = _deep(), _inputs()
    if called:
        model(x)
    model.blocks[0].attn.func_d.sep = "softmax_n:n=2"
    model(x)
    assert _which(model) == [True, False, False, True]


def test_other_blocks_and_revert():
    x = _inputs()
    expected = {blocks: _by_hand(parse_blocks(blocks).of(DEPTH))(x) for blocks in ("2-", "-0", "last")}
    lwpf_patch.revert()
    model = _deep()
    plain = model(x)
    for blocks in ("2-", "-0", "last", "2-"):
        lwpf_patch.apply("timm", blocks=blocks)
        assert torch.equal(model(x), expected[blocks])
    with lwpf_patch.patched("timm", blocks="-0"):
        assert torch.equal(model(x), expected["-0"])
    assert torch.equal(model(x), expected["2-"])
    lwpf_patch.apply("timm")
    assert _which(model) == DEPTH * [True]
    lwpf_patch.revert()
    assert torch.equal(model(x), plain)


@pytest.mark.drawn(days=2)
def test_other_blocks_after_it_was_compiled():
    x = _inputs()
    expected = {blocks: _by_hand(parse_blocks(blocks).of(DEPTH))(x) for blocks in ("2-", "-0")}
    lwpf_patch.apply("timm", blocks="2-")
    model = _deep()
    compiled = _compiled_model(model)
    for blocks in ("2-", "-0"):
        lwpf_patch.apply("timm", blocks=blocks)
        torch.testing.assert_close(compiled(x), expected[blocks], rtol=1e-9, atol=1e-11)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_part_that_matches_no_block():
    lwpf_patch.apply("timm", blocks="0,9-11")
    model = _deep()
    for _ in range(2):  # at each call
        with pytest.raises(SettingsError) as error:
            model(_inputs())
    assert str(error.value) == (
        "9-11 of blocks='0,9-11' (from apply(blocks=...)) matches no block of VisionTransformer, which has 4 attention "
        "modules, counted from 0: blocks.0.attn, blocks.1.attn, blocks.2.attn, blocks.3.attn. Choose others, or leave "
        "this model out: exclude_models='VisionTransformer'"
    )
    lwpf_patch.apply("timm", blocks="0", exclude_models="VisionTransformer")
    model(_inputs())
    assert _which(model) == DEPTH * [False]


def test_an_attention_module_on_its_own_is_block_0():
    lwpf_patch.apply("torch", blocks="1-")
    x = _inputs("torch")
    layer = nn.MultiheadAttention(24, 3, dtype=torch.float64)
    with pytest.raises(SettingsError, match=r"no block of MultiheadAttention, which has 1 attention module, counted"):
        layer(x, x, x)
    lwpf_patch.apply("torch", blocks="0")
    layer(x, x, x)
    assert _which(layer) == [True]


def test_a_function_that_is_called_past_all_modules():
    lwpf_patch.apply("torch", blocks="0")
    layer, x = nn.MultiheadAttention(24, 3, dtype=torch.float64), _inputs("torch")
    with pytest.raises(SettingsError, match="called directly, past its modules"):
        nn.functional.multi_head_attention_forward(
            x, x, x, 24, 3, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0, layer.out_proj.weight,
            layer.out_proj.bias,
        )  # fmt: skip


def test_with_uhop_it_is_refused_for_all_models():
    with pytest.raises(
        SettingsError, match=r"blocks='2-' .* and uhop=.* do not go together .*\.patch_model\(model, bl"
    ):
        lwpf_patch.apply("timm", blocks="2-", uhop="on")
    assert lwpf_patch.status()["hosts"]["timm"]["state"] == "off"


# --- one model --------------------------------------------------------------------------------------------------------


@pytest.mark.drawn(cases=2)
@pytest.mark.parametrize("host", HOSTS)
def test_one_model_alone(host):
    x, make = _inputs(host), HOSTS[host]
    expected = _run(_by_hand({2, 3}, make, host), x)
    other = _run(_by_hand({0, 1}, make, host), x)
    lwpf_patch.revert()
    model = make()
    plain = _run(model, x)
    inner = model.model if host == "transformers" else model
    names = patch_model(inner, func_d="relu", blocks="2-")
    assert len(names) == 2
    _same(_run(model, x), expected)
    lwpf_patch.apply(host, func_d="pfu")  # under which the others stay plain
    _same(_run(model, x), expected)
    assert patch_model(inner, func_d="relu", blocks="-1") != names
    _same(_run(model, x), other)
    _same(_run(copy.deepcopy(model), x), other)
    unpatch_model(inner)
    lwpf_patch.revert()
    _same(_run(model, x), plain)


def test_one_model_with_include_and_exclude():
    model, x = _deep(), _inputs()
    assert patch_model(model, blocks="1-", exclude="*.3.*") == ["blocks.1.attn", "blocks.2.attn"]
    model(x)
    assert _which(model) == [False, True, True]
    assert "NoForgetting(block=0)" in repr(model)
    with pytest.raises(SettingsError, match=r"leave none of these blocks; what they leave is blocks.0.attn \(block 0"):
        patch_model(model, blocks="1-", include="*.0.*")
    with pytest.raises(SettingsError, match=r"blocks='7' \(from patch_model\(blocks=...\)\) matches no block of Visi"):
        patch_model(model, blocks=7)


def test_one_model_with_uhop():
    x = _inputs()
    reference, model = _deep(), _deep()
    patch_model(model, uhop="iters=2", blocks="last 2")
    maps = feature_maps(model)
    assert len(maps) == 2
    assert [hasattr(layer, "feature_map") for layer in _layers(model)] == [False, False, True, True]
    assert torch.equal(model(x), reference(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(x).square().sum().backward()
    optimizer.step()
    assert all(each.steps == 1 for each in maps)
    randomise_maps(model)
    patch_model(model, uhop="iters=2", blocks="1-2")  # the map of block 2 is kept, that of block 3 goes
    assert [hasattr(layer, "feature_map") for layer in _layers(model)] == [False, True, True, False]
    assert feature_maps(model)[1] is maps[0]


# --- an unmodified script ---------------------------------------------------------------------------------------------

SCRIPT = """
import timm, torch
torch.manual_seed(0)
model = timm.create_model("test_vit", num_classes=5).double().eval()
{by_hand}
print(model(torch.randn(2, 3, 160, 160, dtype=torch.float64)).sum().item())
"""
BY_HAND = """
import lwpf_patch
lwpf_patch.apply("timm", func_d="none")
for block in model.blocks[4:]:
    block.attn.func_d = lwpf_patch.ReLU()
"""


@pytest.mark.drawn(days=2)
def test_an_unmodified_script(python, tmp_path):
    expected = python(code=SCRIPT.format(by_hand=BY_HAND)).stdout
    patched = python(code=SCRIPT.format(by_hand=""), LWPF_PATCH="timm", LWPF_BLOCKS=" 4- ")
    assert patched.stdout == expected
    line = (
        "2 of the 6 attention modules of VisionTransformer (test_vit) forget, blocks 4-: blocks.4.attn, blocks.5.attn"
    )
    assert patched.stderr.count(line) == 1
    assert "backend auto, blocks 4-" in patched.stderr
    run = python("-m", "lwpf_patch", "run", "--blocks", "last 2", "script.py")
    assert run.stdout == expected
    assert "blocks last 2" in run.stderr


def test_wrong_text_is_refused_before_anything_runs(python):
    out = python("-m", "lwpf_patch", "run", "--blocks", "6-x", "script.py", check=False)
    assert out.returncode
    assert re.search(r"blocks='6-x' \(from --blocks\)", out.stderr)
    both = python("-m", "lwpf_patch", "run", "--blocks=-5", "--uhop", "on", "script.py", check=False)
    assert "blocks='0-5' (from --blocks) and uhop=" in both.stderr
