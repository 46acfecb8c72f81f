"""Rewriting: find the anchors in a function's source, splice the edits in, compile, show the difference.

The whole module is spliced and compiled, so that ``super()``, closures and defaults survive; only the code objects of
the functions that were edited are taken from it. Splicing by position keeps formatting and comments.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import itertools
import linecache
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import CodeType
from typing import Any

from ..errors import RewriteError
from .source import Edit, Function, Splice


@dataclass(frozen=True)
class Folding:
    """How a feature map becomes part of the projections of its attention module.

    Attributes:
        parameters: Returns, for a model and a module of it, the names of the parameters that are multiplied, relative
            to the module; or raises a FoldError that says what stands between them and the scores.
        multiply: Multiplies them by the matrix of Φ, (heads, d, d) or (d, d), of float64 and on the CPU.
        example: Returns random arguments for a call of the module, of float64 and on the CPU.
    """

    parameters: Callable[[Any, Any], list[str]]
    multiply: Callable[[Any, Any], None]
    example: Callable[[Any], tuple[Any, ...]]


@dataclass(frozen=True)
class Site:
    """A function of a host that holds softmax attention.

    Attributes:
        module: The module that defines it.
        qualname: Its name in the module, ``"Attention.forward"``.
        edit: What turns it into attention with partial forgetting.
        known: For each syntax tree that is known to be right to edit, by hash, the versions of the host that have it.
        func_d: Whether its modules get a func_d.
        map_size: Where its modules get a feature map if U-Hop is asked for: what returns, for a module, the number of
            heads (None: there are none) and of features of each; or raises a SettingsError that says why it has none.
        folding: How their feature maps are folded.
    """

    module: str
    qualname: str
    edit: Edit
    known: Mapping[str, str]
    func_d: bool = True
    map_size: Callable[[Any], tuple[int | None, int]] | None = None
    folding: Folding | None = None

    @property
    def name(self) -> str:
        """The name that users see and that patterns match, such as ``"timm.layers.attention.Attention"``."""
        return f"{self.module}.{self.owner or self.qualname}"

    @property
    def owner(self) -> str:
        """The class that the function belongs to; empty for a function of the module, which gets func_d passed."""
        return self.qualname.rpartition(".")[0]


@dataclass(frozen=True)
class Plan:
    """What shall become of one module.

    Attributes:
        module: Its name.
        path: The file of its source.
        source: Its source.
        patched: The source with the edits spliced in.
        sites: The sites in it.
        unknown: Those whose syntax tree is not known; their shape is.
        hashes: The hash of every site's syntax tree, by qualified name.
    """

    module: str
    path: str
    source: str
    patched: str
    sites: tuple[Site, ...]
    unknown: tuple[Site, ...]
    hashes: Mapping[str, str]

    def compile(self) -> dict[str, tuple[CodeType, CodeType]]:
        """Compiles both sources.

        Returns:
            For each qualified name of a site, the code that its source gives and the patched code.
        """
        filename = _enter_source(self.module, list(map(_with_hint, self.patched.splitlines(keepends=True))))
        before = compile(self.source, self.path, "exec", dont_inherit=True)
        after = compile(self.patched, filename, "exec", dont_inherit=True)
        return {site.qualname: (_code(before, site.qualname), _code(after, site.qualname)) for site in self.sites}

    def diff(self) -> str:
        """Returns the unified difference, upstream against patched; empty if there is none."""
        name = self.module.replace(".", "/") + ".py"
        lines = difflib.unified_diff(
            self.source.splitlines(keepends=True),
            self.patched.splitlines(keepends=True),
            f"{name} (upstream)",
            f"{name} (patched)",
        )
        return "".join(lines)


def source_of(spec: ModuleSpec | None) -> tuple[str, str]:
    """Return the file and the source of a module, wherever its loader has it: a folder or a zip file.

    Raises:
        RewriteError: Its loader has no source.
    """
    get_source = getattr(spec and spec.loader, "get_source", None)
    source = get_source(spec.name) if spec is not None and get_source is not None else None
    if spec is None or source is None:
        name, origin = (spec.name, spec.origin) if spec is not None else ("a module without a spec", None)
        raise RewriteError(
            f"{name} cannot be patched: lwpf_patch rewrites source code, and there is none in {origin or 'its place'} "
            "(compiled files alone do not do); install the library with its sources"
        )
    return str(spec.origin), source


#: What a traceback shows behind a line that fails in an object which borrows a patched function and has nothing to
#: call there. A comment, since torch.compile and torch.jit.script read these functions too.
HINTS = {
    "self.func_d": "no func_d here? Set self.func_d = lwpf_patch.ReLU(), or call lwpf_patch.apply() once more",
    "self.feature_map": "no feature_map here? Call lwpf_patch.apply() once more, or apply it without uhop",
}


def _enter_source(module: str, lines: list[str]) -> str:
    """Enter a source where inspect and tracebacks find it, and return its name; one text keeps one name.

    A module can be patched in several ways at a time, with U-Hop and without: torch.jit.script reads these texts.
    """
    for number in itertools.count(1):
        name = f"<lwpf_patch {module}>" if number == 1 else f"<lwpf_patch {module} {number}>"
        if name not in linecache.cache or linecache.getlines(name) == lines:
            break
    linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
    return name


def _with_hint(line: str) -> str:
    hint = next((hint for name, hint in HINTS.items() if name in line), None)
    return line if hint is None else line.rstrip("\n") + f"  # lwpf_patch: {hint}\n"


def has_site(source: str, site: Site) -> bool:
    """Returns whether a module's source defines a site."""
    return bool(_definitions(ast.parse(source), site.qualname))


def plan(path: str, source: str, sites: Iterable[Site], uhop: bool = False) -> Plan:
    """Plans the edits of some sites of one module; all of them or, when one anchor is missing, none.

    Args:
        path: The file of the source.
        source: The module's source.
        sites: The sites, all in this module.
        uhop: Whether U-Hop's feature map shall come in.

    Returns:
        The plan.

    Raises:
        RewriteError: A site is not there, or does not have the shape that its edits need.
    """
    sites = tuple(sites)
    tree = ast.parse(source, path)
    encoded = source.encode()
    splices: list[Splice] = []
    hashes = {}
    for site in sites:
        node = _definition(tree, site, path)
        hashes[site.qualname] = tree_hash(node)
        splices += _splices(Function(node, encoded, path, uhop), site)
    for splice in sorted(splices, key=lambda splice: splice.start, reverse=True):
        encoded = encoded[: splice.start] + splice.text.encode() + encoded[splice.end :]
    unknown = tuple(site for site in sites if hashes[site.qualname] not in site.known)
    return Plan(sites[0].module, path, source, encoded.decode(), sites, unknown, hashes)


def _splices(function: Function, site: Site) -> list[Splice]:
    try:
        return site.edit(function)
    except RewriteError as error:
        raise RewriteError(
            f"{site.module}.{site.qualname} cannot be patched: {error}. Its source does not have the shape that "
            "lwpf_patch knows; leave it out with exclude=, or install a version that is supported"
        ) from None


def _definitions(tree: ast.AST, qualname: str) -> list[ast.FunctionDef]:
    nodes: list[ast.AST] = [tree]
    for name in qualname.split("."):
        nodes = [child for node in nodes for child in _scope(node) if child.name == name]
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


def _scope(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield child
        elif isinstance(child, ast.If | ast.Try):
            yield from _scope(child)


def _definition(tree: ast.AST, site: Site, path: str) -> ast.FunctionDef:
    found = _definitions(tree, site.qualname)
    if len(found) != 1:
        what = "is not defined" if not found else f"is defined {len(found)} times"
        raise RewriteError(f"{site.module}.{site.qualname} cannot be patched: it {what} in {path}")
    return found[0]


def _code(code: CodeType, qualname: str) -> CodeType:
    for name in qualname.split("."):
        (code,) = (c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return code


def tree_hash(node: ast.AST) -> str:
    """Hashes a function's syntax tree: the same for every formatting, comment, docstring and version of Python."""
    return hashlib.sha256(_canonical(node).encode()).hexdigest()[:16]


def _canonical(node: object) -> str:
    if isinstance(node, list):
        return "[" + ",".join(map(_canonical, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            value = value[1:]
        if value is not None and value != [] and not isinstance(value, ast.expr_context):
            fields.append(f"{name}={_canonical(value)}")
    return f"{type(node).__name__}({','.join(fields)})"
