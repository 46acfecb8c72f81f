"""Whether the start-up hook runs in a new interpreter."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path

from ..errors import SettingsError

HOOK = "lwpf_patch.pth"
#: What to tell of a host that Python does not find from here.
BESIDE = "a copy beside a script is patched when the script imports it"


def interpreter_flags() -> list[str]:
    """Return the flags that this interpreter was started with."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return flags


def hook_files() -> list[Path]:
    """Return where the start-up hook lies and is read: not in a folder that is on the path by PYTHONPATH alone."""
    places = [path for folder in sys.path if (path := Path(folder) / HOOK).is_file()]
    by_variable = [] if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "").split(os.pathsep)
    unread = {os.path.realpath(folder) for folder in by_variable if folder}
    unread -= {os.path.realpath(folder) for folder in (*site.getsitepackages(), site.getusersitepackages())}
    return [path for path in places if os.path.realpath(path.parent) not in unread]


def require_hook() -> None:
    """Check that a new interpreter would run the start-up hook.

    Raises:
        SettingsError: It would not, so that the script would run unpatched.
    """
    if sys.flags.no_site or not hook_files():
        raise SettingsError(
            f"the start-up hook {HOOK} is in no site-packages folder of {sys.executable}, so the script would run "
            "unpatched: install the package with pip (a checkout or a site-packages folder on PYTHONPATH is not "
            "enough), do not use python -S, or call lwpf_patch.apply() in the script"
        )
