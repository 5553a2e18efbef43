"""A tiny prepared data set and the training script's usual options, for the training tests."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from diffusers import LTX2VideoTransformer3DModel

from diffusers_idlora.training.arguments import parse_arguments
from diffusers_idlora.training.samples import TrainingSample, save_sample, write_index
from diffusers_idlora.training.trainer import Trainer


SCRIPT = Path(__file__).parents[1] / "examples" / "train_idlora" / "train_idlora_ltx2.py"


def make_samples(root: Path, checkpoint: Path, count: int = 6, num_validation: int = 2, seed: int = 0) -> Path:
    """Random latents in the shapes that a tiny checkpoint takes; two latent shapes, references of several lengths."""
    config = LTX2VideoTransformer3DModel.load_config(checkpoint / "transformer")
    audio_config = json.loads((checkpoint / "audio_vae" / "config.json").read_text())
    channels = audio_config["latent_channels"]
    mel = config["audio_in_channels"] // channels
    if config["use_prompt_embeddings"]:
        text_dims = (config["caption_channels"],) * 2
    else:
        text_dims = (config["cross_attention_dim"], config["audio_cross_attention_dim"])
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    rows = []
    for index in range(count + num_validation):
        shape = (2, 2, 2) if index % 2 else (2, 2, 1)
        sample = TrainingSample(
            video_latents=randn(config["in_channels"], *shape),
            audio_latents=randn(channels, 9, mel),
            reference_latents=(randn(channels, 4 + index % 3, mel),) * (1 + index % 2),
            video_prompt_embeds=randn(8, text_dims[0]),
            audio_prompt_embeds=randn(8, text_dims[1]),
            prompt_attention_mask=torch.ones(8, dtype=torch.uint8),
            frame_rate=25.0,
        )
        file = f"samples/{index:04d}.safetensors"
        (root / "samples").mkdir(parents=True, exist_ok=True)
        save_sample(root / file, sample, {"caption": f"clip {index}"})
        split = "train" if index < count else "validation"
        lengths = [clip.shape[1] for clip in sample.reference_latents]
        rows.append(
            {"file": file, "shape": list(shape), "split": split, "reference_lengths": lengths, "caption": str(index)}
        )
    write_index(root, rows)
    return root


def options(checkpoint: Path, data: Path, output: Path, **changed) -> list[str]:
    """The training script's command line: six steps of batches of two in float32."""
    values = {
        "pretrained_model_name_or_path": checkpoint,
        "instance_data_root": data,
        "output_dir": output,
        "rank": 4,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 6,
        "learning_rate": 1e-2,
        "checkpointing_steps": 2,
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        **changed,
    }
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def loaded_trainer(arguments: list[str]) -> Trainer:
    """A trainer with its model, ready to run."""
    # Accelerate keeps precision and processes for the life of a process; every run is one of its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(parse_arguments(arguments))
    trainer.load_model()
    return trainer


def launch(arguments: list[str], *, processes: int = 1, script: Path = SCRIPT, **popen) -> subprocess.Popen:
    """The training script as a running process, or as several."""
    launcher = [sys.executable]
    if processes > 1:
        # On CPUs `accelerate launch` starts several processes through MPI only; torch's launcher does without it.
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*launcher, str(script), *arguments], env=environment, text=True, **popen)


def losses_of(output: Path) -> list[float]:
    """The losses of a run, step by step."""
    with (output / "loss.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]
