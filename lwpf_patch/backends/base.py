"""What a backend is: one way to compute the operator. And the call that it computes, as one value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import tracing
from ..specs import Sep


class Threshold(NamedTuple):
    """A func_d that keeps the scores above a threshold ``a = mu + eps``, as the fused backends compute it.

    Attributes:
        mu: The threshold without noise; None: the median of all scores of the call.
        bias: What a forgotten score becomes; None: the threshold itself.
        deviation: The standard deviation of the normal noise eps, drawn in training.
    """

    mu: float | None
    bias: float | None
    deviation: float


class Rule(Protocol):
    """What a backend asks of a forgetting function; see :class:`lwpf_patch.FuncD`."""

    empty_rows: str
    forgets: bool

    def threshold(self) -> Threshold | None:
        """Return the threshold, if the function keeps the scores above one."""

    def forget_rows(
        self, scores: Tensor, excluded: Tensor | None, training: bool, masking: str, dim: int
    ) -> tuple[Tensor, Tensor]:
        """Return D(scores) and D'(scores)."""


class Call(NamedTuple):
    """A call of the operator; shapes as for :func:`lwpf_patch.lwpf_attention`.

    Attributes:
        query: (..., L, E).
        key: (..., S, E).
        value: (..., S, Ev).
        rule: The forgetting function.
        attn_mask: Broadcastable to (..., L, S): boolean (True takes part), or additive; None: there is none.
        dropout_p: Probability that a weight is dropped.
        is_causal: Whether query i sees the keys 0 to i only.
        scale: Factor of the scores, None for ``E ** -0.5``.
        enable_gqa: Whether several query heads share a key and value head.
        training: Whether it draws its noise.
        masking: ``"exclude"`` or ``"paper"``.
        sep: The normalisation.
        verify: When a backend that needs it is checked against the eager form: ``"first"``, at the first call of each
            case; ``"always"``; or ``"off"``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rule: Rule
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    training: bool = False
    masking: str = "exclude"
    sep: Sep = Sep()
    verify: str = "first"

    def is_plain(self) -> bool:
        """Return whether this is plain attention: nothing is forgotten, and the softmax normalises."""
        return not self.rule.forgets and self.sep.alpha == 1.0 and self.sep.n == 0.0

    def noise(self, threshold: Threshold) -> Tensor | None:
        """Draw the noise of the threshold, (), float32; None where there is none."""
        if not self.training or threshold.deviation <= 0.0:
            return None
        return torch.randn(1, dtype=torch.float32, device=self.query.device).squeeze(0) * threshold.deviation


class Backend(ABC):
    """One way to compute the operator.

    Attributes:
        name: What users call it.
        device: The kind of device that ``"auto"`` takes it for; empty: none.
        can_be_transformed: Whether torch.func, forward-mode differentiation and second derivatives can see through it.
    """

    name: str
    device = ""
    can_be_transformed = False

    @abstractmethod
    def why_not(self, call: Call) -> str | None:
        """Return why it cannot compute a call, in words that follow a colon; None: it can."""

    def why_rather_not(self, call: Call) -> str | None:
        """Return why ``"auto"`` should pass it over although it can compute a call; None: it should not."""
        return None

    @abstractmethod
    def compute(self, call: Call) -> Tensor:
        """Compute a call that it can compute: (..., L, Ev), of the query's dtype."""


class FusedBackend(Backend):
    """A backend that computes without the scores in memory, for a func_d with a threshold."""

    def why_not(self, call: Call) -> str | None:
        """Return why it cannot compute a call; None: it can."""
        if call.sep.alpha != 1.0:
            return "sep other than 'softmax' and 'softmax_n' needs a row's scores together"
        if tracing.is_exporting() or (tracing.is_jit_tracing() and torch.onnx.is_in_onnx_export()):
            # Such a program shall run without this package, on other devices, and for other sizes: none is looked at.
            return "the program is being exported"
        if type(call.query) not in (torch.Tensor, torch.nn.Parameter):
            return f"the query is a {type(call.query).__name__}"
        reason = self.why_not_here(call)
        if reason is not None:
            return reason
        threshold = call.rule.threshold()
        if threshold is None:
            return f"{call.rule} is not of the form s > a"
        if call.rule.empty_rows != "zero":
            return "empty_rows='keep' needs a row's scores together"
        if call.masking != "exclude":
            return f"masking {call.masking!r} is computed as the official code does it, by the eager backend only"
        return self.why_not_trusted(call, threshold)

    def why_not_trusted(self, call: Call, threshold: Threshold) -> str | None:
        """Return why what it computes of a call may be wrong; None: nothing is known against it."""
        return None

    @abstractmethod
    def why_not_here(self, call: Call) -> str | None:
        """Return why it cannot compute with such tensors, on such a device; None: it can."""

    def compute(self, call: Call) -> Tensor:
        """Compute a call; see :meth:`Backend.compute`."""
        threshold = call.rule.threshold()
        assert threshold is not None
        return self.compute_threshold(call, threshold.mu, threshold.bias, call.noise(threshold))

    @abstractmethod
    def compute_threshold(self, call: Call, mu: float | None, bias: float | None, eps: Tensor | None) -> Tensor:
        """Compute a call whose func_d keeps the scores above ``a = mu + eps``.

        Args:
            call: The call; its rule has done its part.
            mu: The threshold without noise; None: the median of all scores.
            bias: What a forgotten score becomes; None: the threshold.
            eps: The noise, a scalar, float32; None: none.

        Returns:
            The output, (..., L, Ev), of the query's dtype.
        """
