"""What lives: the classes that there are, and the instances of some of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any

from . import frames


def with_subclasses(classes: Iterable[type]) -> list[type]:
    """Return some classes and their subclasses, bases first."""
    found = {id(cls): cls for cls in classes}
    left = list(found.values())
    while left:
        subclasses: list[type] = type.__subclasses__(left.pop())
        for cls in subclasses:
            if id(cls) not in found:
                found[id(cls)] = cls
                left.append(cls)
    return list(found.values())


def module_classes() -> list[type]:
    """Return the subclasses of ``nn.Module``; none before torch has been imported."""
    torch: Any = sys.modules.get("torch")
    return with_subclasses([torch.nn.Module]) if hasattr(torch, "nn") else []


def living(classes: Iterable[type]) -> list[Any]:
    """Return the instances of some classes that live, in one pass over all objects."""
    # Classes by type() and not isinstance(): proxies of lazily imported modules answer for __class__ by importing. By
    # identity, because a metaclass may compare its classes in any way.
    wanted = {id(cls): cls for cls in with_subclasses(classes)}
    if not wanted:
        return []
    # An instance refers to its class. gc.get_objects() would do too, but what another thread is just making, such as
    # tuple(generator), cannot be finished while somebody has a reference to it.
    candidates = gc.get_referrers(*wanted.values())
    if gc.get_freeze_count():
        candidates = [*candidates, *reachable()]
    found = {id(obj): obj for obj in candidates if id(type(obj)) in wanted}
    return list(found.values())


def reachable() -> list[Any]:
    """Return what can be reached from modules and frames; ``gc.freeze`` hides objects from the collector."""
    left: list[Any] = [vars(module) for module in list(sys.modules.values()) if hasattr(module, "__dict__")]
    left += frames.variables()
    found = {id(obj): obj for obj in left}
    while left:
        referents, left = gc.get_referents(*left), []
        for obj in referents:
            if id(obj) not in found and gc.is_tracked(obj):
                found[id(obj)] = obj
                left.append(obj)
    return list(found.values())
