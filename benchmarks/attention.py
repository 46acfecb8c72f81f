"""One attention layer: time and memory of SDPA, FlexAttention, the hand-edited forms and ours, over the length.

SDPA stands there backend by backend; LwPF by hand is what one would write into a library's source, as it is and under
torch.compile; FlexAttention takes softmax in one pass and LwPF-ReLU in two; ours is lwpf_attention, with whatever
backend "auto" picks or --backend names, as it is and under torch.compile. Forward alone and forward with backward are
timed in turn within one process; what counts are the ratios to the base, repeat by repeat, and to each variant that
computes softmax. Peak memory is what one forward and backward pass adds; on CUDA, activation memory is what is held
between the two, the output included.

TFLOP/s and GB/s are of the median and nominal: of the products that attention cannot do without (4BHNNE operations
forward, 14BHNNE with backward) and of each tensor read or written once (4 and 12 of them). An output matches if its
error, against the eager form in float64 and relative in the Frobenius norm, is within the tolerance of its dtype.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import reporting
from .reporting import Row, say

if TYPE_CHECKING:
    from .measuring import Subject

#: The defaults of each device.
BASES = {"cpu": "eager softmax", "cuda": "SDPA flash"}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
SHAPES = {
    "cpu": ["8,6,197,64", "8,6,1024,64", "1,6,4096,64"],
    "cuda": ["256,12,197,64", "8,12,4096,64", "8,12,4096,128"],
}
REPEATS = {"cpu": 15, "cuda": 30}
QUICK_SHAPES = ["1,2,64,32"]

#: The error of an output that still matches the reference; a few times what rounding makes.
TOLERANCES = {"float64": 1e-9, "float32": 1e-3, "float16": 5e-3, "bfloat16": 2e-2}
#: Operations of a pass in units of BHNNE, and tensors of BHNE elements that it reads or writes: Q, K, V and the output;
#: backward, these and the gradient of the output, and the gradients of Q, K and V.
WORK = {"forward": (4, 4), "both": (14, 12)}

PASSES = {"forward": "forward", "both": "forward + backward"}

MEDIAN, CONSTANT = "pfu:mu=dmedian,bias=mu,sigma=0", "pfu:mu=0.1,bias=mu,sigma=0"


@dataclass(frozen=True)
class Variant:
    """One way to compute attention.

    Attributes:
        function: Maps query, key and value, each (B, H, N, E), to the output.
        func_d: The forgetting function that it computes with.
        compiled: Whether it runs under torch.compile.
        backend: Of our operator; empty for anything else.
    """

    function: Callable[..., Any]
    func_d: str = "none"
    compiled: bool = False
    backend: str = ""

    def runnable(self) -> Callable[..., Any]:
        """Return the function, compiled if it is to be."""
        import torch

        if not self.compiled:
            return self.function
        # For each shape its own program, and a break of the graph is a failure: the fairest to all.
        return torch.compile(self.function, fullgraph=True, dynamic=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    reporting.add_measuring_arguments(parser, REPEATS)
    dtypes = ("float32", "bfloat16", "float16", "float64")
    parser.add_argument("--dtype", choices=dtypes, help=reporting.defaults(DTYPES))
    shapes = reporting.defaults({device: " ".join(texts) for device, texts in SHAPES.items()})
    parser.add_argument(
        "--shapes", nargs="+", metavar="B,H,N,E", help=f"batch, heads, sequence length and width of a head ({shapes})"
    )
    parser.add_argument("--if-there", action="store_true", help="of --only, leave out what this machine lacks")
    parser.add_argument("--base", metavar="VARIANT", help=f"what ratios are taken to ({reporting.defaults(BASES)})")


def run(options: argparse.Namespace) -> None:
    """Measures, prints a table and writes what was asked for."""
    from . import measuring

    measuring.settle(options, REPEATS)
    options.dtype = options.dtype or DTYPES[options.device]
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES[options.device])
    options.base = options.base or BASES[options.device]
    if options.memory_of:
        variant = variants(options.backend)[options.memory_of]
        measuring.print_memory(_subject(variant, *make_inputs(options, options.shapes[0])), options.device)
        return
    known, left_out = available(options.device, options.backend)
    for name, why in left_out.items():
        say(f"left out: {name}: {why}")
    if options.if_there:
        options.only = [name for name in options.only or () if name not in left_out]
    chosen = measuring.chosen(options, options.base, known)

    def plot(rows: list[Row], figure: Any) -> None:
        _plot(rows, figure, options.base)

    rows: list[Row] = []
    for shape in options.shapes:
        say(f"B,H,N,E = {shape}")
        rows += (own := _measure(options, shape, chosen))
        print(f"\nB,H,N,E = {shape}, {options.dtype}; ratios to {options.base!r} (quartiles)")
        print(reporting.table(*_lines_of(own, options.device)))
        print(*measuring.failures_of(own), sep="\n", flush=True)
        # After every shape, so that a run that is cut short has not measured in vain.
        reporting.write(options, rows, device=options.device, plot=plot, left_out=left_out)


def _lines_of(rows: list[Row], device: str) -> tuple[list[str], list[list[str]]]:
    from . import measuring

    headings, lines = measuring.lines_of(rows, PASSES, device)
    for row, cells in zip(rows, lines, strict=True):
        for which in PASSES:
            rates = (row.get(f"{which}_tflops"), row.get(f"{which}_gbps"))
            cells.append("-" if None in rates else f"{rates[0]:.3g}, {rates[1]:.3g}")
        cells.append({True: "yes", False: f"no: {row.get('output_error')}", None: "-"}[row.get("output_matches")])
    return [*headings, *(f"{title}: TFLOP/s, GB/s" for title in PASSES.values()), "output matches"], lines


def variants(backend: str = "auto") -> dict[str, Variant]:
    """Return all that is compared, by name.

    Args:
        backend: Of our operator.
    """
    from torch.nn.attention import SDPBackend

    from lwpf_patch import lwpf_attention

    def ours(func_d: str, compiled: bool = False) -> Variant:
        from lwpf_patch.forgetting import make_func_d

        module = make_func_d(func_d)  # as in a patched layer, which has one

        def function(q: Any, k: Any, v: Any) -> Any:
            return lwpf_attention(q, k, v, func_d=module, training=False, backend=backend)

        return Variant(function, func_d, compiled, backend)

    return {
        "eager softmax": Variant(_softmax),
        "eager softmax, compiled": Variant(_softmax, compiled=True),
        "SDPA math": Variant(_sdpa_by(SDPBackend.MATH)),
        "SDPA flash": Variant(_sdpa_by(SDPBackend.FLASH_ATTENTION)),
        "SDPA efficient": Variant(_sdpa_by(SDPBackend.EFFICIENT_ATTENTION)),
        "SDPA cudnn": Variant(_sdpa_by(SDPBackend.CUDNN_ATTENTION)),
        "FlashAttention 4": Variant(_flash_attention_4),
        "FlexAttention": Variant(_softmax_by_flex_attention, compiled=True),
        "ReLU, FlexAttention": Variant(_relu_by_flex_attention, "relu", compiled=True),
        "ReLU by hand": Variant(_relu_by_hand, "relu"),
        "dmedian by hand": Variant(_dmedian_by_hand, MEDIAN),
        "ReLU by hand, compiled": Variant(_relu_by_hand, "relu", compiled=True),
        "dmedian by hand, compiled": Variant(_dmedian_by_hand, MEDIAN, compiled=True),
        "ReLU, ours": ours("relu"),
        "PFU, ours": ours(CONSTANT),
        "dmedian, ours": ours(MEDIAN),
        "ReLU, ours, compiled": ours("relu", compiled=True),
        "PFU, ours, compiled": ours(CONSTANT, compiled=True),
        "dmedian, ours, compiled": ours(MEDIAN, compiled=True),
    }


def available(device: str, backend: str = "auto") -> tuple[dict[str, Variant], dict[str, str]]:
    """Return the variants that a device has, and those that it lacks with the reason.

    A variant is lacking if it computes in no dtype at all; one that cannot do what is measured is not, it fails.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        backend: Of our operator.
    """
    known = variants(backend)
    lacking = {}
    for name in known:
        why = _why_no_sdpa(known[name], device) if name.startswith("SDPA") else ""
        if "FlexAttention" in name:
            why = _why_no_flex_attention()
        if name == "FlashAttention 4":
            why = _why_no_flash_attention_4(device)
        if why:
            lacking[name] = why
    return {name: variant for name, variant in known.items() if name not in lacking}, lacking


def _softmax(q: Any, k: Any, v: Any) -> Any:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def _by_hand(q: Any, k: Any, v: Any, threshold: Callable[[Any], Any]) -> Any:
    s = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    a = threshold(s)
    mask = (s > a).to(s.dtype).detach()
    s = mask * s + (1 - mask) * a
    return (mask * s.softmax(-1)) @ v


def _relu_by_hand(q: Any, k: Any, v: Any) -> Any:
    return _by_hand(q, k, v, lambda s: 0.0)


def _dmedian_by_hand(q: Any, k: Any, v: Any) -> Any:
    return _by_hand(q, k, v, lambda s: s.median())


def _sdpa_by(backend: Any) -> Callable[..., Any]:
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def function(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return function


def _softmax_by_flex_attention(q: Any, k: Any, v: Any) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v)


def _flash_attention_4(q: Any, k: Any, v: Any) -> Any:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(*(tensor.transpose(1, 2) for tensor in (q, k, v)))  # it wants (B, N, H, E)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # with the log-sum-exp, in some versions


def _relu_by_flex_attention(q: Any, k: Any, v: Any) -> Any:
    """LwPF-ReLU: attention to the kept keys, and a second pass that counts the forgotten ones of each row.

    With Z' the sum of exp(s) over the kept keys and nF the number of forgotten ones, each of which adds exp(0) to the
    denominator, the output is out' Z' / (Z' + nF) = out' sigmoid(log Z' - log nF).
    """
    import torch
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def kept(s: Any, *where: Any) -> Any:
        return torch.where(s > 0, s, -float("inf"))

    def forgotten(s: Any, *where: Any) -> Any:
        return torch.where(s > 0, -float("inf"), 0.0)

    lse = AuxRequest(lse=True)
    out, aux = flex_attention(q, k, v, score_mod=kept, return_aux=lse)
    # The count has no gradient, and only its log-sum-exp is used: values as narrow as there may be.
    q, k, v = q.detach(), k.detach(), v[..., :16].detach()
    _, count = flex_attention(q, k, v, score_mod=forgotten, return_aux=lse)
    return out * torch.sigmoid(aux.lse - count.lse).unsqueeze(-1).to(out.dtype)


def _why_no_sdpa(variant: Variant, device: str) -> str:
    import warnings

    import torch

    why = ""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tiny = torch.zeros(1, 1, 64, 64, dtype=dtype, device=device)
        try:
            with warnings.catch_warnings():  # each kernel warns of why it was not taken
                warnings.simplefilter("ignore")
                variant.function(tiny, tiny, tiny)
            return ""
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
    return why


def _why_no_flash_attention_4(device: str) -> str:
    if device != "cuda":
        return "it is made for CUDA"
    try:
        from flash_attn.cute import flash_attn_func  # noqa: F401
    except Exception as error:  # what it is built on may be missing, or fail when it is imported
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ""


def _why_no_flex_attention() -> str:
    try:
        from torch.nn.attention.flex_attention import AuxRequest  # noqa: F401
    except ImportError:
        return "it needs PyTorch 2.9 or later"
    return ""


def make_inputs(options: argparse.Namespace, shape: str) -> tuple[list[Any], Any]:
    """Draw query, key and value, and a gradient of the output."""
    import torch

    sizes = tuple(int(part) for part in shape.split(","))
    made: dict[str, Any] = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    torch.manual_seed(0)
    return [torch.randn(sizes, **made, requires_grad=True) for _ in range(3)], torch.randn(sizes, **made)


def _subject(variant: Variant, inputs: list[Any], cotangent: Any) -> Subject:
    import torch

    from .measuring import Subject

    function = variant.runnable()
    detached = [tensor.detach() for tensor in inputs]

    def forward() -> Any:
        return function(*inputs)

    def backward(out: Any) -> Any:
        return torch.autograd.grad(out, inputs, cotangent)

    return Subject(forward, backward, {"forward": lambda: function(*detached), "both": lambda: backward(forward())})


def _measure(options: argparse.Namespace, shape: str, chosen: dict[str, Variant]) -> list[Row]:
    import torch

    from . import measuring

    torch.compiler.reset()  # every shape compiles anew: no limit on how often, and no program for changing shapes
    inputs, cotangent = make_inputs(options, shape)
    subjects = {name: _subject(variant, inputs, cotangent) for name, variant in chosen.items()}
    softmax = [name for name, variant in chosen.items() if variant.func_d == "none"]
    rows = measuring.compare(options, subjects, options.base, "--shapes", shape, others=softmax)
    batch, heads, length, width = (int(part) for part in shape.split(","))
    references: dict[str, Any] = {}
    what = {"shape": shape, "batch": batch, "heads": heads, "length": length, "width": width, "dtype": options.dtype}
    for number, row in enumerate(rows):
        variant = chosen[row["variant"]]
        row |= _rates(row, batch * heads * length * width, length, inputs[0].element_size())
        if not row["failures"].keys() & PASSES.keys():
            matching, failure = measuring.attempt(
                functools.partial(_matching, subjects[row["variant"]], variant.func_d, inputs, references),
                options.device,
            )
            row |= matching or {"failures": {**row["failures"], "reference": failure}}
        rows[number] = {**what, "func_d": variant.func_d, "backend": _backend_of(variant, inputs), **row}
    return rows


def _rates(row: Row, elements: int, length: int, bytes_of_one: int) -> Row:
    """Return the nominal rates of a row's medians; see the module."""
    rates: Row = {}
    for which, (operations, tensors) in WORK.items():
        if f"{which}_seconds" in row:
            seconds = row[f"{which}_seconds"][1]
            rates[f"{which}_tflops"] = operations * elements * length / seconds / 1e12
            rates[f"{which}_gbps"] = tensors * elements * bytes_of_one / seconds / 1e9
    return rates


def _matching(subject: Subject, func_d: str, inputs: list[Any], references: dict[str, Any]) -> Row:
    """Compare the output for the first item of the batch to the reference, which is kept for the next variant."""
    if func_d not in references:
        references[func_d] = _reference(func_d, inputs)
    out, expected = subject.forward().detach()[:1].double(), references[func_d]
    error = ((out - expected).norm() / expected.norm()).item()
    tolerance = TOLERANCES[str(inputs[0].dtype).removeprefix("torch.")]
    # NaN is no number in JSON.
    return {"output_error": error if math.isfinite(error) else None, "output_matches": error <= tolerance}


def _reference(func_d: str, inputs: list[Any]) -> Any:
    """Compute the output for the first item of the batch by the eager form in float64."""
    import torch

    from lwpf_patch import PFU, lwpf_attention
    from lwpf_patch.forgetting import make_func_d

    with torch.no_grad():
        module = make_func_d(func_d)
        if func_d == MEDIAN:  # that of all items
            query, key = (tensor.float() for tensor in inputs[:2])
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
            module = PFU(mu=scores.median().item(), bias="mu", sigma=0.0)
            del scores
        query, key, value = (tensor[:1].double() for tensor in inputs)
        return lwpf_attention(query, key, value, func_d=module, training=False, backend="eager")


def _backend_of(variant: Variant, inputs: list[Any]) -> str:
    """Return the backend of our operator that computes a variant, empty for what is not ours."""
    from lwpf_patch import SettingsError, backends
    from lwpf_patch.forgetting import make_func_d

    if not variant.backend:
        return ""
    try:
        return backends.choose(variant.backend, backends.Call(*inputs, make_func_d(variant.func_d)))[0].name
    except SettingsError:
        return variant.backend  # it cannot, as the row says


def _plot(rows: list[Row], figure: Any, base: str) -> None:
    """Draw time and memory over the length; a row of panels for each width of a head."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Writes 0.6, and not 6e-01, where a label is wanted."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    figures = {
        "forward_ratio": "Forward, time",
        "both_ratio": "Forward + backward, time",
        "peak_ratio": "Peak memory",
        "activation_ratio": "Activation memory",
    }
    figures = {key: title for key, title in figures.items() if any(key in row for row in rows)}
    names = list(dict.fromkeys(row["variant"] for row in rows))
    widths = list(dict.fromkeys(row["width"] for row in rows))
    figure.set_size_inches(4.2 * len(figures) + 3, 4 * len(widths) + 0.6)
    panels = figure.subplots(len(widths), len(figures), squeeze=False)
    for width, line in zip(widths, panels, strict=True):
        for (key, title), axes in zip(figures.items(), line, strict=True):
            for number, name in enumerate(names):
                own = [row for row in rows if row["width"] == width and row["variant"] == name and key in row]
                _draw_line(axes, sorted(own, key=lambda row: row["length"]), key, name, number)
            axes.set(title=f"{title} (E = {width})", xlabel="sequence length N", ylabel=f"ratio to {base}")
            lengths = sorted({row["length"] for row in rows if row["width"] == width})
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, map(str, lengths))
            axes.minorticks_off()
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(Plain())
            axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.5)))
            axes.axhline(1, color="black", linewidth=0.8)
            axes.grid(True, alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    found = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    named = {name: found[name] for name in names if name in found}
    figure.legend(named.values(), named, loc="outside right center", fontsize=8)


def _draw_line(axes: Any, rows: list[Row], key: str, name: str, number: int) -> None:
    if not rows:
        return
    lengths = [row["length"] for row in rows]
    style = {
        "color": f"C{number % 10}",
        "linestyle": "--" if "compiled" in name else "-",
        "linewidth": 2.4 if "ours" in name else 1.2,
        "marker": "os^Dv"[number // 3 % 5],
        "markersize": 4,
        "label": name,
    }
    if key in ("peak_ratio", "activation_ratio"):
        axes.plot(lengths, [max(row[key], 1e-4) for row in rows], **style)
        return
    low, median, high = zip(*(row[key] for row in rows), strict=True)
    axes.plot(lengths, median, **style)
    axes.fill_between(lengths, low, high, color=style["color"], alpha=0.12, linewidth=0)
