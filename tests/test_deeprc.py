"""DeepRC, patched, against the oracle; its unmodified examples; and the shims that let them run."""

from __future__ import annotations

import io
import logging
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import require_host, skip_for_host

require_host("deeprc")

import deeprc  # noqa: E402
import numpy as np  # noqa: E402
import oracle  # noqa: E402
from deeprc.architectures import AttentionNetwork, DeepRC, OutputNetwork, SequenceEmbeddingCNN  # noqa: E402
from oracle import Forgetting  # noqa: E402
from oracle_deeprc import deeprc_forward  # noqa: E402
from seps import SEPS  # noqa: E402

import lwpf_patch  # noqa: E402
from lwpf_patch.hosts import deeprc as host  # noqa: E402

FUNC_DS = {
    "relu": Forgetting("relu"),
    "pfu:mu=0.02,bias=-0.2,sigma=0": Forgetting("pfu", 0.02, -0.2),
    "pfu:sigma=0": Forgetting("pfu", "dmedian", "mu"),
}
BAGS = torch.tensor([7, 1, 12])


def _model() -> DeepRC:
    """A model whose scores are on both sides of 0; lwpf_patch is applied, so that it can be made at all."""
    embedding = SequenceEmbeddingCNN(n_input_features=23, kernel_size=3, n_kernels=6, n_layers=1)
    model = DeepRC(
        max_seq_len=9, sequence_embedding_network=embedding, attention_network=AttentionNetwork(6, 1, 5),
        output_network=OutputNetwork(6, 1, 1, 4), device=torch.device("cpu"), sequence_embedding_as_16_bit=False,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def _bags(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = int(BAGS.sum())
    return torch.randn(total, 9, 23, dtype=dtype), torch.full((total,), 9), BAGS


@pytest.mark.parametrize("func_d", FUNC_DS)
def test_the_model_equals_the_oracle(func_d):
    lwpf_patch.apply("deeprc", func_d=func_d)
    model, inputs = _model(), _bags()
    ours = model(*inputs)
    expected = deeprc_forward(model, *inputs, func_d=FUNC_DS[func_d])
    # DeepRC makes its scores in float32 whatever the model's dtype is.
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=1e-5)
    got = torch.autograd.grad(ours.sum(), model.parameters(), retain_graph=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected.sum(), model.parameters(), materialize_grads=True)
    for ours_grad, oracle_grad in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours_grad.double(), oracle_grad.double(), rtol=1e-4, atol=1e-5)


class _In64(torch.Tensor):
    """A float64 tensor that stays one when DeepRC, or the oracle, asks for float32."""

    def to(self, *args, **kwargs):
        return self.as_subclass(torch.Tensor)

    def float(self):
        return self.as_subclass(torch.Tensor)


class _StayIn64(torch.nn.Module):
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs).as_subclass(_In64)


@pytest.mark.parametrize("func_d", ["none", *FUNC_DS])
@pytest.mark.parametrize("sep", SEPS)
def test_every_bag_is_normalised(sep, func_d):
    lwpf_patch.apply("deeprc", func_d=func_d, sep=sep)
    model, inputs = _model().double().eval(), _bags(torch.float64)
    model.sequence_embedding = _StayIn64(model.sequence_embedding)
    ours = model(*inputs)
    expected = deeprc_forward(model, *inputs, func_d=FUNC_DS.get(func_d, Forgetting("none")), **SEPS[sep])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    got = torch.autograd.grad(ours.sum(), model.parameters(), retain_graph=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected.sum(), model.parameters(), materialize_grads=True)
    for ours_grad, oracle_grad in zip(got, wanted, strict=True):
        oracle.assert_equal(ours_grad, oracle_grad)


@pytest.mark.parametrize("masking", ["exclude", "paper"])
@pytest.mark.parametrize("func_d", FUNC_DS)
def test_in_float64_to_1e_12(func_d, masking):
    lwpf_patch.apply("deeprc", func_d=func_d, masking=masking)
    model, inputs = _model().double().eval(), _bags(torch.float64)
    model.sequence_embedding = _StayIn64(model.sequence_embedding)
    ours = model(*inputs)
    expected = deeprc_forward(model, *inputs, func_d=FUNC_DS[func_d])
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    got = torch.autograd.grad(ours.sum(), model.parameters(), retain_graph=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected.sum(), model.parameters(), materialize_grads=True)
    for ours_grad, oracle_grad in zip(got, wanted, strict=True):
        oracle.assert_equal(ours_grad, oracle_grad)


def test_revert_restores_the_very_code_and_the_modules():
    code = DeepRC.forward.__code__
    members = dict(vars(deeprc.architectures))
    lwpf_patch.apply("deeprc", func_d="pfu:mu=-inf,bias=0,sigma=0")
    model, inputs = _model(), _bags()
    nothing = model(*inputs)
    lwpf_patch.revert()
    assert DeepRC.forward.__code__ is code
    assert dict(vars(deeprc.architectures)) == members
    assert "func_d" not in repr(model)
    assert torch.equal(model(*inputs), nothing)


def test_one_model_alone():
    func_d = "pfu:sigma=0"  # forgets half of every bag, whatever the weights are
    with lwpf_patch.patched("deeprc", func_d=func_d):
        model, inputs = _model(), _bags()
        expected = model(*inputs)
    plain = model(*inputs)
    assert not torch.equal(plain, expected)
    lwpf_patch.patch_model(model, func_d=func_d)
    assert torch.equal(model(*inputs), expected)
    lwpf_patch.unpatch_model(model)
    assert torch.equal(model(*inputs), plain)


def test_whole_models_load_with_and_without_the_patch(python, tmp_path):
    inputs = _bags()
    with lwpf_patch.patched("deeprc"):
        patched = _model()
        patched_data, relu = pickle.dumps(patched), patched(*inputs)
    plain_data, plain = pickle.dumps(patched), patched(*inputs)
    # Without the patch: what was saved with it is refused, and not loaded plain.
    with pytest.raises(lwpf_patch.LwpfError, match="pickled with deeprc patched"):
        pickle.loads(patched_data)
    assert torch.equal(pickle.loads(plain_data)(*inputs), plain)
    # With it: both load, and forget as this process asks for.
    lwpf_patch.apply("deeprc")
    for data in (patched_data, plain_data):
        assert torch.equal(pickle.loads(data)(*inputs), relu)
    lwpf_patch.apply("deeprc", func_d="pfu")
    for data in (patched_data, plain_data):
        assert isinstance(pickle.loads(data).func_d.rule, lwpf_patch.PFU)
    # Without the package: an error that names it.
    (tmp_path / "model.pkl").write_bytes(patched_data)
    code = "import sys, pickle; sys.modules['lwpf_patch'] = None; pickle.load(open('model.pkl', 'rb'))"
    assert "lwpf_patch" in python("-c", code, check=False).stderr.splitlines()[-1]


def test_dead_bags_are_warned_of_once_and_can_be_kept_alive(monkeypatch, caplog):
    monkeypatch.setattr(host, "_dead_bags", host._DeadBags())
    monkeypatch.setattr(logging.getLogger("lwpf_patch"), "propagate", True)
    lwpf_patch.apply("deeprc")
    model, inputs = _model(), _bags()
    last = model.attention_nn.attention_nn[-1]
    torch.nn.init.constant_(last.bias, -1e3)
    with caplog.at_level(logging.WARNING, "lwpf_patch"):
        for _ in range(40):
            output = model(*inputs)
    (record,) = [r for r in caplog.records if "bags" in r.message]
    assert "ReLU() forgot every score in 32 of the first 32 bags (100%)" in record.message
    assert "'relu:empty_rows=keep'" in record.message
    gradients = torch.autograd.grad(output.sum(), model.attention_nn.parameters(), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)

    lwpf_patch.apply("deeprc", func_d="relu:empty_rows=keep")
    alive = model(*inputs)
    lwpf_patch.apply("deeprc", func_d="none")
    assert torch.equal(alive, model(*inputs))
    lwpf_patch.apply("deeprc", func_d="relu:empty_rows=keep")
    gradients = torch.autograd.grad(model(*inputs).sum(), model.attention_nn.attention_nn[0].weight)
    assert gradients[0].any()


def test_shims_touch_nothing_but_deeprc():
    def aliases() -> list[str]:
        return [name for name in ("int", "float") if hasattr(np, name)]

    before = aliases()
    with pytest.raises(AttributeError):
        deeprc.architectures.np.int  # noqa: B018
    lwpf_patch.apply("deeprc")
    assert deeprc.architectures.np.int is int
    assert deeprc.architectures.np.ndarray is np.ndarray
    assert aliases() == before
    states = {shim["name"]: shim["state"] for shim in lwpf_patch.status()["hosts"]["deeprc"]["shims"]}
    assert states["numpy aliases"] == "applied"
    assert "not needed" not in {states["regression scores"], states["questions at every run"]}
    lwpf_patch.apply("deeprc", compat=False)
    states = {shim["state"] for shim in lwpf_patch.status()["hosts"]["deeprc"]["shims"]}
    assert states == {"refused"}
    with pytest.raises(AttributeError):
        deeprc.architectures.np.int  # noqa: B018
    lwpf_patch.revert()
    assert deeprc.architectures.np is np


def test_both_questions_of_deeprc_are_answered(monkeypatch):
    """That of the reader, and that before a download; asked in a loop until one of the words is given."""
    import deeprc.utils

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(EOFError):
        deeprc.utils.user_confirmation("It will be downloaded now. Continue?", "y", "n")
    lwpf_patch.apply("deeprc")
    deeprc.utils.user_confirmation("It will be downloaded now. Continue?", "y", "n")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    with pytest.raises(SystemExit):
        deeprc.utils.user_confirmation()


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> Path:
    """DeepRC's examples and their data, which its wheel lacks, from the repository that it was installed from."""
    folder = tmp_path_factory.mktemp("upstream")
    url = "https://github.com/ml-jku/DeepRC"
    clone = subprocess.run(["git", "clone", "-q", "--depth", "1", url, folder], capture_output=True, text=True)
    if clone.returncode:
        skip_for_host(f"DeepRC's repository, which holds the data of its examples, cannot be reached: {clone.stderr}")
    return folder / "deeprc" / "examples"


@pytest.mark.drawn(days=2, cases=1)
@pytest.mark.parametrize("example", ["single_task_cnn", "multitask_cnn", "multitask_lstm"])
def test_its_unmodified_examples_run(python, upstream, example):
    for converted in upstream.parent.glob("datasets/example_dataset/*.hdf5"):
        converted.unlink()
    out = python(
        "-m", "lwpf_patch", "run", "--patch", "deeprc", "-m", f"deeprc.examples.example_{example}", "--device", "cpu",
        "--n_updates", "2", "--evaluate_at", "2", input="", cwd=upstream,
    )  # fmt: skip
    assert "Test scores:" in out.stdout
    assert "DeepRC patched; func_d relu" in out.stderr
    assert "answered yes, since standard input is at its end" in out.stderr
    assert "nothing ran" not in out.stderr


@pytest.mark.drawn(days=3)
def test_without_the_shims_the_example_fails_as_it_does_by_itself(python, upstream):
    arguments = ("-m", "deeprc.examples.example_single_task_cnn", "--device", "cpu")
    out = python(*arguments, check=False, input="", cwd=upstream, LWPF_PATCH="deeprc", LWPF_COMPAT="0")
    assert out.returncode == 1
    assert "AttributeError" in out.stderr or "EOFError" in out.stderr
    assert "answered yes" not in out.stderr


# --- U-Hop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("func_d", FUNC_DS)
def test_the_last_layers_weights_and_inputs_are_mapped(func_d):
    """The attention network, mapped by hand, in the place of the patched one."""
    lwpf_patch.apply("deeprc", func_d=func_d, uhop="on")
    model, inputs = _model().double().eval(), _bags(torch.float64)
    model.sequence_embedding = _StayIn64(model.sequence_embedding)
    network = model.attention_nn
    torch.nn.init.normal_(network.feature_map.weight, std=0.3)
    network.feature_map.steps.fill_(1)
    network.feature_map.take_settings(network.feature_map.settings)

    class ByHand(torch.nn.Module):
        def forward(self, embedded):
            *layers, last = network.attention_nn
            for layer in layers:
                embedded = layer(embedded)
            matrix = torch.eye(5).double() + network.feature_map.weight
            return ((embedded @ matrix.T) @ (matrix @ last.weight[0]) + last.bias)[:, None]

    ours = model(*inputs)
    got = torch.autograd.grad(ours.sum(), network.parameters(), materialize_grads=True)
    model.attention_nn = ByHand()
    expected = deeprc_forward(model, *inputs, func_d=FUNC_DS[func_d])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(expected.sum(), network.parameters(), materialize_grads=True)
    for ours_grad, oracle_grad in zip(got, wanted, strict=True):
        oracle.assert_equal(ours_grad, oracle_grad)
    model.attention_nn = network
    lwpf_patch.fold(model)
    torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=1e-12)


def test_folding_is_refused_where_the_query_is_made_anew():
    lwpf_patch.apply("deeprc", uhop="on")
    model = _model()
    torch.nn.init.normal_(model.attention_nn.feature_map.weight, std=0.3)
    torch.nn.utils.parametrizations.weight_norm(model.attention_nn.attention_nn[-1])
    with pytest.raises(lwpf_patch.FoldError, match=r"its attention_nn\.2\.weight is parametrized \(_WeightNorm\)"):
        lwpf_patch.fold(model)


def test_until_stage_one_and_after_it():
    lwpf_patch.apply("deeprc", func_d="none")
    model, inputs = _model(), _bags()
    without = model(*inputs)
    lwpf_patch.apply("deeprc", uhop="iters=10,samples=50")
    assert torch.equal(model(*inputs), without)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer.zero_grad()
    model(*inputs).square().sum().backward()
    optimizer.step()
    assert model.attention_nn.feature_map.weight.any()
    assert model.attention_nn.feature_map.extra_repr().startswith("5, iters=10")


def test_sequences_that_are_all_the_same_are_said_with_what_helps(caplog):
    """As DeepRC's reader gives them for its example, one for each bag."""
    lwpf_patch.apply("deeprc", uhop="iters=2")
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sequence = torch.randn(1, 9, 23).expand(3, 9, 23)
    model(sequence, torch.full((3,), 9), torch.tensor([1, 1, 1])).square().sum().backward()
    optimizer.step()
    (message,) = [record.message for record in caplog.records if "of deeprc" in record.message]
    assert "one key only" in message or "all keys are equal" in message
    assert "give each name in the HDF5 container a suffix of its own" in message


def test_uhop_for_sites_without_a_map_is_refused():
    with pytest.raises(
        lwpf_patch.SettingsError, match=r"leave no site of deeprc that has a feature map; those are .*AttentionNetwork"
    ):
        lwpf_patch.apply("deeprc", uhop="on", include="*.DeepRC")
    lwpf_patch.apply("deeprc")
    model = torch.nn.Sequential(_model())
    with pytest.raises(
        lwpf_patch.SettingsError, match=r"leave no module that has a feature map; those are 0\.attention_nn"
    ):
        lwpf_patch.patch_model(model, uhop="on", include="0")
