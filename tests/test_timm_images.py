"""recipes/timm_images: timm's own train.py, from a clone of its repository, on a few images."""

from __future__ import annotations

import csv
import os
import struct
import subprocess

import pytest
import torch
from conftest import ROOT, skip_for_host

COMPARE = str(ROOT / "recipes" / "timm_images" / "compare.py")
REPOSITORY = "https://github.com/huggingface/pytorch-image-models"


def write_mnist(folder, train: int, test: int) -> None:
    """Write random digits in the files of MNIST: bright where the label says."""
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 90, (count, 28, 28))
        images[torch.arange(count), 2 * labels + 4] = 250
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(images.flatten().tolist()))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(labels.tolist()))


@pytest.mark.drawn(days=5)
def test_an_arm_against_plain(python, tmp_path):
    cloning = ["git", "clone", "-q", "--filter=blob:none", "--depth=1", REPOSITORY, str(tmp_path / "timm")]
    if subprocess.run(cloning, env=os.environ | {"GIT_TERMINAL_PROMPT": "0"}).returncode:
        skip_for_host(f"{REPOSITORY} cannot be reached, so that its train.py was not run")
    write_mnist(tmp_path / "data" / "MNIST" / "raw", 256, 64)
    out = python(
        COMPARE, "--train-py", "timm/train.py", "--quick", "--arms", "relu", "--output", "out", "--", "--epochs", "2"
    )
    for part in ("training", "shift"):
        with (tmp_path / "out" / part / "runs.csv").open(newline="") as file:
            assert {row["arm"] for row in csv.DictReader(file)} == {"plain", "relu"}
    report = (tmp_path / "out" / "shift" / "report.md").read_text()
    assert "top-1, %: turned by 30 degrees" in report
    assert (tmp_path / "out" / "training" / "curves.png").stat().st_size > 10_000
    with (tmp_path / "out" / "observed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"].partition(".")[2] for row in rows] == [f"blocks.{block}.attn" for block in range(3)]
    assert all(0 < float(row["forgotten"]) < 1 for row in rows)
    assert " compare --seeds 1 " in out.stdout
    assert "--arm plain --arm 'relu: --func-d relu" in out.stdout


def test_what_it_needs_is_said(python):
    out = python(COMPARE, "--train-py", "nowhere/train.py", check=False)
    assert out.returncode == 2
    assert "git clone timm's repository" in out.stderr
