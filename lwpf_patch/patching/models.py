"""Patching one model: each of its attention modules gets a patched subclass, and no other model changes."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch import fx, nn

from ..blocks import BlocksLike
from ..errors import ConflictError, SettingsError, shown
from ..hosting import ModularHost, RewrittenHost, Site
from ..hosting.attachments import Order, is_trained
from ..hosting.rewritten import names_included
from ..hosts import HOSTS
from ..settings import Patterns, Settings
from ..specs import FuncDLike, SepLike, UHopLike
from . import changing
from .attaching import warn_of_loss
from .swapping import describe, locate


def patch_model(
    model: nn.Module,
    *,
    func_d: FuncDLike | None = None,
    sep: SepLike | None = None,
    masking: str | None = None,
    backend: str | None = None,
    verify: str | None = None,
    uhop: UHopLike | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    blocks: BlocksLike | None = None,
) -> list[str]:
    """Patch the attention of one model; its classes and every other model stay as they are.

    The model stays patched whatever ``apply`` and ``revert`` do, and has a func_d of its own: under a patched host,
    ``patch_model(teacher, func_d="none")`` keeps a model plain. Calling it again replaces the settings.

    Args:
        model: The model.
        func_d: As for :func:`lwpf_patch.apply`.
        sep: As for :func:`lwpf_patch.apply`.
        masking: As for :func:`lwpf_patch.apply`.
        backend: As for :func:`lwpf_patch.apply`.
        verify: As for :func:`lwpf_patch.apply`.
        uhop: As for :func:`lwpf_patch.apply`. Make the optimizer afterwards: it has to know the new parameters.
        include: Glob patterns over the names of the model's modules (``model.named_modules()``), such as
            ``"blocks.1?.attn"``; default all.
        exclude: Glob patterns over the names of modules to leave alone.
        blocks: As for :func:`lwpf_patch.apply`: the attention modules that forget, counted from 0 over all of the
            model's. Of those that ``include`` and ``exclude`` leave, the others compute plain attention, under a
            patched host too. It goes with ``uhop`` here.

    Returns:
        The names of the modules that were patched, without those that ``blocks`` leaves plain.

    Raises:
        SettingsError: A wrong value, a pattern that matches no attention module, or a model without any.
        LwpfError: As for :func:`lwpf_patch.apply`.
    """
    _check_model(model, "patch_model")
    origin = "patch_model({}=...)".format
    settings = Settings(
        func_d=func_d,
        sep=sep,
        masking=masking,
        backend=backend,
        verify=verify,
        uhop=uhop,
        include=include,
        exclude=exclude,
        blocks=blocks,
        origin=origin,
    )
    for host in _modular_hosts():
        if modules := host.modules_of(model):
            return _patch_modules(model, host, modules, settings)
    sites = {name: site_of(type(module)) for name, module in model.named_modules()}
    found = {
        name: site
        for name, site in sites.items()
        if site is not None and site[1] in site[0].sites_with_a_part(settings)
    }
    holders = {name: found[name] for name in found if not found[name][1].is_companion}
    if not holders:
        raise SettingsError(
            f"patch_model: {type(model).__name__} has no attention module that can be patched; those are "
            + ", ".join(site.name for host in _rewritten_hosts() for site in host.sites if not site.is_companion)
        )
    included = _included(holders, settings)
    numbers = {name: number for number, name in enumerate(holders)}
    chosen = _in_blocks(model, included, numbers, settings)
    around = [name for name in found if name not in holders and any(_is_inside(each, name) for each in included)]
    for name in (*included, *around):
        _refuse_own_forward(name, model.get_submodule(name), found[name][1])
    if settings.uhop is not None and not any(found[name][1].feature_map for name in chosen):
        raise SettingsError(
            f"uhop={settings.uhop} (from patch_model(uhop=...)): include, exclude and blocks leave no module that has "
            f"a feature map; those are {', '.join(name for name, (_, site) in found.items() if site.feature_map)}"
        )
    forgets_nothing = settings.without_uhop()
    asked = {
        name: forgets_nothing if name in included and name not in chosen else settings for name in (*included, *around)
    }
    classes = {
        name: _patched_class(_plain_class(type(model.get_submodule(name))), found[name][0].parts(each))
        for name, each in asked.items()
    }
    parts = {name: _parts(model.get_submodule(name), *found[name], each) for name, each in asked.items()}
    for name in included if settings.blocks is not None else ():
        _place(parts[name]["func_d"], numbers[name], name in chosen)
    lost = 0
    for name, patched_class in classes.items():
        module = model.get_submodule(name)
        module.__class__ = patched_class
        for part in found[name][0].part_names():
            if part in parts[name]:
                setattr(module, part, parts[name][part])
            elif part in module._modules:
                lost += is_trained(module._modules[part])
                delattr(module, part)
    warn_of_loss(lost, ", ".join(dict.fromkeys(found[name][0].name for name in chosen)))
    changing.discard_compiled()
    return chosen


def unpatch_model(model: nn.Module) -> list[str]:
    """Undo :func:`patch_model`: the modules have their own classes again, as they are: patched if their host is.

    Args:
        model: The model.

    Returns:
        The names of the modules concerned.

    Raises:
        SettingsError: It is no model.
    """
    _check_model(model, "unpatch_model")
    for modular in _modular_hosts():
        alone = {name: each for name, each in modular.modules_of(model).items() if _is_patched_alone(each)}
        for module in alone.values():
            del module.func_d
        if alone:
            modular.unpatch(model)
            changing.discard_compiled()
            return list(alone)
    names = [name for name, module in model.named_modules() if _plain_class(type(module)) is not type(module)]
    lost, around = 0, []
    for name in names:
        module = model.get_submodule(name)
        host, site = site_of(type(module)) or (None, None)
        if site is not None and site.is_companion:
            around.append(name)
        for part in host.part_names() if host is not None else ():
            if part in module._modules:
                lost += is_trained(module._modules[part])
                delattr(module, part)
        module.__class__ = _plain_class(type(module))
        changing.attach_if_applied(module)
    warn_of_loss(lost, type(model).__name__)
    changing.discard_compiled()
    return [name for name in names if name not in around]


def _patch_modules(model: nn.Module, host: ModularHost, modules: dict[str, nn.Module], settings: Settings) -> list[str]:
    """Give modules of a host with an interface their func_d; those that are not chosen forget nothing."""
    host.check(Settings(uhop=settings.uhop, origin=settings.origin))
    included = _included(modules, settings)
    numbers = {name: number for number, name in enumerate(modules)}
    chosen = _in_blocks(model, included, numbers, settings)
    prototype = host.prototypes(settings)["func_d"]
    for name, module in modules.items():
        if name not in included and _is_patched_alone(module):
            continue
        cls = type(module)
        order = Order(
            host.name, cls.__module__, f"{cls.__qualname__}.forward", settings, settings, prototype,
            plain=name not in included,
        )  # fmt: skip
        part = host.attachment.make(module, order)
        if settings.blocks is not None and name in included:
            _place(part, numbers[name], name in chosen)
        part.train(module.training)
        module.func_d = part
    host.patch(model)
    changing.discard_compiled()
    return chosen


def _is_patched_alone(module: nn.Module) -> bool:
    part: Any = module._modules.get("func_d")
    return part is not None and not part.attached


def _check_model(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise SettingsError(f"model={shown(model)} (from {function}(model=...)): model must be a torch.nn.Module")


def _refuse_own_forward(name: str, module: nn.Module, site: Site) -> None:
    """Check that a module runs what its class defines.

    Raises:
        ConflictError: An attribute of the instance stands before it.
    """
    method = site.qualname.rpartition(".")[2]
    if method in vars(module):
        raise ConflictError(
            f"patch_model: {name} ({type(module).__qualname__}) has a {method} of its own, set on the "
            f"instance ({describe(vars(module)[method])}), which a patch of its class does not reach: remove it (del "
            f"module.{method}), leave the module out with exclude=, or use lwpf_patch.apply()"
        )


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _parts(module: nn.Module, host: RewrittenHost, site: Site, settings: Settings) -> dict[str, nn.Module]:
    """Make what a module shall own; a feature map that it has already is kept, with what it has learnt."""
    parts: dict[str, nn.Module] = {}
    for each in site.attachments:
        if not each.is_asked(settings):
            continue
        part: Any = module._modules.get(each.name)
        if part is None or not each.take_over(part, settings):
            prototype = each.prototype(host.name, settings)
            part = each.make(module, Order(host.name, site.module, site.qualname, settings, settings, prototype))
        part.attached = False
        part.train(module.training)
        parts[each.name] = part
    return parts


def _included(found: dict[str, Any], settings: Settings) -> list[str]:
    chosen = names_included(settings, found, f"attention module of the model; they are {', '.join(found)}")
    if not chosen:
        raise SettingsError("patch_model: include and exclude leave no attention module to be patched")
    return chosen


def _in_blocks(model: nn.Module, included: list[str], numbers: dict[str, int], settings: Settings) -> list[str]:
    """Return which of some attention modules are among the blocks that are asked for.

    Args:
        model: The model.
        included: The names of the modules that ``include`` and ``exclude`` leave.
        numbers: The numbers of all attention modules of the model, by name.
        settings: The settings.

    Raises:
        SettingsError: The model lacks blocks that were asked for, or none of the modules is among them.
    """
    if settings.blocks is None:
        return included
    origin = settings.origin("blocks")
    settings.blocks.check(list(numbers), type(model).__name__, origin, "leave blocks out")
    wanted = settings.blocks.of(len(numbers))
    chosen = [name for name in included if numbers[name] in wanted]
    if not chosen:
        raise SettingsError(
            f"blocks={str(settings.blocks)!r} (from {origin}): include and exclude leave none of these blocks; what "
            f"they leave is {', '.join(f'{name} (block {numbers[name]})' for name in included)}"
        )
    return chosen


def _place(func_d: Any, number: int, is_chosen: bool) -> None:
    """Tell a func_d which block it is of, and whether that forgets."""
    if is_chosen:
        func_d.take_part(number)
    else:
        func_d.leave_plain(number)


def _rewritten_hosts() -> list[RewrittenHost]:
    return [host for host in HOSTS.values() if isinstance(host, RewrittenHost)]


def _modular_hosts() -> list[ModularHost]:
    return [host for host in HOSTS.values() if isinstance(host, ModularHost)]


def site_of(cls: type) -> tuple[RewrittenHost, Site] | None:
    """Find the site whose function a class inherits, or is."""
    for host in _rewritten_hosts():
        for site in host.sites:
            owner = getattr(sys.modules.get(site.module), site.owner, None) if site.owner else None
            if isinstance(owner, type) and issubclass(cls, owner) and owner.__module__ == site.module:
                return host, site
    return None


def _plain_class(cls: type) -> type:
    return cls.__dict__.get("_lwpf_plain_class", cls)


@functools.cache
def _patched_class(cls: type, parts: frozenset[str]) -> type:
    """Make the patched subclass of an attention class, with some attachments in its code."""
    found = site_of(cls)
    assert found is not None
    host, site = found
    method = site.qualname.rpartition(".")[2]
    owner = getattr(sys.modules[site.module], site.owner)
    if next(base for base in cls.__mro__ if method in base.__dict__) is not owner:
        raise ConflictError(
            f"patch_model: {cls.__module__}.{cls.__qualname__} defines a {method} of its own over that of {site.name}, "
            "so that it cannot be patched for one model alone; use lwpf_patch.apply()"
        )
    # The functions that the method passes its func_d to; it finds them in globals of its own.
    functions = [other for other in host.sites if other.passed and other.leader in (other.qualname, site.leader)]
    helpers = {_patched_function(host, other, parts): other for other in functions}
    function = _patched_function(host, site, parts, helpers)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        # The subclass is made at run time: what is pickled is the class that it was made of.
        reduced: Any = super(patched_class, self).__reduce_ex__(protocol)
        return (_rebuild, (cls, parts), *reduced[2:]) if type(self) is patched_class else reduced

    namespace = {
        method: function,
        "_lwpf_plain_class": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce_ex,
    }
    patched_class: Any = type(cls.__name__, (cls,), namespace)
    return patched_class


def _patched_function(
    host: RewrittenHost, site: Site, parts: frozenset[str], helpers: Mapping[FunctionType, Site] | None = None
) -> FunctionType:
    """Make a function with a site's patched code beside the one that is there.

    Args:
        host: The host.
        site: The site.
        parts: What comes in.
        helpers: Patched functions that it calls in place of those that are there, with their sites.
    """
    (located,) = locate(host, sys.modules[site.module], [site], parts)
    plain = located.function
    namespace = _namespace_with(helpers or {}, plain.__globals__)
    function = FunctionType(located.patched, namespace, plain.__name__, plain.__defaults__, plain.__closure__)
    if not site.owner:
        namespace[plain.__name__] = function  # which hands itself to tensor-like arguments
    for name in ("__kwdefaults__", "__annotations__", "__qualname__", "__doc__", "__module__"):
        setattr(function, name, copy.copy(getattr(plain, name)))
    return function


def _namespace_with(helpers: Mapping[FunctionType, Site], namespace: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a namespace that has some functions in place of those of the same module and name."""
    copied = dict(namespace)
    del copied["__name__"]  # by which torch.compile, up to PyTorch 2.9 at least, would look into the module's own
    for helper, site in helpers.items():
        if site.copied_to == namespace["__name__"]:
            copied[site.copy] = helper
        plain = getattr(sys.modules[site.module], site.qualname)
        for name in [name for name, value in namespace.items() if value is plain]:
            copied[name] = helper
            # In a trace by torch.fx a function stays whole where its module has asked for that in its namespace.
            exec("wrap(name)", copied, {"wrap": fx.wrap, "name": name})
    return copied


def _rebuild(cls: type, parts: frozenset[str]) -> Any:
    patched_class: Any = _patched_class(cls, parts)
    return patched_class.__new__(patched_class)
