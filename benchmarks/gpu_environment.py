"""What a GPU benchmark runs on, as JSON: ``python -m benchmarks.gpu_environment DEVICE FILE``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import reporting

#: What nvidia-smi is asked for; it refuses all if it does not know one of them.
_QUERIED = (
    "name", "driver_version", "compute_cap", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem",
    "clocks.max.mem", "power.limit", "temperature.gpu",
)  # fmt: skip


def main() -> None:
    """Describe the device that the command line names."""
    import torch

    device, path = sys.argv[1:]
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks: gpu: torch finds no CUDA device here")
    found: dict[str, Any] = {"machine": reporting.machine(device), "versions": reporting.versions()}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found["gpu"] = {
            "name": torch.cuda.get_device_name(),
            "capability": f"{major}.{minor}",
            "count": torch.cuda.device_count(),
            "multiprocessors": torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count,
            "memory_bytes": found["machine"]["device_bytes"],
        }
        values = _nvidia_smi(f"--query-gpu={','.join(_QUERIED)}", "--format=csv,noheader", "--id=0")
        if values.count(",") == len(_QUERIED) - 1:
            found["nvidia_smi"] = dict(zip(_QUERIED, (text.strip() for text in values.split(",")), strict=True))
        found["nvidia_smi_text"] = _nvidia_smi()
    reporting.replace_text(Path(path), json.dumps(found, indent=2) + "\n")


def _nvidia_smi(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


if __name__ == "__main__":
    main()
