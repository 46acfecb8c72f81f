"""What ways of distributing a model make of a feature map's parameter, and how Stage I gets at all of it.

Under FSDP2 (``torch.distributed.fsdp.fully_shard``) the parameter is a DTensor, of which each process holds a part: it
is gathered, worked on, and each process writes its part back. What other ways leave of it is refused.
"""

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..errors import LwpfError


def is_dtensor(tensor: Any) -> bool:
    """Return whether a tensor is distributed over processes; DTensor is imported where there are some."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def parameter_of(feature_map: nn.Module) -> Any:
    """Return the parameter W that an optimizer may have: under FSDP2 the sharded one, whichever is registered now.

    Returns:
        None if there is none.
    """
    sharded = _sharded_by_fsdp2(feature_map)
    return feature_map._parameters.get("weight") if sharded is None else sharded


def _sharded_by_fsdp2(feature_map: nn.Module) -> Any:
    # Where the whole parameter is registered, as between forward and backward, nothing public leads to the sharded one.
    for hook in feature_map._load_state_dict_post_hooks.values():
        if str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp._fully_shard"):
            for cell in getattr(hook, "__closure__", None) or ():
                sharded = getattr(cell.cell_contents, "sharded_param", None)
                if sharded is not None:
                    return sharded
    return None


def check_kinds(waiting: list[Any]) -> list[Any]:
    """Refuse parameters of which Stage I cannot get all, or to which it cannot write.

    A map that was refused is refused again after another forward pass of its model, and another model, while that one
    is still around, is not.

    Args:
        waiting: Feature maps, :class:`lwpf_patch.uhop.HostFeatureMap`, that wait for a Stage I.

    Returns:
        Those whose parameters Stage I can work on.

    Raises:
        LwpfError: Another map has seen a forward pass, or waits for a later step.
    """
    reasons = {each: reason for each in waiting if (reason := _why_not(each, parameter_of(each)))}
    new = [each for each in reasons if each._keys is not None or not (each._listening or each in _refused)]
    for each in new:
        each._keys = None
        _refused.add(each)
    if new:
        raise LwpfError(
            f"uhop: the feature map of {new[0].host} is {reasons[new[0]]}: Stage I needs it whole on every process. "
            "Use FSDP2 (torch.distributed.fsdp.fully_shard), DistributedDataParallel, or lwpf_patch without uhop"
        )
    return [each for each in waiting if each not in reasons]


_refused: "weakref.WeakSet[Any]" = weakref.WeakSet()


def _why_not(feature_map: Any, weight: Any) -> str:
    """Return what is wrong with the parameter of a feature map; "" if Stage I can work on it."""
    if weight is None:
        return "flattened into another parameter, as FSDP1 (FullyShardedDataParallel) does with use_orig_params=False"
    if hasattr(weight, "ds_id"):
        return "a parameter of DeepSpeed's ZeRO-3, which shards it"
    if hasattr(weight, "_hp_mapping") and feature_map._trains:
        return (
            "a copy that DeepSpeed's ZeRO makes anew, at every step, of what its optimizer has (train=false in uhop "
            "leaves it out of the optimizer)"
        )
    if is_dtensor(weight):
        kinds = [placement for placement in weight.placements if not placement.is_replicate()]
        if len(kinds) > 1 or any(type(kind).__name__ != "Shard" for kind in kinds):
            return f"a DTensor with placements {weight.placements}, sharded in more than one way (tensor parallelism)"
        return ""
    whole = weight.dim() in (2, 3) and weight.size(-1) == weight.size(-2) > 0
    if whole and type(weight) is nn.Parameter:
        return ""
    return (
        f"a {type(weight).__name__} {list(weight.shape)}, a part of the whole one, as FSDP1 (FullyShardedDataParallel) "
        "makes it"
    )


def check_is_sharded_now(feature_map: Any) -> None:
    """Refuse a step of the optimizer while FSDP2 still holds what it gathered before, which the step does not change.

    Raises:
        LwpfError: It does.
    """
    if parameter_of(feature_map) is not feature_map._parameters.get("weight"):
        raise LwpfError(
            f"uhop: the optimizer made a step while FSDP2 holds the gathered parameters of {feature_map.host}, which "
            "the step does not change, nor could Stage I: after a forward pass without a backward pass, or with "
            "set_reshard_after_backward(False), call reshard() of the sharded modules before the optimizer's step"
        )


def check_wrapper(feature_map: Any) -> None:
    """Refuse to train a feature map whose gradients nothing averages over the processes, since it came too late.

    DistributedDataParallel is known while its forward pass runs.

    Raises:
        LwpfError: FSDP or DistributedDataParallel had the model before, or DistributedDataParallel ignores the map.
    """
    if not (feature_map._trains and feature_map.weight.requires_grad):
        return
    who = "FSDP" if feature_map._is_after_fsdp else _ddp_without(feature_map)
    if who:
        raise LwpfError(
            f"uhop: {who} does not average the gradients of the feature maps of {feature_map.host}, which came "
            "after it or which it ignores: apply lwpf_patch before the model is wrapped or sharded, or set train=false "
            "in uhop"
        )


def _ddp_without(feature_map: nn.Module) -> str:
    """Return the name of the wrapper whose forward pass this is, if it holds a map and averages no gradient of it."""
    if not distributed.is_available():
        return ""
    ddp: Any = nn.parallel.DistributedDataParallel
    wrapper = ddp._get_active_ddp_module()
    averaged = getattr(wrapper, "_module_parameters", None)
    if averaged is None or any(each is feature_map.weight for each in averaged):
        return ""
    return ddp.__name__ if any(each is feature_map for each in wrapper.module.modules()) else ""


def is_fsdp_module(module: nn.Module) -> bool:
    """Return whether a module is FSDP's, which does not get to know a parameter that comes later."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def gather(weight: Tensor) -> Tensor:
    """Return all of a parameter, without its graph: a DTensor's is gathered, for which all its processes call this."""
    weight = weight.detach()
    if not is_dtensor(weight):
        return weight
    sharded: Any = weight
    mesh = sharded.device_mesh
    # With CPU offload the parts are on the CPU, and the processes talk to each other on the mesh's device.
    part = sharded.to_local().to(mesh.device_type)
    shape, stride = sharded.shape, sharded.stride()
    whole = type(sharded).from_local(part, mesh, sharded.placements, run_check=False, shape=shape, stride=stride)
    return whole.full_tensor()


@torch.no_grad()
def write(weight: Tensor, value: Tensor) -> None:
    """Write what all processes have to a parameter, each to its own part."""
    if not is_dtensor(weight):
        weight.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = weight
    # None: each cuts its part out of what it has, and nothing is sent.
    parts = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
    sharded.to_local().copy_(parts.to_local())


def has_values_here(weight: Tensor) -> bool:
    """Return whether this process's part of a parameter is other than 0; no other process is asked."""
    part: Any = weight.detach()
    part = part.to_local() if is_dtensor(part) else part
    # FSDP1 frees what it has gathered, and leaves views of it.
    is_freed = part.untyped_storage().nbytes() < part.numel() * part.element_size()
    return not is_freed and bool(part.any())


def mesh_of(feature_map: Any) -> Any:
    """Return the mesh of the processes that hold a feature map; None: it is no DTensor, and each holds all of it."""
    weight = feature_map._parameters.get("weight")
    return weight.device_mesh if is_dtensor(weight) else None


def groups_of(mesh: Any) -> list[Any]:
    """Return the groups of processes, sums over which one after another are sums over all that hold a feature map.

    Args:
        mesh: What :func:`mesh_of` returned.

    Returns:
        One for each dimension of a mesh; else [None], which is all processes; empty if there is one process.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    if mesh is None:
        return [None] if distributed.get_world_size() > 1 else []
    return [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]
