"""Hosts whose source is rewritten, and the sites that they declare."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from .. import rewriting
from ..errors import RewriteError, SettingsError
from ..rewriting import Edit, Plan
from ..settings import Settings
from .attachments import Attachment, FeatureMapAttachment, HostModule
from .contract import Host, SiteStatus

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Site:
    """A function of a host that holds softmax attention.

    Attributes:
        module: The module that defines it.
        qualname: Its name in the module, ``"Attention.forward"``.
        known: For each syntax tree that is known to be right to edit, by hash, the versions of the host that have it.
        attachments: What the modules of its class get. Each comes with the edit that has the function use it.
        edit: What else turns it into attention with partial forgetting, such as for a function without a class, which
            is passed what its callers got; it may ask which attachments come in (``function.parts``).
        one_of: A name that it shares with other sites, one of which is where a version of the host has it.
        required: Whether every version has it, or another one of that name.
        passed: Of a function without a class: whether its callers pass it what modules get.
        goes_with: The qualified name of the site that it works only together with: it is patched if that is, and
            patterns do not match it by itself; empty: it stands alone.
        copied_to: The name of the module that gets a copy of the patched function, under the name ``copy``, which the
            patched code there calls; empty: none. torch.compile takes some functions of PyTorch's for operators, which
            it does not look into, and would not know what to do with a func_d among their arguments.
        part: The name of the attachment without which there is nothing to edit; empty: there always is.
    """

    module: str
    qualname: str
    known: Mapping[str, str]
    attachments: tuple[Attachment, ...] = ()
    edit: Edit | None = None
    one_of: str = ""
    required: bool = False
    passed: bool = False
    goes_with: str = ""
    copied_to: str = ""
    part: str = ""

    @property
    def function(self) -> str:
        """The name of the function with that of its module."""
        return f"{self.module}.{self.qualname}"

    @property
    def key(self) -> str:
        """What tells it from all sites but those that stand where other versions have it."""
        return self.one_of or self.function

    @property
    def name(self) -> str:
        """The name that users see and that patterns match, such as ``"timm.layers.attention.Attention"``."""
        return f"{self.module}.{self.owner or self.qualname}"

    @property
    def owner(self) -> str:
        """The class that the function belongs to; empty for a function of the module, which gets func_d passed."""
        return self.qualname.rpartition(".")[0]

    @property
    def leader(self) -> str:
        """The qualified name of the site that it goes with, which may be itself."""
        return self.goes_with or self.qualname

    @property
    def copy(self) -> str:
        """The name of the copy of a function."""
        return f"_lwpf_{self.qualname}"

    @property
    def is_companion(self) -> bool:
        """Whether it is a method around attention modules that holds no attention itself."""
        return bool(self.owner) and not self.attachments

    @property
    def feature_map(self) -> FeatureMapAttachment | None:
        """The feature map that its modules get if U-Hop is asked for; None: they get none."""
        return next((each for each in self.attachments if isinstance(each, FeatureMapAttachment)), None)

    def describe(self, file: str, digest: str) -> SiteStatus:
        """Return the site as plain data.

        Args:
            file: The source file.
            digest: The hash of the function's syntax tree.
        """
        known = self.known.get(digest)
        return {"name": self.name, "function": self.qualname, "file": file, "hash": digest, "known": known}

    def edits(self, parts: Container[str]) -> list[Edit]:
        """Return the edits that bring some parts in."""
        edits = [] if self.edit is None or (self.part and self.part not in parts) else [self.edit]
        return edits + [each.edit for each in self.attachments if each.edit is not None and each.name in parts]


@dataclass(frozen=True)
class RewrittenHost(Host):
    """A library whose functions with softmax attention get other code.

    Attributes:
        sites: Its sites.
        inseparable: Whether its sites work only together, so that none can be left out.
        partly: Whether it is patched without those of its sites, none of them required, whose source has a shape that
            is not known; models that have them are reported when they are made.
        refused: Classes whose softmax is left as it is, by name, and why.
        no_attention: Classes whose softmax is not one of attention.
        names_in_call: Gives the names of the model that one of its functions is making, from the function's name and
            its local variables; none for any other function.
        names_of_model: Gives the names that it has for a model that exists.
    """

    sites: tuple[Site, ...] = ()
    inseparable: bool = False
    partly: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    no_attention: frozenset[str] = frozenset()
    names_in_call: Callable[[str, Mapping[str, object]], Iterable[str]] | None = None
    names_of_model: Callable[[HostModule], Iterable[str]] | None = None

    def for_package(self, name: str, install: str = "", distribution: str = "") -> RewrittenHost:
        """Return the same host for a copy of the library under another name, such as a fork.

        What it does to a function is decided by the function's source alone, as for the library itself: one that is
        known is patched, one of the same shape with a warning, and others are refused.

        Args:
            name: The name of the copy: ``"my_hopfield"``, or ``"project.vendor.hflayers"`` for one inside of a package.
            install: How to install it, for error messages.
            distribution: The name of what pip installs, if it is not that of the top-level package.
        """

        def renamed(module: str) -> str:
            inside = module == self.name or module.startswith(f"{self.name}.")
            return name + module[len(self.name) :] if inside else module

        return dataclasses.replace(
            self,
            name=name,
            install=install or f"install {name.partition('.')[0]}, or put the folder that holds it on sys.path",
            distribution=distribution,
            sites=tuple(
                dataclasses.replace(
                    site, module=renamed(site.module), one_of=renamed(site.one_of), copied_to=renamed(site.copied_to)
                )
                for site in self.sites
            ),
            shims=tuple(dataclasses.replace(shim, modules=tuple(map(renamed, shim.modules))) for shim in self.shims),
            refused={renamed(each): why for each, why in self.refused.items()},
            no_attention=frozenset(map(renamed, self.no_attention)),
        )

    def places_of_attention(self) -> list[str]:
        """Return the names of the modules that hold sites."""
        return list(dict.fromkeys(site.module for site in self.sites))

    def check(self, settings: Settings) -> None:
        """Check that include and exclude leave sites, and that U-Hop can have them; see :meth:`Host.check`."""
        self.chosen_sites(settings)
        if settings.uhop is not None and settings.blocks is not None:
            raise SettingsError(
                f"blocks={str(settings.blocks)!r} (from {settings.origin('blocks')}) and uhop={settings.uhop} (from "
                f"{settings.origin('uhop')}) do not go together for all models of {self.name}: a feature map has to be "
                "there when the optimizer is made, and which blocks a model has is known at its first call. Leave one "
                "of them out, or patch one model: lwpf_patch.patch_model(model, blocks=..., uhop=...)"
            )

    def prototypes(self, settings: Settings) -> dict[str, Any]:
        """Return what is made once for each attachment; see :meth:`Host.prototypes`."""
        return {
            each.name: each.prototype(self.name, settings) for each in self.attachments() if each.is_asked(settings)
        }

    def check_installed(self, settings: Settings) -> None:
        """Check that its source is there and has the sites that are asked for; see :meth:`Host.check_installed`."""
        super().check_installed(settings)
        if self.name not in sys.modules and self.inseparable:
            self.plans(settings)
        elif self.name not in sys.modules:
            self.modules_to_come((), settings, imported=())

    def attachments(self) -> list[Attachment]:
        """Return what its modules can get, one of each name."""
        return list({each.name: each for site in self.sites for each in site.attachments}.values())

    def part_names(self) -> list[str]:
        """Return the names of all attachments."""
        return [each.name for each in self.attachments()]

    def parts(self, settings: Settings) -> frozenset[str]:
        """Return the names of the attachments that some settings ask for."""
        return frozenset(each.name for each in self.attachments() if each.is_asked(settings))

    def chosen_sites(self, settings: Settings) -> tuple[Site, ...]:
        """Return the sites that are asked for: those that ``include`` and ``exclude`` leave.

        Raises:
            SettingsError: A pattern matches no site, or no site is left.
        """
        leaders = [site for site in self.sites if not site.goes_with]
        names = [site.name for site in leaders]
        included = names_included(settings, names, f"site of {self.name}; its sites are {', '.join(names)}")
        chosen = {site.qualname for site in leaders if site.name in included}
        left = tuple(
            site
            for site in self.sites_with_a_part(settings)
            if (site.leader in chosen if site.goes_with else site.name in included)
        )
        if not left:
            raise SettingsError(
                f"include={list(settings.include)} and exclude={list(settings.exclude)} leave no site of {self.name} "
                f"to be patched; its sites are {', '.join(names)}"
            )
        if settings.uhop is not None and not any(site.feature_map for site in left):
            raise SettingsError(
                f"uhop={settings.uhop} (from {settings.origin('uhop')}): include={list(settings.include)} and "
                f"exclude={list(settings.exclude)} leave no site of {self.name} that has a feature map; those are "
                + ", ".join(dict.fromkeys(site.name for site in self.sites if site.feature_map))
            )
        if self.inseparable and len(left) < len(self.sites_with_a_part(settings)):
            raise SettingsError(
                f"the sites of {self.name} work only together: include={list(settings.include)} and "
                f"exclude={list(settings.exclude)} would leave some of {', '.join(names)} out; choose modules of a "
                "model with patch_model(model, include=...) instead"
            )
        return left

    def sites_with_a_part(self, settings: Settings) -> tuple[Site, ...]:
        """Return the sites that have a part in what is asked for: some serve U-Hop alone."""
        parts = self.parts(settings)
        return tuple(site for site in self.sites if site.edits(parts))

    def describe_sites(self, settings: Settings) -> list[SiteStatus]:
        """Return its sites as plain data; see :meth:`Host.describe_sites`."""
        return [
            site.describe(plan.path, plan.hashes[site.qualname])
            for plan in self.plans(settings)
            for site in self.sites
            if site.module == plan.module and site.qualname in plan.hashes
        ]

    def plans(self, settings: Settings) -> list[Plan]:
        """Plan the edits from the installed source, without importing the host.

        Raises:
            HostNotInstalledError: It is not installed.
            RewriteError: Its source does not have a shape that is known.
        """
        plans = []
        chosen = self.chosen_sites(settings)
        found: list[Site] = []
        for module in self.modules():
            sites = [site for site in chosen if site.module == module]
            spec = self.find(module) if sites else None
            if spec is None:
                continue
            path, source = rewriting.source_of(spec)
            sites = [site for site in sites if rewriting.defines(source, site.qualname)]
            sites, _ = self.fitting(path, source, sites, settings)
            if sites:
                plans.append(self.plan(path, source, sites, self.parts(settings)))
                found += sites
        self.modules_to_come(found, settings, imported=self.modules())
        return plans

    def fitting(
        self, path: str, source: str, sites: Iterable[Site], settings: Settings
    ) -> tuple[list[Site], dict[str, str]]:
        """Return the sites of one module whose source has a shape that is known, and why others are left out.

        Args:
            path: The file of the source.
            source: The module's source.
            sites: Sites that it has.
            settings: What is asked for.

        Raises:
            RewriteError: One that cannot be left out does not have the shape that its edits need.
        """
        fitting: list[Site] = []
        misfits: dict[str, str] = {}
        for site in sites:
            if self.partly and not site.required and settings.include == ("*",):
                try:
                    self.plan(path, source, (site,), self.parts(settings))
                except RewriteError as error:
                    misfits[site.name] = str(error)
                    continue
            fitting.append(site)
        return fitting, misfits

    def plan(self, path: str, source: str, sites: Iterable[Site], parts: Container[str]) -> Plan:
        """Plan the edits of some sites of one module; see :func:`lwpf_patch.rewriting.plan`.

        Raises:
            RewriteError: A site is not there, or does not have the shape that its edits need.
        """
        sites = tuple(sites)
        edits = {site.qualname: site.edits(parts) for site in sites}
        return rewriting.plan(sites[0].module, path, source, edits, parts)

    def modules_to_come(
        self, found: Iterable[Site], settings: Settings, imported: Container[str], seen: set[str] | None = None
    ) -> list[str]:
        """Return the modules that have yet to be imported before every site that was asked for is found.

        Args:
            found: The sites found so far.
            settings: What was asked for.
            imported: The names of the modules that have been imported, and so can bring no further site.
            seen: The names of modules that are known to be there; what is found is added.

        Raises:
            HostNotInstalledError: Python does not find the host from here.
            RewriteError: A site that every version should have is in none of the places where it is known to be.
        """
        keys = {site.key for site in found}
        seen = set() if seen is None else seen
        alternatives: dict[str, list[Site]] = {}
        for site in self.sites:
            alternatives.setdefault(site.key, []).append(site)
        expected: dict[str, list[str]] = {}
        wanted = {site.key: site for site in self.chosen_sites(settings)}
        for key in wanted.keys() - keys:
            left = [each.module for each in alternatives[key] if each.module not in imported]
            seen |= {module for module in left if module not in seen and self.find(module) is not None}
            expected[key] = [module for module in left if module in seen]
        # What is not required is not in every version. But something has to be there.
        nothing_left = not keys and not any(expected.values())
        for key in sorted(expected, key=lambda key: (not wanted[key].required, key)):
            if not expected[key] and (wanted[key].required or nothing_left):
                raise RewriteError(
                    f"{self.described()} has no {wanted[key].qualname} in "
                    f"{' or '.join(each.module for each in alternatives[key])}: this version is not supported; "
                    "nothing was patched"
                )
        return [module for key, modules in expected.items() if wanted[key].required or not keys for module in modules]


def multiply_rows(rows: Tensor, matrix: Tensor) -> None:
    """Multiply the rows of a projection, in place, by a matrix for each head.

    Args:
        rows: A weight (heads * d, features) or a bias (heads * d).
        matrix: (heads, d, d).
    """
    heads, width, _ = matrix.shape
    rows.copy_((matrix @ rows.to(matrix).reshape(heads, width, -1)).reshape(rows.shape))


def names_included(settings: Settings, names: Iterable[str], of_what: str) -> list[str]:
    """Return the names that ``include`` and ``exclude`` leave.

    Args:
        settings: The settings.
        names: All names.
        of_what: What they are names of, for the error message.

    Raises:
        SettingsError: A pattern matches none.
    """
    names = list(names)
    for option in ("include", "exclude"):
        for pattern in getattr(settings, option):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SettingsError(
                    f"{option} pattern {pattern!r} (from {settings.origin(option)}) matches no {of_what}"
                )
    included = [name for name in names if any(fnmatchcase(name, pattern) for pattern in settings.include)]
    return [name for name in included if not any(fnmatchcase(name, pattern) for pattern in settings.exclude)]
