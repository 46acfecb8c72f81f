"""The verb ``lwpf run``: set the variables, and then be the script."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from ..comparing.command import Subparsers
from ..errors import SettingsError
from ..hosts import HOSTS, find_hosts
from ..options import Option
from ..settings import OBSERVE, PATCH, SETTINGS, UNPICKLE, VARIABLES, Settings, flag_of, variable_of
from ..specs import FUNC_D_OPTIONS, OBSERVE_OPTIONS, UHOP_OPTIONS
from .hook import interpreter_flags, require_hook

DESCRIPTION = """\
Sets the environment and executes the same interpreter: exit code, signals,
standard input and __main__ are the script's own, and worker processes are
patched too. An option that is not given is taken from its LWPF_ variable.
"""


def _lines(options: Mapping[str, Option]) -> str:
    """Describe options with their defaults, one below the other."""
    lines = []
    for name, option in options.items():
        shown = f"    {name}={option.default or 'N'}"
        lines += textwrap.wrap(option.help, 79, initial_indent=f"{shown:<22} ", subsequent_indent=" " * 23)
    return "\n".join(lines)


EPILOG = f"""\
forgetting functions (s: a score, a: the threshold; a forgotten key gives no value):
  relu  forgets s <= 0
  pfu   forgets s <= a, where a = mu + noise
  none  forgets nothing

options of pfu, with their defaults; relu takes the last of them:
{_lines(FUNC_D_OPTIONS["pfu"])}

U-Hop (Phi: a feature map per head, the identity until Stage I):
  --uhop on, or some of these options, with their defaults:
{_lines(UHOP_OPTIONS)}

observing:
  --observe on, or some of these options, with their defaults:
{_lines(OBSERVE_OPTIONS)}

masking:
  exclude keys hidden by a mask have no part in the softmax, the median and the values
  paper   as in the official code, which lets them back into the softmax

examples:
  lwpf run train.py --model vit_small_patch16_224
  lwpf run --func-d pfu:mu=dmedian,bias=mu,sigma=0.01 train.py
  lwpf run --uhop iters=100,every=500 train.py
  lwpf run --observe every=50,path=forgetting.jsonl train.py
  lwpf run --patch timm -m torch.distributed.run --nproc-per-node 8 train.py
"""


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    """Add the verb, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "run",
        usage="lwpf run [options] (script.py | -m module) [arguments ...]",
        help="run a Python script or module with its attention patched",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for setting in VARIABLES:
        names = f"{', '.join(HOSTS)}, and those that installed packages declare: " if setting is PATCH else ""
        parser.add_argument(setting.flag, metavar=setting.metavar, help=f"{names}{setting.help}")
    parser.add_argument("-m", dest="module", action="store_true", help="the target is a module, as in python -m")
    parser.add_argument("target", nargs=argparse.REMAINDER, help="script (or module) and its arguments")
    parser.set_defaults(command=_run, parser=parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    given = {s.name: value for s in VARIABLES if (value := getattr(options, s.name)) is not None}
    inherited = {s.name: value for s in VARIABLES if (value := os.environ.get(s.variable, "")).strip()}
    asked = {**inherited, **given}

    def origin(name: str) -> str:
        return flag_of(name) if name in given else variable_of(name)

    settings = Settings(**{s.name: asked[s.name] for s in SETTINGS if s.name in asked}, origin=origin)
    target = options.target[1:] if options.target[:1] == ["--"] else options.target
    if not target:
        options.parser.error("no script is given, and no module with -m")
    hosts = asked.get(PATCH.name, "timm")
    for host in find_hosts(hosts, origin(PATCH.name)):
        HOSTS[host].check(settings)
    for alone in (UNPICKLE, OBSERVE):
        alone.read(asked.get(alone.name, ""), origin(alone.name))
    if not options.module and not Path(target[0]).exists():
        raise SettingsError(f"there is no script {target[0]!r} in {Path.cwd()}; write -m before the name of a module")
    require_hook()
    variables = {variable_of(name): value for name, value in {PATCH.name: hosts, **given}.items()}
    arguments = [*interpreter_flags(), *(["-m"] if options.module else []), *target]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, **variables})
