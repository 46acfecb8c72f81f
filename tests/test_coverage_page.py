"""docs/coverage.md says what is found: what is cheap for all rows, models and compiling for a few that are drawn."""

from __future__ import annotations

import os
import random
import re

import pytest
import torch
from conftest import require_host
from coverage_page import (
    COLUMNS,
    PAGE,
    between,
    branches_of,
    cell_of_compile,
    check,
    classes_of_timm,
    row_of,
    rows_of,
)
from drawing import are_drawn

require_host("timm")

import coverage_hosts  # noqa: E402
import coverage_timm  # noqa: E402
import timm  # noqa: E402

from lwpf_patch.hosts import HOSTS  # noqa: E402

TEXT = PAGE.read_text()
ROWS = rows_of(between(TEXT, "timm"))
WITHOUT = re.findall(r"`(\w+)`", between(TEXT, "without attention"))
REASONS = re.findall(r"^\d+\. (.*)$", between(TEXT, "why not folded"), re.MULTILINE)
PLAIN = rows_of(between(TEXT, "why plain"))
VERSIONS = dict(re.findall(r"(\w+) ([\d.]+\d)", between(TEXT, "versions")))

if timm.__version__ != VERSIONS["timm"]:
    pytest.skip(f"docs/coverage.md is about timm {VERSIONS['timm']}, not {timm.__version__}", allow_module_level=True)

#: Whether what torch.compile takes may be another thing than the page says.
OTHER_TORCH = torch.__version__.partition("+")[0] != VERSIONS["torch"]


def named(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_all_families_are_there():
    families = {row.strip("`") for row in ROWS}
    assert families | {*WITHOUT} == {*timm.list_modules()}
    assert not families & {*WITHOUT}
    for family, row in ROWS.items():
        assert int(row["names"]) == len(timm.list_models(module=family.strip("`"))), family
        assert sum(map(int, re.findall(r"\d+", row["func_d"]))) == int(row["names"]), family
        assert {*named(row["tried with"])} <= {*timm.list_models(module=family.strip("`"))}, family


def patched_in(row: dict[str, str]) -> list[str]:
    return named(row["attention classes"].partition("not ")[0])


def test_the_classes_are_those_of_the_host():
    """Each class that is patched is in a row, or among those without a model; and each that is left plain says why."""
    there = classes_of_timm()
    patched = {name for row in ROWS.values() for name in patched_in(row)}
    without = {f"timm.{name}" for name in re.findall(r"`([\w.]+)`", between(TEXT, "without a model"))}
    assert without < {*there}
    assert patched == {site.owner for name, site in there.items() if name not in without}
    refused = {name.rpartition(".")[2]: why for name, why in HOSTS["timm"].refused.items()}
    assert {cls: row["why"] for cls, row in PLAIN.items()} == {cls: refused[cls.strip("`")] for cls in PLAIN}
    plain = {name for row in ROWS.values() for name in named(row["attention classes"].partition("not ")[2])}
    assert plain == {cls.strip("`") for cls in PLAIN}


@pytest.mark.parametrize("family", [row.strip("`") for row in ROWS])
def test_a_family_with_one_class(family):
    """Branches and maps of a class, which its family's row can be compared with if it is the only one there."""
    row = ROWS[f"`{family}`"]
    named_so = [site for site in classes_of_timm().values() if [site.owner] == patched_in(row)]
    its_own = [site for site in named_so if site.module == f"timm.models.{family}"]
    for site in its_own or (named_so if len(named_so) == 1 else []):
        fused, softmax = branches_of(site.name)
        assert fused == ("`triton`" in row["backend"])
        assert softmax == ("`eager`" in row["backend"])
        assert row["uhop"] == ("no" if site.feature_map is None else "all")
        assert site.feature_map is not None or row["fold"] == "—"


@pytest.mark.drawn(cases=2)
@pytest.mark.parametrize("family", [row.strip("`") for row in ROWS])
@pytest.mark.timeout(900)
def test_a_family(family, request):
    """All of its names with --cases all; else those that are tried, and two more."""
    row, names = ROWS[f"`{family}`"], timm.list_models(module=family)
    tried_with = named(row["tried with"])
    if are_drawn(request.config):
        others = random.Random(f"{os.environ['TESTS_DAY']} {family}").sample(names, min(2, len(names)))
        names = sorted({*tried_with, *others})
    kept = coverage_timm.Kept()
    found = coverage_timm.look_at_all(names, kept)
    chosen = coverage_timm.smallest([each for each in found if each["name"] in tried_with])
    assert [*chosen] == tried_with
    tried = coverage_timm.try_out_all(chosen, kept)
    check(found, tried, chosen)
    if OTHER_TORCH:
        tried = {cls: {**each, "compiles": ""} for cls, each in tried.items()}
    cells = dict(zip(row, row_of(family, found, tried, tried_with, REASONS), strict=True))
    if OTHER_TORCH:
        cells["compile"] = row["compile"]
    if len(found) == int(row["names"]):
        assert cells == row
    else:
        assert cells["compile"] == cell_of_compile(tried) == row["compile"]
        assert {*named(cells["attention classes"])} <= {*named(row["attention classes"])}
        assert {*re.findall(r"[a-z ]+", cells["func_d"])} <= {*re.findall(r"[a-z ]+", row["func_d"])}
        assert {*re.findall(r"\(\d+\)", cells["fold"])} <= {*re.findall(r"\(\d+\)", row["fold"])}
        assert not re.match(r"all|[1-9]", cells["fold"]) or not row["fold"].startswith("no")
        assert {*named(cells["backend"])} <= {*named(row["backend"])}
        assert {*named(cells["uhop"])} <= {*named(row["uhop"])} or row["uhop"] == "no"


@pytest.mark.timeout(900)
def test_families_without_attention(request):
    """All of their names with --cases all; else three."""
    names = [name for family in WITHOUT for name in timm.list_models(module=family)]
    if request.config.option.cases != "all":
        names = random.Random(os.environ["TESTS_DAY"]).sample(names, 3)
    found = coverage_timm.look_at_all(names, coverage_timm.Kept())
    assert [each["name"] for each in found if each["state"] != "nothing to patch"] == []


@pytest.mark.parametrize("host", coverage_hosts.CASES)
def test_each_row_of_a_host_is_there(host):
    assert [*rows_of(between(TEXT, host))] == [*coverage_hosts.CASES[host]]


@pytest.mark.drawn(cases=3)
@pytest.mark.parametrize(
    ("host", "attention"), [(host, attention) for host, cases in coverage_hosts.CASES.items() for attention in cases]
)
def test_attention_of_a_host(host, attention):
    pytest.importorskip("open_clip" if "open_clip" in attention else host)
    row = rows_of(between(TEXT, host))[attention]
    found = coverage_hosts.try_out(host, attention)
    compared = [column for column in COLUMNS if not (OTHER_TORCH and column == "compile")]
    assert {column: found[column] for column in compared} == {column: row[column] for column in compared}
