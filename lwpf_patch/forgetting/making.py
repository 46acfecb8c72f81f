"""From what a user gives as func_d to the module that computes it."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import SettingsError, shown
from ..settings import func_d_factory, parse_func_d
from .base import FuncD
from .custom import CustomFuncD
from .none import NoForgetting
from .pfu import PFU
from .relu import ReLU

_BUILT_IN = {"relu": ReLU, "pfu": PFU, "none": NoForgetting}


def make_func_d(func_d: Any, origin: str = "func_d") -> FuncD:
    """Make a module from what the user gave as func_d.

    Args:
        func_d: Text such as ``"pfu:mu=dmedian,bias=mu,sigma=0.01"``, a :class:`FuncD`, or a callable that maps scores
            to ``(D(s), D'(s))``.
        origin: Where it came from, for the error messages.

    Returns:
        A :class:`FuncD`; the object itself if it is one.

    Raises:
        SettingsError: It is none of these, or a registered factory did not take its options.
    """
    if isinstance(func_d, FuncD):
        return func_d
    if isinstance(func_d, str):
        name, options = parse_func_d(func_d, origin)
        factory = func_d_factory(name)
        if factory is None:
            built_in: Any = _BUILT_IN[name]
            return built_in(**options)
        try:
            made = factory(**options)
        except Exception as error:
            raise SettingsError(f"func_d {func_d!r} (from {origin}): its factory raised {error!r}") from error
        return make_func_d(made, f"the factory of {name!r}")
    if callable(func_d) and not inspect.isclass(func_d):
        return CustomFuncD(func_d)
    raise SettingsError(
        f"func_d {shown(func_d)} (from {origin}) is neither text, nor a FuncD, nor a function of scores: pass 'relu', "
        "lwpf_patch.PFU(...), or a callable that returns (D(s), D'(s))"
    )
