"""Trains DeepRC's own example with plain attention and with partial forgetting, over several seeds, and compares."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import platform
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the recipes are plain files, no package; what they share lies beside them

from comparison import PLAIN, VARIANTS, Curve, Metric, Recipe, Run, Runs, Variant, main, positive, train  # noqa: E402

EXAMPLE = "deeprc.examples.example_single_task_cnn"
#: With the script's own learning rate, 0.0001, as few updates as ours would show nothing.
EXAMPLE_ARGUMENTS = ["--learning_rate=0.001"]
REPOSITORY = "https://github.com/ml-jku/DeepRC"
#: Where the example has its data, in the repository and, but for the first folder, seen from its working directory.
DATASET = Path("deeprc", "datasets", "example_dataset")

#: One variant more than elsewhere: the remedy that lwpf_patch names when it sees dead bags.
REMEDY = Variant(
    "relu, empty_rows=keep", "LwPF, ReLU, empty_rows=keep", colour="#009E73", style=":", func_d="relu:empty_rows=keep"
)

#: Ours for the sets of DeepRC's log; the test set is not among them, it comes after the training.
SETS = {"training_inference": "train", "validation": "validation"}
SCORES = {"roc_auc": "AUC", "bacc": "bal. accuracy", "loss": "loss"}
LOGGED = re.compile(r"^\[(\w+)\] u: (\d+); scores: (.*);$", re.MULTILINE)
TESTED = re.compile(r"^Test scores:\n(.*)$", re.MULTILINE)
#: A number among the scores: 0.5, nan, or np.float64(0.5).
NUMBER = re.compile(r"'(\w+)': (?:[\w.]+\()?([-+.\w]+)")

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
MOTIF = "SFEN"

#: The metrics that the table has room for.
SHOWN = ("train_roc_auc", "test_roc_auc", "train_bacc", "train_loss")


class ImmuneRepertoire(Recipe):
    """The comparison on one of DeepRC's scripts."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add what to train, and on which data."""
        parser.add_argument(
            "--evaluate-at", type=positive, metavar="N", help="evaluate every N updates (default: a tenth of them)"
        )
        parser.add_argument(
            "--data",
            choices=("example", "implanted"),
            default="example",
            help="what the example trains on: DeepRC's own random repertoires, for which its repository is cloned "
            "into the output folder, or generated ones with an implanted motif (default: %(default)s)",
        )
        parser.add_argument(
            "--script",
            default=EXAMPLE,
            metavar="MODULE",
            help="another of DeepRC's scripts, which brings data of its own: see the README (default: %(default)s)",
        )
        parser.add_argument("--device", default="cpu", help="as the script has it (default: %(default)s)")
        parser.add_argument(
            "script_arguments",
            nargs="*",
            metavar="ARGUMENT",
            help=f"after --, more arguments of the script (default: {' '.join(EXAMPLE_ARGUMENTS)} for the example)",
        )

    def prepare(self, options: argparse.Namespace, shared: Path) -> None:
        """Write the data of the example, which looks for them beside its working directory."""
        if options.script == EXAMPLE:
            repertoires = implanted() if options.data == "implanted" else downloaded(options.output / "DeepRC")
            write_dataset(Path(shared, *DATASET.parts[1:]), *repertoires)

    def run(
        self, options: argparse.Namespace, variant: Variant, seed: int, folder: Path, quiet: bool
    ) -> tuple[Run, list[str]]:
        """Trains, and takes note of whether lwpf_patch warned of dead bags."""
        # DeepRC asks for three threads, wherever it runs; this is the one limit that it cannot lift.
        threads = dict.fromkeys(("OMP_THREAD_LIMIT", "OMP_NUM_THREADS"), str(options.threads))
        # Its progress bars cannot be switched off and are held back, with what lwpf_patch writes in their midst. It
        # also asks before it downloads gigabytes: that is for a person to answer, not for a comparison.
        arguments = self.command(options, seed, folder, quiet=True)
        stdout, stderr = train(self.host, variant, arguments, folder, quiet=True, environment=threads)
        messages = re.findall(r"lwpf_patch: .*", stderr)
        warned = any("forgot every score" in message for message in messages)
        return {**self.read(folder, stdout), "warned": warned}, messages

    def command(self, options: argparse.Namespace, seed: int, folder: Path, quiet: bool) -> list[str]:
        """Have the script run as a module; it writes its log and its model into the working directory."""
        settings = {
            "device": options.device,
            "n_updates": options.updates,
            "evaluate_at": options.evaluate_at or max(1, options.updates // 10),
            "rnd_seed": seed,
        }
        more = options.script_arguments or (EXAMPLE_ARGUMENTS if options.script == EXAMPLE else [])
        return ["-m", options.script, *(f"--{name}={value}" for name, value in settings.items()), *more]

    def read(self, folder: Path, stdout: str) -> Run:
        """Read the scores that the script printed."""
        updates: dict[int, dict[str, Any]] = {}
        for name, update, text in LOGGED.findall(stdout):
            entry = updates.setdefault(int(update), {"update": int(update)})
            entry |= named(SETS[name], scores(text))
        tested = TESTED.search(stdout)
        if not updates or tested is None:
            sys.exit(f"compare.py: found no scores in what the script printed:\n{stdout}")
        last = list(updates.values())[-1]
        # The script tells no times. It creates the first of these folders' files right before the first update and
        # the last of the others' right after the last one.
        (results,) = folder.glob("results/*/*")
        start, end = ((results / name).stat().st_mtime for name in ("tensorboard", "checkpoint"))
        return {
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "deeprc", "h5py", "numpy", "pandas")},
            "seconds": end - start,
            "updates": list(updates.values()),
            # Where every bag gets the same answer, it has no part in it.
            "dead": last["train_roc_auc"] == last["train_bacc"] == 0.5,
            **named("test", scores(tested[1])),
        }

    def summarise(self, runs: Runs) -> dict[str, dict[str, Any]]:
        """Count the seeds that lwpf_patch warned of and those that were dead as well."""
        summary = super().summarise(runs)
        for variant, repeats in runs.items():
            summary[variant] |= {key: sum(run[key] for run in repeats) for key in ("warned", "dead")}
        return summary

    def table(self, summary: dict[str, dict[str, Any]]) -> str:
        """Return the summary as text."""
        metrics = [metric for metric in self.metrics if metric.key in SHOWN]
        widths = [max(15, len(metric.name) + 2) for metric in metrics]
        columns = "".join(f"{metric.name:>{width}}" for metric, width in zip(metrics, widths, strict=True))
        lines = [f"{'variant':<17}{columns}{'warned':>8}{'dead':>6}{'seconds':>9}"]
        lines.append("-" * len(lines[0]))
        for variant, row in summary.items():
            cells = ""
            for metric, width in zip(metrics, widths, strict=True):
                figures = row[metric.key]
                cell = f"{figures['mean']:.3f}"
                if figures["deviation"] is not None:
                    cell += f" ± {figures['deviation']:.3f}"
                cells += f"{cell:>{width}}"
            lines.append(f"{variant:<17}{cells}{row['warned']:>8}{row['dead']:>6}{row['seconds_mean']:>9.1f}")
        return "\n".join(lines)

    def verdicts(self, options: argparse.Namespace, runs: Runs, summary: dict[str, dict[str, Any]]) -> list[str]:
        """Say what the figures are good for.

        Random repertoires can be learned by heart only, so there it is the training set that counts. A difference
        stands out if it is larger than the distance between the best and the worst seed of either variant.

        Returns:
            One sentence, of all variants.
        """
        random_data = options.script == EXAMPLE and options.data == "example"
        key = "train_roc_auc" if random_data else "test_roc_auc"
        plain = summary[PLAIN][key]
        parts = []
        for variant, row in summary.items():
            if variant == PLAIN:
                continue
            spread = max(max(figures["values"]) - min(figures["values"]) for figures in (row[key], plain))
            difference = row[key]["mean"] - plain["mean"]
            dead = f", {row['dead']} of {options.seeds} dead" if row["dead"] else ""
            parts.append(f"{variant} {difference:+.3f} (seeds alone: {spread:.3f}{dead})")
        metric = next(metric.name for metric in self.metrics if metric.key == key)
        sentence = f"Against plain attention's {metric} of {plain['mean']:.3f}: {'; '.join(parts)}"
        if options.seeds == 1:
            sentence += "; a single seed cannot show whether that is more than chance"
        if random_data:
            sentence += "; the labels are random, so this is learning by heart, and the test set says nothing"
        return [f"{sentence}."]

    def heading(self, options: argparse.Namespace) -> str:
        """Name the script, and the example's data."""
        title = f"DeepRC's {options.script.rpartition('.')[2]}"
        if options.script == EXAMPLE:
            title += f" on {'random' if options.data == 'example' else 'implanted'} repertoires"
        return title

    def plot(self, options: argparse.Namespace, runs: Runs) -> Figure:
        """Draw the learning curves, with a thin line for each seed: means alone would hide that some are dead."""
        figure = super().plot(options, runs)
        for axes, curve in zip(figure.axes, self.curves, strict=True):
            for variant in self.variants:
                looks = {"color": variant.colour, "linestyle": variant.style, "linewidth": 0.7}
                for run in runs[variant.name]:
                    positions = [entry[self.step] for entry in run[f"{self.step}s"]]
                    axes.plot(positions, curve.of(run, self.step), **looks)
        figure.axes[0].legend(loc="center right")  # between the dead ones, at 0.5, and the others
        return figure


RECIPE = ImmuneRepertoire(
    name="immune_repertoire",
    description=__doc__,
    title="DeepRC",
    host="deeprc",
    script=Path(),  # it is a module
    metrics=tuple(
        Metric(f"{part}_{score}", f"{part} {name}", higher_is_better=score != "loss")
        for score, name in SCORES.items()
        for part in ("train", "validation", "test")
    ),
    curves=(
        Curve("train_roc_auc", "AUC on the training set", "area under the ROC curve"),
        Curve("train_loss", "Loss on the training set", "cross entropy"),
    ),
    steps=(200, 4),
    seeds=3,
    items="repertoires",
    confident=False,
    step="update",
    # Plain attention is a patched DeepRC too, one that forgets nothing: the patch brings the shims without which
    # DeepRC does not run in a current environment.
    variants=(
        *(dataclasses.replace(each, func_d="none") if each.name == PLAIN else each for each in VARIANTS),
        REMEDY,
    ),
)


def scores(text: str) -> dict[str, float]:
    """Read the scores of the first task from a dictionary as DeepRC prints it."""
    return {name: float(value) for name, value in NUMBER.findall(text.partition("}")[0]) if name in SCORES}


def named(part: str, figures: dict[str, float]) -> dict[str, float]:
    """Put the name of the set in front of the scores' own."""
    return {f"{part}_{name}": value for name, value in figures.items()}


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
    """Write a dataset as DeepRC's example reads it: a table of labels and an HDF5 container.

    DeepRC could make the container itself, from the tables of its repository, but then would read the same repertoire
    100 times: of each name it looks at the suffix alone (``os.path.splitext(name)[-1]`` in its dataset_readers), which
    is ".tsv" for all. Ours have a suffix each.
    """
    folder.mkdir(parents=True)
    names = [f"repertoire.{number:03d}" for number in range(len(repertoires))]
    lines = ["ID\tbinary_target_1", *(f"{name}\t{label}" for name, label in zip(names, labels, strict=True))]
    (folder / "metadata.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
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


if __name__ == "__main__":
    main(RECIPE)
