"""The kernels of GPUs, compiled by Triton on the user's machine when they first run.

`elements.py` reads and writes gradients, weights and states where they are, `codes.py` decodes and encodes those of few
bits, `techniques.py` has the rules. `measuring.py`, `moments.py`, `low_rank.py` and `writing.py` are the kernels of a
step, in its order, and `passes.py` launches them.
"""
