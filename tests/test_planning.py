"""What is planned and compiled is kept for later processes, and is there what it would be without."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import require_host

import lwpf_patch
from lwpf_patch import keeping
from lwpf_patch.backends import cpu_native
from lwpf_patch.hosts import HOSTS, IN_THE_BOX
from lwpf_patch.patching import planning
from lwpf_patch.rewriting import packing
from lwpf_patch.settings import Settings

#: Patches in one of two ways, computes, and says what it compiled.
SCRIPT = """
import ast, sys
trees = []
parse = ast.parse
def count(source, *arguments, **options):
    trees.append(source)
    return parse(source, *arguments, **options)
ast.parse = count
import torch, lwpf_patch
lwpf_patch.apply("timm", func_d="relu", uhop={uhop!r})
import timm
from timm.models.vision_transformer import Attention
planned = [source for source in trees if "class Attention" in source]
torch.manual_seed(0)
attention = Attention(16, 2).eval()
x = torch.randn(2, 5, 16)
scripted = torch.jit.script(attention) if {uhop!r} is None else attention
print(len(planned), attention(x).double().sum().item(), scripted(x).double().sum().item())
"""


@pytest.fixture
def attend(python, tmp_path):
    """Patches timm in a fresh process; returns how often its attention was planned, and the sums of its outputs."""

    def run(uhop=None, **variables):
        variables = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TORCH_EXTENSIONS_DIR": "", **variables}
        out = python(code=SCRIPT.format(uhop=uhop), **variables)
        planned, *sums = out.stdout.split()
        return int(planned), sums

    return run


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "lwpf_patch").glob("plan-timm.layers.attention-*"))


@pytest.mark.drawn(days=2)
def test_a_later_process_takes_what_an_earlier_one_planned(attend, tmp_path):
    planned, sums = attend(PYTHONDONTWRITEBYTECODE="1")
    assert planned
    assert sums[0] == sums[1]
    assert not kept(tmp_path)  # where Python is to write no compiled files, nothing is
    assert attend() == (planned, sums)
    (file,) = kept(tmp_path)
    assert attend() == (0, sums)
    assert attend(PYTHONDONTWRITEBYTECODE="1") == (0, sums)  # which does not hinder reading
    # Other parts are another plan; a damaged file is made anew, and a folder that cannot be written to is no error.
    assert attend(uhop="on")[0]
    assert len(kept(tmp_path)) == 2
    assert attend(uhop="on") == (0, sums)  # the map begins as the identity
    whole = file.read_bytes()
    for damaged in (b"", whole[:40] + b"x" + whole[41:]):
        file.write_bytes(damaged)
        again, sums_again = attend()
        assert (again > 0, sums_again) == (True, sums)
        assert file.read_bytes()[:32] == whole[:32]
    assert attend(XDG_CACHE_HOME=os.devnull) == (planned, sums)


@pytest.mark.parametrize("uhop", [None, "on"])
@pytest.mark.parametrize("name", IN_THE_BOX)
def test_every_plan_comes_back_as_it_was(name, uhop):
    host = HOSTS[name]
    if not hasattr(host, "plans"):
        pytest.skip(f"{name} is not rewritten")
    require_host(name)
    for plan in host.plans(Settings(func_d="relu", uhop=uhop)):
        codes = plan.compile()
        back, codes_back = packing.unpack(packing.pack(plan, codes), plan.module, plan.path, plan.source)
        assert back == plan
        assert codes_back == codes
        for (_, after), (_, after_back) in zip(codes.values(), codes_back.values(), strict=True):
            assert after_back.co_filename == after.co_filename
            assert list(after_back.co_positions()) == list(after.co_positions())


def test_a_file_is_named_by_all_that_a_plan_depends_on(monkeypatch):
    sites = [site for site in HOSTS["timm"].sites if site.qualname == "Attention.forward"][:1]
    base = planning._file("source", sites, ["func_d"])
    assert planning._file("source", sites, ["func_d"]) == base
    others = [planning._file("sourcf", sites, ["func_d"]), planning._file("source", sites, ["func_d", "feature_map"])]
    for module, name, value in (("sys", "version", "3.99"), ("torch", "__version__", "9")):
        planning._maker.cache_clear()
        monkeypatch.setattr({"sys": planning.sys, "torch": torch}[module], name, value)
        others.append(planning._file("source", sites, ["func_d"]))
        monkeypatch.undo()
    planning._maker.cache_clear()
    assert len({base, *others}) == 5
    assert planning._file("source", sites, ["func_d"]) == base


def test_the_oldest_are_removed(tmp_path):
    files = [tmp_path / f"plan-a.b-{number}" for number in range(planning._KEPT + 3)]
    for age, file in enumerate(files):
        file.touch()
        os.utime(file, (age, age))
    (tmp_path / "plan-a.bc-1").touch()
    planning._forget_old(files[-1])
    assert sorted(tmp_path.iterdir()) == sorted([*files[3:], tmp_path / "plan-a.bc-1"])


def test_a_host_of_ones_own_is_planned_each_time():
    copy = HOSTS["timm"].for_package("my_timm")
    assert planning._is_in_the_box(HOSTS["timm"])
    assert not planning._is_in_the_box(copy)
    assert lwpf_patch.status()["hosts"]["timm"]["state"] == "off"


def test_a_user_without_a_home(monkeypatch):
    def fail(self):
        raise RuntimeError("Could not determine home directory.")

    for variable in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(keeping.Path, "expanduser", fail)
    monkeypatch.setattr(planning, "_planned", {})
    with lwpf_patch.patched("timm"):
        assert lwpf_patch.status()["hosts"]["timm"]["state"] != "off"
    for kept_in_memory in (cpu_native._target, cpu_native._is_compiled):
        kept_in_memory.cache_clear()
    try:
        assert not cpu_native._is_compiled()
        with pytest.raises(cpu_native.Unavailable, match="the user has no home"):
            cpu_native._target()
    finally:
        cpu_native._is_compiled.cache_clear()
