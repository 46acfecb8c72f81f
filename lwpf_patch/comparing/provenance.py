"""What a result depends on: the files that a command names, versions, commit and machine."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import __version__
from ..errors import HostNotInstalledError
from ..hosts import HOSTS

_PACKAGE = Path(__file__).parent.parent


def named_paths(words: Sequence[str], is_module: bool) -> dict[str, Path]:
    """Return what may be the script and every other file that a command names, such as configurations.

    Args:
        words: The script or module, and its arguments.
        is_module: Whether the first is a module.
    """
    file = _module_file(words[0]) if is_module else None
    named = {words[0]: file} if file is not None else {}
    for word in words[is_module:]:
        named |= {part: Path(part) for part in (word, word.partition("=")[2]) if part}
    return named


def sources(named: Mapping[str, Path], hashes: dict[str, str]) -> dict[str, str]:
    """Return the hashes of those paths that are files, by the words that name them.

    Args:
        named: The paths, by these words.
        hashes: Those that are known already, by path; others are added.
    """
    found = {}
    for word, path in named.items():
        with contextlib.suppress(OSError):  # a word that is too long for a name
            if path.is_file():
                found[word] = _hash_of(path, hashes)
    return found


def _module_file(name: str) -> Path | None:
    """Return the source of a module, without importing its package."""
    search: list[str] = [os.getcwd(), *sys.path]
    for depth in range(1, name.count(".") + 2):
        spec = importlib.machinery.PathFinder.find_spec(".".join(name.split(".")[:depth]), search)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or ())
    if search:  # a package: its __main__ is what runs
        return next((path for folder in search if (path := Path(folder) / "__main__.py").is_file()), None)
    return Path(spec.origin) if spec and spec.origin else None


def _hash_of(path: Path, hashes: dict[str, str]) -> str:
    known = hashes.get(str(path))
    if known is None:
        digest = hashlib.sha256()
        state = path.stat()
        if state.st_size > 1 << 26:  # data or a checkpoint: reading it for every comparison takes long
            digest.update(f"{state.st_size} {state.st_mtime_ns}".encode())
        else:
            digest.update(path.read_bytes())
        known = hashes[str(path)] = digest.hexdigest()[:16]
    return known


@functools.cache
def versions(patched: bool = True) -> Mapping[str, str]:
    """Return the versions that a result depends on.

    Args:
        patched: Whether lwpf_patch has a part in it.
    """
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for name, host in HOSTS.items():
        try:
            version = host.version()
        except HostNotInstalledError:
            continue
        if version is not None:
            found[name] = version
    if patched:
        found |= {"lwpf_patch": __version__, "lwpf_patch_source": _own_source()}
    return MappingProxyType(found)


def _own_source() -> str:
    """Return the hash of what patches and computes: in a checkout it changes without the version."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        parts = path.relative_to(_PACKAGE).parts
        if path.suffix in (".py", ".cpp", ".json") and parts[0] not in ("comparing", "cli"):
            digest.update("/".join(parts).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _output_of(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit_of(folder: Path) -> str | None:
    """Return the commit that a folder is a checkout of; None: it is none, or there is no Git."""
    return _output_of("git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*")


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    names = _output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return names.splitlines() if names else []


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Return what this machine is."""
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "gpus": _gpus(),
    }
