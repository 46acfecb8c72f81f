"""Retrieves stored images from damaged ones: five Hopfield networks, each with and without U-Hop's Stage I."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the recipes are plain files, no package

import cifar
from calling import positive

from lwpf_patch import FeatureMap, retrieve, separation_loss

PATCH = 16  # side of the squares that the photographs are cut into
POWER = 10
OFFLINE, DOWNLOADED = ("photographs", "digits"), ("mnist", "cifar10")
#: The inverse temperature of each data set; --beta sets another one.
BETAS = {"photographs": 0.1, "digits": 1.0, "mnist": 0.1, "cifar10": 0.1}
DIMENSIONS = {"photographs": 3 * PATCH**2, "digits": 64, "mnist": 784, "cifar10": 3072}
#: What --quick does less of: memory sizes, noise levels, iterations of Stage I, temperatures, seeds.
SIZES, QUICK_SIZES = (10, 20, 50, 100, 200, 500, 1000), (10, 50)
NOISE, QUICK_NOISE = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5), (0.0, 0.5)
ITERATIONS, QUICK_ITERATIONS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500), (0, 2, 20)
TEMPERATURES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
QUICK_TEMPERATURES = (0.1, 1.0)
SEEDS, QUICK_SEEDS = 5, 2


@dataclass(frozen=True)
class Method:
    """A Hopfield network: how a state is compared with the stored patterns, and how that becomes weights.

    Attributes:
        label: What plots and tables call it.
        colour: Of its lines; Okabe and Ito's colours, which colour-blind people can tell apart.
        marker: Of its points.
        sep: The normalisation of beta <Φ(ξ), Φ(x)>, if it is of that form.
        weights: From Φ of the stored patterns, Φ of the states and beta to the weights, if it is not.
    """

    label: str
    colour: str
    marker: str
    sep: str = ""
    weights: Callable[[Tensor, Tensor, float], Tensor] | None = None

    def recall(self, memory: Tensor, query: Tensor, beta: float, phi: FeatureMap | None) -> Tensor:
        """Make one update of each query (N, d) with the memory (M, d)."""
        if self.weights is None:
            return retrieve(memory, query, beta, sep=self.sep, feature_map=phi)
        keys, states = (memory, query) if phi is None else (phi(memory), phi(query))
        return self.weights(keys, states, beta) @ memory


def polynomial(keys: Tensor, states: Tensor, beta: float) -> Tensor:
    """Weigh by the tenth power of the similarity, divided by their sum, from which beta cancels."""
    smallest = torch.finfo(keys.dtype).tiny  # a similarity of 0 has no logarithm
    return (POWER * (states @ keys.mT).abs().clamp(min=smallest).log()).softmax(-1)


def equally(keys: Tensor, states: Tensor, beta: float) -> Tensor:
    """Weigh all stored patterns alike."""
    return keys.new_full((len(states), len(keys)), 1 / len(keys))


def by_distance(norm: float) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Return the softmax of -beta times the distance in a norm."""
    return lambda keys, states, beta: (-beta * torch.cdist(states, keys, p=norm)).softmax(-1)


#: What needs no query at all, to measure the others by: a network that has learnt nothing but the mean.
MEAN = "mean"
METHODS = {
    "dense": Method("dense (softmax)", "#000000", "o", sep="softmax"),
    "sparse": Method("sparse (sparsemax)", "#0072B2", "s", sep="sparsemax"),
    "polynomial": Method("10th-order polynomial", "#D55E00", "^", weights=polynomial),
    "l2": Method("L2 distance", "#009E73", "D", weights=by_distance(2.0)),
    "manhattan": Method("Manhattan distance", "#CC79A7", "v", weights=by_distance(1.0)),
    MEAN: Method("mean of the stored patterns", "#999999", "", weights=equally),
}


@dataclass(frozen=True)
class Row:
    """One measurement: a line of the CSV file.

    Attributes:
        data: The data set.
        experiment: Which of the figures it belongs to.
        x: What that figure is over: a memory size, a noise level, a number of iterations, or beta.
        method: Of METHODS.
        uhop: Whether the patterns go through Φ.
        memory_size: How many patterns are stored.
        damage: "dropped" (half of the pixels are 0) or "noise".
        iterations: Of Stage I, 0 without.
        beta: The inverse temperature.
        seed: Of patterns and damage.
        separation_loss: Of the stored patterns, after Φ.
        error: Sum over the pixels of the squared difference from what was stored; mean over the patterns.
        recalled: The fraction of the patterns to which what was retrieved is nearer than to any other stored one.
    """

    data: str
    experiment: str
    x: float
    method: str
    uhop: bool
    memory_size: int
    damage: str
    iterations: int
    beta: float
    seed: int
    separation_loss: float
    error: float
    recalled: float


#: For each experiment the label of its horizontal axis and its title.
EXPERIMENTS = {
    "memory": ("stored patterns M", "Half of the pixels dropped"),
    "noise": ("standard deviation of the noise", "Gaussian noise, M = {memory_size}"),
    "iterations": ("iterations of Stage I", "Stage I, half of the pixels dropped, M = {memory_size}"),
    "beta": ("inverse temperature β", "Temperature, half of the pixels dropped, M = {memory_size}"),
}


def main() -> None:
    """Measures, and says where the figures are."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    rows = measure(options)
    total_seconds = time.perf_counter() - start
    summary = summarise(rows)
    for data in options.data:
        print(report(rows, summary, data, options))
    print(f"Everything took {total_seconds:.0f} s.")

    options.output.mkdir(parents=True, exist_ok=True)
    names = ["memory_retrieval.csv", "memory_retrieval.json", *(f"{data}.png" for data in options.data)]
    table, figures, *pictures = (options.output / name for name in names)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    packages = ("torch", "lwpf_patch", "entmax", "scikit-learn", "numpy", "scipy", "matplotlib")
    arguments = {name: value for name, value in vars(options).items() if name not in ("output", "downloads")}
    settings = {
        "arguments": arguments,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "cpu_count": os.cpu_count(),
        "total_seconds": total_seconds,
        "summary": summary,
    }
    figures.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for data, picture in zip(options.data, pictures, strict=True):
        plot(rows, summary, data, options).savefig(picture, dpi=130)
    print("Wrote", ", ".join(map(str, (table, figures, *pictures))))


def parse_arguments() -> argparse.Namespace:
    """Read the command line; what depends on --quick is settled here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data",
        nargs="+",
        choices=OFFLINE + DOWNLOADED,
        default=list(OFFLINE),
        help="photographs (patches of scikit-learn's two) and digits need no network; mnist and cifar10 are downloaded "
        "with torchvision (default: photographs digits)",
    )
    parser.add_argument(
        "--experiments",
        nargs="+",
        choices=EXPERIMENTS,
        default=list(EXPERIMENTS),
        metavar="EXPERIMENT",
        help=f"what is varied, of {', '.join(EXPERIMENTS)}; with --experiments iterations --seeds 20 separation loss "
        "and error are compared over 200 runs (default: all)",
    )
    parser.add_argument("--seeds", type=positive, help=f"how many, from 0 on (default: {SEEDS}; {QUICK_SEEDS} quick)")
    parser.add_argument("--beta", type=float, help=f"inverse temperature (default: {BETAS})")
    parser.add_argument("--iters", type=positive, default=100, help="iterations of Stage I (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, help="rate of Stage I (default: %(default)s)")
    parser.add_argument("--t", type=float, default=2.0, help="t of the separation loss (default: %(default)s)")
    parser.add_argument(
        "--loss", choices=("average", "maximum"), default="average", help="separation loss (default: %(default)s)"
    )
    parser.add_argument(
        "--memory-size", type=positive, help="M where it is not varied (default: 100, digits: 50; quick: 20)"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=1,
        help="CPU threads (default: %(default)s: more gain little, at these sizes)",
    )
    parser.add_argument(
        "--downloads",
        type=Path,
        default=Path("build/data"),
        help="where mnist and cifar10 lie, or go when they are "
        "downloaded; cifar10/train.tar, a tar of images, is taken as well (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/memory_retrieval"), help="where to write (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="smoke test: two seeds, few points")
    options = parser.parse_args()
    if options.beta is not None and not 0 < options.beta < float("inf"):
        parser.error(f"argument --beta: {options.beta} is not above 0")
    options.seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    options.sizes = QUICK_SIZES if options.quick else SIZES
    options.noise = QUICK_NOISE if options.quick else NOISE
    options.iterations = QUICK_ITERATIONS if options.quick else ITERATIONS
    options.temperatures = QUICK_TEMPERATURES if options.quick else TEMPERATURES
    return options


def memory_size(options: argparse.Namespace, data: str) -> int:
    """Return how many patterns are stored where that is not varied."""
    return options.memory_size or (20 if options.quick else 50 if data == "digits" else 100)


def beta_of(options: argparse.Namespace, data: str) -> float:
    """Return the inverse temperature where it is not varied."""
    return BETAS[data] if options.beta is None else options.beta


def load(data: str, downloads: Path) -> Tensor:
    """Load all patterns of a data set.

    Returns:
        (N, d), from 0 to 1.

    Raises:
        SystemExit: They cannot be fetched.
    """
    if data == "photographs":
        patches = []
        for image in load_sample_images().images:
            high, wide = (side // PATCH for side in image.shape[:2])
            cut = image[: high * PATCH, : wide * PATCH].reshape(high, PATCH, wide, PATCH, 3)
            patches.append(cut.swapaxes(1, 2).reshape(high * wide, -1))
        return torch.from_numpy(np.concatenate(patches)).float() / 255
    if data == "digits":
        return torch.from_numpy(load_digits().data).float() / 16
    try:
        if data == "mnist":
            from torchvision.datasets import MNIST

            images = MNIST(str(downloads), train=True, download=True).data
        else:
            tars = downloads / "cifar10"
            folder = tars if (tars / cifar.TARS[True]).is_file() else downloads
            images, _ = cifar.load(folder, train=True, download=True)
    except ImportError:
        sys.exit(f"compare.py: --data {data} needs torchvision: pip install torchvision")
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        sys.exit(f"compare.py: cannot download {data} to {downloads}: {reason}\n--data photographs needs no network")
    return images.flatten(1).float() / 255


@torch.no_grad()
def measure(options: argparse.Namespace) -> list[Row]:
    """Run all experiments.

    Returns:
        A row for each method with and without U-Hop, at each point of each experiment, for each seed.
    """
    rows: list[Row] = []
    stored = {data: load(data, options.downloads) for data in options.data}
    points = sum(len(values) for name, values in varied(options).items() if name in options.experiments)
    with tqdm(total=len(stored) * options.seeds * points, unit="point") as progress:
        for seed in range(options.seeds):
            for data, patterns in stored.items():
                progress.set_description(f"{data}, seed {seed}")
                for point in run_seed(options, data, patterns, seed):
                    rows += point
                    progress.update()
    return rows


def varied(options: argparse.Namespace) -> dict[str, Sequence[float]]:
    """Return what each experiment is over."""
    values = options.sizes, options.noise, options.iterations, options.temperatures
    return dict(zip(EXPERIMENTS, values, strict=True))


def run_seed(options: argparse.Namespace, data: str, patterns: Tensor, seed: int) -> Iterator[list[Row]]:
    """Give the rows of the experiments with one seed, point by point.

    Damage is drawn for experiments that are left out, too, so that the others get the same random numbers.
    """
    wanted = options.experiments
    generator = torch.Generator().manual_seed(seed)
    patterns = patterns[torch.randperm(len(patterns), generator=generator)]
    beta = beta_of(options, data)

    for size in options.sizes:
        memory = patterns[:size]
        query = drop_half(memory, generator)
        if "memory" not in wanted:
            continue
        maps = [(0, None), (options.iters, separated(FeatureMap(memory.shape[1]), memory, options.iters, options))]
        yield compare(data, "memory", size, memory, query, "dropped", maps, beta, seed)

    memory = patterns[: memory_size(options, data)]
    maps = [(0, None)]
    if {"noise", "beta"} & set(wanted):
        maps.append((options.iters, separated(FeatureMap(memory.shape[1]), memory, options.iters, options)))
    for level in options.noise:
        noise = level * torch.randn(memory.shape, generator=generator)
        if "noise" in wanted:
            yield compare(data, "noise", level, memory, (memory + noise).clamp(0, 1), "noise", maps, beta, seed)
    query = drop_half(memory, generator)
    for temperature in options.temperatures if "beta" in wanted else ():
        yield compare(data, "beta", temperature, memory, query, "dropped", maps, temperature, seed)

    phi, done = FeatureMap(memory.shape[1]), 0
    for iterations in options.iterations if "iterations" in wanted else ():
        phi, done = separated(phi, memory, iterations - done, options), iterations
        yield compare(data, "iterations", iterations, memory, query, "dropped", [(iterations, phi)], beta, seed)


def separated(phi: FeatureMap, memory: Tensor, iters: int, options: argparse.Namespace) -> FeatureMap:
    """Run Stage I, from where Φ is."""
    phi.separate(memory, iters, options.t, options.lr, options.loss)
    return phi


def drop_half(memory: Tensor, generator: torch.Generator) -> Tensor:
    """Set half of the pixels to 0, each by a coin of its own."""
    return memory * (torch.rand(memory.shape, generator=generator) < 0.5)


def compare(
    data: str,
    experiment: str,
    x: float,
    memory: Tensor,
    query: Tensor,
    damage: str,
    maps: Sequence[tuple[int, FeatureMap | None]],
    beta: float,
    seed: int,
) -> list[Row]:
    """Measure all methods at one point, with each feature map (and its iterations)."""
    rows = []
    for iterations, phi in maps:
        loss = separation_loss(memory if phi is None else phi(memory)).item()
        for name, method in METHODS.items():
            if name == MEAN and iterations != maps[0][0]:
                continue  # it stays what it is
            states = method.recall(memory, query, beta, phi)
            error = (states - memory).square().sum(-1).mean().item()
            recalled = (torch.cdist(states, memory).argmin(-1) == torch.arange(len(memory))).float().mean().item()
            uhop = phi is not None and name != MEAN
            at = (data, experiment, x, name, uhop, len(memory), damage, iterations, beta, seed)
            rows.append(Row(*at, loss, error, recalled))
    return rows


def summarise(rows: list[Row]) -> list[dict[str, object]]:
    """Return mean and standard deviation over the seeds, for each point of each line."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.data, row.experiment, row.method, row.uhop, row.x), []).append(row)
    summary = []
    for (data, experiment, method, uhop, x), group in groups.items():
        entry = {"data": data, "experiment": experiment, "method": method, "uhop": uhop, "x": x}
        for name in ("error", "recalled", "separation_loss"):
            values = [getattr(row, name) for row in group]
            entry[name] = statistics.mean(values)
            entry[f"{name}_deviation"] = statistics.stdev(values) if len(values) > 1 else 0.0
        summary.append(entry)
    return summary


def line(summary: list[dict], data: str, experiment: str, method: str, uhop: bool) -> list[dict]:
    """Return the points of one line."""
    wanted = {"data": data, "experiment": experiment, "method": method, "uhop": uhop}
    return [entry for entry in summary if all(entry[name] == value for name, value in wanted.items())]


def table(
    summary: list[dict], data: str, experiment: str, figure: str, factor: float = 1, decimals: int = 2
) -> Iterator[str]:
    """Give the lines of the table of one experiment."""
    points = [entry["x"] for entry in line(summary, data, experiment, "dense", True)]
    yield f"{'':<24}" + "".join(f"{point:>16g}" for point in points)
    for name in METHODS:
        for uhop in (False, True):
            entries = line(summary, data, experiment, name, uhop)
            pairs = [(factor * entry[figure], factor * entry[f"{figure}_deviation"]) for entry in entries]
            cells = (f"{mean:.{decimals}f} ± {deviation:.{decimals}f}" for mean, deviation in pairs)
            if entries:
                yield f"{name + ', U-Hop' * uhop:<24}" + "".join(f"{cell:>16}" for cell in cells)


def correlations(rows: list[Row], data: str) -> Iterator[str]:
    """Give the lines of a table of how separation loss and error go together in the runs of "iterations"."""
    runs = [row for row in rows if row.data == data and row.experiment == "iterations" and row.uhop]
    for name in METHODS:
        own = [row for row in runs if row.method == name]
        if own:
            seeds = ([row for row in own if row.seed == seed] for seed in sorted({row.seed for row in own}))
            each = statistics.mean(rank_correlation(group) for group in seeds)
            yield f"{name:<24}{rank_correlation(own):>16.2f}{each:>16.2f}"


def rank_correlation(rows: list[Row]) -> float:
    """Return Spearman's rank correlation of separation loss and error."""
    return float(stats.spearmanr([row.separation_loss for row in rows], [row.error for row in rows]).statistic)


def report(rows: list[Row], summary: list[dict], data: str, options: argparse.Namespace) -> str:
    """Return the tables of one data set as text."""
    lines = [
        f"{data}: squared error, mean ± standard deviation over {options.seeds} seeds; beta {beta_of(options, data)}"
    ]
    for experiment, (label, title) in EXPERIMENTS.items():
        if experiment not in options.experiments:
            continue
        over = f"{title.format(memory_size=memory_size(options, data))}; over {label.replace('β', 'beta')}"
        lines += ["", over, *table(summary, data, experiment, "error")]
        if experiment == "memory":
            lines += ["", "The same, patterns recalled (nearest to what was retrieved), %"]
            lines += table(summary, data, experiment, "recalled", factor=100, decimals=0)
        if experiment == "iterations":
            runs = options.seeds * len(options.iterations)
            lines += [
                "",
                f"Rank correlation of separation loss and error over these {runs} runs; 1: both fall together",
            ]
            lines += [f"{'':<24}{'all runs':>16}{'within a seed':>16}", *correlations(rows, data)]
    if "beta" not in options.experiments:
        return "\n".join([*lines, ""])
    lines += ["", "Each at the beta that is best for it", f"{'':<24}{'plain':>24}{'U-Hop':>24}"]
    for name in METHODS:
        cells = ""
        for uhop in (False, True):
            entries = line(summary, data, "beta", name, uhop)
            if entries:
                best = min(entries, key=lambda entry: entry["error"])
                at = "" if name in (MEAN, "polynomial") else f" at {best['x']:g}"
                cell = f"{best['error']:.2f} ± {best['error_deviation']:.2f}{at}"
                cells += f"{cell:>24}"
        lines.append(f"{name:<24}{cells}")
    return "\n".join([*lines, ""])


def plot(rows: list[Row], summary: list[dict], data: str, options: argparse.Namespace) -> Figure:
    """Draw the experiments of one data set; error bars are standard deviations over the seeds."""
    drawn = [name for name in EXPERIMENTS if name in options.experiments]
    panels_in_all = len(drawn) + ("iterations" in drawn) + 1  # separation, legend
    columns = min(3, panels_in_all)
    lines = -(-panels_in_all // columns)
    figure = Figure(figsize=(16 / 3 * columns, 4.5 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns).flat)
    legend = panels.pop()
    for empty in panels[panels_in_all - 1 :]:
        empty.axis("off")
    for axes, experiment in zip(panels, drawn, strict=False):
        label, title = EXPERIMENTS[experiment]
        for name, method in METHODS.items():
            for uhop in (False, True):
                entries = line(summary, data, experiment, name, uhop)
                if entries:
                    draw(axes, entries, method, uhop)
        if experiment in ("memory", "beta"):
            axes.set_xscale("log")
        elif experiment == "iterations":
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xticks(options.iterations, map(str, options.iterations))
            axes.minorticks_off()
        if experiment == "memory":
            axes.axvline(DIMENSIONS[data], color="grey", linestyle=":", linewidth=1)
            label += f" (dotted: M = d = {DIMENSIONS[data]})"
            axes.set_xticks(options.sizes, map(str, options.sizes))
            axes.minorticks_off()
        decorate(axes, label, title.format(memory_size=memory_size(options, data)))
    if "iterations" in drawn:
        scatter(panels[len(drawn)], rows, data)
        runs = options.seeds * len(options.iterations)
        decorate(panels[len(drawn)], "separation loss", f"Error over the separation loss: the {runs} runs of Stage I")
    handles, labels = panels[0].get_legend_handles_labels()
    legend.axis("off")
    legend.legend(handles, labels, loc="center", fontsize="large", frameon=False)
    figure.suptitle(
        f"Retrieval of {data}: {options.seeds} seeds, beta {beta_of(options, data):g}, U-Hop with {options.iters} "
        f"iterations of Stage I ({options.loss} loss)"
    )
    return figure


def decorate(axes: Axes, label: str, title: str) -> None:
    """Say what a panel shows."""
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("squared error per pattern")
    axes.set_title(title)
    axes.grid(alpha=0.3)


def draw(axes: Axes, entries: list[dict], method: Method, uhop: bool) -> None:
    """Draw a line: solid without U-Hop, dashed with it."""
    if not method.marker:  # it depends on nothing that is varied
        axes.plot(*([entry[name] for entry in entries] for name in ("x", "error")), color=method.colour,
                  label=method.label)  # fmt: skip
        return
    axes.errorbar(
        [entry["x"] for entry in entries],
        [entry["error"] for entry in entries],
        yerr=[entry["error_deviation"] for entry in entries],
        label=method.label + " + U-Hop" * uhop,
        color=method.colour,
        marker=method.marker,
        linestyle="--" if uhop else "-",
        markerfacecolor="white" if uhop else method.colour,
        markersize=5,
        linewidth=1.3,
        elinewidth=0.8,
        capsize=2,
    )


def scatter(axes: Axes, rows: list[Row], data: str) -> None:
    """Draw the runs of "iterations" as points."""
    runs = [row for row in rows if row.data == data and row.experiment == "iterations" and row.uhop]
    for name, method in METHODS.items():
        own = [row for row in runs if row.method == name]
        if own:
            places = [row.separation_loss for row in own], [row.error for row in own]
            axes.scatter(*places, s=20, color=method.colour, marker=method.marker, alpha=0.6, linewidths=0)


if __name__ == "__main__":
    main()
