"""The Triton backend: in Triton's interpreter, compiled ahead of time for GPUs, and on a GPU where there is one.

The comparisons themselves are in tests/triton_cases.py. They run in a process of their own: whether Triton interprets
is settled when it is first imported, for all kernels there are, and torch.compile in another test must not see it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import needs_gpu, needs_triton
from drawing import are_drawn

import lwpf_patch
from lwpf_patch import ReLU, backends, lwpf_attention
from lwpf_patch.backends import triton as triton_backend

HERE = Path(__file__).parent
BACKENDS = Path(triton_backend.__file__).parent
CASES = (str(HERE / "triton_cases.py"), "-c", str(HERE.parent / "pyproject.toml"), "-p", "no:cacheprovider", "-q", "-s")
#: The cases in parts of about the same time, by name, so that they run side by side.
ORACLE, MEDIAN = "test_equals or test_the_attention or test_any_scale", "test_the_median or test_the_gradient"
HEADS_IN_ONE_PASS = "test_heads or test_one_pass"
PARTS = {
    "oracle": ORACLE,
    "median": MEDIAN,
    "heads": HEADS_IN_ONE_PASS,
    "others": f"not ({ORACLE} or {MEDIAN} or {HEADS_IN_ONE_PASS})",
}


@pytest.mark.drawn(cases=1)
@needs_triton
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", PARTS)
def test_the_cases_in_the_interpreter(part, python, request):
    cases = (*CASES, "-k", PARTS[part], "--cases", "day" if are_drawn(request.config) else "all")
    result = python("-m", "pytest", *cases, check=False, cwd=HERE.parent, TRITON_INTERPRET="1", LWPF_NATIVE="off")
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.drawn(days=3)
@needs_triton
@pytest.mark.timeout(900)
def test_the_check_at_the_first_call(python, request):
    cases = (str(HERE / "verify_cases.py"), *CASES[1:], "--cases", "day" if are_drawn(request.config) else "all")
    result = python("-m", "pytest", *cases, check=False, cwd=HERE.parent, TRITON_INTERPRET="1", LWPF_NATIVE="off")
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

COMPILING = str(HERE / "triton_compiled.py")
#: What the code of the kernels was made of, with which Triton; RECORD_INSTRUCTIONS=1 writes it anew.
INSTRUCTIONS = HERE / "instructions.json"

#: Of cases, what follows the width, up to the causality: of those whose backward pass has the kernel for whole heads.
HEADS = [
    (0.0, None, 0.1, 197, 0.0, False),
    (None, None, 0.1, 197, 0.0, True),
    (None, "bool", 0.0, 197, 0.0, False),
    (None, "float32", 0.0, 256, 0.0, False),
    (0.0, None, 0.0, 100, 0.0, False),
    (None, "float32", 0.1, 100, 0.0, False),
    (0.0, None, 0.0, 49, 0.0, False),
    (None, "bfloat16", 0.1, 49, 0.0, True),
]
#: Cases as tests/triton_compiled.py takes them: dtype, width, mu, dtype of the mask, dropout; length, n, causality,
#: heads that share keys, and the one kernel that is wanted. And how many kernels these are.
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
            ("bfloat16", 64, None, "bfloat16", 0.0),
            *(("bfloat16", 64, *rest, 1, "head_kernel") for rest in HEADS),
            ("float16", 32, 0.0, None, 0.0, 197, 0.0, False, 1, "head_kernel"),
        ],
        61,
    ),
    80: (
        [
            ("bfloat16", 64, 0.0, "bfloat16", 0.0),
            ("bfloat16", 128, None, None, 0.0),
            ("bfloat16", 64, 0.0, None, 0.0),
            ("bfloat16", 64, None, None, 0.0, 257),
            *(("bfloat16", 64, *rest, 1, "head_kernel") for rest in HEADS),
            ("float16", 32, None, None, 0.0, 197, 0.0, False, 1, "head_kernel"),
        ],
        24,
    ),
}
#: What a block may have of shared memory: of the kernel for whole heads where it is used, and of the others anywhere.
ROOM = {90: 227, 80: 163}
TOOLS = ("cuobjdump", "nvdisasm")

#: What kernels are planned for.
CAPABILITIES = [80, 86, 90, 120]

_figures: dict[int, list[dict]] = {}
_plans: dict[int, list[dict]] = defaultdict(list)


def sources() -> str:
    """Returns the hash of what the kernels' code is made of, but for Triton."""
    files = [*map(Path, (triton_backend.__file__, COMPILING)), *sorted(BACKENDS.glob("triton_*.py"))]
    hashed = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    hashed.update(json.dumps([COMPILED[capability] for capability in sorted(COMPILED)]).encode())
    return hashed.hexdigest()


def figures_of(python, capability: int, config: pytest.Config) -> list[dict]:
    """Returns the figures of all compiled kernels of a capability; they are compiled once.

    With the cases of a day that is skipped where sources and Triton are those of the record, which was compiled, too.
    """
    import triton

    recorded = json.loads(INSTRUCTIONS.read_text())
    if are_drawn(config) and (recorded["triton"], recorded.get("sources")) == (triton.__version__, sources()):
        pytest.skip("the kernels are those whose compiled code is on record; --cases all compiles them again")
    if not all((Path(triton.__file__).parent / f"backends/nvidia/bin/{tool}").exists() for tool in TOOLS):
        pytest.skip(f"this Triton does not bring {' and '.join(TOOLS)}")
    if capability not in _figures:
        variants, number = COMPILED[capability]
        result = python(COMPILING, json.dumps([capability]), "compile", json.dumps(variants))
        found = [json.loads(line) for line in result.stdout.splitlines()]
        assert len(found) == number
        _figures[capability] = found
    return _figures[capability]


def name_of(figures: dict) -> str:
    return " ".join(map(str, (figures["kernel"], *figures["case"])))


@needs_triton
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", COMPILED)
def test_the_kernels_compile_and_spill_nothing(python, capability, request):
    """Those of the common widths, with the pass over the values and without, with masks; no GPU is needed."""
    import triton

    # How registers are used is Triton's business: of a version that was not planned for, a few bytes are no fault.
    most_spilled = 0 if triton.__version__ == json.loads(INSTRUCTIONS.read_text())["triton"] else 64
    for figures in figures_of(python, capability, request.config):
        name, kernel, shared = name_of(figures), figures["kernel"], figures["shared"]
        print(f"sm_{capability} {name}: {figures['registers']} registers, {shared} bytes shared")
        assert figures["spilled"] <= most_spilled, f"{name} spills {figures['spilled']} bytes"
        # The smaller Amperes have 99 KB; none of them runs the kernel for whole heads.
        most = ROOM[capability] if kernel == "head_kernel" else 99
        assert shared <= most * 1024, f"{name} takes {shared} bytes of shared memory"
        # For each loop over keys once: a thread has no more scores than its part, so that none is collected twice.
        assert figures["collecting"] == (2 if kernel == "count_kernel" else 0), name
        # One instruction makes the scores in all of them, so that they are the same bit by bit.
        expected = ["wgmma.mma_async"] if capability == 90 else ["mma.sync"]
        if figures["case"][1] >= 64:  # of narrower ones not all products are of scores
            assert figures["products"] == expected, name


@needs_triton
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", COMPILED)
def test_the_kernels_take_no_more_instructions_than_before(python, capability, request):
    """The machine instructions of all threads for a score, in the loop over full tiles, and those of a whole thread."""
    import triton

    recorded = json.loads(INSTRUCTIONS.read_text())
    counted = [each for each in figures_of(python, capability, request.config) if "per_score" in each]
    found = {name_of(each): [each["per_score"], each["instructions"]] for each in counted}
    if os.environ.get("RECORD_INSTRUCTIONS") == "1":
        recorded |= {"triton": triton.__version__, "sources": sources(), str(capability): found}
        lines = json.dumps(recorded, indent=1, sort_keys=True)
        INSTRUCTIONS.write_text(re.sub(r"\[\s+([\d.]+),\s+(\d+)\s+\]", r"[\1, \2]", lines) + "\n")
    if recorded["triton"] != triton.__version__:
        pytest.skip(f"the figures are those of Triton {recorded['triton']}, and this is {triton.__version__}")
    before = recorded[str(capability)]
    assert found.keys() == before.keys(), f"other kernels: RECORD_INSTRUCTIONS=1 writes {INSTRUCTIONS.name} anew"
    for name, numbers in found.items():
        print(f"sm_{capability} {name}: {numbers[0]} for a score, {numbers[1]} in all; before {before[name]}")
        for what, now, then in zip(("for a score", "in all"), numbers, before[name], strict=True):
            assert now <= 1.1 * then, f"sm_{capability} {name}: {now} instructions {what}, and {then} before"


def plans(python) -> dict[int, list[dict]]:
    """Returns which kernels the backend starts on GPUs of some capabilities; they are planned once."""
    if not _plans:
        result = python(COMPILING, json.dumps(CAPABILITIES), "plan", json.dumps([*dict.fromkeys([*PLANS, *LENGTHS])]))
        for line in map(json.loads, result.stdout.splitlines()):
            _plans[line["capability"]].append(line)
    return _plans


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("kernel", triton_backend._TILES)
def test_a_length_that_stands_for_others_has_their_tiles(kernel, capability):
    """So that a kernel which was checked with one has been checked, in the tiles that it computes in, with all."""
    lengths = [*range(1, 1300), *torch.randint(1300, 100_000, (50,)).tolist()]
    standing = {length: triton_backend.standing_for(length) for length in lengths}
    assert len(set(standing.values())) == 7
    for most in (triton_backend.LARGEST_HEAD, triton_backend._LARGE):  # which kernels there are depends on these
        assert all((length <= most) == (standing[length] <= most) for length in lengths)
    if kernel == "head":
        lengths = [length for length in lengths if length <= triton_backend.LARGEST_HEAD]
    for dtype, masked in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
        for width in (64, 128):
            tile = functools.partial(triton_backend.tile_of, kernel, dtype, width, capability, masked)
            for length, keys in [*zip(lengths, reversed(lengths), strict=True), *((n, n) for n in lengths)]:
                assert tile(length, keys) == tile(standing[length], standing[keys]), (length, keys)


#: Cases whose tiles are counted, plain ones of many lengths.
LENGTHS = [("bfloat16", width, 0.0, None, 0.0, n) for width in (64, 128) for n in (196, 197, 201, 257, 577)]


@needs_triton
@pytest.mark.parametrize("capability", COMPILED)
def test_tiles_compute_few_scores_in_vain(python, capability):
    """By the programs that are started, their tiles, and what of the other sequence full tiles leave."""
    computed = [each for each in plans(python)[capability] if "own" in each and tuple(each["case"]) in LENGTHS]
    assert len(computed) == 2 * 5 * 3 - 3
    for each in computed:
        _, width, *_, length = each["case"]
        step = each["KEYS" if each["own"] == "ROWS" else "ROWS"]
        rest = step if each["kernel"] == "head_kernel" else each["rest"]
        other = length // step * step + -(-(length % step) // rest) * rest
        ratio = each["programs"] * each[each["own"]] * other / (64 * 12 * length**2)
        print(f"sm_{capability} {each['kernel']}, width {width}, length {length}: {ratio:.2f}")
        # A smaller rest, for whole heads, takes as many instructions as a full tile.
        assert 1 <= ratio <= (1.5 if each["kernel"] == "head_kernel" else 1.4), each


TWO = ["query_kernel", "key_kernel"]
ONE, DELTA = ["head_kernel"], ["delta_kernel"]
#: Which kernels a backward pass is made of.
PLANS = {
    ("bfloat16", 64, 0.0, None, 0.0, 197): ONE,
    ("bfloat16", 64, 0.0, None, 0.0, 256): ONE,
    ("bfloat16", 64, 0.0, None, 0.0, 257): DELTA + TWO,
    ("bfloat16", 128, 0.0, None, 0.0, 197): DELTA + TWO,
    ("bfloat16", 40, 0.0, None, 0.0, 197): DELTA + TWO,
    ("bfloat16", 32, 0.0, None, 0.0, 1): ONE,
    ("float16", 64, 0.0, None, 0.0, 128): ONE,
    ("float32", 64, 0.0, None, 0.0, 197): DELTA + TWO,
    ("bfloat16", 64, None, None, 0.0, 197): DELTA + ONE,
    ("bfloat16", 64, 0.0, "bool", 0.0, 197): ONE,
    ("bfloat16", 64, 0.0, "bfloat16", 0.0, 197): [*DELTA, *ONE, "mask_kernel"],
    ("bfloat16", 64, 0.0, None, 0.1, 197, 0.0, True): ONE,
    ("bfloat16", 64, 0.0, "bool", 0.1, 128): ONE,
    ("bfloat16", 64, 0.0, "bool", 0.1, 129): DELTA + TWO,
    ("bfloat16", 64, 0.0, None, 0.0, 197, 0.0, False, 2): DELTA + TWO,
}


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_which_kernels_a_backward_pass_has(python, capability):
    """One for whole heads where it spills no register, if the device has the shared memory for it."""
    started: dict[tuple, list[str]] = defaultdict(list)
    for each in plans(python)[capability]:
        started[tuple(each["case"])].append(each["kernel"])
    for case, expected in PLANS.items():
        own = started[case][started[case].index("forward_kernel") + 1 :]
        if capability in (86, 120):
            expected = [*DELTA, *TWO, *(name for name in expected if name == "mask_kernel")]
        assert own == expected, case


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
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("func_d", ["relu", "pfu"])
def test_the_gpu_computes_the_same_every_time(func_d, masked):
    inputs = [torch.randn(8, 12, 197, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    mask = torch.randn(12, 197, 197, device="cuda", requires_grad=True) if masked else None
    wanted = [*inputs, mask] if masked else inputs
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        out = lwpf_attention(*inputs, mask, 0.1, func_d=func_d, training=False, backend="triton")
        results.append([out, *torch.autograd.grad(out.float().square().sum(), wanted)])
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
