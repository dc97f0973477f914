"""Checks that also run by hand, as in `python -m tests.checks.geometry_check`, and their tests."""
