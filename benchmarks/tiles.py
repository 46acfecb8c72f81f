"""Tiles of the Triton backend: which of them is the fastest on a GPU, kernel by kernel.

For each kernel, the pass that it takes part in is timed with one candidate after another in the place of the tile that
the backend has for it (the base of the ratios); all other kernels keep theirs. What is fastest here can be written into
the tables of lwpf_patch/backends/triton.py. A candidate that the GPU has no room for fails, and the others go on. Each
has to be compiled first, for seconds: --kernels and --shapes make it shorter.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import attention, reporting
from .reporting import Row, say

if TYPE_CHECKING:
    from .measuring import Subject

BASE = "current"
#: The kernels, and what is timed of each: func_d, and which pass.
KERNELS = {
    "forward": ("relu", "forward"),
    "query": ("relu", "backward"),
    "key": ("relu", "backward"),
    "median": ("pfu:mu=dmedian,bias=mu,sigma=0", "forward"),
}
#: Rows of queries and of keys, warps and stages.
CANDIDATES = [
    (rows, keys, warps, stages)
    for (rows, keys), warps, stages in itertools.product(
        ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)), (4, 8), (2, 3)
    )
]
REPEATS = {"cpu": 2, "cuda": 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu: in Triton's interpreter, to see that all works")
    parser.add_argument("--repeats", type=int, help=f"repeats of each candidate ({reporting.defaults(REPEATS)})")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="default: all")
    shapes = " ".join(attention.SHAPES["cuda"])
    parser.add_argument(
        "--shapes", nargs="+", metavar="B,H,N,E", help=f"batch, heads, length and width of a head (default: {shapes})"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.set_defaults(only=None, no_memory=True, threads=None, load=0, memory_of=None)


def run(options: argparse.Namespace) -> None:
    """Measures, prints a table for each shape and kernel, and writes what was asked for."""
    from lwpf_patch import ReLU
    from lwpf_patch.backends import Call
    from lwpf_patch.backends import triton as backend

    from . import measuring

    measuring.settle(options, REPEATS)
    options.shapes = options.shapes or (attention.QUICK_SHAPES if options.quick else attention.SHAPES["cuda"])
    rows: list[Row] = []
    for shape in options.shapes:
        inputs, cotangent = attention.make_inputs(options, shape)
        if why := backend.Triton().why_not(Call(*inputs, ReLU())):
            sys.exit(f"benchmarks: tiles: the Triton backend does not run here: {why}")
        for kernel in options.kernels:
            say(f"B,H,N,E = {shape}: {kernel}")
            func_d, which = KERNELS[kernel]
            # The kernel for keys has them along the rows of its products, of which fewer than 64 would have Hopper take
            # another instruction than the other kernels, and round scores in another way.
            candidates = [tile for tile in CANDIDATES if kernel != "key" or tile[1] >= 64]
            if options.quick:
                candidates = candidates[:2]
            subjects = {
                _name(tile): _subject(kernel, tile, func_d, which, inputs, cotangent) for tile in (None, *candidates)
            }
            own = measuring.compare(options, subjects, BASE)
            rows += [{"shape": shape, "kernel": kernel, "dtype": options.dtype, **row} for row in own]
            done = [row for row in own if "time_ratio" in row]
            print(f"\nB,H,N,E = {shape}, {options.dtype}, {kernel}; ratios to the tile that it has (quartiles)")
            lines = sorted(done, key=lambda row: row["time_ratio"][1])
            print(reporting.table(["rows, keys, warps, stages", "time"], [_cells(row) for row in lines]), flush=True)
            reporting.write(options, rows, device=options.device)


def _name(tile: tuple[int, ...] | None) -> str:
    return BASE if tile is None else ", ".join(map(str, tile))


def _cells(row: Row) -> list[str]:
    return [row["variant"], reporting.spread(row["time_ratio"])]


def _subject(
    kernel: str, tile: tuple[int, ...] | None, func_d: str, which: str, inputs: list[Any], cotangent: Any
) -> Subject:
    import torch

    from lwpf_patch import lwpf_attention
    from lwpf_patch.forgetting import make_func_d

    from .measuring import Subject

    module = make_func_d(func_d)
    made: list[Any] = []

    def forward() -> Any:
        return lwpf_attention(*inputs, func_d=module, training=False, backend="triton")

    def backward() -> Any:
        if not made:  # once: what is timed is the backward pass alone
            made.append(forward())
        return torch.autograd.grad(made[0], inputs, cotangent, retain_graph=True)

    work = _with_tile(kernel, tile, forward if which == "forward" else backward)
    return Subject(forward, lambda out: None, {"time": work})


def _with_tile(kernel: str, tile: tuple[int, ...] | None, work: Callable[[], Any]) -> Callable[[], Any]:
    """Return the work, done with another tile for a kernel."""
    from lwpf_patch.backends import triton as backend

    own = backend.tile_of

    def tile_of(name: str, *what: Any) -> dict[str, int]:
        if name != kernel or tile is None:
            return own(name, *what)
        return dict(zip(("ROWS", "KEYS", "num_warps", "num_stages"), tile, strict=True))

    def done() -> Any:
        backend.tile_of = tile_of
        try:
            return work()
        finally:
            backend.tile_of = own

    return done
