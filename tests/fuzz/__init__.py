"""Malformed inputs through every door that files come in by: `make fuzz` and a sample in the tests.

For each input: a result or an error of ours that names the file, in bounded time and memory,
nothing written or deleted outside, nothing left, and no code of the input run.
"""
