"""What several tests share: a registry that no test leaves patched, child interpreters, and small random tensors."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from drawing import (  # noqa: F401 - pytest finds them here
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_report_header,
)

import lwpf_patch
from lwpf_patch.backends.triton import why_no_triton
from lwpf_patch.hosts import HOSTS

ROOT = Path(__file__).parent.parent

needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")

torch.set_num_threads(1)  # tests run side by side
# As on a user's machine: without compiled files each child interpreter compiles all of this package again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def require_host(name: str) -> None:
    """Skips the tests of a module whose upstream package is not installed, or fails them if it must be."""
    if importlib.util.find_spec(name) is not None:
        return
    skip_for_host(f"{name} is not installed, so that its tests did not run: {HOSTS[name].install}")


def skip_for_host(message: str) -> None:
    """Skips a test that an upstream package or repository is missing for, or fails it if they must be there."""
    if os.environ.get("LWPF_REQUIRE_HOSTS", "0") not in ("", "0"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message, allow_module_level=True)


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    # Fresh random inputs at every run; a failure shows which, and TESTS_SEED repeats them.
    seed = int(os.environ.get("TESTS_SEED", torch.seed() % 2**31))
    torch.manual_seed(seed)
    print(f"TESTS_SEED={seed}")
    yield
    lwpf_patch.revert()


def environment_of_a_child(**variables: str) -> dict[str, str]:
    """Returns the variables of a child interpreter: none of ours but the given ones, one thread, `quick_timm`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LWPF_")} | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(quick_timm()))))
    return environment | variables


@functools.cache
def quick_timm() -> Path:
    """Returns a folder in which timm and torchvision are installed, with few of timm's models.

    Half of the time of `import timm` goes into torch._dynamo, which torchvision and NaFlexViT load, and a tenth into
    models that no test takes. All files here are links to the installed ones but for the two that import these.
    """
    folder = Path(tempfile.mkdtemp(prefix="lwpf_timm_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if importlib.util.find_spec("timm") is None:
        return folder
    models = _linked("timm", "models/__init__.py", folder)
    kept = ("deit", "eva", "resnet", "vision_transformer")
    rest = "".join(rf"(?!{name} )" for name in kept)
    models.write_text(re.sub(rf"^from \.(?!_){rest}\w+ import \*\n", "", models.read_text(), flags=re.MULTILINE))
    align = _linked("torchvision", "ops/roi_align.py", folder)
    eager = "from torch._dynamo.utils import is_compile_supported"
    lazy = f"def is_compile_supported(device):\n    {eager}\n    return is_compile_supported(device)"
    align.write_text(align.read_text().replace(f"\n{eager}\n", f"\n{lazy}\n"))
    return folder


def _linked(package: str, copied: str, folder: Path) -> Path:
    """Links the files of a package and its metadata into a folder, and copies one of them, which is returned."""
    source = Path(importlib.util.find_spec(package).origin).parent
    for metadata in source.parent.glob(f"{package}-*.dist-info"):
        (folder / metadata.name).symlink_to(metadata)
    inner = Path(copied).parent
    for place in (Path(), inner):
        (folder / package / place).mkdir()
        for entry in (source / place).iterdir():
            if entry.name != "__pycache__" and place / entry.name not in (inner, Path(copied)):
                (folder / package / place / entry.name).symlink_to(entry)
    return shutil.copy(source / copied, folder / package / copied)


@pytest.fixture
def python(tmp_path: Path):
    """Runs a child interpreter in an empty folder, with no variable of ours but the given ones."""

    def run(*arguments, code="", check=True, input=None, cwd=tmp_path, timeout=None, **variables):
        if code:
            script = tmp_path / "script.py"
            script.write_text(code)
            arguments = (str(script), *arguments)
        result = subprocess.run(
            [sys.executable, *arguments],
            env=environment_of_a_child(**variables),
            cwd=cwd,
            capture_output=True,
            text=True,
            input=input,
            timeout=timeout,
        )
        assert not check or result.returncode == 0, result.stderr
        return result

    return run
