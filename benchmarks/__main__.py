"""Benchmarks: each measures its variants side by side in one run, so that ratios count and not seconds.

Medians with quartiles go into a table and, with --output NAME, into NAME.json, NAME.csv and, where there is a plot,
NAME.png, with the machine and the versions beside them. Progress is told on stderr; --quick shows that all works.
"""

from __future__ import annotations

import argparse
import sys

from . import attention, gpu, reporting, separation, startup, tiles, train_step

BENCHMARKS = {
    "attention": attention,
    "train_step": train_step,
    "separation": separation,
    "startup": startup,
    "tiles": tiles,
    "gpu": gpu,
}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="NAME", dest="benchmark")
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        module.add_arguments(command)
        reporting.add_arguments(command, getattr(module, "OUTPUT_HELP", reporting.OUTPUT_HELP))
        command.set_defaults(run=module.run)
    return parser


def main() -> None:
    """Run the benchmark that the command line names."""
    arguments = sys.argv[1:]
    options = make_parser().parse_args(arguments)
    options.command_line = arguments  # what a child that measures memory is started with
    options.run(options)


if __name__ == "__main__":
    main()
