"""The image that a model looks at: one of the user's, or one that is drawn here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import SettingsError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

#: Height and width of the drawn image, in pixels.
SIZE = 448


class Picture(NamedTuple):
    """An image.

    Attributes:
        pixels: As the model gets it, (1, 3, height, width).
        shown: The same part of it as people see it, (height, width, 3), from 0 to 1.
        name: What it is called.
    """

    pixels: Tensor
    shown: NDArray[Any]
    name: str


def load_picture(path: str | None, model: nn.Module) -> Picture:
    """Load an image, cut and scaled as timm does to evaluate a model.

    Args:
        path: A file; None: the drawn image.
        model: The model.

    Raises:
        SettingsError: There is no such file, or it is no image, or the model takes other ones than those of colours.
    """
    import numpy
    import torch
    from PIL import Image
    from timm import data

    if path is None:
        image = Image.fromarray((255 * draw_scene()).round().astype("uint8"))
    else:
        try:
            image = Image.open(path).convert("RGB")
        except FileNotFoundError:
            raise SettingsError(f"there is no file {path!r} (from --image)") from None
        except Exception as error:
            raise SettingsError(f"{path!r} (from --image) cannot be read as an image: {error}") from error
    timm_data: Any = data
    options = timm_data.resolve_data_config({}, model=model)
    if options["input_size"][0] != 3:
        raise SettingsError(f"the model takes images of {options['input_size'][0]} channels, not of colours")
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple) and len(size) == 2 and all(isinstance(each, int) for each in size):
        options["input_size"] = (3, *size)
    # With no share cut off: a drawn scene has its margins, and what a user wants to see is the whole image.
    transform = timm_data.create_transform(**{**options, "crop_pct": 1.0}, is_training=False)
    pixels = transform(image)
    mean, deviation = (torch.tensor(options[name])[:, None, None] for name in ("mean", "std"))
    shown = (pixels * deviation + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return Picture(pixels[None], numpy.ascontiguousarray(shown), "the drawn scene" if path is None else path)


def draw_scene() -> NDArray[Any]:
    """Draw a red boat on a lake under the sun, (:data:`SIZE`, :data:`SIZE`, 3), from 0 to 1; always the same."""
    import numpy as np

    y, x = (axis / SIZE for axis in np.mgrid[0:SIZE, 0:SIZE])
    noise = np.random.default_rng(0).normal(size=(SIZE, SIZE))

    def paint(image: Any, where: Any, colour: tuple[float, float, float], shade: Any = 0.0) -> Any:
        return np.where(where[..., None], np.clip(np.array(colour) + np.asarray(shade)[..., None], 0, 1), image)

    image = np.stack([0.45 + 0.4 * y, 0.65 + 0.25 * y, 0.92 - 0.05 * y], axis=-1)  # the sky
    distance = np.hypot(x - 0.8, y - 0.16)
    image = image + 0.25 * np.exp(-((distance / 0.12) ** 2))[..., None] * np.array([1.0, 0.8, 0.2])
    image = paint(image, distance < 0.075, (1.0, 0.88, 0.35))  # the sun
    for centre, height, colour in ((0.2, 0.27, (0.42, 0.47, 0.6)), (0.62, 0.2, (0.5, 0.55, 0.66))):  # mountains
        ridge = 0.52 - height + 0.9 * np.abs(x - centre) + 0.012 * np.sin(60 * x)
        image = paint(image, y > ridge, colour, 0.02 * noise)
        image = paint(image, (y > ridge) & (y < 0.52 - height + 0.06 + 0.01 * np.sin(90 * x)), (0.95, 0.96, 0.98))
    image = paint(image, y > 0.5 + 0.015 * np.sin(9 * x), (0.28, 0.5, 0.27), 0.04 * noise)  # the shore
    waves = 0.05 * np.sin(90 * y + 4 * np.sin(14 * x)) + 0.015 * noise
    image = paint(image, y > 0.58, (0.16, 0.4, 0.58), waves + 0.12 * (0.8 - y))  # the lake
    hull = (y > 0.72) & (y < 0.82) & (np.abs(x - 0.46) < 0.27 - 0.9 * (y - 0.72))
    image = paint(image, hull, (0.75, 0.16, 0.13), -0.6 * (y - 0.72))
    image = paint(image, hull & (y < 0.738), (0.95, 0.93, 0.88))
    image = paint(image, (np.abs(x - 0.45) < 0.006) & (y > 0.3) & (y < 0.73), (0.3, 0.2, 0.13))  # the mast
    for side, width, colour in ((1, 0.26, (0.97, 0.95, 0.9)), (-1, 0.17, (0.93, 0.55, 0.2))):  # the sails
        offset = side * (x - 0.45)
        image = paint(
            image, (offset > 0.012) & (offset < width * (y - 0.32) / 0.36) & (y < 0.69), colour, -0.25 * offset
        )
    return np.clip(image, 0, 1)
