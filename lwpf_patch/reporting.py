"""What the user gets to see: the line that says what was patched, and the report at exit when nothing came of it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, TextIO

logger = logging.getLogger("lwpf_patch")

_used: set[str] = set()
_backends: set[tuple[str, str, str]] = set()
_replaced: set[tuple[str, str, str]] = set()


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # which takes no type in Python 3.10


class _StderrUnlessConfigured(_StreamHandler):
    """Writes to stderr as long as the script has configured no logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self.stream = sys.stderr
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Let it be: there is no stderr, or it is closed, and nothing said here is worth a script."""


if not logger.handlers:
    logger.addHandler(_StderrUnlessConfigured())
    if logger.level == logging.NOTSET:  # else the script has set one: this is imported with what first has to speak
        logger.setLevel(logging.INFO)

#: Where launchers put the number of a process: of all processes, or of those of a node and of the node itself.
RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "LOCAL_RANK", "NODE_RANK")


def is_main_process() -> bool:
    """Return whether this process should speak: the first of all ranks, and no worker of another process."""
    return all(os.environ.get(variable, "").strip() in ("", "0") for variable in RANKS) and not is_helper_process()


def is_helper_process() -> bool:
    """Return whether another program started this interpreter for its own ends: a worker, a launcher, a compiler."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        return True
    command = " ".join(sys.orig_argv[1:4]).replace(os.sep, ".")
    helpers = (
        "from multiprocessing.", "--multiprocessing-fork", "_inductor.compile_worker", "torch.distributed.",
        "accelerate.commands.",
    )  # fmt: skip
    launchers = ("torchrun", "accelerate")
    return any(helper in command for helper in helpers) or os.path.basename(sys.argv[0]) in launchers


def info(message: str) -> None:
    """Tell the user something, once for all ranks."""
    _say(logging.INFO, message)


def warn(message: str) -> None:
    """Warn the user, once for all ranks."""
    _say(logging.WARNING, message)


def _say(level: int, message: str) -> None:
    if not is_main_process():
        return
    # What logging.config disables by default are loggers that it was not told of; whoever wants silence sets a level.
    logger.disabled = False
    with contextlib.suppress(Exception):  # of a handler of the script's, to a stream that is closed
        # The name is part of the message, so that it is there in whatever format the script has chosen.
        logger.log(level, f"{logger.name}: {message}")


def mark_used(host: str) -> bool:
    """Note that a patched forward of a host was called, compiled or traced."""
    _used.add(host)
    return True


def note_backend(host: str, backend: str, why: str) -> bool:
    """Note which backend computes the attention of a host, and say so when it is a new one, or for a new reason."""
    if host and (host, backend, why) not in _backends:
        _backends.add((host, backend, why))
        info(f"{host}: attention is computed by backend {backend}: {why}")
    return True


def note_replaced(host: str, saved: str, func_d: str) -> None:
    """Say so when a model that is unpickled gets another func_d than it was saved with; once for each pair."""
    if (host, saved, func_d) not in _replaced:
        _replaced.add((host, saved, func_d))
        info(f"{host}: a model that was pickled with func_d {saved} gets {func_d}, as this process is patched")


def backends_of(host: str) -> dict[str, list[str]]:
    """Return the backends that have computed attention of a host, each with the reasons for it."""
    found: dict[str, list[str]] = {}
    for name, backend, why in sorted(_backends):
        if name == host:
            found.setdefault(backend, []).append(why)
    return found


def was_used(host: str) -> bool:
    """Return whether a patched forward of a host was called since :func:`reset_use`."""
    return host in _used


def reset_use(host: str) -> None:
    """Start anew for a host."""
    _used.discard(host)
    _replaced.difference_update([noted for noted in _replaced if noted[0] == host])
    _backends.difference_update([noted for noted in _backends if noted[0] == host])
