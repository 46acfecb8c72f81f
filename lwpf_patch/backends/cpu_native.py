"""CPU: both passes and the median in C++, each of them one parallel region; compiled here at its first use.

Where each step over a tile is an operator of PyTorch's, each of them waits for all threads, and so for one that another
process has put off its core. Here a thread takes one block of queries after another, until none is left. The formulas
are those of :mod:`lwpf_patch.backends.cpu`, which computes what this does not: dropout, and gradients of masks.

The source includes no header of PyTorch's, so that a compiler takes some seconds, once for each machine: too few to go
on computing otherwise meanwhile. The threads are those of PyTorch's own OpenMP, whose ``GOMP_parallel`` is handed over:
a second runtime would have threads of its own, which wait busily beside PyTorch's. Without Linux, a compiler or that
function, or where the results differ from the eager form's, all stays as it was, and ``lwpf doctor`` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import reporting, tracing
from ..errors import unknown_value
from ..options import FLAGS, read_flag
from ..settings import NATIVE
from . import eager_form
from .cpu_median import TIES
from .cpu_steps import numbers

SOURCE = Path(__file__).with_suffix(".cpp")
#: No -ffast-math: NaN and the infinities mean something.
OPTIONS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC",
    "-shared",
)  # fmt: skip
_MEDIAN, _FORWARD, _BACKWARD = range(3)
_INTEGERS = ("batch", "length", "keys", "width", "value_width", "heads")
_POINTERS = (
    "query", "key", "value", "mask", "grad", "out", "log_sum", "rho", "grad_query", "grad_key", "grad_value",
)  # fmt: skip


class _Call(ctypes.Structure):
    """``struct Call`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("mask_strides", ctypes.c_int64 * 4),
        *((name, ctypes.c_int64) for name in ("mask_kind", "causal", "threads")),
        *((name, ctypes.c_double) for name in ("scale", "a", "b", "n", "lowest", "centre")),
        ("ties", ctypes.c_int64),
        ("parallel", ctypes.c_void_p),
    )


class Unavailable(Exception):
    """The library cannot be used; the text says why."""


class _Library:
    """The compiled source."""

    def __init__(self, path: Path) -> None:
        # RTLD_LOCAL: it finds GOMP_parallel in what libtorch_cpu.so depends on, whatever else the process holds.
        try:
            torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
            self.parallel = ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            raise Unavailable("PyTorch's threads are not those of an OpenMP with GOMP_parallel") from None
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"{path} cannot be loaded: {error}") from None
        self.path = path
        self.passes = {torch.float32: library.lwpf_run_float, torch.float64: library.lwpf_run_double}
        lanes = library.lwpf_lanes()
        self.lanes = {torch.float32: lanes, torch.float64: lanes // 2}

    def run(self, which: int, dtype: torch.dtype, call: _Call) -> None:
        """Compute a pass."""
        call.parallel = self.parallel
        call.threads = 1 if _forked else call.threads
        if self.passes[dtype](which, ctypes.byref(call)):
            raise MemoryError("lwpf_attention: there is not enough memory for the gradients or the median")


_forked = False


def _note_the_fork() -> None:
    global _forked
    _forked = True  # the threads of OpenMP are not there, and waiting for them would never end


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_the_fork)


def cache_folder() -> Path:
    """Return where what is compiled is kept."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lwpf_patch"


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise Unavailable("there is no C++ compiler (CXX, c++, g++ or clang++)")


def _processor() -> str:
    """Describe the processor: what is compiled for one need not run on another that shares the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    which = ("model name", "flags", "Features", "CPU part", "cpu family", "model\t")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(which)})])


def _build() -> Path:
    """Return the path of the compiled source; compile it if it is not there."""
    parts = (SOURCE.read_text(), *OPTIONS, _processor())
    name = f"cpu-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"
    path = cache_folder() / name
    if path.exists():
        return path
    compiler = _compiler()
    reporting.logger.info("compiling the attention of the CPU with %s, once: it takes some seconds", compiler)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Processes that compile at once each write a file of their own; the last one stays.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
            made = Path(folder) / name
            command = [compiler, *OPTIONS, "-o", str(made), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                raise Unavailable(f"{compiler} fails: {last}")
            os.replace(made, path)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"it cannot be compiled: {error}") from None
    return path


def _is_wanted() -> bool:
    text = os.environ.get(NATIVE, "").strip()
    try:
        return read_flag(text or "on")
    except ValueError:
        raise unknown_value("native", text, NATIVE, FLAGS) from None


@functools.lru_cache
def _load() -> _Library | str:
    """Return the library, or why it cannot be used."""
    try:
        if not _is_wanted():
            raise Unavailable(f"{NATIVE} says so")
        if not sys.platform.startswith("linux"):
            raise Unavailable("this is not Linux")
        return _Library(_build())
    except Unavailable as error:
        reporting.logger.debug("the attention of the CPU is not compiled: %s", error)
        return str(error)


def is_there() -> bool:
    """Return whether the library is there; it is compiled, if it has to be."""
    return isinstance(_load(), _Library)


def path() -> Path | None:
    """Return where the library lies; None: there is none."""
    library = _load()
    return library.path if isinstance(library, _Library) else None


@functools.lru_cache
def why_not() -> str | None:
    """Return why the library cannot be used; None: it can, and does what the eager form does."""
    library = _load()
    if isinstance(library, str):
        return library
    generator = torch.Generator("cpu").manual_seed(0)
    for dtype, allowed in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        drawn = torch.randn(4, 3, 150, 20, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
        with tracing.not_recorded(), torch.inference_mode(False), torch.enable_grad():
            query, key, value = (x.clone().requires_grad_() for x in (drawn[0, :, :141], drawn[1], drawn[2]))
            wanted = eager_form.above_threshold(query, key, value, None, False, 0.3, None, None, 0.0, None, None)
            grad = drawn[3, :, :141].contiguous()
            # Of a sum: for a tensor of gradients PyTorch loads SymPy.
            wanted_grads = torch.autograd.grad((wanted * grad).sum(), (query, key, value))
        with tracing.not_recorded(), torch.no_grad():
            common: tuple[Any, ...] = (1, 0.0, False, 0, 2, False, None, None, 0.0)
            eps = query.new_zeros(())
            given: tuple[Any, ...] = (*common, eps, eps)
            saved = forward(query, key, value, 0.3, None, *given)
            rest: tuple[Any, ...] = (*saved, eps, *common, False)
            grads = backward(grad, query, key, value, 0.3, None, *rest)
            for got, right in zip((saved[0], *grads), (wanted, *wanted_grads), strict=False):
                if not float((got - right).abs().max()) <= allowed * float(right.abs().max()):
                    return f"{library.path} computes something else than the eager form"
    return None


def suits(tensors: list[Tensor], dropout_p: float, mask_needs_grad: bool) -> bool:
    """Return whether a call with such a query, key and value is computed here."""
    return dropout_p == 0 and not mask_needs_grad and all(tensor.numel() > 0 for tensor in tensors)


def _padded(tensor: Tensor) -> Tensor:
    """Return a tensor with as many features as fill registers: more of them are 0."""
    library = _load()
    assert isinstance(library, _Library)
    missing = -tensor.shape[-1] % library.lanes[tensor.dtype]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor.contiguous()


def _call(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, heads: int, causal: bool, threads: int
) -> _Call:
    call = _Call(scale=scale, heads=max(1, heads), causal=causal, threads=threads)
    call.query, call.key, call.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
    call.batch, call.length, call.width = query.shape
    call.keys, call.value_width = value.shape[1:]
    if mask is not None:
        strides = (0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))
        call.mask, call.mask_strides = mask.data_ptr(), (ctypes.c_int64 * 4)(*strides)
        call.mask_kind, call.causal = (1 if mask.dtype == torch.bool else 2), False
        call.lowest = eager_form.lowest(query.dtype)
    return call


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    heads: int,
    dropout_p: float,
    is_causal: bool,
    tile_size: int,
    threads: int,
    onednn: bool,
    mu: float | None,
    bias: float | None,
    n: float,
    eps: Tensor,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what ``cpu_attention`` does, as :func:`suits` says."""
    library, width = _load(), value.shape[-1]
    assert isinstance(library, _Library)
    query, key, value = _padded(query), _padded(key), _padded(value)
    call = _call(query, key, value, scale, mask, heads, is_causal, threads)
    ties = torch.zeros(TIES + 1, dtype=torch.int64)
    if mu is None:
        library.run(_MEDIAN, query.dtype, call)
        ties[0], ties[1] = call.ties, -1
    centre = torch.full((), call.centre if mu is None else mu, dtype=query.dtype)
    threshold = centre + eps
    call.a, call.b = numbers(threshold, bias)
    call.n = n
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    log_sum, rho = query.new_empty(query.shape[:2]), query.new_empty(query.shape[:2])
    call.out, call.log_sum, call.rho = out.data_ptr(), log_sum.data_ptr(), rho.data_ptr()
    library.run(_FORWARD, query.dtype, call)
    return out[..., :width].contiguous(), log_sum, rho, threshold, centre, ties


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    rho: Tensor,
    threshold: Tensor,
    centre: Tensor,
    ties: Tensor,
    seed: Tensor,
    heads: int,
    dropout_p: float,
    is_causal: bool,
    tile_size: int,
    threads: int,
    onednn: bool,
    mu: float | None,
    bias: float | None,
    n: float,
    mask_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what the backward pass of ``cpu_attention`` does, from what :func:`forward` returned."""
    library, width, value_width = _load(), query.shape[-1], value.shape[-1]
    assert isinstance(library, _Library)
    grad, out = _padded(grad), _padded(out)
    query, key, value = _padded(query), _padded(key), _padded(value)
    call = _call(query, key, value, scale, mask, heads, is_causal, threads)
    a = threshold.item()
    call.a = -math.inf if math.isnan(a) or (bias is None and a == math.inf) else a  # all is NaN, and stays it
    if mu is None and bias is None:
        call.centre, call.ties = centre.item(), int(ties[0])
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    call.grad, call.out, call.log_sum, call.rho = (x.data_ptr() for x in (grad, out, log_sum, rho))
    call.grad_query, call.grad_key, call.grad_value = (x.data_ptr() for x in grads)
    library.run(_BACKWARD, query.dtype, call)
    widths = (width, width, value_width)
    grad_query, grad_key, grad_value = (x[..., :w].contiguous() for x, w in zip(grads, widths, strict=True))
    return grad_query, grad_key, grad_value, query.new_zeros(0)
