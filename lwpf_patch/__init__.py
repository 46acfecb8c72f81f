"""Learning with partial forgetting (LwPF) and U-Hop for the attention of unmodified libraries.

    import lwpf_patch
    lwpf_patch.apply("timm")

Importing this package imports no torch; that happens when something is patched or computed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "patching.registry": ("apply", "revert", "patched", "status"),
    "patching.models": ("patch_model", "unpatch_model"),
    "patching.folding": ("fold",),
    "observing.maps": ("AttentionMap", "attention_maps"),
    "observing.requesting": ("observe",),
    "attention": ("HostFuncD", "lwpf_attention", "partial_forgetting"),
    "uhop.retrieval": ("retrieve",),
    "forgetting": ("FuncD", "NoForgetting", "PFU", "ReLU", "Threshold"),
    "uhop.separation": ("FeatureMap", "separation_loss"),
    "specs": ("UHop", "register_func_d"),
    "hosts": ("register_host",),
    "errors": (
        "ConflictError",
        "CoverageError",
        "FoldError",
        "HostNotInstalledError",
        "LwpfError",
        "RewriteError",
        "SettingsError",
        "StageOneError",
        "UnsupportedError",
    ),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]

if TYPE_CHECKING:  # the same names, for type checkers
    from .attention import HostFuncD as HostFuncD
    from .attention import lwpf_attention as lwpf_attention
    from .attention import partial_forgetting as partial_forgetting
    from .errors import ConflictError as ConflictError
    from .errors import CoverageError as CoverageError
    from .errors import FoldError as FoldError
    from .errors import HostNotInstalledError as HostNotInstalledError
    from .errors import LwpfError as LwpfError
    from .errors import RewriteError as RewriteError
    from .errors import SettingsError as SettingsError
    from .errors import StageOneError as StageOneError
    from .errors import UnsupportedError as UnsupportedError
    from .forgetting import PFU as PFU
    from .forgetting import FuncD as FuncD
    from .forgetting import NoForgetting as NoForgetting
    from .forgetting import ReLU as ReLU
    from .forgetting import Threshold as Threshold
    from .hosts import register_host as register_host
    from .observing.maps import AttentionMap as AttentionMap
    from .observing.maps import attention_maps as attention_maps
    from .observing.requesting import observe as observe
    from .patching.folding import fold as fold
    from .patching.models import patch_model as patch_model
    from .patching.models import unpatch_model as unpatch_model
    from .patching.registry import apply as apply
    from .patching.registry import patched as patched
    from .patching.registry import revert as revert
    from .patching.registry import status as status
    from .specs import UHop as UHop
    from .specs import register_func_d as register_func_d
    from .uhop.retrieval import retrieve as retrieve
    from .uhop.separation import FeatureMap as FeatureMap
    from .uhop.separation import separation_loss as separation_loss


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
