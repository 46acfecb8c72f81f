"""The folder in which this package keeps what it has compiled, for the processes to come."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def folder() -> Path | None:
    """Return the folder, which need not be there; None: no variable names one, and the user has no home."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or "~/.cache").expanduser() / "lwpf_patch"
    except RuntimeError:  # a container's user without a name
        return None


def write(path: Path, data: bytes) -> None:
    """Write a file as a whole, or not at all, as where there is no space or no permission.

    Processes that write the same file at once each write one of their own; the last one stays.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
