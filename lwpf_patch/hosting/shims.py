"""Compatibility shims: what a host needs to run in a current environment.

A shim replaces attributes of the host's own modules and classes, and nothing else: the libraries that the host uses
stay as they are for everyone else. It applies only where it is needed, goes with ``revert``, and can be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

_MISSING = object()


class Replacement(NamedTuple):
    """An attribute that a shim sets.

    Attributes:
        target: A module or a class of the host.
        name: The attribute's name.
        value: What it becomes.
    """

    target: Any
    name: str
    value: Any


@dataclass(frozen=True)
class Shim:
    """One thing that a current environment breaks in a host, and how it is mended.

    Attributes:
        name: A short name.
        why: What is broken.
        modules: The host's modules concerned.
        broken: Return whether it is broken in this environment. Where the library that it asks about is not
            installed, it may raise an ImportError.
        replacements: What to replace in a module.
    """

    name: str
    why: str
    modules: tuple[str, ...]
    broken: Callable[[], bool]
    replacements: Callable[[ModuleType], list[Replacement]]

    def is_needed(self) -> bool:
        """Return whether the shim is needed in this environment, which may lack what the host requires."""
        try:
            return self.broken()
        except ImportError:  # metadata.PackageNotFoundError is one, too
            return False


@dataclass
class AppliedShim:
    """A shim that is in place in one module; ``undo`` puts back what was there."""

    shim: Shim
    module: str
    _replaced: list[tuple[Replacement, Any]] = field(default_factory=list)

    @classmethod
    def apply(cls, shim: Shim, module: ModuleType) -> AppliedShim:
        """Apply a shim to a module."""
        applied = cls(shim, module.__name__)
        for replacement in shim.replacements(module):
            before = vars(replacement.target).get(replacement.name, _MISSING)
            setattr(replacement.target, replacement.name, replacement.value)
            applied._replaced.append((replacement, before))
        return applied

    def is_of(self, shim: Shim, module: ModuleType) -> bool:
        """Return whether this is a shim in a module."""
        return self.shim is shim and self.module == module.__name__

    def undo(self) -> None:
        """Put back what was there, unless someone else has replaced it since."""
        for replacement, before in reversed(self._replaced):
            if vars(replacement.target).get(replacement.name) is not replacement.value:
                continue
            if before is _MISSING:
                delattr(replacement.target, replacement.name)
            else:
                setattr(replacement.target, replacement.name, before)
