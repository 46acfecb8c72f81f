"""func_d, the forgetting functions: ReLU, PFU, none, and your own; one file each, mathematics alone."""

from ..backends import Threshold
from .base import FuncD
from .custom import CustomFuncD
from .making import make_func_d
from .none import NoForgetting
from .pfu import PFU
from .relu import ReLU

__all__ = ["PFU", "CustomFuncD", "FuncD", "NoForgetting", "ReLU", "Threshold", "make_func_d"]
