"""The embedded trainer's command line."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .options import parse


def main(arguments: Sequence[str]) -> int:
    """Run the training that the arguments describe.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        UserError: a mistake in the options or files.
    """
    run = parse(arguments)
    # Imported here, so that a mistake in the options is reported before this import, which takes seconds.
    from .trainer import Trainer

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    trainer = Trainer(run)
    losses = trainer.train()
    if losses is None:
        return 130
    before, after = losses
    state = ", the state to resume from" if run.options.save_state else ""
    print(f"written to {trainer.output}: the LoRA, two pictures{state}")
    print(f"held-out loss before {before:.5f}, after {after:.5f}")
    return 0
