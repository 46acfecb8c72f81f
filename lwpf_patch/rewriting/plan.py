"""Rewriting: find the anchors in a function's source, splice the edits in, compile, show the difference.

A function is compiled with the statement of its module that holds it, such as a class, or with the whole module where
that gives other code, so that ``super()``, closures and defaults survive; only the code objects of the functions that
were edited are taken. Splicing by position keeps formatting and comments.
"""

from __future__ import annotations
import __future__

import ast
import difflib
import functools
import hashlib
import io
import itertools
import linecache
import operator
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import CodeType
from typing import TypeAlias

from ..errors import RewriteError
from .source import Edit, Function, Splice

#: The code of functions, by qualified name: what their source gives, and the patched code.
Codes: TypeAlias = "dict[str, tuple[CodeType, CodeType]]"


@dataclass(frozen=True)
class Plan:
    """What shall become of one module.

    Attributes:
        module: Its name.
        path: The file of its source.
        source: Its source.
        patched: The source with the edits spliced in.
        hashes: The hash of the syntax tree of each function that is edited, by qualified name.
        statements: The statements that hold these functions.
    """

    module: str
    path: str
    source: str
    patched: str
    hashes: Mapping[str, str]
    statements: tuple[Statement, ...]

    def compile(self, whole: bool = False) -> Codes:
        """Compile both sources.

        Args:
            whole: Whether to compile the whole module, and not just the statements that hold the functions, with the
                imports. That takes many times longer, and gives other code only where a function depends on more of
                the module than that: the first of the codes, which must be that of the live function, shows it.

        Returns:
            For each function that is edited, by qualified name, the code that its source gives and the patched code.
        """
        filename = enter(self)
        if whole:
            before = compile(self.source, self.path, "exec", dont_inherit=True)
            after = compile(self.patched, filename, "exec", dont_inherit=True)
            return {name: (_code(before, name), _code(after, name)) for name in self.hashes}
        codes: Codes = {}
        try:
            for statement in self.statements:
                before = statement.compile(self.source, self.path)
                after = statement.compile(self.patched, filename, patched=True)
                codes |= {name: (_code(before, name), _code(after, name)) for name in statement.qualnames}
        except SyntaxError:  # imports that are written in a way that is not foreseen
            return self.compile(whole=True)
        return codes

    def diff(self) -> str:
        """Return the unified difference, upstream against patched; empty if there is none."""
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
    "self.func_d": "no func_d here? Set self.func_d = lwpf_patch.HostFuncD('relu'), or call lwpf_patch.apply() again",
    "self.feature_map": "no feature_map here? Call lwpf_patch.apply() once more, or apply it without uhop",
}


def enter(plan: Plan) -> str:
    """Enter the patched source where inspect and tracebacks find it, and return its name; one text keeps one name.

    A module can be patched in several ways at a time, with U-Hop and without: torch.jit.script reads these texts.
    """
    module, lines = plan.module, _with_hints(plan.patched)
    for number in itertools.count(1):
        name = f"<lwpf_patch {module}>" if number == 1 else f"<lwpf_patch {module} {number}>"
        if name not in linecache.cache or linecache.getlines(name) == lines:
            break
    linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
    return name


def _with_hints(source: str) -> list[str]:
    lines = io.StringIO(source).readlines()
    for name, hint in HINTS.items():
        for match in re.finditer(re.escape(name), source):
            number = source.count("\n", 0, match.start())
            if not lines[number].endswith(f"{hint}\n"):
                lines[number] = f"{lines[number].rstrip()}  # lwpf_patch: {hint}\n"
    return lines


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
    functions: dict[str, Function] = {}
    splices: list[Splice] = []
    for qualname, of_function in edits.items():
        tree = _tree_around(source, qualname.partition(".")[0])
        node = _definition(tree, f"{module}.{qualname}", qualname, path)
        function = functions[qualname] = Function(node, encoded, path, parts)
        splices += [splice for edit in of_function for splice in _splices(function, edit, f"{module}.{qualname}")]
    hashes = {qualname: tree_hash(function.node) for qualname, function in functions.items()}
    splices.sort(key=lambda splice: splice.start)  # of those at one place, the first one comes first
    patched, end = [], 0
    for splice in splices:
        patched += [encoded[end : splice.start], splice.text.encode()]
        end = splice.end
    statements = _statements(source, list(edits), splices)
    return Plan(module, path, source, b"".join([*patched, encoded[end:]]).decode(), hashes, statements)


@dataclass(frozen=True)
class Statement:
    """A statement of a module that holds functions to be edited, all that has to be compiled.

    Attributes:
        qualnames: The functions.
        first: Its first line, from 1.
        last: Its last line.
        shift: By how many lines the edits before it have moved it.
        growth: By how many lines it has grown.
        flags: What the module imports from ``__future__``, as :func:`compile` takes it.
    """

    qualnames: tuple[str, ...]
    first: int
    last: int
    shift: int
    growth: int
    flags: int

    def compile(self, source: str, path: str, patched: bool = False) -> CodeType:
        """Compile it out of a source; every code object has the line numbers that it has in the whole."""
        first = self.first + (self.shift if patched else 0)
        last = self.last + (self.shift + self.growth if patched else 0)
        lines = source.encode().split(b"\n")[first - 1 : last]
        # What is imported by a module is called in another way (Python 3.11), so the imports stand in the line before.
        imports = _imports(source).encode() + b"\n" if first > 1 else b""
        text = b"\n" * (first - 2) + imports + b"\n".join(lines) + b"\n"
        return compile(text, path, "exec", flags=self.flags, dont_inherit=True)


_IMPORTS = re.compile(
    r"^(?:import (?:\\\n|[^\n\\])*|from (?!__future__)\S+ import (?:\([^)]*\)|(?:\\\n|[^\n(\\])*))", re.MULTILINE
)


@functools.lru_cache(maxsize=8)
def _imports(source: str) -> str:
    """Return the imports of a module, all in one line."""
    return "; ".join(" ".join(re.sub(r"#.*|\\\n", " ", each).split()) for each in _IMPORTS.findall(source))


def _statements(source: str, qualnames: list[str], splices: list[Splice]) -> tuple[Statement, ...]:
    encoded = source.encode()
    of_statement: dict[tuple[int, int], list[str]] = {}
    flags = 0
    for qualname in qualnames:
        tree = _tree_around(source, qualname.partition(".")[0])
        flags |= _future_flags(tree)
        holder = next(node for node in tree.body if _definitions(ast.Module([node], []), qualname))
        decorators = [each.lineno for each in getattr(holder, "decorator_list", [])]
        assert holder.end_lineno is not None
        of_statement.setdefault((min([holder.lineno, *decorators]), holder.end_lineno), []).append(qualname)
    # Lines that a splice adds, by the line that it stands in.
    added = []
    for splice in splices:
        lines = splice.text.count("\n") - encoded.count(b"\n", splice.start, splice.end)
        added.append((encoded.count(b"\n", 0, splice.start) + 1, lines))
    return tuple(
        Statement(
            tuple(names), first, last, sum(lines for line, lines in added if line < first),
            sum(lines for line, lines in added if first <= line <= last), flags,
        )
        for (first, last), names in of_statement.items()
    )  # fmt: skip


def _future_flags(tree: ast.Module) -> int:
    names = [alias.name for node in tree.body if _is_future(node) for alias in node.names]  # type: ignore[attr-defined]
    return functools.reduce(operator.or_, (getattr(__future__, name).compiler_flag for name in names), 0)


def _is_future(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _tree_around(source: str, name: str) -> ast.Module:
    """Return the syntax tree of a module, of its imports from the future and the definition of a name at least.

    A definition is found by its first line, and ends before the next line that begins with something else than space, a
    comment or a bracket. Where that leaves a doubt the whole module is parsed, which takes far longer.
    """
    return _part_of_tree(source, name) or _tree(source)


@functools.lru_cache(maxsize=8)
def _part_of_tree(source: str, name: str) -> ast.Module | None:
    found = re.findall(rf"^(?:class|def) {name}\b", source, re.MULTILINE)
    if len(found) != 1 or re.search(rf"^[ \t]+(?:class|def) {name}\b", source, re.MULTILINE):
        return None
    if "\f" in source or "\r" in source:
        return None
    match = re.search(rf"^{re.escape(found[0])}\b.*\n(?:(?:[ \t#)\]}}].*)?\n)*", source, re.MULTILINE)
    if match is None or _may_be_decorated(source, match.start()):
        return None
    future = re.findall(r"^from __future__ import [\w, ]+$", source, re.MULTILINE)
    if len(future) != source.count("from __future__"):
        return None
    try:
        imports = ast.parse("\n".join(future))
        definition = ast.parse("\n" * source.count("\n", 0, match.start()) + match[0])
    except SyntaxError:  # it ends inside of a string
        return None
    return ast.Module([*imports.body, *definition.body], [])


def _may_be_decorated(source: str, start: int) -> bool:
    """Return whether what stands before a definition may be its decorator, which belongs to its syntax tree."""
    end = start
    while end:  # upwards, to the line where the last statement begins
        begin = source.rfind("\n", 0, end - 1) + 1
        if source[begin] not in " \t\n#)]}":
            return source[begin] == "@"
        end = begin
    return False


@functools.lru_cache(maxsize=1)
def _tree(source: str) -> ast.Module:
    return ast.parse(source)


def _splices(function: Function, edit: Edit, name: str) -> list[Splice]:
    try:
        return edit(function)
    except RewriteError as error:
        raise RewriteError(
            f"{name} cannot be patched: {error}. Its source does not have the shape that lwpf_patch knows; leave it "
            "out with exclude= where its host can do without it, install a version that is supported, or describe "
            "your fork by a host of its own (docs/own_host.md)"
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
    """Hash a function's syntax tree: the same for every formatting, comment, docstring and version of Python."""
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
