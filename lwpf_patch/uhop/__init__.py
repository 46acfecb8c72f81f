"""U-Hop (Wu et al., ICML 2024): separating stored patterns, and retrieving them."""

from .host_map import FoldedFeatureMap, HostFeatureMap, NoFeatureMap, without_module
from .stage_one import watch_optimizers

__all__ = ["FoldedFeatureMap", "HostFeatureMap", "NoFeatureMap", "without_module"]

watch_optimizers()
