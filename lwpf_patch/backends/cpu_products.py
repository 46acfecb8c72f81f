"""Products of matrices on the CPU: by ``torch.bmm``, or by oneDNN where that is much faster.

``torch.bmm`` has MKL multiply float32, and MKL uses AVX-512 on Intel's processors only. PyTorch brings oneDNN as well,
which uses it on all, but hands float32 to it in one operator alone, to which torch.compile lowers linear layers. On an
AMD EPYC (Zen 5) it multiplies 2.2 times as fast as MKL where a head has many scores; where it has few, calls head by
head cost more than that saves.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

#: Scores of a head from which one call of oneDNN a head is worth it.
SCORES_FOR_ONEDNN = 1 << 17


def onednn_is_faster() -> bool:
    """Return whether oneDNN multiplies large matrices of float32 faster than MKL here."""
    return _onednn_suits_the_processor() and bool(torch.backends.mkldnn.enabled)


@functools.lru_cache
def _onednn_suits_the_processor() -> bool:
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        described = platform.processor()
    return (
        "AuthenticAMD" in described
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and _linear_multiplies()
    )


def _linear_multiplies() -> bool:
    """Return whether the operator, which is no part of PyTorch's public interface, is there and does what it should."""
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        with torch.no_grad():
            drawn = torch.randn(2, 40, 40, generator=generator, device="cpu", dtype=torch.float32)
            left, right = drawn[:, 2:35, 1:30]
            products = ((left, right[:9]), (left.t(), right.t()[:9]), (left[:, :9].t(), right.t()[:7, :33]))
            return all(torch.allclose(linear(*pair), pair[0] @ pair[1].t(), atol=1e-4) for pair in products)
    except Exception:  # it is gone, or wants other arguments
        return False


def linear(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (M, K) and (N, K) transposed, both of float32 and in any layout, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


def product(left: Tensor, right: Tensor, onednn: bool, out: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """Multiply batches of matrices.

    Args:
        left: (G, M, K).
        right: (G, K, N).
        onednn: Whether oneDNN is to multiply.
        out: (G, M, N), where the product is to lie; None: in memory of its own.
        factor: Factor of the product.
    """
    if not onednn or not left.numel() or not right.numel():
        out = left.new_empty(*left.shape[:2], right.shape[2]) if out is None else out
        return out.baddbmm_(left, right, beta=0, alpha=factor)
    left = left if factor == 1 else left * factor
    made = [linear(one, other.t()) for one, other in zip(left, right, strict=True)]
    if out is not None:
        return torch.stack(made, out=out)
    return made[0].unsqueeze(0) if len(made) == 1 else torch.stack(made)


def add_product(
    total: Tensor, left: Tensor, right: Tensor, onednn: bool, first: bool = False, factor: float = 1.0
) -> None:
    """Add the product of batches of matrices to a total.

    Args:
        total: (G, M, N).
        left: (G, M, K).
        right: (G, K, N).
        onednn: Whether oneDNN is to multiply.
        first: Whether the total is not there yet: the product takes its place.
        factor: Factor of the product.
    """
    if not onednn:
        total.baddbmm_(left, right, beta=0 if first else 1, alpha=factor)
    elif first:
        product(left, right, onednn, out=total)
        if factor != 1:
            total *= factor
    else:
        total.add_(product(left, right, onednn), alpha=factor)
