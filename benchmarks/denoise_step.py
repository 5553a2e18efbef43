"""
A denoising step of the pipeline in each of its modes, against the same transformer called bare and against diffusers.

All run in one process, in turns, and medians are compared, so that the machine's mood falls on all alike. A bare step
is the forwards that the pipeline's guidance needs, of diffusers' transformer as it is, on tensors made beforehand.
Steps are timed from callback to callback, so that encoding and the first step stay out.

    python benchmarks/denoise_step.py [--size small|ltx-2.3] [--rounds 10] [--modes sequential,packed] [--compile]

`small` runs on a CPU. `ltx-2.3` has the layers and widths of the released transformer with random weights in bfloat16
at 512 x 512 x 121, and needs a GPU with 80 GB.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import LTX2ConditionPipeline, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from torch.utils.flop_counter import FlopCounterMode
from train_step import SIZES, timed

from diffusers_idlora import LTX2IDLoRAPipeline, TextContext
from diffusers_idlora.demo_assets import demo_voice
from diffusers_idlora.guidance import CONDITIONAL, ISOLATED, NEGATIVE, NO_REFERENCE, PERTURBED
from diffusers_idlora.tiny import tiny_components


STEPS = 4
VIDEOS = {"small": (256, 256, 25), "ltx-2.3": (512, 512, 121)}
VOICE_SECONDS = {"small": 2.0, "ltx-2.3": 5.0}
TEXT_TOKENS = {"small": 64, "ltx-2.3": 1024}
NO_IDENTITY = {"identity_guidance_scale": 0.0}
IDENTITY_ALONE = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}
MODES = {
    "sequential": {},
    "packed": {"guidance_batching": "packed"},
    "auto": {"guidance_batching": "auto"},
    "shared": {"identity_guidance_mode": "shared"},
    "without identity guidance": NO_IDENTITY,
    "shared, alone": IDENTITY_ALONE | {"identity_guidance_mode": "shared"},
    "no guidance at all": IDENTITY_ALONE | NO_IDENTITY,
    "without a reference": {"reference_audio": None},
}
# Rows of the table, each a mode over another.
RATIOS = {
    "sequential / its bare forwards": ("sequential", "bare"),
    "packed / sequential": ("packed", "sequential"),
    "auto / sequential": ("auto", "sequential"),
    "shared / without identity guidance": ("shared", "without identity guidance"),
    "shared / no guidance at all, one pass each": ("shared, alone", "no guidance at all"),
    "without a reference / LTX2ConditionPipeline": ("without a reference", "LTX2ConditionPipeline"),
}


def make_pipeline(size: str, device: str) -> LTX2IDLoRAPipeline:
    """The tiny components around a transformer of the size; nothing is decoded, so the rest does not matter."""
    components = tiny_components("ltx-2.3")
    # The channels of latents are those of the tiny VAEs; they are a sliver of the work.
    sizes = {name: value for name, value in SIZES[size].items() if "channels" not in name}
    config = {name: value for name, value in components["transformer"].config.items() if not name.startswith("_")}
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(device):
        components["transformer"] = LTX2VideoTransformer3DModel(**config | sizes).eval()
        # Only diffusers' own pipeline needs them; ours gets a finished context.
        components["connectors"] = LTX2TextConnectors(**connectors_config(components, SIZES[size])).eval()
    torch.set_default_dtype(torch.float32)
    pipe = LTX2IDLoRAPipeline(**components).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def connectors_config(components: dict, transformer: dict) -> dict:
    """The tiny connectors' configuration, between the tiny text encoder and a transformer of these widths."""
    config = {name: value for name, value in components["connectors"].config.items() if not name.startswith("_")}
    return config | {
        "video_connector_num_attention_heads": transformer["num_attention_heads"],
        "video_connector_attention_head_dim": transformer["attention_head_dim"],
        "video_hidden_dim": transformer["cross_attention_dim"],
        "audio_connector_num_attention_heads": transformer["audio_num_attention_heads"],
        "audio_connector_attention_head_dim": transformer["audio_attention_head_dim"],
        "audio_hidden_dim": transformer["audio_cross_attention_dim"],
    }


def random_context(pipe: LTX2IDLoRAPipeline, size: str) -> TextContext:
    """A prompt of the size's length."""
    config = pipe.transformer.config
    widths = (config.cross_attention_dim, config.audio_cross_attention_dim)
    return TextContext(*(torch.randn(1, TEXT_TOKENS[size], width) for width in widths)).to(
        pipe.device, pipe.transformer.dtype
    )


def step_times(call: Callable[..., object]) -> list[float]:
    """Seconds of every step of a call but the first."""
    ends = []

    def after_step(pipe, step, timestep, tensors):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return {}

    call(num_inference_steps=STEPS, output_type="latent", callback_on_step_end=after_step)
    return [later - earlier for earlier, later in zip(ends, ends[1:])]


def bare_forwards(pipe: LTX2IDLoRAPipeline, call: Callable[..., object]) -> list[dict]:
    """Arguments for diffusers' forwards that do the work of the passes of one step, under its own processors."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    try:
        call(num_inference_steps=STEPS, output_type="latent")
    finally:
        hook.remove()
    passes = (CONDITIONAL, NEGATIVE, NO_REFERENCE, PERTURBED, ISOLATED)
    last_block = [pipe.transformer.config.num_layers - 1]
    return [
        arguments
        | {
            "isolate_modalities": item.isolated,
            "spatio_temporal_guidance_blocks": last_block if item.perturbed else None,
        }
        for item, arguments in zip(passes, seen[-len(passes) :])
    ]


def matrix_rate(device: str) -> float:
    """Measured bfloat16 operations per second of the device, from the product of two large matrices."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [timed(lambda: left @ right) for _ in range(20)][5:]
    return 2 * 8192**3 / statistics.median(times)


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict:
    """All medians and ratios."""
    torch.manual_seed(0)
    pipe = make_pipeline(options.size, options.device)
    if options.compile:
        torch._dynamo.config.recompile_limit = 64
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    height, width, num_frames = VIDEOS[options.size]
    context = random_context(pipe, options.size)
    size = {"height": height, "width": width, "num_frames": num_frames}
    inputs = {"text_context": context, "negative_text_context": context} | size
    inputs["reference_audio"] = demo_voice(VOICE_SECONDS[options.size])
    plain = LTX2ConditionPipeline(**pipe.components)
    plain.set_progress_bar_config(disable=True)
    text = {"prompt": "a", "negative_prompt": "b", "guidance_rescale": 0.0, "audio_guidance_scale": 7.0}
    text |= {"spatio_temporal_guidance_blocks": [pipe.transformer.config.num_layers - 1]}
    text |= {"max_sequence_length": TEXT_TOKENS[options.size]}
    forwards = bare_forwards(pipe, lambda **kwargs: pipe(**inputs, **kwargs))

    def bare_step() -> None:
        for arguments in forwards:
            pipe.transformer(**arguments)

    calls = {name: lambda mode=mode, **kwargs: pipe(**inputs | mode, **kwargs) for name, mode in MODES.items()}
    calls["LTX2ConditionPipeline"] = lambda **kwargs: plain(**text | size, **kwargs)
    chosen = [name for name in calls if not options.modes or name in options.modes.split(",")]
    times = {name: [] for name in ["bare", *chosen]}
    peaks = {}
    for index in range(options.rounds + 1):
        for name in times:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            new = [timed(bare_step) for _ in range(STEPS - 1)] if name == "bare" else step_times(calls[name])
            if torch.cuda.is_available():
                peaks[name] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            # The first round warms up.
            times[name] += new if index else []
    seconds = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "seconds_per_step": {name: round(value, 4) for name, value in seconds.items()},
        "ratios": {
            name: round(seconds[over] / seconds[under], 3)
            for name, (over, under) in RATIOS.items()
            if over in seconds and under in seconds
        },
        "peak_gib": peaks,
    }
    if options.device.startswith("cuda"):
        counter = FlopCounterMode(display=False)
        with counter:
            bare_step()
        rate = matrix_rate(options.device)
        result["bf16_teraflops_measured"] = round(rate / 1e12, 1)
        result["share_of_bf16_rate"] = {
            name: round(counter.get_total_flops() / seconds[name] / rate, 3)
            for name in ("bare", "sequential", "packed")
            if name in seconds
        }
    return result


def main() -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=VIDEOS, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--modes", help="names of modes, separated by commas; left out, all")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    about = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "size": options.size,
        "rounds": options.rounds,
        "compiled": options.compile,
    }
    text = json.dumps(about | measure(options), indent=2)
    sys.stdout.write(text + "\n")
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
