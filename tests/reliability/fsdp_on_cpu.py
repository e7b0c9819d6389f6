"""accelerate has FSDP on GPUs only. This has it on CPUs too, for the tests, and is the trainer's command line then.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/reliability/fsdp_on_cpu.py --embedded OPTIONS
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def sharding(accelerator: Accelerator, state_dict_type: str = "SHARDED_STATE_DICT") -> Accelerator:
    """An accelerator of processes on CPUs, made to shard models with FSDP2 as one whole each."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type=state_dict_type, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
    )
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    type(accelerator).distributed_type = property(lambda _: DistributedType.FSDP)
    assert accelerator.is_fsdp2
    return accelerator


def main() -> int:
    """The trainer's command line, with sharded models."""
    from library.cameamp_demo import trainer
    from train_network_patch import main

    def accelerator_of(**options: Any) -> Accelerator:
        return sharding(Accelerator(**options))

    trainer.Accelerator = accelerator_of
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
