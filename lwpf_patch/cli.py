"""The command ``lwpf``: run a script patched, show what is patched and how, check the installation."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import site
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__
from .comparing import command as comparing
from .errors import HostNotInstalledError, LwpfError, SettingsError
from .hosts import HOSTS
from .patching import importing, registry
from .settings import (
    BACKENDS,
    FUNC_D_OPTIONS,
    MASKINGS,
    PATCH_VARIABLE,
    UNPICKLE,
    UNPICKLE_VARIABLE,
    VARIABLES,
    Settings,
    check_hosts,
    describe_backend,
    from_environment,
    read_unpickle,
    split_list,
)

HOOK = "lwpf_patch.pth"
BESIDE = "a copy beside a script is patched when the script imports it"

RUN_DESCRIPTION = """\
Sets the environment and executes the same interpreter: exit code, signals,
standard input and __main__ are the script's own, and worker processes are
patched too. An option that is not given is taken from its LWPF_ variable.
"""
RUN_EPILOG = """\
forgetting functions (s: a score, a: the threshold; a forgotten key gives no value):
  relu    forgets s <= 0
  pfu     forgets s <= a, where a = mu + noise; its options, with their defaults:
            mu=dmedian   the median of all scores of a call, or a number
            bias=mu      what a forgotten score becomes: a itself, or a number
            sigma=0.01   in training the noise has standard deviation sigma**2
          relu and pfu also take
            empty=zero   a row that forgets everything gives 0; with empty=plain it
                         forgets nothing instead
  none    forgets nothing

U-Hop (Phi: a feature map per head, the identity until Stage I):
  --uhop on, or some of these options, with their defaults:
    iters=100      steps of gradient descent of Stage I
    t=2, lr=0.1    of the separation loss, and the rate of the descent
    loss=average   average or maximum
    samples=256    keys of a batch that are separated, for each layer and head
    every=N        again every N steps of the optimizer; by default once, after the first
    until=10*N     but after no step beyond this one
    train=true     whether the task's loss trains Phi afterwards

masking:
  exclude keys hidden by a mask have no part in the softmax, the median and the values
  paper   as in the official code, which lets them back into the softmax

examples:
  lwpf run train.py --model vit_small_patch16_224
  lwpf run --func-d pfu:mu=dmedian,bias=mu,sigma=0.01 train.py
  lwpf run --uhop iters=100,every=500 train.py
  lwpf run --patch timm -m torch.distributed.run --nproc-per-node 8 train.py
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Its arguments; default those of the process.

    Returns:
        The exit code: 0, 1 when a check failed, 2 for a wrong request.
    """
    # A request in the environment is meant for the script; this process trains nothing.
    importing.disarm()
    registry.revert()
    for stream in (sys.stdout, sys.stderr):  # sources that are shown, and paths, may hold what a terminal cannot
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(argv)
    try:
        return int(options.command(options))
    except LwpfError as error:
        print(f"lwpf: {error}", file=sys.stderr)
        return 2
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

    run = commands.add_parser(
        "run",
        usage="lwpf run [options] (script.py | -m module) [arguments ...]",
        help="run a Python script or module with its attention patched",
        description=RUN_DESCRIPTION,
        epilog=RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_settings(run)
    run.add_argument("-m", dest="module", action="store_true", help="the target is a module, as in python -m")
    run.add_argument("target", nargs=argparse.REMAINDER, help="script (or module) and its arguments")
    run.set_defaults(command=_run, parser=run)

    comparing.add_parser(commands, run, _require_hook)

    status = commands.add_parser("status", help="show hosts, versions, sites, and what would be patched")
    status.add_argument("--json", action="store_true", help="print plain data")
    status.set_defaults(command=_status)

    diff = commands.add_parser("diff", help="show what patching changes in a host's source")
    diff.add_argument("host", help=", ".join(HOSTS))
    diff.add_argument("--include", action="append", help="only sites that match this glob pattern")
    diff.add_argument("--exclude", action="append", help="no sites that match this glob pattern")
    diff.add_argument("--uhop", help="with U-Hop's feature map: 'on', or its options")
    diff.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="default: on a terminal, unless NO_COLOR is set",
    )
    diff.set_defaults(command=_diff)

    doctor = commands.add_parser("doctor", help="check that the environment variable takes effect here")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patch",
        metavar="HOSTS",
        help=f"hosts to patch, separated by commas: {', '.join(HOSTS)} (default: {PATCH_VARIABLE}, or else timm)",
    )
    parser.add_argument(
        "--func-d",
        metavar="FUNC_D",
        help=f"forgetting function: {', '.join(FUNC_D_OPTIONS)}, with options as in pfu:mu=dmedian,bias=mu,sigma=0.01 "
        "(default: relu, or none with --uhop)",
    )
    parser.add_argument("--masking", help=f"{' or '.join(MASKINGS)} (default: exclude)")
    parser.add_argument("--backend", help=f"{' or '.join(BACKENDS)} (default: auto)")
    parser.add_argument(
        "--uhop",
        metavar="OPTIONS",
        help="U-Hop, with the options of its Stage I as in iters=100,t=2,lr=0.1, or 'on' (default: off). With it the "
        "default of --func-d is none",
    )
    parser.add_argument("--include", metavar="GLOBS", help="patch only sites that match one of these glob patterns")
    parser.add_argument("--exclude", metavar="GLOBS", help="leave alone sites that match one of these glob patterns")
    parser.add_argument(
        "--exclude-models",
        metavar="GLOBS",
        help="leave alone models, such as a distillation teacher, whose class or timm name matches one of these",
    )
    parser.add_argument(
        "--unpickle",
        metavar="|".join(UNPICKLE),
        help="what becomes of a pickled model whose host was patched and is not patched here: an error, or the host is "
        "patched as the model says (default: error)",
    )
    parser.add_argument(
        "--compat", metavar="0|1", help="whether to mend what a current environment breaks (default: 1)"
    )


def _run(options: argparse.Namespace) -> int:
    target = options.target[1:] if options.target[:1] == ["--"] else options.target
    environment = dict(os.environ)
    options_of = {setting: f"--{setting.replace('_', '-')}" for setting in VARIABLES}
    given = {setting: value for setting in VARIABLES if (value := getattr(options, setting)) is not None}
    origins = {setting: options_of[setting] if setting in given else VARIABLES[setting] for setting in VARIABLES}
    inherited = {s: os.environ[v] for s, v in VARIABLES.items() if s not in given and os.environ.get(v, "").strip()}
    settings = Settings(**{**inherited, **given}, origin=origins.__getitem__)
    if not target:
        options.parser.error("no script is given, and no module with -m")
    hosts = options.patch or os.environ.get(PATCH_VARIABLE, "").strip() or "timm"
    for host in check_hosts(split_list(hosts), "--patch" if options.patch else PATCH_VARIABLE, HOSTS):
        HOSTS[host].check(settings)
    environment[PATCH_VARIABLE] = hosts
    environment.update({VARIABLES[setting]: value for setting, value in given.items()})
    if options.unpickle is not None:
        environment[UNPICKLE_VARIABLE] = options.unpickle
    read_unpickle(environment.get(UNPICKLE_VARIABLE, ""), "--unpickle" if options.unpickle else UNPICKLE_VARIABLE)
    if not options.module and not Path(target[0]).exists():
        raise SettingsError(f"there is no script {target[0]!r} in {Path.cwd()}; write -m before the name of a module")
    _require_hook()
    arguments = [*_flags_of_interpreter(), *(["-m"] if options.module else []), *target]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def _hook_files() -> list[Path]:
    """Return where the start-up hook lies and is read: not in a folder that is on the path by PYTHONPATH alone."""
    found = [path for folder in sys.path if (path := Path(folder) / HOOK).is_file()]
    variable = "" if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "")
    unread = {os.path.realpath(folder) for folder in variable.split(os.pathsep) if folder}
    unread -= {os.path.realpath(folder) for folder in (*site.getsitepackages(), site.getusersitepackages())}
    return [path for path in found if os.path.realpath(path.parent) not in unread]


def _flags_of_interpreter() -> list[str]:
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return flags


def _require_hook() -> None:
    """Checks that a new interpreter would run the start-up hook.

    Raises:
        SettingsError: It would not, so that the script would run unpatched.
    """
    if sys.flags.no_site or not _hook_files():
        raise SettingsError(
            f"the start-up hook {HOOK} is in no site-packages folder of {sys.executable}, so the script would run "
            "unpatched: install the package with pip (a checkout or a site-packages folder on PYTHONPATH is not "
            "enough), do not use python -S, or call lwpf_patch.apply() in the script"
        )


def _plain_status() -> dict[str, Any]:
    try:
        requested, settings = from_environment(HOSTS)
        request: dict[str, Any] = {"hosts": list(requested), **settings.describe()} if requested else {}
    except LwpfError as error:
        settings = Settings()
        request = {"problem": str(error)}
    hosts = {}
    for name, host in HOSTS.items():
        try:
            sites = host.describe_sites(Settings(uhop=settings.uhop))
            shims = [{"name": shim.name, "why": shim.why, "needed": shim.is_needed()} for shim in host.shims]
            version = host.version() or "unknown"
            hosts[name] = {"version": version, "patchable": True, "sites": sites, "shims": shims}
        except HostNotInstalledError as error:
            hosts[name] = {"patchable": False, "problem": f"{error}; {BESIDE}"}
        except LwpfError as error:
            hosts[name] = {"patchable": False, "problem": str(error)}
    environment = {name: value for name, value in os.environ.items() if name.startswith("LWPF_")}
    return {
        "lwpf_patch": __version__,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "hook": [str(path) for path in _hook_files()],
        "environment": environment,
        "request": request,
        "backend": describe_backend(request.get("backend", "auto")),
        "hosts": hosts,
    }


def _words(request: dict[str, Any]) -> str:
    """Puts the settings of a request into words: those that are always of interest, and those that are no defaults."""
    usual = Settings().describe()
    always = ("func_d", "masking", "backend")
    shown = {name: request[name] for name in usual if name in always or request[name] != usual[name]}
    lists = {name: ",".join(value) if isinstance(value, list) else value for name, value in shown.items()}
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in lists.items())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _status(options: argparse.Namespace) -> int:
    status = _plain_status()
    if options.json:
        print(json.dumps(status, indent=2))
        return 0
    print(f"lwpf_patch {status['lwpf_patch']}, Python {status['python']}, torch {status['torch'] or 'not installed'}")
    print(f"start-up hook: {', '.join(status['hook']) or 'not installed; LWPF_PATCH and lwpf run have no effect'}")
    print(
        f"environment:   {' '.join(f'{k}={v}' for k, v in status['environment'].items()) or 'no LWPF_ variable is set'}"
    )
    request = status["request"]
    if "problem" in request:
        print(f"request:       WRONG: {request['problem']}")
    elif request:
        print(f"request:       patch {', '.join(request['hosts'])}; {_words(request)}")
    print(f"backend:       {status['backend']}")
    for name, host in status["hosts"].items():
        if not host["patchable"]:
            print(f"\n{name}: cannot be patched: {host['problem']}")
            continue
        print(f"\n{name} {host['version']}: these would be patched")
        for each in host["sites"]:
            known = (
                f"known, as in {each['known']}" if each["known"] else "not tested with this version; its shape is known"
            )
            print(f"  {each['name']:<45} {known}")
        for shim in host["shims"]:
            print(f"  shim: {shim['name']} ({'needed' if shim['needed'] else 'not needed here'}): {shim['why']}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    (name,) = check_hosts([options.host], "lwpf diff", HOSTS)
    settings = Settings(include=options.include, exclude=options.exclude, uhop=options.uhop, origin="--{}".format)
    diff = "".join(plan.diff() for plan in HOSTS[name].plans(settings))
    automatic = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if options.color == "always" or (options.color == "auto" and automatic):
        diff = "".join(map(_coloured, diff.splitlines(keepends=True)))
    print(diff, end="")
    return 0


def _coloured(line: str) -> str:
    colours = {"+++": "1", "---": "1", "@@": "36", "+": "32", "-": "31"}
    colour = next((code for start, code in colours.items() if line.startswith(start)), None)
    return f"\x1b[{colour}m{line.rstrip(chr(10))}\x1b[m\n" if colour else line


_PROBE = """
import sys
registry = sys.modules.get("lwpf_patch.patching.registry")
state = registry.status()["hosts"] if registry else {}
print(",".join(name for name, host in state.items() if host["state"] in ("patched", "waiting for its import")))
"""


def _doctor(options: argparse.Namespace) -> int:
    print(f"interpreter:   {sys.executable} (Python {platform.python_version()})")
    print(f"package:       {Path(__file__).parent}")
    print(f"start-up hook: {', '.join(map(str, _hook_files())) or 'in no folder of sys.path'}")
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
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LWPF_")} | {PATCH_VARIABLE: name}
        child = subprocess.run(
            [sys.executable, *_flags_of_interpreter(), "-c", _PROBE], env=environment, capture_output=True, text=True
        )
        fires = child.stdout.strip() == name
        healthy = healthy and fires
        effect = "takes effect" if fires else "has NO effect"
        print(f"{name}: {PATCH_VARIABLE}={name} {effect} in a new interpreter{beside}")
        if not fires:
            print(child.stderr, end="", file=sys.stderr)
    if not healthy:
        print(f"The hook {HOOK} does not run: install this package with pip into this interpreter's environment.")
    return 0 if healthy else 1
