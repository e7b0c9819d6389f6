#!/bin/bash
# numba 0.68.1, numpy 2.4.6.
#
# njit(cache=True) keeps machine code beside the module and compares a stamp of the module's own file before it uses it.
# Compiled functions of other modules are compiled into the same code, and their files are in no stamp: after a change to
# such a module a new process goes on with its old code, without a word, until the caller's file is touched. A package of
# several kernel files that is updated in place, by git or an editor, so runs kernels of two versions at once.
#
# The order in which a process compiles matters, too: if it has called the changed function by itself before, that one
# is new, and the caller still holds the old one. Output seen (a caller that adds 1 by a callee; then the callee adds 2):
#
#   first: 11 | callee changed: 11 (callee by itself: 12) | caller touched: 12
#
# Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q numba==0.68.1 numpy==2.4.6
mkdir cache
export NUMBA_CACHE_DIR="$folder/cache" PYTHONDONTWRITEBYTECODE=1
callee() { printf 'from numba import njit\n\n@njit(cache=True)\ndef add(x):\n    return x + %d\n' "$1" > callee.py; }
cat > caller.py <<'PYTHON'
from numba import njit

from callee import add


@njit(cache=True)
def twice_removed(x):
    return add(x)
PYTHON
run() { env/bin/python -c "from $1 import $2; print($2(10))"; }
callee 1
first=$(run caller twice_removed)
sleep 1
callee 2
stale=$(run caller twice_removed)
alone=$(run callee add)
sleep 1
echo >> caller.py
fresh=$(run caller twice_removed)
line="first: $first | callee changed: $stale (callee by itself: $alone) | caller touched: $fresh"
echo "$line"
test "$line" = "first: 11 | callee changed: 11 (callee by itself: 12) | caller touched: 12"
