"""Measurements. Every figure is a ratio to a named peer, or a count, of one run."""
