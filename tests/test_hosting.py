"""Hosts of one's own, made of public names alone: one that is rewritten, one that takes attention by an interface."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path

import oracle
import pytest
import torch
from oracle import Forgetting

import lwpf_patch
from lwpf_patch import SettingsError
from lwpf_patch.hosting import FuncDAttachment, RegisteredHost, Replacement, RewrittenHost, Shim, Site
from lwpf_patch.hosts import HOSTS

WINDOWS = """
import torch

class WindowAttention(torch.nn.Module):
    def forward(self, q, k, v, mask=None):
        attn = q @ k.transpose(-2, -1)
        if mask is not None:
            attn = attn + mask
        attn = attn.softmax(dim=-1)
        return attn @ v

class FusedWindowAttention(torch.nn.Module):
    def forward(self, q, k, v, mask=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
"""
INTERFACE = """
import torch

ATTENTION = {"sdpa": torch.nn.functional.scaled_dot_product_attention}

def attend(q, k, v):
    return ATTENTION["sdpa"](q, k, v)
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Makes a package by a name and a source, which is not imported yet."""
    made = []

    def make(name: str, source: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("__version__ = '3.1'\n")
        (tmp_path / name / "attention.py").write_text(source)
        importlib.invalidate_caches()
        made.append(name)

    monkeypatch.syspath_prepend(tmp_path)
    yield make
    lwpf_patch.revert()
    for name in made:
        HOSTS.pop(name, None)
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]


def _windows() -> RewrittenHost:
    return RewrittenHost(
        name="windows",
        install="pip install windows",
        sites=tuple(
            Site("windows.attention", f"{name}.forward", {}, (FuncDAttachment(mask_sentinel=-100.0),))
            for name in ("WindowAttention", "FusedWindowAttention")
        ),
    )


@pytest.mark.parametrize("name", ["WindowAttention", "FusedWindowAttention"])
@pytest.mark.parametrize("func_d", ["relu", "pfu:sigma=0"])
def test_keys_that_a_mask_of_a_hundred_hides(library, name, func_d):
    """A host says which number its mask adds, and those keys are excluded as those are that -inf hides."""
    library("windows", WINDOWS)
    lwpf_patch.register_host(_windows())
    lwpf_patch.apply("windows", func_d=func_d)
    module = getattr(importlib.import_module("windows.attention"), name)()
    q, k, v = (torch.randn(2, 3, n, 6, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5))
    hidden = torch.rand(4, 5) < 0.4
    mask = torch.zeros(4, 5, dtype=torch.float64).masked_fill(hidden, -100.0)
    forgetting = Forgetting("relu") if func_d == "relu" else Forgetting("pfu", "dmedian", "mu")
    expected = oracle.attention(q, k, v, func_d=forgetting, attn_mask=~hidden, scale=1.0)
    oracle.assert_equal(module(q, k, v, mask), expected)
    subclass = type("Subclass", (torch.Tensor,), {})  # whose __torch_function__ gets the whole call
    oracle.assert_equal(module(q.as_subclass(subclass), k, v, mask).as_subclass(torch.Tensor), expected)
    scripted = torch.jit.script(module)
    torch.testing.assert_close(scripted(q, k, v, mask), module(q, k, v, mask))


def test_a_host_with_an_interface(library, caplog):
    """Registered at its import, replaced, named in the status, and gone after the revert."""
    library("interface", INTERFACE)
    host = _interface()
    lwpf_patch.register_host(host)
    lwpf_patch.register_host(host)
    assert lwpf_patch.status()["hosts"]["interface"] == {"installed": True, "version": "unknown", "state": "off"}
    with pytest.raises(SettingsError, match=r"uhop \(from apply\(uhop=...\)\): interface takes its attention by an"):
        lwpf_patch.apply("interface", uhop="on")
    lwpf_patch.apply("interface", func_d="relu")
    assert lwpf_patch.status()["hosts"]["interface"]["state"] == "waiting for its import"
    library_module = importlib.import_module("interface.attention")
    assert "interface 3.1: interface.attention patched; func_d relu, masking exclude" in caplog.text
    q, k, v = (torch.randn(2, 3, n, 6, dtype=torch.float64) for n in (4, 5, 5))
    oracle.assert_equal(library_module.attend(q, k, v), oracle.attention(q, k, v, func_d=Forgetting("relu")))
    with lwpf_patch.patched("interface", func_d="pfu:mu=0.1,sigma=0"):
        expected = oracle.attention(q, k, v, func_d=Forgetting("pfu", 0.1, "mu"))
        oracle.assert_equal(library_module.attend(q, k, v), expected)
    oracle.assert_equal(library_module.attend(q, k, v), oracle.attention(q, k, v, func_d=Forgetting("relu")))
    status = lwpf_patch.status()["hosts"]["interface"]
    assert (status["state"], status["called"], status["version"]) == ("patched", True, "3.1")
    json.dumps(status)
    lwpf_patch.revert("interface")
    assert {"sdpa": torch.nn.functional.scaled_dot_product_attention} == library_module.ATTENTION
    # And where it is imported already; one that fails leaves nothing behind.
    lwpf_patch.apply("interface")
    assert library_module.ATTENTION["sdpa"].__self__.host == "interface"
    lwpf_patch.revert()
    object.__setattr__(host, "register", lambda module, func_d: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lwpf_patch.apply("interface")
    assert lwpf_patch.status()["hosts"]["interface"]["state"] == "off"


def _interface(register=None, **options) -> RegisteredHost:
    """A host whose interface is the dictionary of INTERFACE."""

    def usual(module, func_d):
        before = module.ATTENTION["sdpa"]
        module.ATTENTION["sdpa"] = func_d.scaled_dot_product_attention
        return lambda: module.ATTENTION.update(sdpa=before)

    return RegisteredHost(
        "interface", "pip install interface", places=("interface.attention",), register=register or usual, **options
    )


def test_other_settings_that_an_interface_refuses(library):
    """What was registered before is registered again, and the host is as patched as it was."""
    library("interface", INTERFACE)
    module = importlib.import_module("interface.attention")
    usual = _interface().register

    def register(module, func_d):
        if repr(func_d) != "ReLU()":
            raise ZeroDivisionError
        return usual(module, func_d)

    lwpf_patch.register_host(_interface(register))
    lwpf_patch.apply("interface", func_d="relu")
    with pytest.raises(ZeroDivisionError):
        lwpf_patch.apply("interface", func_d="pfu")
    status = lwpf_patch.status()["hosts"]["interface"]
    assert (status["state"], status["settings"]["func_d"]) == ("patched", "relu")
    q = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    oracle.assert_equal(module.attend(q, q, q), oracle.attention(q, q, q, func_d=Forgetting("relu")))
    lwpf_patch.revert()
    assert {"sdpa": torch.nn.functional.scaled_dot_product_attention} == module.ATTENTION


def test_an_interface_has_no_noise_but_where_training_is_said(library):
    """Nothing tells its func_d of eval(): a function of a library is no module of a model."""
    library("interface", INTERFACE)
    lwpf_patch.register_host(_interface())
    lwpf_patch.apply("interface", func_d="pfu:mu=0,sigma=1")
    module = importlib.import_module("interface.attention")
    q = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    oracle.assert_equal(module.attend(q, q, q), oracle.attention(q, q, q, func_d=Forgetting("pfu", 0.0, "mu")))
    func_d = module.ATTENTION["sdpa"].__self__
    noisy = [lwpf_patch.lwpf_attention(q, q, q, func_d=func_d, training=True) for _ in range(2)]
    assert not torch.equal(*noisy)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interface_that_needs_a_shim(library, when):
    library("interface", INTERFACE)

    def replacements(module):
        return [Replacement(module, "MENDED", True)]

    shim = Shim("mended", "it is broken", ("interface.attention",), broken=lambda: True, replacements=replacements)
    lwpf_patch.register_host(_interface(shims=(shim,)))
    if when == "after":
        importlib.import_module("interface.attention")
    lwpf_patch.apply("interface")
    module = importlib.import_module("interface.attention")
    lwpf_patch.apply("interface", func_d="pfu")
    assert module.MENDED
    assert [each["state"] for each in lwpf_patch.status()["hosts"]["interface"]["shims"]] == ["applied"]
    lwpf_patch.revert()
    assert not hasattr(module, "MENDED")


def test_what_cannot_be_registered():
    with pytest.raises(SettingsError, match=r"register_host\('timm'\): it is not a lwpf_patch.hosting.Host"):
        lwpf_patch.register_host("timm")
    with pytest.raises(SettingsError, match="there is a host by the name 'timm' already"):
        lwpf_patch.register_host(RewrittenHost("timm", "pip install timm"))


def test_the_hosts_in_the_box_use_nothing_that_is_not_public():
    """Of the package they import what a host of one's own can import, and the hashes recorded for them."""
    public = {"errors", "hosting"}
    for name in ("timm", "hflayers", "deeprc", "torch_nn"):
        path = Path(sys.modules[f"lwpf_patch.hosts.{name}"].__file__)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                imported = [node.module] if node.module else [alias.name for alias in node.names]
                own = {each for each in imported if each == "known" or each.startswith(f"{name}_")}
                assert set(imported) <= public | own, f"{name} imports {imported}"
                if node.module == "hosting":
                    assert {alias.name for alias in node.names} <= set(lwpf_patch.hosting.__all__)
