"""Traces: who is tracing, and what a module of ours becomes in a trace by torch.fx.

It becomes a call of that very module, so that the traced model follows train() and eval(), and Stage I still runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from . import compiling


@compiling.constant  # up to 2.9, at least, torch.compile takes it for True whatever it does
def is_exporting() -> bool:
    """Return whether torch.export is at work."""
    return torch.compiler.is_exporting()


def is_jit_tracing() -> bool:
    """Return whether torch.jit.trace, or the export to ONNX that uses it, is at work."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()  # type: ignore[no-untyped-call]


def call_module(module: nn.Module, *arguments: Any) -> Any:
    """Return the proxy of a call of a module; the first argument is a proxy."""
    tracer = _tracer(arguments[0])
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})


def call_method(module: nn.Module, method: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return the proxy of a call of a module's method; the first argument is a proxy.

    A method and not a function that takes the module, because torch.jit.script cannot pass a module to a function.
    """
    tracer = _tracer(arguments[0])
    owner = tracer.create_proxy("get_attr", tracer.path_of_module(module), (), {})
    return tracer.create_proxy("call_method", method, (owner, *arguments), options)


def _tracer(proxy: fx.Proxy) -> fx.Tracer:
    assert isinstance(proxy.tracer, fx.Tracer), "a module can only be traced as part of a module"
    return proxy.tracer
