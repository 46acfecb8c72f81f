"""What the recipes share: their usual options, and the call of `lwpf compare` that each of them makes."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from lwpf_patch.cli import main as lwpf

#: The arms that forget, as in the paper.
RELU, PFU = "relu", "pfu: --func-d pfu:mu=dmedian,bias=mu,sigma=0.01"
#: The arm that forgets nothing and is the nearest other method.
SOFTMAX1 = "softmax1: --func-d none --sep softmax_n:n=1"
#: Where the scripts of the recipes write their figures, and what is compared of them. The mean over the epochs is the
#: higher the earlier a network learns.
FIGURES = "{output}/run.json"
TEST_METRICS = (
    *("--metric", f"json:{FIGURES}:epochs.test_accuracy", "--name", "test accuracy, %"),
    *("--metric", f"json:{FIGURES}:epochs.test_accuracy", "--value", "mean"),
    *("--name", "test accuracy over the epochs, %"),
    *("--metric", f"json:{FIGURES}:epochs.test_loss", "--name", "test loss", "--better", "lower"),
    *("--time", f"json:{FIGURES}:seconds"),
)


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser to which a recipe adds the options of its own; `parse` adds those that all have."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse(
    parser: argparse.ArgumentParser, output: str, seeds: int, steps: tuple[int | None, int], unit: str = "epochs"
) -> argparse.Namespace:
    """Read the command line.

    Args:
        parser: Of the recipe.
        output: The usual folder, below build; an option in braces stands for its value.
        seeds: The usual number of seeds; with --quick it is 1.
        steps: The usual length of a run, None where it depends on the task, and that with --quick.
        unit: What the length is counted in, and the name of its option.
    """
    usual, quick = steps
    length = usual or "as the task has it"
    add = parser.add_argument
    add("--seeds", metavar="N", help=f"how many, or which, as in 0-9 (default: {seeds}; 1 with --quick)")
    add(f"--{unit}", type=positive, metavar="N", help=f"{unit} of a run (default: {length}; {quick} with --quick)")
    add("--jobs", type=positive, default=2, metavar="N", help="runs at a time (default: %(default)s)")
    add("--threads", type=positive, default=1, metavar="N", help="CPU threads of each run: models this small gain "
        "little from more (default: %(default)s)")  # fmt: skip
    add("--output", type=Path, metavar="DIR", help=f"where to write (default: build/{output})")
    add("--quick", action="store_true", help=f"smoke test: {quick} {unit} and one seed, in a folder of its own")
    options = parser.parse_args()
    options.seeds = options.seeds or ("1" if options.quick else str(seeds))
    if getattr(options, unit) is None:
        setattr(options, unit, quick if options.quick else usual)
    options.output = options.output or Path("build", output.format_map(vars(options)) + "-quick" * options.quick)
    return options


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def compare(options: argparse.Namespace, words: list[str]) -> int:
    """Say how `lwpf compare` is called, and call it: in this process, so that it ends its runs when we are interrupted.

    Args:
        options: What `parse` has returned.
        words: What it is called with besides --seeds, --jobs, --threads and --output; the command at the end.

    Returns:
        Its exit code.
    """
    usual = ["--seeds", options.seeds, "--jobs", str(options.jobs), "--threads", str(options.threads)]
    words = ["compare", *usual, "--output", str(options.output), *words]
    installed = shutil.which("lwpf")
    is_ours = installed is not None and Path(installed).parent == Path(sys.executable).parent
    program = ["lwpf"] if is_ours else [os.path.relpath(sys.executable), "-m", "lwpf_patch"]
    print(f"$ {shlex.join([*program, *words])}", flush=True)
    return lwpf(words)


def python(script: Path, *arguments: str) -> list[str]:
    """Return the command at the end: a script, as it is called from where we are, and its arguments."""
    return ["--", "python", os.path.relpath(script), *arguments]
