"""hflayers, the Hopfield layers: func_d in every iteration of the update loop, the last one's mask on the values."""

from __future__ import annotations

import ast
import warnings
from typing import TYPE_CHECKING, NamedTuple

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
    called_name,
    check_scores,
    check_unchanged,
    check_unused,
    multiply_rows,
    normalise_call,
    softmax_scores,
)
from . import known

if TYPE_CHECKING:
    from torch import Tensor

_CORE = "hopfield_core_forward"
#: The name of what is kept, in the patched function.
_MASK = "xi_mask"


class _Loop(NamedTuple):
    """The anchors of the update loop, whatever its variables are called.

    Attributes:
        choice: ``if xi is None:``, both arms of which hold a softmax of the scores.
        softmaxes: Those.
        scores: The name of the scores.
        state: The name of xi, their softmax.
    """

    choice: ast.If
    softmaxes: list[ast.Call]
    scores: str
    state: str


class _Retrieval(NamedTuple):
    """The anchors behind the loop.

    Attributes:
        dropout: The statement that drops out of the weights.
        product: The statement that multiplies the dropped-out weights with the values.
        weights: The name of the weights.
        training: What tells the dropout whether the module trains, as it is written.
    """

    dropout: ast.stmt
    product: ast.stmt
    weights: str
    training: str


def forget_in_update_loop(function: Function) -> list[Splice]:
    """Put the paper's two lines into the loop and behind it, and ``func_d.normalise`` in place of its softmax.

    A parameter brings func_d in, and with U-Hop its feature map.

    Anchors, by whatever names: ``if xi is None:``, both arms of which hold the softmax of the scores; the product of
    the dropped-out weights with the values; the call of itself through ``handle_torch_function``; and, for the feature
    map, the product of q and k. The map stands in that product alone: the state that the loop keeps is a pattern of the
    original space.

    Raises:
        RewriteError: One of them is missing, or something is done in between that partial forgetting would not stand
            around as the paper has it.
    """
    names = _parts(function)
    function.check_free("func_d", "feature_map", _MASK)
    loop = _loop(function)
    retrieval = _retrieval(function, loop)
    check_scores(function, loop.scores, loop.choice, makers=("bmm",))
    return [
        function.new_keyword_parameter(", ".join(f"{name}=None" for name in names)),
        *_passed(function, "handle_torch_function", names),
        *_mapped_query(function, loop),
        function.line_before(loop.choice, f"{loop.scores}, {_MASK} = func_d({loop.scores}, {retrieval.training})"),
        *(normalise_call(function, call, "-1", "func_d") for call in loop.softmaxes),
        function.line_before(retrieval.dropout, f"func_d.show_weights({loop.state})"),
        function.line_before(retrieval.product, f"{retrieval.weights} = {_MASK} * {retrieval.weights}"),
    ]


def _parts(function: Function) -> list[str]:
    """Return what comes in, in the order in which it is written."""
    return [name for name in ("func_d", "feature_map") if name in function.parts]


def _passed(function: Function, called: str, names: list[str], source: str = "") -> list[Splice]:
    arguments = ", ".join(f"{name}={source}{name}" for name in names)
    return [function.new_argument(call, arguments) for call in function.calls(called)]


def _mapped_query(function: Function, loop: _Loop) -> list[Splice]:
    if "feature_map" not in function.parts:
        return []
    products = []
    for block in function.blocks():
        for statement in block:
            match statement:
                case ast.Assign(
                    targets=[ast.Name(id=loop.scores)],
                    value=ast.Call(
                        func=ast.Attribute(attr="bmm"),
                        args=[
                            ast.Name() as query,
                            ast.Call(
                                func=ast.Attribute(value=ast.Name() as key, attr="transpose"),
                                args=[ast.Constant(value=1), ast.Constant(value=2)],
                            ),
                        ],
                    ),
                ):
                    products.append((query, key))
    if len(products) != 1:
        raise RewriteError(f"{function.where}: no single 'torch.bmm(q, k.transpose(1, 2))' makes the scores")
    query, key = products[0]
    return [Splice(function.start(query), function.end(query), f"feature_map({query.id}, {key.id})")]


def _loop(function: Function) -> _Loop:
    for node in ast.walk(function.node):
        match node:
            case ast.If(
                test=ast.Compare(left=ast.Name(id=state), ops=[ast.Is()], comparators=[ast.Constant(value=None)])
            ):
                arms = [_softmax_for(arm, state) for arm in (node.body, node.orelse)]
                found = [call for call in arms if call is not None]
                if len(found) == 2 == len(function.calls("softmax")):
                    names = {_selected(softmax_scores(function, call, "-1", modules=False)) for call in found}
                    scores = names.pop()
                    if scores is not None and not names:
                        check_unchanged(function, scores, node.test, found[1])
                        return _Loop(node, found, scores, state)
    raise RewriteError(f"{function.where}: no 'if xi is None:' with the softmax of the scores in both arms")


def _softmax_for(arm: list[ast.stmt], state: str) -> ast.Call | None:
    """Return the only softmax of an arm, which the state is made of, or the part of it that is still updated."""
    found = [(each, node) for each in arm for node in ast.walk(each)
             if isinstance(node, ast.Call) and called_name(node) == "softmax"]  # fmt: skip
    match found:
        case [(ast.Assign(targets=[ast.Name(id=target)], value=value), call)] if target == state:
            others = {called_name(node) for node in ast.walk(value) if isinstance(node, ast.Call)}
            inside = {called_name(node) for node in ast.walk(call) if isinstance(node, ast.Call)}
            return call if others - inside <= {"masked_scatter"} else None
    return None


def _selected(node: ast.expr) -> str | None:
    """Return the name of the scores, those of active heads or all; None: something is done to them first."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Call(func=ast.Attribute(value=scores, attr="masked_select" | "view" | "reshape")):
            return _selected(scores)
    return None


def _retrieval(function: Function, loop: _Loop) -> _Retrieval:
    """Find the product of the values with the weights, which are the state after a dropout."""
    body = function.node.body
    for dropout in body:
        match dropout:
            case ast.Assign(
                targets=[ast.Name(id=weights)],
                value=ast.Call(args=[ast.Name(id=loop.state), *_], keywords=options) as call,
            ) if called_name(call) == "dropout":
                training = [ast.unparse(each.value) for each in options if each.arg == "training"]
                product = next((each for each in body if _multiplies(each, weights)), None)
                if len(training) == 1 and product is not None and product.lineno > dropout.lineno:
                    check_unchanged(function, loop.state, loop.choice, dropout)
                    check_unused(function, weights, dropout, product)
                    return _Retrieval(dropout, product, weights, training[0])
    raise RewriteError(
        f"{function.where}: no 'torch.bmm(weights, v)' right after the dropout of {loop.state} that makes these weights"
    )


def _multiplies(statement: ast.stmt, weights: str) -> bool:
    match statement:
        case ast.Assign(value=ast.Call(args=[ast.Name(id=name), ast.Name()], keywords=[]) as call):
            return name == weights and called_name(call) == "bmm"
    return False


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
