"""patch_model: one model, its classes untouched."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from timm.layers.attention import Attention
from vits import FUNC_DS, MODELS, images, set_fused, vit

import lwpf_patch
from lwpf_patch import ConflictError, SettingsError, patch_model, unpatch_model
from lwpf_patch.backends import cpu


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("func_d", FUNC_DS)
def test_one_model_alone(func_d, model_name):
    model, other, x = MODELS[model_name]().eval(), MODELS[model_name]().eval(), images()
    plain, other_plain, text = model(x), other(x), repr(model)
    with lwpf_patch.patched("timm", func_d=func_d):
        expected = model(x)
    cls = type(model.blocks[0].attn)
    assert cls.__name__ == model_name
    code = cls.forward.__code__
    assert patch_model(model, func_d=func_d) == ["blocks.0.attn", "blocks.1.attn"]
    assert cls.forward.__code__ is code
    assert torch.equal(model(x), expected)
    assert torch.equal(other(x), other_plain)
    assert isinstance(model.blocks[0].attn, cls)
    assert not torch.equal(expected, plain)
    assert unpatch_model(model) == ["blocks.0.attn", "blocks.1.attn"]
    assert torch.equal(model(x), plain)
    assert repr(model) == text


def test_it_stays_patched_whatever_the_host_does():
    model, x = vit().eval(), images()
    patch_model(model, func_d="pfu:mu=0.1,bias=0")
    expected = model(x)
    lwpf_patch.apply("timm")
    assert torch.equal(model(x), expected)
    lwpf_patch.revert()
    assert torch.equal(model(x), expected)


def test_a_plain_teacher_under_a_patched_host():
    teacher, x = vit().eval(), images()
    plain = teacher(x)
    lwpf_patch.apply("timm")
    student = vit()
    patch_model(teacher, func_d="none")
    assert torch.equal(teacher(x), plain)
    assert isinstance(student.blocks[0].attn.func_d.rule, lwpf_patch.ReLU)
    unpatch_model(teacher)
    assert isinstance(teacher.blocks[0].attn.func_d.rule, lwpf_patch.ReLU)
    assert not torch.equal(teacher(x), plain)


def test_some_blocks_and_other_settings():
    model, x = vit().eval(), images()
    assert patch_model(model, include="blocks.1.*") == ["blocks.1.attn"]
    assert not hasattr(model.blocks[0].attn, "func_d")
    relu = model(x)
    assert patch_model(model, func_d="pfu", exclude=["*.0.*"]) == ["blocks.1.attn"]
    assert isinstance(model.blocks[1].attn.func_d.rule, lwpf_patch.PFU)
    assert not torch.equal(model(x), relu)


@pytest.mark.parametrize("fused", [True, False])
def test_copies_pickles_scripts_and_compiles(fused):
    model, x = vit().eval(), images()
    set_fused(model, fused)
    patch_model(model)
    expected = model(x)
    keys = list(vit().state_dict())
    assert list(model.state_dict()) == keys
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.jit.script(model),
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        torch.export.export(model, (x,)).module(),
    ):
        torch.testing.assert_close(again(x), expected)


def test_pickles_do_not_need_the_process_that_wrote_them(python, tmp_path):
    model, x = vit().eval(), images()
    patch_model(model)
    file = tmp_path / "model.pt"
    torch.save({"model": model, "x": x, "y": model(x)}, file)
    python(
        code=f"""
import torch
saved = torch.load({str(file)!r}, weights_only=False)
torch.testing.assert_close(saved["model"](saved["x"]), saved["y"])
"""
    )


def test_what_cannot_be_patched():
    class Override(Attention):
        def forward(self, x, **kwargs):
            return super().forward(x)

    with pytest.raises(
        SettingsError, match=r"Linear has no attention module that can be patched; those are timm.layers"
    ):
        patch_model(torch.nn.Linear(2, 2))
    with pytest.raises(ConflictError, match=r"Override defines a forward of its own.*use lwpf_patch.apply\(\)"):
        patch_model(Override(12, num_heads=3))
    model = vit()
    model.blocks[1].attn.forward = model.blocks[1].attn.forward
    with pytest.raises(
        ConflictError, match=r"patch_model: blocks.1.attn \(Attention\) has a forward of its own, set on"
    ):
        patch_model(model)
    assert not hasattr(model.blocks[0].attn, "func_d")
    assert patch_model(model, exclude="blocks.1.*") == ["blocks.0.attn"]
    with pytest.raises(SettingsError, match=r"include pattern 'layers.\*' .*they are blocks.0.attn, blocks.1.attn"):
        patch_model(vit(), include="layers.*")
    with pytest.raises(SettingsError, match="leave no attention module"):
        patch_model(vit(), exclude="*")
    with pytest.raises(SettingsError, match=r"unknown func_d 'rleu' \(from patch_model\(func_d=...\)\)"):
        patch_model(vit(), func_d="rleu")


def test_the_backend_that_computes_is_said_once_with_its_reason(caplog, monkeypatch):
    monkeypatch.setattr(cpu, "_native_is_worth_it", lambda: False)
    lwpf_patch.apply("timm", func_d="relu:empty_rows=keep")
    model = vit()
    with caplog.at_level(logging.INFO, "lwpf_patch"):
        model(images())
        lwpf_patch.patch_model(model, backend="cpu")
        model(images())
    lines = [record.message for record in caplog.records if "is computed by backend" in record.message]
    assert lines == [
        "lwpf_patch: timm: attention is computed by backend eager: there are few scores",
        "lwpf_patch: timm: attention is computed by backend cpu: as asked",
    ]
    assert lwpf_patch.status()["hosts"]["timm"]["backends"] == {"cpu": ["as asked"], "eager": ["there are few scores"]}
