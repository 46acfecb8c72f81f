"""Settings: what cannot be computed with, and what nobody means, is refused; every refusal is a SettingsError."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
import timm.layers.attention
import torch

import lwpf_patch
from lwpf_patch import PFU, FeatureMap, LwpfError, ReLU, SettingsError, UHop, lwpf_attention, retrieve, separation_loss
from lwpf_patch.attention import OwnedFuncD
from lwpf_patch.cli import main
from lwpf_patch.settings import Settings, from_environment
from lwpf_patch.specs import FuncDSpec, parse_func_d, parse_sep, parse_uhop

INF, NAN = float("inf"), float("nan")
X = torch.eye(3)
HUGE = 10**5000  # Python refuses to write it in digits

#: What is no number for anyone, in any option that takes one.
NO_NUMBERS = ["1_0", "1,5", "0x1", "1e", "", "True", "None", "nan", "inf", "1e400"]
# Arabic and Devanagari digits, an Arabic point, wide digits, and the minus sign of mathematics.
NO_NUMBERS += ["\u0663", "\u0967", "1\u066b5", "\uff10.\uff15", "\u22121"]


class Unwritable:
    """An object that cannot be shown."""

    def __repr__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_text_that_is_no_number(text):
    for option in ("mu", "bias", "sigma"):
        with pytest.raises(SettingsError, match=rf"^({option}=|.* is not of the form|'1,5'|'5')"):
            parse_func_d(f"pfu:{option}={text}")
        with pytest.raises(
            SettingsError, match=rf"{option}=.* \(from PFU\({option}=...\)\): {option} must be a number"
        ):
            PFU(**{option: text})
    for option in ("t", "lr", "iters", "samples", "every"):
        with pytest.raises(SettingsError):
            parse_uhop(f"{option}={text}")
    with pytest.raises(SettingsError, match=r"sep .*\(from sep\)"):
        parse_sep(text)


def test_text_that_is_a_number():
    for text, number in (("1", 1), (" +1.5e-3 ", 1.5e-3), (".5", 0.5), ("-2.", -2), ("1E1", 10), ("-0", 0)):
        assert parse_func_d(f"pfu:mu={text}") == FuncDSpec("pfu", {"mu": number})
        assert repr(PFU(mu=text)) == repr(PFU(mu=float(text)))
    for text in ("-inf", "-Infinity"):
        assert PFU(mu=text)._mu == -INF
    assert parse_sep(" 1.25 ").alpha == 1.25
    assert parse_uhop("iters= +10 ,train=true").iters == 10


def test_numbers_of_other_libraries():
    for number in (0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), Decimal("0.5"), np.array(0.5)):
        assert PFU(mu=number, sigma=number).threshold() == (0.5, None, 0.25)
    for number in (1, np.int64(1), torch.tensor(1), 1.0):
        assert parse_sep(number).alpha == 1.0
    assert FeatureMap(np.int64(3), heads=torch.tensor(2)).weight.shape == (2, 3, 3)
    assert len(FeatureMap(3).separate(X, iters=np.int32(2), lr=np.float32(0.1), t=1)) == 3


# Too much for float32, alone or squared.
@pytest.mark.parametrize(
    "text",
    ["pfu:mu=1e39", "pfu:mu=-1e400", "pfu:bias=-1e39", "pfu:bias=-inf", "pfu:sigma=1e200", "pfu:sigma=1e19"],
)
def test_numbers_that_cannot_be_computed_with(text):
    option, value = text.removeprefix("pfu:").split("=")
    with pytest.raises(SettingsError, match=rf"{option}='{value}' in '{text}' \(from LWPF_FUNC_D\): .* 1e\+"):
        from_environment(["timm"], {"LWPF_PATCH": "timm", "LWPF_FUNC_D": text})
    with pytest.raises(SettingsError, match=rf"{option}=.* 1e\+"):
        PFU(**{option: value})


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_allowed_can_be_computed_with(backend, training):
    query, key = (torch.randn(2, 6, 4, requires_grad=True) for _ in range(2))
    for mu in ("dmedian", 1e38, -1e38, -INF, 0):
        for bias in ("mu", 1e38, -1e38):
            for sigma in (0, 1e18):
                if mu == -INF and bias == "mu":  # no score is forgotten, whatever it would become
                    continue
                func_d = PFU(mu=mu, bias=bias, sigma=sigma)
                out = lwpf_attention(query, key, key, func_d=func_d, training=training, backend=backend)
                assert out.isfinite().all(), func_d
                assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (query, key))), func_d
    for options in (dict(t=1e6), dict(lr=1e18), dict(t=1e-30), dict(lr=1e-30)):
        assert FeatureMap(4).separate(torch.randn(9, 4), iters=3, **options).isfinite().all(), options


@pytest.mark.parametrize(
    "option", ["t=1e300", "t=1e7", "t=inf", "lr=1e38", "lr=inf", "lr=1e19", "iters=9223372036854775808"]
)
def test_options_of_stage_one_that_cannot_be_computed_with(option):  # fmt: skip
    name, _, value = option.partition("=")
    with pytest.raises(SettingsError, match=rf"{name}='{value}' in '{option}' \(from uhop\): {name} must be a"):
        parse_uhop(option)
    number = int(value) if name == "iters" else float(value)
    with pytest.raises(SettingsError, match=rf"{name}=.* \(from separate\({name}=...\)\): {name} must be a"):
        FeatureMap(3).separate(X, **{name: number})
    if name == "t":
        with pytest.raises(SettingsError, match=r"t=.* \(from separation_loss\(t=...\)\): t must be a number above 0"):
            separation_loss(X, t=number)


def test_words_are_read_alike_everywhere():
    query = -torch.ones(2, 3)  # every score is below 0
    for keep in ("keep", " keep", "keep ", "plain", " plain"):  # "plain" is the former word
        func_ds = [
            ReLU(keep),
            ReLU(empty_rows=keep),
            ReLU(empty=keep),
            PFU(empty_rows=keep, mu=0),
            PFU(empty=keep, mu=0),
        ]
        for func_d in (*func_ds, f"relu:empty_rows={keep}", f" relu : empty = {keep}"):
            assert lwpf_attention(query, -query, query, func_d=func_d).any(), (keep, func_d)
        assert {repr(func_d)[-16:] for func_d in func_ds} == {"empty_rows=keep)"}
        assert ReLU(keep).empty == "plain"
    assert repr(PFU(bias=" mu", mu=" dmedian ")) == repr(PFU())
    for masking in ("paper", " paper "):
        settings = Settings(masking=masking, backend="\teager", include=" *Rope , x", exclude=[" y "])
        assert (settings.masking, settings.backend) == ("paper", "eager")
        assert (settings.include, settings.exclude) == (("*Rope", "x"), ("y",))
        assert lwpf_attention(X, X, X, func_d="relu", masking=masking, backend=" eager ").shape == X.shape
    assert separation_loss(X, kind=" maximum") == separation_loss(X, kind="maximum") != separation_loss(X)


BOOLEANS = {True: ["1", "true", "on", "yes", "True", "ON", " Yes\t"], False: ["0", "false", "off", "no", "OFF", " No "]}


@pytest.mark.parametrize(("word", "value"), [(word, value) for value in BOOLEANS for word in [*BOOLEANS[value], value]])
def test_booleans_are_spelt_alike_everywhere(word, value):
    assert Settings(compat=word).compat is value
    assert from_environment(["timm"], {"LWPF_PATCH": "timm", "LWPF_COMPAT": str(word)})[1].compat is value
    assert parse_uhop(word) == (UHop() if value else None)
    assert parse_uhop(f"train = {word}") == UHop(train=word)
    assert UHop(train=word).train is value


def test_words_that_are_no_boolean():
    for word in ("y", "t", "2", "", "none", "on off", 1, 0, None, [True]):
        for attempt in (lambda w: Settings(compat=w), lambda w: UHop(train=w), lambda w: parse_uhop(f"train={w}+")):
            with pytest.raises(SettingsError, match=r"compat|train"):
                attempt(word)


def test_uhop_as_text_and_as_an_object():
    assert UHop(every=500) == parse_uhop("every=500") == parse_uhop(" every = 500 ") == UHop(every=500, until=5000)
    assert [step for step in range(1, 9000) if UHop(every=500).is_due(step)] == list(range(1, 5000, 500))
    assert [step for step in range(1, 99) if UHop().is_due(step)] == [1]
    assert UHop(iters=np.int64(7), t=torch.tensor(1), lr="0.5") == parse_uhop("iters=7,t=1,lr=.5")
    assert str(UHop(t=1.23456789, train="no")) == "iters=100,t=1.23456789,lr=0.1,loss=average,samples=256,train=false"
    assert lwpf_patch.UHop is UHop
    wrong = [
        dict(iters=0),
        dict(iters=1.5),
        dict(t=0),
        dict(lr=-1),
        dict(lr=10**19),
        dict(loss="least"),
        dict(samples=1),
    ]
    wrong += [dict(every=0), dict(every=True), dict(every=5, until=0), dict(until=5), dict(train=1), dict(iters=None)]
    for options in wrong:
        name, value = list(options.items())[-1]
        text = ",".join(f"{option}={value}" for option, value in options.items())
        refusal = f"({name} must be|needs every=)"
        with pytest.raises(SettingsError, match=rf"{name}='?{value}'? \(from UHop\({name}=...\)\).* {refusal}"):
            UHop(**options)
        if name != "train":  # as text, 1 is a boolean
            with pytest.raises(SettingsError, match=rf"{name}='?{value}'? in '{text}' \(from uhop\).* {refusal}"):
                parse_uhop(text)


def test_empty_rows_by_two_names_at_once():
    assert ReLU(empty_rows="keep", empty="plain").empty_rows == "keep"
    with pytest.raises(SettingsError, match=r"empty='zero' and empty_rows='keep' \(from PFU\(...\)\) differ"):
        PFU(empty_rows="keep", empty="zero")
    with pytest.raises(SettingsError, match="option 'empty_rows' stands twice"):
        parse_func_d("relu:empty_rows=keep,empty_rows=keep")
    func_d = ReLU()
    func_d.empty = "plain"
    assert func_d.empty_rows == "keep"
    with pytest.raises(SettingsError, match=r"empty='full' \(from ReLU.empty = ...\)"):
        func_d.empty = "full"
    state = func_d.__getstate__()
    state["empty"] = state.pop("empty_rows") and "plain"  # as it was pickled under the former name
    saved = ReLU()
    del saved.__dict__["empty_rows"]
    saved.__setstate__(state)
    assert repr(saved) == "ReLU(empty_rows=keep)"


def test_a_func_d_of_another_layer_brings_its_settings(caplog):
    brought = OwnedFuncD(PFU(mu=0.25), "timm", "paper", "eager")
    for given, masking, backend in (({}, "paper", "eager"), ({"masking": "exclude"}, "exclude", "eager")):
        lwpf_patch.apply("timm", func_d=brought, **given)
        layer = timm.layers.attention.Attention(12, num_heads=3)
        assert (layer.func_d.masking, layer.func_d.backend) == (masking, backend)
        shown = lwpf_patch.status()["hosts"]["timm"]["settings"]
        assert (shown["masking"], shown["backend"]) == (masking, backend)
        assert shown["func_d"] == repr(brought.rule)
        assert f"masking {masking}, backend {backend}" in caplog.messages[-1]
        lwpf_patch.revert()
        model = torch.nn.Sequential(timm.layers.attention.Attention(12, num_heads=3))
        lwpf_patch.patch_model(model, func_d=brought, **given)
        assert (model[0].func_d.masking, model[0].func_d.backend) == (masking, backend)
    lwpf_patch.apply("timm", func_d="pfu")  # which brings none
    assert lwpf_patch.status()["hosts"]["timm"]["settings"]["masking"] == "exclude"
    assert "masking exclude, backend auto" in caplog.messages[-1]


#: What takes a number, from 1 or so on; those of Python alone refuse text too.
NUMBERS = {
    "mu": lambda value: PFU(mu=value),
    "bias": lambda value: PFU(bias=value),
    "sigma": lambda value: PFU(sigma=value),
    "sep": lambda value: lwpf_attention(X, X, X, func_d="relu", sep=value),
    "dim": lambda value: FeatureMap(value),
    "heads": lambda value: FeatureMap(3, heads=value),
    "steps": lambda value: retrieve(X, X, steps=value),
    "beta": lambda value: retrieve(X, X, beta=value),
    "t": lambda value: separation_loss(X, t=value),
    "lr": lambda value: FeatureMap(3).separate(X, lr=value),
    "iters": lambda value: FeatureMap(3).separate(X, iters=value),
    "uhop's iters": lambda value: UHop(iters=value),
    "uhop's t": lambda value: UHop(t=value),
}
#: What takes a word, a name, an object or a list of text.
OTHERS = {
    "host": lambda value: lwpf_patch.apply(value),
    "hosts": lambda value: lwpf_patch.apply([value]),
    "masking": lambda value: lwpf_patch.apply("timm", masking=value),
    "backend": lambda value: lwpf_patch.apply("timm", backend=value),
    "include": lambda value: lwpf_patch.apply("timm", include=[value]),
    "exclude": lambda value: lwpf_patch.apply("timm", exclude=[value]),
    "compat": lambda value: lwpf_patch.apply("timm", compat=value),
    "uhop": lambda value: lwpf_patch.apply("timm", uhop=value),
    "func_d": lambda value: lwpf_patch.apply("timm", func_d=value),
    "revert": lambda value: lwpf_patch.revert([value]),
    "patched": lambda value: lwpf_patch.patched(value).__enter__(),
    "patch_model": lambda value: lwpf_patch.patch_model(value),
    "register": lambda value: lwpf_patch.register_func_d(value, ReLU),
    "factory": lambda value: lwpf_patch.register_func_d("mine", value),
    "empty_rows": lambda value: ReLU(empty_rows=value),
    "empty": lambda value: ReLU(empty=value),
    "uhop's loss": lambda value: UHop(loss=value),
    "uhop's train": lambda value: UHop(train=value),
    "the operator's masking": lambda value: lwpf_attention(X, X, X, func_d="relu", masking=value),
    "the operator's backend": lambda value: lwpf_attention(X, X, X, func_d="relu", backend=value),
    "the operator's func_d": lambda value: lwpf_attention(X, X, X, func_d=value),
    "kind": lambda value: separation_loss(X, kind=value),
    "patterns": lambda value: separation_loss(value),
    "memory": lambda value: retrieve(value, X),
    "query": lambda value: retrieve(X, value),
    "feature_map": lambda value: retrieve(X, X, feature_map=value),
}
NEITHER = [b"1.5", 1j, NAN, INF, 10**400, HUGE, [], {}, [1], np.zeros(3), Unwritable(), range(3), "no thing"]


@pytest.mark.parametrize("name", [*NUMBERS, *OTHERS])
def test_every_refusal_is_a_settings_error(name):
    """Whatever stands where it does not belong, and whether or not it can be written into a message."""
    attempt = {**NUMBERS, **OTHERS}[name]
    for value in [*NEITHER, *([True, torch.zeros(2)] if name in NUMBERS else [0, 1, 1.5])]:
        with pytest.raises(SettingsError):  # noqa: PT012 - the value is told
            attempt(value)
            pytest.fail(f"{name}: {value!r} is not refused")


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: lwpf_patch.apply(None),
        lambda: lwpf_patch.apply("timm", include=5),
        lambda: lwpf_patch.apply(b"timm"),
        lambda: lwpf_patch.register_func_d(None, ReLU),
        lambda: retrieve(None, X),
        lambda: retrieve(X, None),
        lambda: separation_loss([[1.0]]),
        lambda: lwpf_patch.patch_model(None),
        lambda: lwpf_patch.unpatch_model("vit"),
        lambda: lwpf_attention(X, X, X, func_d=None),
        lambda: lwpf_attention(X, X, X, func_d="relu", sep=""),
        lambda: lwpf_attention(X, X, X, func_d="relu", sep=X),
        lambda: retrieve(X, X, beta="1"),
        lambda: retrieve(X, X, beta=1e39),
        lambda: FeatureMap("3"),
        lambda: separation_loss(X, t="2"),
    ],
)
def test_refused(attempt):
    with pytest.raises(SettingsError, match=r"from |register_func_d"):
        attempt()


def test_a_large_beta_where_numbers_are_large():
    assert torch.equal(retrieve(X.double(), X.double(), beta=1e300), X.double())


def test_scores_that_are_no_tensor():
    with pytest.raises(TypeError, match="scores must be a tensor, got list"):
        lwpf_patch.partial_forgetting([1.0], func_d="relu")


def test_a_factory_gets_what_is_no_number_as_text():
    options = {}
    lwpf_patch.register_func_d("gather", lambda **given: options.update(given) or ReLU())
    lwpf_attention(X, X, X, func_d="gather:a=1,b=1_0,c=\u0663,d=1e300,e=-inf")
    assert options == {"a": 1.0, "b": "1_0", "c": "\u0663", "d": 1e300, "e": -INF}


def test_the_command_refuses_alike(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["--func-d", "pfu:mu=1_0"], ["--uhop", "lr=1e38"], ["--compat", "y"]):
        assert main(["run", *arguments, "x.py"]) == 2
        assert "(from --" in capsys.readouterr().err
    assert issubclass(SettingsError, LwpfError)
