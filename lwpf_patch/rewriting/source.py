"""The edits that turn softmax attention into attention with partial forgetting.

An edit looks for its anchors in one function and returns the splices that it wants, or none where it has nothing to do.
It changes nothing itself: see :mod:`lwpf_patch.rewriting`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import RewriteError

SDPA = "scaled_dot_product_attention"
SOFTMAX = "softmax"


@dataclass(frozen=True)
class Splice:
    """Text that replaces the bytes ``start`` to ``end`` of a module's source."""

    start: int
    end: int
    text: str


class Function:
    """One function of a module's source, as edits see it.

    Attributes:
        node: Its syntax tree.
        uhop: Whether U-Hop's feature map shall come in, beside func_d.
        where: ``file:line``, for messages.
    """

    def __init__(self, node: ast.FunctionDef, source: bytes, path: str, uhop: bool = False) -> None:
        self.node = node
        self.uhop = uhop
        self.where = f"{path}:{node.lineno}"
        self._source = source
        self._line_starts = [0]
        for line in source.splitlines(keepends=True):
            self._line_starts.append(self._line_starts[-1] + len(line))

    def start(self, node: ast.expr | ast.stmt | ast.arg) -> int:
        """Returns the byte offset of a node's first character."""
        return self._line_starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt | ast.arg) -> int:
        """Returns the byte offset behind a node's last character."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._line_starts[node.end_lineno - 1] + node.end_col_offset

    def line_before(self, statement: ast.stmt, text: str) -> Splice:
        """Returns the splice that puts a line of its own in front of a statement, equally indented.

        Raises:
            RewriteError: The statement does not begin its line.
        """
        line_start = self._line_starts[statement.lineno - 1]
        indent = self._source[line_start : self.start(statement)]
        if indent.strip():
            raise RewriteError(f"the statement at line {statement.lineno} of {self.where} does not begin its line")
        return Splice(line_start, line_start, f"{indent.decode()}{text}\n")

    def new_argument(self, call: ast.Call, text: str) -> Splice:
        """Returns the splice that adds an argument at the end of a call that has arguments already."""
        end = max(self.end(node) for node in [*call.args, *(keyword.value for keyword in call.keywords)])
        return Splice(end, end, f", {text}")

    def new_keyword_parameter(self, text: str) -> Splice:
        """Returns the splice that adds a parameter, by keyword only, to the function.

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
        """Returns every name and argument of the function."""
        names = {node.id for node in ast.walk(self.node) if isinstance(node, ast.Name)}
        return names | {node.arg for node in ast.walk(self.node) if isinstance(node, ast.arg)}

    def blocks(self) -> Iterator[list[ast.stmt]]:
        """Yields every list of statements of the function."""
        for node in ast.walk(self.node):
            for name in ("body", "orelse", "finalbody"):
                block = getattr(node, name, None)
                if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                    yield block

    def calls(self, name: str) -> list[ast.Call]:
        """Returns the calls of a function or method of this name."""
        return [n for n in ast.walk(self.node) if isinstance(n, ast.Call) and _called_name(n) == name]


Edit = Callable[[Function], "list[Splice]"]


def _called_name(call: ast.Call) -> str | None:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else None


def attention(function: Function) -> list[Splice]:
    """Softmax attention over the last dimension, fused or written out or both in branches.

    Raises:
        RewriteError: There is none, or some of it has another shape: nothing is patched by halves.
    """
    splices = [*sdpa_calls(function), *softmax_lines(function)]
    # One splice for each SDPA call, two for each softmax: anything else would patch one branch and not the other.
    anchors = len(function.calls(SDPA)) + 2 * len(function.calls(SOFTMAX))
    if not anchors:
        raise RewriteError(f"{function.where} has no softmax over keys")
    if len(splices) != anchors:
        raise RewriteError(f"{function.where} has a softmax or attention call that no edit covers")
    return [*splices, *map_query(function)] if function.uhop else splices


def map_query(function: Function) -> list[Splice]:
    """``q = self.feature_map(q, k)``, a line of its own before the scores are made, whichever branch makes them.

    Anchor: the first statement of the function that holds ``scaled_dot_product_attention(q, k, ...)`` or
    ``q @ k.transpose(-2, -1)``, always of the same two names.

    Raises:
        RewriteError: There is none, or the names differ.
    """
    for statement in function.node.body:
        names = {pair for node in ast.walk(statement) if (pair := _scored(node)) is not None}
        if len(names) == 1:
            ((query, key),) = names
            return [function.line_before(statement, f"{query} = self.feature_map({query}, {key})")]
        if names:
            raise RewriteError(f"{function.where}: its branches make scores of different names: {sorted(names)}")
    raise RewriteError(f"{function.where}: there is no product of query and key to put a feature map before")


def _scored(node: ast.AST) -> tuple[str, str] | None:
    """Returns the names of query and key where an expression makes scores of them."""
    match node:
        case ast.Call(args=[ast.Name(id=query), ast.Name(id=key), *_]) if _called_name(node) == SDPA:
            return query, key
        case ast.BinOp(
            left=ast.Name(id=query),
            op=ast.MatMult(),
            right=ast.Call(func=ast.Attribute(value=ast.Name(id=key), attr="transpose")),
        ):
            return query, key
    return None


def sdpa_calls(function: Function) -> list[Splice]:
    """``F.scaled_dot_product_attention(...)`` becomes ``self.func_d.scaled_dot_product_attention(...)``."""
    return [
        Splice(function.start(call.func), function.end(call.func), f"self.func_d.{SDPA}")
        for call in function.calls(SDPA)
    ]


def softmax_lines(function: Function) -> list[Splice]:
    """The paper's two lines around a softmax that is written out: before it, and before its result meets the values.

    Anchors: ``attn = attn.softmax(dim=-1)`` and, later in the same block with nothing but dropout in between, a
    statement that holds ``attn @ v``.
    """
    splices = []
    for block in function.blocks():
        for index, statement in enumerate(block):
            name = _softmax_of(statement)
            if name is not None:
                use = _use_of_weights(function, block[index + 1 :], name)
                mask = next(n for n in ("mask", "forget_mask", "func_d_mask") if n not in function.names())
                splices.append(function.line_before(statement, f"{name}, {mask} = self.func_d({name})"))
                splices.append(function.line_before(use, f"{name} = {mask} * {name}"))
    return splices


def _softmax_of(statement: ast.stmt) -> str | None:
    """Returns x for the statement ``x = x.softmax(dim=-1)``."""
    match statement:
        case ast.Assign(
            targets=[ast.Name(id=target)],
            value=ast.Call(func=ast.Attribute(value=ast.Name(id=scores), attr="softmax"), args=args, keywords=keywords),
        ) if target == scores and _is_last_dimension(args, keywords):
            return target
    return None


def _is_last_dimension(args: list[ast.expr], keywords: list[ast.keyword]) -> bool:
    values = [*args, *(keyword.value for keyword in keywords if keyword.arg == "dim")]
    return len(args) + len(keywords) == 1 and len(values) == 1 and ast.unparse(values[0]) == "-1"


def _use_of_weights(function: Function, rest: list[ast.stmt], name: str) -> ast.stmt:
    for statement in rest:
        for node in ast.walk(statement):
            match node:
                case ast.BinOp(left=ast.Name(id=left), op=ast.MatMult()) if left == name:
                    return statement
        match statement:
            case ast.Assign(
                targets=[ast.Name(id=target)],
                value=ast.Call(func=ast.Attribute(attr=method), args=[ast.Name(id=argument)], keywords=[]),
            ) if target == argument == name and "drop" in method:
                continue
        if name in {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}:
            break
    raise RewriteError(
        f"{function.where}: no '{name} @ ...' follows the softmax over keys with nothing but dropout in between"
    )
