"""The edits for softmax attention as most vision transformers write it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from ..errors import RewriteError
from .source import Edit, Function, Splice, called_name
from .tracking import check_no_dropout

SDPA = "scaled_dot_product_attention"
SOFTMAX = "softmax"


def forget_around_softmax(function: Function, dim: str = "-1") -> list[Splice]:
    """Edit softmax attention, fused or written out or both in branches: whatever it calls becomes a call of func_d.

    ``F.scaled_dot_product_attention(...)`` becomes ``self.func_d.scaled_dot_product_attention(...)``, and a softmax
    over the last dimension ``self.func_d.softmax(...)``: the paper's two lines in one, since the mask on the weights
    commutes with the dropout that may follow.

    Args:
        function: The function.
        dim: The dimension of the keys, as it is written.

    Raises:
        RewriteError: There is none, or some of it has another shape: nothing is patched by halves.
    """
    splices = [*sdpa_calls(function), *(softmax_call(function, call, dim) for call in function.calls(SOFTMAX))]
    if not splices:
        raise RewriteError(f"{function.where} has no softmax over keys")
    return splices


def sdpa_calls(function: Function) -> list[Splice]:
    """``F.scaled_dot_product_attention(...)`` becomes ``self.func_d.scaled_dot_product_attention(...)``."""
    return [function.new_callee(call, f"self.func_d.{SDPA}") for call in function.calls(SDPA)]


def softmax_call(function: Function, call: ast.Call, dim: str = "-1") -> Splice:
    """Have a call of a softmax, in any of its spellings, call ``self.func_d.softmax``.

    These are ``x.softmax(dim=-1)``, ``F.softmax(x, dim=-1)`` (of ``torch`` too), and ``self.softmax(x)``, a module
    whose dimension the function does not tell.

    Args:
        function: The function that holds it.
        call: The call.
        dim: The dimension of the keys, as it is written.

    Raises:
        RewriteError: It has another form, runs over another dimension, or takes scores after a dropout.
    """
    scores = softmax_scores(function, call, dim)
    check_no_dropout(function, scores, call)
    return Splice(function.start(call), function.end(call), f"self.func_d.softmax({function.text(scores)}, dim={dim})")


def softmax_scores(function: Function, call: ast.Call, dim: str = "-1", modules: bool = True) -> ast.expr:
    """Return what a call of a softmax, in any of the spellings of :func:`softmax_call`, takes as scores.

    Args:
        function: The function that holds it.
        call: The call.
        dim: The dimension of the keys, as it is written.
        modules: Whether ``self.softmax(x)`` is taken for a softmax over this dimension.

    Raises:
        RewriteError: It has another form, or runs over another dimension.
    """
    found: str | None = None
    match call:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self")), args=[scores], keywords=[]):
            found = dim if modules else None
        case ast.Call(func=ast.Attribute(value=module), args=[scores, *args], keywords=options) if _is_torch(module):
            found = _dimension(args, options)
        case ast.Call(func=ast.Attribute(value=scores), args=args, keywords=options):
            found = _dimension(args, options)
        case _:
            scores = call
    if found != dim:
        raise RewriteError(
            f"{function.where} has a softmax that no edit covers: {ast.unparse(call)}; one over dim={dim} was expected"
        )
    return scores


def normalise_call(function: Function, call: ast.Call, dim: str, func_d: str) -> Splice:
    """Have a call of a softmax call ``normalise`` of a func_d; the scores are forgotten by a line of its own.

    Args:
        function: The function that holds it.
        call: The call.
        dim: The dimension of the keys, as it is written.
        func_d: What func_d is called there.

    Raises:
        RewriteError: It has another form, or runs over another dimension.
    """
    scores = softmax_scores(function, call, dim, modules=False)
    if call.args and call.args[0] is scores:
        return function.new_callee(call, f"{func_d}.normalise")
    return Splice(function.start(call), function.end(call), f"{func_d}.normalise({function.text(scores)}, dim={dim})")


def _is_torch(node: ast.expr) -> bool:
    return ast.unparse(node) in ("F", "torch", "nn.functional", "torch.nn.functional")


def _dimension(args: list[ast.expr], options: list[ast.keyword]) -> str | None:
    values = [*args, *(option.value for option in options if option.arg == "dim")]
    return ast.unparse(values[0]) if len(args) + len(options) == len(values) == 1 else None


def hide(mask: str, sentinel: float) -> Edit:
    """Return the edit that has a mask hide keys in earnest, where its host adds a finite number to their scores.

    It is a line of its own before all others: ``mask = self.func_d.with_infinity(mask, -100.0)``.

    Args:
        mask: The name of the parameter.
        sentinel: The number.
    """

    def edit(function: Function) -> list[Splice]:
        arguments = function.node.args
        if mask not in [each.arg for each in (*arguments.args, *arguments.kwonlyargs)]:
            raise RewriteError(f"{function.where} has no parameter {mask}")
        first = next(statement for statement in function.node.body if not _is_docstring(statement))
        return [function.line_before(first, f"{mask} = self.func_d.with_infinity({mask}, {sentinel})")]

    return edit


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def map_query(function: Function) -> list[Splice]:
    """``q = self.feature_map(q, k)``, a line of its own before the scores are made, whichever branch makes them.

    Anchor: the first statement of the function that holds ``scaled_dot_product_attention(q, k, ...)`` or
    ``q @ k.transpose(-2, -1)``, always of the same two names.

    Raises:
        RewriteError: There is none, or the names differ.
    """
    for statement in function.node.body:
        names = set(_scored(statement))
        if len(names) == 1:
            ((query, key),) = names
            return [function.line_before(statement, f"{query} = self.feature_map({query}, {key})")]
        if names:
            raise RewriteError(f"{function.where}: its branches make scores of different names: {sorted(names)}")
    raise RewriteError(f"{function.where}: there is no product of query and key to put a feature map before")


def _scored(statement: ast.stmt) -> Iterator[tuple[str, str]]:
    """Yield the names of query and key wherever a statement makes scores of them."""
    for node in ast.walk(statement):
        query: ast.expr | None = None
        match node:
            case ast.Call(args=[first, second, *_]) if called_name(node) == SDPA:
                query, key = first, second
            case ast.BinOp(left=left, op=ast.MatMult(), right=right):
                transposed = _without_contiguous(right)
                if isinstance(transposed, ast.Call) and called_name(transposed) == "transpose":
                    assert isinstance(transposed.func, ast.Attribute)
                    query, key = left, transposed.func.value
        if query is not None:
            names = _name_of(query), _name_of(key)
            if names[0] is not None and names[1] is not None:
                yield names[0], names[1]


def _name_of(node: ast.expr) -> str | None:
    """Return x for ``x``, ``x.contiguous()`` and ``x * self.scale``."""
    match _without_contiguous(node):
        case ast.Name(id=name):
            return name
        case ast.BinOp(left=ast.Name(id=name), op=ast.Mult(), right=factor) if ast.unparse(factor) == "self.scale":
            return name
    return None


def _without_contiguous(node: ast.expr) -> ast.expr:
    match node:
        case ast.Call(func=ast.Attribute(value=inner, attr="contiguous"), args=[], keywords=[]):
            return inner
    return node
