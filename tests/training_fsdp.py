"""The training script with FSDP2 on CPUs, where accelerate does not switch it on by itself."""

import importlib.util
import json
import os
import sys

import torch.distributed.fsdp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from training_run import SCRIPT


# As `accelerate launch` sets it for the answers that a user gives to `accelerate config`.
ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def use_fsdp(precision="no"):
    """Sets accelerate's state to what it is under `ENVIRONMENT` where there are GPUs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    state = Accelerator(mixed_precision=precision, cpu=True).state
    plugin = FullyShardedDataParallelPlugin()
    if precision != "no":
        plugin.set_mixed_precision(precision)
    state.fsdp_plugin = plugin
    PartialState().distributed_type = DistributedType.FSDP


def run(arguments):
    """Runs the script; fails if it did not shard block by block."""
    use_fsdp(arguments[arguments.index("--mixed_precision") + 1])
    sharded, fully_shard = [], torch.distributed.fsdp.fully_shard

    def noted_fully_shard(module, **options):
        sharded.append(module)
        return fully_shard(module, **options)

    torch.distributed.fsdp.fully_shard = noted_fully_shard
    spec = importlib.util.spec_from_file_location("train_idlora_ltx2", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    code = script.main(arguments)
    torch.distributed.fsdp.fully_shard = fully_shard
    assert all(any(block is module for module in sharded) for block in sharded[-1].transformer_blocks)
    return code


def main(runs):
    """Runs the script with one command line after the other: processes take far longer to start than to train."""
    os.environ.update(ENVIRONMENT)
    destroy_process_group = PartialState.destroy_process_group
    # The processes stay together from one run to the next.
    PartialState.destroy_process_group = lambda self, group=None: None
    codes = [run(arguments) for arguments in runs]
    destroy_process_group(PartialState())
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
