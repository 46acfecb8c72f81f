"""timm's vision transformers: ``Attention`` and ``AttentionRope``, with their fused and their eager branch."""

from __future__ import annotations

from typing import Any

from ..edits import attention
from ..errors import FoldError
from ..rewriting import Folding, Site
from .base import Host, multiply_rows

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


def projections(model: Any, module: Any) -> list[str]:
    """Returns the names of the parameters that make queries and keys.

    Raises:
        FoldError: A norm stands between projection and scores.
    """
    for name in ("q_norm", "k_norm"):
        if type(getattr(module, name, None)).__name__ not in ("Identity", "NoneType"):
            raise FoldError(f"its {name} stands between the projections and the scores")
    return ["qkv.weight", "qkv.bias"]


def multiply(module: Any, matrix: Any) -> None:
    """Multiplies the projections of query and key, each of which has the rows of a head together."""
    size = matrix.shape[0] * matrix.shape[1]
    for tensor in (module.qkv.weight, module.qkv.bias):
        if tensor is not None:
            multiply_rows(tensor[:size], matrix)
            multiply_rows(tensor[size : 2 * size], matrix)


def example(module: Any) -> tuple[Any, ...]:
    """Returns random tokens."""
    import torch

    return (torch.randn(1, 8, module.qkv.in_features, dtype=torch.float64, device="cpu"),)


def refuse_to_fold(model: Any, module: Any) -> list[str]:
    """Raises FoldError: the rotary embedding stands between."""
    raise FoldError("a rotary embedding stands between the projections and the scores")


_FOLDING = Folding(projections, multiply, example)
_NO_FOLDING = Folding(refuse_to_fold, multiply, example)

HOST = Host(
    name="timm",
    install="pip install timm",
    sites=(
        Site("timm.layers.attention", "Attention.forward", attention, _ATTENTION, map_size=heads, folding=_FOLDING),
        Site(
            "timm.models.vision_transformer",
            "Attention.forward",
            attention,
            _ATTENTION,
            map_size=heads,
            folding=_FOLDING,
        ),
        Site("timm.layers.attention", "AttentionRope.forward", attention, _ROPE, map_size=heads, folding=_NO_FOLDING),
    ),
    required=("Attention.forward",),
)
