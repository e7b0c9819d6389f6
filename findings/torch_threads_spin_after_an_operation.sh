#!/bin/bash
# torch 2.13.0 (and its Linux wheels' own libgomp), Linux, two cores or more.
#
# An element-wise operation on a CPU is over when it returns, but not for the CPU: torch's other threads go on spinning,
# for up to 9 ms here, in case there is more to do. So whatever other threads begin right after it, those of a kernel
# for example, have that many cores less, though no line of Python runs. It begins with one element more than 32,768,
# where torch starts to share an operation; torch.set_num_threads(1) after the operation does not end it; and
# OMP_WAIT_POLICY=passive, which has to be set before the program starts, does away with it.
#
# Output seen (milliseconds of CPU time in which the only thread of Python sleeps, after adding 1 to so many numbers):
#
#   as it is                        32768:  0.05   32769:  8.98   32769, then one thread:  9.04
#   OMP_WAIT_POLICY=passive         32768:  0.06   32769:  0.05   32769, then one thread:  0.05
#
# Fails if 32,769 numbers no longer cost ten times what 32,768 cost, or if the variable does not help.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 numpy==2.4.6
cat > spin.py <<'PYTHON'
import statistics
import sys
import time

import torch


def milliseconds(size, then=2):
    x, found = torch.zeros(size), []
    for _ in range(9):
        torch.set_num_threads(2)
        x.add_(1.0)
        torch.set_num_threads(then)
        begin = time.process_time()
        time.sleep(0.1)
        found.append(1e3 * (time.process_time() - begin))
    return statistics.median(found)


small, large, told = milliseconds(32_768), milliseconds(32_769), milliseconds(32_769, then=1)
print(f"{sys.argv[1]:<30}  32768: {small:5.2f}   32769: {large:5.2f}   32769, then one thread: {told:5.2f}")
spins = [value > 10 * small for value in (large, told)]
assert spins == [sys.argv[1] == "as it is"] * 2, spins
PYTHON
unset OMP_WAIT_POLICY OMP_NUM_THREADS GOMP_SPINCOUNT
env/bin/python spin.py "as it is"
OMP_WAIT_POLICY=passive env/bin/python spin.py OMP_WAIT_POLICY=passive
