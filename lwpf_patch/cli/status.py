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
from ..errors import HostNotInstalledError, LwpfError
from ..hosting import Host, SiteStatus
from ..hosts import HOSTS
from ..patching.schema import HostDescription, ShimStatus, describe_shim
from ..settings import Settings, asked_to_observe, describe_backend, from_environment, in_words
from .hook import BESIDE, hook_files


class HostReport(HostDescription, total=False):
    """What ``lwpf status --json`` tells of a host: what could be patched here.

    Attributes:
        patchable: Whether it can be patched.
        shims: Its compatibility shims.
    """

    patchable: bool
    shims: list[ShimStatus]


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
        requested, settings = from_environment(HOSTS)
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
        "hosts": {name: _report(host, settings) for name, host in HOSTS.items()},
    }


def _report(host: Host, settings: Settings) -> HostReport:
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
        if not host["patchable"]:
            print(f"\n{name}: cannot be patched: {host['problem']}")
            continue
        print(f"\n{name} {host['version']}: these would be patched")
        for site in host["sites"]:
            print(f"  {site['name']:<45} {_what_is_known(site)}")
        for shim in host["shims"]:
            print(f"  shim: {shim['name']} ({'needed' if shim['needed'] else 'not needed here'}): {shim['why']}")
    return 0


def _what_is_known(site: SiteStatus) -> str:
    if site["hash"] is None:
        return "takes attention by an interface; nothing is rewritten"
    return f"known, as in {site['known']}" if site["known"] else "not tested with this version; its shape is known"
