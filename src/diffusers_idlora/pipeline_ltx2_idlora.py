"""The pipeline: a prompt, a face and a voice to one talking video."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LTX2ConditionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import (
    LTX2VideoCondition,
    calculate_shift,
    retrieve_latents,
    retrieve_timesteps,
)
from diffusers.pipelines.ltx2.pipeline_output import LTX2PipelineOutput
from diffusers.pipelines.ltx2.utils import conditioning_frame_rate
from diffusers.utils.torch_utils import randn_tensor

from .attention_processor import ReferenceAttention, is_first_generation
from .audio import log_mel_spectrogram, read_reference
from .denoising import Denoiser, TextContext
from .guidance import GuidancePlan, GuidanceScales, IdentityGuidance
from .inputs import (
    Clip,
    check_count,
    check_positive,
    check_sigmas,
    count_prompts,
    identity_guider,
    per_prompt,
    read_images,
    read_prompts,
    read_references,
    split_latents,
)
from .lora import check_adapter, load_adapter, lora_config
from .media import fit_size
from .prompt import IDLoRAPrompt
from .reference import ReferenceBatch, pack_reference_latents


# The released recipes shift their sigmas as if for this many video tokens, whatever the size (method section 4).
FIXED_SHIFT_TOKENS = 4096
RECIPE_STG_BLOCK = 29
RECIPE_NUM_FRAMES = 121


class LTX2IDLoRAPipeline(LTX2ConditionPipeline):
    r"""
    Talking video of a given person from a text prompt, one image of the face and about five seconds of the voice, with
    LTX-2 or LTX-2.3 and an ID-LoRA ([arXiv 2603.10256](https://huggingface.co/papers/2603.10256)).

    Components are those of [`LTX2ConditionPipeline`]; any checkpoint that `LTX2Pipeline` or a sibling saved loads.

    Example:
        ```py
        import torch
        from diffusers_idlora import LTX2IDLoRAPipeline

        pipe = LTX2IDLoRAPipeline.from_pretrained("diffusers/LTX-2.3-Diffusers", dtype=torch.bfloat16)
        pipe.load_lora_weights("AviadDahan/LTX-2.3-ID-LoRA-CelebVHQ-3K", weight_name="lora_weights.safetensors")
        pipe.enable_model_cpu_offload()
        output = pipe(prompt="[VISUAL]: ... [SPEECH]: ... [SOUNDS]: ...", image="face.png", reference_audio="voice.wav")
        ```
    """

    _callback_tensor_inputs = ["latents", "audio_latents", "prompt_embeds", "negative_prompt_embeds"]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | IDLoRAPrompt | list[str | IDLoRAPrompt] | None = None,
        image: Any = None,
        reference_audio: Any = None,
        negative_prompt: str | list[str] | None = None,
        *,
        reference_audio_sampling_rate: int | None = None,
        reference_latents: torch.Tensor | list[torch.Tensor | None] | None = None,
        image_latents: torch.Tensor | None = None,
        conditions: LTX2VideoCondition | list[LTX2VideoCondition] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        min_seconds: float = 1.0,
        max_seconds: float = 20.0,
        frame_rate: float = 25.0,
        motion_speed: float = 1.0,
        num_inference_steps: int = 30,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 3.0,
        audio_guidance_scale: float | None = None,
        identity_guidance_scale: float | None = None,
        identity_guidance: IdentityGuidance | None = None,
        stg_scale: float = 1.0,
        audio_stg_scale: float | None = None,
        spatio_temporal_guidance_blocks: list[int] | None = None,
        modality_scale: float = 3.0,
        audio_modality_scale: float | None = None,
        guidance_rescale: float = 0.0,
        audio_guidance_rescale: float | None = None,
        guidance_batching: str | int = "sequential",
        use_cross_timestep: bool | None = None,
        mask_video_from_reference: bool = False,
        mask_reference_from_text: bool = False,
        image_crf: int | None = 0,
        noise_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        audio_latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        text_context: TextContext | None = None,
        negative_text_context: TextContext | None = None,
        decode_timestep: float | list[float] = 0.0,
        decode_noise_scale: float | list[float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - diffusers' own default
        max_sequence_length: int = 1024,
    ) -> LTX2PipelineOutput | tuple:
        r"""
        Generates talking videos. The defaults are the released one-stage recipe (method section 4).

        Args:
            prompt (`str`, [`IDLoRAPrompt`] or a list of these):
                What is seen, said and heard. A list makes a batch.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, path, or a list of these, *optional*):
                The face, as the first frame: one for all prompts, or one per prompt (`None` for none). EXIF rotation is
                honoured and transparency flattened; resized and cropped at the centre. Without it the prompt alone
                drives the face.
            reference_audio (path, `(waveform, sampling_rate)`, `torch.Tensor`, a tuple of clips, or a list of these, *optional*):
                The voice: one for all prompts, or a list with one per prompt (`None` for none). A path is any audio
                file or a video with sound. A tuple of several clips of one speaker is encoded clip by clip and laid on
                one timeline. Without it this is plain LTX-2 generation and identity guidance is off.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from. Unused where both text guidance scales are 1.
            reference_audio_sampling_rate (`int`, *optional*):
                In Hz, for `reference_audio` given as tensors.
            reference_latents (`torch.Tensor` or `list[torch.Tensor | None]`, *optional*):
                Instead of `reference_audio`: un-normalised audio latents `[B or 1, C, L, M]`, or one `[1, C, L, M]` per
                prompt, as [`~LTX2IDLoRAPipeline.encode_reference_audio`] gives them.
            image_latents (`torch.Tensor`, *optional*):
                Instead of `image`: un-normalised video latents of the first frame, `[B or 1, C, 1, h, w]`.
            conditions (`LTX2VideoCondition` or a list of these, *optional*):
                Further frames, e.g. a last frame; they hold for every prompt. See [`LTX2ConditionPipeline`].
            height (`int`, *optional*), width (`int`, *optional*):
                In pixels, multiples of 32. Left out: from the first image's aspect, 512 on its long side; 512 x 512
                without an image.
            num_frames (`int`, *optional*):
                8k + 1. Left out: what the checkpoint's `duration_head` predicts between `min_seconds` and
                `max_seconds`, or 121.
            min_seconds (`float`), max_seconds (`float`):
                Bounds on a predicted duration.
            frame_rate (`float`, defaults to `25.0`):
                In frames per second.
            motion_speed (`float`, defaults to `1.0`):
                Speed of the motion relative to real time, see [`LTX2ConditionPipeline`].
            num_inference_steps (`int`, defaults to `30`):
                Denoising steps. Ignored with `sigmas`.
            sigmas (`Sequence[float]`, *optional*):
                The noise levels, used exactly as given (never shifted again), falling; a last 0 may be there or not.
            guidance_scale (`float`, defaults to `3.0`):
                Text guidance on video; 1 is off.
            audio_guidance_scale (`float`, *optional*):
                Text guidance on audio; 1 is off. Left out: 7.0, or `guidance_scale` where that is 1 or less.
            identity_guidance_scale (`float`, *optional*):
                How strongly the reference's voice is amplified; 0 is off. Left out: 3.0.
            identity_guidance ([`IdentityGuidance`], *optional*):
                Instead of `identity_guidance_scale`: a schedule over the steps.
            stg_scale (`float`, defaults to `1.0`):
                Spatio-temporal guidance on video; 0 is off. It has the meaning that fits the model's generation.
            audio_stg_scale (`float`, *optional*):
                The same on audio. Left out: `stg_scale`.
            spatio_temporal_guidance_blocks (`list[int]`, *optional*):
                Blocks that STG perturbs. Left out: `[29]`, or the last block of a smaller model.
            modality_scale (`float`, defaults to `3.0`):
                Guidance away from video and audio that do not see each other, on video; 1 is off.
            audio_modality_scale (`float`, *optional*):
                The same on audio. Left out: `modality_scale`.
            guidance_rescale (`float`, defaults to `0.0`), audio_guidance_rescale (`float`, *optional*):
                Rescaling of the guided prediction's deviation, see [`LTX2ConditionPipeline`].
            guidance_batching (`str` or `int`, defaults to `"sequential"`):
                `"sequential"` runs the passes of a step one by one, `"packed"` all in one forward, a number that many
                at a time. The results agree; packing needs more memory.
            use_cross_timestep (`bool`, *optional*):
                Left out: right for the model's generation (method section 3).
            mask_video_from_reference (`bool`, defaults to `False`), mask_reference_from_text (`bool`, defaults to `False`):
                The attention masks of the training recipe (method section 6). The released inference recipe uses
                neither.
            image_crf (`int`, *optional*, defaults to `0`):
                H.264 re-compression of the image before it is encoded; 0 is none, `None` is the model's default.
            noise_scale (`float`, *optional*):
                How much noise is mixed into `latents` and `audio_latents`. Left out: the first sigma, or 1.
            num_videos_per_prompt (`int`, defaults to `1`):
                Videos per prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                For reproducible noise: one, or one per video.
            latents (`torch.Tensor`, *optional*):
                Un-normalised video latents `[videos, C, F, h, w]` to start from; with `noise_scale=0.0` as they are.
            audio_latents (`torch.Tensor`, *optional*):
                Un-normalised audio latents `[videos, C, L, M]` to start from.
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask (`torch.Tensor`, *optional*):
                Outputs of [`~LTX2ConditionPipeline.encode_prompt`] instead of the texts.
            text_context ([`TextContext`], *optional*), negative_text_context ([`TextContext`], *optional*):
                Outputs of [`~LTX2IDLoRAPipeline.encode_text_context`] instead of the texts; text encoder and
                connectors are then not run.
            decode_timestep (`float` or `list[float]`, defaults to `0.0`), decode_noise_scale (*optional*):
                For video VAEs with timestep conditioning.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for un-normalised latents of both modalities.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`LTX2PipelineOutput`] rather than a tuple.
            attention_kwargs (`dict`, *optional*):
                Given to the transformer; `{"scale": 0.5}` scales loaded LoRAs.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step; may return changed `latents` and
                `audio_latents`. Setting `pipe._interrupt = True` in it ends the loop early.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Which tensors it gets: of `latents`, `audio_latents` (both packed and normalised), `prompt_embeds`,
                `negative_prompt_embeds`.
            max_sequence_length (`int`, defaults to `1024`):
                Tokens of a prompt.

        Returns:
            [`LTX2PipelineOutput`] or `tuple`: `frames` as `output_type` says, and `audio`, a tensor
            `[videos, channels, samples]` at `pipe.vocoder.config.output_sampling_rate`.

        Raises:
            ValueError: On input that can't work, before any model runs.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Read what was given and check it, before any model runs
        scales = GuidanceScales(
            guidance_scale=guidance_scale,
            audio_guidance_scale=audio_guidance_scale,
            stg_scale=stg_scale,
            audio_stg_scale=audio_stg_scale,
            modality_scale=modality_scale,
            audio_modality_scale=audio_modality_scale,
            guidance_rescale=guidance_rescale,
            audio_guidance_rescale=audio_guidance_rescale,
        )
        guider = identity_guider(identity_guidance_scale, identity_guidance)
        prompts = read_prompts(prompt)
        num_prompts = count_prompts(prompts, prompt_embeds, text_context)
        negative_prompts = per_prompt("negative_prompt", negative_prompt or "", num_prompts)
        sigmas = None if sigmas is None else check_sigmas(sigmas)
        stg_blocks = self.default_stg_blocks(spatio_temporal_guidance_blocks, scales)
        images = read_images(image, num_prompts)
        clips = read_references(reference_audio, reference_audio_sampling_rate, num_prompts)
        height, width, num_frames = self.default_size(height, width, num_frames, images, latents)
        self.check_inputs(
            prompts,
            height,
            width,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            num_frames=num_frames,
            min_seconds=min_seconds,
            max_seconds=max_seconds,
            latents=latents,
            audio_latents=audio_latents,
            text_context=text_context,
            negative_text_context=negative_text_context if scales.uses_text_guidance else None,
            image=image,
            image_latents=image_latents,
            conditions=conditions,
            reference_audio=reference_audio,
            reference_latents=reference_latents,
            frame_rate=frame_rate,
            motion_speed=motion_speed,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            output_type=output_type,
            guidance_batching=guidance_batching,
            num_prompts=num_prompts,
        )
        first_frames = split_latents("image_latents", image_latents, num_prompts, num_dims=5)
        references = split_latents("reference_latents", reference_latents, num_prompts, num_dims=4)

        self._keep_scales(scales)
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        self._current_timestep = None
        device = self._execution_device
        num_rows = num_prompts * num_videos_per_prompt
        position_frame_rate = conditioning_frame_rate(frame_rate, motion_speed)

        # 2. Read the prompts: text encoder and connectors, once
        if text_context is None:
            text_context = self.encode_text_context(
                prompts, prompt_embeds, prompt_attention_mask, max_sequence_length, device
            )
        if scales.uses_text_guidance and negative_text_context is None:
            negative_text_context = self.encode_text_context(
                None if negative_prompt_embeds is not None else negative_prompts,
                negative_prompt_embeds,
                negative_prompt_attention_mask,
                max_sequence_length,
                device,
            )
        if num_frames is None:
            num_frames = self.duration_head.predict_num_frames(
                text_context.video_embeds,
                text_context.audio_embeds,
                frame_rate=frame_rate,
                temporal_compression_ratio=self.vae_temporal_compression_ratio,
                min_seconds=min_seconds,
                max_seconds=max_seconds,
            )
        context = text_context.to(device).repeat_rows(num_videos_per_prompt)
        negative_context = None
        if scales.uses_text_guidance:
            negative_context = negative_text_context.to(device).repeat_rows(num_videos_per_prompt)

        # 3. Encode the voices and the faces
        voices = self.prepare_references(clips, references)
        voices = None if voices is None else voices.repeat_rows(num_videos_per_prompt)
        first_frames = [
            latent if face is None else self.encode_image(face, height, width, image_crf)
            for face, latent in zip(images, first_frames)
        ]

        # 4. Prepare latents
        noise_scale = (sigmas[0] if sigmas is not None else 1.0) if noise_scale is None else noise_scale
        latents, conditioning_mask, clean_latents, video_positions = self.prepare_video_tokens(
            conditions,
            [frame for frame in first_frames for _ in range(num_videos_per_prompt)],
            height,
            width,
            num_frames,
            position_frame_rate,
            noise_scale,
            generator,
            latents,
        )
        audio_num_frames = (
            self.audio_length(num_frames, frame_rate) if audio_latents is None else audio_latents.shape[2]
        )
        audio_latents = self.prepare_audio_latents(
            num_rows,
            num_channels_latents=self.audio_latent_channels,
            audio_latent_length=audio_num_frames,
            num_mel_bins=self.audio_mel_bins,
            noise_scale=noise_scale,
            dtype=torch.float32,
            device=device,
            generator=generator,
            latents=None if audio_latents is None else audio_latents.to(device),
        )
        audio_positions = self.transformer.audio_rope.prepare_audio_coords(num_rows, audio_num_frames, device)

        # 5. Prepare the noise levels
        scheduler = self.prepare_scheduler(num_inference_steps, sigmas, device)
        # A scheduler counts its own steps, so each modality has one.
        audio_scheduler = copy.deepcopy(scheduler)
        timesteps = scheduler.timesteps
        self._num_timesteps = len(timesteps)

        # 6. Denoise
        with (
            ReferenceAttention(self.transformer) as attention,
            self.progress_bar(total=len(timesteps)) as progress_bar,
        ):
            denoiser = Denoiser(
                transformer=self.transformer,
                attention=attention,
                context=context,
                negative_context=negative_context,
                references=voices,
                video_positions=video_positions,
                audio_positions=audio_positions,
                conditioning_mask=conditioning_mask,
                use_cross_timestep=(
                    not is_first_generation(self.transformer) if use_cross_timestep is None else use_cross_timestep
                ),
                stg_blocks=stg_blocks,
                mask_video_from_reference=mask_video_from_reference,
                mask_reference_from_text=mask_reference_from_text,
                attention_kwargs=attention_kwargs,
                passes_per_forward={"sequential": 1, "packed": None}.get(guidance_batching, guidance_batching),
            )
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                guider.set_state(step=i, num_inference_steps=len(timesteps), timestep=t)
                plan = GuidancePlan.from_scales(scales, 0.0 if voices is None else guider.scale)
                sigma = scheduler.sigmas[i].to(device)
                video_x0, audio_x0 = denoiser.predict(plan, latents, audio_latents, sigma, t)

                # Clean tokens are put back in x0 space, before the step.
                video_x0 = video_x0 * (1 - conditioning_mask) + clean_latents * conditioning_mask
                latents = scheduler.step((latents - video_x0) / sigma, t, latents, return_dict=False)[0]
                audio_latents = audio_scheduler.step(
                    (audio_latents - audio_x0) / sigma, t, audio_latents, return_dict=False
                )[0]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "audio_latents": audio_latents,
                        "prompt_embeds": context.video_embeds,
                        "negative_prompt_embeds": negative_context and negative_context.video_embeds,
                    }
                    chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, chosen) or {}
                    latents = changed.get("latents", latents)
                    audio_latents = changed.get("audio_latents", audio_latents)
                progress_bar.update()

        # 7. Decode
        video, audio = self.decode_tokens(
            latents,
            audio_latents,
            height,
            width,
            num_frames,
            output_type,
            dtype=context.video_embeds.dtype,
            generator=generator,
            decode_timestep=decode_timestep,
            decode_noise_scale=decode_noise_scale,
        )
        self.maybe_free_model_hooks()
        if not return_dict:
            return (video, audio)
        return LTX2PipelineOutput(frames=video, audio=audio)

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
        num_videos_per_prompt: int,
        text_context: TextContext | None,
        negative_text_context: TextContext | None,
        image: Any,
        image_latents: torch.Tensor | None,
        conditions: LTX2VideoCondition | list[LTX2VideoCondition] | None,
        reference_audio: Any,
        reference_latents: Any,
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
        check_count("num_inference_steps", num_inference_steps)
        if num_inference_steps == 1 and sigmas is None and self.scheduler.config.get("shift_terminal"):
            raise ValueError(
                "`num_inference_steps` is 1, and one step can't be stretched to the scheduler's `shift_terminal`; take at"
                " least 2 steps, or give `sigmas`."
            )
        check_count("num_videos_per_prompt", num_videos_per_prompt)
        for name, value in (("height", height), ("width", width)):
            check_count(name, value)
        if num_frames is not None:
            check_count("num_frames", num_frames)
            ratio = self.vae_temporal_compression_ratio
            if (num_frames - 1) % ratio:
                below = (num_frames - 1) // ratio * ratio + 1
                raise ValueError(
                    f"`num_frames` is {num_frames}; give {ratio}k + 1 frames, for example {below} or {below + ratio}."
                )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}; give one of 'pil', 'np', 'pt', 'latent'.")
        if guidance_batching not in ("sequential", "packed"):
            check_count("guidance_batching", guidance_batching)
        for first, second in (
            (("image", image), ("image_latents", image_latents)),
            (("reference_audio", reference_audio), ("reference_latents", reference_latents)),
        ):
            if first[1] is not None and second[1] is not None:
                raise ValueError(f"`{first[0]}` and `{second[0]}` are both given; leave one of them out.")
        condition_list = [conditions] if isinstance(conditions, LTX2VideoCondition) else conditions or []
        if (image is not None or image_latents is not None) and any(item.index == 0 for item in condition_list):
            raise ValueError(
                "`conditions` has one at index 0 and there is an `image`: give the first frame only once."
            )
        if negative_text_context is not None and negative_text_context.batch_size != num_prompts:
            raise ValueError(
                f"`negative_text_context` has {negative_text_context.batch_size} rows for {num_prompts} prompts; give"
                " one row for each."
            )
        num_rows = num_prompts * num_videos_per_prompt
        if isinstance(generator, list) and len(generator) != num_rows:
            raise ValueError(f"`generator` is a list of {len(generator)} for {num_rows} videos; give one for each.")
        for name, value in (("latents", latents), ("audio_latents", audio_latents)):
            if value is not None and value.shape[0] != num_rows:
                raise ValueError(f"`{name}` has {value.shape[0]} rows for {num_rows} videos; give one for each.")
        super().check_inputs(
            # diffusers knows nothing of a finished context, and would ask for a prompt.
            prompt=[""] * num_prompts if text_context is not None else prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            latents=latents,
            audio_latents=audio_latents,
            stg_scale=0.0,
            audio_stg_scale=0.0,
            **shared,
        )

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
        if latents is not None and latents.ndim == 5:
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
        if scales.uses_stg and not blocks:
            raise ValueError(
                f"`spatio_temporal_guidance_blocks` is {blocks}; name at least one block, or set `stg_scale` to 0."
            )
        if not all(isinstance(block, int) and 0 <= block < num_blocks for block in blocks):
            raise ValueError(
                f"`spatio_temporal_guidance_blocks` is {list(blocks)}; this transformer's blocks are 0 to {num_blocks - 1}."
            )
        return tuple(blocks)

    def _keep_scales(self, scales: GuidanceScales) -> None:
        # Callbacks read these through the properties of `LTX2ConditionPipeline`.
        for item in fields(scales):
            setattr(self, f"_{item.name}", getattr(scales, item.name))

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
        video_embeds, audio_embeds, attention_mask = self.connectors(
            prompt_embeds, attention_mask, padding_side=self.tokenizer_padding_side
        )
        # Without a mask every attention kernel can be used; with learnable registers no token is ever masked.
        return TextContext(video_embeds, audio_embeds, None if attention_mask.all() else attention_mask)

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
            scheduler = self.scheduler.from_config(config, use_dynamic_shifting=False, shift=1.0, shift_terminal=None)
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
        return video, self.vocoder(log_mel)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Loads an adapter, in the released key format or in diffusers' own, from safetensors only.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): File, folder, Hub repository, tensors.
            adapter_name (`str`, *optional*): What `set_adapters` will call it.
            hotswap (`bool`, defaults to `False`): Replace the weights of the adapter of that name in place.
            kwargs: Where to look, as in [`find_adapter_file`], and `low_cpu_mem_usage`.

        Raises:
            ValueError: If it is not a safetensors file, fits no module, or was made for the other model generation;
                diffusers would load nothing then and only log it.
        """
        loading = {name: kwargs.pop(name) for name in ("low_cpu_mem_usage",) if name in kwargs}
        state_dict, metadata = load_adapter(pretrained_model_name_or_path_or_dict, **kwargs)
        check_adapter(state_dict, metadata, self.transformer)
        super().load_lora_weights(state_dict, adapter_name, hotswap, lora_config=lora_config(metadata), **loading)

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: Any, *, lora_config: dict | None = None, **kwargs: Any
    ) -> Any:
        """As [`LTX2LoraLoaderMixin.lora_state_dict`]; `lora_config` is the configuration of weights given as a dict."""
        output = super().lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        if lora_config is None or not kwargs.get("return_lora_metadata"):
            return output
        return output[0], lora_config

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "LTX2IDLoRAPipeline":
        """
        The same components in this pipeline, in the dtypes they have: unless a `dtype` is given, nothing is cast
        (diffusers casts the shared modules to float32). See [`DiffusionPipeline.from_pipe`].
        """
        if kwargs.get("dtype") is not None or kwargs.get("torch_dtype") is not None:
            return super().from_pipe(pipeline, **kwargs)
        names, _ = cls._get_signature_keys(cls)
        components = {name: kwargs.get(name, pipeline.components.get(name)) for name in names}
        if unknown := sorted(set(kwargs) - set(components)):
            raise ValueError(f"`from_pipe` knows no {unknown}; the components are {sorted(components)}.")
        return cls(**components)


def _per_row(value: float | list[float], latents: torch.Tensor) -> torch.Tensor:
    values = value if isinstance(value, list) else [value] * latents.shape[0]
    return torch.tensor(values, device=latents.device, dtype=latents.dtype)
