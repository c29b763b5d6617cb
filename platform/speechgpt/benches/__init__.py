"""Benchmarks that stand on more than one room; `speechgpt bench` has these and interop's."""
