"""U-Hop's Stage II on its own: the retrieval of a stored pattern from a memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import SettingsError, shown
from ..normalising import normalise
from ..options import LARGEST_COUNT, Option
from ..specs import parse_sep


def retrieve(
    memory: Tensor,
    query: Tensor,
    beta: float = 1.0,
    steps: int = 1,
    sep: str | float = "softmax",
    feature_map: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Retrieve stored patterns: ``x <- Ξ Sep(β K(Ξ, x))``, with ``K(ξ, x) = <Φ(ξ), Φ(x)>``.

    U-Hop's Stage II (Wu et al., ICML 2024); without a feature map, a modern Hopfield network (Ramsauer et al., ICLR
    2021), with ``sep="sparsemax"`` a sparse one (Hu et al., NeurIPS 2023). The state is a pattern of the original space
    all along: Φ serves to compare it with the memory only. Half precision is computed in float32.

    Args:
        memory: Ξ, the stored patterns as rows: (M, d), or many memories, (*B, M, d).
        query: The states to start from: (*N, d), any number of dimensions; for many memories (*B, *N, d).
        beta: β, the inverse temperature: a number above 0.
        steps: How many updates to make.
        sep: The normalisation, as for :func:`lwpf_patch.lwpf_attention`: ``"softmax"``, ``"softmax_n:n=1"``,
            ``"sparsemax"``, ``"entmax15"``, or alpha from 1 to 2; the last three need the package ``entmax``.
        feature_map: Φ, for example a :class:`lwpf_patch.FeatureMap`; None: the identity. It is given the memory, and
            states of shape (*B, n, d).

    Returns:
        The states after the last update, of the query's shape and dtype.

    Raises:
        SettingsError: An option that is not allowed, memory or query that is no tensor, or no ``entmax``.
        RuntimeError: Shapes, dtypes or devices that do not go together.

    Example:
        >>> import torch, lwpf_patch
        >>> lwpf_patch.retrieve(torch.eye(3), torch.tensor([0.6, 0.5, 0.1]), beta=100.0)
        tensor([9.9995e-01, 4.5398e-05, 1.9285e-22])
    """
    normalisation = parse_sep(sep, "retrieve(sep=...)")
    if feature_map is not None and not callable(feature_map):
        raise SettingsError(
            f"feature_map={shown(feature_map)} (from retrieve(feature_map=...)): feature_map must be callable, or None"
        )
    _check_inputs(memory, query)
    dtype = torch.promote_types(query.dtype, torch.float32)
    largest = torch.finfo(dtype).max
    beta = Option(minimum=0, maximum=largest, exclusive=True).read_argument(beta, "beta", "retrieve")
    steps = Option(minimum=1, maximum=LARGEST_COUNT, whole=True).read_argument(steps, "steps", "retrieve")
    memory = memory.to(dtype)
    batch = memory.shape[:-2]
    state = query.to(dtype).reshape(*batch, -1, query.shape[-1])
    keys = memory if feature_map is None else feature_map(memory)
    for _ in range(steps):
        mapped = state if feature_map is None else feature_map(state)
        state = normalise(beta * (mapped @ keys.mT), *normalisation) @ memory
    return state.reshape(query.shape).to(query.dtype)


def _check_inputs(memory: Tensor, query: Tensor) -> None:
    for name, tensor in (("memory", memory), ("query", query)):
        if not isinstance(tensor, Tensor):
            raise SettingsError(f"{name}={shown(tensor)} (from retrieve({name}=...)): {name} must be a tensor")
    shapes = f"memory {list(memory.shape)}, query {list(query.shape)}"
    if memory.dim() < 2 or query.dim() < 1 or memory.shape[-1] != query.shape[-1]:
        raise RuntimeError(f"retrieve: memory (*B, M, d) and query (*B, *N, d) must agree in d, got {shapes}")
    if query.shape[: memory.dim() - 2] != memory.shape[:-2] or query.dim() < memory.dim() - 1:
        raise RuntimeError(f"retrieve: memory (*B, M, d) and query (*B, *N, d) must agree in B, got {shapes}")
    if memory.shape[-2] == 0:
        raise RuntimeError(f"retrieve: the memory is empty, got {shapes}")
    if not memory.is_floating_point() or memory.dtype != query.dtype:
        got = f"memory {memory.dtype}, query {query.dtype}"
        raise RuntimeError(f"retrieve: memory and query must be of the same floating dtype, got {got}")
    if memory.device != query.device:
        raise RuntimeError(f"retrieve: memory is on {memory.device}, query on {query.device}")
