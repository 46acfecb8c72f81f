"""Rewriting: a host's source, spliced and compiled, without importing it."""

from .plan import Folding, Plan, Site, has_site, plan, source_of
from .source import Edit, Function, Splice, attention

__all__ = ["Edit", "Folding", "Function", "Plan", "Site", "Splice", "attention", "has_site", "plan", "source_of"]
