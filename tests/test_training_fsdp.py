"""Training with weights that are spread over two processes: losses, checkpoints and the adapter of a single one."""

import csv
import json
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from diffusers_idlora.training.arguments import parse_arguments
from diffusers_idlora.training.finish import finish
from diffusers_idlora.training.trainer import ADAPTER_STATE_NAME, Trainer
from training_fsdp import ENVIRONMENT, use_fsdp
from training_run import launch, loaded_trainer, losses_of, make_samples, options


FSDP_SCRIPT = Path(__file__).parent / "training_fsdp.py"
LORA = {
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "reference_dropout": 0.3,
    "validation_steps": 6,
    "validation_inference_steps": 2,
    "num_validation_samples": 1,
    "lr_scheduler": "constant",
    "checkpointing_steps": 3,
}
DORA = {"use_dora": True, "gradient_checkpointing": True, "max_train_steps": 2}
BF16 = {"mixed_precision": "bf16", "max_train_steps": 3}


@pytest.fixture(scope="module")
def data(tiny_checkpoint, tmp_path_factory):
    """A prepared folder."""
    return make_samples(tmp_path_factory.mktemp("data"), tiny_checkpoint())


@pytest.fixture(scope="module")
def sharded(tiny_checkpoint, data, tmp_path_factory):
    """The outputs of the training script in two processes, each with half the batch and half of every weight."""
    folder = tmp_path_factory.mktemp("sharded")
    runs = [
        ("lora", {**LORA, "max_train_steps": 3, "validation_steps": None}),
        ("lora", {**LORA, "resume_from_checkpoint": "latest"}),
        ("dora", DORA),
        ("bf16", BF16),
    ]
    arguments = [
        options(tiny_checkpoint(), data, folder / name, train_batch_size=1, **changed) for name, changed in runs
    ]
    process = launch([json.dumps(arguments)], processes=2, script=FSDP_SCRIPT, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0 and "3/6" in errors, errors[-3000:]
    return folder


def gradient_norms(output):
    with (output / "loss.csv").open(newline="") as file:
        return [float(row["gradient_norm"]) for row in csv.DictReader(file)]


def assert_equal_runs(found, expected, *names):
    assert losses_of(found) == pytest.approx(losses_of(expected), abs=1e-4)
    assert gradient_norms(found) == pytest.approx(gradient_norms(expected), rel=1e-3)
    for name in names:
        weights, others = load_file(expected / name), load_file(found / name)
        assert weights.keys() == others.keys() and weights
        for key, value in weights.items():
            torch.testing.assert_close(others[key], value, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_two_sharded_processes_that_were_stopped_and_resumed_end_as_one_that_was_not(
    tiny_checkpoint, data, sharded, tmp_path
):
    trainer = loaded_trainer(options(tiny_checkpoint(), data, tmp_path, **LORA))
    trainer.run()
    finish(trainer, trainer.validate())
    found = sharded / "lora"
    assert_equal_runs(found, tmp_path, f"checkpoint-6/{ADAPTER_STATE_NAME}", "pytorch_lora_weights.safetensors")
    validated = [json.loads((folder / "validation.jsonl").read_text()) for folder in (found, tmp_path)]
    assert validated[0] == pytest.approx(validated[1], abs=1e-3)
    assert (found / "validation" / "step-6" / "0.mp4").is_file()
    # Neither the base nor anything in parts.
    assert {path.name for path in (found / "checkpoint-3").iterdir()} == {
        ADAPTER_STATE_NAME,
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
        "random_states_1.pkl",
        "trainer_state.json",
    }


@pytest.mark.slow
def test_a_dora_is_trained_alike_by_two_sharded_processes(tiny_checkpoint, data, sharded, tmp_path):
    loaded_trainer(options(tiny_checkpoint(), data, tmp_path, **DORA)).run()
    assert_equal_runs(sharded / "dora", tmp_path, f"checkpoint-2/{ADAPTER_STATE_NAME}")


@pytest.mark.slow
def test_bfloat16_stays_as_near_to_one_process_as_it_is_exact(tiny_checkpoint, data, sharded, tmp_path):
    loaded_trainer(options(tiny_checkpoint(), data, tmp_path, **BF16)).run()
    assert losses_of(sharded / "bf16") == pytest.approx(losses_of(tmp_path), abs=5e-3)
    adapter = load_file(sharded / "bf16" / "checkpoint-3" / ADAPTER_STATE_NAME)
    assert all(value.dtype == torch.float32 for value in adapter.values())


@pytest.fixture
def fsdp_state(monkeypatch):
    """Sets accelerate's state as with FSDP under changed variables; all is as before afterwards."""

    def set_state(**changed):
        for name, value in {**ENVIRONMENT, **changed}.items():
            monkeypatch.setenv(name, value)
        use_fsdp()

    AcceleratorState._reset_state(reset_partial_state=True)
    yield set_state
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("variables", "changed", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "`fsdp_version` is 1"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "`fsdp_cpu_ram_efficient_loading` is on"),
        ({}, {"mix_lengths": True}, "`mix_lengths` True does not go together with sharding"),
        ({}, {"compile": True}, "`compile` True does not go together"),
    ],
)
def test_what_does_not_go_together_with_sharding_is_refused(
    tiny_checkpoint, data, tmp_path, fsdp_state, variables, changed, message
):
    fsdp_state(**variables)
    with pytest.raises(ValueError, match=message):
        Trainer(parse_arguments(options(tiny_checkpoint(), data, tmp_path, **changed)))
