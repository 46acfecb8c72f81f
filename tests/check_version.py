"""Run by test_timm_versions in a child whose timm is of some version: that version, patched, against the oracle.

Its arguments are the version and the way in which it is patched: ``variable`` and ``run`` (by whoever starts it, with
the first of CASES), ``before`` or ``after`` (by a call of apply before or after timm is imported).
"""

from __future__ import annotations

import sys

VERSION, WAY = sys.argv[1:]
if WAY == "before":
    import lwpf_patch

    lwpf_patch.apply("timm", func_d="relu", backend="eager")

import oracle
import timm
import torch
from oracle import Forgetting
from timm.models.vision_transformer import VisionTransformer

import lwpf_patch

CASES = {
    "relu": Forgetting("relu"),
    "pfu:mu=0.05,bias=-0.2,sigma=0": Forgetting("pfu", 0.05, -0.2),
    "pfu:sigma=0": Forgetting("pfu", "dmedian", "mu"),
}


def attention_classes() -> dict[str, type]:
    try:
        from timm.layers import attention as module
    except ImportError:
        from timm.models import vision_transformer as module
    return {name: getattr(module, name) for name in ("Attention", "AttentionRope") if hasattr(module, name)}


def check(name: str, cls: type, func_d: str) -> None:
    module = cls(24, num_heads=3, attn_drop=0.3).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    branches = (True, False) if hasattr(module, "fused_attn") else (False,)
    assert hasattr(module, "fused_attn") == (timm.__version__ > "0.7")
    parameters = cls.forward.__code__.co_varnames[: cls.forward.__code__.co_argcount]
    options = [{}]
    if "attn_mask" in parameters:
        options.append(
            {"attn_mask": torch.randn(7, 7, dtype=torch.float64).masked_fill(torch.rand(7, 7) < 0.2, -torch.inf)}
        )
    if "is_causal" in parameters:
        options.append({"is_causal": True})
    if "rope" in parameters:
        options = [{"rope": torch.randn(6, 16, dtype=torch.float64), **more} for more in options]
    for fused in branches:
        for more in options:
            module.fused_attn = fused
            torch.manual_seed(1)
            ours = module(x, **more)
            torch.manual_seed(1)
            keep = torch.nn.functional.dropout(torch.ones(2, 3, 7, 7, dtype=torch.float64), 0.3) != 0
            expected = oracle.timm_attention(module, x, func_d=CASES[func_d], dropout_keep=keep, **more)
            oracle.assert_equal(ours, expected)
            cotangent = torch.randn_like(ours)
            inputs = [x, *module.parameters()]
            got, wanted = (torch.autograd.grad(out, inputs, cotangent) for out in (ours, expected))
            for ours_grad, oracle_grad in zip(got, wanted, strict=True):
                oracle.assert_equal(ours_grad, oracle_grad)


def main() -> None:
    assert timm.__version__ == VERSION, timm.__version__
    if WAY != "after":  # patched already, and nothing else is done to it
        for name, cls in attention_classes().items():
            check(name, cls, "relu")
        lwpf_patch.revert()
    plain = {name: cls.forward.__code__ for name, cls in attention_classes().items()}
    for func_d in CASES if WAY == "after" else ():
        lwpf_patch.apply("timm", func_d=func_d, backend="eager")  # whose dropout is that of torch.nn.functional
        for name, cls in attention_classes().items():
            assert cls.forward.__code__ is not plain[name]
            check(name, cls, func_d)
    lwpf_patch.apply("timm")
    sites = {site["name"]: site["known"] for site in lwpf_patch.status()["hosts"]["timm"]["sites"]}
    assert all(sites[f"{cls.__module__}.{name}"] for name, cls in attention_classes().items())
    x = torch.randn(2, 3, 32, 32)
    model = VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=3).eval()
    patched = model(x)
    lwpf_patch.revert()
    assert not torch.equal(model(x), patched)
    assert all(cls.forward.__code__ is plain[name] for name, cls in attention_classes().items())
    print("right:", *plain)


main()
