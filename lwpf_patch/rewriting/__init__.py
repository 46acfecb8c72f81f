"""Rewriting: a host's source, spliced and compiled, without importing it."""

from .edits import forget_around_softmax, map_query
from .plan import Plan, defines, plan, source_of
from .source import Edit, Function, Splice

__all__ = ["Edit", "Function", "Plan", "Splice", "defines", "forget_around_softmax", "map_query", "plan", "source_of"]
