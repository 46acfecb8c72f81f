"""apply, revert, patched, status: who is patched with what, exactly, and nothing by halves."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import importlib.util
import itertools
import pickle
import sys
import threading
import traceback
import weakref

import pytest
import timm.layers.attention
import torch
import wrapt
from conftest import require_host
from timm.layers.attention import Attention, AttentionRope
from vits import images, vit

import lwpf_patch
from lwpf_patch import ConflictError, LwpfError, SettingsError

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


@pytest.mark.drawn(cases=1)
@pytest.mark.parametrize(
    "hosts", [["timm", "hflayers"], "timm,hflayers", (" hflayers ", "timm"), "timm, hflayers, timm"]
)
def test_several_hosts_are_patched_and_reverted_together(hosts):
    require_host("hflayers")

    def patched_hosts():
        state = lwpf_patch.status()["hosts"]
        return {name: state[name]["settings"]["func_d"] for name in state if state[name]["state"] != "off"}

    lwpf_patch.apply(hosts)
    assert patched_hosts() == {"timm": "relu", "hflayers": "relu"}
    lwpf_patch.revert(hosts)
    assert patched_hosts() == {}
    with lwpf_patch.patched(hosts, func_d="pfu"):
        assert patched_hosts() == {"timm": "pfu", "hflayers": "pfu"}
        with lwpf_patch.patched("timm", func_d="none"):
            assert patched_hosts() == {"timm": "none", "hflayers": "pfu"}
        assert patched_hosts() == {"timm": "pfu", "hflayers": "pfu"}
        with pytest.raises(ZeroDivisionError), lwpf_patch.patched(hosts, masking="paper"):
            raise ZeroDivisionError
        assert patched_hosts() == {"timm": "pfu", "hflayers": "pfu"}
    assert patched_hosts() == {}


@pytest.mark.parametrize("before", [None, "pfu"])
def test_where_one_of_several_hosts_cannot_be_patched_none_is(monkeypatch, plain_code, before):
    require_host("hflayers")
    from hflayers.activation import HopfieldCore

    if before:
        lwpf_patch.apply("timm", func_d=before)
    code, state = Attention.forward.__code__, lwpf_patch.status()["hosts"]
    with monkeypatch.context() as context:
        context.setattr(HopfieldCore, "forward", lambda self, x: x)
        for attempt in (lwpf_patch.apply, lambda hosts: lwpf_patch.patched(hosts).__enter__()):
            with pytest.raises(ConflictError, match=r"HopfieldCore.forward is not the code of its source file"):
                attempt("timm,hflayers")
            assert lwpf_patch.status()["hosts"] == state
            assert Attention.forward.__code__ is code or before
    lwpf_patch.revert()
    assert Attention.forward.__code__ is plain_code[0]


def test_blocks_of_several_hosts_are_all_left_whatever_one_of_them_raises(monkeypatch, plain_code):
    require_host("hflayers")
    from hflayers.activation import HopfieldCore

    conflict = pytest.raises(ConflictError, match="forward was patched again after lwpf_patch")
    with conflict, monkeypatch.context() as context, lwpf_patch.patched("timm,hflayers"):
        context.setattr(HopfieldCore.forward, "__code__", (lambda self, x: x).__code__)
    assert Attention.forward.__code__ is plain_code[0]
    assert lwpf_patch.status()["hosts"]["timm"]["state"] == "off"


def test_a_host_that_is_not_installed(monkeypatch, plain_code):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "timm" else find_spec(name, *more)
    )
    for attempt in (lwpf_patch.apply, lambda host: lwpf_patch.patched(host).__enter__()):
        with pytest.raises(lwpf_patch.HostNotInstalledError, match="is not installed here: pip install timm") as caught:
            attempt("timm")
        assert not isinstance(caught.value, ImportError)  # which scripts catch
    with monkeypatch.context() as context:
        context.delitem(sys.modules, "timm")
        status = lwpf_patch.status()["hosts"]["timm"]
    assert status == {"installed": False, "state": "not installed", "problem": str(caught.value)}
    assert Attention.forward.__code__ is plain_code[0]


def test_include_and_exclude(plain_code):
    lwpf_patch.apply("timm", include="*Rope")
    assert Attention.forward.__code__ is plain_code[0]
    assert AttentionRope.forward.__code__ is not plain_code[1]
    lwpf_patch.apply("timm", exclude=["*.AttentionRope"])
    assert Attention.forward.__code__ is not plain_code[0]
    assert AttentionRope.forward.__code__ is plain_code[1]


@pytest.mark.drawn(cases=10)
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["tim"], {}, r"unknown host 'tim' \(from apply\(\)\): allowed are .*timm.*did you mean 'timm'"),
        ([""], {}, r"apply\(\) names no host"),
        (["timm"], {"func_d": "reul"}, r"unknown func_d 'reul' \(from apply\(func_d=...\)\).*did you mean 'relu'"),
        (
            ["timm"],
            {"func_d": "pfu:mu=dmeidan"},
            "mu='dmeidan' in 'pfu:mu=dmeidan' .*must be a number from -1e.38 to 1e.38 or 'dmedian' or",
        ),
        (["timm"], {"func_d": "pfu:sigma=-1"}, "sigma='-1' .* must be a number of at least 0"),
        (["timm"], {"func_d": "pfu:mu=nan"}, "mu='nan'"),
        (["timm"], {"func_d": "pfu:sgima=1"}, "unknown option of pfu 'sgima'.*did you mean 'sigma'"),
        (["timm"], {"func_d": "pfu:mu=1,mu=2"}, "option 'mu' stands twice"),
        (["timm"], {"func_d": "pfu:mu"}, "'mu' in 'pfu:mu' .* is not of the form option=value"),
        (["timm"], {"func_d": "pfu:"}, "no option follows the colon"),
        (["timm"], {"func_d": "relu:mu=1"}, "unknown option of relu 'mu'.*allowed are empty_rows"),
        (["timm"], {"func_d": "none:mu=1"}, "'none' takes no options"),
        (["timm"], {"func_d": "relu:empty=full"}, "empty_rows must be 'zero' or 'keep'"),
        (["timm"], {"compat": "y"}, "unknown compat 'y'.*allowed are 0, 1"),
        (["timm"], {"func_d": lwpf_patch.ReLU}, r"is a class; pass an instance: ReLU\(\)"),
        (["timm"], {"func_d": 3}, "func_d 3 .* is neither text nor callable"),
        (["timm"], {"masking": "Paper"}, "unknown masking 'Paper'.*allowed are exclude, paper; did you mean 'paper'"),
        (["timm"], {"backend": "trtion"}, "unknown backend 'trtion'"),
        (
            ["timm"],
            {"include": ["*none*"]},
            r"include pattern '\*none\*' .* matches no site of timm; its sites are",
        ),
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
    with pytest.raises(SettingsError, match="unknown host 'tom'"), lwpf_patch.patched("timm,tom"):
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


def test_what_nothing_uses_is_in_nobodys_way():
    """A quantized layer can have no feature map; once it is garbage, collected or not, it is no reason to refuse."""
    left = [torch.ao.quantization.quantize_dynamic(Attention(12, num_heads=3), {torch.nn.Linear})]
    with pytest.raises(SettingsError, match="no parameter of a floating dtype"):
        lwpf_patch.apply("timm", uhop="on")
    left.append(left)  # in a circle, which reference counts alone do not free
    gc.disable()
    try:
        del left
        lwpf_patch.apply("timm", uhop="on")
    finally:
        gc.enable()
    assert Attention(12, num_heads=3).feature_map is not None


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
    names = [site["name"] for site in status["sites"]]
    assert {"timm.layers.attention.Attention", "timm.models.swin_transformer.WindowAttention"} <= set(names)
    gc.collect()  # what other tests have left
    before = lwpf_patch.status()["hosts"]["timm"]["modules"]
    model = vit()
    model(images())
    after = lwpf_patch.status()["hosts"]["timm"]
    assert after["called"] is True
    assert after["modules"] == before + len(model.blocks)


@pytest.mark.drawn(days=2)
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
    assert "attn = self.func_d.softmax(attn, dim=-1)" in inspect.getsource(Attention.forward)
    module = Attention(12, num_heads=3)
    module.fused_attn = False
    module.func_d.forward = lambda scores, dim: 1 / 0
    with pytest.raises(ZeroDivisionError) as caught:
        module(X)
    shown = "".join(traceback.format_exception(caught.value))
    assert "attn = self.func_d.softmax(attn, dim=-1)" in shown
    assert "<lwpf_patch timm.layers.attention" in shown


# --- blocks that overlap --------------------------------------------------------------------------------------------


def _func_d(module):
    return repr(getattr(module, "func_d", None))


@pytest.mark.drawn(days=2)
def test_blocks_that_end_in_another_order(plain_code):
    """The block that was entered last says what computes; when all have ended, it is as it was before the first."""
    module = Attention(12, num_heads=3)
    for before in (None, "none"):
        for order in ("abc", "acb", "bac", "bca", "cab") if before is None else ("bca",):
            if before is not None:
                lwpf_patch.apply("timm", func_d=before)
            found = _func_d(module)
            settings = {"a": "relu", "b": "pfu:mu=0.1", "c": "pfu:mu=0.2"}
            open_blocks = {}
            for name, func_d in settings.items():
                open_blocks[name] = contextlib.ExitStack()
                open_blocks[name].enter_context(lwpf_patch.patched("timm", func_d=func_d))
            for name in order:
                open_blocks.pop(name).close()
                top = max(open_blocks, default=None)
                expected = found if top is None else repr(lwpf_patch.forgetting.make_func_d(settings[top]))
                assert _func_d(module) == expected, (before, order, name)
            lwpf_patch.revert()
            assert Attention.forward.__code__ is plain_code[0]


def test_what_is_applied_inside_of_a_block_ends_with_it(plain_code):
    module = Attention(12, num_heads=3)
    with lwpf_patch.patched("timm"):
        lwpf_patch.apply("timm", func_d="pfu:mu=0.1")
        with lwpf_patch.patched("timm", func_d="none"):
            lwpf_patch.revert()
            assert _func_d(module) == "None"
        assert _func_d(module).startswith("PFU(mu=0.1")
        with pytest.raises(SettingsError), lwpf_patch.patched("timm", func_d="no"):
            pass
        assert _func_d(module).startswith("PFU(mu=0.1")
    assert Attention.forward.__code__ is plain_code[0]
    assert lwpf_patch.status()["hosts"]["timm"]["state"] == "off"


# --- threads --------------------------------------------------------------------------------------------------------


def _in_threads(works, times):
    """Runs functions, each in a thread of its own, again and again until the last of them has run so many times."""
    errors, counts = [], dict.fromkeys(works, 0)

    def loop(work) -> None:
        try:
            while counts[works[-1]] < times and not errors:
                work()
                counts[work] += 1
        except Exception:
            errors.append(traceback.format_exc())

    threads = [threading.Thread(target=loop, args=(work,)) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors, errors[0]


@pytest.mark.drawn(days=2)
def test_blocks_of_six_threads_leave_nothing(plain_code):
    def block(number: int):
        def work() -> None:
            with lwpf_patch.patched("timm", func_d=f"pfu:mu={number},bias=0,sigma=0"):
                assert Attention(12, num_heads=3).eval()(X).isfinite().all()

        return work

    _in_threads([block(number) for number in range(6)], 3)
    assert lwpf_patch.status()["hosts"]["timm"]["state"] == "off"
    assert Attention.forward.__code__ is plain_code[0]
    assert not hasattr(Attention(12, num_heads=3), "func_d")


def _timm_case():
    torch.manual_seed(1)

    class Child(Attention):
        def __init__(self):
            super().__init__(12, num_heads=3)

    model = Attention(12, num_heads=3).eval()
    state = model.state_dict()

    def make():
        made = Child().eval()
        made.load_state_dict(state)
        return made

    return model, make, lambda module: module(X)


def _hflayers_case():
    pytest.importorskip("hflayers")
    from hflayers.activation import HopfieldCore

    torch.manual_seed(1)
    core, x = HopfieldCore(8, num_heads=2).eval(), torch.randn(4, 2, 8)
    return core, lambda: copy.deepcopy(core), lambda module: module(x, x, x, update_steps_max=1)[0]


@pytest.mark.drawn(cases=1)
@pytest.mark.parametrize("case", [_timm_case, _hflayers_case], ids=["timm", "hflayers"])
def test_forwards_and_constructors_while_another_thread_patches(case):
    """Each call computes as before the change or as after it, and nothing of the patch is left in the end."""
    host = case.__name__.split("_")[1]
    model, make, call = case()
    states = [None, {"func_d": "relu"}, {"func_d": "pfu:mu=0.05,bias=0,sigma=0"}, {"uhop": "on"}]
    allowed = []
    for settings in states:
        with lwpf_patch.patched(host, **settings) if settings else contextlib.nullcontext():
            allowed.append(call(model))
    classes = {cls: dict(vars(cls)) for cls in (*type(make()).__mro__, type(model))}
    instance = {**vars(model), "_modules": dict(model._modules)}
    changes = itertools.cycle([*states[1:], states[2], None])

    def forward() -> None:
        out = call(model)
        assert any(torch.equal(out, each) for each in allowed)

    def construct() -> None:
        made = make()
        for _ in range(3):
            out = call(made)
            assert any(torch.equal(out, each) for each in allowed)

    def change() -> None:
        settings = next(changes)
        if settings is None:
            lwpf_patch.revert(host)
        else:
            lwpf_patch.apply(host, **settings)

    _in_threads([forward, lambda: forward(), construct, lambda: construct(), change], 10)
    lwpf_patch.revert()
    assert {cls: dict(vars(cls)) for cls in classes} == classes
    assert {**vars(model), "_modules": dict(model._modules)} == instance
    assert torch.equal(call(model), allowed[0])


def test_calls_that_do_not_end(monkeypatch, caplog):
    """A forward that goes on for long keeps what it needs; from inside of one nothing can be changed."""
    lwpf_patch.apply("timm")
    monkeypatch.setattr("lwpf_patch.patching.frames.PATIENCE", 0.2)
    entered, leave, results = threading.Event(), threading.Event(), []

    class Slow(torch.nn.Linear):
        def forward(self, x):
            entered.set()
            assert leave.wait(60)
            return super().forward(x)

    module, other = Attention(12, num_heads=3).eval(), Attention(12, num_heads=3)
    expected = module(X)
    module.qkv, state = Slow(12, 36, bias=False), module.qkv.state_dict()
    module.qkv.load_state_dict(state)
    thread = threading.Thread(target=lambda: results.append(module(X)))
    thread.start()
    assert entered.wait(60)
    with caplog.at_level("WARNING", "lwpf_patch"):
        lwpf_patch.revert()
    assert "timm: 1 calls in other threads have been running for 0.2 s" in caplog.text
    assert not hasattr(other, "func_d")
    leave.set()
    thread.join()
    assert torch.equal(results[0], expected)

    def revert(*arguments):
        lwpf_patch.revert()

    lwpf_patch.apply("timm")
    module.proj.register_forward_hook(revert)
    with pytest.raises(LwpfError, match="the patch of timm cannot be changed from inside of a patched forward"):
        module(X)
    assert lwpf_patch.status()["hosts"]["timm"]["state"] == "patched"


# --- classes and instances of every kind ----------------------------------------------------------------------------


def _unusual_classes():
    class SkipsInit(Attention):
        def __init__(self, dim):
            torch.nn.Module.__init__(self)
            self.take(Attention(dim, num_heads=3))

        def take(self, other):
            self.__dict__.update({k: v for k, v in vars(other).items() if not k.startswith("_")})
            for name in ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"):
                setattr(self, name, getattr(other, name))

    class SkipsSetstate(Attention):
        def __init__(self, dim):
            super().__init__(dim, num_heads=3)

        def __setstate__(self, state):
            self.__dict__.update(state)

    class Borrows(torch.nn.Module):
        forward = Attention.forward

        def __init__(self, dim):
            super().__init__()
            SkipsInit.take(self, Attention(dim, num_heads=3))

    class BorrowsToo(Borrows):
        pass

    return [SkipsInit, SkipsSetstate, Borrows, BorrowsToo]


def test_classes_that_go_past_the_constructor_or_borrow_the_forward():
    before = _unusual_classes()
    namespaces = [dict(vars(cls)) for cls in (*before, Attention, torch.nn.Module)]
    lwpf_patch.apply("timm")
    after = _unusual_classes()
    modules = [cls(12).eval() for cls in (*before, *after)]
    modules += [copy.deepcopy(modules[1]), copy.deepcopy(modules[5])]
    for module in modules:
        assert isinstance(module.func_d.rule, lwpf_patch.ReLU), type(module)
        assert module(X).shape == X.shape
    lwpf_patch.apply("timm", uhop="on")
    for module in [*modules, *(cls(12) for cls in (*before, *after))]:
        assert isinstance(module.func_d.rule, lwpf_patch.NoForgetting)
        assert len(list(module.feature_map.parameters())) == 1
    lwpf_patch.revert()
    assert [dict(vars(cls)) for cls in (*before, Attention, torch.nn.Module)] == namespaces
    assert not any("func_d" in module._modules or "feature_map" in module._modules for module in modules)
    assert [type(vars(cls)["__init__"]).__name__ for cls in after if "__init__" in vars(cls)] == ["function"] * 3
    assert all(not hasattr(cls(12), "func_d") for cls in (*before, *after))


@pytest.mark.drawn(days=2)
def test_instances_that_the_garbage_collector_no_longer_lists():
    module, kept = Attention(12, num_heads=3), [Attention(12, num_heads=3)]
    globals()["_kept"] = kept
    frozen_before = gc.get_freeze_count()
    gc.freeze()
    try:
        assert gc.get_freeze_count() > frozen_before
        lwpf_patch.apply("timm")
        assert isinstance(module.func_d.rule, lwpf_patch.ReLU)
        assert isinstance(kept[0].func_d.rule, lwpf_patch.ReLU)
        lwpf_patch.revert()
        assert not hasattr(module, "func_d")
        assert not hasattr(kept[0], "func_d")
    finally:
        gc.unfreeze()
        del globals()["_kept"]


def test_what_borrows_unseen_fails_with_the_remedy():
    """Nobody can see that a function calls another one by name; the traceback says what to do."""

    class Calls(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.fused_attn = 3, False
            self.__dict__["other"] = Attention(12, num_heads=3).eval()

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "func_d" else getattr(self.__dict__["other"], name)

        def forward(self, x):
            return Attention.forward(self, x)

    class Later(torch.nn.Module):
        def __init__(self):
            super().__init__()
            vars(self).update({k: v for k, v in vars(Attention(12, num_heads=3)).items() if k != "_modules"})
            self._modules.update({k: v for k, v in Attention(12, num_heads=3)._modules.items() if k != "func_d"})

    lwpf_patch.apply("timm")
    Later.forward = Attention.forward
    later, calls = Later(), Calls()
    for module in (later, calls):
        for module.fused_attn in (True, False):
            with pytest.raises(AttributeError, match="func_d") as caught:
                module(X)
            shown = "".join(traceback.format_exception(caught.value))
            assert "# lwpf_patch: no func_d here? Set self.func_d = lwpf_patch.HostFuncD('relu'), or call" in shown
    func_d = lwpf_patch.status()["hosts"]["timm"]["settings"]["func_d"]
    lwpf_patch.apply("timm", func_d=func_d)  # once more
    assert later(X).shape == X.shape
    calls.func_d = lwpf_patch.HostFuncD("relu")
    for calls.fused_attn in (True, False):
        assert calls(X).shape == X.shape


@contextlib.contextmanager
def _reloaded(*modules):
    kept = [dict(vars(module)) for module in modules]
    try:
        for module in modules:
            importlib.reload(module)
        yield
    finally:
        lwpf_patch.revert()
        for module, namespace in zip(modules, kept, strict=True):
            vars(module).update(namespace)


def test_a_module_that_was_reloaded_before(plain_code):
    """What was made before the reload has the classes and functions from before."""
    module = Attention(12, num_heads=3).eval()
    plain = module(X)
    with _reloaded(timm.layers.attention):
        new = timm.layers.attention.Attention(12, num_heads=3).eval()
        assert type(new) is not Attention
        lwpf_patch.apply("timm")
        assert isinstance(new.func_d.rule, lwpf_patch.ReLU)
        assert isinstance(module.func_d.rule, lwpf_patch.ReLU)
        assert not torch.equal(module(X), plain)
        lwpf_patch.revert()
        assert torch.equal(module(X), plain)
        assert not hasattr(new, "func_d")
        assert Attention.forward.__code__ is plain_code[0]
        Attention.forward.__code__ = (lambda self, x, attn_mask=None, is_causal=False: x).__code__
        try:
            with pytest.raises(
                ConflictError, match=r"timm.layers.attention was reloaded, and a Attention.forward from be"
            ):
                lwpf_patch.apply("timm")
            assert lwpf_patch.status()["hosts"]["timm"]["state"] == "off"
        finally:
            Attention.forward.__code__ = plain_code[0]


def test_a_reloaded_function_that_a_module_has_from_before():
    functional = pytest.importorskip("hflayers.functional")
    from hflayers.activation import HopfieldCore

    core, x = HopfieldCore(8, num_heads=2).eval(), torch.randn(4, 2, 8)
    plain = core(x, x, x)[0]
    with _reloaded(functional):
        lwpf_patch.apply("hflayers")
        assert not torch.equal(core(x, x, x)[0], plain)
        lwpf_patch.revert()
        assert torch.equal(core(x, x, x)[0], plain)


def test_a_patch_that_fails_changes_nothing():
    """The second of two instances cannot be patched: the first, and new ones, are as before."""

    class Mine(Attention):
        feature_map = None

    first, second = Attention(12, num_heads=3), Mine(12, num_heads=3)
    for before in (None, "pfu:mu=0.3"):
        if before:
            lwpf_patch.apply("timm", func_d=before)
        func_d = getattr(first, "func_d", None)
        with pytest.raises(ConflictError, match="Mine has an attribute feature_map of its own"):
            lwpf_patch.apply("timm", uhop="on")
        assert getattr(first, "func_d", None) is func_d
        assert "feature_map" not in first._modules
        assert _func_d(pickle.loads(pickle.dumps(first))) == _func_d(first) == _func_d(Attention(12, num_heads=3))
        assert first.eval()(X).shape == X.shape
    del second, Mine
    gc.collect()
