"""PFU, the partial forgetting unit of the paper."""

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from .. import compiling
from ..backends import Threshold
from ..backends import eager_form as eager
from ..errors import UnsupportedError
from ..specs import FUNC_D_OPTIONS, read_empty_rows
from .base import FuncD

_is_in_onnx_export: Callable[[], bool] = compiling.constant(lambda: torch.onnx.is_in_onnx_export())


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
        empty_rows: As for :class:`ReLU`.
        empty: As for :class:`ReLU`.

    Raises:
        SettingsError: A value that is none of these.
    """

    _mu: float | None
    _bias: float | None

    def __init__(
        self,
        *,
        mu: float | str = "dmedian",
        bias: float | str = "mu",
        sigma: float = 0.01,
        empty_rows: str = "zero",
        empty: Optional[str] = None,
    ) -> None:
        super().__init__()
        self._bears_infinity = True
        given = {"mu": mu, "bias": bias, "sigma": sigma}
        options = {
            name: FUNC_D_OPTIONS["pfu"][name].read_from(value, name, f" (from PFU({name}=...))")
            for name, value in given.items()
        }
        self.empty_rows = read_empty_rows(empty_rows, empty, "PFU")
        self._mu = None if options["mu"] == "dmedian" else float(options["mu"])
        self._bias = None if options["bias"] == "mu" else float(options["bias"])
        self.sigma = float(options["sigma"])

    def forget(self, scores: Tensor, excluded: Tensor | None, training: bool) -> tuple[Tensor, Tensor]:
        """Compute D and D'; see :meth:`FuncD.forget`."""
        if not torch.jit.is_scripting():
            self._check_export()
        threshold = eager.find_threshold(scores, excluded, self._mu)
        if training and self.sigma > 0.0:
            noise = torch.randn(1, dtype=torch.float32, device=scores.device).squeeze(0)
            threshold = threshold + (noise * self.sigma**2).to(scores.dtype)
        return eager.forget(scores, threshold, self._bias, self._mu is None)

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

    @torch.jit.unused
    def _check_export(self) -> None:
        """Raise where the median would get into a program that cannot hold it."""
        if self._mu is None and _is_in_onnx_export():
            raise UnsupportedError(
                f"{self} cannot be exported to ONNX, which has no median: give the threshold as a number, mu=<number> "
                "in place of mu=dmedian, the median of all scores"
            )

    def threshold(self) -> Threshold | None:
        """Return the options; see :meth:`FuncD.threshold`."""
        return Threshold(self._mu, self._bias, self.sigma**2)

    def _options(self) -> list[str]:
        mu, bias = ("dmedian" if self._mu is None else self._mu), ("mu" if self._bias is None else self._bias)
        return [f"mu={mu}", f"bias={bias}", f"sigma={self.sigma}"]
