"""What a patched attention module owns: its func_d and, where U-Hop is asked for, its feature map.

Both are submodules, attached when an instance is made or unpickled, and to those that live when the patch comes. A
class needs them if it inherits a patched function, or borrows it, as in
``class Mine(nn.Module): forward = Attention.forward``.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import reporting
from ..hosting.attachments import Attachment, Order, Step, disown, is_trained
from ..hosting.rewritten import RewrittenHost, Site
from ..settings import Settings
from . import importing
from .living import module_classes, with_subclasses
from .owners import Owners, match, names_in_construction

if TYPE_CHECKING:
    from torch import nn


class Attachments:
    """What the instances of a host's patched classes get.

    Args:
        host: The host.
        settings: How it is patched.

    Attributes:
        prototypes: What is made once for each attachment, such as the func_d of which every instance gets a copy.
        provisional: What has been made by any thread while it is not sure that the settings will stand; None: it is.
    """

    def __init__(self, host: RewrittenHost, settings: Settings) -> None:
        self.host, self.settings = host, settings
        self.prototypes = host.prototypes(settings)
        from . import teachers

        self._note = teachers.note
        teachers.watch()
        self.provisional: list[weakref.ref[nn.Module]] | None = None
        self._before: Settings | None = None

    def begin(self, before: Settings | None) -> None:
        """Have instances come also with what the settings before these need, whose code still runs."""
        self.provisional = []
        self._before = before

    def settle(self) -> None:
        """End what :meth:`begin` has begun, since the code is that of these settings now."""
        self.provisional = None
        self._before = None

    def attach(self, module: nn.Module, site: Site, replace: bool = True, owners: Owners | None = None) -> None:
        """Give an instance what its site needs, unless it has its own.

        Args:
            module: The instance.
            site: Its site.
            replace: Whether what was attached before is replaced.
            owners: Who owns the modules that live; None: it is being constructed, or copied.

        Raises:
            ConflictError: A name that is needed is taken.
            SettingsError: The module can have no feature map.
        """
        for step in self.prepare(module, site, replace, owners):
            step()
        made = self.provisional
        if made is not None:
            made.append(weakref.ref(module))

    def prepare(self, module: nn.Module, site: Site, replace: bool = True, owners: Owners | None = None) -> list[Step]:
        """Make what :meth:`attach` attaches, and return the steps that are left, none of which raises."""
        plain = self._is_excluded(module, owners)
        steps: list[Step] = []
        for each in site.attachments:
            order = Order(
                self.host.name, site.module, site.qualname, self.settings, self._who_asks(each),
                self.prototypes.get(each.name), plain, replace,
            )  # fmt: skip
            steps += each.prepare(module, order)
        return [*steps, partial(self._note, module)]

    def _who_asks(self, attachment: Attachment) -> Settings | None:
        if attachment.is_asked(self.settings):
            return self.settings
        before = self._before
        return before if before is not None and attachment.is_asked(before) else None

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
        self._expected: frozenset[tuple[str, str]] = frozenset()
        #: The instances of classes that were seen when they were made and own nothing yet.
        self._early: dict[type, list[weakref.ref[Any]]] = {}
        #: The classes of modules that are being executed, by module.
        self._unplaced: dict[str, list[type]] = {}

        def wrapper(replace: bool) -> Callable[..., Any]:
            def attach_after(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
                result = wrapped(*args, **kwargs)
                self.attach(instance, replace)
                return result

            return attach_after

        # What is unpickled brings what it was saved with. In a constructor that of the base has done it already.
        self._attach_after = {"__init__": wrapper(replace=False), "__setstate__": wrapper(replace=True)}
        self.code: CodeType = self._attach_after["__init__"].__code__  # of both

    def expect(self, classes: Iterable[tuple[str, str]]) -> None:
        """Look out for classes that are about to be defined; :meth:`put_new` is told which functions they have.

        Args:
            classes: The modules and the qualified names of the classes.
        """
        with _classes_lock:
            self._expected = self._expected | frozenset(classes)
            _watch_classes(self)

    def attach(self, instance: Any, replace: bool = True, owners: Owners | None = None) -> None:
        """Give an instance what its sites need; see :meth:`Attachments.attach`."""
        for owned in self._of(instance):
            owned.attachments.attach(instance, owned.site, replace, owners)
        if self._early:
            with _classes_lock:
                for cls in self._early.keys() & type(instance).__mro__:
                    self._early[cls].append(weakref.ref(instance))

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

    def put_new(self, owned: Sequence[tuple[type, FunctionType, Site]], attachments: Attachments) -> list[Any] | None:
        """Do as :meth:`put` for classes of a module that has just been executed, and look at nothing that is older.

        Returns:
            The instances that the module has made; None: they are not known, and may be any of those that live.
        """
        with _classes_lock:
            unplaced = [
                cls for module in {cls.__module__ for cls, _, _ in owned} for cls in self._unplaced.pop(module, ())
            ]
            early = {cls: self._early.pop(cls, None) for cls, _, _ in owned}
            if any(instances is None for instances in early.values()):
                self.put(owned, attachments)
                return None
            for cls, function, site in owned:
                self._owned = {**self._owned, cls: _Owned(function, site, attachments)}
            before = len(self._owned)
            for cls in unplaced:
                self._look_for_borrowed(cls)
                self._wrap(cls)
            made = [instance for each in early.values() for ref in each or () if (instance := ref()) is not None]
            # The constructor of a subclass may have called that of its base, and both are wrapped.
            known = list({id(instance): instance for instance in made}.values())
            return known if len(self._owned) == before else None

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
            if importing.is_executing(cls.__module__):
                self._unplaced.setdefault(cls.__module__, []).append(cls)
                if (cls.__module__, cls.__qualname__) in self._expected:
                    self._early[cls] = []
            self._wrap(cls)

    def _look_for_borrowed(self, cls: type) -> None:
        if self._is_covered(cls):
            return
        functions: dict[object, _Owned] = {owned.function: owned for owned in self._owned.values()}
        for value in list(vars(cls).values()):
            if type(value) is FunctionType and value in functions:
                self._owned = {**self._owned, cls: functions[value]}

    def _is_covered(self, cls: type) -> bool:
        return any(base in self._owned or base in self._early for base in cls.__mro__)

    def _wrap(self, cls: type) -> list[CodeType]:
        import wrapt

        codes = []
        for name in self._attach_after if self._is_covered(cls) else ():
            inherited = name not in vars(cls)
            if (inherited and cls not in self._owned and cls not in self._early) or self._is_ours(vars(cls).get(name)):
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
            if not self._owned and not self._expected:
                _unwatch_classes(self)
            return gone

    def unwatch(self) -> None:
        """Look out for nothing any more."""
        with _classes_lock:
            early, self._early, self._unplaced, self._expected = list(self._early), {}, {}, frozenset()
            for cls in with_subclasses(early):
                if not self._is_covered(cls):
                    self._unwrap(cls)
            if not self._owned:
                _unwatch_classes(self)

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
    if makers not in _watching:
        _watching.append(makers)
    if _class_hook is not None:
        return
    # torch may be in the middle of its import
    module_class: Any = vars(sys.modules[importing.MODULE_OF_MODULES])["Module"]
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


def detach(instances: Iterable[Any], host: str, names: Iterable[str]) -> None:
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
                disown(instance, name)
                part.attached = False  # something else may hold it still, such as a traced model
    warn_of_loss(lost, host)


def warn_of_loss(lost: int, host: str) -> None:
    """Warn of trained feature maps that are taken away."""
    if lost:
        reporting.warn(
            f"{lost} trained feature maps of {host} were removed with the patch, and their models compute without them "
            "now; lwpf_patch.fold(model) before would have written them into the projections"
        )
