"""Larger checks and their tests; `python -m tests.checks.equality_check` also runs by hand."""
