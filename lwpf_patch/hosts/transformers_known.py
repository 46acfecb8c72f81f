"""Which functions of transformers the host relies on, and whether they are those that the tests have passed with.

They are not rewritten, but :func:`lwpf_patch.hosts.transformers.attend` stands in for each ``eager_attention_forward``
of a model, and computes what ``sdpa_mask`` leaves out of a mask. Each is known by the hash of its syntax tree, without
annotations, whatever file it is in: ``tests/record_sources.py transformers`` records them.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from ..rewriting.plan import tree_hash
from . import known

HOST = "transformers"
#: The eager attention of a model: many models have the same.
EAGER = "eager_attention_forward"
#: What makes a boolean mask, or leaves it out, and what computes with that, by module.
MASKS = {
    "transformers.masking_utils": ("sdpa_mask", "_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"),
    "transformers.integrations.sdpa_attention": ("sdpa_attention_forward",),
}
#: What an eager attention is given by name that ``attend`` takes, or that says again what the mask does.
PARAMETERS = frozenset({
    "scaling", "dropout", "position_bias", "softcap", "head_mask", "sinks", "sliding_window", "output_attentions",
})  # fmt: skip


def hash_of(source: str) -> str:
    """Return the hash of a function, whatever its name is, given its source.

    Raises:
        ValueError: It is the source of something else.
    """
    (function,) = ast.parse(textwrap.dedent(source)).body
    if not isinstance(function, ast.FunctionDef):
        raise ValueError("not a function")
    function.name, function.returns = "", None
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            node.annotation = None
    return tree_hash(function)


def is_known(function: Callable[..., Any], name: str) -> bool:
    """Return whether the tests have passed with a function, which is recorded by a name."""
    try:
        digest = hash_of(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError, SyntaxError, ValueError):  # there is no source, or it is more than a function
        return False
    return digest in known.sources(HOST, name)


@functools.cache
def eager_is_known(function: Callable[..., Any]) -> bool:
    """Return whether the eager attention of a model is one that the tests have passed with."""
    return is_known(function, EAGER)


@functools.cache
def unknown_masks() -> tuple[str, ...]:
    """Return the names of the functions that make masks of SDPA and are not those that the tests have passed with."""
    return tuple(name for name, function in mask_functions().items() if not is_known(function, name))


def mask_functions() -> dict[str, Callable[..., Any]]:
    """Return the functions that make masks of SDPA, by the names they go by; a version may have fewer."""
    found = {}
    for module, names in MASKS.items():
        there = vars(importlib.import_module(module))
        found.update({name: there[name] for name in names if name in there})
    return found
