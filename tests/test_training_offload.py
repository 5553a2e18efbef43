"""Frozen weights that stay in main memory: the same training, and no more on the device than one block."""

import subprocess

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

from conftest import families
from diffusers_idlora import TextContext
from diffusers_idlora.attention_processor import ReferenceAttention
from diffusers_idlora.tiny import tiny_components
from diffusers_idlora.training.arguments import parse_arguments
from diffusers_idlora.training.objective import RECIPE_TARGET_MODULES, Objective, TrainingBatch, TrainingNoise
from diffusers_idlora.training.offload import FrozenLinearsInMainMemory
from diffusers_idlora.training.trainer import ADAPTER_STATE_NAME
from training_run import launch, loaded_trainer, losses_of, make_samples, options


@pytest.fixture(scope="module")
def data(tiny_checkpoint, tmp_path_factory):
    """Prepared folders by family."""
    return {
        family: make_samples(tmp_path_factory.mktemp("data"), tiny_checkpoint(family))
        for family in ("ltx-2", "ltx-2.3")
    }


class WeightsOnTheDevice(TorchDispatchMode):
    """Counts the copies of weights that are on the device "meta" at once, which computes nothing and takes any shape."""

    def __init__(self):
        super().__init__()
        self.copies, self.most = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].is_cpu and args[0].ndim == 2:
            self.copies = [copy for copy in self.copies if copy() is not None] + [TensorWeakRef(result)]
            self.most = max(self.most, len(self.copies))
        return result


def tiny_model(gradient_checkpointing=True):
    transformer = tiny_components("ltx-2.3")["transformer"].requires_grad_(False).train()
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=RECIPE_TARGET_MODULES))
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer


def train_once_on_meta(transformer):
    """One forward and backward on random tokens on the device "meta"."""
    config = transformer.config

    def tokens(count, features):
        return torch.empty(1, count, features, device="meta")

    text = TextContext(tokens(6, config.cross_attention_dim), tokens(6, config.audio_cross_attention_dim))
    video, audio = tokens(12, config.in_channels), tokens(9, config.audio_in_channels)
    sigmas, first_frame_clean = torch.empty(1, device="meta"), torch.ones(1, dtype=torch.bool, device="meta")
    batch = TrainingBatch(video, audio, None, text, latent_size=(3, 2, 2), frame_rate=25.0)
    noise = TrainingNoise(sigmas, video, audio, first_frame_clean)
    with ReferenceAttention(transformer) as attention:
        Objective()(transformer, attention, batch, noise).total.backward()


@families
def test_a_run_is_the_same_with_its_frozen_blocks_in_main_memory(tiny_checkpoint, data, tmp_path, family):
    changed = {"gradient_checkpointing": True, "validation_steps": 6, "validation_inference_steps": 0}
    for name, offload in (("without", False), ("with", True)):
        arguments = options(tiny_checkpoint(family), data[family], tmp_path / name, **changed)
        trainer = loaded_trainer([*arguments, "--offload_frozen_blocks", str(offload)])
        trainer.run()
        assert ("forward" in vars(trainer.transformer.transformer_blocks[0].attn1.to_q)) == offload
        trainer.end()
        assert not any({"forward", "_apply"} & vars(module).keys() for module in trainer.transformer.modules())
    assert losses_of(tmp_path / "with") == losses_of(tmp_path / "without")
    with_, without = (load_file(tmp_path / name / "checkpoint-6" / ADAPTER_STATE_NAME) for name in ("with", "without"))
    assert all(torch.equal(with_[key], value) for key, value in without.items())
    rows = [(tmp_path / name / "validation.jsonl").read_text() for name in ("with", "without")]
    assert rows[0] == rows[1]


def test_frozen_linear_layers_of_blocks_stay_where_they_are_and_all_else_moves():
    transformer = tiny_model()
    block = transformer.transformer_blocks[0]
    before = block.attn1.to_q.weight
    with FrozenLinearsInMainMemory(transformer, "meta"):
        transformer.to("meta")
        kept = {name for name, parameter in transformer.named_parameters() if parameter.is_cpu}
        assert block.attn1.to_q.weight is before and before.is_cpu and not before.requires_grad
        train_once_on_meta(transformer)
    assert kept and all(name.startswith("transformer_blocks.") and "lora_" not in name for name in kept)
    assert "transformer_blocks.0.audio_attn1.to_q.base_layer.weight" in kept
    assert "transformer_blocks.0.audio_ff.net.2.base_layer.bias" in kept
    assert transformer.proj_in.weight.is_meta and block.audio_attn1.to_q.lora_A["default"].weight.is_meta
    assert any(parameter.grad is not None and parameter.grad.is_meta for parameter in transformer.parameters())
    transformer.to("meta")
    assert block.attn1.to_q.weight.is_meta


def test_one_blocks_weights_are_on_the_device_at_a_time():
    most = {}
    for gradient_checkpointing in (True, False):
        transformer = tiny_model(gradient_checkpointing)
        with FrozenLinearsInMainMemory(transformer, "meta") as offload:
            transformer.to("meta")
            with WeightsOnTheDevice() as weights:
                train_once_on_meta(transformer)
        most[gradient_checkpointing] = weights.most
    per_block = len(offload.layers) // len(transformer.transformer_blocks)
    assert 1 < most[True] <= per_block < most[False]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gradient_checkpointing": False}, "`offload_frozen_blocks` needs `gradient_checkpointing`"),
        ({"quantize_base": "torchao_int8"}, "`quantize_base` torchao_int8"),
        ({"use_dora": True}, "`use_dora` True"),
        ({"compile": True}, "`compile` True"),
    ],
)
def test_what_does_not_go_together_with_offloading_is_refused(tmp_path, changed, message):
    changed = {"gradient_checkpointing": True, **changed}
    with pytest.raises(ValueError, match=message):
        parse_arguments(options(tmp_path, tmp_path, tmp_path, offload_frozen_blocks=True, **changed))


@pytest.mark.slow
def test_offloading_is_for_one_process(tiny_checkpoint, data, tmp_path):
    changed = {"offload_frozen_blocks": True, "gradient_checkpointing": True}
    arguments = options(tiny_checkpoint(), data["ltx-2.3"], tmp_path, **changed)
    process = launch(arguments, processes=2, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "`offload_frozen_blocks` is for one process, but there are 2" in errors
