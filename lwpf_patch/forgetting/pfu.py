"""PFU, the partial forgetting unit of the paper."""

import torch
from torch import Tensor

from ..backends import Threshold
from ..settings import parse_func_d
from .base import FuncD


class PFU(FuncD):
    """Partial forgetting unit: forgets the scores that are at most a threshold ``a``.

    ``D(s)`` is ``s`` where ``s > a`` and ``bias(a)`` elsewhere; ``D'(s) = 1[s > a]``; ``a = mu(s) + eps``, where
    ``eps`` is normal with standard deviation ``sigma ** 2`` in training and 0 in evaluation. The defaults are the
    published setting.

    Args:
        mu: The threshold: a number, or ``"dmedian"``, the median of the whole score tensor of the call, through which
            gradient flows. It couples the items of a batch, in evaluation too.
        bias: What a forgotten score becomes: a number, or ``"mu"``, the threshold itself.
        sigma: Square root of the noise's standard deviation (that is what the official code does).
        empty: As for :class:`ReLU`.

    Raises:
        SettingsError: A value that is none of these.
    """

    _mu: float | None
    _bias: float | None

    def __init__(
        self,
        bias: float | str = "mu",
        mu: float | str = "dmedian",
        sigma: float = 0.01,
        empty: str = "zero",
    ) -> None:
        super().__init__()
        self._bears_infinity = True
        _, options = parse_func_d(f"pfu:bias={bias},mu={mu},sigma={sigma},empty={empty}", "PFU()")
        self.empty = empty
        self._mu = None if options["mu"] == "dmedian" else float(options["mu"])
        self._bias = None if options["bias"] == "mu" else float(options["bias"])
        self.sigma = float(options["sigma"])

    def _threshold_of(self, scores: Tensor, excluded: Tensor | None, training: bool) -> Tensor:
        """Compute the threshold ``a`` of this call.

        Args:
            scores: (..., L, S).
            excluded: Boolean, broadcastable to the scores: not counted by the median. None: every score counts.
            training: Whether to add noise.

        Returns:
            A scalar tensor of the scores' dtype. NaN if a score that counts is NaN.
        """
        mu = self._mu
        if mu is not None:
            threshold = torch.full((), mu, dtype=scores.dtype, device=scores.device)
        elif excluded is None:
            threshold = scores.median()
        else:
            counted = scores.masked_fill(excluded, float("nan")).nanmedian()
            broken = (scores.isnan() & ~excluded).any()
            threshold = counted.masked_fill(broken, float("nan"))
        if training and self.sigma > 0.0:
            noise = torch.randn(1, dtype=torch.float32, device=scores.device).squeeze(0)
            threshold = threshold + (noise * self.sigma**2).to(scores.dtype)
        return threshold

    def forget(self, scores: Tensor, excluded: Tensor | None, training: bool) -> tuple[Tensor, Tensor]:
        """Compute D and D'; see :meth:`FuncD.forget`."""
        threshold = self._threshold_of(scores, excluded, training)
        bias = self._bias
        forgotten = threshold if bias is None else torch.full_like(threshold, bias)
        # A tie is forgotten and a NaN is not hidden: both follow from asking for s <= a.
        return torch.where(scores <= threshold, forgotten, scores), scores > threshold

    def forget_as_published(self, scores: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Compute D and D' as the official code does: its order of operations, its draw, its ``0 * -inf = NaN``."""
        mu = self._mu
        threshold = scores.median() if mu is None else torch.full((), mu, dtype=scores.dtype, device=scores.device)
        if training:
            threshold = threshold + torch.randn(1).to(scores.device) * self.sigma**2
        h = (scores - threshold).relu()
        mask = torch.heaviside(h, torch.zeros_like(h)).detach()
        bias = self._bias
        forgotten = threshold if bias is None else torch.full_like(threshold, bias)
        # The official code promotes half precision to float32 here, in training only; ours stays in the scores' dtype.
        return (mask * scores + (1.0 - mask) * forgotten).to(scores.dtype), mask.to(scores.dtype)

    def threshold(self) -> Threshold | None:
        """Return the options; see :meth:`FuncD.threshold`."""
        return Threshold(self._mu, self._bias, self.sigma**2)

    def _options(self) -> list[str]:
        mu, bias = ("dmedian" if self._mu is None else self._mu), ("mu" if self._bias is None else self._bias)
        return [f"mu={mu}", f"bias={bias}", f"sigma={self.sigma}"]
