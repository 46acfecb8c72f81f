"""What a function does to a tensor between two of its statements: edits refuse what they could not stand around.

Syntax alone is read, so that this errs on the side of refusal: what is not known to leave a tensor as it is changes it.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator

from ..errors import RewriteError
from .source import Function, called_name

#: Methods and functions that hide keys, or change neither the values of scores nor their order along the keys.
_HARMLESS = ("masked_fill", "masked_fill_", "view", "reshape", "contiguous", "float", "double", "to")
#: Calls that only look at their arguments.
_LOOKING = ("print", "debug", "info", "warning", "error", "log", "write", "append", "add_histogram", "add_scalar")
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div)


def check_scores(function: Function, scores: str, softmax: ast.AST, makers: Container[str]) -> None:
    """Check that a variable holds scores when its softmax is taken: products, with masks, factors and views at most.

    A dropout before the softmax, a bounded score and the like are refused: partial forgetting would stand behind them.

    Args:
        function: The function.
        scores: The name of the variable.
        softmax: The softmax, or the statement that holds it.
        makers: The names of the functions and methods that make scores.

    Raises:
        RewriteError: Something else is done to it.
    """
    names, seen = [scores], set()
    while names:
        name = names.pop()
        seen.add(name)
        for statement in _changes(function, name, None, softmax):
            source = _source(statement, name, makers)
            if source is None:
                raise RewriteError(
                    f"{function.where}: before the softmax of {scores}, line {statement.lineno} does something to "
                    f"{name} that no edit covers: {ast.unparse(statement)}"
                )
            names += [source] if source and source not in seen else []


def check_no_dropout(function: Function, scores: ast.expr, softmax: ast.AST) -> None:
    """Check that no dropout stands before a softmax: a score that it makes 0 would count as one.

    Args:
        function: The function.
        scores: What the softmax takes.
        softmax: The softmax.

    Raises:
        RewriteError: There is one.
    """
    dropouts = [call for call in function.all_calls() if "drop" in (called_name(call) or "")]
    if not any(_start(call) < _end(softmax) for call in dropouts):
        return
    names = [node.id for node in ast.walk(scores) if isinstance(node, ast.Name)]
    places: list[ast.expr | ast.stmt] = [scores]
    for name in names:
        places += _history(function, name, softmax)
    for place in places:
        if any(_start(place) <= _start(call) < _end(place) for call in dropouts):
            raise RewriteError(
                f"{function.where}: a dropout stands before the softmax, in line {place.lineno}, and not behind it: "
                f"{ast.unparse(place)}"
            )


def _history(function: Function, name: str, before: ast.AST) -> Iterator[ast.stmt]:
    """Yield what has made a variable what it is, the last first, back to where it is made of other ones."""
    for statement in sorted(_changes(function, name, None, before), key=_start, reverse=True):
        yield statement
        if isinstance(statement, ast.Assign) and not any(_is_read(node, name) for node in ast.walk(statement.value)):
            return


def _is_read(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)


def check_unchanged(function: Function, name: str, after: ast.AST, before: ast.AST) -> None:
    """Check that nothing changes a variable between two places of a function.

    Args:
        function: The function.
        name: The name of the variable.
        after: Where that begins, behind this.
        before: Where that ends.

    Raises:
        RewriteError: Something does.
    """
    for statement in _changes(function, name, after, before):
        raise _unforeseen(function, name, statement)


def check_unused(function: Function, name: str, after: ast.AST, before: ast.AST, but: Container[str] = ()) -> None:
    """Check that nothing is made of a variable between two places of a function; logging it is no matter.

    Args:
        function: The function.
        name: The name of the variable.
        after: Where that begins, behind this.
        before: Where that ends.
        but: The names of calls that may make its new value of the old one.

    Raises:
        RewriteError: Something is.
    """
    for statement in _between(function, after, before):
        match statement:
            case ast.Expr(value=ast.Call() as call) if called_name(call) in _LOOKING:
                continue
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.Call(args=[ast.Name(id=argument), *_]) as call):
                if target == argument == name and called_name(call) in but:
                    continue
        if any(isinstance(node, ast.Name) and node.id == name for node in _own_nodes(statement)):
            raise _unforeseen(function, name, statement)


def _unforeseen(function: Function, name: str, statement: ast.stmt) -> RewriteError:
    return RewriteError(
        f"{function.where}: around the softmax, line {statement.lineno} does "
        f"something with {name} that no edit covers: {ast.unparse(statement)}"
    )


def _changes(function: Function, name: str, after: ast.AST | None, before: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements between two places that set a variable, or may change its tensor."""
    return (each for each in _between(function, after, before) if _changes_it(each, name))


def _between(function: Function, after: ast.AST | None, before: ast.AST) -> Iterator[ast.stmt]:
    begin = (0, 0) if after is None else _end(after)
    for block in function.blocks():
        yield from (statement for statement in block if begin < _start(statement) < _start(before))


def _start(node: ast.AST) -> tuple[int, int]:
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def _end(node: ast.AST) -> tuple[int, int]:
    return getattr(node, "end_lineno", 0), getattr(node, "end_col_offset", 0)


def _changes_it(statement: ast.stmt, name: str) -> bool:
    """Return whether a statement itself, without the blocks inside of it, sets a variable or may change its tensor."""
    return any(_sets(node, name) or _may_change(node, name) for node in _own_nodes(statement)) or (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
        and called_name(statement.value) not in _LOOKING
        and any(_is(argument, name) for argument in _arguments(statement.value))
    )


def _own_nodes(statement: ast.stmt) -> Iterator[ast.AST]:
    nodes: list[ast.AST] = [statement]
    while nodes:
        node = nodes.pop()
        yield node
        nodes += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]


def _sets(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
        return _is(node.value, name)
    return isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load)


def _may_change(node: ast.AST, name: str) -> bool:
    """Return whether a call is one that changes a tensor in place."""
    if not isinstance(node, ast.Call):
        return False
    in_place = (called_name(node) or "").endswith("_") or any(each.arg in ("inplace", "out") for each in node.keywords)
    receiver = [node.func.value] if isinstance(node.func, ast.Attribute) else []
    return in_place and any(_is(each, name) for each in [*receiver, *_arguments(node)])


def _arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _source(statement: ast.stmt, name: str, makers: Container[str]) -> str | None:
    """Return the name of the variable that a statement makes scores of, ``""`` for no further one; None: it is none."""
    match statement:
        case ast.Assign(targets=[ast.Name()], value=value):
            return _scores_in(value, name, makers)
        case ast.AugAssign(target=ast.Name(), op=op, value=value) if isinstance(op, _ARITHMETIC):
            return None if "dropout" in ast.unparse(value) else ""
        case ast.Expr(value=ast.Call() as call) if called_name(call) in _HARMLESS:
            return _scores_in(call, name, makers)
    # A tuple of initial values, and the like, hold no scores.
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Tuple):
        return "" if all(isinstance(each, ast.Constant) for each in statement.value.elts) else None
    return None


def _scores_in(value: ast.expr, name: str, makers: Container[str]) -> str | None:
    match value:
        case ast.Name(id=source):
            return source
        case ast.Subscript(value=inner):
            return _scores_in(inner, name, makers)
        case ast.BinOp(op=ast.MatMult()):
            return ""
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _ARITHMETIC):
            holders = [each for each in (left, right) if _holds_scores(each, name, makers)]
            if len(holders) == 1 and "dropout" not in ast.unparse(value):
                return _scores_in(holders[0], name, makers)
        case ast.Call() as call if called_name(call) in makers:
            return ""
        case ast.Call(func=ast.Attribute(value=inner)) as call if called_name(call) in _HARMLESS:
            return _scores_in(inner, name, makers)
    return None


def _holds_scores(node: ast.expr, name: str, makers: Container[str]) -> bool:
    for each in ast.walk(node):
        if _is_product(each) or (isinstance(each, ast.Name) and each.id == name):
            return True
        if isinstance(each, ast.Call) and called_name(each) in makers:
            return True
    return False


def _is_product(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)
