"""Which models can be watched: those with patched layers, which are called as Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SettingsError, UnsupportedError, shown

if TYPE_CHECKING:
    from torch import nn

WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")


def check_watchable(model: nn.Module, function: str) -> None:
    """Check that the attention layers of a model can be watched.

    Args:
        model: The model.
        function: What is called, for the error messages.

    Raises:
        SettingsError: It is no model, or has no patched attention module.
        UnsupportedError: It is compiled.
    """
    from torch import jit, nn

    from ..attention.owned import OwnedFuncD

    if not isinstance(model, nn.Module):
        raise SettingsError(f"model={shown(model)} (from {function}(model=...)): model must be a torch.nn.Module")
    if isinstance(model, jit.ScriptModule):
        raise UnsupportedError(
            f"{function}: the model was compiled by torch.jit.script or traced; give the model that it was made of"
        )
    layers = {name for name, module in model.named_modules() if isinstance(module, OwnedFuncD)}
    if not layers:
        raise SettingsError(
            f"{function}: {type(model).__name__} has no patched attention module: call lwpf_patch.apply() or "
            "lwpf_patch.patch_model() first"
        )
    for name, module in model.named_modules():
        compiled = type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None)
        if compiled and any(layer.startswith(f"{name}." if name else "") for layer in layers):
            raise UnsupportedError(
                f"{function}: {name or 'the model'} is compiled by torch.compile, and what is compiled cannot be "
                "observed: give the model before it is compiled, in some steps of its own, or set "
                "TORCH_COMPILE_DISABLE=1"
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without the wrapper that distributes it."""
    inner = getattr(model, "module", model)
    return inner if type(model).__name__ in WRAPPERS else model
