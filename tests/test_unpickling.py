"""Whole models in another process: they compute as they did, or are refused; never plain without a word."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import NamedTuple

import pytest
import torch
from conftest import require_host
from vits import feature_maps, images, randomise_maps, vit

import lwpf_patch

pytestmark = pytest.mark.drawn(days=3)

PFU = "pfu:mu=0.1,bias=0,sigma=0"
LOAD = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(saved["model"](saved["x"]), saved["y"])
print("equal")
"""


class Saved(NamedTuple):
    """A file of a model that was patched, and how; and what the model gives for its input without the patch."""

    file: str
    host: str
    uhop: str | None
    plain: torch.Tensor


@pytest.fixture(params=["timm with uhop", "hflayers"])
def saved(request, tmp_path):
    host = request.param.split()[0]
    uhop = "iters=3,every=2,until=4,t=1.5" if "uhop" in request.param else None
    require_host(host)
    lwpf_patch.apply(host, func_d=PFU, masking="paper", backend="eager", uhop=uhop)
    if host == "timm":
        model, x = vit().eval(), images()
    else:
        import hflayers

        model, x = hflayers.Hopfield(input_size=6, num_heads=2).eval(), torch.randn(2, 5, 6)
        torch.nn.init.normal_(model.association_core.in_proj_weight)
    randomise_maps(model)
    file, y = tmp_path / "model.pt", model(x).detach()
    torch.save({"x": x, "y": y, "model": model}, file)
    lwpf_patch.revert()
    assert not torch.allclose(model(x), y)
    return Saved(str(file), host, uhop, model(x))


@pytest.mark.drawn(cases=1)
def test_in_a_fresh_process(saved, python):
    out = python(saved.file, code=LOAD, check=False)
    assert out.returncode == 1
    assert out.stdout == ""
    error = out.stderr.splitlines()[-1]
    assert f"pickled with {saved.host} patched (func_d {PFU}, masking paper, backend eager" in error
    for remedy in (
        f"lwpf_patch.apply('{saved.host}', ...)",
        f"LWPF_PATCH={saved.host}",
        "LWPF_UNPICKLE=patch",
        'func_d="none"',
    ):
        assert remedy in error
    out = python(saved.file, code=LOAD, LWPF_UNPICKLE="patch")
    assert out.stdout.strip() == "equal"
    line = out.stderr.splitlines()[0]
    assert f"patched; func_d {PFU}, masking paper, backend eager" in line
    assert ("uhop iters=3,t=1.5,lr=0.1,loss=average,samples=256,every=2,until=4" in line) == bool(saved.uhop)


@pytest.mark.drawn(cases=1)
def test_in_a_process_that_is_patched(saved, caplog):
    with pytest.raises(lwpf_patch.LwpfError, match=f"pickled with {saved.host} patched"):
        torch.load(saved.file, weights_only=False)
    caplog.set_level(logging.INFO, "lwpf_patch")
    with lwpf_patch.patched(saved.host, func_d=PFU, masking="paper", backend="eager", uhop=saved.uhop):
        loaded = torch.load(saved.file, weights_only=False)
        torch.testing.assert_close(loaded["model"](loaded["x"]), loaded["y"])
        assert "was pickled with" not in caplog.text
    del loaded
    with lwpf_patch.patched(saved.host, func_d="none", uhop=saved.uhop):
        for _ in range(2):
            loaded = torch.load(saved.file, weights_only=False)
        for each in feature_maps(loaded["model"]):
            torch.nn.init.zeros_(each.weight)
        torch.testing.assert_close(loaded["model"](loaded["x"]), saved.plain)
        assert caplog.text.count("was pickled with func_d PFU(mu=0.1, bias=0.0, sigma=0.0, masking=paper") == 1
        assert "gets NoForgetting(), as this process is patched" in caplog.text
    if saved.uhop:
        lwpf_patch.apply(saved.host, func_d=PFU)
        with pytest.raises(lwpf_patch.ConflictError, match="saved with a feature map"):
            torch.load(saved.file, weights_only=False)


@pytest.mark.drawn(days=3)
def test_after_torch_compile_too():
    """torch.compile puts a function of its own in the place of nn.Module.__setstate__."""
    torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.zeros(2))
    with lwpf_patch.patched("timm", func_d="relu"):
        data = pickle.dumps(vit())
    with lwpf_patch.patched("timm", func_d=PFU):
        assert isinstance(pickle.loads(data).blocks[0].attn.func_d.rule, lwpf_patch.PFU)


SPAWN = """
import multiprocessing, sys
import torch

def work(model, x, queue):
    try:
        queue.put(model(x).detach().numpy())
    finally:
        queue.close()

if __name__ == "__main__":
    import lwpf_patch
    sys.path.insert(0, {tests!r})
    lwpf_patch.apply("timm", func_d={pfu!r}, uhop={uhop!r})
    from vits import images, randomise_maps, vit
    model, x = vit().eval(), images()
    randomise_maps(model)
    context = multiprocessing.get_context({method!r})
    queue = context.SimpleQueue()
    process = context.Process(target=work, args=(model, x, queue))
    process.start()
    process.join(100)
    print("exit code", process.exitcode)
    if process.exitcode == 0:
        torch.testing.assert_close(torch.from_numpy(queue.get()), model(x).detach())
        print("equal")
"""


@pytest.mark.drawn(cases=2)
@pytest.mark.parametrize(
    ("method", "variables", "equal"),
    [
        ("spawn", {}, False),
        ("spawn", {"LWPF_UNPICKLE": "patch"}, True),
        ("fork", {}, True),
    ],
)
def test_as_the_argument_of_another_process(python, method, variables, equal):
    """``apply`` stands under ``if __name__ == "__main__":``, which a spawned process does not run."""
    from conftest import ROOT

    out = python(code=SPAWN.format(tests=str(ROOT / "tests"), pfu=PFU, uhop="on", method=method), **variables)
    assert out.stdout.split("\n")[:-1] == (["exit code 0", "equal"] if equal else ["exit code 1"])
    assert ("LwpfError: this model was pickled with timm patched" in out.stderr) == (not equal)


def test_a_site_that_is_left_out_here():
    lwpf_patch.apply("timm")
    data = pickle.dumps(vit())
    lwpf_patch.apply("timm", exclude="*.Attention")
    with pytest.raises(
        lwpf_patch.LwpfError,
        match=r"patched as well, but timm\.layers\.attention\.Attention\.forward is left out.*exclude=",
    ):
        pickle.loads(data)


def test_a_map_without_func_d():
    """DeepRC's attention network has a feature map and nothing else of ours."""
    require_host("deeprc")
    lwpf_patch.apply("deeprc", uhop="on")
    from deeprc.architectures import AttentionNetwork

    network = AttentionNetwork(4, 1, 3)
    identity = pickle.dumps(network)
    randomise_maps(network)
    trained = pickle.dumps(network)
    lwpf_patch.apply("deeprc")  # without uhop
    with pytest.raises(
        lwpf_patch.ConflictError, match=r"this deeprc\.architectures\.AttentionNetwork was saved with a feature map"
    ):
        pickle.loads(trained)
    pickle.loads(identity)
    lwpf_patch.revert()
    with pytest.raises(lwpf_patch.LwpfError, match="pickled with deeprc patched"):
        pickle.loads(trained)


def test_copies_keep_what_was_changed_by_hand_and_need_no_patch_after_revert():
    lwpf_patch.apply("timm", uhop="on")
    model = vit()
    traced = torch.fx.symbolic_trace(model.blocks[0].attn, concrete_args=dict(attn_mask=None, is_causal=False))
    traced = copy.deepcopy(traced)
    model.blocks[0].attn.func_d.masking = "paper"
    held = model.blocks[1].attn.func_d
    assert copy.deepcopy(model).blocks[0].attn.func_d.masking == "paper"
    lwpf_patch.revert()
    for each in (model, traced, held):
        copy.deepcopy(each)


def test_what_an_older_version_pickled_gets_the_settings_that_it_did_not_have():
    lwpf_patch.apply("timm", func_d="relu", masking="paper")
    model, x = vit().eval(), images()
    wanted, shown = model(x), repr(model)
    for block in model.blocks:
        for name in ("sep", "verify"):
            delattr(block.attn.func_d, name)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(x), wanted)
    assert repr(loaded) == shown


def test_models_of_patch_model_need_no_patch():
    model, x = vit().eval(), images()
    lwpf_patch.patch_model(model, func_d=PFU, uhop="on")
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_the_setting(python):
    code = "import torch; print('went on')"
    out = python(code=code, LWPF_UNPICKLE="ptach", check=False)
    assert "unknown way to unpickle 'ptach' (from LWPF_UNPICKLE): allowed are error, patch" in out.stderr
    assert "went on" not in out.stdout
    code = "import os; print(os.environ['LWPF_UNPICKLE'])"
    assert python(code=code, LWPF_UNPICKLE="patch").stdout.strip() == "patch"  # also without LWPF_PATCH
    out = python("-m", "lwpf_patch", "run", "--unpickle", "patch", "script.py", LWPF_UNPICKLE="error")
    assert out.stdout.strip() == "patch"
    out = python("-m", "lwpf_patch", "run", "--unpickle", "yes", "script.py", check=False)
    assert (out.returncode, out.stdout) == (2, "")
    assert "unknown way to unpickle 'yes' (from --unpickle)" in out.stderr


@pytest.mark.drawn(days=4)
def test_what_a_process_loads_and_saves_again(python, tmp_path):
    """It is checked again by the next one, also where nothing but the model had its host patched."""
    first = "import lwpf_patch, pickle, torch\nfrom timm.layers.attention import Attention\n"
    python(code=first + "lwpf_patch.apply('timm')\npickle.dump(Attention(8, 2), open('model', 'wb'))\n")
    again = "import os, pickle\nos.environ['LWPF_UNPICKLE'] = 'patch'\n"
    python(code=again + "pickle.dump(pickle.load(open('model', 'rb')), open('again', 'wb'))\n")
    out = python(code="import pickle\npickle.load(open('again', 'rb'))\n", check=False)
    assert out.returncode != 0
    assert "Here timm is not patched, and it would compute plain" in out.stderr
