"""hflayers, the Hopfield layers: func_d in every iteration of the update loop, the last one's mask on the values."""

from __future__ import annotations

import ast
import warnings
from itertools import pairwise
from typing import TYPE_CHECKING

from ..errors import FoldError, RewriteError, SettingsError
from ..hosting import (
    FeatureMapAttachment,
    Folding,
    FuncDAttachment,
    Function,
    HostModule,
    Replacement,
    RewrittenHost,
    Shim,
    Site,
    Splice,
    multiply_rows,
)
from . import known

if TYPE_CHECKING:
    from torch import Tensor

_CORE = "hopfield_core_forward"
_SCORES = "attn_output_weights"


def forget_in_update_loop(function: Function) -> list[Splice]:
    """Put the paper's two lines into the loop and behind it, and ``func_d.normalise`` in place of its softmax.

    A parameter brings func_d in, and with U-Hop its feature map.

    Anchors: ``if xi is None:``, both arms of which hold the softmax of the scores; the product of the dropped-out
    weights with the values; the call of itself through ``handle_torch_function``; and, for the feature map, the product
    of q and k. The map stands in that product alone: the state that the loop keeps is a pattern of the original space.
    """
    names = _parts(function)
    return [
        function.new_keyword_parameter(", ".join(f"{name}=None" for name in names)),
        *_passed(function, "handle_torch_function", names),
        *_mapped_query(function),
        function.line_before(_softmax(function), f"{_SCORES}, xi_mask = func_d({_SCORES}, training)"),
        *(function.new_callee(call, "func_d.normalise") for call in function.calls("softmax")),
        function.line_before(_dropout(function), "func_d.show_weights(xi)"),
        function.line_before(_retrieval(function), f"{_SCORES} = xi_mask * {_SCORES}"),
    ]


def _parts(function: Function) -> list[str]:
    """Return what comes in, in the order in which it is written."""
    return [name for name in ("func_d", "feature_map") if name in function.parts]


def _passed(function: Function, called: str, names: list[str], source: str = "") -> list[Splice]:
    arguments = ", ".join(f"{name}={source}{name}" for name in names)
    return [function.new_argument(call, arguments) for call in function.calls(called)]


def _mapped_query(function: Function) -> list[Splice]:
    if "feature_map" not in function.parts:
        return []
    products = [call for call in function.calls("bmm") if ast.unparse(call) == "torch.bmm(q, k.transpose(1, 2))"]
    if len(products) != 1:
        raise RewriteError(f"{function.where}: no single 'torch.bmm(q, k.transpose(1, 2))' makes the scores")
    query = products[0].args[0]
    return [Splice(function.start(query), function.end(query), "feature_map(q, k)")]


def _softmax(function: Function) -> ast.If:
    for node in ast.walk(function.node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "xi is None":
            inside = [n for n in ast.walk(node) if isinstance(n, ast.Call) and "softmax" in ast.unparse(n.func)]
            if len(inside) == 2 == len(function.calls("softmax")):
                return node
    raise RewriteError(f"{function.where}: no 'if xi is None:' with the softmax of {_SCORES} in both arms")


def _retrieval(function: Function) -> ast.stmt:
    return _dropout_and_retrieval(function)[1]


def _dropout(function: Function) -> ast.stmt:
    return _dropout_and_retrieval(function)[0]


def _dropout_and_retrieval(function: Function) -> tuple[ast.stmt, ast.stmt]:
    for block in function.blocks():
        for before, statement in pairwise(block):
            if (
                ast.unparse(before).startswith(f"{_SCORES} = nn.functional.dropout(xi,")
                and ast.unparse(statement) == f"attn_output = torch.bmm({_SCORES}, v)"
            ):
                return before, statement
    raise RewriteError(f"{function.where}: no 'torch.bmm({_SCORES}, v)' right after the dropout of xi")


def pass_parts(function: Function) -> list[Splice]:
    """Have every call of hopfield_core_forward pass the module's func_d, and with U-Hop its feature map.

    Raises:
        RewriteError: There is none.
    """
    splices = _passed(function, _CORE, _parts(function), "self.")
    if not splices:
        raise RewriteError(f"{function.where} does not call {_CORE}")
    return splices


def heads(module: HostModule) -> tuple[int, int]:
    """Return the number of heads and the width of each.

    Raises:
        SettingsError: The module projects nothing, so that its width is known only when it is called.
    """
    if module.head_dim is None:
        raise SettingsError(
            "uhop: a HopfieldCore that projects nothing (all of its inputs are static) has no width before it is "
            "called, so that no feature map can be made for it: give it a projection, or leave it out with "
            "patch_model(model, exclude=...)"
        )
    return module.num_heads, module.head_dim


def projections(model: HostModule, module: HostModule) -> list[str]:
    """Return the names of the parameters that make queries and keys.

    Raises:
        FoldError: Something stands between a projection and the scores, or a projection is missing or shared.
    """
    scalings = [getattr(each, "scaling", 1.0) for each in model.modules() if _core(each) is module]
    reasons = {
        "its patterns are normalised between projection and scores": module.normalize_pattern,
        "its query is not projected (query_as_static)": module.query_as_static,
        "its key is not projected (key_as_static)": module.key_as_static,
        "its value passes the projection of the key (value_as_connected)": module.value_as_connected,
        "its key has a bias of its own behind the projection": module.bias_k is not None,
        "its scaling is a tensor, which multiplies features": any(type(scaling) is not float for scaling in scalings),
    }
    for reason, applies in reasons.items():
        if applies:
            raise FoldError(reason)
    weights = ["in_proj_weight"] if module._qkv_same_embed_dim else ["q_proj_weight", "k_proj_weight"]
    return [*weights, "in_proj_bias"]


def multiply(module: HostModule, matrix: Tensor) -> None:
    """Multiply the projections of query and key, each of which has the rows of a head together."""
    size = matrix.shape[0] * matrix.shape[1]
    if module._qkv_same_embed_dim:
        weights = [module.in_proj_weight[:size], module.in_proj_weight[size : 2 * size]]
    else:
        weights = [module.q_proj_weight, module.k_proj_weight]
    biases = [] if module.in_proj_bias is None else [module.in_proj_bias[:size], module.in_proj_bias[size : 2 * size]]
    for rows in (*weights, *biases):
        multiply_rows(rows, matrix)


def example(module: HostModule) -> tuple[Tensor, ...]:
    """Return random patterns: query, key and value."""
    import torch

    value = module.pattern_dim if module.value_as_static else module.vdim
    sizes = ((3, module.embed_dim), (8, module.kdim), (8, value))
    return tuple(torch.randn(length, 1, size, dtype=torch.float64, device="cpu") for length, size in sizes)


def _core(module: HostModule) -> HostModule:
    return module._modules.get("association_core")


UINT8_MASKS = Shim(
    "uint8 masks",
    "hflayers.functional warns about masks of dtype uint8 with a module that it does not import",
    modules=("hflayers.functional",),
    broken=lambda: True,
    replacements=lambda module: [] if hasattr(module, "warnings") else [Replacement(module, "warnings", warnings)],
)

HOST = RewrittenHost(
    name="hflayers",
    distribution="hopfield-layers",
    install='pip install "hopfield-layers @ git+https://github.com/ml-jku/hopfield-layers"',
    sites=(
        Site(
            "hflayers.functional",
            _CORE,
            known.sources("hflayers", f"hflayers.functional.{_CORE}"),
            edit=forget_in_update_loop,
            required=True,
            passed=True,
        ),
        Site(
            "hflayers.activation",
            "HopfieldCore.forward",
            known.sources("hflayers", "hflayers.activation.HopfieldCore.forward"),
            attachments=(
                FuncDAttachment(edit=None, iterates=True),
                FeatureMapAttachment(edit=None, shape=heads, folding=Folding(projections, multiply, example)),
            ),
            edit=pass_parts,
            required=True,
        ),
    ),
    inseparable=True,
    shims=(UINT8_MASKS,),
)
