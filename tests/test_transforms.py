"""What transforms of PyTorch's do to each backend, and the tables in docs/transforms.md that say so."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import transform_cases
from transform_cases import BACKENDS, PROGRAMS, SUBJECTS, TRANSFORMS

from lwpf_patch.backends.triton import why_no_triton

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "transforms.md"
#: Set, it has the tests write into the page what they find.
UPDATE = os.environ.get("TESTS_UPDATE_DOCS", "0") == "1"
#: What a cell may say with an older PyTorch than that of the page, whatever the page says.
WITH_OLDER = r"works|refused by PyTorch"

DERIVATIVES = ("| transform | " + " | ".join(SUBJECTS) + " |", list(TRANSFORMS), list(SUBJECTS))
MADE = ("| program | " + " | ".join(f"`{name}`" for name in BACKENDS) + " |", list(PROGRAMS), list(BACKENDS))


def table_of(text: str, head: str) -> list[list[str]]:
    """Reads the cells below the head of a table."""
    assert head in text, f"{PAGE} has no table with the head {head}: TESTS_UPDATE_DOCS=1 writes it"
    rows = text.split(head)[1].split("\n\n")[0].strip().splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def check(table: tuple[str, list[str], list[str]], column: str, found: dict[str, str]) -> None:
    """Compares a column of a table with what was found, or puts that there."""
    head, rows, columns = table
    text = PAGE.read_text()
    if UPDATE:
        before = {row[0]: row[1:] for row in table_of(text, head)} if head in text else {}
        cells = {row: before.get(row, ["—"] * len(columns)) for row in rows}
        for row, cell in found.items():
            cells[row][columns.index(column)] = cell
        lines = [head, "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {' | '.join([row, *cells[row]])} |" for row in rows]
        start = text.index(head) if head in text else len(text)
        end = text.find("\n\n", start)
        PAGE.write_text(text[:start] + "\n".join(lines) + (text[end:] if end > 0 else "\n"))
        return
    written = {row: cells[columns.index(column)] for row, *cells in table_of(text, head)}
    assert list(written) == rows
    if torch.__version__ < re.search(r"those of PyTorch ([\d.]+\d)", text)[1]:
        # A wrong figure has raised before. An older PyTorch may itself refuse more, or less; we refuse no more with it.
        for row, cell in found.items():
            ours = {part for part in cell.split("; ") if not re.match(WITH_OLDER, part)}
            assert ours <= set(written[row].split("; ")), row
        return
    assert {row: written[row] for row in found} == found


@pytest.mark.drawn(days=2, cases=1)
@pytest.mark.parametrize("column", [column for column in SUBJECTS if column != "`triton`"])
@pytest.mark.timeout(900)
def test_the_table_of_derivatives(column):
    if "sep" in column:
        pytest.importorskip("entmax")
    check(DERIVATIVES, column, transform_cases.derivatives(column))


@pytest.mark.drawn(days=2, cases=1)
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "triton"])
@pytest.mark.timeout(900)
def test_the_table_of_programs(backend):
    check(MADE, backend, transform_cases.made_programs(backend))


@pytest.mark.drawn(days=4)
@pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
@pytest.mark.timeout(900)
def test_the_tables_of_the_triton_backend(python):
    """In Triton's interpreter, and so in a process of its own."""
    result = python(str(HERE / "transform_cases.py"), check=False, cwd=HERE.parent, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr[-8000:]
    derivatives, programs = json.loads(result.stdout)
    check(DERIVATIVES, "`triton`", derivatives)
    check(MADE, "triton", programs)
