"""Stage 2, a finer picture for finished sound, against the reference implementation."""

import pytest
import torch
from diffusers import LTX2ConditionPipeline

from diffusers_idlora import TextContext
from diffusers_idlora.attention_processor import ReferenceAttention
from diffusers_idlora.denoising import Denoiser
from diffusers_idlora.guidance import GuidancePlan
from golden import Recording


@pytest.fixture(scope="module")
def recording():
    return Recording.load("stage2_ltx23")


@torch.no_grad()
def run(recording, is_frozen=True):
    """Video and audio tokens after the recorded steps."""
    transformer = recording.transformer()
    audio = LTX2ConditionPipeline._pack_audio_latents(recording["audio_latents"])
    latents = recording["initial_video_tokens"]
    first_frame = LTX2ConditionPipeline._pack_latents(recording["image_latents"])
    clean = torch.zeros(1, latents.shape[1], 1)
    clean[:, : first_frame.shape[1]] = 1
    sigmas = recording["sigmas"]
    with ReferenceAttention(transformer) as attention:
        denoiser = Denoiser(
            transformer=transformer,
            attention=attention,
            context=TextContext(recording["prompt_video"], recording["prompt_audio"]),
            negative_context=None,
            references=None,
            video_positions=transformer.rope.prepare_video_coords(
                1, *recording["upscaled_video_latents"].shape[2:], "cpu", fps=recording.setting("frame_rate")
            ),
            audio_positions=transformer.audio_rope.prepare_audio_coords(1, audio.shape[1], "cpu"),
            conditioning_mask=clean,
            audio_conditioning_mask=torch.ones(1, audio.shape[1], 1) if is_frozen else None,
            use_cross_timestep=True,
        )
        for sigma, following in zip(sigmas, sigmas[1:]):
            video_x0, audio_x0 = denoiser.predict(GuidancePlan(()), latents, audio, sigma, sigma * 1000)
            video_x0[:, : first_frame.shape[1]] = first_frame
            latents = latents + (following - sigma) * (latents - video_x0) / sigma
            audio = audio + (following - sigma) * (audio - audio_x0) / sigma
    return latents, audio


def test_video_for_frozen_audio_is_the_recorded_one(recording):
    video, audio = run(recording)
    expected = LTX2ConditionPipeline._pack_latents(recording["video_latents"])
    torch.testing.assert_close(video, expected, atol=1e-4, rtol=0)
    assert torch.equal(audio, LTX2ConditionPipeline._pack_audio_latents(recording["final_audio_latents"]))


def test_that_the_audio_is_frozen_is_visible_in_the_recorded_video(recording):
    video, _ = run(recording, is_frozen=False)
    assert (video - LTX2ConditionPipeline._pack_latents(recording["video_latents"])).abs().max() > 1e-2
