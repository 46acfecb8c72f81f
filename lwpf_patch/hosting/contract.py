"""What a host is: a library that gets patched."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import unquote, urlparse

from ..errors import HostNotInstalledError, SettingsError
from ..rewriting import Plan
from ..settings import Settings
from .shims import Shim

if TYPE_CHECKING:
    from ..attention import HostFuncD


class SiteStatus(TypedDict):
    """A site of a host: one that is patched, or would be.

    Attributes:
        name: Its name, such as ``"timm.layers.attention.Attention"``.
        function: The qualified name of the function.
        file: The source file.
        hash: The hash of the function's syntax tree; None: nothing is rewritten.
        known: The versions of the host that have this very function, in words; None: it has not been tested with.
    """

    name: str
    function: str
    file: str
    hash: str | None
    known: str | None


@dataclass(frozen=True)
class Host(ABC):
    """A library that gets patched: what each kind of host has.

    There are two kinds. A :class:`RewrittenHost` has functions that hold softmax attention, whose code is replaced. A
    :class:`RegisteredHost` has an interface of its own by which attention is registered.

    Attributes:
        name: Its name, which is that of its package, or of its module if it is a single one; that of a library which
            another package has a copy of is dotted, such as ``"project.vendor.hflayers"``.
        install: How to install it, a command.
        distribution: The name of what pip installs, if it is not the package's.
        shims: What it needs to run in a current environment.
        is_model: Tells of a module whether the library made it as a whole model, whose blocks are counted by themselves
            wherever it lies; None: no module is.
    """

    name: str
    install: str
    distribution: str = ""
    shims: tuple[Shim, ...] = ()
    is_model: Callable[[Any], bool] | None = None

    @abstractmethod
    def places_of_attention(self) -> list[str]:
        """Return the names of the modules that it is patched in, without those that need a shim alone."""

    def modules(self) -> list[str]:
        """Return the names of the modules whose imports are watched: those, and what needs shims."""
        return list(
            dict.fromkeys([*self.places_of_attention(), *(name for shim in self.shims for name in shim.modules)])
        )

    @abstractmethod
    def check(self, settings: Settings) -> None:
        """Check that it can do what some settings ask for; whether it is installed is not asked.

        Raises:
            SettingsError: It cannot.
        """

    @abstractmethod
    def describe_sites(self, settings: Settings) -> list[SiteStatus]:
        """Return what would be patched, as plain data, from what is installed and without importing it.

        Raises:
            HostNotInstalledError: It is not installed.
            RewriteError: Its source does not have a shape that is known.
        """

    def plans(self, settings: Settings) -> list[Plan]:
        """Return how its source would be rewritten; raises as :meth:`describe_sites` does."""
        self.root()
        return []

    @abstractmethod
    def prototypes(self, settings: Settings) -> dict[str, Any]:
        """Return what is made once of some settings, for all modules: at least the ``"func_d"``.

        Raises:
            SettingsError: The settings ask for something that cannot be made.
        """

    def check_installed(self, settings: Settings) -> None:
        """Check that it is installed, in a version that can be patched, without importing it.

        Raises:
            HostNotInstalledError: Python does not find it from here.
            RewriteError: It is of a version that is not known.
        """
        self.root()

    def root(self) -> Path:
        """Return the folder of the package, without importing it.

        Raises:
            HostNotInstalledError: Python does not find it from here.
        """
        spec = self._spec()
        return Path(next(iter(spec.submodule_search_locations or [str(spec.origin)])))

    def find(self, module: str) -> ModuleSpec | None:
        """Return where one of its modules would be imported from, without importing anything; None: it has none.

        The module may be one of another package, which need not be installed.

        Raises:
            HostNotInstalledError: Python does not find the host from here.
        """
        self._spec()
        return _spec_of(module)

    def _spec(self) -> ModuleSpec:
        spec = _spec_of(self.name)
        if spec is None:
            raise HostNotInstalledError(
                f"{self.name} was asked to be patched, but it is not installed here: {self.install}"
            )
        return spec

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
            distribution = metadata.distribution(self.distribution or self.name.partition(".")[0])
        except metadata.PackageNotFoundError:
            return None
        files = Path(str(distribution.locate_file(self.name.replace(".", "/")))).resolve()
        source = _editable_source(distribution)
        is_its_own = files in (root, root.with_suffix("")) or (source and source in root.parents)
        return distribution.version if is_its_own else None

    def described(self, place: bool = False) -> str:
        """Return its name and version, as messages have it.

        Args:
            place: Whether to say where it lies, too; it is said anyway if the version is unknown.
        """
        version = self.version() or "of unknown version"
        return f"{self.name} {version}" + (f" at {self.root()}" if place or not self.version() else "")


def _spec_of(module: str) -> ModuleSpec | None:
    """Return where a module would be imported from, without importing anything; None: Python does not find it."""
    package, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # something that someone has put in sys.modules
        return None
    for number in range(1, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = ".".join([package, *parts[:number]])
        locations = list(spec.submodule_search_locations)
        try:
            spec = PathFinder.find_spec(name, locations)
        except KeyError:  # a folder without __init__.py, of a package that has not been imported
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(Path(each, parts[number - 1])) for each in locations]
    return spec


def make_host_func_d(host: str, settings: Settings) -> HostFuncD:
    """Return the func_d of a host, of which each of its modules gets a copy.

    Raises:
        SettingsError: The func_d cannot be made.
    """
    from ..attention import HostFuncD, rule_of

    rule = copy.deepcopy(rule_of(settings.func_d, settings.origin("func_d")))
    func_d = HostFuncD(rule, host, settings.masking, settings.backend, settings.sep, settings.verify)
    if settings.blocks is not None:
        func_d.leave_open()
    return func_d


@dataclass(frozen=True, kw_only=True)
class RegisteredHost(Host):
    """A library with an interface by which attention is registered, such as a dictionary of functions.

    Attributes:
        places: The names of the modules that have the interface.
        register: Called with such a module, once it has been imported, and the func_d: its
            ``scaled_dot_product_attention`` computes attention with partial forgetting, without PFU's noise, since
            no model tells it of ``train()``. Where the library says whether it trains, call
            :func:`lwpf_patch.lwpf_attention` with this func_d and ``training=``. Registers that with the library, and
            returns what undoes it.
        refused: The settings that it cannot meet.
    """

    places: tuple[str, ...]
    register: Callable[[ModuleType, HostFuncD], Callable[[], None]]
    refused: Sequence[str] = ("uhop", "include", "exclude", "blocks", "exclude_models")

    def places_of_attention(self) -> list[str]:
        """Return the names of the modules that have the interface."""
        return list(self.places)

    def check(self, settings: Settings) -> None:
        """Check that nothing is asked for that such a host cannot do; see :meth:`Host.check`."""
        given = {"uhop": settings.uhop is not None, "include": settings.include != ("*",),
                 "exclude": settings.exclude != (), "blocks": settings.blocks is not None,
                 "exclude_models": settings.exclude_models != ()}  # fmt: skip
        for option in (option for option, is_given in given.items() if is_given and option in self.refused):
            raise SettingsError(
                f"{option} (from {settings.origin(option)}): {self.name} takes its attention by an interface of its "
                f"own, for all models alike and without feature maps; leave {option} out"
            )

    def prototypes(self, settings: Settings) -> dict[str, Any]:
        """Return the func_d; see :meth:`Host.prototypes`."""
        return {"func_d": make_host_func_d(self.name, settings).eval()}

    def describe_sites(self, settings: Settings) -> list[SiteStatus]:
        """Return the modules that have the interface; see :meth:`Host.describe_sites`."""
        specs = {place: self.find(place) for place in self.places}
        return [
            {"name": place, "function": place, "file": str(spec.origin), "hash": None, "known": self.version()}
            for place, spec in specs.items()
            if spec is not None
        ]


def _editable_source(distribution: metadata.Distribution) -> Path | None:
    """Return the folder that a distribution was installed from if its files stayed there (``pip install -e``)."""
    direct_url = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not direct_url.get("dir_info", {}).get("editable", False):
        return None
    return Path(unquote(urlparse(direct_url["url"]).path)).resolve()
