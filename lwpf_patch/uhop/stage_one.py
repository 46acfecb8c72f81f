"""Stage I in a script that does not know it: it runs right after a step of the optimizer that trains the feature maps.

Source: Wu et al., ICML 2024. Nothing of it is in the way of torch.compile, gradient checkpointing, autocast or
GradScaler, and a step that GradScaler skips does not count.
"""

import itertools
import math
import time
import weakref
import zlib
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .. import compiling, reporting
from ..errors import LwpfError, StageOneError
from ..specs import UHop
from . import sharding
from .host_map import MAPS, HostFeatureMap
from .separation import separation_gradient

#: So many steps of other optimizers may pass before one must have trained a feature map that waits for it.
PATIENCE = 10
#: The feature maps whose last Stage I failed, by number: their host, and why. They may be gone when the process ends.
FAILURES: dict[int, tuple[str, str]] = {}


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Count the step of an optimizer for the feature maps that it trains, and run Stage I for those that are due."""
    waiting = [each for each in MAPS if each._steps < each.settings.last and not each.steps.is_meta]
    if not waiting or optimizer in _parts or _makes_its_state(optimizer):
        return
    waiting.sort(key=lambda each: each._number)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    counting = []
    waiting = sharding.check_kinds(waiting)
    for each in waiting:
        # One that listens and has no keys has seen no forward pass in training yet.
        if _is_trained_by(each, optimizer, trained) and not (each._listening and each._keys is None):
            sharding.check_wrapper(each)  # as in the forward pass, but for those that are compiled
            sharding.check_is_sharded_now(each)
            counting.append(each)
    _check_patience(waiting)
    due = [each for each in counting if each._listening]
    for each in counting:
        if not each._listening:
            each._count_step()
    for _, group in itertools.groupby(due, key=lambda each: (each.settings, sharding.mesh_of(each))):
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
    if id(sharding.parameter_of(feature_map)) in trained:
        feature_map._missed = 0
        return True
    # A gradient has reached the map in a new forward pass, and yet this optimizer does not have it.
    if feature_map._keys is not None and not feature_map._counted and feature_map.weight.grad is not None:
        feature_map._counted = True
        feature_map._missed += 1
    return False


_followed: "weakref.WeakKeyDictionary[HostFeatureMap, Any]" = weakref.WeakKeyDictionary()
_parts: "weakref.WeakSet[Any]" = weakref.WeakSet()


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Take note of an optimizer whose steps are a part of another's, which hands on what they make afterwards.

    That of ZeroRedundancyOptimizer has other parameters on each process.
    """
    part = getattr(optimizer, "optim", None)
    if isinstance(part, torch.optim.Optimizer):
        _parts.add(part)


def _makes_its_state(optimizer: Any) -> bool:
    """Return whether a step had a rate of 0 and gradients of 0, and so is none of the training.

    torch.distributed.checkpoint has an optimizer make its state by such a step, when it saves and when it loads.
    """
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if isinstance(rate, Tensor) and rate.device.type != "cpu":  # nothing waits for a device here
            return False
        if rate != 0:
            return False
    gradients = (each.grad for group in optimizer.param_groups for each in group["params"])
    return all(each is None or not (each.is_sparse or sharding.has_values_here(each)) for each in gradients)


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
            "parameters, so that they would never be trained: apply lwpf_patch before the optimizer is made, make that "
            "after fully_shard(), give it model.parameters(), or set train=false in uhop"
        )


@torch.no_grad()
def run_stage_one(maps: list[HostFeatureMap]) -> None:
    """Run Stage I on the sampled keys, for all layers side by side, with gradients averaged over the ranks.

    The maps are of the same settings and on the same mesh. An error on one rank is an error on all: until the end they
    tell each other with the gradients, so that none waits for one that has left, and either all maps change or none
    does.

    Raises:
        StageOneError: Keys or feature maps are not finite, or did not stay so; it failed on another rank; or another
            rank has no part in it, or other maps.
    """
    settings = maps[0].settings
    begun = time.perf_counter()
    names = ", ".join(dict.fromkeys(each.host for each in maps))
    mesh = sharding.mesh_of(maps[0])
    groups = sharding.groups_of(mesh)
    device = maps[0].weight.device if mesh is None else torch.device(mesh.device_type)
    _count_ranks(groups, names, device)
    _check_maps(groups, maps, names, device)
    weights = [sharding.gather(each.weight).to(_dtype_of_keys(each), copy=True) for each in maps]
    _check_values(groups, maps, weights, names)
    failure: Exception | None = None
    patterns: list[Tensor] = []
    first: list[Tensor] = []
    losses: list[Tensor] = []
    said = begun
    for iteration in range(settings.iters + 1):
        gradients = [torch.zeros_like(weight) for weight in weights]
        try:
            if failure is None:
                patterns = patterns or _patterns(maps, weights, names)
                results = [_step(weight, keys, settings) for weight, keys in zip(weights, patterns, strict=True)]
                losses = [loss.mean() for loss, _ in results]
                first = first or losses
                gradients = [gradient for _, gradient in results]
        except Exception as error:  # raised on this rank once all know of it
            failure = error
        averaged = _averaged(groups, gradients, failure, names)
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
        sharding.write(each.weight, weight)
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


def _patterns(maps: list[HostFeatureMap], weights: list[Tensor], names: str) -> list[Tensor]:
    """Return what Stage I separates, for each feature map, where its W is.

    Raises:
        StageOneError: Keys or feature maps are not finite.
    """
    for what, tensors in (("keys", [each._keys for each in maps]), ("feature maps", weights)):
        broken = sum(tensor is not None and not tensor.isfinite().all() for tensor in tensors)
        if broken:
            raise StageOneError(
                f"uhop: Stage I on {names}: the {what} of {broken} of {len(maps)} layers hold NaN or infinity, which "
                "nothing can be separated with: see whether the loss is finite. The feature maps are as they were, and "
                "it is tried again after the next step"
            )
    return [_different(each).to(weight.device) for each, weight in zip(maps, weights, strict=True)]


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
    keys = keys.to(_dtype_of_keys(feature_map))
    rows = keys.transpose(0, 1).flatten(1) if keys.dim() == 3 else keys
    rows = torch.unique(rows, dim=0)
    return rows.unflatten(1, (keys.size(0), -1)).transpose(0, 1).contiguous() if keys.dim() == 3 else rows


def _ranks(groups: list[Any]) -> int:
    return math.prod(distributed.get_world_size(group) for group in groups)


def _count_ranks(groups: list[Any], names: str, device: torch.device) -> None:
    """See that all ranks take part, before there is a collective operation that one of them does not expect.

    Under ``torch.distributed.algorithms.join.Join`` a rank whose inputs have ended answers those operations of DDP that
    it foresees. What it waits for between two steps is a sum over one element, by which each of the others says that it
    goes on, and to which it adds 0. This is that sum.

    Raises:
        StageOneError: A rank has no inputs left.
    """
    present = torch.ones(1, device=device)
    for group in groups:
        distributed.all_reduce(present, group=group)
    ranks = _ranks(groups)
    left = ranks - round(present.item())
    if left:
        raise StageOneError(
            f"uhop: Stage I on {names} is to average over {ranks} processes, but {left} of them have no inputs left "
            "(Join, or DDP's join()) and cannot take part: give all of them the same number of batches, or let Stage I "
            "run only before the first has ended (every= and until= in uhop)"
        )


def _check_maps(groups: list[Any], maps: list[HostFeatureMap], names: str, device: torch.device) -> None:
    """See that all ranks work on as many maps, of the same shapes, and with the same settings.

    Raises:
        StageOneError: They do not.
    """
    if not groups:
        return
    text = repr([(tuple(each.weight.shape), _dtype_of_keys(each), each._steps) for each in maps]) + repr(
        maps[0].settings
    )
    code = zlib.crc32(text.encode())
    if _spread(groups, torch.tensor([code], dtype=torch.int64, device=device)).any():
        raise StageOneError(
            f"uhop: Stage I on {names} is to average over {_ranks(groups)} processes, but they have different feature "
            f"maps to work on, here {len(maps)}: each of them needs the whole model (no pipeline or tensor "
            "parallelism), and the same layers in each forward pass. The feature maps are as they were, and it is "
            "tried again after the next step"
        )


def _check_values(groups: list[Any], maps: list[HostFeatureMap], weights: list[Tensor], names: str) -> None:
    """See that maps that are not sharded are the same on all ranks, but for rounding.

    Raises:
        StageOneError: They are not.
    """
    if not groups or sharding.mesh_of(maps[0]) is not None:
        return
    flat = torch.cat([weight.flatten() for weight in weights])
    allowed = max(torch.finfo(each.weight.dtype).eps for each in maps) ** 0.5 * flat.abs().max()
    apart = (_spread(groups, flat) > allowed).any().to(torch.int64)  # not finite is told of later
    for group in groups:
        distributed.all_reduce(apart, distributed.ReduceOp.MAX, group=group)
    if apart.item():
        raise StageOneError(
            f"uhop: the feature maps of {names} differ between the {_ranks(groups)} processes, since nothing averages "
            "their gradients: apply lwpf_patch before DistributedDataParallel or fully_shard() is, and do not have "
            "these ignore the feature maps"
        )


def _spread(groups: list[Any], values: Tensor) -> Tensor:
    """Return the differences of the largest and the least of each value over the ranks."""
    largest, least = values.clone(), values.clone()
    for group in groups:
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=group)
        distributed.all_reduce(least, distributed.ReduceOp.MIN, group=group)
    return largest - least


def _averaged(groups: list[Any], gradients: list[Tensor], failure: Exception | None, names: str) -> list[Tensor]:
    """Average over the processes, so that Φ stays the same on all of them; and tell all if one has failed.

    Raises:
        Exception: ``failure``, if that is what happened on this rank.
        StageOneError: Another one has failed.
    """
    if not groups:
        if failure is not None:
            raise failure
        return gradients
    failed = gradients[0].new_zeros(distributed.get_world_size())
    if failure is not None:
        failed[distributed.get_rank()] = 1.0
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), failed])
    for group in groups:
        distributed.all_reduce(flat, group=group)
    *parts, failed = torch.split(flat, [*(gradient.numel() for gradient in gradients), len(failed)])
    if failed.any():
        if failure is not None:
            raise failure
        others = ", ".join(str(rank) for rank in failed.nonzero().flatten().tolist())
        raise StageOneError(
            f"uhop: Stage I on {names} failed on rank {others}, whose error says why. The feature maps are as they "
            "were, and it is tried again after the next step"
        )
    ranks = _ranks(groups)
    return [part.view_as(gradient) / ranks for part, gradient in zip(parts, gradients, strict=True)]


def watch_optimizers() -> None:
    """Have Stage I run after the steps of all optimizers of torch.optim; called once, when this package is imported."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
