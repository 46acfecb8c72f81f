"""func_d, the forgetting functions: ReLU, PFU, none, and your own.

Source: Ota et al., "Learning with Partial Forgetting in Modern Hopfield Networks", AISTATS 2023. A func_d maps scores
``s`` to the pair ``(D(s), D'(s))``: the partially forgotten scores, and the indicator of what is kept, which carries no
gradient. They are modules without parameters: a patched attention module owns one as ``self.func_d``.

Typing is spelled as torch.jit.script reads it.
"""

import inspect
from typing import Any, Callable, Optional, Tuple, Union

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from . import backends, reporting, transforms, unpickling
from .backends import cpu, eager, triton
from .backends.arguments import batch_shape
from .errors import SettingsError, UnsupportedError, shown
from .settings import FUNC_D_OPTIONS, func_d_factory, parse_func_d, register_func_d

# While torch.compile traces, the note is made once, at tracing, and leaves neither a node nor a guard.
_constant: Any = torch.compiler.assume_constant_result
_constant(transforms.asked)
_mark_used: Callable[[str], bool] = _constant(reporting.mark_used)
_note_backend: Callable[[str, str, str], bool] = _constant(reporting.note_backend)
_is_in_onnx_export: Callable[[], bool] = _constant(lambda: torch.onnx.is_in_onnx_export())

__all__ = ["PFU", "FuncD", "NoForgetting", "ReLU", "make_func_d", "register_func_d"]


class FuncD(nn.Module):
    """Base class of the forgetting functions.

    Called on scores it gives the two lines of the paper: ``attn, mask = func_d(attn)``, then, after the softmax,
    ``attn = mask * attn``. Subclasses define :meth:`forget`.

    Attributes:
        masking: ``"exclude"``: keys hidden by a mask (score -inf or ``finfo.min``) are neither kept nor forgotten, have
            no part in the denominator or the median, and a row with no key left gives 0. ``"paper"``: the official
            recipe to the letter, which lets hidden keys back into the denominator.
        backend: Which implementation computes :meth:`scaled_dot_product_attention`.
        empty: What becomes of a row that would forget every key: ``"zero"``, as in the paper, gives 0 and no gradient
            to the scores; ``"plain"`` forgets nothing of such a row.
    """

    masking: str
    empty: str
    backend: str
    host: str
    attached: bool

    def __init__(self) -> None:
        super().__init__()
        self.masking = "exclude"
        self.backend = "auto"
        self.empty = "zero"
        self.host = ""  # the host whose attention owns this one, empty outside of one
        self.attached = False  # whether apply() put it there, and revert() may take it away
        self.site = ""  # of an attached one: the function whose patched code calls it
        self.request: Any = None  # of an attached one: the Settings that the host is patched with

    def forget(self, scores: Tensor, excluded: Optional[Tensor], training: bool) -> Tuple[Tensor, Tensor]:
        """Computes D and D'.

        Args:
            scores: (..., L, S).
            excluded: Boolean, broadcastable to the scores; what is returned there does not matter. None: none is.
            training: Whether to draw noise, if this func_d has any.

        Returns:
            D(scores), and D'(scores) as a boolean or 0/1 tensor without gradient; both of the scores' shape.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forget(scores, excluded)")

    def forget_as_published(self, scores: Tensor, training: bool) -> Tuple[Tensor, Tensor]:
        """Computes D and D' as the official code does, for ``masking="paper"``; hidden keys are just low scores."""
        return self.forget(scores, None, training)

    def forward(self, scores: Tensor, training: Optional[bool] = None, dim: int = -1) -> Tuple[Tensor, Tensor]:
        """Forgets part of the scores; what stands around a softmax over keys that is written out.

        Args:
            scores: (..., L, S), with masks already added.
            training: Whether to draw noise; None: as ``self.training`` says.
            dim: The dimension of the keys, over which the softmax runs.

        Returns:
            D(scores), and the mask D'(scores) that multiplies the softmax.
        """
        if not torch.jit.is_scripting():
            if has_torch_function_unary(scores):
                return _dispatch_scores(self, scores, training, dim)
            _mark_used(self.host)
        noisy = self.training if training is None else training
        excluded = None if self.masking == "paper" else scores <= eager.lowest(scores.dtype)
        return self._forget_rows(scores, excluded, noisy, self.masking, dim)

    def _forget_rows(
        self, scores: Tensor, excluded: Optional[Tensor], training: bool, masking: str, dim: int
    ) -> Tuple[Tensor, Tensor]:
        """Computes D and D' with all that has to be seen to around them: excluded keys, and rows left empty."""
        if masking == "paper":
            excluded = None
            forgotten, mask = self.forget_as_published(scores, training)
        else:
            forgotten, mask = self.forget(scores, excluded, training)
        if excluded is not None:
            forgotten, mask = eager.exclude(forgotten, mask, excluded, dim)
        if self.empty == "plain":
            forgotten, mask = eager.keep_empty_rows(scores, forgotten, mask, excluded, dim)
        return forgotten, mask

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Optional[Tensor] = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Optional[float] = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention with partial forgetting, in place of ``torch.nn.functional.scaled_dot_product_attention``.

        See :func:`lwpf_patch.lwpf_attention` for the arguments.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102 - torch.jit.script reads only this form
            if has_torch_function((query, key, value)):
                return _dispatch_attention(self, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return self.attend(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            self.training,
            self.masking,
            self.backend,
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Optional[Tensor],
        dropout_p: float,
        is_causal: bool,
        scale: Optional[float],
        enable_gqa: bool,
        training: bool,
        masking: str,
        backend: str,
        alpha: float = 1.0,
    ) -> Tensor:
        """Computes attention; every argument of :func:`lwpf_patch.lwpf_attention` is given."""
        if not torch.jit.is_scripting():
            _mark_used(self.host)
            check_inputs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            device = query.device.type
            if _in_autocast(device):
                dtype = torch.get_autocast_dtype(device)
                query, key, value = _autocast(query, dtype), _autocast(key, dtype), _autocast(value, dtype)
                with torch.autocast(device, enabled=False):
                    return _attend_by_backend(
                        self, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, training, masking,
                        backend, alpha,
                    )  # fmt: skip
            return _attend_by_backend(
                self, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, training, masking,
                backend, alpha,
            )  # fmt: skip
        return self.attend_eagerly(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, training, masking, alpha
        )

    def attend_eagerly(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Optional[Tensor],
        dropout_p: float,
        is_causal: bool,
        scale: Optional[float],
        enable_gqa: bool,
        training: bool,
        masking: str,
        alpha: float = 1.0,
    ) -> Tensor:
        """Computes attention with the scores in memory: the specification; see :meth:`attend`."""
        dtype = query.dtype
        if dtype == torch.float16 or dtype == torch.bfloat16:  # thresholds and exponentials need float32
            query, key, value = query.float(), key.float(), value.float()
        if enable_gqa:
            key, value = eager.repeat_heads(query, key), eager.repeat_heads(query, value)
        scores, excluded = eager.attention_scores(query, key, attn_mask, is_causal, scale)
        forgotten, mask = self._forget_rows(scores, excluded, training, masking, -1)
        return eager.retrieve(forgotten, mask, value, dropout_p, alpha).to(dtype)

    def threshold_form(self) -> Optional[Tuple[Optional[float], Optional[float], float]]:
        """Returns what the fused backends compute with, for functions that keep the scores above a threshold.

        Returns:
            The threshold (None: the median), what a forgotten score becomes (None: the threshold), and the standard
            deviation of the noise; None for any other function.
        """
        return None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        unpickling.require_patch(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FuncD":
        return unpickling.deepcopy(self, memo)

    def __prepare_scriptable__(self) -> "FuncD":
        # A scripted model no longer runs Python, so that its use can only be seen here, when it is compiled.
        _mark_used(self.host)
        return self

    def extra_repr(self) -> str:
        """Shows the options, and those settings that are not the defaults."""
        defaults = {"empty": "zero", "masking": "exclude", "backend": "auto"}
        changed = [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join([*self._options(), *changed])

    def _options(self) -> list[str]:
        return []


class ReLU(FuncD):
    """Forgets the scores that are not positive: ``D(s) = max(s, 0)``, ``D'(s) = 1[s > 0]``.

    A row whose scores are all at most 0 forgets everything: its output, and every gradient through it, is 0.

    Args:
        empty: ``"zero"``, or ``"plain"`` for rows that forget nothing where they would forget everything; see
            :class:`FuncD`.

    Raises:
        SettingsError: A value that is neither.

    Example:
        >>> import torch, lwpf_patch
        >>> lwpf_patch.ReLU()(torch.tensor([[-1.0, 0.0, 2.0]]))
        (tensor([[0., 0., 2.]]), tensor([[False, False,  True]]))
    """

    def __init__(self, empty: str = "zero") -> None:
        super().__init__()
        self.empty = str(FUNC_D_OPTIONS["relu"]["empty"].read_from(empty, "empty", " (from ReLU(empty=...))"))

    def forget(self, scores: Tensor, excluded: Optional[Tensor], training: bool) -> Tuple[Tensor, Tensor]:
        """Computes D and D'; see :meth:`FuncD.forget`."""
        return scores.relu(), scores > 0

    def forget_as_published(self, scores: Tensor, training: bool) -> Tuple[Tensor, Tensor]:
        """Computes D and D' as the official code does."""
        forgotten = scores.relu()
        return forgotten, torch.heaviside(forgotten, torch.zeros_like(forgotten)).detach()

    def threshold_form(self) -> Optional[Tuple[Optional[float], Optional[float], float]]:
        """Returns the threshold 0; see :meth:`FuncD.threshold_form`."""
        return 0.0, 0.0, 0.0


class PFU(FuncD):
    """Partial forgetting unit: forgets the scores that are at most a threshold ``a``.

    ``D(s)`` is ``s`` where ``s > a`` and ``bias(a)`` elsewhere; ``D'(s) = 1[s > a]``; ``a = mu(s) + eps``, where
    ``eps`` is normal with standard deviation ``sigma ** 2`` in training and 0 in evaluation. The defaults are the
    published setting.

    Args:
        mu: The threshold: a number, or ``"dmedian"``, the median of the whole score tensor of the call, through which
            gradient flows. It couples the items of a batch, in evaluation too.
        bias: What a forgotten score becomes: a number, or ``"mu"``, the threshold itself.
        sigma: Square root of the noise's standard deviation (that is what the official code does).
        empty: As for :class:`ReLU`.

    Raises:
        SettingsError: A value that is none of these.
    """

    _mu: Optional[float]
    _bias: Optional[float]

    def __init__(
        self,
        bias: Union[float, str] = "mu",
        mu: Union[float, str] = "dmedian",
        sigma: float = 0.01,
        empty: str = "zero",
    ) -> None:
        super().__init__()
        given = {"bias": bias, "mu": mu, "sigma": sigma, "empty": empty}
        options = {
            name: FUNC_D_OPTIONS["pfu"][name].read_from(value, name, f" (from PFU({name}=...))")
            for name, value in given.items()
        }
        self.empty = str(options["empty"])
        self._mu = None if options["mu"] == "dmedian" else float(options["mu"])
        self._bias = None if options["bias"] == "mu" else float(options["bias"])
        self.sigma = float(options["sigma"])

    def threshold(self, scores: Tensor, excluded: Optional[Tensor], training: bool) -> Tensor:
        """Computes the threshold ``a`` of this call.

        Args:
            scores: (..., L, S).
            excluded: Boolean, broadcastable to the scores: not counted by the median. None: every score counts.
            training: Whether to add noise.

        Returns:
            A scalar tensor of the scores' dtype. NaN if a score that counts is NaN.
        """
        if not torch.jit.is_scripting():
            self._check_export()
        threshold = eager.find_threshold(scores, excluded, self._mu)
        if training and self.sigma > 0.0:
            noise = torch.randn(1, dtype=torch.float32, device=scores.device).squeeze(0)
            threshold = threshold + (noise * self.sigma**2).to(scores.dtype)
        return threshold

    def forget(self, scores: Tensor, excluded: Optional[Tensor], training: bool) -> Tuple[Tensor, Tensor]:
        """Computes D and D'; see :meth:`FuncD.forget`."""
        threshold = self.threshold(scores, excluded, training)
        return eager.forget(scores, threshold, self._bias, self._mu is None)

    def forget_as_published(self, scores: Tensor, training: bool) -> Tuple[Tensor, Tensor]:
        """Computes D and D' as the official code does: its order of operations, its draw, its ``0 * -inf = NaN``."""
        mu = self._mu
        threshold = scores.median() if mu is None else torch.full((), mu, dtype=scores.dtype, device=scores.device)
        if training:
            threshold = threshold + torch.randn(1).to(scores.device) * self.sigma**2
        h = (scores - threshold).relu()
        mask = torch.heaviside(h, torch.zeros_like(h)).detach()
        bias = self._bias
        forgotten = threshold if bias is None else torch.full_like(threshold, bias)
        # The official code promotes half precision to float32 here, in training only; ours stays in the scores' dtype.
        return (mask * scores + (1.0 - mask) * forgotten).to(scores.dtype), mask.to(scores.dtype)

    @torch.jit.unused
    def _check_export(self) -> None:
        """Raise where the median would get into a program that cannot hold it."""
        if self._mu is None and _is_in_onnx_export():
            raise UnsupportedError(
                f"{self} cannot be exported to ONNX, which has no median: give the threshold as a number, mu=<number> "
                "in place of mu=dmedian, the median of all scores"
            )

    def threshold_form(self) -> Optional[Tuple[Optional[float], Optional[float], float]]:
        """Returns the options; see :meth:`FuncD.threshold_form`."""
        return self._mu, self._bias, self.sigma**2

    def _options(self) -> list[str]:
        mu, bias = ("dmedian" if self._mu is None else self._mu), ("mu" if self._bias is None else self._bias)
        return [f"mu={mu}", f"bias={bias}", f"sigma={self.sigma}"]


class NoForgetting(FuncD):
    """Forgets nothing: plain attention, for one model or one block that shall stay as it is under a patched host."""

    def forget(self, scores: Tensor, excluded: Optional[Tensor], training: bool) -> Tuple[Tensor, Tensor]:
        """Returns the scores, all kept."""
        return scores, torch.ones_like(scores, dtype=torch.bool)

    def forward(self, scores: Tensor, training: Optional[bool] = None, dim: int = -1) -> Tuple[Tensor, Tensor]:
        """Returns the very scores and a mask of one element that keeps everything."""
        if not torch.jit.is_scripting():
            _mark_used(self.host)
        return scores, torch.ones((), dtype=torch.bool, device=scores.device)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Optional[Tensor],
        dropout_p: float,
        is_causal: bool,
        scale: Optional[float],
        enable_gqa: bool,
        training: bool,
        masking: str,
        backend: str,
        alpha: float = 1.0,
    ) -> Tensor:
        """Calls ``torch.nn.functional.scaled_dot_product_attention``, which has the softmax only."""
        if not torch.jit.is_scripting():
            if alpha != 1.0:
                return FuncD.attend(
                    self, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, training, masking,
                    backend, alpha,
                )  # fmt: skip
            _mark_used(self.host)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


class CustomFuncD(FuncD):
    """A forgetting function of the user's own.

    Args:
        function: Maps scores ``s`` to ``(D(s), D'(s))``, elementwise: both of the scores' shape, D' boolean or 0/1.
            In ``masking="exclude"`` it sees 0 in place of the scores of excluded keys.
    """

    def __init__(self, function: Callable[[Tensor], Tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.function = function

    def forget(self, scores: Tensor, excluded: Optional[Tensor], training: bool) -> Tuple[Tensor, Tensor]:
        """Computes D and D' with the user's function; see :meth:`FuncD.forget`.

        Raises:
            RuntimeError: The function did not return two tensors of the scores' shape.
        """
        if excluded is not None:
            scores = scores.masked_fill(excluded, 0.0)
        forgotten, mask = self.function(scores)
        if forgotten.shape != scores.shape or mask.shape != scores.shape:
            raise RuntimeError(
                f"func_d must return (D(s), D'(s)), two tensors of the scores' shape {list(scores.shape)}; it returned "
                f"shapes {list(forgotten.shape)} and {list(mask.shape)}"
            )
        return forgotten, mask.detach()

    def _options(self) -> list[str]:
        shown = not isinstance(self.function, nn.Module)  # a module is listed as a child anyway
        return [getattr(self.function, "__name__", repr(self.function))] if shown else []


_BUILT_IN = {"relu": ReLU, "pfu": PFU, "none": NoForgetting}


def make_func_d(func_d: Any, origin: str = "func_d") -> FuncD:
    """Makes a module from what the user gave as func_d.

    Args:
        func_d: Text such as ``"pfu:mu=dmedian,bias=mu,sigma=0.01"``, a :class:`FuncD`, or a callable that maps scores
            to ``(D(s), D'(s))``.
        origin: Where it came from, for the error messages.

    Returns:
        A :class:`FuncD`; the object itself if it is one.

    Raises:
        SettingsError: It is none of these, or a registered factory did not take its options.
    """
    if isinstance(func_d, FuncD):
        return func_d
    if isinstance(func_d, str):
        name, options = parse_func_d(func_d, origin)
        factory = func_d_factory(name)
        if factory is None:
            return _BUILT_IN[name](**options)
        try:
            made = factory(**options)
        except Exception as error:
            raise SettingsError(f"func_d {func_d!r} (from {origin}): its factory raised {error!r}") from error
        return make_func_d(made, f"the factory of {name!r}")
    if callable(func_d) and not inspect.isclass(func_d):
        return CustomFuncD(func_d)
    raise SettingsError(
        f"func_d {shown(func_d)} (from {origin}) is neither text, nor a FuncD, nor a function of scores: pass 'relu', "
        "lwpf_patch.PFU(...), or a callable that returns (D(s), D'(s))"
    )


def _attend_by_backend(
    func_d: FuncD,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    dropout_p: float,
    is_causal: bool,
    scale: Optional[float],
    enable_gqa: bool,
    training: bool,
    masking: str,
    backend: str,
    alpha: float,
) -> Tensor:
    form = func_d.threshold_form()
    chosen, why = backends.choose(backend, func_d, query, key, masking, value, alpha)
    _note_backend(func_d.host, chosen, why)
    if chosen == "eager" or form is None:
        return func_d.attend_eagerly(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, training, masking, alpha
        )
    mu, bias, deviation = form
    eps = None
    if training and deviation > 0.0:
        eps = torch.randn(1, dtype=torch.float32, device=query.device).squeeze(0) * deviation
    if chosen == "triton":
        return triton.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, mu, bias, eps, enable_gqa)
    if enable_gqa:
        key, value = eager.repeat_heads(query, key), eager.repeat_heads(query, value)
    return cpu.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, mu, bias, eps)


def _tracer(proxy: fx.Proxy) -> fx.Tracer:
    assert isinstance(proxy.tracer, fx.Tracer), "a func_d can only be traced as part of a module"
    return proxy.tracer


def _dispatch_scores(func_d: FuncD, scores: Any, training: Optional[bool], dim: int) -> Any:
    """Hands the call to a tensor-like argument; in a trace by torch.fx it becomes a call of that very module.

    So a traced model follows train() and eval().
    """
    from .attention import partial_forgetting

    if isinstance(scores, fx.Proxy):
        return _tracer(scores).create_proxy(
            "call_module", _tracer(scores).path_of_module(func_d), (scores, training, dim), {}
        )
    return handle_torch_function(partial_forgetting, (scores,), scores, func_d=func_d, training=training, dim=dim)


def _dispatch_attention(func_d: FuncD, query: Any, key: Any, value: Any, *options: Any) -> Any:
    """Hands the call to tensor-like arguments; in a trace by torch.fx it becomes a call of that very module's method.

    A method and not our public function, because torch.jit.script cannot pass a module to a function.
    """
    from .attention import lwpf_attention

    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, options, strict=True))
    if isinstance(query, fx.Proxy):
        tracer = _tracer(query)
        module = tracer.create_proxy("get_attr", tracer.path_of_module(func_d), (), {})
        method = func_d.scaled_dot_product_attention.__name__
        return tracer.create_proxy("call_method", method, (module, query, key, value), given)
    return handle_torch_function(lwpf_attention, (query, key, value), query, key, value, func_d=func_d, **given)


def _in_autocast(device: str) -> bool:
    """Returns whether autocast is on for a kind of device; some, such as meta, do not know it."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # before 2.7 torch.compile stopped at it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts as autocast does for SDPA: every floating tensor but float64."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    dropout_p: float,
    is_causal: bool,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> None:
    """Check the arguments of the operator.

    Raises:
        TypeError: Something else than a tensor, a number or a boolean where SDPA wants one.
        RuntimeError: Shapes, dtypes or devices that do not go together, as SDPA raises it.
        IndexError: Heads to be shared, and a tensor without a dimension of heads.
    """
    named = (("query", query), ("key", key), ("value", value))
    _check_types(named, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    for name, tensor in named:
        if tensor.dim() < 2:
            raise RuntimeError(
                f"lwpf_attention: {name} must have at least 2 dimensions, got shape {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise RuntimeError(f"lwpf_attention: {name} must be of a floating dtype, got {tensor.dtype}")
    autocast = _in_autocast(query.device.type)
    if not query.dtype == key.dtype == value.dtype and not autocast:
        got = ", ".join(f"{name} {tensor.dtype}" for name, tensor in named)
        raise RuntimeError(f"lwpf_attention: query, key and value must have the same dtype, got {got}")
    if not query.device == key.device == value.device:
        got = ", ".join(f"{name} on {tensor.device}" for name, tensor in named)
        raise RuntimeError(f"lwpf_attention: query, key and value must be on the same device, got {got}")
    if query.size(-1) != key.size(-1) or key.size(-2) != value.size(-2):
        raise RuntimeError(
            "lwpf_attention: query (..., L, E), key (..., S, E) and value (..., S, Ev) must agree in E and S, got "
            + _shapes(named)
        )
    if enable_gqa:
        _check_heads(named)
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"lwpf_attention: dropout_p must be a probability, got {dropout_p}")
    if attn_mask is None:
        return
    if is_causal:
        raise RuntimeError("lwpf_attention: attn_mask and is_causal=True exclude each other; put causality in the mask")
    _check_mask(query, key, attn_mask, autocast, enable_gqa)


def _check_types(
    tensors: Tuple[Tuple[str, Any], ...], attn_mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> None:
    for name, tensor in (*tensors, ("attn_mask", attn_mask)):
        if not isinstance(tensor, Tensor) and (name != "attn_mask" or tensor is not None):
            raise TypeError(f"lwpf_attention: {name} must be a tensor, got {type(tensor).__name__}")
    for name, number in (("dropout_p", dropout_p), ("scale", scale)):
        # Of tensors and NumPy's numbers PyTorch takes those without a dimension.
        if not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)) and getattr(number, "ndim", None) != 0:
            if name == "scale" and number is None:
                continue
            raise TypeError(f"lwpf_attention: {name} must be a number, got {type(number).__name__}")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"lwpf_attention: {name} must be True or False, got {type(flag).__name__}")


def _check_heads(named: Tuple[Tuple[str, Tensor], ...]) -> None:
    if any(tensor.dim() < 3 for _, tensor in named):
        raise IndexError(f"lwpf_attention: enable_gqa needs a dimension of heads, (..., H, L, E); got {_shapes(named)}")
    heads = named[0][1].size(-3)
    # No head at all can be shared by any number of them: there is nothing to attend to.
    if any(tensor.size(-3) > 0 and heads % tensor.size(-3) != 0 for _, tensor in named):
        raise RuntimeError(
            "lwpf_attention: with enable_gqa the numbers of heads of key and value must divide that of the query, got "
            + _shapes(named)
        )


def _check_mask(query: Tensor, key: Tensor, attn_mask: Tensor, autocast: bool, enable_gqa: bool) -> None:
    dtype = attn_mask.dtype
    fits = dtype in (torch.bool, torch.float32, query.dtype)
    if autocast and attn_mask.is_floating_point():  # which casts all but float64
        fits = (dtype == torch.float64) == (query.dtype == torch.float64)
    if not fits:
        raise RuntimeError(
            f"lwpf_attention: attn_mask must be boolean, float32 or of the query's dtype {query.dtype}, got {dtype}"
        )
    if attn_mask.device != query.device:
        raise RuntimeError(f"lwpf_attention: attn_mask is on {attn_mask.device}, query on {query.device}")
    wanted: Tuple[int, ...] = (query.size(-2), key.size(-2))
    if attn_mask.dim() > 2:
        of_key = key.shape[:-2]
        if enable_gqa:
            of_key = torch.Size((*key.shape[:-3], query.size(-3)))
        wanted = (*batch_shape(query.shape[:-2], of_key), *wanted)
    common = min(attn_mask.dim(), len(wanted))
    # Of equal lengths, as torch.compile wants them.
    sizes = zip(attn_mask.shape[attn_mask.dim() - common :], wanted[len(wanted) - common :], strict=True)
    if attn_mask.dim() > max(2, len(wanted)) or any(size not in (1, extent) for size, extent in sizes):
        raise RuntimeError(
            "lwpf_attention: attn_mask must be broadcastable to the scores, (..., L, S) = "
            f"(..., {', '.join(map(str, wanted))}), got shape {list(attn_mask.shape)}"
        )


def _shapes(named: Tuple[Tuple[str, Tensor], ...]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in named)
