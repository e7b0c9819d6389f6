"""One step: the first pass over the gradients (measure.py), then the techniques in their order (rules.py)."""
