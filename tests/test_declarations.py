"""Each setting is declared once: signatures, variables, options of the command and docs/settings.md follow from it."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path

import pytest

import lwpf_patch
from lwpf_patch import PFU, ReLU, UHop
from lwpf_patch.options import Option
from lwpf_patch.settings import (
    OBSERVE,
    PATCH,
    SETTINGS,
    UNPICKLE,
    VARIABLES,
    Settings,
    SettingsStatus,
    flag_of,
    from_environment,
)
from lwpf_patch.specs import FUNC_D_OPTIONS, OBSERVE_OPTIONS, SEP_OPTIONS, UHOP_OPTIONS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "settings.md"
#: Set, it has the test write the tables into the page.
UPDATE = os.environ.get("TESTS_UPDATE_DOCS", "0") == "1"

#: For each variable a text that is not the default, and what `status()` shows of it where `lwpf run` says so.
SAMPLES = {
    "patch": ("timm", None),
    "func_d": (" pfu : mu = 0.5 , empty=plain", "pfu:mu=0.5,empty_rows=keep"),
    "sep": (" softmax_n : n = 2", "softmax_n:n=2"),
    "masking": ("paper", "paper"),
    "backend": ("eager", "eager"),
    "verify": ("off", "off"),
    "uhop": ("every=7", str(UHop(every=7))),
    "include": ("*.Attention, *Rope", ["*.Attention", "*Rope"]),
    "exclude": ("*Rope", ["*Rope"]),
    "blocks": (" 0, 8 -", "0,8-"),
    "exclude_models": ("a_teacher,b*", ["a_teacher", "b*"]),
    "partial": ("error", "error"),
    "compat": ("No", False),
    "unpickle": ("patch", None),
    "observe": ("every=7,path=seen.jsonl", None),
}


def test_every_setting_has_a_sample():
    assert list(SAMPLES) == [setting.name for setting in VARIABLES]
    assert [setting.name for setting in SETTINGS] == list(SettingsStatus.__annotations__) == list(Settings().describe())
    usual = Settings().describe()
    assert all(SAMPLES[name][1] != usual[name] for name in usual)


@pytest.mark.parametrize("function", [lwpf_patch.apply, lwpf_patch.patch_model])
def test_signatures_are_those_of_the_declarations(function):
    parameters = list(inspect.signature(function).parameters.values())[1:]
    declared = [s for s in SETTINGS if function is lwpf_patch.apply or s.in_patch_model]
    assert [(p.name, p.default) for p in parameters] == [(s.name, s.default) for s in declared]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)
    for name in (p.name for p in parameters):
        assert re.search(rf"^ +{name}: ", inspect.getdoc(function), re.MULTILINE), name


def test_every_option_of_run_reaches_the_script(python, tmp_path):
    """Together and in one process; each also wins over its variable, which says the default."""
    (tmp_path / "script.py").write_text(
        "import json, os, lwpf_patch\n"
        "state = lwpf_patch.status()['hosts']\n"
        "print(json.dumps([state['timm']['settings'], [name for name in state if state[name]['state'] != 'off'],"
        " {name: value for name, value in os.environ.items() if name.startswith('LWPF_')}]))\n"
    )
    samples = {name: sample for name, sample in SAMPLES.items() if name != "blocks"}  # which does not go with uhop
    options = [part for name, (text, _) in samples.items() for part in (flag_of(name), text)]
    others = {"LWPF_PATCH": "hflayers", "LWPF_UNPICKLE": "error", "LWPF_FUNC_D": "relu", "LWPF_SEP": "softmax",
              "LWPF_MASKING": "exclude", "LWPF_BACKEND": "auto", "LWPF_VERIFY": "first", "LWPF_UHOP": "off",
              "LWPF_INCLUDE": "*", "LWPF_EXCLUDE_MODELS": "c", "LWPF_PARTIAL": "allow", "LWPF_COMPAT": "1",
              "LWPF_OBSERVE": "0"}  # fmt: skip
    out = python("-m", "lwpf_patch", "run", *options, "script.py", **others)
    settings, hosts, environment = json.loads(out.stdout)
    assert settings == {
        name: samples[name][1] if name in samples else default for name, default in Settings().describe().items()
    }
    assert hosts == ["timm"]
    assert environment == {f"LWPF_{name.upper()}": text for name, (text, _) in samples.items()}


def test_every_variable_is_read():
    texts = {f"LWPF_{name.upper()}": text for name, (text, _) in SAMPLES.items()}
    hosts, settings = from_environment(["timm"], texts)
    assert hosts == ("timm",)
    for name, shown in settings.describe().items():
        assert shown == SAMPLES[name][1], name
        assert settings.origin(name) == f"LWPF_{name.upper()}"
    for setting in VARIABLES:
        texts = {"LWPF_PATCH": "timm", setting.variable: "[no such thing=]"}
        if setting.name in ("include", "exclude", "exclude_models"):  # any text is a pattern
            continue
        with pytest.raises(lwpf_patch.SettingsError, match=rf"\(from {setting.variable}\)"):
            from_environment(["timm"], texts)


def test_the_defaults_of_options_are_those_of_the_objects():
    for made, options in ((ReLU(), FUNC_D_OPTIONS["relu"]), (PFU(), FUNC_D_OPTIONS["pfu"]), (UHop(), UHOP_OPTIONS)):
        defaults = {name: option.default for name, option in options.items() if name not in ("every", "until")}
        assert repr(type(made)(**defaults)) == repr(made)
        parameters = inspect.signature(type(made)).parameters
        assert [name for name in parameters if name != "empty"] == list(options)
        for name, default in defaults.items():
            assert options[name].read(default) == parameters[name].default


# --- docs/settings.md -------------------------------------------------------------------------------------------------


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def where() -> list[list[str]]:
    rows = []
    for setting in VARIABLES:
        name = code(f"{setting.name}=")
        of_apply = "the first argument" if setting is PATCH else "" if setting in (UNPICKLE, OBSERVE) else name
        of_model = name if setting.in_patch_model else ""
        values = setting.metavar.replace("|", " or ")
        rows.append([of_apply, of_model, code(setting.variable), code(setting.flag), values, setting.help])
    return rows


def options(known: dict[str, Option]) -> list[list[str]]:
    return [[code(name), option.expected(), option.default, option.help] for name, option in known.items()]


#: The tables, each with the heading that it stands below.
TABLES = {
    "Where they can be given": (["`apply`", "`patch_model`", "variable", "`lwpf run`", "values", ""], where()),
    "Options of `relu`": (["option", "values", "default", ""], options(FUNC_D_OPTIONS["relu"])),
    "Options of `pfu`": (["option", "values", "default", ""], options(FUNC_D_OPTIONS["pfu"])),
    "Options of `softmax_n`": (["option", "values", "default", ""], options(SEP_OPTIONS["softmax_n"])),
    "Options of `uhop`": (["option", "values", "default", ""], options(UHOP_OPTIONS)),
    "Options of `observe`": (["option", "values", "default", ""], options(OBSERVE_OPTIONS)),
}


@pytest.mark.parametrize("heading", TABLES)
def test_the_page_of_settings(heading):
    head, rows = TABLES[heading]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    table = re.sub(r" +\|", " |", "\n".join(lines))
    text = PAGE.read_text()
    if UPDATE:
        before, _, rest = text.partition(f"## {heading}\n")
        after = rest.partition("\n## ")[2]
        PAGE.write_text(f"{before.rstrip()}\n\n## {heading}\n\n{table}\n" + (f"\n## {after}" if after else ""))
        return
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    assert section.strip() == table, f"{PAGE} is not what is declared: TESTS_UPDATE_DOCS=1 writes it"
