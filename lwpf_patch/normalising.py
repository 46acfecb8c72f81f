"""The normalisations that stand in for the softmax: those of U-Hop, Sep, and softmax_n.

Sep is alpha-entmax, of which sparsemax is one end: Wu et al., ICML 2024, section 3; Peters, Niculae and Martins,
"Sparse Sequence-to-Sequence Models", ACL 2019, whose package ``entmax`` computes it. softmax_n adds n to the
denominator of the softmax, so that a row may give less than 1 in all; n = 1 is also called "softmax1" or "off by one".

Typing of :func:`softmax_n` is spelled as torch.jit.script reads it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import compiling, transforms
from .errors import SettingsError


def softmax_n(scores: Tensor, n: float) -> Tensor:
    """Compute ``exp(s_j) / (n + sum_k exp(s_k))`` over the last dimension.

    This is the softmax with a further score, log n, that is dropped afterwards: no score is too high or too low.

    Args:
        scores: (..., S), float32 or float64. A row whose every score is -inf gives 0.
        n: Above 0.

    Returns:
        The weights, (..., S), of sum below 1.
    """
    further = torch.nn.functional.pad(scores, (0, 1), value=math.log(n))
    return further.softmax(-1)[..., :-1]


def normalise(scores: Tensor, alpha: float, n: float) -> Tensor:
    """Normalise scores (..., S) over their last dimension; see :func:`softmax_n` and :func:`entmax`.

    Args:
        scores: (..., S).
        alpha: Of alpha-entmax; 1 is the softmax.
        n: What is added to the denominator of the softmax; 0 where alpha is above 1.
    """
    return softmax_n(scores, n) if n > 0.0 else entmax(scores, alpha)


@torch.jit.unused  # a scripted model has the softmax and softmax_n only
def entmax(scores: Tensor, alpha: float) -> Tensor:
    """Normalise scores over their last dimension: ``Sep_alpha(scores)``.

    The weights are not negative and sum to 1. With alpha above 1 the scores far below a row's highest get exactly 0.
    Derivatives are right up to the third, in reverse and in forward mode.

    Args:
        scores: (..., S), float32 or float64. A key whose score is -inf has weight 0 and gradient 0.
        alpha: From 1, the softmax, to 2, the sparsemax. Other values than 1, 1.5 and 2 are found by bisection, and
            lose digits near 1: about 1 / (alpha - 1) times the rounding error of the dtype.

    Returns:
        The weights, (..., S). Rows whose every score is -inf give 0; rows with a NaN or inf, NaN.

    Raises:
        SettingsError: The package ``entmax`` is not installed.
    """
    if scores.shape[-1] == 0:
        return scores
    top = scores.detach().amax(-1, keepdim=True)
    hidden, empty = scores == -torch.inf, top == -torch.inf
    broken = top.isnan() | (top == torch.inf)
    scores = (scores - top).masked_fill(empty | broken, 0.0)
    weights = scores.softmax(-1) if alpha == 1.0 else _entmax(scores, alpha)
    return weights.masked_fill(hidden, 0.0).masked_fill(broken, torch.nan)


def _entmax(scores: Tensor, alpha: float) -> Tensor:
    # The highest score of a row is 0 here. Weights are 0 from 1 / (alpha - 1) below it on. Lower scores are as good as
    # that far down, and keep their size (which may be inf) out of the sums.
    scores = scores.clamp(min=-2.0 / (alpha - 1.0))
    return _plain_entmax(scores, alpha) if transforms.are_active() else _fast_entmax(scores, alpha)


class _Entmax(torch.autograd.Function):
    """The package's functions, with a gradient that has one."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: float) -> Tensor:
        import entmax

        if alpha == 2.0:
            weights = entmax.sparsemax(scores, dim=-1)
        elif alpha == 1.5:
            weights = entmax.entmax15(scores, dim=-1)
        else:  # each iteration gives a binary digit of the threshold
            weights = entmax.entmax_bisect(scores, alpha, dim=-1, n_iter=_iterations(scores))
        ctx.save_for_backward(scores, weights)
        ctx.alpha = alpha
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        scores, weights = ctx.saved_tensors
        if transforms.recompute(grad):
            return transforms.gradients(lambda s: _plain_entmax(s, ctx.alpha), (scores,), (True,), grad)[0], None
        slopes = weights.pow(2.0 - ctx.alpha).masked_fill(weights == 0, 0.0)
        inner = grad * slopes
        return inner - slopes * (inner.sum(-1, keepdim=True) / slopes.sum(-1, keepdim=True)), None


# torch.compile cannot look into the functions of entmax, and need not.
@compiling.opaque
def _fast_entmax(scores: Tensor, alpha: float) -> Tensor:
    try:
        import entmax  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"sep with alpha = {alpha:g}: other normalisations than the softmax need the package entmax, which cannot "
            f"be imported ({error}): pip install 'lwpf_patch[entmax]'"
        ) from error
    return _Entmax.apply(scores, alpha)


def _iterations(scores: Tensor) -> int:
    """Return how many binary digits of the threshold to find; it lies within 1 below the highest score."""
    return 60 if scores.dtype == torch.float64 else 30


def _plain_entmax(scores: Tensor, alpha: float) -> Tensor:
    """Compute alpha-entmax by operators that can be transformed, and differentiated three times.

    ``max(0, (alpha - 1) s - tau) ** (1 / (alpha - 1))``, where tau has the weights sum to 1. It is found by halving,
    and refined by two steps of Newton's, through which its derivatives flow: each doubles the number of right ones.

    Args:
        scores: (..., S), 0 the highest of each row.
        alpha: Above 1.
    """
    power = 1.0 / (alpha - 1.0)
    numbers = scores * (alpha - 1.0)
    fixed = numbers.detach()
    low = torch.full_like(fixed[..., :1], -1.0)
    high = torch.zeros_like(low)
    for _ in range(_iterations(scores)):
        middle = (low + high) / 2
        enough = (fixed - middle).clamp(min=0.0).pow(power).sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    tau, kept = low, fixed > low
    for _ in range(2):
        above = torch.where(kept, numbers - tau, 1.0)
        sums = [torch.where(kept, above.pow(p), 0.0).sum(-1, keepdim=True) for p in (power, power - 1)]
        tau = tau + (sums[0] - 1) / (power * sums[1])
    return torch.where(kept, torch.where(kept, numbers - tau, 1.0).pow(power), 0.0)
