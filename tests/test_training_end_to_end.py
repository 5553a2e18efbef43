"""From real clips to a published adapter that makes a video, with the commands of the documentation."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from diffusers_idlora import LTX2IDLoRAPipeline
from hub_server import HubServer
from talking_clips import NUM_FRAMES, write_clip, write_table
from training_run import SCRIPT


def run(command, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.slow
def test_clips_become_a_published_adapter_that_generates(tiny_checkpoint, tmp_path):
    clips, data, output = tmp_path / "clips", tmp_path / "data", tmp_path / "id-lora"
    clips.mkdir()
    rows = []
    for index in range(6):
        write_clip(clips / f"{index}.mp4", seed=index)
        speech = f"Sentence number {index}."
        rows.append({"file_name": f"{index}.mp4", "visual": "a face", "speech": speech, "speaker_id": str(index // 2)})
    write_table(clips, rows)
    base = tiny_checkpoint("ltx-2.3")
    prepare = [SCRIPT.parent / "prepare_dataset.py", "--pretrained_model_name_or_path", base, "--dtype", "fp32"]
    prepare += ["--instance_data_root", clips, "--output_dir", data, "--max_sequence_length", "32"]
    prepare += [
        "--resolution_buckets",
        f"64x64x{NUM_FRAMES}",
        "--validation_speakers",
        "1",
        "--reference_seconds",
        "1",
    ]
    run(prepare)

    train = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    train += ["--mixed_precision", "no", "--dynamo_backend", "no", SCRIPT]
    train += ["--pretrained_model_name_or_path", base, "--instance_data_root", data, "--output_dir", output]
    train += [
        "--rank",
        "4",
        "--train_batch_size",
        "2",
        "--gradient_accumulation_steps",
        "1",
        "--learning_rate",
        "1e-2",
    ]
    train += ["--mixed_precision", "no", "--gradient_checkpointing", "true", "--checkpointing_steps", "10"]
    train += ["--validation_steps", "10", "--validation_inference_steps", "2", "--report_to", "tensorboard"]
    run([*train, "--max_train_steps", "10"])
    with HubServer() as hub:
        publish = ["--push_to_hub", "true", "--hub_model_id", "tester/id-lora", "--hub_token", "write"]
        publish += ["--push_checkpoints", "true"]
        resumed = run(
            [*train, "--max_train_steps", "20", "--resume_from_checkpoint", "latest", *publish],
            HF_ENDPOINT=hub.endpoint,
            HF_HUB_OFFLINE="0",
            HF_HOME=str(tmp_path / "hub"),
            HF_HUB_DISABLE_XET="1",
        )
        assert "10/20" in resumed.stderr
        published = set(hub.repositories["tester/id-lora"].files)
    assert {"README.md", "pytorch_lora_weights.safetensors", "guider_config.json", "loss.png"} <= published
    assert any(name.endswith(".mp4") for name in published)
    checkpoints = {name for name in published if "checkpoint" in name}
    assert checkpoints == {"checkpoint-20/pytorch_lora_weights.safetensors", "checkpoint-20/guider_config.json"}
    assert not any(name.endswith((".bin", ".pkl", "trainer_state.json")) for name in published)

    validated = [json.loads(line)["step"] for line in (output / "validation.jsonl").read_text().splitlines()]
    assert validated == [10, 20]
    with safe_open(output / "pytorch_lora_weights.safetensors", "pt") as file:
        block = json.loads(file.metadata()["idlora"])
    assert block["generation"] == "ltx-2.3" and block["steps"] == 20
    assert block["recommended"] == {"identity_guidance_scale": 3.0}

    pipe = LTX2IDLoRAPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 32}
    arguments |= {"reference_audio": clips / "0.mp4", "output_type": "latent"}
    before = pipe("a", generator=torch.Generator().manual_seed(0), **arguments)
    pipe.load_lora_weights(output)
    assert pipe.recommended_identity_guidance_scale == 3.0
    after = pipe("a", generator=torch.Generator().manual_seed(0), **arguments)
    assert (after.audio - before.audio).abs().max() > 1e-3
