"""A user's own function as a forgetting function."""

from collections.abc import Callable

from torch import Tensor, nn

from .base import FuncD


class CustomFuncD(FuncD):
    """A forgetting function of the user's own.

    Args:
        function: Maps scores ``s`` to ``(D(s), D'(s))``, elementwise: both of the scores' shape, D' boolean or 0/1.
            In ``masking="exclude"`` it sees 0 in place of the scores of excluded keys.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.function = function

    def forget(self, scores: Tensor, excluded: Tensor | None, training: bool) -> tuple[Tensor, Tensor]:
        """Compute D and D' with the user's function; see :meth:`FuncD.forget`."""
        return self.function(scores)

    def _options(self) -> list[str]:
        shown = not isinstance(self.function, nn.Module)  # a module is listed as a child anyway
        return [getattr(self.function, "__name__", repr(self.function))] if shown else []
