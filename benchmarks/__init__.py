"""Benchmarks of fastfisher against every other way to the same numbers; start at ``run.py``."""
