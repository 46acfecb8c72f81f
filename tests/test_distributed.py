"""Two processes on gloo: DDP and FSDP2 train as one process does; with U-Hop, Φ is bitwise the same on both ranks."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT

# Tried: 2.5 refuses ("FSDP requires CUDA for streams"), and 2.6 asks a CPU's stream for an event, which it has not.
needs_fsdp2 = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason=f"PyTorch {torch.__version__}: FSDP2 runs on CUDA alone before 2.7"
)

COMMON = """
import gc, os, sys
import torch, torch.distributed as dist
from torch import nn
sys.path.insert(0, {tests!r})
from vits import vit

def batch():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64), torch.arange(8) % 5

def train(model, x, y, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

def new_model():
    torch.manual_seed(0)
    return vit()

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
x, y = batch()
alone = new_model()
assert repr(alone.blocks[0].attn.func_d) == "ReLU()"
train(alone, x, y)
model = new_model()
half = slice(4 * rank, 4 * rank + 4)
"""

DDP = """
wrapped = nn.parallel.DistributedDataParallel(model)
train(wrapped, x[half], y[half])
got = model.state_dict()
del wrapped
"""

FSDP = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
mesh = init_device_mesh("cpu", (2,))
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
train(model, x[half], y[half])
got = {name: value.full_tensor() for name, value in model.state_dict().items()}
del model, mesh
"""

# A process group lives as long as what uses it, and PyTorch aborts a process that ends while a thread of gloo gives a
# tensor back (its issue 179291): so what uses it goes first.
END = """
gc.collect()
dist.destroy_process_group()
"""

CHECK = """
for name, value in alone.state_dict().items():
    torch.testing.assert_close(got[name], value)
print("equal on rank", rank)
"""


@pytest.mark.parametrize("way", [pytest.param(DDP, id="DDP"), pytest.param(FSDP, id="FSDP2", marks=needs_fsdp2)])
def test_two_processes_train_as_one(python, tmp_path, way):
    (tmp_path / "train.py").write_text(COMMON.format(tests=str(ROOT / "tests")) + way + CHECK + END)
    out = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py",
        LWPF_PATCH="timm",
    )  # fmt: skip
    assert out.stdout.count("equal on rank") == 2


UHOP = """
wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
for step in range(10):
    optimizer.zero_grad()
    x, y = batch()
    nn.functional.cross_entropy(wrapped(x[half] * (1 + step)), y[half]).backward()
    optimizer.step()
for name, value in model.state_dict().items():
    gathered = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(gathered, value.contiguous())
    assert torch.equal(*gathered), name
maps = [m.feature_map for m in model.modules() if hasattr(m, "feature_map")]
assert maps and all(m.weight.any() and m._steps == STEPS for m in maps)
print("the same on rank", rank)
del wrapped, optimizer, gathered
"""


@pytest.mark.parametrize("options", ["iters=5", "iters=5,every=3,until=9", "iters=5,train=false"])
def test_the_feature_map_is_bitwise_the_same_on_both_ranks(python, tmp_path, options):
    steps = "7" if "every" in options else "1"
    script = COMMON.format(tests=str(ROOT / "tests")).partition("alone = new_model()")
    setup = "model = new_model()\nhalf = slice(4 * rank, 4 * rank + 4)\n"
    (tmp_path / "train.py").write_text(script[0] + setup + UHOP.replace("STEPS", steps) + END)
    out = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py",
        LWPF_PATCH="timm", LWPF_UHOP=options,
    )  # fmt: skip
    assert out.stdout.count("the same on rank") == 2
    assert out.stderr.count("U-Hop Stage I on timm") == (3 if "every" in options else 1)


@needs_fsdp2
def test_fsdp_is_refused_with_uhop(python, tmp_path):
    script = COMMON.format(tests=str(ROOT / "tests")).partition("alone = new_model()")
    setup = "model = new_model()\nhalf = slice(4 * rank, 4 * rank + 4)\n"
    (tmp_path / "train.py").write_text(script[0] + setup + FSDP)
    out = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py",
        LWPF_PATCH="timm", LWPF_UHOP="on", check=False,
    )  # fmt: skip
    assert out.returncode != 0
    assert "Stage I needs it whole on every process, which FSDP" in out.stderr


FAILING = """
import lwpf_patch
from lwpf_patch.uhop import stage_one
wrapped = nn.parallel.DistributedDataParallel(model)
maps = [m.feature_map for m in model.modules() if hasattr(m, "feature_map")]
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
x, y = batch()

def step():
    optimizer.zero_grad()
    nn.functional.cross_entropy(wrapped(x[half]), y[half]).backward()
    if WHERE == "keys" and rank == 1:
        maps[1]._keys[0, 0, 0] = torch.nan
    optimizer.step()

compute = stage_one.separation_gradient
calls = []

def raise_at_last(*arguments):
    calls.append(arguments)
    if WHERE == "end" and rank == 1 and len(calls) == 12:  # the loss of the second layer after 5 iterations
        raise MemoryError("none left")
    return compute(*arguments)

stage_one.separation_gradient = raise_at_last
try:
    step()
except (lwpf_patch.LwpfError, MemoryError) as error:
    print(f"rank {rank}: {type(error).__name__}: {error}\\n", end="", flush=True)
assert all(m.steps == 0 and not m.weight.any() for m in maps)
WHERE = ""
step()
for m in maps:
    gathered = [torch.empty_like(m.weight) for _ in range(2)]
    dist.all_gather(gathered, m.weight.detach())
    assert torch.equal(*gathered) and m.weight.any() and m.steps == 1
print(f"the same on rank {rank}\\n", end="", flush=True)
del wrapped, optimizer, gathered
"""


@pytest.mark.parametrize("where", ["keys", "end"])
def test_what_fails_on_one_rank_fails_on_all_and_is_tried_again(python, tmp_path, where):
    script = COMMON.format(tests=str(ROOT / "tests")).partition("alone = new_model()")
    setup = f"WHERE = {where!r}\nmodel = new_model()\nhalf = slice(4 * rank, 4 * rank + 4)\n"
    (tmp_path / "train.py").write_text(script[0] + setup + FAILING + END)
    out = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py",
        LWPF_PATCH="timm", LWPF_UHOP="iters=5", timeout=100,
    )  # fmt: skip
    assert "rank 0: StageOneError: uhop: Stage I on timm failed on rank 1" in out.stdout
    own = {"keys": "StageOneError: .*the keys of 1 of 2 layers", "end": "MemoryError: none left"}
    assert re.search(f"rank 1: {own[where]}", out.stdout)
    assert out.stdout.count("the same on rank") == 2
    assert "Stage I failed" not in out.stderr  # at exit: it was made up for


JOIN = """
from torch.distributed.algorithms.join import Join
wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
x, y = batch()
with Join([wrapped]):
    for step in range((3, BATCHES)[rank]):
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x[half]), y[half]).backward()
        optimizer.step()
        print(f"rank {rank} made step {step + 1}\\n", end="", flush=True)
print(f"done on rank {rank}\\n", end="", flush=True)
del wrapped, optimizer
"""


@pytest.mark.parametrize("batches", [3, 1])
def test_uneven_inputs_under_join(python, tmp_path, batches):
    """Stage I after the steps 1 and 3: with 3 and 3 batches all take part; one that ended before is an error."""
    script = COMMON.format(tests=str(ROOT / "tests")).partition("alone = new_model()")
    setup = f"BATCHES = {batches}\nmodel = new_model()\nhalf = slice(4 * rank, 4 * rank + 4)\n"
    (tmp_path / "train.py").write_text(script[0] + setup + JOIN + END)
    out = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py",
        LWPF_PATCH="timm", LWPF_UHOP="iters=5,every=2,until=3", check=False, timeout=100,
    )  # fmt: skip
    if batches == 3:
        assert out.stdout.count("done on rank") == 2
        return
    assert out.returncode != 0
    assert "rank 0 made step 2" in out.stdout
    assert "rank 0 made step 3" not in out.stdout
    assert "StageOneError: uhop: Stage I on timm is to average over 2 processes, but 1 of them" in out.stderr
    assert "Signal 6" not in out.stderr  # no abort
