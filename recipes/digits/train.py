"""Trains a small timm vision transformer on scikit-learn's handwritten digits: 1,797 images of 8x8, no download."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

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


def main() -> None:
    """Trains, shows the progress, writes the figures."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    # The order of the images has a generator of its own: it stays the same however much randomness the model uses.
    generator = torch.Generator().manual_seed(options.seed)

    train_images, train_labels, test_images, test_labels = load_data()
    model = build_model()
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
            epochs.append(
                {"epoch": epoch, "train_loss": train_loss, "test_loss": test_loss, "test_accuracy": test_accuracy}
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
            # Higher means learnt earlier.
            "mean_test_accuracy": statistics.mean(epoch["test_accuracy"] for epoch in epochs),
            "epochs": epochs,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"test accuracy {epochs[-1]['test_accuracy']:.2f} %, {seconds:.1f} s")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--epochs", type=positive, default=30, help="passes over the training set (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=positive, default=64, help="images per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate after the warm-up (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="weight decay (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order, not of the split (default: 0)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures here (default: nowhere)")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar, not even in a terminal")
    return parser.parse_args()


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load the digits.

    Returns:
        Training images (N, 1, 8, 8) and labels, test images and labels; standardised by the training images.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_FRACTION, stratify=digits.target, random_state=SPLIT_SEED
    )
    images = (images - images[train].mean()) / images[train].std()
    return images[train], labels[train], images[test], labels[test]


def build_model() -> VisionTransformer:
    """Build a vision transformer that sees each image as 16 patches of 2x2 pixels."""
    model = VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        class_token=False,
        global_pool="avg",
        embed_dim=32,
        depth=2,
        num_heads=4,
        mlp_ratio=2,
        weight_init="reset",
    )
    # timm draws weights and positions with a deviation of 0.02, which suits wide models. One as narrow as this learns
    # faster from torch's own start of each layer ("reset") and from positions that stand out beside the patches.
    torch.nn.init.normal_(model.pos_embed, std=0.3)
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
