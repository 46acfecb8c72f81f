"""Trains the digits with plain attention and with partial forgetting, over several seeds, and compares.

One call of `lwpf compare` does the work. What has finished is not repeated: after Ctrl-C, or with more seeds, the same
command goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the recipes are plain files, no package; what they share lies beside them

import calling  # noqa: E402


def main() -> int:
    """Compare, and return the exit code."""
    parser = calling.parser(__doc__)
    parser.add_argument("more", nargs="*", metavar="OPTION", help="behind --: more options of train.py")
    options = calling.parse(parser, "digits", seeds=5, steps=(None, 3))
    words = [
        *("--arm", "plain", "--arm", calling.RELU, "--arm", calling.PFU),
        *("--metric", f"json:{calling.FIGURES}:epochs.noisy_test_accuracy", "--name", "test accuracy under noise, %"),
        *calling.TEST_METRICS,
    ]
    epochs = [] if options.epochs is None else ["--epochs", str(options.epochs)]
    arguments = [*epochs, "--seed", "{seed}", "--output", calling.FIGURES, *options.more]
    return calling.compare(options, [*words, *calling.python(HERE / "train.py", *arguments)])


if __name__ == "__main__":
    sys.exit(main())
