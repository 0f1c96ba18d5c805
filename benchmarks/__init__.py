"""Runnable measurements: `python -m benchmarks.matrix`, `.scale`, `.decode`. None is part of the test run."""
