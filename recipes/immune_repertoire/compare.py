"""Trains DeepRC's own example with plain attention and with partial forgetting, over several seeds, and compares.

One call of `lwpf compare` does the work. What has finished is not repeated: after Ctrl-C, or with more seeds, the same
command goes on.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from lwpf_patch.observing.writing import read_records

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the recipes are plain files, no package; what they share lies beside them

import calling  # noqa: E402

EXAMPLE = "deeprc.examples.example_single_task_cnn"
#: With the script's own learning rate, 0.0001, as few updates as ours would show nothing.
EXAMPLE_ARGUMENTS = ["--learning_rate=0.001"]
REPOSITORY = "https://github.com/ml-jku/DeepRC"
#: Where the example has its data, in the repository.
DATASET = Path("deeprc", "datasets", "example_dataset")

#: What is compared. The baseline is a patched DeepRC too, one that forgets nothing: the patch brings the shims without
#: which DeepRC does not run in a current environment. The last one is the remedy that lwpf_patch names for dead bags.
BASELINE = "none"
ARMS = {
    "relu": "--func-d relu",
    "pfu": "--func-d pfu:mu=dmedian,bias=mu,sigma=0.01",
    "relu, empty_rows=keep": "--func-d relu:empty_rows=keep",
}
OBSERVED = "forgetting.jsonl"
#: So many updates at the beginning and at the end of a run are looked at for dead bags.
UPDATES = 32

#: A score of the first task in the dictionaries that DeepRC prints: 0.5, nan, or np.float64(0.5).
SCORE = r".*?{}.: (?:[\w.]+\()?(?P<value>[-+.\w]+)"
TRAIN = r"\[training_inference\] u: (?P<step>\d+); scores: " + SCORE
TEST = r"Test scores:\n" + SCORE

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
MOTIF = "SFEN"


def main() -> int:
    """Compare, and return the exit code."""
    options = parse_arguments()
    is_random = options.script == EXAMPLE and options.data == "example"
    code = calling.compare(options, words(options, is_random))
    if is_random:
        print("The labels are random: learning is learning by heart here, and the test set says nothing.")
    if code == 0:
        print(f"Updates whose last bag forgot every score, of the first {UPDATES} and of the last {UPDATES}:")
        for row in dead_bags(options.output):
            print(f"  {row}")
    return code


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = calling.parser(__doc__)
    parser.add_argument(
        "--evaluate-at", type=calling.positive, metavar="N", help="evaluate every N updates (default: a tenth of them)"
    )
    parser.add_argument(
        "--data",
        choices=("example", "implanted"),
        default="example",
        help="what the example trains on: DeepRC's own random repertoires, for which its repository is cloned into the "
        "output folder, or generated ones with an implanted motif (default: %(default)s)",
    )
    parser.add_argument(
        "--script",
        default=EXAMPLE,
        metavar="MODULE",
        help="another of DeepRC's scripts, which brings data of its own: see the README (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="as the script has it (default: %(default)s)")
    parser.add_argument(
        "more",
        nargs="*",
        metavar="OPTION",
        help=f"behind --: more options of the script (default: {' '.join(EXAMPLE_ARGUMENTS)} for the example)",
    )
    return calling.parse(parser, "immune_repertoire/{data}", seeds=3, steps=(200, 4), unit="updates")


def words(options: argparse.Namespace, is_random: bool) -> list[str]:
    """Return what `lwpf compare` is called with, and write the data of the example.

    Args:
        options: The options.
        is_random: Whether the labels are: then it is the training set that counts.
    """
    test = ("--metric", TEST.format("roc_auc"), "--name", "test AUC")
    train = ("--metric", TRAIN.format("roc_auc"), "--name", "train AUC")
    command = ["--", "python", "-m", options.script]
    more = options.more
    if options.script == EXAMPLE:
        datasets = Path(options.output, f"datasets-{options.data}").absolute()
        repertoires = implanted() if options.data == "implanted" else downloaded(options.output / "DeepRC")
        write_dataset(datasets / DATASET.name, *repertoires)
        command = calling.python(HERE / "beside.py", str(datasets), EXAMPLE)
        more = more or EXAMPLE_ARGUMENTS
    observe = f"--observe every=1,path={OBSERVED},tensorboard=off"
    return [
        *("--patch", "deeprc", "--arm", BASELINE),
        *(word for label, text in ARMS.items() for word in ("--arm", f"{label}: {text} {observe}")),
        *((*train, *test) if is_random else (*test, *train)),
        *("--metric", TRAIN.format("loss"), "--name", "train loss", "--better", "lower"),
        # DeepRC asks for three threads, wherever it runs; this is the one limit that it cannot lift.
        *("--env", f"OMP_THREAD_LIMIT={options.threads}", "--in-output", *command),
        *("--device", options.device, "--n_updates", str(options.updates), "--rnd_seed", "{seed}"),
        *("--evaluate_at", str(options.evaluate_at or max(1, options.updates // 10)), *more),
    ]


def dead_bags(folder: Path) -> list[str]:
    """Return, for each arm that forgets, how many of the bags that were looked at forgot every score, seed by seed.

    Args:
        folder: Of the comparison.
    """
    found: dict[str, list[str]] = defaultdict(list)
    with (folder / "runs.csv").open(newline="", encoding="utf-8") as file:
        for run in csv.DictReader(file):
            if run["arm"] != BASELINE:
                records = read_records(Path(run["log"]).parent / "output" / OBSERVED)
                empty = [record["empty_rows"] == [1.0] for record in records if record["training"]]
                first, last = (statistics.mean(part) for part in (empty[:UPDATES], empty[-UPDATES:]))
                found[run["arm"]].append(f"seed {run['seed']} {first:.0%}, {last:.0%}")
    return [f"{arm}: {'; '.join(seeds)}" for arm, seeds in found.items()]


# --- data -----------------------------------------------------------------------------------------------------------


def downloaded(checkout: Path) -> tuple[list[list[str]], list[str]]:
    """Read the example data from DeepRC's repository, which is cloned unless it is there.

    Returns:
        The sequences of each repertoire, and "+" or "-" for each.

    Raises:
        SystemExit: It cannot be cloned.
    """
    folder = checkout / DATASET
    if not folder.exists():
        command = ["git", "clone", "--quiet", "--depth=1", REPOSITORY, str(checkout)]
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=os.environ | {"GIT_TERMINAL_PROMPT": "0"})
        except (OSError, subprocess.CalledProcessError):  # no git, or what git has said on stderr
            sys.exit(
                f"compare.py: cannot clone {REPOSITORY}, whose example data the deeprc package does not contain. "
                f"Clone it elsewhere and copy it to {checkout}, or use --data implanted, which needs no download"
            )
    table = read_table(folder / "metadata.tsv")
    repertoires = [[row["amino_acid"] for row in read_table(folder / "repertoires" / line["ID"])] for line in table]
    return repertoires, [line["binary_target_1"] for line in table]


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a file of tab-separated values."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def implanted(count: int = 100, sequences: int = 200, witness_rate: float = 0.05) -> tuple[list[list[str]], list[str]]:
    """Generate random repertoires, every other one with a motif in some of its sequences.

    Args:
        count: How many repertoires.
        sequences: How many sequences each of them has.
        witness_rate: Fraction of a positive repertoire's sequences that carry the motif.

    Returns:
        The sequences of each repertoire, and "+" or "-" for each.
    """
    generator = random.Random(0)
    labels = ["+", "-"] * (count // 2)
    repertoires = []
    for label in labels:
        repertoire = []
        for _ in range(sequences):
            sequence = "".join(generator.choices(AMINO_ACIDS, k=generator.randint(10, 19)))
            if label == "+" and generator.random() < witness_rate:
                start = generator.randint(0, len(sequence) - len(MOTIF))
                sequence = sequence[:start] + MOTIF + sequence[start + len(MOTIF) :]
            repertoire.append(sequence)
        repertoires.append(repertoire)
    return repertoires, labels


def write_dataset(folder: Path, repertoires: Sequence[Sequence[str]], labels: Sequence[str]) -> None:
    """Write a dataset as DeepRC's example reads it, unless it is there: a table of labels and an HDF5 container.

    DeepRC could make the container itself, from the tables of its repository, but then would read the same repertoire
    100 times: of each name it looks at the suffix alone (``os.path.splitext(name)[-1]`` in its dataset_readers), which
    is ".tsv" for all. Ours have a suffix each.
    """
    metadata = folder / "metadata.tsv"
    if metadata.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"repertoire.{number:03d}" for number in range(len(repertoires))]
    every = [sequence for repertoire in repertoires for sequence in repertoire]
    lengths = np.array([len(sequence) for sequence in every])
    indices = np.full((len(every), lengths.max()), -1, np.int8)  # -1 is padding
    for row, sequence in zip(indices, every, strict=True):
        row[: len(sequence)] = [AMINO_ACIDS.index(letter) for letter in sequence]
    ends = np.cumsum([len(repertoire) for repertoire in repertoires])
    with h5py.File(folder / "repertoires", "w") as file:
        file["metadata/aas"] = AMINO_ACIDS
        file["metadata/n_samples"] = len(repertoires)
        file["metadata/sample_keys"] = names
        file["metadata/stats"] = f"{len(every)} sequences"
        file["sampledata/seq_lens"] = lengths
        file["sampledata/sequences"] = indices
        file["sampledata/sequence_counts"] = np.ones(len(every))  # the example does not look at them
        file["sampledata/sample_sequences_start_end"] = np.stack([np.append(0, ends[:-1]), ends], axis=1)
    lines = ["ID\tbinary_target_1", *(f"{name}\t{label}" for name, label in zip(names, labels, strict=True))]
    metadata.write_text("\n".join(lines) + "\n", encoding="utf-8")  # the last, so that it says that all is there


if __name__ == "__main__":
    sys.exit(main())
