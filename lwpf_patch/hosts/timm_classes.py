"""timm's attention classes, a line each: those whose softmax runs over keys, and those that are refused, and why.

Syntax cannot tell whether a softmax runs over keys; these tables are that judgement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..hosting import (
    Attachment,
    Edit,
    FeatureMapAttachment,
    Folding,
    FuncDAttachment,
    HostModule,
    Site,
    forget_around_softmax,
    hide,
    map_query,
)
from . import known
from . import timm_folding as fold
from .timm_edits import forget_content, forget_in_both, forget_over_the_third, map_before_branches


@dataclass(frozen=True)
class _Class:
    """A class with softmax attention.

    Attributes:
        module: The module that defines it, relative to timm; of layers, the name in ``timm.layers``.
        name: The class, and the method if it is not ``forward``.
        folding: How a feature map of U-Hop is folded; None: it has none, since its queries and keys are not of the
            shape (batch, heads, tokens, width), or something else than their product depends on them.
        heads: Returns the number of heads and the width of each.
        forget: The edit that brings func_d in.
        map: The edit that brings the feature map in.
        mask: The parameter that has -100 for hidden keys.
        layout: What the dimensions of its scores are; see :class:`lwpf_patch.attention.owned.OwnedFuncD`.
    """

    module: str
    name: str
    folding: Folding | None = None
    heads: Callable[[HostModule], tuple[int, int]] = fold.heads
    forget: Edit = forget_around_softmax
    map: Edit = map_query
    mask: str = ""
    layout: str = ""

    def sites(self) -> Iterator[Site]:
        """Yield the class where versions of timm have it."""
        attachments: list[Attachment] = [FuncDAttachment(edit=self.forget, layout=self.layout)]
        if self.folding is not None:
            attachments.append(FeatureMapAttachment(edit=self.map, shape=self.heads, folding=self.folding))
        qualname = self.name if "." in self.name else f"{self.name}.forward"
        former = self.module.replace("layers.", "models.layers.")  # up to 0.6
        key = "" if former == self.module else f"timm.{self.module}.{qualname}"
        for module in dict.fromkeys((self.module, former)):
            function = f"timm.{module}.{qualname}"
            edit = hide(self.mask, -100.0) if self.mask else None
            known_sources = known.sources("timm", key or function)
            yield Site(f"timm.{module}", qualname, known_sources, tuple(attachments), edit, key)


_CLASSES = (
    _Class("layers.attention", "AttentionRope", fold.ROTARY),
    _Class("layers.attention2d", "Attention2d"),
    _Class("layers.attention2d", "MultiQueryAttention2d"),
    _Class("layers.attention2d", "MultiQueryAttentionV2", layout="bqhk"),
    _Class("layers.attention_pool", "AttentionPoolLatent", fold.NO_FOLDING),
    _Class("layers.attention_pool", "AttentionPoolPrr"),
    _Class("layers.attention_pool2d", "AttentionPool2d", fold.NO_FOLDING),
    _Class("layers.attention_pool2d", "RotAttentionPool2d", fold.ROTARY),
    _Class("layers.bottleneck_attn", "BottleneckAttn"),
    _Class("layers.diff_attention", "DiffAttention", fold.TOKENS, fold.twice_as_many_heads,
           forget_in_both, map_before_branches),
    _Class("layers.halo_attn", "HaloAttn", layout="(bh)wqk"),
    _Class("layers.non_local_attn", "NonLocalAttn", forget=forget_over_the_third),
    _Class("layers.other_pool", "SimPool1d", fold.NO_FOLDING),
    _Class("layers.other_pool", "SimPool2d", fold.NO_FOLDING),
    _Class("models.beit", "Attention", fold.NO_FOLDING),
    _Class("models.cait", "ClassAttn", fold.TOKENS),
    _Class("models.cait", "TalkingHeadAttn"),
    _Class("models.convit", "GPSA.get_attention", forget=forget_content),
    _Class("models.convit", "MHSA", fold.TOKENS),
    _Class("models.cpubone", "ConvAttention", fold.INTERLEAVED),
    _Class("models.crossvit", "CrossAttention", fold.TOKENS),
    _Class("models.davit", "WindowAttention", fold.TOKENS),
    _Class("models.efficientformer", "Attention", fold.INTERLEAVED),
    _Class("models.efficientformer_v2", "Attention2d"),
    _Class("models.efficientformer_v2", "Attention2dDownsample"),
    _Class("models.efficientvit_msra", "CascadedGroupAttention", layout="bqk"),
    _Class("models.eva", "EvaAttention", fold.ROTARY),
    _Class("models.fastvit", "Attention", fold.IMAGE),
    _Class("models.gcvit", "WindowAttentionGlobal", fold.NO_FOLDING),
    _Class("models.gemma4_vit", "Gemma4Attention", fold.ROTARY),
    _Class("models.hiera", "MaskUnitAttention", layout="bhwqk"),
    _Class("models.hieradet_sam2", "MultiScaleAttention", fold.NO_FOLDING),
    _Class("models.iformer", "SHMA"),
    _Class("models.levit", "Attention"),
    _Class("models.levit", "AttentionDownsample"),
    _Class("models.levit", "AttentionSubsample"),
    _Class("models.lowformer", "ConvAttention", fold.INTERLEAVED),
    _Class("models.maxxvit", "Attention2d"),
    _Class("models.maxxvit", "AttentionCl", fold.NO_FOLDING),
    _Class("models.metaformer", "Attention", fold.TOKENS),
    _Class("models.mvitv2", "MultiScaleAttention"),
    _Class("models.nest", "Attention", layout="bhwqk"),
    _Class("models.nextvit", "EfficientAttention", fold.SIXTY_FOUR),
    _Class("models.pvt_v2", "Attention", fold.SIZED),
    _Class("models.shvit", "SHSA"),
    _Class("models.swin_transformer", "WindowAttention", fold.WINDOW, mask="mask"),
    _Class("models.swin_transformer_v2", "WindowAttention", mask="mask"),
    _Class("models.swin_transformer_v2_cr", "WindowMultiHeadAttention", mask="mask"),
    _Class("models.swin_transformer_v2_cr", "WindowMultiHeadAttention._forward_batch", mask="mask"),
    _Class("models.tiny_vit", "Attention", fold.INTERLEAVED),
    _Class("models.tnt", "Attention", fold.TOKENS),
    _Class("models.twins", "GlobalSubSampleAttn", fold.SIZED),
    _Class("models.twins", "LocallyGroupedAttn"),
    _Class("models.visformer", "Attention", fold.NO_FOLDING),
    _Class("models.vision_transformer", "DiffParallelScalingBlock", fold.SHARED, fold.twice_as_many_heads,
           forget_in_both, map_before_branches),
    _Class("models.vision_transformer", "ParallelScalingBlock", fold.SHARED),
    _Class("models.vision_transformer_relpos", "RelPosAttention", fold.NO_FOLDING),
    _Class("models.vision_transformer_sam", "Attention", fold.NO_FOLDING),
    _Class("models.volo", "Attention", fold.ROWS),
    _Class("models.volo", "ClassAttention", fold.TOKENS),
    _Class("models.volo", "OutlookAttention", layout="bhwqk"),
)  # fmt: skip

_ATTENTION = (FuncDAttachment(), FeatureMapAttachment(shape=fold.heads, folding=fold.TOKENS))

SITES = (
    *(
        Site(f"timm.{module}", "Attention.forward", known.sources("timm", "Attention.forward"), _ATTENTION,
             one_of="Attention.forward", required=True)
        for module in ("layers.attention", "models.vision_transformer")
    ),
    *(site for each in _CLASSES for site in each.sites()),
)  # fmt: skip

_CHANNELS = "its softmax runs over channels: no key is there to be forgotten"
_LINEAR = "its attention is linear: the softmax normalises features or positions, and no weight is one of a key"

#: Classes with a softmax that is left as it is, and why.
REFUSED = {
    "timm.layers.lambda_layer.LambdaLayer": _LINEAR,
    "timm.models.coat.FactorAttnConvRelPosEnc": _LINEAR,
    "timm.models.csatv2.SpatialTransformerBlock": "it attends over the batch: q, k and v have no dimension of features",
    "timm.models.davit.ChannelAttention": _CHANNELS,
    "timm.models.davit.ChannelAttentionV2": _CHANNELS,
    "timm.models.edgenext.CrossCovarianceAttn": _CHANNELS,
    "timm.models.efficientvim.HSMSSD": _LINEAR,
    "timm.models.mobilevit.LinearSelfAttention": _LINEAR,
    "timm.models.mvitv2.MultiScaleAttentionPoolFirst": "it fails as it is written: its keys are not transposed",
    "timm.models.xcit.XCA": _CHANNELS,
}

#: Classes with a softmax that is not one of attention.
NO_ATTENTION = frozenset({
    "timm.layers.global_context.GlobalContext",
    "timm.layers.selective_kernel.SelectiveKernelAttn",
    "timm.layers.split_attn.RadixSoftmax",
    "timm.models.efficientvim.EfficientViM",
    "timm.models.efficientvim.EfficientViMDistilled",
})  # fmt: skip
