"""The hosts: one file each that declares where a library holds softmax attention and which edits it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import SettingsError, shown
from ..hosting import Host
from ..options import texts
from ..settings import HostNames, check_hosts
from . import deeprc, hflayers, timm, torch_nn, transformers

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

#: The hosts in the box and those that have been registered, by name.
HOSTS: dict[str, Host] = {}


def register_host(host: Host) -> None:
    """Make a library of your own choice known, so that ``lwpf_patch.apply(name)`` patches it.

    Args:
        host: A :class:`lwpf_patch.hosting.RewrittenHost` or :class:`lwpf_patch.hosting.RegisteredHost`.

    Raises:
        SettingsError: It is none, the name is that of another host, or it is in the script itself.
    """
    if not isinstance(host, Host):
        raise SettingsError(f"register_host({shown(host)}): it is not a lwpf_patch.hosting.Host")
    if "__main__" in host.modules():
        raise SettingsError(
            f"register_host: host {host.name!r} has attention in __main__, which is no module that is imported: move "
            "the class into a module of its own"
        )
    if HOSTS.get(host.name, host) != host:
        raise SettingsError(f"register_host: there is a host by the name {host.name!r} already; choose another one")
    HOSTS[host.name] = host


def known_hosts(asked: HostNames = ()) -> list[str]:
    """Return the names of all hosts; those of entry points only if one is asked for that is not known without them.

    Args:
        asked: The names that are asked for.
    """
    return [*HOSTS, *_declared(texts(asked))]


def find_hosts(names: HostNames, origin: str) -> tuple[str, ...]:
    """Return names of hosts that were given, once each; after that all of them are in ``HOSTS``.

    Args:
        names: A name, several, or text with commas.
        origin: Where they came from, for error messages.

    Raises:
        SettingsError: There is no such host, or no name at all; or an entry point that declares one is wrong.
    """
    given = texts(names)
    declared = _declared(given)
    found = check_hosts(given, origin, [*HOSTS, *declared])
    for name in found:
        if name not in HOSTS:
            from . import entry_points

            register_host(entry_points.load(name, declared[name]))
    return found


def _declared(asked: tuple[Any, ...]) -> dict[str, list[EntryPoint]]:
    """Return the entry points of hosts that are not known without them; none if none of them is asked for."""
    if all(name in HOSTS for name in asked if isinstance(name, str)):
        return {}
    from . import entry_points

    return {name: points for name, points in entry_points.declared().items() if name not in HOSTS}


for _host in (timm.HOST, hflayers.HOST, deeprc.HOST, torch_nn.HOST, transformers.HOST):
    register_host(_host)

#: The names of the hosts in the box.
IN_THE_BOX = tuple(HOSTS)

__all__ = ["HOSTS", "IN_THE_BOX", "find_hosts", "known_hosts", "register_host"]
