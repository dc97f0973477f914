"""Kills of every long command, at random moments and inside saves: `make kill-test`, and a sample.

After each, no file is half-written under its final name, and the same command ends with the values
of an undisturbed run.
"""
