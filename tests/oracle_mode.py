"""An oracle for modules that are not patched: attention with partial forgetting wherever one calls a softmax.

It takes the place of `torch.softmax` and `scaled_dot_product_attention` while a module runs as its library wrote it,
and so shares nothing with what rewrites that library. Float64, written out with masks.
"""

from __future__ import annotations

import math
import sys
from types import FrameType

import torch
from oracle import Forgetting
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ForgettingSoftmax(TorchFunctionMode):
    """Has every softmax forget.

    Args:
        func_d: What is forgotten.
        hidden: The keys that a mask hides, broadcastable to the scores; those of -inf are hidden as well.
        gram: Φ^T Φ of U-Hop, (heads, d, d), which multiplies the queries; None: there is none.
        halves: Whether each head has two softmaxes, each with its median: in calls that take turns, or in one.
    """

    def __init__(self, func_d: Forgetting, hidden: Tensor | None = None, gram: Tensor | None = None, halves=False):
        super().__init__()
        self.func_d, self.hidden, self.gram, self.halves = func_d, hidden, gram, halves
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self.attention(*args, **kwargs)
        if name == "softmax" and args[0] is not caller().f_locals.get("pos_score"):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            assert dim in (-1, args[0].dim() - 1), dim
            if self.halves:
                return torch.stack([self.weights(args[0][:, half::2]) for half in (0, 1)], dim=2).flatten(1, 2)
            return self.weights(args[0])
        if self.gram is not None and name in ("matmul", "__matmul__") and makes_scores(*args):
            return func(self.mapped(args[0]), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        assert not dropout_p
        assert not is_causal
        if self.gram is not None:
            query = query @ self.gram[self.calls % 2 :: 2] if self.halves else self.mapped(query)
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self.weights(scores) @ value

    def mapped(self, query: Tensor) -> Tensor:
        if query.dim() == 3:  # items and heads in one dimension
            return (query.unflatten(0, (-1, len(self.gram))) @ self.gram).flatten(0, 1)
        return query @ self.gram

    def weights(self, scores: Tensor) -> Tensor:
        self.calls += 1
        seen = scores > torch.finfo(scores.dtype).min
        if self.hidden is not None:
            seen = seen & ~self.hidden
        forgotten = scores.new_zeros(())
        kept = scores > 0
        if self.func_d.kind == "pfu":
            threshold = scores.new_tensor(0.0 if self.func_d.mu == "dmedian" else self.func_d.mu)
            if self.func_d.mu == "dmedian":
                median = scores[seen].median()
                tied = scores[seen & (scores == median)]
                threshold = (tied - tied.detach()).mean() + median.detach()
            forgotten = threshold if self.func_d.bias == "mu" else scores.new_tensor(self.func_d.bias)
            kept = scores > threshold.detach()
        numbers = torch.where(kept, scores, forgotten).masked_fill(~seen, -math.inf)
        exponentials = (numbers - numbers.detach().amax(-1, keepdim=True)).exp()
        return exponentials / exponentials.sum(-1, keepdim=True) * (kept & seen)


def makes_scores(left: Tensor, right: Tensor) -> bool:
    """Tells whether a product is that of what the module that is at work calls q, perhaps scaled, with its k."""
    query, key = (caller().f_locals.get(name) for name in "qk")
    return isinstance(query, Tensor) and left.shape == query.shape and torch.equal(right, key.transpose(-2, -1))


def caller() -> FrameType:
    """Returns the frame of the module that is at work: the first one outside of torch and of this file."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame
