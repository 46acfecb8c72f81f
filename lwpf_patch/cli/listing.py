"""All hosts that could be patched here, and who declares them."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import SettingsError
from ..hosting import Host
from ..hosts import HOSTS, IN_THE_BOX, entry_points, register_host

#: Who declares the hosts in the box.
BOX = "lwpf_patch"


class Listed(NamedTuple):
    """A host, and who declares it.

    Attributes:
        host: The host; or what is wrong with its declaration.
        by: Who declares it, in words: :data:`BOX`, or an entry point of an installed package.
        not_used: The entry points that claim the name of a host in the box, in words; empty: none.
    """

    host: Host | SettingsError
    by: str
    not_used: str = ""

    def named(self, name: str) -> str:
        """Return its name, with who declares it if that is not the box."""
        return name if self.by == BOX else f"{name} (declared by {self.by})"


def every_host() -> dict[str, Listed]:
    """Return all hosts, by name: those in the box, and those that installed packages declare."""
    declared = entry_points.declared()
    found = {name: Listed(HOSTS[name], BOX, entry_points.describe(declared.pop(name, []))) for name in IN_THE_BOX}
    for name, points in declared.items():
        host: Host | SettingsError
        try:
            if name not in HOSTS:
                register_host(entry_points.load(name, points))
            host = HOSTS[name]
        except SettingsError as error:
            host = error
        found[name] = Listed(host, entry_points.describe(points))
    return found
