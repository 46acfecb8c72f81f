"""The operator: drop-in for ``scaled_dot_product_attention``, and its form for a softmax that is written out."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from ..backends import Call
from ..forgetting import FuncD
from ..options import check_name
from ..settings import BACKENDS, DEFAULTS, MASKINGS, VERIFICATIONS
from ..specs import FuncDLike, Sep, SepLike, parse_sep
from .computing import attend
from .owned import OwnedFuncD, rule_of


def lwpf_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    func_d: FuncDLike,
    training: bool | None = None,
    masking: str | None = None,
    backend: str | None = None,
    enable_gqa: bool = False,
    sep: SepLike | None = None,
    verify: str | None = None,
) -> Tensor:
    """Attention with partial forgetting (Ota et al., AISTATS 2023), with the signature of SDPA.

    It stands in for ``torch.nn.functional.scaled_dot_product_attention``.

    Computes ``s = scale * q k^T (+ mask)``, ``(D, D') = func_d(s)``, ``w = dropout(sep(D))`` and returns
    ``(D' * w) v``: a forgotten key keeps its part of the denominator but gives no value. Half precision is computed in
    float32; under autocast the inputs are cast as for SDPA. Second derivatives,
    and the transforms of torch.func, have the fused backends compute with the scores in memory, as ``"eager"`` does.

    Args:
        query: (..., L, E).
        key: (..., S, E).
        value: (..., S, Ev).
        attn_mask: Broadcastable to (..., L, S): boolean (True takes part), or floating, added to the scores.
        dropout_p: Probability that a weight is dropped. Applied whenever it is above 0, as SDPA does.
        is_causal: Whether query i sees the keys 0 to i only. Excludes ``attn_mask``.
        scale: Factor of the scores, None for ``E ** -0.5``.
        func_d: The forgetting function: text such as ``"relu"``, a :class:`lwpf_patch.FuncD`, or a callable that maps
            scores to ``(D(s), D'(s))``.
        training: Whether PFU draws its noise. None: as the ``training`` of a :class:`lwpf_patch.FuncD` says, and False
            for text and callables.
        masking: ``"exclude"`` or ``"paper"``; None: the func_d's own, which is ``"exclude"`` by default.
        backend: Which implementation computes; None: the func_d's own, which is ``"auto"`` by default.
        enable_gqa: Whether several query heads share a key and value head, as in SDPA.
        sep: The normalisation; None: the func_d's own, which is ``"softmax"`` by default. ``"softmax_n:n=1"`` adds n, a
            number of at least 0 (1 if it is left out), to the denominator of the softmax. Of U-Hop (Wu et al., ICML
            2024) are ``"sparsemax"``, ``"entmax15"``, and alpha from 1 to 2, which need the package ``entmax`` and the
            backend ``"eager"``, which ``"auto"`` takes then.
        verify: When the kernels of a GPU are checked against the eager form, as for :func:`lwpf_patch.apply`; None: as
            the func_d says, which is ``"first"`` by default.

    Returns:
        The output, (..., L, Ev), of the query's dtype.

    Raises:
        SettingsError: An unknown func_d, masking, backend or sep, a backend that cannot do what is asked, or no
            ``entmax``.
        RuntimeError: Shapes, dtypes or devices that do not go together.
        TypeError: Something else than a tensor, a number or a boolean where one is wanted.
    """
    if has_torch_function((query, key, value)):
        return handle_torch_function(
            lwpf_attention, (query, key, value), query, key, value, attn_mask=attn_mask, dropout_p=dropout_p,
            is_causal=is_causal, scale=scale, func_d=func_d, training=training, masking=masking, backend=backend,
            enable_gqa=enable_gqa, sep=sep, verify=verify,
        )  # fmt: skip
    if masking is not None:
        masking = check_name("masking", masking, "lwpf_attention(masking=...)", MASKINGS)
    if backend is not None:
        backend = check_name("backend", backend, "lwpf_attention(backend=...)", BACKENDS)
    if verify is not None:
        verify = check_name("verify", verify, "lwpf_attention(verify=...)", VERIFICATIONS)
    rule = rule_of(func_d, "lwpf_attention(func_d=...)")
    owned = func_d if isinstance(func_d, OwnedFuncD) else None
    attn_mask = owned.with_infinity(attn_mask) if owned else attn_mask
    own: dict[str, Any] = {name: getattr(owned, name) for name in DEFAULTS} if owned else DEFAULTS
    if owned is not None and owned.left_plain:
        rule, own = owned.rule_here(), {**own, "sep": owned.sep_here()}
    normalisation = Sep(*own["sep"]) if sep is None else parse_sep(sep, "lwpf_attention(sep=...)")
    call = Call(
        query, key, value, rule, attn_mask, dropout_p, is_causal, scale, enable_gqa, _training(func_d, training),
        masking or own["masking"], normalisation, verify or own["verify"],
    )  # fmt: skip
    return attend(call, backend or own["backend"], owned.host if owned else "")


def partial_forgetting(
    scores: Tensor, *, func_d: FuncDLike, training: bool | None = None, dim: int = -1
) -> tuple[Tensor, Tensor]:
    """Forget part of the scores, before a softmax that is written out: the paper's ``attn, mask = func_d(attn)``.

    Args:
        scores: (..., L, S), with masks already added.
        func_d: As for :func:`lwpf_attention`.
        training: As for :func:`lwpf_attention`.
        dim: The dimension of the keys, over which the softmax runs.

    Returns:
        D(scores), and the mask D'(scores) that multiplies the softmax.

    Raises:
        SettingsError: An unknown func_d.
        TypeError: The scores are no tensor.
    """
    if has_torch_function_unary(scores):
        return handle_torch_function(partial_forgetting, (scores,), scores, func_d=func_d, training=training, dim=dim)
    if not isinstance(scores, Tensor):
        raise TypeError(f"partial_forgetting: scores must be a tensor, got {type(scores).__name__}")
    module = func_d if isinstance(func_d, OwnedFuncD) else rule_of(func_d, "partial_forgetting(func_d=...)")
    return module(scores, _training(func_d, training), dim)


def _training(func_d: Any, training: bool | None) -> bool:
    if training is not None:
        return training
    return isinstance(func_d, (FuncD, OwnedFuncD)) and func_d.training
