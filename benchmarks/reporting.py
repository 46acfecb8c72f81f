"""What all benchmarks share: quartiles, the description of the machine, tables, files and the options for them."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from lwpf_patch.comparing.provenance import processor
from lwpf_patch.settings import BACKENDS

QUICK_REPEATS = 2
#: One line of the results: figures by name. A list is a lower quartile, a median and an upper quartile.
Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
_QUARTILES = ("q1", "median", "q3")


OUTPUT_HELP = (
    "write NAME.json, NAME.csv and NAME.png; results that are kept are called benchmarks/results/<machine>-<benchmark>"
)


def add_arguments(parser: argparse.ArgumentParser, output_help: str = OUTPUT_HELP) -> None:
    """Add the options that every benchmark has.

    Args:
        parser: Where to.
        output_help: What --output names.
    """
    parser.add_argument("--quick", action="store_true", help="smoke test: tiny and soon over; its figures mean nothing")
    parser.add_argument("--output", metavar="NAME", help=output_help)
    parser.add_argument("--no-plot", action="store_true", help="write no NAME.png")


def add_measuring_arguments(parser: argparse.ArgumentParser, repeats: dict[str, int]) -> None:
    """Add the options of the benchmarks that compute.

    Args:
        parser: Where to.
        repeats: The default number of repeats of each device.
    """
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--repeats", type=int, help=f"repeats of each variant ({defaults(repeats)}; {QUICK_REPEATS} with --quick)"
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="only these variants, and the base of the ratios")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="the backend of our operator (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's own)")
    parser.add_argument(
        "--load", type=int, default=0, metavar="N", help="measure time beside N busy processes (default: %(default)s)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out memory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # the child that measures one variant's


def defaults(values: dict[str, Any]) -> str:
    """Return text that says what the default of each device is."""
    return "default: " + ", ".join(f"{value} on {device}" for device, value in values.items())


def say(text: str) -> None:
    """Tell people on stderr how far things are, and what is left out."""
    print(f"benchmarks: {text}", file=sys.stderr, flush=True)


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile; of one value, three times that."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")  # never beyond what was measured


def spread(figures: Sequence[float] | None, factor: float = 1, decimals: int = 2) -> str:
    """Return a median with its quartiles as text, a dash if there are none."""
    if not figures:
        return "-"
    low, median, high = (f"{factor * figure:.{decimals}f}" for figure in figures)
    return f"{median} ({low}, {high})"


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return lines of cells as text in columns, the first one to the left and the others to the right."""
    cells = [headings, *lines]
    widths = [max(len(line[column]) for line in cells) for column in range(len(headings))]
    texts = []
    for line in cells:
        first, *others = (f"{text:{'>' if i else '<'}{widths[i]}}" for i, text in enumerate(line))
        texts.append("  ".join([first, *others]).rstrip())
    return "\n".join([texts[0], "-" * (sum(widths) + 2 * len(widths) - 2), *texts[1:]])


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe what the benchmark ran on."""
    described: dict[str, Any] = {
        "device": processor(),
        "processor": processor(),
        "processor_count": os.cpu_count(),
        "platform": platform.platform(),
    }
    if "torch" in sys.modules:  # a benchmark that does without shall not have to wait for it
        import torch

        described["threads"] = torch.get_num_threads()
        if device == "cuda":
            described["device"] = torch.cuda.get_device_name()
            described["device_bytes"] = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return described


def versions() -> dict[str, str]:
    """Return the versions of what takes part, as far as it is there."""
    import lwpf_patch

    # From a checkout on PYTHONPATH there are no metadata of ours.
    found = {"lwpf_patch": lwpf_patch.__version__, "python": platform.python_version()}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no Git, or no repository
        describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        found["commit"] = subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    for name in ("torch", "triton", "timm", "numpy"):
        try:
            # A machine's own build may say more about itself than its metadata do.
            found[name] = str(import_module(name).__version__) if name in sys.modules else metadata.version(name)
        except (metadata.PackageNotFoundError, AttributeError):
            continue
    if "torch" in sys.modules:
        import torch

        found |= (
            {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())} if torch.version.cuda else {}
        )
    return found


def write(
    options: argparse.Namespace,
    rows: list[Row],
    *,
    device: str = "cpu",
    plot: Callable[[list[Row], Any], None] | None = None,
    **more: Any,
) -> None:
    """Write the results, if they are to be written.

    Args:
        options: The command line.
        rows: The results.
        device: ``"cpu"`` or ``"cuda"``.
        plot: Draws the rows on a figure of matplotlib's; None: there is nothing to be drawn.
        **more: What else the JSON file shall say.
    """
    if not options.output:
        return
    path = Path(options.output.removesuffix(".json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = ("run", "command_line", "memory_of", "output", "benchmark", "no_plot")
    arguments = {name: value for name, value in vars(options).items() if name not in hidden}
    described, found = machine(device), versions()
    results = {"benchmark": options.benchmark, "arguments": arguments, "machine": described, "versions": found}
    # Not with_suffix(): what follows a dot in the name, of a version say, is no suffix.
    data, lines, picture = (path.with_name(path.name + suffix) for suffix in (".json", ".csv", ".png"))
    replace_text(data, json.dumps({**results, **more, "rows": rows}, indent=2) + "\n")
    flat = [{**_flattened(row), **described, **found} for row in rows]
    with lines.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in flat for name in line)))
        writer.writeheader()
        writer.writerows(flat)
    written = [data, lines]
    if plot is not None and not getattr(options, "no_plot", False) and _draw(plot, rows, described, picture):
        written.append(picture)
    say(f"wrote {', '.join(map(str, written))}")


def replace_text(path: Path, text: str) -> None:
    """Write a file in one piece: a process that is killed meanwhile leaves the former one whole."""
    written = path.with_name(path.name + ".part")
    written.write_text(text, encoding="utf-8")
    written.replace(path)


def _draw(plot: Callable[[list[Row], Any], None], rows: list[Row], described: dict[str, Any], picture: Path) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plot: matplotlib is not installed")
        return False
    figure = Figure(layout="constrained")
    figure.suptitle(f"{described['device']}; CPU threads: {described['threads']}")
    plot(rows, figure)
    figure.savefig(picture, dpi=150)
    return True


def _flattened(row: Row) -> Row:
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= {f"{name}_{which}": figure for which, figure in zip(_QUARTILES, value, strict=True)}
        elif isinstance(value, dict):
            flat[name] = "; ".join(f"{key}: {text}" for key, text in value.items())
        else:
            flat[name] = value
    return flat
