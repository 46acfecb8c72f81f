"""The eager attention of a transformers model with partial forgetting, in plain PyTorch.

It stands in for ``eager_attention_forward`` of an unpatched model, and calls nothing of the package.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from oracle import Forgetting
from torch import Tensor


def eager_attention(forgetting: Forgetting):
    """Returns a function with the signature of transformers' eager attention."""

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, position_bias=None,
               softcap=None, **options):  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        key, value = (torch.stack([each] * groups, 2).flatten(1, 2) for each in (key, value))
        scores = torch.einsum("bhle,bhse->bhls", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if position_bias is not None:
            scores = scores + position_bias
        visible = torch.ones_like(scores, dtype=torch.bool)
        if attention_mask is not None:
            seen = attention_mask[..., : key.shape[2]]
            # eager masks are 0 or the lowest number there is
            visible = (seen if seen.dtype == torch.bool else seen == 0).expand_as(scores)
        weights = forgotten_softmax(scores, visible, forgetting, options.get("s_aux"))
        weights = torch.nn.functional.dropout(weights, dropout, module.training)
        return torch.einsum("bhls,bhse->blhe", weights, value), weights

    return attend


def forgotten_softmax(scores: Tensor, visible: Tensor, forgetting: Forgetting, sinks: Tensor | None = None) -> Tensor:
    """Returns D' * softmax(D) over the visible keys; a sink is a further term of the denominator."""
    if forgetting.kind == "none":
        kept, new = visible, scores
    elif forgetting.kind == "relu":
        kept, new = visible & (scores > 0), scores.clamp(min=0)
    else:
        threshold = forgetting.mu
        if threshold == "dmedian":
            counted = scores[visible].sort().values
            threshold = counted[(len(counted) - 1) // 2]
        kept = visible & (scores > threshold)
        new = torch.where(scores > threshold, scores, threshold if forgetting.bias == "mu" else forgetting.bias)
    highest = new.detach().abs().max()
    terms = torch.where(visible, (new - highest).exp(), 0.0)
    total = terms.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - highest).exp().view(1, -1, 1, 1)
    return torch.where(kept, terms / torch.where(total == 0, 1.0, total), 0.0)


def modeling_files(model) -> list[ModuleType]:
    """Returns the modules of transformers that define the attention of a model."""
    names = {type(module).__module__ for module in model.modules()}
    return [sys.modules[name] for name in names if hasattr(sys.modules[name], "eager_attention_forward")]
