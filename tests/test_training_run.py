"""Training runs as users start them: the same weights whatever happens to the process, and nothing lost."""

import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import LTX2VideoTransformer3DModel
from safetensors.torch import load_file, save_file

from conftest import families
from diffusers_idlora import LTX2IDLoRAPipeline, TextContext
from diffusers_idlora.media import read_video, write_video
from diffusers_idlora.training.arguments import parse_arguments
from diffusers_idlora.training.checkpoints import list_checkpoints, read_checkpoint, save_checkpoint
from diffusers_idlora.training.fingerprint import model_fingerprint, model_folder
from diffusers_idlora.training.finish import finish
from diffusers_idlora.training.samples import SampleFolder, save_negative_prompt
from diffusers_idlora.training.trainer import ADAPTER_STATE_NAME, BadSteps, Trainer
from diffusers_idlora.training.validation import denormalize_audio, denormalize_video
from test_training_original_format import change_original, save_original
from training_run import SCRIPT, launch, loaded_trainer, losses_of, make_samples, options


# Of the method's section 4.
RECIPE_SCALES = {
    "guidance_scale": 3.0,
    "audio_guidance_scale": 7.0,
    "identity_guidance_scale": 3.0,
    "stg_scale": 1.0,
    "modality_scale": 3.0,
}


@pytest.fixture(scope="module")
def data(tiny_checkpoint, tmp_path_factory):
    """Prepared folders by family."""
    return {
        family: make_samples(tmp_path_factory.mktemp("data"), tiny_checkpoint(family))
        for family in ("ltx-2", "ltx-2.3")
    }


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps precision and processes for the life of a process; every run here is one of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


def train(tiny_checkpoint, data, output, family="ltx-2.3", **changed):
    trainer = loaded_trainer(options(tiny_checkpoint(family), data[family], output, **changed))
    trainer.run()
    return trainer


def adapter_of(output, step=6):
    return load_file(output / f"checkpoint-{step}" / ADAPTER_STATE_NAME)


def assert_equal_adapters(first, second):
    assert first.keys() == second.keys() and first
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def wait_for_rows(output, count, process):
    """Until the run has written so many rows of losses."""
    rows, deadline = output / "loss.csv", time.monotonic() + 120
    while not (rows.is_file() and len(rows.read_text().splitlines()) > count) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def straight(tiny_checkpoint, data, tmp_path_factory):
    """The output of an uninterrupted run."""
    output = tmp_path_factory.mktemp("straight")
    train(tiny_checkpoint, data, output)
    return output


# Resuming


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_weights_of_an_uninterrupted_one(
    tiny_checkpoint, data, straight, tmp_path
):
    arguments = options(tiny_checkpoint(), data["ltx-2.3"], tmp_path, resume_from_checkpoint="latest")
    moments = random.Random(0)
    for _ in range(2):
        process = launch(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Killed somewhere within the steps, not while the interpreter starts.
        wait_for_rows(tmp_path, 2, process)
        time.sleep(moments.random() * 0.1)
        process.kill()
        process.wait()
        shutil.rmtree(tmp_path / "checkpoint-6", ignore_errors=True)
    process = launch(arguments)
    assert process.wait(timeout=120) == 0
    assert_equal_adapters(adapter_of(tmp_path), adapter_of(straight))
    assert losses_of(tmp_path) == losses_of(straight)


@pytest.mark.slow
def test_sigterm_saves_and_ends_well_and_the_run_goes_on_from_there(tiny_checkpoint, data, straight, tmp_path):
    # As many steps as never end within the test; the schedule is constant so that the number does not matter.
    arguments = options(
        tiny_checkpoint(), data["ltx-2.3"], tmp_path, max_train_steps=100000, checkpointing_steps=100000
    )
    process = launch(arguments, stderr=subprocess.PIPE)
    wait_for_rows(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    (checkpoint,) = list_checkpoints(tmp_path)
    step = read_checkpoint(checkpoint)["step"]
    assert step == len(losses_of(tmp_path)) >= 3


def test_resuming_equals_running_through_with_dropout_and_accumulation(tiny_checkpoint, data, tmp_path):
    changed = {"lora_dropout": 0.2, "gradient_accumulation_steps": 2, "reference_dropout": 0.5}
    train(tiny_checkpoint, data, tmp_path / "a", **changed)
    train(tiny_checkpoint, data, tmp_path / "b", **changed)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "b" / f"checkpoint-{step}")
    train(tiny_checkpoint, data, tmp_path / "b", **changed, resume_from_checkpoint="latest")
    assert_equal_adapters(adapter_of(tmp_path / "a"), adapter_of(tmp_path / "b"))
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")


def test_latest_passes_over_a_broken_checkpoint_with_a_warning(tiny_checkpoint, data, straight, tmp_path, caplog):
    shutil.copytree(straight, tmp_path / "run")
    broken = tmp_path / "run" / "checkpoint-6" / ADAPTER_STATE_NAME
    broken.write_bytes(broken.read_bytes()[:100])
    trainer = train(tiny_checkpoint, data, tmp_path / "run", resume_from_checkpoint="latest")
    assert "checkpoint-6" in caplog.text and "damaged" in caplog.text
    assert trainer.resumed[0].name == "checkpoint-4"
    assert_equal_adapters(adapter_of(tmp_path / "run"), adapter_of(straight))


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"seed": 7}, "seed 42 -> 7"), ({"rank": 8}, "rank 4 -> 8"), ({"learning_rate": 0.5}, "learning_rate")],
)
def test_a_checkpoint_of_another_run_is_refused_before_the_model_loads(
    tiny_checkpoint, data, straight, changed, named
):
    arguments = options(tiny_checkpoint(), data["ltx-2.3"], straight, resume_from_checkpoint="latest", **changed)
    with pytest.raises(ValueError, match=named):
        Trainer(parse_arguments(arguments))


def test_a_folder_that_holds_a_run_is_not_trained_over(tiny_checkpoint, data, straight):
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="`output_dir`.*holds a run already"):
        Trainer(parse_arguments(options(tiny_checkpoint(), data["ltx-2.3"], straight)))
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def test_latest_is_refused_where_every_checkpoint_is_broken(tiny_checkpoint, data, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    for folder in list_checkpoints(tmp_path / "run"):
        (folder / ADAPTER_STATE_NAME).unlink()
    with pytest.raises(ValueError, match="none of the 3 checkpoints"):
        train(tiny_checkpoint, data, tmp_path / "run", resume_from_checkpoint="latest")
    assert len(losses_of(tmp_path / "run")) == 6


def test_more_steps_go_on_along_the_longer_schedule(tiny_checkpoint, data, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    train(tiny_checkpoint, data, tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=12)
    with (tmp_path / "run" / "loss.csv").open(newline="") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates[6:] == pytest.approx([0.01 * (12 - step) / 12 for step in range(6, 12)])


def test_step_rules_set_the_rate_and_are_followed_after_resuming(tiny_checkpoint, data, tmp_path):
    changed = {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:2,0.5:5,0.1", "max_train_steps": 6}
    train(tiny_checkpoint, data, tmp_path, **changed)
    shutil.rmtree(tmp_path / "checkpoint-6")
    train(tiny_checkpoint, data, tmp_path, **changed, resume_from_checkpoint="latest")
    with (tmp_path / "loss.csv").open(newline="") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([0.01, 0.01, 0.005, 0.005, 0.005, 0.001])


def test_samples_per_forward_may_be_shared_out_anew_but_not_changed(tiny_checkpoint, data, straight):
    arguments = options(
        tiny_checkpoint(), data["ltx-2.3"], straight, resume_from_checkpoint="latest", train_batch_size=1
    )
    with pytest.raises(ValueError, match="samples_per_forward 2 -> 1"):
        Trainer(parse_arguments(arguments))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell a process nothing of its launcher's end")
def test_sigterm_to_accelerate_launch_ends_the_training_with_a_checkpoint(tiny_checkpoint, data, tmp_path):
    arguments = options(
        tiny_checkpoint(), data["ltx-2.3"], tmp_path, max_train_steps=100000, checkpointing_steps=100000
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*launcher, *arguments], env=environment, stderr=subprocess.DEVNULL)
    wait_for_rows(tmp_path, 3, process)
    process.terminate()
    process.wait(timeout=60)
    deadline = time.monotonic() + 60
    while not list_checkpoints(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (checkpoint,) = list_checkpoints(tmp_path)
    assert read_checkpoint(checkpoint)["step"] >= 3


def test_other_data_are_refused_on_resume(tiny_checkpoint, straight, tmp_path):
    other = make_samples(tmp_path, tiny_checkpoint(), count=4)
    with pytest.raises(ValueError, match="the data"):
        Trainer(parse_arguments(options(tiny_checkpoint(), other, straight, resume_from_checkpoint="latest")))


@pytest.fixture
def own_base(tiny_checkpoint, tmp_path):
    """A copy of a checkpoint that a test may change."""
    return shutil.copytree(tiny_checkpoint(), tmp_path / "base")


def change_base(base):
    """Fuses what an adapter would: one weight in the middle of the file."""
    (path,) = (base / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    tensors["transformer_blocks.1.audio_attn1.to_q.weight"] += 1e-3
    save_file(tensors, path, {"format": "pt"})


def test_a_base_whose_weights_have_changed_is_refused_on_resume_and_a_moved_one_is_not(
    data, straight, own_base, tmp_path
):
    arguments = options(own_base, data["ltx-2.3"], straight, resume_from_checkpoint="latest")
    state = read_checkpoint(straight / "checkpoint-6")
    assert Trainer(parse_arguments(arguments)).base_fingerprint == state["base_fingerprint"]
    change_base(own_base)
    with pytest.raises(ValueError, match="the weights of the base"):
        Trainer(parse_arguments(arguments))


def test_a_base_in_the_cache_of_the_hub_is_compared_too(data, straight, own_base, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--user--base" / "snapshots" / ("0" * 40)
    shutil.copytree(own_base, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert model_fingerprint(model_folder("user/base", "transformer")) == model_fingerprint(own_base / "transformer")
    assert model_folder("user/other", "transformer") is None


def test_the_fingerprint_sees_every_weight_of_a_sharded_model_and_only_its_own_variant(own_base, tmp_path):
    model = LTX2VideoTransformer3DModel.from_pretrained(own_base, subfolder="transformer")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    before = model_fingerprint(tmp_path / "sharded")
    model.save_pretrained(tmp_path / "sharded", variant="fp16")
    assert model_fingerprint(tmp_path / "sharded") == before != model_fingerprint(tmp_path / "sharded", "fp16")
    last = sorted((tmp_path / "sharded").glob("*-of-*.safetensors"))[-1]
    tensors = load_file(last)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, last, {"format": "pt"})
    assert model_fingerprint(tmp_path / "sharded") not in (None, before)
    last.write_bytes(b"no weights")
    assert model_fingerprint(tmp_path / "sharded") is None


def test_a_checkpoint_of_an_older_version_can_be_gone_on_with(tiny_checkpoint, data, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    for folder in list_checkpoints(tmp_path / "run"):
        state = json.loads((folder / "trainer_state.json").read_text())
        del state["base_fingerprint"], state["fixed"]["mix_lengths"], state["fixed"]["lr_step_rules"]
        (folder / "trainer_state.json").write_text(json.dumps(state))
    arguments = options(tiny_checkpoint(), data["ltx-2.3"], tmp_path / "run", resume_from_checkpoint="latest")
    assert Trainer(parse_arguments(arguments)).resumed[1]["step"] == 6
    with pytest.raises(ValueError, match="mix_lengths False -> True"):
        Trainer(parse_arguments([*arguments, "--mix_lengths", "true"]))


# Checkpoints


def test_only_so_many_checkpoints_are_kept(tiny_checkpoint, data, tmp_path):
    train(tiny_checkpoint, data, tmp_path, checkpoints_total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(tmp_path):
    def write(folder):
        (folder / "weights").write_text("1")

    def fail(folder):
        (folder / "weights").write_text("2")
        raise OSError(28, "No space left on device")

    save_checkpoint(tmp_path, 2, {"bad_steps": 0}, write)
    for step in (2, 4):
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, step, {"bad_steps": 0}, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert read_checkpoint(tmp_path / "checkpoint-2")["step"] == 2
    assert (tmp_path / "checkpoint-2" / "weights").read_text() == "1"


def test_a_checkpoint_holds_the_adapter_and_not_the_base(straight):
    names = {path.name for path in (straight / "checkpoint-6").iterdir()}
    assert names == {ADAPTER_STATE_NAME, "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "trainer_state.json"}
    assert all("lora_" in key for key in adapter_of(straight))


# Steps that go wrong


def test_a_step_without_a_finite_loss_is_skipped_and_counted(tiny_checkpoint, data, tmp_path, caplog):
    folder = shutil.copytree(data["ltx-2.3"], tmp_path / "data")
    path = folder / "samples" / "0000.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["audio_latents"].fill_(torch.nan)
    save_file(tensors, path, metadata)
    trainer = train(tiny_checkpoint, {"ltx-2.3": folder}, tmp_path / "out")
    assert 1 <= trainer.bad_steps < 6 and "skipped" in caplog.text
    assert all(value.isfinite().all() for value in adapter_of(tmp_path / "out").values())
    with pytest.raises(BadSteps, match="learning_rate"):
        train(tiny_checkpoint, {"ltx-2.3": folder}, tmp_path / "stopped", max_bad_steps=1)


# Several processes


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_with_twice_the_batch(tiny_checkpoint, data, tmp_path):
    train(tiny_checkpoint, data, tmp_path / "one", train_batch_size=2, reference_dropout=0.3)
    arguments = options(
        tiny_checkpoint(), data["ltx-2.3"], tmp_path / "two", train_batch_size=1, reference_dropout=0.3
    )
    process = launch(arguments, processes=2, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors[-3000:]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-4)


# The end of a run


@families
def test_an_adapter_comes_out_that_the_pipeline_loads(tiny_checkpoint, data, tmp_path, family):
    trainer = train(
        tiny_checkpoint,
        data,
        tmp_path,
        family,
        lora_alpha=8,
        also_original_format=True,
        validation_steps=3,
        validation_inference_steps=2,
    )
    videos = trainer.validate()
    finish(trainer, videos)
    trainer.end()
    assert [path.name for path in videos] == ["0.mp4", "1.mp4"]
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0]["validation_reference_gain"] != 0
    outputs = []
    for source in (None, tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "lora_weights.safetensors"):
        pipe = LTX2IDLoRAPipeline.from_pretrained(tiny_checkpoint(family))
        pipe.set_progress_bar_config(disable=True)
        if source is not None:
            pipe.load_lora_weights(source)
        generator = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}
        outputs.append(pipe(prompt="a", generator=generator, output_type="latent", **size).audio)
    assert (outputs[1] - outputs[0]).abs().max() > 1e-3
    torch.testing.assert_close(outputs[2], outputs[1], atol=1e-4, rtol=1e-4)
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert "identity_guidance_scale" in (tmp_path / "README.md").read_text()


@families
def test_validation_videos_follow_the_recipe_where_the_data_hold_a_negative_prompt(
    tiny_checkpoint, data, tmp_path, caplog, family
):
    folder = shutil.copytree(data[family], tmp_path / "data")
    changed = {"max_train_steps": 1, "validation_steps": 5, "validation_inference_steps": 2}
    sample = SampleFolder(folder, split="validation")[0]
    negative = {
        "video_prompt_embeds": -sample.video_prompt_embeds,
        "audio_prompt_embeds": -sample.audio_prompt_embeds,
        "prompt_attention_mask": sample.prompt_attention_mask,
    }

    older = train(tiny_checkpoint, {family: folder}, tmp_path / "older", family, **changed)
    assert "no negative prompt" in caplog.text
    save_negative_prompt(folder, negative, {})
    caplog.clear()
    trainer = train(tiny_checkpoint, {family: folder}, tmp_path / "out", family, **changed)
    assert "no negative prompt" not in caplog.text
    without, found = (read_video(trainer.validate()[0]) for trainer in (older, trainer))

    pipe = trainer._validation_pipeline
    output = pipe(
        text_context=TextContext(sample.video_prompt_embeds[None], sample.audio_prompt_embeds[None]),
        negative_text_context=TextContext(*(value[None] for value in list(negative.values())[:2])),
        image_latents=denormalize_video(sample.video_latents[None, :, :1], pipe.vae),
        reference_latents=denormalize_audio(sample.reference_latents[0][None], pipe.audio_vae),
        height=64,
        width=64 if sample.video_latents.shape[3] == 2 else 32,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        **RECIPE_SCALES,
    )
    path, rate = tmp_path / "expected.mp4", pipe.vocoder.config.output_sampling_rate
    write_video(path, output.frames[0], 25.0, output.audio[0], rate)
    expected = read_video(path)
    for part in (0, 2):
        assert (found[part] == expected[part]).all() and not (without[part] == expected[part]).all()


def test_training_starts_from_an_existing_adapter(tiny_checkpoint, tiny_adapter, data, tmp_path):
    arguments = options(tiny_checkpoint(), data["ltx-2.3"], tmp_path, lora_path=tiny_adapter())
    trainer = Trainer(parse_arguments(arguments))
    trainer.load_model()
    given = load_file(tiny_adapter())
    parameters = dict(trainer.transformer.named_parameters())
    for key, value in given.items():
        name = key.removeprefix("diffusion_model.").replace(".weight", ".default.weight")
        assert torch.equal(parameters[name], value.float())


def test_an_adapter_to_start_from_keeps_its_strength_or_is_refused(tiny_checkpoint, data, straight, tmp_path):
    first = train(tiny_checkpoint, data, tmp_path / "first", lora_alpha=16)
    finish(first, [])
    arguments = options(tiny_checkpoint(), data["ltx-2.3"], tmp_path / "second", lora_path=tmp_path / "first")
    second = Trainer(parse_arguments(arguments))
    second.load_model()
    assert second.transformer.transformer_blocks[0].audio_attn1.to_q.scaling["default"] == 4.0
    with pytest.raises(ValueError, match="`lora_path`.*rank 4.*`rank` 8"):
        Trainer(parse_arguments([*arguments[:-2], "--lora_path", str(tmp_path / "first"), "--rank", "8"]))


def test_only_the_adapted_modules_train_and_in_float32(tiny_checkpoint, data, tmp_path):
    trainer = Trainer(parse_arguments(options(tiny_checkpoint(), data["ltx-2.3"], tmp_path, mixed_precision="bf16")))
    trainer.load_model()
    trained = {name for name, parameter in trainer.transformer.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and "audio" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters)
    assert trainer.transformer.proj_in.weight.dtype == torch.bfloat16
    trainer.run()
    assert all(value.isfinite().all() for value in adapter_of(tmp_path).values())


def test_a_dora_trains_and_loads_back(tiny_checkpoint, data, tmp_path):
    trainer = train(tiny_checkpoint, data, tmp_path, use_dora=True, max_train_steps=3)
    finish(trainer, [])
    assert any("lora_magnitude_vector" in key for key in adapter_of(tmp_path, 3))
    pipe = LTX2IDLoRAPipeline.from_pretrained(tiny_checkpoint())
    pipe.load_lora_weights(tmp_path)
    loaded = pipe.transformer.transformer_blocks[0].audio_attn1.to_q
    trained = trainer.transformer.transformer_blocks[0].audio_attn1.to_q
    hidden = torch.randn(1, 5, loaded.in_features)
    with torch.no_grad():
        torch.testing.assert_close(loaded(hidden), trained(hidden), atol=1e-5, rtol=0)
        assert (loaded(hidden) - loaded.base_layer(hidden)).abs().max() > 1e-4


def test_a_base_in_eight_bits_trains_and_is_left_as_it_was(tiny_checkpoint, data, tmp_path):
    arguments = options(
        tiny_checkpoint(), data["ltx-2.3"], tmp_path, quantize_base="torchao_int8", mixed_precision="bf16"
    )
    trainer = Trainer(parse_arguments(arguments))
    trainer.load_model()
    base = trainer.transformer.transformer_blocks[0].audio_attn1.to_q.base_layer.weight
    assert "Int8" in type(base).__name__
    before = base.dequantize().clone()
    trainer.run()
    assert torch.equal(base.dequantize(), before)
    first = adapter_of(tmp_path, 2)
    assert any(not torch.equal(first[key], value) for key, value in adapter_of(tmp_path).items())
    assert all(value.isfinite().all() for value in adapter_of(tmp_path).values())


@pytest.mark.parametrize("kind", ["bnb_8bit", "bnb_4bit"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="it may work there")
def test_a_quantization_that_can_not_be_had_is_refused_in_a_sentence(tiny_checkpoint, data, tmp_path, kind):
    trainer = Trainer(parse_arguments(options(tiny_checkpoint(), data["ltx-2.3"], tmp_path, quantize_base=kind)))
    with pytest.raises(ValueError, match="`quantize_base`"):
        trainer.load_model()


def test_the_authors_preprocessed_sets_train_also_where_frame_rates_differ(tiny_checkpoint, data, tmp_path):
    folder = tmp_path / "original"
    for name in ("0", "1", "2"):
        save_original(folder, name)
    change_original(folder / "latents" / "1.pt", fps=24.0)
    trainer = train(
        tiny_checkpoint, {"ltx-2.3": folder}, tmp_path / "out", precomputed_format="original", max_train_steps=4
    )
    assert trainer.bad_steps == 0 and len(losses_of(tmp_path / "out")) == 4


# Bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"instance_data_root": "nowhere"}, "`instance_data_root`"),
        ({"rank": 0}, "`rank` is 0"),
        ({"validation_inference_steps": 1}, "`validation_inference_steps` is 1"),
        ({"reference_dropout": 1.5}, "`reference_dropout` is 1.5"),
        ({"learning_rate": -1}, "`learning_rate` is -1"),
        ({"resume_from_checkpoint": "checkpoint-77"}, "`resume_from_checkpoint` is 'checkpoint-77'"),
        ({"hub_token": "x", "report_to": "wandb"}, "`hub_token`"),
        ({"target_modules": "("}, "`target_modules` '\\('"),
        ({"lr_scheduler": "linnear"}, "`lr_scheduler` is 'linnear'"),
        ({"lr_scheduler": "piecewise_constant"}, "`lr_step_rules` is None and `lr_scheduler` is 'piecewise_constant'"),
        ({"lr_step_rules": "1:10,0.1"}, "`lr_step_rules` is '1:10,0.1' and `lr_scheduler` is 'linear'"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:10"}, "`lr_step_rules` is '1:10'; write factors"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:20,0.1:10,0.01"},
            "`lr_step_rules` is '1:20,0.1:10,0.01'; write factors",
        ),
        ({"optimizer": "prodigy"}, "`optimizer` 'prodigy' needs a package"),
        ({"report_to": "comet_ml"}, "`report_to` 'comet_ml' is not installed"),
        ({"lora_path": "nowhere.safetensors"}, "`lora_path`"),
        ({"precomputed_format": "original", "validation_steps": 1}, "`validation_steps`"),
        ({"pretrained_model_name_or_path": ""}, "`pretrained_model_name_or_path` is missing"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(tiny_checkpoint, data, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message) as error:
        Trainer(parse_arguments(options(tiny_checkpoint(), data["ltx-2.3"], tmp_path, **changed)))
    assert "\n" not in str(error.value)


def test_modules_that_do_not_exist_and_data_of_another_base_are_refused(tiny_checkpoint, data, tmp_path):
    arguments = options(tiny_checkpoint(), data["ltx-2.3"], tmp_path, target_modules="nothing")
    with pytest.raises(ValueError, match="`target_modules` 'nothing'"):
        Trainer(parse_arguments(arguments))
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` is"):
        Trainer(parse_arguments(options(tmp_path / "no-base", data["ltx-2.3"], tmp_path)))


def test_a_config_file_gives_defaults_that_options_override(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("pretrained_model_name_or_path: base\ninstance_data_root: data\nlearning_rate: 2e-4\nrank: 64\n")
    arguments = parse_arguments(["--config", str(config), "--rank", "32"])
    assert (arguments.pretrained_model_name_or_path, arguments.learning_rate, arguments.rank) == ("base", 2e-4, 32)
    config.write_text(
        "pretrained_model_name_or_path: b\ninstance_data_root: d\nmixed_precision: no\nlora_path: null\n"
    )
    arguments = parse_arguments(["--config", str(config)])
    assert (arguments.mixed_precision, arguments.lora_path) == ("no", None)
    for wrong in ("quantize_base: bnb4", "rank: 8.5", "optimizer: sgd"):
        config.write_text(f"pretrained_model_name_or_path: b\ninstance_data_root: d\n{wrong}\n")
        with pytest.raises(SystemExit) as error:
            parse_arguments(["--config", str(config)])
        assert error.value.code == 2
    config.write_text("ranks: 64\n")
    with pytest.raises(ValueError, match="'ranks'"):
        parse_arguments(["--config", str(config)])


@pytest.mark.parametrize("name", ["celebvhq", "talkvid"])
def test_the_released_recipes_are_complete_configurations(name):
    path = SCRIPT.parent / "configs" / f"{name}.yaml"
    arguments = parse_arguments(["--config", str(path), "--instance_data_root", "data"])
    values = dataclasses.asdict(arguments)
    assert (values["rank"], values["learning_rate"], values["lr_scheduler"]) == (128, 2e-4, "linear")
    assert values["train_batch_size"] * values["gradient_accumulation_steps"] == 4
    assert values["max_train_steps"] == 3000 and values["mask_reference_from_text"]
