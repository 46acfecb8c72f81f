"""Trains a small timm vision transformer on scikit-learn's 1,797 handwritten digits, which need no download.

After each epoch it is tested on images that training never sees, as they are and with noise, which training never has.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sklearn
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

SPLIT_SEED = 0
TEST_FRACTION = 1 / 3
WARM_UP_FRACTION = 0.1
BRIGHTEST = 16
#: What the weights begin with, as timm's class takes it: timm draws all of them with a deviation of 0.02, which suits
#: wide models; torch's own start of each layer goes with its width.
INITS = {"timm": "", "torch": "reset"}


@dataclass(frozen=True)
class SetUp:
    """How large the images are, and the vision transformer, which sees 16 patches of each.

    Attributes:
        enlarged: How many times as wide and high the images are as scikit-learn has them, 8x8.
        frame: Black pixels around that.
        patch: The side of a patch.
        epochs: Passes over the training set.
        lr: The learning rate after the warm-up.
        init: Of INITS.
        model: Arguments of timm's class.
    """

    enlarged: int
    frame: int
    patch: int
    epochs: int
    lr: float
    init: str
    model: dict[str, Any]

    @property
    def size(self) -> int:
        """The side of an image."""
        return 8 * self.enlarged + 2 * self.frame


SET_UPS = {
    each.size: each
    for each in (
        # As they are.
        SetUp(1, 0, 2, epochs=30, lr=0.01, init="torch", model={
            "embed_dim": 32, "depth": 2, "mlp_ratio": 2, "class_token": False, "global_pool": "avg",
        }),
        # In the format of MNIST: 20 pixels high at most, in a frame.
        SetUp(3, 2, 7, epochs=20, lr=0.002, init="timm", model={"embed_dim": 64, "depth": 3}),
    )
}  # fmt: skip


def main() -> None:
    """Trains, shows the progress, writes the figures."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    # The order of the images has a generator of its own: it stays the same however much randomness the model uses.
    generator = torch.Generator().manual_seed(options.seed)

    setup = SET_UPS[options.size]
    (train_images, train_labels), (test_images, test_labels), noisy_images = load_data(setup, options.noise)
    model = build_model(setup, options.init)
    steps = options.epochs * math.ceil(len(train_images) / options.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    scheduler = LambdaLR(optimizer, warm_up_and_cosine(steps))

    epochs = []
    start = time.perf_counter()
    with tqdm(range(1, options.epochs + 1), unit="epoch", disable=options.no_progress or None) as progress:
        for epoch in progress:
            model.train()
            total = 0.0
            for indices in torch.randperm(len(train_images), generator=generator).split(options.batch_size):
                loss = F.cross_entropy(model(train_images[indices]), train_labels[indices])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                total += loss.item() * len(indices)
            train_loss = total / len(train_images)
            test_loss, test_accuracy = evaluate(model, test_images, test_labels)
            _, noisy_accuracy = evaluate(model, noisy_images, test_labels)
            epochs.append(
                {
                    "epoch": epoch,
                    "train_loss": train_loss,
                    "test_loss": test_loss,
                    "test_accuracy": test_accuracy,
                    "noisy_test_accuracy": noisy_accuracy,
                }
            )
            progress.set_description(f"epoch {epoch}", refresh=False)
            progress.set_postfix_str(f"loss {train_loss:.3f}, test accuracy {test_accuracy:.1f} %")
    seconds = time.perf_counter() - start

    if options.output:
        figures = {
            "arguments": vars(options) | {"output": str(options.output)},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "timm": timm.__version__,
                "scikit-learn": sklearn.__version__,
            },
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "images": {"train": len(train_images), "test": len(test_images)},
            "seconds": seconds,
            "epochs": epochs,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"test accuracy {test_accuracy:.2f} %, with noise {noisy_accuracy:.2f} %, {seconds:.1f} s")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--size", type=int, choices=SET_UPS, default=28, help="side of an image: 8, as they are, or 28, three times as "
        "large and in a frame, as those of MNIST; the network goes with it (default: %(default)s)"
    )  # fmt: skip
    parser.add_argument(
        "--noise", type=float, default=0.2, help="standard deviation of the noise in the test, as a fraction of the "
        "brightest pixel (default: %(default)s)"
    )  # fmt: skip
    usual = {name: ", ".join(f"{getattr(each, name)} at size {each.size}" for each in SET_UPS.values())
             for name in ("init", "epochs", "lr")}  # fmt: skip
    parser.add_argument(
        "--init", choices=INITS, help=f"whose initialisation of the layers it begins with (default: {usual['init']})"
    )
    parser.add_argument("--epochs", type=positive, help=f"passes over the training set (default: {usual['epochs']})")
    parser.add_argument("--batch-size", type=positive, default=64, help="images per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, help=f"learning rate after the warm-up (default: {usual['lr']})")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="weight decay (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order, not of the split (default: 0)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures here (default: nowhere)")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar, not even in a terminal")
    options = parser.parse_args()
    options.epochs = options.epochs or SET_UPS[options.size].epochs
    options.init = options.init or SET_UPS[options.size].init
    options.lr = SET_UPS[options.size].lr if options.lr is None else options.lr
    return options


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def load_data(setup: SetUp, noise: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Load the digits.

    Returns:
        Images (N, 1, size, size) and labels to train with; those to test with; and the test images with noise, as if
        a camera had it: each pixel its own, and none darker than black or brighter than the brightest. All are
        standardised by the training images.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images = F.pad(F.interpolate(images, scale_factor=setup.enlarged, mode="bilinear"), [setup.frame] * 4)
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_FRACTION, stratify=digits.target, random_state=SPLIT_SEED
    )
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    added = BRIGHTEST * noise * torch.randn(images[test].shape, generator=generator)
    noisy = (images[test] + added).clamp(0, BRIGHTEST)
    mean, deviation = images[train].mean(), images[train].std()
    train_images, test_images, noisy = ((each - mean) / deviation for each in (images[train], images[test], noisy))
    return (train_images, labels[train]), (test_images, labels[test]), noisy


def build_model(setup: SetUp, init: str) -> VisionTransformer:
    """Build a vision transformer of four heads that sees each image as 16 patches."""
    model = VisionTransformer(
        img_size=setup.size, patch_size=setup.patch, in_chans=1, num_classes=10, num_heads=4,
        weight_init=INITS[init], **setup.model,
    )  # fmt: skip
    if setup.size == 8:
        torch.nn.init.normal_(model.pos_embed, std=0.3)  # it learns faster from positions that stand out
    return model


def warm_up_and_cosine(steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at each step: a linear warm-up, then half a cosine down to 0."""
    warm_up = math.ceil(WARM_UP_FRACTION * steps)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2

    return factor


@torch.inference_mode()
def evaluate(model: torch.nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the loss and the accuracy in percent over all images, taken as one batch."""
    model.eval()
    logits = model(images)
    return F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).double().mean().item()


if __name__ == "__main__":
    main()
