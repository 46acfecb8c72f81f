"""Every supported version of timm, in a child interpreter, against the oracle; and timm's own tests."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment_of_a_child

#: Where `make test` puts the versions and the source of the newest, which carries its tests.
VERSIONS = Path(sys.prefix) / "timm"


#: Small models of families whose attention is patched.
FAMILIES = (
    "test_vit", "beit_base_patch16_224", "caformer_s18", "cait_xxs24_224", "coatnet_pico_rw_224", "convit_tiny",
    "cpubone_nano", "crossvit_tiny_240", "davit_tiny", "deit_tiny_patch16_224", "eca_botnext26ts_256",
    "efficientformer_l1", "efficientformerv2_s0", "efficientvit_m0", "eva02_tiny_patch14_224", "fastvit_sa12",
    "gcvit_xxtiny", "halonet26t", "hiera_tiny_224", "iformer_t", "levit_128s", "lowformer_b0", "maxvit_pico_rw_256",
    "mobilenetv4_hybrid_medium_075", "mvitv2_tiny", "naflexvit_base_patch16_gap", "nest_tiny", "nextvit_small",
    "pvt_v2_b0", "resnet50_clip_gap", "sam2_hiera_tiny", "samvit_base_patch16_224", "shvit_s1",
    "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "swinv2_tiny_window8_256", "tiny_vit_5m_224",
    "tnt_s_patch16_224", "twins_svt_small", "visformer_tiny", "vit_base_patch16_siglip_224",
    "vit_relpos_small_patch16_224", "vit_small_patch16_rope_224", "volo_d1_224",
)  # fmt: skip


@pytest.mark.drawn(cases=3)
@pytest.mark.parametrize("way", ["variable", "run", "before", "after"])
@pytest.mark.parametrize("version", ["0.6.13", "0.9.16", "1.0.9", "1.0.15", "1.0.20"])
def test_a_version_of_timm(version, way):
    folder = VERSIONS / version
    assert folder.is_dir(), f"timm {version} is not in {folder}; `make test` puts it there"
    command = [ROOT / "tests" / "check_version.py", version, way]
    variables = {}
    if way == "run":
        command = ["-m", "lwpf_patch", "run", "--patch", "timm", "--func-d", "relu", "--backend", "eager", *command]
    elif way == "variable":
        variables = {"LWPF_PATCH": "timm", "LWPF_FUNC_D": "relu", "LWPF_BACKEND": "eager"}
    out = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env=environment_of_a_child(PYTHONPATH=str(folder), **variables), capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("right: Attention")
    line = next(line for line in out.stderr.splitlines() if "patched; func_d" in line)
    assert re.match(rf"lwpf_patch: timm {version}: \d\d classes", line)


@pytest.mark.drawn(cases=1)
@pytest.mark.parametrize("version", ["0.6.13", "0.9.16", "1.0.9", "1.0.15", "1.0.20", "newest"])
def test_the_classes_of_a_version(version):
    """Two models of those that hold all classes, others every time: each class against an oracle in float64."""
    path = "" if version == "newest" else str(VERSIONS / version)
    out = subprocess.run(
        [sys.executable, ROOT / "tests" / "check_classes.py", "2"],
        env=environment_of_a_child(TESTS_SEED=str(torch.initial_seed()), PYTHONPATH=path),
        capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("timm.")


def _run_timm_tests(report: Path, arguments: list[str], **variables: str) -> dict[str, str]:
    """Runs timm's own tests, and returns the outcome of each by its name."""
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments],
        cwd=VERSIONS / "source", env=environment_of_a_child(PYTHONPATH="", HF_HUB_OFFLINE="1", **variables),
        capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode in (0, 1), out.stdout + out.stderr
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        outcomes[case.get("name", "")] = outcome
    return outcomes


@pytest.mark.drawn(days=2, cases=1)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("models", FAMILIES)
def test_timms_own_tests_pass_where_they_pass_unpatched(tmp_path, models):
    source = VERSIONS / "source" / "tests" / "test_models.py"
    assert source.is_file(), f"timm's tests are not in {source.parent}; `make test` puts them there"
    # What downloads weights fails with and without the patch.
    select = ["tests/test_models.py", "-k", f"{models} and not pretrained and not inference"]
    patched = _run_timm_tests(tmp_path / "patched.xml", select, LWPF_PATCH="timm")
    assert list(patched.values()).count("passed") >= 5
    failed = {name for name, outcome in patched.items() if outcome in ("failure", "error")}
    if failed:
        plain = _run_timm_tests(tmp_path / "plain.xml", select)
        assert failed == {name for name in failed if plain[name] in ("failure", "error")}
