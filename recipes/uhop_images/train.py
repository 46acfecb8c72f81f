"""Trains a vision Hopfield network on CIFAR-10: the class token retrieves from the patches of an image, once.

The network of U-Hop's image experiment (Wu et al., ICML 2024), with each of the things in which its two variants differ
as an option. Nothing here knows of lwpf_patch but the feature map's Stage I, which is U-Hop's.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the recipes are plain files, no package

import cifar
from calling import positive

from lwpf_patch import separation_loss

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
STAGE_ONE_BATCH = 200


class HopfieldImages(nn.Module):
    """Classifies an image by what its class token retrieves from its patches.

    Args:
        patch: The side of a patch.
        dim: Features of a pattern.
        values: What the values are made of: "input", the patches, or "keys", the keys after their projection.
        feature_map: Whether queries and keys go through Φ, a linear map, before they are projected.
    """

    def __init__(self, patch: int, dim: int, values: str, feature_map: bool) -> None:
        super().__init__()
        self.values = values
        self.patch = patch
        self.embed = nn.Linear(3 * patch**2, dim)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, num_heads=1, dropout=0.1, batch_first=True)
        for part in range(3):  # its projections begin as nn.Linear does
            linear = nn.Linear(dim, dim)
            self.attention.in_proj_weight.data[part * dim : (part + 1) * dim] = linear.weight.data
            self.attention.in_proj_bias.data[part * dim : (part + 1) * dim] = linear.bias.data
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, 10)
        # Last: all else begins with the same numbers whether there is one or not.
        self.feature_map = nn.Linear(dim, dim) if feature_map else nn.Identity()

    def patterns(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class token, (N, 1, dim), and the patches, (N, M, dim), of images (N, 3, 32, 32)."""
        patches = F.unfold(images, self.patch, stride=self.patch).mT
        return self.token.expand(len(images), -1, -1), self.embed(patches)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (N, 10)."""
        token, patches = self.patterns(images)
        query, keys, values = self.feature_map(token), self.feature_map(patches), patches
        if self.values == "keys":
            dim = values.shape[-1]
            weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
            values = F.linear(keys, weight[dim : 2 * dim], bias[dim : 2 * dim])
        retrieved, _ = self.attention(query, keys, values, need_weights=False)
        return self.classify(self.norm(retrieved.squeeze(1).relu()))


def main() -> None:
    """Trains, shows the progress, writes the figures."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    train, test = load(options)
    torch.manual_seed(options.seed)
    model = HopfieldImages(options.patch, options.dim, options.values, options.feature_map).to(options.device)
    start = time.perf_counter()
    losses = stage_one(model, train[0], options) if options.stage_one != "none" else []
    epochs = fit(model, train, test, options)
    figures = {
        "arguments": vars(options) | {"output": str(options.output), "data_dir": str(options.data_dir)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - start,
        "separation_losses": losses,
        "epochs": epochs,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"test accuracy {epochs[-1]['test_accuracy']:.2f} %, {figures['seconds']:.1f} s")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where CIFAR-10 is: train.tar and "
        "validation.tar, or as torchvision has it (default: %(default)s)")  # fmt: skip
    add("--download", action="store_true", help="have torchvision fetch CIFAR-10 to --data-dir if it is not there")
    add("--images", type=positive, default=10_000, metavar="N", help="images to train with, drawn with the seed "
        "(default: %(default)s)")  # fmt: skip
    add("--test-images", type=positive, metavar="N", help="images to test with (default: all)")
    add("--patch", type=int, choices=(32, 16, 8, 4), default=32, help="side of a patch (default: %(default)s, which is "
        "the image)")  # fmt: skip
    add("--dim", type=positive, default=512, help="features of a pattern (default: %(default)s)")
    add("--whiten", action="store_true", help="the pixels of a patch are decorrelated (ZCA) before they are embedded")
    add("--values", choices=("keys", "input"), default="keys", help="what the values are made of: the projected keys, "
        "or the patches (default: %(default)s)")  # fmt: skip
    add("--feature-map", action="store_true", help="queries and keys go through Φ, which is trained with the rest")
    add("--stage-one", choices=("none", "map", "all"), default="none", help="separate the patterns before training: by "
        "Φ alone, or by the patches' embedding as well (default: %(default)s)")  # fmt: skip
    add("--stage-one-epochs", type=positive, default=50, metavar="N", help="(default: %(default)s)")
    add("--epochs", type=positive, default=25, help="(default: %(default)s)")
    add("--batch-size", type=positive, default=128, help="(default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="of Adam, at the start of a cosine (default: %(default)s)")
    add("--seed", type=int, default=0, help="of images, weights and order (default: %(default)s)")
    add("--device", default="cpu", help="(default: %(default)s)")
    add("--threads", type=positive, help="CPU threads (default: torch's choice)")
    add("--output", type=Path, metavar="FILE.json", help="write the figures here (default: nowhere)")
    add("--no-progress", action="store_true", help="show no progress bar, not even in a terminal")
    options = parser.parse_args()
    if options.stage_one != "none" and not options.feature_map:
        parser.error("--stage-one trains Φ: give --feature-map, too")
    return options


def load(options: argparse.Namespace) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return images (N, 3, 32, 32) and labels to train with, and those to test with.

    Raises:
        SystemExit: CIFAR-10 is not there.
    """
    parts = []
    for train, count in ((True, options.images), (False, options.test_images)):
        try:
            images, labels = cifar.load(options.data_dir, train, options.download)
        except (ImportError, OSError, RuntimeError) as error:
            sys.exit(
                f"train.py: no CIFAR-10 in --data-dir {options.data_dir}: {' '.join(str(error).split())}\nGive the "
                "folder that holds train.tar and validation.tar, or --download, which needs torchvision and a network"
            )
        if train:
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
            images, labels = images[chosen], labels[chosen]
        images = (images[:count] / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
        parts.append((images.movedim(-1, 1).contiguous().to(options.device), labels[:count].to(options.device)))
    if options.whiten:
        parts = [(whitened(images, parts[0][0], options.patch), labels) for images, labels in parts]
    return parts[0], parts[1]


def whitened(images: Tensor, of: Tensor, patch: int) -> Tensor:
    """Return images whose patches are decorrelated and have a variance of 1 in each direction, after those of others.

    Args:
        images: (N, 3, 32, 32).
        of: The images whose patches have the covariance.
        patch: The side of a patch.
    """
    rows = F.unfold(of, patch, stride=patch).mT.flatten(0, 1).double()
    variances, directions = torch.linalg.eigh(rows.mT.cov())
    # Directions of little variance are noise: they are not brought to 1.
    scales = (variances + 0.01 * variances.mean()).rsqrt()
    rotated = (F.unfold(images, patch, stride=patch).mT.double() - rows.mean(0)) @ directions
    return F.fold(((rotated * scales) @ directions.mT).mT.float(), 32, patch, stride=patch)


def stage_one(model: HopfieldImages, images: Tensor, options: argparse.Namespace) -> list[float]:
    """Separate the patterns of each image, the class token among them, by gradient descent.

    Returns:
        The mean separation loss of each epoch.
    """
    trained = model.feature_map if options.stage_one == "map" else model
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(options.seed)
    losses = []
    for _ in tqdm(range(options.stage_one_epochs), "Stage I", unit="epoch", disable=options.no_progress or None):
        total = 0.0
        for batch in batches(len(images), STAGE_ONE_BATCH, generator):
            patterns = torch.cat(model.patterns(images[batch]), dim=1)
            loss = separation_loss(model.feature_map(patterns)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / len(images))
    return losses


def fit(
    model: HopfieldImages, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], options: argparse.Namespace
) -> list[dict[str, float]]:
    """Train, and test after each epoch.

    Returns:
        The figures of each epoch.
    """
    images, labels = train
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)  # dropout draws the same in all variants
    epochs = []
    with tqdm(range(1, options.epochs + 1), unit="epoch", disable=options.no_progress or None) as progress:
        for epoch in progress:
            model.train()
            total = 0.0
            for batch in batches(len(images), options.batch_size, generator):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
            schedule.step()
            test_loss, accuracy = evaluate(model, *test)
            epochs.append(
                {"epoch": epoch, "train_loss": total / len(images), "test_loss": test_loss, "test_accuracy": accuracy}
            )
            progress.set_postfix_str(f"loss {total / len(images):.3f}, test accuracy {accuracy:.1f} %")
    return epochs


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Give all numbers below a count in random order, so many at a time."""
    yield from torch.randperm(count, generator=generator).split(size)


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean loss and the accuracy in percent."""
    model.eval()
    logits = torch.cat([model(part) for part in images.split(1000)])
    return F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).double().mean().item()


if __name__ == "__main__":
    main()
