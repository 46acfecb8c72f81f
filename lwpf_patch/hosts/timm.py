"""timm's vision transformers: ``Attention`` and ``AttentionRope``, with their fused and their eager branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import FoldError
from ..hosting import FeatureMapAttachment, Folding, FuncDAttachment, HostModule, RewrittenHost, Site, multiply_rows
from . import known

if TYPE_CHECKING:
    from torch import Tensor


def heads(module: HostModule) -> tuple[int, int]:
    """Return the number of heads and the width of each."""
    width = getattr(module, "head_dim", None) or module.qkv.in_features // module.num_heads
    return module.num_heads, width


def projections(model: HostModule, module: HostModule) -> list[str]:
    """Return the names of the parameters that make queries and keys.

    Raises:
        FoldError: A norm stands between projection and scores.
    """
    for name in ("q_norm", "k_norm"):
        if type(getattr(module, name, None)).__name__ not in ("Identity", "NoneType"):
            raise FoldError(f"its {name} stands between the projections and the scores")
    return ["qkv.weight", "qkv.bias"]


def multiply(module: HostModule, matrix: Tensor) -> None:
    """Multiply the projections of query and key, each of which has the rows of a head together."""
    size = matrix.shape[0] * matrix.shape[1]
    for tensor in (module.qkv.weight, module.qkv.bias):
        if tensor is not None:
            multiply_rows(tensor[:size], matrix)
            multiply_rows(tensor[size : 2 * size], matrix)


def example(module: HostModule) -> tuple[Tensor, ...]:
    """Return random tokens."""
    import torch

    return (torch.randn(1, 8, module.qkv.in_features, dtype=torch.float64, device="cpu"),)


def refuse_to_fold(model: HostModule, module: HostModule) -> list[str]:
    """Raise FoldError: the rotary embedding stands between."""
    raise FoldError("a rotary embedding stands between the projections and the scores")


_FOLDING = Folding(projections, multiply, example)
_NO_FOLDING = Folding(refuse_to_fold, multiply, example)


def _site(module: str, qualname: str, folding: Folding) -> Site:
    attachments = (FuncDAttachment(), FeatureMapAttachment(shape=heads, folding=folding))
    return Site(module, qualname, known.sources("timm", qualname), attachments)


# The functions that make a model, each with its argument that names it; all versions have them.
_MAKERS = {"create_model": "model_name", "build_model_with_cfg": "variant"}


def names_in_call(function: str, variables: Mapping[str, object]) -> list[str]:
    """Return the names of the model that a function is making, without and with the tag of its weights."""
    return _names(variables.get(_MAKERS[function]), variables.get("pretrained_cfg")) if function in _MAKERS else []


def names_of_model(model: HostModule) -> list[str]:
    """Return the names of a model that timm has made."""
    configuration = model.__dict__.get("pretrained_cfg")
    return _names(configuration.get("architecture"), configuration) if isinstance(configuration, Mapping) else []


def _names(name: object, configuration: object) -> list[str]:
    if not isinstance(name, str) or not name:
        return []
    tag = configuration.get("tag") if isinstance(configuration, Mapping) else configuration
    return [name, f"{name}.{tag}"] if isinstance(tag, str) and tag else [name]


HOST = RewrittenHost(
    name="timm",
    install="pip install timm",
    sites=(
        _site("timm.layers.attention", "Attention.forward", _FOLDING),
        _site("timm.models.vision_transformer", "Attention.forward", _FOLDING),
        _site("timm.layers.attention", "AttentionRope.forward", _NO_FOLDING),
    ),
    required=("Attention.forward",),
    names_in_call=names_in_call,
    names_of_model=names_of_model,
)
