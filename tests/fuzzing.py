"""How long the fuzz tests run: seconds, or with FUZZ_PROFILE=hour about an hour, all of them together on one core."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

#: How many times the examples of a run that takes seconds.
FACTORS = {"seconds": 1, "hour": 90}

PROFILE = os.environ.get("FUZZ_PROFILE", "seconds")
if PROFILE not in FACTORS:
    raise ValueError(f"FUZZ_PROFILE={PROFILE!r}: allowed are {', '.join(FACTORS)}")

#: The limit of pytest-timeout is for tests that take seconds.
timeout = pytest.mark.timeout(300 if PROFILE == "seconds" else 0)


def fuzz(examples: int, **options: object) -> settings:
    """Return the settings of a test with so many examples in a run that takes seconds."""
    return settings(
        max_examples=examples * FACTORS[PROFILE],
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
        **options,
    )
