"""
How close shared identity guidance comes to the exact one: the difference that the reference makes, at every step.

For each step of an exact run, the cosine and the ratio of norms between `c - r` with `r` from a pass without the
reference and with `r` from the copy in the pass with the reference; with and without the mask that keeps video from
the reference. On random weights this says little about a trained model; `--base` and `--lora` take one.

    python benchmarks/shared_identity.py [--base FOLDER_OR_REPO --lora FILE_OR_REPO --device cuda] [--steps 8]
"""

import argparse
import dataclasses
import json
import sys

import torch

from diffusers_idlora import LTX2IDLoRAPipeline
from diffusers_idlora.demo_assets import demo_voice
from diffusers_idlora.denoising import Denoiser
from diffusers_idlora.guidance import CONDITIONAL, NO_REFERENCE
from diffusers_idlora.tiny import tiny_components


def reference_delta(denoiser: Denoiser, mode: str, *step: torch.Tensor) -> torch.Tensor:
    """`c - r` of the audio at one step, flattened."""
    denoiser = dataclasses.replace(denoiser, identity_guidance_mode=mode)
    groups = [(CONDITIONAL, NO_REFERENCE)] if mode == "shared" else [(CONDITIONAL,), (NO_REFERENCE,)]
    (_, with_reference), (_, without) = (x0 for group in groups for x0 in denoiser.run_passes(group, *step))
    return (with_reference - without).flatten()


def compare(pipe: LTX2IDLoRAPipeline, **arguments) -> list[dict[str, float]]:
    """Cosine and ratio of norms at each step of a call."""
    rows, predict = [], Denoiser.predict

    def compared(denoiser, plan, *step):
        exact, shared = (reference_delta(denoiser, mode, *step) for mode in ("exact", "shared"))
        cosine = torch.cosine_similarity(exact, shared, dim=0)
        rows.append({"cosine": round(cosine.item(), 3), "norm_ratio": round((shared.norm() / exact.norm()).item(), 3)})
        return predict(denoiser, plan, *step)

    Denoiser.predict = compared
    try:
        pipe(**arguments)
    finally:
        Denoiser.predict = predict
    return rows


def main() -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="left out: a tiny model with random weights")
    parser.add_argument("--lora")
    parser.add_argument("--voice", help="a recording; left out, a synthetic one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    if options.base is None:
        pipe = LTX2IDLoRAPipeline(**tiny_components("ltx-2.3"))
        size = {"height": 128, "width": 128, "num_frames": 49, "max_sequence_length": 64}
    else:
        pipe = LTX2IDLoRAPipeline.from_pretrained(options.base, dtype=torch.bfloat16)
        size = {"height": 512, "width": 512, "num_frames": 121}
        if options.lora is not None:
            pipe.load_lora_weights(options.lora)
        pipe.enable_model_cpu_offload(device=options.device)
    pipe.set_progress_bar_config(disable=True)
    arguments = size | {"num_inference_steps": options.steps, "output_type": "latent"}
    arguments |= {"prompt": "[VISUAL]: a face [SPEECH]: hello [SOUNDS]: calm", "generator": torch.Generator()}
    result = {
        "with the mask" if masked else "without the mask": compare(
            pipe,
            reference_audio=options.voice or demo_voice(5.0),
            mask_video_from_reference=masked,
            **arguments,
        )
        for masked in (True, False)
    }
    sys.stdout.write(json.dumps({"base": options.base, "steps": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
