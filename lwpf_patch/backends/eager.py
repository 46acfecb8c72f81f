"""The eager backend: the specification, with the scores in memory; every other backend is compared with it."""

from __future__ import annotations

from torch import Tensor

from . import eager_form
from .base import Backend, Call


class Eager(Backend):
    """Computes everything, step by step as the papers write it; see :mod:`lwpf_patch.backends.eager_form`."""

    name = "eager"
    can_be_transformed = True

    def why_not(self, call: Call) -> str | None:
        """Return None: it can compute every call."""
        return None

    def compute(self, call: Call) -> Tensor:
        """Compute a call; see :meth:`Backend.compute`."""
        query, key, value = eager_form.prepare(call.query, call.key, call.value, call.enable_gqa)
        scores, excluded = eager_form.attention_scores(query, key, call.attn_mask, call.is_causal, call.scale)
        forgotten, mask = call.rule.forget_rows(scores, excluded, call.training, call.masking, -1)
        return eager_form.retrieve(forgotten, mask, value, call.dropout_p, *call.sep).to(call.query.dtype)
