"""timm's vision transformers: ``Attention`` and ``AttentionRope``, with their fused and their eager branch."""

from __future__ import annotations

from ..edits import attention
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

HOST = Host(
    name="timm",
    install="pip install timm",
    sites=(
        Site("timm.layers.attention", "Attention.forward", attention, _ATTENTION),
        Site("timm.models.vision_transformer", "Attention.forward", attention, _ATTENTION),
        Site("timm.layers.attention", "AttentionRope.forward", attention, _ROPE),
    ),
    required=("Attention.forward",),
)
