"""What a host is."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from .. import rewriting
from ..errors import HostNotInstalledError, RewriteError, SettingsError
from ..rewriting import Plan, Site
from ..settings import Settings
from .shims import Shim


@dataclass(frozen=True)
class Host:
    """A library that gets patched.

    Attributes:
        name: Its name, which is that of its package.
        install: How to install it.
        sites: Its sites. Those of the same qualified name are alternatives: where versions of the host have it.
        required: Qualified names that some site must provide in every version.
        distribution: The name of what pip installs, if it is not the package's.
        inseparable: Whether its sites work only together, so that none can be left out.
        shims: What it needs to run in a current environment.
        forward_hook: Called after every forward of a func_d that ``apply`` attached, as a hook of torch.
        advice: What else to do where U-Hop's Stage I separates nothing.
        names_in_call: Gives the names of the model that one of its functions is making, from the function's name and
            its local variables; none for any other function.
        names_of_model: Gives the names that it has for a model that exists.
    """

    name: str
    install: str
    sites: tuple[Site, ...]
    required: tuple[str, ...]
    distribution: str = ""
    inseparable: bool = False
    shims: tuple[Shim, ...] = ()
    forward_hook: Callable[[Any, Any, Any], None] | None = None
    advice: str = ""
    names_in_call: Callable[[str, Mapping[str, Any]], Iterable[str]] | None = None
    names_of_model: Callable[[Any], Iterable[str]] | None = None

    def root(self) -> Path:
        """Return the folder of the package, without importing it.

        Raises:
            HostNotInstalledError: Python does not find it from here.
        """
        return Path(self._locations()[0])

    def find(self, module: str) -> ModuleSpec | None:
        """Return where one of its modules would be imported from, without importing anything; None: it has none.

        Raises:
            HostNotInstalledError: Python does not find the host from here.
        """
        locations: Sequence[str] | None = self._locations()
        spec: ModuleSpec | None = None
        parts = module.split(".")
        for number in range(2, len(parts) + 1):
            spec = PathFinder.find_spec(".".join(parts[:number]), locations)
            if spec is None:
                return None
            locations = spec.submodule_search_locations
        return spec

    def _locations(self) -> list[str]:
        try:
            spec = importlib.util.find_spec(self.name)
        except ValueError:  # something that someone has put in sys.modules
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise HostNotInstalledError(
                f"{self.name} was asked to be patched, but it is not installed here: {self.install}"
            )
        return list(spec.submodule_search_locations)

    def version(self) -> str | None:
        """Return the version of the package that is imported, or would be; None if it does not say.

        That of an installed distribution counts only where the package's files are the distribution's: a fork beside
        the script is not the upstream that happens to be installed.

        Raises:
            HostNotInstalledError: Python does not find it from here.
        """
        version = getattr(sys.modules.get(self.name), "__version__", None)
        if isinstance(version, str):
            return version
        root = self.root().resolve()
        try:
            distribution = metadata.distribution(self.distribution or self.name)
        except metadata.PackageNotFoundError:
            return None
        files = Path(str(distribution.locate_file(self.name))).resolve()
        source = _editable_source(distribution)
        return distribution.version if files == root or (source and source in root.parents) else None

    def described(self) -> str:
        """Return its name and version, as messages have it, or where it lies if the version is unknown."""
        version = self.version()
        return f"{self.name} {version}" if version else f"{self.name} of unknown version at {self.root()}"

    def modules(self) -> list[str]:
        """Returns the names of the modules that hold sites, or that need shims."""
        modules = [site.module for site in self.sites] + [name for shim in self.shims for name in shim.modules]
        return list(dict.fromkeys(modules))

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
        left = tuple(site for site in self.wanted(settings) if selects(settings, site.name))
        if not left:
            raise SettingsError(
                f"include={list(settings.include)} and exclude={list(settings.exclude)} leave no site of {self.name} "
                f"to be patched; its sites are {', '.join(names)}"
            )
        if settings.uhop is not None and not any(site.map_size for site in left):
            raise SettingsError(
                f"uhop={settings.uhop} (from {settings.origin('uhop')}): include={list(settings.include)} and "
                f"exclude={list(settings.exclude)} leave no site of {self.name} that has a feature map; those are "
                + ", ".join(dict.fromkeys(site.name for site in self.sites if site.map_size))
            )
        if self.inseparable and len(left) < len(self.wanted(settings)):
            raise SettingsError(
                f"the sites of {self.name} work only together: include={list(settings.include)} and "
                f"exclude={list(settings.exclude)} would leave some of {', '.join(names)} out; choose modules of a "
                "model with patch_model(model, include=...) instead"
            )
        return left

    def wanted(self, settings: Settings) -> tuple[Site, ...]:
        """Returns the sites that have a part in what is asked for: some serve U-Hop alone."""
        return tuple(site for site in self.sites if site.func_d or settings.uhop is not None)

    def plans(self, settings: Settings) -> list[Plan]:
        """Plans the edits from the installed source, without importing the host.

        Raises:
            HostNotInstalledError: It is not installed.
            RewriteError: Its source does not have a shape that is known.
        """
        plans = []
        selected = self.selected(settings)
        for module in self.modules():
            sites = [site for site in selected if site.module == module]
            spec = self.find(module) if sites else None
            if spec is None:
                continue
            path, source = rewriting.source_of(spec)
            if sites := [site for site in sites if rewriting.has_site(source, site)]:
                plans.append(rewriting.plan(path, source, sites, settings.uhop is not None))
        self.missing((site for plan in plans for site in plan.sites), settings, imported=self.modules())
        return plans

    def missing(self, found: Iterable[Site], settings: Settings, imported: Container[str]) -> list[str]:
        """Returns the modules that have yet to be imported before every site that was asked for is found.

        Args:
            found: The sites found so far.
            settings: What was asked for.
            imported: The names of the modules that have been imported, and so can bring no further site.

        Raises:
            HostNotInstalledError: Python does not find the host from here.
            RewriteError: A site that every version should have is in none of the places where it is known to be.
        """
        names = {site.qualname for site in found}
        expected: dict[str, list[str]] = {}
        for qualname in dict.fromkeys(site.qualname for site in self.selected(settings)):
            if qualname not in names:
                places = [site.module for site in self.sites if site.qualname == qualname]
                expected[qualname] = [
                    module for module in places if module not in imported and self.find(module) is not None
                ]
        # What is not required is not in every version. But something has to be there.
        nothing_left = not names and not any(expected.values())
        for qualname in sorted(expected, key=lambda name: (name not in self.required, name)):
            if not expected[qualname] and (qualname in self.required or nothing_left):
                places = [site.module for site in self.sites if site.qualname == qualname]
                raise RewriteError(
                    f"{self.described()} has no {qualname} in {' or '.join(places)}: this version is not supported; "
                    "nothing was patched"
                )
        return [
            module
            for qualname, modules in expected.items()
            if qualname in self.required or not names
            for module in modules
        ]


def multiply_rows(rows: Any, matrix: Any) -> None:
    """Multiplies the rows of a projection, in place, by a matrix for each head.

    Args:
        rows: A weight (heads * d, features) or a bias (heads * d).
        matrix: (heads, d, d).
    """
    heads, width, _ = matrix.shape
    rows.copy_((matrix @ rows.to(matrix).reshape(heads, width, -1)).reshape(rows.shape))


def selects(settings: Settings, name: str) -> bool:
    """Returns whether ``include`` and ``exclude`` leave a name in."""
    included = any(fnmatchcase(name, pattern) for pattern in settings.include)
    return included and not any(fnmatchcase(name, pattern) for pattern in settings.exclude)


def _editable_source(distribution: metadata.Distribution) -> Path | None:
    """Return the folder that a distribution was installed from if its files stayed there (``pip install -e``)."""
    direct_url = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not direct_url.get("dir_info", {}).get("editable", False):
        return None
    return Path(unquote(urlparse(direct_url["url"]).path)).resolve()
