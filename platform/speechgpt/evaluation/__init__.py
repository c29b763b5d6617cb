"""Metrics, an independent recogniser, and reports."""
