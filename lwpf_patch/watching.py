"""Whether anything observes the attention layers, and what their calls are shown to.

A layer asks for :data:`on` at each call, and does nothing else while it is False. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any, Protocol


class Watcher(Protocol):
    """What the calls of attention layers are shown to."""

    def see_call(self, func_d: Any, call: Any) -> None:
        """See a call of a layer that computes attention as a whole, a :class:`lwpf_patch.backends.Call`."""

    def see_scores(self, func_d: Any, scores: Any, forgotten: Any, mask: Any, dim: int) -> None:
        """See a call of a layer around a softmax that is written out: s, D(s), D'(s), and the dimension of the keys."""

    def miss(self, reason: str) -> None:
        """Take note of why calls are not seen."""


#: Whether there is a watcher; the layers read it.
on = False
watcher: Watcher | None = None


def show_to(new: Watcher | None) -> None:
    """Have the calls of attention layers shown to a watcher from now on; None: to nobody."""
    global on, watcher
    watcher = new
    on = new is not None
