"""The registry: what is patched, with what, and since when.

A host is patched module by module: at once where a module is already imported, and otherwise when it is. Patching swaps
the code object of a function, not the function: old instances, subclasses, names imported before and captured bound
methods are all patched, and revert is exact.

``func_d`` is a submodule of every instance, attached when the instance is made or unpickled, and to those that live
when the patch comes. Nothing here imports torch before a host is there to be patched.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import gc
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from . import importing, reporting, rewriting
from .errors import ConflictError, LwpfError, RewriteError
from .hosts import HOSTS, Host
from .rewriting import Site
from .settings import Settings, check_hosts, split_list

if TYPE_CHECKING:
    from torch import nn

    from .forgetting import FuncD

_lock = threading.RLock()


@dataclass
class PatchedSite:
    """A site whose code was swapped.

    Attributes:
        site: The site.
        owner: The class.
        function: The function object whose code was swapped.
        original: The code that stood there.
        patched: The code that stands there now.
        wrappers: The wrappers around the owner's methods that make instances, by name, with what they replaced.
        known: Whether its syntax tree is one that is known to be right to edit.
    """

    site: Site
    owner: type
    function: FunctionType
    original: CodeType
    patched: CodeType
    known: bool
    wrappers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Applied:
    """A host that was asked to be patched.

    Attributes:
        host: The host.
        settings: How.
        sites: What has been patched of it so far.
        complete: Whether its package has been imported to the end.
    """

    host: Host
    settings: Settings
    sites: list[PatchedSite] = field(default_factory=list)
    complete: bool = False


_applied: dict[str, Applied] = {}


# --- what users call ------------------------------------------------------------------------------------------------


def apply(
    host: str | Iterable[str],
    *,
    func_d: Any = "relu",
    masking: str = "exclude",
    backend: str = "auto",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> None:
    """Patches a host, now or when it is imported. Applying again with other settings replaces them.

    Args:
        host: A host's name, such as ``"timm"``, or several.
        func_d: The forgetting function: text such as ``"relu"`` or ``"pfu:mu=dmedian,bias=mu,sigma=0.01"``, a
            :class:`lwpf_patch.FuncD`, or a callable that maps scores to ``(D(s), D'(s))``. Each attention module gets a
            copy of its own.
        masking: ``"exclude"`` keeps keys that a mask hides out of everything; ``"paper"`` is the official recipe, which
            lets them back into the denominator.
        backend: Which implementation of the operator computes.
        include: Glob patterns over site names such as ``"timm.layers.attention.Attention"``; default all.
        exclude: Glob patterns over site names to leave alone.

    Raises:
        SettingsError: An unknown host, func_d, masking or backend, or a pattern that matches no site.
        HostNotInstalledError: The host is not installed.
        RewriteError: A function of the host has a shape that is not known.
        ConflictError: Someone else has patched a function that would be patched.
    """
    names = split_list(host) if isinstance(host, str) else tuple(host)
    check_hosts(names, "apply()", HOSTS)
    settings = Settings(func_d, masking, backend, include, exclude)  # type: ignore[arg-type]
    for name in names:
        request(name, settings)


def request(name: str, settings: Settings) -> None:
    """Patches a host as ``apply`` does, with settings that have been read already."""
    host = HOSTS[name]
    with _lock:
        host.selected(settings)
        host.root()
        if not isinstance(settings.func_d, str) or "torch" in sys.modules:
            prototype(host, settings)  # raises for a wrong one
        before = _applied.get(name)
        if before is not None and before.settings == settings:
            return
        if before is not None:
            _revert(before)
        applied = Applied(host, settings)
        try:
            _patch_loaded(applied)
        except BaseException:
            _revert(applied)
            if before is not None:
                _patch_loaded(Applied(host, before.settings))
            raise
        reporting.forget_use(name)


def revert(host: str | None = None) -> None:
    """Restores the very code that stood there before ``apply``.

    Args:
        host: The host's name, None for all.

    Raises:
        SettingsError: There is no such host.
        ConflictError: Someone else has patched over our patch since.
    """
    names = list(_applied) if host is None else check_hosts([host], "revert()", HOSTS)
    with _lock:
        for name in names:
            if name in _applied:
                _revert(_applied[name])


@contextlib.contextmanager
def patched(host: str, **settings: Any) -> Iterator[None]:
    """Patches a host for the length of a ``with`` block; afterwards it is as it was before, patched or not.

    Args:
        host: The host's name.
        **settings: As for :func:`apply`.

    Raises:
        LwpfError: As for :func:`apply`.
    """
    before = _applied.get(host)
    apply(host, **settings)
    try:
        yield
    finally:
        if before is None:
            revert(host)
        else:
            request(host, before.settings)


def status() -> dict[str, Any]:
    """Returns what is patched, as plain data: for each host its version, state, settings and sites."""
    with _lock:
        return {"hosts": {name: _host_status(host) for name, host in HOSTS.items()}}


def _host_status(host: Host) -> dict[str, Any]:
    try:
        host.root()
        version = host.version()
    except LwpfError as error:
        return {"installed": False, "state": "not installed", "hint": str(error)}
    applied = _applied.get(host.name)
    if applied is None:
        return {"installed": True, "version": version, "state": "off"}
    return {
        "installed": True,
        "version": version,
        "state": "patched" if applied.sites else "waiting for its import",
        "called": reporting.was_used(host.name),
        "modules": len(_living([site.owner for site in applied.sites])),
        "settings": applied.settings.describe(),
        # by name: a module that was reloaded has two classes of one name, both patched
        "sites": list(
            {
                site.site.name: {"name": site.site.name, "function": site.site.qualname, "known": site.known}
                for site in applied.sites
            }.values()
        ),
    }


# --- patching and reverting -----------------------------------------------------------------------------------------


def _patch_loaded(applied: Applied) -> None:
    """Patches the modules of a host that are imported already, and watches for the others."""
    host = applied.host
    _applied[host.name] = applied
    importing.watch({host.name, *host.modules()}, on_import)
    for name in host.modules():
        module = sys.modules.get(name)
        if module is not None:
            _patch_module(applied, module)
    if host.name in sys.modules and not _is_initializing(sys.modules[host.name]):
        _check_complete(applied)


def on_import(module: ModuleType) -> None:
    """Patches a module that has just been imported, or reloaded."""
    with _lock:
        for applied in list(_applied.values()):
            if module.__name__ in applied.host.modules():
                _patch_module(applied, module)
            if module.__name__ == applied.host.name:
                _check_complete(applied)


def _check_complete(applied: Applied) -> None:
    applied.host.check_found([site.site for site in applied.sites], applied.host.selected(applied.settings))
    applied.complete = True
    called = sorted({site.site.owner for site in applied.sites})
    from . import backends

    backend, _ = backends.choose(applied.settings.backend)
    settings = applied.settings.describe()
    reporting.info(
        f"{applied.host.name} {_live_version(applied.host)}: {', '.join(called)} patched; func_d {settings['func_d']}, "
        f"masking {settings['masking']}, backend {backend}"
    )


def _live_version(host: Host) -> str:
    return getattr(sys.modules.get(host.name), "__version__", None) or host.version()


def _is_initializing(module: ModuleType) -> bool:
    return getattr(module.__spec__, "_initializing", False)


def _patch_module(applied: Applied, module: ModuleType) -> None:
    sites = [site for site in applied.host.selected(applied.settings) if site.module == module.__name__]
    sites = [site for site in sites if _is_defined_here(module, site)]
    if not sites:
        return
    found = locate(module, sites)  # raises before anything is changed
    func_d = prototype(applied.host, applied.settings)
    for site in found:
        site.function.__code__ = site.patched
        applied.sites.append(site)
        _wrap_makers(site, func_d)
        if not site.known:
            reporting.warn(
                f"{site.site.module}.{site.site.qualname} of {applied.host.name} {_live_version(applied.host)} is a "
                f"version that lwpf_patch has not been tested with; its shape is known, and it is patched. `lwpf diff "
                f"{applied.host.name}` shows how"
            )
    _attach_to_living([site.owner for site in found], func_d)
    forget_compiled()


def _is_defined_here(module: ModuleType, site: Site) -> bool:
    owner = getattr(module, site.owner, None)
    return isinstance(owner, type) and owner.__module__ == module.__name__


def locate(module: ModuleType, sites: list[Site]) -> list[PatchedSite]:
    """Finds the functions of some sites and their patched code, and checks that nothing stands in the way.

    Raises:
        RewriteError: The source is not there or has a shape that is not known.
        ConflictError: A function is not what the module's source says.
    """
    path = inspect.getsourcefile(module)
    loader: Any = getattr(module.__spec__, "loader", None)
    source = loader.get_source(module.__name__) if hasattr(loader, "get_source") else None
    if path is None or source is None:
        raise RewriteError(f"{module.__name__} cannot be patched: its source is not available")
    plan = rewriting.plan(path, source, sites)
    codes = plan.compile()
    found = []
    for site in sites:
        owner = getattr(module, site.owner)
        function = owner.__dict__.get(site.qualname.rpartition(".")[2])
        original, new = codes[site.qualname]
        ours = _patched_site(function)
        live = ours.original if ours else getattr(function, "__code__", None)
        # type() and not isinstance(): a wrapt proxy claims to be a function and hands out the code of another one.
        if type(function) is not FunctionType or live != original or len(live.co_freevars) != len(new.co_freevars):
            raise ConflictError(
                f"{site.module}.{site.qualname} is not the code of its source file {path}: it is "
                f"{_describe(function)}. lwpf_patch does not rewrite another patch: remove that one, apply lwpf_patch "
                "before it, or leave this site out with exclude="
            )
        found.append(PatchedSite(site, owner, function, live, new, site not in plan.unknown))
    return found


def _patched_site(function: object) -> PatchedSite | None:
    sites = (site for applied in _applied.values() for site in applied.sites)
    return next((site for site in sites if site.function is function), None)


def _describe(function: object) -> str:
    module = getattr(function, "__module__", None)
    code = getattr(function, "__code__", None)
    where = f" at {code.co_filename}:{code.co_firstlineno}" if code is not None else ""
    return f"{getattr(function, '__qualname__', function)!r} of module {module}{where} ({type(function).__name__})"


def _revert(applied: Applied) -> None:
    for site in applied.sites:
        if site.function.__code__ is not site.patched:
            raise ConflictError(
                f"{site.site.module}.{site.site.qualname} was patched again after lwpf_patch: its code is now that of "
                f"{_describe(site.function)}. Remove that patch first; lwpf_patch does not undo it"
            )
        for name, wrapper in site.wrappers.items():
            if site.owner.__dict__.get(name) is not wrapper:
                raise ConflictError(
                    f"{site.site.module}.{site.site.owner}.{name} was patched again after lwpf_patch, by "
                    f"{_describe(site.owner.__dict__.get(name))}. Remove that patch first; lwpf_patch does not undo it"
                )
    for site in applied.sites:
        site.function.__code__ = site.original
        for name, wrapper in site.wrappers.items():
            original = wrapper.__wrapped__
            if any(base.__dict__.get(name) is original for base in site.owner.__mro__[1:]):
                delattr(site.owner, name)
            else:
                setattr(site.owner, name, original)
    _applied.pop(applied.host.name, None)
    if not _applied:
        importing.unwatch()
    if applied.sites:
        _detach_from_living([site.owner for site in applied.sites], applied.host.name)
        forget_compiled()


def forget_compiled() -> None:
    """Makes torch.compile and torch.jit.script look again: both keep what they compiled of a class by its class."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
    recursive = sys.modules.get("torch.jit._recursive")
    if recursive is not None:
        recursive.concrete_type_store.type_store.clear()
        recursive.concrete_type_store.methods_compiled.clear()


# --- func_d on the instances ----------------------------------------------------------------------------------------


def prototype(host: Host, settings: Settings) -> FuncD:
    """Makes the func_d of which every instance gets a copy."""
    from . import forgetting

    func_d = copy.deepcopy(forgetting.make_func_d(settings.func_d, settings.origin("func_d")))
    func_d.masking, func_d.backend, func_d.host = settings.masking, settings.backend, host.name
    return func_d


def _attach(module: nn.Module, template: FuncD) -> None:
    """Gives an instance its func_d, unless it has one of its own."""
    if "func_d" in module._modules:
        return
    if "func_d" in module.__dict__ or hasattr(type(module), "func_d"):
        raise ConflictError(
            f"{type(module).__module__}.{type(module).__qualname__} has an attribute func_d of its own "
            f"({getattr(module, 'func_d', None)!r}); lwpf_patch needs that name: rename it, or exclude this class"
        )
    func_d = copy.deepcopy(template)
    func_d.attached = True
    func_d.train(module.training)
    module.func_d = func_d


def _wrap_makers(site: PatchedSite, template: FuncD) -> None:
    """Has every instance that is constructed, unpickled or copied from now on come with its func_d."""
    import wrapt

    def attach_after(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        _attach(instance, template)
        return result

    for name in ("__init__", "__setstate__"):
        site.wrappers[name] = wrapt.wrap_function_wrapper(site.owner, name, attach_after)


def attach_if_applied(module: nn.Module) -> None:
    """Gives an instance of a patched class the func_d of its host, if it has none."""
    with _lock:
        for applied in _applied.values():
            if any(isinstance(module, site.owner) for site in applied.sites):
                _attach(module, prototype(applied.host, applied.settings))


def _living(owners: list[type]) -> list[Any]:
    classes = tuple(owners)
    # type() and not isinstance(): proxies of lazily imported modules answer for __class__ by importing.
    return [obj for obj in gc.get_objects() if issubclass(type(obj), classes)]


def _attach_to_living(owners: list[type], template: FuncD) -> None:
    for instance in _living(owners):
        if "_modules" in instance.__dict__:
            _attach(instance, template)


def _detach_from_living(owners: list[type], host: str) -> None:
    for instance in _living(owners):
        func_d = instance.__dict__.get("_modules", {}).get("func_d")
        if getattr(func_d, "attached", False) and func_d.host == host:
            del instance.func_d


# --- at exit --------------------------------------------------------------------------------------------------------


@atexit.register
def _report_at_exit() -> None:
    """Says so when a request to patch had no effect on this run."""
    for name, applied in _applied.items():
        if not applied.complete:
            reporting.warn(
                f"{name} was asked to be patched, but this program never imported it: nothing ran with partial "
                "forgetting"
            )
        elif not reporting.was_used(name):
            owners = sorted({site.site.name for site in applied.sites})
            reporting.warn(
                f"{name} was patched, but no patched forward was ever called: nothing ran with partial forgetting. The "
                f"model uses none of {', '.join(owners)}"
            )
