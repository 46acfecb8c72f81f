"""timm's vision transformers: ``Attention`` and ``AttentionRope``, with their fused and their eager branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..edits import attention
from ..errors import RewriteError
from ..rewriting import Site
from . import known
from .base import Host


def heads(module: Any) -> tuple[int, int]:
    """Returns the number of heads and the width of each."""
    width = getattr(module, "head_dim", None) or module.qkv.in_features // module.num_heads
    return module.num_heads, width


def fold(model: Any, module: Any, matrix: Any) -> None:
    """Multiplies the projections of query and key by the matrix of the feature map, (heads, d, d).

    Raises:
        RewriteError: A norm stands between projection and scores.
    """
    for name in ("q_norm", "k_norm"):
        if type(getattr(module, name, None)).__name__ not in ("Identity", "NoneType"):
            raise RewriteError(f"its {name} stands between the projections and the scores")
    number, width, _ = matrix.shape
    for tensor in (module.qkv.weight, module.qkv.bias):
        if tensor is not None:
            for first in (0, number * width):  # query, then key, each head's features together
                rows = tensor[first : first + number * width]
                mapped = matrix @ rows.to(matrix.dtype).reshape(number, width, -1)
                rows.copy_(mapped.reshape(rows.shape))


def refuse_to_fold(model: Any, module: Any, matrix: Any) -> None:
    """Raises RewriteError: the rotary embedding stands between."""
    raise RewriteError("a rotary embedding stands between the projections and the scores")


def _site(module: str, qualname: str, fold: Callable[[Any, Any, Any], None]) -> Site:
    return Site(module, qualname, attention, known.sources("timm", qualname), map_size=heads, fold=fold)


# The functions that make a model, each with its argument that names it; all versions have them.
_MAKERS = {"create_model": "model_name", "build_model_with_cfg": "variant"}


def names_in_call(function: str, variables: Mapping[str, Any]) -> list[str]:
    """Return the names of the model that a function is making, without and with the tag of its weights."""
    return _names(variables.get(_MAKERS[function]), variables.get("pretrained_cfg")) if function in _MAKERS else []


def names_of_model(model: Any) -> list[str]:
    """Return the names of a model that timm has made."""
    configuration = model.__dict__.get("pretrained_cfg")
    return _names(configuration.get("architecture"), configuration) if isinstance(configuration, Mapping) else []


def _names(name: Any, configuration: Any) -> list[str]:
    tag = configuration.get("tag") if isinstance(configuration, Mapping) else configuration
    names = [name, f"{name}.{tag}"] if isinstance(tag, str) and tag else [name]
    return names if isinstance(name, str) and name else []


HOST = Host(
    name="timm",
    install="pip install timm",
    sites=(
        _site("timm.layers.attention", "Attention.forward", fold),
        _site("timm.models.vision_transformer", "Attention.forward", fold),
        _site("timm.layers.attention", "AttentionRope.forward", refuse_to_fold),
    ),
    required=("Attention.forward",),
    names_in_call=names_in_call,
    names_of_model=names_of_model,
)
