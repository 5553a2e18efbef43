"""Frozen weights in main memory that visit the accelerator only where they are used."""

import functools

import torch
import torch.nn.functional as F
from diffusers import LTX2VideoTransformer3DModel


class FrozenLinearsInMainMemory:
    """
    Keeps the weights of the frozen linear layers of a transformer's blocks in main memory for the length of a `with`
    block. Each forward of such a layer copies its weight to the device of its input.

    diffusers' group offloading takes a weight away right after the forward, when the backward pass still needs it.
    Here autograd holds the copy for as long as it needs it: with gradient checkpointing from a block's recomputation
    to the end of its backward pass, so that one block's weights are on the device at a time.

    Inside, `transformer.to(...)` leaves those layers where and as they are. On leaving, layers are as they were found,
    in main memory, which is pinned for a CUDA device.

    Args:
        transformer (`LTX2VideoTransformer3DModel`): With its adapter, in main memory.
        device (`torch.device`): Where it is going to compute.
    """

    def __init__(self, transformer: LTX2VideoTransformer3DModel, device: torch.device | str):
        self.layers = [
            module
            for module in transformer.transformer_blocks.modules()
            # A layer of the adapter is linear too, but trained.
            if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
        ]
        self.pinned = torch.device(device).type == "cuda"

    def __enter__(self) -> "FrozenLinearsInMainMemory":
        for layer in self.layers:
            if self.pinned:
                # The device can fetch pinned memory by itself, without the process waiting for it.
                for parameter in layer.parameters():
                    parameter.data = parameter.data.pin_memory()
            layer.forward = functools.partial(_linear_where_the_input_is, layer)
            # What `Module.to` calls for every module.
            layer._apply = lambda function, recurse=True, layer=layer: layer
        return self

    def __exit__(self, *exception) -> None:
        for layer in self.layers:
            del layer.forward, layer._apply


def _linear_where_the_input_is(layer: torch.nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    weight, bias = (
        None if value is None else value.to(hidden_states.device, non_blocking=True)
        for value in (layer.weight, layer.bias)
    )
    return F.linear(hidden_states, weight, bias)
