"""Prints the lowest versions that pyproject.toml allows, as constraints of pip: what `make test-lowest` installs."""

from __future__ import annotations

import re
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

#: Hosts whose versions are tested in folders of their own; their other tests go with the newest.
IN_FOLDERS = ("timm", "transformers")


def constraints(project: dict) -> list[str]:
    """Returns a pin to the lower bound of each dependency, those of the extras included."""
    extras = project["optional-dependencies"]
    found = []
    for requirement in (*project["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])):
        if requirement.startswith(project["name"]):  # another extra of the package
            continue
        parts = re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement)
        if parts is None:
            raise SystemExit(f"pyproject.toml: {requirement!r} has no lower bound of the form name>=version")
        if parts[1] not in IN_FOLDERS:
            found.append(f"{parts[1]}=={parts[2]}")
    return found


if __name__ == "__main__":
    path = Path(__file__).parent.parent / "pyproject.toml"
    print(*constraints(tomllib.loads(path.read_text(encoding="utf-8"))["project"]), sep="\n")
