"""Hosts whose interface hands the attention module to what is registered, so that each module has its own func_d."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from ..settings import Settings
from .attachments import FuncDAttachment, HostModule
from .contract import RegisteredHost

if TYPE_CHECKING:
    from torch import nn


class AttachedModules(Protocol):
    """The attention modules of a host that have a func_d: what the host attaches by.

    Attributes:
        settings: How the host is patched.
    """

    settings: Settings

    def attach(
        self, module: nn.Module, settings: Settings | None = None, *, plain: bool = False, replace: bool = True
    ) -> None:
        """Give a module its func_d, unless it has one that was made of the same settings.

        Args:
            module: An attention module.
            settings: What it is made of, where that is not ``settings``.
            plain: Whether the module forgets nothing, as part of a model that is left out.
            replace: Whether a func_d that was attached before is replaced.

        Raises:
            ConflictError: The module has something else by that name.
        """

    def is_left_out(self, model: nn.Module) -> bool:
        """Return whether ``exclude_models`` leaves a model plain; asked while it is constructed, or later."""

    def living(self, cls: type) -> list[Any]:
        """Return the instances of a class and its subclasses that live."""


@dataclass(frozen=True, kw_only=True)
class ModularHost(RegisteredHost):
    """A library whose interface hands the attention module to the function that is registered.

    Attributes:
        register: Called with each of ``places``, once it has been imported, and the :class:`AttachedModules`.
            Registers a function that calls the ``func_d`` of the module that it is handed, attaches to the models
            that live, sees to it that those that are made later are attached to, and returns what undoes all that.
            What was attached is taken away after that.
        modules_of: Returns the attention modules of a model, by name; none if it is no model of the library. Raises a
            SettingsError if its attention cannot be patched.
        patch: Called with a model whose modules have a func_d of their own: has them use it, patched host or not.
        unpatch: Undoes that, when their func_d is gone.
        attachment: The func_d of a module.
        names_of_model: Gives the names that the library has for a model.
        no_model: What to say, after "The model", of a program that never called a patched module.
    """

    register: Callable[[ModuleType, AttachedModules], Callable[[], None]]  # type: ignore[assignment]
    modules_of: Callable[[HostModule], dict[str, HostModule]]
    patch: Callable[[HostModule], None]
    unpatch: Callable[[HostModule], None]
    attachment: FuncDAttachment
    names_of_model: Callable[[HostModule], Iterable[str]] | None = None
    names_in_call: None = None
    refused: Sequence[str] = ("uhop", "include", "exclude")
    no_model: str = "takes no attention by its interface"

    def prototypes(self, settings: Settings) -> dict[str, Any]:
        """Return the func_d of which every module gets a copy; see :meth:`Host.prototypes`."""
        return {"func_d": self.attachment.prototype(self.name, settings)}
