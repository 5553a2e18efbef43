"""What a call of the pipeline was given: what was left out filled in, and the rest checked before any model runs."""

import math
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from diffusers import LTX2ConditionPipeline
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

from .attention_processor import check_text_mask
from .audio import check_resampling
from .continuation import EarlierClip, context_frames
from .denoising import TextContext
from .guidance import GuidanceScales, check_scale
from .inputs import (
    Clip,
    check_choice,
    check_condition_indices,
    check_count,
    check_frames,
    check_latents,
    check_positive,
)
from .media import fit_size
from .recipes import NUM_FRAMES, STG_BLOCK


class LTX2IDLoRAChecks(LTX2ConditionPipeline):
    """The defaults and checks of a call of [`LTX2IDLoRAPipeline`]; they run no model."""

    @property
    def output_sampling_rate(self) -> int | None:
        """That of generated sound, in Hz; `None` without a vocoder."""
        return None if self.vocoder is None else self.vocoder.config.output_sampling_rate

    def default_size(
        self,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        images: list[PIL.Image.Image | None],
        earlier_clips: list[EarlierClip],
        latents: torch.Tensor | None,
    ) -> tuple[int, int, int | None]:
        """
        Height, width and frames, with what was left out filled in: from `latents`, else as the clip that goes on, else
        from the first image's aspect, else 512 x 512; 121 frames, or `None` where a `duration_head` is to predict
        them.
        """
        if (height is None) != (width is None):
            raise ValueError(f"`height` is {height} and `width` is {width}; give both or neither.")
        if isinstance(latents, torch.Tensor) and latents.ndim == 5:
            sizes = [size * self.vae_spatial_compression_ratio for size in latents.shape[3:]]
            frames = (latents.shape[2] - 1) * self.vae_temporal_compression_ratio + 1
            if height is not None and [height, width] != sizes or num_frames not in (None, frames):
                raise ValueError(
                    f"`height`, `width` and `num_frames` are {height}, {width} and {num_frames}, but `latents` are of"
                    f" {sizes[0]}, {sizes[1]} and {frames}; leave them out."
                )
            return *sizes, frames
        if height is None and earlier_clips:
            height, width = (max(32, size // 32 * 32) for size in earlier_clips[0].frames.shape[1:3])
        elif height is None:
            face = next((image for image in images if image is not None), None)
            height, width = (512, 512) if face is None else fit_size(*face.size)
        if num_frames is None and getattr(self, "duration_head", None) is None:
            num_frames = NUM_FRAMES
        return height, width, num_frames

    def trimmed_frames(self, earlier_clips: list[EarlierClip], lead_in: float, frame_rate: float) -> tuple[int, int]:
        """
        Frames that earlier clips give clean, and frames that are generated but not wanted: the context but for its
        last frame, or the lead-in in whole latent frames.
        """
        check_scale("lead_in", lead_in)
        check_positive("frame_rate", frame_rate)
        ratio = self.vae_temporal_compression_ratio
        if not earlier_clips:
            return 0, math.ceil(round(lead_in * frame_rate / ratio, 6)) * ratio
        if lead_in:
            raise ValueError(f"`lead_in` is {lead_in} beside `continue_from`, where speech has begun; leave one out.")
        for clip in earlier_clips:
            check_resampling(clip.sampling_rate, self.audio_sampling_rate, "continue_from")
        num_context_frames = context_frames(earlier_clips, frame_rate, ratio)
        return num_context_frames, num_context_frames - 1

    def generated_frames(
        self, num_frames: int | None, num_trimmed_frames: int, latents: torch.Tensor | None
    ) -> int | None:
        """The frames to generate for `num_frames` to be left; `latents` hold those to be trimmed already."""
        check_frames(num_frames, self.vae_temporal_compression_ratio)
        if num_frames is None or latents is None:
            return None if num_frames is None else num_frames + num_trimmed_frames
        if num_frames <= num_trimmed_frames:
            raise ValueError(
                f"`latents` are of {num_frames} frames, of which {num_trimmed_frames} would be trimmed; give longer"
                " ones."
            )
        return num_frames

    def default_stg_blocks(self, blocks: Sequence[int] | None, scales: GuidanceScales) -> tuple[int, ...]:
        """The blocks that STG perturbs: those given, else the recipe's, or the last one of a smaller model."""
        num_blocks = self.transformer.config.num_layers
        if blocks is None:
            return (min(STG_BLOCK, num_blocks - 1),)
        if not isinstance(blocks, (list, tuple)):
            raise ValueError(f"`spatio_temporal_guidance_blocks` is {blocks!r}; give a list of block numbers.")
        if scales.uses_stg and not blocks:
            raise ValueError(
                f"`spatio_temporal_guidance_blocks` is {blocks}; name at least one block, or set `stg_scale` to 0."
            )
        if not all(isinstance(block, int) and 0 <= block < num_blocks for block in blocks):
            raise ValueError(
                f"`spatio_temporal_guidance_blocks` is {list(blocks)}; this transformer's blocks are 0 to"
                f" {num_blocks - 1}."
            )
        return tuple(blocks)

    def check_inputs(
        self,
        prompt: list[str] | None,
        height: int,
        width: int,
        *,
        num_prompts: int,
        num_frames: int | None,
        frame_rate: float,
        motion_speed: float,
        num_inference_steps: int,
        sigmas: Sequence[float] | None,
        sampler: str | None,
        sigma_shift_tokens: int | None,
        freeze_audio: bool,
        identity_guidance_mode: str,
        noise_scale: float | None,
        num_videos_per_prompt: int,
        max_sequence_length: int,
        text_context: TextContext | None,
        negative_text_context: TextContext | None,
        uses_text_guidance: bool,
        conditions: list[LTX2VideoCondition],
        first_frame: str | None,
        mask_reference_from_text: bool,
        clips: list[list[Clip]],
        turns: list[list[tuple[Clip, float, float]]],
        num_trimmed_frames: int,
        image_crf: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        guidance_batching: str | int,
        latents: torch.Tensor | None = None,
        audio_latents: torch.Tensor | None = None,
        **shared: Any,
    ) -> None:
        """
        Raises a ValueError with the argument, its value and the remedy if a call can't work. `shared` goes to
        [`LTX2ConditionPipeline.check_inputs`]; the other arguments are those of [`~LTX2IDLoRAPipeline.__call__`].
        """
        for name, value in (("frame_rate", frame_rate), ("motion_speed", motion_speed)):
            check_positive(name, value)
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("num_videos_per_prompt", num_videos_per_prompt),
            ("max_sequence_length", max_sequence_length),
            ("height", height),
            ("width", width),
        ):
            check_count(name, value)
        check_choice("sampler", sampler, (None, "euler", "res_2s"))
        if sigma_shift_tokens is not None:
            check_count("sigma_shift_tokens", sigma_shift_tokens)
        check_choice("identity_guidance_mode", identity_guidance_mode, ("exact", "shared"))
        if freeze_audio and audio_latents is None:
            raise ValueError("`freeze_audio` is set without `audio_latents`; give the finished sound's latents.")
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        if isinstance(guidance_batching, str):
            check_choice("guidance_batching", guidance_batching, ("sequential", "packed", "auto"))
        else:
            check_count("guidance_batching", guidance_batching)
        if noise_scale is not None:
            check_scale("noise_scale", noise_scale)
        if image_crf is not None and not (isinstance(image_crf, int) and 0 <= image_crf <= 51):
            raise ValueError(f"`image_crf` is {image_crf!r}; give a whole number from 0 to 51, or `None`.")
        if num_inference_steps == 1 and sigmas is None and self.scheduler.config.get("shift_terminal"):
            raise ValueError(
                "`num_inference_steps` is 1, and one step can't be stretched to the scheduler's `shift_terminal`; take"
                " at least 2 steps, or give `sigmas`."
            )
        if text_context is None:
            self._check_sequence_length(max_sequence_length)
        if num_frames is not None and audio_latents is None and self.audio_length(num_frames, frame_rate) < 1:
            raise ValueError(
                f"`num_frames` is {num_frames} at a `frame_rate` of {frame_rate}, too short for any sound; give more"
                " frames."
            )
        for _, sampling_rate in (clip for row in clips for clip in row):
            check_resampling(sampling_rate, self.audio_sampling_rate)
        for (_, sampling_rate), *_ in (turn for row in turns for turn in row):
            check_resampling(sampling_rate, self.audio_sampling_rate, "speakers")
        if mask_reference_from_text:
            check_text_mask(self.transformer.dtype)
        if uses_text_guidance:
            self._check_negative_context(text_context, negative_text_context, num_prompts, shared)
        num_rows = num_prompts * num_videos_per_prompt
        generators = generator if isinstance(generator, list) else []
        if isinstance(generator, list) and len(generator) != num_rows:
            raise ValueError(f"`generator` is a list of {len(generator)} for {num_rows} videos; give one for each.")
        for item in generators or [generator]:
            if item is not None and not isinstance(item, torch.Generator):
                raise ValueError(f"`generator` holds a {type(item).__name__}; give a `torch.Generator`.")
        check_latents("latents", latents, (num_rows, self.transformer.config.in_channels, None, None, None))
        check_latents("audio_latents", audio_latents, (num_rows, *self._audio_latent_shape()))
        if num_frames is not None:
            self.check_times(num_frames, num_trimmed_frames, frame_rate, conditions, first_frame, turns, audio_latents)
        super().check_inputs(
            # diffusers knows nothing of a finished context, and would ask for a prompt.
            prompt=[""] * num_prompts if text_context is not None else prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            stg_scale=0.0,
            audio_stg_scale=0.0,
            **shared,
        )

    def check_times(
        self,
        num_frames: int,
        num_trimmed_frames: int,
        frame_rate: float,
        conditions: list[LTX2VideoCondition],
        first_frame: str | None,
        turns: list[list[tuple[Clip, float, float]]],
        audio_latents: torch.Tensor | None,
    ) -> None:
        """
        Raises a ValueError for conditions and turns of speakers that are not within the clip.

        Args:
            num_frames (`int`), num_trimmed_frames (`int`): Frames that are generated, and those of them not wanted.
            frame_rate (`float`): In frames per second.
            conditions, first_frame: See [`check_condition_indices`].
            turns (`list[list[tuple[Clip, float, float]]]`): As [`read_speakers`] gives them.
            audio_latents (`torch.Tensor`, *optional*): `[B, C, L, M]`, if the sound's length is theirs.
        """
        check_condition_indices(conditions, self._num_latent_frames(num_frames - num_trimmed_frames), first_frame)
        num_tokens = self.audio_length(num_frames, frame_rate) if audio_latents is None else audio_latents.shape[2]
        positions = self.transformer.audio_rope.prepare_audio_coords(1, num_tokens, "cpu")
        middles = positions[0, 0].mean(dim=-1) - num_trimmed_frames / frame_rate
        for _, start, end in (turn for row in turns for turn in row):
            if not ((middles >= start) & (middles < end)).any():
                raise ValueError(
                    f"`speakers` has a turn from {start} to {end} s, which holds no sound of the clip; make it longer,"
                    f" and begin it before {middles[-1].item():.2f} s."
                )

    def _check_negative_context(
        self,
        text_context: TextContext | None,
        negative_text_context: TextContext | None,
        num_prompts: int,
        shared: dict[str, Any],
    ) -> None:
        if negative_text_context is None:
            if self.text_encoder is None and shared.get("negative_prompt_embeds") is None:
                raise ValueError(
                    "`negative_text_context` is missing and there is no text encoder to read `negative_prompt`; give"
                    " it, or set `guidance_scale` to 1."
                )
            return
        if negative_text_context.batch_size != num_prompts:
            raise ValueError(
                f"`negative_text_context` has {negative_text_context.batch_size} rows for {num_prompts} prompts; give"
                " one row for each."
            )
        lengths = {item.video_embeds.shape[1] for item in (text_context, negative_text_context) if item is not None}
        if len(lengths) > 1:
            raise ValueError(
                f"`text_context` and `negative_text_context` have {sorted(lengths)} tokens; encode both with the same"
                " `max_sequence_length`."
            )

    def _check_sequence_length(self, max_sequence_length: int) -> None:
        config = self.connectors.config
        for num_registers in (
            config.video_connector_num_learnable_registers,
            config.audio_connector_num_learnable_registers,
        ):
            if num_registers is not None and max_sequence_length % num_registers:
                raise ValueError(
                    f"`max_sequence_length` is {max_sequence_length}; give a multiple of the text connectors'"
                    f" {num_registers} registers."
                )

    def _audio_latent_shape(self) -> tuple[int, None, int]:
        """Channels, any length, and mel bins of audio latents."""
        return self.audio_latent_channels, None, self.audio_mel_bins // self.audio_vae_mel_compression_ratio

    def _latent_size(self, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
        return (
            self._num_latent_frames(num_frames),
            height // self.vae_spatial_compression_ratio,
            width // self.vae_spatial_compression_ratio,
        )

    def _num_latent_frames(self, num_frames: int) -> int:
        return (num_frames - 1) // self.vae_temporal_compression_ratio + 1

    def audio_length(self, num_frames: int, frame_rate: float) -> int:
        """Audio latents that are as long as the video."""
        latents_per_second = (
            self.audio_sampling_rate / self.audio_hop_length / self.audio_vae_temporal_compression_ratio
        )
        return round(num_frames / frame_rate * latents_per_second)
