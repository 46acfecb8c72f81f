"""The attention weights of a model for some inputs, and which keys they forget."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import autocasting, normalising, reporting, watching
from ..attention.owned import OwnedFuncD
from ..backends import Call
from ..errors import SettingsError, UnsupportedError, shown
from ..options import texts
from .recording import called_modules
from .scoring import cast, heads_before_rows, scores_by_head, scores_of_rows
from .watchable import check_watchable, unwrapped

#: Which places of a dimension are wanted: one, several, or those of a slice.
Places = int | Sequence[int] | slice


class AttentionMap(NamedTuple):
    """What one call of an attention layer computed; each tensor is (batch, heads, queries, keys).

    Attributes:
        weights: D' times the normalised D: what multiplies the values, but for dropout.
        kept: Which keys D' keeps.
        forgotten: Which keys it forgets. A key that is neither is hidden by a mask.
    """

    weights: Tensor
    kept: Tensor
    forgotten: Tensor


def attention_maps(
    model: nn.Module,
    inputs: Any,
    *,
    layers: str | Sequence[str] | None = None,
    items: Places | None = None,
    heads: Places | None = None,
    queries: Places | None = None,
) -> dict[str, AttentionMap]:
    """Compute the attention weights of a patched model after forgetting, and which keys are kept and forgotten.

    The model is called once, in evaluation mode and without gradients, and is left as it was: the modes of its modules,
    gradients, buffers that change in training, the state of the random generators, and what :func:`observe` counts.

        maps = lwpf_patch.attention_maps(model, images)
        maps["blocks.3.attn"].weights  # (batch, heads, queries, keys)

    The first dimension is that of items. Where a layer attends in windows, or other parts of an image, it has all
    windows of the first item, then those of the second. A layer without heads has one.

    A layer that computes several attentions in one pass has the further ones as ``name#2`` and so on, as with weights
    that several blocks share. In hflayers the last iteration of the update loop is the one that counts.

    Args:
        model: The model, patched by :func:`apply` or :func:`patch_model`.
        inputs: What the model is called with: a tuple as its arguments, a mapping as its keyword arguments, anything
            else as its only argument.
        layers: Glob patterns over the names of attention layers, the modules that own a func_d; default all.
        items: Which places of the first dimension to return: a number, several, or a slice; default all. The model
            computes all of them in any case, and ``dmedian`` takes its median of all.
        heads: Which heads to return.
        queries: Which queries to return.

    Returns:
        A map for each layer that was called, by the name of its module in the model, in the order of the calls. They
        are on the layer's device, in its dtype, or float32 where that is half precision.

    Raises:
        SettingsError: A wrong value, a model that is not patched, a pattern that matches no layer, a place that a layer
            does not have.
        UnsupportedError: The model is compiled, or none of the layers computed a softmax that can be seen.
    """
    check_watchable(model, "attention_maps")
    model = unwrapped(model)
    chosen = {
        name: _read_places(places, name) for name, places in (("items", items), ("heads", heads), ("queries", queries))
    }
    names = _layers(model, layers)
    watcher = _MapWatcher(model, names, chosen)
    args, kwargs = _arguments(inputs)
    with _in_evaluation(model), torch.no_grad(), _same_random_numbers(model), watching.shown_alone_to(watcher):
        model(*args, **kwargs)
    _check_seen(model, watcher, layers)
    return watcher.maps


class _MapWatcher:
    """Keeps the maps of the calls of some layers; see :class:`lwpf_patch.watching.Watcher`."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], chosen: dict[str, Any]) -> None:
        self.maps: dict[str, AttentionMap] = {}
        self.reasons: list[str] = []
        self._layers, self._chosen = layers, chosen
        self._names = {module: name for name, module in layers.items()}
        self._owners = {module._modules["func_d"]: module for module in layers.values()}
        self._modules = set(model.modules())
        self._calls: dict[str, int] = {}

    def see_call(self, func_d: Any, call: Call) -> None:
        """See a call that computed attention as a whole; its weights are computed beside it."""
        name = self._name_of(func_d)
        if name is not None:
            self._keep(name, func_d, _of_call(call, func_d.layout, self._heads(name), _Picker(name, self._chosen)))

    def see_scores(
        self, func_d: Any, scores: Tensor, forgotten: Tensor, mask: Tensor, dim: int, normalised: Tensor | None = None
    ) -> None:
        """See a call around a softmax that is written out."""
        name = self._name_of(func_d)
        if name is None:
            return
        pick = _Picker(name, self._chosen)

        def as_chosen(part: Tensor) -> Tensor:
            return pick(_four(scores_by_head(part.detach(), dim, func_d.layout, self._heads(name))))

        parts = [as_chosen(part) for part in (scores, forgotten, mask.expand_as(scores))]
        excluded = None
        if func_d.masking != "paper" or func_d.is_plain():
            excluded = parts[0] <= func_d.highest_hidden(scores)
        weights = None if normalised is None else as_chosen(normalised)
        self._keep(name, func_d, _map(parts[1], parts[2], excluded, func_d.sep_here(), weights))

    def see_weights(self, func_d: Any, weights: Tensor) -> None:
        """See the weights that iterations have ended with: heads may have ended before the last one."""
        name = self._name_of(func_d)
        if name is None:
            return
        weights = scores_by_head(weights.detach(), -1, func_d.layout, self._heads(name))
        last = self.maps[name]
        ended = _Picker(name, self._chosen)(_four(weights)).to(last.weights.dtype)
        self.maps[name] = last._replace(weights=ended.masked_fill(~last.kept, 0.0))

    def see_fast_path(self, func_d: Any) -> None:
        """See nothing: no layer takes one meanwhile."""

    def miss(self, reason: str) -> None:
        """Note why layers are not seen."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def _name_of(self, func_d: Any) -> str | None:
        """Return the layer whose call this is; None: it is not wanted."""
        owner = self._owners.get(func_d)
        if owner is None and func_d not in self._modules:  # that of a host's function, which any module may call
            owner = next((module for module in called_modules() if module in self._modules), None)
        return None if owner is None else self._names.get(owner)

    def _heads(self, name: str) -> int | None:
        heads = getattr(self._layers[name], "num_heads", None)
        return heads if isinstance(heads, int) else None

    def _keep(self, name: str, func_d: Any, found: AttentionMap) -> None:
        number = self._calls[name] = 1 if func_d.iterates else self._calls.get(name, 0) + 1
        self.maps[name if number == 1 else f"{name}#{number}"] = found


# --- computing ------------------------------------------------------------------------------------------------------


class _Picker(NamedTuple):
    """Takes the places that are wanted from (batch, heads, queries, ...).

    Attributes:
        layer: The layer, for the error messages.
        chosen: The places by what they are places of; None: all.
    """

    layer: str
    chosen: dict[str, Any]

    def __call__(self, tensor: Tensor, which: Sequence[str] = ("items", "heads", "queries")) -> Tensor:
        """Return a tensor with the wanted places alone.

        Raises:
            SettingsError: A place that there is not.
        """
        for dim, name in enumerate(("items", "heads", "queries")):
            places = self.places(name, tensor.size(dim), tensor) if name in which else None
            if places is not None:
                tensor = tensor.index_select(dim, places)
        return tensor

    def places(self, name: str, size: int, like: Tensor) -> Tensor | None:
        """Return the places of a dimension of some size; None: all."""
        wanted = self.chosen[name]
        if wanted is None:
            return None
        if isinstance(wanted, slice):
            wanted = range(size)[wanted]
        elif wrong := [place for place in wanted if not -size <= place < size]:
            raise SettingsError(
                f"{name}={wrong[0]} (from attention_maps({name}=...)): {self.layer} has {size} {name}"
                + (", its windows included" if name == "items" else "")
                + "; choose other ones, or the layers with layers=..."
            )
        return torch.tensor([place % size for place in wanted], dtype=torch.long, device=like.device)


def _of_call(call: Call, layout: str, heads: int | None, pick: _Picker) -> AttentionMap:
    query, key, mask = cast(call)
    query, key = (_four(heads_before_rows(part, layout, heads)) for part in (query, key))
    mask = None if mask is None else _four(heads_before_rows(mask, layout, heads))
    threshold = call.rule.threshold()
    # What a rule of the user, or the median, does with a score may depend on all others.
    apart = not call.rule.forgets or (threshold is not None and threshold.mu is not None)
    rows: Any = slice(None)
    if apart:
        query, key = pick(query, ("items", "heads")), pick(key, ("items", "heads"))
        mask = None if mask is None else pick(mask, ("items", "heads"))
        places = pick.places("queries", query.size(2), query)
        rows = rows if places is None else places
    with autocasting.without_autocast(query.device.type):
        scores, excluded = scores_of_rows(call, query, key, mask, rows)
        forgotten, kept = call.rule.forget_rows(scores, excluded, False, call.masking, -1)
        if call.masking == "paper" and not call.is_plain():
            excluded = None
        excluded = None if excluded is None else excluded.expand_as(scores)
        kept = kept.expand_as(scores)
        if not apart:
            forgotten, kept = pick(forgotten), pick(kept)
            excluded = None if excluded is None else pick(excluded)
        return _map(forgotten, kept, excluded, call.sep)


def _map(
    forgotten: Tensor, mask: Tensor, excluded: Tensor | None, sep: tuple[float, float], weights: Tensor | None = None
) -> AttentionMap:
    """Return the map of D(s) and D'(s)."""
    if weights is None:
        forgotten = forgotten.float() if forgotten.dtype.itemsize < 4 else forgotten
        weights = forgotten.softmax(-1) if tuple(sep) == (1.0, 0.0) else normalising.normalise(forgotten, *sep)
    kept = mask != 0
    if excluded is None:
        return AttentionMap(weights * mask, kept, ~kept)
    return AttentionMap(weights * mask, kept & ~excluded, ~kept & ~excluded)


def _four(tensor: Tensor) -> Tensor:
    """Return (batch, heads, queries, ...) of (..., heads, queries, ...)."""
    return tensor.unsqueeze(0) if tensor.dim() == 3 else tensor.flatten(0, -4)


# --- what is asked for ----------------------------------------------------------------------------------------------


def _read_places(places: Any, name: str) -> Any:
    if places is None or isinstance(places, slice):
        return places
    try:
        read = _whole_numbers(places)
    except TypeError:
        read = []
    if not read:
        raise SettingsError(
            f"{name}={shown(places)} (from attention_maps({name}=...)): no whole number, nor several, nor a slice"
        )
    return read


def _whole_numbers(places: Any) -> list[int]:
    if isinstance(places, bool):
        raise TypeError
    try:
        return [operator.index(places)]
    except TypeError:
        return [operator.index(each) for each in places]


def _layers(model: nn.Module, patterns: Any) -> dict[str, nn.Module]:
    """Return the layers that some patterns match, by name: the modules that own a func_d."""
    names = [name.rpartition(".")[0] for name, each in model.named_modules() if isinstance(each, OwnedFuncD)]
    found = {name or type(model).__name__: model.get_submodule(name) for name in names}
    if patterns is None:
        return found
    for pattern in (patterns := texts(patterns)):
        if not any(fnmatchcase(name, str(pattern)) for name in found):
            raise SettingsError(
                f"layers pattern {shown(pattern)} (from attention_maps(layers=...)) matches no attention layer of "
                f"{type(model).__name__}; they are {', '.join(map(repr, found))}"
            )
    return {name: found[name] for name in found if any(fnmatchcase(name, str(pattern)) for pattern in patterns)}


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):  # that of a tokenizer too
        return (), dict(inputs)
    return (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})


def _check_seen(model: nn.Module, watcher: _MapWatcher, patterns: Any) -> None:
    name = type(model).__name__
    if scripted := _scripted(model):
        watcher.miss(f"{', '.join(scripted)} were compiled by torch.jit, and do not run as Python")
    if not watcher.maps:
        what = (
            "none of its patched attention layers" if patterns is None else f"no layer that layers={patterns!r} names"
        )
        why = "; ".join(watcher.reasons) or (
            "the model did not call them with these inputs, or left them for a path of its own; lwpf_patch.status() "
            "shows what is patched"
        )
        raise UnsupportedError(f"attention_maps: {name} ran, but {what} computed a softmax that could be seen: {why}")
    for reason in watcher.reasons:
        reporting.warn(f"attention_maps: the maps of {name} are not all there: {reason}")


def _scripted(model: nn.Module) -> list[str]:
    """Return the names of the patched layers that torch.jit has compiled or traced."""
    return [
        name.rpartition(".")[0]
        for name, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", "").endswith("FuncD")
    ]


# --- leaving no trace -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode; afterwards each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # from the outside to the inside: train() of a module sets all inside of it
            if module.training != training:
                module.train(training)
        for module, training in modes:  # a train() of the model's own may have set another one
            module.training = training


@contextlib.contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Keep the state of the random generators."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    indices = sorted({device.index for device in devices if device.type == "cuda" and device.index is not None})
    with torch.random.fork_rng(devices=indices):
        yield
