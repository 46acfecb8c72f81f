"""Forks of hflayers and DeepRC: those that kept the shape of attention are patched, with a warning; others are refused.

A fork is made of the installed source by edits of text. The oracles read nothing of it but parameters and options.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import re
import shutil
import sys
from pathlib import Path

import oracle
import pytest
import torch
from conftest import require_host

require_host("hflayers")
require_host("deeprc")

from oracle import Forgetting  # noqa: E402
from oracle_deeprc import deeprc_forward  # noqa: E402
from oracle_hflayers import hopfield_core  # noqa: E402

import lwpf_patch  # noqa: E402
from lwpf_patch import HostNotInstalledError, RewriteError  # noqa: E402
from lwpf_patch.hosts import HOSTS, deeprc, hflayers  # noqa: E402

FUNC_D = "pfu:mu=0.02,bias=-0.2,sigma=0"
FORGETTING = Forgetting("pfu", 0.02, -0.2)
UNKNOWN = "lwpf_patch has not been tested with their source"
#: The file that holds the attention.
FILES = {"hflayers": "functional.py", "deeprc": "architectures.py"}
#: The function that holds it.
FUNCTIONS = {
    "hflayers": "hflayers.functional.hopfield_core_forward",
    "deeprc": "deeprc.architectures.DeepRC.forward",
}
#: What a copy says of its version.
VERSIONS = {"hflayers": "of unknown version", "deeprc": "0.0.6"}
#: A text and what a fork has in its place; a text in / / is a pattern, and all of its matches are replaced.
Edits = list[tuple[str, str]]


def _names(*names: str) -> Edits:
    return [(rf"/\b{name}\b/", f"{name}_of_the_fork") for name in names]


_CHOICE = "        if xi is None:\n            xi = nn.functional.softmax(attn_output_weights, dim=-1)\n"
_DROPOUT = "    attn_output_weights = nn.functional.dropout(xi, p=dropout_p, training=training)\n"
_PRODUCT = "    attn_output = torch.bmm(attn_output_weights, v)\n"
_SLICE = "            attention_weights = mb_attention_weights[start_i:start_i+n_seqs]\n"
_SOFTMAX = "            attention_weights = torch.softmax(attention_weights, dim=0)\n"
_WEIGHING = "            emb_seqs_after_attention = emb_seqs * attention_weights\n"

#: Forks that kept the shape.
KEPT: dict[tuple[str, str], Edits] = {
    ("hflayers", "other names"): _names("xi", "attn_output_weights", "attn_output", "q", "k", "v", "src_len"),
    ("hflayers", "comments, logging, another statement"): [
        (_CHOICE, "        # the scores\n        seen = attn_output_weights.shape\n"
         "        logging.getLogger('fork').debug('%s %s', seen, attn_output_weights)\n" + _CHOICE),
        (_PRODUCT, "    # the weights\n    print(attn_output_weights.shape, file=open('/dev/null', 'w'))\n" + _PRODUCT),
        ("import torch.nn as nn\n", "import logging\nimport torch.nn as nn\n"),
        (_DROPOUT, "    number_of_steps = update_step + 1\n" + _DROPOUT),
    ],
    ("hflayers", "formatting, another docstring"): [
        ("/(?s)r\"\"\"\n    Args:.*?\"\"\"/", "'''Ours.'''"),
        (_DROPOUT, "    attn_output_weights = (\n        nn.functional.dropout(\n            xi,\n"
         "            p=dropout_p, training=training,\n        )\n    )\n"),
        (_CHOICE, "        if (xi is None):\n            xi = F.softmax(\n                attn_output_weights, -1)\n"),
        ("import torch.nn as nn\n", "import torch.nn as nn\nimport torch.nn.functional as F\n"),
        ("source=nn.functional.softmax(\n", "source=torch.softmax(  # of active heads\n"),
    ],
    ("hflayers", "scores with a temperature, and methods"): [
        (_CHOICE, "        attn_output_weights = attn_output_weights * 1.0\n" + _CHOICE),
        ("nn.functional.softmax(attn_output_weights, dim=-1)", "attn_output_weights.softmax(dim=-1)"),
    ],
    ("deeprc", "other names"): _names(
        "attention_weights", "emb_seqs", "emb_seqs_after_attention", "mb_attention_weights", "n_seqs", "inputs"
    ),
    ("deeprc", "comments, logging, another statement"): [
        (_SOFTMAX, "            # the scores\n            print(attention_weights, file=open('/dev/null', 'w'))\n"
         "            seen = start_i\n" + _SOFTMAX),
        (_WEIGHING, "            print('weights', attention_weights.shape, file=open('/dev/null', 'w'))\n" + _WEIGHING),
    ],
    ("deeprc", "formatting, another docstring"): [
        ("/(?s)\"\"\" Apply DeepRC .*?\"\"\"/", "'Ours.'"),
        (_SOFTMAX, "            attention_weights = (torch\n              .softmax(attention_weights, 0))  # a bag\n"),
        (_WEIGHING, "            emb_seqs_after_attention = (emb_seqs *\n                attention_weights)\n"),
    ],
    ("deeprc", "weights of a name of their own, methods, dropout behind"): [
        (_SOFTMAX, "            weights = attention_weights.softmax(dim=0)\n"
         "            weights = nn.functional.dropout(weights, 0.0)\n"),
        (_WEIGHING, "            emb_seqs_after_attention = weights * emb_seqs\n"),
    ],
}  # fmt: skip

#: Forks that changed it: where, and what the error says of it.
CHANGED: dict[tuple[str, str], tuple[Edits, str]] = {
    ("hflayers", "another function"): (
        [("nn.functional.softmax(", "torch.sigmoid_or_so(")],
        "no 'if xi is None:' with the softmax of the scores in both arms",
    ),
    ("hflayers", "another function in one arm"): (
        [("nn.functional.softmax(attn_output_weights, dim=-1)", "attn_output_weights.log_softmax(dim=-1)")],
        "no 'if xi is None:' with the softmax of the scores in both arms",
    ),
    ("hflayers", "another dimension"): (
        [("nn.functional.softmax(attn_output_weights, dim=-1)", "nn.functional.softmax(attn_output_weights, dim=1)")],
        r"no edit covers: nn.functional.softmax\(attn_output_weights, dim=1\); one over dim=-1 was expected",
    ),
    ("hflayers", "another dimension in one arm"): (
        [("view(size=(-1, *xi.shape[1:])), dim=-1))", "view(size=(-1, *xi.shape[1:])), dim=-2))")],
        "one over dim=-1 was expected",
    ),
    ("hflayers", "dropout before the softmax"): (
        [(_CHOICE, _DROPOUT.replace("    ", "        ").replace("(xi", "(attn_output_weights") + _CHOICE)],
        "before the softmax of attn_output_weights, line .* does something to attn_output_weights that no edit covers",
    ),
    ("hflayers", "dropout in place"): (
        [(_CHOICE, "        nn.functional.dropout(attn_output_weights, 0.1, inplace=True)\n" + _CHOICE)],
        "before the softmax of attn_output_weights",
    ),
    ("hflayers", "dropout in one arm"): (
        [("        else:\n            xi = torch.masked_scatter(", "        else:\n            attn_output_weights = "
          "nn.functional.dropout(attn_output_weights)\n            xi = torch.masked_scatter(")],
        "line .* does something with attn_output_weights that no edit covers",
    ),
    ("hflayers", "dropout inside of the softmax"): (
        [("attn_output_weights.masked_select(", "nn.functional.dropout(attn_output_weights).masked_select(")],
        "no 'if xi is None:' with the softmax of the scores in both arms",
    ),
    ("hflayers", "a softmax of which more is made"): (
        [("nn.functional.softmax(attn_output_weights, dim=-1)",
          "nn.functional.normalize(nn.functional.softmax(attn_output_weights, dim=-1))")],
        "no 'if xi is None:' with the softmax of the scores in both arms",
    ),
    ("hflayers", "bounded scores"): (
        [(_CHOICE, "        attn_output_weights = torch.tanh(attn_output_weights)\n" + _CHOICE)],
        r"no edit covers: attn_output_weights = torch.tanh\(attn_output_weights\)",
    ),
    ("hflayers", "a helper function"): (
        [("nn.functional.softmax(", "associate("), ("def hopfield_core_forward(", "def associate(scores, dim):\n"
         "    return nn.functional.softmax(scores, dim=dim)\n\n\ndef hopfield_core_forward(")],
        "no 'if xi is None:' with the softmax",
    ),
    ("hflayers", "weights that are changed"): (
        [(_PRODUCT, "    attn_output_weights = attn_output_weights / 2\n" + _PRODUCT)],
        "around the softmax, line .* attn_output_weights",
    ),
    ("hflayers", "values in a helper"): (
        [(_PRODUCT, "    attn_output = torch.einsum('bls,bsd->bld', attn_output_weights, v)\n")],
        r"no 'torch.bmm\(weights, v\)' right after the dropout of xi",
    ),
    ("hflayers", "a func_d of its own"): (
        [("return_projected_patterns=False  #", "return_projected_patterns=False, func_d=None  #")],
        "uses the name func_d already",
    ),
    ("deeprc", "another function"): (
        [("torch.softmax(attention_weights, dim=0)", "torch.sigmoid(attention_weights)")],
        "no softmax of attention_weights over dim=0",
    ),
    ("deeprc", "another dimension"): ([("dim=0)\n            # Apply", "dim=1)\n            # Apply")], "over dim=0"),
    ("deeprc", "dropout before the softmax"): (
        [(_SOFTMAX, "            attention_weights = nn.functional.dropout(attention_weights, 0.1)\n" + _SOFTMAX)],
        r"before the softmax of attention_weights, line .* covers: attention_weights = nn.functional.dropout\(",
    ),
    ("deeprc", "dropout of all scores"): (
        [(_SLICE, "            mb_attention_weights = self.dropout(mb_attention_weights)\n" + _SLICE)],
        r"before the softmax .* does something to mb_attention_weights .*self.dropout\(mb_attention_weights\)",
    ),
    ("deeprc", "a helper function"): (
        [("torch.softmax(attention_weights, dim=0)", "self.attend(attention_weights)"),
         ("    def forward(self, inputs_flat,", "    def attend(self, scores):\n"
          "        return torch.softmax(scores, dim=0)\n\n    def forward(self, inputs_flat,")],
        "no softmax of attention_weights over dim=0",
    ),
    ("deeprc", "weights that are used before"): (
        [(_WEIGHING, "            pooled = attention_weights.T @ emb_seqs\n" + _WEIGHING)],
        "around the softmax, line",
    ),
}  # fmt: skip


def _fork(folder: Path, package: str, edits: Edits, name: str = "") -> Path:
    """Copies an installed package into a folder, under a name, with some text of the file of its attention replaced."""
    copy = folder / (name or package).replace(".", "/")
    source = Path(importlib.util.find_spec(package).origin).parent
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "datasets", "examples"))
    path = copy / FILES[package]
    text = path.read_text()
    for old, new in edits:
        changed = re.sub(old[1:-1], new, text) if old.startswith("/") else text.replace(old, new)
        assert changed != text, old
        text = changed
    path.write_text(text)
    return copy


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """Makes a fork under a name of its own and registers its host, and returns the name and where it lies.

    One process can have many such forks; those under the name of the library are left to processes of their own.
    """
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(package: str, edits: Edits, name: str = "") -> tuple[str, Path]:
        name = name or f"{package}_{next(_numbers)}"
        place = _fork(tmp_path, package, edits, name)
        importlib.invalidate_caches()
        lwpf_patch.register_host({"hflayers": hflayers, "deeprc": deeprc}[package].HOST.for_package(name))
        made.append(name)
        return name, place

    yield make
    lwpf_patch.revert()
    for name in made:
        del HOSTS[name]
        for module in [each for each in sys.modules if each.partition(".")[0] == name.partition(".")[0]]:
            del sys.modules[module]


_numbers = itertools.count()


def _compare_hflayers(package: str, feature_map: bool = False) -> None:
    core = importlib.import_module(f"{package}.activation").HopfieldCore(embed_dim=8, num_heads=2).double()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.35)
    inputs = [torch.randn(n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (4, 6, 6)]
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, -2:] = True
    options = dict(update_steps_max=2, key_padding_mask=padding)
    mapped = dict(feature_map=core.feature_map.weight.detach() + torch.eye(4)) if feature_map else {}
    ours, wanted = core(*inputs, **options), hopfield_core(core, *inputs, **options, func_d=FORGETTING, **mapped)
    for got, expected in zip(ours[:2], wanted[:2], strict=True):
        oracle.assert_equal(got, expected)
    cotangent = torch.randn_like(ours[0])
    leaves = [*inputs, core.in_proj_weight]
    gradients = [torch.autograd.grad(out[0], leaves, cotangent) for out in (ours, wanted)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def _compare_deeprc(package: str) -> None:
    made = importlib.import_module(f"{package}.architectures")
    model = made.DeepRC(
        max_seq_len=9, sequence_embedding_network=made.SequenceEmbeddingCNN(23, 3, 6, 1),
        attention_network=made.AttentionNetwork(6, 1, 5), output_network=made.OutputNetwork(6, 1, 1, 4),
        device=torch.device("cpu"), sequence_embedding_as_16_bit=False,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    inputs = torch.randn(20, 9, 23), torch.full((20,), 9), torch.tensor([7, 1, 12])
    ours, wanted = model(*inputs), deeprc_forward(model, *inputs, func_d=FORGETTING)
    torch.testing.assert_close(ours.double(), wanted.double(), rtol=0, atol=1e-5)
    for got, expected in zip(*(torch.autograd.grad(out.sum(), list(model.parameters()), materialize_grads=True)
                               for out in (ours, wanted)), strict=True):  # fmt: skip
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=1e-5)


COMPARE = {"hflayers": _compare_hflayers, "deeprc": _compare_deeprc}


def _warnings(caplog) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.drawn(cases=8)
@pytest.mark.parametrize("when", ["before the import", "after it"])
@pytest.mark.parametrize(("package", "what"), KEPT)
def test_a_fork_that_kept_the_shape(fork, caplog, package, what, when):
    name, place = fork(package, KEPT[package, what])
    if when == "after it":
        importlib.import_module(f"{name}.architectures" if package == "deeprc" else name)
    lwpf_patch.apply(name, func_d=FUNC_D)
    COMPARE[package](name)
    function = FUNCTIONS[package].removeprefix(f"{package}.")
    (warning,) = _warnings(caplog)
    assert warning.startswith(f"lwpf_patch: {name}.{function} of {name} {VERSIONS[package]} at {place}: {UNKNOWN}")
    assert f"`lwpf diff {name}` shows how" in warning
    sites = {each["function"]: each["known"] for each in lwpf_patch.status()["hosts"][name]["sites"]}
    assert [each for each, known in sites.items() if known is None] == [function.partition(".")[2]]


@pytest.mark.drawn(cases=16)
@pytest.mark.parametrize("way", ["apply, then import", "import, then apply"])
@pytest.mark.parametrize(("package", "what"), CHANGED)
def test_a_fork_that_changed_it(fork, package, what, way):
    edits, message = CHANGED[package, what]
    name, place = fork(package, edits)
    function = FUNCTIONS[package].removeprefix(f"{package}.")
    module = f"{name}.{FILES[package][:-3]}"

    def patch_and_import() -> None:
        if way == "import, then apply":
            importlib.import_module(module)
        lwpf_patch.apply(name)
        importlib.import_module(module)

    with pytest.raises(RewriteError, match=rf"{name}.{function} cannot be patched: (?s:.*){message}") as caught:
        patch_and_import()
    assert str(place / FILES[package]) in str(caught.value)
    assert "install a version that is supported, or describe your fork by a host of its own" in str(caught.value)
    lwpf_patch.revert()
    imported = importlib.import_module(module)
    unpatched = imported.DeepRC.forward if package == "deeprc" else imported.hopfield_core_forward
    assert unpatched.__code__.co_filename == str(place / FILES[package])
    assert unpatched.__kwdefaults__ is None


def test_a_feature_map_in_forks(fork):
    """U-Hop, where the variables have other names and the network returns its scores at once."""
    name, _ = fork("hflayers", KEPT["hflayers", "other names"])
    lwpf_patch.apply(name, func_d=FUNC_D, uhop="iters=1")
    _compare_hflayers(name, feature_map=True)
    returned = ("attention_weights = self.attention_nn(inputs)\n        return attention_weights",
                "return self.attention_nn(inputs)")  # fmt: skip
    name, _ = fork("deeprc", [returned, *_names("inputs")])
    lwpf_patch.apply(name, uhop="iters=1")
    network = importlib.import_module(f"{name}.architectures").AttentionNetwork(6, 1, 5)
    matrix = torch.randn(5, 5) / 5
    with torch.no_grad():
        network.feature_map.weight.copy_(matrix)
    features = torch.randn(7, 6)
    phi = torch.eye(5) + matrix
    keys, last = network.attention_nn[:-1](features), network.attention_nn[-1]
    torch.testing.assert_close(network(features), keys @ phi.T @ phi @ last.weight.T + last.bias)


@pytest.mark.parametrize("package", ["hflayers", "deeprc"])
def test_a_copy_that_is_known_is_patched_without_a_warning(fork, caplog, package):
    name, _ = fork(package, [], f"my_{package}")
    lwpf_patch.apply(name, func_d=FUNC_D)
    COMPARE[package](name)
    assert _warnings(caplog) == []


def test_a_copy_inside_of_another_package(fork, tmp_path, caplog):
    """As projects have them that edit a library: its own name is dotted, and nothing is imported to find it."""
    name, place = fork("hflayers", KEPT["hflayers", "other names"], "project.vendor.hflayers")
    (tmp_path / "project" / "__init__.py").write_text("")
    lwpf_patch.apply(name, func_d=FUNC_D)
    assert "project" not in sys.modules
    assert lwpf_patch.status()["hosts"][name]["state"] == "waiting for its import"
    _compare_hflayers(name)
    assert f"of {name} of unknown version at {place}: {UNKNOWN}" in _warnings(caplog)[0]
    lwpf_patch.revert()
    lwpf_patch.register_host(hflayers.HOST.for_package("project.gone"))
    with pytest.raises(HostNotInstalledError, match=r"project.gone was asked to be patched.*install project, or put"):
        lwpf_patch.apply("project.gone")
    del HOSTS["project.gone"]


def test_nothing_is_half_patched(fork):
    """hopfield_core_forward is as it was, HopfieldCore calls something else: the first import refuses both."""
    name, place = fork("hflayers", [])
    activation = place / "activation.py"
    activation.write_text(activation.read_text().replace("return hopfield_core_forward(", "return other("))
    with pytest.raises(
        RewriteError, match=r"HopfieldCore.forward cannot be patched.*does not call hopfield_core_forwar"
    ):
        lwpf_patch.apply(name)
    settings = lwpf_patch.settings.Settings()
    lwpf_patch.patching.registry.request(name, settings)  # as the start-up hook does, which asks for no source
    with pytest.raises(RewriteError, match=r"HopfieldCore.forward cannot be patched"):
        importlib.import_module(f"{name}.functional")
    assert f"{name}.functional" not in sys.modules


def test_a_fork_under_the_name_of_the_library_by_the_variable(python, tmp_path):
    """One that kept the shape, beside the script."""
    place = _fork(tmp_path, "hflayers", KEPT["hflayers", "other names"])
    code = "import torch, hflayers\nhflayers.Hopfield(input_size=8)(torch.randn(1, 3, 8))\nprint('ran')\n"
    out = python(code=code, LWPF_PATCH="hflayers")
    assert out.stdout == "ran\n"
    assert out.stderr.count(UNKNOWN) == 1
    assert f"{FUNCTIONS['hflayers']} of hflayers of unknown version at {place}: {UNKNOWN}" in out.stderr


def test_a_fork_under_the_name_of_the_library_by_lwpf_run(python, tmp_path):
    """One that did not keep it: the script stops at the import, whatever it catches."""
    _fork(tmp_path, "deeprc", CHANGED["deeprc", "dropout before the softmax"][0])
    (tmp_path / "train.py").write_text(
        "try:\n    import deeprc.architectures\nexcept ImportError:\n    pass\nprint('ran')\n"
    )
    out = python("-m", "lwpf_patch", "run", "--patch", "deeprc", "train.py", check=False)
    assert (out.returncode, out.stdout) == (1, "")
    error = out.stderr.strip().splitlines()[-1]
    assert error.startswith(f"lwpf_patch.errors.RewriteError: {FUNCTIONS['deeprc']} cannot be patched: ")
    assert "before the softmax of attention_weights" in error
