"""Whether anything observes the attention layers, and what their calls are shown to.

A layer asks for :data:`on` at each call, and does nothing else while it is False. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol


class Watcher(Protocol):
    """What the calls of attention layers are shown to."""

    def see_call(self, func_d: Any, call: Any) -> None:
        """See a call of a layer that computes attention as a whole, a :class:`lwpf_patch.backends.Call`."""

    def see_scores(self, func_d: Any, scores: Any, forgotten: Any, mask: Any, dim: int, normalised: Any = None) -> None:
        """See a call of a layer around a softmax that is written out.

        Args:
            func_d: That of the layer.
            scores: s.
            forgotten: D(s).
            mask: D'(s).
            dim: The dimension of the keys.
            normalised: The weights that D'(s) multiplies; None: the normalisation of D(s).
        """

    def see_weights(self, func_d: Any, weights: Any) -> None:
        """See the weights that several iterations of a layer have ended with, which the last D'(s) multiplies."""

    def see_fast_path(self, func_d: Any) -> None:
        """See that a host may compute a layer by one call of its own, of which nothing is shown."""

    def miss(self, reason: str) -> None:
        """Take note of why calls are not seen."""


#: Whether there is a watcher; the layers read it.
on = False
watcher: Watcher | None = None
#: The watchers that threads have each for themselves, by the threads' numbers.
_own: dict[int, Watcher] = {}


def show_to(new: Watcher | None) -> None:
    """Have the calls of attention layers shown to a watcher from now on; None: to nobody."""
    global on, watcher
    watcher = new
    on = new is not None or bool(_own)


@contextlib.contextmanager
def shown_alone_to(new: Watcher) -> Iterator[None]:
    """Have the calls of this thread shown to one watcher alone: no other one sees them.

    Layers that forget nothing do not take the fast paths of their host meanwhile, which call no func_d.
    """
    global on
    thread = threading.get_ident()
    before = _own.get(thread)
    _own[thread] = new
    on = True
    try:
        yield
    finally:
        del _own[thread]
        if before is not None:
            _own[thread] = before
        on = watcher is not None or bool(_own)


def current() -> Watcher | None:
    """Return what the calls of this thread are shown to."""
    return _own.get(threading.get_ident(), watcher) if _own else watcher


def has_own() -> bool:
    """Return whether this thread has a watcher for itself."""
    return bool(_own) and threading.get_ident() in _own
