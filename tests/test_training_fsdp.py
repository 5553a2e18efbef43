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
CHANGED = {
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "reference_dropout": 0.3,
    "validation_steps": 6,
    "validation_inference_steps": 2,
    "num_validation_samples": 1,
}


@pytest.fixture(scope="module")
def data(tiny_checkpoint, tmp_path_factory):
    """A prepared folder."""
    return make_samples(tmp_path_factory.mktemp("data"), tiny_checkpoint())


def run_sharded(checkpoint, data, output, **changed):
    """The training script in two processes, each with half the batch and half of every weight."""
    arguments = options(checkpoint, data, output, train_batch_size=1, **changed)
    process = launch(arguments, processes=2, script=FSDP_SCRIPT, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=240)
    return process.returncode, errors


def gradient_norms(output):
    with (output / "loss.csv").open(newline="") as file:
        return [float(row["gradient_norm"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_two_sharded_processes_end_as_one_does_also_when_resumed(tiny_checkpoint, data, tmp_path):
    trainer = loaded_trainer(options(tiny_checkpoint(), data, tmp_path / "one", **CHANGED))
    trainer.run()
    finish(trainer, trainer.validate())
    sharded = tmp_path / "sharded"
    changed = {**CHANGED, "lr_scheduler": "linear", "checkpointing_steps": 3}
    code, errors = run_sharded(tiny_checkpoint(), data, sharded, **changed)
    assert code == 0, errors[-3000:]

    def assert_like_one_process():
        assert losses_of(sharded) == pytest.approx(losses_of(tmp_path / "one"), abs=1e-4)
        assert gradient_norms(sharded) == pytest.approx(gradient_norms(tmp_path / "one"), rel=1e-3)
        for name in (f"checkpoint-6/{ADAPTER_STATE_NAME}", "pytorch_lora_weights.safetensors"):
            expected, found = load_file(tmp_path / "one" / name), load_file(sharded / name)
            assert expected.keys() == found.keys() and expected
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, atol=1e-4, rtol=0)

    assert_like_one_process()
    validated = [json.loads((folder / "validation.jsonl").read_text()) for folder in (sharded, tmp_path / "one")]
    assert validated[0] == pytest.approx(validated[1], abs=1e-3)
    assert (sharded / "validation" / "step-6" / "0.mp4").is_file()
    checkpoint = sharded / "checkpoint-3"
    # Neither the base nor anything in parts.
    assert {path.name for path in checkpoint.iterdir()} == {
        ADAPTER_STATE_NAME,
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
        "random_states_1.pkl",
        "trainer_state.json",
    }
    (sharded / "checkpoint-6" / ADAPTER_STATE_NAME).unlink()
    code, errors = run_sharded(tiny_checkpoint(), data, sharded, resume_from_checkpoint="latest", **changed)
    assert code == 0 and "3/6" in errors, errors[-3000:]
    assert_like_one_process()


@pytest.mark.slow
def test_bfloat16_stays_as_near_to_one_process_as_it_is_exact(tiny_checkpoint, data, tmp_path):
    changed = {"mixed_precision": "bf16", "max_train_steps": 3}
    loaded_trainer(options(tiny_checkpoint(), data, tmp_path / "one", **changed)).run()
    code, errors = run_sharded(tiny_checkpoint(), data, tmp_path / "sharded", **changed)
    assert code == 0, errors[-3000:]
    assert losses_of(tmp_path / "sharded") == pytest.approx(losses_of(tmp_path / "one"), abs=5e-3)
    adapter = load_file(tmp_path / "sharded" / "checkpoint-3" / ADAPTER_STATE_NAME)
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
