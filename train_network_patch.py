"""Train with the Automagic_CameAMP optimizers.

python train_network_patch.py --embedded --config_file configs/embedded_lora.toml
    trains a small LoRA on this machine, with nothing else installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 2 for a mistake in the options or files, 130 after Ctrl-C.
    """
    from library.cameamp_demo.options import UserError, is_embedded

    try:
        if not is_embedded(arguments):
            raise UserError(
                "training inside sd-scripts is not available yet; use --embedded, or embedded = true in the file"
            )
        from library.cameamp_demo.main import main as train_embedded

        return train_embedded(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
