"""What a patched attention module owns: its func_d and, where U-Hop is asked for, its feature map.

Both are submodules, attached when an instance is made or unpickled, and to those that live when the patch comes.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import reporting
from .errors import ConflictError, SettingsError
from .hosts import Host
from .rewriting import Site
from .settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from .attention import HostFuncD
    from .uhop import HostFeatureMap


def func_d_prototype(host: Host, settings: Settings) -> HostFuncD:
    """Make the func_d of which every instance gets a copy."""
    from .attention import HostFuncD, rule_of

    rule = copy.deepcopy(rule_of(settings.func_d, settings.origin("func_d")))
    func_d = HostFuncD(rule, host.name, settings.masking, settings.backend)
    if host.forward_hook is not None:
        func_d.register_forward_hook(host.forward_hook)
    return func_d


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
    return HostFeatureMap(features, heads, settings.uhop, host.name, like)


class Attachments:
    """What the instances of a host's patched classes get.

    Args:
        host: The host.
        settings: How it is patched.
    """

    def __init__(self, host: Host, settings: Settings) -> None:
        self.host, self.settings = host, settings
        self.func_d = func_d_prototype(host, settings)

    def attach(self, module: nn.Module, site: Site) -> None:
        """Gives an instance what its site needs, unless it has its own.

        Raises:
            ConflictError: A name that is needed is taken.
            SettingsError: The module can have no feature map.
        """
        if site.func_d and _is_free(module, "func_d"):
            func_d = copy.deepcopy(self.func_d)
            func_d.attached = True
            func_d.train(module.training)
            module.func_d = func_d
        existing: Any = module._modules.get("feature_map")
        if self.settings.uhop is None:
            _refuse_to_ignore(module, existing)
        elif site.map_size is not None:
            if getattr(existing, "attached", False) and hasattr(existing, "adopt"):
                existing.adopt(self.settings.uhop)  # of a model that was saved; it keeps what it has learnt
            elif _is_free(module, "feature_map"):
                feature_map = make_feature_map(module, site, self.host, self.settings)
                feature_map.attached = True
                feature_map.train(module.training)
                module.feature_map = feature_map


def _is_free(module: nn.Module, name: str) -> bool:
    """Returns whether a module has no submodule of its own by a name, or one that was attached before.

    Raises:
        ConflictError: The name is that of something else.
    """
    existing = module._modules.get(name)
    if existing is not None:
        return getattr(existing, "attached", False) and not getattr(existing, "by_hand", False)
    if name in module.__dict__ or hasattr(type(module), name):
        raise ConflictError(
            f"{type(module).__module__}.{type(module).__qualname__} has an attribute {name} of its own "
            f"({getattr(module, name, None)!r}); lwpf_patch needs that name: rename it, or exclude this class"
        )
    return True


def _refuse_to_ignore(module: nn.Module, existing: Any) -> None:
    if getattr(existing, "attached", False) and is_trained(existing):
        raise ConflictError(
            f"this {type(module).__qualname__} was saved with a feature map of U-Hop, which would be ignored without "
            "uhop: apply lwpf_patch with uhop, or fold the model before it is saved (lwpf_patch.fold)"
        )


def attach_to_living(attachments: Attachments, sites: Iterable[tuple[type, Site]]) -> None:
    """Attaches to the instances that live, of classes each with its site."""
    for owner, site in sites:
        for instance in living([owner]):
            if "_modules" in instance.__dict__:
                attachments.attach(instance, site)


def detach_from_living(owners: list[type], host: str, keep_maps: bool) -> None:
    """Takes away what was attached to the instances that live.

    Args:
        owners: Their classes.
        host: The host.
        keep_maps: Whether feature maps stay, because others would only come in their place.
    """
    lost = 0
    for instance in living(owners):
        modules = instance.__dict__.get("_modules", {})
        for name in ("func_d",) if keep_maps else ("func_d", "feature_map"):
            part = modules.get(name)
            if getattr(part, "attached", False) and part.host == host:
                lost += name == "feature_map" and is_trained(part)
                delattr(instance, name)
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
