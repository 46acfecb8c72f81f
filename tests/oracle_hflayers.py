"""hflayers' HopfieldCore with partial forgetting, written out as the specification of the tests.

It calls nothing of the package and nothing of hflayers, only reads the parameters and the options of a HopfieldCore.
One head of one batch item at a time, one query row at a time, float64 only; gradients are autograd's. Where everything
is forgotten, a parameter may have no gradient (None) where upstream's is zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from oracle import Forgetting, dots, forget, normalised, resolve_threshold
from torch import Tensor, nn

#: Weight and bias of an affine map.
_Affine = tuple[Tensor, Tensor | None]


@dataclass
class _Head:
    """One head of one batch item, and how far its retrieval has come."""

    number: int  # which head of the module it is
    state: Tensor  # (L, width), the scaled queries of the last scoring
    key: Tensor  # (S, width), where S counts the zero key too
    value: Tensor  # (S, any)
    visible: list[list[int]]  # for every query row, the keys that no mask hides
    bias: Tensor | None  # (L, S), an additive mask
    xi: Tensor  # (L, S)
    indicator: Tensor  # (L, S), D' of the last iteration


@dataclass
class _Row:
    """One query row: the keys that are in the softmax, and their scores."""

    head: _Head
    keys: list[int]
    scores: Tensor


def hopfield_core(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    func_d: Forgetting,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    scaling: float | Tensor | None = None,
    update_steps_max: int | Tensor | None = 0,
    update_steps_eps: float | Tensor = 1e-4,
    return_raw_associations: bool = False,
    return_pattern_projections: bool = False,
    dropout_keep: Tensor | None = None,
    masking: str = "exclude",
    eps_per_step: Sequence[float] | None = None,
    feature_map: Tensor | None = None,
    alpha: float = 1.0,
    n: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What a HopfieldCore gives whose scores are partially forgotten in every update iteration.

    Args:
        module: The HopfieldCore, float64.
        query: Shape (L, N, any).
        key: Shape (S, N, any).
        value: Shape (S, N, any).
        func_d: What is forgotten. Its own eps has to be 0.
        key_padding_mask: Boolean (True hides), shape (N, S).
        need_weights: Whether the second result is wanted.
        attn_mask: Boolean (True hides) or additive, shape (L, S) or (N * heads, L, S).
        scaling: As in HopfieldCore.
        update_steps_max: As in HopfieldCore; None or a negative number iterates until convergence.
        update_steps_eps: As in HopfieldCore.
        return_raw_associations: Whether the third result is wanted.
        return_pattern_projections: Whether the fourth result is wanted.
        dropout_keep: Boolean, shape (N * heads, L, S), or (N, heads, L, S), where S counts the zero key too. Its rate
            is the module's. None is no dropout, also in training.
        masking: "exclude" takes hidden keys out; "paper" puts them in as scores of -inf, as the official code does.
        eps_per_step: The noise of each iteration, which may be more than are made; None is no noise.
        feature_map: The matrices of U-Hop's Φ, shape (heads, width, width), that map query and key in each scoring.
        alpha: The normalisation of each iteration is that of `oracle.entmax`; 1 is the softmax.
        n: Added to the denominator of the softmax of each iteration.

    Returns:
        The output, the weights averaged over the heads (after dropout and D'), xi (before both), the projected values.
    """
    if masking not in ("exclude", "paper"):
        raise ValueError(f"unknown masking {masking!r}")
    if func_d.eps:
        raise ValueError("the noise of each iteration is given by eps_per_step")
    if {tensor.dtype for tensor in (query, key, value, *module.parameters())} != {torch.float64}:
        raise TypeError("the oracle wants float64")
    if scaling is not None and not isinstance(scaling, float | Tensor):
        raise TypeError("HopfieldCore takes a float or a tensor of scaling")

    n_head, n_item = module.num_heads, value.shape[1]
    heads = _heads(module, query, key, value, attn_mask, key_padding_mask, masking)
    limits = _per_head(-1 if update_steps_max is None else update_steps_max, n_head)
    tolerances = _per_head(update_steps_eps, n_head)

    # A module's head is active in all batch items or in none.
    active, step = [True] * n_head, 0
    while any(active):
        before = [head.xi.detach() for head in heads]
        for head in heads:
            # In the first iteration the state is the projected query.
            if step > 0 and active[head.number]:
                head.state = head.xi @ head.key
            # An inactive head keeps its state, but is scaled once more in every iteration that others make. No xi
            # shows it, but the median and D' of that iteration are made from all scores.
            side_by_side = step == 0 and not module.query_as_static
            head.state = _scaled(head.state, scaling, n_head, head.number if side_by_side else None)

        eps = 0.0 if eps_per_step is None else float(eps_per_step[step])
        _iterate(heads, dataclasses.replace(func_d, eps=eps), active, masking, feature_map, alpha, n)

        for number in range(n_head):
            goes_on = limits[number] < 0 or step < limits[number]
            if step > 0:
                moved = [
                    (old - head.xi.detach()).square().sum().sqrt()
                    for old, head in zip(before, heads, strict=True)
                    if head.number == number
                ]
                # The maximum of a tensor is NaN if one of its entries is, and NaN is not greater.
                goes_on = goes_on and torch.stack(moved).max().item() > tolerances[number]
            active[number] = goes_on
        step += 1

    weights = [head.xi for head in heads]
    if dropout_keep is not None:
        # No division when nothing is kept, so that p = 1 gives 0 and not 0 * inf.
        factor = 1.0 / (1.0 - module.dropout) if module.dropout < 1.0 else 0.0
        keeps = dropout_keep.reshape(len(heads), *heads[0].xi.shape).unbind(0)
        weights = [weight * keep.to(weight.dtype) * factor for weight, keep in zip(weights, keeps, strict=True)]
    weights = [weight * head.indicator for weight, head in zip(weights, heads, strict=True)]

    retrieved = [weight @ head.value for weight, head in zip(weights, heads, strict=True)]
    items = [torch.cat(retrieved[first : first + n_head], dim=-1) for first in range(0, len(heads), n_head)]
    output = torch.stack(items, dim=1)
    if module.out_proj is not None:
        output = _affine(output, (module.out_proj.weight, module.out_proj.bias))

    def by_item(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).reshape(n_item, n_head, *parts[0].shape)

    return (
        output,
        by_item(weights).sum(1) / n_head if need_weights else None,
        by_item([head.xi for head in heads]) if return_raw_associations else None,
        by_item([head.value for head in heads]) if return_pattern_projections else None,
    )


def _iterate(
    heads: list[_Head],
    func_d: Forgetting,
    active: list[bool],
    masking: str,
    feature_map: Tensor | None,
    alpha: float,
    n: float,
) -> None:
    """Scores all heads, sets the indicator of all and xi of the active ones."""
    # The scores of all rows come first: dmedian needs all of them before any row can go on.
    rows = []
    for head in heads:
        for number, one_query in enumerate(head.state.unbind(0)):
            if feature_map is None:
                scores = dots(head.key, one_query)
            else:
                matrix = feature_map[head.number]
                scores = torch.stack([(matrix @ one_key) @ (matrix @ one_query) for one_key in head.key])
            if head.bias is not None:
                scores = scores + head.bias[number]
            keys = head.visible[number]
            scores = scores[keys]
            if masking == "paper":
                scores = _spread(scores, keys, head.key.shape[0], -math.inf)
                keys = list(range(head.key.shape[0]))
            rows.append(_Row(head, keys, scores))

    if func_d.kind == "pfu" and func_d.mu == "dmedian" and any(row.scores.isnan().any() for row in rows):
        # In "paper" an earlier iteration may have left NaN, and the median of the official code is NaN then.
        threshold = math.nan
        forgotten_value: Tensor | float = math.nan if func_d.bias == "mu" else float(func_d.bias)
    else:
        threshold, forgotten_value = resolve_threshold(func_d, [row.scores for row in rows])

    xis: dict[int, list[Tensor]] = {id(head): [] for head in heads}
    indicators: dict[int, list[Tensor]] = {id(head): [] for head in heads}
    for row in rows:
        n_key = row.head.key.shape[0]
        if row.keys:
            forgotten, indicator = forget(func_d, row.scores, threshold, forgotten_value)
            xi = _spread(normalised(forgotten, alpha, n), row.keys, n_key, 0.0)
            indicator = _spread(indicator, row.keys, n_key, 0.0)
        else:
            # Nothing to choose from: the next state has to be finite, so D is 0 everywhere. D' takes it all out again.
            xi, indicator = row.scores.new_full((n_key,), 1.0 / (n + n_key)), row.scores.new_zeros(n_key)
        xis[id(row.head)].append(xi)
        indicators[id(row.head)].append(indicator)
    for head in heads:
        head.indicator = torch.stack(indicators[id(head)])
        if active[head.number]:
            head.xi = torch.stack(xis[id(head)])


def _heads(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    masking: str,
) -> list[_Head]:
    """The heads before the first iteration: all of the first batch item, then all of the second, and so on.

    bias_k and bias_v have no part in it. hflayers appends them if two options are None which are always True or False,
    so it never does.
    """
    n_head, n_query, n_key = module.num_heads, query.shape[0], key.shape[0]
    # Two static inputs bring their own width; all other combinations are checked against the module's by hflayers.
    width = query.shape[2] if module.query_as_static and module.key_as_static else module.head_dim
    maps = _maps(module, width)

    queries, keys = (
        _split(_affine(x, maps[name]), n_head) if name in maps else _repeated(x, n_head)
        for name, x in (("q", query), ("k", key))
    )
    if module.normalize_pattern:
        # Only here: neither the states of later iterations nor the values are normalised.
        queries = [_normalised(module, x) for x in queries]
        keys = [_normalised(module, x) for x in keys]

    if module.value_as_connected and "k" in maps:
        value = _affine(value, maps["k"])
    if "v" in maps:
        values = _split(_affine(value, maps["v"]), n_head)
    elif not module._qkv_same_embed_dim and (module.value_as_connected or module.key_as_static):
        # With separate weights these static values are cut into heads and not repeated for each.
        values = _split(value, n_head)
    else:
        values = _repeated(value, n_head)

    heads = []
    for place, (one_query, one_key, one_value) in enumerate(zip(queries, keys, values, strict=True)):
        item, number = divmod(place, n_head)
        mask = attn_mask[place] if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
        padding = None if key_padding_mask is None else key_padding_mask[item]
        visible, bias = _masks(mask, padding, n_query, n_key, masking)
        if module.add_zero_attn:
            one_key, one_value = _with_zero(one_key, 0), _with_zero(one_value, 0)
            visible = [[*row, n_key] for row in visible]
            bias = None if bias is None else _with_zero(bias, 1)
        empty = one_query.new_zeros(n_query, one_key.shape[0])
        heads.append(_Head(number, one_query, one_key, one_value, visible, bias, xi=empty, indicator=empty))
    return heads


def _maps(module: nn.Module, width: int) -> dict[str, _Affine]:
    """The projections of those of q, k and v that are not static."""
    static = {"q": module.query_as_static, "k": module.key_as_static, "v": module.value_as_static}
    maps = {}
    begin = 0  # parameters that several projections share have rows for the non-static ones only, in this order
    for name in "qkv":
        if static[name]:
            continue
        end: int | None = begin + module.num_heads * width
        if module._qkv_same_embed_dim:
            weight = module.in_proj_weight[begin:end]
        else:
            weight = getattr(module, f"{name}_proj_weight")
            # Values may have another width.
            end = None if name == "v" else end
        maps[name] = (weight, None if module.in_proj_bias is None else module.in_proj_bias[begin:end])
        begin += module.num_heads * width
    return maps


def _affine(x: Tensor, parameters: _Affine) -> Tensor:
    """An affine map of the last dimension."""
    weight, bias = parameters
    y = x @ weight.T
    return y if bias is None else y + bias


def _split(x: Tensor, n_head: int) -> list[Tensor]:
    """Cuts the features of (any, N, features) into heads: all heads of an item are neighbours."""
    return [part for item in x.unbind(1) for part in item.unflatten(-1, (n_head, -1)).unbind(1)]


def _repeated(x: Tensor, n_head: int) -> list[Tensor]:
    """Gives every head a static input, in the order in which hflayers does."""
    # It lays the copies out with all items of a head as neighbours and reads them as `_split` orders them. With more
    # than one head and item, a head of one item thus gets what belongs to another item.
    return list(x.unbind(1)) * n_head


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """Layer normalisation of each row."""
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + module.normalize_pattern_eps).sqrt()
    if module.p_norm_weight is not None:
        x = x * module.p_norm_weight + module.p_norm_bias
    return x


def _scaled(x: Tensor, scaling: float | Tensor | None, n_head: int, place: int | None) -> Tensor:
    """Scales the queries (L, width) of a head.

    Args:
        x: The queries.
        scaling: A number or one entry for each head.
        n_head: How many heads there are.
        place: The head's place among all heads if hflayers has their features side by side in one dimension then.

    Raises:
        ValueError: Where hflayers fails for want of a matching shape.
    """
    if not isinstance(scaling, Tensor):
        return x if scaling is None else x * scaling
    # Meant is an entry for each head, but hflayers deals the entries out to the features, again and again in turn.
    width = x.shape[1]
    if place is None and width % n_head:
        raise ValueError(f"{width} features cannot be scaled by {n_head} entries")
    first = 0 if place is None else place * width
    return x * scaling[[(first + feature) % n_head for feature in range(width)]]


def _masks(
    mask: Tensor | None, padding: Tensor | None, n_query: int, n_key: int, masking: str
) -> tuple[list[list[int]], Tensor | None]:
    """Returns the keys that each query row may see, and the mask if it is additive.

    In "paper" an additive -inf is an addend like any other, and does not replace the score as a boolean does: a score
    of NaN, which an earlier iteration may have left, stays NaN.
    """
    bias = None
    hidden = torch.zeros(n_query, n_key, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | mask
    elif mask is not None:
        bias = mask.to(torch.float64)
        if masking == "exclude":
            hidden = hidden | (bias.detach() == -math.inf)
    if padding is not None:
        if padding.dtype != torch.bool:
            raise TypeError("HopfieldCore takes a boolean padding mask")
        hidden = hidden | padding
    return [[j for j, out in enumerate(row) if not out] for row in hidden.tolist()], bias


def _with_zero(x: Tensor, dim: int) -> Tensor:
    """Appends one zero, or one row of zeros."""
    return torch.cat([x, torch.zeros_like(x.narrow(dim, 0, 1))], dim)


def _spread(entries: Tensor, places: list[int], size: int, elsewhere: float) -> Tensor:
    """A row that has the entries in these places."""
    return entries.new_full((size,), elsewhere).index_copy(0, torch.tensor(places, dtype=torch.long), entries)


def _per_head(option: float | Tensor, n_head: int) -> list[float]:
    """An option that is one number for all heads or one for each."""
    return option.tolist() if isinstance(option, Tensor) else [option] * n_head
