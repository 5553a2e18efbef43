"""Runs the passes that a step needs: one by one, or several packed into one forward."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import LTX2VideoTransformer3DModel
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.utils import logging

from .attention_processor import AttentionRules, ReferenceAttention
from .guidance import CONDITIONAL, NO_REFERENCE, GuidancePass, GuidancePlan
from .parallel import GuidanceParallel, Predictions
from .reference import ReferenceBatch, ReferenceLayout, reference_timesteps


logger = logging.get_logger(__name__)

IDENTITY_GUIDANCE_MODES = ("exact", "shared")

# Accelerators do about 300 bf16 operations in the time that they read one byte of a weight (H100: 990 TFLOP/s at
# 3.35 TB/s), so a forward of fewer tokens than about that mostly waits for its weights, and more rows are nearly free.
SMALL_ROW_TOKENS = 512


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


def auto_passes_per_forward(
    transformer: LTX2VideoTransformer3DModel, num_tokens_per_row: int, num_passes: int
) -> int | None:
    """
    How many passes to pack into one forward where the caller does not say: all of them if the weights are moved to the
    device anew in every forward, or if reading them takes longer than computing; one otherwise.

    Args:
        transformer (`LTX2VideoTransformer3DModel`): The model.
        num_tokens_per_row (`int`): Video and audio tokens of one pass, all samples together.
        num_passes (`int`): Passes of a step.

    Returns:
        `int`, *optional*: `None` is all.
    """
    if num_passes > 1 and (streams_weights(transformer) or num_tokens_per_row <= SMALL_ROW_TOKENS):
        return None
    return 1


def streams_weights(transformer: LTX2VideoTransformer3DModel) -> bool:
    """
    Whether every forward moves the weights to the device: group offload, or accelerate's sequential offload. Model
    offload does not count, under which the transformer stays on the device over all steps.
    """
    if _is_group_offload_enabled(transformer):
        return True
    hooks = [getattr(module, "_hf_hook", None) for module in transformer.modules()]
    hooks += [part for hook in hooks if isinstance(hook, SequentialHook) for part in hook.hooks]
    return any(isinstance(hook, AlignDevicesHook) and hook.offload for hook in hooks)


@dataclass
class PassPacking:
    """
    How many passes of a step share one forward. It lives as long as a call, so that what was learned stays.

    Attributes:
        passes_per_forward (`int`, *optional*, defaults to `1`): As many; `None` is all.
        halve_on_out_of_memory (`bool`, defaults to `False`):
            Whether a forward that finds no memory is tried again, and all later ones run, with half as many.
    """

    passes_per_forward: int | None = 1
    halve_on_out_of_memory: bool = False

    def halve(self, error: RuntimeError, count: int) -> bool:
        """Whether half as many passes as the `count` that ended in `error` are worth a try; notes it if so."""
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
        if not (self.halve_on_out_of_memory and out_of_memory and count > 1):
            return False
        self.passes_per_forward = count // 2
        logger.info(f"No memory for {count} passes in one forward; going on with {self.passes_per_forward}.")
        return True


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
        audio_conditioning_mask (`torch.Tensor`, *optional*):
            The same of the target's audio tokens, `[B, audio tokens, 1]`; all ones is frozen audio. `None` if all are
            noisy.
        use_cross_timestep (`bool`): See method section 3.
        stg_blocks (`tuple[int, ...]`): Blocks that a perturbed pass perturbs.
        mask_video_from_reference (`bool`): See [`AttentionRules`].
        mask_reference_from_text (`bool`): See [`AttentionRules`].
        attention_kwargs (`dict`, *optional*): Given to the transformer, e.g. `{"scale": 0.5}` for LoRAs.
        passes_per_forward (`int` or [`PassPacking`], *optional*):
            How many passes are packed into one forward; `None` is all.
        identity_guidance_mode (`str`, defaults to `"exact"`):
            `"exact"` runs a pass without the reference. `"shared"` leaves it out, and predicts the audio without the
            reference from a copy of the target tokens in the conditional pass, of which nothing else sees anything.
            An approximation: the copy attends to a video that has seen the target with the reference. That pass's
            video stands in for the one without the reference.
        parallel ([`GuidanceParallel`], *optional*): Shares the passes of a step among processes.
        motion_speed (`float`, defaults to `1.0`):
            What the times in `video_positions` are multiplied by, those of `audio_positions` not.
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
    passes_per_forward: int | PassPacking | None = 1
    audio_conditioning_mask: torch.Tensor | None = None
    identity_guidance_mode: str = "exact"
    parallel: GuidanceParallel | None = None
    motion_speed: float = 1.0

    def __post_init__(self):
        if self.identity_guidance_mode not in IDENTITY_GUIDANCE_MODES:
            raise ValueError(
                f"`identity_guidance_mode` is {self.identity_guidance_mode!r};"
                f" give one of {', '.join(IDENTITY_GUIDANCE_MODES)}."
            )

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
        units = [(item,) for item in plan.passes]
        if self._shares_video(plan.passes):
            # The two run as one row, so they stay together.
            units = [(CONDITIONAL, NO_REFERENCE)]
            units += [(item,) for item in plan.passes if item not in (CONDITIONAL, NO_REFERENCE)]
        step = (latents, audio_latents, sigma, timestep)
        if self.parallel is None:
            return plan.combine(self._run_units(units, *step))
        return plan.combine(
            self.parallel.predict(units, lambda own: self._run_units(own, *step), latents, audio_latents)
        )

    def _run_units(self, units: Sequence[tuple[GuidancePass, ...]], *step: torch.Tensor) -> Predictions:
        """All units, as many per forward as there is memory for."""
        packing = self.passes_per_forward
        if not isinstance(packing, PassPacking):
            packing = PassPacking(packing)
        predictions, done = {}, 0
        while done < len(units):
            pack = units[done : done + (packing.passes_per_forward or len(units))]
            passes = [item for unit in pack for item in unit]
            outputs = None
            try:
                outputs = self.run_passes(passes, *step)
            except RuntimeError as error:
                if not packing.halve(error, len(pack)):
                    raise
            if outputs is None:
                # Only here, where the exception is gone and no longer holds the tensors of the failed forward.
                clear_device_cache(garbage_collection=True)
                continue
            predictions.update(zip(passes, outputs))
            done += len(pack)
        return predictions

    def _shares_video(self, passes: Sequence[GuidancePass]) -> bool:
        """Whether the audio without the reference comes from a copy in the conditional pass."""
        return self.identity_guidance_mode == "shared" and {CONDITIONAL, NO_REFERENCE} <= set(passes)

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
        rows = [item for item in passes if not (item == NO_REFERENCE and self._shares_video(passes))]
        count = len(rows)
        context = TextContext.cat([self.negative_context if item.negative else self.context for item in rows])
        dtype = context.video_embeds.dtype
        timesteps = timestep.expand(count * latents.shape[0])
        layout, audio_tokens, audio_positions, audio_timesteps = self._audio_sequence(
            rows, audio_latents, timesteps, has_copy=count < len(passes)
        )
        self.attention.apply(self._rules(rows, layout), latents.device, dtype)
        # Each kind of pass has a cache of its own: their residuals differ, and so do their audio lengths.
        with self.transformer.cache_context("+".join(item.name for item in passes)):
            video_velocity, audio_velocity = self.transformer(
                hidden_states=latents.to(dtype).repeat(count, 1, 1),
                audio_hidden_states=audio_tokens.to(dtype),
                encoder_hidden_states=context.video_embeds,
                audio_encoder_hidden_states=context.audio_embeds,
                timestep=timesteps[:, None] * (1 - self.conditioning_mask[..., 0]).repeat(count, 1),
                audio_timestep=audio_timesteps,
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
        audio_sigma = sigma if self.audio_conditioning_mask is None else sigma * (1 - self.audio_conditioning_mask)
        end = layout.num_front_tokens
        target, copies = audio_velocity[:, layout.num_reference_tokens : end], audio_velocity[:, end:]
        x0 = {
            item: (latents - video_sigma * video.float(), audio_latents - audio_sigma * audio.float())
            for item, video, audio in zip(rows, video_velocity.chunk(count), target.chunk(count))
        }
        if count < len(passes):
            copy = copies.chunk(count)[rows.index(CONDITIONAL)]
            x0[NO_REFERENCE] = (x0[CONDITIONAL][0], audio_latents - audio_sigma * copy.float())
        return [x0[item] for item in passes]

    def _rules(self, rows: Sequence[GuidancePass], layout: ReferenceLayout) -> AttentionRules:
        """What the attentions of a forward of these passes respect."""
        num_rows = len(layout.lengths) // len(rows)
        audio_visibility = video_visibility = None
        if layout.num_reference_tokens and self.references.turns is not None:
            turns = self.references.turns
            audio_visibility = turns.audio_visibility(self.audio_positions).repeat(len(rows), 1, 1)
            if not self.mask_video_from_reference:
                positions = self.video_positions / self.motion_speed
                video_visibility = turns.video_visibility(positions, layout.num_target_tokens)
                video_visibility = video_visibility.repeat(len(rows), 1, 1)
        return AttentionRules(
            layout,
            perturbed=tuple(item.perturbed for item in rows for _ in range(num_rows)),
            isolated=tuple(item.isolated for item in rows for _ in range(num_rows)),
            stg_blocks=self.stg_blocks,
            mask_video_from_reference=self.mask_video_from_reference,
            mask_reference_from_text=self.mask_reference_from_text,
            audio_visibility=audio_visibility,
            video_visibility=video_visibility,
        )

    def _audio_sequence(
        self, rows: Sequence[GuidancePass], audio_latents: torch.Tensor, timesteps: torch.Tensor, has_copy: bool
    ) -> tuple[ReferenceLayout, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The audio sequences of the passes: their layout, tokens, positions and timesteps."""
        count, (num_rows, num_target_tokens, _) = len(rows), audio_latents.shape
        references = self.references if any(item.reference for item in rows) else None
        no_reference = (0,) * num_rows
        lengths = no_reference if references is None else references.lengths
        layout = ReferenceLayout(
            tuple(length for item in rows for length in (lengths if item.reference else no_reference)),
            0 if references is None else references.num_tokens,
            num_target_tokens,
            num_target_tokens if has_copy else 0,
        )
        mask = self.audio_conditioning_mask
        timesteps = reference_timesteps(
            timesteps,
            layout.num_reference_tokens,
            num_target_tokens,
            None if mask is None else mask.repeat(count, 1, 1),
        )
        tokens, positions = [audio_latents], [self.audio_positions]
        if references is not None:
            tokens.insert(0, references.tokens.to(audio_latents))
            positions.insert(0, references.positions.to(self.audio_positions))
        if has_copy:
            tokens.append(audio_latents)
            positions.append(self.audio_positions)
            timesteps = torch.cat([timesteps, timesteps[:, -num_target_tokens:]], dim=1)
        return (
            layout,
            torch.cat(tokens, dim=1).repeat(count, 1, 1),
            torch.cat(positions, dim=2).repeat(count, 1, 1, 1),
            timesteps,
        )
