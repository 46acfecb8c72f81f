"""A small instance of each of timm's attention classes, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm import layers
from timm.layers import (
    attention2d,
    attention_pool,
    attention_pool2d,
    bottleneck_attn,
    diff_attention,
    halo_attn,
    other_pool,
)  # fmt: skip
from timm.models import (
    beit,
    cait,
    convit,
    cpubone,
    crossvit,
    davit,
    efficientformer,
    efficientformer_v2,
    efficientvit_msra,
    eva,
    fastvit,
    gcvit,
    gemma4_vit,
    hiera,
    hieradet_sam2,
    iformer,
    levit,
    lowformer,
    maxxvit,
    metaformer,
    mvitv2,
    nest,
    nextvit,
    pvt_v2,
    shvit,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    tiny_vit,
    tnt,
    twins,
    visformer,
    vision_transformer,
    vision_transformer_relpos,
    vision_transformer_sam,
    volo,
)  # fmt: skip
from torch import Tensor, nn


class Case(NamedTuple):
    """An instance.

    Attributes:
        make: Makes it, and returns it with its inputs.
        hidden: The keys that these inputs hide.
        halves: Whether each head has two softmaxes, with a median each.
    """

    make: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    hidden: Tensor | None = None
    halves: bool = False


def x(*shape: int) -> Tensor:
    return torch.randn(*shape)


#: Two windows of 16 tokens, the second one cut in two.
SHIFTED = torch.zeros(2, 16, 16)
SHIFTED[1, :8, 8:] = SHIFTED[1, 8:, :8] = -100.0
_HIDDEN = (SHIFTED < 0)[:, None]
_HIDDEN_EVERYWHERE = _HIDDEN.repeat(2, 1, 1, 1)

IMAGE, TOKENS = (2, 24, 4, 4), (2, 16, 24)


def _rope() -> Tensor:
    return layers.RotaryEmbeddingCat(8, in_pixels=False, feat_shape=[4, 4], ref_feat_shape=[4, 4]).get_embed()


def _gemma() -> tuple[nn.Module, tuple[Any, ...]]:
    angles = x(2, 16, 16)
    return gemma4_vit.Gemma4Attention(24, 3, 16, 1), (x(*TOKENS), angles.cos(), angles.sin())


_bias = {"window_size": (4, 4)}

CASES = {
    "layers.attention.Attention": Case(
        lambda: (layers.Attention(24, 3, qk_norm=True, norm_layer=nn.LayerNorm), (x(*TOKENS),))
    ),
    "layers.attention.AttentionRope": Case(
        lambda: (layers.AttentionRope(24, 3, num_prefix_tokens=0), (x(*TOKENS), _rope()))
    ),
    "layers.attention2d.Attention2d": Case(lambda: (attention2d.Attention2d(24, num_heads=3), (x(*IMAGE),))),
    "layers.attention2d.MultiQueryAttention2d": Case(
        lambda: (attention2d.MultiQueryAttention2d(24, num_heads=3, key_dim=8, kv_stride=2), (x(*IMAGE),))
    ),
    "layers.attention2d.MultiQueryAttentionV2": Case(
        lambda: (attention2d.MultiQueryAttentionV2(24, num_heads=3, key_dim=8, value_dim=4), (x(*IMAGE),))
    ),
    "layers.attention_pool.AttentionPoolLatent": Case(
        lambda: (attention_pool.AttentionPoolLatent(24, num_heads=3, latent_len=2), (x(*TOKENS),))
    ),
    "layers.attention_pool.AttentionPoolPrr": Case(lambda: (attention_pool.AttentionPoolPrr(24, 3), (x(*TOKENS),))),
    "layers.attention_pool2d.AttentionPool2d": Case(
        lambda: (attention_pool2d.AttentionPool2d(24, 4, num_heads=3, head_dim=8), (x(*IMAGE),))
    ),
    "layers.attention_pool2d.RotAttentionPool2d": Case(
        lambda: (attention_pool2d.RotAttentionPool2d(24, ref_feat_size=4, num_heads=3, head_dim=8), (x(*IMAGE),))
    ),
    "layers.bottleneck_attn.BottleneckAttn": Case(
        lambda: (bottleneck_attn.BottleneckAttn(24, feat_size=(4, 4), num_heads=3, dim_head=8), (x(*IMAGE),))
    ),
    "layers.diff_attention.DiffAttention": Case(
        lambda: (diff_attention.DiffAttention(24, 3), (x(*TOKENS),)), halves=True
    ),
    "layers.halo_attn.HaloAttn": Case(
        lambda: (halo_attn.HaloAttn(24, num_heads=3, dim_head=8, block_size=2, halo_size=1), (x(*IMAGE),))
    ),
    "layers.non_local_attn.NonLocalAttn": Case(lambda: (layers.NonLocalAttn(24), (x(*IMAGE),))),
    "layers.other_pool.SimPool1d": Case(lambda: (other_pool.SimPool1d(24, 3), (x(*TOKENS),))),
    "layers.other_pool.SimPool2d": Case(lambda: (other_pool.SimPool2d(24, 3), (x(*IMAGE),))),
    "models.beit.Attention": Case(lambda: (beit.Attention(24, 3, qkv_bias=True, window_size=(4, 4)), (x(2, 17, 24),))),
    "models.cait.ClassAttn": Case(lambda: (cait.ClassAttn(24, 3), (x(*TOKENS),))),
    "models.cait.TalkingHeadAttn": Case(lambda: (cait.TalkingHeadAttn(24, 3), (x(*TOKENS),))),
    "models.convit.GPSA": Case(lambda: (convit.GPSA(24, 3), (x(*TOKENS),))),
    "models.convit.MHSA": Case(lambda: (convit.MHSA(24, 3, qkv_bias=True), (x(*TOKENS),))),
    "models.cpubone.ConvAttention": Case(
        lambda: (cpubone.ConvAttention(16, att_stride=2, att_kernel=3), (x(2, 16, 4, 4),))
    ),
    "models.crossvit.CrossAttention": Case(lambda: (crossvit.CrossAttention(24, 3, qkv_bias=True), (x(*TOKENS),))),
    "models.davit.WindowAttention": Case(lambda: (davit.WindowAttention(24, (4, 4), 3), (x(*TOKENS),))),
    "models.efficientformer.Attention": Case(
        lambda: (efficientformer.Attention(24, 8, 3, resolution=4), (x(*TOKENS),))
    ),
    "models.efficientformer_v2.Attention2d": Case(
        lambda: (efficientformer_v2.Attention2d(24, 8, 3, resolution=(4, 4)), (x(*IMAGE),))
    ),
    "models.efficientformer_v2.Attention2dDownsample": Case(
        lambda: (efficientformer_v2.Attention2dDownsample(24, 8, 3, resolution=(4, 4), out_dim=8), (x(*IMAGE),))
    ),
    "models.efficientvit_msra.CascadedGroupAttention": Case(
        lambda: (efficientvit_msra.CascadedGroupAttention(24, 4, 3, 2, 4, kernels=(3, 3, 3)), (x(*IMAGE),))
    ),
    "models.eva.EvaAttention": Case(
        lambda: (eva.EvaAttention(24, 3, num_prefix_tokens=0, scale_norm=False), (x(*TOKENS), _rope()))
    ),
    "models.fastvit.Attention": Case(lambda: (fastvit.Attention(24, 8, qkv_bias=True), (x(*IMAGE),))),
    "models.gcvit.WindowAttentionGlobal": Case(
        lambda: (gcvit.WindowAttentionGlobal(24, 3, (4, 4)), (x(4, 16, 24), x(2, 16, 24)))
    ),
    "models.gemma4_vit.Gemma4Attention": Case(_gemma),
    "models.hiera.MaskUnitAttention": Case(
        lambda: (hiera.MaskUnitAttention(24, 24, 3, q_stride=2, window_size=4, use_mask_unit_attn=True), (x(*TOKENS),))
    ),
    "models.hieradet_sam2.MultiScaleAttention": Case(
        lambda: (hieradet_sam2.MultiScaleAttention(24, 24, 3, nn.MaxPool2d(2)), (x(2, 4, 4, 24),))
    ),
    "models.iformer.SHMA": Case(lambda: (iformer.SHMA(24), (x(*IMAGE),))),
    "models.levit.Attention": Case(lambda: (levit.Attention(24, 8, 3, resolution=(4, 4)), (x(*TOKENS),))),
    "models.levit.AttentionDownsample": Case(
        lambda: (levit.AttentionDownsample(24, 16, 8, 3, resolution=(4, 4), use_conv=True), (x(*IMAGE),))
    ),
    "models.lowformer.ConvAttention": Case(
        lambda: (lowformer.ConvAttention(16, att_stride=2, att_kernel=3), (x(2, 16, 4, 4),))
    ),
    "models.maxxvit.Attention2d": Case(
        lambda: (
            maxxvit.Attention2d(24, dim_head=8, rel_pos_cls=lambda **more: layers.RelPosBias((4, 4), **more)),
            (x(*IMAGE),),
        )
    ),
    "models.maxxvit.AttentionCl": Case(lambda: (maxxvit.AttentionCl(24, dim_head=8), (x(2, 4, 4, 24),))),
    "models.metaformer.Attention": Case(lambda: (metaformer.Attention(24, 8, qkv_bias=True), (x(*TOKENS),))),
    "models.mvitv2.MultiScaleAttention": Case(
        lambda: (
            mvitv2.MultiScaleAttention(24, 24, (4, 4), 3, stride_kv=(2, 2), kernel_kv=(3, 3)),
            (x(2, 17, 24), [4, 4]),
        )
    ),
    "models.nest.Attention": Case(lambda: (nest.Attention(24, 3), (x(2, 2, 16, 24),))),
    "models.nextvit.EfficientAttention": Case(
        lambda: (nextvit.EfficientAttention(24, head_dim=8, sr_ratio=2).eval(), (x(*TOKENS),))
    ),
    "models.pvt_v2.Attention": Case(lambda: (pvt_v2.Attention(24, 3, sr_ratio=2), (x(*TOKENS), [4, 4]))),
    "models.shvit.SHSA": Case(lambda: (shvit.SHSA(24, 8, 8), (x(*IMAGE),))),
    "models.swin_transformer.WindowAttention": Case(
        lambda: (swin_transformer.WindowAttention(24, 3, **_bias), (x(4, 16, 24), SHIFTED)), _HIDDEN_EVERYWHERE
    ),
    "models.swin_transformer_v2.WindowAttention": Case(
        lambda: (swin_transformer_v2.WindowAttention(24, (4, 4), 3), (x(4, 16, 24), SHIFTED)), _HIDDEN_EVERYWHERE
    ),
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention": Case(
        lambda: (swin_transformer_v2_cr.WindowMultiHeadAttention(24, 3, (4, 4)).eval(), (x(4, 16, 24), SHIFTED)),
        _HIDDEN_EVERYWHERE,
    ),
    "models.tiny_vit.Attention": Case(lambda: (tiny_vit.Attention(24, 8, 3, resolution=(4, 4)), (x(*TOKENS),))),
    "models.tnt.Attention": Case(lambda: (tnt.Attention(24, 24, 3, qkv_bias=True), (x(*TOKENS),))),
    "models.twins.GlobalSubSampleAttn": Case(
        lambda: (twins.GlobalSubSampleAttn(24, 3, sr_ratio=2), (x(*TOKENS), (4, 4)))
    ),
    "models.twins.LocallyGroupedAttn": Case(lambda: (twins.LocallyGroupedAttn(24, 3, ws=2), (x(*TOKENS), (4, 4)))),
    "models.visformer.Attention": Case(lambda: (visformer.Attention(24, 3), (x(*IMAGE),))),
    "models.vision_transformer.DiffParallelScalingBlock": Case(
        lambda: (vision_transformer.DiffParallelScalingBlock(24, 3), (x(*TOKENS),)), halves=True
    ),
    "models.vision_transformer.ParallelScalingBlock": Case(
        lambda: (vision_transformer.ParallelScalingBlock(24, 3), (x(*TOKENS),))
    ),
    "models.vision_transformer_relpos.RelPosAttention": Case(
        lambda: (
            vision_transformer_relpos.RelPosAttention(
                24, 3, rel_pos_cls=lambda **more: layers.RelPosBias((4, 4), **more)
            ),
            (x(*TOKENS),),
        )
    ),
    "models.vision_transformer_sam.Attention": Case(
        lambda: (vision_transformer_sam.Attention(24, 3, use_rel_pos=True, input_size=(4, 4)), (x(2, 4, 4, 24),))
    ),
    "models.volo.Attention": Case(lambda: (volo.Attention(24, 3, qkv_bias=True), (x(2, 4, 4, 24),))),
    "models.volo.ClassAttention": Case(lambda: (volo.ClassAttention(24, 3, qkv_bias=True), (x(*TOKENS),))),
    "models.volo.OutlookAttention": Case(lambda: (volo.OutlookAttention(24, 3), (x(2, 4, 4, 24),))),
}


def made(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Makes an instance in float64, with scores and outputs that are not near 0, as timm starts with."""
    module, inputs = CASES[name].make()
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    moved = tuple(each.double() if isinstance(each, Tensor) else each for each in inputs)
    return module.double(), moved
