"""One training step as pure functions of tensors: noise levels, noising, the forward, the loss (method section 6)."""

import math
from dataclasses import dataclass, field

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import calculate_shift

from ..attention_processor import AttentionRules, ReferenceAttention, is_first_generation
from ..denoising import TextContext
from ..reference import ReferenceBatch, ReferenceLayout, reference_timesteps


# The shifted logit-normal of the released recipe.
SHIFT_TOKENS, SHIFTS = (1024, 4096), (0.95, 2.05)
STRETCHED_PERCENTILES = (0.005, 0.999)
SMALLEST_SIGMA = 1e-3
UNIFORM_PROBABILITY = 0.1

# Every attention that an audio token takes part in, and the audio feed-forward; nothing that is video alone.
RECIPE_TARGET_MODULES = (
    r".*\.(audio_attn1|audio_attn2|audio_to_video_attn|video_to_audio_attn)\.(to_q|to_k|to_v|to_out\.0)"
    r"|.*\.audio_ff\.net\.(0\.proj|2)"
)


def logit_normal_sigmas(
    num_video_tokens: int,
    normal: torch.Tensor,
    uniform: torch.Tensor,
    uniform_choice: torch.Tensor,
) -> torch.Tensor:
    """
    Noise levels of the training distribution from plain random numbers.

    A logit-normal with standard deviation 1, whose mean grows linearly from 0.95 at 1024 video tokens to 2.05 at 4096,
    is stretched so that its 0.5th and 99.9th percentiles land on 0 and 1; what falls below 0.001 is reflected there.
    One value in ten is replaced by a uniform one.

    Args:
        num_video_tokens (`int`): Tokens of a video, which decide the shift.
        normal (`torch.Tensor`): Standard normal numbers, `[B]`.
        uniform (`torch.Tensor`): Uniform numbers in `[0, 1)`, `[B]`.
        uniform_choice (`torch.Tensor`): Uniform numbers in `[0, 1)` that choose between the two, `[B]`.

    Returns:
        `torch.Tensor`: Noise levels in `[0.001, 1]`, `[B]`.
    """
    mean = calculate_shift(num_video_tokens, *SHIFT_TOKENS, *SHIFTS)
    low, high = (
        1 / (1 + math.exp(-(mean + math.sqrt(2) * torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)).item())))
        for p in STRETCHED_PERCENTILES
    )
    sigmas = (torch.sigmoid(normal + mean) - low) / (high - low)
    sigmas = torch.where(sigmas < SMALLEST_SIGMA, 2 * SMALLEST_SIGMA - sigmas, sigmas).clamp(max=1.0)
    uniform = SMALLEST_SIGMA + (1 - SMALLEST_SIGMA) * uniform
    return torch.where(uniform_choice < UNIFORM_PROBABILITY, uniform, sigmas)


@dataclass(frozen=True)
class TrainingBatch:
    """
    Clean tokens of a batch and what goes with them, all on one device.

    Attributes:
        video_tokens (`torch.Tensor`): Packed, normalised, `[B, F * h * w, C]`.
        audio_tokens (`torch.Tensor`): Of the target, packed, normalised, `[B, T, C * M]`.
        references (`ReferenceBatch`, *optional*): The voices; rows may be without.
        context (`TextContext`): The captions, after the connectors.
        latent_size (`tuple[int, int, int]`): Frames, height and width of the video latents.
        frame_rate (`float`): In frames per second.
    """

    video_tokens: torch.Tensor
    audio_tokens: torch.Tensor
    references: ReferenceBatch | None
    context: TextContext
    latent_size: tuple[int, int, int]
    frame_rate: float


@dataclass(frozen=True)
class TrainingNoise:
    """
    The random part of a step; one noise level per sample serves both modalities.

    Attributes:
        sigmas (`torch.Tensor`): `[B]`.
        video (`torch.Tensor`), audio (`torch.Tensor`): Standard normal, of the shapes of the tokens.
        first_frame_clean (`torch.Tensor`): Boolean `[B]`: whether the first latent frame is given clean.
    """

    sigmas: torch.Tensor
    video: torch.Tensor
    audio: torch.Tensor
    first_frame_clean: torch.Tensor


@dataclass(frozen=True)
class TrainingLoss:
    """
    The loss of a step and what it was made of.

    Attributes:
        video (`torch.Tensor`), audio (`torch.Tensor`): The two terms of every sample, `[B]`.
        video_velocity (`torch.Tensor`): The prediction `[B, S, C]`.
        audio_velocity (`torch.Tensor`): The prediction of reference and target `[B, R + T, C * M]`.
        audio_weight (`float`): Weight of the audio term.
    """

    video: torch.Tensor
    audio: torch.Tensor
    video_velocity: torch.Tensor = field(repr=False)
    audio_velocity: torch.Tensor = field(repr=False)
    audio_weight: float = 1.0

    @property
    def total(self) -> torch.Tensor:
        """Mean over the samples of `video + audio_weight * audio`, a scalar."""
        return (self.video + self.audio_weight * self.audio).mean()


@dataclass(frozen=True)
class Objective:
    """
    What a step minimises; the defaults are the released recipe.

    Attributes:
        mask_video_from_reference (`bool`, defaults to `True`): See [`AttentionRules`].
        mask_reference_from_text (`bool`, defaults to `True`): See [`AttentionRules`].
        audio_loss_weight (`float`, defaults to `1.0`): Weight of the audio term.
    """

    mask_video_from_reference: bool = True
    mask_reference_from_text: bool = True
    audio_loss_weight: float = 1.0

    def __call__(
        self,
        transformer: torch.nn.Module,
        attention: ReferenceAttention,
        batch: TrainingBatch,
        noise: TrainingNoise,
    ) -> TrainingLoss:
        """
        Args:
            transformer (`LTX2VideoTransformer3DModel`):
                The model that is called; it may be wrapped for distributed training.
            attention (`ReferenceAttention`): The processors installed on the model itself.
            batch (`TrainingBatch`): The clean tokens.
            noise (`TrainingNoise`): The random part.

        Returns:
            [`TrainingLoss`]: With gradients.
        """
        model: LTX2VideoTransformer3DModel = attention.transformer
        device, dtype = batch.video_tokens.device, batch.context.video_embeds.dtype
        num_rows, num_target_tokens, _ = batch.audio_tokens.shape
        clean = clean_video_tokens(noise.first_frame_clean, batch.latent_size)
        audio_sigmas = noise.sigmas[:, None, None]
        video_sigmas = audio_sigmas * ~clean[..., None]
        audio = add_noise(batch.audio_tokens, noise.audio, audio_sigmas)
        audio_positions = model.audio_rope.prepare_audio_coords(num_rows, num_target_tokens, device)
        references, num_references, lengths = batch.references, 0, (0,) * num_rows
        if references is not None:
            num_references, lengths = references.num_tokens, references.lengths
            audio = torch.cat([references.tokens.to(audio), audio], dim=1)
            audio_positions = torch.cat([references.positions.to(device), audio_positions], dim=2)
        attention.apply(
            AttentionRules(
                ReferenceLayout(lengths, num_references, num_target_tokens),
                mask_video_from_reference=self.mask_video_from_reference,
                mask_reference_from_text=self.mask_reference_from_text,
            ),
            device,
            dtype,
        )
        timesteps = noise.sigmas * model.config.timestep_scale_multiplier
        video_velocity, audio_velocity = transformer(
            hidden_states=add_noise(batch.video_tokens, noise.video, video_sigmas).to(dtype),
            audio_hidden_states=audio.to(dtype),
            encoder_hidden_states=batch.context.video_embeds,
            audio_encoder_hidden_states=batch.context.audio_embeds,
            encoder_attention_mask=batch.context.attention_mask,
            audio_encoder_attention_mask=batch.context.attention_mask,
            timestep=timesteps[:, None] * ~clean,
            audio_timestep=reference_timesteps(timesteps, num_references, num_target_tokens),
            sigma=timesteps,
            audio_sigma=timesteps,
            video_coords=model.rope.prepare_video_coords(num_rows, *batch.latent_size, device, fps=batch.frame_rate),
            audio_coords=audio_positions,
            use_cross_timestep=not is_first_generation(model),
            return_dict=False,
        )
        # The target is the velocity from the clean tokens to the noise.
        video_error = (video_velocity.float() - (noise.video - batch.video_tokens).float()).square().mean(dim=-1)
        audio_target = (noise.audio - batch.audio_tokens).float()
        audio_error = (audio_velocity[:, num_references:].float() - audio_target).square()
        return TrainingLoss(
            # Per sample, so that neither gradient accumulation nor the number of processes changes the sum.
            video=(video_error * ~clean).sum(dim=1) / (~clean).sum(dim=1),
            audio=audio_error.mean(dim=(1, 2)),
            video_velocity=video_velocity,
            audio_velocity=audio_velocity,
            audio_weight=self.audio_loss_weight,
        )


def add_noise(tokens: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """`(1 - sigma) * tokens + sigma * noise`, with `sigmas` of a shape that broadcasts."""
    return (1 - sigmas) * tokens + sigmas * noise


def clean_video_tokens(first_frame_clean: torch.Tensor, latent_size: tuple[int, int, int]) -> torch.Tensor:
    """
    Boolean `[B, F * h * w]`: True on the tokens of the first latent frame where it is given clean.

    Args:
        first_frame_clean (`torch.Tensor`): Boolean `[B]`.
        latent_size (`tuple[int, int, int]`): Frames, height and width of the video latents.
    """
    frames, height, width = latent_size
    in_first_frame = torch.arange(frames * height * width, device=first_frame_clean.device) < height * width
    return first_frame_clean[:, None] & in_first_frame
