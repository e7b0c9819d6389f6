"""Train with the Automagic_CameAMP optimizers.

python train_network_patch.py --sd_scripts DIR [--train_script sdxl_train_network.py] <options of that script>
    trains in sd-scripts; DIR may be left out if it is SD_SCRIPTS_DIR, the current folder, ./sd-scripts or
    ../sd-scripts.
    --print_optimizer_config prints the optimizer's resolved options as TOML, and exits.
    --new_learning_rate_on_resume goes on at the learning rate of the command, not at the resumed state's.

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
    try:
        from library.cameamp.command_line import run
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("library"):
            raise
        print(f"error: {error}. Start this script where it is, in the folder of its project", file=sys.stderr)
        return 2
    return run(train, arguments, __doc__)


def train(arguments: Sequence[str]) -> int:
    """Train in the embedded trainer if the arguments or their file ask for it, else in sd-scripts."""
    from library.cameamp_demo.options import is_embedded

    if is_embedded(arguments):
        from library.cameamp_demo.main import main as train_embedded

        return train_embedded(arguments)
    from library.cameamp.sd_scripts.checkout import SdScriptsNotFoundError
    from library.cameamp.sd_scripts.main import main as train_in_sd_scripts

    try:
        return train_in_sd_scripts(arguments)
    except SdScriptsNotFoundError as error:
        raise SdScriptsNotFoundError(f"{error}, or train without it: --embedded") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
