"""What of timm's models is patched, and what can be done with it: found by making them, for docs/coverage.md."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from coverage_trying import Called, called_of_func_d, why_not_compiled, why_not_cpu, why_not_folded
from torch import nn

import lwpf_patch
from lwpf_patch.patching import coverage, folding
from lwpf_patch.patching.models import site_of
from lwpf_patch.patching.state import PATCHED

# --- models on the device meta --------------------------------------------------------------------------------------


def look_at(name: str) -> dict[str, Any]:
    """Makes a model without memory for its weights, and tells what is known of it; timm is patched with U-Hop's map.

    Returns:
        Its ``name``, its ``state``, how many ``parameters`` it has, its ``patched`` classes, those ``without_map``,
        those ``plain``, and of each why; of each class with a map ``folding``: why it cannot be folded, in all of its
        forms, empty where it can; and ``fused``: which branch each class takes.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = timm.create_model(name)
    found = coverage.coverage_of(model, PATCHED["timm"])
    of_folding: dict[str, set[str]] = {}
    fused: dict[str, set[bool]] = {}
    for module in model.modules():
        cls = class_name(module)
        if cls not in found.patched:
            continue
        if "feature_map" in module._modules:
            of_folding.setdefault(cls, set()).add(_why_not_folded(model, module))
        if isinstance(branch := getattr(module, "fused_attn", None), bool):
            fused.setdefault(cls, set()).add(branch)
    return {
        "name": name,
        "state": found.state(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "patched": sorted(found.patched),
        "without_map": sorted(found.without_map),
        "plain": {cls: found.why[cls] for cls in sorted(found.plain)},
        "folding": {cls: sorted(reasons) for cls, reasons in sorted(of_folding.items())},
        "fused": {cls: sorted(branches) for cls, branches in sorted(fused.items())},
    }


def class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _why_not_folded(model: nn.Module, module: nn.Module) -> str:
    """As `fold` decides it, up to where it needs values."""
    _, site = site_of(type(module))
    try:
        for path in site.feature_map.folding.parameters(model, module):
            folding._owner(model, module, path.rpartition(".")[0])
    except lwpf_patch.FoldError as error:
        return str(error)
    return ""


def look_at_all(names: Iterable[str], kept: Kept) -> list[dict[str, Any]]:
    """Looks at models."""
    lwpf_patch.apply("timm", uhop="on", partial="allow")
    try:
        return [kept(f"look at {name}", lambda name=name: look_at(name)) for name in names]
    finally:
        lwpf_patch.revert()


class Kept:
    """What was found before, in a file, so that a long search can be cut and goes on.

    Args:
        file: It has a line for each; None: nothing is kept.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file is not None and file.exists() else []
        self.known = dict(map(json.loads, lines))

    def __call__(self, key: str, find: Callable[[], Any]) -> Any:
        """Returns what is known by a key, or finds it."""
        if key not in self.known:
            self.known[key] = find()
            if self.file is not None:
                with self.file.open("a") as file:
                    file.write(json.dumps([key, self.known[key]]) + "\n")
        return self.known[key]


# --- attention modules on the CPU -----------------------------------------------------------------------------------


class _SeenError(Exception):
    """Ends a forward pass in which all has been seen."""


def try_out(name: str, classes: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Makes a model on the CPU, and tries the first attention module of each class with what it is called with.

    Args:
        name: The name of the model.
        classes: The classes.

    Returns:
        For each class: what it ``calls`` of its func_d; ``cpu``: why the backend of this name cannot compute it, empty
        where it can; ``compiles``: why torch.compile(fullgraph=True) does not take it, empty where it does, None where
        it does not take the unpatched one either; and, if it has a map, ``folding``: why a map of random numbers
        cannot be folded, empty where it can.
    """
    lwpf_patch.apply("timm", func_d="relu", partial="allow")
    try:
        called = _called_with(name, set(classes))
        found: dict[str, dict[str, Any]] = {
            cls: {"calls": called_of_func_d(each), "cpu": why_not_cpu(each), "compiles": why_not_compiled(each)}
            for cls, each in called.items()
        }
        lwpf_patch.apply("timm", uhop="on", partial="allow")
        for cls, each in called.items():
            if "feature_map" in each.module._modules:
                found[cls]["folding"] = why_not_folded(each.module)
    finally:
        lwpf_patch.revert()
    for cls, each in called.items():
        if found[cls]["compiles"] and why_not_compiled(each):
            found[cls]["compiles"] = None
    return found


def _called_with(name: str, classes: set[str]) -> dict[str, Called]:
    """Returns the first module of each class that a model calls, on a random image."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        model = timm.create_model(name).eval()
    found: dict[str, Called] = {}

    def see(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.setdefault(class_name(module), Called(module, args, options))
        if found.keys() == classes:
            raise _SeenError

    handles = [
        module.register_forward_pre_hook(see, with_kwargs=True)
        for module in model.modules()
        if class_name(module) in classes
    ]
    with torch.no_grad(), contextlib.suppress(_SeenError):
        model(torch.randn(1, *model.pretrained_cfg["input_size"]))
    for handle in handles:
        handle.remove()
    assert found.keys() == classes, f"{name} does not call {sorted(classes - found.keys())}"
    return found


def smallest(found: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Returns the models that are tried, each with the classes that it is tried for: the smallest that has a class."""
    chosen: dict[str, list[str]] = {}
    for cls in sorted({cls for each in found for cls in each["patched"]}):
        having = [each for each in found if cls in each["patched"]]
        chosen.setdefault(min(having, key=lambda each: (each["parameters"], each["name"]))["name"], []).append(cls)
    return chosen


def try_out_all(chosen: dict[str, list[str]], kept: Kept) -> dict[str, dict[str, Any]]:
    """Tries models out, each for some classes; returns what was found, by class."""
    found: dict[str, dict[str, Any]] = {}
    for name, classes in chosen.items():
        found |= kept(f"try {name}: {' '.join(classes)}", lambda name=name, classes=classes: try_out(name, classes))
    return found
