"""The check of the Triton kernels at the first call of each case: what is right passes, what is off by 1 % does not.

Not collected by itself: tests/test_triton.py runs it in a process of its own, in Triton's interpreter. What the kernels
compute is changed behind them.
"""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch

import lwpf_patch
from lwpf_patch import PFU, lwpf_attention
from lwpf_patch.attention import HostFuncD
from lwpf_patch.backends import BACKENDS, triton_kernels, triton_median, verifying

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter: exp2 of an infinity

(TRITON,) = (backend for backend in BACKENDS if backend.name == "triton")


@pytest.fixture(autouse=True)
def _no_case_is_known():
    verifying.forget_cases()
    yield
    verifying.forget_cases()


@pytest.fixture
def warned(monkeypatch):
    """What users are warned of."""
    said = []
    monkeypatch.setattr(verifying.reporting, "warn", said.append)
    return said


@pytest.fixture
def on_its_device(monkeypatch):
    """Have backend="auto" take the kernels where the interpreter runs them."""
    monkeypatch.setattr(TRITON, "device", "cpu")


def inputs(dtype=torch.float32, length=19, keys=23, heads=2, width=16, grad=True):
    shapes = ((2, heads, length, width), (2, heads, keys, width), (2, heads, keys, width))
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


CALLS = {
    "relu": dict(func_d="relu"),
    "a constant": dict(func_d="pfu:mu=0.1,bias=-0.3,sigma=0", is_causal=True),
    "the median": dict(func_d="pfu:sigma=0"),
    "the median, with noise": dict(func_d=PFU(sigma=0.4), training=True),
    "the median, and a constant bias": dict(func_d="pfu:bias=0.2,sigma=0", is_causal=True),
    "dropout": dict(func_d="relu", dropout_p=0.3),
    "softmax1": dict(func_d="none", sep="softmax_n"),
    "a boolean mask": dict(func_d="pfu:sigma=0", attn_mask=torch.bool),
    "an additive mask": dict(func_d="relu", attn_mask=torch.float32),
}


def call(name, tensors, **more):
    options = CALLS[name] | more
    if "attn_mask" in options:
        generator = torch.Generator().manual_seed(3)
        shape = (tensors[0].shape[-2], tensors[1].shape[-2])
        mask = torch.randn(shape, generator=generator)
        options["attn_mask"] = mask.requires_grad_() if options["attn_mask"] == torch.float32 else mask < 1
    return lwpf_attention(*tensors, **options)


@pytest.mark.drawn(cases=5)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CALLS),
     *((name, dtype) for name in ("relu", "the median") for dtype in (torch.float16, torch.bfloat16))],
)  # fmt: skip
def test_what_is_right_passes(name, dtype, warned):
    out = call(name, inputs(dtype), backend="triton")
    assert out.dtype == dtype
    assert not warned
    assert list(verifying._problems.values()) == [None]


@pytest.mark.drawn(cases=2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["relu", "the median"])
def test_what_cancels_is_no_mistake(name, dtype, warned):
    """Keys and values that have much in common, as at the start of a training."""
    tensors = [(0.02 * torch.randn(1, 2, 31, 16) + torch.randn(16)).to(dtype).requires_grad_() for _ in range(3)]
    call(name, tensors, backend="triton")
    assert not warned


def test_figures_that_are_no_numbers_are_replaced(warned):
    tensors = inputs(grad=False)
    tensors[0][0, 0, 1] = math.nan
    call("relu", tensors, backend="triton")
    assert not warned
    assert list(verifying._problems.values()) == [None]


def test_shared_keys(warned):
    query, key, value = torch.randn(2, 4, 19, 16), torch.randn(2, 2, 23, 16), torch.randn(2, 2, 23, 16)
    tensors = [tensor.requires_grad_() for tensor in (query, key, value)]
    call("the median", tensors, backend="triton", enable_gqa=True)
    assert not warned


#: For each result of a kernel: its kernel, its place among the arguments, and a call that needs it.
RESULTS = {
    "output": ("forward_kernel", 7, "relu"),
    "log-sum-exp": ("forward_kernel", 8, "relu"),
    "rho": ("forward_kernel", 9, "the median"),
    "delta": ("delta_kernel", 2, "relu"),
    "gradient of the query": ("query_kernel", 11, "relu"),
    "gradient of the key": ("key_kernel", 11, "relu"),
    "gradient of the value": ("key_kernel", 12, "relu"),
    "gradient of the mask": ("mask_kernel", 11, "an additive mask"),
}
#: The same of the kernel for whole heads, which does not compute in float32.
IN_ONE_PASS = {
    "gradient of the query, in one pass": ("head_kernel", 12, "relu"),
    "gradient of the key, in one pass": ("head_kernel", 13, "relu"),
    "gradient of the value, in one pass": ("head_kernel", 14, "relu"),
    "gradient of the query, in one pass by the median": ("head_kernel", 12, "the median"),
    "gradient of the key, in one pass with a mask": ("head_kernel", 13, "an additive mask"),
}


def change(monkeypatch, result, factor=1.01):
    """Have a kernel give another result; how often it does is counted."""
    name, place, _ = (RESULTS | IN_ONE_PASS)[result]
    launch, count = triton_kernels.launch, []

    def launch_and_change(kernel, programs, *arguments, **options):
        launch(kernel, programs, *arguments, **options)
        if kernel is getattr(triton_kernels, name):
            arguments[place].mul_(factor)
            count.append(name)

    monkeypatch.setattr(triton_kernels, "launch", launch_and_change)
    return count


@pytest.mark.drawn(cases=6)
@pytest.mark.parametrize(
    ("result", "dtype", "width"),
    # In float16 a hundredth of rho or delta is less than rounding makes of the gradients. The width of 24 has two
    # kernels there.
    [*((result, torch.float32, 16) for result in RESULTS),
     *((result, torch.float16, 24) for result in ("output", "gradient of the query", "gradient of the key")),
     *((result, torch.float16, 16) for result in IN_ONE_PASS)],
)  # fmt: skip
def test_a_kernel_that_is_off_by_a_hundredth_is_caught(result, dtype, width, warned, on_its_device, monkeypatch):
    torch.manual_seed(11)  # so that what rho adds up to is not about 0
    count = change(monkeypatch, result)
    name, tensors = (RESULTS | IN_ONE_PASS)[result][2], inputs(dtype, heads=1, width=width)
    wanted = call(name, tensors, backend="eager")
    out = call(name, tensors)
    assert torch.equal(out, wanted)  # eager computes
    assert count
    assert len(warned) == 1
    assert torch.equal(call(name, tensors), wanted)
    assert len(warned) == 1
    for part in ("backend triton is not used for this case any more", "differs by ", "is allowed", f"width {width}",
                 "On the interpreter, torch ", "Please report this line"):  # fmt: skip
        assert part in warned[0]
    with pytest.raises(lwpf_patch.SettingsError, match=r"its first run of this case was not right .* differs by "):
        call(name, tensors, backend="triton")
    if result == "output" and dtype == torch.float32:
        torch.testing.assert_close(call(name, tensors, backend="triton", verify="off"), 1.01 * wanted)


@pytest.mark.parametrize("off", [1.01, "another score"])
def test_a_median_that_is_not_one_is_caught(off, warned, on_its_device, monkeypatch):
    find = triton_median.find

    def find_another(*arguments, **options):
        centre, ties = find(*arguments, **options)
        return (centre + 0.05 if off == "another score" else centre * off), ties

    monkeypatch.setattr(triton_median, "find", find_another)
    tensors = [tensor.detach().abs().requires_grad_() for tensor in inputs()]
    wanted = call("the median", tensors, backend="eager")
    assert torch.equal(call("the median", tensors), wanted)
    assert "are below its median" in warned[0]


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_kernel_that_fails(backend, warned, on_its_device, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of resource: shared memory")

    tensors = inputs()
    wanted = call("relu", tensors, backend="eager")
    monkeypatch.setattr(triton_kernels, "launch", fail)
    if backend == "triton":
        with pytest.raises(lwpf_patch.SettingsError, match="it failed with RuntimeError: out of resource"):
            call("relu", tensors, backend=backend)
    else:
        assert torch.equal(call("relu", tensors), wanted)
    assert "it failed with RuntimeError: out of resource: shared memory" in warned[0]


def test_when_it_is_checked(warned, on_its_device, monkeypatch):
    tensors = inputs(grad=False)
    call("relu", tensors)
    count = change(monkeypatch, "output")
    call("relu", tensors)
    assert len(count) == 1  # the case is known; no part was computed
    assert not warned
    call("relu", [tensor.requires_grad_() for tensor in tensors])  # another case: with gradients
    assert len(warned) == 1
    verifying.forget_cases()
    tensors = inputs(grad=False)
    call("relu", tensors, verify="off")
    assert len(warned) == 1
    monkeypatch.undo()
    call("relu", tensors)


def test_always(warned, on_its_device, monkeypatch):
    tensors = inputs(grad=False)
    func_d = HostFuncD("relu", verify="always")
    func_d.scaled_dot_product_attention(*tensors)
    change(monkeypatch, "output")
    func_d.scaled_dot_product_attention(*tensors)
    assert len(warned) == 1


@pytest.mark.drawn(cases=1)
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_it_disturbs_nothing(around, warned):
    tensors = inputs()
    state = torch.get_rng_state()
    with around():
        out = call("the median", tensors, backend="triton")
    assert not warned
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.grad is None for tensor in tensors)
    if out.requires_grad:
        torch.autograd.grad(out.sum(), tensors)


@pytest.mark.drawn(cases=1)
@pytest.mark.parametrize("result", [None, "gradient of the key"])
def test_under_torch_compile_it_is_checked_while_it_is_traced(result, warned, on_its_device, monkeypatch):
    if result is not None:
        change(monkeypatch, result)
    tensors = inputs()
    torch._dynamo.reset()
    graphs = []

    def keep(graph, examples):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *tensors: call("relu", tensors), fullgraph=True, backend=keep)
    out = compiled(*tensors)
    assert len(warned) == (result is not None)
    torch.testing.assert_close(out, call("relu", tensors, backend="eager"))
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("triton_attention" in target for target in targets) == (result is None)
    compiled(*tensors)
    assert len(verifying._problems) == 1


@pytest.mark.drawn(cases=1)
@pytest.mark.parametrize(("dynamic", "func_d"), [(None, "relu"), (True, "pfu:mu=0.1,bias=-0.3,sigma=0")])
def test_what_torch_compile_leaves_open_is_no_obstacle(func_d, dynamic, warned, on_its_device):
    """Lengths from the second on, with dynamic=True widths, heads and numbers too; a graph is for many lengths."""
    torch._dynamo.reset()
    graphs = []
    module = HostFuncD(func_d)

    def keep(graph, examples):
        graphs.append(graph)
        return graph.forward

    def attend(query, key, value, scale, n):
        return lwpf_attention(query, key, value, func_d=module, scale=scale, sep=f"softmax_n:n={n}", enable_gqa=True)

    def plainly(*tensors):
        return module.scaled_dot_product_attention(*tensors, dropout_p=0.0)

    for function, numbers in ((functools.partial(attend, n=1.0), (0.3,)), (plainly, ())):
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=keep)
        for length in (9, 13, 17):
            query, key, value = (torch.randn(1, 1, length, 16) for _ in range(3))
            out, wanted = (each(query, key, value, *numbers) for each in (compiled, function))
            torch.testing.assert_close(out, wanted)
    assert not warned
    assert verifying._problems  # it was checked
    assert set(verifying._problems.values()) == {None}
    assert len(graphs) <= 4
    assert all("triton_attention" in graph.code for graph in graphs)


@pytest.mark.drawn(days=2)
def test_the_table_of_doctor(capsys, monkeypatch):
    from lwpf_patch.cli import doctor

    monkeypatch.setattr(verifying, "TYPICAL", [(*each[:-1], 19) for each in verifying.TYPICAL[:3]])
    assert doctor.check_kernels(["cpu"])
    right = capsys.readouterr().out
    assert right.count("right") == 3
    assert "float32, width 64, threshold 0, bias 0, no mask, forward and backward" in right
    change(monkeypatch, "output")
    verifying.forget_cases()
    assert not doctor.check_kernels(["cpu"])
    assert "WRONG: " in capsys.readouterr().out


def test_graphs_are_not_captured_with_it(monkeypatch, warned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call("relu", inputs(), backend="triton")
    assert not verifying._problems
