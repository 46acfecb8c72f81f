"""The plans of hosts' modules and their compiled code, made once: kept in memory, and for later processes on disk.

Without what is on disk, importing a library with many sites takes about half a second longer.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from .. import __version__, keeping, rewriting
from ..hosting.rewritten import RewrittenHost, Site
from ..hosts import HOSTS, IN_THE_BOX
from ..rewriting import packing
from .collecting import no_collection

#: What has been planned and compiled, by file, source, sites and parts: what is patched again needs it again.
_planned: dict[tuple[str, str, tuple[int, ...], frozenset[str]], tuple[rewriting.Plan, rewriting.Codes]] = {}
#: So many plans of a module are kept on disk: for some versions of its library, and of this package.
_KEPT = 8
_PACKAGE = Path(__file__).parent.parent


def planned(
    host: RewrittenHost, path: str, source: str, sites: list[Site], parts: frozenset[str]
) -> tuple[rewriting.Plan, rewriting.Codes]:
    """Plan the edits of some sites of one module, and compile them.

    Args:
        host: The host.
        path: The file of the module's source.
        source: The source.
        sites: The sites, all of that module.
        parts: The names of the attachments that come in.

    Raises:
        RewriteError: The source has a shape that is not known.
    """
    key = (path, source, tuple(map(id, sites)), parts)
    if key not in _planned:
        # The edits of other hosts are code of theirs, which may change without notice.
        file = _file(source, sites, parts) if _is_in_the_box(host) else None
        found = _read(file, path, source, sites) if file is not None else None
        if found is None:
            with no_collection():  # syntax trees are many objects, none of them garbage
                plan = host.plan(path, source, sites, parts)
                found = plan, plan.compile()
            if file is not None and not sys.dont_write_bytecode:
                keeping.write(file, packing.pack(*found))
                _forget_old(file)
        _planned[key] = found
    return _planned[key]


def _is_in_the_box(host: RewrittenHost) -> bool:
    return host.name in IN_THE_BOX and HOSTS[host.name] is host


def _file(source: str, sites: list[Site], parts: Iterable[str]) -> Path | None:
    """Return the file of a plan, whose name tells all that it depends on; None: there is no place for it."""
    folder = keeping.folder()
    if folder is None:
        return None
    identity = (_maker(), source, [site.qualname for site in sites], sorted(parts))
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    return folder / f"plan-{sites[0].module}-{digest}"


@functools.lru_cache
def _maker() -> tuple[object, ...]:
    """Return what makes plans and code: Python, PyTorch and this package, which changes unnoticed in a checkout."""
    states = []
    for file in sorted(_PACKAGE.rglob("*.py")):
        with contextlib.suppress(OSError):  # an editor's, which is gone again
            state = file.stat()
            states.append((str(file), state.st_size, state.st_mtime_ns))
    torch = getattr(sys.modules.get("torch"), "__version__", "")
    return importlib.util.MAGIC_NUMBER, sys.version, sys.flags.optimize, str(torch), __version__, states


def _read(file: Path, path: str, source: str, sites: list[Site]) -> tuple[rewriting.Plan, rewriting.Codes] | None:
    try:
        packed = file.read_bytes()
    except OSError:
        return None
    return packing.unpack(packed, sites[0].module, path, source)


def _forget_old(file: Path) -> None:
    """Remove all but the last plans of a module."""
    with contextlib.suppress(OSError):
        prefix = file.name.rpartition("-")[0]
        kept = sorted(file.parent.glob(f"{prefix}-*"), key=os.path.getmtime)
        for old in kept[:-_KEPT]:
            old.unlink(missing_ok=True)
