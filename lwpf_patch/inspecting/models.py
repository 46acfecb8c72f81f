"""A model of timm by its name, with the weights of a checkpoint, of a release, or random ones."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Where checkpoints have their weights, the first one that is there; the same as timm's, with those of EMA first.
KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
#: What DDP and torch.compile put before the names of parameters.
PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")
#: The seed of random weights.
SEED = 0


class Loaded(NamedTuple):
    """A model.

    Attributes:
        model: The model, in evaluation mode.
        weights: What its weights are, in words.
        is_random: Whether they are random.
    """

    model: nn.Module
    weights: str
    is_random: bool


def load_model(name: str, checkpoint: str | None, pretrained: bool, image_size: int | None) -> Loaded:
    """Make a model of timm.

    Args:
        name: The name that timm has it by.
        checkpoint: A file with its weights; None: there is none.
        pretrained: Whether timm shall fetch the weights that were released.
        image_size: The height and width of its images, in pixels; None: as it is.

    Raises:
        SettingsError: There is no such model, or the weights cannot be read, or are those of another one.
    """
    import torch

    if checkpoint is not None and pretrained:
        raise SettingsError("--pretrained and --checkpoint: the weights can come from one of them only")
    state, key = (None, "") if checkpoint is None else read_checkpoint(checkpoint)
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    torch.manual_seed(SEED)
    model = _create(name, pretrained, options)
    if state is not None:
        _load(model, state, name, str(checkpoint))
        return Loaded(model.eval() or model, f"{Path(str(checkpoint)).name}{f' ({key})' if key else ''}", False)
    if pretrained:
        return Loaded(model.eval() or model, "as released with timm", False)
    return Loaded(model.eval() or model, f"RANDOM (seed {SEED}): nothing of this was learned", True)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        similar = timm.list_models(f"*{architecture}*")[:5] or _similar(architecture, timm.list_models())
        hint = f"; similar names are {', '.join(similar)}" if similar else ""
        raise SettingsError(f"timm has no model {name!r} (from --model){hint}; timm.list_models() has all names")
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # whatever the code of a model raises, or the network
        size = [f"images of {options['img_size']} pixels (--img-size)"] if options else []
        what = " and ".join([*(["its released weights (--pretrained)"] if pretrained else []), *size])
        with_what = f" with {what}" if what else ""
        raise SettingsError(f"timm cannot make {name!r}{with_what}: {_in_a_line(error)}") from error


def check_size(model: nn.Module, name: str, pixels: Tensor, image_size: int) -> None:
    """Check that a model takes images of the size that it was made for.

    Args:
        model: The model.
        name: The name that timm has it by.
        pixels: An image as the model gets it.
        image_size: Its height and width.

    Raises:
        SettingsError: It does not, as where its patches do not fill them.
    """
    import torch

    try:
        with torch.no_grad():
            model(pixels)
    except Exception as error:  # whatever the code of a model raises
        raise SettingsError(
            f"{name!r} cannot compute images of {image_size} pixels (--img-size): {_in_a_line(error)}"
        ) from error


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _similar(name: str, names: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, names, n=3, cutoff=0.5)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def read_checkpoint(path: str) -> tuple[dict[str, Tensor], str]:
    """Read the weights of a checkpoint, as timm does; nothing in it is executed.

    Returns:
        The state dict, and the key that it was found under; empty: the file is the state dict itself.

    Raises:
        SettingsError: There is no such file, it is no checkpoint, or holds no weights.
    """
    import torch

    file = Path(path)
    if not file.is_file():
        raise SettingsError(f"there is no file {path!r} (from --checkpoint)")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            read: Any = load_file(path)
        else:
            # timm's training script keeps its arguments beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                read = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SettingsError(
            f"{path!r} (from --checkpoint) holds something else than weights, or is no checkpoint: "
            f"{_first_sentence(error)}. Save model.state_dict() alone"
        ) from error
    except Exception as error:  # a truncated file, a folder in a zip file, a missing package
        raise SettingsError(
            f"{path!r} (from --checkpoint) cannot be read as a checkpoint: {type(error).__name__}: "
            f"{_first_sentence(error)}"
        ) from error
    key = next((key for key in KEYS if isinstance(read, Mapping) and read.get(key) is not None), "")
    state = read[key] if key else read
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        held = (
            f"the keys {', '.join(map(repr, list(state)[:6]))}" if isinstance(state, Mapping) else type(state).__name__
        )
        raise SettingsError(
            f"{path!r} (from --checkpoint) has no weights where timm keeps them ({', '.join(KEYS)}, or the file "
            f"itself): it has {held}"
        )
    return {_without_prefixes(name): value for name, value in state.items()}, key


def _without_prefixes(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    wanted = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])
    return wanted.strip().rstrip(".")[:200]


def _load(model: Any, state: dict[str, Tensor], name: str, path: str) -> None:
    """Put weights into a model, whose classifier gets as many classes as they have.

    Raises:
        SettingsError: They are those of another model.
    """
    origin = f"{path!r} (from --checkpoint)"
    if maps := [key for key in state if ".feature_map." in key]:
        raise SettingsError(
            f"{origin} has feature maps of U-Hop, such as {maps[0]!r}: save a checkpoint after lwpf_patch.fold(model)"
        )
    configuration = getattr(model, "pretrained_cfg", None) or {}
    classifier = configuration.get("classifier") if isinstance(configuration, Mapping) else None
    weight = state.get(f"{classifier}.weight")
    if isinstance(classifier, str) and weight is not None and weight.shape[0] != getattr(model, "num_classes", None):
        model.reset_classifier(weight.shape[0])
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    shapes = f" ({list(state[other[0]].shape)}, not {list(own[other[0]].shape)})" if other else ""
    problems = [
        f"{len(keys)} {what}, such as {keys[0]!r}{more}"
        for keys, what, more in (
            (missing, "of the model's are missing", ""),
            (unknown, "are not in the model", ""),
            (other, "have another shape", shapes),
        )
        if keys
    ]
    if problems:
        # Of a checkpoint for other images only what belongs to places differs; else it is that of another model.
        is_of_other_images = other and not missing and not unknown and all("pos" in key for key in other)
        hint = "; with --img-size the model is made for other images" if is_of_other_images else ""
        raise SettingsError(f"{origin} is not of {name}: of its parameters {'; '.join(problems)}{hint}")
    model.load_state_dict(state)
