"""The edits for those of timm's attention classes that the general ones do not fit."""

from __future__ import annotations

import ast
from functools import partial

from ..errors import RewriteError
from ..hosting import Function, Splice, forget_around_softmax, sdpa_calls, softmax_call

#: For scores of three dimensions, the keys in the last one.
forget_over_the_third = partial(forget_around_softmax, dim="2")


def forget_content(function: Function) -> list[Splice]:
    """Edit convit's gated attention: what is forgotten are the scores of patches, before the gate mixes in positions.

    Anchor: ``patch_score = patch_score.softmax(dim=-1)``. The other softmax has no keys but positions.

    Raises:
        RewriteError: It is missing.
    """
    for call in function.calls("softmax"):
        if ast.unparse(call) == "patch_score.softmax(dim=-1)":
            return [softmax_call(function, call)]
    raise RewriteError(f"{function.where}: no patch_score.softmax(dim=-1)")


def forget_in_both(function: Function) -> list[Splice]:
    """Edit differential attention: each of the two softmaxes forgets by itself, in the eager branch as in the fused.

    Anchor, beside calls of ``scaled_dot_product_attention``: ``attn.softmax(dim=-1)`` over both, one after the other
    for each head. Computed in one it would have one median, as ``dmedian`` takes it of a call.

    Raises:
        RewriteError: It is missing.
    """
    calls = function.calls("softmax")
    if [ast.unparse(call) for call in calls] != ["attn.softmax(dim=-1)"]:
        raise RewriteError(f"{function.where}: no single attn.softmax(dim=-1)")
    halves = "[self.func_d.softmax(half, dim=-1) for half in attn.unflatten(1, (-1, 2)).unbind(2)]"
    text = f"torch.stack({halves}, dim=2).flatten(1, 2)"
    return [*sdpa_calls(function), Splice(function.start(calls[0]), function.end(calls[0]), text)]


def map_before_branches(function: Function) -> list[Splice]:
    """``q = self.feature_map(q, k)``, a line of its own before the branches, each of which splits q and k further.

    Anchor: ``if self.fused_attn:`` in the function's own body.

    Raises:
        RewriteError: It is missing.
    """
    for statement in function.node.body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "self.fused_attn":
            return [function.line_before(statement, "q = self.feature_map(q, k)")]
    raise RewriteError(f"{function.where}: no 'if self.fused_attn:' to put a feature map before")


def report_the_model(function: Function) -> list[Splice]:
    """Have the function that makes timm's models say which of their attention is not patched.

    Anchor: its last statement, ``return model``.

    Raises:
        RewriteError: It is another one.
    """
    last = function.node.body[-1]
    if ast.unparse(last) != "return model":
        raise RewriteError(f"{function.where} does not end with 'return model'")
    lines = ("from lwpf_patch.patching.coverage import report_model", 'report_model(model, "timm")')
    return [function.line_before(last, line) for line in lines]
