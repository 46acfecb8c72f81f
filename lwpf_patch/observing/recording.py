"""Which models and layers are observed, which of their steps, and what was found there.

A training step begins with a forward pass of the root model in training mode; passes between two steps of the
optimizer, as with accumulated gradients, are one step, of which the first pass is looked at. Where no optimizer of
torch.optim has the model's parameters, each pass is a step. Passes in evaluation mode are counted apart.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from .. import reporting, watching
from ..attention.owned import OwnedFuncD
from . import statistics
from .statistics import Figures
from .watchable import WRAPPERS

#: Why layers are not seen that torch.nn computes by one call of its own.
FAST_PATH = (
    "layers that forget nothing took the fast path of torch.nn, which shows no weights: to observe them, call "
    "torch.backends.mha.set_fastpath_enabled(False)"
)
#: One line of the file: of one layer at one step.
Record = dict[str, Any]


class Layer(NamedTuple):
    """An attention layer.

    Attributes:
        name: The name of its module in the root model.
        heads: How many heads the module says that it has; None: it does not say.
    """

    name: str
    heads: int | None


class Observation:
    """One request to observe.

    Args:
        every: One step in so many is looked at, and one evaluation.
        write: Called with the records of each step that was looked at.
        finds_models: Whether every model with patched layers that is called is observed.
        takes_part: Returns whether this process has anything to record.

    Attributes:
        roots: The models.
        samples: How many steps were looked at, and evaluations.
        layers: The models and names of layers that were seen.
        reasons: Why layers were not seen.
    """

    def __init__(
        self,
        every: int,
        write: Callable[[list[Record]], None],
        finds_models: bool = False,
        takes_part: Callable[[], bool] = lambda: True,
    ) -> None:
        self.every, self.write, self.finds_models, self.takes_part = every, write, finds_models, takes_part
        self.roots: list[Root] = []
        self.samples = 0
        self.layers: set[tuple[str, str]] = set()
        self.reasons: list[str] = []
        self._names: dict[str, int] = {}

    def add(self, model: nn.Module) -> Root:
        """Observe a model."""
        for root in [root for root in self.roots if root.model() is None]:
            root.end()
            root.release()
            self.roots.remove(root)
        name = type(model).__name__
        number = self._names[name] = self._names.get(name, 0) + 1
        root = Root(self, model, name if number == 1 else f"{name}-{number}")
        self.roots.append(root)
        return root

    def place_of(self, func_d: nn.Module) -> tuple[Root, Layer] | None:
        """Return the root model and the layer whose call this is; None: it is not to be observed."""
        for root in self.roots:
            root.end_if_over()
        for root in self.roots:
            layer = root.layers.get(func_d)
            if layer is not None:
                return root, layer
        if not self.finds_models or not func_d.host:  # which one has that stays plain
            return None
        outer = [each for each in called_modules() if type(each).__name__ not in WRAPPERS]
        if not outer:
            self.miss("layers were called past the __call__ of any module, so that no model is known")
            return None
        found = self._root_of(outer[-1])
        if found is None:
            # Around the model there may be a module that does not hold it, as a loss that it is an argument of, or one
            # that has it in a list. A func_d that no module holds is that of a host's function.
            holds = (each for each in reversed(outer) if any(part is func_d for part in each.modules()))
            model = next(holds, outer[-1])
            found = self._root_of(model)
            if found is None:
                found = self.add(model)
                found.begin(model.training, found=True)  # this call is within its first forward pass
        if not found.sampling:
            return None
        return found, found.layers.get(func_d) or found.layer_of(outer[0])

    def _root_of(self, model: nn.Module) -> Root | None:
        return next((root for root in self.roots if root.model() is model), None)

    def miss(self, reason: str) -> None:
        """Note why layers were not seen, and warn of it once."""
        if reason not in self.reasons and self.takes_part():
            self.reasons.append(reason)
            reporting.warn(f"observe: {reason}")

    def close(self) -> None:
        """Write what is left, and look at nothing any more."""
        for root in self.roots:
            root.end()
            root.release()
        self.roots.clear()


class Root:
    """A model that is observed: its layers, its steps, and what was seen in the pass that runs.

    Args:
        observation: The request.
        model: The model.
        name: What the records call it.
    """

    def __init__(self, observation: Observation, model: nn.Module, name: str) -> None:
        self.observation, self.name, self.model = observation, name, weakref.ref(model)
        self.layers: weakref.WeakKeyDictionary[nn.Module, Layer] = weakref.WeakKeyDictionary()
        self._others: dict[int, Layer] = {}  # by the id() of their modules, of one pass
        self.step = self.evaluations = 0
        self.sampling = self.training = False
        self._seen: dict[str, Figures] = {}
        self._not_shown: set[str] = set()
        self._found = False  # whether it was found in the pass that runs, whose end no hook tells of
        # Whether an optimizer of the model has made a step since the last pass of training, and whether any one has.
        self._stepped = self._any_stepped = False
        _watch_optimizers()
        self._optimizers: weakref.WeakKeyDictionary[Any, tuple[int, bool]] = weakref.WeakKeyDictionary()
        self._is_optimized = self._is_of_any(_optimizers())
        self._key = id(model)
        _roots_of.setdefault(self._key, []).append(self)
        _listen()
        self.find_layers()

    def find_layers(self) -> None:
        """Find the layers that the model has now."""
        model = self.model()
        if model is None:
            return
        self.layers.clear()
        self._others.clear()
        modules = dict(model.named_modules())
        for name, module in modules.items():
            if isinstance(module, OwnedFuncD):
                self.layers[module] = self._layer(name.rpartition(".")[0], modules)

    def layer_of(self, module: nn.Module) -> Layer:
        """Return the layer that a module is which calls a func_d that the model does not hold."""
        layer = self._others.get(id(module))
        if layer is None:
            model = self.model()
            modules = dict(model.named_modules()) if model is not None else {}
            name = next((name for name, each in modules.items() if each is module), "")
            layer = self._others[id(module)] = self._layer(name, modules)
        return layer

    def _layer(self, name: str, modules: dict[str, nn.Module]) -> Layer:
        heads = getattr(modules.get(name), "num_heads", None)
        return Layer(name or self.name, heads if isinstance(heads, int) else None)

    def _is_of(self, optimizer: Any) -> bool:
        """Return whether an optimizer has parameters of the model."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)  # which add_param_group() changes
        known = self._optimizers.get(optimizer)
        if known is None or known[0] != size:
            model = self.model()
            own = set() if model is None else {id(each) for each in model.parameters()}
            known = size, any(id(each) in own for group in optimizer.param_groups for each in group["params"])
            self._optimizers[optimizer] = known
        return known[1]

    def _is_of_any(self, optimizers: Sequence[Any]) -> bool:
        own = [each for each in optimizers if self._is_of(each)]  # of each it is known then
        return bool(own)

    def note_step(self, optimizer: Any) -> None:
        """Note a step of an optimizer; where it is one of the model, a pass has ended before."""
        self._any_stepped = True
        if self._is_of(optimizer):
            self.end()
            self._stepped = self._is_optimized = True

    def begin(self, training: bool, found: bool = False) -> None:
        """Begin a forward pass.

        Args:
            training: Whether it is one of training.
            found: Whether it has begun already, and the model was found in it.
        """
        self.end()
        self._found = found
        observation = self.observation
        if training:
            if not self._is_optimized and self.step:
                # One may have been made since the model is observed, or have got the model's parameters.
                known = _optimizers() if self.step == 1 else list(self._optimizers)
                self._is_optimized = self._is_of_any(known)
                self._stepped = self._any_stepped
            due = self._stepped or not self._is_optimized or self.step == 0
            self.step += due
            self._stepped = self._any_stepped = False
            due = due and (self.step - 1) % observation.every == 0
        else:
            due = self.evaluations % observation.every == 0
            self.evaluations += 1
        self.sampling, self.training = due and observation.takes_part(), training
        if self.sampling or _ends:  # which nothing takes off where a pass ends: it may be called for an exception then
            _listen()
        if self.sampling:
            self.find_layers()

    def see(self, layer: Layer, figures: Figures) -> None:
        """Keep the figures of a call; of several calls of a layer in one pass the last one counts."""
        self._seen.pop(layer.name, None)
        self._seen[layer.name] = figures

    def see_fast_path(self, layer: Layer) -> None:
        """Note that a layer may be computed by its host; it was, if no call of it is seen."""
        self._not_shown.add(layer.name)

    def end(self) -> None:
        """End a forward pass, and hand over what was seen in it."""
        self.sampling = self._found = False
        seen, self._seen = self._seen, {}
        not_shown, self._not_shown = self._not_shown, set()
        if not_shown - seen.keys():
            self.observation.miss(FAST_PATH)
        if not seen:
            return
        observation = self.observation
        with _harmless(observation):  # the next pass is counted whatever becomes of this one
            records = [
                {"step": self.step, "layer": name, "training": self.training, "model": self.name, **figures}
                for name, figures in zip(seen, _plain(list(seen.values())), strict=True)
            ]
            observation.samples += 1
            observation.layers.update((self.name, name) for name in seen)
            observation.write(records)

    def end_if_over(self) -> None:
        """End the pass in which the model was found, if it no longer runs."""
        if self._found and all(each is not self.model() for each in called_modules()):
            self.end()

    def forget(self) -> None:
        """Drop what was seen in the pass that runs: another process has it."""
        self._seen, self._not_shown = {}, set()

    def release(self) -> None:
        """Be told of the passes of the model no more."""
        roots = _roots_of.get(self._key, [])
        if self in roots:
            roots.remove(self)
        if not roots:
            _roots_of.pop(self._key, None)
        _listen()


def _plain(figures: list[Figures]) -> Iterator[dict[str, list[float | None]]]:
    """Return figures as plain data, None for NaN, with one transfer from each device."""
    flat = [torch.cat([part.flatten().float() for part in each]) for each in figures]
    same = len({each.device for each in flat}) == 1
    numbers = torch.cat(flat).tolist() if same else [number for each in flat for number in each.tolist()]
    begin = 0
    for each in figures:
        heads = each.forgotten.numel()
        values = [round(value, 6) if math.isfinite(value) else None for value in numbers[begin : begin + 4 * heads]]
        yield {name: values[i * heads : (i + 1) * heads] for i, name in enumerate(Figures._fields)}
        begin += 4 * heads


# --- what tells of passes and steps ---------------------------------------------------------------------------------

#: The models that are observed, by their id(): a module may have an equality of its own, and no hash.
_roots_of: dict[int, list[Root]] = {}
_beginnings: list[RemovableHandle] = []
_ends: list[RemovableHandle] = []
_hook: Any = None


def _listen() -> None:
    """Be told of what is needed: where passes of any module begin, of any model; where they end, if one is looked at.

    A hook of the model's own would be compiled by torch.jit.script, which cannot, and go into the copies of the model.
    """
    if not _roots_of:
        _take_off(_beginnings)
    elif not _beginnings:
        _beginnings.append(register_module_forward_pre_hook(_before_forward))
    if not any(root.sampling for roots in _roots_of.values() for root in roots):
        _take_off(_ends)
    elif not _ends:
        _ends.append(register_module_forward_hook(_after_forward, always_call=True))


def _take_off(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _before_forward(module: nn.Module, inputs: Any) -> None:
    # Most modules are no root, and are called often; what torch.compile traces ends before it sees the dictionary.
    if torch.compiler.is_compiling() or id(module) not in _roots_of:
        return
    for root in _roots_called(module):
        with _harmless(root.observation):
            root.begin(module.training)


def _after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
    if torch.compiler.is_compiling() or id(module) not in _roots_of:
        return
    for root in _roots_called(module):
        with _harmless(root.observation):
            root.end()


def _roots_called(module: nn.Module) -> Sequence[Root]:
    """Return the roots whose model a module is that is called, if the call is a pass of it."""
    if _in_backward() or watching.has_own():
        return ()
    return [root for root in _roots_of[id(module)] if root.model() is module]


def _watch_optimizers() -> None:
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for roots in list(_roots_of.values()):
        for root in roots:
            with _harmless(root.observation):
                root.note_step(optimizer)


def _optimizers() -> list[Any]:
    """Return all optimizers that there are; this takes a tenth of a second."""
    return [each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer)]


def _in_backward() -> bool:
    """Return whether a backward pass runs: what is called in it is a recomputation of checkpointing."""
    return _graph_task() != -1


# No part of PyTorch's public interface; torch.utils.checkpoint asks the same.
_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def called_modules() -> list[nn.Module]:
    """Return the modules whose ``__call__`` runs in this thread, from the inside to the outside."""
    code = nn.Module._call_impl.__code__
    found = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found


# --- what is shown the calls ----------------------------------------------------------------------------------------

_observations: list[Observation] = []


class _Watcher:
    """Computes the figures of the calls that are to be looked at; see :class:`lwpf_patch.watching.Watcher`."""

    def see_call(self, func_d: Any, call: Any) -> None:
        self._see(func_d, lambda layer: statistics.of_call(call, func_d.layout, layer.heads), call.query)

    def see_scores(
        self, func_d: Any, scores: Tensor, forgotten: Tensor, mask: Tensor, dim: int, normalised: Tensor | None = None
    ) -> None:
        plain = func_d.masking == "paper" and not func_d.is_plain()
        hidden = None if plain else func_d.highest_hidden(scores)

        def compute(layer: Layer) -> Figures:
            return statistics.of_scores(
                scores, forgotten, mask, hidden, func_d.sep_here(), dim, layer.heads, func_d.layout, normalised
            )

        self._see(func_d, compute, scores)

    def see_weights(self, func_d: Any, weights: Tensor) -> None:
        """Take no figures of them: those of the last iteration count."""

    def see_fast_path(self, func_d: Any) -> None:
        self._at_each_place(func_d, lambda root, layer: root.see_fast_path(layer))

    def miss(self, reason: str) -> None:
        for observation in _observations:
            observation.miss(reason)

    def _see(self, func_d: Any, compute: Callable[[Layer], Figures], like: Tensor) -> None:
        def see(root: Root, layer: Layer) -> None:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                root.observation.miss("layers were captured in a CUDA graph, which cannot be observed")
            else:
                root.see(layer, compute(layer))

        self._at_each_place(func_d, see)

    def _at_each_place(self, func_d: Any, take: Callable[[Root, Layer], None]) -> None:
        """Hand the root model and the layer of a call to `take`, for each observation that samples it."""
        if _in_backward() or torch.utils.data.get_worker_info() is not None:
            return
        for observation in tuple(_observations):
            with _harmless(observation):
                place = observation.place_of(func_d)
                if place is not None and place[0].sampling:
                    take(*place)


@contextlib.contextmanager
def _harmless(observation: Observation) -> Iterator[None]:
    """Have an error say why nothing is observed; what only looks must not stop a training."""
    try:
        yield
    except Exception as error:
        observation.miss(f"failed with {type(error).__name__}: {error}")


def start(observation: Observation) -> None:
    """Have an observation see calls from now on."""
    if observation not in _observations:
        _observations.append(observation)
    watching.show_to(_WATCHER)


def stop(observation: Observation) -> None:
    """End an observation, and write what is left of it."""
    if observation in _observations:
        _observations.remove(observation)
    with _harmless(observation):
        observation.close()
    if not _observations:
        watching.show_to(None)


def _in_forked_process() -> None:
    for observation in _observations:
        for root in observation.roots:
            root.forget()


_WATCHER = _Watcher()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_process)
