"""Rewriting: a host's source, spliced and compiled, without importing it."""

from .edits import forget_around_softmax, hide, map_query, sdpa_calls, softmax_call
from .plan import Codes, Plan, defines, plan, source_of
from .source import Edit, Function, Splice

__all__ = [
    "Codes",
    "Edit",
    "Function",
    "Plan",
    "Splice",
    "defines",
    "forget_around_softmax",
    "hide",
    "map_query",
    "plan",
    "sdpa_calls",
    "softmax_call",
    "source_of",
]
