"""Notices models that are patched though they are only evaluated while another one trains: distillation teachers.

At the first steps of an optimizer, patched attention in evaluation mode that no optimizer trains is looked at: is it
called between one step and the next, and does it keep its weights? Copies of the model that trains, as for moving
averages, and frozen layers of that model are none.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import reporting
from ..hosts import HOSTS
from .owners import Owners

#: So many steps are looked at.
STEPS = 10
#: So many times a model has to be called between two steps, one after the other.
TIMES = 2
#: A copy of weights that train has moved away from them by less than this part of them.
NEAR = 0.1

_WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel")

_steps_left = 0
_handle: Any = None
_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_suspects: list[_Suspect] = []
_suspect_of: weakref.WeakKeyDictionary[nn.Module, _Suspect] = weakref.WeakKeyDictionary()


def watch() -> None:
    """Look at the next steps of all optimizers."""
    global _handle, _steps_left
    _steps_left = STEPS
    if _handle is None:
        _handle = register_optimizer_step_post_hook(_after_step)


def note(module: nn.Module) -> None:
    """Take note of an attention module that has been patched."""
    _attached.add(module)


class _Suspect:
    """A model that may be one.

    Args:
        host: The host's name.
        model: The model.
        modules: Its attention modules.
    """

    def __init__(self, host: str, model: nn.Module, modules: list[nn.Module]) -> None:
        names = list(_names_by_host(model, host))
        cls = type(model).__name__
        self.host, self.pattern = host, names[0] if names else cls
        self.description = f"{cls} ({names[0]})" if names else cls
        self.count = len(modules)
        self.called = False
        self.times = 0
        self._weight = weakref.ref(_largest(modules[0])[1])
        self._before = _largest(modules[0])[1].detach().clone()
        self._handles: list[Any] = []

    def listen(self, modules: Iterable[nn.Module]) -> None:
        """Have the calls of some modules noted, of whichever is called."""
        for module in modules:
            _suspect_of[module] = self
            self._handles.append(module.register_forward_pre_hook(_note_call))

    def dismiss(self) -> None:
        """Leave no trace."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def is_one(self) -> bool | None:
        """Return whether it is one, after a step; None: not known yet."""
        weight = self._weight()
        if weight is None or not torch.equal(weight, self._before):
            return False
        self.times = self.times + 1 if self.called else 0
        self.called = False
        return True if self.times == TIMES else None


def _note_call(module: nn.Module, inputs: Any) -> None:
    # A function of a module, and nothing that it holds: models can be pickled and copied while it listens.
    if not torch.compiler.is_compiling() and module in _suspect_of and not module.training:
        _suspect_of[module].called = True


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    global _steps_left
    if _steps_left <= 0 or torch.compiler.is_compiling():
        return
    _steps_left -= 1
    with contextlib.suppress(Exception):  # what only looks must not stop a training
        _judge()
        _look(optimizer)
    if _steps_left <= 0:
        _stop()


def _stop() -> None:
    for suspect in _suspects:
        suspect.dismiss()
    _suspects.clear()  # the hook of optimizers stays: they go over it now, and it must not change under them


def _judge() -> None:
    """Warn of the models that were called between the last steps."""
    for suspect in list(_suspects):
        verdict = suspect.is_one()
        if verdict is None:
            continue
        suspect.dismiss()
        _suspects.remove(suspect)
        if verdict:
            reporting.warn(
                f"{suspect.host}: {suspect.description} is only evaluated while another model trains, as a "
                f"distillation teacher is, and its {suspect.count} attention modules are patched too. To leave it "
                f"plain, set LWPF_EXCLUDE_MODELS={suspect.pattern} (or lwpf run --exclude-models, or "
                'apply(exclude_models=...)), or call lwpf_patch.patch_model(teacher, func_d="none")'
            )


def _look(optimizer: Any) -> None:
    """Find new suspects."""
    trained = _parameters([optimizer])
    found = [module for module in _attached if module not in _seen and _may_be_of_one(module, trained)]
    if not found:
        return
    _seen.update(found)
    trained = _parameters([each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer)])
    owners = Owners()
    contains: dict[int, bool] = {}

    def trains(module: nn.Module) -> bool:
        if id(module) not in contains:
            contains[id(module)] = any(id(parameter) in trained for parameter in module.parameters())
        return contains[id(module)]

    groups: dict[int, tuple[nn.Module, list[nn.Module]]] = {}
    for module in found:
        around = owners.of(module)
        plain = [each for each in around if not trains(each)]
        if plain and (len(plain) == len(around) or _is_called_teacher(around, plain)):
            model = _model_among(plain, str(module.func_d.host))  # type: ignore[union-attr]
            groups.setdefault(id(model), (model, []))[1].append(module)
    for model, modules in groups.values():
        if not _is_copy(modules[0], [each for each in _attached if trains(each)]):
            suspect = _Suspect(str(modules[0].func_d.host), model, modules)  # type: ignore[union-attr]
            suspect.listen(_uncompiled([each for each in owners.of(modules[0]) if not trains(each)]))
            _suspects.append(suspect)


def _may_be_of_one(module: nn.Module, trained: set[int]) -> bool:
    func_d: Any = module._modules.get("func_d")
    if module.training or not getattr(func_d, "host", "") or not func_d.rule_here().forgets:
        return False
    parameters = list(module.parameters())
    return bool(parameters) and not any(id(each) in trained or each.is_meta for each in parameters)


def _parameters(optimizers: list[Any]) -> set[int]:
    return {id(each) for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}


def _is_called_teacher(around: list[nn.Module], plain: list[nn.Module]) -> bool:
    """Return whether what does not train is called a teacher, and not just frozen layers of the model that trains."""
    names = [type(each).__name__ for each in plain]
    names += [name for each in around for name, part in each._modules.items() if any(part is one for one in plain)]
    return any("teacher" in name.lower() for name in names)


def _names_by_host(model: nn.Module, host: str) -> Iterable[str]:
    names = getattr(HOSTS[host], "names_of_model", None)  # of a host that is rewritten
    return () if names is None else names(model)


def _model_among(plain: list[nn.Module], host: str) -> nn.Module:
    """Return the model among a module and what is around it: that which the host has named, or else the outermost."""
    named = [each for each in plain if list(_names_by_host(each, host))]
    return (named or [each for each in plain if type(each).__name__ not in _WRAPPERS][::-1] or plain)[0]


def _uncompiled(modules: list[nn.Module]) -> list[nn.Module]:
    """Return the modules that are called by Python: those around what torch.compile has compiled, if any is."""
    for index in reversed(range(len(modules))):
        if type(modules[index]).__name__ == "OptimizedModule":
            return modules[index:]
        if getattr(modules[index], "_compiled_call_impl", None) is not None:
            return modules[index + 1 :]
    return modules


def _largest(module: nn.Module) -> tuple[str, Tensor]:
    return max(module.named_parameters(), key=lambda item: item[1].numel())


def _is_copy(module: nn.Module, others: list[nn.Module]) -> bool:
    """Return whether a module has the weights of one that trains, or those that it had a while ago."""
    name, weight = _largest(module)
    for other in others:
        parameter = dict(other.named_parameters()).get(name)
        if parameter is not None and parameter.shape == weight.shape:
            theirs = parameter.detach().to(weight)
            if (weight.detach() - theirs).norm() <= NEAR * theirs.norm():
                return True
    return False
