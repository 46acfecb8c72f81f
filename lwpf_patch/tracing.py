"""Traces by torch.fx: what a module of ours becomes in one.

It becomes a call of that very module, so that the traced model follows train() and eval(), and Stage I still runs.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn


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
