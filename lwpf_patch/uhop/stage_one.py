"""Stage I in a script that does not know it: it runs right after a step of the optimizer that trains the feature maps.

Source: Wu et al., ICML 2024. Nothing of it is in the way of torch.compile, gradient checkpointing, autocast or
GradScaler, and a step that GradScaler skips does not count.
"""

import itertools
import time
import weakref
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import compiling, reporting
from ..errors import LwpfError, StageOneError
from ..specs import UHop
from .host_map import MAPS, HostFeatureMap
from .separation import separation_gradient

#: So many steps of other optimizers may pass before one must have trained a feature map that waits for it.
PATIENCE = 10
#: The feature maps whose last Stage I failed, by number: their host, and why. They may be gone when the process ends.
FAILURES: dict[int, tuple[str, str]] = {}


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Count the step of an optimizer for the feature maps that it trains, and run Stage I for those that are due."""
    waiting = [each for each in MAPS if each._steps < each.settings.last and not each.steps.is_meta]
    if not waiting:
        return
    waiting.sort(key=lambda each: each._number)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    counting = []
    for each in waiting:
        _check_kind(each)
        # One that listens and has no keys has seen no forward pass in training yet.
        if _is_trained_by(each, optimizer, trained) and not (each._listening and each._keys is None):
            counting.append(each)
    _check_patience(waiting)
    due = [each for each in counting if each._listening]
    for each in counting:
        if not each._listening:
            each._count_step()
    for _, group in itertools.groupby(due, key=lambda each: each.settings):
        together = list(group)
        try:
            run_stage_one(together)
        except BaseException as error:  # it stays due, with the keys of the next step
            for each in together:
                each._keys = None
                FAILURES[each._number] = each.host, str(error) or repr(error)
            raise
        for each in together:
            each._count_step()
            FAILURES.pop(each._number, None)


def _is_trained_by(feature_map: HostFeatureMap, optimizer: Any, trained: set[int]) -> bool:
    """Return whether an optimizer's steps are those that count for a feature map."""
    if feature_map._is_frozen():
        return False
    if not feature_map._trains:  # in none: that of the first step that finds keys
        if feature_map._keys is not None and feature_map not in _followed:
            _followed[feature_map] = weakref.ref(optimizer)
        return feature_map in _followed and _followed[feature_map]() is optimizer
    if id(feature_map.weight) in trained:
        feature_map._missed = 0
        return True
    # A gradient has reached the map in a new forward pass, and yet this optimizer does not have it.
    if feature_map._keys is not None and not feature_map._counted and feature_map.weight.grad is not None:
        feature_map._counted = True
        feature_map._missed += 1
    return False


_followed: "weakref.WeakKeyDictionary[HostFeatureMap, Any]" = weakref.WeakKeyDictionary()


def _check_patience(waiting: list[HostFeatureMap]) -> None:
    """Refuse to go on without an optimizer that has a map.

    Each further forward pass of that model is refused as well; another model's, while this one is still around, is not.

    Raises:
        LwpfError: The optimizers' steps have missed a map too often.
    """
    missed = [each for each in waiting if each._missed >= PATIENCE]
    for each in missed:
        each._missed = PATIENCE - 1
    if missed:
        raise LwpfError(
            f"uhop: after {PATIENCE} steps no optimizer has the feature maps of {missed[0].host} among its "
            "parameters, so that they would never be trained: apply lwpf_patch before the optimizer is made, give it "
            "model.parameters(), or set train=false in uhop"
        )


def _check_kind(feature_map: HostFeatureMap) -> None:
    """Refuse what shards or replaces parameters, so that Stage I has no whole Φ to work on.

    Raises:
        LwpfError: Φ is no ordinary parameter any more.
    """
    weight = feature_map._parameters.get("weight")
    whole = weight is not None and weight.dim() in (2, 3) and weight.size(-1) == weight.size(-2) > 0
    if whole and type(weight) is nn.Parameter and not hasattr(weight, "ds_id"):
        return
    found = "flattened into another parameter" if weight is None else f"a {type(weight).__name__} {list(weight.shape)}"
    raise LwpfError(
        f"uhop: the feature map of {feature_map.host} is {found}: Stage I needs it whole on every process, which FSDP "
        "and other ways of sharding parameters do not give it. Use DDP, or apply lwpf_patch without uhop"
    )


@torch.no_grad()
def run_stage_one(maps: list[HostFeatureMap]) -> None:
    """Run Stage I on the sampled keys, for all layers side by side; under DDP with gradients averaged over the ranks.

    An error on one rank is an error on all: until the end they tell each other with the gradients, so that none waits
    for one that has left, and either all maps change or none does.

    Raises:
        StageOneError: Keys or feature maps are not finite, or did not stay so; it failed on another rank; or another
            rank has no part in it.
    """
    settings = maps[0].settings
    begun = time.perf_counter()
    names = ", ".join(dict.fromkeys(each.host for each in maps))
    weights = [each.weight.detach().to(_dtype_of_keys(each), copy=True) for each in maps]
    _count_ranks(names, weights[0].device)
    failure: Exception | None = None
    patterns: list[Tensor] = []
    first: list[Tensor] = []
    losses: list[Tensor] = []
    said = begun
    for iteration in range(settings.iters + 1):
        gradients = [torch.zeros_like(weight) for weight in weights]
        try:
            if failure is None:
                patterns = patterns or _patterns(maps, names)
                results = [_step(weight, keys, settings) for weight, keys in zip(weights, patterns, strict=True)]
                losses = [loss.mean() for loss, _ in results]
                first = first or losses
                gradients = [gradient for _, gradient in results]
        except Exception as error:  # raised on this rank once all know of it
            failure = error
        averaged = _averaged(gradients, failure, names)
        if iteration == settings.iters:
            break
        for weight, gradient in zip(weights, averaged, strict=True):
            weight.sub_(gradient, alpha=settings.lr)
        if time.perf_counter() - said > 10:
            said = time.perf_counter()
            reporting.info(f"U-Hop Stage I on {names}: iteration {iteration + 1} of {settings.iters}")
    if not all(weight.isfinite().all() for weight in weights):
        raise StageOneError(
            f"uhop: Stage I on {names} did not stay finite with lr={settings.lr:g}, t={settings.t:g}: choose smaller "
            "ones in uhop. The feature maps are as they were, and it is tried again after the next step"
        )
    for each, weight in zip(maps, weights, strict=True):
        each.weight.copy_(weight)
        each._keys = None
    changes = list(zip(_floats(first), _floats(losses), strict=True))
    change = ", ".join(f"{a:.3f} -> {b:.3f}" for a, b in changes)
    reporting.info(
        f"U-Hop Stage I on {names} after step {maps[0]._steps + 1}: {len(maps)} layers, {settings.iters} iterations, "
        f"{time.perf_counter() - begun:.1f} s; separation loss by layer: {change}"
    )
    if any(after > before for before, after in changes):
        reporting.warn(
            f"uhop: in Stage I the separation loss of some layers of {names} went up: lr={settings.lr:g} is too large "
            "for them; choose a smaller one in uhop"
        )
    _warn_of_idle_layers(maps, patterns, changes)


compiling.disable_in(globals(), "run_stage_one")  # where the optimizer's step is compiled


def _warn_of_idle_layers(
    maps: list[HostFeatureMap], patterns: list[Tensor], changes: list[tuple[float, float]]
) -> None:
    """Warn once, for all layers, where the keys gave Stage I nothing to do, or where it did nothing.

    Args:
        maps: The feature maps.
        patterns: The different keys of each, (..., M, d).
        changes: The losses of each, before and after.
    """
    names = ", ".join(dict.fromkeys(each.host for each in maps))
    idle = [abs(after - before) < max(abs(before) / 100, 0.001) for before, after in changes]
    alone = sum(keys.shape[-2] < 2 for keys in patterns)
    alike = sum(still and keys.shape[-2] > 1 and _are_alike(keys) for still, keys in zip(idle, patterns, strict=True))
    problems = []
    if alone:
        problems.append(
            f"{alone} layers of {names} saw one key only, which nothing can be separated from: their feature maps stay "
            "as they are"
        )
    if alike:
        problems.append(
            f"in {alike} layers of {names} all keys are equal but for rounding, and Stage I could not tell them apart"
        )
    if problems:
        problems.append("give it more different keys (samples), or see whether the inputs are different at all")
        problems += dict.fromkeys(each.advice for each in maps if each.advice)
    elif all(idle) and maps[0]._steps == 0:  # a later Stage I has little to do where the first one has done it
        problems.append(
            f"Stage I changed the separation loss of every layer of {names} by less than 1 %: it separated nothing. "
            "Where keys lie apart already there is nothing to gain from U-Hop; else it needs more steps (iters), "
            "larger ones (lr), or more keys (samples)"
        )
    if problems:
        reporting.warn(f"uhop: {'; '.join(problems)}")


def _are_alike(keys: Tensor) -> bool:
    """Return whether keys (..., M, d) have one direction, but for the rounding of half precision."""
    directions = nn.functional.normalize(keys, dim=-1)
    return bool((directions - directions[..., :1, :]).norm(dim=-1).max() < 0.02)


def _step(weight: Tensor, keys: Tensor, settings: UHop) -> tuple[Tensor, Tensor]:
    """Return loss and gradient; 0 where there is no pair, so that all processes take part in every step."""
    if keys.shape[-2] < 2:
        return weight.new_zeros(()), torch.zeros_like(weight)
    return separation_gradient(weight, keys, settings.t, settings.loss)


def _floats(values: list[Tensor]) -> list[float]:
    return torch.stack([value.double() for value in values]).tolist()


def _patterns(maps: list[HostFeatureMap], names: str) -> list[Tensor]:
    """Return what Stage I separates, for each feature map.

    Raises:
        StageOneError: Keys or feature maps are not finite.
    """
    for what, tensors in (("keys", [each._keys for each in maps]), ("feature maps", [each.weight for each in maps])):
        broken = sum(tensor is not None and not tensor.isfinite().all() for tensor in tensors)
        if broken:
            raise StageOneError(
                f"uhop: Stage I on {names}: the {what} of {broken} of {len(maps)} layers hold NaN or infinity, which "
                "nothing can be separated with: see whether the loss is finite. The feature maps are as they were, and "
                "it is tried again after the next step"
            )
    patterns = [_different(each) for each in maps]
    return patterns


def _dtype_of_keys(feature_map: HostFeatureMap) -> torch.dtype:
    keys = feature_map._keys
    assert keys is not None
    return torch.promote_types(keys.dtype, torch.float32)


def _different(feature_map: HostFeatureMap) -> Tensor:
    """Return the sampled keys without repetitions, (heads, M, d) or (M, d), in float32 at least.

    Stored patterns that are parameters are repeated for each item of a batch, and nothing can separate them.
    """
    keys = feature_map._keys
    assert keys is not None
    keys = keys.to(_dtype_of_keys(feature_map)).to(feature_map.weight.device)
    rows = keys.transpose(0, 1).flatten(1) if keys.dim() == 3 else keys
    rows = torch.unique(rows, dim=0)
    return rows.unflatten(1, (keys.size(0), -1)).transpose(0, 1).contiguous() if keys.dim() == 3 else rows


def _ranks() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _count_ranks(names: str, device: torch.device) -> None:
    """See that all ranks take part, before there is a collective operation that one of them does not expect.

    Under ``torch.distributed.algorithms.join.Join`` a rank whose inputs have ended answers those operations of DDP that
    it foresees. What it waits for between two steps is a sum over one element, by which each of the others says that it
    goes on, and to which it adds 0. This is that sum.

    Raises:
        StageOneError: A rank has no inputs left.
    """
    ranks = _ranks()
    if ranks == 1:
        return
    present = torch.ones(1, device=device)
    distributed.all_reduce(present)
    left = ranks - round(present.item())
    if left:
        raise StageOneError(
            f"uhop: Stage I on {names} is to average over {ranks} processes, but {left} of them have no inputs left "
            "(Join, or DDP's join()) and cannot take part: give all of them the same number of batches, or let Stage I "
            "run only before the first has ended (every= and until= in uhop)"
        )


def _averaged(gradients: list[Tensor], failure: Exception | None, names: str) -> list[Tensor]:
    """Average over the processes, so that Φ stays the same on all of them; and tell all if one has failed.

    Raises:
        Exception: ``failure``, if that is what happened on this rank.
        StageOneError: Another one has failed.
    """
    ranks = _ranks()
    if ranks == 1:
        if failure is not None:
            raise failure
        return gradients
    failed = gradients[0].new_zeros(ranks)
    if failure is not None:
        failed[distributed.get_rank()] = 1.0
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), failed])
    distributed.all_reduce(flat)
    *parts, failed = torch.split(flat, [*(gradient.numel() for gradient in gradients), ranks])
    if failed.any():
        if failure is not None:
            raise failure
        others = ", ".join(str(rank) for rank in failed.nonzero().flatten().tolist())
        raise StageOneError(
            f"uhop: Stage I on {names} failed on rank {others}, whose error says why. The feature maps are as they "
            "were, and it is tried again after the next step"
        )
    return [part.view_as(gradient) / ranks for part, gradient in zip(parts, gradients, strict=True)]


def watch_optimizers() -> None:
    """Have Stage I run after the steps of all optimizers of torch.optim; called once, when this package is imported."""
    register_optimizer_step_post_hook(_after_step)
