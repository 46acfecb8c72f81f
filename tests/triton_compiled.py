"""Compile the Triton backend's kernels ahead of time, as it would launch them, and say what their code is made of.

A program of its own: ``python tests/triton_compiled.py CAPABILITIES WHAT CASES``. No GPU is needed, but a Triton that
brings its disassemblers. Each case is a list of dtype, width, mu (None: the median), dtype of the mask, dropout and, if
they are not those of a vision transformer, length, n of softmax_n, causality, how many heads share keys, and the one
kernel that is wanted of the case.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

#: A kernel, its arguments, and its options, those of compilation among them.
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]

#: What a thread does that collects scores near the median.
COLLECTING = "atom.relaxed.gpu.global.add.u32 place"
#: Those that compute no scores.
SMALL = ("delta_kernel", "sample_kernel", "result_kernel")
#: Which number of a tile each program of a kernel has for itself.
OWN = {"forward_kernel": "ROWS", "query_kernel": "ROWS", "key_kernel": "KEYS", "head_kernel": "ROWS"}


def launches(
    dtype: str,
    width: int,
    mu: float | None = 0.0,
    of_mask: str | None = None,
    dropout_p: float = 0.0,
    length: int = 197,
    n: float = 0.0,
    is_causal: bool = False,
    group: int = 1,
    only: str = "",
) -> list[tuple[Launch, int]]:
    """Has the backend start its kernels, without starting them; returns them and how many programs each has."""
    import torch

    from lwpf_patch.backends import triton as backend
    from lwpf_patch.backends import triton_kernels

    launched: list[tuple[Launch, int]] = []
    launch = triton_kernels.launch
    triton_kernels.launch = lambda kernel, number, *values, **options: launched.append(
        ((kernel, values, options), number)
    )
    try:
        packed = torch.empty(64, length, 3, 12, width, dtype=getattr(torch, dtype), device="meta")
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        key, value = key[:, : 12 // group], value[:, : 12 // group]
        mask = None
        if of_mask is not None:
            mask = torch.empty(64, 12, length, length, dtype=getattr(torch, of_mask), device="meta")
        seed = torch.empty((), dtype=torch.int64, device="meta") if dropout_p else None
        options = (dropout_p, is_causal, width**-0.5, mu, mu)
        results = backend._forward(query, key, value, mask, *options, n, None, seed)
        needs_grad = mask is not None and mask.is_floating_point()
        backend._backward(
            results[0], query, key, value, mask, None, seed, *results, *options, needs_grad
        )  # fmt: skip
    finally:
        triton_kernels.launch = launch
    return [each for each in launched if only in each[0][0].__name__]


def compiled(launched: Launch, capability: int) -> Any:
    """Returns a kernel, compiled for a device of this capability."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {
        torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
        torch.uint8: "u8",
    }  # fmt: skip
    kernel, values, options = launched
    compiling = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    given = dict(zip(kernel.arg_names, values, strict=False)) | {k: v for k, v in options.items() if k not in compiling}
    signature, constants, hints = {}, {}, {}
    for position, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = given[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = "fp32"
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + types[value.dtype]
        elif isinstance(value, int):
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            hints[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compiling)


def shown(tool: str, option: str, code: bytes) -> str:
    """Returns what one of Triton's tools says of machine code."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code)
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(code: bytes) -> tuple[int, int]:
    """Reads off a kernel's code the registers of a thread, and its bytes of stack and local memory."""
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", shown("cuobjdump", "-res-usage", code)).groups()
    )
    return registers, stack + local


def loops(code: bytes) -> tuple[int, list[tuple[int, float]]]:
    """Counts the machine instructions of a thread.

    Returns:
        How many there are; and of each loop with products of matrices, how many it has, and the multiplications of a
        warp in it. A loop is what lies between a label and a jump back to it.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in shown("nvdisasm", "-c", code).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    found = []
    for place, instruction in enumerate(instructions):
        if (jump := re.search(r"BRA .*?\(\.?(L_x_\d+)\)", instruction)) and labels["." + jump[1]] <= place:
            body = instructions[labels["." + jump[1]] : place + 1]
            # A warp's part: 16 x 8 x 16, or of Hopper's own, which four warps make together, 16 x N x 16.
            ours = [re.search(r"HGMMA\.64x(\d+)x16|HMMA\.16816", line) for line in body]
            if products := sum(256.0 * int(each[1] or 8) for each in ours if each):
                found.append((len(body), products))
    return len(instructions), found


def counted(case: Any) -> bool:
    """Says whether instructions are counted: of the kernels of usual cases only, as it takes half a second each."""
    _, width, _, of_mask, dropout_p, length, *rest = (*case, 197)[: max(6, len(case))]
    return width == 64 and of_mask in (None, "bfloat16") and not dropout_p and length <= 257 and not any(rest)


def describe(launched: Launch, found: Any, count: bool) -> dict[str, Any]:
    """Returns the figures of a compiled kernel."""
    kernel, _, options = launched
    code, text = found.asm["cubin"], found.asm["ptx"]
    registers, spilled = resources(code)
    counts = {}
    if count:
        number, inner = loops(code)
        main = max(inner, key=lambda loop: loop[1])[0]  # that of full tiles
        per_score = main * 32 * options["num_warps"] / (options["ROWS"] * options["KEYS"])
        counts = {"instructions": number, "per_score": round(per_score, 2)}
    return {
        "kernel": kernel.__name__,
        "registers": registers,
        "spilled": spilled,
        "shared": found.metadata.shared,
        "collecting": text.count(COLLECTING),
        "products": [name for name in ("wgmma.mma_async", "mma.sync") if name in text],
        **counts,
    }


def divmod_of(capability: int, device: object) -> tuple[int, int]:
    return divmod(capability, 10)


def main() -> None:
    """Prints a line of JSON for each kernel of each case: its figures, or its tiles and programs."""
    from lwpf_patch.backends import triton as backend
    from lwpf_patch.backends import triton_kernels

    capabilities, what, cases = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    if what == "plan":
        for capability, case in itertools.product(capabilities, cases):
            backend.capability = functools.partial(divmod_of, capability)
            for (kernel, _, options), programs in launches(*case):
                line = {"capability": capability, "kernel": kernel.__name__, "case": case, "programs": programs}
                if kernel.__name__ in OWN:
                    line |= {"own": OWN[kernel.__name__], "rest": triton_kernels.REST.value}
                    line |= {name: options[name] for name in ("ROWS", "KEYS")}
                print(json.dumps(line))
        return
    (capability,) = capabilities
    backend.capability = functools.partial(divmod_of, capability)
    done = []
    with ThreadPoolExecutor(2) as pool:  # the disassembler is another process, and works beside the compiler
        for case in cases:
            for launched, _ in launches(*case):
                if launched[2].get("DIGIT", 1) == 1 and launched[0].__name__ not in SMALL:
                    found = compiled(launched, capability)
                    done.append((case, pool.submit(describe, launched, found, counted(case))))
        for case, described in done:
            print(json.dumps({"case": case, **described.result()}), flush=True)


if __name__ == "__main__":
    main()
