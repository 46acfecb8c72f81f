"""Which attention modules of a model forget, by their depth: ``"6-"``, ``"0,3,8-11"``, ``"last 4"``.

A block is an attention module of a model, by its number in the order in which the model registers them, from 0 on.
Nothing here imports torch.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from .errors import SettingsError, shown
from .options import split_list, texts

_FORMS = (
    "a number such as 3 (counted from 0), a range such as 3-5, 6- (from the seventh on) or -5 (the first six), last, "
    "last 4, or several of these with commas; all is every block"
)
_RANGE = re.compile(r"(\d*)\s*(-?)\s*(\d*)", re.ASCII)
_LAST = re.compile(r"last\s*(\d*)", re.ASCII)
#: Longer numbers are no counts of anything, and Python does not read all of them.
_DIGITS = 18

#: What users may give as blocks.
BlocksLike: TypeAlias = "str | int | Iterable[str | int] | Blocks"


class Part(NamedTuple):
    """One number or range.

    Attributes:
        first: The first block; negative: counted from the end, where -1 is the last block.
        last: The last block; None: that of the model.
    """

    first: int
    last: int | None

    def __str__(self) -> str:
        if self.first < 0:
            return "last" if self.first == -1 else f"last {-self.first}"
        if self.last is None:
            return f"{self.first}-"
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"

    def of(self, count: int) -> range:
        """Return the blocks that it means in a model that has so many; those that the model lacks are left out."""
        first = self.first if self.first >= 0 else max(count + self.first, 0)
        return range(first, count if self.last is None else min(self.last + 1, count))


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model that are asked for.

    Attributes:
        parts: The numbers and ranges; a block may be in several.
    """

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.parts))

    def of(self, count: int) -> set[int]:
        """Return the blocks that are meant in a model that has so many."""
        return {block for part in self.parts for block in part.of(count)}

    def idle(self, count: int) -> list[str]:
        """Return the parts that mean no block of a model that has so many."""
        return [str(part) for part in self.parts if not part.of(count)]

    def check(self, names: list[str], model: str, origin: str, remedy: str) -> None:
        """Check that each part means a block of a model.

        Args:
            names: The names of the model's attention modules.
            model: What the model is called.
            origin: Where the setting came from.
            remedy: What else to do than to choose other blocks.

        Raises:
            SettingsError: A part means none.
        """
        idle = self.idle(len(names))
        if not idle:
            return
        modules = f"{len(names)} attention modules" if len(names) > 1 else "1 attention module"
        which = "" if [str(self)] == idle else f"{', '.join(idle)} of "
        raise SettingsError(
            f"{which}blocks={str(self)!r} (from {origin}) matches no block of {model}, which has {modules}, counted "
            f"from 0: {in_short(names)}. Choose others, or {remedy}"
        )


def in_short(names: list[str]) -> str:
    """Return names with commas, and of many the first ones and the last."""
    return ", ".join(names if len(names) <= 6 else [*names[:3], "...", names[-1]])


def parse_blocks(value: object, origin: str = "blocks") -> Blocks | None:
    """Read which blocks are meant.

    Args:
        value: Text such as ``"6-"``, a number, or several of these, such as ``range(6, 12)``; None or ``"all"``: all.
        origin: Where it came from, for the error message.

    Returns:
        The blocks; None: all.

    Raises:
        SettingsError: It has another form.
    """
    if value is None or isinstance(value, Blocks):
        return value
    pieces = [each for given in texts(value) for each in (split_list(given) if isinstance(given, str) else (given,))]
    if not pieces and not isinstance(value, str):
        raise SettingsError(f"blocks={shown(value)} (from {origin}) names no block: give {_FORMS}")
    if all(isinstance(piece, str) and piece.lower() == "all" for piece in pieces):
        return None
    return Blocks(tuple(dict.fromkeys(_part(piece, value, origin) for piece in pieces)))


def _part(piece: Any, value: object, origin: str) -> Part:
    part = _read(piece) if isinstance(piece, str) else _read_number(piece)
    if part is None:
        raise SettingsError(f"blocks={shown(value)} (from {origin}): {shown(piece)} is no block: give {_FORMS}")
    return part


def _read(text: str) -> Part | None:
    text = text.strip().lower()
    if found := _LAST.fullmatch(text):
        count = _number(found[1] or "1")
        return Part(-count, None) if count else None
    found = _RANGE.fullmatch(text)
    if found is None or not (found[1] or found[3]) or (found[1] and found[3] and not found[2]):
        return None
    if not found[2]:
        number = _number(found[1])
        return None if number is None else Part(number, number)
    first = _number(found[1] or "0")
    last = _number(found[3]) if found[3] else None
    if first is None or (found[3] and last is None) or (last is not None and last < first):
        return None
    return Part(first, last)


def _read_number(value: Any) -> Part | None:
    if isinstance(value, bool):
        return None
    try:
        number = operator.index(value)
    except Exception:  # whatever an object's own code raises
        return None
    return Part(number, number) if 0 <= number < 10**_DIGITS else None


def _number(digits: str) -> int | None:
    return int(digits) if len(digits) <= _DIGITS else None
