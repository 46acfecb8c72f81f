"""Tests a model that timm's train.py has trained on images that are zoomed, turned, moved or noisy, as in no training.

It knows nothing of forgetting: `lwpf run` patches it as it patches train.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import yaml
from timm.data import create_dataset
from torch import Tensor
from torchvision.transforms.v2 import functional as F

#: A shift takes images (N, C, H, W), from 0 to 1, and a generator of random numbers.
Shift = Callable[[Tensor, torch.Generator], Tensor]


def affine(angle: float = 0, zoom: float = 1, right: int = 0) -> Shift:
    """Return a shift that turns by degrees, enlarges and moves by pixels; what was outside is black."""

    def shift(images: Tensor, generator: torch.Generator) -> Tensor:
        return F.affine(images, angle, [right, 0], zoom, [0.0, 0.0], interpolation=F.InterpolationMode.BILINEAR)

    return shift


def noise(deviation: float) -> Shift:
    """Return a shift that adds Gaussian noise; pixels stay between 0 and 1."""

    def shift(images: Tensor, generator: torch.Generator) -> Tensor:
        return (images + deviation * torch.randn(images.shape, generator=generator)).clamp(0, 1)

    return shift


#: By name, without dots: lwpf compare takes these for nested keys.
SHIFTS: dict[str, Shift] = {
    "as it is": affine(),
    "zoomed in": affine(zoom=1.2),
    "zoomed out": affine(zoom=0.8),
    "turned by 15 degrees": affine(angle=15),
    "turned by 30 degrees": affine(angle=30),
    "moved by 2 pixels": affine(right=2),
    "noise of 10 %": noise(0.1),
    "noise of 20 %": noise(0.2),
}


def main() -> None:
    """Test, and write the accuracy under each shift, in percent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trained", type=Path, required=True, help="the folder of the comparison that trained")
    parser.add_argument("--arm", required=True, help="of the run that is tested")
    parser.add_argument("--seed", required=True, help="of the run that is tested")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    options = parser.parse_args()
    pattern = f"runs/{options.arm}-seed{options.seed}-*/output/run"
    found = sorted(options.trained.glob(pattern), key=lambda folder: folder.stat().st_mtime)
    if not found:
        parser.error(f"{options.trained} has no folder {pattern}: train first")
    accuracies = test(found[-1], torch.device(options.device))
    for name, accuracy in accuracies.items():
        print(f"{name}: {accuracy:.2f} %")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(accuracies))


@torch.inference_mode()
def test(folder: Path, device: torch.device) -> dict[str, float]:
    """Return the accuracy under each shift.

    Args:
        folder: Where train.py wrote.
        device: Where the model is to run.
    """
    trained = yaml.safe_load((folder / "args.yaml").read_text())
    model = timm.create_model(
        trained["model"],
        num_classes=trained["num_classes"],
        in_chans=trained["in_chans"] or trained["input_size"][0],
        checkpoint_path=str(folder / "last.pth.tar"),
        **trained["model_kwargs"],
    )
    model.to(device).eval()
    images, labels = load(trained)
    statistics = ([trained[name]] if isinstance(trained[name], float) else trained[name] for name in ("mean", "std"))
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in statistics)
    accuracies = {}
    for name, shift in SHIFTS.items():
        shifted = (shift(images, torch.Generator().manual_seed(0)) - mean) / deviation
        batches = shifted.split(trained["validation_batch_size"] or trained["batch_size"])
        right = torch.cat([model(batch.to(device)).argmax(1).cpu() for batch in batches]) == labels
        accuracies[name] = 100 * right.double().mean().item()
    return accuracies


def load(trained: dict) -> tuple[Tensor, Tensor]:
    """Return the images of the test set, from 0 to 1, and their labels.

    Args:
        trained: The options that train.py was called with.
    """
    dataset = create_dataset(
        trained["dataset"], root=trained["data_dir"], split=trained["val_split"], is_training=False
    )
    mode = "L" if trained["input_size"][0] == 1 else "RGB"
    images, labels = zip(*((F.pil_to_tensor(image.convert(mode)), label) for image, label in dataset), strict=True)
    return torch.stack(images).float() / 255, torch.tensor(labels)


if __name__ == "__main__":
    main()
