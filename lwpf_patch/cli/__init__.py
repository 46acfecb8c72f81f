"""The command ``lwpf``: run a script patched, show what is patched and how, check the installation; one file a verb."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

from .. import __version__
from ..comparing import command as comparing
from ..errors import LwpfError
from ..observing import requesting
from ..patching import importing, registry
from . import diff, doctor, inspect, models, run, status
from .hook import require_hook


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; default those of the process.

    Returns:
        The exit code: 0, 1 when a check failed, 2 for a wrong request, 130 after Ctrl-C.
    """
    # A request in the environment is meant for the script; this process trains nothing.
    importing.disarm()
    registry.revert()
    requesting.request(None)
    for stream in (sys.stdout, sys.stderr):  # sources that are shown, and paths, may hold what a terminal cannot
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(argv)
    try:
        return int(options.command(options))
    except LwpfError as error:
        print(f"lwpf: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while a request is read: what takes longer handles it by itself
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of `lwpf diff timm | head` has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lwpf",
        description="Learning with partial forgetting (LwPF) and U-Hop for the attention of unmodified libraries.",
    )
    parser.add_argument("--version", action="version", version=f"lwpf_patch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    comparing.add_parser(commands, run.add_parser(commands), require_hook)
    status.add_parser(commands)
    models.add_parser(commands)
    inspect.add_parser(commands)
    diff.add_parser(commands)
    doctor.add_parser(commands)
    return parser
