"""What an attention layer owns beside the mathematics: a forgetting function, and how it is applied there.

Typing is spelled as torch.jit.script reads it.
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .. import attached, compiling, watching
from ..attached import Attached
from ..backends import eager_form as eager
from ..errors import UnsupportedError
from ..forgetting import FuncD, NoForgetting, make_func_d
from ..options import check_name
from ..settings import BACKENDS, DEFAULTS, MASKINGS, VERIFICATIONS
from ..specs import FuncDLike, parse_sep
from .watched import show_fast_path

_ALLOWED = {"masking": MASKINGS, "backend": BACKENDS, "verify": VERIFICATIONS}
#: What a layer is whose blocks nobody asked for.
_DECIDED: dict[str, Any] = {"left_plain": False, "undecided": False, "block": -1, "_decide": None}
#: What forgets in a layer that is left plain.
_NOTHING = NoForgetting()


class OwnedFuncD(Attached, nn.Module):
    """The forgetting function of one attention layer.

    ``layer.func_d = lwpf_patch.PFU(mu=0.1)`` puts another function in; all else stays as it is.

    Args:
        rule: The forgetting function, in any form that :func:`lwpf_patch.apply` takes.
        host: The host's name; empty: none, so that no report counts its use.
        masking: As for :func:`lwpf_patch.apply`.
        backend: As for :func:`lwpf_patch.apply`.
        sep: As for :func:`lwpf_patch.apply`.
        verify: As for :func:`lwpf_patch.apply`.

    Attributes:
        rule: The forgetting function.
        masking: ``"exclude"``: keys hidden by a mask (score -inf or ``finfo.min``) are neither kept nor forgotten, have
            no part in the denominator or the median, and a row with no key left gives 0. ``"paper"``: the official
            recipe to the letter, which lets hidden keys back into the denominator.
        backend: Which backend computes.
        sep: The normalisation of the scores: alpha of alpha-entmax, and n of softmax_n; set it as for
            :func:`lwpf_patch.apply`.
        verify: When the kernels of a GPU are checked against the eager form.
        mask_sentinel: The number that a mask of the host adds to the scores of hidden keys, where it is neither -inf
            nor ``finfo.min``; keys whose score or mask is at most half of it are excluded.
        layout: What the dimensions of the host's scores are, a letter each: ``b`` items, ``h`` heads, ``w`` windows or
            other parts of an image, ``q`` queries, ``k`` keys, ``(bh)`` items and heads in one. Empty: ``bhqk``, or
            ``bwhqk``, or ``(bh)qk`` where the module says how many heads it has, else ``bqk``.
        iterates: Whether the host calls it for several iterations, of which the weights of the last one count.
        why_not_scripted: Why torch.jit.script cannot compile the layer, in words that follow a colon; empty: it can.
        by_hand: Whether the rule was assigned by hand: it stays when ``apply()`` comes with other settings, and when
            ``revert()`` takes the rest away.
        left_plain: Whether the layer computes plain attention, since it is none of the blocks that were asked for.
        undecided: Whether that is open: it is decided when the layer is first called, with all others of its model.
        block: The number of the layer in its model, once that was decided; -1: it was not asked.
    """

    layout = ""
    iterates = False
    why_not_scripted = ""
    masking: str
    backend: str
    verify: str
    sep: Tuple[float, float]
    by_hand: bool
    mask_sentinel: Optional[float]
    left_plain: bool
    undecided: bool
    block: int
    if TYPE_CHECKING:  # torch.jit.script would read it, and knows no functions
        _decide: Optional[Callable[[], bool]]

    def __init__(
        self,
        rule: Any,
        host: str = "",
        masking: str = "exclude",
        backend: str = "auto",
        sep: Any = "softmax",
        verify: str = "first",
    ) -> None:
        super().__init__()
        self.rule: FuncD = rule_of(rule, "HostFuncD(...)")
        self.host = host
        self.masking = masking
        self.backend = backend
        self.sep = sep
        self.verify = verify
        self.by_hand = False
        self.mask_sentinel = None
        self.left_plain = False
        self.undecided = False
        self.block = -1
        self._decide = None
        _keep_settings_of_layers()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            SettingsError: A masking, backend, sep or verify that there is not.
        """
        if name == "sep":
            value = parse_sep(value, "func_d.sep = ...")
        if name in _ALLOWED:
            value = check_name(name, value, f"func_d.{name} = ...", _ALLOWED[name])
        super().__setattr__(name, value)
        if name in ("rule", "sep") and (self.__dict__.get("left_plain") or self.__dict__.get("undecided")):
            self.take_part()  # it is set by hand

    def leave_open(self) -> None:
        """Have it decided at the first call whether the layer is one of the blocks that were asked for."""
        self.undecided = True
        self._decide = _decider(self)

    def take_part(self, block: int = -1) -> None:
        """Have the layer forget, as one of the blocks that were asked for, or since it was set by hand."""
        self.left_plain, self.block = False, block
        self.undecided = False

    def leave_plain(self, block: int) -> None:
        """Have the layer compute plain attention, since it is none of the blocks that were asked for."""
        self.left_plain, self.block = True, block
        self.undecided = False

    def settle(self) -> None:
        """See that it is decided whether the layer forgets; each way to compute begins with it.

        Raises:
            SettingsError: The model has no such blocks.
            UnsupportedError: It cannot be decided here.
        """
        # Not a question of what is undecided: torch.compile would take the answer for one that holds, and it changes.
        if self._decide is not None:
            self._decide()
            if self.undecided:
                raise UnsupportedError(
                    f"blocks: nn.DataParallel makes new replicas of the model for every step, and which layers of "
                    f"{self.host} forget has to be decided before: call the model once without it, or use "
                    "DistributedDataParallel"
                )

    def rule_here(self) -> FuncD:
        """Return the forgetting function that computes: one that forgets nothing where the layer is left plain."""
        return _NOTHING if self.left_plain else self.rule

    def sep_here(self) -> Tuple[float, float]:
        """Return the normalisation that computes: the softmax where the layer is left plain."""
        return (1.0, 0.0) if self.left_plain else self.sep

    def host_here(self) -> str:
        """Return the host whose patch a call is one of; empty where the layer is left plain."""
        return "" if self.left_plain else self.host

    def highest_hidden(self, scores: Tensor) -> float:
        """Return the value at and below which a mask hides a key, in the dtype of some scores or a mask."""
        sentinel = self.mask_sentinel
        return eager.lowest(scores.dtype) if sentinel is None else 0.5 * sentinel

    def with_infinity(self, attn_mask: Optional[Tensor], sentinel: Optional[float] = None) -> Optional[Tensor]:
        """Return a mask with -inf in place of the host's own number, as every backend reads it.

        Args:
            attn_mask: The mask.
            sentinel: The number that it has for hidden keys; None: ``mask_sentinel``.
        """
        if not torch.jit.is_scripting():
            self.settle()
        hidden = self.mask_sentinel if sentinel is None else sentinel
        if attn_mask is None or hidden is None or attn_mask.dtype == torch.bool:
            return attn_mask
        if self.masking == "paper" or self.is_plain():  # which compute with the mask as it is
            return attn_mask
        return attn_mask.masked_fill(attn_mask <= 0.5 * hidden, float("-inf"))

    def is_plain(self) -> bool:
        """Return whether attention is computed as it is without this package."""
        return self.left_plain or (not self.rule.forgets and self.sep[0] == 1.0 and self.sep[1] == 0.0)

    def allows_fast_path(self) -> bool:
        """Return whether a host may compute its layer by one call of its own, which knows nothing of this."""
        self.settle()
        if not self.is_plain() or watching.has_own():
            return False
        if not torch.compiler.is_compiling() and watching.on:
            show_fast_path(self)
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decide": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**DEFAULTS, **_DECIDED, **state})  # type: ignore[no-untyped-call] # an older one has fewer
        if self.undecided:
            self.leave_open()
        _keep_settings_of_layers()

    def __repr__(self) -> str:
        """Show the forgetting function, the settings that are not the defaults, and which block the layer is."""
        if self.left_plain:
            return f"NoForgetting(block={self.block})"
        counted = [f"block={self.block}"] if self.block >= 0 else []
        return self.described(["in some blocks only"] if self.undecided else counted)

    def described(self, more: Sequence[str] = ()) -> str:
        """Return the forgetting function and the settings that are not the defaults, in words.

        Args:
            more: What else to tell.
        """
        changed = [f"{name}={getattr(self, name)}" for name, value in DEFAULTS.items() if getattr(self, name) != value]
        changed += more
        shown = repr(self.rule)
        if not changed or not shown.endswith(")"):
            return shown
        head, bracket, options = shown[:-1].partition("(")
        return f"{head}{bracket}{', '.join(part for part in (options, *changed) if part)})"


def rule_of(func_d: FuncDLike, origin: str = "func_d") -> FuncD:
    """Return the forgetting function that is meant by what a user gives, which may be that of an attention layer.

    Raises:
        SettingsError: As for :func:`lwpf_patch.forgetting.make_func_d`.
    """
    return func_d.rule if isinstance(func_d, OwnedFuncD) else make_func_d(func_d, origin)


# While torch.compile traces, a layer is decided at tracing, before anything is read of it, and leaves no node.
@compiling.constant
def _marked() -> bool:
    return True


def _decider(func_d: OwnedFuncD) -> Callable[[], bool]:
    """Return what decides, for all layers of the model of one, whether they forget, if that is open.

    A function of each layer, since torch.compile would compile anew for each layer that is an argument.
    """
    reference = weakref.ref(func_d)

    def decide_blocks() -> bool:
        layer = reference()
        if layer is not None and layer.undecided and attached.decide is not None:
            attached.decide(layer)
        return True

    return compiling.marked_as(decide_blocks, _marked)


def _keep_settings_of_layers() -> None:
    """See to it that a forgetting function that is assigned to a layer comes in its :class:`OwnedFuncD`."""
    global _hook
    if _hook is None:
        _hook = register_module_module_registration_hook(_on_assignment)  # type: ignore[arg-type]


_hook: Any = None


def _on_assignment(module: nn.Module, name: str, assigned: Optional[nn.Module]) -> Optional[nn.Module]:
    layer = module._modules.get(name) if name == "func_d" else None
    if assigned is None or not isinstance(layer, OwnedFuncD) or isinstance(assigned, OwnedFuncD):
        return None
    if any(part is layer for part in assigned.modules()):  # a wrapper around it, such as that of checkpointing
        return None
    layer.rule = make_func_d(assigned, f"{type(module).__name__}.func_d = ...")
    layer.by_hand = True
    layer.take_part()
    layer.rule.train(layer.training)
    return layer
