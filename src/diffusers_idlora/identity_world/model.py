"""A transformer of the real class, small enough for the identity world, and how it generates."""

from dataclasses import dataclass, field

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import calculate_shift

from ..attention_processor import ReferenceAttention
from ..denoising import Denoiser
from ..guidance import NO_REFERENCE, GuidancePlan, GuidanceTerm
from ..reference import ReferenceBatch, reference_positions
from ..training.objective import SHIFT_TOKENS, SHIFTS, clean_video_tokens
from .world import AUDIO_CHANNELS, AUDIO_TEXT_WIDTH, FRAME_RATE, LATENT_SIZE, VIDEO_CHANNELS, VIDEO_TEXT_WIDTH, Scenes


PLACEMENTS = ("negative", "overlapping")

_HEADS = 4


def build_transformer(seed: int) -> LTX2VideoTransformer3DModel:
    """
    Makes an untrained transformer of LTX-2.3's kind with about a million parameters.

    Args:
        seed (`int`): Of the weights. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LTX2VideoTransformer3DModel(
            in_channels=VIDEO_CHANNELS,
            out_channels=VIDEO_CHANNELS,
            num_attention_heads=_HEADS,
            attention_head_dim=VIDEO_TEXT_WIDTH // _HEADS,
            cross_attention_dim=VIDEO_TEXT_WIDTH,
            audio_in_channels=AUDIO_CHANNELS,
            audio_out_channels=AUDIO_CHANNELS,
            audio_num_attention_heads=_HEADS,
            audio_attention_head_dim=AUDIO_TEXT_WIDTH // _HEADS,
            audio_cross_attention_dim=AUDIO_TEXT_WIDTH,
            caption_channels=AUDIO_TEXT_WIDTH,
            num_layers=4,
            rope_type="split",
            gated_attn=True,
            cross_attn_mod=True,
            audio_gated_attn=True,
            audio_cross_attn_mod=True,
            perturbed_attn=True,
            use_prompt_embeddings=False,
        )


def make_references(
    transformer: LTX2VideoTransformer3DModel, tokens: torch.Tensor, placement: str = "negative"
) -> ReferenceBatch:
    """
    Reference blocks of recordings, which usually lie before the target in time.

    Args:
        transformer (`LTX2VideoTransformer3DModel`): The model, which knows the rates.
        tokens (`torch.Tensor`): The recordings, `[B, tokens, AUDIO_CHANNELS]`.
        placement (`str`, *optional*, defaults to `"negative"`):
            `"negative"` as in the method; `"overlapping"` gives them the target's own positions, which begin at zero,
            and is for comparison only.

    Returns:
        [`ReferenceBatch`]: One block for each row.

    Raises:
        ValueError: If `placement` is unknown.
    """
    rope, (num_rows, length, _) = transformer.audio_rope, tokens.shape
    if placement == "negative":
        positions = reference_positions([length], rope)
    elif placement == "overlapping":
        positions = rope.prepare_audio_coords(1, length, "cpu")
    else:
        raise ValueError(f"`placement` is {placement!r}; give one of {', '.join(PLACEMENTS)}.")
    return ReferenceBatch(tokens, positions.expand(num_rows, -1, -1, -1).clone(), (length,) * num_rows)


@dataclass(frozen=True)
class Sampler:
    """
    How clips are generated: the steps of the pipeline's call with everything but the denoising left out.

    Attributes:
        identity_guidance_scale (`float`): Weight of the difference that the reference makes.
        num_inference_steps (`int`): Steps.
        seed (`int`): Of the noise.
        mask_video_from_reference (`bool`), mask_reference_from_text (`bool`): See [`AttentionRules`].
        options (`dict`): What else the [`Denoiser`] is given.
    """

    identity_guidance_scale: float = 0.0
    num_inference_steps: int = 12
    seed: int = 0
    mask_video_from_reference: bool = False
    mask_reference_from_text: bool = False
    options: dict = field(default_factory=dict)

    @property
    def plan(self) -> GuidancePlan:
        """Identity guidance and nothing else."""
        term = GuidanceTerm(NO_REFERENCE, 0.0, self.identity_guidance_scale)
        return GuidancePlan((term,) if term.is_active else ())

    @torch.no_grad()
    def __call__(
        self, transformer: LTX2VideoTransformer3DModel, scenes: Scenes, references: ReferenceBatch | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Generates the scenes anew from their prompt, their first frame and the references.

        Args:
            transformer (`LTX2VideoTransformer3DModel`): The model, in eval mode.
            scenes ([`Scenes`]): What to say, and the face.
            references ([`ReferenceBatch`], *optional*): The voices.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Video and audio tokens of the shapes of the scenes' own.
        """
        # A scheduler counts its own steps, so each modality has one.
        scheduler, audio_scheduler = (_scheduler(self.num_inference_steps) for _ in range(2))
        with ReferenceAttention(transformer) as attention:
            denoiser = self.denoiser(transformer, attention, scenes, references)
            clean, clean_video = denoiser.conditioning_mask, scenes.video_tokens
            generator = torch.Generator().manual_seed(self.seed)
            video = torch.randn(scenes.video_tokens.shape, generator=generator)
            audio = torch.randn(scenes.audio_tokens.shape, generator=generator)
            video = clean_video * clean + video * (1 - clean)
            for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):
                video_x0, audio_x0 = denoiser.predict(self.plan, video, audio, sigma, timestep)
                video_x0 = clean_video * clean + video_x0 * (1 - clean)
                video = scheduler.step((video - video_x0) / sigma, timestep, video, return_dict=False)[0]
                audio = audio_scheduler.step((audio - audio_x0) / sigma, timestep, audio, return_dict=False)[0]
        return video, audio

    def denoiser(
        self,
        transformer: LTX2VideoTransformer3DModel,
        attention: ReferenceAttention,
        scenes: Scenes,
        references: ReferenceBatch | None,
    ) -> Denoiser:
        """The denoiser of a generation; use it inside of `attention`'s `with` block."""
        num_rows = len(scenes.words)
        clean = clean_video_tokens(torch.ones(num_rows, dtype=torch.bool), LATENT_SIZE)
        settings = {
            "video_positions": transformer.rope.prepare_video_coords(num_rows, *LATENT_SIZE, "cpu", fps=FRAME_RATE),
            "audio_positions": transformer.audio_rope.prepare_audio_coords(
                num_rows, scenes.audio_tokens.shape[1], "cpu"
            ),
            "mask_video_from_reference": self.mask_video_from_reference,
            "mask_reference_from_text": self.mask_reference_from_text,
            **self.options,
        }
        return Denoiser(
            transformer=transformer,
            attention=attention,
            context=scenes.context,
            negative_context=None,
            references=references,
            conditioning_mask=clean[..., None].float(),
            use_cross_timestep=True,
            **settings,
        )


def _scheduler(num_inference_steps: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    # The fixed shift of the released recipe, whatever the clip's size.
    sigmas = torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(SHIFT_TOKENS[1], *SHIFT_TOKENS, *SHIFTS))
    return scheduler
