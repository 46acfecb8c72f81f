"""The masks of transformers' models: of which kind they are, and what the attention function makes of them.

A model that would use ``"sdpa"`` without us gets the masks of that: boolean ones, and none where the mask would be
causal and no more, or would hide nothing. All others get those of ``"eager"``, which are added to the scores.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .. import compiling, tracing

#: The configurations of models that read masks of SDPA, by identity: they cannot be hashed.
_readers: dict[int, weakref.ref[Any]] = {}


def set_reader(config: Any, reads: bool) -> None:
    """Say whether the models of a configuration read masks of SDPA."""
    key = id(config)
    _readers.pop(key, None)
    if reads:
        _readers[key] = weakref.ref(config, lambda _: _readers.pop(key, None))


def is_reader(config: Any) -> bool:
    """Return whether the models of a configuration read masks of SDPA."""
    return _is_reader(id(config))


# torch.compile compiles anew for another configuration, by whose identity it asks.
@compiling.constant
def _is_reader(key: int) -> bool:
    return key in _readers


def mask_for(*args: Any, **options: Any) -> Tensor | None:
    """Make the mask of a model, as transformers calls it.

    What is exported gets a mask that is added to the scores: a causality that is left to the attention would hold for
    the lengths of the example alone.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    if is_reader(options.get("config")) and not tracing.is_exporting() and not tracing.is_jit_tracing():
        return sdpa_mask(*args, **options)
    return eager_mask(*args, **options)


def without_unseen_keys(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return keys, values and bias without the keys that no query sees, where query i sees the keys 0 to i.

    Those are the places of a static cache that are still empty: keys beside a causality without a mask.
    """
    length = query.shape[2]
    if key.shape[2] <= length:
        return key, value, bias
    return key[:, :, :length], value[:, :, :length], bias if bias is None else bias[..., :length]


def whole_mask(mask: Tensor | None, bias: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """Return mask and bias in one, of a dtype that goes with the query; None: there is nothing to add or hide."""
    length = key.shape[2]
    if mask is not None and mask.shape[-1] > length:  # of a cache that is longer
        mask = mask[..., :length]
    if bias is not None and bias.shape[-1] > length:
        bias = bias[..., :length]
    if bias is None and (mask is None or mask.dtype in (torch.bool, query.dtype)):
        return mask
    if mask is None and causal:
        mask = torch.ones(query.shape[2], length, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):  # the lowest number of another dtype
        mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf")).to(query.dtype)
    if bias is None or mask is None:
        return mask if bias is None else bias.to(query.dtype)
    bias = bias.to(query.dtype)
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
