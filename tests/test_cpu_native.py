"""The passes of the CPU that a compiler makes: that they are taken, and what happens where they cannot be."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import oracle
import pytest
import torch
from conftest import environment_of_a_child
from oracle import Forgetting

from lwpf_patch import PFU, ReLU, lwpf_attention
from lwpf_patch.backends import cpu_native

INF = float("inf")

needs_library = pytest.mark.skipif(not cpu_native.is_there(), reason=str(cpu_native._load()))

CASES = {
    "relu": (ReLU(), Forgetting("relu")),
    "pfu": (PFU(mu=0.1, bias=-0.3, sigma=0), Forgetting("pfu", 0.1, -0.3)),
    "dmedian": (PFU(sigma=0), Forgetting("pfu", "dmedian", "mu")),
}

#: Attends in a child process, and says which passes ran and whether the result is right.
_ATTEND = """
import sys, torch, lwpf_patch
from lwpf_patch.backends import cpu_native
ran = []
if cpu_native.is_there():
    run = cpu_native._load().run
    cpu_native._load().run = lambda which, *rest: (ran.append(which), run(which, *rest))[1]
    assert cpu_native.why_not() is None
    ran.clear()
query, key, value = (torch.randn(2, 3, 90, 16, requires_grad=True) for _ in range(3))
def attend(backend):
    out = lwpf_patch.lwpf_attention(query, key, value, func_d="pfu", training=False, backend=backend)
    return [out, *torch.autograd.grad(out.square().sum(), (query, key, value))]
for got, wanted in zip(attend("cpu"), attend("eager")):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
print(ran, "; ", cpu_native.why_not())
"""


def attend_in_a_child(**variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _ATTEND], env=environment_of_a_child(**variables), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@needs_library
@pytest.mark.parametrize("masked", ["none", "causal", "boolean", "padding", "additive"])
@pytest.mark.parametrize("name", CASES)
def test_several_tiles_blocks_and_threads_equal_the_oracle(name, masked):
    """Sizes that are multiples of nothing; in float64, whose tiles are those of float32 otherwise."""
    func_d, forgetting = CASES[name]
    threads = torch.get_num_threads()
    for batch, length, keys, width, value_width in ((1, 77, 131, 5, 7), (2, 70, 70, 16, 8), (2, 1, 70, 4, 3)):
        if masked == "causal":
            keys = length
        query = torch.randn(batch, 2, length, width, dtype=torch.float64, requires_grad=True)
        key = torch.randn(batch, 2, keys, width, dtype=torch.float64, requires_grad=True)
        value = torch.randn(batch, 2, keys, value_width, dtype=torch.float64, requires_grad=True)
        mask = None
        if masked == "boolean":
            mask = torch.rand(batch, 2, length, keys) < 0.7
            mask[..., 0, :] = False
        elif masked == "padding":
            mask = torch.arange(keys) < torch.randint(0, keys, (batch, 1, 1, 1))
        elif masked == "additive":
            mask = torch.randn(length, keys, dtype=torch.float64)
            mask = mask.masked_fill(torch.rand(length, keys) < 0.3, -INF)
        options = dict(is_causal=masked == "causal")
        expected = oracle.attention(query, key, value, func_d=forgetting, attn_mask=mask, **options)
        cotangent = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, (query, key, value), cotangent, materialize_grads=True)
        try:
            torch.set_num_threads(2)
            ours = lwpf_attention(query, key, value, mask, func_d=func_d, training=False, backend="cpu", **options)
            got = torch.autograd.grad(ours, (query, key, value), cotangent)
        finally:
            torch.set_num_threads(threads)
        for one, other in zip((ours, *got), (expected, *wanted), strict=True):
            oracle.assert_equal(one, other)


@needs_library
@pytest.mark.parametrize("name", CASES)
def test_what_is_not_a_number_stays_it(name):
    """As in the eager form: NaN and infinite scores, in one row and in all that a median reaches."""
    for odd, place in itertools.product((float("nan"), INF, -INF), range(3)):
        tensors = [torch.randn(2, 70, 8) for _ in range(3)]
        tensors[place][1, 5, 3] = odd
        out, wanted = (
            lwpf_attention(*tensors, func_d=CASES[name][0], training=False, backend=each) for each in ("cpu", "eager")
        )
        torch.testing.assert_close(out, wanted, equal_nan=True, rtol=1e-4, atol=1e-5)


@needs_library
def test_results_do_not_depend_on_which_thread_computes():
    inputs = [torch.randn(1, 2, 700, 8, requires_grad=True) for _ in range(3)]
    threads, results = torch.get_num_threads(), []
    try:
        torch.set_num_threads(4)
        for _ in range(5):
            out = lwpf_attention(*inputs, func_d="pfu", training=False, backend="cpu")
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_library
def test_calls_that_it_does_not_compute_are_left_to_the_operators():
    query, key, value = (torch.zeros(2, 5, 4) for _ in range(3))
    assert cpu_native.suits([query, key, value], 0.0, False)
    assert not cpu_native.suits([query, key, value], 0.1, False)
    assert not cpu_native.suits([query, key, value], 0.0, True)
    assert not cpu_native.suits([query[:, :0], key, value], 0.0, False)


@pytest.mark.drawn(days=3)
@needs_library
def test_two_processes_compile_at_once(tmp_path):
    children = [attend_in_a_child(XDG_CACHE_HOME=str(tmp_path), TORCH_EXTENSIONS_DIR="") for _ in range(2)]
    for child in children:
        out, err = child.communicate(timeout=200)
        assert child.returncode == 0, err
        assert out.strip() == "[0, 1, 2] ;  None"
    (made,) = (tmp_path / "lwpf_patch").iterdir()
    assert made.suffix == ".so"


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"PATH": "", "CXX": ""}, "there is no C++ compiler (CXX, c++, g++ or clang++)"),
        ({"CXX": "false"}, "false fails: exit code 1"),
        ({"LWPF_NATIVE": "off"}, "LWPF_NATIVE says so"),
    ],
)
def test_without_it_the_operators_compute(variables, why, tmp_path):
    child = attend_in_a_child(XDG_CACHE_HOME=str(tmp_path), TORCH_EXTENSIONS_DIR="", **variables)
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    assert out.startswith("[] ; ")
    assert out.strip().endswith(why)


def test_a_library_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(cpu_native, "why_not", lambda: "it computes something else")
    query = torch.randn(2, 40, 8, requires_grad=True)
    out, wanted = (lwpf_attention(query, query, query, func_d="relu", backend=each) for each in ("cpu", "eager"))
    torch.testing.assert_close(out, wanted)
    for one, other in zip(*(torch.autograd.grad(x.sum(), query) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(one, other)


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_has_not():
    code = """
import os, torch, lwpf_patch
torch.set_num_threads(2)
x = torch.randn(2, 4, 200, 16)
attend = lambda: lwpf_patch.lwpf_attention(x, x, x, func_d="relu", backend="cpu")
wanted = attend()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(attend(), wanted) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment_of_a_child(), check=True, timeout=60)


def test_a_wrong_value_of_the_variable_is_an_error():
    child = attend_in_a_child(LWPF_NATIVE="maybe")
    _, err = child.communicate(timeout=100)
    assert child.returncode != 0
    assert "unknown native 'maybe'" in err
    assert "LWPF_NATIVE" in err
