"""What patching costs before anything is computed: the start-up hook, and imports of timm and of a host of many sites.

Interpreters are started in turn, so that drift of the machine hits all alike; the cost of the hook's line itself, which
is far below the noise of a start, is measured inside one interpreter. The host is a generated package: each of its
modules has an attention class as timm writes it, and other code around it; it is planned anew each time, where plans of
timm are kept for later processes. The import of timm is measured in processor time, start of the interpreter included.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lwpf_patch.rewriting.plan import tree_hash

from . import reporting
from .reporting import Row

HOOK = reporting.ROOT / "lwpf_patch" / "lwpf_patch.pth"

# exec is what site does with the line of a .pth file.
_INSIDE = """
import sys, time
line = sys.argv[1]
for _ in range(200):
    start = time.perf_counter()
    exec(line)
    print(time.perf_counter() - start)
"""

_ATTENTION = """
class Attention{number}(nn.Module):
    def __init__(self, dim, num_heads=8):
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = num_heads, dim // num_heads, True
        self.qkv, self.proj, self.attn_drop = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            attn = attn.softmax(dim=-1)
            attn = self.attn_drop(attn)
            x = attn @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))
"""
_OTHER = """
class Block{number}(nn.Module):
    def __init__(self, dim, layer=nn.Identity, drop=0.0, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.attn, self.norm2 = norm(dim), layer(dim), norm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(drop), nn.Linear(4 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

def make_block_{number}(dim, depth, *, drop=0.0, **options):
    blocks = [Block{number}(dim, drop=drop * index / max(1, depth - 1), **options) for index in range(depth)]
    return nn.Sequential(*blocks)
"""

_IMPORT = """
import json, sys, time
import torch
sys.path.insert(0, sys.argv[1])
import lwpf_patch
from lwpf_patch.hosting import FeatureMapAttachment, FuncDAttachment, RewrittenHost, Site
known = {json.loads(sys.argv[4])["hash"]: "1"}
attachments = (FuncDAttachment(), FeatureMapAttachment(shape=lambda module: (module.num_heads, module.head_dim)))
sites = tuple(
    Site(f"generated.part{number}", f"Attention{number}.forward", known, attachments)
    for number in range(int(sys.argv[2]))
)
lwpf_patch.register_host(RewrittenHost("generated", "pip install generated", sites=sites))
if sys.argv[3] == "patched":
    lwpf_patch.apply("generated")
start = time.perf_counter()
import generated
print(time.perf_counter() - start)
assert sys.argv[3] == "plain" or len(lwpf_patch.status()["hosts"]["generated"]["sites"]) == len(sites)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--sites", type=int, help="sites of the generated host (default: 60; 5 with --quick)")
    parser.add_argument("--starts", type=int, help="interpreters started of each kind (default: 40; 3 with --quick)")


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    options.starts = options.starts or (3 if options.quick else 40)
    plain = {k: v for k, v in os.environ.items() if not k.startswith("LWPF_")}
    variants = {"start, no variable set": plain, "start, LWPF_PATCH=timm": {**plain, "LWPF_PATCH": "timm"}}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.starts):
        for name, environment in variants.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", ""], env=environment, check=True, stderr=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    base, *_ = seconds.values()
    rows: list[Row] = []
    for name, own in seconds.items():
        ratios = [one / other for one, other in zip(own, base, strict=True)]
        rows.append({"variant": name, "seconds": reporting.quartiles(own), "ratio": reporting.quartiles(ratios)})
    out = subprocess.run(
        [sys.executable, "-c", _INSIDE, HOOK.read_text()], env=plain, check=True, capture_output=True, text=True
    )
    line = [float(text) for text in out.stdout.split()]
    rows.append({"variant": "the hook's line alone", "seconds": reporting.quartiles(line)})
    rows += _imports(options, plain)
    if importlib.util.find_spec("timm") is not None:
        rows += _import_of_timm(options, plain)
    headings = ["variant", "milliseconds (quartiles)", "ratio (quartiles)"]
    cells = [[r["variant"], reporting.spread(r["seconds"], 1e3, 4), reporting.spread(r.get("ratio"))] for r in rows]
    print(reporting.table(headings, cells))
    reporting.write(options, rows)


def _imports(options: argparse.Namespace, environment: dict[str, str]) -> list[Row]:
    """Measure the import of a generated host, plain and patched in turn."""
    sites = options.sites or (5 if options.quick else 60)
    seconds: dict[str, list[float]] = {"plain": [], "patched": []}
    with tempfile.TemporaryDirectory() as folder:
        _generate(Path(folder) / "generated", sites)
        known = json.dumps({"hash": tree_hash(ast.parse(_ATTENTION.format(number=0)).body[0].body[1])})
        for _ in range(1 + (1 if options.quick else max(2, options.starts // 4))):
            for name, own in seconds.items():
                command = [sys.executable, "-c", _IMPORT, folder, str(sites), name, known]
                out = subprocess.run(
                    command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                own.append(float(out.stdout))
    plain, patched = (own[1:] for own in seconds.values())  # the first ones compile what is cached afterwards
    added = [one - other for one, other in zip(patched, plain, strict=True)]
    ratios = [one / other for one, other in zip(patched, plain, strict=True)]
    return [
        {"variant": f"import of a host of {sites} modules, plain", "seconds": reporting.quartiles(plain)},
        {
            "variant": f"the same with {sites} sites patched",
            "seconds": reporting.quartiles(patched),
            "ratio": reporting.quartiles(ratios),
        },
        {"variant": "what that adds", "seconds": reporting.quartiles(added)},
    ]


def _import_of_timm(options: argparse.Namespace, environment: dict[str, str]) -> list[Row]:
    """Measure `import timm`: plain, patched for the first time on a machine, and patched later on."""
    patched = {**environment, "LWPF_PATCH": "timm"}
    patched.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds: dict[str, list[float]] = {"plain": [], "patched for the first time": [], "patched": []}
    command = [sys.executable, "-c", "import time, timm; print(time.process_time())"]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1 + (1 if options.quick else max(2, options.starts // 4))):
            places = (environment, {**patched, "XDG_CACHE_HOME": f"{folder}/{number}", "TORCH_EXTENSIONS_DIR": ""},
                      {**patched, "XDG_CACHE_HOME": folder, "TORCH_EXTENSIONS_DIR": ""})  # fmt: skip
            for own, variables in zip(seconds.values(), places, strict=True):
                out = subprocess.run(
                    command, env=variables, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                own.append(float(out.stdout.split()[-1]))
    plain, *others = (own[1:] for own in seconds.values())
    rows: list[Row] = [{"variant": "import timm, plain (processor time)", "seconds": reporting.quartiles(plain)}]
    for name, own in zip([*seconds][1:], others, strict=True):
        added = [one - other for one, other in zip(own, plain, strict=True)]
        rows.append({"variant": f"what it adds if timm is {name}", "seconds": reporting.quartiles(added)})
    return rows


def _generate(package: Path, sites: int) -> None:
    package.mkdir()
    others = "".join(_OTHER.format(number=number) for number in range(20))
    for number in range(sites):
        attention = _ATTENTION.format(number=number)
        source = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n" + attention + others
        (package / f"part{number}.py").write_text(source)
    (package / "__init__.py").write_text("".join(f"from . import part{number}\n" for number in range(sites)))
