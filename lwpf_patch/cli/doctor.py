"""The verb ``lwpf doctor``: check that the environment variable takes effect."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

from ..comparing.command import Subparsers
from ..errors import HostNotInstalledError, LwpfError
from ..hosts import HOSTS
from ..settings import PATCH, Settings
from .hook import BESIDE, HOOK, hook_files, interpreter_flags

_PROBE = """
import sys
registry = sys.modules.get("lwpf_patch.patching.registry")
state = registry.status()["hosts"] if registry else {}
print(",".join(name for name, host in state.items() if host["state"] in ("patched", "waiting for its import")))
"""


def add_parser(commands: Subparsers) -> None:
    """Add the verb."""
    parser = commands.add_parser("doctor", help="check that the environment variable takes effect here")
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    print(f"interpreter:   {sys.executable} (Python {platform.python_version()})")
    print(f"package:       {Path(__file__).parent.parent}")
    print(f"start-up hook: {', '.join(map(str, hook_files())) or 'in no folder of sys.path'}")
    healthy = True
    for name, host in HOSTS.items():
        beside = ""
        try:
            host.plans(Settings())
        except HostNotInstalledError:
            beside = f"; it is not installed here, but {BESIDE}"
        except LwpfError as error:
            print(f"{name}: {error}")
            continue
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LWPF_")} | {PATCH.variable: name}
        command = [sys.executable, *interpreter_flags(), "-c", _PROBE]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        fires = child.stdout.strip() == name
        healthy = healthy and fires
        effect = "takes effect" if fires else "has NO effect"
        print(f"{name}: {PATCH.variable}={name} {effect} in a new interpreter{beside}")
        if not fires:
            print(child.stderr, end="", file=sys.stderr)
    if not healthy:
        print(f"The hook {HOOK} does not run: install this package with pip into this interpreter's environment.")
    return 0 if healthy else 1
