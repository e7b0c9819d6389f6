"""The kernels of CPUs, compiled by numba on the user's machine when they first run."""
