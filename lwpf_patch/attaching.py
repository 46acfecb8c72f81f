"""What a patched attention module owns: its func_d and, where U-Hop is asked for, its feature map.

Both are submodules, attached when an instance is made or unpickled, and to those that live when the patch comes.
"""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import reporting
from .errors import ConflictError, SettingsError
from .hosts import Host
from .owners import Owners, match, names_in_construction
from .rewriting import Site
from .settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from .forgetting import FuncD
    from .uhop import HostFeatureMap


def func_d_prototype(host: Host, settings: Settings) -> FuncD:
    """Makes the func_d of which every instance gets a copy."""
    from . import forgetting

    func_d = copy.deepcopy(forgetting.make_func_d(settings.func_d, settings.origin("func_d")))
    func_d.masking, func_d.backend, func_d.host = settings.masking, settings.backend, host.name
    if host.forward_hook is not None:
        func_d.register_forward_hook(host.forward_hook)
    func_d._register_load_state_dict_pre_hook(_name_the_remedy)  # type: ignore[no-untyped-call]
    return func_d


def _name_the_remedy(
    state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: list[str], errors: list[str]
) -> None:
    """Add to torch's error of unexpected keys what to do with a checkpoint of U-Hop in a model that has no map for it.

    A hook of a func_d: torch has been through the module that owns it, and through what that owned before, by then.
    """
    maps = sum(key.endswith("feature_map.steps") for key in unexpected)
    message = (
        "the checkpoint holds feature maps of U-Hop, and this model has none: apply lwpf_patch with uhop before the "
        "model is made (LWPF_UHOP=on), or fold them into the projections before the checkpoint is saved: "
        "lwpf_patch.fold(model)"
    )
    if maps and message not in errors:
        if _is_strict():
            errors.append(message)
        elif maps == 1:
            reporting.warn(f"{message}. They are left out, since strict=False was asked for")


def _is_strict() -> bool:
    """Return whether the load_state_dict that runs is a strict one; torch tells modules that it always is."""
    from torch import nn

    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not nn.Module.load_state_dict.__code__:
        frame = frame.f_back
    return frame is not None and bool(frame.f_locals.get("strict"))


def make_feature_map(module: nn.Module, site: Site, host: Host, settings: Settings) -> HostFeatureMap:
    """Makes the feature map of a module, on its device and of its dtype.

    Raises:
        SettingsError: The module can have none.
    """
    from .uhop import HostFeatureMap

    assert site.map_size is not None
    heads, features = site.map_size(module)
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if like is None:
        raise SettingsError(f"uhop: {type(module).__qualname__} has no parameter of a floating dtype to make Φ like")
    feature_map = HostFeatureMap(features, heads, settings.uhop, host.name, like)
    feature_map.advice = host.advice
    return feature_map


class Attachments:
    """What the instances of a host's patched classes get.

    Args:
        host: The host.
        settings: How it is patched.
    """

    def __init__(self, host: Host, settings: Settings) -> None:
        self.host, self.settings = host, settings
        self.func_d = func_d_prototype(host, settings)
        from . import teachers

        self._note = teachers.note
        teachers.watch()

    def attach(self, module: nn.Module, site: Site, owners: Owners | None = None) -> None:
        """Gives an instance what its site needs, unless it has its own.

        Args:
            module: The instance.
            site: Its site.
            owners: Who owns the modules that live; None: it is being constructed, or copied.

        Raises:
            ConflictError: A name that is needed is taken.
            SettingsError: The module can have no feature map.
        """
        excluded = self._is_excluded(module, owners)
        if site.func_d and _is_free(module, "func_d"):
            self._attach_func_d(module, site, excluded)
            self._note(module)
        existing: Any = module._modules.get("feature_map")
        if self.settings.uhop is None or excluded:
            refuse_to_ignore(existing, type(module).__qualname__)
            if self.settings.uhop is not None and site.map_size is not None and _is_free(module, "feature_map"):
                module.feature_map = _no_feature_map(self.host)
        elif site.map_size is not None:
            if getattr(existing, "attached", False) and hasattr(existing, "adopt"):
                existing.adopt(self.settings.uhop)  # of a model that was saved; it keeps what it has learnt
                self._mark(existing, site)
            elif _is_free(module, "feature_map"):
                feature_map = make_feature_map(module, site, self.host, self.settings)
                self._mark(feature_map, site)
                feature_map.train(module.training)
                module.feature_map = feature_map

    def _attach_func_d(self, module: nn.Module, site: Site, excluded: bool) -> None:
        """Give a module its func_d; a copy, or one saved under the same settings, keeps the one that it has."""
        existing: Any = module._modules.get("func_d")
        if getattr(existing, "request", None) == self.settings and bool(existing.host) != excluded:
            return
        func_d = _plain_func_d() if excluded else copy.deepcopy(self.func_d)
        self._mark(func_d, site)
        func_d.train(module.training)
        module.func_d = func_d
        if existing is not None and repr(existing) != repr(func_d):
            reporting.note_replaced(self.host.name, repr(existing), repr(func_d))

    def _mark(self, part: Any, site: Site) -> None:
        part.attached, part.site, part.request = True, site.qualname, self.settings

    def _is_excluded(self, module: nn.Module, owners: Owners | None) -> bool:
        """Return whether a module is part of a model that stays plain."""
        patterns = self.settings.exclude_models
        if not patterns:
            return False
        if owners is not None:
            return match(owners.names(module, self.host), patterns)
        existing = module._modules.get("func_d")
        copied = getattr(existing, "attached", False) and not existing.host  # type: ignore[union-attr]
        return copied or match(names_in_construction(module, self.host), patterns)


def _plain_func_d() -> FuncD:
    """Make what stands for a func_d in a model that stays plain; of no host, as whose use it would count."""
    from . import forgetting

    return forgetting.NoForgetting()


def _no_feature_map(host: Host) -> nn.Module:
    from .uhop import NoFeatureMap

    return NoFeatureMap(host.name, attached=True)


def _is_free(module: nn.Module, name: str) -> bool:
    """Returns whether a module has no submodule of its own by a name, or one that was attached before.

    Raises:
        ConflictError: The name is that of something else.
    """
    existing = module._modules.get(name)
    if existing is not None:
        return getattr(existing, "attached", False)
    if name in module.__dict__ or hasattr(type(module), name):
        raise ConflictError(
            f"{type(module).__module__}.{type(module).__qualname__} has an attribute {name} of its own "
            f"({getattr(module, name, None)!r}); lwpf_patch needs that name: rename it, or exclude this class"
        )
    return True


def refuse_to_ignore(feature_map: Any, owner: str) -> None:
    """Refuse a saved feature map where U-Hop was not asked for.

    Raises:
        ConflictError: It is another one than the identity.
    """
    if getattr(feature_map, "attached", False) and is_trained(feature_map):
        raise ConflictError(
            f"this {owner} was saved with a feature map of U-Hop, which would be ignored without "
            "uhop: apply lwpf_patch with uhop, or fold the model before it is saved (lwpf_patch.fold)"
        )


def attach_to_living(attachments: Attachments, sites: Iterable[tuple[type, Site]]) -> None:
    """Attaches to the instances that live, of classes each with its site."""
    owners = Owners() if attachments.settings.exclude_models else None
    for owner, site in sites:
        for instance in living([owner]):
            if "_modules" in instance.__dict__:
                attachments.attach(instance, site, owners)


def detach_from_living(owners: list[type], host: str, keep_maps: bool) -> None:
    """Takes away what was attached to the instances that live.

    Args:
        owners: Their classes.
        host: The host.
        keep_maps: Whether feature maps stay, because others would only come in their place.
    """
    from .forgetting import FuncD
    from .uhop import HostFeatureMap

    kinds = (FuncD,) if keep_maps else (FuncD, HostFeatureMap)
    lost = 0
    found = living([*owners, *kinds])
    for instance in found:
        modules = instance.__dict__.get("_modules", {})
        for name in ("func_d",) if keep_maps else ("func_d", "feature_map"):
            part = modules.get(name)
            if getattr(part, "attached", False) and part.host in (host, ""):  # "": of a model that was left out
                lost += name == "feature_map" and is_trained(part)
                delattr(instance, name)
    for part in found:  # also those that something else holds, such as a traced model: nothing is patched any more
        if issubclass(type(part), kinds) and part.host == host:
            part.attached = False
    warn_of_loss(lost, host)


def is_trained(feature_map: Any) -> bool:
    """Returns whether a feature map is another one than the identity."""
    weight = getattr(feature_map, "weight", None)
    return weight is not None and not weight.is_meta and bool(weight.any())


def warn_of_loss(lost: int, host: str) -> None:
    """Warns of trained feature maps that are taken away."""
    if lost:
        reporting.warn(
            f"{lost} trained feature maps of {host} were removed with the patch, and their models compute without them "
            "now; lwpf_patch.fold(model) before would have written them into the projections"
        )


def living(owners: list[type]) -> list[Any]:
    """Returns the instances of some classes that live."""
    classes = tuple(owners)
    # type() and not isinstance(): proxies of lazily imported modules answer for __class__ by importing.
    return [obj for obj in gc.get_objects() if issubclass(type(obj), classes)]
