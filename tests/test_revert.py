"""After apply and revert a process is the one that was never patched: its models, its classes and its numbers."""

from __future__ import annotations

import pytest
from conftest import require_host

#: Makes and trains one model of each host, and prints what there is of it: members, hooks, figures to the last bit.
SCRIPT = """
import hashlib, sys, warnings
warnings.simplefilter("ignore")
import numpy, torch
numpy.int = int  # which DeepRC needs, patched or not
PATCH_BEFORE
import hflayers, timm
from deeprc.architectures import AttentionNetwork, DeepRC, OutputNetwork, SequenceEmbeddingCNN
PATCH_AFTER
torch.manual_seed(0)
bags = DeepRC(
    max_seq_len=9, sequence_embedding_network=SequenceEmbeddingCNN(23, kernel_size=3, n_kernels=6, n_layers=1),
    attention_network=AttentionNetwork(6, 1, 5), output_network=OutputNetwork(6, 1, 1, 4),
    device=torch.device("cpu"), sequence_embedding_as_16_bit=False,
)
models = {
    "timm": (timm.create_model("test_vit", num_classes=3, attn_drop_rate=0.1), (torch.randn(2, 3, 160, 160),)),
    "hflayers": (hflayers.Hopfield(8, num_heads=2, dropout=0.1, update_steps_max=2), (torch.randn(2, 5, 8),)),
    "deeprc": (bags, (torch.randn(8, 9, 23), torch.full((8,), 9), torch.tensor([5, 3]))),
}
PATCH_MODELS
for name, (model, inputs) in models.items():
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(*inputs)
        output.square().sum().backward()
        optimizer.step()
    digest = hashlib.sha256(output.detach().numpy().tobytes())
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.numpy().tobytes())
    print(name, digest.hexdigest())
    for path, module in model.named_modules():
        members = {k: sorted(v) if k.startswith("_") and isinstance(v, dict) else type(v).__name__
                   for k, v in vars(module).items()}
        cls = {k: getattr(v, "__qualname__", None) for k, v in vars(type(module)).items() if callable(v)}
        code = [v.__code__.co_code.hex() for v in vars(type(module)).values() if hasattr(v, "__code__")]
        print(name, path, sorted(members.items()), sorted(cls.items()), hashlib.sha256(str(code).encode()).hexdigest())
"""
APPLY = "import lwpf_patch; lwpf_patch.apply(['timm', 'hflayers', 'deeprc'], func_d='pfu', sep='entmax15', uhop='on')\n"
#: While it is patched something is computed, and a feature map is trained.
TRAIN = """
for model, inputs in models.values():
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(*inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
REVERT = "lwpf_patch.revert()\n"


def _run(python, before="", after="", models=""):
    script = SCRIPT.replace("PATCH_BEFORE", before).replace("PATCH_AFTER", after).replace("PATCH_MODELS", models)
    return python(code=script).stdout


@pytest.mark.drawn(days=3)
def test_after_revert_a_process_is_that_which_was_never_patched(python):
    require_host("hflayers")
    require_host("deeprc")
    never = _run(python)
    assert never.count("\n") > 100
    assert _run(python, before=APPLY, after=REVERT) == never
    assert _run(python, after=APPLY + REVERT) == never
    assert _run(python, after=APPLY, models=TRAIN + REVERT) == never
    assert _run(python, after=APPLY) != never
