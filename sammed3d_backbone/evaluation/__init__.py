"""Metrics, scores, statistics, figures and reports."""
