"""Shims, on modules made for these tests; and those of DeepRC that need no DeepRC."""

from __future__ import annotations

import types

import numpy as np
import pytest

from lwpf_patch.hosting import Replacement, Shim
from lwpf_patch.hosting.shims import AppliedShim
from lwpf_patch.hosts import deeprc as host


def _shim(replacements) -> Shim:
    return Shim("a shim", "because", ("module",), lambda: True, replacements)


def test_a_shim_goes_as_it_came():
    module = types.ModuleType("module")
    module.there = 1
    shim = _shim(lambda m: [Replacement(m, "there", 2), Replacement(m, "new", 3)])
    applied = AppliedShim.apply(shim, module)
    assert (module.there, module.new) == (2, 3)
    applied.undo()
    assert module.there == 1
    assert not hasattr(module, "new")


def test_what_someone_else_replaced_since_stays():
    module = types.ModuleType("module")
    module.there = 1
    applied = AppliedShim.apply(_shim(lambda m: [Replacement(m, "there", 2)]), module)
    module.there = 5
    applied.undo()
    assert module.there == 5


def test_numpy_gets_its_aliases_back_for_one_module_only():
    (shim,) = (shim for shim in host.SHIMS if shim.name == "numpy aliases")
    module = types.ModuleType("module")
    module.np = np
    before = set(dir(np))
    AppliedShim.apply(shim, module)
    assert module.np.zeros(3, dtype=module.np.int).dtype == np.int64
    assert module.np.asarray([1], dtype=module.np.float).dtype == np.float64
    assert module.np.random is np.random
    with pytest.raises(AttributeError):
        module.np.nothing_of_the_kind  # noqa: B018
    letters = module.np.chararray(shape=(3,))
    letters[:] = list("abc")
    assert letters[np.array([2, 0])].tostring() == b"ca"
    assert set(dir(np)) == before


def test_the_question_is_answered_only_where_nobody_can(monkeypatch, caplog):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert host._answer_yes("Shall I?") == "n"
    assert host._answer_yes("Shall I?") == "y"
    assert host._answer_yes("Go on? (yes/no)") == "yes"
    assert "answered yes" in caplog.text
