"""The one grammar of what users write: numbers, booleans, words, lists, and options as in ``"a=b,c=d"``.

White space around words, names, values and separators means nothing. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .errors import SettingsError, shown, unknown_value

#: The largest number that is computed with: float32 ends at 3.4e38, and the differences of two are taken.
LARGEST = 1e38
#: The largest one that is squared.
LARGEST_SQUARED = 1e18
#: The largest factor of squared distances in an exponent, whose rounding errors it multiplies.
LARGEST_EXPONENT = 1e6
#: The largest count: more do not fit into the numbers that PyTorch counts with.
LARGEST_COUNT = 2**63 - 1

#: The words for a boolean, in any case.
FLAGS = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}


# --- numbers, booleans and words ------------------------------------------------------------------------------------


def read_number(value: object) -> float:
    """Read a number: one of Python's, NumPy's or PyTorch's, or text as Python writes it, in ASCII.

    Raises:
        ValueError: It is none, such as ``True``, bytes, ``"1_0"``, digits of other scripts, or more than a float holds.
    """
    if isinstance(value, float):
        return float(value)
    text = _ascii(value)
    number = float(text)
    if math.isinf(number) and "inf" not in text.lower():
        raise ValueError(text)
    return number


def read_count(value: object) -> int:
    """Read a whole number, given as for :func:`read_number`.

    Raises:
        ValueError: It is none.
    """
    return int(_ascii(value))


def write_value(value: object) -> str:
    """Return a value as text, as short as it can be for the same value to be read from it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


def read_flag(value: object) -> bool:
    """Read a boolean: one of Python's, or one of the words for it.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else ""
    if word not in FLAGS:
        raise ValueError(word)
    return FLAGS[word]


def check_name(what: str, value: object, origin: str, known: Iterable[str]) -> str:
    """Return a name, without the white space around it.

    Raises:
        SettingsError: It is none of those that are known.
    """
    known = tuple(known)
    name = value.strip() if isinstance(value, str) else value
    if not isinstance(name, str) or name not in known:
        raise unknown_value(what, name, origin, known)
    return name


def _text(value: object) -> str:
    """Return a value as text: what is no text already is written as Python writes it."""
    if isinstance(value, str):
        return value.strip()
    try:
        return f"{value}"
    except Exception as error:  # whatever an object's own code raises
        raise ValueError from error


def _ascii(value: object) -> str:
    """Return how a number is written, without what float() and int() would take besides."""
    text = _text(value)
    if not text.isascii() or "_" in text:
        raise ValueError(text)
    return text


# --- lists ----------------------------------------------------------------------------------------------------------


def split_list(text: str) -> tuple[str, ...]:
    """Split text at its commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def texts(value: Any) -> tuple[Any, ...]:
    """Return what was given as a list of text: its parts, or the value itself where it is no list."""
    if isinstance(value, str):
        return split_list(value)
    try:
        parts = (value,) if isinstance(value, bytes) else tuple(value)
    except TypeError:
        return (value,)
    return tuple(part.strip() if isinstance(part, str) else part for part in parts)


# --- options --------------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """An option that takes a number, a boolean, or one of some words.

    Attributes:
        words: The words that it takes.
        minimum: The least number that it takes; None: it takes no number.
        maximum: The largest number that it takes.
        whole: Whether a number must be a whole one.
        exclusive: Whether a number must be above the minimum.
        flag: Whether it takes a boolean and nothing else.
        text: Whether it takes any text, such as the name of a file.
        default: What it is where it is not given, in words.
        help: What it does, in words.
        former: An earlier name of it, which is taken as well.
        former_words: Earlier words, which are taken as well, each with the word that stands for it now.
    """

    words: tuple[str, ...] = ()
    minimum: float | None = -LARGEST
    maximum: float = LARGEST
    whole: bool = False
    exclusive: bool = False
    flag: bool = False
    text: bool = False
    default: str = ""
    help: str = ""
    former: str = ""
    former_words: Mapping[str, str] = {}

    def expected(self) -> str:
        """Describe the values that it takes."""
        if self.flag:
            return "true or false"
        if self.text:
            return "text"
        values = [repr(word) for word in self.words]
        if self.minimum is not None:
            number = "a whole number" if self.whole else "a number"
            if self.minimum == -self.maximum:
                number += f" from {self.minimum:g} to {self.maximum:g}"
            else:
                number += f" {'above' if self.exclusive else 'of at least'} {self.minimum:g}"
                number += f" and at most {self.maximum:g}" if self.maximum < LARGEST_COUNT else ""
            values.insert(0, number)
        return " or ".join(values)

    def read(self, value: object) -> float | str:
        """Read a value, given as text or as such.

        Raises:
            ValueError: It does not take this one.
        """
        if self.flag:
            return read_flag(value)
        word = _text(value)
        if self.text:
            return word
        word = self.former_words.get(word, word)
        if word in self.words:
            return word
        if self.minimum is None:
            raise ValueError(word)
        number: float = read_count(value) if self.whole else read_number(value)
        if f"{number}" in self.words:  # such as -inf
            return number
        if not self.minimum <= number <= self.maximum or (self.exclusive and number == self.minimum):
            raise ValueError(word)
        return number

    def read_from(self, value: object, name: str, place: str) -> Any:
        """Read a value as :meth:`read` does.

        Args:
            value: The value.
            name: The option's name.
            place: Where it came from, for the error message.

        Raises:
            SettingsError: It does not take this one.
        """
        try:
            return self.read(value)
        except ValueError:
            raise SettingsError(f"{name}={shown(value)}{place}: {name} must be {self.expected()}") from None

    def read_argument(self, value: object, name: str, function: str) -> Any:
        """Read an argument of a function in Python, which takes no text for a number; see :meth:`read_from`."""
        place = f" (from {function}({name}=...))"
        if isinstance(value, str) and value not in self.words:
            raise SettingsError(f"{name}={value!r}{place}: {name} must be {self.expected()}")
        return self.read_from(value, name, place)


def read_pairs(rest: str, text: str, origin: str) -> dict[str, str]:
    """Read ``option=value,option=value``.

    Args:
        rest: The options.
        text: The whole text that they stand in, for the error messages.
        origin: Where it came from, for the error messages.

    Returns:
        The values, by option.

    Raises:
        SettingsError: Something has another form, or an option stands twice.
    """
    pairs: dict[str, str] = {}
    for item in rest.split(",") if rest.strip() else ():
        option, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not option or not value:
            raise SettingsError(f"{item!r} in {text!r} (from {origin}) is not of the form option=value")
        if option in pairs:
            raise twice(option, text, origin)
        pairs[option] = value
    return pairs


def read_options(what: str, known: Mapping[str, Option], rest: str, text: str, origin: str) -> dict[str, Any]:
    """Read options that are known; see :func:`read_pairs`.

    Args:
        what: Whose options they are, for the error messages.
        known: The options that there are.
        rest: The options as text.
        text: The whole text that they stand in, for the error messages.
        origin: Where it came from, for the error messages.

    Returns:
        The values, by option; former names are those of today.

    Raises:
        SettingsError: An unknown option, or a value that the option does not take.
    """
    former = {option.former: name for name, option in known.items() if option.former}
    found: dict[str, Any] = {}
    for given, value in read_pairs(rest, text, origin).items():
        name = former.get(given, given)
        if name not in known:
            raise unknown_value(f"option of {what}", given, origin, known)
        if name in found:
            raise twice(name, text, origin)
        found[name] = known[name].read_from(value, name, f" in {text!r} (from {origin})")
    return found


def twice(option: str, text: str, origin: str) -> SettingsError:
    """Build the error for an option that stands twice."""
    return SettingsError(f"option {option!r} stands twice in {text!r} (from {origin})")
