"""How U-Hop's feature map fits timm's attention classes: heads and their width, and folding into the projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import FoldError
from ..hosting import Folding, HostModule, multiply_rows

if TYPE_CHECKING:
    from torch import Tensor

#: The names of the layers that make queries and keys, and of how many projections of equal size each holds the rows:
#: a layer for both, which come first, or one for each, that of the key first in its own.
_LAYERS = ((("qkv", 3),), (("qk", 2),), (("q", 1), ("k", 1)), (("wq", 1), ("wk", 1)), (("q", 1), ("kv", 2)))


def heads(module: HostModule) -> tuple[int, int]:
    """Return the number of heads and the width of each, by what the class calls them."""
    number = module.num_heads
    for name in ("head_dim", "dim_head", "key_dim"):
        if isinstance(width := getattr(module, name, None), int):
            return number, width
    layer, parts = _layers(module)[0]
    return number, _size(layer, "out") // parts // number


def twice_as_many_heads(module: HostModule) -> tuple[int, int]:
    """Return the number of heads of differential attention, each of which is two, and the width of each."""
    return 2 * module.num_heads, module.head_dim


def _layers(module: HostModule) -> list[tuple[HostModule, int]]:
    """Return the layers that make queries and keys, each with how many projections it holds the rows of."""
    for names in _LAYERS:
        found = [(getattr(module, name, None), parts) for name, parts in names]
        if all(layer is not None for layer, _ in found):
            return found
    raise AttributeError(f"{type(module).__qualname__} has no projections by a name that is known")


def projections(model: HostModule, module: HostModule) -> list[str]:
    """Return the names of the parameters that make queries and keys.

    Raises:
        FoldError: A norm stands between projection and scores.
    """
    for name in ("q_norm", "k_norm"):
        if type(getattr(module, name, None)).__name__ not in ("Identity", "NoneType"):
            raise FoldError(f"its {name} stands between the projections and the scores")
    found = next((names for names in _LAYERS if all(hasattr(module, name) for name, _ in names)), ())
    return [f"{name}.{parameter}" for name, _ in found for parameter in ("weight", "bias")]


def multiply(module: HostModule, matrix: Tensor) -> None:
    """Multiply the projections of query and key, each of which has the rows of a head together."""
    size = matrix.shape[0] * matrix.shape[1]
    layers = _layers(module)
    for layer, _ in layers:
        for rows in (layer.weight, layer.bias):
            if rows is not None:
                multiply_rows(rows[:size], matrix)
                if len(layers) == 1:
                    multiply_rows(rows[size : 2 * size], matrix)


def _random(*shape: int) -> Tensor:
    import torch

    return torch.randn(*shape, dtype=torch.float64, device="cpu")


def _width(module: HostModule) -> int:
    return _size(_layers(module)[0][0], "in")


def _size(layer: HostModule, side: str) -> int:
    """Return how many features a linear layer or a convolution has; reading a weight may compute it."""
    found = getattr(layer, f"{side}_features", None)
    return int(getattr(layer, f"{side}_channels") if found is None else found)


def _folding(example: Callable[[HostModule], tuple[Any, ...]]) -> Folding:
    return Folding(projections, multiply, example)


def refuse(reason: str) -> Folding:
    """Return a folding that is refused, with the reason."""

    def parameters(model: HostModule, module: HostModule) -> list[str]:
        raise FoldError(reason)

    return Folding(parameters, multiply, lambda module: ())


#: By what a class takes: a sequence of any length, of one that fits its window, of its side lengths, an image.
TOKENS = _folding(lambda module: (_random(1, 8, _width(module)),))
WINDOW = _folding(lambda module: (_random(1, module.window_area, _width(module)),))
SIZED = _folding(lambda module: (_random(1, 64, _width(module)), (8, 8)))
FOUR_BY_FOUR = _folding(lambda module: (_random(1, 16, _width(module)),))
SIXTY_FOUR = _folding(lambda module: (_random(1, 64, _width(module)),))
ROWS = _folding(lambda module: (_random(1, 4, 4, _width(module)),))
IMAGE = _folding(lambda module: (_random(1, _width(module), 4, 4),))
ROTARY = refuse("a rotary embedding stands between the projections and the scores")
SHARED = refuse("one projection makes queries, keys and what else the block computes")
INTERLEAVED = refuse("its projection has the rows of query, key and value by head")
NO_FOLDING = refuse("folding is not written for this class")
