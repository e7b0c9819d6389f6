"""Long checks of what docs/reliability.md promises. `python tests/reliability/full.py` runs all, the tests a few."""
