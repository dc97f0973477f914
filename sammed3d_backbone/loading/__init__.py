"""Weights into networks: sizes, the weights table, files and the Hub, and how they fit."""
