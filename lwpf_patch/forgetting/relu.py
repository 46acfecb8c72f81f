"""ReLU as a forgetting function."""

from typing import Optional

import torch
from torch import Tensor

from ..backends import Threshold
from ..specs import read_empty_rows
from .base import FuncD


class ReLU(FuncD):
    """Forgets the scores that are not positive: ``D(s) = max(s, 0)``, ``D'(s) = 1[s > 0]``.

    A row whose scores are all at most 0 forgets everything: its output, and every gradient through it, is 0.

    Args:
        empty_rows: ``"zero"``, or ``"keep"`` for rows that forget nothing where they would forget everything; see
            :class:`FuncD`.
        empty: The former name of ``empty_rows``; its former word for ``"keep"`` is ``"plain"``.

    Raises:
        SettingsError: A value that is neither.

    Example:
        >>> import torch, lwpf_patch
        >>> lwpf_patch.ReLU()(torch.tensor([[-1.0, 0.0, 2.0]]))
        (tensor([[0., 0., 2.]]), tensor([[False, False,  True]]))
    """

    def __init__(self, empty_rows: str = "zero", *, empty: Optional[str] = None) -> None:
        super().__init__()
        self._bears_infinity = True
        self.empty_rows = read_empty_rows(empty_rows, empty, "ReLU")

    def forget(self, scores: Tensor, excluded: Tensor | None, training: bool) -> tuple[Tensor, Tensor]:
        """Compute D and D'; see :meth:`FuncD.forget`."""
        return scores.relu(), scores > 0

    def forget_as_published(self, scores: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Compute D and D' as the official code does."""
        forgotten = scores.relu()
        return forgotten, torch.heaviside(forgotten, torch.zeros_like(forgotten)).detach()

    def threshold(self) -> Threshold | None:
        """Return the threshold 0; see :meth:`FuncD.threshold`."""
        return Threshold(0.0, 0.0, 0.0)
