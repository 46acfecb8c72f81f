"""README and docs/: the code of each page runs, links lead somewhere, quoted messages stand in the source.

docs/own_host.md is run by tests/test_own_hosts.py. A block after a line `<!-- not run: reason -->` is left out.
"""

from __future__ import annotations

import ast
import functools
import re

import pytest
from conftest import ROOT

import lwpf_patch
from lwpf_patch import hosting, specs

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

_MODEL = """
import timm, torch, lwpf_patch
from torch.distributed import checkpoint as dcp
model = timm.create_model("test_vit", num_classes=3)
optimizer = torch.optim.AdamW(model.parameters())
images = torch.randn(2, 3, 160, 160)
"""
#: What stands before the code of a page, for names that its text explains.
BEFORE = {
    "observing.md": f"""{_MODEL}
lwpf_patch.patch_model(model, func_d="relu")
def train(model):
    for _ in range(2):
        model(images).sum().backward()
        optimizer.step()
""",
    "inspecting.md": _MODEL.replace("test_vit", "vit_tiny_patch16_224").replace("160, 160", "224, 224"),
    "distributed.md": f"""{_MODEL}
from torch.distributed.checkpoint.state_dict import get_state_dict
path = "checkpoint"
saved = get_state_dict(model, optimizer)
dcp.save(dict(zip(("model", "optimizer"), saved)), checkpoint_id=path)
""",
}


def _blocks(page):
    """The blocks of a page that are run, each on its own lines, so that a traceback shows where it stands."""
    text = page.read_text()
    return ["\n" * text[: found.start(2)].count("\n") + found[2] for found in BLOCK.finditer(text) if not found[1]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.name) for page in PAGES if _blocks(page) and page.name != "own_host.md"]
)
def test_the_code_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    exec(BEFORE.get(page.name, ""), names)
    try:
        for block in _blocks(page):
            exec(compile(block, page, "exec"), names)
    finally:
        specs._factories.pop("above", None)


def test_few_blocks_are_left_out():
    left_out = [page.name for page in PAGES for found in BLOCK.finditer(page.read_text()) if found[1]]
    assert left_out == ["index.md"]


# --- links ------------------------------------------------------------------------------------------------------------


def _anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.parent.name != "reference":  # mkdocs checks those
            assert anchor in _anchors(path), f"{page.name}: {target}#{anchor}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# --- what pages say of the source -------------------------------------------------------------------------------------


@functools.cache
def _strings():
    """All strings of the package, with a zero byte for what is put into them."""
    found = []
    for path in (ROOT / "lwpf_patch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def _messages():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)
    return [message for cell in cells for message in re.findall(r"`([^`]{12,})`", cell) if " " in message]


def test_the_page_of_messages_has_some():
    assert len(_messages()) > 50


def _has(text, parts):
    """Tells whether a text has some parts, one after the other."""
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


@pytest.mark.parametrize("message", _messages())
def test_quoted_messages_stand_in_the_source(message):
    parts = re.split(r"\.\.\.+", message)
    assert any(_has(text, parts) for text in _strings()), f"no such message: {message}"


@pytest.mark.parametrize("module", [lwpf_patch, hosting], ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module):
    page = ROOT / "docs" / "reference" / f"{module.__name__.rpartition('.')[2]}.md"
    listed = re.findall(rf"^::: {module.__name__}\.(\w+)$", page.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(set(module.__all__) - {"__version__"})


def test_pre_commit_runs_what_make_lint_runs():
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.partition("\nlint: ")[2].partition("\n\n")[0]
    hooks = re.findall(r"^ +entry: \.venv/bin/(.+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert hooks == re.findall(r"\$\(BIN\)/(.+)", recipe)
