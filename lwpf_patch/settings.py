"""What the user asks for. Each setting is declared once, as a field of :class:`Settings`.

The variable ``LWPF_...``, the option of ``lwpf run``, what ``status()`` and ``lwpf status`` show and the table in
docs/settings.md follow from the declaration. The signatures of ``apply`` and ``patch_model`` are spelled out for those
who read them, and tests compare them with it. Nothing here imports torch, so that a start-up hook can check a request
before anything heavy is loaded.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeAlias, TypedDict, cast

from .attached import Attached
from .blocks import Blocks, parse_blocks
from .errors import SettingsError, shown, unknown_value
from .options import FLAGS, check_name, read_flag, texts
from .specs import (
    FUNC_D_OPTIONS,
    SEPS,
    FuncDSpec,
    Observe,
    Sep,
    UHop,
    parse_observe,
    parse_sep,
    parse_uhop,
    read_func_d,
    require_entmax,
)

MASKINGS = ("exclude", "paper")
BACKENDS = ("auto", "cpu", "eager", "plain", "triton")
#: When the kernels of a GPU are checked against the eager form.
VERIFICATIONS = ("first", "always", "off")
#: What holds where neither the user nor the func_d says anything else.
DEFAULTS: dict[str, Any] = {"sep": Sep(), "masking": "exclude", "backend": "auto", "verify": "first"}
#: What becomes of a model whose attention cannot be patched whole.
PARTIALS = ("warn", "allow", "error")
#: What becomes of a model that was pickled with its host patched, where that is not patched.
UNPICKLINGS = ("error", "patch")
#: Whether the CPU computes with what a compiler makes at its first use, where there is one; a variable alone.
NATIVE = "LWPF_NATIVE"
#: Variables with our prefix that are no setting: what the test suite reads, and NATIVE.
OTHER_VARIABLES = ("LWPF_REQUIRE_HOSTS", NATIVE)

#: What users may give as hosts, and as patterns: one, several, or text with commas.
HostNames: TypeAlias = str | Iterable[str]
Patterns: TypeAlias = str | Iterable[str]


# --- declarations ---------------------------------------------------------------------------------------------------


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"LWPF_{name.upper()}"


def flag_of(name: str) -> str:
    """Return the option of ``lwpf run`` of a setting."""
    return f"--{name.replace('_', '-')}"


class Setting(NamedTuple):
    """The declaration of a setting.

    Attributes:
        name: Its name, which is that of the parameter of ``apply``.
        read: Reads a value, text or object. Called with the value, and with where it came from for error messages.
        metavar: What stands for a value in the help text of ``lwpf run``.
        help: What it does and its default, in words.
        default: The default of the parameter, in Python.
        in_patch_model: Whether ``patch_model`` takes it.
    """

    name: str
    read: Callable[[Any, str], Any]
    metavar: str
    help: str
    default: Any = None
    in_patch_model: bool = True

    @property
    def variable(self) -> str:
        """The environment variable."""
        return variable_of(self.name)

    @property
    def flag(self) -> str:
        """The option of ``lwpf run``."""
        return flag_of(self.name)


def _declaration(read: Callable[[Any, str], Any], metavar: str, help: str, **more: Any) -> dict[str, Setting]:
    """Declare a setting, as the metadata of a field of :class:`Settings`; the field's name is the setting's."""
    return {"setting": Setting("", read, metavar, help, **more)}


def _func_d(value: object, origin: str) -> FuncDSpec | Callable[..., Any] | None:
    return None if value is None else read_func_d(value, origin)


def _sep(value: object, origin: str) -> Sep | None:
    if value is None:
        return None
    sep = parse_sep(value, origin)
    require_entmax(sep, origin)
    return sep


def _word(name: str, allowed: tuple[str, ...], value: object, origin: str) -> str | None:
    return None if value is None else check_name(name, value, origin, allowed)


def _flag(name: str, value: object, origin: str) -> bool:
    try:
        return read_flag(value)
    except ValueError:
        raise unknown_value(name, value, origin, FLAGS) from None


def _patterns(name: str, default: tuple[str, ...], value: object, origin: str) -> tuple[str, ...]:
    patterns = default if value is None else texts(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SettingsError(f"{name} {shown(pattern)} (from {origin}) is not text: pass glob patterns")
    return patterns


def read_unpickle(value: str, origin: str) -> str:
    """Read what shall become of a pickled model that needs a patch: ``"error"`` (default), or ``"patch"``.

    Raises:
        SettingsError: It is none of these.
    """
    return check_name("way to unpickle", value.strip() or "error", origin, UNPICKLINGS)


#: The hosts to patch. What hosts there are, :func:`check_hosts` is told.
PATCH = Setting(
    "patch",
    lambda value, origin: texts(value),
    "HOSTS",
    "hosts to patch, separated by commas; lwpf run without it patches timm",
    in_patch_model=False,
)
#: What becomes of pickled models; a variable and an option of lwpf run alone.
UNPICKLE = Setting(
    "unpickle",
    read_unpickle,
    "|".join(UNPICKLINGS),
    "what becomes of a pickled model whose host was patched and is not patched here: an error, or the host is patched "
    "as the model says (default: error)",
    in_patch_model=False,
)
#: What is observed of the layers; a variable and an option of lwpf run alone, since it is no matter of a host.
OBSERVE = Setting(
    "observe",
    parse_observe,
    "on|off|OPTIONS",
    "write down what each layer forgets while the script trains, with options as in every=50,path=forgetting.jsonl "
    "(default: off)",
    in_patch_model=False,
)


class SettingsStatus(TypedDict):
    """Settings as plain data: what ``status()`` and ``lwpf status --json`` tell."""

    func_d: str
    sep: str
    masking: str
    backend: str
    verify: str
    uhop: str | None
    include: list[str]
    exclude: list[str]
    blocks: str | None
    exclude_models: list[str]
    partial: str
    compat: bool


@dataclass(frozen=True, init=False)
class Settings:
    """How the sites of a host are patched.

    Args:
        origin: Says where a setting came from, for error messages, by its name.
        **given: Settings, as text or as objects; the others have their defaults.

    Attributes:
        func_d: The forgetting function: what its text says, or an object.
        sep: The normalisation of the scores.
        masking: ``"exclude"`` keeps keys hidden by a mask out of everything; ``"paper"`` is the official recipe.
        backend: Which implementation of the operator computes.
        verify: When the kernels of a GPU are checked against the eager form.
        uhop: U-Hop's Stage I; None: no U-Hop.
        include: Glob patterns over the names of the sites; a site that matches none of them is left alone.
        exclude: Glob patterns over the names of the sites to be left alone.
        blocks: The attention modules of a model that forget, by their number; None: all.
        exclude_models: Glob patterns over the names of models whose attention stays plain.
        partial: What becomes of a model that holds attention which is not patched, when it is made.
        compat: Whether to mend what a current environment breaks in a host.

    Raises:
        SettingsError: A value that is not allowed.
    """

    func_d: FuncDSpec | Callable[..., Any] = field(
        metadata=_declaration(
            _func_d,
            "FUNC_D",
            f"forgetting function: {', '.join(FUNC_D_OPTIONS)}, with options as in pfu:mu=dmedian,bias=mu,sigma=0.01 "
            "(default: relu, or none with U-Hop or a sep)",
        )
    )
    sep: Sep = field(
        metadata=_declaration(
            _sep,
            "SEP",
            f"normalisation of the scores: {', '.join(SEPS)}, or alpha from 1 (softmax) to 2 (sparsemax); "
            "softmax_n:n=1 adds n to the denominator of the softmax (default: softmax)",
        )
    )
    masking: str = field(
        metadata=_declaration(
            functools.partial(_word, "masking", MASKINGS),
            "|".join(MASKINGS),
            "whether keys hidden by a mask are kept out of everything, or are as in the official code "
            f"(default: {DEFAULTS['masking']})",
        )
    )
    backend: str = field(
        metadata=_declaration(
            functools.partial(_word, "backend", BACKENDS),
            "BACKEND",
            f"which implementation computes: {', '.join(BACKENDS)} (default: {DEFAULTS['backend']})",
        )
    )
    verify: str = field(
        metadata=_declaration(
            functools.partial(_word, "verify", VERIFICATIONS),
            "|".join(VERIFICATIONS),
            "when the kernels of a GPU are checked against the eager form: at the first call of each case, at every "
            f"call, or never (default: {DEFAULTS['verify']})",
        )
    )
    uhop: UHop | None = field(
        metadata=_declaration(
            parse_uhop,
            "on|off|OPTIONS",
            "U-Hop's feature map in each attention module, and Stage I after the first step of the optimizer, with "
            "options as in iters=100,t=2,lr=0.1 (default: off)",
        )
    )
    include: tuple[str, ...] = field(
        metadata=_declaration(
            functools.partial(_patterns, "include", ("*",)),
            "GLOBS",
            "patch only sites that match one of these glob patterns (default: all)",
        )
    )
    exclude: tuple[str, ...] = field(
        metadata=_declaration(
            functools.partial(_patterns, "exclude", ()),
            "GLOBS",
            "leave alone sites that match one of these glob patterns (default: none)",
        )
    )
    blocks: Blocks | None = field(
        metadata=_declaration(
            parse_blocks,
            "BLOCKS",
            "the attention modules of each model that forget, counted from 0, as in 6- (from the seventh on), -5 (the "
            "first six), 0,3,8-11 or last 4; the others stay plain (default: all)",
        )
    )
    exclude_models: tuple[str, ...] = field(
        metadata=_declaration(
            functools.partial(_patterns, "exclude_models", ()),
            "GLOBS",
            "leave alone models, such as a distillation teacher, whose class or timm name matches one of these glob "
            "patterns (default: none)",
            in_patch_model=False,
        )
    )
    partial: str = field(
        metadata=_declaration(
            functools.partial(_word, "partial", PARTIALS),
            "|".join(PARTIALS),
            "what becomes of a model of timm that holds attention which is not patched, when it is made: a warning, "
            "nothing, or an error (default: warn)",
            default="warn",
            in_patch_model=False,
        )
    )
    compat: bool = field(
        metadata=_declaration(
            functools.partial(_flag, "compat"),
            "on|off",
            "whether to mend what a current environment breaks in a host (default: on)",
            default=True,
            in_patch_model=False,
        )
    )
    origin: Callable[[str], str] = field(compare=False, repr=False)

    def __init__(self, *, origin: Callable[[str], str] = "apply({}=...)".format, **given: Any) -> None:
        object.__setattr__(self, "origin", origin)
        for setting in SETTINGS:
            value = setting.read(given.pop(setting.name, setting.default), origin(setting.name))
            object.__setattr__(self, setting.name, value)
        if given:
            raise TypeError(f"there is no setting {', '.join(given)}")
        self._settle()

    def _settle(self) -> None:
        """Put in what was left open, which other settings decide."""
        func_d: Any = self.func_d
        own: dict[str, Any] = {}
        if isinstance(func_d, Attached) and hasattr(func_d, "rule"):  # that of an attention layer
            own = {name: getattr(func_d, name) for name in DEFAULTS}
            object.__setattr__(self, "func_d", func_d.rule)
        if func_d is None:  # U-Hop's paper and those of other normalisations forget nothing
            alone = self.uhop is None and self.sep in (None, DEFAULTS["sep"])
            object.__setattr__(self, "func_d", FuncDSpec("relu" if alone else "none"))
        for name, default in DEFAULTS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, own.get(name, default))

    def with_func_d(self, func_d: object, origin: str) -> Settings:
        """Return the same settings with another func_d.

        Raises:
            SettingsError: It is none.
        """
        changed = copy.copy(self)
        object.__setattr__(changed, "func_d", read_func_d(func_d, origin))
        object.__setattr__(changed, "origin", lambda name: origin if name == "func_d" else self.origin(name))
        return changed

    def without_uhop(self) -> Settings:
        """Return the same settings without U-Hop."""
        changed = copy.copy(self)
        object.__setattr__(changed, "uhop", None)
        return changed

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        return self  # frozen, and what every copy of a patched module refers to

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "origin": "the settings of a pickled model ({})".format}

    def describe(self) -> SettingsStatus:
        """Return the settings as plain data."""
        return cast(SettingsStatus, {setting.name: _plain(getattr(self, setting.name)) for setting in SETTINGS})


def in_words(settings: Mapping[str, Any], *unsaid: str) -> str:
    """Put settings into words: those that are always of interest, and those that are no defaults.

    Args:
        settings: What :meth:`Settings.describe` returned.
        *unsaid: Names of settings to leave out.
    """
    usual, given = ({**each} for each in (Settings().describe(), settings))
    always = ("func_d", "masking", "backend")
    shown = {name: given[name] for name in usual if name in always or given[name] != usual[name]}
    texts = {name: ",".join(value) if isinstance(value, list) else value for name, value in shown.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items() if name not in unsaid)


#: All settings, in the order in which they are shown.
SETTINGS: tuple[Setting, ...] = tuple(
    each.metadata["setting"]._replace(name=each.name) for each in fields(Settings) if "setting" in each.metadata
)
#: All that has a variable and an option of ``lwpf run``.
VARIABLES: tuple[Setting, ...] = (PATCH, *SETTINGS, UNPICKLE, OBSERVE)


def _plain(value: object) -> Any:
    if isinstance(value, FuncDSpec | Sep | UHop | Blocks):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return value if value is None or isinstance(value, str | bool) else repr(value)


# --- reading --------------------------------------------------------------------------------------------------------


def check_hosts(names: HostNames, origin: str, known: Iterable[str]) -> tuple[str, ...]:
    """Return names of hosts that were given: one, several, or text with commas.

    Raises:
        SettingsError: There is no such host, or no name at all.
    """
    known = tuple(known)
    try:
        checked = tuple(check_name("host", name, origin, known) for name in texts(names))
    except SettingsError as error:
        raise SettingsError(f"{error}. How to declare a host of your own: docs/own_host.md") from None
    if not checked:
        raise SettingsError(f"{origin} names no host: allowed are {', '.join(sorted(known))}")
    return tuple(dict.fromkeys(checked))


def from_environment(
    known_hosts: Iterable[str], environ: Mapping[str, str] = os.environ
) -> tuple[tuple[str, ...], Settings]:
    """Read a request from the environment.

    Args:
        known_hosts: The hosts that exist.
        environ: The environment.

    Returns:
        The hosts to patch and the settings.

    Raises:
        SettingsError: A wrong value, a variable with our prefix that does not exist, or settings without a host:
            whoever sets ``LWPF_FUNC_D`` or mistypes ``LWPF_PATCH`` wants something patched.
    """
    known_variables = (*(setting.variable for setting in VARIABLES), *OTHER_VARIABLES)
    given = {name: value for name, value in environ.items() if name.startswith("LWPF_") and value.strip()}
    for name in given:
        if name not in known_variables:
            raise unknown_value("variable", name, "the environment", known_variables)
    # It may stand alone: which hosts, the models say.
    UNPICKLE.read(given.get(UNPICKLE.variable, ""), UNPICKLE.variable)
    asked_to_observe(environ)  # so may this: the script may patch by itself
    values = {setting.name: given[setting.variable] for setting in SETTINGS if setting.variable in given}
    if PATCH.variable not in given:
        if not values:
            return (), Settings()
        names = ", ".join(map(variable_of, values))
        raise SettingsError(
            f"{names} is set but {PATCH.variable} is not, so nothing would be patched: set {PATCH.variable} to one of "
            f"{', '.join(sorted(known_hosts))}, or unset {names}"
        )
    hosts = check_hosts(given[PATCH.variable], PATCH.variable, known_hosts)
    return hosts, Settings(**values, origin=variable_of)


def asked_to_observe(environ: Mapping[str, str] = os.environ) -> Observe | None:
    """Read from the environment whether the layers are to be observed, and how; None: they are not.

    Raises:
        SettingsError: As for :func:`lwpf_patch.specs.parse_observe`.
    """
    asked: Observe | None = OBSERVE.read(environ.get(OBSERVE.variable, ""), OBSERVE.variable)
    return asked


def describe_backend(requested: str) -> str:
    """Return, in words, what a request for a backend comes to."""
    if requested != "auto":
        return requested
    return "auto (triton on CUDA of capability 8.0 and later; cpu for many scores on the CPU; eager otherwise)"
