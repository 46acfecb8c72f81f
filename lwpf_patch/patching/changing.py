"""Taking a host from one state to another: patched with some settings, or not at all.

A host is patched module by module: at once where a module is already imported, and otherwise when it is. Patching swaps
the code object of a function, not the function: old instances, subclasses, names imported before and captured bound
methods are all patched, and revert is exact. What the patched code calls are submodules of every instance;
:mod:`lwpf_patch.patching.attaching` puts them there.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from .. import reporting
from ..errors import ConflictError, HostNotInstalledError, LwpfError, RewriteError
from ..hosting import Host, ModularHost, RegisteredHost, RewrittenHost, Site
from ..hosting.shims import AppliedShim
from ..hosts import HOSTS
from ..rewriting import source_of
from ..settings import Settings, in_words
from ..specs import FuncDSpec
from . import deciding, exit_report, frames, importing
from .attaching import Makers, detach
from .living import living
from .owners import Owners
from .state import LOCK, PATCHED, TRANSITIONS, PatchedHost
from .swapping import ClassesByName, PatchedSite, classes_by_name, describe, locate

if TYPE_CHECKING:
    from torch import nn


_MANY = 8


def request(name: str, settings: Settings) -> None:
    """Patche a host as ``apply`` does, with settings that have been read already.

    Whether the host is installed is not asked: the start-up hook comes before the script's folder is on the path, so
    that is seen when the host is imported.
    """
    host = HOSTS[name]
    host.check(settings)
    torch = sys.modules.get("torch")
    if not isinstance(settings.func_d, FuncDSpec) or (torch is not None and not importing.is_initializing(torch)):
        host.prototypes(settings)  # raises for a wrong func_d
    with TRANSITIONS:
        before = PATCHED.get(name)
        if before is not None and before.settings == settings:
            _attach_missing(before)
            return
        change(host, settings)
        if before is None:
            reporting.reset_use(name)


# --- patching and reverting -----------------------------------------------------------------------------------------


def on_import(module: ModuleType) -> None:
    """Patche a module that has just been imported, or reloaded."""
    if module.__name__ == importing.MODULE_OF_MODULES:
        exit_report.listen(module)
        with LOCK:
            for applied in PATCHED.values():
                _expect_classes(applied)
        return
    if importing.is_executing(_TORCH):
        return  # its turn comes with all of torch, which what is attached needs
    with LOCK:
        for applied in list(PATCHED.values()):
            for each in _just_imported(applied.host, module):
                if isinstance(applied.host, RegisteredHost):
                    _register(applied, each)
                else:
                    _patch_imported(applied, each)
            if module.__name__ in (applied.host.name, *applied.host.modules()):
                _announce(applied, module.__name__)


#: The host that what is attached needs itself: it is patched once all of it has been imported.
_TORCH = "torch"


def _just_imported(host: Host, module: ModuleType) -> list[ModuleType]:
    """Return the modules of a host that come with one that has just been imported."""
    if module.__name__ == _TORCH:
        return [each for name, each in _loaded(host).items() if name.startswith(f"{_TORCH}.")]
    return [module] if module.__name__ in host.modules() else []


def on_not_found(name: str, where: str) -> None:
    """Stop the import of a host that is not there: the script must not go on without the patch.

    Raises:
        HostNotInstalledError: The host was asked to be patched.
    """
    if name in PATCHED:
        raise HostNotInstalledError(
            f"{name} was asked to be patched, but it is not installed here: {where} imports it, and Python does not "
            f"find it. {HOSTS[name].install}; or put the folder that holds it on sys.path; or do not ask for it"
        )


def change(host: Host, settings: Settings | None) -> None:
    """Take a host from the state that it is in to another one: patched with some settings, or (None) not at all.

    In this order, so that every call in another thread finds what its code needs, and an error leaves all as it was:

    1. Everything is located and compiled.
    2. New instances come with what the new state needs; those that live get it.
    3. The code is swapped.
    4. What only the old state needed is taken away, once nothing runs its code any more.
    """
    deciding.start_anew(host.name)
    if isinstance(host, RegisteredHost):
        _change_registered(host, settings)
        return
    assert isinstance(host, RewrittenHost)
    old, new = PATCHED.get(host.name), None
    if old is not None:
        _check_untouched(old)
    replaced: list[CodeType] = []
    if settings is not None:
        new = PatchedHost(host, settings)
        replaced = _patch(old, new)
    elif old is not None:
        _refuse_inside(host, old.sites)
        with LOCK:
            del PATCHED[host.name]
            _unwatch_if_idle()
    _finish(host, old, new, replaced)
    if new is not None and host.name in sys.modules:
        _announce(new)


def _change_registered(host: RegisteredHost, settings: Settings | None) -> None:
    """Take a host with an interface from the state that it is in to another one; see :func:`change`."""
    with LOCK:
        old = PATCHED.get(host.name)
        if settings is not None and old is None:
            _watch_imports(host)
    if settings is not None and (stuck := importing.wait_for(host.modules())):
        with LOCK:
            _unwatch_if_idle()
        raise LwpfError(_in_the_middle(host, stuck[0]))
    with LOCK:
        if old is not None:
            _unregister(old)
        if settings is not None:
            try:
                _register_everywhere(PatchedHost(host, settings))
            except BaseException:
                if old is not None:
                    _register_everywhere(PatchedHost(host, old.settings))
                raise
        _unwatch_if_idle()
    if settings is not None and host.name in sys.modules:
        _announce(PATCHED[host.name])


def _register_everywhere(new: PatchedHost) -> None:
    """Have a host patched, in all of its modules that are imported or in none."""
    PATCHED[new.host.name] = new
    try:
        for module in _loaded(new.host).values():
            _register(new, module)
    except BaseException:
        _unregister(new)
        raise


def _unregister(applied: PatchedHost) -> None:
    del PATCHED[applied.host.name]
    for undo in reversed(applied.registered.values()):
        undo()
    for shim in reversed(applied.shims):
        shim.undo()


def _register(applied: PatchedHost, module: ModuleType) -> None:
    """Patch a module of a host with an interface; one that was reloaded has a new interface, and is patched again."""
    assert isinstance(applied.host, RegisteredHost)
    _shim(applied, module)
    if module.__name__ in applied.host.places_of_attention():
        if isinstance(applied.host, ModularHost):
            _register_modules(applied, applied.host, module)
            return
        func_d = applied.host.prototypes(applied.settings)["func_d"]
        applied.registered[module.__name__] = applied.host.register(module, func_d)


def _register_modules(applied: PatchedHost, host: ModularHost, module: ModuleType) -> None:
    """Patch a module of a host that hands over its attention modules, which get their func_d."""
    from .attached_modules import AttachedModules

    modules = AttachedModules(host, applied.settings)

    def undo() -> None:
        undo_register()
        modules.detach()
        discard_compiled()

    try:
        undo_register = host.register(module, modules)
    except BaseException:
        modules.detach()
        raise
    modules.settle()
    applied.registered[module.__name__] = undo
    applied.modules = modules
    discard_compiled()


def _watch_imports(host: Host) -> None:
    importing.watch([host.name, *host.modules(), importing.MODULE_OF_MODULES], on_import, on_not_found)
    of_torch = sys.modules.get(importing.MODULE_OF_MODULES)
    if of_torch is not None and not importing.is_initializing(of_torch):
        exit_report.listen(of_torch)


def _expect_classes(applied: PatchedHost) -> None:
    """Look out for the classes of a host that are about to be defined, so that their instances need not be found."""
    if isinstance(applied.host, RewrittenHost) and hasattr(sys.modules.get(importing.MODULE_OF_MODULES), "Module"):
        applied.makers.expect((site.module, site.owner) for site in applied.chosen if site.owner)


def _unwatch_if_idle() -> None:
    if not PATCHED:
        importing.unwatch()
        exit_report.unlisten()


def _in_the_middle(host: Host, module: str) -> str:
    return (
        f"{host.name} cannot be patched in the middle of the import of {module}: call lwpf_patch.apply() before that "
        "import, or after it"
    )


def _patch(old: PatchedHost | None, new: PatchedHost) -> list[CodeType]:
    """Patch the modules of a host that are imported already, and watch for the others; return the code replaced."""
    host = new.host
    located: list[PatchedSite] = []
    try:
        if old is None:
            with LOCK:
                PATCHED[host.name] = new
                _watch_imports(host)
            whole = [_TORCH] if host.name == _TORCH else []
            if stuck := importing.wait_for([*whole, *host.modules()]):
                raise LwpfError(_in_the_middle(host, stuck[0]))
        else:
            new.makers = old.makers
        with LOCK:
            modules = _loaded(host).values()
            classes = classes_by_name()
            located = [site for module in modules for site in _locate(new, module, classes)]
            if host.name in sys.modules:
                _missing(new, [*new.sites, *located])
            if old is not None:
                _refuse_inside(host, _changed(old.sites, located))
            PATCHED[host.name] = new
            _expect_classes(new)
            for module in modules:
                _shim(new, module, old)
            if located:
                new.attachments().begin(old.settings if old is not None else None)
            wrapped = _put_makers(new, located)
        # What a constructor has begun to make is attached to when it is whole; new ones are wrapped by now.
        if frames.wait_for(frames.in_flight([*wrapped, new.makers.code])):
            raise LwpfError(
                f"{host.name} cannot be patched: another thread has been inside of a constructor of one of its classes "
                f"for {frames.PATIENCE:g} s"
            )
        with LOCK:
            _attach(new, located)
            replaced = [site.function.__code__ for site in located if site.function.__code__ is not site.patched]
            grows = old is None or _rewritten(new).parts(old.settings) <= _rewritten(new).parts(new.settings)
            _swap(new, located, functions=grows)
            if located:
                new.attachments().settle()
            return replaced
    except BaseException:
        _restore(old, new, located)
        raise


def _patch_imported(applied: PatchedHost, module: ModuleType) -> None:
    """Patch a module that has just been executed: nothing of it is running, so that there is nobody to wait for."""
    if _rewritten(applied).inseparable and not applied.sites:
        applied.host.plans(applied.settings)  # raises for a site of a module to come, before anything is patched
    _shim(applied, module)
    located = _locate(applied, module)
    if not located:
        return
    owned = [(site.owner, site.function, site.site) for site in located if site.owner is not None]
    try:
        made = applied.makers.put_new(owned, applied.attachments())
        is_new = made is not None  # no instance lives but those that the module has made
        _attach(applied, located, instances=made)
    except BaseException:
        applied.makers.drop({site.function for site in located})
        raise
    _swap(applied, located)
    _set_defaults(located, applied)
    if made or not is_new:
        discard_compiled()


def _finish(host: Host, old: PatchedHost | None, new: PatchedHost | None, replaced: list[CodeType]) -> None:
    """Take away what only the old state needed, and put in what could not be swapped before.

    A function that is passed func_d by its callers takes it for as long as one of these callers may run, and gets along
    without it from the first that does not pass it.
    """
    assert isinstance(host, RewrittenHost)
    before = old.sites if old is not None else []
    after = new.sites if new is not None else []
    makers = new.makers if new is not None else old.makers if old is not None else Makers()
    dropped = [site for site in before if site.function not in {site.function for site in after}]
    with LOCK:
        _set_interim_defaults(dropped, host)
        replaced = [*replaced, *(site.patched for site in dropped)]
        for site in dropped:
            if site.owner is not None:
                site.take_out()
        gone = makers.drop({site.function for site in dropped})
        if new is None:
            makers.unwatch()
        if before or after:
            discard_compiled()
    leaving: frozenset[str] = frozenset()  # parts that are asked for no longer
    if old is not None and new is not None:
        leaving = host.parts(old.settings) - host.parts(new.settings)
    waits = dropped or leaving or any(site.owner is None for site in after)
    calls = frames.in_flight([*replaced, *([makers.code] if gone or leaving else [])]) if waits else []
    running = calls
    try:
        running = frames.wait_for(calls)
    finally:
        keep = {id(each.get("self")) for each in frames.variables(running)}
        with LOCK:
            for site in dropped:
                if site.owner is None:
                    site.take_out()
            for site in after:
                site.put()
            if new is not None:
                _set_defaults(after, new)
            left = [each for each in living([*gone, *(makers.owners() if leaving else [])]) if id(each) not in keep]
            detach([each for each in left if not makers.covers(each)], host.name, host.part_names())
            detach([each for each in left if makers.covers(each)], host.name, leaving)
            for shim in reversed(old.shims if old is not None else []):
                if new is None or not any(each is shim for each in new.shims):
                    shim.undo()
    if running:
        reporting.warn(
            f"{host.name}: {len(running)} calls in other threads have been running for {frames.PATIENCE:g} s while "
            "the patch was changed; their modules keep the func_d that they had"
        )


def _restore(old: PatchedHost | None, new: PatchedHost, located: list[PatchedSite]) -> None:
    """Undo a patch that failed before code was swapped, and what imports have patched in the meantime."""
    host, made = new.host, []
    with LOCK:
        if old is not None:
            PATCHED[host.name] = old
            _put_makers(old, old.sites)
        elif PATCHED.pop(host.name, None) is not None:
            _unwatch_if_idle()
        before = {site.function for site in old.sites} if old is not None else set()
        new.makers.drop({site.function for site in located} - before)
        if old is None:
            new.makers.unwatch()
        for shim in reversed(new.shims):
            if old is None or not any(each is shim for each in old.shims):
                shim.undo()
    frames.wait_for(frames.in_flight([new.makers.code]))
    with LOCK:
        made = [module for each in new.provisional() if (module := each()) is not None]
        detach([module for module in made if not new.makers.covers(module)], host.name, _rewritten(new).part_names())
        for module in made:
            new.makers.attach(module)
    if new.sites:
        names = dict.fromkeys(site.site.module for site in new.sites)
        _finish(host, PatchedHost(host, new.settings, makers=new.makers, sites=new.sites), None, [])
        for name in names if old is not None else ():
            on_import(sys.modules[name])


# --- the steps ------------------------------------------------------------------------------------------------------


def _loaded(host: Host) -> dict[str, ModuleType]:
    if importing.is_executing(_TORCH):
        return {}
    found = {name: sys.modules[name] for name in host.modules() if sys.modules.get(name) is not None}
    return {name: module for name, module in found.items() if not importing.is_initializing(module)}


def _missing(applied: PatchedHost, found: list[PatchedSite], just_imported: str = "") -> list[str]:
    """Return the modules that have yet to be imported before all that was asked for is found.

    Raises:
        RewriteError: Something is in none of its places, all of which have been imported.
    """
    imported = {just_imported, *_loaded(applied.host)}
    return _rewritten(applied).modules_to_come([site.site for site in found], applied.settings, imported, applied.seen)


def _rewritten(applied: PatchedHost) -> RewrittenHost:
    assert isinstance(applied.host, RewrittenHost)
    return applied.host


def _announce(applied: PatchedHost, just_imported: str = "") -> None:
    """Say what was patched once all that was asked for has been found; raises as :func:`_missing` does."""
    if applied.complete:
        _say_what_is_not_known(applied)
        _announce_further(applied, just_imported)
        return
    root = sys.modules.get(applied.host.name)
    if root is not None and just_imported != applied.host.name and importing.is_initializing(root):
        return  # more of it comes, and it is told of at once
    if isinstance(applied.host, RegisteredHost):
        waits, places = not applied.registered, list(applied.registered)
    else:
        waits = bool(_missing(applied, applied.sites, just_imported))
        places = _in_few_words(site.site for site in applied.sites)
    if waits:
        return
    applied.complete = True
    _say_what_is_not_known(applied)
    settings = applied.settings.describe()
    left_out = f", but not in {', '.join(settings['exclude_models'])}" if settings["exclude_models"] else ""
    reporting.info(
        f"{applied.host.described()}: {', '.join(places)} patched; "
        f"{in_words(settings, 'include', 'exclude', 'exclude_models', 'compat')}{left_out}"
    )


def _announce_further(applied: PatchedHost, module: str) -> None:
    """Say what was patched in another package, which was imported after all that the host must have."""
    places = [site.site.owner or site.site.qualname for site in applied.sites if site.site.module == module]
    if places and not module.startswith(f"{applied.host.name}."):
        reporting.info(f"{applied.host.name}: {', '.join(dict.fromkeys(places))} of {module} patched, too")


def _locate(applied: PatchedHost, module: ModuleType, classes: ClassesByName | None = None) -> list[PatchedSite]:
    """Find what is to be patched in a module and is not yet; see :func:`lwpf_patch.patching.swapping.locate`."""
    host = _rewritten(applied)
    sites = [site for site in applied.chosen if site.module == module.__name__]
    sites = [site for site in sites if _is_defined_here(module, site)]
    if not sites:
        return []
    done = {site.function for site in applied.sites}
    parts = host.parts(applied.settings)
    try:
        found = locate(host, module, sites, parts, classes)
    except RewriteError:
        path, source = source_of(module.__spec__)
        sites, misfits = host.fitting(path, source, sites, applied.settings)
        if not misfits:
            raise
        applied.misfits |= misfits
        found = locate(host, module, sites, parts, classes) if sites else []
    return [site for site in found if site.function not in done]


def _is_defined_here(module: ModuleType, site: Site) -> bool:
    found = getattr(module, site.owner or site.qualname, None)
    if getattr(found, "__module__", None) != module.__name__:
        return False
    return not site.owner or site.qualname.rpartition(".")[2] in vars(found)


def _changed(before: list[PatchedSite], after: list[PatchedSite]) -> list[PatchedSite]:
    """Return what is patched and will have other code, or none of ours."""
    codes = {site.function: site.patched for site in after}
    return [site for site in before if codes.get(site.function) is not site.patched]


def _check_untouched(applied: PatchedHost) -> None:
    """Check that nobody has patched over our patch, which would be undone with it.

    Raises:
        ConflictError: Someone has.
    """
    for site in applied.sites:
        if site.function.__code__ is not site.patched:
            raise ConflictError(
                f"{site.site.module}.{site.site.qualname} was patched again after lwpf_patch: its code is now that of "
                f"{describe(site.function)}. Remove that patch first; lwpf_patch does not undo it"
            )
        for name, value in applied.makers.overridden(site.owner):
            raise ConflictError(
                f"{site.site.module}.{site.site.owner}.{name} was patched again after lwpf_patch, by "
                f"{describe(value)}. Remove that patch first; lwpf_patch does not undo it"
            )


def _refuse_inside(host: Host, sites: list[PatchedSite]) -> None:
    """Check that this thread runs no code that would lose what it needs.

    Raises:
        LwpfError: It does.
    """
    frame = frames.in_this_thread(site.patched for site in sites)
    if frame is not None:
        raise LwpfError(
            f"the patch of {host.name} cannot be changed from inside of a patched {frame.f_code.co_name} "
            f"({frame.f_code.co_filename}:{frame.f_lineno}), which needs it: do it when that has returned"
        )


def _shim(applied: PatchedHost, module: ModuleType, old: PatchedHost | None = None) -> None:
    for shim in applied.host.shims if applied.settings.compat else ():
        if module.__name__ in shim.modules and shim.is_needed():
            there = [each for each in (old.shims if old is not None else ()) if each.is_of(shim, module)]
            applied.shims += there or [AppliedShim.apply(shim, module)]


def _put_makers(applied: PatchedHost, sites: list[PatchedSite]) -> list[CodeType]:
    owned = [(site.owner, site.function, site.site) for site in sites if site.owner is not None]
    return applied.makers.put(owned, applied.attachments()) if owned else []


def _attach(
    applied: PatchedHost, sites: list[PatchedSite], replace: bool = True, instances: list[Any] | None = None
) -> bool:
    """Attach to the instances that live, all or none, and return whether there was anything to attach."""
    steps = None
    try:
        steps = _steps_of_attaching(applied, sites, replace, instances)
    except LwpfError:
        if instances is not None:
            raise
    if steps is None:
        gc.collect()  # the instance that is refused may be one that nothing uses any more
        steps = _steps_of_attaching(applied, sites, replace, instances)
    for step in steps:
        step()
    return bool(steps)


def _steps_of_attaching(
    applied: PatchedHost, sites: list[PatchedSite], replace: bool, instances: list[Any] | None
) -> list[Callable[[], object]]:
    """Return what attaches to instances, or to all that live; it is an error where one of them is refused."""
    if instances is None:
        instances = living(applied.makers.owners({site.function for site in sites}))
    # What another thread has begun to construct since it was watched is not whole yet, and comes with it by itself.
    begun = {id(each["instance"]) for each in frames.variables(frames.in_flight([applied.makers.code]))}
    whole = [instance for instance in instances if id(instance) not in begun]
    owners = Owners() if whole and applied.settings.exclude_models else None
    return [step for instance in whole for step in applied.makers.prepare(instance, replace, owners)]


def _attach_missing(applied: PatchedHost) -> None:
    """Attach to instances that have come without a func_d past everything that could be watched."""
    with LOCK:
        if applied.sites:
            applied.makers.look_for_classes()
            if _attach(applied, applied.sites, replace=False):
                discard_compiled()


def _swap(applied: PatchedHost, sites: list[PatchedSite], functions: bool = True) -> None:
    """Put the patched code in: callees, which then take more than their callers pass, before callers.

    Args:
        applied: The new state.
        sites: What to put in.
        functions: Whether to put in callees already: not if they will take less than callers that still run pass.
    """
    _set_interim_defaults(sites, _rewritten(applied), applied)
    for site in sorted(sites, key=lambda site: site.owner is not None):
        if functions or site.owner is not None:
            site.put()
    applied.sites += sites
    if applied.complete:
        _say_what_is_not_known(applied)


def _say_what_is_not_known(applied: PatchedHost) -> None:
    """Warn of sources that lwpf_patch has not been tested with, once of each."""
    unknown = [site.site for site in applied.sites if not site.known and site.site.function not in applied.told]
    applied.told |= {site.function for site in unknown}
    if unknown:
        functions = ", ".join(dict.fromkeys(site.function for site in unknown))
        reporting.warn(
            f"{functions} of {applied.host.described(place=True)}: lwpf_patch has not been tested with their source, "
            "which is that of a fork or of another version; its shape is known, and they are patched. "
            f"`lwpf diff {applied.host.name}` shows how"
        )
    for name, why in applied.misfits.items():
        if name not in applied.told:
            applied.told.add(name)
            reporting.warn(f"{name} is left as it is: {why}")


def _in_few_words(sites: Iterable[Site]) -> list[str]:
    """Return the names of classes, or where there are many, how many."""
    classes = dict.fromkeys(site.name for site in sites if site.attachments or site.passed)
    if len(classes) > _MANY:
        return [f"{len(classes)} classes (lwpf status lists them)"]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in classes))


def _set_interim_defaults(sites: list[PatchedSite], host: RewrittenHost, applied: PatchedHost | None = None) -> None:
    """Have functions compute as the new state (None: unpatched) for callers that pass nothing yet, or no longer."""
    functions = [site for site in sites if site.site.passed]
    prototypes = applied.attachments().prototypes if functions and applied is not None else {}
    for function in functions:
        function.set_defaults(
            {each.name: each.in_function(prototypes.get(each.name), is_asked=False) for each in host.attachments()}
        )


def _set_defaults(sites: list[PatchedSite], applied: PatchedHost) -> None:
    """Have functions that are called without func_d, past the modules of their library, forget as their host does."""
    functions = [site for site in sites if site.site.passed]
    prototypes = applied.attachments().prototypes if functions else {}  # which needs torch
    for function in functions:
        function.set_defaults(
            {
                each.name: each.in_function(prototypes[each.name], is_asked=True)
                for each in _rewritten(applied).attachments()
                if each.name in prototypes
            }
        )


def discard_compiled() -> None:
    """Make torch.compile and torch.jit.script look again: both keep what they compiled of a class by its class."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
    signatures = getattr(sys.modules.get("torch._dynamo.variables.functions"), "_spec_cache", None)
    if signatures is not None:
        signatures.clear()  # which are kept by the function, whose code has other parameters now
    recursive = sys.modules.get("torch.jit._recursive")
    if recursive is not None:
        recursive.concrete_type_store.type_store.clear()
        recursive.concrete_type_store.methods_compiled.clear()
    scripting = sys.modules.get("torch.jit._state")
    if scripting is not None:
        scripting._jit_caching_layer.clear()  # and of a function, by the function


def attach_if_applied(module: nn.Module) -> None:
    """Give an instance of a patched class what its host's instances have."""
    with LOCK:
        for applied in PATCHED.values():
            applied.makers.attach(module, owners=Owners())
