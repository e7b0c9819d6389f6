"""One step: passes.py goes over a group twice, with what measure.py finds and what rules.py does."""
