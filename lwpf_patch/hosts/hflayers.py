"""hflayers, the Hopfield layers: func_d in every iteration of the update loop, the last one's mask on the values."""

from __future__ import annotations

import ast
import warnings
from itertools import pairwise

from ..compat import Replacement, Shim
from ..edits import Function, Splice
from ..errors import RewriteError
from ..rewriting import Site
from .base import Host

_CORE = "hopfield_core_forward"
_SCORES = "attn_output_weights"


def forget_in_update_loop(function: Function) -> list[Splice]:
    """The paper's two lines in the loop and behind it, and a parameter that brings func_d in.

    Anchors: ``if xi is None:``, both arms of which hold the softmax of the scores; the product of the dropped-out
    weights with the values; and the call of itself through ``handle_torch_function``.
    """
    return [
        function.new_keyword_parameter("func_d=None"),
        *(function.new_argument(call, "func_d=func_d") for call in function.calls("handle_torch_function")),
        function.line_before(_softmax(function), f"{_SCORES}, xi_mask = func_d({_SCORES}, training)"),
        function.line_before(_retrieval(function), f"{_SCORES} = xi_mask * {_SCORES}"),
    ]


def _softmax(function: Function) -> ast.If:
    for node in ast.walk(function.node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "xi is None":
            inside = [n for n in ast.walk(node) if isinstance(n, ast.Call) and "softmax" in ast.unparse(n.func)]
            if len(inside) == 2 == len(function.calls("softmax")):
                return node
    raise RewriteError(f"{function.where}: no 'if xi is None:' with the softmax of {_SCORES} in both arms")


def _retrieval(function: Function) -> ast.stmt:
    for block in function.blocks():
        for before, statement in pairwise(block):
            if (
                ast.unparse(before).startswith(f"{_SCORES} = nn.functional.dropout(xi,")
                and ast.unparse(statement) == f"attn_output = torch.bmm({_SCORES}, v)"
            ):
                return statement
    raise RewriteError(f"{function.where}: no 'torch.bmm({_SCORES}, v)' right after the dropout of xi")


def pass_func_d(function: Function) -> list[Splice]:
    """Has every call of hopfield_core_forward pass the module's func_d.

    Raises:
        RewriteError: There is none.
    """
    calls = function.calls(_CORE)
    if not calls:
        raise RewriteError(f"{function.where} does not call {_CORE}")
    return [function.new_argument(call, "func_d=self.func_d") for call in calls]


UINT8_MASKS = Shim(
    "uint8 masks",
    "hflayers.functional warns about masks of dtype uint8 with a module that it does not import",
    modules=("hflayers.functional",),
    needed=lambda: True,
    replacements=lambda module: [] if hasattr(module, "warnings") else [Replacement(module, "warnings", warnings)],
)

HOST = Host(
    name="hflayers",
    distribution="hopfield-layers",
    install='pip install "hopfield-layers @ git+https://github.com/ml-jku/hopfield-layers"',
    sites=(
        Site("hflayers.functional", _CORE, forget_in_update_loop, {"41cc8bf3def74821": "1.0.2"}),
        Site("hflayers.activation", "HopfieldCore.forward", pass_func_d, {"6c1aa720572ebfba": "1.0.2"}),
    ),
    required=(_CORE, "HopfieldCore.forward"),
    inseparable=True,
    shims=(UINT8_MASKS,),
)
