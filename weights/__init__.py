"""Weights files that install with the package; `README.md` is the index of all known weights."""
