"""The verb ``lwpf inspect``: draw what each head of a model keeps and forgets."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..comparing.command import Subparsers
from ..errors import SettingsError, UnsupportedError
from ..hosts import HOSTS
from ..options import read_count, split_list
from ..settings import Settings, flag_of

if TYPE_CHECKING:
    from ..inspecting.drawing import Row
    from ..inspecting.models import Loaded
    from ..inspecting.tokens import Geometry

#: So many heads are drawn if none are chosen, so many queries of all layers together, and so many layers are tried.
HEADS, ROWS, TRIED = 12, 12, 3

DESCRIPTION = """\
Draws, for some queries of a model of timm, which keys each head keeps and which it forgets, and with what weights:
plain above patched, with the same weights. Without --checkpoint or --pretrained the weights are random.
"""


def add_parser(commands: Subparsers) -> None:
    """Add the verb."""
    parser = commands.add_parser(
        "inspect",
        help="draw what each head of a model keeps and forgets",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a model of timm, such as vit_small_patch16_224")
    parser.add_argument("--func-d", metavar="SPEC", default="relu", help="the forgetting function; default: relu")
    parser.add_argument("--sep", metavar="NAME", help="the normalisation; default: softmax")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights, as timm's scripts save them; those of EMA if they are there"
    )
    parser.add_argument("--pretrained", action="store_true", help="fetch the weights that were released with timm")
    parser.add_argument("--img-size", metavar="N", help="height and width of the images that the model is made for")
    parser.add_argument("--image", metavar="FILE", help="the image; default: a scene that is drawn")
    parser.add_argument(
        "--layer", action="append", metavar="GLOBS",
        help="glob patterns over the names of attention modules, such as 'blocks.0.attn'; default: the last one",
    )  # fmt: skip
    parser.add_argument(
        "--query", action="append", metavar="QUERY",
        help="'class' (also 'distillation', 'register1') or a patch as 'ROW,COLUMN'; may be given several times; "
        "default: the class token and two patches",
    )  # fmt: skip
    parser.add_argument("--head", action="append", metavar="N", help=f"heads, such as 0,3; default: the first {HEADS}")
    parser.add_argument("--output", metavar="FILE", default="attention.png", help="default: attention.png")
    parser.set_defaults(command=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    _check_output(options.output)
    logging.getLogger("lwpf_patch").setLevel(logging.WARNING)  # which backends compute says nothing here
    settings = Settings(func_d=options.func_d, sep=options.sep, origin=flag_of)
    HOSTS["timm"].check(settings)  # raises where it is not installed
    from ..inspecting import drawing, images, models
    from ..inspecting.tokens import Geometry

    size = None if options.img_size is None else _count(options.img_size, "--img-size")
    loaded = models.load_model(options.model, options.checkpoint, options.pretrained, size)
    picture = images.load_picture(options.image, loaded.model)
    if size is not None:
        models.check_size(loaded.model, options.model, picture.pixels, size)
    geometry = Geometry(loaded.model, options.model)
    print(f"model:   {options.model}, {_patched(loaded, settings, 'none')} attention modules")
    print(f"weights: {loaded.weights}")
    height, width = picture.pixels.shape[-2:]
    print(f"image:   {picture.name}, {height} x {width} pixels, {geometry.grid[0]} x {geometry.grid[1]} patches")
    plain = _plain_maps(loaded, picture.pixels, geometry, options.layer)
    heads = _heads(options.head, plain)
    _patched(loaded, settings)
    rows = _rows(loaded, picture.pixels, geometry, plain, heads, options.query)
    rule = options.func_d.partition(":")[0].strip()
    _print(rows, options.func_d)
    title = f"{options.model}: attention plain and with {options.func_d}"
    figure = drawing.draw(rows, heads, picture.shown, rule, title, loaded.weights, loaded.is_random)
    try:
        figure.savefig(options.output, dpi=160)
    except OSError as error:
        raise SettingsError(f"{options.output!r} (from --output) cannot be written: {error}") from error
    print(f"written: {options.output}")
    return 0


def _check_output(path: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingsError("lwpf inspect needs matplotlib: pip install 'lwpf_patch[plots]', or matplotlib alone")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lower().lstrip(".") not in kinds:
        raise SettingsError(f"{path!r} (from --output): its ending is not one of {', '.join(sorted(kinds))}")
    if not Path(path).absolute().parent.is_dir():
        raise SettingsError(f"{path!r} (from --output): there is no folder {str(Path(path).parent)!r}")


def _count(text: str, flag: str) -> int:
    try:
        number = read_count(text)
    except ValueError:
        number = -1
    if number < 0:
        raise SettingsError(f"{text!r} (from {flag}) is no whole number of at least 0")
    return number


def _patched(loaded: Loaded, settings: Settings, func_d: str | None = None) -> int:
    """Patch the model, and return of how many attention modules."""
    from ..patching.models import patch_model

    if func_d is not None:
        return len(patch_model(loaded.model, func_d=func_d))
    return len(patch_model(loaded.model, func_d=settings.func_d, sep=settings.sep))


def _plain_maps(loaded: Loaded, pixels: Any, geometry: Geometry, layers: list[str] | None) -> dict[str, Any]:
    """Return the plain maps of the layers that are to be drawn.

    Raises:
        SettingsError: A pattern matches no layer.
        UnsupportedError: A layer cannot be drawn.
    """
    from ..observing.maps import attention_maps

    names = [name.rpartition(".")[0] for name, _ in loaded.model.named_modules() if name.endswith(".func_d")]
    if layers is not None:
        patterns = [pattern for text in layers for pattern in split_list(text)]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SettingsError(
                    f"pattern {pattern!r} (from --layer) matches no attention module of {geometry.name}; they are "
                    f"{', '.join(names)}"
                )
        maps = attention_maps(loaded.model, pixels, layers=patterns)
        for name, found in maps.items():
            if reason := geometry.why_not(*_sizes(found)):
                raise UnsupportedError(_refusal(name, geometry, reason))
        return maps
    reasons = []
    for name in names[: -TRIED - 1 : -1]:
        maps = attention_maps(loaded.model, pixels, layers=name)
        found = next(iter(maps.values()))
        reason = geometry.why_not(*_sizes(found))
        if reason is None and found.weights.shape[2] > 1:
            return maps
        reasons.append(_refusal(name, geometry, reason or "it has a single query: ask for it with --layer"))
    raise UnsupportedError(reasons[0])


def _sizes(found: Any) -> tuple[int, int, int]:
    batch, _, queries, keys = found.weights.shape
    return batch, queries, keys


def _refusal(layer: str, geometry: Geometry, reason: str) -> str:
    return (
        f"{layer} of {geometry.name} cannot be drawn: {reason}. lwpf_patch.attention_maps(model, images) returns its "
        "weights"
    )


def _heads(given: list[str] | None, plain: dict[str, Any]) -> list[int]:
    smallest = min(found.weights.shape[1] for found in plain.values())
    if given is None:
        if smallest > HEADS:
            print(f"heads:   the first {HEADS} of {smallest}; choose with --head")
        return list(range(min(smallest, HEADS)))
    heads = [_count(part, "--head") for text in given for part in split_list(text)]
    if wrong := [head for head in heads if head >= smallest]:
        raise SettingsError(f"head {wrong[0]} (from --head): there are {smallest}, from 0")
    return list(dict.fromkeys(heads))


def _rows(
    loaded: Loaded, pixels: Any, geometry: Geometry, plain: dict[str, Any], heads: list[int], queries: list[str] | None
) -> list[Row]:
    from ..inspecting.drawing import Row
    from ..observing.maps import attention_maps

    layers = [name.partition("#")[0] for name in plain]
    patched = attention_maps(loaded.model, pixels, layers=list(dict.fromkeys(layers)), heads=heads)
    rows = []
    for name, found in plain.items():
        _, number, keys = _sizes(found)
        tokens, lie = geometry.queries(number), geometry.tokens(keys)
        assert lie is not None
        if number == 1:
            places = [0]
        else:
            places = tokens.sensible() if queries is None else [tokens.find(text) for text in queries]
        for place in places:
            rows.append(
                Row(
                    name, tokens.name(place), tokens.patch(place), tokens.grid, lie,
                    found.weights[0, heads, place].float().numpy(),
                    patched[name].weights[0, :, place].float().numpy(),
                    patched[name].forgotten[0, :, place].numpy(),
                )
            )  # fmt: skip
    if len(rows) > ROWS:
        raise SettingsError(
            f"{len(rows)} queries of {len(plain)} layers are too many for a picture, which has at most {ROWS}: choose "
            "with --layer and --query"
        )
    return rows


def _print(rows: list[Row], rule: str) -> None:
    print(f"with {rule}, of the keys of each head:")
    for row in rows:
        shares = ", ".join(f"{share:.0%}" for share in row.forgotten.mean(-1))
        lost = float((row.plain * row.forgotten).sum(-1).mean())
        print(f"  {row.layer}, {row.query}: forgotten {shares}, which have {lost:.0%} of the plain weight")
