"""Where the tokens of an attention layer lie in an image."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from ..errors import SettingsError, UnsupportedError

if TYPE_CHECKING:
    from torch import nn


class Tokens(NamedTuple):
    """The tokens of one side of a layer, its queries or its keys: those of no place come first.

    Attributes:
        prefix: The names of the tokens that are no patches, such as the class token.
        grid: How many rows and columns of patches there are; (0, 0): none.
    """

    prefix: tuple[str, ...]
    grid: tuple[int, int]

    def name(self, place: int) -> str:
        """Return what a token is called."""
        if place < len(self.prefix):
            return self.prefix[place]
        return "patch {}, {}".format(*divmod(place - len(self.prefix), self.grid[1]))

    def patch(self, place: int) -> tuple[int, int] | None:
        """Return the row and column of a token; None: it is no patch."""
        return None if place < len(self.prefix) else divmod(place - len(self.prefix), self.grid[1])

    def find(self, text: str) -> int:
        """Return the place of a token that a user names: the name of one that is no patch, or ``ROW,COLUMN``.

        Raises:
            SettingsError: There is none.
        """
        names = {"".join(name.split()[:1]) if "register" not in name else name.replace(" ", ""): place
                 for place, name in enumerate(self.prefix)}  # fmt: skip
        rows, columns = self.grid
        word = text.strip().lower()
        if word in names:
            return names[word]
        found = re.fullmatch(r"(\d+)\s*,\s*(\d+)", word)
        if found and int(found[1]) < rows and int(found[2]) < columns:
            return len(self.prefix) + int(found[1]) * columns + int(found[2])
        allowed = [*map(repr, names), f"'ROW,COLUMN' of its {rows} x {columns} patches, from '0,0'"]
        raise SettingsError(f"unknown query {text!r} (from --query): allowed are {', '.join(allowed)}")

    def sensible(self) -> list[int]:
        """Return tokens that are worth a look: the class token, and patches in the middle and off it."""
        rows, columns = self.grid
        places = dict.fromkeys(
            len(self.prefix) + int(row * rows) * columns + int(column * columns)
            for row, column in ((0.52, 0.53), (0.16, 0.22))
        )
        return [*([0] if self.prefix else []), *places]


class Geometry:
    """Where the tokens of a model's layers lie.

    Args:
        model: The model, one of timm's.
        name: What it is called.

    Raises:
        UnsupportedError: Its patches are not known to lie in a grid.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        if grid is None:
            raise UnsupportedError(
                f"{name} cannot be drawn: it has no patch_embed.grid_size, which says how its tokens lie in the image. "
                "lwpf_patch.attention_maps(model, images) returns the weights of its layers"
            )
        self.grid: tuple[int, int] = (int(grid[0]), int(grid[1]))
        self.prefix = _names_of_prefix(model)

    def why_not(self, batch: int, queries: int, keys: int) -> str | None:
        """Return why a layer cannot be drawn, in words that follow a colon; None: it can.

        Args:
            batch: The first dimension of its map of one image.
            queries: How many queries it has.
            keys: How many keys.
        """
        if batch != 1:
            return (
                f"it attends within {batch} windows or other parts of the image, of {queries} queries and {keys} keys "
                "each, whose places in the image are not known"
            )
        if self.tokens(keys) is None:
            what = f"{len(self.prefix)} + {self.grid[0]} x {self.grid[1]}"
            return f"its {keys} keys are not the {what} tokens of the model, nor a grid of patches that were merged"
        if queries != 1 and self.tokens(queries) is None:
            return f"its {queries} queries have no known places in the image"
        return None

    def tokens(self, number: int) -> Tokens | None:
        """Return where so many tokens lie; None: it is not known."""
        rows, columns = self.grid
        while rows and columns:
            for prefix in dict.fromkeys((self.prefix, ())):
                if number == len(prefix) + rows * columns:
                    return Tokens(prefix, (rows, columns))
            rows, columns = (rows // 2, columns // 2) if rows % 2 == columns % 2 == 0 else (0, 0)
        return None

    def queries(self, number: int) -> Tokens:
        """Return where so many queries lie; a single one lies nowhere."""
        # Of a grid that is a power of two wide and high, a single token would be the patch that all were merged into.
        found = None if number == 1 else self.tokens(number)
        return found or Tokens(("the only query",), (0, 0))


def _names_of_prefix(model: nn.Module) -> tuple[str, ...]:
    number = getattr(model, "num_prefix_tokens", 0) or 0
    own = [
        name
        for attribute, name in (("cls_token", "class token"), ("dist_token", "distillation token"))
        if getattr(model, attribute, None) is not None
    ][:number]
    return (*own, *(f"register {index}" for index in range(1, number - len(own) + 1)))
