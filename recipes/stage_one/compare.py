"""Trains the digits and the bit patterns with plain attention and with U-Hop, over several seeds, and compares."""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the recipes are plain files, no package; what they share lies beside them

from comparison import PLAIN, Curve, Metric, Recipe, Run, Runs, Variant, compare, parse_arguments, train  # noqa: E402

#: What lwpf_patch says when Stage I has run.
STAGE_ONE = re.compile(r"^lwpf_patch: U-Hop Stage I on \w+ after step (\d+): .*; separation loss by layer: (.+)$", re.M)
BEFORE_AFTER = ("before", "after")
BOTH = "both"
#: The control: Φ stays the identity as far as Stage I goes, and the task trains it like any other parameter. What U-Hop
#: has over this is what Stage I gives.
CONTROL = "phi"
NEXT_TO_NOTHING = "iters=1,t=2,lr=1e-12"


@dataclass(frozen=True)
class StageOne(Recipe):
    """The comparison on one of the training scripts.

    Attributes:
        epoch_steps: Steps of the optimizer in an epoch, after so many of which bilevel U-Hop runs Stage I again.
        arguments: More arguments of the script.
    """

    epoch_steps: int = 0
    arguments: tuple[str, ...] = ()

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add what to train, and the settings of Stage I."""
        parser.add_argument(
            "--task", choices=(*TASKS, BOTH), default=BOTH, help="which script to train with (default: %(default)s)"
        )
        parser.add_argument(
            "--uhop",
            default="iters=100,t=2,lr=0.1",
            metavar="OPTIONS",
            help="Stage I as `lwpf run` has it, without every= and until= (default: %(default)s, as there)",
        )
        parser.add_argument("--relu", action="store_true", help="also train LwPF's ReLU, without and with U-Hop")

    def for_options(self, options: argparse.Namespace) -> StageOne:
        """Return the recipe with the variants that the command line asks for."""
        bilevel = f"{options.uhop},every={self.epoch_steps}"  # until= is then the tenth epoch
        variants = [
            Variant(PLAIN, "plain attention", "#000000", "-"),
            Variant(CONTROL, "Φ trained, no Stage I", "#D55E00", "-.", uhop=NEXT_TO_NOTHING),
            Variant("uhop", "U-Hop, Stage I once", "#CC79A7", "--", uhop=options.uhop),
            Variant("bilevel", "U-Hop, bilevel", "#009E73", ":", uhop=bilevel),
        ]
        if options.relu:
            variants += [
                Variant("relu", "LwPF, ReLU", "#0072B2", "-.", func_d="relu"),
                Variant("relu+uhop", "LwPF, ReLU and U-Hop", "#E69F00", "-", func_d="relu", uhop=options.uhop),
            ]
        return dataclasses.replace(self, variants=tuple(variants))

    def run(
        self, options: argparse.Namespace, variant: Variant, seed: int, folder: Path, quiet: bool
    ) -> tuple[Run, list[str]]:
        """Trains, and takes note of what Stage I did to the separation loss."""
        # Always quiet: what is to be noted is on stderr.
        arguments = [*self.command(options, seed, folder, quiet=True), *self.arguments]
        stdout, stderr = train(self.host, variant, arguments, folder, quiet=True)
        run = self.read(folder, stdout)
        run["mean_test_accuracy"] = statistics.mean(entry["test_accuracy"] for entry in run["epochs"])
        run["stage_one"] = stage_one(stderr)
        if (variant.uhop is not None) != bool(run["stage_one"]):
            sys.exit(
                f"{stderr}compare.py: a {variant.name} run, with uhop {variant.uhop!r}, says this of Stage I: "
                f"{run['stage_one'] or 'nothing'}; see above whether lwpf_patch words its line as STAGE_ONE expects"
            )
        return run, [line for line in STAGE_ONE.sub("", stderr).splitlines() if line]

    def summarise(self, runs: Runs) -> dict[str, dict[str, Any]]:
        """Add the separation loss before and after each Stage I, the mean over layers and seeds."""
        summary = super().summarise(runs)
        for variant, repeats in runs.items():
            if not repeats[0]["stage_one"]:
                continue
            summary[variant]["separation_loss"] = [
                {"step": passes[0]["step"]}
                | {when: statistics.mean(value for each in passes for value in each[when]) for when in BEFORE_AFTER}
                for passes in zip(*(run["stage_one"] for run in repeats), strict=True)
            ]
        return summary

    def verdicts(self, options: argparse.Namespace, runs: Runs, summary: dict[str, dict[str, Any]]) -> list[str]:
        """Judge the end and the way there, and say what Stage I did to the separation loss."""
        parts = []
        for variant, row in summary.items():
            passes = row.get("separation_loss", [])
            first_and_last = passes[:1] + passes[1:][-1:]
            texts = [f"{each['before']:.2f} -> {each['after']:.2f} (step {each['step']})" for each in first_and_last]
            if texts:
                parts.append(f"{variant} {' ... '.join(texts)}")
        pairs = [(variant, PLAIN) for variant in runs if variant != PLAIN]
        pairs += [("uhop", CONTROL), ("bilevel", CONTROL)]
        return [
            f"Separation loss before and after Stage I, mean over layers and seeds: {'; '.join(parts)}.",
            *(
                f"{metric.name}, {self.verdict(runs, variant, metric, against)}"
                for metric in self.metrics[:2]
                for variant, against in pairs
            ),
        ]


def stage_one(stderr: str) -> list[dict[str, Any]]:
    """Read what lwpf_patch said: for each Stage I the step and, by layer, the separation loss before and after."""
    passes = []
    for step, layers in STAGE_ONE.findall(stderr):
        pairs = [layer.split(" -> ") for layer in layers.split(", ")]
        losses = ([float(loss) for loss in column] for column in zip(*pairs, strict=True))
        passes.append({"step": int(step), **dict(zip(BEFORE_AFTER, losses, strict=True))})
    return passes


DIGITS = StageOne(
    name="stage_one-digits",
    description=__doc__,
    title="U-Hop in a small vision transformer on handwritten digits",
    host="timm",
    script=HERE.parent / "digits" / "train.py",
    metrics=(
        Metric("test_accuracy", "test accuracy", percent=True),
        Metric("mean_test_accuracy", "accuracy over epochs", percent=True),
        Metric("test_loss", "test loss", higher_is_better=False),
    ),
    curves=(
        Curve("test_accuracy", "Test accuracy", "test accuracy (%)", percent=True),
        Curve("test_accuracy", "Test accuracy, the end enlarged", "test accuracy (%)", percent=True, zoom=True),
        Curve("train_loss", "Training loss", "cross entropy", log=True),
    ),
    steps=(30, 3),
    seeds=6,
    items="images",
    confident=True,
    jobs=2,
    epoch_steps=19,  # 1,198 images in batches of 64
)
TASKS = {
    "digits": DIGITS,
    "bit_pattern": dataclasses.replace(
        DIGITS,
        name="stage_one-bit_pattern",
        title="U-Hop in a Hopfield pooling on bit patterns",
        host="hflayers",
        script=HERE.parent / "bit_pattern" / "train.py",
        curves=(DIGITS.curves[0], dataclasses.replace(DIGITS.curves[-1], log=False)),
        items="bags",
        epoch_steps=48,  # 1,536 bags in batches of 32
        arguments=("--network=pooling-adapted",),  # as recipes/bit_pattern has it
    ),
}


def main() -> None:
    """Compare on one script after the other."""
    options = parse_arguments(dataclasses.replace(DIGITS, name="stage_one"))  # the folder of both
    for name, recipe in TASKS.items():
        if options.task in (name, BOTH):
            print(f"\n{recipe.title}\n")
            compare(recipe.for_options(options), options)


if __name__ == "__main__":
    main()
