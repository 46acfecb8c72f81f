"""What users call: apply, revert, patched, status."""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .. import attached, reporting
from ..errors import HostNotInstalledError
from ..hosting import Host
from ..hosting.shims import Shim
from ..hosts import HOSTS
from ..settings import Settings, check_hosts, texts
from . import exit_report, unpickling
from .attaching import living
from .changing import change, request
from .state import LOCK, PATCHED, TRANSITIONS, PatchedHost

__all__ = ["apply", "patched", "request", "revert", "status"]

_blocks: dict[str, list[_Block]] = {}


def apply(
    host: str | Iterable[str],
    *,
    func_d: Any = None,
    masking: str = "exclude",
    backend: str = "auto",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    compat: bool = True,
    uhop: Any = None,
    exclude_models: str | Iterable[str] | None = None,
) -> None:
    """Patches a host, now or when it is imported. Applying again with other settings replaces them.

    Other threads may be in the middle of a forward pass or a constructor: each call of an attention module computes
    with what was there before or with what is there afterwards. Applying once more with the same settings looks for
    modules that have come without a func_d.

    Args:
        host: A host's name, such as ``"timm"``, or several.
        func_d: The forgetting function: text such as ``"relu"`` or ``"pfu:mu=dmedian,bias=mu,sigma=0.01"``, a
            :class:`lwpf_patch.FuncD`, or a callable that maps scores to ``(D(s), D'(s))``. Each attention module gets a
            copy of its own. Default: ``"relu"``, or ``"none"`` with ``uhop``.
        masking: ``"exclude"`` keeps keys that a mask hides out of everything; ``"paper"`` is the official recipe, which
            lets them back into the denominator.
        backend: Which implementation of the operator computes.
        include: Glob patterns over site names such as ``"timm.layers.attention.Attention"``; default all.
        exclude: Glob patterns over site names to leave alone.
        compat: Whether to mend what a current environment breaks in a host; ``lwpf status`` lists these shims.
        uhop: U-Hop (Wu et al., ICML 2024): each attention module gets a feature map, and Stage I separates its keys
            after the first step of the optimizer. Text such as ``"iters=100,t=2,lr=0.1"``, or ``"on"``; apply it before
            the optimizer is made. None: no U-Hop.
        exclude_models: Glob patterns over names of models that stay plain, such as the teacher of a distillation: the
            class of a model, or of any module around the attention, and what ``timm.create_model`` calls it.

    Raises:
        SettingsError: An unknown host, func_d, masking, backend or option of uhop, or a pattern that matches no site.
        HostNotInstalledError: The host is not installed.
        RewriteError: A function of the host has a shape that is not known.
        ConflictError: Someone else has patched a function that would be patched.
    """
    names = check_hosts(texts(host), "apply()", HOSTS)
    settings = Settings(
        func_d, masking, backend, include, exclude, compat, uhop, exclude_models  # type: ignore[arg-type]
    )  # fmt: skip
    for name in names:  # all of them can be met before any of them is
        HOSTS[name].check(settings)
        HOSTS[name].check_installed(settings)
    for name in names:
        request(name, settings)


def revert(host: str | None = None) -> None:
    """Restores the very code that stood there before ``apply``.

    Calls that other threads have begun are waited for, for 10 s at most, before what they use is taken away.

    Args:
        host: The host's name, None for all.

    Raises:
        SettingsError: There is no such host.
        ConflictError: Someone else has patched over our patch since.
        LwpfError: It is called inside of a patched forward.
    """
    with TRANSITIONS:
        names = list(PATCHED) if host is None else check_hosts([host], "revert()", HOSTS)
        for name in names:
            if name in PATCHED:
                change(HOSTS[name], None)


@dataclass
class _Block:
    """A block of :func:`patched`, with what it found."""

    before: Settings | None


@contextlib.contextmanager
def patched(host: str, **settings: Any) -> Iterator[None]:
    """Patches a host for the length of a ``with`` block; afterwards it is as it was before, patched or not.

    A host is patched for the whole process, so blocks of several threads share it: the settings are those of the block
    that was entered last, for everyone. Each block puts back what it found. One that ends while a later one is still
    open changes nothing; the later one then puts back what the ended one had found, so that after the last of them the
    host is as it was before the first. ``apply`` and ``revert`` inside of a block hold until it ends.

    Args:
        host: The host's name.
        **settings: As for :func:`apply`.

    Raises:
        LwpfError: As for :func:`apply`, and at the end as for :func:`revert`.
    """
    check_hosts([host], "patched()", HOSTS)
    with TRANSITIONS:
        before = PATCHED.get(host)
        apply(host, **settings)
        block = _Block(None if before is None else before.settings)
        blocks = _blocks.setdefault(host, [])
        blocks.append(block)
    try:
        yield
    finally:
        with TRANSITIONS:
            above = blocks[blocks.index(block) + 1 :]
            blocks.remove(block)
            if above:
                above[0].before = block.before
            elif block.before is None:
                revert(host)
            else:
                request(host, block.before)


def status() -> dict[str, Any]:
    """Returns what is patched, as plain data: for each host its version, state, settings and sites."""
    with LOCK:
        return {"hosts": {name: _host_status(host) for name, host in HOSTS.items()}}


def _host_status(host: Host) -> dict[str, Any]:
    applied = PATCHED.get(host.name)
    found: dict[str, Any]
    try:
        found = {"installed": True, "version": host.version() or "unknown"}
    except HostNotInstalledError as error:
        if applied is None:
            return {"installed": False, "state": "not installed", "hint": str(error)}
        found = {"installed": False, "version": "unknown"}
    if applied is None:
        return {**found, "state": "off"}
    return {
        **found,
        "state": "patched" if applied.sites or applied.registered else "waiting for its import",
        "called": reporting.was_used(host.name),
        "backends": reporting.backends_of(host.name),
        "shims": [{"name": shim.name, "why": shim.why, "state": _shim_state(applied, shim)} for shim in host.shims],
        "modules": len(living(applied.makers.owners())),
        "feature_maps": _feature_maps(host.name) if applied.settings.uhop is not None else None,
        "settings": applied.settings.describe(),
        # by name: a module that was reloaded has two classes of one name, both patched
        "sites": list(
            {
                site.site.name: {"name": site.site.name, "function": site.site.qualname, "known": site.known}
                for site in applied.sites
            }.values()
        ),
    }


def _feature_maps(host: str) -> dict[str, int]:
    if "lwpf_patch.uhop" not in sys.modules:  # which imports torch
        return {"modules": 0, "separated": 0}
    from ..uhop import report

    return report.summary(host)


def _shim_state(applied: PatchedHost, shim: Shim) -> str:
    if not applied.settings.compat:
        return "refused"
    if any(each.shim is shim for each in applied.shims):
        return "applied"
    return "waiting for its import" if shim.is_needed() else "not needed"


def set_state(part: Any, contents: Any) -> None:
    """Set the state of an attached part that is unpickled, and see that its host is patched; named in every pickle.

    Raises:
        LwpfError: As for :func:`lwpf_patch.patching.unpickling.require_patch`.
    """
    part.__setstate__(contents)
    unpickling.require_patch(part)


attached.set_state_of = set_state
atexit.register(exit_report.report, PATCHED)
