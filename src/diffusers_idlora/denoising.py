"""Runs the passes that a step needs: one by one, or several packed into one forward."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import LTX2VideoTransformer3DModel

from .attention_processor import AttentionRules, ReferenceAttention
from .guidance import GuidancePass, GuidancePlan
from .reference import ReferenceBatch, ReferenceLayout, reference_timesteps


@dataclass(frozen=True)
class TextContext:
    """
    A prompt as the transformer reads it: the output of the text connectors. It stays the same over all steps, and may
    be kept and given to later calls.

    Attributes:
        video_embeds (`torch.Tensor`): What video attends to, `[B, S, video_dim]`.
        audio_embeds (`torch.Tensor`): What audio attends to, `[B, S, audio_dim]`.
        attention_mask (`torch.Tensor`, *optional*): 1 on tokens that count, 0 elsewhere, `[B, S]`; `None` if all do.
    """

    video_embeds: torch.Tensor
    audio_embeds: torch.Tensor
    attention_mask: torch.Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Number of prompts."""
        return self.video_embeds.shape[0]

    def repeat_rows(self, count: int) -> "TextContext":
        """Each row `count` times in a row: `[a, b]` becomes `[a, a, b, b]`."""
        mask = self.attention_mask
        return TextContext(
            self.video_embeds.repeat_interleave(count, dim=0),
            self.audio_embeds.repeat_interleave(count, dim=0),
            None if mask is None else mask.repeat_interleave(count, dim=0),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "TextContext":
        """The same on another device, and the embeddings in another dtype."""
        mask = self.attention_mask
        return TextContext(
            self.video_embeds.to(device, dtype),
            self.audio_embeds.to(device, dtype),
            None if mask is None else mask.to(device),
        )

    def rows(self, start: int, stop: int) -> "TextContext":
        """Some of the prompts."""
        mask = self.attention_mask
        return TextContext(
            self.video_embeds[start:stop], self.audio_embeds[start:stop], None if mask is None else mask[start:stop]
        )

    @staticmethod
    def cat(contexts: Sequence["TextContext"]) -> "TextContext":
        """The rows of several contexts, one after the other."""
        if len(contexts) == 1:
            return contexts[0]
        mask = None
        if any(context.attention_mask is not None for context in contexts):
            mask = torch.cat(
                [
                    context.video_embeds.new_ones(context.video_embeds.shape[:2])
                    if context.attention_mask is None
                    else context.attention_mask.to(context.video_embeds.dtype)
                    for context in contexts
                ]
            )
        return TextContext(
            torch.cat([context.video_embeds for context in contexts]),
            torch.cat([context.audio_embeds for context in contexts]),
            mask,
        )


@dataclass(frozen=True)
class Denoiser:
    """
    The transformer with everything that stays the same over the steps. Use it inside of `attention`'s `with` block.

    Attributes:
        transformer (`LTX2VideoTransformer3DModel`): The model.
        attention (`ReferenceAttention`): The processors installed on it.
        context (`TextContext`): The prompt, `B` rows.
        negative_context (`TextContext`, *optional*): The negative prompt, needed by passes that are `negative`.
        references (`ReferenceBatch`, *optional*): The voices, `B` rows.
        video_positions (`torch.Tensor`): `[B, 3, video tokens, 2]`.
        audio_positions (`torch.Tensor`): Of the target, `[B, 1, audio tokens, 2]`.
        conditioning_mask (`torch.Tensor`): `[B, video tokens, 1]`, 1 on clean video tokens, 0 on noisy ones.
        use_cross_timestep (`bool`): See method section 3.
        stg_blocks (`tuple[int, ...]`): Blocks that a perturbed pass perturbs.
        mask_video_from_reference (`bool`): See [`AttentionRules`].
        mask_reference_from_text (`bool`): See [`AttentionRules`].
        attention_kwargs (`dict`, *optional*): Given to the transformer, e.g. `{"scale": 0.5}` for LoRAs.
        passes_per_forward (`int`, *optional*): How many passes are packed into one forward; `None` is all.
    """

    transformer: LTX2VideoTransformer3DModel
    attention: ReferenceAttention
    context: TextContext
    negative_context: TextContext | None
    references: ReferenceBatch | None
    video_positions: torch.Tensor
    audio_positions: torch.Tensor
    conditioning_mask: torch.Tensor
    use_cross_timestep: bool
    stg_blocks: tuple[int, ...] = ()
    mask_video_from_reference: bool = False
    mask_reference_from_text: bool = False
    attention_kwargs: dict | None = field(default=None, repr=False)
    passes_per_forward: int | None = 1

    def predict(
        self,
        plan: GuidancePlan,
        latents: torch.Tensor,
        audio_latents: torch.Tensor,
        sigma: torch.Tensor,
        timestep: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The guided prediction of one step.

        Args:
            plan (`GuidancePlan`): Which passes, and how they combine.
            latents (`torch.Tensor`): Noisy video tokens, float32, `[B, video tokens, channels]`.
            audio_latents (`torch.Tensor`): Noisy target audio tokens, float32, `[B, audio tokens, channels]`.
            sigma (`torch.Tensor`): The step's noise level, a scalar.
            timestep (`torch.Tensor`): The same as the transformer wants it (times 1000), a scalar.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Video and audio x0, of the shapes of the latents.
        """
        predictions = {}
        count = self.passes_per_forward or len(plan.passes)
        for start in range(0, len(plan.passes), count):
            passes = plan.passes[start : start + count]
            predictions.update(zip(passes, self.run_passes(passes, latents, audio_latents, sigma, timestep)))
        return plan.combine(predictions)

    def run_passes(
        self,
        passes: Sequence[GuidancePass],
        latents: torch.Tensor,
        audio_latents: torch.Tensor,
        sigma: torch.Tensor,
        timestep: torch.Tensor,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        One forward for several passes, as rows of one batch; arguments as for [`~Denoiser.predict`].

        Returns:
            `list[tuple[torch.Tensor, torch.Tensor]]`: Video and audio x0 of each pass, without the reference tokens.
        """
        count, num_rows = len(passes), latents.shape[0]
        context = TextContext.cat([self.negative_context if item.negative else self.context for item in passes])
        dtype = context.video_embeds.dtype
        layout, audio_tokens, audio_positions = self._with_references(passes, audio_latents)
        rules = AttentionRules(
            layout,
            perturbed=tuple(item.perturbed for item in passes for _ in range(num_rows)),
            isolated=tuple(item.isolated for item in passes for _ in range(num_rows)),
            stg_blocks=self.stg_blocks,
            mask_video_from_reference=self.mask_video_from_reference,
            mask_reference_from_text=self.mask_reference_from_text,
        )
        self.attention.apply(rules, latents.device, dtype)
        timesteps = timestep.expand(count * num_rows)
        # Each kind of pass has a cache of its own: their residuals differ, and so do their audio lengths.
        with self.transformer.cache_context("+".join(item.name for item in passes)):
            video_velocity, audio_velocity = self.transformer(
                hidden_states=latents.to(dtype).repeat(count, 1, 1),
                audio_hidden_states=audio_tokens.to(dtype),
                encoder_hidden_states=context.video_embeds,
                audio_encoder_hidden_states=context.audio_embeds,
                timestep=timesteps[:, None] * (1 - self.conditioning_mask[..., 0]).repeat(count, 1),
                audio_timestep=reference_timesteps(timesteps, layout.num_reference_tokens, layout.num_target_tokens),
                sigma=timesteps,
                audio_sigma=timesteps,
                encoder_attention_mask=context.attention_mask,
                audio_encoder_attention_mask=context.attention_mask,
                video_coords=self.video_positions.repeat(count, 1, 1, 1),
                audio_coords=audio_positions,
                use_cross_timestep=self.use_cross_timestep,
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
            )
        # A clean token's own noise level is 0, so its x0 is the token itself.
        video_sigma = sigma * (1 - self.conditioning_mask)
        audio_velocity = audio_velocity[:, layout.num_reference_tokens :]
        return [
            (latents - video_sigma * video.float(), audio_latents - sigma * audio.float())
            for video, audio in zip(video_velocity.chunk(count), audio_velocity.chunk(count))
        ]

    def _with_references(
        self, passes: Sequence[GuidancePass], audio_latents: torch.Tensor
    ) -> tuple[ReferenceLayout, torch.Tensor, torch.Tensor]:
        """The audio sequences of the passes: their layout, tokens and positions."""
        count, (num_rows, num_target_tokens, _) = len(passes), audio_latents.shape
        tokens = audio_latents.repeat(count, 1, 1)
        positions = self.audio_positions.repeat(count, 1, 1, 1)
        if self.references is None or not any(item.reference for item in passes):
            return ReferenceLayout((0,) * (count * num_rows), 0, num_target_tokens), tokens, positions
        references = self.references
        no_reference = (0,) * num_rows
        layout = ReferenceLayout(
            tuple(length for item in passes for length in (references.lengths if item.reference else no_reference)),
            references.num_tokens,
            num_target_tokens,
        )
        return (
            layout,
            torch.cat([references.tokens.to(tokens).repeat(count, 1, 1), tokens], dim=1),
            torch.cat([references.positions.to(positions).repeat(count, 1, 1, 1), positions], dim=2),
        )
