"""apply, revert, patched, status: who is patched with what, exactly, and nothing by halves."""

from __future__ import annotations

import gc
import importlib
import threading
import weakref

import pytest
import timm.layers.attention
import torch
import wrapt
from timm.layers.attention import Attention, AttentionRope
from vits import images, vit

import lwpf_patch
from lwpf_patch import ConflictError, SettingsError

X = torch.randn(2, 7, 12)


@pytest.fixture
def plain_code():
    return Attention.forward.__code__, AttentionRope.forward.__code__


def test_revert_restores_the_very_code(plain_code):
    members = {name: Attention.__dict__.get(name) for name in ("forward", "__init__", "__setstate__")}
    names = set(vars(timm.layers.attention))
    module = Attention(12, num_heads=3).eval()
    plain, text = module(X), repr(module)
    lwpf_patch.apply("timm")
    assert Attention.forward.__code__ is not plain_code[0]
    assert AttentionRope.forward.__code__ is not plain_code[1]
    assert not torch.equal(module(X), plain)
    lwpf_patch.revert("timm")
    assert (Attention.forward.__code__, AttentionRope.forward.__code__) == plain_code
    assert Attention.forward.__code__ is plain_code[0]
    assert {name: Attention.__dict__.get(name) for name in members} == members
    assert set(vars(timm.layers.attention)) == names
    assert torch.equal(module(X), plain)
    assert repr(module) == text
    lwpf_patch.revert("timm")  # once more: no harm


def test_everything_from_before_the_patch_is_patched():
    class Child(Attention):
        pass

    class Caller(Attention):
        def forward(self, x):
            return 2 * super().forward(x)

    before = [Attention(12, num_heads=3), Child(12, num_heads=3), Caller(12, num_heads=3)]
    alias, bound, function = Attention, before[0].forward, Attention.forward
    plain = [module(X) for module in before]
    lwpf_patch.apply("timm", func_d="relu")
    for module, old in zip(before, plain, strict=True):
        assert isinstance(module.func_d.rule, lwpf_patch.ReLU)
        assert not torch.equal(module(X), old)
    assert torch.equal(bound(X), before[0](X))
    assert torch.equal(function(before[0], X), before[0](X))
    assert torch.equal(2 * function(before[2], X), before[2](X))
    assert isinstance(alias(12, num_heads=3).func_d.rule, lwpf_patch.ReLU)


def test_apply_is_idempotent_and_replaces():
    lwpf_patch.apply("timm")
    module = Attention(12, num_heads=3)
    code, func_d = Attention.forward.__code__, module.func_d
    lwpf_patch.apply("timm")
    assert Attention.forward.__code__ is code
    assert module.func_d is func_d
    lwpf_patch.apply("timm", func_d=lwpf_patch.PFU(mu=0.3), masking="paper")
    assert repr(module.func_d) == "PFU(mu=0.3, bias=mu, sigma=0.01, masking=paper)"
    assert repr(Attention(12, num_heads=3).func_d) == repr(module.func_d)


def test_every_module_has_its_own_func_d():
    mine = lwpf_patch.PFU()
    lwpf_patch.apply("timm", func_d=mine)
    first, second = Attention(12, num_heads=3), Attention(12, num_heads=3)
    assert first.func_d is not second.func_d
    assert first.func_d.rule is not mine
    first.eval()
    assert not first.func_d.training
    assert second.func_d.training


def test_patched_puts_back_what_was_there(plain_code):
    with lwpf_patch.patched("timm", func_d="pfu"):
        module = Attention(12, num_heads=3)
        with lwpf_patch.patched("timm", func_d="relu"):
            assert isinstance(module.func_d.rule, lwpf_patch.ReLU)
        assert isinstance(module.func_d.rule, lwpf_patch.PFU)
        with pytest.raises(ZeroDivisionError), lwpf_patch.patched("timm"):
            raise ZeroDivisionError
        assert isinstance(module.func_d.rule, lwpf_patch.PFU)
    assert Attention.forward.__code__ is plain_code[0]


def test_include_and_exclude(plain_code):
    lwpf_patch.apply("timm", include="*Rope")
    assert Attention.forward.__code__ is plain_code[0]
    assert AttentionRope.forward.__code__ is not plain_code[1]
    lwpf_patch.apply("timm", exclude=["*.AttentionRope"])
    assert Attention.forward.__code__ is not plain_code[0]
    assert AttentionRope.forward.__code__ is plain_code[1]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["tim"], {}, r"unknown host 'tim' \(from apply\(\)\): allowed are .*timm.*did you mean 'timm'"),
        ([""], {}, r"apply\(\) names no host"),
        (["timm"], {"func_d": "reul"}, r"unknown func_d 'reul' \(from apply\(func_d=...\)\).*did you mean 'relu'"),
        (["timm"], {"func_d": "pfu:mu=dmeidan"}, "mu='dmeidan' in 'pfu:mu=dmeidan' .*must be a number or 'dmedian'"),
        (["timm"], {"func_d": "pfu:sigma=-1"}, "sigma='-1' .* must be a number of at least 0"),
        (["timm"], {"func_d": "pfu:mu=nan"}, "mu='nan'"),
        (["timm"], {"func_d": "pfu:sgima=1"}, "unknown option of pfu 'sgima'.*did you mean 'sigma'"),
        (["timm"], {"func_d": "pfu:mu=1,mu=2"}, "option 'mu' stands twice"),
        (["timm"], {"func_d": "pfu:mu"}, "'mu' in 'pfu:mu' .* is not of the form option=value"),
        (["timm"], {"func_d": "pfu:"}, "no option follows the colon"),
        (["timm"], {"func_d": "relu:mu=1"}, "unknown option of relu 'mu'.*did you mean 'empty'|allowed are empty"),
        (["timm"], {"func_d": "none:mu=1"}, "'none' takes no options"),
        (["timm"], {"func_d": "relu:empty=full"}, "empty must be 'zero' or 'plain'"),
        (["timm"], {"compat": "yes"}, "unknown compat 'yes'.*allowed are 0, 1"),
        (["timm"], {"func_d": lwpf_patch.ReLU}, r"is a class; pass an instance: ReLU\(\)"),
        (["timm"], {"func_d": 3}, "func_d 3 .* is neither text nor callable"),
        (["timm"], {"masking": "Paper"}, "unknown masking 'Paper'.*allowed are exclude, paper; did you mean 'paper'"),
        (["timm"], {"backend": "trtion"}, "unknown backend 'trtion'"),
        (["timm"], {"include": ["*swin*"]}, r"include pattern '\*swin\*' .* matches no site of timm; its sites are"),
        (["timm"], {"exclude": "*"}, "leave no site of timm"),
        (["timm"], {"include": [3]}, "include 3 .* is not text"),
    ],
)
def test_wrong_requests_change_nothing(plain_code, arguments, options, message):
    for before in ({}, {"func_d": "pfu"}):
        if before:
            lwpf_patch.apply("timm", **before)
        code = Attention.forward.__code__
        with pytest.raises(SettingsError, match=message):
            lwpf_patch.apply(*arguments, **options)
        assert Attention.forward.__code__ is code
    with pytest.raises(SettingsError, match="unknown host 'tom'"):
        lwpf_patch.revert("tom")
    with pytest.raises(SettingsError, match="unknown host 'timm,hflayers'"), lwpf_patch.patched("timm,hflayers"):
        pass


def test_an_option_that_does_not_exist_is_a_type_error():
    with pytest.raises(TypeError, match="fun_d"):
        lwpf_patch.apply("timm", fun_d="relu")


def _proxy(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs)


@pytest.mark.parametrize("kind", ["rebound", "code", "proxy"])
def test_a_patch_of_someone_else_in_the_way(monkeypatch, plain_code, kind):
    def theirs(self, x, attn_mask=None, is_causal=False):
        return x

    if kind == "rebound":
        monkeypatch.setattr(Attention, "forward", theirs)
    elif kind == "code":
        monkeypatch.setattr(Attention.forward, "__code__", theirs.__code__)
    else:
        monkeypatch.setattr(Attention, "forward", wrapt.FunctionWrapper(Attention.forward, _proxy))
    rope, init = AttentionRope.forward.__code__, Attention.__init__
    with pytest.raises(
        ConflictError, match=r"Attention.forward is not the code of its source file .*attention.py: it is"
    ):
        lwpf_patch.apply("timm")
    assert AttentionRope.forward.__code__ is rope  # nothing half-patched
    assert Attention.__init__ is init
    assert lwpf_patch.status()["hosts"]["timm"]["state"] == "off"
    lwpf_patch.apply("timm", include="*Rope")


@pytest.mark.parametrize("member", ["forward", "__init__"])
def test_revert_does_not_undo_a_later_patch(monkeypatch, plain_code, member):
    def theirs(self, x, attn_mask=None, is_causal=False):
        return x

    with monkeypatch.context() as context:
        lwpf_patch.apply("timm")
        code = Attention.forward.__code__
        if member == "forward":
            context.setattr(Attention.forward, "__code__", theirs.__code__)
        else:
            context.setattr(Attention, "__init__", lambda self: None)
        with pytest.raises(ConflictError, match=rf"{member} was patched again after lwpf_patch.*test_registry"):
            lwpf_patch.revert()
        assert AttentionRope.forward.__code__ is not plain_code[1]
    assert Attention.forward.__code__ is code
    lwpf_patch.revert()
    assert Attention.forward.__code__ is plain_code[0]


def test_a_wrapper_around_the_patched_forward_stays(monkeypatch, plain_code):
    """Someone who rebinds the name calls our function, whose code revert restores."""
    lwpf_patch.apply("timm")
    original = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, x: 2 * original(self, x))
    module = Attention(12, num_heads=3)
    doubled = module(X)
    lwpf_patch.revert()
    assert not torch.equal(module(X), doubled)
    assert original.__code__ is plain_code[0]


def test_an_attribute_of_the_same_name_in_the_way():
    class Mine(Attention):
        func_d = None

    instance = Mine(12, num_heads=3)
    with pytest.raises(ConflictError, match=r"Mine has an attribute func_d of its own \(None\)"):
        lwpf_patch.apply("timm")
    assert lwpf_patch.status()["hosts"]["timm"]["state"] == "off"
    del instance
    gc.collect()


def test_a_reloaded_module_is_patched():
    source = timm.layers.attention
    kept = {name: getattr(source, name) for name in ("Attention", "AttentionRope")}
    lwpf_patch.apply("timm")
    try:
        importlib.reload(source)
        assert source.Attention is not kept["Attention"]
        module = source.Attention(12, num_heads=3)
        assert isinstance(module.func_d.rule, lwpf_patch.ReLU)
        patched = module.eval()(X)
        lwpf_patch.revert()
        assert not torch.equal(module(X), patched)
    finally:
        lwpf_patch.revert()
        for name, cls in kept.items():
            setattr(source, name, cls)


def test_status_is_plain_data():
    import json

    assert lwpf_patch.status()["hosts"]["timm"] == {"installed": True, "version": timm.__version__, "state": "off"}
    lwpf_patch.apply("timm", func_d="pfu")
    status = json.loads(json.dumps(lwpf_patch.status()))["hosts"]["timm"]
    assert status["state"] == "patched"
    assert status["called"] is False
    assert status["settings"]["func_d"] == "pfu"
    assert [site["name"] for site in status["sites"]] == [
        "timm.layers.attention.Attention",
        "timm.layers.attention.AttentionRope",
    ]
    before = status["modules"]
    model = vit()
    model(images())
    after = lwpf_patch.status()["hosts"]["timm"]
    assert after["called"] is True
    assert after["modules"] == before + len(model.blocks)


def test_threads_leave_one_patch_and_exact_code(plain_code):
    errors = []

    def work(number: int) -> None:
        try:
            for _ in range(5):
                lwpf_patch.apply("timm", func_d="relu" if number % 2 else "pfu")
                Attention(12, num_heads=3)
                lwpf_patch.revert()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    lwpf_patch.revert()
    assert Attention.forward.__code__ is plain_code[0]


def test_nothing_is_kept_alive():
    lwpf_patch.apply("timm")
    module = Attention(12, num_heads=3)
    reference = weakref.ref(module)
    lwpf_patch.apply("timm", func_d="pfu")
    del module
    gc.collect()
    assert reference() is None


def test_source_and_tracebacks_show_the_patched_lines():
    import inspect
    import traceback

    lwpf_patch.apply("timm")
    assert "attn, mask = self.func_d(attn)" in inspect.getsource(Attention.forward)
    module = Attention(12, num_heads=3)
    module.fused_attn = False
    module.func_d.forward = lambda scores: 1 / 0
    with pytest.raises(ZeroDivisionError) as caught:
        module(X)
    shown = "".join(traceback.format_exception(caught.value))
    assert "attn, mask = self.func_d(attn)" in shown
    assert "<lwpf_patch timm.layers.attention>" in shown
