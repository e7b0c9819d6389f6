"""Long checks of what docs/reliability.md promises: the tests run a few cases, `python -m tests.reliability` all."""
