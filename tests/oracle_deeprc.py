"""DeepRC with partial forgetting, written out as the specification of the tests.

It calls nothing of the package. The three networks of the DeepRC are called as they are, in the numeric types in which
DeepRC calls them, so that the attention activations are bit by bit those of upstream: what is forgotten hangs on them.
What stands between activations and output network is float64. Gradients are autograd's. Where everything is forgotten,
a parameter may have no gradient (None) where upstream's is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from oracle import Forgetting, forget, normalised, resolve_threshold
from torch import Tensor, nn


def deeprc_forward(
    module: nn.Module,
    inputs_flat: Tensor,
    sequence_lengths_flat: Tensor,
    n_sequences_per_bag: Tensor,
    *,
    func_d: Forgetting,
    eps_per_bag: Sequence[float] | None = None,
    alpha: float = 1.0,
    n: float = 0.0,
) -> Tensor:
    """What DeepRC.forward gives if the attention activations of each bag are partially forgotten.

    Args:
        module: The DeepRC.
        inputs_flat: The sequences of all bags, shape (sequences, positions, features).
        sequence_lengths_flat: Shape (sequences,).
        n_sequences_per_bag: Shape (bags,).
        func_d: What is forgotten; dmedian is that of a bag. Its own eps has to be 0.
        eps_per_bag: The noise of each bag; None is no noise.
        alpha: The normalisation is that of `oracle.entmax`; 1 is the softmax.
        n: Added to the denominator of the softmax.

    Returns:
        The predictions, shape (bags, outputs), in the type that the output network gives.
    """
    if func_d.eps:
        raise ValueError("the noise of each bag is given by eps_per_bag")
    sizes = n_sequences_per_bag.tolist()
    noise = [0.0] * len(sizes) if eps_per_bag is None else [float(eps) for eps in eps_per_bag]

    # DeepRC embeds in half precision by default and goes on in float32, whatever the module was converted to.
    embedded = module.sequence_embedding(inputs_flat, sequence_lengths=sequence_lengths_flat).float()
    activations = module.attention_nn(embedded)
    if activations.shape[1:] != (1,):
        raise ValueError("DeepRC attends with one head")

    # Upstream lets the sum of the bags' sizes be smaller than the number of sequences.
    bags, begin = [], 0
    for size, eps in zip(sizes, noise, strict=True):
        scores = activations[begin : begin + size, 0].double()
        features = embedded[begin : begin + size].double()
        begin += size

        func_d = dataclasses.replace(func_d, eps=eps)
        threshold, forgotten_value = resolve_threshold(func_d, [scores])
        forgotten, indicator = forget(func_d, scores, threshold, forgotten_value)
        weights = normalised(forgotten, alpha, n) * indicator
        bags.append((weights[:, None] * features).sum(0))
    # The type in which DeepRC hands them to the output network.
    return module.output_nn(torch.stack(bags).to(torch.promote_types(embedded.dtype, activations.dtype)))
