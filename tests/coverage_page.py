"""The tables of docs/coverage.md: how what was found is written, and read again."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lwpf_patch.hosting import Site
from lwpf_patch.hosts import HOSTS

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
COLUMNS = ("func_d", "uhop", "fold", "compile", "backend")
TIMM_COLUMNS = ("family", "names", "attention classes", *COLUMNS, "tried with")
HOST_COLUMNS = ("attention", *COLUMNS)
STATES = {"whole": "whole", "partly": "in part", "refused": "refused", "nothing to patch": "without", "unknown": "?"}
#: What the branches of a class mean for the backends.
BACKENDS = {
    (True, False): "`triton`, `cpu`",
    (False, True): "`eager`",
    "fused": "`triton`, `cpu`; unfused `eager`",
    "unfused": "`eager`; fused `triton`, `cpu`",
    "either": "`triton`, `cpu` or `eager`, by model",
}

# --- reading and writing --------------------------------------------------------------------------------------------


def between(text: str, part: str) -> str:
    """Returns what stands between the markers of a part of the page."""
    return text.partition(f"<!-- {part} -->\n")[2].partition(f"<!-- end of {part} -->")[0].strip()


def replaced(text: str, part: str, new: str) -> str:
    """Returns the page with something else between the markers of a part."""
    start, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->"
    assert start in text, f"{PAGE} has no {start.strip()}"
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{new.strip()}\n\n{end}{rest.partition(end)[2]}"


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """Reads a table: the cells of each row by column, by the first one."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: dict(zip(lines[0], row, strict=True)) for row in lines[2:]} if lines else {}


# --- the cells of timm's families -----------------------------------------------------------------------------------


def short(cls: str) -> str:
    return f"`{cls.rpartition('.')[2]}`"


def listed(classes: Iterable[str]) -> str:
    """Returns the names of classes as a cell has them."""
    return ", ".join(f"`{name}`" for name in sorted({cls.rpartition(".")[2] for cls in classes}))


def classes_of_timm() -> dict[str, Site]:
    """Returns the sites of the classes that the installed timm has, by the name of the class."""
    found = {}
    for site in HOSTS["timm"].sites:
        if site.owner and HOSTS["timm"].find(site.module) is not None:
            cls = getattr(importlib.import_module(site.module), site.owner, None)
            if cls is not None and cls.__module__ == site.module:
                found.setdefault(site.name, site)
    return found


def cell_of_func_d(found: list[dict[str, Any]]) -> str:
    numbers = Counter(each["state"] for each in found)
    return ", ".join(f"{numbers[state]} {words}" for state, words in STATES.items() if numbers[state])


def cell_of_classes(found: list[dict[str, Any]]) -> str:
    patched = listed(cls for each in found for cls in each["patched"])
    plain = listed(cls for each in found for cls in each["plain"])
    return "; ".join(filter(None, (patched, f"not {plain}" if plain else "")))


def cell_of_uhop(found: list[dict[str, Any]]) -> str:
    patched = {cls for each in found for cls in each["patched"]}
    without = {cls for each in found for cls in each["without_map"]}
    if not patched:
        return "—"
    if not without:
        return "all"
    return f"some: not {listed(without)}" if patched - without else "no"


def cell_of_fold(found: list[dict[str, Any]], reasons: list[str]) -> str:
    """Says how many models can be folded; reasons why not are numbered in the order of a list."""
    mapped = [each for each in found if each["folding"]]
    if not mapped:
        return "—"
    why = {reason for each in mapped for of_class in each["folding"].values() for reason in of_class if reason}
    can = sum(not any(any(of_class) for of_class in each["folding"].values()) for each in mapped)
    notes = " ".join(f"({reasons.index(reason) + 1})" for reason in sorted(why, key=reasons.index))
    if can == len(mapped):
        return "all"
    return f"{can} of {len(mapped)} {notes}" if can else f"no {notes}"


def cell_of_compile(tried: dict[str, dict[str, Any]]) -> str:
    if not tried:
        return "—"
    problems = {cls: each["compiles"] for cls, each in tried.items() if each["compiles"] != ""}
    if not problems:
        return "works"
    if all(problem is None for problem in problems.values()):
        return "—" if len(problems) == len(tried) else f"works; — {listed(problems)}"
    return f"no: {listed(cls for cls, problem in problems.items() if problem)}"


def branches_of(cls: str) -> tuple[bool, bool]:
    """Returns whether a class calls PyTorch's attention, and whether a softmax, by the names in its code."""
    module, _, name = cls.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    names: set[str] = set()
    for site in HOSTS["timm"].sites:
        if site.owner and any(f"{each.__module__}.{each.__qualname__}" == site.name for each in made.__mro__):
            function = getattr(made, site.qualname.rpartition(".")[2], None)
            names |= set(function.__code__.co_names) if function is not None else set()  # versions differ in methods
    return "scaled_dot_product_attention" in names, "softmax" in names


def cell_of_backend(found: list[dict[str, Any]]) -> str:
    of_classes = {cls: _backend_of(cls, found) for each in found for cls in each["patched"]}
    kinds = sorted(set(of_classes.values()))
    if len(kinds) <= 1:
        return "".join(kinds) or "—"
    return "<br>".join(f"{listed(cls for cls, each in of_classes.items() if each == kind)}: {kind}" for kind in kinds)


def _backend_of(cls: str, found: list[dict[str, Any]]) -> str:
    branches = branches_of(cls)
    if branches != (True, True):
        return BACKENDS[branches]
    taken = {branch for each in found for branch in each["fused"].get(cls, ())}
    return BACKENDS["either" if len(taken) != 1 else "fused" if taken == {True} else "unfused"]


def row_of(
    family: str, found: list[dict[str, Any]], tried: dict[str, dict[str, Any]], names: list[str], reasons: list[str]
) -> list[str]:
    """Returns the cells of a family."""
    return [
        f"`{family}`",
        str(len(found)),
        cell_of_classes(found),
        cell_of_func_d(found),
        cell_of_uhop(found),
        cell_of_fold(found, reasons),
        cell_of_compile(tried),
        cell_of_backend(found),
        ", ".join(f"`{name}`" for name in names) or "—",
    ]


def check(found: list[dict[str, Any]], tried: dict[str, dict[str, Any]], chosen: dict[str, list[str]]) -> None:
    """Checks that what modules do when they are called is what the cells say of their models."""
    of_names = {each["name"]: each for each in found}
    for name, classes in chosen.items():
        for cls in classes:
            branches = of_names[name]["fused"].get(cls, [branches_of(cls)[0]])
            calls = tried[cls]["calls"]
            assert calls, cls
            assert set(calls) <= {"scaled_dot_product_attention" if each else "softmax" for each in branches}
            assert not tried[cls]["cpu"], f"{cls}: {tried[cls]['cpu']}"
            if "folding" in tried[cls]:
                assert tried[cls]["folding"] in of_names[name]["folding"][cls], cls
