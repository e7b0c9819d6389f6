"""The engine behind the Automagic_CameAMP optimizers. Users import from `library.automagic_cameamp`."""
