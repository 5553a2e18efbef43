"""The steps of a call: checking, reading prompt, voice and face, preparing latents and noise levels, decoding."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2ConditionPipeline
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import (
    LTX2VideoCondition,
    calculate_shift,
    retrieve_latents,
    retrieve_timesteps,
)
from diffusers.utils.torch_utils import randn_tensor

from .attention_processor import check_text_mask
from .audio import check_resampling, log_mel_spectrogram, read_reference
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
from .reference import ReferenceBatch, pack_reference_latents


# The released recipes shift their sigmas as if for this many video tokens, whatever the size (method section 4).
FIXED_SHIFT_TOKENS = 4096
RECIPE_STG_BLOCK = 29
RECIPE_NUM_FRAMES = 121


class LTX2IDLoRASteps(LTX2ConditionPipeline):
    """
    What a call of [`LTX2IDLoRAPipeline`] is made of, each step a method of its own. It adds no component to
    [`LTX2ConditionPipeline`].
    """

    def default_size(
        self,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        images: list[PIL.Image.Image | None],
        latents: torch.Tensor | None,
    ) -> tuple[int, int, int | None]:
        """
        Height, width and frames, with what was left out filled in: from `latents`, else from the first image's aspect,
        else 512 x 512; 121 frames, or `None` where a `duration_head` is to predict them.
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
        if height is None:
            face = next((image for image in images if image is not None), None)
            height, width = (512, 512) if face is None else fit_size(*face.size)
        if num_frames is None and getattr(self, "duration_head", None) is None:
            num_frames = RECIPE_NUM_FRAMES
        return height, width, num_frames

    def default_stg_blocks(self, blocks: Sequence[int] | None, scales: GuidanceScales) -> tuple[int, ...]:
        """The blocks that STG perturbs: those given, else the recipe's, or the last one of a smaller model."""
        num_blocks = self.transformer.config.num_layers
        if blocks is None:
            return (min(RECIPE_STG_BLOCK, num_blocks - 1),)
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
        check_frames(num_frames, self.vae_temporal_compression_ratio)
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        if isinstance(guidance_batching, str):
            check_choice("guidance_batching", guidance_batching, ("sequential", "packed"))
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
        if num_frames is not None:
            check_condition_indices(conditions, self._latent_size(height, width, num_frames)[0], first_frame)
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

    @torch.no_grad()
    def encode_text_context(
        self,
        prompt: list[str] | None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int = 1024,
        device: torch.device | None = None,
    ) -> TextContext:
        """
        Prompts as the transformer reads them; keep the result to use a prompt again without the text encoder.

        Args:
            prompt (`list[str]`, *optional*): The prompts.
            prompt_embeds (`torch.Tensor`, *optional*), prompt_attention_mask (`torch.Tensor`, *optional*):
                The output of [`~LTX2ConditionPipeline.encode_prompt`] instead.
            max_sequence_length (`int`, defaults to `1024`): Tokens of a prompt.
            device (`torch.device`, *optional*): Where to run.

        Returns:
            [`TextContext`]: One row for each prompt.
        """
        # Always one row per prompt here: diffusers repeats embeddings and masks in different orders.
        prompt_embeds, attention_mask, _, _ = self.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        device = device or self._execution_device
        video_embeds, audio_embeds, attention_mask = self.connectors(
            prompt_embeds.to(device), attention_mask.to(device), padding_side=self.tokenizer_padding_side
        )
        # Without a mask every attention kernel can be used; with learnable registers no token is ever masked.
        return TextContext(video_embeds, audio_embeds, None if attention_mask.all() else attention_mask)

    def prepare_contexts(
        self,
        prompts: list[str] | None,
        negative_prompts: list[str] | None,
        context: TextContext | None,
        negative_context: TextContext | None,
        embeds: tuple[torch.Tensor | None, torch.Tensor | None],
        negative_embeds: tuple[torch.Tensor | None, torch.Tensor | None],
        max_sequence_length: int,
    ) -> tuple[TextContext, TextContext | None]:
        """
        The contexts of prompts and negative prompts. Texts of both go through the text encoder in one batch, so that
        offloading moves it once.

        Args:
            prompts (`list[str]`, *optional*), negative_prompts (`list[str]`, *optional*):
                The texts. Without `negative_prompts` there is no text guidance, and no negative context is made.
            context ([`TextContext`], *optional*), negative_context ([`TextContext`], *optional*): Finished contexts.
            embeds (`tuple`), negative_embeds (`tuple`): Embeddings and attention masks, or `None` and `None`.
            max_sequence_length (`int`): Tokens of a prompt.
        """
        if negative_prompts is None:
            negative_context = None
        elif prompts is not None and negative_context is None and negative_embeds[0] is None:
            both = self.encode_text_context(prompts + negative_prompts, max_sequence_length=max_sequence_length)
            return both.rows(0, len(prompts)), both.rows(len(prompts), len(prompts) + len(negative_prompts))
        elif negative_context is None:
            texts = negative_prompts if negative_embeds[0] is None else None
            negative_context = self.encode_text_context(texts, *negative_embeds, max_sequence_length)
        if context is None:
            context = self.encode_text_context(prompts, *embeds, max_sequence_length)
        return context, negative_context

    @torch.no_grad()
    def encode_reference_audio(self, reference_audio: Any, sampling_rate: int | None = None) -> torch.Tensor:
        """
        One clip of a voice as audio latents (method section 1), for `reference_latents`.

        Args:
            reference_audio (path, `(waveform, sampling_rate)` or `torch.Tensor`): The recording.
            sampling_rate (`int`, *optional*): In Hz, for a tensor.

        Returns:
            `torch.Tensor`: Un-normalised latents `[1, C, L, M]`, 25 per second; the posterior's mode.
        """
        waveform, sampling_rate = read_reference(reference_audio, sampling_rate)
        log_mel = log_mel_spectrogram(
            waveform,
            sampling_rate,
            target_sampling_rate=self.audio_sampling_rate,
            hop_length=self.audio_hop_length,
            mel_bins=self.audio_mel_bins,
        ).to(self._execution_device, self.audio_vae.dtype)
        return retrieve_latents(self.audio_vae.encode(log_mel), sample_mode="argmax").float()

    @torch.no_grad()
    def encode_image(self, image: PIL.Image.Image, height: int, width: int, image_crf: int | None = 0) -> torch.Tensor:
        """
        An image as the latents of a first frame, for `image_latents`: bilinear resize, centre crop, VAE.

        Args:
            image (`PIL.Image.Image`): The image.
            height (`int`), width (`int`): Of the video, in pixels.
            image_crf (`int`, *optional*, defaults to `0`): H.264 re-compression first; `None` is the model's default.

        Returns:
            `torch.Tensor`: Un-normalised latents `[1, C, 1, h, w]`.
        """
        condition = LTX2VideoCondition(frames=image, index=0, crf=image_crf)
        (pixels,), *_ = self.preprocess_conditions(condition, height, width, 1, device=self._execution_device)
        return retrieve_latents(self.vae.encode(pixels), sample_mode="argmax").float()

    def prepare_references(
        self, clips: list[list[Clip]], reference_latents: list[torch.Tensor | None]
    ) -> ReferenceBatch | None:
        """
        The voices of a batch: encoded, packed, normalised and placed in time.

        Args:
            clips (`list[list[tuple[torch.Tensor, int]]]`): Of each prompt, its recordings.
            reference_latents (`list[torch.Tensor | None]`): Of each prompt, latents that need no encoding.

        Returns:
            [`ReferenceBatch`], or `None` if no prompt has a voice.
        """
        tokens = {}
        for row in clips:
            # A voice given once for all prompts is one object, and is encoded once.
            if id(row) not in tokens:
                tokens[id(row)] = [self._reference_tokens(self.encode_reference_audio(clip)) for clip in row]
        rows = [
            tokens[id(row)] if latents is None else [self._reference_tokens(latents)]
            for row, latents in zip(clips, reference_latents)
        ]
        return ReferenceBatch.from_clips(rows, self.transformer.audio_rope)

    def _reference_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        return pack_reference_latents(latents.to(self._execution_device, torch.float32), self.audio_vae)[0]

    def prepare_video_tokens(
        self,
        conditions: LTX2VideoCondition | list[LTX2VideoCondition] | None,
        first_frames: list[torch.Tensor | None],
        height: int,
        width: int,
        num_frames: int,
        frame_rate: float,
        noise_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Noisy video tokens with each row's own first frame in place.

        Args:
            conditions (`LTX2VideoCondition` or a list of these, *optional*): Frames that hold for all rows.
            first_frames (`list[torch.Tensor | None]`): Of each row, un-normalised latents `[1, C, 1, h, w]`.
            height (`int`), width (`int`), num_frames (`int`): The video's size.
            frame_rate (`float`): The rate that positions follow, in frames per second.
            noise_scale (`float`): How much noise is mixed in.
            generator (`torch.Generator` or a list of these, *optional*): Sources of noise.
            latents (`torch.Tensor`, *optional*): Un-normalised `[B, C, F, h, w]` to start from.

        Returns:
            Tokens `[B, S, C]`, conditioning mask `[B, S, 1]` (1 is clean), clean tokens `[B, S, C]`, positions
            `[B, 3, S, 2]`.
        """
        device, num_rows = self._execution_device, len(first_frames)
        generators = generator if isinstance(generator, list) else [generator] * num_rows
        rows = [
            # Row by row, because diffusers conditions every row alike and would use the first generator only.
            self.prepare_latents(
                conditions=conditions,
                batch_size=1,
                num_channels_latents=self.transformer.config.in_channels,
                height=height,
                width=width,
                num_frames=num_frames,
                frame_rate=frame_rate,
                noise_scale=noise_scale,
                dtype=torch.float32,
                device=device,
                generator=row_generator,
                latents=None if latents is None else latents[index : index + 1].to(device, torch.float32),
            )
            for index, row_generator in enumerate(generators)
        ]
        tokens, mask, clean = (torch.cat(parts) for parts in list(zip(*rows))[:3])
        for index, frame in enumerate(first_frames):
            if frame is None:
                continue
            frame = self._pack_latents(
                self._normalize_latents(
                    frame.to(device, torch.float32),
                    self.vae.latents_mean,
                    self.vae.latents_std,
                    self.vae.config.scaling_factor,
                ),
                self.transformer_spatial_patch_size,
                self.transformer_temporal_patch_size,
            )
            first_tokens = slice(0, frame.shape[1])
            tokens[index, first_tokens] = clean[index, first_tokens] = frame[0]
            mask[index, first_tokens] = 1.0
        positions = self.transformer.rope.prepare_video_coords(
            num_rows, *self._latent_size(height, width, num_frames), device, fps=frame_rate
        )
        keyframe_positions = rows[0][3]
        if keyframe_positions is not None:
            positions = torch.cat([positions, keyframe_positions.expand(num_rows, -1, -1, -1)], dim=2)
        return tokens, mask, clean, positions

    def _latent_size(self, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
        return (
            (num_frames - 1) // self.vae_temporal_compression_ratio + 1,
            height // self.vae_spatial_compression_ratio,
            width // self.vae_spatial_compression_ratio,
        )

    def audio_length(self, num_frames: int, frame_rate: float) -> int:
        """Audio latents that are as long as the video."""
        latents_per_second = (
            self.audio_sampling_rate / self.audio_hop_length / self.audio_vae_temporal_compression_ratio
        )
        return round(num_frames / frame_rate * latents_per_second)

    def prepare_scheduler(
        self,
        num_inference_steps: int,
        sigmas: Sequence[float] | None = None,
        device: torch.device | None = None,
        num_tokens: int = FIXED_SHIFT_TOKENS,
    ) -> FlowMatchEulerDiscreteScheduler:
        """
        A scheduler ready for the loop.

        Args:
            num_inference_steps (`int`): Steps, without `sigmas`.
            sigmas (`Sequence[float]`, *optional*): Noise levels to be used as they are, without the last 0.
            device (`torch.device`, *optional*): Where its timesteps are.
            num_tokens (`int`, defaults to `4096`): Video tokens that the shift is for.

        Returns:
            `FlowMatchEulerDiscreteScheduler`: The pipeline's own, or with `sigmas` one that does not shift them.
        """
        config = self.scheduler.config
        if sigmas is not None:
            conversions = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
            unchanged = {name: False for name in ("use_dynamic_shifting", *conversions) if name in config}
            scheduler = self.scheduler.from_config(config, **unchanged, shift=1.0, shift_terminal=None)
            scheduler.set_timesteps(sigmas=list(sigmas), device=device)
            return scheduler
        mu = calculate_shift(
            num_tokens,
            config.get("base_image_seq_len", 1024),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.95),
            config.get("max_shift", 2.05),
        )
        retrieve_timesteps(
            self.scheduler,
            num_inference_steps,
            device,
            sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps),
            mu=mu,
        )
        return self.scheduler

    def decode_tokens(
        self,
        latents: torch.Tensor,
        audio_latents: torch.Tensor,
        height: int,
        width: int,
        num_frames: int,
        output_type: str = "pil",
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | list[torch.Generator] | None = None,
        decode_timestep: float | list[float] = 0.0,
        decode_noise_scale: float | list[float] | None = None,
    ) -> tuple[Any, torch.Tensor]:
        """
        Packed, normalised tokens of both modalities to frames and sound; keyframe tokens at the end are dropped.

        Args:
            latents (`torch.Tensor`): Video tokens `[B, S, C]`.
            audio_latents (`torch.Tensor`): Audio tokens `[B, L, C * M]`.
            height (`int`), width (`int`), num_frames (`int`): The video's size.
            output_type (`str`, defaults to `"pil"`): See [`~LTX2IDLoRAPipeline.__call__`].
            dtype (`torch.dtype`): What video latents are rounded to before decoding, as diffusers does.
            generator, decode_timestep, decode_noise_scale: For video VAEs with timestep conditioning.

        Returns:
            Frames and a waveform `[B, channels, samples]`, or un-normalised latents of both.
        """
        latent_size = self._latent_size(height, width, num_frames)
        latents = self._unpack_latents(
            latents[:, : math.prod(latent_size)],
            *latent_size,
            self.transformer_spatial_patch_size,
            self.transformer_temporal_patch_size,
        )
        audio_latents = self._unpack_audio_latents(
            self._denormalize_audio_latents(audio_latents, self.audio_vae.latents_mean, self.audio_vae.latents_std),
            audio_latents.shape[1],
            num_mel_bins=self.audio_mel_bins // self.audio_vae_mel_compression_ratio,
        )
        statistics = (self.vae.latents_mean, self.vae.latents_std, self.vae.config.scaling_factor)
        if output_type == "latent":
            return self._denormalize_latents(latents, *statistics), audio_latents

        latents, timestep = latents.to(dtype), None
        if self.vae.config.timestep_conditioning:
            timestep = _per_row(decode_timestep, latents)
            noise_scale = timestep if decode_noise_scale is None else _per_row(decode_noise_scale, latents)
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
            noise_scale = noise_scale[:, None, None, None, None]
            latents = (1 - noise_scale) * latents + noise_scale * noise
        latents = self._denormalize_latents(latents, *statistics).to(self.vae.dtype)
        video = self.vae.decode(latents, timestep, return_dict=False)[0]
        video = self.video_processor.postprocess_video(video, output_type=output_type)
        log_mel = self.audio_vae.decode(audio_latents.to(self.audio_vae.dtype), return_dict=False)[0]
        return video, self.vocoder(log_mel.to(self.vocoder.dtype))


def _per_row(value: float | list[float], latents: torch.Tensor) -> torch.Tensor:
    values = value if isinstance(value, list) else [value] * latents.shape[0]
    return torch.tensor(values, device=latents.device, dtype=latents.dtype)
