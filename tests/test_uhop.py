"""U-Hop in timm: the feature map in the attention, Stage I while an unmodified script trains, checkpoints.

hflayers and DeepRC have theirs in their own files, folding has test_folding.py.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from vits import MODELS, feature_maps, images, randomise_maps, set_fused, vit

import lwpf_patch
from lwpf_patch.specs import parse_uhop
from lwpf_patch.uhop import HostFeatureMap, host_map, report, stage_one

pytestmark = pytest.mark.drawn(days=2)

STAGE = "iters=5,lr=0.5,samples=32"
CLASSES = torch.tensor([0, 1, 2])


def _train(model, optimizer, steps=1, batch=None):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images() if batch is None else batch), CLASSES).backward()
        optimizer.step()


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


def _model(make=vit, **settings):
    lwpf_patch.apply("timm", **{"uhop": STAGE, **settings})
    return make()


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_keys_and_queries_are_mapped(name, qk_norm, monkeypatch):
    """Against the plain model with an attention, written here, that maps both."""
    options = dict(qk_norm=qk_norm) if name == "Attention" else {}
    plain = MODELS[name](**options).double().eval()
    x = images().double()
    model = copy.deepcopy(plain)
    lwpf_patch.patch_model(model, uhop=STAGE)
    randomise_maps(model)
    matrices = iter([torch.eye(8) + each.weight.detach() for each in feature_maps(model)])

    def attend(query, key, value, **options):
        matrix = next(matrices)
        query, key = (torch.einsum("hij,bhnj->bhni", matrix, t) for t in (query, key))
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value

    set_fused(plain, True)
    fused = [model, copy.deepcopy(model)]
    set_fused(fused[0], True)
    set_fused(fused[1], False)
    ours = [each(x) for each in fused]
    gradients = [
        torch.autograd.grad(out.square().sum(), [each.weight for each in feature_maps(m)])
        for out, m in zip(ours, fused, strict=True)
    ]
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    expected = plain(x)
    for out in ours:
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_the_map_is_that_of_finite_differences():
    model = _model().double().eval()
    randomise_maps(model)
    x, weight = images(2).double(), feature_maps(model)[0].weight
    (gradient,) = torch.autograd.grad(model(x).square().sum(), weight)
    direction = torch.randn_like(weight)
    with torch.no_grad():
        ends = []
        for step in (1e-5, -2e-5):
            weight += step * direction
            ends.append(model(x).square().sum())
        weight += 1e-5 * direction
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, (gradient * direction).sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("func_d", ["none", "relu", "pfu:sigma=0"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_until_stage_one_the_output_is_bitwise_that_without(name, fused, func_d):
    model = MODELS[name]()
    set_fused(model, fused)
    with_map = copy.deepcopy(model)
    lwpf_patch.patch_model(model, func_d=func_d)
    lwpf_patch.patch_model(with_map, func_d=func_d, uhop=STAGE)
    x = images()
    assert torch.equal(model(x), with_map(x))
    plain = [p.grad for p in _backward(model, x)]
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, _backward(with_map, x), strict=True))
    assert all(not each.weight.grad.any() for each in feature_maps(with_map))


def _backward(model, x):
    model(x).square().sum().backward()
    return [p for name, p in model.named_parameters() if "feature_map" not in name]


def test_uhop_alone_forgets_nothing_and_together_with_func_d_it_forgets():
    assert isinstance(_model().blocks[0].attn.func_d.rule, lwpf_patch.NoForgetting)
    lwpf_patch.revert()
    assert isinstance(_model(func_d="relu").blocks[0].attn.func_d.rule, lwpf_patch.ReLU)


# --- Stage I --------------------------------------------------------------------------------------------------------


def _separate_by_hand(keys, iters, t, lr):
    """Stage I written out for the keys (M, d) of one head, with autograd, in float64."""
    weight = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64, requires_grad=True)
    different = ~torch.eye(len(keys), dtype=torch.bool)
    for _ in range(iters):
        mapped = F.normalize(keys @ (torch.eye(keys.shape[1]).double() + weight).T, dim=-1)
        distances = (mapped[:, None] - mapped[None]).square().sum(-1)[different]
        (gradient,) = torch.autograd.grad((-t * distances).exp().mean().log(), weight)
        weight = (weight - lr * gradient).detach().requires_grad_()
    return weight.detach()


def test_stage_one_separates_the_keys_of_the_first_step_and_changes_nothing_else():
    plain = vit().double()
    model = copy.deepcopy(plain)
    lwpf_patch.patch_model(model, uhop="iters=7,lr=0.3,t=1.5,samples=1000")
    x = images().double()
    keys = []
    handles = [
        block.attn.qkv.register_forward_hook(
            lambda module, inputs, out: keys.append(out.detach().reshape(3, 17, 3, 3, 8).permute(2, 3, 0, 1, 4)[1])
        )
        for block in plain.blocks
    ]
    _train(model, _sgd(model), batch=x)
    _train(plain, _sgd(plain), batch=x)
    ours = {name: value for name, value in model.state_dict().items() if "feature_map" not in name}
    for name, value in plain.state_dict().items():
        assert torch.equal(ours[name], value), name
    for each, of_layer in zip(feature_maps(model), keys, strict=True):
        for head in range(3):
            different = torch.unique(
                of_layer[head].flatten(0, 1), dim=0
            )  # the class token's key is that of every image
            expected = _separate_by_hand(different, 7, 1.5, 0.3)
            torch.testing.assert_close(each.weight[head].detach(), expected, rtol=1e-9, atol=1e-10)
    for handle in handles:
        handle.remove()


def test_every_iteration_lowers_the_loss_when_the_step_is_small():
    keys = torch.randn(2, 20, 6)
    phi = lwpf_patch.FeatureMap(6, heads=2)
    losses = phi.separate(keys, iters=30, lr=0.01)
    assert (losses.diff(dim=0) < 0).all()


def test_afterwards_the_map_trains_with_the_task_or_stays_frozen():
    for train in ("true", "false"):
        model = _model(uhop=f"{STAGE},train={train}")
        optimizer = _sgd(model)
        _train(model, optimizer)
        after = [each.weight.detach().clone() for each in feature_maps(model)]
        assert all(weight.any() for weight in after)
        _train(model, optimizer)
        moved = [not torch.equal(a, each.weight) for a, each in zip(after, feature_maps(model), strict=True)]
        assert all(moved) if train == "true" else not any(moved)
        lwpf_patch.revert()


def test_it_runs_once_or_every_so_many_steps(monkeypatch):
    runs = []
    monkeypatch.setattr(stage_one, "run_stage_one", lambda maps: runs.append((maps[0]._steps + 1, len(maps))))
    model = _model(uhop="every=3,until=8")
    optimizer = _sgd(model)
    _train(model, optimizer, steps=12)
    assert runs == [(1, 2), (4, 2), (7, 2)]
    runs.clear()
    lwpf_patch.revert()
    model = _model()
    _train(model, _sgd(model), steps=4)
    assert runs == [(1, 2)]


@pytest.mark.parametrize("text", ["", "every=1", "every=4,until=4", "every=4,until=5", "every=3"])
def test_when_stage_one_is_due(text):
    settings = parse_uhop(text or "on")
    due = [step for step in range(1, 40) if settings.is_due(step)]
    assert due == ([step for step in range(1, settings.until + 1) if (step - 1) % settings.every == 0] if text else [1])
    assert settings.last == due[-1]


def test_the_progress_line_tells_losses_and_time(caplog):
    model = _model()
    with caplog.at_level(logging.INFO, "lwpf_patch"):
        _train(model, _sgd(model))
    (line,) = [record.message for record in caplog.records if "Stage I" in record.message]
    assert "on timm after step 1: 2 layers, 5 iterations" in line
    before, after = line.rpartition(": ")[2].split(", ")[0].split(" -> ")
    assert float(after) < float(before)


def _idle(caplog, keys, settings=STAGE, steps=0):
    """Runs Stage I on keys for each of two layers, and returns what it warns of."""
    maps = [HostFeatureMap(8, 3, parse_uhop(settings), "timm", torch.zeros(())) for _ in range(2)]
    for each, some in zip(maps, keys, strict=True):
        each._keys, each._steps = some, steps
    caplog.clear()
    stage_one.run_stage_one(maps)
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_a_stage_one_that_separates_nothing_says_so_once(caplog):
    different, one = torch.randn(3, 40, 8), torch.randn(3, 1, 8)
    alike = one * (1 + 1e-6 * torch.randn(3, 40, 1))  # as equal keys come out of different places of a batch
    assert _idle(caplog, (different, different)) == []
    (message,) = _idle(caplog, (different, alike))
    assert "in 1 layers of timm all keys are equal but for rounding" in message
    assert "(samples)" in message
    (message,) = _idle(caplog, (one.expand(3, 40, 8), alike))
    assert "1 layers of timm saw one key only" in message
    assert "in 1 layers of timm all keys are equal but for rounding" in message
    apart = torch.eye(8).repeat(3, 1, 1)
    slow = "iters=5,lr=1e-6"
    (message,) = _idle(caplog, (apart, different), slow)
    assert "the separation loss of every layer of timm by less than 1 %: it separated nothing" in message
    assert all(option in message for option in ("(iters)", "(lr)", "(samples)"))
    assert _idle(caplog, (apart, different), slow, steps=501) == []  # the first one may have done it all


def test_repeated_keys_are_one_pattern_and_one_alone_is_left_out(caplog):
    model = _model()
    first, second = feature_maps(model)
    first._keys = torch.randn(3, 1, 8).expand(3, 10, 8)
    second._keys = torch.randn(3, 4, 8).repeat(1, 3, 1)
    assert stage_one._different(second).shape == (3, 4, 8)
    stage_one.run_stage_one([first, second])
    assert "1 layers of timm saw one key only" in caplog.text
    assert not first.weight.any()
    assert second.weight.any()


def test_a_loss_that_goes_up_is_a_warning(caplog):
    model = _model(uhop="iters=3,lr=1e6")
    _train(model, _sgd(model))
    assert "the separation loss of some layers of timm went up: lr=1e+06 is too large" in caplog.text


def _fail(model, optimizer, message):
    """Makes a step whose Stage I meets a key that is no number; the network itself stays finite."""
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    model(images()).sum().backward()
    feature_maps(model)[1]._keys[0, 0, 0] = torch.nan
    with pytest.raises(lwpf_patch.StageOneError, match=message):
        optimizer.step()
    for name, value in model.state_dict().items():
        # afterwards the task's own step moves the map as well
        if name.endswith("steps") or (name.endswith("feature_map.weight") and not feature_maps(model)[0].steps):
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("options", ["", ",every=2,until=5"])
def test_a_stage_one_that_raised_stays_due(options, monkeypatch, caplog):
    monkeypatch.setattr(stage_one, "FAILURES", {})
    model = _model(uhop=STAGE + options)
    optimizer, maps = torch.optim.SGD(model.parameters(), lr=1e-3), feature_maps(model)
    _fail(model, optimizer, r"the keys of 1 of 2 layers hold NaN or infinity")
    assert "Stage I failed for 2 feature maps when it was last tried" in report.report("timm")
    assert "the keys of 1 of 2 layers hold NaN" in report.report("timm")
    again = vit()
    again.load_state_dict(model.state_dict())
    assert lwpf_patch.status()["hosts"]["timm"]["feature_maps"]["separated"] == 0
    for each, optimizer_of_it in ((model, optimizer), (again, _sgd(again))):
        with caplog.at_level(logging.INFO, "lwpf_patch"):
            _train(each, optimizer_of_it)
        assert caplog.text.count("Stage I on timm after step 1: 2 layers") == 1
        caplog.clear()
        assert all(one.weight.any() and one.steps == 1 for one in feature_maps(each))
    assert report.report("timm") is None
    if options:
        _train(model, optimizer)
        assert all(each._steps == 2 for each in maps)
        _fail(model, optimizer, "the keys of 1 of 2 layers")
        assert "Stage I failed" in report.report("timm")
        _train(model, optimizer)
        assert all(each._steps == 3 for each in maps)
        assert report.report("timm") is None


def test_a_descent_that_leaves_the_numbers_changes_no_map(monkeypatch):
    monkeypatch.setattr(stage_one, "FAILURES", {})
    monkeypatch.setattr(stage_one, "separation_gradient", lambda weight, *_: (weight.sum((1, 2)), weight - torch.inf))
    model = _model()
    optimizer = _sgd(model)
    for _ in range(2):
        with pytest.raises(lwpf_patch.StageOneError, match=r"did not stay finite with lr=0\.5, t=2"):
            _train(model, optimizer)
        assert all(not each.weight.any() and not each.steps for each in feature_maps(model))


def test_a_step_counts_for_no_map_where_one_of_them_is_refused(monkeypatch):
    model = _model()
    monkeypatch.setattr(feature_maps(model)[1], "weight", nn.Parameter(torch.zeros(192, dtype=torch.float64)))
    monkeypatch.setattr(HostFeatureMap, "forward", lambda self, query, key: setattr(self, "_keys", key) or query)
    with pytest.raises(lwpf_patch.LwpfError, match="Stage I needs it whole"):
        _train(model, _sgd(model))
    assert all(not each.steps for each in feature_maps(model))


@pytest.mark.parametrize("batch", [30, 64, 128, 256, 264, 512])
@pytest.mark.parametrize("length", [16, 17, 196, 197, 198])
def test_sampled_keys_come_from_everywhere(batch, length):
    each = HostFeatureMap(2, 1, parse_uhop("on"), "timm", torch.zeros(()))
    place = torch.arange(batch * length)
    keys = torch.stack([place // length, place % length], -1).float().view(batch, 1, length, 2)
    sample = host_map._sample(each, keys)[0]
    assert len(torch.unique(sample, dim=0)) == min(256, batch * length) == len(sample)
    items, positions = sample.unbind(1)
    assert len(torch.unique(items)) >= min(batch, 256) * 0.6
    assert len(torch.unique(positions)) >= min(length, 256) * 0.6


# --- in scripts that do not know it ---------------------------------------------------------------------------------


def test_gradient_checkpointing():
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        model = _model()
        model.set_grad_checkpointing(checkpointing)
        x = images()
        _train(model, _sgd(model), steps=2, batch=x)
        results.append(model.state_dict())
        lwpf_patch.revert()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradscaler(dtype):
    model = _model(lambda: vit().float())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1)  # the first steps overflow
    made = 0
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = F.cross_entropy(model(images(dtype=torch.float32)), CLASSES)
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        made += scaler.get_scale() >= before
        assert feature_maps(model)[0]._steps == min(made, 1)
        if made > 1:
            break
    assert made
    assert all(each.weight.any() and each.weight.dtype == torch.float32 for each in feature_maps(model))


def test_pure_half_precision():
    model = _model().to(torch.bfloat16)
    _train(model, _sgd(model), steps=2, batch=images().to(torch.bfloat16))
    assert all(each.weight.any() and each.weight.dtype == torch.bfloat16 for each in feature_maps(model))


def test_gradient_accumulation_counts_steps_of_the_optimizer():
    model = _model()
    optimizer = _sgd(model)
    for _ in range(3):
        F.cross_entropy(model(images()), CLASSES).backward()
        assert not feature_maps(model)[0].weight.any()
    optimizer.step()
    assert feature_maps(model)[0].weight.any()


def test_several_optimizers():
    """Stage I follows the one that has the map; that of the head, and another model's, do not count."""
    model, other = _model(uhop="iters=2,every=2"), nn.Linear(2, 2)
    maps = [p for name, p in model.named_parameters() if "feature_map" in name]
    rest = [p for name, p in model.named_parameters() if "feature_map" not in name]
    optimizers = [torch.optim.SGD(other.parameters()), torch.optim.SGD(rest, lr=0.1), torch.optim.Adam(maps)]
    for step in range(3):
        other(torch.randn(1, 2)).sum().backward()
        F.cross_entropy(model(images()), CLASSES).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert all(each._steps == step + 1 for each in feature_maps(model))


def test_a_map_that_no_optimizer_has_is_an_error():
    lwpf_patch.revert()
    model = vit()
    optimizer = _sgd(model)
    lwpf_patch.apply("timm", uhop=STAGE)
    with pytest.raises(lwpf_patch.LwpfError, match=r"no optimizer has the feature maps of timm.*before the optimizer"):
        _train(model, optimizer, steps=stage_one.PATIENCE + 1)
    # As in a notebook, where the traceback keeps the model: the next one trains.
    another = _model()
    _train(another, _sgd(another), steps=stage_one.PATIENCE + 1)
    assert feature_maps(another)[0].weight.any()
    with pytest.raises(lwpf_patch.LwpfError, match="no optimizer has the feature maps"):
        _train(model, optimizer)


def test_a_stale_forward_pass_is_no_reason_for_that_error():
    idle, model = _model(), vit()
    idle(images())
    optimizer = _sgd(model)
    _train(model, optimizer, steps=stage_one.PATIENCE + 1)
    for _ in range(stage_one.PATIENCE + 1):  # a generator's images, while its critic trains
        idle(images()).detach()
        _train(model, optimizer)
    assert not feature_maps(idle)[0].weight.any()


def test_what_the_script_freezes_stays_as_it_is_unless_frozen_maps_were_asked_for():
    for settings, separated in ((STAGE, False), (f"{STAGE},train=false", True)):
        model = _model(uhop=settings)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head"))
        _train(model, torch.optim.SGD(model.head.parameters(), lr=0.1), steps=2)
        assert all(bool(each.weight.any()) == separated for each in feature_maps(model))
        lwpf_patch.revert()


def test_a_frozen_map_stays_frozen_when_the_script_thaws_everything():
    model = _model(uhop=f"{STAGE},train=false").requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    _train(model, optimizer)
    after = feature_maps(model)[0].weight.detach().clone()
    assert after.any()
    _train(model, optimizer, steps=2)
    assert torch.equal(feature_maps(model)[0].weight, after)


def test_training_in_evaluation_mode():
    model = _model().eval()
    _train(model, _sgd(model))
    assert all(each.weight.any() for each in feature_maps(model))


def _copy_of_the_parameters(model):
    """As BYOL, DINO and MoCo make their second network."""
    other = copy.deepcopy(model)

    @torch.no_grad()
    def update(model):
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)

    return other, update


def _averages():
    from timm.utils import ModelEmaV2, ModelEmaV3
    from torch.optim.swa_utils import AveragedModel

    def made_of(make, update):
        def both(model):
            average = make(model)
            return average.module, getattr(average, update)

        return both

    return {
        "ModelEmaV2": made_of(lambda model: ModelEmaV2(model, decay=0.5), "update"),
        "ModelEmaV3": made_of(lambda model: ModelEmaV3(model, decay=0.5), "update"),
        "AveragedModel": made_of(AveragedModel, "update_parameters"),
        "with buffers": made_of(lambda model: AveragedModel(model, use_buffers=True), "update_parameters"),
        "parameters": _copy_of_the_parameters,
    }


@pytest.mark.parametrize("kind", _averages())
def test_an_average_of_the_model_computes_with_the_average_of_the_map(kind):
    model = _model()
    average, update = _averages()[kind](model)
    optimizer = _sgd(model)
    for _ in range(4):
        _train(model, optimizer)
        update(model)
    average.eval()
    x = images()
    expected = average(x)
    assert all(each.weight.any() for each in feature_maps(average))
    again = vit().eval()
    again.load_state_dict(average.state_dict())
    assert torch.equal(again(x), expected)
    for each in feature_maps(again):
        nn.init.zeros_(each.weight)
    assert not torch.equal(again(x), expected)
    lwpf_patch.fold(average)
    torch.testing.assert_close(average(x), expected)


def test_weight_decay_pulls_to_the_identity():
    model = _model()
    randomise_maps(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0)
    before = feature_maps(model)[0].weight.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(feature_maps(model)[0].weight.detach(), 0.9 * before)


@pytest.mark.drawn(days=4)
def test_under_torch_compile():
    torch.manual_seed(3)
    x = images()
    results = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(3)
        model = _model()
        run = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
        optimizer = _sgd(model)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(run(x), CLASSES).backward()
            optimizer.step()
        results.append(model.state_dict())
        assert feature_maps(model)[0].weight.any()
        lwpf_patch.revert()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


def test_data_parallel_replicas_are_refused():
    model = _model()
    replica = feature_maps(model)[0]._replicate_for_data_parallel()
    replica.weight = feature_maps(model)[0].weight.detach()
    query = torch.randn(2, 3, 5, 8)
    with pytest.raises(lwpf_patch.LwpfError, match=r"nn\.DataParallel"):
        replica(query, query)


def test_a_scripted_model():
    model = _model().eval()
    with pytest.raises(lwpf_patch.LwpfError, match="waits for Stage I"):
        torch.jit.script(model.blocks[0].attn)
    randomise_maps(model)
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    for fused in (True, False):
        set_fused(model, fused)
        attention = model.blocks[0].attn
        torch.testing.assert_close(torch.jit.script(attention)(x), attention(x))


@pytest.mark.drawn(days=2)
def test_traced_and_exported():
    model = _model().eval()
    randomise_maps(model)
    x = images()
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    attention = model.blocks[0].attn
    traced = torch.fx.symbolic_trace(attention, concrete_args=dict(attn_mask=None, is_causal=False))
    tokens = torch.randn(2, 17, 24, dtype=torch.float64)
    torch.testing.assert_close(traced(tokens), attention(tokens))


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_the_map_loads_and_means_the_identity():
    lwpf_patch.revert()
    plain = vit()
    model = _model()
    randomise_maps(model)
    model.load_state_dict(plain.state_dict(), strict=True)
    lwpf_patch.revert()
    x = images()
    expected = plain(x)
    lwpf_patch.apply("timm", uhop=STAGE)
    again = vit()
    again.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(again(x), expected)
    assert all(each._steps == 0 and not each.weight.any() for each in feature_maps(again))


def test_a_checkpoint_with_the_map_comes_back_exactly():
    model = _model()
    _train(model, _sgd(model), steps=2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = vit()
    again.load_state_dict(torch.load(file, weights_only=True))
    model.eval(), again.eval()
    x = images()
    assert torch.equal(model(x), again(x))
    assert all(each._separated for each in feature_maps(again))
    pickled = pickle.loads(pickle.dumps(model))
    assert torch.equal(pickled(x), model(x))


@pytest.mark.parametrize("how", ["apply", "patch_model"])
def test_a_checkpoint_with_the_map_in_a_model_without_names_the_remedy(how, caplog):
    state = _model().state_dict()
    lwpf_patch.revert()
    if how == "apply":
        lwpf_patch.apply("timm", func_d="relu")
    model = nn.ModuleDict({"module": vit()})
    if how == "patch_model":
        lwpf_patch.patch_model(model, func_d="relu")
    model = pickle.loads(pickle.dumps(model))["module"]
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*feature_map") as raised:
        model.load_state_dict(state)
    assert str(raised.value).count("lwpf_patch.fold(model)") == 1
    assert "LWPF_UHOP=on" in str(raised.value)
    caplog.clear()
    model.load_state_dict(state, strict=False)
    (record,) = caplog.records
    assert "lwpf_patch.fold(model). They are left out" in record.message
    with pytest.raises(RuntimeError) as raised:  # another mistake: nothing of ours
        model.load_state_dict({"head": torch.zeros(())})
    assert "fold" not in str(raised.value)


def test_a_resumed_run_goes_on_where_it_stopped():
    """Between the runs of a bilevel Stage I, also in another process."""
    batches = [images() for _ in range(6)]

    def go_on(model, optimizer, some):
        for batch in some:
            _train(model, optimizer, batch=batch)

    torch.manual_seed(1)
    model = _model(uhop="iters=3,every=2,until=6")
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters())
    go_on(model, optimizer, batches)
    first = vit()
    first.load_state_dict(start)
    optimizer = torch.optim.AdamW(first.parameters())
    go_on(first, optimizer, batches[:2])
    resumed = vit()
    resumed.load_state_dict(first.state_dict())
    resumed_optimizer = torch.optim.AdamW(resumed.parameters())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    go_on(resumed, resumed_optimizer, batches[2:])
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert all(each._steps == 5 for each in feature_maps(resumed))  # that of its last Stage I


def test_a_model_saved_with_a_map_is_not_run_without(monkeypatch):
    model = _model()
    randomise_maps(model)
    saved = pickle.dumps(model)
    lwpf_patch.apply("timm", func_d="relu", uhop=STAGE)  # other settings: the map stays
    assert feature_maps(model)[0].weight.any()
    del model
    lwpf_patch.apply("timm", func_d="relu")
    with pytest.raises(lwpf_patch.ConflictError, match="saved with a feature map"):
        pickle.loads(saved)


def test_revert_takes_the_map_away_and_says_what_is_lost(caplog):
    model = _model()
    assert "feature_map" in repr(model)
    randomise_maps(model)
    with caplog.at_level(logging.WARNING, "lwpf_patch"):
        lwpf_patch.revert()
    assert "2 trained feature maps of timm were removed" in caplog.text
    assert not feature_maps(model)
    assert not any("feature_map" in name for name in model.state_dict())


# --- models that lose their maps, or are made without data ---------------------------------------------------------


@pytest.mark.parametrize("how", ["unpatch", "patch again"])
def test_taking_trained_maps_from_a_model_is_said(how, caplog):
    model = vit()
    lwpf_patch.patch_model(model, uhop=STAGE)
    randomise_maps(model)
    lwpf_patch.unpatch_model(model) if how == "unpatch" else lwpf_patch.patch_model(model, func_d="relu")
    assert "2 trained feature maps" in caplog.text


def test_a_module_without_data_can_be_made():
    from torch._subclasses.fake_tensor import FakeTensorMode

    attention_class = type(_model().blocks[0].attn)
    with FakeTensorMode():
        attention = attention_class(24, num_heads=3)
        assert attention(torch.randn(2, 5, 24)).shape == (2, 5, 24)


def test_a_model_on_meta_gets_a_checkpoint_without_the_map():
    lwpf_patch.revert()
    state = vit().state_dict()
    lwpf_patch.apply("timm", uhop=STAGE)
    with torch.device("meta"):
        model = timm.models.VisionTransformer(
            img_size=16, patch_size=4, num_classes=5, embed_dim=24, depth=2, num_heads=3
        )
    model.load_state_dict(state, assign=True)
    _train(model, _sgd(model))
    assert all(each.weight.any() for each in feature_maps(model))


# --- requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iters=0", "iters='0'.*must be a whole number of at least 1"),
        ("iters=1.5", "iters must be a whole number"),
        ("t=0", "t must be a number above 0"),
        ("lr=-1", "lr must be a number above 0"),
        ("loss=median", "loss must be 'average' or 'maximum'"),
        ("train=maybe", "train must be true or false"),
        ("samples=1", "samples must be a whole number of at least 2"),
        ("until=5", "needs every="),
        ("iter=5", "unknown option of uhop 'iter'"),
        ("100", "write 'on', 'off', or options as in"),
        ("iters=1,100", "'100' .*is not of the form option=value"),
        (5, "is not text"),
    ],
)
def test_wrong_requests_name_the_option(text, message):
    with pytest.raises(lwpf_patch.SettingsError, match=message):
        lwpf_patch.apply("timm", uhop=text)


@pytest.mark.drawn(days=4)
def test_the_variable_the_command_and_the_report(python):
    code = """
import sys
sys.path.insert(0, {tests!r})
import torch
from vits import vit, images
model = vit()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
if {train}:
    model(images()).sum().backward()
    optimizer.step()
else:
    model(images())
print(model.blocks[0].attn.func_d, bool(model.blocks[0].attn.feature_map.weight.any()))
"""
    from conftest import ROOT

    tests = str(ROOT / "tests")
    out = python(code=code.format(tests=tests, train=True), LWPF_PATCH="timm", LWPF_UHOP="iters=3")
    assert out.stdout.strip() == "NoForgetting() True"
    assert "uhop iters=3," in out.stderr
    assert "Stage I on timm after step 1" in out.stderr
    failing = code.format(tests=tests, train=True).replace(
        "    optimizer.step()",
        """
    model.blocks[0].attn.feature_map._keys[:] = torch.inf
    try:
        optimizer.step()
    except RuntimeError:
        pass""",
    )
    out = python(code=failing, LWPF_PATCH="timm", LWPF_UHOP="on")
    assert out.stdout.strip() == "NoForgetting() False"
    assert "timm: U-Hop's Stage I failed for 2 feature maps" in out.stderr.splitlines()[-1]
    assert "the keys of 1 of 2 layers hold NaN or infinity" in out.stderr.splitlines()[-1]
    out = python(code=code.format(tests=tests, train=False), LWPF_PATCH="timm", LWPF_UHOP="on")
    assert "Stage I never ran, and every feature map is still the identity" in out.stderr
    out = python("-m", "lwpf_patch", "run", "--uhop", "iters=2", "--func-d", "relu", "script.py")
    assert out.stdout.strip() == "ReLU() False"
    out = python("-m", "lwpf_patch", "run", "--uhop", "iter=2", "script.py", check=False)
    assert out.returncode == 2
    assert "unknown option of uhop 'iter' (from --uhop)" in out.stderr
    out = python("-m", "lwpf_patch", "diff", "timm", "--uhop", "on")
    assert out.stdout.count("+        q = self.feature_map(q, k)\n") > 30


def test_the_report_tells_of_maps_of_another_model_that_waited():
    model, other = _model(), vit()
    other(images())
    _train(model, _sgd(model))
    message = report.report("timm")
    assert "Stage I ran in this process, but not on 2 feature maps that waited for it" in message
    assert "never ran" not in message


def test_status_tells_of_the_maps():
    model = _model()
    _train(model, _sgd(model))
    status = lwpf_patch.status()["hosts"]["timm"]
    assert status["settings"]["uhop"].startswith("iters=5,")
    assert status["feature_maps"]["separated"] >= 2


def test_every_version_of_timm_in_use_is_edited():
    assert timm.__version__
    plans = lwpf_patch.hosts.HOSTS["timm"].plans(lwpf_patch.settings.Settings(uhop="on", include="*.Attention"))
    assert any("self.feature_map(q, k)" in plan.diff() for plan in plans)
