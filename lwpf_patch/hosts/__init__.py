"""The hosts: one file each that declares where a library holds softmax attention and which edits it needs."""

from __future__ import annotations

from ..errors import SettingsError, shown
from ..hosting import Host
from . import deeprc, hflayers, timm, torch_nn, transformers

#: All hosts, by name.
HOSTS: dict[str, Host] = {}


def register_host(host: Host) -> None:
    """Make a library of your own choice known, so that ``lwpf_patch.apply(name)`` patches it.

    Args:
        host: A :class:`lwpf_patch.hosting.RewrittenHost` or :class:`lwpf_patch.hosting.RegisteredHost`.

    Raises:
        SettingsError: It is none, or the name is that of another host.
    """
    if not isinstance(host, Host):
        raise SettingsError(f"register_host({shown(host)}): it is not a lwpf_patch.hosting.Host")
    if HOSTS.get(host.name, host) != host:
        raise SettingsError(f"register_host: there is a host by the name {host.name!r} already; choose another one")
    HOSTS[host.name] = host


for _host in (timm.HOST, hflayers.HOST, deeprc.HOST, torch_nn.HOST, transformers.HOST):
    register_host(_host)

__all__ = ["HOSTS", "register_host"]
