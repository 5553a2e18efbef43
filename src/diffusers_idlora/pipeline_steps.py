"""The steps of a call: reading prompt, voice and face, preparing latents and noise levels, decoding."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import (
    LTX2VideoCondition,
    calculate_shift,
    retrieve_latents,
)
from diffusers.utils.torch_utils import randn_tensor

from .audio import log_mel_spectrogram, read_reference
from .continuation import EarlierClip
from .denoising import PassPacking, TextContext, auto_passes_per_forward
from .inputs import Clip
from .pipeline_checks import LTX2IDLoRAChecks
from .recipes import SHIFT_TOKENS
from .reference import ReferenceBatch, Turn, pack_reference_latents
from .schedulers import LTX2Res2sScheduler


MOST_PASSES = 5
SAMPLERS = {"euler": FlowMatchEulerDiscreteScheduler, "res_2s": LTX2Res2sScheduler}


class LTX2IDLoRASteps(LTX2IDLoRAChecks):
    """
    What a call of [`LTX2IDLoRAPipeline`] is made of, each step a method of its own. It adds no component to
    [`LTX2ConditionPipeline`].
    """

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
        return self._encode_sound(*read_reference(reference_audio, sampling_rate))

    def _encode_sound(self, waveform: torch.Tensor, sampling_rate: int) -> torch.Tensor:
        log_mel = log_mel_spectrogram(
            waveform,
            sampling_rate,
            target_sampling_rate=self.audio_sampling_rate,
            hop_length=self.audio_hop_length,
            mel_bins=self.audio_mel_bins,
        ).to(self._execution_device, self.audio_vae.dtype)
        return retrieve_latents(self.audio_vae.encode(log_mel), sample_mode="argmax").float()

    @torch.no_grad()
    def encode_image(
        self, image: PIL.Image.Image | list[PIL.Image.Image], height: int, width: int, image_crf: int | None = 0
    ) -> torch.Tensor:
        """
        An image as the latents of a first frame, for `image_latents`: bilinear resize, centre crop, VAE. Several
        frames, 8k + 1 of them, give the latents of a beginning.

        Args:
            image (`PIL.Image.Image` or a list of these): The image, or the frames.
            height (`int`), width (`int`): Of the video, in pixels.
            image_crf (`int`, *optional*, defaults to `0`):
                H.264 re-compression of a single image first; `None` is the model's default.

        Returns:
            `torch.Tensor`: Un-normalised latents `[1, C, k + 1, h, w]`.
        """
        num_frames = len(image) if isinstance(image, list) else 1
        condition = LTX2VideoCondition(frames=image, index=0, crf=image_crf)
        (pixels,), *_ = self.preprocess_conditions(condition, height, width, num_frames, self._execution_device)
        return retrieve_latents(self.vae.encode(pixels), sample_mode="argmax").float()

    @torch.no_grad()
    def encode_earlier_sound(self, clip: EarlierClip, num_frames: int, frame_rate: float) -> torch.Tensor:
        """
        The sound under the last frames of a clip, as the audio VAE encodes the beginning of a target.

        Args:
            clip ([`EarlierClip`]): The clip that is to go on.
            num_frames (`int`): How many of its last frames.
            frame_rate (`float`): In frames per second.

        Returns:
            `torch.Tensor`: Un-normalised latents `[1, C, L, M]` with L as for a video of that many frames.
        """
        start = (len(clip.frames) - num_frames) / frame_rate
        # The first latent holds a single mel frame (method section 2), so L latents need 4 (L - 1) hops of sound.
        num_hops = (self.audio_length(num_frames, frame_rate) - 1) * self.audio_vae_temporal_compression_ratio
        seconds = num_hops * self.audio_hop_length / self.audio_sampling_rate
        # Not checked as a voice is: a clip may end in silence.
        return self._encode_sound(clip.sound_from(start, seconds), clip.sampling_rate)

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
                tokens[id(row)] = [self._audio_tokens(self.encode_reference_audio(clip)) for clip in row]
        rows = [
            tokens[id(row)] if latents is None else [self._audio_tokens(latents)]
            for row, latents in zip(clips, reference_latents)
        ]
        return ReferenceBatch.from_clips(rows, self.transformer.audio_rope)

    def prepare_speakers(
        self,
        rows: list[list[tuple[Clip, float, float]]],
        first_second: float,
        num_target_tokens: int,
        begins_early: bool = False,
    ) -> ReferenceBatch:
        """
        The voices of a batch in which speakers take turns (experimental).

        Args:
            rows (`list[list[tuple[Clip, float, float]]]`): Of each prompt, voice, start and end of its turns.
            first_second (`float`): When the clip that is wanted begins in what is generated.
            num_target_tokens (`int`): Length of the target.
            begins_early (`bool`, defaults to `False`):
                Whether a turn from 0 s on is heard before the clip begins too, in a lead-in.
        """
        tokens = {}
        for clip in (clip for row in rows for clip, *_ in row):
            if id(clip) not in tokens:
                tokens[id(clip)] = self._audio_tokens(self.encode_reference_audio(clip))
        turns = [
            [
                Turn(tokens[id(clip)], start + first_second if start or not begins_early else 0.0, end + first_second)
                for clip, start, end in row
            ]
            for row in rows
        ]
        return ReferenceBatch.from_turns(turns, self.transformer.audio_rope, num_target_tokens)

    def _audio_tokens(self, latents: torch.Tensor) -> torch.Tensor:
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
            first_frames (`list[torch.Tensor | None]`): Of each row, un-normalised latents `[1, C, 1 or more, h, w]`.
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

    def prepare_audio_tokens(
        self,
        first_sounds: list[torch.Tensor | None],
        num_tokens: int,
        frozen: bool,
        noise_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        audio_latents: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Noisy audio tokens of the target, with what is given clean in place.

        Args:
            first_sounds (`list[torch.Tensor | None]`): Of each row, un-normalised latents `[1, C, L, M]` or none.
            num_tokens (`int`): Length of the target.
            frozen (`bool`): Whether `audio_latents` stay as they are.
            noise_scale (`float`): How much noise is mixed in.
            generator (`torch.Generator` or a list of these, *optional*): Sources of noise.
            audio_latents (`torch.Tensor`, *optional*): Un-normalised `[B, C, L, M]` to start from.

        Returns:
            Tokens `[B, L, C * M]`, conditioning mask `[B, L, 1]` (1 is clean), clean tokens `[B, L, C * M]`, positions
            `[B, 1, L, 2]`.
        """
        device, num_rows = self._execution_device, len(first_sounds)
        tokens = self.prepare_audio_latents(
            num_rows,
            num_channels_latents=self.audio_latent_channels,
            audio_latent_length=num_tokens,
            num_mel_bins=self.audio_mel_bins,
            noise_scale=0.0 if frozen else noise_scale,
            dtype=torch.float32,
            device=device,
            generator=generator,
            latents=None if audio_latents is None else audio_latents.to(device, torch.float32),
        )
        mask = torch.full((*tokens.shape[:2], 1), float(frozen), device=device)
        for index, sound in enumerate(first_sounds):
            if sound is not None:
                first = self._audio_tokens(sound)[:num_tokens]
                tokens[index, : len(first)] = first
                mask[index, : len(first)] = 1.0
        positions = self.transformer.audio_rope.prepare_audio_coords(num_rows, num_tokens, device)
        return tokens, mask, tokens * mask, positions

    def prepare_scheduler(
        self,
        num_inference_steps: int,
        sigmas: Sequence[float] | None = None,
        device: torch.device | None = None,
        num_tokens: int = SHIFT_TOKENS,
        sampler: str | None = None,
    ) -> FlowMatchEulerDiscreteScheduler | LTX2Res2sScheduler:
        """
        A scheduler ready for the loop.

        Args:
            num_inference_steps (`int`): Steps, without `sigmas`.
            sigmas (`Sequence[float]`, *optional*): Noise levels to be used as they are, without the last 0.
            device (`torch.device`, *optional*): Where its timesteps are.
            num_tokens (`int`, defaults to `4096`): Video tokens that the shift is for.
            sampler (`str`, *optional*): `"euler"` or `"res_2s"`; left out, what the pipeline's own scheduler is.

        Returns:
            `FlowMatchEulerDiscreteScheduler` or [`LTX2Res2sScheduler`]: One of its own for this call.
        """
        config = self.scheduler.config
        if sigmas is None:
            sigmas = self._shifted_sigmas(num_inference_steps, num_tokens)
        conversions = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        unchanged = {name: False for name in ("use_dynamic_shifting", *conversions) if name in config}
        scheduler_class = type(self.scheduler) if sampler is None else SAMPLERS[sampler]
        scheduler = scheduler_class.from_config(config, **unchanged, shift=1.0, shift_terminal=None)
        scheduler.set_timesteps(sigmas=list(sigmas), device=device)
        return scheduler

    def _shifted_sigmas(self, num_inference_steps: int, num_tokens: int) -> list[float]:
        config = self.scheduler.config
        mu = calculate_shift(
            num_tokens,
            config.get("base_image_seq_len", 1024),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.95),
            config.get("max_shift", 2.05),
        )
        scheduler = copy.deepcopy(self.scheduler)
        plain = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        # Of its class whatever the sampler, which may split these steps further.
        FlowMatchEulerDiscreteScheduler.set_timesteps(scheduler, sigmas=plain, mu=mu)
        return scheduler.sigmas[:-1].tolist()

    def pass_packing(
        self, guidance_batching: str | int, latents: torch.Tensor, audio_latents: torch.Tensor
    ) -> PassPacking:
        """How many passes of a step share a forward; the tokens tell what `"auto"` means, which may become less."""
        if guidance_batching != "auto":
            return PassPacking({"sequential": 1, "packed": None}.get(guidance_batching, guidance_batching))
        num_tokens = latents.shape[0] * (latents.shape[1] + audio_latents.shape[1])
        return PassPacking(
            auto_passes_per_forward(self.transformer, num_tokens, MOST_PASSES), halve_on_out_of_memory=True
        )

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
        first_frame: int = 0,
        frame_rate: float = 25.0,
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
            first_frame (`int`, defaults to `0`): Frames before it are left out, and the sound under them.
            frame_rate (`float`, defaults to `25.0`): In frames per second; tells how much sound that is.

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
        video = self.video_processor.postprocess_video(video[:, :, first_frame:], output_type=output_type)
        log_mel = self.audio_vae.decode(audio_latents.to(self.audio_vae.dtype), return_dict=False)[0]
        first_sample = round(first_frame / frame_rate * self.vocoder.config.output_sampling_rate)
        return video, self.vocoder(log_mel.to(self.vocoder.dtype))[..., first_sample:]


def denoising_step(
    scheduler: FlowMatchEulerDiscreteScheduler | LTX2Res2sScheduler,
    x0: torch.Tensor,
    latents: torch.Tensor,
    clean_latents: torch.Tensor,
    conditioning_mask: torch.Tensor,
    sigma: torch.Tensor,
    timestep: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """
    One step of a scheduler from a guided prediction, in which clean tokens stay as they are.

    Args:
        scheduler: The scheduler of this modality.
        x0 (`torch.Tensor`): The guided prediction, `[B, tokens, channels]`.
        latents (`torch.Tensor`): The noisy tokens.
        clean_latents (`torch.Tensor`): What conditioned tokens are to be.
        conditioning_mask (`torch.Tensor`): `[B, tokens, 1]`: 1 on clean tokens, between 0 and 1 on partly clean ones.
        sigma (`torch.Tensor`), timestep (`torch.Tensor`): The noise level, and as the scheduler counts it.
        generator (`torch.Generator` or a list of these, *optional*): Of samplers that add noise.
    """
    # In x0 space before the step, as the reference implementation does it.
    x0 = x0 * (1 - conditioning_mask) + clean_latents * conditioning_mask
    velocity = (latents - x0) / sigma
    latents = scheduler.step(velocity, timestep, latents, generator=generator, return_dict=False)[0]
    # And after it, where a sampler has added noise.
    return torch.where(conditioning_mask == 1, clean_latents, latents)


def _per_row(value: float | list[float], latents: torch.Tensor) -> torch.Tensor:
    values = value if isinstance(value, list) else [value] * latents.shape[0]
    return torch.tensor(values, device=latents.device, dtype=latents.dtype)
