"""The feature map of a host's attention.

A patched attention module owns its Φ as ``self.feature_map``, so that the script's optimizer, EMA, checkpoints and DDP
see it. A forward pass in training keeps a sample of its keys, for :mod:`lwpf_patch.uhop.stage_one`.
"""

import itertools
import math
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import autocasting, tracing
from ..attached import Attached
from ..errors import LwpfError
from ..specs import UHop
from . import sharding
from .separation import FeatureMap

_numbers = itertools.count()
#: All feature maps of hosts that live.
MAPS: "weakref.WeakSet[HostFeatureMap]" = weakref.WeakSet()
#: The hosts some of whose feature maps have been through Stage I.
SEPARATED_HOSTS: set[str] = set()


class HostFeatureMap(Attached, FeatureMap):
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
        advice: What else to do, with this host, where Stage I separates nothing.
    """

    advice = ""
    _is_after_fsdp = False  # whether FSDP had the attention module before
    steps: Tensor
    _number: int

    def __init__(self, dim: int, heads: int | None, settings: UHop, host: str, like: Tensor) -> None:
        super().__init__(dim, heads, device=like.device, dtype=like.dtype)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=like.device))
        self.host = host
        self._start_at(settings, 0)  # nothing is read here, for models that are made without data
        _register(self)

    def take_settings(self, settings: UHop) -> None:
        """Take over other settings, and go on from where it is."""
        if self.weight.is_meta:
            self._start_at(settings, 0)
            return
        # An average of models may have lost the count. No other process is asked: which models live may differ.
        if not self.steps and not sharding.is_dtensor(self.weight) and sharding.has_values_here(self.weight):
            self.steps.fill_(1)
        self._start_at(settings, int(self.steps))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make Φ the identity, before Stage I."""
        super().reset_parameters()
        if "steps" in self._buffers:  # the constructor of the base has none yet
            self.steps.zero_()
            self._start_over(0)

    def _apply(self, fn: Any, recurse: bool = True) -> "HostFeatureMap":
        """Apply a function to the tensors; where ``to_empty`` makes them real, Φ is the identity.

        The script that initialises the model then need not know of Φ.
        """
        was_meta = self.steps.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.steps.is_meta:
            self.reset_parameters()
        return self

    def _start_at(self, settings: UHop, steps: int) -> None:
        self.settings = settings
        if "weight" in self._parameters:  # else FSDP1 has flattened it into another
            self.weight.requires_grad_(settings.train)
        self._trains = settings.train
        self._start_over(steps)

    def _start_over(self, steps: int) -> None:
        self._keys: Tensor | None = None
        self._counted = False  # whether these keys have been waiting for an optimizer already
        self._missed = 0
        self._set_steps(steps)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:  # type: ignore[override]
        """Map the query so that its products with the keys are those of the mapped patterns.

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

    def allows_fast_path(self) -> bool:
        """Return False: a layer that is computed by one call of its host's knows nothing of this."""
        return False

    def passed_with(self, tensor: Any) -> Any:
        """Return this as an argument, beside a tensor, of a function that torch.fx does not look into."""
        return tracing.as_argument(self, tensor)

    def matrix(self) -> Tensor:
        """Return the matrix of Φ, I + W; see :meth:`FeatureMap.matrix`.

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
        """Return whether the script has frozen a map that was to train; such a network stays as it is."""
        return self._trains and not self.weight.requires_grad

    def _set_steps(self, steps: int) -> None:
        # Python's own values, so that a forward pass neither waits for a device nor breaks a compiled graph.
        self._steps = steps
        self._separated = steps > 0
        if self._separated:
            SEPARATED_HOSTS.add(self.host)
        self._listening = self.settings.is_due(steps + 1)

    def _count_step(self) -> None:
        """Count a step of the optimizer; one with a Stage I counts once that has succeeded."""
        self.steps.fill_(self._steps + 1)
        self._set_steps(self._steps + 1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load a checkpoint; one without Φ means the identity, before Stage I."""
        if not any(prefix + name in state_dict for name in ("weight", "steps")):
            if self.weight.is_meta and rest[0].get("assign_to_params_buffers", False):
                self.to_empty(device=torch.get_default_device())  # as the rest becomes real
            with torch.no_grad():
                self.weight.zero_()
                self.steps.zero_()
        else:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        if sharding.is_dtensor(self.weight) and not self.weight.is_meta and not self.steps:
            self.steps.fill_(bool(sharding.gather(self.weight).any()))  # all processes load
        self.take_settings(self.settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keys": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _register(self)

    def __prepare_scriptable__(self) -> "HostFeatureMap":
        if not self._separated:
            raise LwpfError(
                f"torch.jit.script: the feature map of {self.host} waits for Stage I (uhop), which a scripted model "
                "cannot run: script the model after its training has begun, or apply lwpf_patch without uhop"
            )
        return self

    def extra_repr(self) -> str:
        """Show the sizes and the settings."""
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
        """Return the query."""
        return query

    def allows_fast_path(self) -> bool:
        """Return True."""
        return True

    def passed_with(self, tensor: Any) -> Any:
        """Return this as an argument; see :meth:`HostFeatureMap.passed_with`."""
        return tracing.as_argument(self, tensor)


class FoldedFeatureMap(NoFeatureMap):
    """Stands where a feature map was whose matrix is now part of the projections.

    Args:
        folded: The map that was there.
    """

    def __init__(self, folded: HostFeatureMap) -> None:
        super().__init__(folded.host, folded.attached)


def without_module(query: Tensor, key: Tensor) -> Tensor:
    """Stand for a feature map where a host's function is called past the modules that have one.

    Raises:
        LwpfError: Always: there is no feature map to use.
    """
    raise LwpfError(
        "U-Hop was asked for (uhop), but this attention function is called directly, and only modules have a feature "
        "map: call the module, or apply lwpf_patch without uhop"
    )


def _register(feature_map: HostFeatureMap) -> None:
    feature_map._number = next(_numbers)  # of the same order in every process
    MAPS.add(feature_map)


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
    """Compute Φ^T Φ in the dtype of Φ under autocast too, and round it once, to what the query has."""
    device = query.device.type
    if autocasting.in_autocast(device):
        with autocasting.without_autocast(device):
            return feature_map.gram().to(query.dtype)
    return feature_map.gram().to(query.dtype)


def _sample(feature_map: HostFeatureMap, key: Tensor) -> Tensor:
    """Take keys from everywhere, the same for all heads: (heads, n, d) or (n, d), n at most ``samples``.

    They are the same if the pass is computed again, for gradient checkpointing.

    Raises:
        LwpfError: In a replica of nn.DataParallel, whose keys would be lost with it; or in a wrapper that does not know
            the map.
    """
    if getattr(feature_map, "_is_replica", False):
        raise LwpfError(
            "uhop: nn.DataParallel makes new replicas of the model for every step, and what they see does not reach "
            "Stage I: use DistributedDataParallel, or apply lwpf_patch without uhop"
        )
    weight = feature_map.weight
    if not torch.compiler.is_compiling():
        sharding.check_wrapper(feature_map)
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
