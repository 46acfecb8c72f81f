"""What the user asked for: one strict parser for ``apply()``, the environment and the command line.

Nothing here imports torch, so that a start-up hook can check a request before anything heavy is loaded.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import SettingsError, shown, unknown_value

MASKINGS = ("exclude", "paper")
BACKENDS = ("auto", "cpu", "eager", "plain", "triton")

PATCH_VARIABLE = "LWPF_PATCH"
#: The environment variable of each setting.
VARIABLES = {
    "func_d": "LWPF_FUNC_D",
    "masking": "LWPF_MASKING",
    "backend": "LWPF_BACKEND",
    "include": "LWPF_INCLUDE",
    "exclude": "LWPF_EXCLUDE",
    "exclude_models": "LWPF_EXCLUDE_MODELS",
    "uhop": "LWPF_UHOP",
    "compat": "LWPF_COMPAT",
}
#: What becomes of a model that was pickled with its host patched, where that is not patched.
UNPICKLE_VARIABLE = "LWPF_UNPICKLE"
UNPICKLE = ("error", "patch")
#: Variables with our prefix that mean something elsewhere (the test suite).
OTHER_VARIABLES = ("LWPF_REQUIRE_HOSTS",)


#: The largest number that is computed with: float32 ends at 3.4e38, and the differences of two are taken.
LARGEST = 1e38
#: The largest one that is squared.
LARGEST_SQUARED = 1e18
#: The largest factor of squared distances in an exponent, whose rounding errors it multiplies.
LARGEST_EXPONENT = 1e6
#: The largest count: more do not fit into the numbers that PyTorch counts with.
LARGEST_COUNT = 2**63 - 1

FLAGS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}


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


class Option(NamedTuple):
    """An option that takes a number, or one of some words.

    Attributes:
        words: The words that it takes.
        minimum: The least number that it takes; None: it takes no number.
        maximum: The largest number that it takes.
        whole: Whether a number must be a whole one.
        exclusive: Whether a number must be above the minimum.
    """

    words: tuple[str, ...] = ()
    minimum: float | None = -LARGEST
    maximum: float = LARGEST
    whole: bool = False
    exclusive: bool = False

    def expected(self) -> str:
        """Describes the values that it takes."""
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
        """Reads a value, given as text or as such.

        Raises:
            ValueError: It does not take this one.
        """
        word = _text(value)
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
        """Reads a value as :meth:`read` does.

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
        """Reads an argument of a function in Python, which takes no text for a number; see :meth:`read_from`."""
        place = f" (from {function}({name}=...))"
        if isinstance(value, str) and value not in self.words:
            raise SettingsError(f"{name}={value!r}{place}: {name} must be {self.expected()}")
        return self.read_from(value, name, place)


_EMPTY = Option(("zero", "plain"), minimum=None)
#: The built-in forgetting functions, each with its options.
FUNC_D_OPTIONS: dict[str, dict[str, Option]] = {
    "relu": {"empty": _EMPTY},
    "pfu": {
        "mu": Option(("dmedian", "-inf")),
        "bias": Option(("mu",)),  # not -inf: a row that forgets everything would have no weight to divide by
        "sigma": Option(minimum=0, maximum=LARGEST_SQUARED),
        "empty": _EMPTY,
    },
    "none": {},
}
_factories: dict[str, Callable[..., Any]] = {}


def register_func_d(name: str, factory: Callable[..., Any]) -> None:
    """Makes a forgetting function of your own known by name, for use as text: ``"name:option=value,..."``.

    Args:
        name: The name, a Python identifier that is not taken.
        factory: Called with the options as keyword arguments (numbers as ``float``, anything else as ``str``). Returns
            a func_d: a :class:`lwpf_patch.FuncD`, or any callable that maps scores ``s`` to ``(D(s), D'(s))``.

    Raises:
        SettingsError: The name is taken by another factory or is no identifier, or the factory cannot be called.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise SettingsError(f"register_func_d: the name {shown(name)} is not a Python identifier")
    if not callable(factory):
        raise SettingsError(f"register_func_d({name!r}): the factory {shown(factory)} is not callable")
    if name in FUNC_D_OPTIONS or _factories.get(name, factory) is not factory:
        raise SettingsError(f"register_func_d: the name {name!r} is taken; choose another one")
    _factories[name] = factory


def func_d_factory(name: str) -> Callable[..., Any] | None:
    """Returns the factory registered under a name, None for a built-in one."""
    return _factories.get(name)


def parse_func_d(text: str, origin: str = "func_d") -> tuple[str, dict[str, float | str]]:
    """Reads the text form of a func_d, such as ``"relu"`` or ``"pfu:mu=dmedian,bias=mu,sigma=0.01"``.

    Args:
        text: The text.
        origin: Where it came from, for the error messages.

    Returns:
        The name and its options.

    Raises:
        SettingsError: An unknown name or option, or a value that the option does not take.
    """
    name, colon, rest = text.strip().partition(":")
    name = name.strip()
    if name not in FUNC_D_OPTIONS and name not in _factories:
        raise unknown_value("func_d", name, origin, [*FUNC_D_OPTIONS, *_factories])
    if colon and not rest.strip():
        raise SettingsError(
            f"{text!r} (from {origin}): no option follows the colon; write {name!r} or 'name:option=value'"
        )
    pairs = _pairs(rest, text, origin)
    return name, {option: _read_option(name, option, value, text, origin) for option, value in pairs.items()}


def _pairs(rest: str, text: str, origin: str) -> dict[str, str]:
    """Reads ``option=value,option=value``, which is the rest of a text."""
    pairs: dict[str, str] = {}
    for item in rest.split(",") if rest.strip() else ():
        option, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not option or not value:
            raise SettingsError(f"{item!r} in {text!r} (from {origin}) is not of the form option=value")
        if option in pairs:
            raise SettingsError(f"option {option!r} stands twice in {text!r} (from {origin})")
        pairs[option] = value
    return pairs


class Sep(NamedTuple):
    """A normalisation of the scores: alpha-entmax, or a softmax with a number added to its denominator.

    Attributes:
        alpha: Of alpha-entmax: from 1, the softmax, to 2, the sparsemax.
        n: What is added to the denominator of the softmax, not negative; 0 where alpha is above 1.
    """

    alpha: float = 1.0
    n: float = 0.0


#: The normalisations that have a name.
SEPS = {"softmax": Sep(), "entmax15": Sep(1.5), "sparsemax": Sep(2.0), "softmax_n": Sep(n=1.0)}
#: The options of each that has any.
SEP_OPTIONS = {"softmax_n": {"n": Option(minimum=0)}}


def parse_sep(sep: Any, origin: str = "sep") -> Sep:
    """Read what the user gave as ``sep``, the normalisation of the scores.

    Args:
        sep: ``"softmax"``, ``"entmax15"``, ``"sparsemax"``, alpha itself, from 1 (softmax) to 2 (sparsemax), or
            ``"softmax_n:n=1"``, where n is 1 if it is left out.
        origin: Where it came from, for the error messages.

    Returns:
        The normalisation.

    Raises:
        SettingsError: It is none of these.
    """
    name, colon, rest = sep.partition(":") if isinstance(sep, str) else ("", "", "")
    name = name.strip()
    if name in SEPS and colon:
        return SEPS[name]._replace(**_sep_options(name, rest, sep, origin))
    if name in SEPS:
        return SEPS[name]
    try:
        alpha = read_number(sep)
    except ValueError:
        raise unknown_value("sep", sep, origin, [*SEPS, "a number from 1 to 2"]) from None
    if not 1.0 <= alpha <= 2.0:
        raise SettingsError(
            f"sep {shown(sep)} (from {origin}): alpha must be a number from 1 (softmax) to 2 (sparsemax)"
        )
    return Sep(alpha)


def _sep_options(name: str, rest: str, text: str, origin: str) -> dict[str, Any]:
    """Read the options behind the colon of a normalisation's text form."""
    known = SEP_OPTIONS.get(name)
    if known is None:
        raise SettingsError(f"sep {text!r} (from {origin}): {name!r} takes no options")
    if not rest.strip():
        raise SettingsError(
            f"sep {text!r} (from {origin}): no option follows the colon; write {name!r}, or '{name}:n=1'"
        )
    pairs = _pairs(rest, text, origin)
    return {option: _read_known_option(name, known, option, value, text, origin) for option, value in pairs.items()}


def _read_option(name: str, option: str, value: str, text: str, origin: str) -> float | str:
    if name in _factories:
        _check_factory_option(name, option, origin)
        try:
            return read_number(value)
        except ValueError:
            return value
    known = FUNC_D_OPTIONS[name]
    if not known:
        raise SettingsError(f"option {option!r} in {text!r} (from {origin}): {name!r} takes no options")
    return _read_known_option(name, known, option, value, text, origin)


def _read_known_option(
    name: str, known: Mapping[str, Option], option: str, value: str, text: str, origin: str
) -> float | str:
    if option not in known:
        raise unknown_value(f"option of {name}", option, origin, known)
    return known[option].read_from(value, option, f" in {text!r} (from {origin})")


def _check_factory_option(name: str, option: str, origin: str) -> None:
    try:
        parameters = inspect.signature(_factories[name]).parameters.values()
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    allowed = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if option not in allowed:
        raise unknown_value(f"option of {name}", option, origin, allowed)


UHOP_OPTIONS = {
    "iters": Option(minimum=1, maximum=LARGEST_COUNT, whole=True),
    "t": Option(minimum=0, maximum=LARGEST_EXPONENT, exclusive=True),
    "lr": Option(minimum=0, maximum=LARGEST_SQUARED, exclusive=True),
    "loss": Option(("average", "maximum"), minimum=None),
    "samples": Option(minimum=2, maximum=LARGEST_COUNT, whole=True),
    "every": Option(minimum=1, maximum=LARGEST_COUNT, whole=True),
    "until": Option(minimum=1, maximum=LARGEST_COUNT, whole=True),
    "train": Option(("true", "false"), minimum=None),
}


@dataclass(frozen=True)
class UHop:
    """U-Hop's Stage I in training: when it runs, and how (Wu et al., ICML 2024).

    Attributes:
        iters: The steps of gradient descent of one Stage I.
        t: How fast a pair of patterns counts for less with its distance.
        lr: The rate of the descent.
        loss: ``"average"`` or ``"maximum"``; see :func:`lwpf_patch.separation_loss`.
        samples: How many keys of a batch Stage I separates, for each layer and head.
        every: Stage I runs again every so many steps of the optimizer; 0: once, after the first.
        until: The last step after which it may run again.
        train: Whether the task's loss trains the feature map after Stage I.
    """

    iters: int = 100
    t: float = 2.0
    lr: float = 0.1
    loss: str = "average"
    samples: int = 256
    every: int = 0
    until: int = 0
    train: bool = True

    def __str__(self) -> str:
        again = f",every={self.every},until={self.until}" if self.every else ""
        return (
            f"iters={self.iters},t={self.t:g},lr={self.lr:g},loss={self.loss},samples={self.samples}{again},"
            f"train={str(self.train).lower()}"
        )

    def is_due(self, step: int) -> bool:
        """Returns whether Stage I runs after a step of the optimizer, the first of which is 1."""
        return step == 1 or (1 < step <= self.last and (step - 1) % self.every == 0)

    @property
    def last(self) -> int:
        """The step after which Stage I runs for the last time."""
        return 1 + (self.until - 1) // self.every * self.every if self.every and self.until else 1


def parse_uhop(value: Any, origin: str = "uhop") -> UHop | None:
    """Reads what the user gave as ``uhop``.

    Args:
        value: Text such as ``"iters=100,t=2,lr=0.1"``, ``"on"`` (or True) for the defaults, ``"off"`` (or False, None)
            for no U-Hop, or a :class:`UHop`.
        origin: Where it came from, for the error messages.

    Returns:
        What was asked for; None: no U-Hop.

    Raises:
        SettingsError: An unknown option, or a value that the option does not take.
    """
    if value is None or isinstance(value, UHop):
        return value
    if isinstance(value, bool):
        return UHop() if value else None
    if not isinstance(value, str):
        raise SettingsError(f"uhop {shown(value)} (from {origin}) is not text: write 'iters=100,t=2,lr=0.1', or 'on'")
    text = value.strip()
    if "=" not in text:
        try:
            return UHop() if text and read_flag(text) else None
        except ValueError:
            raise SettingsError(
                f"uhop {text!r} (from {origin}): write 'on', 'off', or options as in 'iters=100,t=2,lr=0.1'"
            ) from None
    pairs = _pairs(text, text, origin)
    options: dict[str, Any] = {
        option: _read_known_option("uhop", UHOP_OPTIONS, option, given, text, origin) for option, given in pairs.items()
    }
    if "train" in options:
        options["train"] = read_flag(options["train"])
    if "until" in options and "every" not in options:
        raise SettingsError(f"until={options['until']} in {text!r} (from {origin}) needs every=, how often until then")
    if "every" in options:
        options.setdefault("until", 10 * options["every"])  # the official bilevel code: each of the first ten epochs
    return UHop(**options)


@dataclass(frozen=True)
class Settings:
    """How the sites of a host are patched.

    Attributes:
        func_d: The forgetting function: its text form, or an object. None: ReLU, or ``"none"`` with U-Hop.
        uhop: U-Hop's Stage I, in its text form; None: no U-Hop.
        masking: ``"exclude"`` keeps keys hidden by a mask out of everything; ``"paper"`` is the official recipe.
        backend: Which implementation of the operator computes.
        include: Glob patterns over the names of the sites; a site that matches none of them is left alone.
        exclude: Glob patterns over the names of the sites to be left alone.
        compat: Whether to mend what a current environment breaks in a host; as text ``"1"`` or ``"0"``.
        exclude_models: Glob patterns over the names of models whose attention stays plain.
    """

    func_d: Any = None
    masking: str = "exclude"
    backend: str = "auto"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    compat: bool = True
    uhop: Any = None
    exclude_models: tuple[str, ...] = ()
    origin: Callable[[str], str] = field(default="apply({}=...)".format, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uhop", parse_uhop(self.uhop, self.origin("uhop")))
        if self.func_d is None:
            object.__setattr__(self, "func_d", "relu" if self.uhop is None else "none")
        if isinstance(self.func_d, str):
            parse_func_d(self.func_d, self.origin("func_d"))
        elif isinstance(self.func_d, type):
            raise SettingsError(
                f"func_d {self.func_d.__name__} (from {self.origin('func_d')}) is a class; pass an instance: "
                f"{self.func_d.__name__}()"
            )
        elif not callable(self.func_d):
            raise SettingsError(
                f"func_d {shown(self.func_d)} (from {self.origin('func_d')}) is neither text nor callable: pass text "
                "such as 'relu', or an object that maps scores to (D(s), D'(s))"
            )
        check_name("masking", self.masking, self.origin("masking"), MASKINGS)
        check_name("backend", self.backend, self.origin("backend"), BACKENDS)
        try:
            object.__setattr__(self, "compat", read_flag(self.compat))
        except ValueError:
            raise unknown_value("compat", self.compat, self.origin("compat"), FLAGS) from None
        for name in ("include", "exclude", "exclude_models"):
            object.__setattr__(self, name, self._patterns(name, getattr(self, name)))

    def _patterns(self, name: str, value: Any) -> tuple[str, ...]:
        if value is None:
            return ("*",) if name == "include" else ()
        patterns = texts(value)
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise SettingsError(
                    f"{name} {shown(pattern)} (from {self.origin(name)}) is not text: pass glob patterns"
                )
        return patterns

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        return self  # frozen, and what every copy of a patched module refers to

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "origin": "the settings of a pickled model ({})".format}

    def describe(self) -> dict[str, Any]:
        """Returns the settings as plain data."""
        return {
            "func_d": self.func_d if isinstance(self.func_d, str) else repr(self.func_d),
            "masking": self.masking,
            "backend": self.backend,
            "uhop": None if self.uhop is None else str(self.uhop),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "exclude_models": list(self.exclude_models),
            "compat": self.compat,
        }


def describe_backend(requested: str) -> str:
    """Return, in words, what a request for a backend comes to."""
    if requested != "auto":
        return requested
    return "auto (triton on CUDA of capability 8.0 and later; cpu for many scores on the CPU; eager otherwise)"


def split_list(text: str) -> tuple[str, ...]:
    """Splits text at its commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def texts(value: Any) -> tuple[Any, ...]:
    """Return what was given as a list of text: its parts, or the value itself where it is no list."""
    if isinstance(value, str):
        return split_list(value)
    try:
        return (value,) if isinstance(value, bytes) else tuple(value)
    except TypeError:
        return (value,)


def check_name(what: str, value: object, origin: str, known: Iterable[str]) -> None:
    """Check a name.

    Raises:
        SettingsError: It is none of those that are known.
    """
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise unknown_value(what, value, origin, known)


def check_hosts(names: Iterable[str], origin: str, known: Iterable[str]) -> tuple[str, ...]:
    """Checks names of hosts.

    Raises:
        SettingsError: There is no such host, or no name at all.
    """
    names, known = tuple(names), tuple(known)
    for name in names:
        check_name("host", name, origin, known)
    if not names:
        raise SettingsError(f"{origin} names no host: allowed are {', '.join(sorted(known))}")
    return names


def read_unpickle(value: str, origin: str = UNPICKLE_VARIABLE) -> str:
    """Read what shall become of a pickled model that needs a patch: ``"error"`` (default), or ``"patch"``.

    Raises:
        SettingsError: It is neither.
    """
    text = value.strip() or "error"
    if text not in UNPICKLE:
        raise unknown_value("way to unpickle", text, origin, UNPICKLE)
    return text


def from_environment(
    known_hosts: Iterable[str], environ: Mapping[str, str] = os.environ
) -> tuple[tuple[str, ...], Settings]:
    """Reads a request from the environment.

    Args:
        known_hosts: The hosts that exist.
        environ: The environment.

    Returns:
        The hosts to patch and the settings.

    Raises:
        SettingsError: A wrong value, a variable with our prefix that does not exist, or settings without a host:
            whoever sets ``LWPF_FUNC_D`` or mistypes ``LWPF_PATCH`` wants something patched.
    """
    known_variables = (PATCH_VARIABLE, *VARIABLES.values(), UNPICKLE_VARIABLE, *OTHER_VARIABLES)
    given = {name: value for name, value in environ.items() if name.startswith("LWPF_") and value.strip()}
    for name in given:
        if name not in known_variables:
            raise unknown_value("variable", name, "the environment", known_variables)
    read_unpickle(given.get(UNPICKLE_VARIABLE, ""))  # also alone: which hosts, the models say
    values: dict[str, Any] = {setting: given[name] for setting, name in VARIABLES.items() if name in given}
    if PATCH_VARIABLE not in given:
        if not values:
            return (), Settings()
        names = ", ".join(VARIABLES[setting] for setting in values)
        raise SettingsError(
            f"{names} is set but {PATCH_VARIABLE} is not, so nothing would be patched: set {PATCH_VARIABLE} to one of "
            f"{', '.join(sorted(known_hosts))}, or unset {names}"
        )
    hosts = check_hosts(split_list(given[PATCH_VARIABLE]), PATCH_VARIABLE, known_hosts)
    return hosts, Settings(**values, origin=VARIABLES.__getitem__)
