"""transformers: attention that goes through ``AttentionInterface``, under the name ``"lwpf"``.

Nothing is rewritten. A model that would use ``"sdpa"`` or ``"eager"`` gets ``"lwpf"`` as its attention implementation,
and each of its attention modules a func_d, which the function that is registered finds on the module that it is handed.
Masks are those that the model would get otherwise: of ``"sdpa"``, boolean or left to an ``is_causal``, or of
``"eager"``, added to the scores. A model that computes its attention elsewhere is refused when it is made.
"""

from __future__ import annotations

import functools
import gc
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError, shown
from ..hosting import AttachedModules, FuncDAttachment, HostModule, ModularHost, Replacement, Shim, warn
from ..hosting.shims import AppliedShim
from . import transformers_known as known

if TYPE_CHECKING:
    from torch import Tensor

    from ..settings import Settings

#: What attention is called in a configuration; with a rule of its own ``"lwpf|pfu:mu=0.1"``.
NAME = "lwpf"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
#: What the models use by themselves, and what is replaced.
_REPLACED = (None, "sdpa", "eager")
#: Names by which code computes attention weights.
_SOFTMAX = frozenset({"softmax", "scaled_dot_product_attention", "multi_head_attention_forward"})
#: Names in a model's own eager attention that :func:`attend` has something for.
# fmt: off
_KNOWN = frozenset({
    "F", "arange", "attn_dropout", "bias", "bool", "cat", "contiguous", "device", "dim", "distance_embedding",
    "dropout", "dtype", "einsum", "expand", "finfo", "float", "float32", "full", "functional", "getattr",
    "hasattr", "head_dim", "head_mask", "is_cross_attention", "layer_idx", "logsumexp", "long", "masked_fill",
    "matmul", "max", "max_position_embeddings", "maybe_autocast", "min", "ndim", "nn", "num_key_value_groups",
    "position_embedding_type", "repeat_kv", "reshape", "scale_attn_by_inverse_layer_idx", "scale_attn_weights",
    "shape", "sigmoid", "sinks", "size", "softmax", "tanh", "to", "torch", "training", "transpose", "type",
    "unsqueeze", "values", "view", "where",
})
# fmt: on

#: What stands among the names in code that makes a mask itself, and in code that does otherwise for ``"sdpa"``.
_OWN_MASK, _ASKS_FOR_SDPA = "a mask of its own for eager and sdpa", "what SDPA needs"

#: The configurations of models that are patched, with what each said before, by identity: they cannot be hashed.
_before: dict[int, tuple[weakref.ref[Any], str | None]] = {}
#: The models that were patched alone, which a revert leaves as they are.
_alone: weakref.WeakSet[Any] = weakref.WeakSet()
#: What attaches, while the host is patched.
_modules: AttachedModules | None = None


# --- what is registered ---------------------------------------------------------------------------------------------


def attend(
    module: HostModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    head_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of a module, as transformers calls it; its weights are returned where they are asked for.

    Args:
        module: The attention module, whose func_d forgets.
        query: (B, H, L, E).
        key: (B, H or fewer, S, E).
        value: (B, H or fewer, S, Ev).
        attention_mask: Boolean, or added to the scores; broadcastable to (B, H, L, S).
        dropout: The probability that a weight is dropped, in training.
        scaling: The factor of the scores; None: ``E ** -0.5``.
        is_causal: Whether query i sees the keys 0 to i where there is no mask; None: as the module says.
        position_bias: Added to the scores.
        softcap: The bound of the scores.
        head_mask: Multiplies the weights.
        **options: What else transformers passes. Sinks are among it, and whether the weights are asked for.
    """
    from .transformers_masks import whole_mask, without_unseen_keys

    func_d = getattr(module, "func_d", None)
    if func_d is None:
        func_d = _attach_late(module)
    if attention_mask is not None and func_d.mask_is_of_heads:
        attention_mask, head_mask = None, attention_mask
    causal = False
    if attention_mask is None and func_d.causal_without_mask and query.shape[2] > 1:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal:
        key, value, position_bias = without_unseen_keys(query, key, value, position_bias)
    mask = whole_mask(attention_mask, position_bias, causal, query, key)
    given = {
        "attn_mask": mask,
        "dropout_p": dropout if module.training else 0.0,
        "is_causal": bool(causal and mask is None),
        "scale": scaling,
        "enable_gqa": bool(key.shape[1] != query.shape[1]),  # a tensor where torch.jit.trace is at work
    }
    sinks = _sinks(module, options, query)
    weights: Tensor | None = None
    if softcap is not None or sinks is not None or head_mask is not None or _are_asked_for(options):
        if head_mask is not None and head_mask.dim() == 1:
            head_mask = head_mask.view(1, -1, 1, 1)
        output, weights = func_d.attention_with_weights(
            query, key, value, **given, softcap=softcap, sinks=sinks, head_mask=head_mask
        )
    else:
        output = func_d.scaled_dot_product_attention(query, key, value, **given)
    return output.transpose(1, 2).contiguous(), weights


def _sinks(module: HostModule, options: dict[str, Any], query: Tensor) -> Tensor | None:
    """Return the scores of keys without a value, (B, H, L, n), for models that have some."""
    sinks: Tensor | None = options.get("s_aux")
    if sinks is None:
        sinks = options.get("sinks")
    if sinks is None:
        sinks = getattr(module, "sinks", None)
    if sinks is None or sinks.dim() == 4:
        return sinks
    return sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], -1)


def _are_asked_for(options: dict[str, Any]) -> bool:
    """Return whether somebody wants the weights: the caller, or the hooks of transformers 5."""
    if options.get("output_attentions"):
        return True
    capturing: Any = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    wanted = None if collector is None else collector.get()
    if not wanted:
        return False
    return any(each.endswith("attentions") for each in wanted)


# --- which modules --------------------------------------------------------------------------------------------------


def goes_through_interface(cls: type) -> bool:
    """Return whether a class of modules takes its attention from the interface."""
    return _INTERFACE in _names_used(cls)


_names_of: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def _names_used(cls: type) -> frozenset[str]:
    """Return the names in the code of a class, without that of torch."""
    if cls in _names_of:
        return _names_of[cls]
    found: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins") and base.__name__ != "PreTrainedModel":
            for value in vars(base).values():
                found.update(_names_in(inspect.unwrap(getattr(value, "__func__", value))))
    _names_of[cls] = frozenset(found)
    return _names_of[cls]


def _names_in(function: Any) -> Iterator[str]:
    waiting = [getattr(function, "__code__", None)]
    while waiting:
        code = waiting.pop()
        if isinstance(code, CodeType):
            yield from code.co_names
            for constant in code.co_consts:
                # what it asks of the implementation's name
                if constant == ("eager", "sdpa"):
                    yield _OWN_MASK
                if constant == "sdpa" or (isinstance(constant, (tuple, frozenset)) and "sdpa" in constant):
                    yield _ASKS_FOR_SDPA
                waiting.append(constant)


def _elsewhere(model: HostModule) -> list[str]:
    """Return the modules of a model that compute attention weights past the interface, by class."""
    found = []
    for module in model.modules():
        cls = type(module)
        named = re.search(r"Attention|Attn", cls.__name__) is not None
        if cls.__module__.partition(".")[0] in ("torch", "lwpf_patch"):
            if cls.__name__ == "MultiheadAttention":
                found.append(f"torch.nn.{cls.__name__}")
        elif named and not goes_through_interface(cls):
            if _names_used(cls) & _SOFTMAX:
                found.append(cls.__name__)
        elif not goes_through_interface(cls) and "scaled_dot_product_attention" in _names_used(cls):
            found.append(cls.__name__)
    return list(dict.fromkeys(found))


def _check(model: HostModule) -> None:
    """Check that the attention of a model goes through the interface, and is one that is known.

    Raises:
        SettingsError: It does not.
    """
    modules = [module for module in model.modules() if goes_through_interface(type(module))]
    elsewhere = _elsewhere(model)
    if not modules:
        unknown = [type(each).__name__ for each in model.modules() if re.search("Attention", type(each).__name__)]
        elsewhere = elsewhere or list(dict.fromkeys(unknown))
        if elsewhere:
            raise SettingsError(
                f"{type(model).__name__} cannot be patched: its attention ({', '.join(elsewhere)}) does not go through "
                f"transformers' AttentionInterface, and would compute plain. {_leave_out(model)}"
            )
        return
    for cls in dict.fromkeys(map(type, modules)):
        if _OWN_MASK in _names_used(cls):
            raise SettingsError(
                f"{type(model).__name__} cannot be patched: {cls.__name__} hides keys by itself, for the "
                f"implementations 'eager' and 'sdpa' only. {_leave_out(model)}"
            )
    for module in modules:
        if reason := _why_not_known(module):
            raise SettingsError(
                f"{type(model).__name__} cannot be patched: the attention of {type(module).__name__} {reason}. "
                f"{_leave_out(model)}"
            )
    if elsewhere:
        _warn_once(
            f"transformers: {type(model).__name__} is patched in part: {', '.join(elsewhere)} compute attention past "
            "transformers' AttentionInterface, and stay plain"
        )


def _check_asks(model: HostModule, modules: AttachedModules) -> None:
    """Check that the attention modules of a model that is made ask for us, whatever way it was made.

    Raises:
        SettingsError: They ask for something else, and would compute plain.
    """
    owners = {"": model}
    for name, module in model.named_modules():
        owner = module if is_model(module) else owners[name.rpartition(".")[0]]
        owners[name] = owner
        asked = getattr(getattr(module, "config", None), "_attn_implementation_internal", NAME)
        if goes_through_interface(type(module)) and not is_ours(asked) and not modules.is_left_out(owner):
            raise SettingsError(
                f"{type(model).__name__} cannot be patched: its {type(module).__name__} asks for "
                f"attn_implementation={shown(asked)} after all, and would compute plain. {_leave_out(owner)}"
            )


def _classes_by_name(cls: type) -> str:
    """Return the name of a table of attention classes in the file of a model, as in transformers 4; empty: none."""
    file = vars(sys.modules.get(cls.__module__, sys))
    return next((name for name in file if name.endswith("_ATTENTION_CLASSES") and _INTERFACE not in file), "")


def _leave_out(model: HostModule) -> str:
    return (
        f"If it shall stay plain, leave it out: LWPF_EXCLUDE_MODELS={type(model).__name__}, or "
        f"apply(exclude_models={type(model).__name__!r})"
    )


@functools.cache
def _warn_once(message: str) -> None:
    warn(message)


def _eager_of(module: HostModule) -> Any:
    """Return the eager attention that a module's class, or a base of it, has where no other is asked for."""
    for cls in type(module).__mro__:
        names = {name for value in vars(cls).values() for name in _names_in(inspect.unwrap(value))}
        if _INTERFACE in names:
            file = vars(sys.modules.get(cls.__module__, sys))
            own = sorted(name for name in names & file.keys() if name.endswith(known.EAGER))
            return file[own[0]] if own else None
    return None


def _why_not_known(module: HostModule) -> str | None:
    """Return why the attention of a module may be another one than :func:`attend` computes; None: it is not."""
    eager = _eager_of(module)
    names = set(_names_in(eager))
    unknown = (names - _KNOWN) | (_parameters_of(eager) - known.PARAMETERS)
    if unknown:
        return f"has something that is not known ({', '.join(sorted(unknown))} in its eager_attention_forward)"
    if eager is None or not known.eager_is_known(eager):
        _warn_once(
            f"transformers: the eager attention of {type(module).__name__} ({type(module).__module__}) is none of "
            "those that are known here. It is patched, since all that it names is known: check that func_d 'none' "
            "gives the usual outputs"
        )
    kind = getattr(module, "position_embedding_type", None)
    if "distance_embedding" in names and isinstance(kind, str) and kind.startswith("relative"):
        return f"adds scores of relative positions (position_embedding_type={kind!r})"
    if "scale_attn_weights" in names and not getattr(module, "scale_attn_weights", True):
        return "does not scale its scores (scale_attn_weights=False)"
    if "scale_attn_by_inverse_layer_idx" in names and getattr(module, "scale_attn_by_inverse_layer_idx", False):
        return "scales its scores by layer (scale_attn_by_inverse_layer_idx=True)"
    return None


def _parameters_of(function: Any) -> set[str]:
    """Return what a function can be given by name beside what every eager attention is given."""
    code = getattr(function, "__code__", None)
    if code is None:
        return set()
    by_position = 5  # module, query, key, value and mask, which some call otherwise
    return set(code.co_varnames[by_position : code.co_argcount + code.co_kwonlyargcount])


@functools.cache
def _multiplies_mask(function: Any) -> bool:
    """Return whether an eager attention multiplies by what it calls a mask, as vision models did in transformers 4."""
    try:
        return "attn_weights * attention_mask" in inspect.getsource(function)
    except (OSError, TypeError):
        return False


# --- models ---------------------------------------------------------------------------------------------------------


def is_ours(name: object) -> bool:
    """Return whether the name of an implementation is one of ours."""
    return isinstance(name, str) and (name == NAME or name.startswith(f"{NAME}|"))


def _settings_for(name: object, modules: AttachedModules) -> Settings:
    """Return the settings that the name of an implementation means.

    Raises:
        SettingsError: Its rule is none.
    """
    if not isinstance(name, str) or "|" not in name:
        return modules.settings
    return modules.settings.with_func_d(name.partition("|")[2], f"attn_implementation={name!r}")


def _register_names(*names: str) -> None:
    """Make names known to transformers, for attention and for its mask."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    from .transformers_masks import mask_for

    for name in names:
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, mask_for)


def _unregister_names() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for interface in (AttentionInterface, AttentionMaskInterface):
        for name in [name for name in interface._global_mapping if is_ours(name)]:
            del interface._global_mapping[name]


def _configurations(model: HostModule) -> list[Any]:
    """Return the configurations that the attention modules of a model ask for its implementation."""
    configs = [getattr(model, "config", None)]
    configs += [getattr(module, "config", None) for module in model.modules()]
    return list({id(each): each for each in configs if hasattr(each, "_attn_implementation_internal")}.values())


def _note_before(config: Any, name: str | None) -> None:
    found = _before.get(id(config))
    if found is None or found[0]() is not config:
        key = id(config)
        _before[key] = weakref.ref(config, lambda _: _before.pop(key, None)), name


def _before_us(config: Any) -> str | None:
    return _before[id(config)][1] if _is_noted(config) else None


def _is_noted(config: Any) -> bool:
    found = _before.get(id(config))
    return found is not None and found[0]() is config


def _attach_to(model: HostModule, modules: AttachedModules, plain: bool, replace: bool = True) -> None:
    """Give the attention modules of a model their func_d."""
    for module in model.modules():
        if goes_through_interface(type(module)):
            name = getattr(getattr(module, "config", model.config), "_attn_implementation", None)
            own = module._modules.get("func_d")
            if own is not None and getattr(own, "host", None) is not None and not getattr(own, "attached", True):
                continue  # that of patch_model
            modules.attach(module, _settings_for(name, modules), plain=plain, replace=replace)
    _describe(model)


def _describe(model: HostModule) -> None:
    """Tell what a func_d cannot see of its module at each call, and the masks which kind the model reads."""
    from .transformers_masks import set_reader

    takes_sdpa = bool(getattr(model, "_supports_sdpa", False))
    attached = [each for each in model.modules() if goes_through_interface(type(each)) and "func_d" in each._modules]
    for module in attached:
        module.func_d.causal_without_mask = takes_sdpa
        module.func_d.mask_is_of_heads = _multiplies_mask(_eager_of(module))
    configs = [each for each in _configurations(model) if is_ours(each._attn_implementation_internal)]
    reads = takes_sdpa and bool(attached) and all(_before_us(each) in (None, "sdpa") for each in configs)
    # The recipe of the paper lets hidden keys in again, with the scores that eager masks leave them.
    reads = reads and all(module.func_d.masking == "exclude" for module in attached)
    reads = reads and not any(_ASKS_FOR_SDPA in _names_used(type(each)) for each in model.modules())
    for config in configs:
        set_reader(config, reads and _masks_are_known())


def _masks_are_known() -> bool:
    """Return whether masks of SDPA mean here what they mean in the versions that were tested."""
    if unknown := known.unknown_masks():
        _warn_once(
            f"transformers: {', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} not the same as in the "
            f"versions that are known here, and masks are made as for 'eager': right, and of the size of the scores"
        )
    return not unknown


def _attach_late(module: HostModule) -> Any:
    """Attach to a module that was made past all models, at its first call."""
    if _modules is None:
        raise SettingsError(
            f"{type(module).__name__} was made for attention by {NAME!r}, and has no func_d: call "
            'lwpf_patch.apply("transformers") or lwpf_patch.patch_model(model) before'
        )
    from .transformers_masks import is_reader

    config = getattr(module, "config", None)
    _modules.attach(module, _settings_for(getattr(config, "_attn_implementation", None), _modules))
    func_d: Any = module.func_d
    func_d.causal_without_mask = config is None or is_reader(config)
    func_d.mask_is_of_heads = _multiplies_mask(_eager_of(module))
    return func_d


def _adopt(model: HostModule, modules: AttachedModules) -> None:
    """Have a model that lives, or that was copied or unpickled, go through the interface.

    Raises:
        SettingsError: It cannot, or was asked to use something else.
    """
    if model in _alone:
        return
    plain = modules.is_left_out(model)
    if not plain:
        _check(model)
        for config in _configurations(model):
            name = config._attn_implementation_internal
            if is_ours(name):
                _register_names(name)
                _note_before(config, None)
            elif name in _REPLACED:
                _note_before(config, name)
                config._attn_implementation_internal = NAME
            elif config is getattr(model, "config", None):
                _refuse(model, name)
    _attach_to(model, modules, plain)


def _refuse(model: HostModule, name: object) -> None:
    raise SettingsError(
        f"{type(model).__name__} was asked for attn_implementation={shown(name)}, which would compute plain where "
        f"transformers is patched: leave it out, or ask for {NAME!r}. {_leave_out(model)}"
    )


# --- registering ----------------------------------------------------------------------------------------------------


def _wrappers(library: ModuleType, modules: AttachedModules) -> list[Replacement]:
    """Return what has models that are made from now on go through the interface."""
    model_class: Any = library.PreTrainedModel
    check, choose = model_class._check_and_adjust_attn_implementation, model_class.get_correct_attn_implementation
    post_init, set_implementation = model_class.post_init, model_class.set_attn_implementation
    set_state = model_class.__setstate__

    def refuse_what_cannot(model: Any, name: Any) -> None:
        if name not in _REPLACED and not is_ours(name):
            _refuse(model, name)
        if classes := _classes_by_name(type(model)):
            raise SettingsError(
                f"{type(model).__name__} cannot be patched: it chooses the class of its attention by the name of the "
                f"implementation ({classes}), and does not take it from transformers' AttentionInterface. "
                f"{_leave_out(model)}"
            )

    @functools.wraps(check)
    def _check_and_adjust_attn_implementation(self: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        if modules.is_left_out(self):
            return check(self, None if is_ours(name) else name, *args, **kwargs)
        refuse_what_cannot(self, name)
        return check(self, name, *args, **kwargs)

    @functools.wraps(choose)
    def get_correct_attn_implementation(self: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        if modules.is_left_out(self):
            return choose(self, None if is_ours(name) else name, *args, **kwargs)
        refuse_what_cannot(self, name)
        if is_ours(name):
            _settings_for(name, modules)
            _register_names(name)
            _note_before(self.config, None)
            return choose(self, name, *args, **kwargs)
        chosen = choose(self, name, *args, **kwargs)
        _before.pop(id(self.config), None)  # what was asked for last
        _note_before(self.config, chosen)
        return NAME

    @functools.wraps(post_init)
    def after_construction(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = post_init(self, *args, **kwargs)
        plain = modules.is_left_out(self)
        if not plain:
            _check(self)
            _check_asks(self, modules)
        _attach_to(self, modules, plain, replace=False)
        return result

    @functools.wraps(set_implementation)
    def set_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = set_implementation(self, *args, **kwargs)
        _attach_to(self, modules, modules.is_left_out(self))
        return result

    @functools.wraps(set_state)
    def __setstate__(self: Any, state: Any) -> None:
        set_state(self, state)
        _adopt(self, modules)

    return [
        Replacement(model_class, check.__name__, _check_and_adjust_attn_implementation),
        Replacement(model_class, choose.__name__, get_correct_attn_implementation),
        Replacement(model_class, post_init.__name__, after_construction),
        Replacement(model_class, set_implementation.__name__, set_attn_implementation),
        Replacement(model_class, "__setstate__", __setstate__),
        _setter(library, modules),
    ]


def _setter(library: ModuleType, modules: AttachedModules) -> Replacement:
    """Return what keeps a script from taking a patched model out of the interface by its configuration."""
    config_class: Any = vars(library).get("PreTrainedConfig") or vars(library)["PretrainedConfig"]
    name = "_attn_implementation"
    owner = next(cls for cls in config_class.__mro__ if name in vars(cls))
    implementation: property = vars(owner)[name]
    assert implementation.fset is not None
    put = implementation.fset

    def put_ours(self: Any, value: Any) -> None:
        if _is_noted(self) and isinstance(value, str):
            if is_ours(value):
                _settings_for(value, modules)
                _register_names(value)
            else:
                value = NAME if value in _REPLACED else value
        put(self, value)
        noted = _is_noted(self) and not isinstance(value, dict)
        if noted and value is not None and not is_ours(value):
            put(self, NAME)
            raise SettingsError(
                f"config._attn_implementation = {shown(value)}: a model with this configuration is patched, and would "
                f"compute plain. Leave it out with exclude_models, or ask for {NAME!r}"
            )

    return Replacement(owner, name, property(implementation.fget, put_ours, implementation.fdel))


def register(library: ModuleType, modules: AttachedModules) -> Callable[[], None]:
    """Register with transformers; see :class:`lwpf_patch.hosting.ModularHost`."""
    global _modules
    _register_names(NAME)
    shim = Shim(NAME, "", (), lambda: True, lambda library: _wrappers(library, modules))
    applied = AppliedShim.apply(shim, library)
    _modules = modules

    def undo() -> None:
        global _modules
        _modules = None
        applied.undo()
        for model in modules.living(library.PreTrainedModel):
            if "_modules" in vars(model) and model not in _alone:
                _put_back(model)
        if not _alone:
            _unregister_names()

    try:
        gc.collect()  # what nobody has any more may not stop a patch
        for model in modules.living(library.PreTrainedModel):
            if "config" in vars(model) and "_modules" in vars(model):
                _adopt(model, modules)
    except BaseException:
        undo()
        raise
    return undo


def _put_back(model: HostModule) -> None:
    """Have a model use what it would without us."""
    for config in _configurations(model):
        if is_ours(config._attn_implementation_internal):
            before = _before_us(config)
            if before is None and hasattr(model, "get_correct_attn_implementation"):
                before = model.get_correct_attn_implementation(None)
            config._attn_implementation_internal = before
            _before.pop(id(config), None)


# --- one model alone ------------------------------------------------------------------------------------------------


def modules_of(model: HostModule) -> dict[str, HostModule]:
    """Return the attention modules of a model by name; see :class:`lwpf_patch.hosting.ModularHost`."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return {}
    _check(model)
    return {name: each for name, each in model.named_modules() if goes_through_interface(type(each))}


def patch(model: HostModule) -> None:
    """Have the attention of one model go through the interface; see :class:`lwpf_patch.hosting.ModularHost`."""
    from transformers.modeling_utils import PreTrainedModel

    _register_names(NAME)
    for config in _configurations(model):
        if not is_ours(config._attn_implementation_internal):
            _note_before(config, config._attn_implementation_internal)
            config._attn_implementation_internal = NAME
    for each in model.modules():
        if isinstance(each, PreTrainedModel):
            _alone.add(each)
    _describe(model)


def unpatch(model: HostModule) -> None:
    """Undo :func:`patch`."""
    for each in model.modules():
        _alone.discard(each)
    if _modules is None:
        _put_back(model)
    else:
        _adopt(model, _modules)


def names_of_model(model: HostModule) -> Iterable[str]:
    """Return the name or the path that a model was loaded by."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    return [name] if name else []


def is_model(module: HostModule) -> bool:
    """Return whether a module is a model of transformers."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(module, library.PreTrainedModel)


HOST = ModularHost(
    name="transformers",
    install="pip install 'transformers>=4.57'",
    places=("transformers.modeling_utils",),
    register=register,
    modules_of=modules_of,
    patch=patch,
    unpatch=unpatch,
    # markuplm adds -10,000 to what is hidden, eomt -1e9.
    attachment=FuncDAttachment(edit=None, mask_sentinel=-1e4),
    names_of_model=names_of_model,
    is_model=is_model,
    no_model="takes no attention by transformers' AttentionInterface, or was left out by exclude_models",
)
