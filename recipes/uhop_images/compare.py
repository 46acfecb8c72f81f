"""Takes U-Hop's image experiment apart: the variants differ in one thing each.

One call of `lwpf compare` for each patch size does the work. What has finished is not repeated: after Ctrl-C, or with
more seeds, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the recipes are plain files, no package; what they share lies beside them

import calling  # noqa: E402

VALUES = "--values input"
MAP = f"{VALUES} --feature-map"
#: What is compared: label and arm. Each has one thing more than the one that it is compared with in the README.
ARMS = {
    "plain": "plain",
    "sparsemax": "--sep sparsemax --func-d none",
    "values": f"plain -- {VALUES}",
    "whitened": f"plain -- {VALUES} --whiten",
    "map": f"plain -- {MAP}",
    "stage_one": f"plain -- {MAP} --stage-one map",
    "everything": f"plain -- {MAP} --stage-one all",
    "everything_sparsemax": f"--sep sparsemax --func-d none -- {MAP} --stage-one all",
    "uhop": f"--uhop on -- {VALUES}",
}


@dataclass(frozen=True)
class Task:
    """A size of the experiment.

    Attributes:
        dim: Features of a pattern.
        epochs: Of a run.
    """

    dim: int
    epochs: int


#: By the side of a patch. 32 is the official code's, with its size; the others are what two cores train in an hour.
TASKS = {32: Task(dim=512, epochs=25), 8: Task(dim=128, epochs=25), 4: Task(dim=128, epochs=10)}


def main() -> int:
    """Compare at one patch size after the other; return the exit code of the first comparison that fails, or 0."""
    parser = calling.parser(__doc__)
    add = parser.add_argument
    add("--patch", type=int, nargs="+", choices=TASKS, default=[*TASKS], metavar="SIDE",
        help=f"sides of the patches, of {', '.join(map(str, TASKS))} (default: all)")  # fmt: skip
    add("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="ARM",
        help=f"of {', '.join(ARMS)} (default: all)")  # fmt: skip
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where CIFAR-10 is (default: %(default)s)")
    add("--download", action="store_true", help="have torchvision fetch CIFAR-10 to --data-dir if it is not there")
    add("--device", default="cpu", help="(default: %(default)s)")
    add("more", nargs="*", metavar="OPTION", help="behind --: more options of train.py, which win over the recipe's")
    options = calling.parse(parser, "uhop_images", seeds=5, steps=(None, 1))
    if len(options.arms) < 2:
        parser.error("argument --arms: a comparison needs two or more")
    folder = options.output
    for side in options.patch:
        options.output = folder / f"patch{side}"
        code = calling.compare(options, words(options, side))
        if code:
            return code
    return 0


def words(options: argparse.Namespace, side: int) -> list[str]:
    """Return what `lwpf compare` is called with for a patch size."""
    task = TASKS[side]
    arms = (name if name == ARMS[name] else f"{name}: {ARMS[name]}" for name in options.arms)
    arguments = [
        *("--data-dir", str(options.data_dir), *(["--download"] if options.download else [])),
        *("--patch", str(side), "--dim", str(task.dim), "--epochs", str(options.epochs or task.epochs)),
        *("--device", options.device, "--seed", "{seed}", "--output", calling.FIGURES, *options.more),
    ]
    return [
        *("--patch", "torch", *(word for arm in arms for word in ("--arm", arm))),
        *calling.TEST_METRICS,
        *calling.python(HERE / "train.py", *arguments),
    ]


if __name__ == "__main__":
    sys.exit(main())
