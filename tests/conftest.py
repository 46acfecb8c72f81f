"""What several tests share: a registry that no test leaves patched, child interpreters, and small random tensors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lwpf_patch
from lwpf_patch.backends.triton import why_no_triton
from lwpf_patch.hosts import HOSTS

ROOT = Path(__file__).parent.parent

needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")

torch.set_num_threads(1)  # tests run side by side


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


@pytest.fixture
def python(tmp_path: Path):
    """Runs a child interpreter in an empty folder, with no variable of ours but the given ones."""

    def run(*arguments, code="", check=True, input=None, cwd=tmp_path, timeout=None, **variables):
        if code:
            script = tmp_path / "script.py"
            script.write_text(code)
            arguments = (str(script), *arguments)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LWPF_")}
        environment |= {"OMP_NUM_THREADS": "1", **variables}
        result = subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            input=input,
            timeout=timeout,
        )
        assert not check or result.returncode == 0, result.stderr
        return result

    return run
