"""The registry: what is patched, with what, and since when.

A host is patched module by module: at once where a module is already imported, and otherwise when it is. Patching swaps
the code object of a function, not the function: old instances, subclasses, names imported before and captured bound
methods are all patched, and revert is exact.

What the patched code calls are submodules of every instance; :mod:`lwpf_patch.attaching` puts them there. Nothing here
imports torch before a host is there to be patched.
"""

from __future__ import annotations

import atexit
import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from . import exit_report, importing, reporting, rewriting
from .attaching import Attachments, attach_to_living, detach_from_living, func_d_prototype, living
from .compat import AppliedShim, Shim
from .errors import ConflictError, LwpfError, RewriteError
from .hosts import HOSTS, Host
from .owners import Owners
from .rewriting import Site
from .settings import Settings, check_hosts, texts

if TYPE_CHECKING:
    from torch import nn

_lock = threading.RLock()


@dataclass
class PatchedSite:
    """A site whose code was swapped.

    Attributes:
        site: The site.
        owner: The class; None for a function of a module.
        function: The function object whose code was swapped.
        original: The code that stood there.
        patched: The code that stands there now.
        wrappers: The wrappers around the owner's methods that make instances, by name, with what they replaced.
        known: Whether its syntax tree is one that is known to be right to edit.
    """

    site: Site
    owner: type | None
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
        shims: The compatibility shims that are in place.
        complete: Whether every site that was asked for has been found.
    """

    host: Host
    settings: Settings
    sites: list[PatchedSite] = field(default_factory=list)
    shims: list[AppliedShim] = field(default_factory=list)
    complete: bool = False


_applied: dict[str, Applied] = {}


# --- what users call ------------------------------------------------------------------------------------------------


def apply(
    host: str | Iterable[str],
    *,
    func_d: Any = None,
    masking: str = "exclude",
    backend: str = "auto",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    compat: bool = True,
    uhop: Any = None,
    exclude_models: str | Iterable[str] | None = None,
) -> None:
    """Patches a host, now or when it is imported. Applying again with other settings replaces them.

    Args:
        host: A host's name, such as ``"timm"``, or several.
        func_d: The forgetting function: text such as ``"relu"`` or ``"pfu:mu=dmedian,bias=mu,sigma=0.01"``, a
            :class:`lwpf_patch.FuncD`, or a callable that maps scores to ``(D(s), D'(s))``. Each attention module gets a
            copy of its own. Default: ``"relu"``, or ``"none"`` with ``uhop``.
        masking: ``"exclude"`` keeps keys that a mask hides out of everything; ``"paper"`` is the official recipe, which
            lets them back into the denominator.
        backend: Which implementation of the operator computes.
        include: Glob patterns over site names such as ``"timm.layers.attention.Attention"``; default all.
        exclude: Glob patterns over site names to leave alone.
        compat: Whether to mend what a current environment breaks in a host; ``lwpf status`` lists these shims.
        uhop: U-Hop (Wu et al., ICML 2024): each attention module gets a feature map, and Stage I separates its keys
            after the first step of the optimizer. Text such as ``"iters=100,t=2,lr=0.1"``, or ``"on"``; apply it before
            the optimizer is made. None: no U-Hop.
        exclude_models: Glob patterns over names of models that stay plain, such as the teacher of a distillation: the
            class of a model, or of any module around the attention, and what ``timm.create_model`` calls it.

    Raises:
        SettingsError: An unknown host, func_d, masking, backend or option of uhop, or a pattern that matches no site.
        HostNotInstalledError: The host is not installed.
        RewriteError: A function of the host has a shape that is not known.
        ConflictError: Someone else has patched a function that would be patched.
    """
    names = check_hosts(texts(host), "apply()", HOSTS)
    settings = Settings(
        func_d, masking, backend, include, exclude, compat, uhop, exclude_models  # type: ignore[arg-type]
    )  # fmt: skip
    for name in names:  # all of them can be met before any of them is
        HOSTS[name].selected(settings)
        HOSTS[name].root()
    for name in names:
        request(name, settings)


def request(name: str, settings: Settings) -> None:
    """Patches a host as ``apply`` does, with settings that have been read already."""
    host = HOSTS[name]
    with _lock:
        host.selected(settings)
        host.root()
        if not isinstance(settings.func_d, str) or "torch" in sys.modules:
            func_d_prototype(host, settings)  # raises for a wrong one
        before = _applied.get(name)
        if before is not None and before.settings == settings:
            return
        if before is not None:
            _revert(before, keep_maps=settings.uhop is not None)
        applied = Applied(host, settings)
        try:
            _patch_loaded(applied)
        except BaseException:
            _revert(applied, keep_maps=before is not None and before.settings.uhop is not None)
            if before is not None:
                _patch_loaded(Applied(host, before.settings))
            raise
        if before is None:
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
    check_hosts([host], "patched()", HOSTS)
    before = _applied.get(host)
    apply(host, **settings)
    try:
        yield
    finally:
        if before is None:
            revert(host)
        else:
            request(host, before.settings)


def settings_of(host: str) -> Settings | None:
    """Return the settings that a host is patched with, None if it is not."""
    applied = _applied.get(host)
    return None if applied is None else applied.settings


def is_patched(host: str, qualname: str) -> bool:
    """Return whether a function of a host has its patched code."""
    applied = _applied.get(host)
    return applied is not None and any(site.site.qualname == qualname for site in applied.sites)


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
        "backends": reporting.backends_of(host.name),
        "shims": [{"name": shim.name, "why": shim.why, "state": _shim_state(applied, shim)} for shim in host.shims],
        "modules": len(living(_owners(applied.sites))),
        "feature_maps": _feature_maps(host.name) if applied.settings.uhop is not None else None,
        "settings": applied.settings.describe(),
        # by name: a module that was reloaded has two classes of one name, both patched
        "sites": list(
            {
                site.site.name: {"name": site.site.name, "function": site.site.qualname, "known": site.known}
                for site in applied.sites
            }.values()
        ),
    }


def _feature_maps(host: str) -> dict[str, int]:
    uhop = sys.modules.get(f"{__package__}.uhop")  # which imports torch
    return uhop.summary(host) if uhop is not None else {"modules": 0, "separated": 0}


def _shim_state(applied: Applied, shim: Shim) -> str:
    if not applied.settings.compat:
        return "refused"
    if any(each.shim is shim for each in applied.shims):
        return "applied"
    return "waiting for its import" if shim.needed() else "not needed"


# --- patching and reverting -----------------------------------------------------------------------------------------


def _patch_loaded(applied: Applied) -> None:
    """Patches the modules of a host that are imported already, and watches for the others."""
    host = applied.host
    _applied[host.name] = applied
    importing.watch([*host.modules(), exit_report.MODULE], on_import)
    modules = sys.modules.get(exit_report.MODULE)
    if modules is not None and not _is_initializing(modules):
        exit_report.listen(modules)
    for name in host.modules():
        module = sys.modules.get(name)
        if module is not None and not _is_initializing(module):
            _patch_module(applied, module)
    _check_complete(applied)


def on_import(module: ModuleType) -> None:
    """Patches a module that has just been imported, or reloaded."""
    if module.__name__ == exit_report.MODULE:
        exit_report.listen(module)
        return
    with _lock:
        for applied in list(_applied.values()):
            if module.__name__ in applied.host.modules():
                _patch_module(applied, module)
                _check_complete(applied, module.__name__)


def _check_complete(applied: Applied, just_imported: str = "") -> None:
    """Sees whether all that was asked for has been found, and says so once it has.

    Raises:
        RewriteError: Something is in none of its places, all of which have been imported.
    """
    loaded = {name: sys.modules[name] for name in applied.host.modules() if name in sys.modules}
    imported = {just_imported} | {name for name, module in loaded.items() if not _is_initializing(module)}
    found = [site.site for site in applied.sites]
    if applied.host.missing(found, applied.settings, imported) or applied.complete:
        return
    applied.complete = True
    places = list(dict.fromkeys(site.site.owner or site.site.qualname for site in applied.sites))
    settings = applied.settings.describe()
    uhop = f", uhop {settings['uhop']}" if settings["uhop"] else ""
    left_out = f", but not in {', '.join(settings['exclude_models'])}" if settings["exclude_models"] else ""
    reporting.info(
        f"{applied.host.name} {_live_version(applied.host)}: {', '.join(places)} patched; func_d {settings['func_d']}, "
        f"masking {settings['masking']}, backend {settings['backend']}{uhop}{left_out}"
    )


def _is_initializing(module: ModuleType) -> bool:
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


def _live_version(host: Host) -> str:
    return getattr(sys.modules.get(host.name), "__version__", None) or host.version()


def _patch_module(applied: Applied, module: ModuleType) -> None:
    for shim in applied.host.shims if applied.settings.compat else ():
        if module.__name__ in shim.modules and shim.needed():
            applied.shims.append(AppliedShim.apply(shim, module))
    sites = [site for site in applied.host.selected(applied.settings) if site.module == module.__name__]
    sites = [site for site in sites if _is_defined_here(module, site)]
    if not sites:
        return
    found = locate(module, sites, applied.settings.uhop is not None)  # raises before anything is changed
    attachments = Attachments(applied.host, applied.settings)
    for site in found:
        applied.sites.append(site)
        _swap(site, attachments)
        if not site.known:
            reporting.warn(
                f"{site.site.module}.{site.site.qualname} of {applied.host.name} {_live_version(applied.host)} is a "
                f"version that lwpf_patch has not been tested with; its shape is known, and it is patched. `lwpf diff "
                f"{applied.host.name}` shows how"
            )
    attach_to_living(attachments, _owned(found))
    forget_compiled()


def _swap(site: PatchedSite, attachments: Attachments) -> None:
    if site.owner is None:
        # A function that is called without func_d, past the modules of its library, forgets as its host does.
        site.function.__kwdefaults__ = {"func_d": attachments.func_d}
        if attachments.settings.uhop is not None:
            from .uhop import without_module

            site.function.__kwdefaults__["feature_map"] = without_module
    else:
        _wrap_makers(site, site.owner, attachments)
    site.function.__code__ = site.patched


def _swap_back(site: PatchedSite) -> None:
    site.function.__code__ = site.original
    if site.owner is None:
        site.function.__kwdefaults__ = None
        return
    for name, wrapper in site.wrappers.items():
        original = wrapper.__wrapped__
        if any(base.__dict__.get(name) is original for base in site.owner.__mro__[1:]):
            delattr(site.owner, name)
        else:
            setattr(site.owner, name, original)


def _owned(sites: list[PatchedSite]) -> list[tuple[type, Site]]:
    return [(site.owner, site.site) for site in sites if site.owner is not None]


def _owners(sites: list[PatchedSite]) -> list[type]:
    return [owner for owner, _ in _owned(sites)]


def _is_defined_here(module: ModuleType, site: Site) -> bool:
    found = getattr(module, site.owner or site.qualname, None)
    return getattr(found, "__module__", None) == module.__name__


def locate(module: ModuleType, sites: list[Site], uhop: bool = False) -> list[PatchedSite]:
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
    plan = rewriting.plan(path, source, sites, uhop)
    codes = plan.compile()
    found = []
    for site in sites:
        owner = getattr(module, site.owner) if site.owner else None
        function = vars(owner or module).get(site.qualname.rpartition(".")[2])
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


def _revert(applied: Applied, keep_maps: bool = False) -> None:
    for site in applied.sites:
        if site.function.__code__ is not site.patched:
            raise ConflictError(
                f"{site.site.module}.{site.site.qualname} was patched again after lwpf_patch: its code is now that of "
                f"{_describe(site.function)}. Remove that patch first; lwpf_patch does not undo it"
            )
        for name, wrapper in site.wrappers.items():
            if vars(site.owner).get(name) is not wrapper:
                raise ConflictError(
                    f"{site.site.module}.{site.site.owner}.{name} was patched again after lwpf_patch, by "
                    f"{_describe(vars(site.owner).get(name))}. Remove that patch first; lwpf_patch does not undo it"
                )
    for site in applied.sites:
        _swap_back(site)
    for shim in reversed(applied.shims):
        shim.undo()
    _applied.pop(applied.host.name, None)
    if not _applied:
        importing.unwatch()
        exit_report.unlisten()
    if applied.sites:
        detach_from_living(_owners(applied.sites), applied.host.name, keep_maps)
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


def _wrap_makers(site: PatchedSite, owner: type, attachments: Attachments) -> None:
    """Has every instance that is constructed, unpickled or copied from now on come with what it needs."""
    import wrapt

    def attach_after(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        attachments.attach(instance, site.site)
        return result

    for name in ("__init__", "__setstate__"):
        site.wrappers[name] = wrapt.wrap_function_wrapper(owner, name, attach_after)


def attach_if_applied(module: nn.Module) -> None:
    """Gives an instance of a patched class what its host's instances have."""
    with _lock:
        for applied in _applied.values():
            for owner, site in _owned(applied.sites):
                if isinstance(module, owner):
                    Attachments(applied.host, applied.settings).attach(module, site, Owners())


# --- at exit --------------------------------------------------------------------------------------------------------

atexit.register(exit_report.report, _applied)
