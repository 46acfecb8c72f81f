"""The Triton backend: in Triton's interpreter, compiled ahead of time for GPUs, and on a GPU where there is one.

The comparisons themselves are in tests/triton_cases.py. They run in a process of their own: whether Triton interprets
is settled when it is first imported, for all kernels there are, and torch.compile in another test must not see it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import needs_gpu, needs_triton

import lwpf_patch
from lwpf_patch import ReLU, backends, lwpf_attention
from lwpf_patch.backends import triton as triton_backend

HERE = Path(__file__).parent
CASES = (str(HERE / "triton_cases.py"), "-c", str(HERE.parent / "pyproject.toml"), "-p", "no:cacheprovider", "-q", "-s")
#: The cases in parts of about the same time, by name, so that they run side by side.
ORACLE, MEDIAN = "test_equals or test_the_attention or test_any_scale", "test_the_median or test_the_gradient"
PARTS = {"oracle": ORACLE, "median": MEDIAN, "others": f"not ({ORACLE} or {MEDIAN})"}


@needs_triton
@pytest.mark.timeout(900)  # ten seconds or so, where nothing else computes
@pytest.mark.parametrize("part", PARTS)
def test_the_cases_in_the_interpreter(part, python):
    result = python("-m", "pytest", *CASES, "-k", PARTS[part], check=False, cwd=HERE.parent, TRITON_INTERPRET="1")
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@needs_triton
@pytest.mark.timeout(900)
def test_the_check_at_the_first_call(python):
    cases = (str(HERE / "verify_cases.py"), *CASES[1:])
    result = python("-m", "pytest", *cases, check=False, cwd=HERE.parent, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_on_the_cpu_it_says_why_not():
    query = torch.randn(5, 16)
    with pytest.raises(lwpf_patch.SettingsError, match=r"backend 'triton' cannot do what is asked: .* are on cpu; use"):
        lwpf_attention(query, query, query, func_d="relu", backend="triton")
    chosen, why = backends.choose("auto", backends.Call(query, query, query, ReLU()))
    assert (chosen.name, why) == ("eager", "there are few scores")


@pytest.mark.parametrize(("version", "new"), [("3.4.0", False), ("3.5.1", True), ("3.10.0+git1", True), ("4.0", True)])
def test_an_old_triton_is_left_alone(monkeypatch, version, new):
    monkeypatch.setattr(triton_backend, "_triton_version", lambda: version)
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: object())
    reason = triton_backend.why_no_triton()
    assert reason is None if new else f"Triton is of version {version}" in str(reason)


def test_the_kernels_are_imported_when_they_compute(python):
    code = "import sys, lwpf_patch.attention; print([name for name in sys.modules if name.endswith('triton_kernels')])"
    assert python(code=code).stdout.strip() == "[]"
    code = "import sys, lwpf_patch.cli; print('torch' in sys.modules, 'triton' in sys.modules)"
    assert python(code=code).stdout.strip() == "False False"


# --- compiled ahead of time -------------------------------------------------------------------------------------------

COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path

import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lwpf_patch.backends import triton as backend, triton_kernels

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8",
}
backend.capability = lambda device: divmod(int(sys.argv[1]), 10)
COLLECTING = "atom.relaxed.gpu.global.add.u32 place"  # what a thread does that collects scores near the median
launched = []
programs = {}

def launch(kernel, number, *values, **options):
    programs[kernel] = number
    launched.append((kernel, values, options))

triton_kernels.launch = launch

def launches(dtype, width, mu, of_mask, dropout_p, length=197, n=0.0):
    '''Has the backend start its kernels, as for a vision transformer, without starting them.'''
    launched.clear()
    packed = torch.empty(64, length, 3, 12, width, dtype=dtype, device="meta")
    inputs = packed.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if of_mask is None else torch.empty(64, 12, length, length, dtype=of_mask, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta") if dropout_p else None
    options = (dropout_p, False, width**-0.5, mu, mu)
    results = backend._forward(*inputs, mask, *options, n, None, seed)
    needs_grad = mask is not None and mask.is_floating_point()
    backend._backward(results[0], *inputs, mask, None, seed, *results, *options, needs_grad)
    return list(launched)

def compile(kernel, values, options, capability):
    compiling = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    given = dict(zip(kernel.arg_names, values)) | {k: v for k, v in options.items() if k not in compiling}
    signature, constants, hints = {}, {}, {}
    for position, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params)):
        value = given[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = "fp32"
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, int):
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            hints[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compiling)

def resources(compiled):
    '''Reads off a kernel's code the registers of a thread, its bytes of stack, and the block's shared memory.'''
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\\d+) STACK:(\\d+) .*LOCAL:(\\d+)", shown).groups()
    text = compiled.asm["ptx"]
    return (
        int(registers), int(stack) + int(local), compiled.metadata.shared, text.count(COLLECTING),
        [name for name in ("wgmma.mma_async", "mma.sync") if name in text],
    )

for dtype, width, mu, of_mask, dropout_p, *length in json.loads(sys.argv[2]):
    of_mask = of_mask and getattr(torch, of_mask)
    for kernel, values, options in launches(getattr(torch, dtype), width, mu, of_mask, dropout_p, *length):
        if options.get("DIGIT", 1) == 1 and kernel.__name__ not in ("delta_kernel", "sample_kernel", "result_kernel"):
            compiled = compile(kernel, values, options, int(sys.argv[1]))
            print(json.dumps((kernel.__name__, dtype, width, mu, str(of_mask), dropout_p, *resources(compiled))))
"""


#: Dtype, width, mu (that of ReLU, or the median), dtype of the mask, dropout, the length if it is not that of a vision
#: transformer, and n of softmax_n; and how many kernels these are.
COMPILED = {
    90: (
        [
            *(("bfloat16", width, mu, None, 0.0) for width in (64, 128) for mu in (0.0, None)),
            ("bfloat16", 64, None, "bfloat16", 0.1),
            ("bfloat16", 128, 0.0, "bool", 0.1),
            ("bfloat16", 64, 0.0, None, 0.0, 4096),
            ("bfloat16", 128, 0.0, None, 0.1, 4096),
            ("bfloat16", 64, 0.0, None, 0.0, 197, 1.0),
            ("bfloat16", 128, None, None, 0.0, 197, 1.0),
            *(("bfloat16", width, mu, None, 0.0, 257) for width, mu in ((64, 0.0), (64, None), (128, 0.0))),
        ],
        50,
    ),
    80: (
        [
            ("bfloat16", 64, 0.0, "bfloat16", 0.0),
            ("bfloat16", 128, None, None, 0.0),
            ("float16", 64, 0.0, None, 0.0),
            ("bfloat16", 64, None, None, 0.0, 257),
        ],
        17,
    ),
}


@needs_triton
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", COMPILED)
def test_the_kernels_compile_and_spill_nothing(python, capability):
    """Those of the common widths, with the pass over the values and without, with masks; no GPU is needed."""
    import triton

    if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this Triton brings no cuobjdump")
    variants, number = COMPILED[capability]
    result = python(str(capability), json.dumps(variants), code=COMPILE)
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == number
    for *name, registers, spilled, shared, collecting, products in kernels:
        print(f"sm_{capability} {name}: {registers} registers, {shared} bytes shared")
        assert spilled == 0, f"{name} spills {spilled} bytes"
        assert shared <= 99 * 1024, f"{name} takes {shared} bytes of shared memory; the smaller Amperes have 99 KB"
        # For each loop over keys once: a thread has no more scores than its part, so that none is collected twice.
        assert collecting == (2 if name[0] == "count_kernel" else 0), name
        # One instruction makes the scores in all of them, so that they are the same bit by bit.
        assert products == (["wgmma.mma_async"] if capability == 90 else ["mma.sync"]), name


PLAN = (
    COMPILE.split("def compile(")[0]
    + """
own = {"forward_kernel": "ROWS", "query_kernel": "ROWS", "key_kernel": "KEYS"}
for width in (64, 128):
    for length in (196, 197, 201, 257, 577):
        for kernel, values, options in launches(torch.bfloat16, width, 0.0, None, 0.0, length):
            if kernel.__name__ in own:
                axis = own[kernel.__name__]
                of_program, step = options[axis], options["KEYS" if axis == "ROWS" else "ROWS"]
                rest = triton_kernels.REST.value
                other = length // step * step + -(-(length % step) // rest) * rest
                print(json.dumps((kernel.__name__, width, length, programs[kernel] * of_program * other)))
"""
)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("kernel", triton_backend._TILES)
def test_a_length_that_stands_for_others_has_their_tiles(kernel, capability):
    """So that a kernel which was checked with one has been checked, in the tiles that it computes in, with all."""
    lengths = [*range(1, 1300), *torch.randint(1300, 100_000, (50,)).tolist()]
    standing = {length: triton_backend.standing_for(length) for length in lengths}
    assert len(set(standing.values())) == 3
    for dtype, masked in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
        for width in (64, 128):
            tile = functools.partial(triton_backend.tile_of, kernel, dtype, width, capability, masked)
            for length, keys in [*zip(lengths, reversed(lengths), strict=True), *((n, n) for n in lengths)]:
                assert tile(length, keys) == tile(standing[length], standing[keys]), (length, keys)


@needs_triton
@pytest.mark.parametrize("capability", COMPILED)
def test_tiles_compute_few_scores_in_vain(python, capability):
    """By the programs that are started, their tiles, and what of the other sequence full tiles leave."""
    result = python(str(capability), code=PLAN)
    computed = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(computed) == 2 * 5 * 3
    for kernel, width, length, scores in computed:
        ratio = scores / (64 * 12 * length**2)
        print(f"sm_{capability} {kernel}, width {width}, length {length}: {ratio:.2f}")
        assert 1 <= ratio <= 1.4, (kernel, width, length)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def exact(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Draws figures whose inner products every dtype computes without rounding, so that all agree on every tie."""
    return (torch.randint(-128, 129, shape, device="cuda") / 128).to(dtype).requires_grad_()


def gradients(func_d, inputs, cotangent, backend, **options):
    out = lwpf_attention(*inputs, func_d=func_d, training=False, backend=backend, scale=1.0, **options)
    return [out, *torch.autograd.grad(out, inputs, cotangent.to(out))]


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_the_cases_on_the_gpu(python):
    result = python("-m", "pytest", *CASES, check=False, cwd=HERE.parent)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(64, 12, 197, 197, 64), (2, 4, 1024, 1024, 64), (1, 4, 1500, 700, 128)], ids=str)
@pytest.mark.parametrize("func_d", ["relu", "pfu", "pfu:mu=0.1,bias=-0.5,sigma=0"])
@pytest.mark.parametrize("how", ["plain", "causal", "padding"])
def test_large_sizes_on_the_gpu(func_d, shape, dtype, how):
    """Against the eager form in float64; errors may be a small factor of those of the eager form in the same dtype."""
    batch, heads, length, keys, width = shape
    query, key, value = (exact(batch, heads, n, width, dtype=dtype) for n in (length, keys, keys))
    options = {"is_causal": how == "causal"}
    if how == "padding":
        options["attn_mask"] = torch.arange(keys, device="cuda") < torch.randint(
            1, keys, (batch, 1, 1, 1), device="cuda"
        )
    cotangent = torch.randn(batch, heads, length, width, device="cuda").to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (query, key, value)]
    wanted = gradients(func_d, wide, cotangent, "eager", **options)
    ours = gradients(func_d, (query, key, value), cotangent, "triton", **options)
    theirs = gradients(func_d, (query, key, value), cotangent, "eager", **options)
    for name, one, other, true in zip(("output", "query", "key", "value"), ours, theirs, wanted, strict=True):
        error, allowed = ((t.double() - true).abs().max() / true.abs().max() for t in (one, other))
        print(f"{name}: error {error:.1e}, of the eager form {allowed:.1e}")
        assert error <= 8 * (allowed + torch.finfo(dtype).eps / 2), name


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("func_d", ["relu", "pfu"])
def test_memory_on_the_gpu(func_d):
    query, key, value = (torch.randn(1, 8, 8192, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    inputs = [t.requires_grad_() for t in (query, key, value)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(func_d, inputs, torch.ones_like(value), "triton")
    used = torch.cuda.max_memory_allocated() - before
    print(f"{func_d}: {used / 2**20:.0f} MB; the scores would be {8 * 8192**2 * 2 / 2**20:.0f} MB")
    assert used < 8 * 8192**2 * 2 / 4


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("func_d", ["relu", "pfu"])
def test_the_gpu_computes_the_same_every_time(func_d):
    inputs = [torch.randn(8, 12, 197, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    mask = torch.randn(12, 197, 197, device="cuda", requires_grad=True)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        out = lwpf_attention(*inputs, mask, 0.1, func_d=func_d, training=False, backend="triton")
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [*inputs, mask])])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("func_d", ["relu", "pfu"])
def test_a_cuda_graph_holds_it(func_d):
    """Both passes and the search for the median; a replay sees new figures, and draws a new dropout."""
    inputs = [torch.randn(4, 6, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def step(dropout_p):
        out = lwpf_attention(*inputs, None, dropout_p, func_d=func_d, training=False, backend="triton")
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    for dropout_p in (0.0, 0.2):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(dropout_p)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = step(dropout_p)
        with torch.no_grad():
            for tensor in inputs:
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        first = [tensor.clone() for tensor in held]
        graph.replay()
        if dropout_p:
            assert not torch.equal(first[0], held[0])
        else:
            assert all(torch.equal(one, two) for one, two in zip(first, step(0.0), strict=True))


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_on_the_gpu(dtype):
    query, key, value = (torch.randn(2, 4, 99, 64, device="cuda") for _ in range(3))
    with torch.autocast("cuda", dtype=dtype):
        out = lwpf_attention(query, key, value, func_d="pfu", training=False)
    assert out.dtype == dtype
    direct = lwpf_attention(
        query.to(dtype), key.to(dtype), value.to(dtype), func_d="pfu", training=False, backend="triton"
    )  # fmt: skip
    assert torch.equal(out, direct)


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_auto_takes_it_on_the_gpu():
    query = torch.randn(2, 4, 99, 64, device="cuda")
    call = backends.Call(query, query, query, ReLU())
    assert backends.choose("auto", call)[0].name == "triton"
    assert backends.choose("auto", call._replace(query=query.double()))[0].name == "eager"
    assert backends.choose("auto", call._replace(masking="paper"))[0].name == "eager"
