"""Options of the training script that must not be without effect, and what a run says of itself and of a full disk."""

import csv
import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file

from diffusers_idlora import LTX2IDLoRAPipeline
from diffusers_idlora.training.arguments import parse_arguments
from diffusers_idlora.training.checkpoints import list_checkpoints, save_checkpoint
from diffusers_idlora.training.finish import finish
from diffusers_idlora.training.loading import check_before_loading, make_schedule
from training_run import loaded_trainer, make_samples, options


@pytest.fixture(scope="module")
def data(tiny_checkpoint, tmp_path_factory):
    """A prepared folder."""
    return make_samples(tmp_path_factory.mktemp("data"), tiny_checkpoint())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"lr_warmup_steps": 5, "lr_scheduler": "constant"},
            "`lr_warmup_steps` is 5, but `lr_scheduler` constant has",
        ),
        (
            {"lr_warmup_steps": 5, "lr_scheduler": "piecewise_constant", "lr_step_rules": "1:2,0.1"},
            "`lr_warmup_steps` is 5, but `lr_scheduler` piecewise_constant has no warm-up",
        ),
        ({"lr_warmup_steps": -1}, "`lr_warmup_steps` is -1"),
        ({"lr_num_cycles": 0}, "`lr_num_cycles` is 0"),
        ({"lr_power": -1}, "`lr_power` is -1"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa'; .* change the base"),
        ({"init_lora_weights": "olora"}, "`init_lora_weights` is 'olora'; .* change the base"),
    ],
)
def test_options_that_would_have_no_effect_or_a_wrong_one_are_refused(
    tiny_checkpoint, data, tmp_path, changed, message
):
    with pytest.raises(ValueError, match=message) as error:
        check_before_loading(parse_arguments(options(tiny_checkpoint(), data, tmp_path, **changed)))
    assert "\n" not in str(error.value)


def learning_rates(arguments):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    schedule = make_schedule(optimizer, arguments)
    rates = []
    for _ in range(arguments.max_train_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_schedules_restart_and_bend_as_asked(tmp_path):
    def rates(**changed):
        arguments = options(tmp_path, tmp_path, tmp_path, max_train_steps=8, learning_rate=1.0, **changed)
        return learning_rates(parse_arguments(arguments))

    restarts = rates(lr_scheduler="cosine_with_restarts", lr_num_cycles=2)
    assert restarts[:4] == restarts[4:] == pytest.approx(rates(lr_scheduler="cosine")[::2])
    bent = rates(lr_scheduler="polynomial", lr_power=2)
    assert bent == pytest.approx([(1 - step / 8) ** 2 for step in range(8)], abs=1e-6)
    assert rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=4)[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_prodigy_with_the_rate_of_another_optimizer_is_told_of(tiny_checkpoint, data, tmp_path, caplog):
    pytest.importorskip("prodigyopt")
    arguments = options(tiny_checkpoint(), data, tmp_path, optimizer="prodigy", learning_rate=2e-4)
    check_before_loading(parse_arguments(arguments))
    assert "1.0 is the usual value" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="it has no limit of a file's size")
@pytest.mark.parametrize(
    "write", [torch.save, lambda state, path: save_file(state, path)], ids=["optimizer", "adapter"]
)
def test_a_write_that_the_system_refuses_is_told_as_such_and_leaves_the_last_checkpoint(tmp_path, write):
    import resource

    state = {"weights": torch.randn(100_000)}
    save_checkpoint(tmp_path, 2, {"bad_steps": 0}, lambda folder: write(state, folder / "state"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="GiB") as error:
            save_checkpoint(tmp_path, 4, {"bad_steps": 0}, lambda folder: write(state, folder / "state"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # By this number the training script knows an error of the system, and ends in a sentence.
    assert error.value.errno is not None and error.value.filename == str(tmp_path / "checkpoint-4")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}


def test_a_base_that_is_there_in_one_variant_only_trains_and_validates(tiny_checkpoint, data, tmp_path):
    base, output = tmp_path / "base", tmp_path / "out"
    LTX2IDLoRAPipeline.from_pretrained(tiny_checkpoint()).save_pretrained(base, variant="fp16")
    changed = {"variant": "fp16", "max_train_steps": 1, "validation_steps": 1, "validation_inference_steps": 2}
    trainer = loaded_trainer(options(base, data, output, **changed))
    trainer.run()
    assert [path.name for path in trainer.validate()] == ["0.mp4", "1.mp4"]


def test_the_record_and_the_card_tell_the_last_loss_and_the_time(tiny_checkpoint, data, tmp_path):
    trainer = loaded_trainer(options(tiny_checkpoint(), data, tmp_path, max_train_steps=2))
    trainer.run()
    finish(trainer, [])
    with (tmp_path / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    record = json.loads((tmp_path / "training_record.json").read_text())
    assert record["final_loss"] == float(rows[-1]["loss"])
    assert math.isclose(record["seconds"], sum(float(row["seconds"]) for row in rows))
    assert f"| Loss at the end | {record['final_loss']:.4f} |" in (tmp_path / "README.md").read_text()
