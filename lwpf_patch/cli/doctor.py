"""The verb ``lwpf doctor``: check that the environment variable takes effect, and that the kernels are right here."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..comparing.command import Subparsers
from ..errors import HostNotInstalledError, LwpfError
from ..settings import PATCH, Settings
from .hook import BESIDE, HOOK, hook_files, interpreter_flags
from .listing import every_host

_PROBE = """
import sys
registry = sys.modules.get("lwpf_patch.patching.registry")
state = registry.status()["hosts"] if registry else {}
print(",".join(name for name, host in state.items() if host["state"] in ("patched", "waiting for its import")))
"""


def add_parser(commands: Subparsers) -> None:
    """Add the verb."""
    parser = commands.add_parser(
        "doctor", help="check that the environment variable takes effect here, and the GPU's kernels"
    )
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    print(f"interpreter:   {sys.executable} (Python {platform.python_version()})")
    print(f"package:       {Path(__file__).parent.parent}")
    print(f"start-up hook: {', '.join(map(str, hook_files())) or 'in no folder of sys.path'}")
    healthy = True
    for name, listed in every_host().items():
        beside = ""
        shown = listed.named(name)
        try:
            if isinstance(listed.host, LwpfError):
                raise listed.host
            listed.host.plans(Settings())
        except HostNotInstalledError:
            beside = f"; it is not installed here, but {BESIDE}"
        except LwpfError as error:
            print(f"{shown}: {error}")
            continue
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LWPF_")} | {PATCH.variable: name}
        command = [sys.executable, *interpreter_flags(), "-c", _PROBE]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        fires = child.stdout.strip() == name
        healthy = healthy and fires
        effect = "takes effect" if fires else "has NO effect"
        print(f"{shown}: {PATCH.variable}={name} {effect} in a new interpreter{beside}")
        if not fires:
            print(child.stderr, end="", file=sys.stderr)
    if not healthy:
        print(f"The hook {HOOK} does not run: install this package with pip into this interpreter's environment.")
    print_native()
    return 0 if check_kernels() and healthy else 1


def print_native() -> None:
    """Say whether the attention of the CPU is compiled here; it is at once, where it has not been before."""
    try:
        from ..backends import cpu_native
    except ImportError:  # which is said of the kernels
        return
    reason = cpu_native.why_not()
    if reason is None:
        print(f"attention on the CPU: compiled, compared with the eager form: right ({cpu_native.path()})")
    else:
        print(f"attention on the CPU: not compiled, PyTorch's operators compute it, slowly: {reason}")


def check_kernels(devices: Sequence[str] | None = None) -> bool:
    """Check the kernels on the GPUs that are there, and print a table.

    Args:
        devices: The devices; None: all of CUDA's.

    Returns:
        Whether all are right; True where there are none.
    """
    try:
        import torch

        from ..backends import triton
    except ImportError as error:
        print(f"kernels: not checked, PyTorch cannot be imported ({error})")
        return True
    if devices is None:
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if not devices:
        print("kernels: there is no GPU of CUDA to check them on")
    right = True
    for device in devices:
        kind = torch.device(device)
        name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else "the interpreter"
        reason = triton.why_not_on(kind.type, kind.index)
        if reason is not None:
            print(f"kernels on {device} ({name}): not used: {reason}")
            continue
        print(f"kernels on {device} ({name}), compared with the eager form:")
        for case, problem in triton.check_device(device):
            print(f"  {'right' if problem is None else 'WRONG'}: {case}" + (f": {problem}" if problem else ""))
            right = right and problem is None
    return right
