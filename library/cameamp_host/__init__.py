"""Everything that knows sd-scripts: finding it, joining its package with ours, its options, its loop, its logs.

Nothing here is needed to use the optimizers; nothing outside this package imports sd-scripts.
"""
