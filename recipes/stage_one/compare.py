"""Trains the digits and the bit patterns with plain attention and with U-Hop, over several seeds, and compares.

One call of `lwpf compare` for each does the work, and adds the control: the same feature maps, which the task trains as
well, but a Stage I that moves nothing. What has finished is not repeated: after Ctrl-C, or with more seeds, the same
command goes on.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the recipes are plain files, no package; what they share lies beside them

import calling  # noqa: E402

BOTH = "both"
#: What lwpf_patch says when Stage I has run.
STAGE_ONE = re.compile(r"^lwpf_patch: U-Hop Stage I on \w+ after step (\d+): .*; separation loss by layer: (.+)$", re.M)


@dataclass(frozen=True)
class Task:
    """A training script that knows nothing of U-Hop.

    Attributes:
        host: The library that is patched.
        script: Where it lies.
        epoch_steps: Steps of the optimizer in an epoch, after so many of which bilevel U-Hop runs Stage I again.
        arguments: More arguments of the script.
    """

    host: str
    script: Path
    epoch_steps: int
    arguments: tuple[str, ...] = ()


TASKS = {
    "digits": Task(
        "timm",
        HERE.parent / "digits" / "train.py",
        epoch_steps=19,  # 1,198 images in batches of 64
        arguments=("--size", "8"),
    ),
    "bit_pattern": Task(
        "hflayers",
        HERE.parent / "bit_pattern" / "train.py",
        epoch_steps=48,  # 1,536 bags in batches of 32
        arguments=("--network", "pooling-adapted"),  # as recipes/bit_pattern has it
    ),
}


def main() -> int:
    """Compare on one script after the other, and return the exit code of the first comparison that fails, or 0."""
    options = parse_arguments()
    folder = options.output
    for name, task in TASKS.items():
        if options.task not in (name, BOTH):
            continue
        options.output = folder / name
        code = calling.compare(options, words(options, task))
        if code:
            return code
        print("Separation loss before and after Stage I, means over layers and seeds:")
        for line in separation(options.output):
            print(f"  {line}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = calling.parser(__doc__)
    parser.add_argument(
        "--task", choices=(*TASKS, BOTH), default=BOTH, help="which script to train with (default: %(default)s)"
    )
    parser.add_argument(
        "--uhop",
        default="iters=100,t=2,lr=0.1",
        metavar="OPTIONS",
        help="Stage I as lwpf run has it, without every= and until= (default: %(default)s, as there)",
    )
    parser.add_argument("--relu", action="store_true", help="also train LwPF's ReLU, without and with U-Hop")
    return calling.parse(parser, "stage_one", seeds=6, steps=(30, 3))


def words(options: argparse.Namespace, task: Task) -> list[str]:
    """Return what `lwpf compare` is called with."""
    arms = ["plain", f"uhop: --uhop {options.uhop}"]
    arms += [f"bilevel: --uhop {options.uhop},every={task.epoch_steps}"]  # until= is then the tenth epoch
    if options.relu:
        arms += [calling.RELU, f"relu+uhop: --func-d relu --uhop {options.uhop}"]
    arguments = [*task.arguments, "--epochs", str(options.epochs), "--seed", "{seed}", "--output", calling.FIGURES]
    return [
        *("--patch", task.host, *(word for arm in arms for word in ("--arm", arm))),
        *calling.TEST_METRICS,
        *calling.python(task.script, *arguments),
    ]


def separation(folder: Path) -> list[str]:
    """Return for each arm with U-Hop what the first and the last Stage I did, as its runs have said.

    Args:
        folder: Of the comparison.
    """
    before_after: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    with (folder / "runs.csv").open(newline="", encoding="utf-8") as file:
        for run in csv.DictReader(file):
            for step, layers in STAGE_ONE.findall(Path(run["log"]).read_text(encoding="utf-8")):
                for layer in layers.split(", "):
                    before, after = layer.split(" -> ")
                    before_after[run["arm"], int(step)].append((float(before), float(after)))
    lines = []
    for arm in dict.fromkeys(arm for arm, _ in before_after):
        steps = sorted(step for own, step in before_after if own == arm)
        for step in dict.fromkeys((steps[0], steps[-1])):
            before, after = (statistics.mean(values) for values in zip(*before_after[arm, step], strict=True))
            lines.append(f"{arm}, step {step}: {before:.2f} -> {after:.2f}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
