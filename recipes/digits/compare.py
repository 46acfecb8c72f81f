"""Trains the digits with plain attention and with partial forgetting, over several seeds, and compares."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

TRAIN = Path(__file__).with_name("train.py")
PLAIN = "plain"
#: The forgetting function of each variant.
VARIANTS = {PLAIN: None, "relu": "relu", "pfu": "pfu:mu=dmedian,bias=mu,sigma=0.01"}
#: Line colour and style; the colours are Okabe and Ito's, which colour-blind people can tell apart.
STYLES = {PLAIN: ("#000000", "-"), "relu": ("#0072B2", "--"), "pfu": ("#D55E00", "-.")}
LABELS = {PLAIN: "plain attention", "relu": "LwPF, ReLU", "pfu": "LwPF, PFU (dmedian)"}

#: What train.py wrote, for each variant one entry per seed.
Runs = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Compares, and says where the figures are."""
    options = parse_arguments()
    epochs = options.epochs or (3 if options.quick else 30)
    seeds = options.seeds or (1 if options.quick else 3)

    start = time.perf_counter()
    runs = run_all(epochs, seeds, options.threads)
    total_seconds = time.perf_counter() - start
    summary = summarise(runs)
    verdicts = [verdict(summary, variant, runs[PLAIN][0]["images"]["test"]) for variant in VARIANTS if variant != PLAIN]
    print(table(summary), *verdicts, f"The whole comparison took {total_seconds:.0f} s.", sep="\n")

    options.output.mkdir(parents=True, exist_ok=True)
    figures = {
        "arguments": {"epochs": epochs, "seeds": seeds, "threads": options.threads, "quick": options.quick},
        "versions": runs[PLAIN][0]["versions"] | {name: version(name) for name in ("lwpf_patch", "matplotlib")},
        "cpu_count": os.cpu_count(),
        "total_seconds": total_seconds,
        "func_d": VARIANTS,
        "summary": summary,
        "verdicts": verdicts,
        "runs": runs,
    }
    data, picture = options.output / "digits.json", options.output / "digits.png"
    data.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    plot(runs).savefig(picture, dpi=150)
    print(f"Wrote {data} and {picture}")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=positive, help="how many seeds, from 0 on (default: 3; 1 with --quick)")
    parser.add_argument("--epochs", type=positive, help="epochs of each run (default: 30; 3 with --quick)")
    parser.add_argument(
        "--threads",
        type=positive,
        default=1,
        help="CPU threads of each run (default: %(default)s: a model this small gains little from more, and the times "
        "of a single thread suffer least from what else the machine does)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/digits"), metavar="DIR", help="where to write (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="smoke test: a few epochs, one seed")
    return parser.parse_args()


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def run_all(epochs: int, seeds: int, threads: int) -> Runs:
    """Trains every variant with every seed.

    Returns:
        The figures of the runs.
    """
    runs: Runs = {variant: [] for variant in VARIANTS}
    seen: set[str] = set()
    # All variants of a seed come before the next seed: should the machine slow down, it slows down for all of them.
    plan = [(seed, variant) for seed in range(seeds) for variant in VARIANTS]
    with tempfile.TemporaryDirectory() as folder, tqdm(plan, unit="run") as progress:
        for seed, variant in progress:
            progress.set_description(f"{variant}, seed {seed}")
            output = Path(folder) / f"{variant}-{seed}.json"
            arguments = [f"--epochs={epochs}", f"--seed={seed}", f"--threads={threads}", f"--output={output}"]
            for line in train(variant, arguments):
                if line not in seen:  # what was patched, and each warning, once
                    seen.add(line)
                    progress.write(line, file=sys.stderr)
            figures = json.loads(output.read_text(encoding="utf-8"))
            del figures["arguments"]["output"]  # gone with the folder
            runs[variant].append(figures)
    return runs


def train(variant: str, arguments: list[str]) -> list[str]:
    """Runs the training script in an interpreter of its own.

    Args:
        variant: Which attention.
        arguments: The script's arguments.

    Returns:
        The lines it wrote to stderr; none on a terminal, where they stood already, with its progress bar.

    Raises:
        SystemExit: It failed.
    """
    func_d = VARIANTS[variant]
    wrapper = ["-m", "lwpf_patch", "run", "--patch", "timm", "--func-d", func_d] if func_d else []
    command = [sys.executable, *wrapper, str(TRAIN), *arguments]
    # The caller's own settings must not reach a run, least of all the plain one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LWPF_")}
    on_terminal = sys.stderr.isatty()
    if on_terminal:
        print(file=sys.stderr)  # the script's bar goes below ours
    else:
        command.append("--no-progress")
    child = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=None if on_terminal else subprocess.PIPE, text=True
    )
    stderr = child.stderr or ""
    if child.returncode:
        sys.exit(f"{stderr}compare.py: a {variant} run failed with exit code {child.returncode}: {' '.join(command)}")
    return stderr.splitlines()


def summarise(runs: Runs) -> dict[str, dict[str, Any]]:
    """Returns, for each variant, what its runs say: accuracies in percent, of the last epoch, never of the best one."""
    summary = {}
    for variant, repeats in runs.items():
        accuracies = [100 * run["epochs"][-1]["test_accuracy"] for run in repeats]
        seconds = [run["seconds"] for run in repeats]
        # Run by run against the plain one of the same seed, which ran shortly before.
        ratios = [own / run["seconds"] for own, run in zip(seconds, runs[PLAIN], strict=True)]
        summary[variant] = {
            "accuracies": accuracies,
            "accuracy_mean": statistics.mean(accuracies),
            "accuracy_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "seconds_mean": statistics.mean(seconds),
            "seconds_ratio": statistics.median(ratios),
        }
    return summary


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Returns the summary as text."""
    lines = [f"{'variant':<10}{'test accuracy, %':>18}{'seconds':>10}{'x plain':>10}"]
    lines.append("-" * len(lines[0]))
    for variant, row in summary.items():
        accuracy = f"{row['accuracy_mean']:.2f}"
        if row["accuracy_deviation"] is not None:
            accuracy += f" ± {row['accuracy_deviation']:.2f}"
        lines.append(f"{variant:<10}{accuracy:>18}{row['seconds_mean']:>10.1f}{row['seconds_ratio']:>10.2f}")
    return "\n".join(lines)


def verdict(summary: dict[str, dict[str, Any]], variant: str, images: int) -> str:
    """Says whether a variant's accuracy differs from plain attention's by more than seeds do.

    What seeds do is taken as the larger of the two ranges from lowest to highest seed: deliberately strict, because
    with so few runs the standard deviations are guesses themselves.

    Args:
        summary: The figures of all variants.
        variant: Which one to judge.
        images: Number of test images.

    Returns:
        One sentence.
    """
    row, plain = summary[variant], summary[PLAIN]
    difference = row["accuracy_mean"] - plain["accuracy_mean"]
    seeds = len(row["accuracies"])
    sentence = f"{variant}: {difference:+.2f} points against plain"
    if seeds == 1:
        return f"{sentence}; a single seed cannot show whether that is more than chance."
    spread = max(max(side["accuracies"]) - min(side["accuracies"]) for side in (row, plain))
    if abs(difference) <= spread:
        return f"{sentence}, which does not stand out from what a change of seed alone makes ({spread:.2f} points)."
    direction = "better" if difference > 0 else "worse"
    return (
        f"{sentence}, which is more than a change of seed alone makes ({spread:.2f} points): {direction} with these "
        f"{seeds} seeds on these {images} images, and no proof for others."
    )


def plot(runs: Runs) -> Figure:
    """Draws the learning curves: for each variant the mean over the seeds, in a band from the lowest to the highest."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for variant, repeats in runs.items():
        draw_curve(accuracy, variant, [[100 * epoch["test_accuracy"] for epoch in run["epochs"]] for run in repeats])
        draw_curve(loss, variant, [[epoch["train_loss"] for epoch in run["epochs"]] for run in repeats])
    accuracy.set(title="Test accuracy", xlabel="epoch", ylabel="test accuracy (%)")
    # The first epochs climb from chance; with them in view the curves could not be told apart where they end.
    half = len(runs[PLAIN][0]["epochs"]) // 2
    late = [epoch["test_accuracy"] for repeats in runs.values() for run in repeats for epoch in run["epochs"][half:]]
    lowest, highest = 100 * min(late), 100 * max(late)
    margin = 0.5 * (highest - lowest) + 0.2
    accuracy.set_ylim(lowest - margin, highest + margin / 2)
    loss.set(title="Training loss", xlabel="epoch", ylabel="cross entropy", yscale="log")
    for axes in (accuracy, loss):
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy.legend(loc="lower right")
    seeds = len(runs[PLAIN])
    bands = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(f"A small vision transformer on handwritten digits ({bands})")
    return figure


def draw_curve(axes: Axes, variant: str, values: list[list[float]]) -> None:
    """Draws one variant's line and band.

    Args:
        axes: Where.
        variant: Which variant.
        values: One list per seed, of one value per epoch.
    """
    colour, style = STYLES[variant]
    low, mean, high = (
        [pick(at_epoch) for at_epoch in zip(*values, strict=True)] for pick in (min, statistics.mean, max)
    )
    epochs = range(1, len(mean) + 1)
    axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(epochs, mean, color=colour, linestyle=style, linewidth=1.8, label=LABELS[variant])


if __name__ == "__main__":
    main()
