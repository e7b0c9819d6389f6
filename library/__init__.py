"""Shares its name with sd-scripts' own package, so that documented import paths stay `library.automagic_cameamp`.

Where both are on the module search path, the submodules of both can be imported: `library.automagic_cameamp` from here,
`library.train_util` from there, also in worker processes, which inherit nothing but the search path.
"""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
