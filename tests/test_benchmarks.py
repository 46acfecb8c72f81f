"""The benchmarks run, in their shortest form, and what they compare computes the same; no figure is looked at."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, needs_gpu, needs_triton

from benchmarks import attention, measuring, reporting, train_step
from benchmarks.__main__ import main
from lwpf_patch import lwpf_attention

HERE, LEFT_OUT = attention.available("cpu", backend="cpu")


def inputs(**made) -> list[torch.Tensor]:
    q, k, v = (torch.randn(2, 3, 21, 16, **made) for _ in range(3))
    # A row that keeps every key, and one that forgets them all, at either sign of one large feature.
    k[..., 0] = k[..., 0].abs() + 1
    q[..., 0, 0], q[..., 1, 0] = 100, -100
    return [q, k, v]


@pytest.mark.parametrize("name", HERE)
def test_a_variant_computes_what_its_func_d_says(name):
    variant = HERE[name]
    tensors = inputs(dtype=torch.float64)
    backward = "Flex" not in name  # it has none on the CPU
    for tensor in tensors:
        tensor.requires_grad_(backward)
    out = variant.function(*tensors)
    expected = lwpf_attention(*tensors, func_d=variant.func_d, backend="eager")
    torch.testing.assert_close(out, expected)
    if backward:
        cotangent = torch.randn_like(out)
        own, others = (torch.autograd.grad(result, tensors, cotangent) for result in (out, expected))
        torch.testing.assert_close(own, others)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", attention.variants())
def test_a_variant_computes_what_its_func_d_says_on_cuda(name):
    known, left_out = attention.available("cuda")
    if name in left_out:
        pytest.skip(left_out[name])
    variant = known[name]
    torch.compiler.reset()
    tensors = [tensor.requires_grad_() for tensor in inputs(dtype=torch.bfloat16, device="cuda")]
    out = variant.runnable()(*tensors)
    expected = lwpf_attention(*(tensor.double() for tensor in tensors), func_d=variant.func_d, backend="eager")
    # Near the threshold half precision may keep another key, and the median is one of its own scores.
    far = (out.double() - expected).abs() < 0.05
    assert far.double().mean() > 0.9
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out, tensors, torch.randn_like(out)))


def test_what_the_cpu_lacks_is_left_out():
    assert {"SDPA math", "SDPA flash", "ReLU, ours"} <= HERE.keys()
    assert {"SDPA efficient", "SDPA cudnn"} <= LEFT_OUT.keys()
    assert all(LEFT_OUT.values())


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
    """Runs a benchmark here, as importing torch takes the longest; only what measures memory is a child."""

    def run(*arguments):
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        main()
        return capsys.readouterr()

    return run


def test_attention(bench, tmp_path):
    only = ("SDPA flash", "ReLU, ours")
    arguments = ("--shapes", "1,1,8,16", "1,1,16,16", "--only", *only, "--base", only[0], "--no-memory", "--load", "1")
    said = bench("attention", "--device", "cpu", "--quick", *arguments, "--output", "out/a")
    rows = check_files(said, tmp_path / "out" / "a", plot=True)
    assert [(row["length"], row["variant"]) for row in rows] == [(n, name) for n in (8, 16) for name in only]
    assert [row["backend"] for row in rows] == ["", "eager"] * 2
    for row in rows:
        assert not row["failures"]
        assert len(row["forward_ratio"]) == len(row["both_ratio"]) == 3
    assert said.err.count("left out: SDPA") == 2
    assert json.loads((tmp_path / "out" / "a.json").read_text())["arguments"]["load"] == 1


@needs_triton
def test_tiles(python, tmp_path):
    """In Triton's interpreter, which has to be a process of its own."""
    arguments = ("tiles", "--device", "cpu", "--quick", "--output", "out/t")
    said = python("-m", "benchmarks", *arguments, TRITON_INTERPRET="1", PYTHONPATH=str(ROOT))
    rows = check_files(SimpleNamespace(out=said.stdout), tmp_path / "out" / "t", plot=False)
    names = [(row["kernel"], row["variant"]) for row in rows]
    assert names[:3] == [("forward", "current"), ("forward", "64, 32, 4, 2"), ("forward", "64, 32, 4, 3")]
    assert len(names) == 12
    assert not any(row["failures"] for row in rows)


def test_tiles_need_a_gpu(bench):
    with pytest.raises(SystemExit, match="the Triton backend does not run here: the tensors are on cpu"):
        bench("tiles", "--device", "cpu", "--quick")


def test_attention_memory(bench, tmp_path):
    arguments = ("--shapes", "1,1,512,16", "--only", "eager softmax")
    said = bench("attention", "--device", "cpu", "--quick", *arguments, "--output", "out/a")
    (row,) = check_files(said, tmp_path / "out" / "a", plot=True)
    assert not row["failures"]
    assert row["peak_bytes"] > 512 * 512 * 4  # the scores
    assert row["growth_bytes"] > 512 * 512 * 4
    assert row["peak_ratio"] == row["growth_ratio"] == 1


def test_train_step(bench, tmp_path):
    said = bench("train_step", "--device", "cpu", "--quick", "--batch", "1", "--only", "relu", "--output", "out/t")
    rows = check_files(said, tmp_path / "out" / "t", plot=True)
    assert [(row["variant"], row["patched_modules"] > 0) for row in rows] == [("plain", False), ("relu", True)]
    for row in rows:
        assert not row["failures"]
        assert len(row["step_ratio"]) == 3
        assert row["peak_bytes"] > 0


def test_separation(python, tmp_path):
    out = python("-m", "benchmarks", "separation", "--quick", "--batch=2", "--output", "out", PYTHONPATH=str(ROOT))
    for variant in ("pdist", "separation_loss", "separation_loss, maximum", "a training step", "Stage I"):
        assert f"\n{variant} " in out.stdout
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 5


def test_startup(python, tmp_path):
    out = python("-m", "benchmarks", "startup", "--quick", "--output", "out/torch2.11", PYTHONPATH=str(ROOT))
    said = argparse.Namespace(out=out.stdout, err=out.stderr)
    assert len(check_files(said, tmp_path / "out" / "torch2.11", plot=False)) == 6


def check_files(said, path, *, plot):
    data, lines, picture = (path.with_name(path.name + suffix) for suffix in (".json", ".csv", ".png"))
    results = json.loads(data.read_text())
    assert results["machine"]["device"]
    assert results["versions"].keys() >= {"lwpf_patch", "python"}
    table = list(csv.DictReader(lines.open(newline="")))
    assert [line["variant"] for line in table] == [row["variant"] for row in results["rows"]]
    assert table[0]["device"] == results["machine"]["device"]
    for row in results["rows"]:
        assert row["variant"] in said.out
    if plot and importlib.util.find_spec("matplotlib"):
        assert picture.stat().st_size > 5_000
    elif plot:
        assert "no plot" in said.err
    return results["rows"]


@pytest.mark.parametrize("failing", ["base", "other"])
def test_a_failure_stays_in_its_row(failing):
    def subject(name):
        def forward():
            if name == failing:
                raise ValueError("no\nmemory")

        return measuring.Subject(forward, lambda out: None, {"forward": forward, "both": lambda: None})

    options = argparse.Namespace(device="cpu", repeats=3, load=0, no_memory=True)
    rows = measuring.compare(options, {name: subject(name) for name in ("base", "other", "third")}, "base")
    for row in rows:
        assert row["failures"] == ({"forward": "ValueError: no memory"} if row["variant"] == failing else {})
        assert ("forward_ratio" in row) == (failing != "base" and row["variant"] != failing)
        assert "both_ratio" in row
    headings, cells = measuring.lines_of(rows, attention.PASSES, "cpu")
    assert sum(cell == "failed" for line in cells for cell in line) == 1
    assert len(reporting.table(headings, cells).splitlines()) == 5
    assert measuring.failures_of(rows) == [f"{failing}, forward: ValueError: no memory"]


def test_without_matplotlib_there_is_no_plot(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = argparse.Namespace(output=str(tmp_path / "a.json"), benchmark="attention")
    reporting.write(options, [{"variant": "a", "seconds": [1.0, 2.0, 3.0]}], plot=lambda rows, figure: None)
    assert "no plot: matplotlib is not installed" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.csv"}
    assert "seconds_median" in (tmp_path / "a.csv").read_text()


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "commit" not in reporting.versions()
    assert "torch" in reporting.versions()


def test_wrong_requests_are_refused(monkeypatch):
    options = argparse.Namespace(only=["SDPA"])
    with pytest.raises(SystemExit, match=r"no variant 'SDPA' here; there are: .*'SDPA math'"):
        measuring.chosen(options, "eager softmax", HERE)
    monkeypatch.setenv("LWPF_PATCH", "timm")
    with pytest.raises(SystemExit, match="would not be plain"):
        train_step.run(options)
