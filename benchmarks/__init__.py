"""Benchmarks: ``python -m benchmarks NAME``. Ratios within one run count, not seconds."""
