"""Recorded cases as pipelines and calls; where they come from is said in `fixtures/golden/README.md`."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_idlora import LTX2IDLoRAPipeline, TextContext
from diffusers_idlora.tiny import tiny_components


FOLDER = Path(__file__).parent / "fixtures" / "golden"


@dataclass(frozen=True)
class Recording:
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    @classmethod
    def load(cls, name: str) -> "Recording":
        path = FOLDER / f"{name}.safetensors"
        with safe_open(path, "pt") as file:
            return cls(load_file(path), file.metadata())

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def setting(self, key: str):
        return json.loads(self.metadata[key])

    def with_prefix(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def transformer(self) -> LTX2VideoTransformer3DModel:
        transformer = LTX2VideoTransformer3DModel(**self.setting("config")).eval()
        transformer.load_state_dict(self.with_prefix("transformer."))
        return transformer


def pipeline_for(recording: Recording) -> LTX2IDLoRAPipeline:
    """The recorded transformer between VAEs that have the real latent channels and statistics that show if misused."""
    components = tiny_components(recording.metadata["variant"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        video_config = {**components["vae"].config, "latent_channels": 128}
        audio_config = {**components["audio_vae"].config, "latent_channels": 8, "base_channels": 128, "mel_bins": 64}
        components["vae"] = AutoencoderKLLTX2Video.from_config(video_config).eval()
        components["audio_vae"] = AutoencoderKLLTX2Audio.from_config(audio_config).eval()
        for vae in (components["vae"], components["audio_vae"]):
            vae.latents_mean.copy_(torch.randn(128))
            vae.latents_std.copy_(0.5 + torch.rand(128))
    components["transformer"] = recording.transformer()
    pipe = LTX2IDLoRAPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(recording: Recording, pipe: LTX2IDLoRAPipeline) -> dict:
    """The public call that the recording is of, without its noise levels."""
    scales = recording.setting("scales")
    height, width, num_frames = (recording.setting(key) for key in ("height", "width", "num_frames"))
    video = pipe._unpack_latents(recording["initial_video_tokens"], *pipe._latent_size(height, width, num_frames))
    return {
        "text_context": TextContext(recording["prompt_video"], recording["prompt_audio"]),
        "negative_text_context": TextContext(recording["negative_video"], recording["negative_audio"]),
        "image_latents": denormalize_video(pipe, recording["image_latents"]),
        "reference_latents": denormalize_audio(pipe, recording["reference_latents"]),
        "latents": denormalize_video(pipe, video),
        "audio_latents": denormalize_audio(
            pipe, pipe._unpack_audio_latents(recording["initial_audio_tokens"], 17, num_mel_bins=16)
        ),
        "noise_scale": 0.0,
        "guidance_scale": scales["v"],
        "audio_guidance_scale": scales["a"],
        "identity_guidance_scale": scales["idg"],
        "stg_scale": scales["stg"],
        "modality_scale": scales["bi"],
        "spatio_temporal_guidance_blocks": recording.setting("stg_blocks"),
        "frame_rate": recording.setting("frame_rate"),
        "output_type": "latent",
    }


def denormalize_video(pipe, latents: torch.Tensor) -> torch.Tensor:
    return pipe._denormalize_latents(latents, pipe.vae.latents_mean, pipe.vae.latents_std)


def normalize_video(pipe, latents: torch.Tensor) -> torch.Tensor:
    return pipe._normalize_latents(latents, pipe.vae.latents_mean, pipe.vae.latents_std)


def denormalize_audio(pipe, latents: torch.Tensor) -> torch.Tensor:
    tokens = pipe._pack_audio_latents(latents)
    tokens = pipe._denormalize_audio_latents(tokens, pipe.audio_vae.latents_mean, pipe.audio_vae.latents_std)
    return pipe._unpack_audio_latents(tokens, latents.shape[2], latents.shape[3])


def normalize_audio(pipe, latents: torch.Tensor) -> torch.Tensor:
    tokens = pipe._pack_audio_latents(latents)
    tokens = pipe._normalize_audio_latents(tokens, pipe.audio_vae.latents_mean, pipe.audio_vae.latents_std)
    return pipe._unpack_audio_latents(tokens, latents.shape[2], latents.shape[3])
