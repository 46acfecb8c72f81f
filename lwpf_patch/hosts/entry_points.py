"""Hosts that other packages declare, by an entry point of the group ``lwpf_patch.hosts``.

Only what asks for a host that is not in the box imports this: reading the metadata of all packages takes time.
"""

from __future__ import annotations

from importlib import metadata

from ..errors import SettingsError
from ..hosting import Host

GROUP = "lwpf_patch.hosts"


def declared() -> dict[str, list[metadata.EntryPoint]]:
    """Return the entry points of all installed packages, by the name of the host; one of each package is usual."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in metadata.entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return dict(sorted(found.items()))


def describe(points: list[metadata.EntryPoint]) -> str:
    """Return, in words, which packages declare a host."""
    return " and ".join(f"entry point {point.value} of {_package(point)}" for point in points)


def load(name: str, points: list[metadata.EntryPoint]) -> Host:
    """Return the host that an entry point names.

    Args:
        name: The name of the host.
        points: The entry points of this name.

    Raises:
        SettingsError: Several packages claim the name, the entry point cannot be loaded, or it is no host of this name.
    """
    what = f"host {name!r}: {describe(points)} (group {GROUP})"
    if len(points) > 1:
        raise SettingsError(f"{what} claim the same name: uninstall all of these packages but one")
    (point,) = points
    try:
        host = point.load()
    except Exception as error:  # whatever the package's own code raises
        raise SettingsError(
            f"{what} cannot be loaded: {type(error).__name__}: {error}. Repair or reinstall {_package(point)}, or "
            "uninstall it"
        ) from error
    if not isinstance(host, Host):
        raise SettingsError(
            f"{what} is no host but an object of type {type(host).__name__}: have it name an instance of "
            "lwpf_patch.hosting.RewrittenHost or of another kind of host there"
        )
    if host.name != name:
        raise SettingsError(
            f"{what} is the host {host.name!r}: give the entry point in the metadata of {_package(point)} the name of "
            "the host, which is that of the package to be patched, and install it again"
        )
    return host


def _package(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown package"
