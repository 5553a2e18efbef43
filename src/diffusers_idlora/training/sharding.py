"""A model whose weights are spread over processes (PyTorch's FSDP2, by accelerate): its set-up and its checkpoints."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import DistributedType
from diffusers import LTX2VideoTransformer3DModel
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from .arguments import TrainingArguments


OPTIMIZER_NAME = "optimizer.bin"


def check_sharding(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """
    Raises a ValueError for a way of sharding, or an option with it, that can't work or was never tried. What is not
    sharded passes.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed is not supported; choose FSDP or data parallel training with `accelerate config`.")
    if not is_fsdp(accelerator):
        return
    if not accelerator.is_fsdp2:
        raise ValueError("`fsdp_version` is 1, which is not supported; set 2 with `accelerate config`.")
    if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        # accelerate 1.15 looks for a parameter of the model itself in a submodule, and fails.
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading` is on, with which accelerate can't place this model's weights; switch it"
            " off with `accelerate config`."
        )
    for name, plain in (
        # Processes whose batches have unlike numbers of shapes would wait for each other for ever.
        ("mix_lengths", (False,)),
        ("mixed_precision", ("no", "bf16")),
        ("quantize_base", ("none",)),
        ("offload_frozen_blocks", (False,)),
        ("compile", (False,)),
        ("optimizer", ("adamw",)),
    ):
        if getattr(arguments, name) not in plain:
            raise ValueError(
                f"`{name}` {getattr(arguments, name)} does not go together with sharding (FSDP); give"
                f" {' or '.join(map(str, plain))}, or run `accelerate config` for data parallel training."
            )


def is_fsdp(accelerator: Accelerator) -> bool:
    """Whether weights are spread over processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def shard_block_by_block(accelerator: Accelerator, transformer: LTX2VideoTransformer3DModel) -> None:
    """Settles how accelerate is going to shard a transformer."""
    plugin = accelerator.state.fsdp_plugin
    if not plugin.transformer_cls_names_to_wrap:
        # diffusers does not name the blocks where accelerate looks, and a whole model gathered at once saves nothing.
        plugin.transformer_cls_names_to_wrap = list(transformer._repeated_blocks)
    # accelerate's own would round the positions and noise levels that go into the model; autocast does what is needed.
    plugin.mixed_precision_policy = None


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts of all processes, all of which must call this; one that is not sharded as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_sharded_state(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: object, folder: Path
) -> None:
    """Writes optimizer, schedule and random states as one process would; called by every process."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=whole)
    if accelerator.is_main_process:
        torch.save(state, folder / OPTIMIZER_NAME)
    save_accelerator_state(str(folder), [], [], [schedule], [], accelerator.process_index, step=0)


def load_sharded_state(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: object, folder: Path
) -> None:
    """Reads what [`save_sharded_state`] wrote; called by every process."""
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = torch.load(folder / OPTIMIZER_NAME, weights_only=True) if accelerator.is_main_process else {}
    set_optimizer_state_dict(model, optimizer, state, options=whole)
    load_accelerator_state(str(folder), [], [], [schedule], [], accelerator.process_index)
