"""A denoiser on a tiny transformer with random inputs, for the tests of the passes of a step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import LTX2VideoTransformer3DModel

from diffusers_idlora.attention_processor import ReferenceAttention, is_first_generation
from diffusers_idlora.denoising import Denoiser, TextContext
from diffusers_idlora.guidance import GuidancePlan, GuidanceScales
from diffusers_idlora.reference import ReferenceBatch


# All five passes.
PLAN = GuidancePlan.from_scales(GuidanceScales(), identity_guidance_scale=3.0)
IDENTITY_ONLY = GuidancePlan.from_scales(
    GuidanceScales(guidance_scale=1.0, stg_scale=0.0, modality_scale=1.0), identity_guidance_scale=3.0
)


class Case:
    """Random inputs of one step for rows with references of the given lengths; 0 is a row without."""

    def __init__(
        self,
        transformer: LTX2VideoTransformer3DModel,
        reference_lengths: Sequence[int] = (5,),
        num_video_tokens: int = 12,
        num_audio_tokens: int = 9,
        seed: int = 0,
    ):
        self.transformer = transformer
        config, generator = transformer.config, torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(shape, generator=generator)

        if config.use_prompt_embeddings:
            text_dims = (config.caption_channels,) * 2
        else:
            text_dims = (config.cross_attention_dim, config.audio_cross_attention_dim)
        rows = len(reference_lengths)
        self.context, self.negative_context = (
            TextContext(randn(rows, 6, text_dims[0]), randn(rows, 6, text_dims[1])) for _ in range(2)
        )
        clips = [[randn(length, config.audio_in_channels)] if length else [] for length in reference_lengths]
        self.references = ReferenceBatch.from_clips(clips, transformer.audio_rope)
        self.latents = randn(rows, num_video_tokens, config.in_channels)
        self.audio_latents = randn(rows, num_audio_tokens, config.audio_in_channels)
        self.step = (self.latents, self.audio_latents, torch.tensor(0.7), torch.tensor(700.0))

    @contextmanager
    def denoiser(self, **changed) -> Iterator[Denoiser]:
        rope, rows = self.transformer.rope, len(self.latents)
        clean = torch.zeros(*self.latents.shape[:2], 1)
        clean[:, :4] = 1
        with torch.no_grad(), ReferenceAttention(self.transformer) as attention:
            fields = {
                "transformer": self.transformer,
                "attention": attention,
                "context": self.context,
                "negative_context": self.negative_context,
                "references": self.references,
                "video_positions": rope.prepare_video_coords(rows, self.latents.shape[1] // 4, 2, 2, "cpu", fps=25.0),
                "audio_positions": self.transformer.audio_rope.prepare_audio_coords(
                    rows, self.audio_latents.shape[1], "cpu"
                ),
                "conditioning_mask": clean,
                "use_cross_timestep": not is_first_generation(self.transformer),
                "stg_blocks": (1,),
            }
            yield Denoiser(**{**fields, **changed})

    def run_passes(self, passes, **changed) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with self.denoiser(**changed) as denoiser:
            return denoiser.run_passes(passes, *self.step)

    def predict(self, plan: GuidancePlan = PLAN, **changed) -> tuple[torch.Tensor, torch.Tensor]:
        with self.denoiser(**changed) as denoiser:
            return denoiser.predict(plan, *self.step)
