"""Settings, as text, as variables and in Python: read as a strict grammar has it, or refused with a SettingsError."""

from __future__ import annotations

import math
import re

import fuzzing
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lwpf_patch import PFU, FeatureMap, FuncD, ReLU, SettingsError, UHop, lwpf_attention, retrieve, separation_loss
from lwpf_patch.forgetting import make_func_d
from lwpf_patch.hosts import HOSTS
from lwpf_patch.settings import Settings, from_environment
from lwpf_patch.specs import Sep, parse_func_d, parse_sep, parse_uhop

pytestmark = fuzzing.timeout

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
WHOLE = re.compile(r"[+-]?[0-9]+")
#: For each option: the words it takes, and the least and the largest number.
OPTIONS = {
    "relu": {"empty_rows": (("zero", "keep"), None)},
    "pfu": {
        "mu": (("dmedian",), (-1e38, 1e38)),
        "bias": (("mu",), (-1e38, 1e38)),
        "sigma": ((), (0, 1e18)),
        "empty_rows": (("zero", "keep"), None),
    },
    "none": {},
    "uhop": {
        "iters": ((), (1, 2**63 - 1)),
        "t": ((), (5e-324, 1e6)),
        "lr": ((), (5e-324, 1e18)),
        "loss": (("average", "maximum"), None),
        "samples": ((), (2, 2**63 - 1)),
        "every": ((), (1, 2**63 - 1)),
        "until": ((), (1, 2**63 - 1)),
        "train": ((), None),
    },
}
#: The words for a boolean, in any case.
FLAGS = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}
#: What was called otherwise once.
FORMER_NAMES, FORMER_WORDS = {"empty": "empty_rows"}, {"plain": "keep"}
COUNTS = ("iters", "samples", "every", "until")

# Pieces of which numbers, words and their near misses are made.
PIECES = st.sampled_from(
    ["1", "0", "5", "00", ".", "-", "+", "e", "E", "_", "inf", "-inf", "nan", " ", "38", "400", "1e38", "1e39",
     "\u0663", "\uff11", "\u2212", "0x", "dmedian", "mu", "zero", "plain", "true", "True", "average",
     "maximum", "\t", "\u00a0"]
)  # fmt: skip
VALUES = st.one_of(
    st.lists(PIECES, max_size=4).map("".join),
    st.floats().map(repr),
    st.integers(-(10**20), 10**20).map(str),
    st.sampled_from(["dmedian", "mu", "zero", "keep", "plain", "average", "maximum", "1.5", "0.1", "100"]),
    st.sampled_from(["true", "false", "ON", "off", "yes", "No", "1", "0", "y"]),
)
NAMES = st.sampled_from(
    [
        "mu",
        "bias",
        "sigma",
        "empty",
        "empty_rows",
        "iters",
        "t",
        "lr",
        "loss",
        "samples",
        "every",
        "until",
        "train",
        "Mu",
        "",
        "sgima",
    ]
)
ITEMS = st.one_of(st.tuples(NAMES, st.sampled_from(["=", "=", "=", " = ", "", "=="]), VALUES).map("".join), VALUES)
LISTS = st.lists(ITEMS, max_size=3).map(",".join)
HEADS = st.sampled_from(["relu", "pfu", "none", " pfu ", "PFU", "reul", "", "pfu:"])
FUNC_DS = st.one_of(st.tuples(HEADS, st.sampled_from([":", "", "::"]), LISTS).map("".join), st.text(max_size=6))


def read_value(name: str, option: str, text: str) -> object:
    """Read a value as the grammar has it; raises KeyError or ValueError for one that is none."""
    words, bounds = OPTIONS[name][option]
    if option == "train":
        return FLAGS[text.lower()]
    if option == "empty_rows":
        text = FORMER_WORDS.get(text, text)
    if text in words:
        return text
    if option == "mu" and text.lower() in ("-inf", "-infinity"):
        return -math.inf
    if bounds is None or not (WHOLE if option in COUNTS else NUMBER).fullmatch(text):
        raise ValueError(text)
    number = int(text) if option in COUNTS else float(text)
    if not bounds[0] <= number <= bounds[1]:
        raise ValueError(text)
    return number


def read_pairs(name: str, rest: str) -> dict[str, object]:
    """Read ``option=value,option=value``."""
    found: dict[str, object] = {}
    for item in rest.split(","):
        option, equals, value = (part.strip() for part in item.partition("="))
        option = FORMER_NAMES.get(option, option) if name in ("relu", "pfu") else option
        if not equals or option in found:
            raise ValueError(item)
        found[option] = read_value(name, option, value)
    return found


def outcome(read, *arguments):
    """What a reader gives; None where it refuses."""
    try:
        return read(*arguments)
    except (KeyError, ValueError):
        return None


def ours(read, *arguments):
    """What a reader of the package gives; None where it raises a SettingsError."""
    try:
        return read(*arguments)
    except SettingsError:
        return None


def func_d_by_the_grammar(text: str):
    name, colon, rest = text.strip().partition(":")
    if name.strip() not in ("relu", "pfu", "none") or (colon and not rest.strip()):
        raise ValueError(text)
    return name.strip(), read_pairs(name.strip(), rest) if colon else {}


def uhop_by_the_grammar(text: str):
    word = text.strip().lower()
    if "=" not in word:
        return {} if word and FLAGS[word] else "off"
    given = read_pairs("uhop", text)
    if "until" in given and "every" not in given:
        raise ValueError(text)
    return given


@fuzzing.fuzz(300)
@given(text=FUNC_DS)
def test_a_func_d_is_read_as_the_grammar_has_it(text):
    expected = outcome(func_d_by_the_grammar, text)
    spec = ours(parse_func_d, text)
    assert (spec and (spec.name, spec.options)) == expected
    assert spec is None or parse_func_d(str(spec)) == spec
    made = ours(make_func_d, text)
    assert (made is None) == (expected is None)
    if expected is not None and expected[0] == "pfu":
        mu, bias = expected[1].get("mu", "dmedian"), expected[1].get("bias", "mu")
        sigma = expected[1].get("sigma", 0.01)
        assert made.threshold() == (None if mu == "dmedian" else mu, None if bias == "mu" else bias, sigma**2)
        assert repr(PFU(**expected[1])) == repr(made)


@fuzzing.fuzz(300)
@given(text=st.one_of(LISTS, st.sampled_from(["on", "off", " ON", "1", "yes", "true "]), st.text(max_size=6)))
def test_options_of_uhop_are_read_as_the_grammar_has_it(text):
    expected = outcome(uhop_by_the_grammar, text)
    try:
        found = parse_uhop(text)
    except SettingsError:
        assert expected is None
        return
    assert (found is None) == (expected == "off")
    if found is not None:
        assert expected is not None
        for option, value in expected.items():
            assert getattr(found, option) == value
        assert parse_uhop(str(found)) == found == UHop(**expected)


@fuzzing.fuzz(300)
@given(given=st.dictionaries(NAMES.filter(OPTIONS["uhop"].__contains__), VALUES, max_size=3))
def test_an_object_of_uhop_takes_and_refuses_what_the_text_does(given):
    by_text = ours(parse_uhop, ",".join(f"{option}={value}" for option, value in given.items()) or "on")
    assert ours(lambda: UHop(**given)) == by_text


@fuzzing.fuzz(100)
@given(text=st.one_of(VALUES, st.sampled_from(["softmax", "sparsemax", " entmax15", "1", "2.0", "1.25"])))
def test_sep_is_read_as_the_grammar_has_it(text):
    names = {"softmax": 1.0, "entmax15": 1.5, "sparsemax": 2.0}
    word = text.strip()
    expected = names.get(word, float(word) if NUMBER.fullmatch(word) else math.nan)
    assert ours(parse_sep, text) == (Sep(expected) if 1 <= expected <= 2 else None)


VARIABLES = st.sampled_from(
    ["LWPF_PATCH", "LWPF_FUNC_D", "LWPF_MASKING", "LWPF_BACKEND", "LWPF_INCLUDE", "LWPF_UHOP", "LWPF_PACTH", "PATH"]
)
ASKED = st.one_of(
    FUNC_DS, LISTS, st.sampled_from(["timm", "timm,hflayers", "relu", "exclude", "eager", "*", "0", "on", " "])
)


@fuzzing.fuzz(100)
@given(environment=st.dictionaries(VARIABLES, ASKED, max_size=4))
def test_an_environment_is_read_or_refused(environment):
    found = ours(from_environment, HOSTS, environment)
    if found is None:
        return
    hosts, settings = found
    asked = {name for name, value in environment.items() if name.startswith("LWPF_") and value.strip()}
    assert not asked or "LWPF_PATCH" in asked
    assert set(hosts) <= set(HOSTS)
    assert bool(hosts) == ("LWPF_PATCH" in asked)
    assert (settings.func_d == "none") == (environment.get("LWPF_FUNC_D", "").strip() == "none") or settings.uhop


class Raises:
    """An object whose every representation raises."""

    def __repr__(self) -> str:
        raise ZeroDivisionError


OBJECTS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.binary(max_size=3), VALUES,
    st.integers(10**300, 10**310), st.lists(st.integers(0, 3), max_size=2),
    st.builds(lambda: 10**5000), st.builds(Raises),
    st.floats(width=32).map(np.float32), st.floats(width=16).map(torch.tensor), st.just(np.zeros(3)),
    st.just(torch.eye(2)), st.dictionaries(st.text(max_size=2), st.integers(), max_size=1), st.just(int),
    st.fractions(), st.decimals(),
)  # fmt: skip
X = torch.eye(3)
READERS = {
    "mu": lambda value: PFU(mu=value),
    "bias": lambda value: PFU(bias=value),
    "sigma": lambda value: PFU(sigma=value),
    "empty_rows": lambda value: ReLU(empty_rows=value),
    "empty": lambda value: ReLU(empty=value),
    "uhop's every": lambda value: UHop(every=value),
    "uhop's train": lambda value: UHop(train=value),
    "sep": lambda value: lwpf_attention(X, X, X, func_d="relu", sep=value),
    "masking": lambda value: lwpf_attention(X, X, X, func_d="relu", masking=value),
    "backend": lambda value: Settings(backend=value),
    "include": lambda value: Settings(include=value),
    "blocks": lambda value: Settings(blocks=value),
    "compat": lambda value: Settings(compat=value),
    "uhop": lambda value: Settings(uhop=value),
    "func_d": lambda value: Settings(func_d=value),
    "t": lambda value: separation_loss(X, t=value),
    "kind": lambda value: separation_loss(X, kind=value),
    "patterns": lambda value: FeatureMap(2).separate(value, iters=1),
    "iters": lambda value: FeatureMap(3).separate(X, iters=min(value, 2) if type(value) is int else value),
    "lr": lambda value: FeatureMap(3).separate(X, iters=2, lr=value),
    "dim": lambda value: FeatureMap(min(value, 9) if type(value) is int else value),
    "beta": lambda value: retrieve(X, X, beta=value),
    "steps": lambda value: retrieve(X, X, steps=min(value, 9) if type(value) is int else value),
    "memory": lambda value: retrieve(value, torch.ones(2)),
}


@fuzzing.fuzz(400)
@given(name=st.sampled_from(list(READERS)), value=OBJECTS)
def test_any_object_is_taken_or_refused(name, value):
    if isinstance(value, torch.Tensor) and name in ("patterns", "memory"):
        return  # what does not fit in shape is no setting
    result = ours(READERS[name], value)
    if isinstance(result, torch.Tensor):
        assert result.isfinite().all()
    if isinstance(result, FuncD) and name in ("mu", "bias", "sigma"):
        numbers = [number for number in result.threshold() if number is not None]
        assert all(abs(number) <= 1e38 for number in numbers if number != -math.inf)
        assert not isinstance(value, bool | bytes)
