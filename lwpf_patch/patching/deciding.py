"""Which attention modules of a model forget where ``blocks`` was asked for; decided when the model is first called.

At construction an attention module does not know the model that it will be part of. At the first call that is known,
for the module and for all others of the model, which are decided together. What has been decided stays, in copies too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .. import reporting
from ..blocks import in_short
from ..errors import SettingsError
from ..hosting import Host
from ..hosts import HOSTS
from ..observing.watchable import WRAPPERS
from .owners import Owners

if TYPE_CHECKING:
    from torch import nn

#: Put into the names of modules by wrappers of torch's.
_INSERTED = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

_lock = threading.Lock()
_said: set[str] = set()
_decided: dict[str, dict[str, list[str]]] = {}


def decide(func_d: Any) -> None:
    """Decide which attention modules forget of the model that a func_d belongs to.

    Args:
        func_d: The func_d of an attention module that is called, a :class:`lwpf_patch.attention.OwnedFuncD`.

    Raises:
        SettingsError: The model lacks blocks that were asked for, or the func_d belongs to no module.
    """
    with _lock:
        if not func_d.undecided:  # another thread came first
            return
        host = HOSTS[func_d.host]
        layers = dict(_layers(model := _model_of(func_d, host), host.name))
        names, request = list(layers), func_d.request
        request.blocks.check(
            names,
            described := _described(model, host),
            request.origin("blocks"),
            f"leave this model out: exclude_models={type(model).__name__!r}",
        )
        chosen = request.blocks.of(len(names))
        for number, layer in enumerate(layers.values()):
            if layer.undecided and number in chosen:
                layer.take_part(number)
            elif layer.undecided:
                layer.leave_plain(number)
        forgetting = [name for name, layer in layers.items() if not layer.is_plain()]
        _note(host.name, described, forgetting)
        _say(
            f"{host.name}: {len(forgetting)} of the {len(names)} attention modules of {described} forget, blocks "
            f"{request.blocks}: {in_short(forgetting)}; the others stay plain"
        )


def decided(host: str) -> dict[str, list[str]]:
    """Return the names of the modules that forget, for each model of a host that was decided."""
    return {model: list(names) for model, names in _decided.get(host, {}).items()}


def start_anew(host: str) -> None:
    """Forget what was decided for the models of a host, which is patched in another way from now on."""
    _decided.pop(host, None)
    _said.clear()


def _model_of(func_d: Any, host: Host) -> nn.Module:
    """Return the model that is counted: one that the library made as a whole, or else the outermost module.

    Raises:
        SettingsError: Nothing owns the func_d.
    """
    from torch import nn

    owners = Owners()
    around = owners.of(func_d)[1:]
    if not around or func_d.request is None:
        raise SettingsError(
            f"blocks: an attention function of {host.name} is called directly, past its modules, so that it is no "
            "block of any model: call the module, or leave blocks out"
        )
    # A ModuleList is called by nobody, and so no model.
    callable_ = [each for each in around if type(each).forward is not nn.Module.forward]
    candidates = [each for each in callable_ if type(each).__name__ not in WRAPPERS] or around[:1]
    whole = [each for each in candidates if host.is_model is not None and host.is_model(each)]
    candidates = whole or candidates
    outermost = [
        each for each in candidates if not any(owner is other for owner in owners.of(each)[1:] for other in candidates)
    ]
    # A part of a model may be part of something else as well, such as an nn.Sequential of its first blocks. None is the
    # outermost where a module holds one that holds it.
    return max(outermost or candidates, key=lambda each: sum(1 for _ in _layers(each, host.name)))


def _layers(model: nn.Module, host: str) -> Iterator[tuple[str, Any]]:
    """Return the attention modules of a model that a host has patched, by name: the func_d of each."""
    from ..attention.owned import OwnedFuncD

    for name, module in model.named_modules():
        part = module._modules.get("func_d")
        if isinstance(part, OwnedFuncD) and part.host == host:
            for inserted in _INSERTED:
                name = name.replace(inserted, "")
            yield name or type(module).__name__, part


def _described(model: nn.Module, host: Host) -> str:
    names_of_model = getattr(host, "names_of_model", None)
    names = [] if names_of_model is None else list(names_of_model(model))
    return f"{type(model).__name__} ({names[0]})" if names else type(model).__name__


def _note(host: str, model: str, forgetting: list[str]) -> None:
    models, name, number = _decided.setdefault(host, {}), model, 1
    while models.get(name, forgetting) != forgetting:
        number += 1
        name = f"{model}-{number}"
    models[name] = forgetting


def _say(message: str) -> None:
    """Say something once, of many models that are alike."""
    if message not in _said:
        _said.add(message)
        reporting.info(message)
