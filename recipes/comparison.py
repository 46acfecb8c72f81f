"""What the recipes share: a training script run with several kinds of attention and seeds, and compared.

A recipe is one `Recipe` and a call of `main`. As it stands, `Recipe` runs a training script that takes --epochs,
--seed, --threads, --output FILE.json and --no-progress and writes a `Run` as JSON. For a script with other ways (a
library's own example, say, which writes a log) a recipe overrides `Recipe.command` and `Recipe.read`, and where that is
not enough `Recipe.prepare` and `Recipe.run`; for other figures than the usual ones `Recipe.summarise` and what follows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student
from tqdm import tqdm

PLAIN = "plain"
#: What one run says: "seconds", "versions" and, one entry per epoch, "epochs" (or what else the recipe counts in).
Run = dict[str, Any]
#: For each variant one entry per seed.
Runs = dict[str, list[Run]]


@dataclass(frozen=True)
class Variant:
    """A kind of attention that is compared.

    Attributes:
        name: What tables and files call it. The one that is called "plain" is what the others are compared with.
        label: What the legend calls it.
        colour: Of its line; choose among Okabe and Ito's, which colour-blind people can tell apart.
        style: Of its line, for those who see no colours.
        func_d: What `lwpf run` gets as --func-d.
        uhop: What `lwpf run` gets as --uhop. With neither, the script is run without `lwpf run`, unpatched.
    """

    name: str
    label: str
    colour: str
    style: str
    func_d: str | None = None
    uhop: str | None = None

    def wrapper(self, host: str) -> list[str]:
        """Return what comes between Python and the script to patch a host."""
        given = {"--func-d": self.func_d, "--uhop": self.uhop}
        options = [text for option, value in given.items() if value is not None for text in (option, value)]
        return ["-m", "lwpf_patch", "run", "--patch", host, *options] if options else []


VARIANTS = (
    Variant(PLAIN, "plain attention", "#000000", "-"),
    Variant("relu", "LwPF, ReLU", "#0072B2", "--", func_d="relu"),
    Variant("pfu", "LwPF, PFU (dmedian)", "#D55E00", "-.", func_d="pfu:mu=dmedian,bias=mu,sigma=0.01"),
)


@dataclass(frozen=True)
class Metric:
    """A figure of merit: a column of the table.

    Attributes:
        key: Where a run has it: at its top or, if it is not there, in its last epoch (never in the best one).
        name: What the table calls it.
        percent: Whether it is a fraction, shown in percent.
        higher_is_better: Which direction is good.
    """

    key: str
    name: str
    percent: bool = False
    higher_is_better: bool = True

    def of(self, run: Run, step: str) -> float:
        """Return the figure of a run, in the unit it is shown in."""
        value = run[self.key] if self.key in run else run[f"{step}s"][-1][self.key]
        return 100 * value if self.percent else value


@dataclass(frozen=True)
class Curve:
    """A figure that is drawn over the epochs.

    Attributes:
        key: Where each epoch has it.
        title: Of the panel.
        label: Of the vertical axis, with the unit.
        percent: Whether it is a fraction, shown in percent.
        zoom: Show the range of the second half only: what comes first, climbing from chance, would hide differences.
        log: Whether the axis is logarithmic.
    """

    key: str
    title: str
    label: str
    percent: bool = False
    zoom: bool = False
    log: bool = False

    def of(self, run: Run, step: str) -> list[float]:
        """Return the figures of a run's epochs, in the unit they are shown in."""
        return [(100 if self.percent else 1) * entry[self.key] for entry in run[f"{step}s"]]


@dataclass(frozen=True)
class Recipe:
    """What one comparison consists of.

    Attributes:
        name: Of the files that are written, and of their folder.
        description: For --help.
        title: Of the plot; an option in braces stands for its value.
        host: The library that is patched.
        script: The training script.
        metrics: The columns of the table; the verdicts are on the first one.
        curves: The panels of the plot.
        steps: Default number of epochs; the second one is for --quick.
        seeds: Default number of seeds; --quick has one.
        items: What is classified, as the runs call it; run[items]["test"] is how many there are to test with.
        confident: What the bands and the verdicts are made of: the 95 % confidence interval of the mean, or else the
            range from the lowest to the highest seed, which is all that very few seeds are good for.
        jobs: Default number of runs at a time.
        step: What is counted, in the singular; gives the option --epochs and a run's "epochs".
        variants: What is compared, the plain one first.
    """

    name: str
    description: str
    title: str
    host: str
    script: Path
    metrics: tuple[Metric, ...]
    curves: tuple[Curve, ...]
    steps: tuple[int, int]
    seeds: int
    items: str
    confident: bool
    jobs: int = 1
    step: str = "epoch"
    variants: tuple[Variant, ...] = VARIANTS

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of this recipe alone; `command` finds them in its options."""

    def prepare(self, options: argparse.Namespace, shared: Path) -> None:
        """Lay out what all runs need, before the first one, in the folder that holds their working directories."""

    def run(
        self, options: argparse.Namespace, variant: Variant, seed: int, folder: Path, quiet: bool
    ) -> tuple[Run, list[str]]:
        """Train one variant with one seed.

        Args:
            options: As in `command`.
            variant: Which attention.
            seed: As in `command`.
            folder: As in `command`.
            quiet: As in `command`.

        Returns:
            What the run says, and the lines of its stderr that people should see, if they have not yet.
        """
        stdout, stderr = train(self.host, variant, self.command(options, seed, folder, quiet), folder, quiet)
        # A carriage return is a progress bar's, of a script that has one and cannot do without.
        messages = [line for line in re.split(r"\r?\n", stderr) if line and "\r" not in line]
        return self.read(folder, stdout), messages

    def command(self, options: argparse.Namespace, seed: int, folder: Path, quiet: bool) -> list[str]:
        """Return what Python is to run: a script or "-m" and a module, and the arguments.

        Args:
            options: The comparison's own; epochs and seeds are settled.
            seed: Of this run.
            folder: The run's working directory, which is empty and its own.
            quiet: Whether to do without a progress bar.
        """
        arguments = [f"--epochs={options.epochs}", f"--seed={seed}", f"--threads={options.threads}"]
        return [str(self.script), *arguments, f"--output={folder / 'run.json'}", *["--no-progress"] * quiet]

    def read(self, folder: Path, stdout: str) -> Run:
        """Return what a run that has ended says.

        Args:
            folder: The run's working directory.
            stdout: What it printed.
        """
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        del run["arguments"]["output"]  # soon gone
        return run

    def summarise(self, runs: Runs) -> dict[str, dict[str, Any]]:
        """Return, for each variant, what its runs say."""
        summary: dict[str, dict[str, Any]] = {}
        for variant, repeats in runs.items():
            seconds = [run["seconds"] for run in repeats]
            # Run by run against the plain one of the same seed, which ran shortly before.
            ratios = [own / run["seconds"] for own, run in zip(seconds, runs[PLAIN], strict=True)]
            summary[variant] = {}
            for metric in self.metrics:
                values = [metric.of(run, self.step) for run in repeats]
                summary[variant][metric.key] = {
                    "values": values,
                    "mean": statistics.mean(values),
                    "deviation": statistics.stdev(values) if len(values) > 1 else None,
                }
            summary[variant] |= {"seconds_mean": statistics.mean(seconds), "seconds_ratio": statistics.median(ratios)}
        return summary

    def table(self, summary: dict[str, dict[str, Any]]) -> str:
        """Return the summary as text."""
        headings = {metric.key: metric.name + ", %" * metric.percent for metric in self.metrics}
        widths = {key: max(18, len(heading) + 2) for key, heading in headings.items()}
        columns = "".join(f"{heading:>{widths[key]}}" for key, heading in headings.items())
        width = max(10, *(len(variant) + 2 for variant in summary))
        lines = [f"{'variant':<{width}}{columns}{'seconds':>10}{'x plain':>10}"]
        lines.append("-" * len(lines[0]))
        for variant, row in summary.items():
            cells = ""
            for metric in self.metrics:
                figures = row[metric.key]
                decimals = 2 if metric.percent else 3
                cell = f"{figures['mean']:.{decimals}f}"
                if figures["deviation"] is not None:
                    cell += f" ± {figures['deviation']:.{decimals}f}"
                cells += f"{cell:>{widths[metric.key]}}"
            lines.append(f"{variant:<{width}}{cells}{row['seconds_mean']:>10.1f}{row['seconds_ratio']:>10.2f}")
        return "\n".join(lines)

    def verdicts(self, options: argparse.Namespace, runs: Runs, summary: dict[str, dict[str, Any]]) -> list[str]:
        """Return the sentences below the table: of each variant, whether it differs from plain attention."""
        return [self.verdict(runs, variant, self.metrics[0]) for variant in runs if variant != PLAIN]

    def verdict(self, runs: Runs, variant: str, metric: Metric, against: str = PLAIN) -> str:
        """Say whether a variant differs from another one, in one metric, by more than seeds do.

        What seeds do is either the confidence interval of the difference, seed by seed, or the larger of the two ranges
        from lowest to highest seed: deliberately strict, because with so few runs the standard deviations are guesses
        themselves.

        Args:
            runs: The runs of all variants.
            variant: Which one to judge.
            metric: By what.
            against: The other one.

        Returns:
            One sentence.
        """
        own, other = ([metric.of(run, self.step) for run in runs[name]] for name in (variant, against))
        decimals, unit = (2, " points") if metric.percent else (3, "")
        differences = [left - right for left, right in zip(own, other, strict=True)]
        difference, seeds = statistics.mean(differences), len(differences)
        sentence = f"{variant}: {difference:+.{decimals}f}{unit} against {against}"
        if seeds == 1:
            return f"{sentence}; a single seed cannot show whether that is more than chance."
        better = (difference > 0) == metric.higher_is_better
        conclusion = (
            f"{'better' if better else 'worse'} with these {seeds} seeds on these "
            f"{runs[PLAIN][0][self.items]['test']} {self.items}, and no proof for others."
        )
        if self.confident:
            low, high = confidence_interval(differences)
            sentence += f" (95 % confidence interval {low:+.{decimals}f} to {high:+.{decimals}f})"
            if low <= 0 <= high:
                return f"{sentence}, which {seeds} seeds cannot tell from chance."
            return f"{sentence}: {conclusion}"
        spread = max(max(values) - min(values) for values in (own, other))
        chance = f"a change of seed alone makes ({spread:.{decimals}f}{unit})"
        if abs(difference) <= spread:
            return f"{sentence}, which does not stand out from what {chance}."
        return f"{sentence}, which is more than {chance}: {conclusion}"

    def heading(self, options: argparse.Namespace) -> str:
        """Return the title of the plot."""
        return self.title.format_map(vars(options))

    def plot(self, options: argparse.Namespace, runs: Runs) -> Figure:
        """Draw the learning curves: for each variant the mean over the seeds, in a band."""
        figure = Figure(figsize=(5.5 * len(self.curves), 4.6), layout="constrained")
        panels = figure.subplots(1, len(self.curves), squeeze=False)[0]
        for axes, curve in zip(panels, self.curves, strict=True):
            for variant in self.variants:
                repeats = runs[variant.name]
                positions = [entry[self.step] for entry in repeats[0][f"{self.step}s"]]
                values = [curve.of(run, self.step) for run in repeats]
                draw_curve(axes, variant, positions, values, self.confident, curve.log)
            axes.set(title=curve.title, xlabel=self.step, ylabel=curve.label, yscale="log" if curve.log else "linear")
            if curve.zoom:
                half = len(positions) // 2
                every_run = (run for repeats in runs.values() for run in repeats)
                late = [value for run in every_run for value in curve.of(run, self.step)[half:]]
                margin = 0.5 * (max(late) - min(late)) + 0.2
                axes.set_ylim(min(late) - margin, max(late) + margin / 2)
            axes.grid(True, alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].legend(loc="lower right")
        seeds = len(runs[PLAIN])
        repeats = f"mean and range of {seeds} seeds"
        if self.confident:
            repeats = f"mean over {seeds} seeds and its 95 % confidence interval"
        if seeds == 1:
            repeats = "one seed"
        figure.suptitle(f"{self.heading(options)} ({repeats})")
        return figure


def main(recipe: Recipe) -> None:
    """Compare as the command line says."""
    compare(recipe, parse_arguments(recipe))


def compare(recipe: Recipe, options: argparse.Namespace) -> None:
    """Compare, and say where the figures are."""
    start = time.perf_counter()
    runs = run_all(recipe, options)
    total_seconds = time.perf_counter() - start
    summary = recipe.summarise(runs)
    verdicts = recipe.verdicts(options, runs, summary)
    print(recipe.table(summary), *verdicts, f"The whole comparison took {total_seconds:.0f} s.", sep="\n")

    options.output.mkdir(parents=True, exist_ok=True)
    figures = {
        "arguments": {name: value for name, value in vars(options).items() if name != "output"},
        "versions": runs[PLAIN][0]["versions"] | {name: version(name) for name in ("lwpf_patch", "matplotlib")},
        "cpu_count": os.cpu_count(),
        "total_seconds": total_seconds,
        "func_d": {variant.name: variant.func_d for variant in recipe.variants},
        "uhop": {variant.name: variant.uhop for variant in recipe.variants},
        "summary": summary,
        "verdicts": verdicts,
        "runs": runs,
    }
    data, picture = (options.output / f"{recipe.name}{suffix}" for suffix in (".json", ".png"))
    data.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    recipe.plot(options, runs).savefig(picture, dpi=150)
    print(f"Wrote {data} and {picture}")


def parse_arguments(recipe: Recipe) -> argparse.Namespace:
    """Read the command line; what depends on --quick is settled here."""
    parser = argparse.ArgumentParser(description=recipe.description)
    steps, (usual, quick) = f"{recipe.step}s", recipe.steps
    parser.add_argument(
        "--seeds", type=positive, help=f"how many seeds, from 0 on (default: {recipe.seeds}; 1 with --quick)"
    )
    parser.add_argument(
        f"--{steps}", type=positive, help=f"{steps} of each run (default: {usual}; {quick} with --quick)"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=1,
        help="CPU threads of each run (default: %(default)s: a model this small gains little from more, and the times "
        "of a single thread suffer least from what else the machine does)",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=recipe.jobs,
        help="runs at a time (default: %(default)s); where they share the cores, their times say little",
    )
    recipe.add_options(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build") / recipe.name,
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help=f"smoke test: a few {steps}, one seed")
    options = parser.parse_args()
    options.seeds = options.seeds or (1 if options.quick else recipe.seeds)
    if getattr(options, steps) is None:
        setattr(options, steps, quick if options.quick else usual)
    return options


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def run_all(recipe: Recipe, options: argparse.Namespace) -> Runs:
    """Train every variant with every seed.

    Returns:
        What the runs say.
    """
    # All variants of a seed come before the next seed: should the machine slow down, it slows down for all of them.
    plan = [(seed, variant) for seed in range(options.seeds) for variant in recipe.variants]
    runs: Runs = {variant.name: [] for variant in recipe.variants}
    seen: set[str] = set()
    # A run's own progress bar has its place below ours if it is alone and there is a terminal.
    quiet = options.jobs > 1 or not sys.stderr.isatty()
    with (
        tempfile.TemporaryDirectory() as shared,
        tqdm(total=len(plan), unit="run") as progress,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        recipe.prepare(options, Path(shared))

        def run(seed: int, variant: Variant) -> tuple[Run, list[str]]:
            progress.set_description(f"{variant.name}, seed {seed}")
            folder = Path(shared) / f"{variant.name}-{seed}"
            folder.mkdir()
            return recipe.run(options, variant, seed, folder, quiet)

        for (_, variant), (figures, messages) in zip(plan, pool.map(run, *zip(*plan, strict=True)), strict=True):
            for message in messages:
                if message not in seen:  # what was patched, and each warning, once
                    seen.add(message)
                    progress.write(message, file=sys.stderr)
            runs[variant.name].append(figures)
            progress.update()
    return runs


def train(
    host: str, variant: Variant, arguments: list[str], folder: Path, quiet: bool, environment: Mapping[str, str] = {}
) -> tuple[str, str]:
    """Train in an interpreter of its own.

    Args:
        host: The library that is patched.
        variant: Which attention.
        arguments: What Python is to run.
        folder: Where.
        quiet: Whether to hold back what it writes to stderr; otherwise it stands there, progress bar and all.
        environment: Variables for it, besides the caller's.

    Returns:
        What it printed, and what it wrote to stderr if that was held back.

    Raises:
        SystemExit: It failed.
    """
    command = [sys.executable, *variant.wrapper(host), *arguments]
    # The caller's own settings must not reach a run, least of all the plain one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LWPF_")}
    if not quiet:
        print(file=sys.stderr)  # the script's bar goes below ours
    child = subprocess.run(
        command,
        env={**inherited, **environment},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if quiet else None,
    )
    stdout, stderr = ((stream or b"").decode(errors="replace") for stream in (child.stdout, child.stderr))
    if child.returncode:
        sys.exit(
            f"{stderr}compare.py: a {variant.name} run failed with exit code {child.returncode}: {' '.join(command)}"
        )
    return stdout, stderr


def confidence_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean, after Student; of a single value, the value alone."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, mean
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def draw_curve(
    axes: Axes, variant: Variant, positions: list[int], values: Iterable[list[float]], confident: bool, log: bool
) -> None:
    """Draw one variant's line and band.

    Args:
        axes: Where.
        variant: Which variant.
        positions: The epochs.
        values: One list per seed, of one value per epoch.
        confident: Whether the band is the confidence interval of the mean, or else the range.
        log: Whether the axis is logarithmic. Mean and confidence interval are then those of the logarithms: the
            interval of the values themselves may reach below 0.
    """
    there, back = (math.log, math.exp) if log and confident else (float, float)
    at_epochs = [[there(value) for value in seeds] for seeds in zip(*values, strict=True)]
    bands = [confidence_interval(seeds) if confident else (min(seeds), max(seeds)) for seeds in at_epochs]
    low, high = ([back(bound) for bound in bounds] for bounds in zip(*bands, strict=True))
    axes.fill_between(positions, low, high, color=variant.colour, alpha=0.15, linewidth=0)
    mean = [back(statistics.mean(seeds)) for seeds in at_epochs]
    axes.plot(positions, mean, color=variant.colour, linestyle=variant.style, linewidth=1.8, label=variant.label)
