"""How much of a model's attention is patched, told when the model is made."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from .. import reporting
from ..errors import CoverageError
from ..hosting import RewrittenHost
from . import owners
from .models import site_of
from .state import PATCHED, PatchedHost

if TYPE_CHECKING:
    from torch import nn

#: What a function calls that computes attention weights.
_CALLS = frozenset({"softmax", "scaled_dot_product_attention", "multi_head_attention_forward"})
_UNKNOWN = "lwpf_patch does not know this class"
_LEFT_OUT = "left out by include and exclude"


@dataclass
class Coverage:
    """How much of a model's attention is patched.

    Attributes:
        patched: How many modules of each class are, by the name of the class.
        plain: How many modules of each class with a softmax are not.
        why: Why not, for each of these classes.
        without_map: The patched classes that have no feature map of U-Hop, and could have none.
    """

    patched: Counter[str] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)
    why: dict[str, str] = field(default_factory=dict)
    without_map: set[str] = field(default_factory=set)

    def state(self) -> str:
        """Return ``"whole"``, ``"partly"``, ``"refused"`` or ``"nothing to patch"``."""
        if self.patched:
            return "partly" if self.plain else "whole"
        return "refused" if self.plain else "nothing to patch"


def coverage_of(model: nn.Module, applied: PatchedHost) -> Coverage:
    """Return how much of a model's attention is patched.

    Args:
        model: The model.
        applied: The host that it is a model of, as it is patched.
    """
    from ..attention import OwnedFuncD

    assert isinstance(applied.host, RewrittenHost)
    found = Coverage()
    whys: dict[type, str | None] = {}
    for module in model.modules():
        cls = type(module)
        name = f"{cls.__module__}.{cls.__qualname__}"
        if cls.__module__.partition(".")[0] == "lwpf_patch":
            continue
        func_d = module._modules.get("func_d")
        if isinstance(func_d, OwnedFuncD) and func_d.host:
            found.patched[name] += 1
            if "feature_map" not in module._modules:
                found.without_map.add(name)
            continue
        if cls not in whys:
            whys[cls] = _why_plain(cls, applied)
        if (why := whys[cls]) is not None:
            found.plain[name] += 1
            found.why[name] = why
    return found


def _why_plain(cls: type, applied: PatchedHost) -> str | None:
    """Return why the softmax of a class is left as it is; None: it has none."""
    host = applied.host
    assert isinstance(host, RewrittenHost)
    names = [f"{each.__module__}.{each.__qualname__}" for each in cls.__mro__]
    for name in names:
        if name in host.no_attention:
            return None
        if name in host.refused:
            return host.refused[name]
        if name in applied.misfits:
            return f"its source has a shape that is not known ({host.described()})"
    if (found := site_of(cls)) is not None:
        return _LEFT_OUT if found[0] is host else f"it is patched by {found[0].name}: apply({found[0].name!r})"
    own = [each for each in cls.__mro__ if not each.__module__.startswith("torch.nn.modules.module")]
    if any(_computes_weights(each) for each in own):
        return _UNKNOWN
    return None


def _computes_weights(cls: type) -> bool:
    """Return whether a function of a class calls a softmax, or attention, by the names in its code."""
    if cls.__module__ == "torch.nn.modules.activation" and cls.__name__ != "MultiheadAttention":
        return False  # nn.Softmax itself, whoever uses it
    functions = [value for value in vars(cls).values() if type(value) is FunctionType]
    return any(_CALLS & set(_names(function.__code__)) for function in functions)


def _names(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def report_model(model: nn.Module, host: str) -> None:
    """Say which attention of a model that has just been made is not patched, as the setting ``partial`` asks.

    Args:
        model: The model.
        host: The name of its host, whose code calls this.

    Raises:
        CoverageError: Not all of it is, and ``partial="error"``.
    """
    applied = PATCHED.get(host)
    if applied is None or applied.settings.partial == "allow" or _is_inner(inspect.currentframe()):
        return
    assert isinstance(applied.host, RewrittenHost)
    settings, names = applied.settings, owners.names_of(model, applied.host)
    if settings.exclude_models and owners.match(names, settings.exclude_models):
        return
    message = _message(model, applied)
    if message is None:
        return
    if settings.partial == "error":
        raise CoverageError(
            f"{message}. It was asked for whole models alone (partial=error, from {settings.origin('partial')}); "
            "name models that shall stay plain in exclude_models"
        )
    if message not in applied.told:
        applied.told.add(message)
        reporting.warn(f"{message}. partial=allow (LWPF_PARTIAL) silences this, partial=error refuses such models")


def _message(model: nn.Module, applied: PatchedHost) -> str | None:
    found = coverage_of(model, applied)
    assert isinstance(applied.host, RewrittenHost)
    known = getattr(applied.host, "names_of_model", None)
    name = next(iter(known(model)), type(model).__name__) if known is not None else type(model).__name__
    left = {each: number for each, number in found.plain.items() if found.why[each] != _LEFT_OUT}
    if not found.patched:
        if not found.plain:
            return f"{applied.host.name}: {name} has no softmax attention, so that nothing of it is patched"
        return f"{applied.host.name}: nothing of {name} is patched: {_in_words(found.plain, found.why)}"
    parts = []
    if left:
        total = found.patched.total() + sum(left.values())
        parts.append(f"{found.patched.total()} of its {total} attention layers; plain are {_in_words(left, found.why)}")
    if applied.settings.uhop is not None and found.without_map:
        parts.append(
            "with no feature map of U-Hop in "
            + ", ".join(f"{found.patched[each]} {_short(each)}" for each in sorted(found.without_map))
        )
    return f"{applied.host.name}: {name} is patched in part: {'; and '.join(parts)}" if parts else None


def _in_words(numbers: Any, why: dict[str, str]) -> str:
    return "; ".join(f"{number} {_short(name)} ({why[name]})" for name, number in numbers.items())


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _is_inner(frame: Any) -> bool:
    """Return whether the model is made as a part of another one, by the same function further up."""
    maker = frame.f_back.f_code
    frame = frame.f_back.f_back
    while frame is not None and frame.f_code is not maker:
        frame = frame.f_back
    return frame is not None
