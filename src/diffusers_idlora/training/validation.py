"""Does the adapter use the voice? Losses on held-out samples with and without the reference, and videos."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2ConditionPipeline

from ..attention_processor import ReferenceAttention
from ..denoising import TextContext
from ..media import write_video
from ..pipeline_ltx2_idlora import LTX2IDLoRAPipeline
from .batches import SampleDraw, collate, stack_contexts
from .objective import Objective
from .samples import TrainingSample


VALIDATION_SIGMAS = (0.2, 0.4, 0.6, 0.8, 0.95)
VALIDATION_SEED = 0
WITHOUT_NEGATIVE_PROMPT = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}


@torch.no_grad()
def validation_losses(
    attention: ReferenceAttention,
    objective: Objective,
    samples: Sequence[TrainingSample],
    device: torch.device | str,
    dtype: torch.dtype,
) -> dict[str, float]:
    """
    Losses at fixed noise levels with fixed noise, so that values of different steps and runs can be compared.

    Args:
        attention (`ReferenceAttention`): The processors installed on the model.
        objective (`Objective`): What is trained.
        samples (`Sequence[TrainingSample]`): Held-out samples.
        device (`torch.device`): Where to run.
        dtype (`torch.dtype`): What the base computes in.

    Returns:
        `dict[str, float]`: `validation_loss`, `validation_audio_loss`, `validation_audio_loss_without_reference`, and
        `validation_reference_gain`, how much smaller the audio loss is with the reference: above 0, the adapter uses
        the voice.
    """
    transformer = attention.transformer
    was_training = transformer.training
    transformer.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for row, sample in enumerate(samples):
        for sigma in VALIDATION_SIGMAS:
            losses = []
            for dropout in (0.0, 1.0):
                # The draw's noise is used up by collating, so each of the two gets a fresh, equal one.
                draw = SampleDraw.of(VALIDATION_SEED, 0, row)
                batch, noise = collate(
                    [sample], [draw], transformer.audio_rope, device, dtype, dropout, first_frame_conditioning_p=1.0
                )
                noise = replace(noise, sigmas=torch.full_like(noise.sigmas, sigma))
                losses.append(objective(transformer, attention, batch, noise))
            with_reference, without = losses
            values = (with_reference.total, with_reference.audio.mean(), without.audio.mean())
            sums += torch.stack([value.double().cpu() for value in values])
    transformer.train(was_training)
    loss, audio, without = (sums / (len(samples) * len(VALIDATION_SIGMAS))).tolist()
    return {
        "validation_loss": loss,
        "validation_audio_loss": audio,
        "validation_audio_loss_without_reference": without,
        "validation_reference_gain": without - audio,
    }


def load_validation_pipeline(
    base: str | Path,
    transformer: torch.nn.Module,
    dtype: torch.dtype,
    revision: str | None = None,
    variant: str | None = None,
) -> LTX2IDLoRAPipeline:
    """The pipeline around the model in training; captions are prepared, so neither text encoder nor connectors."""
    without_text = {"text_encoder": None, "tokenizer": None, "connectors": None}
    pipe = LTX2IDLoRAPipeline.from_pretrained(
        base, revision=revision, variant=variant, transformer=transformer, dtype=dtype, **without_text
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def validation_videos(
    pipe: LTX2IDLoRAPipeline,
    samples: Sequence[TrainingSample],
    folder: Path | None,
    num_inference_steps: int,
    identity_guidance_scale: float,
    negative_context: TextContext | None = None,
) -> list[Path]:
    """
    Generates each held-out sample from its caption, first frame and reference, with the training's own pipeline.

    With a negative prompt that is the released recipe, of five passes per step. Without one there can be no text
    guidance; spatio-temporal and modality guidance are off too then, which leaves two passes.

    Args:
        pipe (`LTX2IDLoRAPipeline`): From [`load_validation_pipeline`].
        samples (`Sequence[TrainingSample]`): Held-out samples.
        folder (`pathlib.Path`, *optional*):
            Where `0.mp4`, `1.mp4`, ... are written; `None` in a process that only computes its part.
        num_inference_steps (`int`): Denoising steps.
        identity_guidance_scale (`float`): Scale of identity guidance.
        negative_context (`TextContext`, *optional*): The negative prompt, of one row.

    Returns:
        `list[pathlib.Path]`: The videos.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    was_training = pipe.transformer.training
    pipe.transformer.eval()
    device, dtype = pipe.transformer.device, pipe.vae.dtype
    if negative_context is None:
        guidance = WITHOUT_NEGATIVE_PROMPT
    else:
        guidance = {"negative_text_context": negative_context.to(device, dtype)}
    for component in (pipe.vae, pipe.audio_vae, pipe.vocoder):
        component.to(device)
    paths = []
    for index, sample in enumerate(samples):
        output = pipe(
            text_context=stack_contexts([sample], device, dtype),
            image_latents=denormalize_video(sample.video_latents[None, :, :1].float(), pipe.vae),
            reference_latents=denormalize_audio(sample.reference_latents[0][None].float(), pipe.audio_vae),
            height=sample.video_latents.shape[2] * pipe.vae_spatial_compression_ratio,
            width=sample.video_latents.shape[3] * pipe.vae_spatial_compression_ratio,
            num_frames=(sample.video_latents.shape[1] - 1) * pipe.vae_temporal_compression_ratio + 1,
            frame_rate=sample.frame_rate,
            num_inference_steps=num_inference_steps,
            identity_guidance_scale=identity_guidance_scale,
            **guidance,
            generator=torch.Generator().manual_seed(VALIDATION_SEED),
        )
        if folder is None:
            continue
        path = folder / f"{index}.mp4"
        write_video(
            path,
            output.frames[0],
            sample.frame_rate,
            output.audio[0].float().cpu(),
            pipe.vocoder.config.output_sampling_rate,
            metadata={"comment": "Synthetic media: generated while training an ID-LoRA."},
        )
        paths.append(path)
    for component in (pipe.vae, pipe.audio_vae, pipe.vocoder):
        component.to("cpu")
    pipe.transformer.train(was_training)
    return paths


def denormalize_video(latents: torch.Tensor, vae: AutoencoderKLLTX2Video) -> torch.Tensor:
    """Normalised video latents `[B, C, F, h, w]` as the pipeline takes them."""
    return LTX2ConditionPipeline._denormalize_latents(
        latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )


def denormalize_audio(latents: torch.Tensor, audio_vae: AutoencoderKLLTX2Audio) -> torch.Tensor:
    """Normalised audio latents `[B, C, L, M]` as the pipeline takes them; the statistics are per packed feature."""
    tokens = LTX2ConditionPipeline._denormalize_audio_latents(
        LTX2ConditionPipeline._pack_audio_latents(latents), audio_vae.latents_mean, audio_vae.latents_std
    )
    return LTX2ConditionPipeline._unpack_audio_latents(tokens, latents.shape[2], num_mel_bins=latents.shape[3])
