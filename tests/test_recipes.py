"""The recipes run, in their shortest form."""

from __future__ import annotations

import csv
import json
import math
import sys

import pytest
from conftest import ROOT, require_host, skip_for_host


def test_digits(python, tmp_path):
    recipe = ROOT / "recipes" / "digits"
    assert "lwpf" not in (recipe / "train.py").read_text().lower()
    out = python(str(recipe / "compare.py"), "--quick", "--epochs", "1", "--output", "figures")
    for variant in ("plain", "relu", "pfu"):
        assert f"\n{variant} " in out.stdout
    assert out.stderr.count("patched; func_d") == 2
    figures = json.loads((tmp_path / "figures" / "digits.json").read_text())
    assert set(figures["runs"]) == {"plain", "relu", "pfu"}
    assert (tmp_path / "figures" / "digits.png").stat().st_size > 10_000


@pytest.mark.drawn(days=2)
def test_bit_pattern(python, tmp_path):
    require_host("hflayers")
    recipe = ROOT / "recipes" / "bit_pattern"
    assert "lwpf" not in (recipe / "train.py").read_text().lower()
    out = python(str(recipe / "compare.py"), "--quick", "--epochs", "1", "--output", "figures")
    assert out.stderr.count("patched; func_d") == 2
    figures = json.loads((tmp_path / "figures" / "bit_pattern.json").read_text())
    assert set(figures["runs"]) == {"plain", "relu", "pfu"}
    assert (tmp_path / "figures" / "bit_pattern.png").stat().st_size > 10_000


def test_memory_retrieval(python, tmp_path):
    pytest.importorskip("entmax")
    recipe = str(ROOT / "recipes" / "memory_retrieval" / "compare.py")
    out = python(recipe, "--quick", "--output", "figures")
    folder = tmp_path / "figures"
    with (folder / "memory_retrieval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    methods = {"dense", "sparse", "polynomial", "l2", "manhattan", "mean"}
    assert {row["method"] for row in rows} == methods
    assert {row["data"] for row in rows} == {"photographs", "digits"}
    assert {row["experiment"] for row in rows} == {"memory", "noise", "iterations", "beta"}
    assert all(float(row["error"]) >= 0 for row in rows)
    figures = json.loads((folder / "memory_retrieval.json").read_text())
    assert figures["versions"]["entmax"]
    for name in methods - {"mean"}:
        assert f"\n{name}, U-Hop " in out.stdout
    # Without a step of Stage I a network is the plain one, to the last digit.
    errors = {}
    for row in rows:
        if row["data"] == "digits" and row["method"] == "dense" and row["seed"] == "0" and row["beta"] == "1.0":
            errors[row["experiment"], row["x"], row["uhop"]] = row["error"]
    assert errors["iterations", "0", "True"] == errors["beta", "1.0", "False"]
    for data in ("photographs", "digits"):
        assert (folder / f"{data}.png").stat().st_size > 10_000


def test_memory_retrieval_says_what_it_cannot_fetch(python):
    pytest.importorskip("torchvision")
    recipe = str(ROOT / "recipes" / "memory_retrieval" / "compare.py")
    code = f"""
import runpy, sys, urllib.request
def offline(*arguments, **options):
    raise urllib.error.URLError("no network")
urllib.request.urlopen = offline
sys.argv = ["compare.py", "--quick", "--data", "mnist"]
runpy.run_path({recipe!r}, run_name="__main__")
"""
    out = python(code=code, check=False)
    assert out.returncode == 1
    assert "compare.py: cannot download mnist to build/data: " in out.stderr
    assert "--data photographs needs no network" in out.stderr


@pytest.mark.drawn(cases=1)
@pytest.mark.parametrize(("task", "host", "items"), [("digits", "timm", "images"), ("bit_pattern", "hflayers", "bags")])
def test_stage_one(python, tmp_path, task, host, items):
    require_host(host)
    script = str(ROOT / "recipes" / "stage_one" / "compare.py")
    out = python(script, "--quick", "--epochs", "2", "--task", task, "--output", "figures")
    assert "Separation loss before and after Stage I" in out.stdout
    assert out.stderr.count("patched; func_d none") == 3
    figures = json.loads((tmp_path / "figures" / f"stage_one-{task}.json").read_text())
    assert list(figures["runs"]) == ["plain", "phi", "uhop", "bilevel"]
    (plain,), (phi,), (uhop,), (bilevel,) = figures["runs"].values()
    assert not plain["stage_one"]
    assert [each["before"] == each["after"] for each in phi["stage_one"]] == [True]
    assert [each["step"] for each in uhop["stage_one"]] == [1]
    epoch_steps = math.ceil(plain[items]["train"] / plain["arguments"]["batch_size"])
    assert [each["step"] for each in bilevel["stage_one"]] == [1, 1 + epoch_steps]
    for each in (*uhop["stage_one"], *bilevel["stage_one"]):
        assert all(after < before for before, after in zip(each["before"], each["after"], strict=True))
    assert (tmp_path / "figures" / f"stage_one-{task}.png").stat().st_size > 10_000


def test_a_failing_run_fails_the_comparison(python, tmp_path):
    out = python(
        "-c",
        "import sys, runpy, pathlib, dataclasses; sys.argv = ['compare.py', '--quick']; "
        f"module = runpy.run_path({str(ROOT / 'recipes' / 'digits' / 'compare.py')!r}); "
        "module['main'](dataclasses.replace(module['RECIPE'], script=pathlib.Path('missing.py')))",
        check=False,
    )
    assert out.returncode == 1
    assert "a plain run failed with exit code 2" in out.stderr
    assert sys.executable in out.stderr


@pytest.mark.drawn(days=2)
def test_immune_repertoire(python, tmp_path):
    require_host("deeprc")
    code = f"""
import dataclasses, runpy, sys
sys.argv = ["compare.py", "--quick", "--updates", "2", "--jobs", "2", "--output", "figures"]
module = runpy.run_path({str(ROOT / "recipes" / "immune_repertoire" / "compare.py")!r})
recipe = module["RECIPE"]
sys.exit(module["main"](dataclasses.replace(recipe, variants=(recipe.variants[0], recipe.variants[-1]))))
"""
    out = python("-c", code, check=False)
    if "cannot clone" in out.stderr:
        skip_for_host(out.stderr.strip().splitlines()[-1])
    assert out.returncode == 0, out.stderr
    variants = ("plain", "relu, empty_rows=keep")
    for variant in variants:
        assert f"\n{variant} " in out.stdout
    assert out.stderr.count("patched; func_d") == len(variants)
    figures = json.loads((tmp_path / "figures" / "immune_repertoire.json").read_text())
    assert set(figures["runs"]) == set(variants)
    (plain,) = figures["runs"]["plain"]
    assert [entry["update"] for entry in plain["updates"]] == [1, 2]
    assert plain["updates"][0]["train_roc_auc"] != 0.5  # the repertoires differ, see write_dataset
    assert (tmp_path / "figures" / "immune_repertoire.png").stat().st_size > 10_000
