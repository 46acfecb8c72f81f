"""What is patched, with what, and since when.

Nothing here imports torch before a host is there to be patched.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from typing import Any

from ..hosting import Host, RewrittenHost, Site
from ..hosting.shims import AppliedShim
from ..settings import Settings
from .attaching import Attachments, Makers
from .swapping import PatchedSite

#: Held while a host goes from one state to another: one at a time.
TRANSITIONS = threading.RLock()
#: Held while the state is read or changed, and by imports; never while waiting for another thread.
LOCK = threading.RLock()


@dataclass
class PatchedHost:
    """A host that was asked to be patched.

    Attributes:
        host: The host.
        settings: How.
        makers: What has new instances come with what they need.
        sites: What has been patched of it so far.
        shims: The compatibility shims that are in place.
        registered: Of a host with an interface: for each module that has it, what undoes the registration.
        modules: Of a host that hands over its attention modules: those that have a func_d.
        seen: The modules that are known to be there, imported or not.
        complete: Whether every site that was asked for has been found.
        misfits: The sites that are left as they are, since the shape of their source is not known, and why.
        told: The names of functions that the user has been warned of.
    """

    host: Host
    settings: Settings
    makers: Makers = field(default_factory=Makers)
    sites: list[PatchedSite] = field(default_factory=list)
    shims: list[AppliedShim] = field(default_factory=list)
    registered: dict[str, Callable[[], None]] = field(default_factory=dict)
    modules: Sized = ()
    seen: set[str] = field(default_factory=set)
    complete: bool = False
    misfits: dict[str, str] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    _attachments: Attachments | None = None

    @functools.cached_property
    def chosen(self) -> tuple[Site, ...]:
        """The sites that were asked for."""
        assert isinstance(self.host, RewrittenHost)
        return self.host.chosen_sites(self.settings)

    def attachments(self) -> Attachments:
        """Return what the instances get; made at first use, since it needs torch."""
        if self._attachments is None:
            assert isinstance(self.host, RewrittenHost)
            self._attachments = Attachments(self.host, self.settings)
        return self._attachments

    def provisional(self) -> list[Any]:
        """Return references to what was made while it was not sure that this state would stand."""
        return (self._attachments.provisional or []) if self._attachments is not None else []


#: The hosts that were asked to be patched, by name.
PATCHED: dict[str, PatchedHost] = {}


def settings_of(host: str) -> Settings | None:
    """Return the settings that a host is patched with, None if it is not."""
    applied = PATCHED.get(host)
    return None if applied is None else applied.settings


def is_patched(host: str, function: str) -> bool:
    """Return whether a function of a host was asked to be patched, and not left out.

    Args:
        host: The host's name.
        function: The function's qualified name with that of its module; without in models that an older version saved.
    """
    applied = PATCHED.get(host)
    if applied is None or not isinstance(applied.host, RewrittenHost):
        return applied is not None
    return any(function in (site.function, site.qualname) for site in applied.chosen)
