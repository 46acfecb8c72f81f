"""PyTorch's own attention, ``nn.MultiheadAttention``, and what stands in for it in torchvision's Swin and open_clip."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import FoldError, RewriteError
from ..hosting import (
    FeatureMapAttachment,
    Folding,
    FuncDAttachment,
    Function,
    HostModule,
    RewrittenHost,
    Site,
    Splice,
    multiply_rows,
)
from . import known

if TYPE_CHECKING:
    from torch import Tensor

_MHA = "MultiheadAttention.forward"
_MHA_FUNCTION = "multi_head_attention_forward"
_SWIN = "ShiftedWindowAttention.forward"
_SWIN_V2 = "ShiftedWindowAttentionV2.forward"
_SWIN_FUNCTION = "shifted_window_attention"
_SWIN_3D = "ShiftedWindowAttention3d.forward"
_SWIN_3D_FUNCTION = "shifted_window_attention_3d"

# --- the edits ------------------------------------------------------------------------------------------------------


def forget_in_function(function: Function) -> list[Splice]:
    """Edit ``multi_head_attention_forward``, both branches: with ``need_weights`` and without.

    Parameters bring in func_d and, with U-Hop, its feature map. Anchors: ``if need_weights:``, which holds the softmax,
    and, in its other branch, the only call of ``scaled_dot_product_attention``; and the call of itself through
    ``handle_torch_function``. The weights that are returned are those that multiply the values.
    """
    branches = _only(
        function,
        "'if need_weights:'",
        (node for node in function.node.body if isinstance(node, ast.If) and ast.unparse(node.test) == "need_weights"),
    )
    fused = _only(function, "'scaled_dot_product_attention(...)'", function.calls("scaled_dot_product_attention"))
    scores = "attn_output_weights"
    return [
        *_unchecked_while_compiling(function),
        _parameters(function),
        *_passed(function, "handle_torch_function"),
        *([function.line_before(branches, "q = feature_map(q, k)")] if "feature_map" in function.parts else []),
        *_around_softmax(function, scores, f"softmax({scores}, dim=-1)", f"torch.bmm({scores}, v)"),
        function.new_callee(fused, "func_d.scaled_dot_product_attention"),
        function.new_argument(fused, "training=training"),
    ]


def _unchecked_while_compiling(function: Function) -> list[Splice]:
    """Leave out the check of a mask's shape while torch.compile traces, which cannot trace its message."""
    return [
        Splice(function.end(node.test), function.end(node.test), " and not torch.compiler.is_compiling()")
        for node in _statements(function)
        if isinstance(node, ast.If) and ast.unparse(node.body[0]).startswith("_check_key_padding_mask(")
    ]


def forget_in_windows(function: Function) -> list[Splice]:
    """Edit ``shifted_window_attention``, that of images or of videos.

    Parameters bring in func_d and, with U-Hop, its feature map, which maps what is scored: patterns that are normalised
    where the attention is that of Swin V2. The mask of shifted windows, which is -100 for keys of other windows, is
    told apart before it is added: scores of a cosine attention can be as low themselves.
    """
    shifted = _only(
        function,
        "'attn = attn + attn_mask...'",
        (node for node in _statements(function) if ast.unparse(node).startswith("attn = attn + attn_mask")),
    )
    return [
        _parameters(function),
        *_mapped_in_windows(function),
        function.line_before(shifted, "attn_mask = func_d.with_infinity(attn_mask, -100.0)"),
        *_around_softmax(function, "attn", "F.softmax(attn, dim=-1)", "attn.matmul(v)"),
    ]


def forget_in_clip(function: Function) -> list[Splice]:
    """Edit ``Attention`` of open_clip: the fused branch, and each that writes the softmax out.

    Anchors: calls of ``scaled_dot_product_attention``, and pairs of ``attn = attn.softmax(dim=-1)`` and
    ``torch.bmm(attn, v)``.

    Raises:
        RewriteError: There is something else.
    """
    splices = [
        function.new_callee(call, "self.func_d.scaled_dot_product_attention")
        for call in function.calls("scaled_dot_product_attention")
    ]
    splices += _around_softmax(function, "attn", "attn.softmax(dim=-1)", "torch.bmm(attn, v)", "self.")
    if "feature_map" not in function.parts:
        return splices
    unnormalised = _only(
        function,
        "'if self.use_fsdpa:'",
        (node for node in _statements(function) if ast.unparse(node).startswith("if self.use_fsdpa:")),
    )
    splices += [*_mapped_cosines(function, "self."), function.line_before(unnormalised, "q = self.feature_map(q, k)")]
    return splices


def pass_parts_to(called: str) -> Callable[[Function], list[Splice]]:
    """Return the edit that has every call of a function pass the module's func_d, and with U-Hop its feature map."""

    def pass_parts(function: Function) -> list[Splice]:
        splices = []
        for call in function.calls(called):
            tensor = ast.unparse(call.args[0])
            arguments = ", ".join(f"{name}=self.{name}.passed_with({tensor})" for name in _parts(function))
            splices.append(function.new_argument(call, arguments))
        if not splices:
            raise RewriteError(f"{function.where} does not call {called}")
        return splices

    return pass_parts


def pass_parts(function: Function) -> list[Splice]:
    """Have ``MultiheadAttention.forward`` pass what the module owns, and take no fast path around it.

    Raises:
        RewriteError: It does not call ``multi_head_attention_forward``, or decides in another way.
    """
    splices = _passed(function, _MHA_FUNCTION, "self.")
    if not splices:
        raise RewriteError(f"{function.where} does not call {_MHA_FUNCTION}")
    splices += [function.new_callee(call, f"_lwpf_{_MHA_FUNCTION}") for call in function.calls(_MHA_FUNCTION)]
    allowed = " and ".join(f"self.{name}.allows_fast_path()" for name in _parts(function))
    line = f'why_not_fast_path = why_not_fast_path or ("" if {allowed} else "lwpf_patch computes this attention")'
    return [*splices, function.line_before(_fast_path(function, "why_not_fast_path"), line)]


def close_fast_path(function: Function) -> list[Splice]:
    """Have a layer, or an encoder, take no fast path around the attention modules in it."""
    test = _fast_path(function, "why_not_sparsity_fast_path").test
    allowed = 'all(each.allows_fast_path() for each in self.modules() if hasattr(each, "allows_fast_path"))'
    return [Splice(function.end(test), function.end(test), f" and {allowed}")]


def leave_feature_maps(function: Function) -> list[Splice]:
    """Have ``Transformer._reset_parameters`` leave feature maps alone, which begin as the identity."""
    loop = _only(
        function,
        "'for p in self.parameters():'",
        (node for node in function.node.body if isinstance(node, ast.For)),
    )
    if ast.unparse(loop.iter) != "self.parameters()":
        raise RewriteError(f"{function.where} goes over something else than 'self.parameters()'")
    others = '[each for name, each in self.named_parameters() if ".feature_map." not in name]'
    return [Splice(function.start(loop.iter), function.end(loop.iter), others)]


def _parts(function: Function) -> list[str]:
    """Return what comes in, in the order in which it is written."""
    return [name for name in ("func_d", "feature_map") if name in function.parts]


def _parameters(function: Function) -> Splice:
    return function.new_keyword_parameter(", ".join(f"{name}=None" for name in _parts(function)))


def _passed(function: Function, called: str, source: str = "") -> list[Splice]:
    arguments = ", ".join(f"{name}={source}{name}" for name in _parts(function))
    return [function.new_argument(call, arguments) for call in function.calls(called)]


def _around_softmax(function: Function, scores: str, softmax: str, use: str, source: str = "") -> list[Splice]:
    """Put the paper's two lines around each softmax: ``scores = softmax``, and later in the same block ``use``.

    Raises:
        RewriteError: There is a softmax that is not followed by its use with nothing but dropout in between, or none.
    """
    splices: list[Splice] = []
    for block in function.blocks():
        for index, statement in enumerate(block):
            if not isinstance(statement, ast.Assign) or ast.unparse(statement) != f"{scores} = {softmax}":
                continue
            user = _use(block[index + 1 :], scores, use)
            if user is None:
                raise RewriteError(f"{function.where}: no '{use}' follows '{softmax}' with nothing but dropout between")
            call = statement.value
            splices += [
                function.line_before(statement, f"{scores}, forget_mask = {source}func_d({scores}{_training(source)})"),
                Splice(function.start(call), function.end(call), f"{source}func_d.normalise({scores})"),
                function.line_before(user, f"{scores} = forget_mask * {scores}"),
            ]
    if len(splices) != 3 * len(function.calls("softmax")) or not splices:
        raise RewriteError(f"{function.where} has a softmax that is not '{scores} = {softmax}'")
    return splices


def _training(source: str) -> str:
    """Return the argument that tells a func_d whether to draw noise, where its function is told."""
    return "" if source else ", training"


def _use(rest: list[ast.stmt], scores: str, use: str) -> ast.stmt | None:
    for statement in rest:
        text = ast.unparse(statement)
        if use in text:
            return statement
        if scores in text and "drop" not in text:
            return None
    return None


def _mapped_in_windows(function: Function) -> list[Splice]:
    if "feature_map" not in function.parts:
        return []
    scored = _only(
        function,
        "'attn = q.matmul(k.transpose(-2, -1))'",
        (node for node in _statements(function) if ast.unparse(node) == "attn = q.matmul(k.transpose(-2, -1))"),
    )
    return [*_mapped_cosines(function), function.line_before(scored, "q = feature_map(q, k)")]


def _mapped_cosines(function: Function, source: str = "") -> list[Splice]:
    """Map a query that is normalised; the splices are none where no query is."""
    return [
        Splice(
            function.start(call),
            function.end(call),
            f"{source}feature_map(F.normalize(q, dim=-1), F.normalize(k, dim=-1))",
        )
        for call in function.calls("normalize")
        if ast.unparse(call) == "F.normalize(q, dim=-1)"
    ]


def _fast_path(function: Function, name: str) -> ast.If:
    found = (
        node for node in function.node.body if isinstance(node, ast.If) and ast.unparse(node.test) == f"not {name}"
    )
    return _only(function, f"'if not {name}:'", found)


def _statements(function: Function) -> list[ast.stmt]:
    return [statement for block in function.blocks() for statement in block]


def _only(function: Function, what: str, found: Iterable[HostModule]) -> HostModule:
    """Return the only one of some nodes.

    Raises:
        RewriteError: There are none, or several.
    """
    nodes = list(found)
    if len(nodes) != 1:
        raise RewriteError(f"{function.where} has {f'{len(nodes)} times' if nodes else 'no'} {what}")
    return nodes[0]


# --- feature maps ---------------------------------------------------------------------------------------------------


def heads(module: HostModule) -> tuple[int, int]:
    """Return the number of heads and the width of each."""
    return module.num_heads, module.head_dim


def projections(model: HostModule, module: HostModule) -> list[str]:
    """Return the names of the parameters that make queries and keys."""
    weights = ["in_proj_weight"] if module._qkv_same_embed_dim else ["q_proj_weight", "k_proj_weight"]
    return [*weights, "in_proj_bias", *(["bias_k"] if module.bias_k is not None else [])]


def multiply(module: HostModule, matrix: Tensor) -> None:
    """Multiply the projections of query and key, each of which has the rows of a head together."""
    size = module.embed_dim
    if module._qkv_same_embed_dim:
        rows = [module.in_proj_weight[:size], module.in_proj_weight[size : 2 * size]]
    else:
        rows = [module.q_proj_weight, module.k_proj_weight]
    if module.in_proj_bias is not None:
        rows += [module.in_proj_bias[:size], module.in_proj_bias[size : 2 * size]]
    if module.bias_k is not None:
        rows.append(module.bias_k[0, 0])
    for each in rows:
        multiply_rows(each, matrix)


def example(module: HostModule) -> tuple[Tensor, ...]:
    """Return a random query, key and value."""
    import torch

    sizes = ((3, module.embed_dim), (8, module.kdim), (8, module.vdim))
    tensors = (torch.randn(length, 1, size, dtype=torch.float64, device="cpu") for length, size in sizes)
    return tuple(each.transpose(0, 1) if module.batch_first else each for each in tensors)


def heads_of_windows(module: HostModule) -> tuple[int, int]:
    """Return the number of heads and the width of each."""
    return module.num_heads, module.qkv.in_features // module.num_heads


def projections_of_windows(model: HostModule, module: HostModule) -> list[str]:
    """Return the names of the parameters that make queries and keys.

    Raises:
        FoldError: Query and key are normalised.
    """
    if hasattr(module, "logit_scale"):
        raise FoldError("query and key are normalised between the projections and the scores")
    return ["qkv.weight", "qkv.bias"]


def multiply_of_windows(module: HostModule, matrix: Tensor) -> None:
    """Multiply the projections of query and key, each of which has the rows of a head together."""
    size = module.qkv.in_features
    for tensor in (module.qkv.weight, module.qkv.bias):
        if tensor is not None:
            multiply_rows(tensor[:size], matrix)
            multiply_rows(tensor[size : 2 * size], matrix)


def example_of_windows(module: HostModule) -> tuple[Tensor, ...]:
    """Return a random image, or video, of two windows in each direction."""
    import torch

    sizes = (2 * size for size in module.window_size)
    return (torch.randn(1, *sizes, module.qkv.in_features, dtype=torch.float64, device="cpu"),)


def projections_in_clip(model: HostModule, module: HostModule) -> list[str]:
    """Return the names of the parameters that make queries and keys.

    Raises:
        FoldError: Query and key are normalised.
    """
    if module.logit_scale is not None or type(module.ln_q).__name__ != "Identity":
        raise FoldError("query and key are normalised between the projections and the scores")
    return ["in_proj_weight", "in_proj_bias"]


def multiply_in_clip(module: HostModule, matrix: Tensor) -> None:
    """Multiply the projections of query and key, each of which has the rows of a head together."""
    size = module.in_proj_weight.shape[1]
    for tensor in (module.in_proj_weight, module.in_proj_bias):
        if tensor is not None:
            multiply_rows(tensor[:size], matrix)
            multiply_rows(tensor[size : 2 * size], matrix)


def example_in_clip(module: HostModule) -> tuple[Tensor, ...]:
    """Return random tokens."""
    import torch

    return (torch.randn(1, 8, module.in_proj_weight.shape[1], dtype=torch.float64, device="cpu"),)


# --- the sites ------------------------------------------------------------------------------------------------------

_NOT_SCRIPTED = "its method hands its func_d to a function, and functions of TorchScript take no modules"


def _function(
    module: str, qualname: str, edit: Callable[[Function], list[Splice]], goes_with: str, copied_to: str = ""
) -> Site:
    return Site(
        module, qualname, _sources(module, qualname), edit=edit, goes_with=goes_with, copied_to=copied_to,
        required=qualname == _MHA_FUNCTION, passed=True,
    )  # fmt: skip


def _sources(module: str, qualname: str) -> dict[str, str]:
    return known.sources(module.partition(".")[0], f"{module}.{qualname}")


def _around(qualname: str, edit: Callable[[Function], list[Splice]], part: str = "") -> Site:
    """Return the site of a method around attention modules, which would not call them."""
    module = "torch.nn.modules.transformer"
    return Site(
        module, qualname, _sources(module, qualname), edit=edit, goes_with=_MHA, part=part, required=not part
    )  # fmt: skip


def _windows(module: str, qualname: str, called: str, goes_with: str = "") -> Site:
    folding = Folding(projections_of_windows, multiply_of_windows, example_of_windows)
    return Site(
        module,
        qualname,
        _sources(module, qualname),
        (
            FuncDAttachment(edit=None, why_not_scripted=_NOT_SCRIPTED),
            FeatureMapAttachment(edit=None, shape=heads_of_windows, folding=folding),
        ),
        edit=pass_parts_to(called),
        goes_with=goes_with,
    )


_IMAGES, _VIDEOS = "torchvision.models.swin_transformer", "torchvision.models.video.swin_transformer"

HOST = RewrittenHost(
    name="torch",
    install="pip install torch",
    sites=(
        _function("torch.nn.functional", _MHA_FUNCTION, forget_in_function, _MHA, "torch.nn.modules.activation"),
        Site(
            "torch.nn.modules.activation",
            _MHA,
            _sources("torch.nn.modules.activation", _MHA),
            (
                FuncDAttachment(edit=None, why_not_scripted=_NOT_SCRIPTED),
                FeatureMapAttachment(edit=None, shape=heads, folding=Folding(projections, multiply, example)),
            ),
            edit=pass_parts,
            required=True,
        ),
        _around("TransformerEncoderLayer.forward", close_fast_path),
        _around("TransformerEncoder.forward", close_fast_path),
        _around("Transformer._reset_parameters", leave_feature_maps, "feature_map"),
        _function(_IMAGES, _SWIN_FUNCTION, forget_in_windows, _SWIN),
        _windows(_IMAGES, _SWIN_V2, _SWIN_FUNCTION, goes_with=_SWIN),  # the more special one first
        _windows(_IMAGES, _SWIN, _SWIN_FUNCTION),
        _function(_VIDEOS, _SWIN_3D_FUNCTION, forget_in_windows, _SWIN_3D),
        _windows(_VIDEOS, _SWIN_3D, _SWIN_3D_FUNCTION),
        Site(
            "open_clip.transformer",
            "Attention.forward",
            _sources("open_clip.transformer", "Attention.forward"),
            (
                FuncDAttachment(edit=None),
                FeatureMapAttachment(
                    edit=None,
                    shape=heads,
                    folding=Folding(projections_in_clip, multiply_in_clip, example_in_clip),
                ),
            ),
            edit=forget_in_clip,
        ),
    ),
)
