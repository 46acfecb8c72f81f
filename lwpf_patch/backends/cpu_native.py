"""CPU: both passes and the median in C++, each of them one parallel region; compiled here at its first use.

Where each step over a tile is an operator of PyTorch's, each of them waits for all threads, and so for one that another
process has put off its core. Here a thread takes one block of queries after another, until none is left. The formulas
are those of :mod:`lwpf_patch.backends.cpu`.

The source includes no header of PyTorch's, so that a compiler takes some seconds, once for each machine: too few to go
on computing otherwise meanwhile. The threads are those of PyTorch's own OpenMP, whose ``GOMP_parallel`` is handed over:
a second runtime would have threads of its own, which wait busily beside PyTorch's. Without Linux, a compiler or that
function, or where the results differ from the eager form's, :mod:`lwpf_patch.backends.cpu_tiles` computes instead, and
``lwpf doctor`` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .. import keeping, reporting, tracing
from ..errors import unknown_value
from ..options import FLAGS, read_flag
from ..settings import NATIVE
from . import eager_form
from .cpu_dropout import dropout
from .cpu_scores import Given

SOURCE = Path(__file__).with_suffix(".cpp")
#: No -ffast-math: NaN and the infinities mean something.
OPTIONS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC",
    "-shared",
)  # fmt: skip
#: After so many small calls a process may wait for a compiler.
SMALL_CALLS = 100
#: So many products of two numbers are worth another thread, which has to be woken up and waited for.
GRAIN = 2_000_000
#: ``struct Call`` of the source: every field of it has 8 bytes.
_CALL = struct.Struct("4q 4q 4q 4q 4q q q 7q 3q 6q 5q Q 7d q q")
_ABSENT = (0, 0, 0, 0)


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
        for each in self.passes.values():
            each.argtypes = (ctypes.c_int, ctypes.c_char_p)
        lanes = library.lwpf_lanes()
        self.lanes = {torch.float32: lanes, torch.float64: lanes // 2}

    def run(self, forwards: bool, dtype: torch.dtype, call: bytes) -> None:
        """Compute a pass."""
        if self.passes[dtype](forwards, call):
            raise MemoryError("lwpf_attention: there is not enough memory for the gradients or the median")


_forked = False


def _note_the_fork() -> None:
    global _forked
    _forked = True  # the threads of OpenMP are not there, and waiting for them would never end


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_the_fork)


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


@functools.lru_cache
def _target() -> Path:
    """Return where the compiled source lies, or is to lie."""
    parts = (SOURCE.read_text(), *OPTIONS, _processor())
    folder = keeping.folder()
    if folder is None:
        raise Unavailable("there is no folder to keep it in: the user has no home, and XDG_CACHE_HOME names none")
    return folder / f"cpu-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"


def _build() -> Path:
    """Return the path of the compiled source; compile it if it is not there."""
    path = _target()
    if path.exists():
        return path
    compiler = _compiler()
    reporting.logger.info("compiling the attention of the CPU with %s, once: it takes some seconds", compiler)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Processes that compile at once each write a file of their own; the last one stays.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
            made = Path(folder) / path.name
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


_is_wrong = False


def is_there() -> bool:
    """Return whether the library is there, and not known to be wrong; it is compiled, if it has to be."""
    return isinstance(_load(), _Library) and not _is_wrong


_small_calls = 0


def is_worth_it() -> bool:
    """Return whether a small call is to be computed here. Call this once for each of them.

    A process that makes a handful of them shall not wait for a compiler: it is as long as the library is neither loaded
    nor compiled by an earlier process, and until there have been :data:`SMALL_CALLS`.
    """
    global _small_calls
    if _load.cache_info().currsize == 0:
        _small_calls += 1
        if _small_calls <= SMALL_CALLS and not _is_compiled():
            return False
    return is_there()


@functools.lru_cache
def _is_compiled() -> bool:
    try:
        return _is_wanted() and _target().exists()
    except Unavailable:
        return False


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
    # A process may begin in inference mode, whose tensors have no gradients.
    with tracing.not_recorded(), torch.inference_mode(False):
        return _compare(library)


def _compare(library: _Library) -> str | None:
    """Compare both passes with the eager form; return what is wrong, None: nothing is."""
    global _is_wrong
    generator = torch.Generator("cpu").manual_seed(0)
    for dtype, allowed in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        drawn = torch.randn(4, 1, 3, 150, 20, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
        drawn_mask = torch.randn(3, 1, 150, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
        dropped = dropout(5, 0.2, torch.arange(3 * 141, device="cpu").view(1, 3, 141), 150, dtype)
        with torch.enable_grad():
            inputs = (drawn[0, :, :, :141], drawn[1], drawn[2], drawn_mask.expand(1, 3, 1, 150))
            query, key, value, mask = (x.clone().requires_grad_() for x in inputs)
            wanted = eager_form.above_threshold(query, key, value, mask, False, 0.3, None, None, 0.0, None, dropped)
            grad = drawn[3, :, :, :141]
            # Of a sum: for a tensor of gradients PyTorch loads SymPy.
            wanted_grads = torch.autograd.grad((wanted * grad).sum(), (query, key, value, mask))
        with torch.no_grad():
            given = Given(0.3, mask, 0.2, False, None, None, 0.0, torch.tensor(5, device="cpu"))
            out, rows, found = forward(query, key, value, given, None, 2)
            grads = backward(grad, query, key, value, given, out, rows, found, True, 2)
            for got, right in zip((out, *grads), (wanted, *wanted_grads), strict=True):
                if not float((got - right).abs().max()) <= allowed * float(right.abs().max()):
                    _is_wrong = True
                    return f"{library.path} computes something else than the eager form"
    return None


def _ready(tensor: Tensor, lanes: int) -> Tensor:
    """Return a tensor with as many features as fill registers, one beside another; features that are added are 0."""
    missing = -tensor.shape[-1] % lanes
    if missing:
        return torch.nn.functional.pad(tensor, (0, missing))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _view(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.data_ptr(), *tensor.stride()[:3])


def _pack(
    library: _Library, query: Tensor, key: Tensor, value: Tensor, grad: Tensor | None, given: Given, noise: float,
    results: tuple[Tensor | None, ...], found: Tensor, threads: int,
) -> bytes:  # fmt: skip
    """Return ``struct Call``.

    Args:
        library: What is called.
        query: Ready, as the next ones.
        key: S keys.
        value: S values.
        grad: The gradient of the output; None in the forward pass.
        given: As for the passes.
        noise: Of the threshold.
        results: Output, L, rho, and the gradients of query, key, value and mask.
        found: What the threshold is.
        threads: As for the operator; fewer do where there is little to compute.
    """
    scale, mask, dropout_p, is_causal, mu, bias, n, seed = given
    of_mask: tuple[int, ...] = _ABSENT
    mask_stride = mask_kind = 0
    if mask is not None:
        strides = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
        of_mask, mask_stride = (mask.data_ptr(), *strides[:3]), strides[3]
        mask_kind = 1 if mask.dtype == torch.bool else 2
    grad_mask = results[6]
    batch, heads, length, width = query.shape
    products = batch * heads * length * key.shape[2] * (width + value.shape[3])
    threads = 1 if _forked else max(1, min(threads, products // GRAIN))
    return _CALL.pack(
        *_view(query), *_view(key), *_view(value), *(_ABSENT if grad is None else _view(grad)), *of_mask, mask_stride,
        mask_kind, *(0 if tensor is None else tensor.data_ptr() for tensor in results),
        *((0, 0, 0) if grad_mask is None else grad_mask.shape[:3]),
        batch * heads, length, key.shape[2], width, value.shape[3], heads,
        is_causal and mask is None, threads, seed is not None, mu is not None, bias is not None,
        0 if seed is None else int(seed),
        scale, mu or 0.0, noise, bias or 0.0, n, eager_form.lowest(query.dtype), dropout_p,
        found.data_ptr(), library.parallel,
    )  # fmt: skip


def forward(
    query: Tensor, key: Tensor, value: Tensor, given: Given, eps: Tensor | None, threads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the forward pass; arguments and results are those of ``cpu_attention``."""
    library, width = _load(), value.shape[-1]
    assert isinstance(library, _Library)
    lanes = library.lanes[query.dtype]
    query, key, value = _ready(query, lanes), _ready(key, lanes), _ready(value, lanes)
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    rows = query.new_empty((2, *query.shape[:3]))
    found = query.new_empty(3, dtype=torch.float64)
    noise = 0.0 if eps is None else eps.item()
    call = _pack(
        library, query, key, value, None, given, noise, (out, *rows, None, None, None, None), found, threads,
    )  # fmt: skip
    library.run(True, query.dtype, call)
    return out if out.shape[-1] == width else out[..., :width].contiguous(), rows, found


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, given: Given, out: Tensor, rows: Tensor, found: Tensor,
    mask_needs_grad: bool, threads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the backward pass; arguments and results are those of ``cpu_attention_backward``."""
    library, width, value_width = _load(), query.shape[-1], value.shape[-1]
    assert isinstance(library, _Library)
    lanes = library.lanes[query.dtype]
    grad, out = _ready(grad, lanes), _ready(out, lanes)
    query, key, value = _ready(query, lanes), _ready(key, lanes), _ready(value, lanes)
    grads = [query.new_empty(tensor.shape) for tensor in (query, key, value)]
    mask, grad_mask = given.mask, None
    if mask is not None and mask_needs_grad:  # where all rows have one mask, they add to it
        grad_mask = (query.new_zeros if mask.shape[2] == 1 else query.new_empty)(mask.shape)
    call = _pack(
        library, query, key, value, grad, given, 0.0, (out, *rows, *grads, grad_mask), found, threads,
    )  # fmt: skip
    library.run(False, query.dtype, call)
    grad_query, grad_key, grad_value = (
        x if x.shape[-1] == w else x[..., :w].contiguous()
        for x, w in zip(grads, (width, width, value_width), strict=True)
    )
    return grad_query, grad_key, grad_value, query.new_empty(0) if grad_mask is None else grad_mask
