"""The benchmarks run, in their shortest form, and what they compare computes the same; no figure is looked at."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, needs_gpu, needs_triton

from benchmarks import attention, gpu, gpu_report, measuring, reporting, tiles, train_step
from benchmarks.__main__ import main, make_parser
from lwpf_patch import lwpf_attention

pytestmark = pytest.mark.drawn(days=3)

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


@pytest.mark.drawn(days=5)
@needs_triton
def test_tiles(python, tmp_path):
    """In Triton's interpreter, which has to be a process of its own."""
    arguments = ("tiles", "--device", "cpu", "--quick", "--output", "out/t")
    said = python("-m", "benchmarks", *arguments, TRITON_INTERPRET="1", PYTHONPATH=str(ROOT))
    rows = check_files(SimpleNamespace(out=said.stdout), tmp_path / "out" / "t", plot=False)
    names = [(row["kernel"], row["variant"]) for row in rows]
    assert names[:3] == [("forward", "current"), ("forward", "64, 32, 4, 2"), ("forward", "64, 32, 4, 3")]
    # The shape is one of whole heads.
    assert [kernel for kernel, variant in names if variant == "current"] == ["forward", "head", "median"]
    assert len(names) == 9
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


@pytest.mark.drawn(days=3)
def test_train_step(bench, tmp_path):
    said = bench("train_step", "--device", "cpu", "--quick", "--batch", "1", "--only", "relu", "--output", "out/t")
    rows = check_files(said, tmp_path / "out" / "t", plot=True)
    assert [(row["variant"], row["patched_modules"] > 0) for row in rows] == [("plain", False), ("relu", True)]
    for row in rows:
        assert not row["failures"]
        assert len(row["step_ratio"]) == 3
        assert row["peak_bytes"] > 0


@pytest.mark.drawn(days=3)
def test_separation(python, tmp_path):
    out = python("-m", "benchmarks", "separation", "--quick", "--batch=2", "--output", "out", PYTHONPATH=str(ROOT))
    for variant in ("pdist", "separation_loss", "separation_loss, maximum", "a training step", "Stage I"):
        assert f"\n{variant} " in out.stdout
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 5


@pytest.mark.drawn(days=3)
def test_startup(python, tmp_path):
    out = python("-m", "benchmarks", "startup", "--quick", "--output", "out/torch2.11", PYTHONPATH=str(ROOT))
    said = argparse.Namespace(out=out.stdout, err=out.stderr)
    assert len(check_files(said, tmp_path / "out" / "torch2.11", plot=False)) == 9


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


# --- all of them on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.drawn(days=3)
@needs_triton
def test_gpu_in_the_interpreter(python, tmp_path):
    arguments = ("gpu", "--device", "cpu", "--quick", "--minutes", "3", "--output", "out")
    said = python("-m", "benchmarks", *arguments, TRITON_INTERPRET="1", PYTHONPATH=str(ROOT))
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    names = ["environment", "tests", "tiles", "attention-float32", "train_step-test_vit-eager", "separation"]
    assert [(step["name"], step["state"]) for step in report["steps"]] == [(name, "finished") for name in names]
    assert report["environment"]["versions"].keys() >= {"torch", "triton", "python"}
    assert (report["tests"]["passed"], report["tests"]["failed"]) == (1, 0)
    assert list(report["results"]) == names[2:]
    for name in names:
        assert (out / f"{name}.log").exists()
        assert f"{name}: finished after" in said.stderr
    rows = {row["variant"]: row for row in report["results"]["attention-float32"]["rows"]}
    assert rows.keys() == {"eager softmax", "SDPA flash", "ReLU, ours", "PFU, ours", "dmedian, ours"}
    for row in rows.values():
        assert not row["failures"]
        assert row["output_matches"]
        assert row["both_tflops"] > 0
        assert row["both_gbps"] > 0
        assert set(row["both_ratios"]) == {"eager softmax", "SDPA flash"}
    assert {row["backend"] for row in rows.values()} == {"", "triton"}
    assert {one["verdict"] for one in report["verdicts"]} == {"not measured"}
    assert '"forward": {64: (' in (out / "tiles.tables.txt").read_text()
    text = (out / "report.md").read_text()
    for heading in ("Steps", "Environment", "Tests", "Goals", *names[2:]):
        assert f"## {heading}\n" in text
    assert "1 passed, 0 failed" in text


ROWS = {"rows": [{"variant": "plain", "dtype": "bfloat16", "failures": {}, "step_seconds": [1.0, 2.0, 3.0]}]}


def stub(name, code):
    return gpu.Step(name, ["-c", code])


def writes(folder, name):
    return f"import json, pathlib; pathlib.Path({str(folder / name)!r}).write_text(json.dumps({ROWS!r}))\n"


def test_gpu_a_step_that_hangs_is_cut(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
    (tmp_path / "separation.json").write_text(json.dumps(ROWS))  # of an earlier run
    child = tmp_path / "child"
    hangs = (
        writes(tmp_path, "train_step-a.json")
        + "import subprocess, sys, time\n"
        + "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        + f"open({str(child)!r}, 'w').write(str(child.pid))\ntime.sleep(60)"
    )
    steps = [stub("train_step-a", hangs), stub("train_step-b", writes(tmp_path, "train_step-b.json"))]
    report = gpu.run_steps([*steps, stub("separation", "")], tmp_path, 0.1, [])
    assert [step["state"] for step in report["steps"]] == ["cut", "finished", "finished"]
    assert list(report["results"]) == ["train_step-a", "train_step-b"]
    assert not gpu_report.failed(report)
    text = (tmp_path / "report.md").read_text()
    assert "The step was cut (at its limit of" in text
    assert text.count("| plain | 2000.00 (1000.00, 3000.00) |") == 2
    assert "train_step-a: cut (at its limit of" in capsys.readouterr().err
    status = Path("/proc", child.read_text(), "status")
    assert not status.exists() or "zombie" in status.read_text()


def test_gpu_a_step_without_time_is_left_out(tmp_path, capsys):
    report = gpu.run_steps([stub("tiles", ""), stub("separation", "")], tmp_path, 0, [])
    assert [step["state"] for step in report["steps"]] == ["left out"] * 2
    assert "no time was left" in (tmp_path / "report.md").read_text()
    assert "separation: left out: no time was left" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["tiles", "tests"])
def test_gpu_a_step_that_crashes_loses_no_other(monkeypatch, tmp_path, step):
    crashes = stub(step, "import sys; print('so far'); sys.exit('out | of order')")
    if step == "tests":
        crashes = stub(step, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    steps = [crashes, stub("train_step-a", writes(tmp_path, "train_step-a.json"))]
    monkeypatch.setattr(gpu, "steps", lambda options, folder: steps)
    with pytest.raises(SystemExit) as ended:
        gpu.run(argparse.Namespace(output=str(tmp_path), minutes=1, command_line=["gpu"]))
    assert ended.value.code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [one["state"] for one in report["steps"]] == ["crashed", "finished"]
    assert report["steps"][0]["why"] == (
        "status 1: out | of order" if step == "tiles" else "status -11: it said nothing"
    )
    assert list(report["results"]) == ["train_step-a"]


def test_gpu_without_a_device_measures_nothing(tmp_path):
    steps = [stub("environment", "import sys; sys.exit('no device')"), stub("tiles", "")]
    report = gpu.run_steps(steps, tmp_path, 1, [])
    assert [step["state"] for step in report["steps"]] == ["crashed", "left out"]


def test_gpu_that_is_killed_keeps_what_has_finished(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks import gpu\n"
        f"steps = [gpu.Step('train_step-a', ['-c', {writes(tmp_path, 'train_step-a.json')!r}]),"
        " gpu.Step('tiles', ['-c', 'import time; time.sleep(5)'])]\n"
        f"gpu.run_steps(steps, Path({str(tmp_path)!r}), 1, [])"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) as parent:
        for line in parent.stderr:
            if "step 2 of 2" in line:
                break
        time.sleep(0.5)
        parent.kill()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [step["state"] for step in report["steps"]] == ["finished", "running"]
    assert list(report["results"]) == ["train_step-a"]
    assert "train_step-a" in (tmp_path / "report.md").read_text()


def test_gpu_tells_which_tests_failed(python, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "@pytest.fixture(autouse=True)\ndef seed(): print('TESTS_SEED=' + os.environ['TESTS_SEED'])\n"
        "def test_passes(): pass\n"
        "def test_fails():\n    print('FAILED inner.py::test_x - ValueError: 3')\n    assert 1 == 2, 'one\\ntwo'\n"
        "def test_skips(): pytest.skip('no')\n"
        "def test_hangs(): os.kill(os.getpid(), 9)\n"
    )
    arguments = ("-m", "pytest", "-p", "benchmarks.pytest_results", "--results", "tests.jsonl", "test_some.py")
    python(*arguments, check=False, PYTHONPATH=str(ROOT), TESTS_SEED="17")
    found = gpu_report.tests_of(tmp_path / "tests.jsonl")
    (failure,) = found["failures"]
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert (failure["id"], failure["seed"]) == ("test_some.py::test_fails", 17)
    assert failure["error"] == "AssertionError: one"
    assert failure["inner"] == ["inner.py::test_x - ValueError: 3"]
    assert found["unfinished"] == ["test_some.py::test_hangs"]


def attention_row(variant="ReLU, ours", **more):
    what = {"variant": variant, "length": 197, "width": 64, "dtype": "bfloat16", "failures": {}, "output_matches": True}
    return {**what, **more}


def verdict_of(goal, row, gpu_name="NVIDIA H100 80GB HBM3", step="attention-bfloat16"):
    (found,) = (one for one in gpu_report.verdicts({step: [row]}, gpu_name) if one["goal"] == goal)
    return found


FORWARD = "ReLU, ours: forward, N 197, d 64"
RATIOS = {"SDPA flash": [1.0, 1.05, 1.1], "SDPA cudnn": [1.1, 1.14, 1.2], "eager softmax": [0.2, 0.3, 0.4]}


def test_gpu_verdicts():
    met = verdict_of(FORWARD, attention_row(forward_ratios=RATIOS))
    assert (met["verdict"], met["against"], met["figure"]) == ("met", "SDPA cudnn", [1.1, 1.14, 1.2])
    slower = {**RATIOS, "SDPA flash": [1.1, 1.16, 1.2]}
    missed = verdict_of(FORWARD, attention_row(forward_ratios=slower))
    assert (missed["verdict"], missed["against"]) == ("missed", "SDPA flash")
    assert missed["cudnn"] == [1.1, 1.14, 1.2]
    longer = attention_row(length=4096, both_ratios={"SDPA flash": [1.2, 1.25, 1.3], "SDPA cudnn": [1.6, 1.7, 1.8]})
    flash = verdict_of("ReLU, ours: forward + backward, N 4096, d 64", longer)
    assert (flash["verdict"], flash["against"], flash["cudnn"]) == ("met", "SDPA flash", [1.6, 1.7, 1.8])
    assert verdict_of("ReLU, ours: peak memory, N 197, d 64", attention_row(peak_ratio=1.06))["verdict"] == "missed"
    step = {"variant": "relu", "model": "vit_base_patch16_224", "dtype": "bfloat16", "compile": True, "failures": {}}
    step["step_ratio"] = [1.0, 1.01, 1.02]
    goal = "relu: training step, vit_base_patch16_224, compiled"
    assert verdict_of(goal, step, "NVIDIA H200", step="train_step-x")["verdict"] == "met"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (attention_row(variant="PFU, ours", forward_ratios=RATIOS), "no result"),
        (attention_row(dtype="float16", forward_ratios=RATIOS), "no result"),
        (attention_row(failures={"forward": "OutOfMemoryError"}), "OutOfMemoryError"),
        (attention_row(output_matches=None, forward_ratios=RATIOS), "the output was not compared to the reference"),
    ],
)
def test_gpu_goals_that_are_not_measured(row, why):
    found = verdict_of(FORWARD, row)
    assert (found["verdict"], found["why"]) == ("not measured", why)


def test_gpu_goals_are_for_some_gpus_and_right_outputs():
    for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB"):
        found = verdict_of(FORWARD, attention_row(forward_ratios=RATIOS), name)
        assert (found["verdict"], found["figure"]) == ("not measured", [1.1, 1.14, 1.2])
    wrong = verdict_of(FORWARD, attention_row(forward_ratios=RATIOS, output_matches=False))
    assert (wrong["verdict"], wrong["why"]) == ("missed", "the output does not match the reference")


def test_every_step_of_gpu_has_a_share(tmp_path):
    options = argparse.Namespace(device="cuda", quick=False, tests=None)
    steps = gpu.steps(options, tmp_path)
    assert [step.name for step in steps] == list(gpu.SHARES)
    assert sum(gpu.SHARES.values()) == pytest.approx(1)
    assert {"tests/test_triton.py", "tests/test_benchmarks.py"} <= set(steps[1].command)
    names = set()
    for step in steps:
        if step.command[1] == "benchmarks":
            parsed = make_parser().parse_args(step.command[2:])
            assert parsed.output == str(tmp_path / step.name)
            names |= {*(getattr(parsed, "only", None) or ())}
            if parsed.benchmark == "train_step":
                assert set(parsed.only) <= train_step.VARIANTS.keys()
    assert {*gpu.ANCHORS, *gpu.OURS, *gpu.COMPILED} <= names & attention.variants().keys()


def test_tiles_that_are_beaten():
    def rows(shape, kernel="forward", **seconds):
        what = {"shape": shape, "kernel": kernel, "dtype": "bfloat16", "current": "128, 64, 8, 3"}
        base = seconds["current"]
        return [
            {**what, "variant": name.replace("_", ", "), "time_seconds": own, "time_ratio": [own[1] / base[1]] * 3}
            for name, own in seconds.items()
        ]

    clear = {"current": [9.0, 10.0, 11.0], "64_64_8_3": [7.0, 8.0, 8.5], "64_64_4_3": [6.0, 9.0, 9.5]}
    (found,) = tiles.beaten(rows("1,1,197,64", **clear), (9, 0))
    assert (found["table"], found["width"], found["better"]) == ("_TILES", 64, "64, 64, 8, 3")
    text = tiles.tables([found], "some GPU")
    assert '"forward": {64: (64, 64, 8, 3), 128: (128, 64, 8, 2)' in text
    assert "0.800 (0.800, 0.800) on 1,1,197,64 bfloat16" in text
    assert tiles.beaten(rows("1,1,4096,64", **clear), (9, 0))[0]["table"] == "_TILES_LONG"
    assert tiles.beaten(rows("1,1,4096,64", **clear), (8, 0))[0]["table"] == "_TILES_BEFORE_HOPPER"
    other = {**clear, "64_64_8_3": [12.0, 13.0, 14.0]}  # it loses where the same entry serves
    assert tiles.beaten(rows("1,1,197,64", **clear) + rows("1,1,577,64", **other), (9, 0)) == []
    assert tiles.beaten(rows("1,1,300,64", **clear), (9, 0)) == []  # half of the tile stands in for it


@pytest.mark.parametrize("near", [False, True])
def test_tiles_of_whole_heads(near):
    """They have the rows of the sequence; their entry is by these."""
    candidates = tiles.candidates_of("head", (256, 32, 8, 1), near)
    assert candidates
    assert all((tile[0], tile[3]) == (256, 1) for tile in candidates)
    assert (256, 32, 8, 1) not in candidates
    assert tiles.entry_of("head", "bfloat16", "1,1,197,32", (9, 0)) == ("_TILES", "head", 256)
    assert tiles.entry_of("head", "bfloat16", "1,1,49,64", (8, 0)) == ("_TILES_BEFORE_HOPPER", "head", 64)
    assert tiles.entry_of("query", "bfloat16", "1,1,577,64", (9, 0)) == ("_TILES", "query", 64)


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
