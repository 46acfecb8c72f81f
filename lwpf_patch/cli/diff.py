"""The verb ``lwpf diff``: show what patching changes in a host's source."""

from __future__ import annotations

import argparse
import os
import sys

from ..comparing.command import Subparsers
from ..hosting import RegisteredHost
from ..hosts import HOSTS, find_hosts
from ..options import split_list
from ..settings import Settings, flag_of

_COLOURS = {"+++": "1", "---": "1", "@@": "36", "+": "32", "-": "31"}


def add_parser(commands: Subparsers) -> None:
    """Add the verb."""
    parser = commands.add_parser("diff", help="show what patching changes in a host's source")
    parser.add_argument("host", help=f"{', '.join(HOSTS)}, or one that an installed package declares")
    for flag, which in (("--include", "only sites that"), ("--exclude", "no sites that")):
        parser.add_argument(flag, action="append", metavar="GLOBS", help=f"{which} match one of these glob patterns")
    parser.add_argument("--uhop", help="with U-Hop's feature map: 'on', or its options")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="default: on a terminal, unless NO_COLOR is set",
    )
    parser.set_defaults(command=_diff)


def _diff(options: argparse.Namespace) -> int:
    names = find_hosts(options.host, "lwpf diff")
    patterns = {
        name: None if given is None else [pattern for text in given for pattern in split_list(text)]
        for name, given in (("include", options.include), ("exclude", options.exclude))
    }
    settings = Settings(**patterns, uhop=options.uhop, origin=flag_of)
    diff = "".join(plan.diff() for name in names for plan in HOSTS[name].plans(settings))
    for name in names:
        if isinstance(HOSTS[name], RegisteredHost):
            places = ", ".join(HOSTS[name].places_of_attention())
            print(
                f"{name}: nothing is rewritten. It takes attention by an interface of its own ({places}), with which "
                "lwpf_patch registers",
                file=sys.stderr,
            )
    automatic = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if options.color == "always" or (options.color == "auto" and automatic):
        diff = "".join(map(_coloured, diff.splitlines(keepends=True)))
    print(diff, end="")
    return 0


def _coloured(line: str) -> str:
    colour = next((code for start, code in _COLOURS.items() if line.startswith(start)), None)
    return f"\x1b[{colour}m{line.rstrip(chr(10))}\x1b[m\n" if colour else line
