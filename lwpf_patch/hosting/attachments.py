"""What the modules of a patched class get: submodules, under names that the patched code uses.

A further one is a class here, and a line at each site that uses it.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .. import reporting
from ..errors import ConflictError, SettingsError
from ..rewriting import Edit, forget_around_softmax, map_query
from ..settings import Settings
from .contract import make_host_func_d

if TYPE_CHECKING:
    from torch import Tensor, nn

#: What is left to be done when nothing can go wrong any more.
Step: TypeAlias = Callable[[], object]
#: A module of a host, or a model that has some: what its attributes are, the host knows.
HostModule: TypeAlias = Any
#: What stands between a layer and its rule in a function of a host: what is called, and passed where modules have it.
InFunction: TypeAlias = Callable[..., Any]
#: Called after a forward pass of a submodule: with it, its inputs and its output.
ForwardHook: TypeAlias = "Callable[[nn.Module, tuple[Any, ...], Any], None]"


class Order(NamedTuple):
    """What is to be attached, to the modules of one site.

    Attributes:
        host: The host's name.
        module: The name of the module that defines the site's function.
        qualname: The function's qualified name.
        settings: What the host is patched with.
        asked: The settings that ask for this attachment: those, or the ones before whose code still runs; None: none.
        prototype: What :meth:`Attachment.prototype` made of them.
        plain: Whether the model stays plain.
        replace: Whether what was attached before is replaced.
    """

    host: str
    module: str
    qualname: str
    settings: Settings
    asked: Settings | None
    prototype: Any = None
    plain: bool = False
    replace: bool = True

    def mark(self, part: Any) -> None:
        """Mark a part as attached by this order."""
        part.attached, part.site, part.request = True, f"{self.module}.{self.qualname}", self.settings


@dataclass(frozen=True)
class Attachment(ABC):
    """A submodule that the modules of a patched class get.

    Attributes:
        edit: What has the site's function use it; None: the edit of the site does.
    """

    name = ""
    edit: Edit | None = None

    @abstractmethod
    def is_asked(self, settings: Settings) -> bool:
        """Return whether some settings ask for it."""

    def prototype(self, host: str, settings: Settings) -> Any:
        """Return what is made once, for all modules of a host of some name.

        Raises:
            SettingsError: The settings ask for something that cannot be made.
        """
        return None

    @abstractmethod
    def make(self, module: nn.Module, order: Order) -> nn.Module:
        """Return the submodule for one module.

        Raises:
            SettingsError: The module can have none.
        """

    @abstractmethod
    def prepare(self, module: nn.Module, order: Order) -> list[Step]:
        """Make what a module shall get, and return the steps that are left, none of which raises.

        Raises:
            ConflictError: The name is taken.
            SettingsError: The module can have none.
        """

    @abstractmethod
    def in_function(self, prototype: Any, is_asked: bool) -> InFunction:
        """Return what a function that is passed the submodule gets where its callers pass none.

        Args:
            prototype: What :meth:`prototype` made; None where the host is not patched.
            is_asked: Whether the settings ask for it.
        """

    def take_over(self, part: nn.Module, settings: Settings) -> bool:
        """Have a submodule that is there already go on under other settings; return whether it can."""
        return False


@dataclass(frozen=True)
class FuncDAttachment(Attachment):
    """The forgetting function of an attention layer, :class:`lwpf_patch.attention.HostFuncD`.

    Attributes:
        mask_sentinel: The number that a mask of the site adds to the scores of hidden keys, such as -100, where it is
            neither -inf nor ``finfo.min``; keys whose score or mask is at most half of it are excluded.
        forward_hook: Called after every forward of it, as a hook of torch.
        layout: What the dimensions of the site's scores are; see :class:`lwpf_patch.attention.owned.OwnedFuncD`.
        iterates: Whether the site calls it for several iterations, of which the weights of the last one count.
        why_not_scripted: Why torch.jit.script cannot compile the patched function, in words that follow a colon; empty:
            it can.
    """

    name = "func_d"
    edit: Edit | None = forget_around_softmax
    mask_sentinel: float | None = None
    forward_hook: ForwardHook | None = None
    layout: str = ""
    iterates: bool = False
    why_not_scripted: str = ""

    def is_asked(self, settings: Settings) -> bool:
        """Return True."""
        return True

    def prototype(self, host: str, settings: Settings) -> Any:
        """Return the func_d of which every module gets a copy."""
        func_d = make_host_func_d(host, settings)
        func_d._register_load_state_dict_pre_hook(_name_the_remedy)  # type: ignore[no-untyped-call]
        return func_d

    def make(self, module: nn.Module, order: Order) -> nn.Module:
        """Return the func_d of one module."""
        from ..attention import HostFuncD
        from ..forgetting import NoForgetting

        # In a model that stays plain it is of no host, as whose use it would count.
        func_d = HostFuncD(NoForgetting(), "") if order.plain else copy.deepcopy(order.prototype)
        func_d.mask_sentinel = self.mask_sentinel
        func_d.why_not_scripted = self.why_not_scripted
        func_d.layout, func_d.iterates = self.layout, self.iterates
        if self.forward_hook is not None and not order.plain:
            func_d.register_forward_hook(self.forward_hook)
        return func_d

    def prepare(self, module: nn.Module, order: Order) -> list[Step]:
        """Return the steps that attach it; see :meth:`Attachment.prepare`."""
        from ..forgetting import FuncD

        existing: Any = module._modules.get(self.name)
        assigned = isinstance(existing, FuncD)  # by hand, while the host was not patched
        if not assigned and not is_free(module, self.name, order.replace):
            return []
        if getattr(existing, "request", None) == order.settings and bool(existing.host) != order.plain:
            return []  # a copy, or one that was saved under the same settings
        func_d: Any = self.make(module, order)
        if assigned or getattr(existing, "by_hand", False):
            func_d.rule, func_d.by_hand = getattr(existing, "rule", existing), True
        order.mark(func_d)
        if existing is not None:
            before = repr(existing) if assigned else existing.described()
            if before != func_d.described():
                reporting.note_replaced(order.host, before, func_d.described())
        return [partial(own, module, self.name, func_d)]

    def in_function(self, prototype: Any, is_asked: bool) -> InFunction:
        """Return the func_d of all; what forgets nothing where the host is not patched."""
        return _ForgetNothing() if prototype is None else prototype


@dataclass(frozen=True, kw_only=True)
class FeatureMapAttachment(Attachment):
    """The feature map of U-Hop, :class:`lwpf_patch.uhop.HostFeatureMap`.

    Attributes:
        shape: Returns, for a module, the number of heads (None: there are none) and of features of each; or raises a
            SettingsError that says why it can have no feature map.
        folding: How it is folded.
        advice: What else to do, with this host, where Stage I separates nothing.
    """

    name = "feature_map"
    edit: Edit | None = map_query
    shape: Callable[[HostModule], tuple[int | None, int]]
    folding: Folding | None = None
    advice: str = ""

    def is_asked(self, settings: Settings) -> bool:
        """Return whether there is to be a Stage I."""
        return settings.uhop is not None

    def make(self, module: nn.Module, order: Order) -> nn.Module:
        """Return the feature map of one module, on its device and of its dtype; the identity."""
        from ..uhop import HostFeatureMap, sharding

        assert order.asked is not None
        assert order.asked.uhop is not None
        try:
            heads, features = self.shape(module)
        except AttributeError as error:
            raise SettingsError(
                f"uhop: {type(module).__qualname__} lacks what a feature map is made by: {error}"
            ) from None
        like = next((p for p in module.parameters() if p.is_floating_point()), None)
        if like is None:
            name = type(module).__qualname__
            raise SettingsError(
                f"uhop: {name} has no parameter of a floating dtype to make Φ like; where FSDP1 has flattened them, "
                "apply lwpf_patch before the model is sharded"
            )
        feature_map = HostFeatureMap(features, heads, order.asked.uhop, order.host, like)
        feature_map.advice = self.advice
        feature_map._is_after_fsdp = sharding.is_fsdp_module(module)
        return feature_map

    def prepare(self, module: nn.Module, order: Order) -> list[Step]:
        """Return the steps that attach it; see :meth:`Attachment.prepare`."""
        from ..uhop import NoFeatureMap

        existing: Any = module._modules.get(self.name)
        if order.asked is None or order.plain:
            refuse_to_ignore(existing, type(module).__qualname__)
            if order.asked is None or not is_free(module, self.name, order.replace):
                return []
            return [partial(own, module, self.name, NoFeatureMap(order.host, attached=True))]
        if existing is not None and not (order.replace and self.is_asked(order.settings)):
            return []
        if getattr(existing, "attached", False) and hasattr(existing, "take_settings"):
            # of a model that was saved; it keeps what it has learnt
            return [partial(self.take_over, existing, order.asked), partial(order.mark, existing)]
        if not is_free(module, self.name, order.replace) or self._is_replaced(module, order):
            return []
        feature_map = self.make(module, order)
        order.mark(feature_map)
        return [partial(own, module, self.name, feature_map)]

    def _is_replaced(self, module: nn.Module, order: Order) -> bool:
        """Return whether a subclass has a forward of its own and lacks what that of its base would work with."""
        function = getattr(type(module), order.qualname.rpartition(".")[2])
        if (function.__module__, function.__qualname__) == (order.module, order.qualname):
            return False
        try:
            self.shape(module)
        except AttributeError:
            return True
        return False

    def in_function(self, prototype: Any, is_asked: bool) -> InFunction:
        """Return what raises, since only modules have feature maps; what maps nothing where none is asked for."""
        if not is_asked:
            return _map_nothing
        from ..uhop import without_module

        return without_module

    def take_over(self, part: Any, settings: Settings) -> bool:
        """Have a feature map go on from where it is under other settings; return whether it can."""
        if not hasattr(part, "take_settings") or settings.uhop is None:
            return False
        part.take_settings(settings.uhop)
        return True


@dataclass(frozen=True)
class Folding:
    """How a feature map becomes part of the projections of its attention module.

    Attributes:
        parameters: Returns, for a model and a module of it, the names of the parameters that are multiplied, relative
            to the module; or raises a FoldError that says what stands between them and the scores.
        multiply: Multiplies them by the matrix of Φ, (heads, d, d) or (d, d), of float64 and on the CPU.
        example: Returns random arguments for a call of the module, tensors of float64 and on the CPU.
    """

    parameters: Callable[[HostModule, HostModule], list[str]]
    multiply: Callable[[HostModule, Tensor], None]
    example: Callable[[HostModule], tuple[Any, ...]]


class _ForgetNothing:
    """What a function of a host that is not patched gets for a func_d."""

    def __call__(self, scores: Tensor, training: bool) -> tuple[Tensor, int]:
        return scores, 1

    def normalise(self, scores: Tensor, dim: int = -1) -> Tensor:
        return scores.softmax(dim)

    def show_weights(self, weights: Tensor) -> None:
        pass

    def with_infinity(self, attn_mask: Tensor, sentinel: float) -> Tensor:
        return attn_mask

    def scaled_dot_product_attention(self, *arguments: Any, training: bool, **options: Any) -> Tensor:
        from torch.nn import functional as F

        return F.scaled_dot_product_attention(*arguments, **options)


def _map_nothing(query: Tensor, key: Tensor) -> Tensor:
    return query


def own(module: nn.Module, name: str, part: Any) -> None:
    """Give a module a submodule."""
    part.attached = True
    part.train(module.training)
    # Another thread may be going through the submodules, which must not change in number meanwhile.
    module.__dict__["_modules"] = {**module._modules, name: part}


def disown(module: nn.Module, name: str) -> None:
    """Take a submodule away from a module; a func_d whose rule was assigned by hand leaves it behind."""
    part: Any = module._modules.get(name)
    left = {name: part.rule} if getattr(part, "by_hand", False) else {}
    module.__dict__["_modules"] = {key: each for key, each in module._modules.items() if key != name} | left


def is_free(module: nn.Module, name: str, replace: bool = True) -> bool:
    """Return whether a module has no submodule of its own by a name, or one that was attached before.

    Raises:
        ConflictError: The name is that of something else.
    """
    existing = module._modules.get(name)
    if existing is not None:
        return replace and getattr(existing, "attached", False)
    if name in module.__dict__ or hasattr(type(module), name):
        raise ConflictError(
            f"{type(module).__module__}.{type(module).__qualname__} has an attribute {name} of its own "
            f"({getattr(module, name, None)!r}); lwpf_patch needs that name: rename it, or exclude this class"
        )
    return True


def refuse_to_ignore(feature_map: Any, owner: str) -> None:
    """Refuse a saved feature map where U-Hop was not asked for.

    Raises:
        ConflictError: It is another one than the identity.
    """
    if getattr(feature_map, "attached", False) and is_trained(feature_map):
        raise ConflictError(
            f"this {owner} was saved with a feature map of U-Hop, which would be ignored without "
            "uhop: apply lwpf_patch with uhop, or fold the model before it is saved (lwpf_patch.fold)"
        )


def is_trained(feature_map: Any) -> bool:
    """Return whether a feature map is another one than the identity; of a sharded one, what lies here."""
    from ..uhop import sharding

    weight = getattr(feature_map, "weight", None)
    return weight is not None and not weight.is_meta and sharding.has_values_here(weight)


def _name_the_remedy(
    state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: list[str], errors: list[str]
) -> None:
    """Add to torch's error of unexpected keys what to do with a checkpoint of U-Hop in a model that has no map for it.

    A hook of a func_d: torch has been through the module that owns it, and through what that owned before, by then.
    """
    maps = sum(key.endswith("feature_map.steps") for key in unexpected)
    message = (
        "the checkpoint holds feature maps of U-Hop, and this model has none: apply lwpf_patch with uhop before the "
        "model is made (LWPF_UHOP=on), or fold them into the projections before the checkpoint is saved: "
        "lwpf_patch.fold(model)"
    )
    if maps and message not in errors:
        if _is_strict():
            errors.append(message)
        elif maps == 1:
            reporting.warn(f"{message}. They are left out, since strict=False was asked for")


def _is_strict() -> bool:
    """Return whether the load_state_dict that runs is a strict one; torch tells modules that it always is."""
    from torch import nn

    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not nn.Module.load_state_dict.__code__:
        frame = frame.f_back
    return frame is not None and bool(frame.f_locals.get("strict"))
