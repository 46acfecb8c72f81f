"""Plain attention, for a func_d that forgets nothing."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .base import Backend, Call


class Plain(Backend):
    """Calls ``torch.nn.functional.scaled_dot_product_attention``, which has the softmax only."""

    name = "plain"
    can_be_transformed = True

    def why_not(self, call: Call) -> str | None:
        """Return why it cannot compute a call; None: it can."""
        if call.rule.forgets:
            return f"{call.rule} forgets, and plain attention does not"
        return None if call.is_plain() else "sep other than 'softmax' is not plain attention"

    def compute(self, call: Call) -> Tensor:
        """Compute a call; see :meth:`Backend.compute`."""
        return F.scaled_dot_product_attention(
            call.query, call.key, call.value, call.attn_mask, call.dropout_p, call.is_causal,
            scale=call.scale, enable_gqa=call.enable_gqa,
        )  # fmt: skip
