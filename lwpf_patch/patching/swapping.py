"""Swapping code objects: finding the functions of a host's sites, and putting other code into them.

Other threads may be anywhere while that happens. A call that has begun goes on with the code it began with, so what
that code needs is taken away only when no frame runs it any more; see :mod:`lwpf_patch.patching.frames`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .. import rewriting
from ..errors import ConflictError
from ..hosting.rewritten import RewrittenHost, Site
from .living import module_classes
from .planning import planned

#: The code that stood in each function that has patched code now.
_originals: dict[FunctionType, CodeType] = {}


@dataclass
class PatchedSite:
    """A function of a site and its patched code.

    Attributes:
        site: The site.
        owner: The class; None for a function of a module.
        function: The function object whose code is swapped.
        original: The code that stands there unpatched.
        patched: The patched code.
        known: Whether its syntax tree is one that is known to be right to edit.
        file: The source file.
        hash: The hash of its syntax tree.
    """

    site: Site
    owner: type | None
    function: FunctionType
    original: CodeType
    patched: CodeType
    known: bool
    file: str
    hash: str

    def put(self) -> None:
        """Put the patched code into the function."""
        _originals[self.function] = self.original
        if self.function.__code__ is not self.patched:
            self.function.__code__ = self.patched
        if self.site.copied_to:
            self._copy().__code__ = self.patched

    def take_out(self) -> None:
        """Put the code back that stood there before."""
        self.function.__code__ = self.original
        if self.site.passed:
            self.function.__kwdefaults__ = None
        if self.site.copied_to:
            vars(sys.modules[self.site.copied_to]).pop(self.site.copy, None)
        _originals.pop(self.function, None)

    def set_defaults(self, defaults: dict[str, Any]) -> None:
        """Have a function of a module, and its copy, take these for what callers do not pass."""
        self.function.__kwdefaults__ = defaults
        if self.site.copied_to:
            self._copy().__kwdefaults__ = defaults

    def _copy(self) -> FunctionType:
        """Return the copy of the function in the module where its callers look for it; made at first use."""
        namespace = vars(sys.modules[self.site.copied_to])
        copy: FunctionType | None = namespace.get(self.site.copy)
        if copy is None:
            plain = self.function
            arguments = (self.patched, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
            copy = namespace[self.site.copy] = FunctionType(*arguments)
        return copy


ClassesByName = dict[tuple[str, str], list[type]]


def locate(
    host: RewrittenHost,
    module: ModuleType,
    sites: list[Site],
    parts: frozenset[str],
    classes: ClassesByName | None = None,
) -> list[PatchedSite]:
    """Find the functions of some sites and their patched code, and check that nothing stands in the way.

    Args:
        host: The host.
        module: The module that defines them.
        sites: The sites.
        parts: The names of the attachments that come in.
        classes: Those of :func:`classes_by_name`, to return also the functions of earlier executions of the module:
            after ``importlib.reload``, instances and namespaces can have the classes and functions from before.

    Raises:
        RewriteError: The source is not there or has a shape that is not known.
        ConflictError: A function is not what the module's source says.
    """
    path, source = rewriting.source_of(module.__spec__)
    (plan, codes), whole = planned(host, path, source, sites, parts), False
    found = []
    for site in sites:
        owner = getattr(module, site.owner) if site.owner else None
        name = site.qualname.rpartition(".")[2]
        places: list[tuple[type | None, Any]] = [(owner, vars(owner or module).get(name))]
        if classes is not None and owner is not None:
            same = classes.get((owner.__module__, owner.__qualname__), [])
            places += [(cls, vars(cls)[name]) for cls in same if _is_earlier(cls, owner) and name in vars(cls)]
        elif classes is not None:
            places += [(None, function) for function in _earlier_functions(module, places[0][1])]
        for place, function in places:
            live = _originals.get(function, function.__code__) if type(function) is FunctionType else None
            if live is not None and live != codes[site.qualname][0] and not whole:
                codes, whole = plan.compile(whole=True), True
            original, new = codes[site.qualname]
            # type() and not isinstance(): a wrapt proxy claims to be a function and hands out the code of another one.
            if live is None or live != original or len(live.co_freevars) != len(new.co_freevars):
                raise ConflictError(_conflict(site, path, function, place is owner and function is places[0][1]))
            patched = function.__code__ if function.__code__ == new else new
            digest = plan.hashes[site.qualname]
            known = digest in site.known
            found.append(PatchedSite(site, place, function, live, patched, known, path, digest))
    return found


def classes_by_name() -> ClassesByName:
    """Return the subclasses of ``nn.Module`` by their modules and qualified names."""
    found: ClassesByName = {}
    for cls in module_classes():
        found.setdefault((cls.__module__, cls.__qualname__), []).append(cls)
    return found


def _is_earlier(cls: type, owner: type) -> bool:
    return cls is not owner and "_lwpf_plain_class" not in vars(cls)  # that of patch_model


def _earlier_functions(module: ModuleType, function: Any) -> list[Any]:
    """Find functions of the same name and origin that other modules have in their namespaces."""
    found = {}
    for other in list(sys.modules.values()):
        each = getattr(other, "__dict__", {}).get(function.__name__) if type(function) is FunctionType else None
        if type(each) is FunctionType and each.__globals__ is vars(module) and each is not function:
            found[id(each)] = each
    return list(found.values())


def _conflict(site: Site, path: str, function: Any, current: bool) -> str:
    if current:
        return (
            f"{site.module}.{site.qualname} is not the code of its source file {path}: it is {describe(function)}. "
            "lwpf_patch does not rewrite another patch: remove that one, apply lwpf_patch before it, or leave this "
            "site out with exclude="
        )
    return (
        f"{site.module} was reloaded, and a {site.qualname} from before is not the code of its source file {path}: it "
        f"is {describe(function)}. What was made with it could not be patched: apply lwpf_patch before the reload, or "
        "leave this site out with exclude="
    )


def describe(function: object) -> str:
    """Describe what stands where a function was expected."""
    module = getattr(function, "__module__", None)
    code = getattr(function, "__code__", None)
    where = f" at {code.co_filename}:{code.co_firstlineno}" if code is not None else ""
    return f"{getattr(function, '__qualname__', function)!r} of module {module}{where} ({type(function).__name__})"
