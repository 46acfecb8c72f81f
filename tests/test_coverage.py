"""What is told of a model that is patched in part or not at all, when timm makes it; and ``lwpf models``."""

from __future__ import annotations

import importlib
import json
import re

import pytest
import timm
import torch
from timm.models import davit
from torch import nn

import lwpf_patch
from lwpf_patch.cli import main
from lwpf_patch.hosts import HOSTS
from lwpf_patch.patching import coverage
from lwpf_patch.patching.state import PATCHED


def create(name):
    with torch.device("meta"):
        return timm.create_model(name)


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_a_whole_model_is_not_told_of(caplog):
    lwpf_patch.apply("timm")
    for name in ("test_vit", "swin_tiny_patch4_window7_224", "cait_xxs24_224", "vit_small_r26_s32_224"):
        create(name)  # the last one has a ResNet inside
    assert not told(caplog)


@pytest.mark.drawn(cases=2)
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("xcit_nano_12_p16_224", "xcit_nano_12_p16_224 is patched in part: 2 of its 14 attention layers; plain are"),
        ("resnet18", "resnet18 has no softmax attention, so that nothing of it is patched"),
        ("coat_tiny", "nothing of coat_tiny is patched: 26 FactorAttnConvRelPosEnc (its attention is linear"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_whole(name, what, caplog):
    lwpf_patch.apply("timm", partial="allow")
    create(name)
    assert not told(caplog)
    lwpf_patch.apply("timm")
    create(name)
    create(name)
    (message,) = told(caplog)  # once
    assert what in message
    assert "partial=error refuses such models" in message
    lwpf_patch.apply("timm", partial="error", exclude_models=name)
    create(name)
    lwpf_patch.apply("timm", partial="error")
    with pytest.raises(
        lwpf_patch.CoverageError, match=rf"{re.escape(what)}.*\(partial=error, from apply\(partial=\.\.\.\)"
    ):
        create(name)


def test_what_include_and_exclude_leave_out_does_not_count(caplog):
    lwpf_patch.apply("timm", partial="error", exclude="*OutlookAttention")
    model = create("volo_d1_224")
    assert not told(caplog)
    found = coverage.coverage_of(model, PATCHED["timm"])
    assert found.plain == {"timm.models.volo.OutlookAttention": 4}
    assert found.why == {"timm.models.volo.OutlookAttention": "left out by include and exclude"}
    lwpf_patch.apply("timm", exclude=["*.Attention", "timm.layers.*"])
    create("test_vit")
    assert "nothing of test_vit is patched" in told(caplog)[-1]
    assert "left out by include and exclude" in told(caplog)[-1]


def test_classes_without_a_feature_map_are_told_of(caplog):
    lwpf_patch.apply("timm", uhop="on")
    create("test_vit")
    assert not told(caplog)
    create("levit_128s")
    assert "with no feature map of U-Hop in 9 Attention, 2 AttentionDownsample" in told(caplog)[-1]


def test_a_class_that_is_not_known():
    """Whatever its name: what counts is that its code calls a softmax, or that it is PyTorch's attention."""

    class New(nn.Module):
        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ x

    lwpf_patch.apply("timm")
    model = nn.Sequential(New(), nn.MultiheadAttention(4, 2), nn.Softmax(-1), davit.ChannelAttention(8, 2), nn.GELU())
    found = coverage.coverage_of(model, PATCHED["timm"])
    assert {name.rpartition(".")[2]: why for name, why in found.why.items()} == {
        "New": "lwpf_patch does not know this class",
        "MultiheadAttention": "it is patched by torch: apply('torch')",
        "ChannelAttention": "its softmax runs over channels: no key is there to be forgotten",
    }


def test_the_classes_that_are_left_alone_are_there():
    for name in [*HOSTS["timm"].refused, *HOSTS["timm"].no_attention]:
        module, _, cls = name.rpartition(".")
        assert hasattr(importlib.import_module(module), cls), name


CHANGED = """
import sys
from importlib.machinery import SourceFileLoader

import lwpf_patch

get_data = SourceFileLoader.get_data

def changed(self, path):
    data = get_data(self, path)
    return data.replace(b"attn = attn.softmax(dim=-1)", b"attn = softmax(attn)") if path.endswith("pvt_v2.py") else data

def no_bytecode(self, path):
    raise OSError

SourceFileLoader.get_data, SourceFileLoader.path_stats = changed, no_bytecode
lwpf_patch.apply("timm", partial=sys.argv[1])
import timm, torch
with torch.device("meta"):
    print(type(timm.create_model("test_vit").blocks[0].attn.func_d).__name__)
    timm.create_model("pvt_v2_b0")
"""


@pytest.mark.drawn(days=5)
def test_a_class_of_another_shape_is_left_out_by_name(python):
    """A timm one class of which no edit fits: the others are patched, and a model that has it is told of."""
    out = python("warn", code=CHANGED, PYTHONPATH="")
    assert "HostFuncD" in out.stdout
    assert "timm.models.pvt_v2.Attention is left as it is: timm.models.pvt_v2.Attention.forward cannot be" in out.stderr
    assert "nothing of pvt_v2_b0 is patched: 8 Attention (its source has a shape that is not known" in out.stderr
    refused = python("error", code=CHANGED, check=False, PYTHONPATH="")
    assert refused.returncode == 1
    assert "CoverageError: timm: nothing of pvt_v2_b0 is patched" in refused.stderr


@pytest.mark.drawn(days=3)
def test_the_variable_and_the_command(python, tmp_path):
    """With the whole of timm, as users have it."""
    (tmp_path / "train.py").write_text("import timm\ntimm.create_model('xcit_nano_12_p16_224')\nprint('went on')\n")
    out = python("train.py", LWPF_PATCH="timm", PYTHONPATH="")
    assert "60 classes (lwpf status lists them) patched" in out.stderr
    assert "xcit_nano_12_p16_224 is patched in part: 2 of its 14 attention layers" in out.stderr
    assert "not been tested" not in out.stderr
    refused = python("-m", "lwpf_patch", "run", "--partial", "error", "train.py", check=False, PYTHONPATH="")
    assert refused.returncode == 1
    assert "(partial=error, from LWPF_PARTIAL)" in refused.stderr
    assert "went on" not in refused.stdout


def test_lwpf_models(capsys):
    assert main(["models", "davit_t*", "test_vit", "--json"]) == 0
    davit_tiny, test_vit = map(json.loads, capsys.readouterr().out.splitlines())
    assert davit_tiny["name"] == "davit_tiny"
    assert (davit_tiny["state"], test_vit["state"]) == ("partly", "whole")
    assert davit_tiny["patched"] == {"timm.models.davit.WindowAttention": 6}
    assert davit_tiny["plain"] == {"timm.models.davit.ChannelAttention": 6}
    assert main(["models", "resnet18", "coat_tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["resnet18", "nothing"], ["coat_tiny", "refused"]]
    assert lines[2] == "2 models: 1 nothing to patch, 1 refused"
    assert lwpf_patch.status()["hosts"]["timm"]["state"] == "off"
    assert main(["models", "no_such_model*"]) == 2
    assert "no model of timm matches 'no_such_model*'" in capsys.readouterr().err
