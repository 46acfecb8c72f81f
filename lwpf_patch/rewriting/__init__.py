"""Rewriting: a host's source, spliced and compiled, without importing it."""

from .edits import forget_around_softmax, hide, map_query, normalise_call, sdpa_calls, softmax_call, softmax_scores
from .plan import Codes, Plan, defines, plan, source_of
from .source import Edit, Function, Splice, called_name
from .tracking import check_scores, check_unchanged, check_unused

__all__ = [
    "Codes",
    "Edit",
    "Function",
    "Plan",
    "Splice",
    "called_name",
    "check_scores",
    "check_unchanged",
    "check_unused",
    "defines",
    "forget_around_softmax",
    "hide",
    "map_query",
    "normalise_call",
    "plan",
    "sdpa_calls",
    "softmax_call",
    "softmax_scores",
    "source_of",
]
