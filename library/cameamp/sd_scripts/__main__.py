"""Train in sd-scripts with the Automagic_CameAMP optimizers.

python -m automagic_cameamp.sd_scripts --sd_scripts DIR [--train_script sdxl_train_network.py] <options of that script>
accelerate launch -m automagic_cameamp.sd_scripts --sd_scripts DIR ...
    DIR may be left out if it is SD_SCRIPTS_DIR, the current folder, ./sd-scripts or ../sd-scripts.
    --print_optimizer_config prints the optimizer's resolved options as TOML, and exits.
    --new_learning_rate_on_resume goes on at the learning rate of the command, not at the resumed state's.
"""

from __future__ import annotations

import sys

from ..command_line import run
from .main import main

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], __doc__))
