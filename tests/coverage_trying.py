"""What can be done with a module that is patched: found by trying, for docs/coverage.md."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn

import lwpf_patch
from lwpf_patch.attention import HostFuncD
from lwpf_patch.uhop import HostFeatureMap


class Called(NamedTuple):
    """A module, and what it is called with."""

    module: nn.Module
    args: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> Any:
        return self.module(*self.args, **self.options)


def _func_ds(called: Called) -> list[HostFuncD]:
    return [module for module in called.module.modules() if isinstance(module, HostFuncD)]


def called_of_func_d(called: Called) -> list[str]:
    """Returns the names of what a module calls of its func_d."""
    seen: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def note(*args: Any, **options: Any) -> Any:
            seen.append(name)
            return function(*args, **options)

        return mock.patch.object(HostFuncD, name, note)

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name in ("scaled_dot_product_attention", "softmax"):
            stack.enter_context(noting(name, getattr(HostFuncD, name)))
        called()
    return list(dict.fromkeys(seen))


def why_not_cpu(called: Called) -> str:
    """Returns why the backend of this name cannot compute a module; empty: it can."""
    func_ds = _func_ds(called)
    for func_d in func_ds:
        func_d.backend = "cpu"
    try:
        called()
    except lwpf_patch.LwpfError as error:
        return str(error)
    finally:
        for func_d in func_ds:
            func_d.backend = "auto"
    return ""


def why_not_compiled(called: Called) -> str:
    """Returns why a module cannot be traced for training, in one graph; empty: it can, and computes the same."""
    graphs = []

    def run_as_it_is(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    called.module.train()
    torch._dynamo.reset()
    try:
        state = torch.get_rng_state()
        expected = called()
        torch.set_rng_state(state)
        program = torch.compile(called.module, backend=run_as_it_is, fullgraph=True)
        found = program(*called.args, **called.options)
    except torch._dynamo.exc.TorchDynamoException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        called.module.eval()
    assert len(graphs) == 1, "a frame that is skipped is not compiled"
    for one, other in zip(_tensors(found), _tensors(expected), strict=True):
        torch.testing.assert_close(one, other)
    return ""


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def why_not_folded(module: nn.Module) -> str:
    """Returns why maps of random numbers cannot be folded; empty: they can."""
    for each in module.modules():
        if isinstance(each, HostFeatureMap):
            nn.init.normal_(each.weight, std=0.1)
    try:
        lwpf_patch.fold(module)
    except lwpf_patch.FoldError as error:
        return reason_of(str(error))
    return ""


def reason_of(message: str) -> str:
    """Returns the reason in a message of `fold`."""
    return message.partition("projections: ")[2].partition(". Nothing was folded")[0]
