"""The kernels of GPUs, compiled by Triton on the user's machine when they first run.

`elements.py` reads and writes gradients, weights and states where they are, `codes.py` decodes and encodes those of few
bits, `techniques.py` has the rules. `measuring.py`, `moments.py`, `low_rank.py` and `writing.py` are the kernels of a
step, in its order. On the host `passes.py` begins a group's step, as `begun.py` keeps it, and measures its gradients;
`course.py` and `packing.py` launch the kernels of the second pass, and `shards.py` has them wait for the sums over
whole tensors where several processes share them.
"""
