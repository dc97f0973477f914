"""Trained networks on whole volumes, and what travels with them."""
