"""Runs an example of DeepRC as it is, beside its data: it looks for them in ../datasets, and writes to where it is."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the module; the arguments are the folder of the data, the module, and its own arguments."""
    datasets, module, *arguments = sys.argv[1:]
    Path("datasets").symlink_to(datasets, target_is_directory=True)
    Path("example").mkdir()
    os.chdir("example")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
