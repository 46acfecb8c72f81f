"""What users call: ``observe(model)``, and the request of ``LWPF_OBSERVE``, which waits for the first call of a layer.

Nothing here imports torch before a model is given, or called.
"""

from __future__ import annotations

import atexit
import glob
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from .. import reporting, watching
from ..errors import SettingsError, UnsupportedError, shown
from ..options import FLAGS
from ..specs import OBSERVE_OPTIONS, Observe, check_path
from .watchable import check_watchable, unwrapped

if TYPE_CHECKING:
    from torch import nn

    from .recording import Observation, Record
    from .writing import Writer


# --- one model ------------------------------------------------------------------------------------------------------


class Observing:
    """What :func:`observe` returns: a handle, and a context that closes it at its end.

    Attributes:
        records: What was found so far, a dictionary for each layer and each step that was looked at; see
            :func:`observe`.
    """

    def __init__(self, observation: Observation, writer: Writer) -> None:
        self.records: list[Record] = []
        self._observation, self._writer = observation, writer
        observation.write = self._write
        self._entered = 0
        self._is_closed = False

    def _write(self, records: list[Record]) -> None:
        self.records += records
        if self._writer.takes_part():
            self._writer.write(records)

    def close(self) -> None:
        """Look at nothing any more; the model is as it was before."""
        from . import recording

        self._is_closed = True
        recording.stop(self._observation)
        self._writer.close()

    def __enter__(self) -> Observing:
        """Enter the context, several times if need be: the outermost one closes it.

        Raises:
            UnsupportedError: It was closed.
        """
        if self._is_closed:
            raise UnsupportedError("observe: this handle was closed, and records nothing more: call observe(...) again")
        self._entered += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._entered -= 1
        if not self._entered:
            self.close()


def observe(
    model: nn.Module, *, every: int = 1, path: str | os.PathLike[str] | None = None, tensorboard: bool = True
) -> Observing:
    """Observe what the attention layers of a model forget, while it trains or is evaluated.

    ``with lwpf_patch.observe(model) as seen: ...`` or ``seen = lwpf_patch.observe(model); ...; seen.close()``.
    The training is the same bit for bit.

    Of each step that is looked at there is a record for each layer:

    - ``step``, from 1; ``layer``, the name of the module in the model; ``training``; ``model``, the name of its class.
    - In lists with one number per head: ``forgotten``, the share of the keys that func_d forgot, of those that no mask
      hides; ``empty_rows``, the share of the rows that forgot all of them; ``entropy``, that of the kept weights,
      scaled to sum to 1, in nats; ``forgotten_weight``, the forgotten keys' part of the denominator. The last two are
      means over rows. None stands where there is no such number.

    They are computed from at most 4 items of the batch, and without PFU's noise where the scores are not in memory.

    A step is what lies between two steps of the optimizer: of several forward passes in training mode the first one is
    looked at. Where no optimizer of torch.optim has the model's parameters, each pass is a step. Passes in evaluation
    mode are counted apart, and bear the number of the last training step.

    Args:
        model: The model, patched already.
        every: One step in so many is looked at, and one evaluation; the first always is.
        path: A file that the records are added to, as JSON, one a line; None: none. The line before the first has the
            version of this package.
        tensorboard: Whether TensorBoard gets them too, if it is installed and there is a path: in a folder beside the
            file, whose name ends in ``.tensorboard``.

    Returns:
        A handle, which is a context too.

    Raises:
        SettingsError: A wrong value, or a model without a patched attention module.
        UnsupportedError: The model is compiled.
    """
    check_watchable(model, "observe")
    every = OBSERVE_OPTIONS["every"].read_argument(every, "every", "observe")
    if not isinstance(tensorboard, bool):
        words = ", ".join(FLAGS)
        raise SettingsError(f"tensorboard={shown(tensorboard)} (from observe(tensorboard=...)): not one of {words}")
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise SettingsError(f"path={shown(path)} (from observe(path=...)): must be the name of a file")
    path = None if path is None else os.path.abspath(path)
    check_path(path, " (from observe(path=...))")
    from . import recording, writing

    observation = recording.Observation(every, lambda records: None)
    handle = Observing(observation, writing.Writer(Observe(every, path, tensorboard)))
    if _request is not None and _request.observation is None:
        _request.start()  # it waits for the first call of a layer, which would not be shown to it from now on
    observation.add(unwrapped(model))
    recording.start(observation)
    return handle


# --- the variable ---------------------------------------------------------------------------------------------------


class ObservingStatus(TypedDict):
    """What ``status()`` tells of the request of ``LWPF_OBSERVE``.

    Attributes:
        every: One step in so many is looked at.
        path: The file.
        samples: How many steps were looked at so far, and evaluations.
        layers: How many layers were seen.
        reasons: Why layers were not seen, if any were not.
    """

    every: int
    path: str
    samples: int
    layers: int
    reasons: list[str]


class _Request:
    """The request; sees the first call, and then has everything observed."""

    def __init__(self, asked: Observe) -> None:
        self.asked = replace(asked, path=os.path.abspath(str(asked.path)))
        self.since = time.time()
        self.observation: Observation | None = None
        self.writer: Writer | None = None

    def start(self) -> Any:
        """Begin to observe, with torch; return what calls are shown to from now on."""
        from . import recording, writing

        if self.observation is None:
            self.writer = writing.Writer(self.asked)
            self.observation = recording.Observation(
                self.asked.every, self.writer.write, finds_models=True, takes_part=self.writer.takes_part
            )
        recording.start(self.observation)
        return watching.watcher

    def has_been_answered(self) -> bool:
        """Return whether another process has written since, as those do that this one has started."""
        path = Path(str(self.asked.path))
        files = [path, *path.parent.glob(f"{glob.escape(path.stem)}.*{glob.escape(path.suffix)}")]
        return any(file.is_file() and file.stat().st_mtime >= self.since for file in files)

    def see_call(self, func_d: Any, call: Any) -> None:
        """See the first call."""
        self.start().see_call(func_d, call)

    def see_scores(self, func_d: Any, scores: Any, forgotten: Any, mask: Any, dim: int, normalised: Any = None) -> None:
        """See the first call."""
        self.start().see_scores(func_d, scores, forgotten, mask, dim, normalised)

    def see_weights(self, func_d: Any, weights: Any) -> None:
        """See nothing: a call comes before."""

    def see_fast_path(self, func_d: Any) -> None:
        """See the first call, of which no more is shown."""
        self.start().see_fast_path(func_d)

    def miss(self, reason: str) -> None:
        """Take note of why the first call is not seen."""
        self.start().miss(reason)


_request: _Request | None = None


def request(asked: Observe | None) -> None:
    """Have all models of this process observed that are patched, or none any more."""
    global _request
    if _request is not None and _request.observation is not None:
        from . import recording

        recording.stop(_request.observation)
    _request = None if asked is None else _Request(asked)
    if _request is not None:
        atexit.register(finish)  # after what reports has been registered, and so before that is called
    if watching.watcher is None or isinstance(watching.watcher, _Request):
        watching.show_to(_request)
    elif _request is not None:
        _request.start()


def status() -> ObservingStatus | None:
    """Return what has come of the request; None: there is none."""
    if _request is None:
        return None
    observation = _request.observation
    return {
        "every": _request.asked.every,
        "path": str(_request.asked.path),
        "samples": 0 if observation is None else observation.samples,
        "layers": 0 if observation is None else len(observation.layers),
        "reasons": [] if observation is None else list(observation.reasons),
    }


def finish() -> None:
    """Write what is left, when the process ends."""
    if _request is not None and _request.observation is not None and _request.writer is not None:
        from . import recording

        recording.stop(_request.observation)
        _request.writer.close()


def report() -> None:
    """Say what came of the request, when a process ends that has computed something."""
    found = status()
    if found is None or _request is None:
        return
    writer = _request.writer
    if writer is not None and not writer.takes_part():
        return  # of another rank, whose first one says it
    if not found["samples"] and not found["reasons"] and _request.has_been_answered():
        return
    if not found["samples"]:
        why = "; ".join(found["reasons"]) or "no patched attention was called"
        reporting.warn(f"observe was asked for, but nothing was seen, and {found['path']} has nothing of it: {why}")
    elif writer is not None and writer.problem:
        reporting.warn(f"observe: {found['path']} could not be written: {writer.problem}")
    else:
        where = found["path"] if writer is None else writer.path()
        reporting.info(f"observe: {found['layers']} layers in {found['samples']} samples: {where}")
