"""Two processes on gloo: what shards parameters and what else distributes work, as docs/distributed.md says."""

from __future__ import annotations

import importlib.metadata
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT
from test_distributed import run
from vits import feature_maps, images, vit

import lwpf_patch

pytestmark = pytest.mark.drawn(days=3)


def has_accelerate() -> bool:
    """Returns whether accelerate is there and knows FSDP2."""
    try:
        return tuple(map(int, importlib.metadata.version("accelerate").split(".")[:2])) >= (1, 8)
    except importlib.metadata.PackageNotFoundError:
        return False


UHOP = "iters=5,every=3,until=4"  # Stage I after the steps 1 and 4

#: What both scripts begin with, after what those of test_distributed.py do.
BEGIN = """
import contextlib, functools
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
)

DDP = nn.parallel.DistributedDataParallel
SGD = functools.partial(torch.optim.SGD, lr=0.05)
AdamW = functools.partial(torch.optim.AdamW, lr=1e-2)
MESH = init_device_mesh("cpu", (2,))

def go(model, optimizer, first=0, last=4):
    for step in range(first, last):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[half] * (1 + step)), y[half]).backward()
        optimizer.step()

def trained(wrap=DDP, optimizer=SGD):
    model = wrap(new_model())
    go(model, optimizer(model.parameters()))
    return model

def values(model):
    return {
        name.removeprefix("module."): each.full_tensor() if hasattr(each, "full_tensor") else each
        for name, each in model.state_dict().items()
    }

def check_equal(model, other, **tolerance):
    got, expected = values(model), values(other)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name].to(value.dtype), value, **(tolerance or dict(rtol=0, atol=1e-6)), msg=name)
    for mine, its in zip(feature_maps(model), feature_maps(other), strict=True):
        assert mine._steps == its._steps == int(mine.steps) and values(mine)["weight"].any()

def sharded(units, model, **options):
    for module in units(model):
        fully_shard(module, **{"mesh": MESH, **options})
    return model

def blocks(model):
    return [*model.blocks, model]

@contextlib.contextmanager
def refused(way, error=lwpf_patch.LwpfError):
    try:
        yield
    except error as caught:
        say(f"{way} refused: {caught}")
    else:
        say(f"{way} was not refused")
"""

ACCELERATE = """
# accelerate enters FSDP on accelerators alone; the rest of it does not ask for one
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"],
    reshard_after_forward=True, cpu_ram_efficient_loading=False,
)
accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
model = new_model()
model, optimizer = accelerator.prepare(model, AdamW(model.parameters()))
assert type(feature_maps(model)[0].weight).__name__ == "DTensor"
go(model, optimizer)
check_equal(model, by_adamw)
say("FSDP2 of accelerate works")
"""

FSDP2 = """
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict
)

by_ddp, by_adamw = trained(), trained(optimizer=AdamW)

# where it is sharded
check_equal(trained(lambda model: sharded(lambda model: [model], model)), by_ddp)
check_equal(trained(lambda model: sharded(blocks, model)), by_ddp)
def parts(model):
    return [*(block.attn.feature_map for block in model.blocks), *(block.attn for block in model.blocks), model]

check_equal(trained(lambda model: sharded(parts, model)), by_ddp)
if torch.__version__ >= (2, 8):  # 2.7 expects an event of a CPU's stream
    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "parts"))
    check_equal(trained(lambda model: sharded(blocks, model, mesh=hybrid)), by_ddp)
offload = CPUOffloadPolicy(pin_memory=False)
check_equal(trained(lambda model: sharded(blocks, model, offload_policy=offload)), by_ddp)
say("FSDP2 works")

# PyTorch 2.7 sums float32 on gloo, where it should average.
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float64)
mixed = trained(lambda model: sharded(blocks, model, mp_policy=policy))
check_equal(mixed, by_ddp, rtol=0.05, atol=0.02)
assert all(m.weight.dtype == torch.float64 for m in feature_maps(mixed))

def checkpointing(model):
    model.set_grad_checkpointing(True)
    return sharded(blocks, model)

check_equal(trained(checkpointing), by_ddp)

# an error on one rank is one on all, and it is tried again
model = sharded(blocks, new_model())
optimizer = SGD(model.parameters())
nn.functional.cross_entropy(model(x[half]), y[half]).backward()
if rank == 1:
    feature_maps(model)[1]._keys[0, 0, 0] = torch.nan
with refused("NaN", lwpf_patch.StageOneError):
    optimizer.step()
assert all(m.steps == 0 and not values(m)["weight"].any() for m in feature_maps(model))
go(model, optimizer, last=1)
assert all(m.steps == 1 and values(m)["weight"].any() for m in feature_maps(model))

# checkpoints: get_state_dict has an optimizer without state make a step, which is none of the training
def save(model, optimizer):
    model_state, state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id="checkpoint")

def load(model, optimizer):
    model_state, state = get_state_dict(model, optimizer)
    states = {"model": model_state, "optimizer": state}
    dcp.load(states, checkpoint_id="checkpoint")
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])

model = sharded(blocks, new_model())
optimizer = AdamW(model.parameters())
go(model, optimizer, last=2)
save(model, optimizer)
at_two = {name: value.clone() for name, value in values(model).items()}
go(model, optimizer, first=2)
check_equal(model, by_adamw)
for wrap in (DDP, lambda model: sharded(blocks, model)):
    model = wrap(new_model())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    optimizer = AdamW(model.parameters())
    load(model, optimizer)
    assert all(torch.equal(value, at_two[name]) for name, value in values(model).items())
    assert all(m._steps == 2 for m in feature_maps(model))
    go(model, optimizer, first=2)
    check_equal(model, by_adamw)

model = sharded(blocks, new_model())
optimizer = SGD(model.parameters())
go(model, optimizer, last=2)
optimizer.zero_grad()
get_state_dict(model, optimizer)
assert all(m._steps == 2 for m in feature_maps(model))
go(model, optimizer, first=2)
check_equal(model, by_ddp)

# a model made on the device meta
with torch.device("meta"):
    empty = new_model()
sharded(blocks, empty).to_empty(device="cpu")
assert all(not values(m)["weight"].any() and m.steps == 0 for m in feature_maps(empty))
whole = StateDictOptions(full_state_dict=True)
broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
set_model_state_dict(empty, get_model_state_dict(model, options=whole), options=broadcast)
check_equal(empty, model)
try:
    empty.load_state_dict({name: value for name, value in model.state_dict().items() if ".feature_map." not in name})
    assert all(not values(m)["weight"].any() and m._steps == 0 for m in feature_maps(empty))
    lwpf_patch.fold(model)
except lwpf_patch.FoldError as error:
    say(f"fold: {error}")

def unsharded():
    model = sharded(lambda model: [model], new_model())
    optimizer = SGD(model.parameters())
    nn.functional.cross_entropy(model(x[half]), y[half]).backward()
    with torch.no_grad():
        model(x[half])
    optimizer.step()

with refused("a gathered parameter"):
    unsharded()
with refused("an optimizer from before"):
    model = new_model()
    optimizer = SGD(model.parameters())
    go(sharded(blocks, model), optimizer, last=10)
"""


@pytest.mark.drawn(days=3)
def test_fsdp2_trains_as_ddp_does_and_its_checkpoints_load_anywhere(python, tmp_path):
    out = run(python, tmp_path, BEGIN + FSDP2 + ACCELERATE * has_accelerate(), LWPF_UHOP=UHOP)
    check_table(out.stdout, ["FSDP2", *["FSDP2 of accelerate"] * has_accelerate()])
    assert "rank 0: NaN refused: uhop: Stage I on timm failed on rank 1" in out.stdout
    assert out.stdout.count("fold: fold: the feature map of blocks.0.attn (Attention) cannot") == 2
    assert out.stdout.count("its parameters are sharded (FSDP2); gather them with") == 2
    assert out.stdout.count("a gathered parameter refused: uhop: the optimizer made a step while FSDP2 holds") == 2
    assert out.stdout.count("an optimizer from before refused: uhop: after 10 steps no optimizer has") == 2
    # two ranks' checkpoint in one process
    lwpf_patch.apply("timm", uhop=UHOP)
    model = vit()
    states = {"model": model.state_dict()}
    dcp.load(states, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    model.load_state_dict(states["model"])
    assert all(each._steps == 2 and each.weight.any() for each in feature_maps(model))


OTHERS = """
from torch.distributed.optim import ZeroRedundancyOptimizer

def fsdp1(strategy, use_orig_params):
    return functools.partial(
        FullyShardedDataParallel, sharding_strategy=ShardingStrategy[strategy], use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )

def late(wrap):
    lwpf_patch.revert()
    model = wrap(new_model())
    lwpf_patch.apply("timm", uhop="iters=5")
    go(model, SGD(model.parameters()), last=1)

wrappers = {"DDP": DDP, "FSDP2": lambda model: sharded(blocks, model), "FSDP1": fsdp1("FULL_SHARD", True)}
for name, wrap in wrappers.items():
    with refused(f"apply after {name}"):
        late(wrap)

lwpf_patch.apply("timm", uhop="iters=5,every=3,until=4")

by_ddp, by_adamw = trained(), trained(optimizer=AdamW)
say("DistributedDataParallel works")
zero = functools.partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, lr=1e-2)
check_equal(trained(optimizer=zero), by_adamw)
say("ZeroRedundancyOptimizer works")

check_equal(trained(fsdp1("NO_SHARD", True)), by_ddp)
say("FSDP1 with NO_SHARD works")
for use in (True, False):
    with refused(f"FSDP1, use_orig_params={use}"):
        trained(fsdp1("FULL_SHARD", use))
check_equal(trained(), by_ddp)  # what was refused stops nothing else

def skip():
    model = new_model()
    if rank == 1:
        model.blocks[1].forward = lambda x: x
    wrapped = DDP(model, find_unused_parameters=True)
    go(wrapped, SGD(wrapped.parameters()), last=1)

with refused("layers that one skips", lwpf_patch.StageOneError):
    skip()

lwpf_patch.apply("timm", uhop="iters=5,every=3,until=4,train=false")
check_equal(trained(optimizer=zero), trained(optimizer=AdamW))
check_equal(trained(lambda model: sharded(blocks, model)), trained())

# forgetting, without U-Hop; each call has a median of its own
def forget(func_d):
    lwpf_patch.apply("timm", func_d=func_d)
    by_ddp = trained()
    check_equal(trained(lambda model: sharded(blocks, model)), by_ddp)
    check_equal(trained(optimizer=zero), trained(optimizer=AdamW))
    with FullyShardedDataParallel.summon_full_params(by_fsdp1 := trained(fsdp1("FULL_SHARD", True))):
        mine = [each.detach().clone() for each in by_fsdp1.parameters()]
    torch.testing.assert_close(mine, [each.detach() for each in by_ddp.parameters()], rtol=0, atol=1e-6)
    return by_ddp

lwpf_patch.revert()
forget("relu")
by_ddp = forget("pfu:mu=dmedian,bias=mu,sigma=0")

def accumulated(parts):
    model = new_model()
    optimizer = SGD(model.parameters())
    for step in range(4):
        optimizer.zero_grad()
        for part in parts:
            (nn.functional.cross_entropy(model(x[part] * (1 + step)), y[part]) / len(parts)).backward()
        optimizer.step()
    return model

check_equal(accumulated([slice(0, 4), slice(4, 8)]), by_ddp)
whole = values(accumulated([slice(0, 8)]))
assert any((whole[name] - value).abs().max() > 1e-4 for name, value in values(by_ddp).items())
say("a median for each call")
"""


@pytest.mark.drawn(days=3)
def test_other_ways_work_or_are_refused(python, tmp_path):
    out = run(python, tmp_path, BEGIN + OTHERS, LWPF_UHOP=UHOP)
    check_table(
        out.stdout,
        [
            "DistributedDataParallel", "ZeroRedundancyOptimizer", "FSDP1 with NO_SHARD", "FSDP1, use_orig_params=True",
            "FSDP1, use_orig_params=False",
        ],
    )  # fmt: skip
    assert out.stdout.count("FSDP1, use_orig_params=True refused: uhop: the feature map of timm is a Parameter [") == 2
    assert out.stdout.count("refused: uhop: the feature map of timm is flattened into another parameter") == 2
    assert out.stdout.count("layers that one skips refused: uhop: Stage I on timm is to average over 2 processes") == 2
    for name, who in {"DDP": "DistributedDataParallel", "FSDP2": "FSDP", "FSDP1": "FSDP"}.items():
        assert out.stdout.count(f"apply after {name} refused: uhop: {who} does not average the gradients") == 2
    assert out.stdout.count("a median for each call") == 2


@pytest.mark.parametrize(("mark", "train"), [("ds_id", True), ("_hp_mapping", True), ("_hp_mapping", False)])
def test_deepspeed_is_known_by_the_marks_of_its_parameters(mark, train):
    lwpf_patch.apply("timm", uhop=f"iters=2,train={train}")
    model = vit()
    for parameter in model.parameters():
        setattr(parameter, mark, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).sum().backward()
    if train:
        with pytest.raises(lwpf_patch.LwpfError, match=r"DeepSpeed's ZeRO.*whole on every process\. Use FSDP2"):
            optimizer.step()
    else:
        optimizer.step()
        assert all(each.weight.any() for each in feature_maps(model))


def test_replicas_of_data_parallel_forget_as_the_model_does():
    lwpf_patch.apply("timm", func_d="pfu:mu=dmedian,bias=mu,sigma=0")
    model, x = vit(), images()
    assert torch.equal(replica(model)(x), model(x))


def replica(module: torch.nn.Module) -> torch.nn.Module:
    """Makes what torch.nn.parallel.replicate does on a GPU."""
    copy = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        setattr(copy, name, None if parameter is None else parameter.clone())
    return copy


# --- the table of docs/distributed.md -------------------------------------------------------------------------------


def table() -> dict[str, list[str]]:
    text = (ROOT / "docs" / "distributed.md").read_text()
    rows = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in text.splitlines() if line.startswith("| ")]
    return {row[0].replace("`", ""): row[1:] for row in rows[1:]}


def check_table(output: str, ways: list[str]) -> None:
    """Compares what each of two ranks said of some ways with what the documentation says of U-Hop."""
    for way in ways:
        verdict = table()[way][1].partition(" ")[0].rstrip(",;:")
        assert verdict in ("works", "refused")
        assert len(re.findall(rf"^rank \d: {re.escape(way)} {verdict}", output, re.MULTILINE)) == 2, (way, output)
