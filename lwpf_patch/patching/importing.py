"""Import hooks: patch a module when it is imported, or raise when a request could not be read or met.

A finder of our own and not a post-import hook of a library: those fire once, so that a reloaded module would stay
unpatched, and cannot stop an import.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

#: Where the class of all of torch's modules is defined.
MODULE_OF_MODULES = "torch.nn.modules.module"


class _Watcher:
    """A finder that finds nothing itself: it has modules of some names reported right after they were executed."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.executing: set[str] = set()
        self.callback: Callable[[ModuleType], None] = lambda module: None
        self.not_found: Callable[[str, str], None] = lambda name, where: None

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
        if (importer := _importer()) is not None:
            self.not_found(name, f"{importer.f_code.co_filename}:{importer.f_lineno}")
        return None

    def _report_after(self, spec: ModuleSpec) -> None:
        # On the loader's instance, which belongs to this spec alone: its type and everything else stay as they are.
        loader: Any = spec.loader
        if any(loader is finder for finder in sys.path_importer_cache.values()):
            loader = spec.loader = copy.copy(loader)  # that of a zip file, which loads all of its modules
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            self.executing.add(spec.name)
            try:
                execute(module)
            finally:
                self.executing.discard(spec.name)
            self.callback(module)

        loader.exec_module = exec_module


def _importer() -> FrameType | None:
    """Return the frame whose import looks for a module; None for a question such as importlib.util.find_spec."""
    frame: FrameType | None = sys._getframe(1)
    imports = False
    while frame is not None and (
        frame.f_code.co_name == "find_spec" or frame.f_globals.get("__name__", "").startswith(("importlib", "_frozen_"))
    ):
        if frame.f_code is importlib.util.find_spec.__code__:
            return None
        imports = imports or frame.f_code.co_name == "_find_and_load_unlocked"
        frame = frame.f_back
    return frame if imports else None


_watcher = _Watcher()


def watch(names: Iterable[str], callback: Callable[[ModuleType], None], not_found: Callable[[str, str], None]) -> None:
    """Have a function called with each module of some names, right after it was imported or reloaded.

    Args:
        names: The names of the modules.
        callback: Called with the module. An exception that it raises makes the import fail.
        not_found: Called with the name of a module that an import does not find, and where the import stands; it may
            raise. Not called for questions such as ``importlib.util.find_spec``.
    """
    _watcher.names |= set(names)
    _watcher.callback, _watcher.not_found = callback, not_found
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)


def unwatch() -> None:
    """End all watching."""
    _watcher.names = set()
    if _watcher in sys.meta_path:
        sys.meta_path.remove(_watcher)


def is_initializing(module: ModuleType) -> bool:
    """Return whether a module is being imported."""
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


def is_executing(name: str) -> bool:
    """Return whether the code of a watched module is running."""
    return name in _watcher.executing


def wait_for(names: Iterable[str]) -> list[str]:
    """Wait for those modules that were being imported, by other threads, before they were watched.

    Hold no lock that an import could need.

    Returns:
        The names of those that cannot be waited for: they are being imported by this very thread.
    """
    left = []
    for name in names:
        module = sys.modules.get(name)
        if module is None or not is_initializing(module) or name in _watcher.executing:
            continue
        try:
            importlib.import_module(name)  # returns when the other thread has finished
        except Exception:
            continue  # it failed in the other thread, which says so
        if is_initializing(module) and sys.modules.get(name) is module:
            left.append(name)
    return left


class _EndOfSite:
    """A finder that finds nothing itself: ``site`` looks for ``sitecustomize`` once it has read all .pth files."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "sitecustomize":
            return None
        sys.meta_path.remove(self)
        self.callback()
        # The caller goes through a list that has changed, and might leave out a finder.
        specs = (finder.find_spec(name, path, target) for finder in list(sys.meta_path))
        return next((spec for spec in specs if spec is not None), None)


def after_site(callback: Callable[[], None]) -> None:
    """Have a function called when the interpreter has read all .pth files, at once if that is over."""
    frame: FrameType | None = sys._getframe(1)
    functions = set()
    while frame is not None:
        if frame.f_globals.get("__name__") == "site":
            functions.add(frame.f_code.co_name)
        frame = frame.f_back
    if "main" in functions and not functions & {"execsitecustomize", "execusercustomize"}:
        sys.meta_path.insert(0, _EndOfSite(callback))
    else:
        callback()


class _Raiser:
    """A finder that raises."""

    def __init__(self, error: BaseException, names: Iterable[str]) -> None:
        self.error = error
        self.names = set(names)

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> None:
        if name in self.names:
            raise self.error


def arm(error: BaseException, names: Iterable[str]) -> None:
    """Make every import of some modules fail with an error.

    An exception in a start-up file is printed and the script runs on; this is how a wrong request stops it. Where torch
    is imported already, as by a package that declares a host, every forward pass of a module fails, too.
    """
    sys.meta_path.insert(0, _Raiser(error, names))
    of_torch = sys.modules.get(MODULE_OF_MODULES)
    if of_torch is not None:

        def refuse(module: Any, inputs: Any) -> None:
            raise error

        _refusals.append(of_torch.register_module_forward_pre_hook(refuse))


#: The hooks that :func:`arm` has registered with torch.
_refusals: list[Any] = []


def disarm() -> None:
    """Undo :func:`arm`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Raiser)]
    while _refusals:
        _refusals.pop().remove()
