"""From what users write to a value: a func_d with its options, U-Hop's Stage I, a normalisation.

Text is read once, here. Nothing here imports torch, so that a start-up hook can check a request before anything heavy
is loaded; :mod:`lwpf_patch.forgetting` makes the module that a :class:`FuncDSpec` stands for.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from .errors import SettingsError, shown, unknown_value
from .options import (
    LARGEST_COUNT,
    LARGEST_EXPONENT,
    LARGEST_SQUARED,
    Option,
    read_flag,
    read_number,
    read_options,
    read_pairs,
    write_value,
)

# --- func_d ---------------------------------------------------------------------------------------------------------

#: What becomes of rows that would forget every key.
EMPTY_ROWS = Option(
    ("zero", "keep"),
    minimum=None,
    default="zero",
    help="a row that would forget every key gives 0; with keep it forgets none",
    former="empty",
    former_words={"plain": "keep"},
)
#: The built-in forgetting functions, each with its options.
FUNC_D_OPTIONS: dict[str, dict[str, Option]] = {
    "relu": {"empty_rows": EMPTY_ROWS},
    "pfu": {
        "mu": Option(
            ("dmedian", "-inf"),
            default="dmedian",
            help="the threshold: a number, or the median of all scores of a call",
        ),
        # Not -inf: a row that forgets everything would have no weight to divide by.
        "bias": Option(("mu",), default="mu", help="what a forgotten score becomes: a number, or the threshold itself"),
        "sigma": Option(
            minimum=0,
            maximum=LARGEST_SQUARED,
            default="0.01",
            help="in training the threshold has normal noise of standard deviation sigma**2",
        ),
        "empty_rows": EMPTY_ROWS,
    },
    "none": {},
}
_factories: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class FuncDSpec:
    """What the text of a func_d says.

    Attributes:
        name: The name of the forgetting function.
        options: The options that were given: numbers, and words.
    """

    name: str
    options: Mapping[str, float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ",".join(f"{option}={write_value(value)}" for option, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name


#: What users may give as func_d.
FuncDLike: TypeAlias = str | FuncDSpec | Callable[..., Any]


def register_func_d(name: str, factory: Callable[..., Any]) -> None:
    """Make a forgetting function of your own known by name, for use as text: ``"name:option=value,..."``.

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


def func_d_factory(name: str, origin: str) -> Callable[..., Any] | None:
    """Return the factory registered under a name, None for a built-in one.

    Raises:
        SettingsError: There is no func_d of this name.
    """
    if name not in FUNC_D_OPTIONS and name not in _factories:
        raise unknown_value("func_d", name, origin, [*FUNC_D_OPTIONS, *_factories])
    return _factories.get(name)


def parse_func_d(text: str, origin: str = "func_d") -> FuncDSpec:
    """Read the text form of a func_d, such as ``"relu"`` or ``"pfu:mu=dmedian,bias=mu,sigma=0.01"``.

    Args:
        text: The text.
        origin: Where it came from, for the error messages.

    Returns:
        What it says.

    Raises:
        SettingsError: An unknown name or option, or a value that the option does not take.
    """
    name, colon, rest = text.strip().partition(":")
    name = name.strip()
    factory = func_d_factory(name, origin)
    if colon and not rest.strip():
        raise SettingsError(
            f"{text!r} (from {origin}): no option follows the colon; write {name!r} or 'name:option=value'"
        )
    if factory is not None:
        pairs = read_pairs(rest, text, origin)
        for option in pairs:
            _check_factory_option(name, factory, option, origin)
        return FuncDSpec(name, {option: _number_or_text(value) for option, value in pairs.items()})
    known = FUNC_D_OPTIONS[name]
    if not known and (pairs := read_pairs(rest, text, origin)):
        raise SettingsError(f"option {next(iter(pairs))!r} in {text!r} (from {origin}): {name!r} takes no options")
    return FuncDSpec(name, read_options(name, known, rest, text, origin))


def read_func_d(value: object, origin: str = "func_d") -> FuncDSpec | Callable[..., Any]:
    """Read what the user gave as func_d: text, or an object, which is returned as it is.

    Raises:
        SettingsError: It is neither text nor callable, or as for :func:`parse_func_d`.
    """
    if isinstance(value, str):
        return parse_func_d(value, origin)
    if isinstance(value, FuncDSpec):
        return value
    if isinstance(value, type):
        raise SettingsError(f"func_d {value.__name__} (from {origin}) is a class; pass an instance: {value.__name__}()")
    if not callable(value):
        raise SettingsError(
            f"func_d {shown(value)} (from {origin}) is neither text nor callable: pass text such as 'relu', or an "
            "object that maps scores to (D(s), D'(s))"
        )
    return value


def read_empty_rows(empty_rows: object, former: object, function: str) -> str:
    """Read the argument ``empty_rows`` of a forgetting function, which may come by its former name.

    Args:
        empty_rows: The argument.
        former: The argument ``empty``; None: it was not given.
        function: Whose arguments they are, for the error messages.

    Raises:
        SettingsError: A wrong value, or two values that differ.
    """
    name = "empty_rows" if former is None else "empty"
    given = empty_rows if former is None else former
    value = EMPTY_ROWS.read_from(given, name, f" (from {function}({name}=...))")
    if former is not None and empty_rows not in ("zero", value):
        raise SettingsError(
            f"empty={shown(former)} and empty_rows={shown(empty_rows)} (from {function}(...)) differ: empty is the "
            "former name of empty_rows; leave it out"
        )
    return str(value)


def _number_or_text(value: str) -> float | str:
    try:
        return read_number(value)
    except ValueError:
        return value


def _check_factory_option(name: str, factory: Callable[..., Any], option: str, origin: str) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    allowed = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if option not in allowed:
        raise unknown_value(f"option of {name}", option, origin, allowed)


# --- U-Hop ----------------------------------------------------------------------------------------------------------

#: The options of Stage I.
UHOP_OPTIONS = {
    "iters": Option(
        minimum=1, maximum=LARGEST_COUNT, whole=True, default="100", help="steps of gradient descent of Stage I"
    ),
    "t": Option(
        minimum=0,
        maximum=LARGEST_EXPONENT,
        exclusive=True,
        default="2",
        help="of the separation loss: how fast a pair of patterns counts for less with its distance",
    ),
    "lr": Option(
        minimum=0, maximum=LARGEST_SQUARED, exclusive=True, default="0.1", help="the rate of the gradient descent"
    ),
    "loss": Option(
        ("average", "maximum"), minimum=None, default="average", help="average or maximum: which separation loss"
    ),
    "samples": Option(
        minimum=2,
        maximum=LARGEST_COUNT,
        whole=True,
        default="256",
        help="keys of a batch that are separated, for each layer and head",
    ),
    "every": Option(
        minimum=1,
        maximum=LARGEST_COUNT,
        whole=True,
        help="run again every so many steps of the optimizer; by default once, after the first",
    ),
    "until": Option(
        minimum=1,
        maximum=LARGEST_COUNT,
        whole=True,
        default="10 * every",
        help="but after no step beyond this one",
    ),
    "train": Option(flag=True, default="true", help="whether the task's loss trains the feature map afterwards"),
}


@dataclass(frozen=True)
class UHop:
    """U-Hop's Stage I in training: when it runs, and how (Wu et al., ICML 2024).

    ``UHop(every=500)`` and the text ``"every=500"`` mean the same.

    Attributes:
        iters: The steps of gradient descent of one Stage I.
        t: How fast a pair of patterns counts for less with its distance.
        lr: The rate of the descent.
        loss: ``"average"`` or ``"maximum"``; see :func:`lwpf_patch.separation_loss`.
        samples: How many keys of a batch Stage I separates, for each layer and head.
        every: Stage I runs again every so many steps of the optimizer; None: once, after the first.
        until: The last step after which it may run again; default: 10 times ``every``.
        train: Whether the task's loss trains the feature map after Stage I.

    Raises:
        SettingsError: A value that the option of the same name does not take as text.
    """

    iters: int = 100
    t: float = 2.0
    lr: float = 0.1
    loss: str = "average"
    samples: int = 256
    every: int | None = None
    until: int | None = None
    train: bool = True

    def __post_init__(self) -> None:
        for name, option in UHOP_OPTIONS.items():
            value = getattr(self, name)
            if value is not None or name not in ("every", "until"):
                object.__setattr__(self, name, option.read_from(value, name, f" (from UHop({name}=...))"))
        if self.until is not None and self.every is None:
            raise _until_alone(self.until, " (from UHop(until=...))")
        if self.until is None and self.every is not None:
            # The official bilevel code: each of the first ten epochs.
            object.__setattr__(self, "until", min(10 * self.every, LARGEST_COUNT))

    def __str__(self) -> str:
        values = {name: getattr(self, name) for name in UHOP_OPTIONS}
        return ",".join(f"{name}={write_value(value)}" for name, value in values.items() if value or name == "train")

    def is_due(self, step: int) -> bool:
        """Return whether Stage I runs after a step of the optimizer, the first of which is 1."""
        return step == 1 or (1 < step <= self.last and (step - 1) % (self.every or 1) == 0)

    @property
    def last(self) -> int:
        """The step after which Stage I runs for the last time."""
        return 1 + (self.until - 1) // self.every * self.every if self.every and self.until else 1


#: What users may give as uhop.
UHopLike: TypeAlias = str | bool | UHop


def parse_uhop(value: object, origin: str = "uhop") -> UHop | None:
    """Read what the user gave as ``uhop``.

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
        raise SettingsError(
            f"uhop {shown(value)} (from {origin}) is not text: write 'iters=100,t=2,lr=0.1', or 'on', or pass a "
            "lwpf_patch.UHop"
        )
    text = value.strip()
    if "=" not in text:
        try:
            return UHop() if text and read_flag(text) else None
        except ValueError:
            raise SettingsError(
                f"uhop {text!r} (from {origin}): write 'on', 'off', or options as in 'iters=100,t=2,lr=0.1'"
            ) from None
    options = read_options("uhop", UHOP_OPTIONS, text, text, origin)
    if "until" in options and "every" not in options:
        raise _until_alone(options["until"], f" in {text!r} (from {origin})")
    return UHop(**options)


def _until_alone(until: int, place: str) -> SettingsError:
    return SettingsError(f"until={until}{place} needs every=, how often until then")


# --- normalisations -------------------------------------------------------------------------------------------------


class Sep(NamedTuple):
    """A normalisation of the scores: alpha-entmax, or a softmax with a number added to its denominator.

    Attributes:
        alpha: Of alpha-entmax: from 1, the softmax, to 2, the sparsemax.
        n: What is added to the denominator of the softmax, not negative; 0 where alpha is above 1.
    """

    alpha: float = 1.0
    n: float = 0.0

    def __str__(self) -> str:
        if self.n > 0.0:
            return f"softmax_n:n={write_value(self.n)}"
        named = {sep: name for name, sep in SEPS.items()}
        return named.get(self, write_value(self.alpha))


#: The normalisations that have a name.
SEPS = {"softmax": Sep(), "entmax15": Sep(1.5), "sparsemax": Sep(2.0), "softmax_n": Sep(n=1.0)}
#: The options of each that has any.
SEP_OPTIONS = {
    "softmax_n": {"n": Option(minimum=0, default="1", help="what is added to the denominator of the softmax")}
}

#: What users may give as sep.
SepLike: TypeAlias = str | float | Sep


def parse_sep(sep: object, origin: str = "sep") -> Sep:
    """Read what the user gave as ``sep``, the normalisation of the scores.

    Args:
        sep: ``"softmax"``, ``"entmax15"``, ``"sparsemax"``, alpha itself, from 1 (softmax) to 2 (sparsemax), or
            ``"softmax_n:n=1"``, where n is 1 if it is left out; or a :class:`Sep`.
        origin: Where it came from, for the error messages.

    Returns:
        The normalisation.

    Raises:
        SettingsError: It is none of these.
    """
    if isinstance(sep, Sep):
        return sep
    name, colon, rest = sep.partition(":") if isinstance(sep, str) else ("", "", "")
    name = name.strip()
    if name in SEPS and colon:
        usual = SEPS[name]
        return Sep(usual.alpha, _sep_options(name, rest, str(sep), origin).get("n", usual.n))
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


def require_entmax(sep: Sep, origin: str) -> None:
    """Check that the package that computes a normalisation is installed, without importing it.

    Raises:
        SettingsError: It is not.
    """
    if sep.alpha != 1.0 and importlib.util.find_spec("entmax") is None:
        raise SettingsError(
            f"sep {sep} (from {origin}): sparsemax and entmax need the package entmax, which is not installed: "
            "pip install 'lwpf_patch[entmax]'"
        )


def _sep_options(name: str, rest: str, text: str, origin: str) -> dict[str, Any]:
    """Read the options behind the colon of a normalisation's text form."""
    known = SEP_OPTIONS.get(name)
    if known is None:
        raise SettingsError(f"sep {text!r} (from {origin}): {name!r} takes no options")
    if not rest.strip():
        raise SettingsError(
            f"sep {text!r} (from {origin}): no option follows the colon; write {name!r}, or '{name}:n=1'"
        )
    options = {}
    for option, value in read_pairs(rest, text, origin).items():
        if option not in known:
            raise unknown_value(f"option of {name}", option, origin, known)
        options[option] = known[option].read_from(value, option, f" in {text!r} (from {origin})")
    return options


# --- observing ------------------------------------------------------------------------------------------------------

#: The options of observing what the layers forget.
OBSERVE_OPTIONS = {
    "every": Option(
        minimum=1,
        maximum=LARGEST_COUNT,
        whole=True,
        default="50",
        help="one step in so many is looked at, and one evaluation",
    ),
    "path": Option(
        text=True,
        default="forgetting.jsonl",
        help="the file that the figures are added to, one line per layer and step",
    ),
    "tensorboard": Option(
        flag=True,
        default="true",
        help="whether TensorBoard gets them too, if it is installed: in forgetting.tensorboard, beside the file",
    ),
}


@dataclass(frozen=True)
class Observe:
    """What the layers forget is to be observed; see :func:`lwpf_patch.observe`.

    Attributes:
        every: One step in so many is looked at.
        path: The file that the figures are added to; None: none.
        tensorboard: Whether TensorBoard gets them too.
    """

    every: int = 50
    path: str | None = "forgetting.jsonl"
    tensorboard: bool = True

    def __str__(self) -> str:
        values = {name: getattr(self, name) for name in OBSERVE_OPTIONS}
        return ",".join(f"{name}={write_value(value)}" for name, value in values.items() if value is not None)


def parse_observe(text: str, origin: str = "observe") -> Observe | None:
    """Read what the user gave as ``LWPF_OBSERVE``.

    Args:
        text: ``"every=50,path=forgetting.jsonl"``, ``"on"`` for the defaults, ``"off"`` or nothing.
        origin: Where it came from, for the error messages.

    Returns:
        What was asked for; None: nothing.

    Raises:
        SettingsError: An unknown option, a value that the option does not take, or a folder that is not there.
    """
    text = text.strip()
    if "=" not in text:
        try:
            return Observe() if text and read_flag(text) else None
        except ValueError:
            raise SettingsError(
                f"observe {text!r} (from {origin}): write 'on', 'off', or options as in "
                "'every=50,path=forgetting.jsonl'"
            ) from None
    asked = Observe(**read_options("observe", OBSERVE_OPTIONS, text, text, origin))
    check_path(asked.path, f" in {text!r} (from {origin})")
    return asked


def check_path(path: str | None, place: str) -> None:
    """Check that a file can be there.

    Args:
        path: Its name; None: there is none.
        place: Where it came from, for the error message.

    Raises:
        SettingsError: Its folder is not there, or it is a folder itself.
    """
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise SettingsError(f"path={shown(path)}{place} is a folder: give the name of a file in it")
    if not os.path.isdir(folder):
        raise SettingsError(f"path={shown(path)}{place}: there is no folder {folder}; make it, or choose another path")
