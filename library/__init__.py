"""Shares its name with sd-scripts' own package, so that documented import paths stay `library.automagic_cameamp`."""
