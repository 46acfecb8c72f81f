"""What users call: apply, revert, patched, status."""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import attached, reporting
from ..blocks import BlocksLike
from ..errors import HostNotInstalledError
from ..hosting import Host
from ..hosting.shims import Shim
from ..hosts import HOSTS, find_hosts
from ..observing import requesting
from ..settings import HostNames, Patterns, Settings
from ..specs import FuncDLike, SepLike, UHopLike
from . import deciding, exit_report, unpickling
from .changing import change, request
from .living import living
from .schema import AppliedShimStatus, FeatureMapsStatus, HostStatus, Status, describe_shim
from .state import LOCK, PATCHED, TRANSITIONS, PatchedHost, settings_of

__all__ = ["apply", "patched", "request", "revert", "status"]

_blocks: dict[str, list[_Block]] = {}


def apply(
    host: HostNames,
    *,
    func_d: FuncDLike | None = None,
    sep: SepLike | None = None,
    masking: str | None = None,
    backend: str | None = None,
    verify: str | None = None,
    uhop: UHopLike | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    blocks: BlocksLike | None = None,
    exclude_models: Patterns | None = None,
    partial: str = "warn",
    compat: bool | str = True,
) -> None:
    """Patch a host, now or when it is imported. Applying again with other settings replaces them.

    Other threads may be in the middle of a forward pass or a constructor: each call of an attention module computes
    with what was there before or with what is there afterwards. Applying once more with the same settings looks for
    modules that have come without a func_d.

    Args:
        host: A host's name, such as ``"timm"``, or several: a list, or text with commas. All are patched, or none.
        func_d: The forgetting function: text such as ``"relu"`` or ``"pfu:mu=dmedian,bias=mu,sigma=0.01"``, a
            :class:`lwpf_patch.FuncD`, or a callable that maps scores to ``(D(s), D'(s))``. Each attention module gets a
            copy of its own. Default: ``"relu"``, or ``"none"`` with ``uhop`` or ``sep``.
        sep: The normalisation of the scores: ``"softmax"``, ``"softmax_n:n=1"``, ``"sparsemax"``, ``"entmax15"``, or
            alpha from 1 to 2; see :func:`lwpf_patch.lwpf_attention`. None: as the func_d says, or ``"softmax"``.
        masking: ``"exclude"`` keeps keys that a mask hides out of everything; ``"paper"`` is the official recipe, which
            lets them back into the denominator. None: as the func_d says, if it is that of another attention layer
            (``model.blocks[0].attn.func_d``), and else ``"exclude"``.
        backend: Which implementation of the operator computes. None: as the func_d says, or ``"auto"``.
        verify: When the kernels of a GPU are checked against the eager form: ``"first"``, by a small part of the first
            call of each case; ``"always"``; or ``"off"``. What fails is computed by the eager form from then on, with a
            warning, or is an error with ``backend="triton"``. None: as the func_d says, or ``"first"``.
        uhop: U-Hop (Wu et al., ICML 2024): each attention module gets a feature map, and Stage I separates its keys
            after the first step of the optimizer. Text such as ``"iters=100,t=2,lr=0.1"``, ``"on"``, or a
            :class:`lwpf_patch.UHop`; apply it before the optimizer is made. None: no U-Hop.
        include: Glob patterns over site names such as ``"timm.layers.attention.Attention"``; default all.
        exclude: Glob patterns over site names to leave alone.
        blocks: The attention modules of each model that forget, counted from 0 in the order in which the model
            registers them: text such as ``"6-"`` (from the seventh on), ``"-5"`` (the first six), ``"0,3,8-11"`` or
            ``"last 4"``, a number, or several, such as ``range(6, 12)``. The others stay plain. It is decided when a
            model is first called. Not with ``uhop``. Default: all.
        exclude_models: Glob patterns over names of models that stay plain, such as the teacher of a distillation: the
            class of a model, or of any module around the attention, and what ``timm.create_model`` calls it.
        partial: What becomes of a model of timm that holds attention which is not patched, when it is made:
            ``"warn"``, ``"allow"``, or ``"error"``. What ``include`` and ``exclude`` leave out does not count.
        compat: Whether to mend what a current environment breaks in a host; ``lwpf status`` lists these shims.

    Raises:
        SettingsError: An unknown host, func_d, sep, masking, backend or option of uhop; a package that one of them
            needs is not installed; or a pattern matches no site.
        HostNotInstalledError: The host is not installed.
        RewriteError: A function of the host has a shape that is not known.
        ConflictError: Someone else has patched a function that would be patched.
    """
    names = find_hosts(host, "apply()")
    settings = Settings(
        func_d=func_d, sep=sep, masking=masking, backend=backend, verify=verify, uhop=uhop,
        include=include, exclude=exclude, blocks=blocks, exclude_models=exclude_models, partial=partial,
        compat=compat,
    )  # fmt: skip
    for name in names:  # all of them can be met before any of them is
        HOSTS[name].check(settings)
        HOSTS[name].check_installed(settings)
    with TRANSITIONS, contextlib.ExitStack() as undo:
        for name in names:
            before = settings_of(name)
            request(name, settings)
            undo.callback(_put_back, name, before)
        undo.pop_all()  # nothing is undone: all of them are patched


def _put_back(name: str, before: Settings | None) -> None:
    """Have a host patched as it was before, or not at all."""
    if before is None:
        revert(name)
    else:
        request(name, before)


def revert(host: HostNames | None = None) -> None:
    """Restore the very code that stood there before ``apply``.

    Calls that other threads have begun are waited for, for 10 s at most, before what they use is taken away.

    Args:
        host: The host's name, or several as for :func:`apply`; None for all.

    Raises:
        SettingsError: There is no such host.
        ConflictError: Someone else has patched over our patch since.
        LwpfError: It is called inside of a patched forward.
    """
    with TRANSITIONS:
        names = tuple(PATCHED) if host is None else find_hosts(host, "revert()")
        for name in names:
            if name in PATCHED:
                change(HOSTS[name], None)


@dataclass
class _Block:
    """A block of :func:`patched`, with what it found."""

    before: Settings | None


@contextlib.contextmanager
def patched(host: HostNames, **settings: Any) -> Iterator[None]:
    """Patch a host for the length of a ``with`` block; afterwards it is as it was before, patched or not.

    A host is patched for the whole process, so blocks of several threads share it: the settings are those of the block
    that was entered last, for everyone. Each block puts back what it found. One that ends while a later one is still
    open changes nothing; the later one then puts back what the ended one had found, so that after the last of them the
    host is as it was before the first. ``apply`` and ``revert`` inside of a block hold until it ends.

    Args:
        host: The host's name, or several as for :func:`apply`. Several are patched together, and left together.
        **settings: As for :func:`apply`.

    Raises:
        LwpfError: As for :func:`apply`, and at the end as for :func:`revert`.
    """
    names = find_hosts(host, "patched()")
    with TRANSITIONS:
        entered = {name: _Block(settings_of(name)) for name in names}
        apply(names, **settings)
        for name, block in entered.items():
            _blocks.setdefault(name, []).append(block)
    try:
        yield
    finally:
        with TRANSITIONS, contextlib.ExitStack() as leaving:  # all of them, whatever one of them raises
            for name, block in entered.items():
                leaving.callback(_leave, name, block)


def _leave(name: str, block: _Block) -> None:
    """End a block of one host."""
    blocks = _blocks[name]
    position = next(index for index, each in enumerate(blocks) if each is block)
    above = blocks[position + 1 :]
    del blocks[position]
    if above:
        above[0].before = block.before
    else:
        _put_back(name, block.before)


def status() -> Status:
    """Return what is patched in this process, as plain data.

    Returns:
        ``hosts``: for each host what :class:`lwpf_patch.patching.schema.HostStatus` lists. ``observe``: what has come
        of ``LWPF_OBSERVE``. ``lwpf status --json`` tells what would be patched. Its keys are the same for what the two
        share: ``installed``, ``version`` and ``problem`` of a host, all of each of ``sites``, the ``name``, ``why`` and
        ``needed`` of each of ``shims``, and the settings, which stand in ``request`` there.
    """
    with LOCK:
        hosts = {name: _host_status(host) for name, host in HOSTS.items()}
    return {"hosts": hosts, "observe": requesting.status()}


def _host_status(host: Host) -> HostStatus:
    applied = PATCHED.get(host.name)
    found: HostStatus
    try:
        found = {"installed": True, "version": host.version() or "unknown"}
    except HostNotInstalledError as error:
        if applied is None:
            return {"installed": False, "state": "not installed", "problem": str(error)}
        found = {"installed": False, "version": "unknown"}
    if applied is None:
        return {**found, "state": "off"}
    return {
        **found,
        "state": "patched" if applied.sites or applied.registered else "waiting for its import",
        "called": reporting.was_used(host.name),
        "backends": reporting.backends_of(host.name),
        "shims": [_shim_status(applied, shim) for shim in host.shims],
        "modules": len(applied.modules) or len(living(applied.makers.owners())),
        "feature_maps": _feature_maps(host.name) if applied.settings.uhop is not None else None,
        "blocks": deciding.decided(host.name) if applied.settings.blocks is not None else None,
        "settings": applied.settings.describe(),
        # by name: a module that was reloaded has two classes of one name, both patched
        "sites": list({site.site.name: site.site.describe(site.file, site.hash) for site in applied.sites}.values()),
    }


def _feature_maps(host: str) -> FeatureMapsStatus:
    if "torch" not in sys.modules:  # which what counts them imports
        return {"modules": 0, "separated": 0}
    from ..uhop.report import summary

    modules, separated = summary(host)
    return {"modules": modules, "separated": separated}


def _shim_status(applied: PatchedHost, shim: Shim) -> AppliedShimStatus:
    return {**describe_shim(shim), "state": _shim_state(applied, shim)}


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
attached.decide = deciding.decide
atexit.register(exit_report.report, PATCHED)
