"""Traces: who is tracing, and what a module of ours becomes in a trace by torch.fx.

It becomes a call of that very module, so that the traced model follows train() and eval(), and Stage I still runs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from . import compiling


def is_exporting() -> bool:
    """Return whether torch.export is at work."""
    return torch.compiler.is_compiling() and _is_exporting()


# What torch.compile traces of PyTorch's own question is always True up to 2.9, at least; and what answers it, False
# where torch.export traces by torch.compile (strict=True).
@compiling.constant
def _is_exporting() -> bool:
    if torch.compiler.is_exporting():
        return True
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.export" and frame.f_code.co_name.startswith("export"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_jit_tracing() -> bool:
    """Return whether torch.jit.trace, or the export to ONNX that uses it, is at work."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def not_recorded() -> Iterator[None]:
    """Keep what is computed out of the trace of torch.jit.trace, if one is being made."""
    if not is_jit_tracing():  # under a TorchDispatchMode, as FlopCounterMode is, to set the state fails
        yield
        return
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def call_module(module: nn.Module, *arguments: Any) -> Any:
    """Return the proxy of a call of a module; the first argument is a proxy."""
    tracer = _tracer(arguments[0])
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})


def call_method(module: nn.Module, method: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return the proxy of a call of a module's method; the first argument is a proxy.

    A method and not a function that takes the module, because torch.jit.script cannot pass a module to a function.
    """
    owner = as_argument(module, arguments[0])
    return _tracer(arguments[0]).create_proxy("call_method", method, (owner, *arguments), options)


def as_argument(module: nn.Module, beside: Any) -> Any:
    """Return a module as an argument of a call: in a trace by torch.fx a proxy, since that takes no modules.

    Args:
        module: The module.
        beside: Another argument of the call, which is a proxy in a trace.
    """
    if not isinstance(beside, fx.Proxy):
        return module
    tracer = _tracer(beside)
    return tracer.create_proxy("get_attr", tracer.path_of_module(module), (), {})


def _tracer(proxy: fx.Proxy) -> fx.Tracer:
    assert isinstance(proxy.tracer, fx.Tracer), "a module can only be traced as part of a module"
    return proxy.tracer
