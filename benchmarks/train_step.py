"""A whole training step of a timm model: forward, loss, backward and AdamW, plain against patched.

Each variant is a copy of the same model, patched alone with lwpf_patch.patch_model, with an optimiser of its own; the
plain one is timm's own code. They train in turn within one process on the same images; what counts are the ratios to
the plain one, repeat by repeat. Peak memory is what a step adds to parameters and the optimiser's state; on CUDA,
activation memory is what is held between forward and backward.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from typing import TYPE_CHECKING, Any

from . import reporting
from .reporting import Row

if TYPE_CHECKING:
    from .measuring import Subject

BASE = "plain"
#: What patch_model is given for each variant; None: the model stays as it is.
VARIANTS: dict[str, dict[str, Any] | None] = {
    BASE: None,
    "none": {"func_d": "none"},
    "relu": {"func_d": "relu"},
    "pfu, dmedian": {"func_d": "pfu:mu=dmedian,bias=mu,sigma=0.01"},
    "uhop": {"uhop": "on"},  # its Stage I runs after the first step, which warms up
}

#: The defaults of each device.
MODELS = {"cpu": "vit_small_patch16_224", "cuda": "vit_base_patch16_224"}
BATCHES = {"cpu": 4, "cuda": 256}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
REPEATS = {"cpu": 9, "cuda": 20}
QUICK_MODEL, QUICK_BATCH = "test_vit", 2

PASSES = {"step": "training step"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    reporting.add_measuring_arguments(parser, REPEATS)
    parser.add_argument("--model", help=f"a model of timm's ({reporting.defaults(MODELS)})")
    parser.add_argument("--batch", type=int, help=f"images in a batch ({reporting.defaults(BATCHES)})")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help=f"of autocast; float32 is without ({reporting.defaults(DTYPES)})",
    )
    parser.add_argument("--compile", action="store_true", help="all variants under torch.compile")


def run(options: argparse.Namespace) -> None:
    """Measures, prints a table and writes what was asked for."""
    from . import measuring

    if os.environ.get("LWPF_PATCH"):
        sys.exit("benchmarks: LWPF_PATCH is set, so that the plain model would not be plain; unset it")
    measuring.settle(options, REPEATS)
    options.model = options.model or (QUICK_MODEL if options.quick else MODELS[options.device])
    options.batch = options.batch or (QUICK_BATCH if options.quick else BATCHES[options.device])
    options.dtype = options.dtype or DTYPES[options.device]
    chosen = measuring.chosen(options, BASE, VARIANTS)
    original = _original(options)
    if options.memory_of:
        subject, _ = _subject(options, original, VARIANTS[options.memory_of])
        measuring.print_memory(subject, options.device)
        return
    subjects, patched = {}, {}
    for name, settings in chosen.items():
        subjects[name], patched[name] = _subject(options, original, settings)
    rows = measuring.compare(options, subjects, BASE)
    what = {name: getattr(options, name) for name in ("model", "batch", "dtype", "compile")}
    rows = [{**what, "patched_modules": patched[row["variant"]], **row} for row in rows]
    print(f"{options.model}, batch {options.batch}, {options.dtype}{', compiled' * options.compile}; ", end="")
    print(f"ratios to {BASE!r} (quartiles)")
    print(reporting.table(*measuring.lines_of(rows, PASSES, options.device)))
    print(*measuring.failures_of(rows), sep="\n", flush=True)
    reporting.write(options, rows, device=options.device, plot=_plot, variants=chosen)


def _original(options: argparse.Namespace) -> Any:
    import timm
    import torch

    torch.manual_seed(0)
    return timm.create_model(options.model, pretrained=False).train()


def _subject(options: argparse.Namespace, original: Any, settings: dict[str, Any] | None) -> tuple[Subject, int]:
    """Make a variant, and count its patched modules."""
    import torch
    from timm.data import resolve_data_config
    from torch.nn import functional as F

    from lwpf_patch import patch_model

    from .measuring import Subject

    model = copy.deepcopy(original).to(options.device)
    patched = [] if settings is None else patch_model(model, **{"backend": options.backend, **settings})
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    size = resolve_data_config({}, model=model)["input_size"]
    torch.manual_seed(1)
    images = torch.randn(options.batch, *size, device=options.device)
    labels = torch.randint(model.num_classes, (options.batch,), device=options.device)
    network = torch.compile(model, dynamic=False) if options.compile else model
    dtype = getattr(torch, options.dtype)

    def forward() -> Any:
        with torch.autocast(options.device, dtype=dtype, enabled=dtype != torch.float32):
            return F.cross_entropy(network(images), labels)

    def backward(loss: Any) -> None:
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return Subject(forward, backward, {"step": lambda: backward(forward())}), len(patched)


def _plot(rows: list[Row], figure: Any) -> None:
    """Draw a bar for each variant: its time and its memory against the plain model's."""
    figures = {"step_ratio": "Time", "peak_ratio": "Peak memory", "activation_ratio": "Activation memory"}
    figures = {key: title for key, title in figures.items() if any(key in row for row in rows)}
    figure.set_size_inches(4 * len(figures) + 1, 0.5 * len(rows) + 1.8)
    for (key, title), axes in zip(figures.items(), figure.subplots(1, len(figures), squeeze=False)[0], strict=True):
        own = [row for row in rows if key in row]
        names = [row["variant"] for row in own]
        if key == "step_ratio":
            low, middle, high = zip(*(row[key] for row in own), strict=True)
            below, above = ([abs(a - b) for a, b in zip(edge, middle, strict=True)] for edge in (low, high))
            axes.barh(names, middle, xerr=(below, above), color="#0072B2", capsize=3)
        else:
            axes.barh(names, [row[key] for row in own], color="#E69F00")
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=title, xlabel=f"ratio to {BASE}")
        axes.spines[["top", "right"]].set_visible(False)
