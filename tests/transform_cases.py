"""What transforms of PyTorch's do to each backend: compared with the oracle, and told in words.

tests/test_transforms.py makes the tables of docs/transforms.md from it. As a program it prints, as JSON, what it finds
for the backend "triton", which needs a process of its own: the variable TRITON_INTERPRET=1 holds for all of one.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import oracle
import pytest
import torch
from oracle import Forgetting
from torch import Tensor, nn
from torch.autograd import forward_ad, functional
from torch.utils.checkpoint import checkpoint

from lwpf_patch import PFU, FuncD, LwpfError, ReLU, lwpf_attention, separation_loss
from lwpf_patch.attention import HostFuncD
from lwpf_patch.backends import cpu
from lwpf_patch.specs import parse_sep

Function = Callable[..., Tensor]


class Subject(NamedTuple):
    """A function to transform.

    Attributes:
        name: What is compared, beside the backend.
        function: What is transformed.
        reference: The same by the oracle.
        inputs: Its arguments, in float64 figures that float32 holds.
        dtype: What the function computes in.
    """

    name: str
    function: Function
    reference: Function
    inputs: list[Tensor]
    dtype: torch.dtype

    def placed(self, grad: bool = True) -> list[Tensor]:
        return [x.to(self.dtype, copy=True).requires_grad_(grad) for x in self.inputs]

    def wide(self) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in self.inputs]


FUNC_DS: dict[str, tuple[FuncD, Forgetting]] = {
    "relu": (ReLU(), Forgetting("relu")),
    "mu": (PFU(mu=0.125, bias=-0.25), Forgetting("pfu", 0.125, -0.25)),
    "dmedian": (PFU(), Forgetting("pfu", "dmedian", "mu")),
}


def figures(*shape: int) -> Tensor:
    """Draws figures whose inner products no dtype rounds, so that all agree on the threshold and on every tie."""
    return torch.randint(-8, 9, shape).double() / 8


def attention(backend: str, seps: Sequence[str] = ("softmax", "softmax_n:n=0.5", "softmax")) -> list[Subject]:
    """Attention by a backend, with masks of every kind among the func_ds, and with a normalisation for each."""
    seen = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
    subjects = []
    for (name, (func_d, forgetting)), sep in zip(FUNC_DS.items(), seps, strict=True):
        common = dict(scale=0.5, attn_mask=seen if name == "relu" else None, is_causal=name == "dmedian")

        def function(query, key, value, bias=None, func_d=func_d, common=common, sep=sep):
            options = common if bias is None else {**common, "attn_mask": bias}
            return lwpf_attention(query, key, value, func_d=func_d, training=False, backend=backend, sep=sep, **options)

        def reference(query, key, value, bias=None, forgetting=forgetting, common=common, sep=sep):
            options = common if bias is None else {**common, "attn_mask": bias}
            alpha, n = parse_sep(sep)
            return oracle.attention(query, key, value, func_d=forgetting, alpha=alpha, n=n, **options)

        inputs = [figures(2, 3, 3), figures(2, 4, 3), figures(2, 4, 2)]
        if name == "mu":
            inputs.append(figures(3, 4).expand(2, 3, 4).clone())  # a mask that takes part in all of it
        dtype = torch.float32 if backend == "triton" else torch.float64
        subjects.append(Subject(name if sep == "softmax" else f"{name}, {sep}", function, reference, inputs, dtype))
    return subjects


def losses() -> list[Subject]:
    def subject(kind: str) -> Subject:
        def reference(patterns):
            flat = patterns.reshape(-1, *patterns.shape[-2:])
            return torch.stack([oracle.separation_loss(x, 2.0, kind) for x in flat]).reshape(patterns.shape[:-2])

        inputs = [torch.randn(2, 5, 3, dtype=torch.float64)]
        return Subject(kind, lambda x: separation_loss(x, 2.0, kind), reference, inputs, torch.float64)

    return [subject("average"), subject("maximum")]


#: The columns of the first table.
SUBJECTS: dict[str, Callable[[], list[Subject]]] = {
    "`eager`": lambda: attention("eager"),
    "`cpu`": lambda: attention("cpu"),
    "`triton`": lambda: attention("triton"),
    "`sep` other than softmax": lambda: attention("auto", ("sparsemax", "entmax15", "1.3")),
    "`separation_loss`": losses,
}


def compare(got: Sequence[Tensor], wanted: Sequence[Tensor], subject: Subject) -> None:
    limit = 2e-5 if subject.dtype == torch.float32 else 1e-11
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        # The error, of the largest figure.
        torch.testing.assert_close(one.double(), other, rtol=0, atol=limit * max(1.0, float(other.abs().max())))


def directions(tensors: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in tensors]


def scalar(function: Function) -> Function:
    """A loss with second derivatives in all that it depends on."""
    return lambda *inputs: function(*inputs).square().sum()


def gradients(function: Function, inputs: list[Tensor], **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar(function)(*inputs), inputs, **options)


# --- transforms: each compares, or raises ---------------------------------------------------------------------------


def backward(s: Subject) -> None:
    compare(gradients(s.function, s.placed()), gradients(s.reference, s.wide()), s)


def gradient_penalty(s: Subject) -> None:
    def penalty(function: Function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        first = gradients(function, inputs, create_graph=True)
        return torch.autograd.grad(sum(x.pow(3).sum() for x in first), inputs)

    compare(penalty(s.function, s.placed()), penalty(s.reference, s.wide()), s)


def functional_hvp(s: Subject) -> None:
    def product(function: Function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return functional.hvp(scalar(function), tuple(inputs), tuple(directions(inputs)))[1]

    compare(product(s.function, s.placed()), product(s.reference, s.wide()), s)


def functional_jacobian(s: Subject) -> None:
    got = functional.jacobian(s.function, tuple(s.placed()), vectorize=True)
    compare(got, functional.jacobian(s.reference, tuple(s.wide())), s)


def reference_jvp(s: Subject) -> tuple[Tensor, Tensor]:
    inputs = s.wide()
    return functional.jvp(s.reference, tuple(inputs), tuple(directions(inputs)))


def dual_numbers(s: Subject) -> None:
    inputs = s.placed(grad=False)
    with forward_ad.dual_level():
        out = s.function(*map(forward_ad.make_dual, inputs, directions(inputs)))
        compare(forward_ad.unpack_dual(out), reference_jvp(s), s)


def places(s: Subject) -> tuple[int, ...]:
    return tuple(range(len(s.inputs)))


def func_grad(s: Subject) -> None:
    got = torch.func.grad(scalar(s.function), places(s))(*s.placed(grad=False))
    compare(got, gradients(s.reference, s.wide()), s)


def func_vjp(s: Subject) -> None:
    inputs, wide = s.placed(grad=False), s.wide()
    out, vjp = torch.func.vjp(s.function, *inputs)
    expected = s.reference(*wide)
    (cotangent,) = directions([expected])
    compare([out, *vjp(cotangent.to(out.dtype))], [expected, *torch.autograd.grad(expected, wide, cotangent)], s)


def func_jvp(s: Subject) -> None:
    inputs = s.placed(grad=False)
    compare(torch.func.jvp(s.function, tuple(inputs), tuple(directions(inputs))), reference_jvp(s), s)


def func_vmap(s: Subject) -> None:
    wanted = torch.stack([s.reference(*items) for items in zip(*s.wide(), strict=True)])
    compare([torch.func.vmap(s.function)(*s.placed())], [wanted], s)


def per_sample_gradients(s: Subject) -> None:
    got = torch.func.vmap(torch.func.grad(scalar(s.function), places(s)))(*s.placed(grad=False))
    each = [gradients(s.reference, list(items)) for items in zip(*s.wide(), strict=True)]
    compare(got, [torch.stack(items) for items in zip(*each, strict=True)], s)


def func_jacrev(s: Subject) -> None:
    got = torch.func.jacrev(s.function, places(s))(*s.placed(grad=False))
    compare(got, functional.jacobian(s.reference, tuple(s.wide())), s)


def func_jacfwd(s: Subject) -> None:
    got = torch.func.jacfwd(s.function, places(s))(*s.placed(grad=False))
    compare(got, functional.jacobian(s.reference, tuple(s.wide())), s)


def func_hessian(s: Subject) -> None:
    first, *others = s.placed(grad=False)
    got = torch.func.hessian(lambda x: scalar(s.function)(x, *others))(first)
    first, *others = s.wide()
    compare([got], [functional.hessian(lambda x: scalar(s.reference)(x, *others), first)], s)


def checkpointed(s: Subject) -> None:
    wanted = gradients(s.reference, s.wide())
    for reentrant in (False, True):
        inputs = s.placed()
        scalar(lambda *x, r=reentrant: checkpoint(s.function, *x, use_reentrant=r))(*inputs).backward()
        compare([x.grad for x in inputs], wanted, s)


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def in_compiled_code(s: Subject) -> None:
    function = compiled(s.function)
    compare(gradients(function, s.placed()), gradients(s.reference, s.wide()), s)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        gradient_penalty(s._replace(function=function))


def func_in_compiled_code(s: Subject) -> None:
    inputs = s.placed(grad=False)
    got = compiled(lambda *x: torch.func.grad(scalar(s.function), places(s))(*x))(*inputs)
    compare(got, gradients(s.reference, s.wide()), s)
    tangents = directions(inputs)
    got = compiled(lambda x, v: torch.func.jvp(s.function, tuple(x), tuple(v)))(inputs, tangents)
    compare(got, reference_jvp(s), s)


def func_of_compiled_code(s: Subject) -> None:
    function = compiled(s.function)
    function(*s.placed(grad=False))  # what it compiles without a transform does not do with one
    got = torch.func.grad(scalar(function), places(s))(*s.placed(grad=False))
    compare(got, gradients(s.reference, s.wide()), s)


def dual_numbers_of_compiled_code(s: Subject) -> None:
    function, inputs = compiled(s.function), s.placed(grad=False)
    function(*inputs)
    with forward_ad.dual_level():
        out = function(*map(forward_ad.make_dual, inputs, directions(inputs)))
        compare(forward_ad.unpack_dual(out), reference_jvp(s), s)


#: The rows of the first table.
TRANSFORMS: dict[str, Callable[[Subject], None]] = {
    "`backward()`": backward,
    "`torch.utils.checkpoint`": checkpointed,
    "`autograd.grad(create_graph=True)`, differentiated again": gradient_penalty,
    "`autograd.functional.hvp`": functional_hvp,
    "`autograd.functional.jacobian(vectorize=True)`": functional_jacobian,
    "`autograd.forward_ad`, dual numbers": dual_numbers,
    "`func.grad`": func_grad,
    "`func.vjp`": func_vjp,
    "`func.jvp`": func_jvp,
    "`func.vmap`": func_vmap,
    "`func.vmap` of `func.grad`: gradients by sample": per_sample_gradients,
    "`func.jacrev`": func_jacrev,
    "`func.jacfwd`": func_jacfwd,
    "`func.hessian`": func_hessian,
    "`torch.compile`, with `backward()`": in_compiled_code,
    "`torch.compile` of code with `func.grad` and `func.jvp`": func_in_compiled_code,
    "`func.grad` of compiled code": func_of_compiled_code,
    "dual numbers through compiled code": dual_numbers_of_compiled_code,
}


# --- programs -------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention as hosts write it."""

    def __init__(self, func_d: HostFuncD) -> None:
        super().__init__()
        self.func_d = func_d

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.func_d.scaled_dot_product_attention(query, key, value)


class WrittenOut(Layer):
    """Attention as hosts write it where they have no fused branch."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attn = query * 0.5 @ key.transpose(-2, -1)
        attn, mask = self.func_d(attn)
        attn = attn.softmax(dim=-1)
        attn = mask * attn
        return attn @ value


class Program(NamedTuple):
    """Something to make a program of, and what it shall compute.

    Attributes:
        layer: The module.
        forgetting: What it forgets.
        example: Arguments to make the program with.
        others: Arguments of another batch size to try it with.
    """

    layer: Layer
    forgetting: Forgetting
    example: tuple[Tensor, ...]
    others: tuple[Tensor, ...]

    def check(self, program: Callable[..., Tensor], dynamic: bool = True) -> None:
        arguments = self.others if dynamic else self.example
        wanted = oracle.attention(*(x.double() for x in arguments), func_d=self.forgetting)
        torch.testing.assert_close(program(*arguments).double(), wanted, rtol=0, atol=1e-5)


def programs(backend: str, name: str, written_out: bool = False) -> Program:
    _, forgetting = FUNC_DS[name]
    rule = PFU(**({"mu": 0.125, "bias": -0.25} if name == "mu" else {})) if name != "relu" else ReLU()
    layer = (WrittenOut if written_out else Layer)(HostFuncD(rule, "", backend=backend)).eval()
    example, others = (tuple(figures(n, 2, 5, 4).float() for _ in range(3)) for n in (3, 4))
    return Program(layer, forgetting, example, others)


def export(program: Program, strict: bool) -> None:
    batch = torch.export.Dim("batch")
    shapes = ({0: batch},) * 3
    exported = torch.export.export(program.layer, program.example, dynamic_shapes=shapes, strict=strict)
    program.check(exported.module())


def strict_export(backend: str, name: str) -> None:
    export(programs(backend, name), True)


def other_export(backend: str, name: str) -> None:
    export(programs(backend, name), False)


def script(backend: str, name: str) -> None:
    program = programs(backend, name)
    program.check(torch.jit.script(program.layer))


def trace(backend: str, name: str) -> None:
    program = programs(backend, name)
    program.check(torch.jit.trace(program.layer, program.example), dynamic=False)


def symbolic_trace(backend: str, name: str) -> None:
    program = programs(backend, name)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, path: str) -> bool:
            return isinstance(module, HostFuncD)

    program.check(torch.fx.GraphModule(program.layer, Tracer().trace(program.layer)))


def onnx(backend: str, name: str, dynamo: bool, written_out: bool) -> None:
    import io

    import onnxruntime

    program = programs(backend, name, written_out)
    batch = {0: torch.export.Dim("batch")} if dynamo else {0: "batch"}
    names = ["query", "key", "value"]
    dynamic = {"dynamic_shapes": (batch,) * 3} if dynamo else {"dynamic_axes": dict.fromkeys(names, batch)}
    file = io.BytesIO()
    made = torch.onnx.export(
        program.layer, program.example, None if dynamo else file, input_names=names, dynamo=dynamo, **dynamic,
        **({"verbose": False} if dynamo else {}),
    )  # fmt: skip
    content = made.model_proto.SerializeToString() if dynamo else file.getvalue()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    program.check(
        lambda *x: torch.from_numpy(session.run(None, dict(zip(names, (t.numpy() for t in x), strict=True)))[0])
    )


def onnx_of(dynamo: bool, written_out: bool) -> Callable[[str, str], None]:
    return lambda backend, name: onnx(backend, name, dynamo, written_out)


#: The rows of the second table.
PROGRAMS: dict[str, Callable[[str, str], None]] = {
    "`torch.export`, strict, a batch of any size": strict_export,
    "`torch.export`, not strict, a batch of any size": other_export,
    "`torch.jit.script`": script,
    "`torch.jit.trace`": trace,
    "`torch.fx`": symbolic_trace,
    "`torch.onnx`, `dynamo=True`": onnx_of(True, False),
    "`torch.onnx`, `dynamo=True`, softmax written out": onnx_of(True, True),
    "`torch.onnx`, `dynamo=False`": onnx_of(False, False),
    "`torch.onnx`, `dynamo=False`, softmax written out": onnx_of(False, True),
}
BACKENDS = ("auto", "cpu", "triton")


def told(outcomes: dict[str, str]) -> str:
    """Says what came out for several func_ds."""
    first, *others = dict.fromkeys(outcomes.values())
    if not others:
        return first
    return "; ".join(
        [first, *(f"{other} for " + ", ".join(f"`{n}`" for n, o in outcomes.items() if o == other) for other in others)]
    )


def outcome(attempt: Callable[[], None]) -> str:
    """Tries something: what is wrong is an AssertionError, which is not caught."""
    try:
        attempt()
    except AssertionError:
        raise
    except Exception as error:
        return "refused" if is_ours(error) else f"refused by PyTorch: {type(error).__name__}"
    return "works"


def is_ours(error: BaseException | None) -> bool:
    """Says whether an error is ours, or was raised from one, which torch.compile hands on as text."""
    if error is None:
        return False
    return isinstance(error, LwpfError) or "backend 'auto' or 'eager'" in str(error) or is_ours(error.__cause__)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    before, cpu.MANY_SCORES = cpu.MANY_SCORES, 0  # for "auto"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        cpu.MANY_SCORES = before


def derivatives(column: str) -> dict[str, str]:
    """Makes a column of the first table."""
    with quietly():
        subjects = SUBJECTS[column]()
        return {
            row: told(
                {
                    subject.name: outcome(lambda s=subject, t=transform: t(s))
                    for subject in (subjects[-1:] if "compile" in row else subjects)  # which takes its time
                }
            )
            for row, transform in TRANSFORMS.items()
        }


def made_programs(backend: str) -> dict[str, str]:
    """Makes a column of the second table; without the rows whose packages are not installed."""
    found = {}
    with quietly():
        for row, make in PROGRAMS.items():
            if "onnx" in row and not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
                continue
            if backend == "auto":
                found[row] = told({name: outcome(lambda n=name, m=make: m(backend, n)) for name in FUNC_DS})
            elif "written out" not in row:  # where the backend has no part
                found[row] = outcome(lambda m=make: m(backend, "relu"))
    return found


if __name__ == "__main__":
    print(json.dumps([derivatives("`triton`"), made_programs("triton")]))
