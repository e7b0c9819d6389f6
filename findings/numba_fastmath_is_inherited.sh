#!/bin/bash
# numba 0.68.1, numpy 2.4.6.
#
# A function compiled by plain njit rounds as it is written only if nobody with fastmath=True calls it first: what a
# function does not say of fastmath, it inherits from the one in whose compilation it is compiled, for that and for
# every later call with these types, direct ones too. So the same two functions give different sums, by the order of
# two calls. fastmath=False, which is the documented default, is something else if it is said: it is kept. With
# inline="always" it is dropped: the body takes the caller's fastmath whatever it says of its own.
#
# Output seen (the error of a compensated sum of a million float32 numbers: by a caller with fastmath=True, and then
# directly):
#
#   nothing said, caller first        7.501  7.501
#   nothing said, directly first      0.001  0.001
#   fastmath=False, caller first      0.001  0.001
#   fastmath=False, inline="always"   7.501  0.001
#
# Fails if any of this changes. Only the sizes of the errors are compared: which sum is 7.5 off depends on the CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q numba==0.68.1 numpy==2.4.6
cat > sums.py <<'PYTHON'
import numpy
from numba import njit


def compensated(x):
    total, lost = numpy.float32(0), numpy.float32(0)
    for i in range(len(x)):
        term = x[i] - lost
        new = total + term
        lost = (new - total) - term
        total = new
    return total


x = numpy.ones(1_000_000, dtype=numpy.float32)
x[::2] = 0.1
truth = x.astype(numpy.float64).sum()


def errors(directly_first=False, **options):
    callee = njit(**options)(compensated)

    @njit(fastmath=True)
    def caller(x):
        return callee(x)

    if directly_first:
        callee(x)
    return [abs(float(function(x)) - truth) for function in (caller, callee)]


found = {
    "nothing said, caller first": errors(),
    "nothing said, directly first": errors(directly_first=True),
    "fastmath=False, caller first": errors(fastmath=False),
    'fastmath=False, inline="always"': errors(fastmath=False, inline="always"),
}
for case, (by_caller, directly) in found.items():
    print(f"{case:<32}{by_caller:7.3f}{directly:7.3f}")
is_exact = [[error < 0.1 for error in pair] for pair in found.values()]
assert is_exact == [[False, False], [True, True], [True, True], [False, True]], is_exact
PYTHON
env/bin/python sums.py
