"""What a host is made of: all that those in the box use, and that one of your own needs.

Describe a library by a :class:`RewrittenHost` (its sites, what their modules get, the edits) or a
:class:`RegisteredHost` (an interface by which it takes attention; :class:`ModularHost` where that interface hands over
the attention module), and make it known by :func:`lwpf_patch.register_host`.
"""

from ..reporting import info, warn
from ..rewriting import (
    Edit,
    Function,
    Splice,
    called_name,
    check_scores,
    check_unchanged,
    check_unused,
    forget_around_softmax,
    hide,
    map_query,
    normalise_call,
    sdpa_calls,
    softmax_call,
    softmax_scores,
)
from .attachments import Attachment, FeatureMapAttachment, Folding, FuncDAttachment, HostModule, Order
from .contract import Host, RegisteredHost, SiteStatus
from .modular import AttachedModules, ModularHost
from .rewritten import RewrittenHost, Site, multiply_rows
from .shims import Replacement, Shim

__all__ = [
    "AttachedModules",
    "Attachment",
    "Edit",
    "FeatureMapAttachment",
    "Folding",
    "FuncDAttachment",
    "Function",
    "Host",
    "HostModule",
    "ModularHost",
    "Order",
    "RegisteredHost",
    "Replacement",
    "RewrittenHost",
    "Shim",
    "Site",
    "SiteStatus",
    "Splice",
    "called_name",
    "check_scores",
    "check_unchanged",
    "check_unused",
    "forget_around_softmax",
    "hide",
    "info",
    "map_query",
    "multiply_rows",
    "normalise_call",
    "sdpa_calls",
    "softmax_call",
    "softmax_scores",
    "warn",
]
