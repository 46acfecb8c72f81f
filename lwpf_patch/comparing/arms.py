"""An arm of a comparison: the script as it is, or run by ``lwpf run`` with certain options."""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import LwpfError, SettingsError
from ..hosts import HOSTS, find_hosts
from ..settings import SETTINGS, Settings, flag_of

PLAIN = "plain"
#: Stage I runs once and moves nothing: what the feature map then becomes is the work of the task's loss alone.
IDLE_STAGE_ONE = "iters=1,samples=2,lr=1e-12"
#: With a seed and a hash behind it, it is the name of a folder, of which a file system allows 255 bytes.
LONGEST_SLUG = 120


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Attributes:
        label: What the report calls it.
        options: Those of ``lwpf run``; None: the script runs without it, unpatched.
        hosts: What is patched.
        settings: How, as plain data.
        sites: The hash of the source of each function that is patched, by name.
        control_of: The labels of the arms that this one is the control of.
        more: Arguments of the script, behind those that all arms have.
    """

    label: str
    options: tuple[str, ...] | None = None
    hosts: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, str] = field(default_factory=dict)
    control_of: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """Its label as the name of a folder, and what ``{arm}`` stands for."""
        slug = re.sub(r"[^A-Za-z0-9.=_-]+", "-", self.label).strip("-.") or "arm"
        if len(slug) <= LONGEST_SLUG:
            return slug
        return f"{slug[:LONGEST_SLUG]}-{hashlib.sha256(self.label.encode()).hexdigest()[:8]}"


def read_arms(texts: Iterable[str], run: argparse.ArgumentParser, hosts: str, controls: bool) -> list[Arm]:
    """Read the arms of a comparison.

    Args:
        texts: For each arm ``"plain"``, the text of a func_d, ``"label: options of lwpf run"`` or ``"label: plain"``;
            behind the last two, ``" -- "`` and more arguments of the script.
        run: The parser of ``lwpf run``.
        hosts: The ``--patch`` of the arms that do not say it themselves.
        controls: Whether arms with U-Hop get a control, right behind the first that it is the control of.

    Raises:
        SettingsError: A text is none of these, there are less than two arms, or two of the same name.
        LwpfError: What an arm asks for cannot be patched here.
    """
    arms: list[Arm] = []
    for text in texts:
        arm, settings = _read(text, run, hosts)
        arms.append(arm)
        if controls and settings is not None and settings.uhop is not None:
            for control in _control(arm, settings, run, hosts):
                _add_control(arms, control)
    for attribute in ("label", "slug"):
        seen: dict[str, Arm] = {}
        for arm in arms:
            twin = seen.setdefault(getattr(arm, attribute), arm)
            if twin is not arm:
                raise SettingsError(
                    f"--arm {twin.label!r} and --arm {arm.label!r} cannot be told apart: give one of them another "
                    "label, as in 'label: --func-d relu'"
                )
    if len(arms) < 2:
        raise SettingsError("a comparison needs two arms or more, as in --arm plain --arm relu")
    return arms


def _add_control(arms: list[Arm], control: Arm) -> None:
    """Add a control, or have the arm share that of an arm before it, if it is computed in the same way."""
    for place, other in enumerate(arms):
        if other.control_of and (other.hosts, other.settings, other.more) == (
            control.hosts, control.settings, control.more
        ):  # fmt: skip
            arms[place] = replace(other, control_of=(*other.control_of, *control.control_of))
            return
    arms.append(control)


def _read(text: str, run: argparse.ArgumentParser, hosts: str) -> tuple[Arm, Settings | None]:
    text = text.strip()
    if not text.isprintable():
        raise SettingsError(f"--arm {text!r} has characters that cannot be printed, such as a new line")
    if text == PLAIN:
        return Arm(PLAIN), None
    label, colon, rest = (part.strip() for part in text.partition(":"))
    if not colon or not (rest.startswith("-") or rest.split()[:1] == [PLAIN]):
        if not text:
            raise SettingsError("--arm '' is empty: write 'plain', a func_d, or 'label: options of lwpf run'")
        return _patched(text, ["--func-d", text], run, hosts)
    if not label or label == PLAIN:
        raise SettingsError(
            f"--arm {text!r}: the label {label!r} is taken or empty; 'plain' is the arm that is not patched"
        )
    try:
        options = shlex.split(rest)
    except ValueError as error:
        raise SettingsError(f"--arm {text!r} does not parse: {error}") from None
    end = options.index("--") if "--" in options else len(options)
    options, more = options[:end], tuple(options[end + 1 :])
    if options == [PLAIN]:
        return Arm(label, more=more), None
    if options[:1] == [PLAIN]:
        raise SettingsError(
            f"--arm {text!r}: {options[1]!r} stands behind 'plain', which takes no options of lwpf run; those of the "
            "script stand behind ' -- '"
        )
    arm, settings = _patched(label, options, run, hosts)
    return replace(arm, more=more), settings


def _patched(
    label: str, given: Sequence[str], run: argparse.ArgumentParser, hosts: str, control_of: tuple[str, ...] = ()
) -> tuple[Arm, Settings]:
    """Build an arm from options of ``lwpf run``, checked as that checks them."""
    options = ["--patch", hosts, *given]
    parsed = _parse(label, options, run)
    chosen = find_hosts(parsed.patch, f"arm {label!r}, --patch")
    values = {s.name: value for s in SETTINGS if (value := getattr(parsed, s.name, None)) is not None}
    try:
        settings = Settings(**values, origin=lambda name: f"arm {label!r}, {flag_of(name)}")
    except SettingsError as error:
        if not control_of and given == ["--func-d", label]:
            raise SettingsError(f"{error}. An arm is 'plain', a func_d, or 'label: options of lwpf run'") from None
        raise
    sites: dict[str, str] = {}
    for host in chosen:
        try:
            described = HOSTS[host].describe_sites(settings)
        except LwpfError as error:
            raise type(error)(f"arm {label!r}: {error}") from None
        sites |= {site["name"]: site["hash"] or "" for site in described}
    return Arm(label, tuple(options), chosen, {**settings.describe()}, sites, control_of), settings


def _parse(label: str, options: list[str], run: argparse.ArgumentParser) -> argparse.Namespace:
    def refuse(message: str) -> None:
        raise SettingsError(f"arm {label!r} does not parse: {message}; see 'lwpf run --help' for its options")

    usual, run.error = run.error, refuse  # type: ignore[method-assign, assignment]
    target = "script.py"
    try:
        parsed = run.parse_args([*options, target])
    except SystemExit:  # --help
        raise SettingsError(f"arm {label!r}: {' '.join(options)!r} asks for help, not for a patch") from None
    finally:
        run.error = usual  # type: ignore[method-assign]
    if parsed.module or parsed.target != [target]:
        extra = "-m" if parsed.module else parsed.target[0]
        refuse(f"{extra!r} is no option that says how to patch (the command stands behind --, once for all arms)")
    return parsed


def _control(arm: Arm, settings: Settings, run: argparse.ArgumentParser, hosts: str) -> list[Arm]:
    """Return the control of an arm with U-Hop, if it needs one of its own.

    U-Hop gives a network more parameters, its feature maps, and these are trained by the task as well. The control has
    the same parameters and steps and goes without Stage I, so that the difference is what Stage I gives. Where the
    task does not train the maps (``train=false``), maps without Stage I stay the identity: then the control is the arm
    without U-Hop, and ``plain`` is that already where nothing else is changed.
    """
    given = list(arm.options or ())[2:]  # without the --patch that stands in front of all
    if settings.uhop is not None and settings.uhop.train:
        given += ["--uhop", IDLE_STAGE_ONE]
    else:
        without, unchanged = ({**each.describe(), "uhop": None} for each in (settings, Settings(func_d="none")))
        if without == unchanged and not arm.more:
            return []
        given += ["--uhop", "off", "--func-d", str(settings.func_d)]
    control, _ = _patched(f"{arm.label} (control)", given, run, hosts, control_of=(arm.label,))
    return [replace(control, more=arm.more)]
