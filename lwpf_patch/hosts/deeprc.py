"""DeepRC: func_d on the attention activations of each bag, U-Hop's feature map in its attention network."""

from __future__ import annotations

import ast
import importlib
import re
import warnings
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import RewriteError
from ..hosting import (
    FeatureMapAttachment,
    Folding,
    FuncDAttachment,
    Function,
    HostModule,
    Replacement,
    RewrittenHost,
    Shim,
    Site,
    Splice,
    check_scores,
    check_unused,
    info,
    normalise_call,
    softmax_scores,
    warn,
)
from . import known

if TYPE_CHECKING:
    from torch import Tensor


#: The name of what is kept, in the patched function.
_MASK = "xi_mask"


def forget_in_bags(function: Function) -> list[Splice]:
    """Put the paper's two lines around the softmax over the sequences of a bag, and ``func_d.normalise`` in its place.

    Anchors, by whatever names: ``attention_weights = torch.softmax(attention_weights, dim=0)`` and, later in the same
    block, ``emb_seqs_after_attention = emb_seqs * attention_weights``, the product of the embedded sequences with them.

    Raises:
        RewriteError: One of them is missing, or something is done in between that partial forgetting would not stand
            around as the paper has it.
    """
    function.check_free(_MASK)
    calls = function.calls("softmax")
    for block in function.blocks():
        for statement in block:
            match statement:
                case ast.Assign(targets=[ast.Name(id=weights)], value=ast.Call() as call) if [call] == calls:
                    scores = softmax_scores(function, call, "0", modules=False)
                    weighing = next((each for each in block if _weighs(each, weights)), None)
                    if isinstance(scores, ast.Name) and weighing is not None and statement.lineno < weighing.lineno:
                        check_scores(function, scores.id, statement, makers=("attention_nn",))
                        check_unused(function, weights, statement, weighing, but=("dropout",))
                        return [
                            function.line_before(statement, f"{scores.id}, {_MASK} = self.func_d({scores.id}, dim=0)"),
                            normalise_call(function, call, "0", "self.func_d"),
                            function.line_before(weighing, f"{weights} = {_MASK} * {weights}"),
                        ]
    raise RewriteError(
        f"{function.where}: no softmax of attention_weights over dim=0 whose result weighs emb_seqs, in one block"
    )


def _weighs(statement: ast.stmt, weights: str) -> bool:
    """Return whether a statement multiplies something with the weights."""
    match statement:
        case ast.Assign(value=ast.BinOp(left=ast.Name(id=left), op=ast.Mult(), right=ast.Name(id=right))):
            return weights in (left, right) and left != right
    return False


def map_features(function: Function) -> list[Splice]:
    """Put the feature map into the last layer of the attention network: its weights are the query, its inputs the keys.

    Anchor: ``attention_weights = self.attention_nn(inputs)``, the only call of the network, or a ``return`` of it.

    Raises:
        RewriteError: It is missing.
    """
    function.check_free("keys")
    calls = function.calls("attention_nn")
    for statement in function.node.body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name()], value=ast.Call(args=[ast.Name(id=inputs)], keywords=[]) as call)
                | ast.Return(value=ast.Call(args=[ast.Name(id=inputs)], keywords=[]) as call)
            ) if [call] == calls and ast.unparse(call.func) == "self.attention_nn":
                last = "self.attention_nn[-1]"
                score = f"torch.nn.functional.linear(keys, self.feature_map({last}.weight, keys), {last}.bias)"
                return [
                    function.line_before(statement, f"keys = self.attention_nn[:-1]({inputs})"),
                    Splice(function.start(call), function.end(call), score),
                ]
    raise RewriteError(f"{function.where}: no single 'attention_weights = self.attention_nn(inputs)'")


def features(module: HostModule) -> tuple[None, int]:
    """Return the number of features that enter the last layer of an attention network; there are no heads."""
    return None, module.attention_nn[-1].in_features


def projections(model: HostModule, module: HostModule) -> list[str]:
    """Return the name of the weight of the last layer, which is the query."""
    return [f"attention_nn.{len(module.attention_nn) - 1}.weight"]


def multiply(module: HostModule, matrix: Tensor) -> None:
    """Multiply the query by Φ^T Φ; the keys have no weight of their own."""
    weight = module.attention_nn[-1].weight
    weight.copy_(weight.to(matrix) @ matrix.T @ matrix)


def example(module: HostModule) -> tuple[Tensor, ...]:
    """Return random features of sequences."""
    import torch

    return (torch.randn(8, module.attention_nn[0].in_features, dtype=torch.float64, device="cpu"),)


# --- what a current environment breaks in DeepRC 0.0.6 --------------------------------------------------------------

_WITH_NUMPY = ("architectures", "dataset_converters", "dataset_readers", "task_definitions", "training")


def _removed_from_numpy() -> dict[str, Any]:
    np: Any = importlib.import_module("numpy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older versions of NumPy have the aliases, and warn
        removed: dict[str, Any] = {
            t.__name__: t for t in (int, float, bool, object, str, complex) if not hasattr(np, t.__name__)
        }
    if not hasattr(np.ndarray, "tostring"):
        removed["chararray"] = type("chararray", (np.char.chararray,), {"tostring": np.ndarray.tobytes})
    return removed


class _NumpyAsItWas(ModuleType):
    """NumPy, with what it no longer has."""

    def __init__(self, removed: dict[str, Any]) -> None:
        super().__init__("numpy")
        self.__dict__.update(removed)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("numpy"), name)


class _PandasWithObjects(ModuleType):
    """pandas, reading text into columns of Python objects as it did before version 3."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("pandas"), name)

    def read_csv(self, *args: Any, **kwargs: Any) -> Any:
        """Read a file as ``pandas.read_csv`` does."""
        pd: Any = importlib.import_module("pandas")
        frame = pd.read_csv(*args, **kwargs)
        return frame.astype({name: object for name, dtype in frame.dtypes.items() if isinstance(dtype, pd.StringDtype)})


def _pandas_is_new() -> bool:
    return int(metadata.version("pandas").partition(".")[0]) >= 3


def _answer_yes(question: str = "") -> str:
    """Ask as ``input`` does, and answer yes where nobody can: ``"y"``, or the first of the words that it offers."""
    try:
        return input(question)
    except EOFError:
        info(f"answered yes, since standard input is at its end: {question}")
        offered = re.search(r"\((\w+)/\w+\)\s*$", question)
        return offered[1] if offered else "y"


def _accept_arrays(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    import torch

    def loss(raw_outputs: torch.Tensor, targets: Any) -> Any:
        return wrapped(raw_outputs, torch.as_tensor(targets, device=raw_outputs.device))

    return loss(*args, **kwargs)


def _regression_loss(module: ModuleType) -> list[Replacement]:
    import wrapt

    target = module.RegressionTarget
    return [Replacement(target, "loss_function", wrapt.FunctionWrapper(target.loss_function, _accept_arrays))]


SHIMS = (
    Shim(
        "numpy aliases",
        "np.int, np.float and others were removed from NumPy",
        modules=tuple(f"deeprc.{name}" for name in _WITH_NUMPY),
        broken=lambda: bool(_removed_from_numpy()),
        replacements=lambda module: [Replacement(module, "np", _NumpyAsItWas(_removed_from_numpy()))],
    ),
    Shim(
        "pandas 3",
        "columns of text are no longer arrays of objects, which cannot be compared as DeepRC does",
        modules=("deeprc.dataset_converters", "deeprc.dataset_readers"),
        broken=_pandas_is_new,
        replacements=lambda module: [Replacement(module, "pd", _PandasWithObjects("pandas"))],
    ),
    Shim(
        "regression scores",
        "RegressionTarget.get_scores hands NumPy arrays to a loss of torch",
        modules=("deeprc.task_definitions",),
        broken=lambda: True,
        replacements=_regression_loss,
    ),
    Shim(
        "questions at every run",
        "it asks whether to convert its files and to download others, and fails where standard input is no terminal",
        modules=("deeprc.dataset_readers", "deeprc.utils"),
        broken=lambda: True,
        replacements=lambda module: [Replacement(module, "input", _answer_yes)],
    ),
)


# --- dead starts ----------------------------------------------------------------------------------------------------

_BAGS_BETWEEN_LOOKS = 32
_WORTH_A_WARNING = 1 / 16  # the share of dead bags; single ones are a matter of chance


class _DeadBags:
    """Counts the bags whose every score was forgotten: they give 0, and no gradient to the attention."""

    def __init__(self) -> None:
        self.bags = 0
        self.dead: Any = 0
        self.warned = False

    def notice(self, func_d: Any, inputs: Any, output: Any) -> None:
        """Take note of a bag; a forward hook of func_d."""
        import torch

        if self.warned or torch.compiler.is_compiling():
            return
        self.bags += 1
        self.dead = self.dead + (output[1] != 0).any().logical_not()  # stays on the device until it is looked at
        if self.bags % _BAGS_BETWEEN_LOOKS == 0 and (dead := int(self.dead)) >= _WORTH_A_WARNING * self.bags:
            self.warned = True
            warn(
                f"deeprc: {func_d} forgot every score in {dead} of the first {self.bags} bags "
                f"({dead / self.bags:.0%}). Such a bag gives 0 and no gradient to the attention; if all are so, "
                "training cannot leave this state. "
                "Remedies: func_d 'relu:empty_rows=keep' (a bag that would forget everything forgets nothing), 'pfu' "
                "(which keeps the upper half of every bag of two or more), or another seed"
            )


_dead_bags = _DeadBags()


def notice_dead_bags(func_d: Any, inputs: Any, output: Any) -> None:
    """Count dead bags, for the process; a function of a module, so that the models that hold it can be pickled."""
    _dead_bags.notice(func_d, inputs, output)


ADVICE = (
    "deeprc 0.0.6 reads the same repertoire for every name whose suffix is the same: give each name in the HDF5 "
    "container a suffix of its own, as recipes/immune_repertoire does"
)

HOST = RewrittenHost(
    name="deeprc",
    install='pip install "deeprc @ git+https://github.com/ml-jku/DeepRC" '
    '"widis-lstm-tools @ git+https://github.com/widmi/widis-lstm-tools"',
    sites=(
        Site(
            "deeprc.architectures",
            "DeepRC.forward",
            known.sources("deeprc", "deeprc.architectures.DeepRC.forward"),
            attachments=(FuncDAttachment(edit=forget_in_bags, forward_hook=notice_dead_bags),),
            required=True,
        ),
        Site(
            "deeprc.architectures",
            "AttentionNetwork.forward",
            known.sources("deeprc", "deeprc.architectures.AttentionNetwork.forward"),
            attachments=(
                FeatureMapAttachment(
                    edit=map_features,
                    shape=features,
                    folding=Folding(projections, multiply, example),
                    advice=ADVICE,
                ),
            ),
        ),
    ),
    shims=SHIMS,
)
