"""The recipes run, in their shortest form."""

from __future__ import annotations

import json
import sys

from conftest import ROOT


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
