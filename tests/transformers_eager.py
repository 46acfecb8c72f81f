"""The eager attention of all models of a version of transformers, read from its files without importing them."""

from __future__ import annotations

import re
from pathlib import Path

from lwpf_patch.hosts import transformers_known

_FUNCTION = re.compile(r"^def \w*eager_attention_forward\(.*?(?=^\S(?<!\)))", re.DOTALL | re.MULTILINE)


def eager_attentions(root: Path) -> dict[str, tuple[str, list[str]]]:
    """Returns the source of each, and the models that have it, by hash; `root` is the folder of transformers.

    Those that take something else than query, key and value are left out: such models are refused.
    """
    by_source: dict[str, list[str]] = {}
    for file in sorted(root.glob("models/**/modeling_*.py")):
        for source in _FUNCTION.findall(file.read_text(encoding="utf-8")):
            if re.search(r"module[^,]*,\s*query", source):
                by_source.setdefault(source, []).append(file.stem.removeprefix("modeling_"))
    found: dict[str, tuple[str, list[str]]] = {}
    for source, models in by_source.items():
        found.setdefault(transformers_known.hash_of(source), (source, []))[1].extend(models)
    return found
