"""Checkpoints: save.py writes what load.py reads."""
