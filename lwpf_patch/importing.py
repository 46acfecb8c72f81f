"""Import hooks: patch a module when it is imported, or raise when a request could not be read.

A finder of our own and not a post-import hook of a library: those fire once, so that a reloaded module would stay
unpatched, and cannot stop an import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Watcher:
    """A finder that finds nothing itself: it has modules of some names reported right after they were executed."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.callback: Callable[[ModuleType], None] = lambda module: None

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.names:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = (
                find_spec(name, path, target) if finder is not self and find_spec is not None else None
            )
            if spec is not None:
                self._report_after(spec)
                return spec
        return None

    def _report_after(self, spec: ModuleSpec) -> None:
        # On the loader's instance, which belongs to this spec alone: its type and everything else stay as they are.
        loader: Any = spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            self.callback(module)

        loader.exec_module = exec_module


_watcher = _Watcher()


def watch(names: Iterable[str], callback: Callable[[ModuleType], None]) -> None:
    """Has a function called with each module of some names, right after it was imported or reloaded.

    An exception that the function raises makes the import fail.
    """
    _watcher.names |= set(names)
    _watcher.callback = callback
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)


def unwatch() -> None:
    """Ends all watching."""
    _watcher.names = set()
    if _watcher in sys.meta_path:
        sys.meta_path.remove(_watcher)


class _Raiser:
    """A finder that raises."""

    def __init__(self, error: BaseException, names: Iterable[str]) -> None:
        self.error = error
        self.names = set(names)

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> None:
        if name in self.names:
            raise self.error


def arm(error: BaseException, names: Iterable[str]) -> None:
    """Makes every import of some modules fail with an error.

    An exception in a start-up file is printed and the script runs on; this is how a wrong request stops it.
    """
    sys.meta_path.insert(0, _Raiser(error, names))


def disarm() -> None:
    """Undoes :func:`arm`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Raiser)]
