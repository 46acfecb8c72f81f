"""The attention modules of a host that hands them to what is registered with it, and the func_d that each has."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from ..hosting import ModularHost, Order
from ..settings import Settings
from .attaching import detach
from .living import living
from .owners import Owners, match, names_in_construction

if TYPE_CHECKING:
    from torch import nn


class AttachedModules:
    """See :class:`lwpf_patch.hosting.AttachedModules`.

    Args:
        host: The host.
        settings: How it is patched.
    """

    def __init__(self, host: ModularHost, settings: Settings) -> None:
        from . import teachers

        self.host, self.settings = host, settings
        self._prototypes: list[tuple[Settings, Any]] = []
        self._attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._left_out: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self._owners: Owners | None = None
        self._note = teachers.note
        teachers.watch()

    def __len__(self) -> int:
        return len(self._attached)

    def attach(
        self, module: nn.Module, settings: Settings | None = None, *, plain: bool = False, replace: bool = True
    ) -> None:
        """Give a module its func_d; see :meth:`lwpf_patch.hosting.AttachedModules.attach`."""
        settings = self.settings if settings is None else settings
        cls = type(module)
        order = Order(
            self.host.name, cls.__module__, f"{cls.__qualname__}.forward", settings, settings,
            self._prototype(settings), plain, replace,
        )  # fmt: skip
        for step in self.host.attachment.prepare(module, order):
            step()
        self._attached.add(module)
        self._note(module)

    def _prototype(self, settings: Settings) -> Any:
        found = next((prototype for known, prototype in self._prototypes if known == settings), None)
        if found is None:
            found = self.host.prototypes(settings)["func_d"]
            self._prototypes.append((settings, found))
        return found

    def is_left_out(self, model: nn.Module) -> bool:
        """Return whether a model stays plain; see :meth:`lwpf_patch.hosting.AttachedModules.is_left_out`."""
        if not self.settings.exclude_models:
            return False
        if model not in self._left_out:
            names = set(names_in_construction(model, self.host))
            if self.host.names_of_model is not None and "config" in vars(model):
                names.update(self.host.names_of_model(model))
            if self._owners is not None:
                names.update(self._owners.names(model, self.host))
            self._left_out[model] = match(names, self.settings.exclude_models)
        return self._left_out[model]

    def living(self, cls: type) -> list[Any]:
        """Return the instances of a class and its subclasses that live."""
        found = living([cls])
        self._owners = Owners() if found and self.settings.exclude_models else None
        return found

    def settle(self) -> None:
        """Forget who owned what when the host was registered."""
        self._owners = None

    def detach(self) -> None:
        """Take away what was attached."""
        detach(list(self._attached), self.host.name, [self.host.attachment.name])
        self._attached.clear()
