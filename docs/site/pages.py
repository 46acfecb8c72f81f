"""Hooks of mkdocs: pages from outside of docs/, and links that hold in the repository and on the site alike."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
#: The pages that the site has beside those in docs/, by their file in the repository.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results/README.md": "benchmark_results.md",
    **{
        f"recipes/{path.parent.name}/README.md": f"recipes/{path.parent.name}.md"
        for path in ROOT.glob("recipes/*/README.md")
    },
}

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Have links between files of the repository lead to their pages; of what has no page the text stays."""
    here = page.file.src_uri
    source = next((each for each, uri in PAGES.items() if uri == here), f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        uri = next((PAGES[each] for each in (path, f"{path}/README.md") if each in PAGES), path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is not None:
            return f"[{text}]({os.path.relpath(uri, os.path.dirname(here) or '.')}{anchor})"
        return text if (ROOT / path).exists() else match[0]

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)
