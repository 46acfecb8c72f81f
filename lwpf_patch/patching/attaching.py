"""What a patched attention module owns: its func_d and, where U-Hop is asked for, its feature map.

Both are submodules, attached when an instance is made or unpickled, and to those that live when the patch comes. A
class needs them if it inherits a patched function, or borrows it, as in
``class Mine(nn.Module): forward = Attention.forward``.
"""

from __future__ import annotations

import copy
import gc
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Container, Iterable
from functools import partial
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import reporting
from ..errors import ConflictError, SettingsError
from ..hosts import Host
from ..rewriting import Site
from ..settings import Settings
from ..specs import UHop
from . import frames
from .owners import Owners, match, names_in_construction

if TYPE_CHECKING:
    from torch import nn

    from ..attention import HostFuncD
    from ..uhop import HostFeatureMap


def func_d_prototype(host: Host, settings: Settings) -> HostFuncD:
    """Make the func_d of which every instance gets a copy."""
    from ..attention import HostFuncD, rule_of

    rule = copy.deepcopy(rule_of(settings.func_d, settings.origin("func_d")))
    func_d = HostFuncD(rule, host.name, settings.masking, settings.backend)
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


def make_feature_map(module: nn.Module, site: Site, host: Host, uhop: UHop) -> HostFeatureMap:
    """Makes the feature map of a module, on its device and of its dtype.

    Raises:
        SettingsError: The module can have none.
    """
    from ..uhop import HostFeatureMap

    assert site.map_size is not None
    try:
        heads, features = site.map_size(module)
    except AttributeError as error:
        raise SettingsError(f"uhop: {type(module).__qualname__} lacks what a feature map is made by: {error}") from None
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if like is None:
        raise SettingsError(f"uhop: {type(module).__qualname__} has no parameter of a floating dtype to make Φ like")
    feature_map = HostFeatureMap(features, heads, uhop, host.name, like)
    feature_map.advice = host.advice
    return feature_map


class Attachments:
    """What the instances of a host's patched classes get.

    Args:
        host: The host.
        settings: How it is patched.

    Attributes:
        func_d: The func_d of which every instance gets a copy.
        provisional: What has been made by any thread while it is not sure that the settings will stand; None: it is.
    """

    def __init__(self, host: Host, settings: Settings) -> None:
        self.host, self.settings = host, settings
        self.func_d = func_d_prototype(host, settings)
        from . import teachers

        self._note = teachers.note
        teachers.watch()
        self.provisional: list[weakref.ref[nn.Module]] | None = None
        self._uhop: UHop | None = settings.uhop

    def begin(self, before: Settings | None) -> None:
        """Have instances come also with what the settings before these need, whose code still runs."""
        self.provisional = []
        if self.settings.uhop is None and before is not None:
            self._uhop = before.uhop

    def settle(self) -> None:
        """End what :meth:`begin` has begun, since the code is that of these settings now."""
        self.provisional = None
        self._uhop = self.settings.uhop

    def attach(self, module: nn.Module, site: Site, replace: bool = True, owners: Owners | None = None) -> None:
        """Give an instance what its site needs, unless it has its own.

        Args:
            module: The instance.
            site: Its site.
            replace: Whether what was attached before is replaced.

        Args:
            module: The instance.
            site: Its site.
            owners: Who owns the modules that live; None: it is being constructed, or copied.

        Raises:
            ConflictError: A name that is needed is taken.
            SettingsError: The module can have no feature map.
        """
        for action in self.prepare(module, site, replace, owners):
            action()
        made = self.provisional
        if made is not None:
            made.append(weakref.ref(module))

    def prepare(
        self, module: nn.Module, site: Site, replace: bool = True, owners: Owners | None = None
    ) -> list[Callable[[], object]]:
        """Make what :meth:`attach` attaches, and return the steps that are left, none of which raises."""
        steps: list[Callable[[], object]] = []
        excluded = self._is_excluded(module, owners)
        if site.func_d and (_is_a_rule(module, "func_d") or _is_free(module, "func_d", replace)):
            func_d = self._func_d_for(module, site, excluded)
            if func_d is not None:
                steps.append(partial(_own, module, "func_d", func_d))
            steps.append(partial(self._note, module))
        existing: Any = module._modules.get("feature_map")
        uhop = self._uhop
        if uhop is None or excluded:
            refuse_to_ignore(existing, type(module).__qualname__)
            if uhop is not None and site.map_size is not None and _is_free(module, "feature_map", replace):
                steps.append(partial(_own, module, "feature_map", _no_feature_map(self.host)))
        elif site.map_size is not None and (existing is None or (replace and self.settings.uhop is not None)):
            if getattr(existing, "attached", False) and hasattr(existing, "adopt"):
                # of a model that was saved; it keeps what it has learnt
                steps += [partial(existing.adopt, uhop), partial(self._mark, existing, site)]
            elif _is_free(module, "feature_map", replace) and not _replaces_everything(module, site):
                feature_map = make_feature_map(module, site, self.host, uhop)
                self._mark(feature_map, site)
                steps.append(partial(_own, module, "feature_map", feature_map))
        return steps

    def _func_d_for(self, module: nn.Module, site: Site, excluded: bool) -> Any:
        """Make the func_d of a module; None: a copy, or one saved under the same settings, keeps its own."""
        existing: Any = module._modules.get("func_d")
        if getattr(existing, "request", None) == self.settings and bool(existing.host) != excluded:
            return None
        func_d = _plain_func_d() if excluded else copy.deepcopy(self.func_d)
        if _is_a_rule(module, "func_d") or getattr(existing, "by_hand", False):
            func_d.rule, func_d.by_hand = getattr(existing, "rule", existing), True
        self._mark(func_d, site)
        if existing is not None and repr(existing) != repr(func_d):
            reporting.note_replaced(self.host.name, repr(existing), repr(func_d))
        return func_d

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


def _plain_func_d() -> HostFuncD:
    """Make what stands for a func_d in a model that stays plain; of no host, as whose use it would count."""
    from ..attention import HostFuncD
    from ..forgetting import NoForgetting

    return HostFuncD(NoForgetting(), "")


def _no_feature_map(host: Host) -> nn.Module:
    from ..uhop import NoFeatureMap

    return NoFeatureMap(host.name, attached=True)


def _replaces_everything(module: nn.Module, site: Site) -> bool:
    """Return whether a subclass has a forward of its own and lacks what that of its base would work with."""
    function = getattr(type(module), site.qualname.rpartition(".")[2])
    if (function.__module__, function.__qualname__) == (site.module, site.qualname):
        return False
    assert site.map_size is not None
    try:
        site.map_size(module)
    except AttributeError:
        return True
    return False


def _own(module: nn.Module, name: str, part: Any) -> None:
    part.attached = True
    part.train(module.training)
    # Another thread may be going through the submodules, which must not change in number meanwhile.
    module.__dict__["_modules"] = {**module._modules, name: part}


def _disown(module: nn.Module, name: str) -> None:
    module.__dict__["_modules"] = {key: part for key, part in module._modules.items() if key != name}


def _is_a_rule(module: nn.Module, name: str) -> bool:
    """Return whether a module has a forgetting function by a name that was assigned to it by hand, unpatched."""
    from ..forgetting import FuncD

    return isinstance(module._modules.get(name), FuncD)


def _is_free(module: nn.Module, name: str, replace: bool = True) -> bool:
    """Returns whether a module has no submodule of its own by a name, or one that was attached before.

    Raises:
        ConflictError: The name is that of something else.
    """
    existing = module._modules.get(name)
    if existing is not None:
        return replace and getattr(existing, "attached", False)
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


class _Owned(NamedTuple):
    """What a class owns or borrows, and what its instances get."""

    function: FunctionType
    site: Site
    attachments: Attachments


class Makers:
    """Has every instance of a host's patched classes come with what it needs: constructed, unpickled or copied.

    Wraps ``__init__`` and ``__setstate__`` of the classes that own a patched function or borrow it, and of those
    subclasses that define their own: not all of them call that of their base. Classes that are made later are wrapped
    when they are made, by ``__init_subclass__`` of ``nn.Module``. :meth:`drop` restores all of it; a wrapper that
    someone else has wrapped in turn cannot be taken out, and does nothing from then on.
    """

    def __init__(self) -> None:
        self._owned: dict[type, _Owned] = {}  # replaced and never changed, since other threads read it

        def wrapper(replace: bool) -> Callable[..., Any]:
            def attach_after(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
                result = wrapped(*args, **kwargs)
                self.attach(instance, replace)
                return result

            return attach_after

        # What is unpickled brings what it was saved with. In a constructor that of the base has done it already.
        self._attach_after = {"__init__": wrapper(replace=False), "__setstate__": wrapper(replace=True)}
        self.code: CodeType = self._attach_after["__init__"].__code__  # of both

    def attach(self, instance: Any, replace: bool = True, owners: Owners | None = None) -> None:
        """Give an instance what its sites need; see :meth:`Attachments.attach`."""
        for owned in self._of(instance):
            owned.attachments.attach(instance, owned.site, replace, owners)

    def prepare(self, instance: Any, replace: bool = True, owners: Owners | None = None) -> list[Callable[[], object]]:
        """Return the steps that attach to an instance; see :meth:`Attachments.prepare`."""
        return [
            step
            for owned in self._of(instance)
            for step in owned.attachments.prepare(instance, owned.site, replace, owners)
        ]

    def _of(self, instance: Any) -> list[_Owned]:
        if "_modules" not in instance.__dict__:  # it was never constructed
            return []
        return [owned for owner, owned in self._owned.items() if issubclass(type(instance), owner)]

    def owners(self, functions: Container[FunctionType] | None = None) -> list[type]:
        """Return the classes that own or borrow some functions; None: any."""
        return [cls for cls, owned in self._owned.items() if functions is None or owned.function in functions]

    def put(self, owned: Iterable[tuple[type, FunctionType, Site]], attachments: Attachments) -> list[CodeType]:
        """Have the instances of some classes come with what they need, or with something else from now on.

        Args:
            owned: The classes, each with its function and site.
            attachments: What they get.

        Returns:
            What was wrapped: an instance whose constructor is running in such code comes without.
        """
        with _classes_lock:
            _watch_classes(self)
            for cls, function, site in owned:
                new = _Owned(function, site, attachments)
                borrowers = dict.fromkeys(self.owners({function}), new)
                self._owned = {**self._owned, **borrowers, cls: new}
            return self.look_for_classes()

    def look_for_classes(self) -> list[CodeType]:
        """Wrap the classes that live now and are not wrapped yet; return the code that was wrapped."""
        with _classes_lock:
            classes = module_classes()
            for cls in classes:
                self._look_for_borrowed(cls)
            return [code for cls in classes for code in self._wrap(cls)]

    def see(self, cls: type) -> None:
        """Wrap a class that has just been made, if it has to be."""
        with _classes_lock:
            self._look_for_borrowed(cls)
            self._wrap(cls)

    def _look_for_borrowed(self, cls: type) -> None:
        if self._is_covered(cls):
            return
        functions: dict[object, _Owned] = {owned.function: owned for owned in self._owned.values()}
        for value in list(vars(cls).values()):
            if type(value) is FunctionType and value in functions:
                self._owned = {**self._owned, cls: functions[value]}

    def _is_covered(self, cls: type) -> bool:
        return any(base in self._owned for base in cls.__mro__)

    def _wrap(self, cls: type) -> list[CodeType]:
        import wrapt

        codes = []
        for name in self._attach_after if self._is_covered(cls) else ():
            inherited = name not in vars(cls)
            if (inherited and cls not in self._owned) or self._is_ours(vars(cls).get(name)):
                continue
            original = next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
            wrapper: Any = wrapt.FunctionWrapper(original, self._attach_after[name])
            wrapper._self_inherited = inherited
            setattr(cls, name, wrapper)
            codes.append(getattr(original, "__code__", None))
        return [code for code in codes if isinstance(code, CodeType)]

    def _is_ours(self, value: Any) -> bool:
        import wrapt

        return type(value) is wrapt.FunctionWrapper and value._self_wrapper in self._attach_after.values()

    def overridden(self, owner: type | None) -> list[tuple[str, Any]]:
        """Return what someone has put over our wrappers in a class, by name."""
        names = self._attach_after if owner in self._owned else ()
        return [(name, vars(owner).get(name)) for name in names if not self._is_ours(vars(owner).get(name))]

    def covers(self, instance: Any) -> bool:
        """Return whether there is something that an instance has to come with."""
        return bool(self._of(instance))

    def drop(self, functions: Container[FunctionType]) -> list[type]:
        """Let go of the classes that own or borrow some functions, and return them."""
        with _classes_lock:
            gone = self.owners(functions)
            self._owned = {cls: owned for cls, owned in self._owned.items() if cls not in gone}
            for cls in with_subclasses(gone):
                if not self._is_covered(cls):
                    self._unwrap(cls)
            if not self._owned:
                _unwatch_classes(self)
            return gone

    def _unwrap(self, cls: type) -> None:
        for name in self._attach_after:
            wrapper: Any = vars(cls).get(name)
            if self._is_ours(wrapper) and wrapper._self_inherited:
                delattr(cls, name)
            elif self._is_ours(wrapper):
                setattr(cls, name, wrapper.__wrapped__)


_classes_lock = threading.RLock()
_watching: list[Makers] = []
_class_hook: Any = None


def _watch_classes(makers: Makers) -> None:
    global _class_hook
    from torch import nn

    if makers not in _watching:
        _watching.append(makers)
    if _class_hook is not None:
        return
    module_class: Any = nn.Module
    before = vars(module_class).get("__init_subclass__")

    def __init_subclass__(cls: Any, *args: Any, **kwargs: Any) -> None:
        if before is None:
            super(module_class, cls).__init_subclass__(*args, **kwargs)
        else:
            before.__get__(None, cls)(*args, **kwargs)
        for each in list(_watching):
            each.see(cls)

    _class_hook = module_class.__init_subclass__ = classmethod(__init_subclass__)
    _class_hook.__func__.before = before


def _unwatch_classes(makers: Makers) -> None:
    global _class_hook
    if makers in _watching:
        _watching.remove(makers)
    if _watching or _class_hook is None:
        return
    from torch import nn

    module_class: Any = nn.Module
    # Else someone's hook has come over ours, which finds nothing to do from now on.
    if vars(module_class).get("__init_subclass__") is _class_hook:
        if _class_hook.__func__.before is None:
            del module_class.__init_subclass__
        else:
            module_class.__init_subclass__ = _class_hook.__func__.before
    _class_hook = None


def detach(instances: Iterable[Any], host: str, names: Iterable[str] = ("func_d", "feature_map")) -> None:
    """Take away what was attached to instances, and warn where that had learnt something.

    Args:
        instances: The instances.
        host: The host.
        names: What to take away.
    """
    lost = 0
    for instance in instances:
        modules = instance.__dict__.get("_modules", {})
        for name in names:
            part = modules.get(name)
            if getattr(part, "attached", False) and part.host in (host, ""):  # "": of a model that was left out
                lost += name == "feature_map" and is_trained(part)
                if getattr(part, "by_hand", False):
                    instance.__dict__["_modules"] = {**modules, name: part.rule}
                else:
                    _disown(instance, name)
                part.attached = False  # something else may hold it still, such as a traced model
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


# --- what lives -----------------------------------------------------------------------------------------------------


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
        candidates = [*candidates, *_reachable()]
    found = {id(obj): obj for obj in candidates if id(type(obj)) in wanted}
    return list(found.values())


def _reachable() -> list[Any]:
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
