"""The recipes run, in their shortest form."""

from __future__ import annotations

import json
import sys

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


def test_bit_pattern(python, tmp_path):
    require_host("hflayers")
    recipe = ROOT / "recipes" / "bit_pattern"
    assert "lwpf" not in (recipe / "train.py").read_text().lower()
    out = python(str(recipe / "compare.py"), "--quick", "--epochs", "1", "--output", "figures")
    assert out.stderr.count("patched; func_d") == 2
    figures = json.loads((tmp_path / "figures" / "bit_pattern.json").read_text())
    assert set(figures["runs"]) == {"plain", "relu", "pfu"}
    assert (tmp_path / "figures" / "bit_pattern.png").stat().st_size > 10_000


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


def test_immune_repertoire(python, tmp_path):
    require_host("deeprc")
    script = str(ROOT / "recipes" / "immune_repertoire" / "compare.py")
    arguments = (script, "--quick", "--updates", "2", "--jobs", "2", "--output", "figures")
    out = python(*arguments, check=False)
    if "cannot clone" in out.stderr:
        skip_for_host(out.stderr.strip().splitlines()[-1])
    assert out.returncode == 0, out.stderr
    variants = ("plain", "relu", "pfu", "relu, empty=plain")
    for variant in variants:
        assert f"\n{variant} " in out.stdout
    assert out.stderr.count("patched; func_d") == len(variants)
    figures = json.loads((tmp_path / "figures" / "immune_repertoire.json").read_text())
    assert set(figures["runs"]) == set(variants)
    (plain,) = figures["runs"]["plain"]
    assert [entry["update"] for entry in plain["updates"]] == [1, 2]
    assert plain["updates"][0]["train_roc_auc"] != 0.5  # the repertoires differ, see write_dataset
    assert (tmp_path / "figures" / "immune_repertoire.png").stat().st_size > 10_000
