"""The hosts: one file each that declares where a library holds softmax attention and which edits it needs."""

from __future__ import annotations

from . import deeprc, hflayers, timm
from .base import Host

HOSTS: dict[str, Host] = {host.name: host for host in (timm.HOST, hflayers.HOST, deeprc.HOST)}

__all__ = ["HOSTS", "Host"]
