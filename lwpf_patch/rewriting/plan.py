"""Rewriting: find the anchors in a function's source, splice the edits in, compile, show the difference.

The whole module is spliced and compiled, so that ``super()``, closures and defaults survive; only the code objects of
the functions that were edited are taken from it. Splicing by position keeps formatting and comments.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import itertools
import linecache
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import CodeType

from ..errors import RewriteError
from .source import Edit, Function, Splice


@dataclass(frozen=True)
class Plan:
    """What shall become of one module.

    Attributes:
        module: Its name.
        path: The file of its source.
        source: Its source.
        patched: The source with the edits spliced in.
        hashes: The hash of the syntax tree of each function that is edited, by qualified name.
    """

    module: str
    path: str
    source: str
    patched: str
    hashes: Mapping[str, str]

    def compile(self) -> dict[str, tuple[CodeType, CodeType]]:
        """Compile both sources.

        Returns:
            For each function that is edited, by qualified name, the code that its source gives and the patched code.
        """
        filename = _enter_source(self.module, list(map(_with_hint, self.patched.splitlines(keepends=True))))
        before = compile(self.source, self.path, "exec", dont_inherit=True)
        after = compile(self.patched, filename, "exec", dont_inherit=True)
        return {name: (_code(before, name), _code(after, name)) for name in self.hashes}

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


def defines(source: str, qualname: str) -> bool:
    """Return whether a module's source defines a function."""
    return bool(_definitions(_tree(source), qualname))


def plan(module: str, path: str, source: str, edits: Mapping[str, Iterable[Edit]], parts: Container[str] = ()) -> Plan:
    """Plan the edits of some functions of one module; all of them or, when one anchor is missing, none.

    Args:
        module: The module's name.
        path: The file of the source.
        source: The module's source.
        edits: The edits of each function, by its qualified name.
        parts: The names of what shall come in, which edits may ask for; see :class:`Function`.

    Returns:
        The plan.

    Raises:
        RewriteError: A function is not there, or does not have the shape that its edits need.
    """
    encoded = source.encode()
    splices: list[Splice] = []
    hashes = {}
    for qualname, of_function in edits.items():
        node = _definition(_tree(source), f"{module}.{qualname}", qualname, path)
        hashes[qualname] = tree_hash(node)
        function = Function(node, encoded, path, parts)
        splices += [splice for edit in of_function for splice in _splices(function, edit, f"{module}.{qualname}")]
    for splice in sorted(splices, key=lambda splice: splice.start, reverse=True):
        encoded = encoded[: splice.start] + splice.text.encode() + encoded[splice.end :]
    return Plan(module, path, source, encoded.decode(), hashes)


@functools.lru_cache(maxsize=1)
def _tree(source: str) -> ast.Module:
    return ast.parse(source)


def _splices(function: Function, edit: Edit, name: str) -> list[Splice]:
    try:
        return edit(function)
    except RewriteError as error:
        raise RewriteError(
            f"{name} cannot be patched: {error}. Its source does not have the shape that lwpf_patch knows; leave it "
            "out with exclude=, or install a version that is supported"
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


def _definition(tree: ast.AST, name: str, qualname: str, path: str) -> ast.FunctionDef:
    found = _definitions(tree, qualname)
    if len(found) != 1:
        what = "is not defined" if not found else f"is defined {len(found)} times"
        raise RewriteError(f"{name} cannot be patched: it {what} in {path}")
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
