"""Observing: the figures against an oracle, layers and steps, the same training bit for bit, files, errors."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import pickle
import sys

import pytest
import torch
from conftest import require_host
from oracle import Forgetting, dots, forget, normalised, resolve_threshold
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lwpf_patch
from lwpf_patch.backends import Call
from lwpf_patch.forgetting import make_func_d
from lwpf_patch.observing import requesting, statistics, writing
from lwpf_patch.observing.writing import read_records
from lwpf_patch.specs import Observe, Sep

require_host("timm")
from timm_classes import made  # noqa: E402
from vits import images, set_fused, vit  # noqa: E402

NAMES = ("forgotten", "empty_rows", "entropy", "forgotten_weight")

#: Text of a func_d and what it means to the oracle.
RULES = {
    "relu": Forgetting("relu"),
    "pfu:mu=0.3,bias=-0.2,sigma=0": Forgetting("pfu", 0.3, -0.2),
    "pfu:mu=dmedian,bias=mu,sigma=0.5": Forgetting("pfu", "dmedian", "mu"),
    "none": Forgetting("none"),
}


# --- the figures ----------------------------------------------------------------------------------------------------


def expected(scores: torch.Tensor, hidden: torch.Tensor, rule: Forgetting, alpha: float = 1.0, n: float = 0.0) -> dict:
    """The figures of scores (B, H, L, S), float64, row by row; hidden is of the same shape."""
    batch, heads, length, _ = scores.shape
    places = list(itertools.product(range(batch), range(heads), range(length)))
    rows = {place: scores[place][~hidden[place]] for place in places}
    threshold, value = resolve_threshold(rule, list(rows.values()))
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for head in range(heads):
        keys = lost = empty = there = 0
        entropies, parts = [], []
        for (_, h, _), row in rows.items():
            if h != head or not len(row):
                continue
            computed, kept = forget(rule, row, threshold, value, "exclude")
            weights, kept = normalised(computed, alpha, n), kept != 0
            keys, lost, there = keys + len(row), lost + int((~kept).sum()), there + 1
            empty += not kept.any()
            parts.append(float(weights[~kept].sum()))
            if kept.any():
                shares = [float(w / weights[kept].sum()) for w in weights[kept]]
                entropies.append(-sum(p * math.log(p) for p in shares if p > 0))
        found["forgotten"].append(lost / keys)
        found["empty_rows"].append(empty / there)
        found["entropy"].append(sum(entropies) / len(entropies) if entropies else math.nan)
        found["forgotten_weight"].append(sum(parts) / there)
    return found


def assert_close(found, wanted: dict, tolerance: float = 1e-6) -> None:
    for name in NAMES:
        values = getattr(found, name, None)
        values = found[name] if values is None else values.tolist()
        values = [math.nan if value is None else value for value in values]
        assert values == pytest.approx(wanted[name], abs=tolerance, nan_ok=True), name


def scores_of(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    rows = [torch.stack([dots(key[b, h], q) for q in query[b, h]]) for b in range(query.shape[0])
            for h in range(query.shape[1])]  # fmt: skip
    return scale * torch.stack(rows).unflatten(0, query.shape[:2])


@pytest.mark.parametrize("sep", [Sep(), Sep(n=1.5), Sep(2.0)], ids=str)
@pytest.mark.parametrize("text", RULES)
def test_figures_of_a_call(text, sep, monkeypatch):
    """In blocks of few rows, with a boolean mask that leaves one row without a key, and grouped queries."""
    monkeypatch.setattr(statistics, "BLOCK", 40)
    query = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    key = torch.randn(2, 2, 6, 3, dtype=torch.float64)
    mask = torch.rand(2, 1, 5, 6) > 0.3
    mask[1, 0, 2] = False
    call = Call(
        query, key, key, make_func_d(text), mask, scale=0.7, enable_gqa=True, training=True, sep=sep
    )  # fmt: skip
    scores = scores_of(query, key[:, [0, 0, 1, 1]], 0.7)
    wanted = expected(scores, ~mask.expand_as(scores), RULES[text], *sep)
    before = torch.get_rng_state()
    assert_close(statistics.of_call(call), wanted)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("text", RULES)
def test_figures_of_a_causal_call_and_of_an_additive_mask(text):
    query, key = (torch.randn(2, 2, 6, 3, dtype=torch.float64) for _ in range(2))
    scores = scores_of(query, key, 3**-0.5)
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    call = Call(query, key, key, make_func_d(text), is_causal=True)
    wanted = expected(scores, later.expand_as(scores), RULES[text])
    assert_close(statistics.of_call(call), wanted)
    mask = torch.randn(6, 6, dtype=torch.float64).masked_fill(later, torch.finfo(torch.float64).min)
    call = Call(query, key, key, make_func_d(text), mask)
    assert_close(statistics.of_call(call), expected(scores + mask, later.expand_as(scores), RULES[text]))


def test_figures_of_rows_that_forget_everything():
    query = torch.ones(1, 1, 3, 2, dtype=torch.float64)
    found = statistics.of_call(Call(query, -query, query, make_func_d("relu")))
    assert_close(found, {"forgotten": [1], "empty_rows": [1], "entropy": [math.nan], "forgotten_weight": [1]})
    found = statistics.of_call(Call(query, -query, query, make_func_d("relu:empty_rows=keep")))
    kept = {"forgotten": [0], "empty_rows": [0], "entropy": [math.log(3)], "forgotten_weight": [0]}
    assert_close(found, kept)


def test_a_function_of_the_user_is_asked_in_blocks_and_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 12)

    def function(scores):
        torch.rand(3)
        return scores.relu(), scores > 0

    query, key = (torch.randn(2, 2, 5, 3, dtype=torch.float64) for _ in range(2))
    before = torch.get_rng_state()
    found = statistics.of_call(Call(query, key, key, make_func_d(function)))
    assert torch.equal(torch.get_rng_state(), before)
    scores = scores_of(query, key, 3**-0.5)
    assert_close(found, expected(scores, torch.zeros_like(scores, dtype=torch.bool), RULES["relu"]))


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operator makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.size = max(self.size, each.untyped_storage().nbytes() // each.element_size())
        return out


@pytest.mark.parametrize("text", ["relu", "pfu"])
def test_memory_is_linear_in_the_number_of_keys(text):
    query = torch.randn(1, 2, 4096, 4)
    mask = torch.ones(1, 1, 1, 4096, dtype=torch.bool)
    call = Call(query, query, query, make_func_d(text), mask)
    with _Largest() as largest:
        found = statistics.of_call(call)
    assert largest.size <= max(query.numel(), statistics.SCORES) < 4096**2 / 8
    scores = query @ query.transpose(-2, -1) / 2
    kept = scores > (0 if text == "relu" else scores.median())
    assert found.forgotten.tolist() == pytest.approx((~kept).float().mean((0, 2, 3)).tolist(), abs=0.02)


# --- layers and steps -----------------------------------------------------------------------------------------------


def patched_vit(func_d: str = "relu", **options) -> nn.Module:
    model = vit()
    lwpf_patch.patch_model(model, func_d=func_d, **options)
    return model


@pytest.mark.parametrize("func_d", ["relu", "pfu:mu=0.1,sigma=0", "pfu:sigma=0"])
def test_fused_and_eager_branches_agree(func_d):
    x, records = images(), []
    model = patched_vit(func_d)
    for fused, backend in ((True, "cpu"), (True, "eager"), (False, "eager")):
        set_fused(model, fused)
        for block in model.blocks:
            block.attn.func_d.backend = backend
        with lwpf_patch.observe(model) as seen:
            model(x)
        assert [(r["step"], r["layer"], r["training"], r["model"]) for r in seen.records] == [
            (1, "blocks.0.attn", True, "VisionTransformer"),
            (1, "blocks.1.attn", True, "VisionTransformer"),
        ]
        records.append(seen.records)
    for other in records[1:]:
        for one, two in zip(records[0], other, strict=True):
            assert len(one["forgotten"]) == 3
            assert_close(one, two, 2e-6)


def test_only_some_items_are_looked_at_and_all_count_for_the_median():
    query, key = torch.randn(2, 7, 2, 5, 3, dtype=torch.float64)  # of one tensor two scores each would be the same
    query[4:] *= 3
    scores = scores_of(query, key, 3**-0.5)
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    few = slice(0, statistics.ITEMS)
    found = statistics.of_call(Call(query, key, query, make_func_d("relu")))
    assert_close(found, expected(scores[few], hidden[few], RULES["relu"]))
    found = statistics.of_call(Call(query, key, query, make_func_d("pfu")))
    assert found.forgotten.tolist() == pytest.approx(
        (scores[few] <= scores.median()).double().mean((0, 2, 3)).tolist(), abs=1e-6
    )


def test_steps_are_those_of_the_optimizer_and_evaluations_are_counted_apart():
    model = patched_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = lwpf_patch.observe(model, every=2)
    for _ in range(5):
        for _ in range(2):  # accumulated gradients
            model(images()).sum().backward()
        optimizer.step()
    model.eval()
    for _ in range(3):
        model(images())
    seen.close()
    model.train()(images())
    steps = [(r["step"], r["training"]) for r in seen.records if r["layer"] == "blocks.0.attn"]
    assert steps == [(1, True), (3, True), (5, True), (5, False), (5, False)]
    assert len(seen.records) == 2 * len(steps)
    with lwpf_patch.observe(patched_vit()) as seen:  # no optimizer has its parameters
        pass
    other = patched_vit()
    with lwpf_patch.observe(other) as seen:
        other(images())
        other(images())
    assert [r["step"] for r in seen.records] == [1, 1, 2, 2]


def test_steps_where_the_optimizer_or_its_parameters_come_after_the_request():
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, passes: int) -> None:
        for _ in range(steps):
            for _ in range(passes):
                model(images()).sum().backward()
            optimizer.step()

    model, head = patched_vit(), nn.Linear(1, 1)
    with lwpf_patch.observe(model) as seen:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3, 4)
    assert [r["step"] for r in seen.records[::2]] == [1, 2, 3]
    model = patched_vit()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    with lwpf_patch.observe(model) as seen:
        train(model, optimizer, 2, 1)  # frozen, so that each pass is a step
        optimizer.add_param_group({"params": list(model.parameters())})
        train(model, optimizer, 3, 4)
    assert [r["step"] for r in seen.records[::2]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_is_not_seen(reentrant, monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = patched_vit()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model, calls = Model(), []
    original = statistics.of_call
    monkeypatch.setattr(statistics, "of_call", lambda *call: calls.append(1) or original(*call))
    with lwpf_patch.observe(model) as seen, lwpf_patch.observe(model.inner) as inner:
        for _ in range(2):
            model(images().requires_grad_()).sum().backward()
    assert [r["step"] for r in seen.records] == [1, 1, 2, 2]
    assert [r["layer"] for r in seen.records][:2] == ["inner.blocks.0.attn", "inner.blocks.1.attn"]
    assert [r["step"] for r in inner.records] == [1, 1, 2, 2]
    assert len(calls) == 8


@pytest.mark.parametrize("fused", [True, False])
def test_the_training_is_the_same_bit_for_bit(fused):
    def train(observed: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = vit(attn_drop_rate=0.1).float()
        lwpf_patch.patch_model(model, func_d="pfu")
        set_fused(model, fused)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        handle = lwpf_patch.observe(model) if observed else None
        for _ in range(3):
            optimizer.zero_grad()
            model(images(dtype=torch.float32)).square().sum().backward()
            optimizer.step()
        if handle is not None:
            handle.close()
            assert len(handle.records) == 6
        return [*model.parameters(), torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_a_model_that_is_observed_can_be_copied_pickled_and_scripted_and_nothing_is_left_on_it():
    model, x = patched_vit().eval(), images()
    with lwpf_patch.observe(model) as seen:
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        scripted = torch.jit.script(model)
        for each in (copied, loaded, scripted):
            torch.testing.assert_close(each(x), model.forward(x))
        assert not seen.records
        with pytest.raises(AssertionError, match="Input width"):
            model(x[..., :3])
        model(x)
        assert len(seen.records) == 2
    model(x)
    assert len(seen.records) == 2
    for each in (model, copied, loaded):
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in each.modules())
        torch.jit.script(each)
    assert not torch.nn.modules.module._has_any_global_hook()


def test_under_autocast_and_with_half_precision():
    model = patched_vit().float()
    with lwpf_patch.observe(model) as seen, torch.autocast("cpu", torch.bfloat16):
        model(images(dtype=torch.float32))
    assert all(0.2 < share < 0.8 for r in seen.records for share in r["forgotten"])


def test_hflayers_last_iteration_counts_and_heads_are_told_apart():
    require_host("hflayers")
    import hflayers

    model = hflayers.Hopfield(input_size=8, num_heads=2, hidden_size=4, update_steps_max=3, batch_first=True).double()
    lwpf_patch.patch_model(model, func_d="relu")
    shown = []
    (func_d,) = [m for m in model.modules() if isinstance(m, lwpf_patch.HostFuncD)]
    func_d.register_forward_hook(lambda m, inputs, output: shown.append(inputs[0].detach()))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with lwpf_patch.observe(model) as seen:
        model(x, stored_pattern_padding_mask=padding)
    (record,) = seen.records
    assert record["layer"] == "association_core"
    assert len(shown) > 1
    scores = shown[-1].unflatten(0, (2, 2))  # items and heads
    assert_close(record, expected(scores, padding[:, None, None].expand_as(scores), RULES["relu"]), 2e-6)


def test_keys_in_the_first_dimension():
    func_d = lwpf_patch.HostFuncD("relu")
    scores = torch.randn(9, 2, dtype=torch.float64)
    forgotten, mask = func_d(scores, dim=0)
    found = statistics.of_scores(scores, forgotten, mask, -1e300, Sep(), 0, None)
    rows = scores.T[None, :, None]
    assert_close(found, expected(rows, torch.zeros_like(rows, dtype=torch.bool), RULES["relu"]))


@pytest.mark.parametrize("name", ["models.hiera.MaskUnitAttention", "layers.attention2d.MultiQueryAttentionV2"])
def test_heads_are_told_apart_where_a_class_of_timm_has_another_layout(name):
    module, inputs = made(name)
    lwpf_patch.patch_model(module, func_d="relu")
    (found,) = lwpf_patch.attention_maps(module, tuple(inputs)).values()
    with lwpf_patch.observe(module.eval()) as seen:
        module(*inputs)
    assert seen.records[0]["forgotten"] == pytest.approx(found.forgotten.double().mean((0, 2, 3)).tolist(), abs=1e-6)
    assert len(seen.records[0]["forgotten"]) == 3


def test_rows_whose_kept_keys_have_no_weight_are_no_part_of_the_entropy():
    """With sparsemax, where what forgotten keys get exceeds the scores that are kept."""
    model, x = patched_vit("pfu:mu=0.1,bias=2,sigma=0", sep="sparsemax").eval(), images()
    weights = lwpf_patch.attention_maps(model, x)["blocks.0.attn"].weights
    with lwpf_patch.observe(model) as seen:
        model(x)
    wanted = []
    for head in range(3):
        rows = [row[row > 0] for row in weights[:, head].flatten(0, 1)]
        entropies = [-float((row / row.sum() * (row / row.sum()).log()).sum()) for row in rows if len(row)]
        assert 0 < len(entropies) < len(rows)
        wanted.append(sum(entropies) / len(entropies))
    assert seen.records[0]["entropy"] == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("func_d", ["none", "relu", "pfu:mu=0.1,sigma=0", "pfu:sigma=0", "pfu:bias=0.1,sigma=0"])
def test_masking_as_published_in_both_branches(func_d):
    """Padding counts as keys, but for plain layers; PFU makes it NaN, and so a forgotten weight of null."""
    model = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    nn.init.normal_(model.in_proj_weight, std=0.4)
    lwpf_patch.patch_model(model, func_d=func_d, masking="paper")
    x, padding = torch.randn(2, 5, 12, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 3:] = True
    found = []
    for need_weights in (True, False):
        with lwpf_patch.observe(model) as seen:
            output, _ = model(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        (record,) = seen.records
        assert output.isnan().any() == (None in record["forgotten_weight"]) == func_d.startswith("pfu")
        assert (record["forgotten"] == [0.0] * 3) == (func_d == "none")
        found.append({name: [math.nan if each is None else each for each in record[name]] for name in NAMES})
    assert_close(*found)


def test_what_sinks_take_of_the_denominator_is_not_the_forgotten_keys():
    scores = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    forgotten, mask = lwpf_patch.HostFuncD("relu")(scores)
    weights = torch.cat([forgotten, torch.ones(2, 3, 4, 1)], -1).softmax(-1)[..., :-1]
    found = statistics.of_scores(scores, forgotten, mask, -1e300, Sep(), -1, None, normalised=weights)
    lost = (weights * (scores <= 0)).sum(-1).mean((0, 2))
    assert found.forgotten_weight.tolist() == pytest.approx(lost.tolist())


# --- where it goes --------------------------------------------------------------------------------------------------


def test_the_file_and_tensorboard(tmp_path):
    path = tmp_path / "seen.jsonl"
    model = patched_vit()
    for _ in range(2):  # added to what is there
        with lwpf_patch.observe(model, path=path) as seen:
            model(images())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [set(line) & {"lwpf_patch", "layer"} for line in lines] == 2 * [{"lwpf_patch"}, {"layer"}, {"layer"}]
    assert lines[0]["lwpf_patch"] == lwpf_patch.__version__
    assert lines[4:] == seen.records == read_records(path)
    assert list(lines[1]) == ["step", "layer", "training", "model", *NAMES]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "seen.tensorboard"))
    events.Reload()
    (event, _) = events.Scalars("forgotten/VisionTransformer/blocks.0.attn")
    assert event.step == 1
    assert event.value == pytest.approx(sum(lines[1]["forgotten"]) / 3, abs=1e-5)


def test_a_line_that_was_cut_off_costs_no_other(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lwpf_patch"), "propagate", True)
    model, path = patched_vit(), tmp_path / "seen.jsonl"
    with lwpf_patch.observe(model, path=path, tensorboard=False) as seen:
        model(images())
    path.write_bytes(path.read_bytes()[:-9])
    assert read_records(path) == seen.records[:1]
    assert sum("line 3 of" in r.message and "was cut off" in r.message for r in caplog.records) == 1
    with lwpf_patch.observe(model, path=path, tensorboard=False) as seen:
        model(images())
    assert read_records(path) == seen.records
    assert len(path.read_text().splitlines()) == 6


def test_a_tensorboard_that_has_changed_is_said(tmp_path, monkeypatch, caplog):
    """What it is written by could be missing from another version of it."""
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "lwpf_patch.observing.board", None)  # its import fails
    monkeypatch.setattr(logging.getLogger("lwpf_patch"), "propagate", True)
    model = patched_vit()
    with lwpf_patch.observe(model, path=tmp_path / "seen.jsonl") as seen:
        model(images())
    assert seen.records == read_records(tmp_path / "seen.jsonl")
    assert [r.levelname for r in caplog.records if "TensorBoard gets nothing any more" in r.message] == ["WARNING"]


def test_a_tensorboard_that_cannot_be_opened_takes_nothing_from_the_file(tmp_path, monkeypatch, caplog):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(logging.getLogger("lwpf_patch"), "propagate", True)
    (tmp_path / "seen.tensorboard").write_text("a file where the folder would be")
    model, path = patched_vit(), tmp_path / "seen.jsonl"
    with lwpf_patch.observe(model, path=path) as seen:
        model(images())
        model(images())
    assert [r["step"] for r in seen.records] == [1, 1, 2, 2]
    assert "lwpf_patch" in json.loads(path.read_text().splitlines()[0])
    assert read_records(path) == seen.records
    assert [r.levelname for r in caplog.records if "seen.tensorboard cannot be written" in r.message] == ["WARNING"]


def test_an_error_of_what_writes_does_not_change_the_steps(monkeypatch, tmp_path):
    """The first pass in which the variable finds a model ends where the next one begins."""
    monkeypatch.chdir(tmp_path)
    original, calls = writing.Writer.write, []
    monkeypatch.setattr(writing.Writer, "write", lambda *call: original(*call) if calls else calls.append(1) or 1 / 0)
    requesting.request(Observe(1, "seen.jsonl", False))
    try:
        model = patched_vit()
        for _ in range(3):
            model(images())
    finally:
        requesting.finish()
        requesting.request(None)
    assert [r["step"] for r in read_records(tmp_path / "seen.jsonl")] == [2, 2, 3, 3]


def record(step: int, empty: float, layer: str = "blocks.0.attn", training: bool = True) -> dict:
    figures = {name: [0.5, empty] for name in NAMES} | {"empty_rows": [empty, empty]}
    return {"step": step, "layer": layer, "training": training, "model": "Net", **figures}


def test_dead_layers_are_warned_of_once(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lwpf_patch"), "propagate", True)
    writer = writing.Writer(Observe(1, None))
    with caplog.at_level(logging.INFO, "lwpf_patch"):
        for step in range(49):
            writer.write([record(step, 1.0), record(step, 1.0, "b")])
        writer.write([record(49, 1.0), record(49, 0.9, "b")])
        for step in range(50, 99):
            writer.write([record(step, 1.0), record(step, 1.0, "b")])
            writer.write([record(step, 0.0, "b", training=False)])
    lines = [r.message for r in caplog.records]
    assert sum("blocks.0.attn of Net forgot every key of every row in the last 50" in line for line in lines) == 1
    assert sum("b of Net forgot" in line for line in lines) == 0
    assert [line for line in lines if "step 0: forgotten 0.75, empty rows 1" in line] == [lines[0]]
    assert len(lines) == 2  # the log is not flooded


def test_a_layer_that_is_nan_is_no_dead_one(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lwpf_patch"), "propagate", True)
    model, x = patched_vit(), images()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.fill_(math.nan)
        with lwpf_patch.observe(model, path=tmp_path / "seen.jsonl", tensorboard=False):
            for _ in range(51):
                model(x)
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert warnings == [
        "lwpf_patch: observe: the attention weights of blocks.1.attn of VisionTransformer are NaN at step 1: it has "
        "scores that are NaN or infinite"
    ]


def test_two_requests_and_an_error_that_harms_nothing(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lwpf_patch"), "propagate", True)
    model = patched_vit()
    with lwpf_patch.observe(model) as one:
        with lwpf_patch.observe(model, every=2) as two:
            model(images())
            model(images())
        model(images())
        assert (len(one.records), len(two.records)) == (6, 2)
        monkeypatch.setattr(statistics, "of_call", lambda *call: 1 / 0)
        model(images())
        model(images())
    assert len(one.records) == 6
    assert [r.message for r in caplog.records if "ZeroDivisionError" in r.message] == [
        "lwpf_patch: observe: failed with ZeroDivisionError: division by zero"
    ]


def test_a_handle_ends_with_its_outermost_context_and_cannot_be_entered_again():
    model = patched_vit()
    with lwpf_patch.observe(model) as seen:
        with seen:
            model(images())
        model(images())
    assert len(seen.records) == 4
    with pytest.raises(lwpf_patch.UnsupportedError, match=r"this handle was closed.*: call observe"), seen:
        pass


def test_errors(tmp_path):
    with pytest.raises(lwpf_patch.SettingsError, match=r"model=3 \(from observe\(model=\.\.\.\)\)"):
        lwpf_patch.observe(3)
    with pytest.raises(lwpf_patch.SettingsError, match="Linear has no patched attention module: call"):
        lwpf_patch.observe(nn.Linear(1, 1))
    model = patched_vit()
    with pytest.raises(lwpf_patch.SettingsError, match=r"every=0 .*must be a whole number of at least 1"):
        lwpf_patch.observe(model, every=0)
    with pytest.raises(lwpf_patch.SettingsError, match="there is no folder"):
        lwpf_patch.observe(model, path=tmp_path / "no" / "seen.jsonl")
    with pytest.raises(lwpf_patch.SettingsError, match=r"path=3 \(from observe\(path=\.\.\.\)\): must be the name"):
        lwpf_patch.observe(model, path=3)
    with pytest.raises(lwpf_patch.SettingsError, match="is a folder"):
        lwpf_patch.observe(model, path=tmp_path)
    with pytest.raises(lwpf_patch.UnsupportedError, match="the model is compiled by"):
        lwpf_patch.observe(torch.compile(model, backend="eager"))
    model.blocks[1].compile(backend="eager")
    with pytest.raises(lwpf_patch.UnsupportedError, match=r"blocks\.1 is compiled"):
        lwpf_patch.observe(model)


def test_a_model_that_is_compiled_later_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lwpf_patch"), "propagate", True)
    model, x = patched_vit(), images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(x)
    with lwpf_patch.observe(model) as seen:
        assert torch.equal(compiled(x), before)
        compiled(x)
        assert not seen.records
        assert sum("layers are compiled" in r.message for r in caplog.records) == 1
        torch.jit.script(model.blocks[0].attn.func_d)
        assert sum("torch.jit.script" in r.message for r in caplog.records) == 1
        torch.func.vmap(model.blocks[0].attn.func_d)(torch.randn(2, 3, 3))
        assert sum("torch.func" in r.message for r in caplog.records) == 1
        model(x)
    assert len(seen.records) == 2


# --- scripts that know nothing --------------------------------------------------------------------------------------

SCRIPT = """
import torch
from timm.models.vision_transformer import VisionTransformer

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, number):
        return torch.randn(3, 16, 16)

torch.manual_seed(0)
model = VisionTransformer(img_size=16, patch_size=4, num_classes=5, embed_dim=24, depth=2, num_heads=3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for epoch in range(2):
    for x in torch.utils.data.DataLoader(Data(), batch_size=4, num_workers=1):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
model.eval()(x)
print(sum(p.detach().double().sum().item() for p in model.parameters()))
"""


@pytest.mark.drawn(days=2)
def test_the_variable_and_the_command(python, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    out = python("-m", "lwpf_patch", "run", "--observe", "every=3,tensorboard=off", "train.py")
    path = tmp_path / "forgetting.jsonl"
    records = read_records(path)
    assert [(r["step"], r["layer"], r["training"]) for r in records] == [
        (step, f"blocks.{block}.attn", training)
        for step, training in ((1, True), (4, True), (4, False))
        for block in range(2)
    ]
    assert "lwpf_patch: step 1: forgotten 0." in out.stderr
    assert out.stderr.splitlines()[-1] == f"lwpf_patch: observe: 2 layers in 3 samples: {path}"
    assert not (tmp_path / "forgetting.tensorboard").exists()
    path.unlink()
    # A rank that is not the first looks at nothing, and computes the same.
    other = python("train.py", LWPF_PATCH="timm", LWPF_OBSERVE="tensorboard=off", RANK="1")
    assert (other.stdout, other.stderr, path.exists()) == (out.stdout, "", False)


#: A layer without a host, which is quick to import.
LAYER = """
import os, torch, lwpf_patch

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.func_d = lwpf_patch.HostFuncD("relu", "timm")
    def forward(self, x):
        return self.func_d.scaled_dot_product_attention(x, x, x)

model, x = Layer(), torch.randn(1, 2, 5, 3)
"""


def test_a_script_that_fails_and_processes_that_it_forks(python, tmp_path):
    forks = (
        LAYER
        + """
model(x)
if (child := os.fork()) == 0:
    model(x)
    os._exit(0)
os.waitpid(child, 0)
model(x)
raise SystemError
"""
    )
    out = python(code=forks, check=False, LWPF_OBSERVE="every=1,path=a.jsonl,tensorboard=0")
    assert "SystemError" in out.stderr
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    steps = [line.get("step", line.get("lwpf_patch")) for line in lines]
    assert steps == [lwpf_patch.__version__, 2, lwpf_patch.__version__, 1, 2]  # the child's, then the parent's
    assert len({line["pid"] for line in lines if "pid" in line}) == 2
    assert read_records(tmp_path / "a.jsonl") == lines[3:]


def test_the_variable_holds_where_a_model_is_observed_before_its_first_call(python, tmp_path):
    code = f"{LAYER}\nwith lwpf_patch.observe(model) as seen:\n    model(x)\nmodel(x), print(len(seen.records))"
    out = python(code=code, LWPF_OBSERVE="every=1,path=a.jsonl,tensorboard=0")
    assert out.stdout == "1\n"
    assert [r["step"] for r in read_records(tmp_path / "a.jsonl")] == [1, 2]


def test_a_disk_that_is_full_is_one_warning_and_no_error(python, tmp_path):
    """Of a request and of a model, with TensorBoard: neither when it is written nor when it is closed."""
    pytest.importorskip("tensorboard")
    full = (
        LAYER
        + """
import resource, signal, sys
sys.dont_write_bytecode = True
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
with lwpf_patch.observe(model, path="a.jsonl") as seen:
    for _ in range(9):
        model(x)
print(len(seen.records))
"""
    )
    out = python(code=full, LWPF_OBSERVE="every=1,path=b.jsonl")
    assert out.stdout == "9\n"
    assert "Traceback" not in out.stderr
    assert out.stderr.count("a.jsonl cannot be written") == out.stderr.count("b.jsonl cannot be written") == 1
    assert out.stderr.count("cannot be written") == 2
    assert out.stderr.splitlines()[-1].startswith(f"lwpf_patch: observe: {tmp_path}/b.jsonl could not be written")


@pytest.mark.drawn(days=2)
def test_of_several_ranks_the_first_one_writes(python, tmp_path):
    """And a process without a rank to a file of its own."""
    code = (
        LAYER
        + """
import torch.distributed as dist, torch.multiprocessing as processes
model.linear = torch.nn.Linear(3, 3)
model.register_forward_hook(lambda module, inputs, output: module.linear(output))

def work(rank, init):
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        parallel(x).sum().backward()
    dist.destroy_process_group()

def alone(rank):
    model(x), model(x)

processes.start_processes(work, (f"file://{os.getcwd()}/init",), nprocs=2, start_method="fork")
processes.start_processes(alone, nprocs=1, start_method="fork")
"""
    )
    out = python(code=code, LWPF_OBSERVE="every=2,path=a.jsonl,tensorboard=0")
    assert "nothing was seen" not in out.stderr
    assert [(r["step"], r["layer"]) for r in read_records(tmp_path / "a.jsonl")] == [(1, "Layer"), (3, "Layer")]
    (other,) = tmp_path.glob("a.*.jsonl")
    assert [r["step"] for r in read_records(other)] == [1]


def test_a_request_that_saw_nothing_says_so(python):
    code = "import torch\ntorch.nn.Linear(1, 1)(torch.ones(1))"
    assert "observe was asked for, but nothing was seen" in python(code=code, LWPF_OBSERVE="on").stderr
    code = "import lwpf_patch; print(lwpf_patch.status()['observe'])"
    out = python(code=code, LWPF_OBSERVE="every=7")
    assert "'every': 7" in out.stdout
    assert out.stderr == ""  # it computed nothing
    status = python("-m", "lwpf_patch", "status", LWPF_OBSERVE="every=7")
    assert "observe:       every=7,path=forgetting.jsonl,tensorboard=true" in status.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evry=5", r"unknown option of observe 'evry' \(from LWPF_OBSERVE\).*did you mean 'every'"),
        ("every=0", r"every='0' in 'every=0' \(from LWPF_OBSERVE\): every must be a whole number of at least 1"),
        ("seldom", r"observe 'seldom' \(from LWPF_OBSERVE\): write 'on', 'off', or options"),
        ("path=no/such/folder/x", r"there is no folder .*; make it, or choose another path"),
    ],
)
def test_wrong_variables(text, message):
    from lwpf_patch.settings import from_environment

    with pytest.raises(lwpf_patch.SettingsError, match=message):
        from_environment(["timm"], {"LWPF_OBSERVE": text})


def test_a_wrong_variable_stops_the_script(python):
    out = python(code="import torch", check=False, LWPF_OBSERVE="every=x")
    assert "every='x' in 'every=x' (from LWPF_OBSERVE)" in out.stderr.splitlines()[-1]


@pytest.fixture
def requested(tmp_path, monkeypatch):
    """As with the variable: returns what was written of what was called since, in this process."""
    monkeypatch.chdir(tmp_path)
    requesting.request(Observe(1, "seen.jsonl", False))

    def finish() -> list[dict]:
        requesting.finish()
        requesting.request(None)
        return read_records(tmp_path / "seen.jsonl")

    yield finish
    requesting.request(None)


def test_the_model_is_the_outermost_module_that_holds_the_layer(requested):
    class Loss(nn.Module):
        def forward(self, model, x):
            return model(x).square().mean()

    class Trainer(nn.Module):
        def __init__(self, *models):
            super().__init__()
            self.models = list(models)  # which registers none

        def forward(self, x):
            return sum(model(x).sum() for model in self.models)

    model, others = patched_vit(), (patched_vit(), nn.Sequential(patched_vit()))
    loss, trainer = Loss(), Trainer(*others)
    for _ in range(2):
        loss(model, images()).backward()
        trainer(images())
    places = [(r["model"], r["step"], r["layer"]) for r in requested()]
    assert places == [
        (name, step, f"{before}blocks.{number}.attn")
        for step in (1, 2)
        for name, before in (("VisionTransformer", ""), ("VisionTransformer-2", ""), ("Sequential", "0."))
        for number in range(2)
    ]


def test_the_pass_in_which_a_model_is_found_ends_with_it(requested):
    model, x = patched_vit(), images()
    with torch.no_grad():
        model(x)
        model.eval().forward_features(2 * x)  # past the __call__ of the model, as for a plot
        with lwpf_patch.observe(model.train()) as seen:
            model(x)
        model.eval()(3 * x)
    records = requested()
    assert [(r["step"], r["training"]) for r in records[::2]] == [(1, True), (2, True), (2, False)]
    assert [r | {"step": 1} for r in records[2:4]] == records[:2] == seen.records


def test_plain_layers_on_the_fast_path_of_torch_are_warned_of(requested, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("lwpf_patch"), "propagate", True)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 5, 16)
    lwpf_patch.patch_model(model, func_d="none")

    def warnings() -> int:
        return sum("took the fast path of torch.nn" in r.message for r in caplog.records)

    with torch.no_grad():
        model(x)
        model(x)
    assert warnings() == 1
    with lwpf_patch.observe(model) as seen:
        model(x)  # with gradients, where it takes none
        assert warnings() == 1
        with torch.no_grad():
            model(x)
            assert warnings() == 2
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                model(x)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
    assert [r["layer"] for r in seen.records] == ["layers.0.self_attn", "layers.1.self_attn"] * 2
    assert requested() == seen.records


def test_models_that_come_later_and_several_of_them(tmp_path, monkeypatch):
    """As the variable has it: found at their first call, the layers that stay plain left out."""
    monkeypatch.chdir(tmp_path)
    requesting.request(Observe(1, "seen.jsonl", False))
    try:
        lwpf_patch.apply("timm", exclude_models="Teacher")

        class Teacher(nn.Module):
            def __init__(self):
                super().__init__()
                self.vit = vit()

            def forward(self, x):
                return self.vit(x)

        teacher, first = Teacher(), vit()
        second = nn.Sequential(vit(), nn.Linear(5, 2).double())
        for model in (first, teacher, vit(), second, first):
            model(images())
    finally:
        requesting.finish()
        found = lwpf_patch.status()["observe"]
        requesting.request(None)
    assert (found["layers"], found["samples"]) == (6, 4)
    places = [(r["model"], r["step"], r["layer"]) for r in read_records(tmp_path / "seen.jsonl")]
    assert places == [
        *(("VisionTransformer", 1, f"blocks.{i}.attn") for i in range(2)),
        *(("VisionTransformer-2", 1, f"blocks.{i}.attn") for i in range(2)),
        *(("Sequential", 1, f"0.blocks.{i}.attn") for i in range(2)),
        *(("VisionTransformer", 2, f"blocks.{i}.attn") for i in range(2)),
    ]
