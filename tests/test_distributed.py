"""Two processes on gloo: DDP and FSDP2 train a patched model as one process does."""

from __future__ import annotations

import pytest
from conftest import ROOT

COMMON = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
sys.path.insert(0, {tests!r})
from vits import vit

def batch():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 5

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
assert type(alone.blocks[0].attn.func_d).__name__ == "ReLU"
train(alone, x, y)
model = new_model()
half = slice(4 * rank, 4 * rank + 4)
"""

DDP = """
wrapped = nn.parallel.DistributedDataParallel(model)
train(wrapped, x[half], y[half])
got = model.state_dict()
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
"""

CHECK = """
for name, value in alone.state_dict().items():
    torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
print("equal on rank", rank)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("way", [DDP, FSDP], ids=["DDP", "FSDP2"])
def test_two_processes_train_as_one(python, tmp_path, way):
    (tmp_path / "train.py").write_text(COMMON.format(tests=str(ROOT / "tests")) + way + CHECK)
    out = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py",
        LWPF_PATCH="timm",
    )  # fmt: skip
    assert out.stdout.count("equal on rank") == 2
