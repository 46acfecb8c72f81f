"""Checks the attention classes of whatever timm is found, in models as it registers them; a program.

    python tests/check_classes.py           # a name a line: the classes that are right
    python tests/check_classes.py 5         # with five models, chosen by the seed TESTS_SEED

Each module of a class that is met first is called again as the model calls it, in float64, unpatched under the oracle
and patched. Prints the sites that were checked, and fails at the first difference.
"""

from __future__ import annotations

import os
import random
import sys
import warnings

import timm
import torch
from oracle import Forgetting
from oracle_mode import ForgettingSoftmax

import lwpf_patch
from lwpf_patch.patching.models import site_of

#: Small models that hold the classes of all versions.
MODELS = (
    "beit_base_patch16_224", "caformer_s18", "cait_xxs24_224", "coatnet_pico_rw_224", "convit_tiny", "cpubone_nano",
    "crossvit_tiny_240", "davit_tiny", "eca_botnext26ts_256", "efficientformer_l1", "efficientformerv2_s0",
    "efficientvit_m0", "eva02_tiny_patch14_224", "fastvit_sa12", "gcvit_xxtiny", "halonet26t", "hiera_tiny_224",
    "iformer_t", "levit_128s", "levit_conv_128s", "lowformer_b0", "maxvit_pico_rw_256", "maxxvit_rmlp_nano_rw_256",
    "mobilenetv4_hybrid_medium_075", "mvitv2_tiny", "nest_tiny", "nextvit_small", "pvt_v2_b0", "pvt_v2_b2_li",
    "resnet50_clip", "shvit_s1", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_ns_224", "swinv2_tiny_window8_256",
    "tiny_vit_5m_224", "tnt_s_patch16_224", "twins_pcpvt_small", "twins_svt_small", "visformer_tiny",
    "vit_base_patch16_siglip_224", "vit_relpos_small_patch16_224", "vit_tiny_patch16_224", "volo_d1_224",
)  # fmt: skip
FUNC_DS = {"relu": Forgetting("relu"), "pfu:mu=dmedian,bias=mu,sigma=0": Forgetting("pfu", "dmedian", "mu")}


def first_calls(model: torch.nn.Module, image: torch.Tensor) -> dict[str, tuple]:
    """Returns, for each site, a module of a model and the arguments of its first call; those with a mask first."""
    found: dict[str, tuple] = {}

    def note(module, args, kwargs):
        site = site_of(type(module))
        masked = any(isinstance(each, torch.Tensor) and (each < -50).any() for each in [*args[1:], *kwargs.values()])
        if site is not None and (site[1].name not in found or masked):
            found[site[1].name] = module, args, kwargs

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return found


def check(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    module = module.double()
    for name, value in list(vars(module).items()):  # tensors that are no buffers
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(module, name, value.double())
    args = tuple(
        each.double() if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in args
    )
    kwargs = {
        name: each.double() if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for name, each in kwargs.items()
    }
    masks = [each for each in [*args[1:], *kwargs.values()] if isinstance(each, torch.Tensor) and (each < -50).any()]
    hidden = None
    if masks:
        (mask,) = masks
        hidden = (mask < -50)[:, None].repeat(len(args[0]) // len(mask), 1, 1, 1)
    for fused in (True, False) if hasattr(module, "fused_attn") else (None,):
        if fused is not None:
            module.fused_attn = fused
        for func_d, forgetting in FUNC_DS.items():
            with torch.no_grad(), ForgettingSoftmax(forgetting, hidden) as oracle:
                wanted = module(*args, **kwargs)
            assert oracle.calls
            with lwpf_patch.patched("timm", func_d=func_d), torch.no_grad():
                found = module(*args, **kwargs)
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


def wide(value: object) -> object:
    """Returns a tensor of floating dtype in float64, and anything else as it is."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def main() -> None:
    """Checks all of the models that this timm has, or some."""
    there = [name for name in MODELS if timm.is_model(name)]
    if len(sys.argv) > 1:
        there = random.Random(int(os.environ.get("TESTS_SEED", "0"))).sample(there, int(sys.argv[1]))
    done: set[str] = set()
    for name in there:
        model = timm.create_model(name).eval()
        size = model.default_cfg["input_size"]
        for site, call in first_calls(model, torch.randn(1, *size)).items():
            if site not in done:
                try:
                    check(*call)
                except Exception as error:
                    error.add_note(f"{site} of {name}, timm {timm.__version__}")
                    raise
                done.add(site)
                print(site, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
