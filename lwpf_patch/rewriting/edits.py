"""The edits for softmax attention as most vision transformers write it."""

from __future__ import annotations

import ast

from ..errors import RewriteError
from .source import Function, Splice, called_name

SDPA = "scaled_dot_product_attention"
SOFTMAX = "softmax"


def forget_around_softmax(function: Function) -> list[Splice]:
    """Edit softmax attention over the last dimension, fused or written out or both in branches.

    Raises:
        RewriteError: There is none, or some of it has another shape: nothing is patched by halves.
    """
    splices = [*sdpa_calls(function), *softmax_lines(function)]
    # One splice for each SDPA call, three for each softmax: anything else would patch one branch and not the other.
    anchors = len(function.calls(SDPA)) + 3 * len(function.calls(SOFTMAX))
    if not anchors:
        raise RewriteError(f"{function.where} has no softmax over keys")
    if len(splices) != anchors:
        raise RewriteError(f"{function.where} has a softmax or attention call that no edit covers")
    return splices


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
    """Return the names of query and key where an expression makes scores of them."""
    match node:
        case ast.Call(args=[ast.Name(id=query), ast.Name(id=key), *_]) if called_name(node) == SDPA:
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
    return [function.new_callee(call, f"self.func_d.{SDPA}") for call in function.calls(SDPA)]


def softmax_lines(function: Function) -> list[Splice]:
    """Put the paper's two lines around a softmax that is written out: before it, and before its result meets values.

    The softmax itself becomes ``self.func_d.normalise``, which is the softmax where no other ``sep`` is asked for.

    Anchors: ``attn = attn.softmax(dim=-1)`` and, later in the same block with nothing but dropout in between, a
    statement that holds ``attn @ v``.
    """
    splices = []
    for block in function.blocks():
        for index, statement in enumerate(block):
            name = _softmax_of(statement)
            if name is not None:
                assert isinstance(statement, ast.Assign)
                use = _use_of_weights(function, block[index + 1 :], name)
                mask = next(n for n in ("mask", "forget_mask", "func_d_mask") if n not in function.names())
                splices.append(function.line_before(statement, f"{name}, {mask} = self.func_d({name})"))
                call = statement.value
                splices.append(Splice(function.start(call), function.end(call), f"self.func_d.normalise({name})"))
                splices.append(function.line_before(use, f"{name} = {mask} * {name}"))
    return splices


def _softmax_of(statement: ast.stmt) -> str | None:
    """Return x for the statement ``x = x.softmax(dim=-1)``."""
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
