"""Shows the calls of an attention layer to what observes it, where there is anything to see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import compiling, tracing, transforms, watching
from ..backends import Call

COMPILED = (
    "layers are compiled (torch.compile, torch.export), and what is compiled cannot be observed: run some steps "
    "without torch.compile, for example with TORCH_COMPILE_DISABLE=1"
)
TRACED = "layers were traced by torch.jit.trace, and what is traced cannot be observed: observe the model itself"
SCRIPTED = "layers were compiled by torch.jit.script, which cannot be observed: observe the model itself"
TRANSFORMED = "layers were called under a transform of torch.func or in forward mode, where nothing can be observed"
REPLICAS = "layers are in replicas of nn.DataParallel, which are not observed: use DistributedDataParallel"


def show_call(func_d: Any, call: Call) -> None:
    """Show a call that computed attention as a whole."""
    if not torch.compiler.is_compiling():
        watcher = watching.current()
        if _can_be_seen(func_d, call.query) and watcher is not None:
            watcher.see_call(func_d, call)
    elif not tracing.is_exporting():
        miss_compiled()


def show_scores(
    func_d: Any, scores: Tensor, forgotten: Tensor, mask: Tensor, dim: int, normalised: Tensor | None = None
) -> None:
    """Show a call around a softmax that is written out; see :meth:`lwpf_patch.watching.Watcher.see_scores`."""
    if not torch.compiler.is_compiling():
        watcher = watching.current()
        if _can_be_seen(func_d, scores) and watcher is not None:
            watcher.see_scores(func_d, scores, forgotten, mask, dim, normalised)
    elif not tracing.is_exporting():
        miss_compiled()


def show_weights(func_d: Any, weights: Tensor) -> None:
    """Show the weights that several iterations of a layer have ended with."""
    if not torch.compiler.is_compiling():  # else it is missed already
        watcher = watching.current()
        if _can_be_seen(func_d, weights) and watcher is not None:
            watcher.see_weights(func_d, weights)


def show_fast_path(func_d: Any) -> None:
    """Show that a host may compute a layer by one call of its own."""
    watcher = watching.current()
    if watcher is not None:
        watcher.see_fast_path(func_d)


def miss(reason: str) -> bool:
    """Tell what observes that it misses calls."""
    watcher = watching.current()
    if watcher is not None:
        watcher.miss(reason)
    return True


# While torch.compile traces, this is said once, at tracing, and leaves no node.
@compiling.constant
def miss_compiled() -> bool:
    """Tell what observes that layers are compiled."""
    return miss(COMPILED)


def _can_be_seen(func_d: Any, tensor: Tensor) -> bool:
    if tracing.is_jit_tracing():
        return not miss(TRACED)
    if transforms.are_active():
        return not miss(TRANSFORMED)
    if getattr(func_d, "_is_replica", False):
        return not miss(REPLICAS)
    # The others are computed with no numbers, as of FakeTensorMode and of meta, or by parts.
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return not miss(f"layers computed with a {type(tensor).__name__}, which cannot be observed")
    return not tensor.is_meta
