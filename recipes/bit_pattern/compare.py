"""Trains on bit patterns with plain attention and with partial forgetting, over several seeds, and compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the recipes are plain files, no package; what they share lies beside them

from comparison import Curve, Metric, Recipe, main  # noqa: E402


class BitPattern(Recipe):
    """The comparison of one of train.py's networks."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the choice of the network."""
        parser.add_argument("--network", default="pooling-adapted", help="see train.py's --help (default: %(default)s)")

    def command(self, options: argparse.Namespace, seed: int, folder: Path, quiet: bool) -> list[str]:
        """Pass it on."""
        return [*super().command(options, seed, folder, quiet), f"--network={options.network}"]


RECIPE = BitPattern(
    name="bit_pattern",
    description=__doc__,
    title="Bit patterns with hflayers, network {network}",
    host="hflayers",
    script=HERE / "train.py",
    metrics=(
        Metric("test_accuracy", "test accuracy", percent=True),
        Metric("test_loss", "test loss", higher_is_better=False),
    ),
    curves=(
        Curve("test_accuracy", "Test accuracy", "test accuracy (%)", percent=True),
        Curve("train_loss", "Training loss", "cross entropy"),
    ),
    steps=(30, 3),
    seeds=8,
    items="bags",
    confident=True,
    jobs=2,
)

if __name__ == "__main__":
    main(RECIPE)
