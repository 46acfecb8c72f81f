"""Steps on tiles by operators that PyTorch has for derivatives of its own, several times as fast as public ones.

What they do with a NaN, with part of a larger tensor, or where the result takes the place of an argument, nobody has
promised. So each is tried before its first use, and stays where it does what the plain form of the step does; else that
form takes its place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten: Any = torch.ops.aten

#: What is tried: a row that does not fill the registers of a processor, and one that is longer.
_DTYPES, _KEYS = (torch.float32, torch.float64), (1, 37)


def _argument(layout: str, dtype: torch.dtype, keys: int, odd: list[float], generator: torch.Generator) -> Tensor:
    """Make an argument for a step: some of its figures are what thresholds are, and some odd ones.

    Args:
        layout: ``"d"``, dense; ``"p"``, part of a larger tensor; ``"1"``, a single number, repeated.
        dtype: Of the figures.
        keys: Figures in a row.
        odd: Figures that it has besides.
        generator: Draws the others.
    """
    if layout == "1":
        return torch.ones((), dtype=dtype, device="cpu").expand(2, 3, keys)
    tensor = torch.empty((2, 3, keys), dtype=dtype, device="cpu")
    if layout == "p":
        tensor = torch.empty((3, 5, keys + 3), dtype=dtype, device="cpu")[:2, 1:4, :keys]
    tensor.copy_(torch.randint(-4, 5, tensor.shape, generator=generator, device="cpu") / 8)
    if odd:
        tensor[0, : len(odd), keys // 2] = torch.tensor(odd, dtype=dtype, device="cpu")
    return tensor


class Step:
    """A step in its fast form, where that does what the plain form does.

    Args:
        fast: Takes tensors, numbers, and ``out``.
        plain: The same by public operators.
        uses: How it is used: the layouts of the tensors, and which of them the result takes the place of, if any.
        numbers: Numbers to try.
        odd: Figures to try, besides ordinary ones.
    """

    def __init__(
        self,
        fast: Callable[..., Tensor],
        plain: Callable[..., Tensor],
        uses: tuple[tuple[str, int | None], ...],
        numbers: tuple[float, ...],
        odd: list[float],
    ) -> None:
        self._fast, self._plain, self._uses, self._numbers, self._odd = fast, plain, uses, numbers, odd

    def __call__(self, *arguments: Any, out: Tensor) -> Tensor:
        """Return ``out``."""
        return (self._fast if self.is_fast else self._plain)(*arguments, out=out)

    # Not at import: the first operators in parallel start a process's threads, and a script may fork before that.
    @functools.cached_property
    def is_fast(self) -> bool:
        """Whether the fast form does what the plain one does."""
        try:
            with torch.no_grad():
                return all(self._agree(dtype, keys, *use) for dtype in _DTYPES for keys in _KEYS for use in self._uses)
        except Exception:  # the operator is gone, or wants other arguments
            return False

    def _agree(self, dtype: torch.dtype, keys: int, layouts: str, place: int | None) -> bool:
        generator = torch.Generator("cpu").manual_seed(0)
        given = [_argument(layout, dtype, keys, self._odd, generator) for layout in layouts]
        wanted = self._plain(*given, *self._numbers, out=torch.empty(2, 3, keys, dtype=dtype, device="cpu"))
        out = torch.full_like(wanted, 9.0) if place is None else given[place]
        self._fast(*given, *self._numbers, out=out)
        return bool((out.nan_to_num(9.0) - wanted.nan_to_num(9.0)).abs().amax() < 1e-5)


_ODD = [math.nan, math.inf, -math.inf]


def _raise_to(scores: Tensor, a: float, b: float, out: Tensor) -> Tensor:
    return aten.threshold.out(scores, a, b, out=out)


def _raise_to_plainly(scores: Tensor, a: float, b: float, out: Tensor) -> Tensor:
    return out.copy_(scores.masked_fill(scores <= a, b))


#: (scores, a, b, out): copies the scores, b in place of those that are at most a.
raise_to = Step(_raise_to, _raise_to_plainly, (("d", None), ("d", 0), ("p", None), ("p", 0)), (0.25, -0.5), _ODD)


def _keep(weights: Tensor, scores: Tensor, a: float, out: Tensor) -> Tensor:
    return aten.threshold_backward.grad_input(weights, scores, a, grad_input=out)


def _keep_plainly(weights: Tensor, scores: Tensor, a: float, out: Tensor) -> Tensor:
    return out.copy_(weights.masked_fill(scores <= a, 0))


#: (weights, scores, a, out): copies the weights, 0 in place of those whose scores are at most a.
keep = Step(_keep, _keep_plainly, (("dd", 0), ("dd", 1), ("dp", 1), ("1d", None), ("1p", None)), (0.25,), _ODD)


def _keep_inside(weights: Tensor, scores: Tensor, low: float, high: float, out: Tensor) -> Tensor:
    return aten.hardtanh_backward.grad_input(weights, scores, low, high, grad_input=out)


def _keep_inside_plainly(weights: Tensor, scores: Tensor, low: float, high: float, out: Tensor) -> Tensor:
    return out.copy_(weights.masked_fill((scores <= low) | (scores >= high), 0))


#: (weights, scores, low, high, out): copies the weights, 0 where the scores, none of them NaN, are not in between.
keep_inside = Step(_keep_inside, _keep_inside_plainly, (("1d", None), ("1p", None)), (-0.25, 0.25), _ODD[1:])


def _softmax(scores: Tensor, out: Tensor) -> Tensor:
    return torch.softmax(scores, -1, out=out)


def _softmax_plainly(scores: Tensor, out: Tensor) -> Tensor:
    return out.copy_(torch.softmax(scores.contiguous(), -1))


#: (scores, out): the softmax of the scores.
softmax = Step(_softmax, _softmax_plainly, (("d", None), ("p", None)), (), [-math.inf])


def _softmax_backward(grad: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    return aten._softmax_backward_data.out(grad, weights, -1, grad.dtype, grad_input=out)


def _softmax_backward_plainly(grad: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    return out.copy_((grad - (grad * weights).sum(-1, keepdim=True)) * weights)


#: (grad, weights, out): the gradient of the softmax's argument, from that of its result.
softmax_backward = Step(_softmax_backward, _softmax_backward_plainly, (("dd", 0), ("dp", 0)), (), [])
