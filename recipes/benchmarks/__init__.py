"""Benchmarks: speed, memory and parity against the reference; README.md has the tables."""
