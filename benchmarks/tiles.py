"""Tiles of the Triton backend: which of them is the fastest on a GPU, kernel by kernel.

For each kernel, the pass that it takes part in is timed with one candidate after another in the place of the tile that
the backend has for it (the base of the ratios); all other kernels keep theirs. What is fastest here can be written into
the tables of lwpf_patch/backends/triton.py: with --output NAME, NAME.tables.txt has these tables with each tile that is
beaten replaced. A tile is beaten if the quartiles of the times do not overlap. A candidate that the GPU has no room for
fails, and the others go on. Short sequences have one backward kernel, head, in place of query and key: each is measured
at the shapes that it computes. Each candidate has to be compiled first, for seconds: --kernels, --shapes and --near
make it shorter.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
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
    "head": ("relu", "backward"),
    "median": ("pfu:mu=dmedian,bias=mu,sigma=0", "forward"),
}
#: Rows of queries and of keys, warps and stages.
CANDIDATES = [
    (rows, keys, warps, stages)
    for (rows, keys), warps, stages in itertools.product(
        ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)), (4, 8), (2, 3)
    )
]
#: Keys, warps and stages of the kernel for whole heads.
OF_HEAD = [(keys, warps, 1) for keys, warps in itertools.product((16, 32, 64), (4, 8, 16))]
#: What a tile that is near another may be made of.
NEAR = ((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
REPEATS = {"cpu": 2, "cuda": 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu: in Triton's interpreter, to see that all works")
    parser.add_argument("--repeats", type=int, help=f"repeats of each candidate ({reporting.defaults(REPEATS)})")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="default: all")
    parser.add_argument(
        "--near", action="store_true", help="only candidates that differ from the present tile in one number"
    )
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
            call = _call(func_d, inputs)
            if kernel in (("query", "key") if call.in_one_pass else ("head",)):
                say("the backward pass of this shape has no such kernel")
                continue
            found = call.tile(kernel)
            current = (found["ROWS"], found["KEYS"], found["num_warps"], found["num_stages"])
            candidates = candidates_of(kernel, current, options.near)
            if options.quick:
                candidates = candidates[:2]
            subjects = {
                _name(tile): _subject(kernel, tile, func_d, which, inputs, cotangent) for tile in (None, *candidates)
            }
            own = measuring.compare(options, subjects, BASE)
            what = {"shape": shape, "kernel": kernel, "dtype": options.dtype, "current": ", ".join(map(str, current))}
            rows += [{**what, **row} for row in own]
            done = [row for row in own if "time_ratio" in row]
            print(f"\nB,H,N,E = {shape}, {options.dtype}, {kernel}; ratios to the tile that it has (quartiles)")
            lines = sorted(done, key=lambda row: row["time_ratio"][1])
            print(reporting.table(["rows, keys, warps, stages", "time"], [_cells(row) for row in lines]), flush=True)
            found = beaten(rows, backend.capability(inputs[0].device))
            reporting.write(options, rows, device=options.device, beaten=found)
            if options.output:
                path = Path(options.output.removesuffix(".json"))
                text = tables(found, reporting.machine(options.device)["device"])
                reporting.replace_text(path.with_name(path.name + ".tables.txt"), text)


def candidates_of(kernel: str, current: tuple[int, ...], only_near: bool) -> list[tuple[int, ...]]:
    """Return the tiles that are tried for a kernel.

    Args:
        kernel: Which kernel.
        current: The tile that it has.
        only_near: Whether to try only those that are near it.
    """
    if kernel == "head":  # its rows are those of the sequence, and it has no stages
        known = near(current) if only_near else [(current[0], *of_head) for of_head in OF_HEAD]
        return [tile for tile in known if tile != current and (tile[0], tile[3]) == (current[0], current[3])]
    known = near(current) if only_near else CANDIDATES
    # The kernel for keys has them along the rows of its products, of which fewer than 64 would have Hopper take another
    # instruction than the other kernels, and round scores in another way.
    return [tile for tile in known if kernel != "key" or tile[1] >= 64]


def near(tile: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the tiles that differ from one in one number, which is the next larger or smaller one."""
    others = []
    for place, (number, numbers) in enumerate(zip(tile, NEAR, strict=True)):
        below, above = ([n for n in numbers if n < number][-1:], [n for n in numbers if n > number][:1])
        others += [(*tile[:place], other, *tile[place + 1 :]) for other in (*below, *above)]
    return others


def beaten(rows: list[Row], capability: tuple[int, int]) -> list[dict[str, Any]]:
    """Return which entries of the backend's tables are beaten, and by what.

    A candidate beats a tile if the quartiles of its times lie below those of the tile at one shape at least, and above
    them at no other shape that the same entry serves; of several, the one with the smallest ratio on average is taken.

    Args:
        rows: The results.
        capability: Of the device that was measured.
    """
    entries: dict[tuple[str, str, int], dict[str, dict[str, Row]]] = {}
    for (shape, kernel, dtype), own in _grouped(rows).items():
        if (entry := entry_of(kernel, dtype, shape, capability)) is not None and BASE in own:
            entries.setdefault(entry, {})[f"{shape} {dtype}"] = own
    found = []
    for (table, kernel, width), of_shape in entries.items():
        names = set.intersection(*(set(own) for own in of_shape.values())) - {BASE}
        better = {}
        for name in names:
            pairs = [(own[name]["time_seconds"], own[BASE]["time_seconds"]) for own in of_shape.values()]
            wins, losses = (any(one[2] < two[0] for one, two in each) for each in (pairs, [p[::-1] for p in pairs]))
            if wins and not losses:
                ratios = [own[name]["time_ratio"][1] for own in of_shape.values()]
                better[name] = math.fsum(ratios) / len(ratios)
        if better:
            name = min(better, key=lambda name: better[name])
            found.append(
                {
                    "table": table,
                    "kernel": kernel,
                    "width": width,
                    "current": next(iter(of_shape.values()))[BASE]["current"],
                    "better": name,
                    "ratios": {shape: own[name]["time_ratio"] for shape, own in of_shape.items()},
                }
            )
    return found


def _grouped(rows: list[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    grouped: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if "time_ratio" in row:
            grouped.setdefault((row["shape"], row["kernel"], row["dtype"]), {})[row["variant"]] = row
    return grouped


def entry_of(kernel: str, dtype: str, shape: str, capability: tuple[int, int]) -> tuple[str, str, int] | None:
    """Return the table, kernel and width, or rows, of the entry that a new tile for a shape belongs in.

    Args:
        kernel: Which kernel.
        dtype: What it computes in.
        shape: B, H, N and E.
        capability: Of the device.

    Returns:
        None if there is none: the tile of the table is halved for this length.
    """
    from lwpf_patch.backends import triton as backend

    _, _, length, features = (int(part) for part in shape.split(","))
    if backend.halves(length) and kernel in backend.OWN:
        return None
    table = "_TILES_LONG" if length >= backend.KEYS_OF_LONG else "_TILES"
    if capability < (9, 0):
        table = "_TILES_BEFORE_HOPPER"
    if dtype == "float32":
        table = "_TILES_FLOAT32"
    return table, kernel, backend.entry_of(kernel, backend._block(features), length)


def tables(found: list[dict[str, Any]], device: str) -> str:
    """Return the tables of the backend as source text, with the tiles that are beaten replaced.

    Args:
        found: What `beaten` returned.
        device: What it was measured on.
    """
    from lwpf_patch.backends import triton as backend

    lines = [f"# Measured on {device}."]
    if not found:
        lines.append("# No tile of those measured so far is beaten: the tables are as they were.")
    for entry in found:
        spreads = "; ".join(f"{reporting.spread(own, decimals=3)} on {shape}" for shape, own in entry["ratios"].items())
        lines.append(
            f"# {entry['table']}, {entry['kernel']}, width {entry['width']}: ({entry['better']}) in place of "
            f"({entry['current']}) takes {spreads} of its time"
        )
    lines.append("# After replacing them, tests/test_triton.py tells whether a kernel spills registers.")
    for name in ("_TILES", "_TILES_LONG", "_TILES_BEFORE_HOPPER", "_TILES_FLOAT32"):
        table = {kernel: dict(tiles) for kernel, tiles in getattr(backend, name).items()}
        for entry in found:
            if entry["table"] == name:
                tile = tuple(int(number) for number in entry["better"].split(","))
                table.setdefault(entry["kernel"], {})[entry["width"]] = tile
        lines += [f"{name}: _Tiles = {{", *(f'    "{kernel}": {tiles},' for kernel, tiles in table.items()), "}"]
    return "\n".join(lines) + "\n"


def _call(func_d: str, inputs: list[Any]) -> Any:
    """Return what the kernels are told of a call, by which they find their tiles."""
    from lwpf_patch.backends import triton as backend

    mu = None if "dmedian" in func_d else 0.0
    return backend._Call(*inputs, None, None, None, 0.0, False, inputs[0].shape[-1] ** -0.5, mu, mu)


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
