"""Record the sources of a host that the tests pass with, as hashes in ``lwpf_patch/hosts/known.json``.

    python tests/record_sources.py timm                  # the installed version
    python tests/record_sources.py timm 1.0.24 1.0.26    # versions from the package index, each in a temporary folder
    python tests/record_sources.py transformers          # what it relies on: nothing of it is rewritten

Run the tests with a version before it is recorded: a recorded hash tells users that the edits are right there.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from transformers_eager import eager_attentions

from lwpf_patch.hosts import HOSTS, known, transformers_known
from lwpf_patch.settings import Settings


def record(host: str, version: str, folder: Path | None) -> None:
    """Record the hashes of all sites of one version of a host.

    Args:
        host: The host's name.
        version: The version.
        folder: Where it lies; None: where it is installed.
    """
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        if host == transformers_known.HOST:
            record_transformers(version, HOSTS[host].root())
            return
        plans = HOSTS[host].plans(Settings(uhop="on"))
        versions = {package: _version(package) for package in {_package(plan.module) for plan in plans} - {host}}
    finally:
        if folder is not None:
            sys.path.remove(str(folder))
            sys.path_importer_cache.clear()
    for plan in plans:
        keys = {site.qualname: site.key for site in HOSTS[host].sites if site.module == plan.module}
        for qualname, digest in plan.hashes.items():
            package = _package(plan.module)
            of_package = versions.get(package, version).partition("+")[0]
            known.add(package, keys[qualname], digest, of_package)
            print(f"{package} {of_package}: {plan.module}.{qualname} {digest}")


def record_transformers(version: str, root: Path) -> None:
    """Record the hashes of the functions of transformers that the host relies on; `root` is its folder."""
    digests = [(transformers_known.EAGER, digest) for digest in eager_attentions(root)]
    for module, names in transformers_known.MASKS.items():
        source = root.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            name = getattr(node, "name", "").removesuffix("_recent_torch")  # as of 4.57
            if name in names:
                digests.append((name, transformers_known.hash_of(ast.get_source_segment(source, node) or "")))
    for name, digest in digests:
        known.add(transformers_known.HOST, name, digest, version)
        print(f"{transformers_known.HOST} {version}: {name} {digest}")


def _package(module: str) -> str:
    return module.partition(".")[0]


def _version(package: str) -> str:
    return metadata.version(metadata.packages_distributions()[package][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", choices=list(HOSTS))
    parser.add_argument("versions", nargs="*", help="versions from the package index (default: what is installed)")
    options = parser.parse_args()
    if not options.versions:
        record(options.host, HOSTS[options.host].version() or "unknown", None)
    for version in options.versions:
        with tempfile.TemporaryDirectory() as folder:
            requirement = f"{HOSTS[options.host].distribution or options.host}=={version}"
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, requirement]
            subprocess.run(command, check=True)
            record(options.host, version, Path(folder))


if __name__ == "__main__":
    main()
