"""What torch.compile is told about functions of this package: when it is imported, and not before.

``torch.compiler`` imports all of ``torch._dynamo`` to mark a function. That takes a process 2 s and 150 MB, and most
processes compile nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import wrapt

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """Mark a function whose result torch.compile takes for a constant of what it traces; return the function.

    PyTorch 2.5 puts the result among the globals of the code that it compiles, by the name in the function's code:
    that must not be the name of the function there.
    """
    code: Any = getattr(function, "__code__")  # noqa: B009
    function.__code__ = code.replace(co_name=f"_result_of_{code.co_name.strip('<>')}")
    _when_it_comes(lambda _: torch.compiler.assume_constant_result(function))  # type: ignore[no-untyped-call]
    return function


def marked_as(function: _Function, other: Callable[..., Any]) -> _Function:
    """Mark a function as another one is marked, now or later; return the function."""
    function.__dict__ = other.__dict__
    return function


def whole(number: int) -> int:
    """Return a whole number as one that torch.compile does not leave open: what it compiles is for this one."""
    return operator.index(number)


def real(number: float) -> float:
    """Return a number as one that torch.compile does not leave open: what it compiles is for this one."""
    return math.ldexp(*math.frexp(number))  # the same bit by bit; of float() the number stays open


def opaque(function: _Function) -> _Function:
    """Mark a function that torch.compile puts into its graph without looking into it; return the function."""
    _when_it_comes(lambda _: torch.compiler.allow_in_graph(function))  # type: ignore[no-untyped-call]
    return function


def disable_in(namespace: dict[str, Any], name: str) -> None:
    """Have torch.compile leave out a function of a module, whose namespace is given."""

    def disable(_: Any) -> None:
        namespace[name] = torch.compiler.disable(namespace[name])  # type: ignore[no-untyped-call]

    _when_it_comes(disable)


def _when_it_comes(tell: Callable[[Any], Any]) -> None:
    wrapt.register_post_import_hook(tell, "torch._dynamo")
