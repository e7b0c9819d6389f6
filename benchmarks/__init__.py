"""Measurements: `python -m benchmarks --help` lists them. Every figure is a count, or a ratio to a named peer."""
