"""Folding: writes U-Hop's trained feature maps into the projections of an ordinary model.

Φ is linear, so where nothing stands between a projection and the scores, Φ W_q and Φ W_k are projections themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import RewriteError, SettingsError
from .models import site_of
from .uhop import FoldedFeatureMap, HostFeatureMap


@torch.no_grad()
def fold(model: nn.Module) -> list[str]:
    """Writes every feature map of a model into the projections of query and key, and removes it.

    The output stays the same, to rounding. Afterwards the state dict is that of the plain library, which loads it
    without this package; partial forgetting, if there is any, stays on in this model. All maps are folded, or none.
    Make a new optimizer if training goes on.

    Args:
        model: A model that was patched with ``uhop``.

    Returns:
        The names of the attention modules concerned.

    Raises:
        SettingsError: The model has no feature map.
        RewriteError: A norm, a rotary embedding or anything else stands between a projection and the scores.
    """
    maps = {
        name: feature_map
        for name, module in model.named_modules()
        if isinstance(feature_map := module._modules.get("feature_map"), HostFeatureMap)
    }
    if not maps:
        raise SettingsError(f"fold: {type(model).__name__} has no feature map of U-Hop; there is nothing to fold")
    matrices = {name: _matrix(feature_map) for name, feature_map in maps.items() if bool(feature_map.weight.any())}
    for name, matrix in matrices.items():  # the identity changes nothing, but is refused where a map would be
        _fold(model, name, torch.eye(matrix.shape[-1]).to(matrix).expand_as(matrix))
    for name, matrix in matrices.items():
        _fold(model, name, matrix)
    for name in maps:
        module = model.get_submodule(name)
        module.feature_map = FoldedFeatureMap(maps[name])
    return list(maps)


def _matrix(feature_map: HostFeatureMap) -> Tensor:
    """Returns I + W in float64."""
    weight = feature_map.weight.double()
    return torch.eye(weight.shape[-1], device=weight.device, dtype=weight.dtype) + weight


def _fold(model: nn.Module, name: str, matrix: Tensor) -> None:
    module = model.get_submodule(name)
    found = site_of(type(module))
    assert found is not None
    assert found[1].fold is not None
    try:
        found[1].fold(model, module, matrix)
    except RewriteError as error:
        raise RewriteError(
            f"fold: the feature map of {name} ({type(module).__name__}) cannot become part of its projections: "
            f"{error}. Nothing was folded; keep the model as it is, its checkpoint holds the feature maps"
        ) from None
