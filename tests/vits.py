"""Small models of timm that hold its two attention classes, and what the package's func_ds mean to the oracle."""

from __future__ import annotations

import torch
from oracle import Forgetting
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

#: Text of a func_d, and the same for the oracle; without noise.
FUNC_DS = {
    "relu": Forgetting("relu"),
    "pfu:mu=0.05,bias=-0.2,sigma=0": Forgetting("pfu", 0.05, -0.2),
    "pfu:mu=dmedian,bias=mu,sigma=0": Forgetting("pfu", "dmedian", "mu"),
}


def vit(**options) -> VisionTransformer:
    """A vision transformer with 17 tokens, made of timm's Attention."""
    return _lively(
        VisionTransformer(img_size=16, patch_size=4, num_classes=5, embed_dim=24, depth=2, num_heads=3, **options)
    )


def rope(**options) -> Eva:
    """One of rotary embeddings, made of timm's AttentionRope."""
    model = Eva(
        img_size=16, patch_size=4, num_classes=5, embed_dim=24, depth=2, num_heads=3, use_rot_pos_emb=True,
        attn_type="rope", **options,
    )  # fmt: skip
    return _lively(model)


def _lively(model: torch.nn.Module) -> torch.nn.Module:
    # timm starts with scores and outputs near 0, which would hide what attention does.
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    # In float64 no rounding moves a score across a threshold, so that two ways to compute one thing can be compared.
    return model.double()


MODELS = {"Attention": vit, "AttentionRope": rope}


def images(count: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, dtype=dtype)


def set_fused(model: torch.nn.Module, fused: bool) -> None:
    """Chooses the branch of every attention module."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def feature_maps(model: torch.nn.Module) -> list:
    """The feature maps of U-Hop that a model has."""
    return [module for module in model.modules() if type(module).__name__.endswith("HostFeatureMap")]


def randomise_maps(model: torch.nn.Module, size: float = 0.2) -> None:
    """Gives the feature maps what they could have after Stage I."""
    for each in feature_maps(model):
        torch.nn.init.normal_(each.weight, std=size)
        each.steps.fill_(1)
        each.take_settings(each.settings)
