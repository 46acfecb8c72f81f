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
from lwpf_patch.backends import cpu_dropout, cpu_native

INF = float("inf")

needs_library = pytest.mark.skipif(not cpu_native.is_there(), reason=str(cpu_native._load()))

CASES = {
    "relu": (ReLU(), Forgetting("relu")),
    "pfu": (PFU(mu=0.1, bias=-0.3, sigma=0), Forgetting("pfu", 0.1, -0.3)),
    "dmedian": (PFU(sigma=0), Forgetting("pfu", "dmedian", "mu")),
}

#: Attends in a child process, and says how many small calls were left to the eager form, which passes ran of one that
#: was not, and why none did.
_ATTEND = """
import sys, torch, lwpf_patch
from lwpf_patch.backends import Call, choose, cpu_native
x, ran = torch.randn(4, 20, 8), []
early = [choose("auto", Call(x, x, x, lwpf_patch.ReLU()))[0].name for _ in range(102)].count("eager")
if cpu_native.is_there():
    run = cpu_native._load().run
    cpu_native._load().run = lambda forwards, *rest: (ran.append(forwards), run(forwards, *rest))[1]
    assert cpu_native.why_not() is None
    ran.clear()
query, key, value = (torch.randn(2, 3, 90, 16, requires_grad=True) for _ in range(3))
def attend(backend):
    out = lwpf_patch.lwpf_attention(query, key, value, func_d="pfu", training=False, backend=backend)
    return [out, *torch.autograd.grad(out.square().sum(), (query, key, value))]
for got, wanted in zip(attend("cpu"), attend("eager")):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
print(early, ran, "; ", cpu_native.why_not())
"""


def attend_in_a_child(**variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _ATTEND], env=environment_of_a_child(**variables), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def three_threads(monkeypatch):
    """Has even small calls be shared by threads."""
    monkeypatch.setattr(cpu_native, "GRAIN", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("masked", ["none", "causal", "boolean", "padding", "additive"])
@pytest.mark.parametrize("name", CASES)
def test_several_tiles_blocks_and_threads_equal_the_oracle(name, masked, three_threads):
    """Sizes that are multiples of nothing; in float64, whose tiles are those of float32 otherwise."""
    func_d, forgetting = CASES[name]
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
        ours = lwpf_attention(query, key, value, mask, func_d=func_d, training=False, backend="cpu", **options)
        got = torch.autograd.grad(ours, (query, key, value), cotangent)
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
def test_results_do_not_depend_on_which_thread_computes(three_threads):
    inputs, results = [torch.randn(1, 2, 700, 8, requires_grad=True) for _ in range(3)], []
    for _ in range(5):
        out = lwpf_attention(*inputs, func_d="pfu", training=False, backend="cpu")
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_library
@pytest.mark.parametrize(("name", "dropout_p"), [("relu", 0.0), ("pfu", 0.4), ("dmedian", 0.3)])
def test_gradients_of_masks_equal_the_oracle(name, dropout_p, three_threads):
    """In every way that a mask is the same for all items, heads or rows; the same bit by bit whoever computes."""
    func_d, forgetting = CASES[name]
    batch, heads, length, keys = 5, 2, 19, 21
    for sizes in itertools.product((1, batch), (1, heads), (1, length)):
        query = torch.randn(batch, length, heads, 4, dtype=torch.float64).transpose(1, 2).requires_grad_()
        key, value = (torch.randn(batch, heads, keys, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        mask = torch.randn(*sizes, keys, dtype=torch.float64)
        inputs = (query, key, value, mask.masked_fill(torch.rand(mask.shape) < 0.2, -INF).requires_grad_())
        seed, cotangent = int(torch.randint(2**31, ())), torch.randn(batch, heads, length, 4, dtype=torch.float64)
        results = []
        for _ in range(2):
            torch.manual_seed(seed)
            out = lwpf_attention(*inputs, dropout_p, func_d=func_d, training=False, backend="cpu")
            results.append((out, *torch.autograd.grad(out, inputs, cotangent)))
        assert all(map(torch.equal, *results))
        torch.manual_seed(seed)
        drawn = int(torch.randint(2**62, ()))
        rows = torch.arange(batch * heads * length).view(batch, heads, length)
        keep = cpu_dropout.dropout(drawn, dropout_p, rows, keys, torch.float64) > 0 if dropout_p else None
        expected = oracle.attention(
            query, key, value, func_d=forgetting, attn_mask=inputs[3], dropout_keep=keep, dropout_p=dropout_p
        )  # fmt: skip
        wanted = torch.autograd.grad(expected, inputs, cotangent, materialize_grads=True)
        for one, other in zip(results[0], (expected, *wanted), strict=True):
            oracle.assert_equal(one, other)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_dropped_depends_on_its_place_alone(dtype, three_threads):
    """The C++ drops what the plain form does, with one thread and with more."""
    for (batch, length, keys), p in itertools.product(((1, 150, 131), (6, 17, 9)), (0.0001, 0.3, 0.9999, 1.0)):
        query, key = torch.randn(batch, length, 8, dtype=dtype), torch.randn(batch, keys, 8, dtype=dtype)
        unit = torch.eye(keys, dtype=dtype).expand(batch, keys, keys)
        for threads in (3, 1):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)
            out = lwpf_attention(query, key, unit, None, p, func_d=PFU(mu=-INF, bias=0, sigma=0), backend="cpu")
            torch.manual_seed(threads)
            seed = int(torch.randint(2**62, ()))
            rows = torch.arange(batch * length).view(batch, length)
            assert torch.equal(out != 0, cpu_dropout.dropout(seed, p, rows, keys, dtype) != 0)


def test_dropout_is_as_good_as_independent_draws():
    """Its share, and the correlation of neighbours in a row, a column, another head and another call."""
    heads, length, keys = 6, 200, 300
    rows = torch.arange(heads * length).view(heads, length)
    for p, seed in itertools.product((0.1, 0.5, 0.9), (0, 1, 2**61 + 12345, int(torch.randint(2**62, ())))):
        drawn = cpu_dropout.dropout(seed, p, rows, keys, torch.float64)
        assert set(drawn.unique().tolist()) == {0.0, 1 / (1 - p)}
        normal = (drawn - 1) / ((p / (1 - p)) ** 0.5)
        pairs = [(normal, torch.ones(())), (normal.sum(-1) / keys**0.5, torch.ones(()))]
        pairs += [(normal[..., step:], normal[..., :-step]) for step in (1, 2, 8, 16, 64)]
        pairs += [(normal[:, step:], normal[:, :-step]) for step in (1, 2, 8, 16, 64)]
        pairs += [(normal[1:], normal[:-1]), (normal[..., 1:, 1:], normal[..., :-1, :-1])]
        for other in (seed + 1, seed ^ 2**40):
            again = (cpu_dropout.dropout(other, p, rows, keys, torch.float64) - 1) / ((p / (1 - p)) ** 0.5)
            pairs.append((normal, again))
        for one, other in pairs:
            product = one * other
            assert abs(float(product.mean())) < 5.5 / product.numel() ** 0.5
        spread = float((normal.sum(-1) / keys**0.5).square().mean())  # of a row's share
        assert abs(spread - 1) < 5.5 * (2 / (heads * length)) ** 0.5


@pytest.mark.drawn(days=5)
@needs_library
def test_two_processes_compile_at_once(tmp_path):
    """After a hundred small calls, which shall not wait for it; those of a later process need not."""
    children = [attend_in_a_child(XDG_CACHE_HOME=str(tmp_path), TORCH_EXTENSIONS_DIR="") for _ in range(2)]
    for child in children:
        out, err = child.communicate(timeout=200)
        assert child.returncode == 0, err
        assert out.strip() == "100 [True, False] ;  None"
    (made,) = (tmp_path / "lwpf_patch").iterdir()
    assert made.suffix == ".so"
    out, err = attend_in_a_child(XDG_CACHE_HOME=str(tmp_path), TORCH_EXTENSIONS_DIR="").communicate(timeout=100)
    assert out.strip() == "0 [True, False] ;  None", err


@pytest.mark.drawn(cases=1)
@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"PATH": "", "CXX": ""}, "there is no C++ compiler (CXX, c++, g++ or clang++)"),
        ({"CXX": "false"}, "false fails: exit code 1"),
        ({"LWPF_NATIVE": "off"}, "LWPF_NATIVE says so"),
    ],
)
def test_without_it_pytorchs_operators_compute(variables, why, tmp_path):
    child = attend_in_a_child(XDG_CACHE_HOME=str(tmp_path), TORCH_EXTENSIONS_DIR="", **variables)
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    assert out.startswith("102 [] ; ")
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


FIRST_CALLS = """
import contextlib, torch, lwpf_patch
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from lwpf_patch.backends import cpu_native

def attend(x):
    return lwpf_patch.lwpf_attention(x, x, x, func_d="pfu", training=False, backend="cpu")

def traced(x):
    return torch.jit.trace(attend, x)(x)

for name, around, attend_so in (
    ("inference", torch.inference_mode(), attend), ("no_grad", torch.no_grad(), attend),
    ("autocast", torch.autocast("cpu", torch.bfloat16), attend), ("counted", FlopCounterMode(display=False), attend),
    ("no hooks", disable_saved_tensors_hooks("no"), attend), ("traced", contextlib.nullcontext(), traced),
):
    cpu_native.why_not.cache_clear()
    x = torch.randn(1, 2, 50, 8)
    with around:
        out = attend_so(x)
    eager = lwpf_patch.lwpf_attention(x, x, x, func_d="pfu", training=False, backend="eager")
    if out.dtype == torch.float32:  # under autocast a rounded score can lie on the other side of the threshold
        assert torch.allclose(out, eager, atol=1e-5), name
    assert cpu_native.why_not.cache_info().currsize == 1, name
    assert cpu_native.why_not() is None, name
"""


@needs_library
def test_the_check_at_the_first_call_takes_gradients_whatever_is_around_it(python):
    python(code=FIRST_CALLS)
