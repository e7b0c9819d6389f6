"""The plugin for sd-scripts: finds it, makes it importable, and serves its options, its training loop and its logs.

The optimizers work without this package, and nothing outside of it imports sd-scripts.
"""
