"""One process of several that share the passes of each step; `test_guidance_parallel.py` starts them."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from denoising_case import PLAN, Case
from diffusers_idlora import LTX2IDLoRATwoStagePipeline
from diffusers_idlora.denoising import PassPacking
from diffusers_idlora.parallel import guidance_group
from diffusers_idlora.tiny import tiny_components, tiny_latent_upsampler


SETTINGS = {
    "sequential": {},
    "packed": {"passes_per_forward": PassPacking(None, halve_on_out_of_memory=True)},
    "shared": {"identity_guidance_mode": "shared", "mask_video_from_reference": True},
}


def run_steps(case, **fields) -> tuple[torch.Tensor, torch.Tensor]:
    latents, audio = case.latents, case.audio_latents
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.0])
    with case.denoiser(**fields) as denoiser:
        for sigma, following in zip(sigmas, sigmas[1:]):
            video_x0, audio_x0 = denoiser.predict(PLAN, latents, audio, sigma, sigma * 1000)
            latents = latents + (following - sigma) * (latents - video_x0) / sigma
            audio = audio + (following - sigma) * (audio - audio_x0) / sigma
    return latents, audio


def differs_between_processes(tensors) -> bool:
    mine = torch.cat([tensor.flatten() for tensor in tensors])
    first = mine.clone()
    dist.broadcast(first, src=0)
    differences = torch.tensor([not torch.equal(first, mine)], dtype=torch.int32)
    dist.all_reduce(differences)
    return bool(differences.item())


def failure_of(case, parallel) -> str:
    """What a step ends in whose pass with a perturbation, the last but one, fails wherever it runs."""

    def fail(module, args, kwargs):
        if case.transformer.transformer_blocks[1].attn1.processor.edit.all_pass_values:
            raise FloatingPointError("of this process")

    hook = case.transformer.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        case.predict(parallel=parallel)
    except (FloatingPointError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        hook.remove()
    return "nothing"


def differs_after_two_stages() -> bool:
    """Whether processes that draw noise of their own end in clips of their own."""
    pipe = LTX2IDLoRATwoStagePipeline(**tiny_components("ltx-2.3"), latent_upsampler=tiny_latent_upsampler())
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        "hello",
        height=128,
        width=128,
        num_frames=9,
        num_inference_steps=2,
        max_sequence_length=16,
        distilled_adapter=None,
        guidance_parallel=True,
        generator=torch.Generator().manual_seed(dist.get_rank()),
        output_type="latent",
    )
    return differs_between_processes([output.frames, output.audio])


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    case = Case(tiny_components("ltx-2.3")["transformer"], (5, 3))
    parallel = guidance_group(case.transformer)
    report = {"settings": {}}
    for name, fields in SETTINGS.items():
        alone, forwards = run_steps(case, **fields), []
        hook = case.transformer.register_forward_pre_hook(lambda *_, seen=forwards: seen.append(None))
        together = run_steps(case, **fields, parallel=parallel)
        hook.remove()
        report["settings"][name] = {
            "forwards": len(forwards),
            "difference": max((one - other).abs().max().item() for one, other in zip(alone, together)),
            "differs_between_processes": differs_between_processes(together),
        }
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(parallel.rank)).T
    shared = parallel.same_everywhere(noise)
    report["noise_differs"] = differs_between_processes([noise])
    report["shared_noise_differs"] = differs_between_processes([shared])
    report["failure"] = failure_of(case, parallel)
    report["goes_on"] = not differs_between_processes(case.predict(parallel=parallel))
    report["two_stages_differ"] = differs_after_two_stages()
    (folder / f"{parallel.rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
