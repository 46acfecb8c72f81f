"""CIFAR-10 as tensors: from tars of images, or as torchvision has it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

#: The files that stand for the two parts where they are tars, with a folder for each class.
TARS = {True: "train.tar", False: "validation.tar"}


def load(folder: Path, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
    """Load one of the two parts of CIFAR-10.

    Args:
        folder: Holds train.tar and validation.tar, or what torchvision reads.
        train: Which part: the 50,000 images to train with, or the 10,000 to test with.
        download: Whether torchvision may fetch what is not there.

    Returns:
        The images, (N, 32, 32, 3), whole numbers from 0 to 255, and their labels, (N,).

    Raises:
        ImportError: There are no tars, and no torchvision.
        OSError: The data cannot be fetched.
        RuntimeError: The data is not there, or is damaged.
    """
    tar = folder / TARS[train]
    if tar.is_file():
        return from_tar(tar)
    from torchvision.datasets import CIFAR10

    found = CIFAR10(str(folder), train=train, download=download)
    return torch.from_numpy(found.data), torch.tensor(found.targets)


def from_tar(path: Path) -> tuple[Tensor, Tensor]:
    """Load the images of a tar in the order of their names; what their folders are called says the class."""
    files: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)) is not None:
                files[member.name] = file.read()
    names = sorted(files)
    folders = [name.rpartition("/")[0] for name in names]
    classes = {folder: number for number, folder in enumerate(sorted(set(folders)))}
    images = np.stack([np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")) for name in names])
    return torch.from_numpy(images), torch.tensor([classes[folder] for folder in folders])
