"""Write the tables of docs/coverage.md: make all of timm's models, and try one of each kind of attention.

    python tests/record_coverage.py                              # all tables; some 15 minutes on two cores
    python tests/record_coverage.py --kept build/coverage.jsonl  # goes on where it was cut

What was found with other versions is not to be kept.
"""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path
from typing import Any

import coverage_hosts
import coverage_timm
import timm
import torch
from coverage_page import HOST_COLUMNS, PAGE, TIMM_COLUMNS, check, classes_of_timm, replaced, row_of, short, table


def of_timm(kept: coverage_timm.Kept) -> dict[str, str]:
    """Returns the parts of the page about timm."""
    of_families: dict[str, list[dict[str, Any]]] = {}
    for family in timm.list_modules():
        of_families[family] = coverage_timm.look_at_all(timm.list_models(module=family), kept)
    of_classes = [why for found in of_families.values() for each in found for why in each["folding"].values()]
    reasons = sorted({reason for why in of_classes for reason in why if reason})
    rows, without = [], []
    for family, found in of_families.items():
        if all(each["state"] == "nothing to patch" for each in found):
            without.append(f"`{family}`")
            continue
        chosen = coverage_timm.smallest(found)
        tried = coverage_timm.try_out_all(chosen, kept)
        check(found, tried, chosen)
        rows.append(row_of(family, found, tried, list(chosen), reasons))
    used = {cls for found in of_families.values() for each in found for cls in each["patched"]}
    there = {*classes_of_timm()}
    plain = {cls: why for found in of_families.values() for each in found for cls, why in each["plain"].items()}
    return {
        "timm": table(TIMM_COLUMNS, rows),
        "why not folded": "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)),
        "why plain": table(("class", "why"), [[short(cls), why] for cls, why in sorted(plain.items())]),
        "without attention": ", ".join(without),
        "without a model": ", ".join(f"`{cls.removeprefix('timm.')}`" for cls in sorted(there - used)),
    }


def of_hosts(kept: coverage_timm.Kept) -> dict[str, str]:
    """Returns the parts of the page about the other hosts."""
    parts = {}
    for host, cases in coverage_hosts.CASES.items():
        found = {
            row: kept(f"{host}: {row}", lambda host=host, row=row: coverage_hosts.try_out(host, row)) for row in cases
        }
        parts[host] = table(HOST_COLUMNS, [[row, *cells.values()] for row, cells in found.items()])
    return parts


def versions() -> str:
    """Returns the versions that the tables are those of, in words."""
    names = ("timm", "torch", "torchvision", "transformers", "open_clip_torch")
    return "; ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, help="a file with what was found before, to which what is new is added")
    kept = coverage_timm.Kept(parser.parse_args().kept)
    torch.set_num_threads(1)
    text = PAGE.read_text()
    for part, new in {"versions": f"{versions()}.", **of_hosts(kept), **of_timm(kept)}.items():
        text = replaced(text, part, new)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
