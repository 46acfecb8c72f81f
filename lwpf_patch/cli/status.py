"""The verb ``lwpf status``: show hosts, versions, sites, and what would be patched."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from typing import Any, TypedDict

from .. import __version__
from ..comparing.command import Subparsers
from ..errors import HostNotInstalledError, LwpfError, SettingsError
from ..hosting import Host, SiteStatus
from ..hosts import find_hosts, known_hosts
from ..patching.schema import HostDescription, ShimStatus, describe_shim
from ..settings import PATCH, Settings, asked_to_observe, describe_backend, from_environment, in_words
from .hook import BESIDE, hook_files
from .listing import BOX, Listed, every_host


class HostReport(HostDescription, total=False):
    """What ``lwpf status --json`` tells of a host: what could be patched here.

    Attributes:
        patchable: Whether it can be patched.
        shims: Its compatibility shims.
        declared_by: Who declares it, in words: ``"lwpf_patch"``, or the entry point of an installed package.
        not_used: The entry points that claim its name in vain, in words; empty: none.
    """

    patchable: bool
    shims: list[ShimStatus]
    declared_by: str
    not_used: str


class CommandStatus(TypedDict):
    """What ``lwpf status --json`` prints.

    Attributes:
        lwpf_patch: The version of this package.
        python: That of Python.
        torch: That of PyTorch; None: it is not installed.
        hook: Where the start-up hook lies.
        environment: The variables that are set.
        request: What they ask for: ``hosts``, and the settings as :class:`lwpf_patch.settings.SettingsStatus` lists
            them; or ``problem``, what is wrong. Empty where nothing is asked for.
        observe: What is to be observed of the layers; None: nothing.
        backend: What the request for a backend comes to, in words.
        hosts: The hosts, by name.
    """

    lwpf_patch: str
    python: str
    torch: str | None
    hook: list[str]
    environment: dict[str, str]
    request: dict[str, Any]
    observe: str | None
    backend: str
    hosts: dict[str, HostReport]


def add_parser(commands: Subparsers) -> None:
    """Add the verb."""
    parser = commands.add_parser("status", help="show hosts, versions, sites, and what would be patched")
    parser.add_argument("--json", action="store_true", help="print plain data")
    parser.set_defaults(command=_status)


def _command_status() -> CommandStatus:
    try:
        requested, settings = from_environment(known_hosts(os.environ.get(PATCH.variable, "")))
        if requested:
            find_hosts(requested, PATCH.variable)  # raises where an entry point is wrong
        request: dict[str, Any] = {"hosts": list(requested), **settings.describe()} if requested else {}
        observed = asked_to_observe()
    except LwpfError as error:
        settings, observed = Settings(), None
        request = {"problem": str(error)}
    return {
        "lwpf_patch": __version__,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "hook": [str(path) for path in hook_files()],
        "environment": {name: value for name, value in os.environ.items() if name.startswith("LWPF_")},
        "request": request,
        "observe": None if observed is None else str(observed),
        "backend": describe_backend(settings.backend),
        "hosts": {name: _report(listed, settings) for name, listed in every_host().items()},
    }


def _report(listed: Listed, settings: Settings) -> HostReport:
    return {**_found(listed.host, settings), "declared_by": listed.by, "not_used": listed.not_used}


def _found(host: Host | SettingsError, settings: Settings) -> HostReport:
    if isinstance(host, SettingsError):
        return {"patchable": False, "problem": str(host)}
    try:
        sites = host.describe_sites(Settings(uhop=settings.uhop))
    except HostNotInstalledError as error:
        return {"installed": False, "patchable": False, "problem": f"{error}; {BESIDE}"}
    except LwpfError as error:
        version = host.version() or "unknown"
        return {"installed": True, "version": version, "patchable": False, "problem": str(error)}
    return {
        "installed": True,
        "version": host.version() or "unknown",
        "patchable": True,
        "sites": sites,
        "shims": [describe_shim(shim) for shim in host.shims],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _status(options: argparse.Namespace) -> int:
    status = _command_status()
    if options.json:
        print(json.dumps(status, indent=2))
        return 0
    print(f"lwpf_patch {status['lwpf_patch']}, Python {status['python']}, torch {status['torch'] or 'not installed'}")
    print(f"start-up hook: {', '.join(status['hook']) or 'not installed; LWPF_PATCH and lwpf run have no effect'}")
    print(
        f"environment:   {' '.join(f'{k}={v}' for k, v in status['environment'].items()) or 'no LWPF_ variable is set'}"
    )
    request = status["request"]
    if "problem" in request:
        print(f"request:       WRONG: {request['problem']}")
    elif request:
        print(f"request:       patch {', '.join(request['hosts'])}; {in_words(request)}")
    if status["observe"]:
        print(f"observe:       {status['observe']}")
    print(f"backend:       {status['backend']}")
    for name, host in status["hosts"].items():
        by = "" if host["declared_by"] == BOX else f" (declared by {host['declared_by']})"
        if not host["patchable"]:
            print(f"\n{name}{by}: cannot be patched: {host['problem']}")
            continue
        print(f"\n{name} {host['version']}{by}: these would be patched")
        for site in host["sites"]:
            print(f"  {site['name']:<45} {_what_is_known(site)}")
        for shim in host["shims"]:
            print(f"  shim: {shim['name']} ({'needed' if shim['needed'] else 'not needed here'}): {shim['why']}")
        if host["not_used"]:
            print(f"  not used: {host['not_used']}, since lwpf_patch has a host of this name")
    return 0


def _what_is_known(site: SiteStatus) -> str:
    if site["hash"] is None:
        return "takes attention by an interface; nothing is rewritten"
    return f"known, as in {site['known']}" if site["known"] else "not tested with this version; its shape is known"
