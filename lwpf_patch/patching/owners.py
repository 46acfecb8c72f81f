"""To which model an attention module belongs: while that is constructed, and among those that live.

``exclude_models`` goes by it, and the warning about models that are only evaluated while another one trains.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ..hosting import ModularHost, RewrittenHost
from . import living

if TYPE_CHECKING:
    from torch import nn

_matched: set[str] = set()


def match(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Return whether one of some names matches one of some glob patterns, and note which patterns have matched."""
    names = set(names)
    found = {pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)}
    _matched.update(found)
    return bool(found)


def unmatched(patterns: Iterable[str]) -> list[str]:
    """Return the patterns that have matched no model of this process so far."""
    return [pattern for pattern in patterns if pattern not in _matched]


def names_in_construction(module: nn.Module, host: RewrittenHost | ModularHost) -> set[str]:
    """Return the names of the models that a module is being constructed for.

    These are the names of the classes whose constructors are running, and what the host's functions were asked for.
    """
    from torch import nn

    names = set(_class_names(type(module)))
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount:
            constructed = type(frame.f_locals.get(code.co_varnames[0]))
            names.update(_class_names(constructed) if issubclass(constructed, nn.Module) else ())
        elif host.names_in_call is not None and frame.f_globals.get("__name__", "").startswith(f"{host.name}."):
            names.update(host.names_in_call(code.co_name, frame.f_locals))
        frame = frame.f_back
    return names


def names_of(model: nn.Module, host: RewrittenHost | ModularHost) -> set[str]:
    """Return the names of a model: those of its class, and what the host calls it."""
    return {*_class_names(type(model)), *(host.names_of_model(model) if host.names_of_model is not None else ())}


def _class_names(cls: type) -> tuple[str, str]:
    return cls.__name__, f"{cls.__module__}.{cls.__qualname__}"


class Owners:
    """The modules that live, each with those that own it; made by one pass over all objects of the process."""

    def __init__(self) -> None:
        from torch import nn

        self._owners: dict[int, list[nn.Module]] = {}
        # type() and not isinstance(): proxies of lazily imported modules answer for __class__ by importing.
        found = [*gc.get_objects(), *(living.reachable() if gc.get_freeze_count() else ())]
        for module in {id(each): each for each in found if issubclass(type(each), nn.Module)}.values():
            for part in module.__dict__.get("_modules", {}).values():
                if part is not None:
                    self._owners.setdefault(id(part), []).append(module)

    def of(self, module: nn.Module) -> list[nn.Module]:
        """Return a module and all that own it, from the inside to the outside."""
        found: dict[int, Any] = {id(module): module}
        waiting = [module]
        while waiting:
            for owner in self._owners.get(id(waiting.pop(0)), ()):
                if id(owner) not in found:
                    found[id(owner)] = owner
                    waiting.append(owner)
        return list(found.values())

    def names(self, module: nn.Module, host: RewrittenHost | ModularHost) -> Iterator[str]:
        """Return the names of the models that a module is part of."""
        for model in self.of(module):
            yield from names_of(model, host)
