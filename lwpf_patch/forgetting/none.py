"""Plain attention under a patched host."""

import math

import torch
from torch import Tensor

from ..backends import Threshold
from .base import FuncD


class NoForgetting(FuncD):
    """Forgets nothing: plain attention, for one model or one block that shall stay as it is under a patched host."""

    def __init__(self) -> None:
        super().__init__()
        self.forgets = False

    def forget(self, scores: Tensor, excluded: Tensor | None, training: bool) -> tuple[Tensor, Tensor]:
        """Return the scores, all kept."""
        return scores, torch.ones_like(scores, dtype=torch.bool)

    def threshold(self) -> Threshold | None:
        """Return a threshold that every score is above, for normalisations other than the softmax."""
        return Threshold(-math.inf, None, 0.0)

    def forward(self, scores: Tensor, training: bool | None = None, dim: int = -1) -> tuple[Tensor, Tensor]:
        """Return the very scores, and a mask of one element that keeps everything."""
        return scores, torch.ones((), dtype=torch.bool, device=scores.device)
