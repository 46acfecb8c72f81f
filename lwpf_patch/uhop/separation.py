"""U-Hop: the feature map, the separation loss of stored patterns, and Stage I, which minimises it.

Source: Wu et al., "Uniform Memory Retrieval with Larger Capacity for Modern Hopfield Models", ICML 2024
(arXiv 2404.03827). A feature map Φ moves patterns to where their similarity K(ξ, x) = <Φ(ξ), Φ(x)> tells them apart
better; Stage I trains it on the stored patterns alone, before (or while) anything else is learnt.

torch.jit.script reads :meth:`FeatureMap.forward`.
"""

import contextlib
import importlib.util
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import transforms
from ..autocasting import without_autocast
from ..errors import SettingsError, shown
from ..options import LARGEST_COUNT, Option, check_name
from ..specs import UHOP_OPTIONS

__all__ = ["KINDS", "FeatureMap", "separation_gradient", "separation_loss"]

#: What may be minimised: the mean over the pairs of patterns, or its largest term.
KINDS = ("average", "maximum")
#: Similarities held at a time. A tile of them should stay in a CPU's cache; a GPU wants more to do at once.
TILE = 1 << 18
GPU_TILE = 1 << 24
#: Up to this exponent the smallest term of the mean, exp(-4 t), is an ordinary number: no maximum has to be sought.
SAFE_EXPONENT = 64.0


def separation_loss(patterns: Tensor, t: float = 2.0, kind: str = "average") -> Tensor:
    """Compute how badly patterns are separated, the loss of U-Hop's Stage I.

    ``L = log mean_{u != v} exp(-t * ||φ(u) - φ(v)||²)``, where φ divides a pattern by its norm. ``kind="maximum"``
    takes the largest term in place of the mean: ``L = -t * min_{u != v} ||φ(u) - φ(v)||²`` (Wu et al., ICML 2024).

    Memory is linear in M: similarities are made tile by tile, and the gradient along with them if it is wanted. For
    second derivatives, in forward mode and under torch.func all pairs are held: M * M numbers, or with ``"maximum"``
    their differences, M * M * d / 2. A pattern of zeros has no direction: it stays where it is, at distance 1 from all
    others, and its gradient is 0. If a pattern holds a NaN or an infinity, loss and gradient are NaN.

    Args:
        patterns: (..., M, d), M at least 2, floating.
        t: How fast a pair counts for less with its distance; above 0.
        kind: ``"average"``, or ``"maximum"``, whose gradient is shared evenly among pairs at the same distance.

    Returns:
        The loss, (...), of the patterns' dtype; of float32 for half precision, in which it is computed then.

    Raises:
        SettingsError: An unknown kind, a t that cannot be computed with, or patterns that are no tensor.
        RuntimeError: Fewer than two patterns, or patterns that are not floating.

    Example:
        >>> import torch, lwpf_patch
        >>> lwpf_patch.separation_loss(torch.eye(3))
        tensor(-4.)
    """
    t, kind = _read_options(t, kind, "separation_loss")
    _check_patterns(patterns, "separation_loss")
    if transforms.are_active():
        return _plain_loss(patterns, t, kind)
    loss: Tensor = _SeparationLoss.apply(patterns, t, kind, patterns.requires_grad and torch.is_grad_enabled())
    return loss


@torch.no_grad()
def separation_gradient(
    weight: Tensor, patterns: Tensor, t: float = 2.0, kind: str = "average"
) -> tuple[Tensor, Tensor]:
    """Compute the separation loss of Φ(patterns), Φ = I + W, and its gradient with respect to W: a step of Stage I.

    For those who do something to the gradient before they use it, such as averaging it over processes. It is computed
    directly: nothing is recorded for autograd, and no ``.grad`` is touched.

    Args:
        weight: W, (..., d, d).
        patterns: (..., M, d), with the same leading dimensions.
        t: As for :func:`separation_loss`.
        kind: As for :func:`separation_loss`.

    Returns:
        The loss, (...), and the gradient, (..., d, d); both in the wider dtype of the two tensors, float32 at least.

    Raises:
        SettingsError: An unknown kind, a t that cannot be computed with, or patterns that are no tensor.
        RuntimeError: Shapes that do not go together, fewer than two patterns, or patterns that are not floating.
    """
    t, kind = _read_options(t, kind, "separation_gradient")
    _check_pair(weight, patterns, "separation_gradient")
    dtype = torch.promote_types(_wide(weight.dtype), _wide(patterns.dtype))
    with without_autocast(patterns.device.type):
        wide = patterns.to(dtype)
        loss, gradient = _pattern_loss(wide + wide @ weight.to(dtype).mT, t, kind, with_gradient=True)
        assert gradient is not None
        return loss, gradient.mT @ wide


class FeatureMap(nn.Module):
    """The learnable feature map of U-Hop: ``Φ(x) = x + W x``, the identity at the start (Wu et al., ICML 2024).

    The paper's Φ is a square matrix. It is stored as its difference ``W`` from the identity, so that weight decay
    pulls it towards the identity, and half precision keeps small changes.

    Args:
        dim: d, the number of features.
        heads: How many maps of their own the heads have; None: one map for all patterns.
        device: Where W is.
        dtype: Of W.

    Attributes:
        weight: W, (d, d) or (heads, d, d); 0 at the start, where the output equals the input bit for bit.

    Raises:
        SettingsError: A dim or a number of heads that is not a whole number above 0.

    Example:
        >>> import torch, lwpf_patch
        >>> patterns = torch.rand(50, 200)
        >>> phi = lwpf_patch.FeatureMap(200)
        >>> losses = phi.separate(patterns)
        >>> bool(losses[-1] < losses[0])
        True
    """

    def __init__(
        self,
        dim: int,
        heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim = _read_count(dim, "dim", "FeatureMap", least=1)
        shape: tuple[int, ...] = (dim, dim)
        if heads is not None:
            shape = (_read_count(heads, "heads", "FeatureMap", least=1), *shape)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make Φ the identity."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map patterns.

        Args:
            x: (..., d), or (..., heads, N, d) for a map with heads.

        Returns:
            Φ(x), of the same shape.
        """
        return x + x @ self.weight.transpose(-2, -1)

    def matrix(self) -> Tensor:
        """Return the matrix of Φ, I + W: (d, d) or (heads, d, d)."""
        return torch.eye(self.weight.shape[-1], device=self.weight.device, dtype=self.weight.dtype) + self.weight

    def gram(self) -> Tensor:
        """Return Φ^T Φ: (d, d) or (heads, d, d). ``<Φ(q), Φ(k)> = q^T (Φ^T Φ) k``, so one side alone can be mapped."""
        matrix = self.matrix()
        return matrix.transpose(-2, -1) @ matrix

    @torch.no_grad()
    def separate(
        self,
        patterns: Tensor,
        iters: int = 100,
        t: float = 2.0,
        lr: float = 0.1,
        kind: str = "average",
        progress: bool = False,
    ) -> Tensor:
        """Run Stage I: gradient descent on the separation loss of Φ(patterns), over W and from where W is.

        Nothing but W changes, whether or not it requires a gradient: no ``.grad``, not the patterns, no state of an
        optimizer. Computed in float32 at least. Where it raises, W keeps its old value.

        Args:
            patterns: The stored patterns, (M, d); (heads, M, d) for a map with heads, each of which follows its own
                loss. M at least 2.
            iters: The number of steps, N in the paper.
            t: As for :func:`lwpf_patch.separation_loss`.
            lr: The rate of the descent, the same for all steps.
            kind: As for :func:`lwpf_patch.separation_loss`.
            progress: Whether to show a progress bar (with tqdm) on standard error.

        Returns:
            The losses before each step and after the last, (iters + 1,) or (iters + 1, heads).

        Raises:
            SettingsError: An option that is not allowed, or a progress bar without tqdm.
            RuntimeError: Patterns of another shape, fewer than two, or with a NaN or an infinity.
        """
        t, kind = _read_options(t, kind, "separate")
        iters = _read_count(iters, "iters", "separate", least=0)
        lr = float(UHOP_OPTIONS["lr"].read_argument(lr, "lr", "separate"))
        _check_pair(self.weight, patterns, "separate")
        dtype = torch.promote_types(_wide(self.weight.dtype), _wide(patterns.dtype))
        weight, patterns = self.weight.detach().to(dtype, copy=True), patterns.detach().to(dtype)
        losses = []
        with without_autocast(patterns.device.type), _progress_bar(iters, progress) as bar:
            for loss in _descend(weight, patterns, iters, t, lr, kind):
                losses.append(loss)
                if bar is not None and len(losses) > 1:
                    bar.set_postfix_str(f"loss {loss.mean().item():.4f}", refresh=False)
                    bar.update()
        result = torch.stack(losses)
        if not (result.isfinite().all() and weight.isfinite().all()):
            finite = bool(patterns.isfinite().all())
            reason = f"W is too large, or became so at lr={lr}" if finite else "patterns hold a NaN or an infinity"
            raise RuntimeError(f"separate: the separation loss is not a finite number: {reason}; W is left as it was")
        self.weight.copy_(weight)
        return result

    def extra_repr(self) -> str:
        """Show the sizes."""
        heads = f", heads={self.weight.shape[0]}" if self.weight.dim() == 3 else ""
        return f"{self.weight.shape[-1]}{heads}"


class _SeparationLoss(torch.autograd.Function):
    """The loss, which makes its gradient in the same pass over the pairs, while their similarities are at hand."""

    @staticmethod
    def forward(ctx: Any, patterns: Tensor, t: float, kind: str, with_gradient: bool) -> Tensor:
        with without_autocast(patterns.device.type):
            loss, gradient = _pattern_loss(patterns.to(_wide(patterns.dtype)), t, kind, with_gradient)
        if gradient is not None:
            ctx.save_for_backward(patterns, gradient)
        ctx.options = (t, kind)
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, None, None, None]:
        patterns, gradient = ctx.saved_tensors
        if transforms.recompute(factor):
            again = transforms.gradients(lambda x: _plain_loss(x, *ctx.options), (patterns,), (True,), factor)
            return again[0], None, None, None
        return (factor[..., None, None] * gradient).to(patterns.dtype), None, None, None


def _plain_loss(patterns: Tensor, t: float, kind: str) -> Tensor:
    """Compute the loss of patterns (..., M, d) by operators that can be transformed and differentiated without end."""
    with without_autocast(patterns.device.type):
        patterns = patterns.to(_wide(patterns.dtype))
        count = patterns.shape[-2]
        size = patterns.detach().abs().amax(-1, keepdim=True)
        zero = size == 0
        scaled = torch.where(zero, 1.0, patterns / size.masked_fill(zero, 1.0))  # whose norm has all derivatives
        directions = (scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)).masked_fill(zero, 0.0)
        first, second = torch.triu_indices(count, count, 1, device=patterns.device)
        if kind == "maximum":  # equal distances are told by differences alone
            difference = directions[..., first, :] - directions[..., second, :]
            return -t * difference.square().sum(-1).amin(-1)
        centred, squares = _centre(directions)
        similarities = centred @ centred.mT
        distances = squares[..., first] + squares[..., second] - 2 * similarities[..., first, second]
        return (-t * distances).logsumexp(-1) - math.log(count * (count - 1) / 2)


def _descend(weight: Tensor, patterns: Tensor, iters: int, t: float, lr: float, kind: str) -> Iterator[Tensor]:
    """Give the loss before each step of gradient descent and after the last, by which W is what the steps made of it.

    A step moves W by ``-lr Gᵀ X``, G the gradient for Φ(X), and hence Φ(X) by ``-lr X Xᵀ G``. So where there are fewer
    patterns than features, as U-Hop wants it, the products with W of each step are left out, and W is made at the end.
    """
    few = 2 * patterns.shape[-2] <= patterns.shape[-1]
    similarities = patterns @ patterns.mT if few else None
    mapped, steps = patterns + patterns @ weight.mT, torch.zeros_like(patterns)
    for _ in range(iters):
        loss, gradient = _pattern_loss(mapped, t, kind, with_gradient=True)
        assert gradient is not None
        yield loss
        if similarities is not None:
            steps.add_(gradient)
            mapped.sub_(similarities @ gradient, alpha=lr)
        else:
            weight.sub_(gradient.mT @ patterns, alpha=lr)
            mapped = patterns + patterns @ weight.mT
    if similarities is not None:
        weight.sub_(steps.mT @ patterns, alpha=lr)
    yield _pattern_loss(mapped, t, kind, with_gradient=False)[0]


def _pattern_loss(patterns: Tensor, t: float, kind: str, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the loss of patterns (..., M, d) and, if wanted, its gradient with respect to them."""
    *lead, count, dim = patterns.shape
    flat = patterns.reshape(math.prod(lead), count, dim)
    # The largest entry is divided out first, or squares overflow and vanish where the entries do not.
    size = flat.abs().amax(-1, keepdim=True)
    zero = size == 0
    directions = flat / size.masked_fill(zero, 1.0)
    norms = torch.linalg.vector_norm(directions, dim=-1, keepdim=True).masked_fill(zero, 1.0)
    directions /= norms
    loss, gradient = (_average if kind == "average" else _maximum)(directions, t, with_gradient)
    if gradient is not None:
        # Through the division by the norm: what points along the pattern is lost.
        radial = (gradient * directions).sum(-1, keepdim=True)
        gradient = ((gradient - radial * directions) / norms / size).masked_fill(zero, 0.0).reshape(patterns.shape)
    return loss.reshape(lead), gradient


def _average(directions: Tensor, t: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the loss "average" of directions (B, M, d), and its gradient with respect to them.

    With p_uv a pair's part of the mean, the gradient for u is ``4 t sum_v p_uv (v - u)``.
    """
    batch, count, dim = directions.shape
    centred, squares = _centre(directions)
    # Log-sum-exp: what is subtracted from all distances comes back at the end. If t is moderate, nothing need be.
    nearest = directions.new_zeros(batch) if 4 * t <= SAFE_EXPONENT else _rough_minimum(centred, squares)
    reduced = squares - nearest.unsqueeze(-1) / 2
    total = directions.new_zeros(batch)
    # A column of ones collects the sum of each row's weights.
    summands = torch.cat([centred, torch.ones_like(centred[..., :1])], dim=-1)
    sums = torch.zeros_like(summands) if with_gradient else None
    for start, stop, exponents in _tiles(centred, reduced, -t):
        weights = exponents.exp_()
        square, rest = weights[..., : stop - start], weights[..., stop - start :]
        square.diagonal(dim1=-2, dim2=-1).zero_()
        if sums is None:
            total += square.sum((-2, -1)) + 2 * rest.sum((-2, -1))
        else:
            sums[:, start:stop].baddbmm_(weights, summands[:, start:])
            sums[:, stop:].baddbmm_(rest.mT, summands[:, start:stop])
    if sums is not None:
        total = sums[..., dim].sum(-1)
    loss = total.log() - t * nearest - math.log(count * (count - 1))
    if sums is None:
        return loss, None
    return loss, (sums[..., :dim] - sums[..., dim:] * centred) * (4 * t / total).view(-1, 1, 1)


def _maximum(directions: Tensor, t: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the loss "maximum" of directions (B, M, d), and its gradient with respect to them.

    Distances from similarities are good enough to find the pairs that may be the nearest. Theirs are then computed
    again from differences, which alone are exact for patterns that are almost the same, or as far apart as others.
    """
    dim = directions.shape[-1]
    centred, squares = _centre(directions)
    rough = _rough_minimum(centred, squares)
    limit = rough + 8 * dim * torch.finfo(directions.dtype).eps * squares.amax(-1)
    nearest = torch.full_like(rough, math.inf)
    for item, _, _, difference in _pairs_within(directions, centred, squares, limit):
        nearest.scatter_reduce_(0, item, difference.square().sum(-1), "amin")
    nearest = torch.where(rough.isnan(), rough, nearest)
    if not with_gradient:
        return -t * nearest, None
    sums, ties = torch.zeros_like(directions), torch.zeros_like(rough)
    for item, u, v, difference in _pairs_within(directions, centred, squares, limit):
        tied = (difference.square().sum(-1) == nearest[item]).to(directions.dtype)
        ties.index_add_(0, item, tied)
        difference = difference * tied.unsqueeze(-1)
        sums.index_put_((item, u), difference, accumulate=True)
        sums.index_put_((item, v), -difference, accumulate=True)
    return -t * nearest, sums * (-2 * t / ties).view(-1, 1, 1)


def _centre(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return directions as differences from their mean, and their squared norms.

    Distances stay what they are, but where all patterns point about the same way, as images do, fewer digits cancel.
    """
    centred = directions - directions.mean(-2, keepdim=True)
    return centred, centred.square().sum(-1)


def _tiles(centred: Tensor, squares: Tensor, factor: float) -> Iterator[tuple[int, int, Tensor]]:
    """Give the squared distances of all pairs, times a factor, tile by tile.

    Args:
        centred: (B, M, d).
        squares: Their squared norms, (B, M).
        factor: What the distances are multiplied by.

    Yields:
        The rows from start to stop, and their distances from themselves and all rows that follow,
        (B, stop - start, M - start): a pair of different tiles comes once.
    """
    batch, count, _ = centred.shape
    limit = TILE if centred.device.type == "cpu" else GPU_TILE
    rows = max(1, min(count, limit // max(1, batch * count)))
    scaled = squares * factor
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        own, others = centred[:, start:stop], centred[:, start:].mT
        tile = torch.baddbmm(scaled[:, None, start:], own, others, alpha=-2 * factor)
        yield start, stop, tile.add_(scaled[:, start:stop, None])


def _rough_minimum(centred: Tensor, squares: Tensor) -> Tensor:
    """Return the least squared distance (B,) of a pair, as exact as similarities give it."""
    nearest = torch.full_like(squares[:, 0], math.inf)
    for start, stop, distances in _tiles(centred, squares, 1.0):
        distances[..., : stop - start].diagonal(dim1=-2, dim2=-1).fill_(math.inf)
        nearest = torch.minimum(nearest, distances.amin((-2, -1)))
    return nearest


def _pairs_within(
    directions: Tensor, centred: Tensor, squares: Tensor, limit: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Give the pairs whose squared distance is at most about ``limit`` (B,), each once and some at a time.

    Yields:
        The number b of the batch item and those of the patterns, u and v, as indices (P,); and u - v, (P, d).
    """
    some = max(1, TILE // centred.shape[-1])
    for start, _, distances in _tiles(centred, squares, 1.0):
        close = (distances <= limit.view(-1, 1, 1)).triu_(1)
        for pairs in torch.split(close.nonzero(), some):
            item, u, v = pairs.unbind(-1)
            u, v = u + start, v + start
            yield item, u, v, directions[item, u] - directions[item, v]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in."""
    return torch.promote_types(dtype, torch.float32)


def _progress_bar(iters: int, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    if not wanted:
        return contextlib.nullcontext()
    if importlib.util.find_spec("tqdm") is None:
        raise SettingsError("progress=True (from separate) needs tqdm: pip install tqdm, or leave it out")
    from tqdm import tqdm

    return tqdm(total=iters, desc="Stage I", unit="step", file=sys.stderr)


def _read_options(t: object, kind: object, function: str) -> tuple[float, str]:
    """Read how the loss is made."""
    kind = check_name("kind", kind, f"{function}(kind=...)", KINDS)
    return float(UHOP_OPTIONS["t"].read_argument(t, "t", function)), kind


def _read_count(value: object, name: str, function: str, least: int) -> int:
    option = Option(minimum=least, maximum=LARGEST_COUNT, whole=True)
    return int(option.read_argument(value, name, function))


def _check_patterns(patterns: Tensor, origin: str) -> None:
    if not isinstance(patterns, Tensor):
        raise SettingsError(f"patterns={shown(patterns)} (from {origin}(patterns=...)): patterns must be a tensor")
    if not patterns.is_floating_point():
        raise RuntimeError(f"{origin}: patterns must be of a floating dtype, got {patterns.dtype}")
    if patterns.dim() < 2 or patterns.shape[-2] < 2 or patterns.shape[-1] < 1:
        raise RuntimeError(
            f"{origin}: patterns must be (..., M, d) with M at least 2, a pair to separate; got shape "
            f"{list(patterns.shape)}"
        )


def _check_pair(weight: Tensor, patterns: Tensor, origin: str) -> None:
    _check_patterns(patterns, origin)
    dim = patterns.shape[-1]
    if weight.shape != (*patterns.shape[:-2], dim, dim):
        expected = [*weight.shape[:-2], "M", weight.shape[-1]]
        raise RuntimeError(
            f"{origin}: for a feature map with W of shape {list(weight.shape)} patterns must be of shape "
            f"({', '.join(map(str, expected))}), got {list(patterns.shape)}"
        )
    if weight.device != patterns.device:
        raise RuntimeError(f"{origin}: W is on {weight.device}, patterns on {patterns.device}")
