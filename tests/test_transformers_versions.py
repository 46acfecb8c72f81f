"""Every supported version of transformers beside the newest: tests of test_transformers.py in a child interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment_of_a_child

#: Where `make test` puts the versions.
VERSIONS = Path(sys.prefix) / "transformers"
#: T5 and BERT are of the interface in transformers 5 only, and GPT-2 returns no weights.
MODELS = "vit or dinov2 or clip or gpt2 or llama or gemma2 or gpt_oss or whisper"
SELECTED = (
    f"gradients and relu and ({MODELS}) or masks or every_eager or training and gpt2 or half and bfloat16 and "
    "(clip or whisper) or weights and llama or cache or interface or alone"
)


@pytest.mark.drawn(days=3)
@pytest.mark.parametrize("version", ["4.57.6"])
def test_a_version_of_transformers(version):
    folder = VERSIONS / version
    assert folder.is_dir(), f"transformers {version} is not in {folder}; `make test` puts it there"
    code = f"import sys, pytest, transformers; assert transformers.__version__ == {version!r}; sys.exit(pytest.main())"
    out = subprocess.run(
        [sys.executable, "-c", code, "tests/test_transformers.py", "-q", "-p", "no:cacheprovider", "-k", SELECTED],
        env=environment_of_a_child(PYTHONPATH=str(folder)), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
    assert " passed" in out.stdout
