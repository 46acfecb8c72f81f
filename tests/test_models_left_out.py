"""Distillation teachers: they are noticed, and ``exclude_models`` leaves them plain."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.task.distillation import DistillationTeacher
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from vits import images, vit

import lwpf_patch
from lwpf_patch import uhop
from lwpf_patch.patching import exit_report, owners, state, teachers

pytestmark = pytest.mark.drawn(days=3)


def _named():
    """timm's smallest vision transformer, by its name."""
    return timm.create_model("test_vit", img_size=32, patch_size=16, num_classes=5).double().eval()


def _student():
    return nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten(), nn.Linear(4, 5)).double()


def _distil(student, teacher, steps=4, size=32, **options):
    """Trains a student on what a teacher says, and returns the last loss."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(3, 3, size, size, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            goal = teacher(x)
        loss = F.mse_loss(student(x[..., :16, :16]), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def _warnings(caplog):
    return [record.message for record in caplog.records if "is only evaluated" in record.message]


# --- noticed --------------------------------------------------------------------------------------------------------


class _Task(nn.Module):
    """Student and teacher in one module, as in timm.task and in Lightning."""

    def __init__(self, student, teacher, name="teacher"):
        super().__init__()
        self.student = student
        self.add_module(name, teacher)


@pytest.mark.parametrize("how", ["apart", "in one module", "as timm does", "compiled"])
def test_a_teacher_is_noticed_once_and_named(how, caplog):
    lwpf_patch.apply("timm")
    student, teacher = _student(), _named()
    held = None
    if how == "in one module":
        held = _Task(student, teacher)
    elif how == "as timm does":
        teacher = DistillationTeacher(teacher)
        held = _Task(student, teacher, "other")
    elif how == "compiled":
        teacher = torch.compile(teacher, backend="eager")
    _distil(student, teacher, steps=teachers.STEPS)
    (message,) = _warnings(caplog)
    assert "timm: VisionTransformer (test_vit" in message
    assert "its 6 attention modules are patched too" in message
    assert "LWPF_EXCLUDE_MODELS=test_vit" in message
    assert 'patch_model(teacher, func_d="none")' in message
    assert not any(module._forward_pre_hooks for module in (held or teacher).modules())
    assert not teachers._suspects


def test_the_hook_is_in_nobodys_way():
    """torch goes through all hooks of optimizers while ours looks for the last time; another one comes after it."""
    lwpf_patch.apply("timm")
    calls = []
    handle = register_optimizer_step_post_hook(lambda *args: calls.append(args))
    try:
        _distil(_student(), _named(), steps=teachers.STEPS + 2)
    finally:
        handle.remove()
    assert len(calls) == teachers.STEPS + 2


def test_no_other_model_is_taken_for_one(caplog):
    """Averages of the model that trains, frozen layers of it, itself in evaluation, and what is plain anyway."""
    lwpf_patch.apply("timm")
    student = vit()

    def step_with(other, steps=5, update=lambda: None, model=student):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        teachers.watch()
        for _ in range(steps):
            optimizer.zero_grad()
            model(images()).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                update()
                other(images())
        assert not _warnings(caplog)

    average = copy.deepcopy(student).eval()

    def update():
        for mine, theirs in zip(average.parameters(), student.parameters(), strict=True):
            mine.data.mul_(0.99).add_(theirs.data, alpha=0.01)

    step_with(average)  # not moved yet
    step_with(average, update=update)
    resumed = vit().eval()  # far from the model that trains, but moving
    step_with(resumed, update=lambda: [p.data.mul_(0.99999) for p in resumed.parameters()])
    step_with(lambda x: (student.eval()(x), student.train()))  # a validation, and a sanity check
    backbone = vit().eval().requires_grad_(False)
    probe = nn.Sequential(backbone, nn.Linear(5, 5).double())
    step_with(probe, model=probe)
    left = vit().eval()
    lwpf_patch.patch_model(left, func_d="none")
    step_with(left)
    step_with(lambda x: None)  # one that lives, and is not called
    assert _distil(_student(), vit(), size=16)  # one in training mode
    assert not _warnings(caplog)


def test_steps_that_gradscaler_skips_do_not_count(caplog):
    lwpf_patch.apply("timm")
    student, teacher = _student().float(), _named().float()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step in range(12):
        x = torch.randn(2, 3, 32, 32)
        loss = F.mse_loss(student(x[..., :16, :16]), teacher(x).detach())
        scaler.scale(loss * (float("inf") if step % 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert len(_warnings(caplog)) == 1


# --- left out -------------------------------------------------------------------------------------------------------


@pytest.mark.drawn(cases=3)
@pytest.mark.parametrize(
    "pattern",
    ["test_vit", "test_vit.*", "VisionTransformer", "timm.models.vision_transformer.V*", "_Around", "no,test_*"],
)
def test_a_model_is_left_out_by_its_name_or_a_class_around_it(pattern):
    class _Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = _named()

    torch.manual_seed(0)
    plain = _Around()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = plain.model(x)
    lwpf_patch.apply("timm", exclude_models=pattern)
    torch.manual_seed(0)
    model = _Around()
    assert torch.equal(model.model(x), expected)
    assert torch.equal(copy.deepcopy(model).model(x), expected)
    other = timm.models.Eva(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, attn_type="rope",
                            use_rot_pos_emb=True)  # fmt: skip
    assert isinstance(other.blocks[0].attn.func_d.rule, lwpf_patch.ReLU)
    if pattern != "_Around":
        assert torch.equal(plain.model(x), expected)  # it was there before
        lwpf_patch.apply("timm", func_d="pfu", exclude_models=pattern)
        assert torch.equal(model.model(x), expected)
    lwpf_patch.apply("timm")
    assert not torch.equal(model.model(x), expected)
    lwpf_patch.revert()
    assert "func_d" not in repr(model)
    assert torch.equal(model.model(x), expected)


def test_with_uhop_it_has_no_map():
    lwpf_patch.apply("timm", uhop="iters=2", func_d="relu", exclude_models="test_vit")
    teacher, student = _named(), vit()
    assert not any("feature_map" in name for name in teacher.state_dict())
    assert isinstance(teacher.blocks[0].attn.feature_map, uhop.NoFeatureMap)
    assert any("feature_map" in name for name in student.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ours = teacher(x)
    lwpf_patch.revert()
    assert torch.equal(ours, teacher(x))
    assert "feature_map" not in repr(teacher)


def test_a_pattern_that_matches_nothing_is_reported(monkeypatch, caplog):
    monkeypatch.setattr(owners, "_matched", set())
    monkeypatch.setattr(exit_report, "has_computed", lambda: True)
    lwpf_patch.apply("timm", exclude_models=["test_vit", "vit_bsae*"])
    _named()
    exit_report.report(state.PATCHED)
    assert "exclude_models: 'vit_bsae*' matched no model" in caplog.text
    assert "'test_vit'" not in caplog.text


def test_wrong_patterns_are_refused():
    with pytest.raises(lwpf_patch.SettingsError, match=r"exclude_models 5 .* is not text"):
        lwpf_patch.apply("timm", exclude_models=[5])


SCRIPT = """
import sys, timm, torch
torch.manual_seed(0)
student = timm.create_model("test_resnet", num_classes=5)
teacher = timm.create_model("test_vit", num_classes=5).eval()
optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
for step in range(4):
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        goal = teacher(x)
    loss = torch.nn.functional.mse_loss(student(x), goal)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(loss.item())
"""


@pytest.mark.drawn(days=4)
def test_an_unmodified_script(python, tmp_path):
    plain = python(code=SCRIPT)
    patched = python(code=SCRIPT, LWPF_PATCH="timm")
    assert patched.stdout != plain.stdout
    assert patched.stderr.count("is only evaluated while another model trains") == 1
    assert "LWPF_EXCLUDE_MODELS=test_vit" in patched.stderr
    out = python("-m", "lwpf_patch", "run", "--exclude-models", "test_vit", "script.py")
    assert out.stdout == plain.stdout
    assert "backend auto, but not in test_vit" in out.stderr
    assert "is only evaluated" not in out.stderr
    assert "nothing ran with partial forgetting" in out.stderr
    assert "or was left out by exclude_models" in out.stderr
    assert "matched no model" not in out.stderr
