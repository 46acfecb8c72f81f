"""One attention layer: time and memory of plain attention, the hand-edited forms and ours, over the length.

All variants run in turn within one process, repeat after repeat, so that drift of the machine hits all alike; what
counts are the ratios to eager softmax attention, repeat by repeat, as medians with quartiles. Peak memory is measured
in a process of its own for each variant, and is what one forward and backward pass adds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BASE = "eager softmax"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["8,6,197,64", "8,6,1024,64", "1,6,4096,64"],
        metavar="B,H,N,E",
        help="batch, heads, sequence length and width of a head (default: %(default)s)",
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="only these variants, and the base of the ratios")
    parser.add_argument("--repeats", type=int, default=15, help="repeats of each variant (default: 15)")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's own)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--output", type=Path, help="write NAME.json, NAME.csv and NAME.png", metavar="NAME")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # the child that measures one variant


def variants() -> dict[str, Callable[..., Any]]:
    """Returns what is compared, by name."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from lwpf_patch import PFU, lwpf_attention

    def eager(q: Any, k: Any, v: Any) -> Any:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v

    def by_hand(q: Any, k: Any, v: Any, threshold: Callable[[Any], Any]) -> Any:
        s = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        a = threshold(s)
        mask = (s > a).to(s.dtype).detach()
        s = mask * s + (1 - mask) * a
        return (mask * s.softmax(-1)) @ v

    def relu_by_hand(q: Any, k: Any, v: Any) -> Any:
        return by_hand(q, k, v, lambda s: 0.0)

    def dmedian_by_hand(q: Any, k: Any, v: Any) -> Any:
        return by_hand(q, k, v, lambda s: s.median())

    def sdpa_by(backend: SDPBackend) -> Callable[..., Any]:
        def run(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(backend):
                return sdpa(q, k, v)

        return run

    median = PFU(sigma=0)
    return {
        BASE: eager,
        "SDPA math": sdpa_by(SDPBackend.MATH),
        "SDPA flash": sdpa_by(SDPBackend.FLASH_ATTENTION),
        "ReLU by hand": relu_by_hand,
        "ReLU by hand, compiled": torch.compile(relu_by_hand),
        "dmedian by hand": dmedian_by_hand,
        "ReLU, ours": lambda q, k, v: lwpf_attention(q, k, v, func_d="relu"),
        "dmedian, ours": lambda q, k, v: lwpf_attention(q, k, v, func_d=median, training=False),
    }


def run(options: argparse.Namespace) -> None:
    """Measures, prints a table and writes what was asked for."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(_peak_memory(options, options.memory_of)))
        return
    rows: list[dict[str, Any]] = []
    for text in options.shapes:
        times = _times(options, text)
        for name, passes in times.items():
            row: dict[str, Any] = {"shape": text, "length": int(text.split(",")[2]), "variant": name}
            for which, seconds in passes.items():
                ratios = [own / base for own, base in zip(seconds, times[BASE][which], strict=True)]
                row[f"{which}_ratio"] = statistics.quantiles(ratios, n=4)
                row[f"{which}_seconds"] = statistics.median(seconds)
            if not options.no_memory:
                row["peak_bytes"] = _memory_in_child(options, text, name)
            rows.append(row)
            _print_row(row, rows)
    if options.output:
        _write(options, rows)


def _inputs(options: argparse.Namespace, text: str) -> tuple[list[Any], Any]:
    import torch

    shape = tuple(int(part) for part in text.split(","))
    made = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    torch.manual_seed(0)
    return [torch.randn(shape, **made, requires_grad=True) for _ in range(3)], torch.randn(shape, **made)


def _chosen(options: argparse.Namespace) -> dict[str, Callable[..., Any]]:
    return {n: f for n, f in variants().items() if not options.only or n in options.only or n == BASE}


def _times(options: argparse.Namespace, text: str) -> dict[str, dict[str, list[float]]]:
    """Times every variant, forward alone and forward and backward."""
    import torch

    inputs, cotangent = _inputs(options, text)
    detached = [tensor.detach() for tensor in inputs]
    chosen = _chosen(options)

    def both(function: Callable[..., Any]) -> None:
        torch.autograd.grad(function(*inputs), inputs, cotangent)

    def clock(work: Callable[[], Any]) -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": []} for name in chosen}
    for repeat in range(options.repeats + 2):  # the first two warm up
        for name, function in chosen.items():
            forward = clock(lambda function=function: function(*detached))  # type: ignore[misc]
            backward = clock(lambda function=function: both(function))  # type: ignore[misc]
            if repeat > 1:
                times[name]["forward"].append(forward)
                times[name]["both"].append(backward)
    return times


def _memory_in_child(options: argparse.Namespace, text: str, name: str) -> int:
    command = [sys.executable, "-m", "benchmarks", "attention", "--device", options.device, "--dtype", options.dtype]
    out = subprocess.run([*command, "--shapes", text, "--memory-of", name], capture_output=True, text=True, check=True)
    return int(out.stdout)


def _peak_memory(options: argparse.Namespace, name: str) -> int:
    """Returns the bytes that one forward and backward pass adds at its peak."""
    import torch

    function = variants()[name]
    small, cotangent = _inputs(options, "1,1,64,64")
    torch.autograd.grad(function(*small), small, cotangent)  # libraries and compilers have what they need
    inputs, cotangent = _inputs(options, options.shapes[0])
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(function(*inputs), inputs, cotangent)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew, below that of the imports
    before = _resident("VmRSS")
    torch.autograd.grad(function(*inputs), inputs, cotangent)
    return _resident("VmHWM") - before


def _resident(which: str) -> int:
    """Returns the bytes of this process that are in memory (VmRSS), or were at most (VmHWM)."""
    (line,) = (text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(f"{which}:"))
    return int(line.split()[1]) * 1024


def _print_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    if row["variant"] == BASE:
        print(f"\nB,H,N,E = {row['shape']}; ratios to {BASE} (quartiles)")
        print(f"{'variant':<26}{'forward':>24}{'forward + backward':>24}{'peak memory':>16}")
    base = next(r for r in rows if r["shape"] == row["shape"] and r["variant"] == BASE)
    cells = [f"{q[1]:.2f} ({q[0]:.2f}, {q[2]:.2f})" for q in (row["forward_ratio"], row["both_ratio"])]
    memory = ""
    if "peak_bytes" in row:
        memory = f"{row['peak_bytes'] / 2**20:.0f} MB {row['peak_bytes'] / max(base['peak_bytes'], 1):.2f}"
    print(f"{row['variant']:<26}{cells[0]:>24}{cells[1]:>24}{memory:>16}", flush=True)


def _write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    import torch

    options.output.parent.mkdir(parents=True, exist_ok=True)
    cuda = options.device == "cuda"
    machine = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "processor_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "repeats": options.repeats,
    }
    options.output.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    with options.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shape", "variant", "forward_ratio", "both_ratio", "forward_seconds", "both_seconds", "peak"])
        for row in rows:
            seconds = (row["forward_seconds"], row["both_seconds"])
            ratios = (row["forward_ratio"][1], row["both_ratio"][1])
            writer.writerow([row["shape"], row["variant"], *ratios, *seconds, row.get("peak_bytes", "")])
    _plot(options, rows)


def _plot(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        lengths = [row["length"] for row in own]
        style = {"marker": "o", "linewidth": 2.2 if "ours" in name else 1.2, "label": name}
        left.plot(lengths, [row["both_ratio"][1] for row in own], **style)
        if "peak_bytes" in own[0]:
            right.plot(lengths, [max(row["peak_bytes"], 1) / 2**20 for row in own], **style)
    left.set(title=f"Forward and backward, against {BASE}", xlabel="sequence length", ylabel="ratio of times")
    right.set(title="Peak memory", xlabel="sequence length", ylabel="MB", yscale="log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.axhline(1, color="black", linewidth=0.8)
    left.legend(fontsize=8)
    figure.savefig(options.output.with_suffix(".png"), dpi=150)
