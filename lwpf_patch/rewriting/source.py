"""A function's source as edits see it, and the splices that they make."""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from ..errors import RewriteError


@dataclass(frozen=True)
class Splice:
    """Text that replaces the bytes ``start`` to ``end`` of a module's source."""

    start: int
    end: int
    text: str


@functools.lru_cache(maxsize=8)
def _line_starts(source: bytes) -> list[int]:
    """Return the byte offset of each line's first character, and the length of the source."""
    return [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]


class Function:
    """One function of a module's source, as edits see it.

    Attributes:
        node: Its syntax tree.
        parts: The names of what shall come in, such as ``"func_d"`` and ``"feature_map"``.
        where: ``file:line``, for messages.
    """

    def __init__(self, node: ast.FunctionDef, source: bytes, path: str, parts: Container[str] = ()) -> None:
        self.node = node
        self.parts = parts
        self.where = f"{path}:{node.lineno}"
        self._source = source
        self._nodes = list(ast.walk(node))
        self._line_starts = _line_starts(source)

    def start(self, node: ast.expr | ast.stmt | ast.arg) -> int:
        """Return the byte offset of a node's first character."""
        return self._line_starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt | ast.arg) -> int:
        """Return the byte offset behind a node's last character."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._line_starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr) -> str:
        """Return the source of an expression, without brackets around it."""
        return self._source[self.start(node) : self.end(node)].decode()

    def line_before(self, statement: ast.stmt, text: str) -> Splice:
        """Return the splice that puts a line of its own in front of a statement, equally indented.

        Raises:
            RewriteError: The statement does not begin its line.
        """
        line_start = self._line_starts[statement.lineno - 1]
        indent = self._source[line_start : self.start(statement)]
        if indent.strip():
            raise RewriteError(f"the statement at line {statement.lineno} of {self.where} does not begin its line")
        return Splice(line_start, line_start, f"{indent.decode()}{text}\n")

    def new_argument(self, call: ast.Call, text: str) -> Splice:
        """Return the splice that adds an argument at the end of a call that has arguments already."""
        end = max(self.end(node) for node in [*call.args, *(keyword.value for keyword in call.keywords)])
        return Splice(end, end, f", {text}")

    def new_callee(self, call: ast.Call, text: str) -> Splice:
        """Return the splice that has a call call something else, with the same arguments."""
        return Splice(self.start(call.func), self.end(call.func), text)

    def new_keyword_parameter(self, text: str) -> Splice:
        """Return the splice that adds a parameter, by keyword only, to the function.

        Raises:
            RewriteError: It has such parameters already, or takes any number of arguments.
        """
        arguments = self.node.args
        if arguments.vararg or arguments.kwonlyargs or arguments.kwarg or not arguments.args:
            raise RewriteError(f"{self.where}: its parameters are not of a kind that can be added to")
        last = arguments.defaults[-1] if arguments.defaults else arguments.args[-1]
        end = self.end(last)
        return Splice(end, end, f", *, {text}")

    def names(self) -> set[str]:
        """Return every name and argument of the function."""
        names = {node.id for node in self._nodes if isinstance(node, ast.Name)}
        return names | {node.arg for node in self._nodes if isinstance(node, ast.arg)}

    def check_free(self, *names: str) -> None:
        """Check that the function does not use names which an edit brings in.

        Raises:
            RewriteError: It uses one of them.
        """
        if taken := sorted(set(names) & self.names()):
            raise RewriteError(f"{self.where} uses the name {', '.join(taken)} already, which the patch would bring in")

    def blocks(self) -> Iterator[list[ast.stmt]]:
        """Yield every list of statements of the function."""
        for node in self._nodes:
            for name in ("body", "orelse", "finalbody"):
                block = getattr(node, name, None)
                if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                    yield block

    def all_calls(self) -> list[ast.Call]:
        """Return all calls."""
        return [node for node in self._nodes if isinstance(node, ast.Call)]

    def calls(self, name: str) -> list[ast.Call]:
        """Return the calls of a function or method of this name."""
        return [call for call in self.all_calls() if called_name(call) == name]


#: Looks for its anchors in one function and returns the splices that it wants. It changes nothing itself.
Edit = Callable[[Function], "list[Splice]"]


def called_name(call: ast.Call) -> str | None:
    """Return the name of the function or method that a call calls; None: it calls something without a name."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else None
