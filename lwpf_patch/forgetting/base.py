"""What a forgetting function is: the pair (D, D') of scores, and what protects it from keys that do not count.

Source: Ota et al., "Learning with Partial Forgetting in Modern Hopfield Networks", AISTATS 2023. A func_d maps scores
``s`` to the pair ``(D(s), D'(s))``: the partially forgotten scores, and the indicator of what is kept, which carries no
gradient. A func_d is mathematics alone; what an attention layer of a host owns beside it is in
:mod:`lwpf_patch.attention.layer`.

Typing is spelled as torch.jit.script reads it.
"""

from typing import Any, Dict

import torch
from torch import Tensor, fx, nn

from .. import tracing
from ..backends import Threshold
from ..backends import eager_form as eager
from ..specs import EMPTY_ROWS


class FuncD(nn.Module):
    """Base class of the forgetting functions. Subclasses define :meth:`forget`.

    Called on scores it gives the two lines of the paper: ``attn, mask = func_d(attn)``, then, after the softmax,
    ``attn = mask * attn``.

    Attributes:
        empty_rows: What becomes of a row that would forget every key: ``"zero"``, as in the paper, gives 0 and no
            gradient to the scores; ``"keep"`` forgets nothing of such a row.
        forgets: False where every score stays as it is, so that plain attention computes the same.
    """

    empty_rows: str
    forgets: bool
    _bears_infinity: bool
    __jit_unused_properties__ = ["empty"]  # noqa: RUF012 - torch.jit.script wants a list

    def __init__(self) -> None:
        super().__init__()
        self.empty_rows = "zero"
        self.forgets = True
        self._bears_infinity = False  # whether forget() gives no NaN where a score is -inf, in its gradient neither

    def forget(self, scores: Tensor, excluded: Tensor | None, training: bool) -> tuple[Tensor, Tensor]:
        """Compute D and D'.

        Args:
            scores: (..., L, S), 0 where a key is excluded.
            excluded: Boolean, broadcastable to the scores; what is returned there does not matter. None: none is.
            training: Whether to draw noise, if this func_d has any.

        Returns:
            D(scores), and D'(scores) as a boolean or 0/1 tensor; both of the scores' shape.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forget(scores, excluded, training)")

    def forget_as_published(self, scores: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Compute D and D' as the official code does, for ``masking="paper"``; hidden keys are just low scores."""
        return self.forget(scores, None, training)

    def threshold(self) -> Threshold | None:
        """Return what the fused backends compute with; None: this func_d keeps no scores above a threshold."""
        return None

    def forward(self, scores: Tensor, training: bool | None = None, dim: int = -1) -> tuple[Tensor, Tensor]:
        """Forget part of the scores.

        Args:
            scores: (..., L, S), with masks already added.
            training: Whether to draw noise; None: as ``self.training`` says.
            dim: The dimension of the keys, over which the softmax runs.

        Returns:
            D(scores), and the mask D'(scores) that multiplies the softmax.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102 - torch.jit.script reads only this form
            if isinstance(scores, fx.Proxy):
                return tracing.call_module(self, scores, training, dim)
        excluded = scores <= eager.lowest(scores.dtype)
        return self.forget_rows(scores, excluded, self.training if training is None else training, "exclude", dim)

    def forget_rows(
        self, scores: Tensor, excluded: Tensor | None, training: bool, masking: str, dim: int
    ) -> tuple[Tensor, Tensor]:
        """Compute D and D' with all that has to be seen to around them: excluded keys, and rows left empty.

        Args:
            scores: (..., L, S).
            excluded: Boolean, broadcastable to the scores; None: no key is excluded.
            training: Whether to draw noise.
            masking: ``"exclude"`` or ``"paper"``; see :func:`lwpf_patch.apply`.
            dim: The dimension of the keys.

        Returns:
            D(scores), -inf where a key is excluded; and D'(scores), False there.
        """
        if masking == "paper":
            excluded = None
            forgotten, mask = self.forget_as_published(scores, training)
        else:
            seen = scores
            if excluded is not None and not self._bears_infinity:
                seen = scores.masked_fill(excluded, 0.0)
            forgotten, mask = self.forget(seen, excluded, training)
        if not torch.jit.is_scripting():
            _check_shapes(scores, forgotten, mask)
        mask = mask.detach()
        if excluded is not None:
            forgotten, mask = eager.exclude(forgotten, mask, excluded, dim)
        if self.empty_rows == "keep":
            forgotten, mask = eager.keep_empty_rows(scores, forgotten, mask, excluded, dim)
        return forgotten, mask

    @property
    def empty(self) -> str:
        """The former name of ``empty_rows``, with the former word ``"plain"`` for ``"keep"``."""
        return "plain" if self.empty_rows == "keep" else self.empty_rows

    @empty.setter
    def empty(self, value: str) -> None:
        self.empty_rows = EMPTY_ROWS.read_from(value, "empty", f" (from {type(self).__name__}.empty = ...)")

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "empty"})  # type: ignore[no-untyped-call]
        if "empty" in state:  # it was pickled when that was the name
            self.empty = state["empty"]

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join([*self._options(), *(["empty_rows=keep"] if self.empty_rows == "keep" else [])])

    def _options(self) -> list[str]:
        return []


def _check_shapes(scores: Tensor, forgotten: Tensor, mask: Tensor) -> None:
    if forgotten.shape != scores.shape or mask.shape != scores.shape:
        raise RuntimeError(
            f"func_d must return (D(s), D'(s)), two tensors of the scores' shape {list(scores.shape)}; it returned "
            f"shapes {list(forgotten.shape)} and {list(mask.shape)}"
        )
