"""Trains the digits with plain attention and with partial forgetting, over several seeds, and compares."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the recipes are plain files, no package; what they share lies beside them

from comparison import Curve, Metric, Recipe, main  # noqa: E402

RECIPE = Recipe(
    name="digits",
    description=__doc__,
    title="A small vision transformer on handwritten digits",
    host="timm",
    script=HERE / "train.py",
    metrics=(Metric("test_accuracy", "test accuracy", percent=True),),
    curves=(
        Curve("test_accuracy", "Test accuracy", "test accuracy (%)", percent=True, zoom=True),
        Curve("train_loss", "Training loss", "cross entropy", log=True),
    ),
    steps=(30, 3),
    seeds=3,
    items="images",
    confident=False,
)

if __name__ == "__main__":
    main(RECIPE)
