"""The frames of other threads: who is running some code, and when has everybody left it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Iterable
from types import CodeType, FrameType
from typing import Any

from .collecting import no_collection

#: How long to wait for other threads to leave code that was replaced, in seconds.
PATIENCE = 10.0


def in_flight(codes: Iterable[CodeType]) -> list[FrameType]:
    """Return the frames of other threads that run some code; of code that was replaced before, no new ones come."""
    wanted = {id(code) for code in codes}
    if not wanted:
        return []
    mine = threading.get_ident()
    stacks = _stacks().items()
    return [each for thread, stack in stacks if thread != mine for each in stack if id(each.f_code) in wanted]


def in_this_thread(codes: Iterable[CodeType]) -> FrameType | None:
    """Return a frame of this thread that runs some code."""
    wanted = {id(code) for code in codes}
    return next((each for each in _stack(sys._getframe()) if id(each.f_code) in wanted), None)


def wait_for(frames: Collection[FrameType]) -> list[FrameType]:
    """Wait until some frames of other threads have returned, for :data:`PATIENCE` at most.

    Hold no lock that these threads could need.

    Returns:
        Those that have not.
    """
    left, pause, end = list(frames), 0.0005, time.monotonic() + PATIENCE
    while left and time.monotonic() < end:
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
        running = {id(frame) for stack in _stacks().values() for frame in stack}
        left = [frame for frame in left if id(frame) in running]
    return left


def variables(frames: Iterable[FrameType] | None = None) -> list[dict[str, Any]]:
    """Return the local variables of some frames; None: of all frames of all threads."""
    chosen = [each for stack in _stacks().values() for each in stack] if frames is None else frames
    with no_collection():  # see _stacks
        return [dict(frame.f_locals) for frame in chosen]


def _stacks() -> dict[int, list[FrameType]]:
    # Before Python 3.12 the collector can run whenever an object is made, such as that of a frame. What it calls lets
    # other threads run, and the frame that was being read is gone.
    with no_collection():
        return {thread: _stack(top) for thread, top in sys._current_frames().items()}


def _stack(top: FrameType) -> list[FrameType]:
    frames: list[FrameType] = []
    frame: FrameType | None = top
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames
