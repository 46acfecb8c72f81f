"""The func_d of an attention layer, as the patched code of a host calls it: ``self.func_d``.

It is called in the two forms that attention has: around a softmax that is written out, and in place of
``scaled_dot_product_attention``. Everything about torch.jit.script, torch.fx and ``__torch_function__`` is here.

Typing is spelled as torch.jit.script reads it.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from .. import normalising, tracing
from ..backends import Call
from ..backends import eager_form as eager
from ..errors import SettingsError
from ..specs import Sep
from .computing import attend, mark_used
from .operator import lwpf_attention, partial_forgetting
from .owned import OwnedFuncD


class HostFuncD(OwnedFuncD):
    """The forgetting function of one attention layer of a host; see :class:`OwnedFuncD` for what it holds."""

    def forward(self, scores: Tensor, training: bool | None = None, dim: int = -1) -> tuple[Tensor, Tensor]:
        """Forget part of the scores, as this layer's settings say; see :meth:`lwpf_patch.FuncD.forward`."""
        if not torch.jit.is_scripting():
            if has_torch_function_unary(scores):
                return _dispatch_scores(self, scores, training, dim)
            mark_used(self.host)
        if self.is_plain():
            return scores, torch.ones((), dtype=torch.bool, device=scores.device)
        noisy = self.training if training is None else training
        excluded = None if self.masking == "paper" else scores <= self.highest_hidden(scores)
        return self.rule.forget_rows(scores, excluded, noisy, self.masking, dim)

    def normalise(self, scores: Tensor, dim: int = -1) -> Tensor:
        """Normalise scores over their keys, in place of a softmax that is written out.

        Args:
            scores: (..., S), or the keys in another dimension; what :meth:`forward` returned.
            dim: The dimension of the keys.

        Returns:
            The weights, of the scores' shape and dtype.
        """
        alpha, n = self.sep
        if alpha == 1.0 and n == 0.0:
            return scores.softmax(dim)
        if not torch.jit.is_scripting():  # noqa: SIM102 - torch.jit.script looks for it alone
            if isinstance(scores, fx.Proxy):
                return tracing.call_method(self, HostFuncD.normalise.__name__, (scores,), {"dim": dim})
        half = scores.dtype == torch.float16 or scores.dtype == torch.bfloat16
        computed = normalising.normalise((scores.float() if half else scores).transpose(dim, -1), alpha, n)
        return computed.transpose(dim, -1).to(scores.dtype)

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        training: bool | None = None,
    ) -> Tensor:
        """Compute attention with partial forgetting, in place of ``torch.nn.functional.scaled_dot_product_attention``.

        See :func:`lwpf_patch.lwpf_attention` for the arguments. ``training`` is that of this module where it is None.
        """
        noisy = self.training if training is None else training
        if not torch.jit.is_scripting():
            if has_torch_function((query, key, value)):
                options = (attn_mask, dropout_p, is_causal, scale, enable_gqa, training)
                return _dispatch_attention(self, query, key, value, *options)
            attn_mask = self.with_infinity(attn_mask)
            call = Call(
                query, key, value, self.rule, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                noisy, self.masking, Sep(*self.sep), self.verify,
            )  # fmt: skip
            return attend(call, self.backend, self.host)
        # What the backends "plain" and "eager" do, as torch.jit.script reads it.
        if self.is_plain():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        dtype = query.dtype
        attn_mask = self.with_infinity(attn_mask)
        query, key, value = eager.prepare(query, key, value, enable_gqa)
        scores, excluded = eager.attention_scores(query, key, attn_mask, is_causal, scale)
        forgotten, mask = self.rule.forget_rows(scores, excluded, noisy, self.masking, -1)
        return eager.retrieve(forgotten, mask, value, dropout_p, self.sep[0], self.sep[1]).to(dtype)

    def passed_with(self, tensor: Any) -> Any:
        """Return this as an argument, beside a tensor, of a function that torch.fx does not look into."""
        return tracing.as_argument(self, tensor)

    def __prepare_scriptable__(self) -> "HostFuncD":
        if self.why_not_scripted:
            raise SettingsError(
                f"torch.jit.script cannot compile a layer that is patched for {self.host or 'one model alone'}: "
                f"{self.why_not_scripted}; use torch.compile, torch.export or torch.jit.trace, or revert the patch"
            )
        if self.sep[0] != 1.0:
            raise SettingsError(
                f"sep {Sep(*self.sep)}: torch.jit.script cannot compile sparsemax and entmax; use torch.compile, "
                "torch.export, or a func_d whose sep is 'softmax' or 'softmax_n'"
            )
        # A scripted model no longer runs Python, so that its use can only be seen here, when it is compiled.
        mark_used(self.host)
        return self


def _dispatch_scores(func_d: HostFuncD, scores: Any, training: bool | None, dim: int) -> Any:
    """Hand the call to a tensor-like argument."""
    if isinstance(scores, fx.Proxy):
        return tracing.call_module(func_d, scores, training, dim)
    return handle_torch_function(partial_forgetting, (scores,), scores, func_d=func_d, training=training, dim=dim)


def _dispatch_attention(func_d: HostFuncD, query: Any, key: Any, value: Any, *options: Any) -> Any:
    """Hand the call to tensor-like arguments."""
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "training")
    given = dict(zip(names, options, strict=True))
    if isinstance(query, fx.Proxy):
        method = HostFuncD.scaled_dot_product_attention.__name__
        return tracing.call_method(func_d, method, (query, key, value), given)
    return handle_torch_function(lwpf_attention, (query, key, value), query, key, value, func_d=func_d, **given)
