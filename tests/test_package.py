"""The package as a whole: its public names, and its layers."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import lwpf_patch
from lwpf_patch import backends, settings

PACKAGE = Path(lwpf_patch.__file__).parent


def test_the_public_names_are_the_same_for_python_and_for_type_checkers():
    (block,) = (node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    typed = {alias.asname: node.module for node in block.body for alias in node.names}
    assert typed == lwpf_patch._MODULE_OF
    for name in lwpf_patch.__all__:
        assert getattr(lwpf_patch, name) is not None
        assert name in dir(lwpf_patch)
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        lwpf_patch.aply  # noqa: B018


@pytest.mark.parametrize("name", [name for name in lwpf_patch.__all__ if name != "__version__"])
def test_public_names_are_documented(name):
    assert len(inspect.getdoc(getattr(lwpf_patch, name)) or "") > 40


#: What a module may import of the package when it is loaded: only what stands further down this list.
LAYERS = [
    "__main__", "_startup", "cli", "comparing", "folding", "models", "registry", "exit_report", "swapping", "attaching",
    "teachers", "owners", "hosts", "rewriting", "edits", "compat", "attention", "forgetting", "backends", "retrieval",
    "uhop", "tracing", "separation", "sep", "transforms", "unpickling", "settings", "importing", "frames", "reporting",
    "errors",
]  # fmt: skip


def test_the_names_of_backends_are_those_that_settings_allow():
    assert sorted(["auto", *(backend.name for backend in backends.BACKENDS)]) == sorted(settings.BACKENDS)


def test_imports_point_down():
    for path in PACKAGE.rglob("*.py"):
        layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if layer == "__init__":
            continue
        prefix = ".." if path.parent != PACKAGE else "."
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level == len(prefix):
                for target in [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]:
                    if target != "__version__":
                        assert LAYERS.index(target) > LAYERS.index(layer), f"{path.name} imports {target}"
