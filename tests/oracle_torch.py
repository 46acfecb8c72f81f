"""PyTorch's and torchvision's attention with partial forgetting, written out as the specification of the tests.

It calls nothing of the package, and of the modules it only reads the parameters and options: what is forgotten is
computed by `oracle.attention`, one query row at a time, in float64.
"""

from __future__ import annotations

import itertools
import math

import torch
from oracle import Forgetting, attention
from torch import Tensor, nn


def multihead_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    func_d: Forgetting,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    dropout_keep: Tensor | None = None,
    feature_map: Tensor | None = None,
    **more,
) -> tuple[Tensor, Tensor]:
    """What nn.MultiheadAttention gives.

    Args:
        module: The module, float64.
        query: Shape (L, N, E), (N, L, E) with batch_first, or (L, E).
        key: As the query.
        value: As the query.
        func_d: What is forgotten.
        key_padding_mask: (N, S) or (S): boolean (True hides) or additive.
        attn_mask: (L, S) or (N heads, L, S): boolean (True hides) or additive.
        average_attn_weights: Whether the weights are averaged over the heads.
        dropout_keep: Boolean, (N, heads, L, S), where S counts the keys that the module adds. None is no dropout.
        feature_map: The matrices of U-Hop's Φ, (heads, width, width).
        **more: Options of `oracle.attention`.

    Returns:
        The output, and the weights after dropout and D': (N, L, S), or (N, heads, L, S).
    """
    batched = query.dim() == 3
    if not batched:
        query, key, value = (each[None] for each in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not module.batch_first:
        query, key, value = (each.movedim(1, 0) for each in (query, key, value))
    size, heads = module.embed_dim, module.num_heads
    if module.in_proj_weight is not None:
        weights = [module.in_proj_weight[part * size : (part + 1) * size] for part in range(3)]
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    projected = []
    for part, (each, weight) in enumerate(zip((query, key, value), weights, strict=True)):
        rows = each @ weight.T
        projected.append(
            rows if module.in_proj_bias is None else rows + module.in_proj_bias[part * size : (part + 1) * size]
        )
    batch, length, keys = query.shape[0], query.shape[1], key.shape[1]
    added = 0
    if module.bias_k is not None:
        for part, extra in ((1, module.bias_k), (2, module.bias_v)):
            projected[part] = torch.cat([projected[part], extra.reshape(1, 1, size).expand(batch, 1, size)], dim=1)
        added += 1
    if module.add_zero_attn:
        for part in (1, 2):
            projected[part] = torch.cat([projected[part], projected[part].new_zeros(batch, 1, size)], dim=1)
        added += 1
    q, k, v = (torch.stack(each.split(size // heads, dim=-1), dim=1) for each in projected)
    if feature_map is not None:
        q, k = (torch.stack([each[:, head] @ feature_map[head].T for head in range(heads)], dim=1) for each in (q, k))

    mask = torch.zeros(batch, heads, length, keys + added, dtype=torch.float64)
    if attn_mask is not None:
        wide = attn_mask if attn_mask.dim() == 2 else attn_mask.reshape(batch, heads, length, keys)
        mask[..., :keys] += _additive(wide)
    if key_padding_mask is not None:
        mask[..., :keys] += _additive(key_padding_mask)[:, None, None]
    if attn_mask is None and key_padding_mask is None:
        mask = None
    options = dict(func_d=func_d, attn_mask=mask, dropout_keep=dropout_keep, dropout_p=module.dropout, **more)
    mixed = torch.cat(attention(q, k, v, **options).unbind(1), dim=-1) @ module.out_proj.weight.T
    if module.out_proj.bias is not None:
        mixed = mixed + module.out_proj.bias
    # What reads each value by itself gives the weights.
    found = attention(q, k, torch.eye(keys + added, dtype=torch.float64), **options)
    if average_attn_weights:
        found = sum(found.unbind(1)) / heads
    if not batched:
        return mixed[0], found[0]
    return (mixed if module.batch_first else mixed.movedim(0, 1)), found


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -math.inf)


def swin_attention(
    module: nn.Module,
    x: Tensor,
    *,
    func_d: Forgetting,
    feature_map: Tensor | None = None,
    dropout_keep: Tensor | None = None,
    masking: str = "exclude",
    **more,
) -> Tensor:
    """What torchvision's ShiftedWindowAttention gives, that of images (V1 and V2) or of videos.

    Args:
        module: The module, float64; its dropout is taken to be 0.
        x: (B, H, W, C), or (B, T, H, W, C).
        func_d: What is forgotten.
        feature_map: The matrices of U-Hop's Φ, (heads, width, width).
        dropout_keep: Boolean, (B, windows, heads, N, N); its rate is module.attention_dropout. None is no dropout.
        masking: "exclude" takes keys of other regions of a window out; "paper" scores them 100 lower.
        **more: Options of `oracle.attention`.

    Returns:
        Of the shape of x.
    """
    heads, channels = module.num_heads, x.shape[-1]
    width = channels // heads
    extent = x.shape[1:-1]
    # A window that covers everything is not shifted; that of a video is made smaller, too.
    window = [min(w, e) if len(extent) == 3 else w for w, e in zip(module.window_size, extent, strict=True)]
    padded = [-(-e // w) * w for e, w in zip(extent, window, strict=True)]
    shift = [0 if p <= w else s for p, w, s in zip(padded, window, module.shift_size, strict=True)]

    # For each window of the shifted grid: the places that it shows, and the region of each.
    windows = []
    for corner in itertools.product(*(range(0, p, w) for p, w in zip(padded, window, strict=True))):
        places, regions = [], []
        for offset in itertools.product(*(range(w) for w in window)):
            at = [c + o for c, o in zip(corner, offset, strict=True)]
            places.append(tuple((a + s) % p for a, s, p in zip(at, shift, padded, strict=True)))
            # What the shift has brought round the edge is a region of its own, and so is what it has met there.
            regions.append(tuple(_region(*each) for each in zip(at, padded, window, shift, strict=True)))
        windows.append((places, regions))

    def token(item: int, place: tuple[int, ...]) -> Tensor:
        inside = all(p < e for p, e in zip(place, extent, strict=True))
        return x[(item, *place)] if inside else x.new_zeros(channels)

    shown = [[[token(item, place) for place in places] for places, _ in windows] for item in range(len(x))]
    tokens = torch.stack([torch.stack([torch.stack(each) for each in of_item]) for of_item in shown])
    bias_of_qkv = module.qkv.bias
    cosine = hasattr(module, "logit_scale")
    if cosine and bias_of_qkv is not None:
        bias_of_qkv = torch.cat(
            [bias_of_qkv[:channels], torch.zeros(channels, dtype=x.dtype), bias_of_qkv[2 * channels :]]
        )
    projected = tokens @ module.qkv.weight.T
    projected = projected if bias_of_qkv is None else projected + bias_of_qkv
    q, k, v = (torch.stack(each.split(width, dim=-1), dim=2) for each in projected.split(channels, dim=-1))
    if cosine:
        q, k = (each / each.norm(dim=-1, keepdim=True).clamp(min=1e-12) for each in (q, k))
    if feature_map is not None:
        q, k = (torch.stack([each[:, :, h] @ feature_map[h].T for h in range(heads)], dim=2) for each in (q, k))
    q = q * (module.logit_scale.clamp(max=math.log(100.0)).exp() if cosine else width**-0.5)

    offsets = list(itertools.product(*(range(w) for w in window)))
    bias = torch.stack([torch.stack([_relative(module, a, b) for b in offsets]) for a in offsets]).movedim(-1, 0)
    hidden = torch.tensor([[[a != b for b in regions] for a in regions] for _, regions in windows])
    lower = bias - 100.0 if masking == "paper" else torch.full_like(bias, -math.inf)
    mask = torch.where(hidden[:, None], lower, bias)
    options = dict(func_d=func_d, attn_mask=mask[None], scale=1.0, masking=masking, dropout_keep=dropout_keep, **more)
    if dropout_keep is not None:
        options["dropout_p"] = module.attention_dropout
    mixed = torch.cat(attention(q, k, v, **options).unbind(2), dim=-1) @ module.proj.weight.T + module.proj.bias

    rows: dict[tuple[int, ...], Tensor] = {}
    for number, (places, _) in enumerate(windows):
        for index, place in enumerate(places):
            rows[place] = mixed[:, number, index]
    ordered = torch.stack([rows[place] for place in itertools.product(*(range(e) for e in extent))], dim=1)
    return ordered.reshape(x.shape)


def _region(at: int, padded: int, window: int, shift: int) -> int:
    if shift == 0:
        return 0
    return 2 if at >= padded - shift else 1 if at >= padded - window else 0


def _relative(module: nn.Module, query: tuple[int, ...], key: tuple[int, ...]) -> Tensor:
    """The bias of a pair of places in a window, for each head."""
    sizes = module.window_size
    index = 0
    for a, b, size in zip(query, key, sizes, strict=True):
        index = index * (2 * size - 1) + (a - b + size - 1)
    if not hasattr(module, "logit_scale"):
        return module.relative_position_bias_table[index]
    first, _, last = module.cpb_mlp
    place = torch.tensor([8.0 * (a - b) / (size - 1) for a, b, size in zip(query, key, sizes, strict=True)])
    place = (place.sign() * (place.abs() + 1).log2() / 3).to(first.weight)  # the table of the module is float32
    return 16 * torch.sigmoid((place @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T)
