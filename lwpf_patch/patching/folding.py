"""Folding: writes U-Hop's trained feature maps into the projections of an ordinary model.

Φ is linear, so where nothing stands between a projection and the scores, Φ W_q and Φ W_k are projections themselves.
What may stand between is refused by name. What no list of names can foresee is found by a comparison: the scores of one
random input before and after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import FoldError, SettingsError
from ..hosting import Folding
from ..uhop import FoldedFeatureMap, HostFeatureMap, sharding
from .models import site_of

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: How far scores may move, in units of the rounding of the weights times the size of query and key.
_ROUNDINGS = 4.0


@torch.no_grad()
def fold(model: nn.Module) -> list[str]:
    """Write every feature map of a model into the projections of query and key, and remove it.

    The output stays the same, to rounding. Afterwards the state dict is that of the plain library, which loads it
    without this package; partial forgetting, if there is any, stays on in this model. All maps are folded, or none: if
    one cannot be, every weight is what it was. Make a new optimizer if training goes on.

    Args:
        model: A model that was patched with ``uhop``.

    Returns:
        The names of the attention modules concerned.

    Raises:
        SettingsError: The model has no feature map.
        FoldError: Something stands between a weight and the scores: a norm, a rotary embedding, a parametrization,
            pruning, a hook, a layer that is no plain ``nn.Linear``, a weight that other modules use; or the scores of
            a random input would have moved by more than rounding.
    """
    maps = {
        name: feature_map
        for name, module in model.named_modules()
        if isinstance(feature_map := module._modules.get("feature_map"), HostFeatureMap)
    }
    if not maps:
        raise SettingsError(f"fold: {type(model).__name__} has no feature map of U-Hop; there is nothing to fold")
    changes = [change for name in maps if (change := _plan(model, name, maps[name])) is not None]
    saved = [(parameter, parameter.detach().clone()) for change in changes for parameter in change.parameters]
    try:
        for change in changes:
            change.folding.multiply(change.module, change.matrix)
        for change in changes:
            _compare(change)
    except BaseException:
        for parameter, value in saved:
            parameter.copy_(value)
        raise
    for name in maps:
        model.get_submodule(name).feature_map = FoldedFeatureMap(maps[name])
    return list(maps)


@dataclass
class _Change:
    """A feature map that is to be folded.

    Attributes:
        name: The name of its attention module.
        module: The attention module.
        folding: How its host folds.
        matrix: I + W in float64, on the CPU.
        parameters: The parameters that are multiplied.
        arguments: A random input.
        scores: Those of this input before.
    """

    name: str
    module: nn.Module
    folding: Folding
    matrix: Tensor
    parameters: list[nn.Parameter]
    arguments: tuple[Any, ...]
    scores: _Scores


@dataclass
class _Scores:
    """What a feature map was called with, and the scores of what it gave, in float64.

    Attributes:
        query: (..., L, d).
        key: (..., S, d).
        mapped: The mapped query, (..., L, d).
    """

    query: Tensor
    key: Tensor
    mapped: Tensor

    def values(self) -> Tensor:
        return self.mapped @ self.key.mT

    def size(self) -> Tensor:
        """Return the largest product of norms of a query and a key, (...)."""
        return self.query.norm(dim=-1).amax(-1) * self.key.norm(dim=-1).amax(-1)


def _plan(model: nn.Module, name: str, feature_map: HostFeatureMap) -> _Change | None:
    """Find out how a feature map is folded; None if it is the identity, which only has to be taken away.

    Raises:
        FoldError: It cannot be folded.
    """
    module = model.get_submodule(name)
    found = site_of(type(module))
    assert found is not None
    attachment = found[1].feature_map
    assert attachment is not None
    folding = attachment.folding
    assert folding is not None
    try:
        if feature_map.weight.is_meta:
            raise FoldError("its feature map is on the device meta and has no values")
        if any(sharding.is_dtensor(parameter) for parameter in module.parameters()):
            raise FoldError(
                "its parameters are sharded (FSDP2); gather them with get_model_state_dict and "
                "StateDictOptions(full_state_dict=True) of torch.distributed.checkpoint.state_dict, load them into a "
                "model that is not sharded, and fold that"
            )
        if not feature_map.weight.any():
            return None
        names = folding.parameters(model, module)
        _refuse_hooks(module, "it")
        _refuse_hooks(feature_map, "its feature map")
        _parameters_of(feature_map, "feature_map.", ["weight"])
        parameters = []
        for prefix in dict.fromkeys(path.rpartition(".")[0] for path in names):
            owner = _owner(model, module, prefix)
            own = [path.rpartition(".")[2] for path in names if path.rpartition(".")[0] == prefix]
            parameters += _parameters_of(owner, f"{prefix}." if prefix else "", own)
        _refuse_shared(model, parameters)
        matrix = feature_map.weight.detach().cpu().double()
        matrix = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device="cpu") + matrix
        if not matrix.isfinite().all():
            raise FoldError("its feature map holds NaN or infinity")
        arguments = folding.example(module)
        return _Change(name, module, folding, matrix, parameters, arguments, _scores(module, arguments))
    except FoldError as error:
        raise _refusal(name, module, str(error)) from error.__cause__


def _refusal(name: str, module: nn.Module, reason: str) -> FoldError:
    return FoldError(
        f"fold: the feature map of {name or 'the model'} ({type(module).__name__}) cannot become part of its "
        f"projections: {reason}. Nothing was folded; keep the model as it is, its checkpoint holds the feature maps"
    )


# --- what may stand between -----------------------------------------------------------------------------------------


def _owner(model: nn.Module, module: nn.Module, path: str) -> nn.Module:
    """Return the projection that lies at a path in an attention module, the module itself if that is empty.

    Raises:
        FoldError: It is no plain ``nn.Linear``, or it is shared.
    """
    owner: Any = module
    for name in path.split(".") if path else ():
        owner = getattr(owner, name, None)
    if owner is module:
        return module
    if isinstance(owner, nn.Module) and not parametrize.is_parametrized(owner) and type(owner) is not nn.Linear:
        raise FoldError(
            f"its {path} is a {type(owner).__module__}.{type(owner).__qualname__} and no plain torch.nn.Linear, so "
            "that more than its weight and bias makes the scores; make it one first (with peft: merge_and_unload())"
        )
    if not isinstance(owner, nn.Linear):
        raise FoldError(f"its {path} is {type(owner).__name__} and no torch.nn.Linear")
    places = [
        f"{name}.{child}".lstrip(".")
        for name, parent in model.named_modules()
        for child, each in parent._modules.items()
        if each is owner
    ]
    if len(places) > 1:
        raise FoldError(f"its {path} is used in several places ({', '.join(places)}); give each a copy of its own")
    _refuse_hooks(owner, f"its {path}")
    return owner


def _refuse_hooks(owner: nn.Module, what: str) -> None:
    if "forward" in owner.__dict__:
        raise FoldError(f"{what} has a forward of its own, set on the instance; remove what set it")
    hooks = [*owner._forward_pre_hooks.values(), *owner._forward_hooks.values()]
    own = [hook for hook in hooks if not _makes_a_weight(hook)]  # those are named with the weight that they make
    if own:
        raise FoldError(f"{what} has forward hooks ({_names(own)}), which may change what it computes; remove them")


def _makes_a_weight(hook: Any) -> bool:
    """Return whether a hook is one of torch's that make a weight anew before each call."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def _names(hooks: list[Any]) -> str:
    return ", ".join(dict.fromkeys(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks))


def _parameters_of(owner: nn.Module, prefix: str, names: list[str]) -> list[nn.Parameter]:
    """Return those of some parameters that are there.

    Raises:
        FoldError: One of them is no ordinary parameter, so that what is written into it is not what the scores get.
    """
    found = []
    for name in names:
        what = f"its {prefix}{name}"
        if parametrize.is_parametrized(owner, name):
            kinds = _names(list(owner.parametrizations[name]))  # type: ignore[index]
            raise FoldError(
                f"{what} is parametrized ({kinds}); torch.nn.utils.parametrize.remove_parametrizations makes it an "
                "ordinary parameter"
            )
        if name not in owner._parameters:
            makers = _names([hook for hook in owner._forward_pre_hooks.values() if _makes_a_weight(hook)])
            raise FoldError(
                f"{what} is no parameter, but made anew before each call ({makers or 'by what replaced it'}), as by "
                "pruning and the older weight_norm and spectral_norm; torch.nn.utils has a function that removes each"
            )
        parameter = owner._parameters[name]
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            raise FoldError(f"{what} is a {type(parameter).__name__} and no ordinary parameter")
        if parameter.is_meta:
            raise FoldError(f"{what} is on the device meta and has no values")
        if parameter.dtype not in _DTYPES:
            raise FoldError(f"{what} is of dtype {parameter.dtype}, which cannot hold the product; dequantize it first")
        found.append(parameter)
    if parametrize.is_parametrized(owner):
        names = list(owner.parametrizations)  # type: ignore[arg-type]
        raise FoldError(f"its {prefix.rstrip('.') or 'module'} has parametrizations ({', '.join(names)})")
    return found


def _refuse_shared(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Refuse weights whose memory is also that of another parameter or buffer of the model.

    Raises:
        FoldError: The other one would change, too.
    """
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in parameters:
        sharing = [name for name, other in _tensors(model) if other is parameter or _overlap(other, parameter)]
        if len(sharing) > 1:
            others = ", ".join(name for name in sharing if name != own[id(parameter)])
            raise FoldError(
                f"{own[id(parameter)]} has its memory in common with {others}, which would change as well; give each "
                "a copy of its own"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give all parameters and buffers; those of a module that is used in several places come once."""
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}".lstrip("."), tensor


def _overlap(one: Tensor, two: Tensor) -> bool:
    if one.device != two.device or type(one.data) is not Tensor or one.layout != torch.strided or not one.numel():
        return False
    (begin, end), (other_begin, other_end) = _memory(one), _memory(two)
    return begin < other_end and other_begin < end


def _memory(tensor: Tensor) -> tuple[int, int]:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


# --- the comparison -------------------------------------------------------------------------------------------------


class _ReachedError(Exception):
    """Ends a forward pass where all is known that is asked for; nothing behind it runs."""


class _Caller(nn.Module):
    """Calls a module, for ``functional_call``: its forward alone, whatever else was compiled around it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> None:
        self.module.forward(*arguments)


def _scores(module: nn.Module, arguments: tuple[Any, ...], without_map: bool = False) -> _Scores:
    """Call an attention module as far as its feature map, in float64, and see what reaches it.

    Args:
        module: The module.
        arguments: Of the call.
        without_map: Whether to compute as if the feature map were the identity.

    Raises:
        FoldError: The call fails, or does not reach the feature map.
    """
    feature_map: Any = module.feature_map
    seen: list[_Scores] = []

    def look(called: Any, inputs: Any, output: Any) -> None:
        query, key = inputs
        seen.append(_Scores(query, key, output))
        raise _ReachedError

    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wide = {
        f"module.{name}": tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in tensors.items()
    }
    if without_map:
        wide["module.feature_map.weight"] = torch.zeros_like(wide["module.feature_map.weight"])
    handle = feature_map.register_forward_hook(look)
    try:
        torch.func.functional_call(_Caller(module), wide, arguments)
    except _ReachedError:
        return seen[0]
    except Exception as error:
        raise FoldError(f"a call with a random input, which would compare its scores, raised {error!r}") from error
    finally:
        handle.remove()
    raise FoldError(f"the forward of {type(module).__qualname__} does not call its feature map")


def _compare(change: _Change) -> None:
    """Compare the scores of a random input with those before.

    The weights alone were rounded: each score may move by the rounding of the weights, times the size of what is
    multiplied. What float64 itself rounds counts where Φ makes patterns much smaller.

    Raises:
        FoldError: They moved by more than rounding.
    """
    before, after = change.scores, _scores(change.module, change.arguments, without_map=True)
    moved = (after.values() - before.values()).abs().amax((-2, -1))
    rounding = max(torch.finfo(parameter.dtype).eps for parameter in change.parameters)
    own = torch.finfo(torch.float64).eps * change.matrix.shape[-1] * change.matrix.square().sum((-2, -1))
    limit = _ROUNDINGS * (rounding * after.size() + own * before.size())
    if not (moved <= limit).all():
        raise _refusal(
            change.name,
            change.module,
            f"the scores of a random input moved by {moved.max().item():.3g}, where rounding explains "
            f"{limit.min().item():.3g}: something else has a part in them",
        )
