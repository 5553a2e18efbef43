"""
The trainer's step against a bare forward, backward and optimizer step of the same model on the same batch.

Both run in one process, one after the other in turns, and medians are compared, so that the machine's mood falls on
both alike. The bare step is diffusers' transformer as it is: its own attention processors, no masks, no clipping, no
log. The trainer's reads its sample from disk, draws noise, applies the masks of the recipe, clips and writes the log.

    python benchmarks/train_step.py [--size small|ltx-2.3] [--steps 30] [--batch-size 1]

`small` runs on a CPU; `ltx-2.3` has the layers and widths of the released model with random weights, and needs a GPU
with 80 GB or more.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import LTX2VideoTransformer3DModel

from diffusers_idlora.attention_processor import ReferenceAttention, is_first_generation
from diffusers_idlora.reference import reference_timesteps
from diffusers_idlora.tiny import save_tiny_checkpoint, tiny_components
from diffusers_idlora.training.arguments import parse_arguments
from diffusers_idlora.training.objective import add_noise
from diffusers_idlora.training.samples import TrainingSample, save_sample, write_index
from diffusers_idlora.training.trainer import LossLog, Trainer


SIZES = {
    "small": {
        "num_layers": 6,
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "cross_attention_dim": 512,
        "audio_num_attention_heads": 8,
        "audio_attention_head_dim": 32,
        "audio_cross_attention_dim": 256,
    },
    "ltx-2.3": {
        "num_layers": 48,
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "cross_attention_dim": 4096,
        "audio_num_attention_heads": 32,
        "audio_attention_head_dim": 64,
        "audio_cross_attention_dim": 2048,
        "in_channels": 128,
        "out_channels": 128,
        "audio_in_channels": 128,
        "audio_out_channels": 128,
    },
}
# Latent frames, height and width, sound and reference; 512 x 512 x 121 at the real size.
SHAPES = {"small": ((4, 8, 8), 25, 25), "ltx-2.3": ((16, 16, 16), 121, 125)}


def prepare(folder: Path, size: str, batch_size: int) -> tuple[Path, Path]:
    """A checkpoint of the size with random weights, and as many random samples as a batch has."""
    base = save_tiny_checkpoint(folder / "base", "ltx-2.3")
    config = {**tiny_components("ltx-2.3")["transformer"].config, **SIZES[size]}
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    dtype = torch.float32 if size == "small" else torch.bfloat16
    with torch.device("cuda" if size == "ltx-2.3" else "cpu"):
        transformer = LTX2VideoTransformer3DModel(**config).to(dtype)
    transformer.save_pretrained(base / "transformer")
    (frames, height, width), audio_length, reference_length = SHAPES[size]
    features = config["audio_in_channels"]
    rows = []
    (folder / "data" / "samples").mkdir(parents=True)
    for index in range(batch_size):
        sample = TrainingSample(
            torch.randn(config["in_channels"], frames, height, width),
            torch.randn(1, audio_length, features),
            (torch.randn(1, reference_length, features),),
            torch.randn(128, config["cross_attention_dim"]),
            torch.randn(128, config["audio_cross_attention_dim"]),
            torch.ones(128, dtype=torch.uint8),
            25.0,
        )
        file = f"samples/{index}.safetensors"
        save_sample(folder / "data" / file, sample, {})
        rows.append({"file": file, "shape": [frames, height, width], "split": "train"})
    write_index(folder / "data", rows)
    return base, folder / "data"


def bare_step(trainer: Trainer, optimizer: torch.optim.Optimizer, batch, noise) -> None:
    """Forward, backward and optimizer step with nothing around them."""
    transformer = trainer.transformer
    rows, num_target, _ = batch.audio_tokens.shape
    num_references = batch.references.num_tokens
    sigmas = noise.sigmas[:, None, None]
    timesteps = noise.sigmas * 1000
    dtype = trainer.weight_dtype
    audio = torch.cat([batch.references.tokens, add_noise(batch.audio_tokens, noise.audio, sigmas)], dim=1)
    positions = transformer.audio_rope.prepare_audio_coords(rows, num_target, audio.device)
    with trainer.accelerator.autocast():
        video_velocity, audio_velocity = transformer(
            hidden_states=add_noise(batch.video_tokens, noise.video, sigmas).to(dtype),
            audio_hidden_states=audio.to(dtype),
            encoder_hidden_states=batch.context.video_embeds,
            audio_encoder_hidden_states=batch.context.audio_embeds,
            timestep=timesteps[:, None].expand(-1, batch.video_tokens.shape[1]),
            audio_timestep=reference_timesteps(timesteps, num_references, num_target),
            sigma=timesteps,
            audio_sigma=timesteps,
            video_coords=transformer.rope.prepare_video_coords(rows, *batch.latent_size, audio.device, fps=25.0),
            audio_coords=torch.cat([batch.references.positions, positions], dim=2),
            use_cross_timestep=not is_first_generation(transformer),
            return_dict=False,
        )
    loss = (video_velocity.float() - (noise.video - batch.video_tokens)).square().mean()
    loss = loss + (audio_velocity[:, num_references:].float() - (noise.audio - batch.audio_tokens)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def timed(step) -> float:
    """Seconds that a step takes, with everything that it started on the accelerator."""
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measures and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, data = prepare(folder, options.size, options.batch_size)
        precision = "no" if options.size == "small" else "bf16"
        arguments = f"--pretrained_model_name_or_path {base} --instance_data_root {data} --output_dir {folder / 'out'}"
        arguments += f" --train_batch_size {options.batch_size} --gradient_accumulation_steps 1 --rank 128"
        arguments += f" --mixed_precision {precision} --gradient_checkpointing {options.size != 'small'}"
        trainer = Trainer(parse_arguments(arguments.split()))
        trainer.load_model()
        batches = trainer._batches(0)
        batch, noise = next(batches)
        bare_optimizer = torch.optim.AdamW(trainer.parameters, lr=1e-6)
        log = LossLog(folder / "loss.csv", 0)

        def step_of_trainer(attention: ReferenceAttention) -> None:
            row = trainer._train_step(attention, batches)
            log.write({"step": 0, "seconds": 0.0, **row})

        times = {"bare": [], "trainer": []}
        for index in range(options.steps + 2):
            seconds = {"bare": timed(lambda: bare_step(trainer, bare_optimizer, batch, noise))}
            # A run installs its processors once, so that is not part of a step.
            with ReferenceAttention(trainer.transformer) as attention:
                seconds["trainer"] = timed(lambda attention=attention: step_of_trainer(attention))
            if index >= 2:
                for kind, value in seconds.items():
                    times[kind].append(value)
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        result = {
            "size": options.size,
            "batch_size": options.batch_size,
            "steps": options.steps,
            "bare_seconds": round(medians["bare"], 4),
            "trainer_seconds": round(medians["trainer"], 4),
            "ratio": round(medians["trainer"] / medians["bare"], 4),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }
        if torch.cuda.is_available():
            result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
