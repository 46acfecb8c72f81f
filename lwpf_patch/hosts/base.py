"""What a host is."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path

from .. import rewriting
from ..errors import HostNotInstalledError, RewriteError, SettingsError
from ..rewriting import Plan, Site
from ..settings import Settings


@dataclass(frozen=True)
class Host:
    """A library that gets patched.

    Attributes:
        name: Its name, which is that of its package.
        install: How to install it.
        sites: Its sites. Those of the same qualified name are alternatives: where versions of the host have it.
        required: Qualified names that some site must provide in every version.
    """

    name: str
    install: str
    sites: tuple[Site, ...]
    required: tuple[str, ...]

    def root(self) -> Path:
        """Returns the folder of the package, without importing it.

        Raises:
            HostNotInstalledError: It is not installed.
        """
        spec = importlib.util.find_spec(self.name)
        if spec is None or not spec.submodule_search_locations:
            raise HostNotInstalledError(
                f"{self.name} was asked to be patched, but it is not installed here: {self.install}"
            )
        return Path(next(iter(spec.submodule_search_locations)))

    def version(self) -> str:
        """Returns the installed version, ``"unknown"`` if it has none."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return "unknown"

    def modules(self) -> list[str]:
        """Returns the names of the modules that hold sites."""
        return list(dict.fromkeys(site.module for site in self.sites))

    def selected(self, settings: Settings) -> tuple[Site, ...]:
        """Returns the sites that ``include`` and ``exclude`` leave.

        Raises:
            SettingsError: A pattern matches no site, or no site is left.
        """
        names = [site.name for site in self.sites]
        for option in ("include", "exclude"):
            for pattern in getattr(settings, option):
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise SettingsError(
                        f"{option} pattern {pattern!r} (from {settings.origin(option)}) matches no site of "
                        f"{self.name}; its sites are {', '.join(names)}"
                    )
        left = tuple(site for site in self.sites if selects(settings, site.name))
        if not left:
            raise SettingsError(
                f"include={list(settings.include)} and exclude={list(settings.exclude)} leave no site of {self.name} "
                f"to be patched; its sites are {', '.join(names)}"
            )
        return left

    def plans(self, settings: Settings) -> list[Plan]:
        """Plans the edits from the installed source, without importing the host.

        Raises:
            HostNotInstalledError: It is not installed.
            RewriteError: Its source does not have a shape that is known.
        """
        root, plans = self.root(), []
        selected = self.selected(settings)
        for module in self.modules():
            path = root.joinpath(*module.split(".")[1:]).with_suffix(".py")
            if not path.exists():
                continue
            source = rewriting.read_source(path)
            sites = [site for site in selected if site.module == module and rewriting.has_site(source, site)]
            if sites:
                plans.append(rewriting.plan(str(path), source, sites))
        self.check_found([site for plan in plans for site in plan.sites], selected)
        return plans

    def check_found(self, found: Sequence[Site], selected: Sequence[Site]) -> None:
        """Checks that the sites found in a version of the host are as many as every version has.

        Raises:
            RewriteError: One that every version should have is nowhere.
        """
        names = {site.qualname for site in found}
        wanted = {site.qualname for site in selected}
        for qualname in self.required:
            if qualname in wanted and qualname not in names:
                places = " or ".join(site.module for site in self.sites if site.qualname == qualname)
                raise RewriteError(
                    f"{self.name} {self.version()} has no {qualname} in {places}: this version is not supported; "
                    "nothing was patched"
                )
        if not names:
            raise RewriteError(f"{self.name} {self.version()} has none of the sites that were asked for")


def selects(settings: Settings, name: str) -> bool:
    """Returns whether ``include`` and ``exclude`` leave a name in."""
    included = any(fnmatchcase(name, pattern) for pattern in settings.include)
    return included and not any(fnmatchcase(name, pattern) for pattern in settings.exclude)
