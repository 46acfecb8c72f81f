"""timm: every class of its models whose softmax runs over keys; :mod:`.timm_classes` lists them."""

from __future__ import annotations

from collections.abc import Mapping

from ..hosting import HostModule, RewrittenHost, Site
from . import known
from .timm_classes import NO_ATTENTION, REFUSED, SITES
from .timm_edits import report_the_model

# The functions that make a model, each with its argument that names it; all versions have them.
_MAKERS = {"create_model": "model_name", "build_model_with_cfg": "variant"}


def names_in_call(function: str, variables: Mapping[str, object]) -> list[str]:
    """Return the names of the model that a function is making, without and with the tag of its weights."""
    return _names(variables.get(_MAKERS[function]), variables.get("pretrained_cfg")) if function in _MAKERS else []


def names_of_model(model: HostModule) -> list[str]:
    """Return the names of a model that timm has made."""
    configuration = model.__dict__.get("pretrained_cfg")
    return _names(configuration.get("architecture"), configuration) if isinstance(configuration, Mapping) else []


def is_model(module: HostModule) -> bool:
    """Return whether timm has made a module as a whole model, as ``timm.create_model`` does."""
    return "pretrained_cfg" in module.__dict__


def _names(name: object, configuration: object) -> list[str]:
    if not isinstance(name, str) or not name:
        return []
    tag = configuration.get("tag") if isinstance(configuration, Mapping) else configuration
    return [name, f"{name}.{tag}"] if isinstance(tag, str) and tag else [name]


_BUILDER = "build_model_with_cfg"
_BUILDERS = tuple(
    Site(module, _BUILDER, known.sources("timm", _BUILDER), edit=report_the_model, one_of=_BUILDER)
    for module in ("timm.models._builder", "timm.models.helpers")
)

HOST = RewrittenHost(
    name="timm",
    install="pip install timm",
    sites=(*SITES, *_BUILDERS),
    partly=True,
    refused=REFUSED,
    no_attention=NO_ATTENTION,
    names_in_call=names_in_call,
    names_of_model=names_of_model,
    is_model=is_model,
)
