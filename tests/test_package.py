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


def test_the_names_of_backends_are_those_that_settings_allow():
    assert sorted(["auto", *(backend.name for backend in backends.BACKENDS)]) == sorted(settings.BACKENDS)
