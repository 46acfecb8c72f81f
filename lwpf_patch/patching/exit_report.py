"""The report at exit: says so when a request to patch had no effect on what the process computed.

A process that computed nothing has nothing to report: the parent of ``accelerate launch``, of pytest-xdist or of a
notebook's kernel, a script whose arguments were wrong. What tells them apart is whether any module of torch was called.
Until the first such call, ``torch.nn.Module.__call__`` runs code that takes note of it and puts the original back. A
global forward hook would do the same, but ``torch.compile`` warns of those where it meets them, and guards on them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from .. import reporting
from ..hosting import ModularHost
from ..observing import requesting
from . import importing, owners

if TYPE_CHECKING:
    import torch

    from .state import PatchedHost

_called = False
_listening: tuple[FunctionType, CodeType] | None = None


# --- whether anything was computed ----------------------------------------------------------------------------------


def listen(module: ModuleType) -> None:
    """Take note of the first call of any module from now on.

    Args:
        module: That which defines ``Module``.
    """
    global _listening
    function: Any = vars(module.Module).get("__call__")
    # type() and not isinstance(): a wrapt proxy claims to be a function.
    if _called or type(function) is not FunctionType or function.__code__.co_freevars:
        return
    if function.__code__ is not _first_call.__code__:
        _listening = function, function.__code__
        function.__code__ = _first_call.__code__


def unlisten() -> None:
    """Put the original code back, unless someone else's stands there."""
    if _listening is not None and _listening[0].__code__ is _first_call.__code__:
        _listening[0].__code__ = _listening[1]


def _first_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    # This code runs as a function of torch, whose globals it sees.
    if torch.compiler.is_compiling():
        return self._call_impl(*args, **kwargs)
    from lwpf_patch.patching import exit_report

    return exit_report.note_call()(self, *args, **kwargs)


def note_call() -> Callable[..., Any]:
    """Note that this process computes.

    Returns:
        What calls a module.
    """
    global _called
    assert _listening is not None
    _called = True
    unlisten()
    return _listening[0]


def has_computed() -> bool:
    """Return whether a module was called or compiled in this process; True where that cannot be known."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")  # what it compiles calls modules in its own way
    compiled = dynamo is not None and bool(dynamo.counters["frames"])
    return _called or compiled or (_listening is None and importing.MODULE_OF_MODULES in sys.modules)


# --- the report -----------------------------------------------------------------------------------------------------


def report(applied: Mapping[str, PatchedHost]) -> None:
    """Say what came of the requests to patch, where it is less than was asked for.

    Args:
        applied: The requests, by the name of the host.
    """
    if hasattr(sys, "last_type") and not hasattr(sys, "ps1"):
        return  # it ended with a traceback, which explains itself; an interactive session goes on after one
    if not has_computed():
        return
    for name, each in applied.items():
        if message := _of_host(name, each):
            reporting.warn(message)
    requesting.report()
    patterns = dict.fromkeys(pattern for each in applied.values() for pattern in each.settings.exclude_models)
    if idle := owners.unmatched(patterns):
        reporting.warn(
            f"exclude_models: {', '.join(map(repr, idle))} matched no model whose attention can be patched, and left "
            "none out. A pattern is matched, while a model is constructed, with the class of the model and of the "
            "modules around its attention, and with the name that timm.create_model was given"
        )


def _of_host(name: str, applied: PatchedHost) -> str | None:
    if not applied.complete:
        places = dict.fromkeys(applied.host.places_of_attention())
        wanted = "it" if name not in sys.modules else " or ".join(places)
        return (
            f"{name} was asked to be patched, but this program never imported {wanted}: nothing ran with partial "
            "forgetting"
        )
    if not reporting.was_used(name) and isinstance(applied.host, ModularHost):
        return (
            f"{name} was patched, but no patched attention was ever called: nothing ran with partial forgetting. The "
            f"model {applied.host.no_model}"
        )
    if not reporting.was_used(name):
        classes = sorted({site.site.name for site in applied.sites} or applied.registered)
        shown = ", ".join(classes) if len(classes) <= 8 else f"its {len(classes)} classes (lwpf status lists them)"
        left_out = ", or was left out by exclude_models" if applied.settings.exclude_models else ""
        return (
            f"{name} was patched, but no patched forward was ever called: nothing ran with partial forgetting. The "
            f"model uses none of {shown}{left_out}"
        )
    if applied.settings.uhop is not None:
        from ..uhop import report as uhop

        return uhop.report(name)
    return None
