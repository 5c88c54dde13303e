"""The benchmark suite: every kernel at every shape of Dia-1.6B, every stage of the model, all backends side by side.

    python -m bench.suite [--quick] [--device cuda] [--dtype bf16] [--out FOLDER] [--compare FILE [--fail-at 10]]

The rounds are pytest-benchmark's, the clock is the device's own (`bench.device`). What differs from its reference by
more than rounding is reported as wrong, and has no time.
"""
