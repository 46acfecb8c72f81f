"""The recipes run, in their shortest form, and write what their READMEs promise."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import runpy
import shlex
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT, require_host, skip_for_host
from PIL import Image
from scipy import stats


def compared(recipe, python, tmp_path, *arguments, folder="figures", without=()):
    """Run a recipe, without some of its arms; return what it printed, the runs of its report by arm, and the report."""
    path = str(ROOT / "recipes" / recipe / "compare.py")
    start = (path,)
    if without:
        code = "import runpy, sys; sys.argv = sys.argv[1:]; recipe = runpy.run_path(sys.argv[0])"
        start = ("-c", f"{code}; [recipe['ARMS'].pop(arm) for arm in {without!r}]; sys.exit(recipe['main']())", path)
    out = python(*start, "--quick", "--output", "figures", *arguments, check=False)
    if "cannot clone" in out.stderr:
        skip_for_host(out.stderr.strip().splitlines()[-1])
    assert out.returncode == 0, out.stderr
    report = json.loads((tmp_path / folder / "report.json").read_text())
    assert (tmp_path / folder / "curves.png").stat().st_size > 10_000
    return out, {run["arm"]: run for run in report["runs"]}, report


@pytest.mark.drawn(days=2)
def test_digits(python, tmp_path):
    assert "lwpf" not in (ROOT / "recipes" / "digits" / "train.py").read_text().lower()
    out, runs, report = compared("digits", python, tmp_path, "--epochs", "1")
    assert list(runs) == ["plain", "relu", "pfu"]
    assert out.stderr.count("patched; func_d") == 2
    for arm, run in runs.items():
        assert f"\n{arm} " in out.stdout
        assert 1 < run["curves"]["test accuracy, %"]["values"][0] <= 100  # in percent
    # The time is that of the training loop, as the script says it.
    for arm in report["arms"]:
        (figures,) = tmp_path.glob(f"figures/runs/{arm['label']}-*/output/run.json")
        assert arm["times"]["seconds"]["0"] == json.loads(figures.read_text())["seconds"]


def test_a_failing_run_fails_the_comparison(python, tmp_path):
    (tmp_path / "sklearn.py").write_text("raise SystemExit('no digits')")  # what the script imports first
    recipe = str(ROOT / "recipes" / "digits" / "compare.py")
    out = python(recipe, "--quick", PYTHONPATH=str(tmp_path), check=False)
    # The line that is printed first can be copied.
    words = shlex.split(out.stdout.splitlines()[0].removeprefix("$ "))
    copied = python("-m", "lwpf_patch", *words[words.index("compare") :], PYTHONPATH=str(tmp_path), check=False)
    for each in (out, copied):
        assert each.returncode == 1
        assert "plain, seed 0: FAILED: exit code 1" in each.stderr
        assert "  | no digits" in each.stderr
        assert "no run has finished" in each.stderr
    assert (tmp_path / "build" / "digits-quick" / "runs").is_dir()  # a folder that the usual comparison does not use


@pytest.mark.drawn(days=4)
def test_bit_pattern(python, tmp_path):
    require_host("hflayers")
    assert "lwpf" not in (ROOT / "recipes" / "bit_pattern" / "train.py").read_text().lower()
    out, runs, _ = compared("bit_pattern", python, tmp_path, "--epochs", "1", "--network", "association")
    assert list(runs) == ["plain", "relu", "pfu"]
    assert out.stderr.count("patched; func_d") == 2
    assert "--network association" in out.stdout.splitlines()[0]
    # Other arms, as the line says them that is printed first; the seeds are refused before anything is run.
    recipe = str(ROOT / "recipes" / "bit_pattern" / "compare.py")
    refused = python(recipe, "--arms", "softmax1", "uhop", "--seeds", "none", check=False)
    words = shlex.split(refused.stdout.splitlines()[0])
    arms = [word for before, word in itertools.pairwise(words) if before == "--arm"]
    assert arms == ["plain", "softmax1: --func-d none --sep softmax_n:n=1", "uhop: --uhop on"]
    assert refused.returncode == 2
    # A training as long as hflayers' example is compared at epochs in between, too.
    line = python(recipe, "--epochs", "250", "--seeds", "none", check=False).stdout.splitlines()[0]
    counted = [word for before, word in itertools.pairwise(shlex.split(line)) if before == "--value"]
    assert counted == ["mean", "30", "60", "100", "150"]


@pytest.mark.drawn(days=2)
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
    # An experiment finds the same alone, and says how the separation loss and the error go together.
    alone = python(recipe, "--quick", "--experiments", "iterations", "--data", "digits", "--output", "alone")
    with (tmp_path / "alone" / "memory_retrieval.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found == [row for row in rows if (row["data"], row["experiment"]) == ("digits", "iterations")]
    own = [row for row in found if row["method"] == "dense"]
    loss, error = ([float(row[name]) for row in own] for name in ("separation_loss", "error"))
    expected = stats.spearmanr(loss, error).statistic
    assert f"over these {len(own)} runs" in alone.stdout
    assert re.search(rf"^dense +{expected:.2f} ", alone.stdout, re.MULTILINE)
    assert "Gaussian noise" not in alone.stdout
    assert "best for it" not in alone.stdout


@pytest.mark.drawn(days=2)
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


@pytest.mark.drawn(days=3, cases=1)
@pytest.mark.parametrize(("task", "host", "steps"), [("digits", "timm", 19), ("bit_pattern", "hflayers", 48)])
def test_stage_one(python, tmp_path, task, host, steps):
    require_host(host)
    arguments = ("--epochs", "2", "--task", task)
    out, runs, report = compared("stage_one", python, tmp_path, *arguments, folder=f"figures/{task}")
    assert list(runs) == ["plain", "uhop", "uhop (control)", "bilevel"]
    assert report["arms"][2]["control_of"] == ["uhop", "bilevel"]
    assert "\n  against uhop (control) " in out.stdout
    said = re.findall(r"^  (\S.*), step (\d+): (\S+) -> (\S+)$", out.stdout, re.MULTILINE)
    after_an_epoch = str(1 + steps)
    assert [each[:2] for each in said] == [
        ("uhop", "1"), ("uhop (control)", "1"), ("bilevel", "1"), ("bilevel", after_an_epoch),
    ]  # fmt: skip
    for arm, _, before, after in said:
        assert (float(after) < float(before)) == ("control" not in arm)
    # What it ends with is judged, and how early it learnt.
    assert [(metric["key"], metric["value"]) for metric in report["metrics"]][:2] == [
        ("epochs.test_accuracy", "last"), ("epochs.test_accuracy", "mean"),
    ]  # fmt: skip


@pytest.mark.drawn(days=4)
def test_immune_repertoire(python, tmp_path):
    require_host("deeprc")
    remedy = "relu, empty_rows=keep"
    out, runs, _ = compared("immune_repertoire", python, tmp_path, "--updates", "2", without=("relu", "pfu"))
    assert list(runs) == ["none", remedy]
    assert out.stderr.count("patched; func_d") == len(runs)
    train = runs["none"]["curves"]["train AUC"]
    assert train["steps"] == [1, 2]
    assert train["values"][0] != 0.5  # the repertoires differ, see write_dataset
    assert "the test set says nothing" in out.stdout
    assert f"\n  {remedy}: seed 0 0%, 0%\n" in out.stdout  # no bag forgot every score


def write_cifar10(folder, **counts):
    """Write a tar for each part, with a folder for each of ten classes of random images."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, count in counts.items():
        with tarfile.open(folder / f"{part}.tar", "w") as archive:
            for number in range(count):
                pixels = generator.integers(0, 90, (32, 32, 3), dtype=np.uint8)
                pixels[3 * (number % 10)] = 250
                data = io.BytesIO()
                Image.fromarray(pixels).save(data, "PNG")
                entry = tarfile.TarInfo(f"{part}/class{number % 10}/{number}.png")
                entry.size = data.tell()
                data.seek(0)
                archive.addfile(entry, data)


@pytest.mark.drawn(days=4)
def test_uhop_images(python, tmp_path):
    write_cifar10(tmp_path / "data", train=80, validation=40)
    small = ("--patch", "32", "--", "--images", "60", "--dim", "16", "--stage-one-epochs", "1", "--lr", "0.03")
    out, runs, report = compared("uhop_images", python, tmp_path, *small, folder="figures/patch32")
    assert list(runs) == [
        "plain", "sparsemax", "values", "whitened", "map", "stage_one", "everything", "everything_sparsemax", "uhop",
        "uhop (control)",
    ]  # fmt: skip
    loss = {arm: run["curves"]["test loss"]["values"][0] for arm, run in runs.items()}
    # The weight of a single key is 1: neither the map nor the normalisation reaches the output.
    assert loss["plain"] == pytest.approx(loss["sparsemax"], abs=1e-6) != loss["values"]
    assert loss["values"] == pytest.approx(loss["map"], abs=1e-6) == loss["uhop"]
    assert loss["map"] == loss["stage_one"]
    # What Stage I does to the embedding does.
    assert loss["everything"] == pytest.approx(loss["everything_sparsemax"], abs=1e-6) != loss["map"]
    assert "everything gives exactly" not in out.stderr
    assert {arm["label"]: arm["options"] for arm in report["arms"]}["everything"] is None


def test_whitened_patches_of_uhop_images():
    whitened = runpy.run_path(str(ROOT / "recipes" / "uhop_images" / "train.py"))["whitened"]
    images = torch.randn(400, 3, 32, 32)
    images += 3 * images.roll(1, -1) + 5  # neighbours have much in common, and the mean is not 0
    rows = whitened(images, images, 4).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 48)
    covariance = (rows - rows.mean(0)).mT @ (rows - rows.mean(0)) / len(rows)
    torch.testing.assert_close(rows.mean(0), torch.zeros(48), atol=1e-4, rtol=0)
    # 0.01 of the mean variance is taken for noise in each direction, which leaves those of much variance near 1.
    assert 0.9 < covariance.diagonal().mean() < 1
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.1
    # The test images go the way of the training's.
    torch.testing.assert_close(whitened(images[:2], images, 4), whitened(images, images, 4)[:2])


@pytest.mark.parametrize("values", ["keys", "input"])
@pytest.mark.parametrize("feature_map", [True, False])
def test_the_network_of_uhop_images_computes_what_its_readme_says(values, feature_map):
    train = runpy.run_path(str(ROOT / "recipes" / "uhop_images" / "train.py"))
    model = train["HopfieldImages"](8, 12, values, feature_map).double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    rows = images.view(3, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(3, 16, 192)
    patches = rows @ weights["embed.weight"].mT + weights["embed.bias"]
    w_q, w_k, w_v = weights["attention.in_proj_weight"].split(12)
    b_q, b_k, b_v = weights["attention.in_proj_bias"].split(12)
    phi, b_phi = torch.eye(12, dtype=torch.float64), 0
    if feature_map:
        phi, b_phi = weights["feature_map.weight"], weights["feature_map.bias"]
    query = (weights["token"][0, 0] @ phi.mT + b_phi) @ w_q.mT + b_q
    keys = (patches @ phi.mT + b_phi) @ w_k.mT + b_k
    stored = (keys if values == "keys" else patches) @ w_v.mT + b_v
    out = ((keys @ query / 12**0.5).softmax(-1).unsqueeze(-1) * stored).sum(1)
    out = out @ weights["attention.out_proj.weight"].mT + weights["attention.out_proj.bias"]
    out = torch.nn.functional.layer_norm(out.relu(), (12,), weights["norm.weight"], weights["norm.bias"])
    expected = out @ weights["classify.weight"].mT + weights["classify.bias"]
    torch.testing.assert_close(model(images), expected)
