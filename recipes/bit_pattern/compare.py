"""Trains on bit patterns with plain attention and with partial forgetting, over several seeds, and compares.

One call of `lwpf compare` does the work. What has finished is not repeated: after Ctrl-C, or with more seeds, the same
command goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the recipes are plain files, no package; what they share lies beside them

import calling  # noqa: E402

#: The epochs after which a longer training is compared as well.
BETWEEN = (30, 60, 100, 150)
#: What can be compared with plain attention. uhop brings a control with as many parameters.
ARMS = {
    "relu": calling.RELU,
    "pfu": calling.PFU,
    "softmax1": calling.SOFTMAX1,
    "uhop": "uhop: --uhop on",
}


def main() -> int:
    """Compare, and return the exit code."""
    parser = calling.parser(__doc__)
    parser.add_argument("--network", default="pooling-adapted", help="see train.py's --help (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["relu", "pfu"], metavar="ARM",
        help=f"what is compared with plain attention, of {', '.join(ARMS)} (default: relu pfu)")  # fmt: skip
    parser.add_argument("more", nargs="*", metavar="OPTION", help="behind --: more options of train.py")
    options = calling.parse(parser, "bit_pattern/{network}", seeds=8, steps=(30, 3))
    words = [
        *("--patch", "hflayers", "--arm", "plain", *(word for arm in options.arms for word in ("--arm", ARMS[arm]))),
        *calling.TEST_METRICS,
    ]
    for epoch in (epoch for epoch in BETWEEN if epoch < options.epochs):
        words += ["--metric", f"json:{calling.FIGURES}:epochs.test_accuracy", "--value", str(epoch)]
        words += ["--name", f"test accuracy after epoch {epoch}, %"]
    arguments = ["--network", options.network, "--epochs", str(options.epochs)]
    arguments += ["--seed", "{seed}", "--output", calling.FIGURES, *options.more]
    return calling.compare(options, [*words, *calling.python(HERE / "train.py", *arguments)])


if __name__ == "__main__":
    sys.exit(main())
