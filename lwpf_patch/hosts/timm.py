"""timm's vision transformers: ``Attention`` and ``AttentionRope``, with their fused and their eager branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..edits import attention
from ..errors import RewriteError
from ..rewriting import Site
from .base import Host

# Found by `lwpf status --json`, and entered once tests/check_version.py passes with that version.
_ATTENTION = {
    "8ff5d0b35ae8d3c0": "0.6.13",
    "d2cd45e583270d55": "0.9.2",
    "019655ec4957429d": "0.9.16 to 1.0.15",
    "bfe317ca487d08a7": "1.0.16 to 1.0.22",
    "0a540a001bbf510e": "1.0.24",
    "51c7488db59f7108": "1.0.26",
    "8998357684f7a101": "1.0.28 to 1.0.31",
}
_ROPE = {
    "1cbb453bba410e23": "1.0.16 to 1.0.19",
    "fb17412175943b68": "1.0.20 to 1.0.22",
    "dd8a0736b6a29c0f": "1.0.24",
    "8de9fb79927846db": "1.0.26",
    "2225323da37307c7": "1.0.28",
    "e09467827e2b1651": "1.0.30 to 1.0.31",
}


def heads(module: Any) -> tuple[int, int]:
    """Returns the number of heads and the width of each."""
    width = getattr(module, "head_dim", None) or module.qkv.in_features // module.num_heads
    return module.num_heads, width


def fold(model: Any, module: Any, matrix: Any) -> None:
    """Multiplies the projections of query and key by the matrix of the feature map, (heads, d, d).

    Raises:
        RewriteError: A norm stands between projection and scores.
    """
    for name in ("q_norm", "k_norm"):
        if type(getattr(module, name, None)).__name__ not in ("Identity", "NoneType"):
            raise RewriteError(f"its {name} stands between the projections and the scores")
    number, width, _ = matrix.shape
    for tensor in (module.qkv.weight, module.qkv.bias):
        if tensor is not None:
            for first in (0, number * width):  # query, then key, each head's features together
                rows = tensor[first : first + number * width]
                mapped = matrix @ rows.to(matrix.dtype).reshape(number, width, -1)
                rows.copy_(mapped.reshape(rows.shape))


def refuse_to_fold(model: Any, module: Any, matrix: Any) -> None:
    """Raises RewriteError: the rotary embedding stands between."""
    raise RewriteError("a rotary embedding stands between the projections and the scores")


# The functions that make a model, each with its argument that names it; all versions have them.
_MAKERS = {"create_model": "model_name", "build_model_with_cfg": "variant"}


def names_in_call(function: str, variables: Mapping[str, Any]) -> list[str]:
    """Return the names of the model that a function is making, without and with the tag of its weights."""
    return _names(variables.get(_MAKERS[function]), variables.get("pretrained_cfg")) if function in _MAKERS else []


def names_of_model(model: Any) -> list[str]:
    """Return the names of a model that timm has made."""
    configuration = model.__dict__.get("pretrained_cfg")
    return _names(configuration.get("architecture"), configuration) if isinstance(configuration, Mapping) else []


def _names(name: Any, configuration: Any) -> list[str]:
    tag = configuration.get("tag") if isinstance(configuration, Mapping) else configuration
    names = [name, f"{name}.{tag}"] if isinstance(tag, str) and tag else [name]
    return names if isinstance(name, str) and name else []


HOST = Host(
    name="timm",
    install="pip install timm",
    sites=(
        Site("timm.layers.attention", "Attention.forward", attention, _ATTENTION, map_size=heads, fold=fold),
        Site("timm.models.vision_transformer", "Attention.forward", attention, _ATTENTION, map_size=heads, fold=fold),
        Site("timm.layers.attention", "AttentionRope.forward", attention, _ROPE, map_size=heads, fold=refuse_to_fold),
    ),
    required=("Attention.forward",),
    names_in_call=names_in_call,
    names_of_model=names_of_model,
)
