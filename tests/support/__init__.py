"""Helpers of several tests: small data sets, stand-in networks, a local Hub."""
