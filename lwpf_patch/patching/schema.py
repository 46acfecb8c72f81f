"""The schema of what ``status()`` returns, and of what ``lwpf status --json`` prints of a host, for what they share."""

from __future__ import annotations

from typing import TypedDict

from ..hosting import SiteStatus
from ..hosting.shims import Shim
from ..observing.requesting import ObservingStatus
from ..settings import SettingsStatus


class ShimStatus(TypedDict):
    """A compatibility shim of a host.

    Attributes:
        name: Its name.
        why: What it mends.
        needed: Whether this environment needs it.
    """

    name: str
    why: str
    needed: bool


class AppliedShimStatus(ShimStatus):
    """A shim of a host that is patched.

    Attributes:
        state: ``"applied"``, ``"waiting for its import"``, ``"not needed"`` or ``"refused"``.
    """

    state: str


class FeatureMapsStatus(TypedDict):
    """The feature maps of U-Hop that live.

    Attributes:
        modules: How many there are.
        separated: How many of them have been through Stage I.
    """

    modules: int
    separated: int


class HostDescription(TypedDict, total=False):
    """What ``status()`` and ``lwpf status --json`` both tell of a host, as far as it applies.

    Attributes:
        installed: Whether Python finds it.
        version: Its version, or ``"unknown"``.
        problem: Why it cannot be patched, if it cannot.
        sites: What is patched of it (``status()``), or would be (``lwpf status``).
    """

    installed: bool
    version: str
    problem: str
    sites: list[SiteStatus]


class HostStatus(HostDescription, total=False):
    """What ``status()`` tells of a host.

    Attributes:
        state: ``"not installed"``, ``"off"``, ``"waiting for its import"`` or ``"patched"``.
        called: Whether a patched forward was ever called.
        backends: The backends that have computed, each with the reasons for it.
        modules: How many attention modules live that are patched.
        feature_maps: The feature maps; None without U-Hop.
        blocks: The modules that forget of each model called so far; None where ``blocks`` was not asked for.
        settings: How it is patched.
        shims: Its compatibility shims.
    """

    state: str
    called: bool
    backends: dict[str, list[str]]
    modules: int
    feature_maps: FeatureMapsStatus | None
    blocks: dict[str, list[str]] | None
    settings: SettingsStatus
    shims: list[AppliedShimStatus]


class Status(TypedDict):
    """What ``status()`` returns.

    Attributes:
        hosts: The hosts, by name.
        observe: What came of the request of ``LWPF_OBSERVE`` so far; None: there is none.
    """

    hosts: dict[str, HostStatus]
    observe: ObservingStatus | None


def describe_shim(shim: Shim) -> ShimStatus:
    """Return what there is to tell of a shim."""
    return {"name": shim.name, "why": shim.why, "needed": shim.is_needed()}
