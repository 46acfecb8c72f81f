"""From what a user gives as func_d to the module that computes it."""

from __future__ import annotations

from typing import Any

from ..errors import SettingsError
from ..specs import FuncDLike, FuncDSpec, func_d_factory, read_func_d
from .base import FuncD
from .custom import CustomFuncD
from .none import NoForgetting
from .pfu import PFU
from .relu import ReLU

_BUILT_IN = {"relu": ReLU, "pfu": PFU, "none": NoForgetting}


def make_func_d(func_d: FuncDLike, origin: str = "func_d") -> FuncD:
    """Make a module from what the user gave as func_d.

    Args:
        func_d: Text such as ``"pfu:mu=dmedian,bias=mu,sigma=0.01"``, or what was read from it; a :class:`FuncD`, or a
            callable that maps scores to ``(D(s), D'(s))``.
        origin: Where it came from, for the error messages.

    Returns:
        A :class:`FuncD`; the object itself if it is one.

    Raises:
        SettingsError: It is none of these, or a registered factory did not take its options.
    """
    read = read_func_d(func_d, origin)
    if isinstance(read, FuncDSpec):
        return _make(read, origin)
    return read if isinstance(read, FuncD) else CustomFuncD(read)


def _make(spec: FuncDSpec, origin: str) -> FuncD:
    factory = func_d_factory(spec.name, origin)
    if factory is None:
        built_in: Any = _BUILT_IN[spec.name]
        return built_in(**spec.options)
    try:
        made = factory(**spec.options)
    except Exception as error:
        raise SettingsError(f"func_d {str(spec)!r} (from {origin}): its factory raised {error!r}") from error
    return make_func_d(made, f"the factory of {spec.name!r}")
