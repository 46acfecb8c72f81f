"""The separation loss, forward and backward, against its direct form with ``torch.pdist``; and Stage I of a ViT.

The forms of the loss take turns, so that drift of the machine hits all alike. Stage I is that of a whole timm model, in
steps of training of that very model, as many as take the same time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from . import reporting
from .reporting import Row, say

DIRECT = "pdist"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--patterns", type=int, help="M (default: 2000; 100 with --quick)")
    parser.add_argument("--dim", type=int, default=784, help="d (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's own)")
    parser.add_argument("--repeats", type=int, help="times each form runs (default: 7; 2 with --quick)")
    parser.add_argument("--model", help="of timm (default: vit_small_patch16_224; test_vit with --quick)")
    parser.add_argument("--batch", type=int, default=8, help="images of a training step (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.patterns = options.patterns or (100 if options.quick else 2000)
    options.repeats = options.repeats or (reporting.QUICK_REPEATS if options.quick else 7)
    options.model = options.model or ("test_vit" if options.quick else "vit_small_patch16_224")
    rows = _losses(options)
    # Already now, so that a run that is cut short has not measured in vain.
    reporting.write(options, rows, device=options.device)
    rows += _stage_one(options)
    print(
        f"{options.patterns} patterns of {options.dim} dimensions, {torch.get_num_threads()} threads; {options.model}"
    )
    cells = [[row["variant"], reporting.spread(row["seconds"], 1e3, 1), reporting.spread(row["ratio"])] for row in rows]
    print(reporting.table(["variant", "milliseconds (quartiles)", "ratio (quartiles)"], cells))
    print(f"ratios: to {DIRECT}; for Stage I: how many training steps of batch {options.batch} take as long")
    reporting.write(options, rows, device=options.device)


def _losses(options: argparse.Namespace) -> list[Row]:
    """Time the forms of the loss, forward and backward."""
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    from lwpf_patch import separation_loss

    def direct(patterns: Tensor) -> Tensor:
        return torch.pdist(F.normalize(patterns, dim=-1)).square().mul(-2.0).exp().mean().log()

    patterns = torch.rand(options.patterns, options.dim, device=options.device, requires_grad=True)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        DIRECT: direct,
        "separation_loss": separation_loss,
        "separation_loss, maximum": lambda x: separation_loss(x, kind="maximum"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(options.repeats + 1):  # the first one warms up
        say(f"loss, repeat {repeat} of {options.repeats}")
        for name, form in forms.items():
            start = _now(options.device)
            torch.autograd.grad(form(patterns), patterns)
            if repeat:
                seconds[name].append(_now(options.device) - start)
    return [_row(name, own, seconds[DIRECT]) for name, own in seconds.items()]


def _stage_one(options: argparse.Namespace) -> list[Row]:
    """Time Stage I of all layers of a model, and its ordinary training step, in turn."""
    import timm
    import torch
    from timm.data import resolve_data_config
    from torch.nn import functional as F

    from lwpf_patch import patch_model
    from lwpf_patch.uhop import stage_one

    stages: list[float] = []
    steps: list[float] = []
    for repeat in range(max(2, options.repeats // 2) + 1):
        say(f"Stage I of {options.model}, repeat {repeat}")
        model: Any = timm.create_model(options.model).train().to(options.device)
        patch_model(model, uhop="on")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        size = resolve_data_config({}, model=model)["input_size"]
        images = torch.randn(options.batch, *size, device=options.device)
        labels = torch.randint(model.num_classes, (options.batch,), device=options.device)
        of_run: list[float] = []
        original = stage_one.run_stage_one

        def timed(maps: Any, original: Any = original, of_run: list[float] = of_run) -> None:
            start = _now(options.device)
            original(maps)
            of_run.append(_now(options.device) - start)

        stage_one.run_stage_one = timed
        try:
            for step in range(4):
                start = _now(options.device)
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                if repeat and step > 1:
                    steps.append(_now(options.device) - start)
        finally:
            stage_one.run_stage_one = original
        stages += of_run * bool(repeat)
    middle = reporting.quartiles(steps)[1]
    return [_row("a training step", steps, [middle] * len(steps)), _row("Stage I", stages, [middle] * len(stages))]


def _now(device: str) -> float:
    """Return the time at which a device has done all that it was given, in seconds."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _row(name: str, own: list[float], base: list[float]) -> Row:
    ratios = [one / other for one, other in zip(own, base, strict=True)]
    return {"variant": name, "seconds": reporting.quartiles(own), "ratio": reporting.quartiles(ratios)}
