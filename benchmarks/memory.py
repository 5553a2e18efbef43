"""
Peak memory of a clip in each way of fitting the models into memory, each in a process of its own.

On a GPU that of the GPU, as torch counts it; on a CPU that of the process, of which the libraries alone take most.
Weights are random, so only memory and seconds mean anything.

    python benchmarks/memory.py [--size tiny|ltx-2.3] [--device cuda] [--modes "none; group"] [--output table.json]

`tiny` runs on a CPU. `ltx-2.3` has the layers and widths of the released transformer and text encoder in bfloat16
(about 65 GB in main memory and in the folder `TMPDIR`), and needs a GPU; connectors, VAEs and vocoder stay tiny there,
so decoding is not measured at that size.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from train_step import SIZES as TRANSFORMER_SIZES

from diffusers_idlora.tiny import save_tiny_adapter, save_tiny_checkpoint, tiny_components


MODES = {
    "none": {},
    "none, tiles": {"vae_tiling": True},
    "none, torchao_int8": {"quantize": "torchao_int8"},
    "none, torchao_fp8": {"quantize": "torchao_fp8"},
    "none, fp8_casting": {"quantize": "fp8_casting"},
    "none, fp8_casting of both": {"quantize": "fp8_casting", "quantize_text_encoder": "fp8_casting"},
    "none, bnb_8bit": {"quantize": "bnb_8bit"},
    "none, bnb_4bit": {"quantize": "bnb_4bit"},
    "model": {"offload": "model"},
    "model, torchao_int8": {"offload": "model", "quantize": "torchao_int8"},
    "model, fp8_casting of both": {
        "offload": "model",
        "quantize": "fp8_casting",
        "quantize_text_encoder": "fp8_casting",
    },
    "group": {"offload": "group", "stream": False},
    "group, stream": {"offload": "group", "stream": True},
    "group, stream, fp8_casting": {"offload": "group", "stream": True, "quantize": "fp8_casting"},
    "group, stream, torchao_int8": {"offload": "group", "stream": True, "quantize": "torchao_int8"},
    "sequential": {"offload": "sequential"},
}
# Gemma 3 12B, whose hidden states the connectors read.
TEXT_ENCODER = {
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
}
CLIPS = {
    "tiny": {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 64},
    "ltx-2.3": {"height": 512, "width": 512, "num_frames": 121, "max_sequence_length": 1024},
}


def config_of(model: torch.nn.Module, **changes) -> dict:
    """The arguments of a diffusers model's class, some of them changed."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")} | changes


def prepare(folder: Path, size: str, device: str) -> None:
    """A checkpoint of the size with random weights, and an adapter of rank 128 or, for a tiny model, of rank 4."""
    base = save_tiny_checkpoint(folder / "base", "ltx-2.3")
    components = tiny_components("ltx-2.3")
    transformer = components["transformer"]
    if size == "ltx-2.3":
        dtype = torch.bfloat16
        torch.set_default_dtype(dtype)
        with torch.device(device):
            # The VAEs stay tiny, so the channels of the latents are theirs.
            sizes = {name: value for name, value in TRANSFORMER_SIZES[size].items() if "channels" not in name}
            transformer = LTX2VideoTransformer3DModel(**config_of(transformer, **sizes))
            transformer.save_pretrained(base / "transformer")
            text_config = components["text_encoder"].config
            language = text_config.text_config
            text_config.text_config = type(language)(**language.to_dict() | TEXT_ENCODER | {"layer_types": None})
            text_encoder = type(components["text_encoder"])(text_config)
            # Or the tiny weights would be left beside the shards of these, and be preferred to them.
            shutil.rmtree(base / "text_encoder")
            text_encoder.save_pretrained(base / "text_encoder")
            connectors = LTX2TextConnectors(**connectors_config(components["connectors"]))
            connectors.save_pretrained(base / "connectors")
        torch.set_default_dtype(torch.float32)
    save_tiny_adapter(folder / "lora.safetensors", transformer, rank=128 if size == "ltx-2.3" else 4)


def connectors_config(connectors: torch.nn.Module) -> dict:
    """The tiny connectors between a text encoder and a transformer of the real widths."""
    transformer = TRANSFORMER_SIZES["ltx-2.3"]
    widths = {
        "caption_channels": TEXT_ENCODER["hidden_size"],
        "text_proj_in_factor": TEXT_ENCODER["num_hidden_layers"] + 1,
        "video_connector_num_attention_heads": transformer["num_attention_heads"],
        "video_connector_attention_head_dim": transformer["attention_head_dim"],
        "audio_connector_num_attention_heads": transformer["audio_num_attention_heads"],
        "audio_connector_attention_head_dim": transformer["audio_attention_head_dim"],
        "video_hidden_dim": transformer["cross_attention_dim"],
        "audio_hidden_dim": transformer["audio_cross_attention_dim"],
    }
    return config_of(connectors, **{name: value for name, value in widths.items() if name in connectors.config})


def measure(folder: Path, size: str, device: str, mode: str) -> dict:
    """Makes one clip of two steps with all guidance in this process; returns its peak memory and seconds."""
    from diffusers_idlora.demo_assets import demo_face, demo_voice
    from diffusers_idlora.generation import load_models
    from diffusers_idlora.settings import ModelSettings

    models = ModelSettings(
        base=str(folder / "base"), lora=str(folder / "lora.safetensors"), device=device, **MODES[mode]
    )
    models.check()
    pipe = load_models(models)
    loaded = peak_gib(device)
    arguments = {
        "prompt": "A face looks into the camera.",
        "image": demo_face(512),
        "reference_audio": demo_voice(5.0),
        "num_inference_steps": 2,
        "output_type": "latent" if size == "ltx-2.3" else "pil",
    }
    started = time.perf_counter()
    pipe(**arguments, **CLIPS[size])
    return {"peak_gib": peak_gib(device), "after_loading_gib": loaded, "seconds": time.perf_counter() - started}


def peak_gib(device: str) -> float:
    """The most memory so far: of the GPU, or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    # In KiB, but on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def measured_apart(folder: Path, options: argparse.Namespace, mode: str) -> dict:
    """One row of the table, from a process of its own."""
    arguments = ["--size", options.size, "--device", options.device, "--folder", str(folder), "--modes", mode]
    result = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        return {"mode": mode, "not_measured": reason}
    return {"mode": mode, **json.loads(result.stdout.splitlines()[-1])}


def markdown(table: dict) -> str:
    """The table as it stands in the docs."""
    lines = [
        f"{table['size']}, {table['device']}, {table['date']}",
        "",
        "| mode | peak GiB | after loading | seconds |",
        "|---|---|---|---|",
    ]
    for row in table["rows"]:
        cells = [f"{row[name]:.2f}" for name in ("peak_gib", "after_loading_gib", "seconds") if name in row]
        lines.append(f"| {row['mode']} | {' | '.join(cells) or 'not measured: ' + row['not_measured'] + ' | | '} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures each mode and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=CLIPS, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", help=f"Separated by semicolons; by default all: {'; '.join(MODES)}.")
    parser.add_argument("--output", type=Path, help="Where the table is put as JSON, too.")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    modes = options.modes.split(";") if options.modes else list(MODES)
    modes = [mode.strip() for mode in modes]
    if unknown := [mode for mode in modes if mode not in MODES]:
        parser.error(f"--modes has {unknown}; the modes are {'; '.join(MODES)}.")
    if options.size == "ltx-2.3" and not options.device.startswith("cuda"):
        parser.error("--size ltx-2.3 needs a GPU.")
    if options.folder is not None:
        sys.stdout.write(json.dumps(measure(options.folder, options.size, options.device, modes[0])) + "\n")
        return
    is_gpu = options.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if is_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    table = {"size": options.size, "device": machine, "date": datetime.date.today().isoformat(), "rows": []}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options.size, options.device)
        if is_gpu:
            torch.cuda.empty_cache()
        for mode in modes:
            table["rows"].append(measured_apart(Path(name), options, mode))
            sys.stderr.write(json.dumps(table["rows"][-1]) + "\n")
    if options.output is not None:
        options.output.write_text(json.dumps(table, indent=2) + "\n")
    sys.stdout.write(markdown(table))


if __name__ == "__main__":
    main()
