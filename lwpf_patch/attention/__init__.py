"""The operator, attention with partial forgetting; and what an attention layer of a host owns to call it."""

from .layer import HostFuncD
from .operator import lwpf_attention, partial_forgetting
from .owned import OwnedFuncD, rule_of

__all__ = ["HostFuncD", "OwnedFuncD", "lwpf_attention", "partial_forgetting", "rule_of"]
