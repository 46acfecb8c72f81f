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

from .. import normalising, tracing, watching
from ..autocasting import in_autocast, without_autocast
from ..backends import Call
from ..backends import eager_form as eager
from ..errors import SettingsError
from ..specs import Sep
from .computing import attend, mark_used, note_backend
from .operator import lwpf_attention, partial_forgetting
from .owned import OwnedFuncD
from .watched import SCRIPTED, miss, show_call, show_scores, show_weights


class HostFuncD(OwnedFuncD):
    """The forgetting function of one attention layer of a host; see :class:`OwnedFuncD` for what it holds."""

    def forward(self, scores: Tensor, training: bool | None = None, dim: int = -1) -> tuple[Tensor, Tensor]:
        """Forget part of the scores, as this layer's settings say; see :meth:`lwpf_patch.FuncD.forward`."""
        if not torch.jit.is_scripting():
            self.settle()
            if has_torch_function_unary(scores):
                return _dispatch_scores(self, scores, training, dim)
            mark_used(self.host_here())
        if self.is_plain():
            forgotten, mask = scores, torch.ones((), dtype=torch.bool, device=scores.device)
        else:
            noisy = self.training if training is None else training
            excluded = None if self.masking == "paper" else scores <= self.highest_hidden(scores)
            forgotten, mask = self.rule.forget_rows(scores, excluded, noisy, self.masking, dim)
        if not torch.jit.is_scripting():  # noqa: SIM102 - torch.jit.script looks for it alone
            if watching.on:
                show_scores(self, scores, forgotten, mask, dim)
        return forgotten, mask

    def normalise(self, scores: Tensor, dim: int = -1) -> Tensor:
        """Normalise scores over their keys, in place of a softmax that is written out.

        Args:
            scores: (..., S), or the keys in another dimension; what :meth:`forward` returned.
            dim: The dimension of the keys.

        Returns:
            The weights, of the scores' shape and dtype.
        """
        alpha, n = self.sep
        if self.left_plain:
            alpha, n = 1.0, 0.0
        if alpha == 1.0 and n == 0.0:
            return scores.softmax(dim)
        if not torch.jit.is_scripting():  # noqa: SIM102 - torch.jit.script looks for it alone
            if isinstance(scores, fx.Proxy):
                return tracing.call_method(self, HostFuncD.normalise.__name__, (scores,), {"dim": dim})
        half = scores.dtype == torch.float16 or scores.dtype == torch.bfloat16
        computed = normalising.normalise((scores.float() if half else scores).transpose(dim, -1), alpha, n)
        return computed.transpose(dim, -1).to(scores.dtype)

    def softmax(self, scores: Tensor, dim: int = -1) -> Tensor:
        """Return attention weights with partial forgetting, in place of ``torch.softmax``: D', times that of D(scores).

        Args:
            scores: (..., S), or the keys in another dimension, with masks already added.
            dim: The dimension of the keys.

        Returns:
            The weights, of the scores' shape and dtype.
        """
        if torch.jit.is_scripting():
            if self.is_plain():
                return scores.softmax(dim)
            forgotten, mask = self.forward(scores, None, dim)
        else:
            self.settle()
            if isinstance(scores, fx.Proxy):
                return tracing.call_method(self, HostFuncD.softmax.__name__, (scores,), {"dim": dim})
            if self.is_plain() and not watching.on and not has_torch_function_unary(scores):
                mark_used(self.host_here())
                return scores.softmax(dim)
            forgotten, mask = self(scores, dim=dim)
        return mask * self.normalise(forgotten, dim)

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
            self.settle()
            if has_torch_function((query, key, value)):
                options = (attn_mask, dropout_p, is_causal, scale, enable_gqa, training)
                return _dispatch_attention(self, query, key, value, *options)
            attn_mask = self.with_infinity(attn_mask)
            call = Call(
                query, key, value, self.rule_here(), attn_mask, dropout_p, is_causal, scale, enable_gqa,
                noisy, self.masking, Sep(*self.sep_here()), self.verify,
            )  # fmt: skip
            output = attend(call, self.backend, self.host_here())
            if watching.on:
                show_call(self, call)
            return output
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

    def attention_with_weights(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention with partial forgetting step by step, with what no fused kernel has.

        Args:
            query: (B, H, L, E).
            key: (B, H, S, E).
            value: (B, H, S, Ev).
            attn_mask: As for :func:`lwpf_patch.lwpf_attention`.
            dropout_p: As there.
            is_causal: As there.
            scale: As there.
            enable_gqa: As there.
            softcap: The bound of the scores before the mask, ``softcap * tanh(s / softcap)``; None: there is none.
            sinks: Scores of keys without a value, (B, H, L, n): they are part of the denominator and are not forgotten.
            head_mask: Multiplies the weights, broadcastable to (B, H, L, S).

        Returns:
            The output, (B, H, L, Ev), and the weights D' * w that multiplied the values, (B, H, L, S).

        Raises:
            SettingsError: A backend was asked for that cannot do that.
        """
        self.settle()
        if self.backend not in ("auto", "eager", "plain") and not self.left_plain:
            raise SettingsError(
                f"backend {self.backend!r} (of {self.host or 'func_d'}) cannot return the attention weights, nor bound "
                "the scores (softcap), nor take sinks or a head mask: use backend='auto' or 'eager'"
            )
        host = self.host_here()
        mark_used(host)
        note_backend(host, "eager", "the weights are asked for, or softcap, sinks or a head mask")
        device = query.device.type
        if in_autocast(device):
            with without_autocast(device):
                return self.attention_with_weights(
                    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, softcap, sinks, head_mask
                )
        dtype = query.dtype
        query, key, value = eager.prepare(query, key, value, enable_gqa)
        scores, _ = eager.attention_scores(query, key, None, False, scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        excluded = None
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            excluded = ~attn_mask
            hidden = torch.finfo(scores.dtype).min if self.is_plain() else float("-inf")
            scores = scores.masked_fill(excluded, hidden)
        elif attn_mask is not None:
            excluded = attn_mask <= self.highest_hidden(attn_mask)
            scores = scores + attn_mask.to(scores.dtype)
        kept: Tensor | None = None
        unforgotten = scores
        if not self.is_plain():
            scores, kept = self.rule.forget_rows(scores, excluded, self.training, self.masking, -1)
        with_sinks = scores if sinks is None else torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
        weights = self.normalise(with_sinks)[..., : scores.size(-1)]
        if watching.on:
            shown = weights if head_mask is None else weights * head_mask
            mask = torch.ones((), dtype=torch.bool, device=scores.device) if kept is None else kept
            show_scores(self, unforgotten, scores, mask, -1, shown)
        if dropout_p > 0.0:
            weights = F.dropout(weights, dropout_p, True)
        weights = weights if kept is None else kept * weights
        weights = weights if head_mask is None else weights * head_mask
        return (weights @ value).to(dtype), weights.to(dtype)

    @torch.jit.unused
    def show_weights(self, weights: Tensor) -> None:
        """Show the weights that several iterations have ended with, before dropout and D', to what watches."""
        if watching.on:
            show_weights(self, weights)

    def passed_with(self, tensor: Any) -> Any:
        """Return this as an argument, beside a tensor, of a function that torch.fx does not look into."""
        self.settle()
        return tracing.as_argument(self, tensor)

    def __prepare_scriptable__(self) -> "HostFuncD":
        if self.why_not_scripted:
            raise SettingsError(
                f"torch.jit.script cannot compile a layer that is patched for {self.host or 'one model alone'}: "
                f"{self.why_not_scripted}; use torch.compile, torch.export or torch.jit.trace, or revert the patch"
            )
        self.settle()
        if self.sep_here()[0] != 1.0:
            raise SettingsError(
                f"sep {Sep(*self.sep)}: torch.jit.script cannot compile sparsemax and entmax; use torch.compile, "
                "torch.export, or a func_d whose sep is 'softmax' or 'softmax_n'"
            )
        # A scripted model no longer runs Python, so that its use can only be seen here, when it is compiled.
        mark_used(self.host_here())
        if watching.on:
            miss(SCRIPTED)
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
