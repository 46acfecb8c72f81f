"""Sep, the normalisations of U-Hop that stand in for the softmax: alpha-entmax, of which sparsemax is one end.

Sources: Wu et al., ICML 2024, section 3; Peters, Niculae and Martins, "Sparse Sequence-to-Sequence Models", ACL 2019,
whose package ``entmax`` computes them.
"""

import torch
from torch import Tensor

from .errors import SettingsError


@torch.jit.unused  # a scripted model has the softmax only
def normalise(scores: Tensor, alpha: float) -> Tensor:
    """Normalises scores over their last dimension: ``Sep_alpha(scores)``.

    The weights are not negative and sum to 1. With alpha above 1 the scores far below a row's highest get exactly 0,
    and there is no second derivative.

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


# torch.compile cannot look into the functions of entmax, and need not.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _entmax(scores: Tensor, alpha: float) -> Tensor:
    try:
        import entmax
    except ImportError as error:
        raise SettingsError(
            f"sep with alpha = {alpha:g}: other normalisations than the softmax need the package entmax, which cannot "
            f"be imported ({error}): pip install 'lwpf_patch[entmax]'"
        ) from error
    # The highest score of a row is 0 here. Weights are 0 from 1 / (alpha - 1) below it on. Lower scores are as good as
    # that far down, and keep their size (which may be inf) out of the cumulative sums.
    scores = scores.clamp(min=-2.0 / (alpha - 1.0))
    if alpha == 2.0:
        return entmax.sparsemax(scores, dim=-1)
    if alpha == 1.5:
        return entmax.entmax15(scores, dim=-1)
    # Each iteration gives a binary digit of the threshold, which lies within 1 of the highest score.
    iterations = 60 if scores.dtype == torch.float64 else 30
    return entmax.entmax_bisect(scores, alpha, dim=-1, n_iter=iterations)
