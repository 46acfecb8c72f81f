"""Calls that SDPA computes and calls that it refuses: what the operator shall do alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lwpf_patch import PFU, lwpf_attention

Call = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]

#: Forgets nothing, in every backend: attention with it is SDPA's.
NOTHING = PFU(mu=-float("inf"), bias=0, sigma=0)


def _calls(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    """A call with random query, key, value and, if its shape is given, boolean mask."""

    def call() -> tuple[tuple[Any, ...], dict[str, Any]]:
        tensors = [torch.randn(shape).to(dtype) for shape in shapes[:3]]
        return (*tensors, *(torch.rand(shape) < 0.6 for shape in shapes[3:])), options

    return call


def _with(place: int, thing: Callable[[], Any]) -> Call:
    """An ordinary call with something else for its query (0), key, value or mask (3)."""

    def call() -> tuple[tuple[Any, ...], dict[str, Any]]:
        tensors: list[Any] = [torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4), None]
        tensors[place] = thing()
        return tuple(tensors), {}

    return call


QUERY, KEY = (2, 3, 5, 4), (2, 3, 6, 4)

COMPUTED: dict[str, Call] = {
    "no feature": _calls((2, 5, 0), (2, 6, 0), (2, 6, 3)),
    "no feature, a scale": _calls((2, 5, 0), (2, 6, 0), (2, 6, 3), scale=2.0),
    "no feature in anything": _calls((2, 3, 5, 0), (2, 3, 6, 0), (2, 3, 6, 0)),
    "no feature in the value": _calls((2, 5, 4), (2, 6, 4), (2, 6, 0)),
    "no heads": _calls((2, 0, 5, 4), (2, 0, 6, 4), (2, 0, 6, 4)),
    "no heads, masked": _calls((2, 0, 5, 4), (2, 0, 6, 4), (2, 0, 6, 4), (2, 1, 5, 6)),
    "no heads to be shared": _calls((2, 4, 5, 4), (2, 0, 6, 4), (2, 0, 6, 4), enable_gqa=True),
    "no heads to share": _calls((2, 0, 5, 4), (2, 4, 6, 4), (2, 4, 6, 4), enable_gqa=True),
    "no heads that share none": _calls((2, 0, 5, 4), (2, 0, 6, 4), (2, 0, 6, 4), enable_gqa=True),
    "shared keys and values, of other numbers": _calls((6, 5, 4), (3, 6, 4), (2, 6, 4), enable_gqa=True),
    "shared values": _calls((2, 6, 5, 4), (2, 6, 6, 4), (2, 3, 6, 4), (2, 6, 5, 6), enable_gqa=True),
    "shared heads without a batch": _calls((4, 5, 4), (2, 6, 4), (2, 6, 4), (4, 5, 6), enable_gqa=True),
    "shared heads with a batch of two dimensions": _calls(
        (2, 3, 4, 5, 4), (2, 3, 2, 6, 4), (2, 3, 2, 6, 4), (2, 1, 4, 1, 6), enable_gqa=True
    ),
    "shared heads over a batch": _calls((2, 4, 5, 4), (2, 6, 4), (2, 6, 4), enable_gqa=True),
    "an empty batch, masked": _calls((0, 3, 5, 4), (0, 3, 6, 4), (0, 3, 6, 4), (5, 6)),
    "an empty batch, masked alike": _calls((0, 3, 5, 4), (0, 3, 6, 4), (0, 3, 6, 4), (0, 3, 5, 6)),
    "an empty batch, one mask": _calls((2, 0, 3, 5, 4), (2, 0, 3, 6, 4), (2, 0, 3, 6, 4), (2, 1, 3, 5, 6)),
    "no key": _calls((2, 5, 4), (2, 0, 4), (2, 0, 4), (5, 0)),
    "no key, a mask of one": _calls((2, 5, 4), (2, 0, 4), (2, 0, 4), (5, 1)),
    "no query": _calls((2, 0, 4), (2, 6, 4), (2, 6, 4), (0, 6)),
    "a mask of one dimension": _calls(QUERY, KEY, KEY, (6,)),
    "a mask without any": _calls(QUERY, KEY, KEY, ()),
    "a mask over queries": _calls((2, 5, 4), (2, 6, 4), (2, 6, 4), (2, 5, 1)),
    "a mask over what is broadcast": _calls((2, 1, 5, 4), (1, 3, 6, 4), (1, 3, 6, 4), (2, 3, 5, 6)),
    "more values than scores": _calls((5, 4), (6, 4), (2, 6, 4)),
    "more keys than queries": _calls((5, 4), (2, 6, 4), (2, 6, 4)),
    "an expanded mask": _with(3, lambda: (torch.rand(2, 1, 1, 6) < 0.6).expand(2, 3, 5, 6)),
    "a mask the other way round": _with(3, lambda: torch.randn(6, 5, 3, 2).permute(3, 2, 1, 0)),
    "an expanded query": _with(0, lambda: torch.randn(3, 1, 1).expand(2, 3, 5, 4)),
    "every other key": _with(1, lambda: torch.randn(4, 2, 3, 12).permute(1, 2, 3, 0)[:, :, ::2]),
    "one value": _with(2, lambda: torch.randn(()).expand(2, 3, 6, 4)),
    "float32 masks float32": _with(3, lambda: torch.randn(5, 6)),
    "a scale that is whole": _calls(QUERY, KEY, KEY, scale=2),
    "a scale of NumPy's": _calls(QUERY, KEY, KEY, scale=np.float32(0.3)),
    "a scale in a tensor": _calls((5, 4), (6, 4), (6, 4), scale=torch.tensor(0.3)),
    "a scale of 0": _calls(QUERY, KEY, KEY, scale=0.0),
    "a scale below 0": _calls(QUERY, KEY, KEY, scale=-0.5),
    "a scale above 1": _calls(QUERY, KEY, KEY, scale=8.0),
}

try:
    _X = torch.zeros(1, 1, 1)
    torch.nn.functional.scaled_dot_product_attention(_X, _X, _X, torch.zeros(1, 1, 1, 1))
except RuntimeError:  # up to PyTorch 2.9, whose SDPA also ends the process where there are no heads to share
    for _case in ("no heads to be shared", "no heads that share none"):
        del COMPUTED[_case]
else:
    COMPUTED |= {
        "a mask of four dimensions over three": _calls((3, 5, 4), (3, 6, 4), (3, 6, 4), (1, 3, 5, 6)),
        "a mask of four dimensions for all": _calls((3, 5, 4), (3, 6, 4), (3, 6, 4), (1, 1, 5, 6)),
    }

#: Scores that a number cannot hold: here it counts that they are computed, and in which shape.
OVERFLOWING: dict[str, Call] = {
    f"scale {scale:g}": _calls(QUERY, KEY, KEY, scale=scale) for scale in (1e300, -1e300, 1e39, float("inf"))
}

REFUSED: dict[str, Call] = {
    "fewer heads of the query": _calls((2, 2, 5, 4), (2, 4, 6, 4), (2, 4, 6, 4), enable_gqa=True),
    "one head of the query": _calls((2, 1, 5, 4), (2, 4, 6, 4), (2, 4, 6, 4), enable_gqa=True),
    "heads that do not divide": _calls((2, 6, 5, 4), (2, 4, 6, 4), (2, 4, 6, 4), enable_gqa=True),
    "shared heads without heads": _calls((5, 4), (6, 4), (6, 4), enable_gqa=True),
    "a mask with a batch": _calls((5, 4), (6, 4), (6, 4), (2, 5, 6)),
    "a mask with another batch": _calls(QUERY, KEY, KEY, (7, 2, 3, 5, 6)),
    "a mask with a batch of one": _calls(QUERY, KEY, KEY, (1, 2, 3, 5, 6)),
    "a mask with a larger batch": _calls((1, 3, 5, 4), (1, 3, 6, 4), (1, 3, 6, 4), (2, 3, 5, 6)),
    "a mask of four dimensions, a batch over three": _calls((3, 5, 4), (3, 6, 4), (3, 6, 4), (2, 3, 5, 6)),
    "a mask with more heads": _calls((2, 1, 5, 4), (2, 1, 6, 4), (2, 1, 6, 4), (2, 3, 5, 6)),
    "a mask with no batch at all": _calls((1, 3, 5, 4), (1, 3, 6, 4), (1, 3, 6, 4), (0, 3, 5, 6)),
    "a mask as the values": _calls((1, 5, 4), (1, 6, 4), (2, 6, 4), (2, 5, 6)),
    "a mask with more queries": _calls((2, 1, 4), (2, 6, 4), (2, 6, 4), (5, 6)),
    "a list for the query": _with(0, lambda: [[1.0, 2.0]]),
    "an array for the key": _with(1, lambda: np.zeros((2, 3, 6, 4), np.float32)),
    "nothing for the value": _with(2, lambda: None),
    "a list for the mask": _with(3, lambda: [[True] * 6] * 5),
    "an array for the mask": _with(3, lambda: np.ones((5, 6), bool)),
    "True for the mask": _with(3, lambda: True),
    "float64 masks float32": _with(3, lambda: torch.zeros(5, 6, dtype=torch.float64)),
    "float16 masks float32": _with(3, lambda: torch.zeros(5, 6, dtype=torch.float16)),
    "bfloat16 masks float32": _with(3, lambda: torch.zeros(5, 6, dtype=torch.bfloat16)),
    "whole numbers mask float32": _with(3, lambda: torch.zeros(5, 6, dtype=torch.int64)),
    "text for the scale": _calls(QUERY, KEY, KEY, scale="1"),
    "a scale with a dimension": _calls(QUERY, KEY, KEY, scale=torch.tensor([0.5])),
    "a complex scale": _calls(QUERY, KEY, KEY, scale=1j),
    "a scale past all floats": _calls(QUERY, KEY, KEY, scale=10**400),
    "text for the dropout": _calls(QUERY, KEY, KEY, dropout_p="0"),
    "no dropout": _calls(QUERY, KEY, KEY, dropout_p=None),
    "a dropout above 1": _calls(QUERY, KEY, KEY, dropout_p=1.5),
    "1 for is_causal": _calls(QUERY, KEY, KEY, is_causal=1),
    "text for enable_gqa": _calls(QUERY, KEY, KEY, enable_gqa="no"),
    "other batches": _calls((2, 5, 4), (3, 6, 4), (3, 6, 4)),
    "another batch of values": _calls((2, 5, 4), (2, 6, 4), (3, 6, 4)),
    "other features": _calls((2, 5, 4), (2, 6, 3), (2, 6, 4)),
    "no dimensions": _calls((4,), (6, 4), (6, 4)),
}


def check_computed(call: Call, backend: str, func_ds: tuple[str, ...] = ("relu", "pfu")) -> None:
    """Asserts that a call that forgets nothing gives what SDPA gives, and that those that forget compute."""
    arguments, options = call()
    tensors = [
        each.requires_grad_() if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments
    ]
    ours = lwpf_attention(*tensors, **options, func_d=NOTHING, training=False, backend=backend)
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones do not know masks of fewer than two dimensions
        expected = F.scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    inputs = [each for each in tensors if isinstance(each, Tensor) and each.requires_grad]
    for got, wanted in zip(*(_gradients(each, inputs) for each in (ours, expected)), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
    for func_d in func_ds:
        out = lwpf_attention(*tensors, **options, func_d=func_d, backend=backend)
        assert out.shape == expected.shape
        _gradients(out, inputs)


def check_overflowing(call: Call, backend: str) -> None:
    """Asserts that a call is computed in SDPA's shape: NaN where there is a score that is too large."""
    arguments, options = call()
    expected = F.scaled_dot_product_attention(*arguments, **options)
    # TODO: "pfu" too, once the CPU's median takes scores that are NaN or infinite.
    for func_d in (NOTHING, "relu"):
        out = lwpf_attention(*arguments, **options, func_d=func_d, backend=backend)
        assert out.shape == expected.shape
        assert out.isnan().any()


def check_refused(call: Call, backend: str) -> None:
    """Asserts that a call raises what SDPA raises, or a kind of it."""
    arguments, options = call()
    errors = []
    for attend in (F.scaled_dot_product_attention, _attend(backend)):
        try:
            attend(*arguments, **options)
        except Exception as error:
            errors.append(type(error))
        else:
            raise AssertionError(f"{attend} does not raise")
    assert issubclass(errors[1], errors[0]), errors


def _attend(backend: str) -> Callable[..., Tensor]:
    return lambda *arguments, **options: lwpf_attention(*arguments, **options, func_d="relu", backend=backend)


def _gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.square().sum(), inputs, allow_unused=True, materialize_grads=True)
