"""U-Hop in a script that does not know it: the feature map of a host's attention, and Stage I while the script trains.

Source: Wu et al., ICML 2024. A patched attention module owns its Φ as ``self.feature_map``, so that the script's
optimizer, EMA, checkpoints and DDP see it. A forward pass in training keeps a sample of its keys. Stage I runs outside
of it, right after a step of the optimizer that trains Φ: nothing of it is in the way of torch.compile, gradient
checkpointing, autocast or GradScaler, and a step that GradScaler skips does not count.
"""

import itertools
import math
import time
import weakref
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import reporting, tracing, unpickling
from .errors import LwpfError, StageOneError
from .separation import FeatureMap, separation_gradient
from .settings import UHop

#: So many steps of other optimizers may pass before one must have trained a feature map that waits for it.
PATIENCE = 10

_numbers = itertools.count()
_separated_hosts: set[str] = set()
#: The feature maps whose last Stage I failed, by number: their host, and why. They may be gone when the process ends.
_failures: dict[int, tuple[str, str]] = {}
_maps: "weakref.WeakSet[HostFeatureMap]" = weakref.WeakSet()


class HostFeatureMap(FeatureMap):
    """The feature map Φ of one attention module of a host, the identity until Stage I has run.

    Args:
        dim: d, the number of features of a head.
        heads: The number of heads, each with a map of its own; None: there are no heads.
        settings: When Stage I runs, and how.
        host: The host's name.
        like: A tensor on the device and of the dtype that the map shall have.

    Attributes:
        weight: W = Φ - I, (heads, d, d) or (d, d).
        steps: How many steps of the optimizer have been made, until Stage I has run for the last time; int64. With the
            weight it is in the checkpoint, so that a run that is resumed goes on where it stopped.
        settings: When Stage I runs, and how.
        host: The host's name.
        attached: Whether ``apply()`` put it there, and ``revert()`` may take it away.
        advice: What else to do, with this host, where Stage I separates nothing.
        site: Of an attached one: the function whose patched code calls it.
        request: Of an attached one: the settings that the host is patched with.
    """

    advice = ""
    steps: Tensor
    _number: int

    def __init__(self, dim: int, heads: int | None, settings: UHop, host: str, like: Tensor) -> None:
        super().__init__(dim, heads, device=like.device, dtype=like.dtype)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=like.device))
        self.host = host
        self.attached = False
        self.site = ""
        self.request: Any = None
        self._begin(settings, 0)  # nothing is read here, for models that are made without data
        _register(self)

    def adopt(self, settings: UHop) -> None:
        """Takes over other settings, and goes on from where it is."""
        if self.weight.is_meta:
            self._begin(settings, 0)
            return
        if not self.steps and self.weight.any():
            self.steps.fill_(1)  # an average of models may have lost the count
        self._begin(settings, int(self.steps))

    def _begin(self, settings: UHop, steps: int) -> None:
        self.settings = settings
        self.weight.requires_grad_(settings.train)
        self._trains = settings.train
        self._keys: Tensor | None = None
        self._counted = False  # whether these keys have been waiting for an optimizer already
        self._missed = 0
        self._set_steps(steps)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:  # type: ignore[override]
        """Maps the query so that its products with the keys are those of the mapped patterns.

        ``<Φ(q), Φ(k)> = <q Φ^T Φ, k>``: the query alone is multiplied, once, and the keys stay as they are.

        Args:
            query: (B, heads, L, d) or (B heads, L, d); (L, d) where there are no heads.
            key: (B, heads, S, d) or (B heads, S, d); (S, d) where there are no heads.

        Returns:
            q Φ^T Φ, of the query's shape and dtype.
        """
        if not torch.jit.is_scripting():
            if isinstance(query, fx.Proxy):
                return tracing.call_module(self, query, key)
            if self._listening and torch.is_grad_enabled() and not tracing.is_exporting():
                self._keys = _sample(self, key.detach())
                self._counted = False
            return _map_query(query, _gram_in_full_precision(self, query))
        return _map_query(query, self.gram().to(query.dtype))

    def matrix(self) -> Tensor:
        """Returns the matrix of Φ, I + W; see :meth:`FeatureMap.matrix`.

        Until Stage I has run, the gradient of W is 0 and not missing: the optimizer leaves the identity alone, and DDP
        gets the gradient that it waits for. The values are always those of W, which an average of models may have got
        from elsewhere.
        """
        weight: Tensor = self.weight
        if not self._trains:
            weight = weight.detach()
        elif not self._separated:
            weight = weight.detach() + 0.0 * weight
        return torch.eye(weight.size(-1), device=weight.device, dtype=weight.dtype) + weight

    def _is_frozen(self) -> bool:
        """Returns whether the script has frozen a map that was to train; such a network stays as it is."""
        return self._trains and not self.weight.requires_grad

    def _set_steps(self, steps: int) -> None:
        # Python's own values, so that a forward pass neither waits for a device nor breaks a compiled graph.
        self._steps = steps
        self._separated = steps > 0
        if self._separated:
            _separated_hosts.add(self.host)
        self._listening = self.settings.is_due(steps + 1)

    def _count_step(self) -> None:
        """Count a step of the optimizer; one with a Stage I counts once that has succeeded."""
        self.steps.fill_(self._steps + 1)
        self._set_steps(self._steps + 1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Loads a checkpoint; one without Φ means the identity, before Stage I."""
        if not any(prefix + name in state_dict for name in ("weight", "steps")):
            if self.weight.is_meta and rest[0].get("assign_to_params_buffers", False):
                self.to_empty(device=torch.get_default_device())  # as the rest becomes real
            with torch.no_grad():
                self.weight.zero_()
                self.steps.zero_()
        else:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        self.adopt(self.settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keys": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        unpickling.require_patch(self)
        _register(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostFeatureMap":
        return unpickling.deepcopy(self, memo)

    def __prepare_scriptable__(self) -> "HostFeatureMap":
        if not self._separated:
            raise LwpfError(
                f"torch.jit.script: the feature map of {self.host} waits for Stage I (uhop), which a scripted model "
                "cannot run: script the model after its training has begun, or apply lwpf_patch without uhop"
            )
        return self

    def extra_repr(self) -> str:
        """Shows the sizes and the settings."""
        return f"{super().extra_repr()}, {self.settings}"


class NoFeatureMap(nn.Module):
    """Stands where a feature map could be, and does nothing.

    Attributes:
        host: The host's name.
        attached: Whether ``revert()`` may take it away.
    """

    def __init__(self, host: str, attached: bool) -> None:
        super().__init__()
        self.host, self.attached = host, attached

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Returns the query."""
        return query


class FoldedFeatureMap(NoFeatureMap):
    """Stands where a feature map was whose matrix is now part of the projections.

    Args:
        folded: The map that was there.
    """

    def __init__(self, folded: HostFeatureMap) -> None:
        super().__init__(folded.host, folded.attached)


def without_module(query: Tensor, key: Tensor) -> Tensor:
    """Stands for a feature map where a host's function is called past the modules that have one.

    Raises:
        LwpfError: Always: there is no feature map to use.
    """
    raise LwpfError(
        "U-Hop was asked for (uhop), but this attention function is called directly, and only modules have a feature "
        "map: call the module, or apply lwpf_patch without uhop"
    )


def summary(host: str) -> dict[str, int]:
    """Returns how many feature maps of a host live, and how many of them have been through Stage I."""
    maps = [each for each in _maps if each.host == host]
    return {"modules": len(maps), "separated": sum(each._separated for each in maps)}


def report(host: str) -> str | None:
    """Returns what people should know when the process ends: whose Stage I failed or never ran, and why."""
    reasons = [reason for name, reason in _failures.values() if name == host]
    if reasons:
        return (
            f"{host}: U-Hop's Stage I failed for {len(reasons)} feature maps when it was last tried, and they are as "
            f"they were before: {reasons[-1]}"
        )
    waiting = [each for each in _maps if each.host == host and not each._separated]
    frozen = [each for each in waiting if each._is_frozen()]
    saw = [each for each in waiting if each._keys is not None and each not in frozen]
    if host in _separated_hosts and not saw:
        return None
    if saw:
        why = "no step of an optimizer that has them among its parameters came after their forward passes"
    elif frozen:
        why = (
            "the script has frozen them, and train=true asks for maps that train; train=false separates frozen ones too"
        )
    else:
        why = "it runs after the first step of the torch.optim optimizer that trains the model"
    if host in _separated_hosts:
        return (
            f"{host}: U-Hop's Stage I ran in this process, but not on {len(saw)} feature maps that waited for it, and "
            f"are still the identity: {why}"
        )
    return f"{host}: U-Hop was asked for, but Stage I never ran, and every feature map is still the identity: {why}"


# --- in the forward pass --------------------------------------------------------------------------------------------


def _map_query(query: Tensor, gram: Tensor) -> Tensor:
    if gram.dim() == 2:
        return query @ gram
    if query.dim() == 3:
        return (query.unflatten(0, (-1, gram.size(0))) @ gram).flatten(0, 1)  # type: ignore[no-untyped-call]
    if query.is_contiguous():
        return query @ gram
    # As a projection lays it out, (B, L, heads, d) in memory: one product for each head, and nothing is copied.
    batch, length = query.size(0), query.size(2)
    mapped = torch.bmm(query.transpose(0, 1).flatten(1, 2), gram)
    return mapped.unflatten(1, (batch, length)).transpose(0, 1)  # type: ignore[no-untyped-call]


def _gram_in_full_precision(feature_map: HostFeatureMap, query: Tensor) -> Tensor:
    """Computes Φ^T Φ in the dtype of Φ under autocast too, and rounds it once, to what the query has."""
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return feature_map.gram().to(query.dtype)
    return feature_map.gram().to(query.dtype)


def _sample(feature_map: HostFeatureMap, key: Tensor) -> Tensor:
    """Takes keys from everywhere, the same for all heads: (heads, n, d) or (n, d), n at most ``samples``.

    They are the same if the pass is computed again, for gradient checkpointing.

    Raises:
        LwpfError: In a replica of nn.DataParallel, whose keys would be lost with it.
    """
    if getattr(feature_map, "_is_replica", False):
        raise LwpfError(
            "uhop: nn.DataParallel makes new replicas of the model for every step, and what they see does not reach "
            "Stage I: use DistributedDataParallel, or apply lwpf_patch without uhop"
        )
    weight = feature_map.weight
    if weight.dim() == 3:
        key = key.unflatten(0, (-1, weight.size(0))) if key.dim() == 3 else key  # type: ignore[no-untyped-call]
        key = key.transpose(0, 1).flatten(1, 2)
    count, samples = int(key.size(-2)), feature_map.settings.samples
    if count <= samples:
        return key.clone()
    # Steps of the golden section, of no common divisor with the count: all different, and spread over items and
    # positions alike, where an even step could meet the same position of every item.
    step = round(count * 0.6180339887498949)
    while math.gcd(step, count) > 1:
        step += 1
    return key[..., torch.arange(samples, device=key.device) * step % count, :]


# --- Stage I --------------------------------------------------------------------------------------------------------

_hook: Any = None


def _register(feature_map: HostFeatureMap) -> None:
    global _hook
    feature_map._number = next(_numbers)  # of the same order in every process
    _maps.add(feature_map)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Counts the step of an optimizer for the feature maps that it trains, and runs Stage I for those that are due."""
    waiting = [each for each in _maps if each._steps < each.settings.last and not each.steps.is_meta]
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
                _failures[each._number] = each.host, str(error) or repr(error)
            raise
        for each in together:
            each._count_step()
            _failures.pop(each._number, None)


def _is_trained_by(feature_map: HostFeatureMap, optimizer: Any, trained: set[int]) -> bool:
    """Returns whether an optimizer's steps are those that count for a feature map."""
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
    if feature_map._missed >= PATIENCE:
        raise LwpfError(
            f"uhop: after {PATIENCE} steps no optimizer has the feature maps of {feature_map.host} among its "
            "parameters, so that they would never be trained: apply lwpf_patch before the optimizer is made, give it "
            "model.parameters(), or set train=false in uhop"
        )
    return False


_followed: "weakref.WeakKeyDictionary[HostFeatureMap, Any]" = weakref.WeakKeyDictionary()


def _check_kind(feature_map: HostFeatureMap) -> None:
    """Refuses what shards or replaces parameters, so that Stage I has no whole Φ to work on.

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


@torch.compiler.disable  # type: ignore[untyped-decorator] # where the optimizer's step is compiled
@torch.no_grad()
def run_stage_one(maps: list[HostFeatureMap]) -> None:
    """Runs Stage I on the sampled keys, for all layers side by side; under DDP with gradients averaged over the ranks.

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
    """Returns loss and gradient; 0 where there is no pair, so that all processes take part in every step."""
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
    """Returns the sampled keys without repetitions, (heads, M, d) or (M, d), in float32 at least.

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
    """Averages over the processes, so that Φ stays the same on all of them; and tells all if one has failed.

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
