"""Trains vision transformers by timm's own train.py, plain and with forgetting, and tests them under shift, too.

Two calls of `lwpf compare` do the work: one of train.py, unmodified, from a clone of timm's repository, and one of
shift.py, which tests what was trained. What has finished is not repeated: after Ctrl-C the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the recipes are plain files, no package

from calling import PFU, SOFTMAX1, compare, parse, parser, python  # noqa: E402
from shift import SHIFTS  # noqa: E402

from lwpf_patch.observing.writing import read_records  # noqa: E402

#: What is compared with plain attention: labels and options of lwpf run.
ARMS = {"relu": "relu: --func-d relu", "pfu": PFU, "softmax1": SOFTMAX1}
#: The options of train.py for each task, at a size that two cores train in an hour or two.
TASKS = {
    "mnist": (
        "--dataset torch/mnist --in-chans 1 --input-size 1 28 28 --mean 0.1307 --std 0.3081 "
        "--model-kwargs img_size=28 patch_size=7 embed_dim=64 depth=3 num_heads=4 --no-aug --lr 2e-3"
    ),
    "cifar10": (
        "--train-split train.tar --val-split validation.tar --input-size 3 32 32 "
        "--mean 0.4914 0.4822 0.4465 --std 0.2470 0.2435 0.2616 "
        "--model-kwargs img_size=32 patch_size=8 embed_dim=96 depth=4 num_heads=4 --scale 0.6 1.0 --color-jitter 0 "
        "--lr 1e-3"
    ),
}
#: What goes for all tasks. The test sees the whole image: timm's default would cut off a tenth.
COMMON = (
    "--model vit_tiny_patch16_224 --num-classes 10 --crop-pct 1.0 --opt adamw --weight-decay 0.05 --warmup-epochs 0 "
    "-b 128 -vb 1000 -j 1 --no-prefetcher --log-interval 100000"
)
EPOCHS = 4
#: Where train.py writes, below the folder of a run.
RUN = "run"


def main() -> int:
    """Train, test, and say where the reports are; return the exit code."""
    options = parse_arguments()
    output = options.output
    training = output / "training"
    options.output = training
    code = compare(options, train(options))
    if code:
        return code
    options.output = output / "shift"
    code = compare(options, test(options, training))
    if code:
        return code
    table = observed(training)
    (output / "observed.csv").write_text("".join(f"{','.join(row)}\n" for row in table))
    print("What the layers forget at the end of training, as means over heads and seeds:")
    print("\n".join("  ".join(f"{cell:>18}" for cell in row) for row in table))
    print(f"Wrote {output / 'observed.csv'}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__ or "")
    add = options.add_argument
    add("--train-py", type=Path, required=True, metavar="FILE", help="train.py in a clone of timm's repository")
    add("--task", choices=TASKS, default="mnist", help="(default: %(default)s)")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where the data is (default: %(default)s)")
    add("--download", action="store_true", help="have torchvision fetch MNIST to --data-dir if it is not there")
    add("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="ARM",
        help=f"what is compared with plain attention, of {', '.join(ARMS)} (default: all)")  # fmt: skip
    add("--device", default="cpu", help="as train.py has it (default: %(default)s)")
    add("more", nargs="*", metavar="OPTION", help="behind --: more options of train.py, which win over the recipe's")
    found = parse(options, "timm_images/{task}", seeds=5, steps=(EPOCHS, 1))
    if not found.train_py.is_file():
        options.error(
            f"--train-py {found.train_py}: there is no such file; git clone timm's repository, "
            "huggingface/pytorch-image-models, and give the train.py in it"
        )
    return found


def train(options: argparse.Namespace) -> list[str]:
    """Return what `lwpf compare` is called with to train."""
    summary = f"csv:{{output}}/{RUN}/summary.csv"
    top1 = f"{summary}:eval_top1"
    return [
        *arms(options, " --observe every=100,path=forgetting.jsonl,tensorboard=off"),
        "--in-output",
        *("--metric", top1, "--name", "top-1 after the last epoch, %"),
        *("--metric", top1, "--value", "first", "--name", "top-1 after the first epoch, %"),
        *("--metric", f"{summary}:eval_loss", "--better", "lower", "--name", "test loss"),
        *("--", "python", str(options.train_py.resolve()), "--data-dir", str(options.data_dir.resolve())),
        *(["--dataset-download"] if options.download else []),
        *shlex.split(f"{TASKS[options.task]} {COMMON}"),
        *("--epochs", str(options.epochs), "--device", options.device, "--seed", "{seed}"),
        *("--output", "{output}", "--experiment", RUN, *options.more),
    ]


def test(options: argparse.Namespace, trained: Path) -> list[str]:
    """Return what `lwpf compare` is called with to test what was trained, on shifted images."""
    metrics = []
    for name in SHIFTS:
        metrics += ["--metric", f"json:{{output}}/shift.json:{name}", "--name", f"top-1, %: {name}"]
    arguments = ("--trained", str(trained), "--arm", "{arm}", "--seed", "{seed}", "--device", options.device)
    return [*arms(options), *metrics, *python(HERE / "shift.py", *arguments, "--output", "{output}/shift.json")]


def arms(options: argparse.Namespace, more: str = "") -> list[str]:
    """Return the arms as `lwpf compare` takes them.

    Args:
        options: The recipe's own.
        more: Further options of each patched one.
    """
    patched = [part for name in options.arms for part in ("--arm", f"{ARMS[name]}{more}")]
    return ["--arm", "plain", *patched]


def observed(folder: Path) -> list[tuple[str, ...]]:
    """Return a table of what each layer forgot in the last samples of training.

    Args:
        folder: Of the comparison that trained.
    """
    fields = ("forgotten", "empty_rows", "entropy", "forgotten_weight")
    last: dict[tuple[str, str], list[dict[str, list[float | None]]]] = defaultdict(list)
    with (folder / "runs.csv").open(newline="") as file:
        runs = sorted({(row["arm"], row["seed"]) for row in csv.DictReader(file)})
    for arm, seed in runs:
        for path in sorted(folder.glob(f"runs/{arm}-seed{seed}-*/output/forgetting.jsonl"))[-1:]:
            samples = {each["layer"]: each for each in read_records(path) if each["training"]}  # the last one of each
            for layer, sample in samples.items():
                last[arm, layer].append(sample)
    rows: list[tuple[str, ...]] = [("arm", "layer", *fields)]
    for (arm, layer), samples in last.items():
        values = ([value for each in samples for value in each[field] if value is not None] for field in fields)
        rows.append((arm, layer, *(f"{statistics.mean(each):.3f}" if each else "" for each in values)))
    return rows


if __name__ == "__main__":
    sys.exit(main())
