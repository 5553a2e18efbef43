"""The pipeline: a prompt, a face and a voice to one talking video."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_output import LTX2PipelineOutput
from diffusers.pipelines.ltx2.utils import conditioning_frame_rate

from .attention_processor import ReferenceAttention, is_first_generation
from .denoising import Denoiser, TextContext
from .guidance import GuidancePlan, GuidanceScales, GuidanceWindow, IdentityGuidance, check_windows
from .inputs import (
    SpeakerTurn,
    check_given_once,
    check_sigmas,
    count_prompts,
    identity_guider,
    place_conditions,
    read_conditions,
    read_earlier_clips,
    read_images,
    read_negative_prompts,
    read_prompts,
    read_references,
    read_speakers,
    split_latents,
)
from .parallel import guidance_group
from .pipeline_lora import IDLoRALoaderMixin
from .pipeline_steps import LTX2IDLoRASteps, denoising_step
from .prompt import IDLoRAPrompt
from .recipes import SHIFT_TOKENS


class LTX2IDLoRAPipeline(IDLoRALoaderMixin, LTX2IDLoRASteps):
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
        prompt = "[VISUAL]: ... [SPEECH]: ... [SOUNDS]: ..."
        output = pipe(prompt=prompt, image="face.png", reference_audio="voice.wav")
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
        speakers: list[SpeakerTurn] | list[list[SpeakerTurn]] | None = None,
        continue_from: Any = None,
        lead_in: float = 0.0,
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
        sampler: str | None = None,
        sigma_shift_tokens: int | None = SHIFT_TOKENS,
        guidance_scale: float = 3.0,
        audio_guidance_scale: float | None = None,
        cfg_star: bool = False,
        identity_guidance_scale: float | None = None,
        identity_guidance: IdentityGuidance | None = None,
        identity_guidance_mode: str = "exact",
        stg_scale: float = 1.0,
        audio_stg_scale: float | None = None,
        spatio_temporal_guidance_blocks: list[int] | None = None,
        modality_scale: float = 3.0,
        audio_modality_scale: float | None = None,
        guidance_rescale: float = 0.0,
        audio_guidance_rescale: float | None = None,
        guidance_windows: Mapping[str, GuidanceWindow | tuple[float, float]] | None = None,
        guidance_batching: str | int = "sequential",
        guidance_parallel: bool = False,
        use_cross_timestep: bool | None = None,
        mask_video_from_reference: bool = False,
        mask_reference_from_text: bool = False,
        image_crf: int | None = 0,
        noise_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        audio_latents: torch.Tensor | None = None,
        freeze_audio: bool = False,
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
                The face, as the first frame: one for all prompts, or one per prompt (`None` for none). EXIF rotation
                is honoured and transparency flattened; resized and cropped at the centre. Without it the prompt alone
                drives the face.
            reference_audio (path, `(waveform, sampling_rate)`, `torch.Tensor`, tuple of clips, list, *optional*):
                The voice: one for all prompts, or a list with one per prompt (`None` for none). A path is any audio
                file or a video with sound. A tuple of several clips of one speaker is encoded clip by clip and laid on
                one timeline. Without it this is plain LTX-2 generation and identity guidance is off.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from. Unused where both text guidance scales are 1.
            reference_audio_sampling_rate (`int`, *optional*):
                In Hz, for `reference_audio` given as tensors.
            reference_latents (`torch.Tensor` or `list[torch.Tensor | None]`, *optional*):
                Instead of `reference_audio`: un-normalised audio latents `[B or 1, C, L, M]`, or one `[1, C, L, M]`
                per prompt, as [`~LTX2IDLoRAPipeline.encode_reference_audio`] gives them.
            speakers (`list[SpeakerTurn]`, or a list of one such list per prompt, *optional*):
                Experimental: several voices by turns, instead of `reference_audio`. See [`SpeakerTurn`].
            continue_from (path, `(frames, audio)`, or a list of one per prompt, *optional*):
                An earlier clip that goes on, instead of `image`: about its last second, picture and sound, is given
                clean. The result begins with its last frame; [`join_clips`] puts both together. See
                [`read_earlier_clip`].
            lead_in (`float`, defaults to `0.0`):
                Seconds that are generated before the clip and trimmed from picture and sound, rounded up to whole
                latent frames (0.32 s at 25 frames per second).
            image_latents (`torch.Tensor`, *optional*):
                Instead of `image`: un-normalised video latents of the first frame, `[B or 1, C, 1, h, w]`.
            conditions (`LTX2VideoCondition` or a list of these, *optional*):
                Further frames, e.g. a last frame; they hold for every prompt. See [`LTX2ConditionPipeline`]. An
                `index` counts latent frames of the clip that is asked for; 0 is the first frame that is generated.
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
            sampler (`str`, *optional*):
                `"euler"`, or `"res_2s"` with two predictions per step. Left out: what `pipe.scheduler` is.
            sigma_shift_tokens (`int`, *optional*, defaults to `4096`):
                Video tokens that the schedule is shifted for; `None` is their real number.
            guidance_scale (`float`, defaults to `3.0`):
                Text guidance on video; 1 is off.
            audio_guidance_scale (`float`, *optional*):
                Text guidance on audio; 1 is off. Left out: 7.0, or `guidance_scale` where that is 1 or less.
            cfg_star (`bool`, defaults to `False`):
                Whether the negative prediction is first scaled to the prompt's (method section 5).
            identity_guidance_scale (`float`, *optional*):
                How strongly the reference's voice is amplified; 0 is off. Left out: what the active adapter's metadata
                recommend, or 3.0.
            identity_guidance ([`IdentityGuidance`], *optional*):
                Instead of `identity_guidance_scale`: a schedule over the steps.
            identity_guidance_mode (`str`, defaults to `"exact"`):
                `"exact"` runs a pass without the reference. `"shared"` takes that prediction from a copy of the target
                audio in the pass with the reference: nearly free and approximate, see `docs/performance.md`.
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
            guidance_windows (`Mapping[str, GuidanceWindow | tuple[float, float]]`, *optional*):
                Fractions of the steps between which `"text"`, `"identity"`, `"stg"` and `"modality"` guidance act.
            guidance_batching (`str` or `int`, defaults to `"sequential"`):
                `"sequential"` runs the passes of a step one by one, `"packed"` all in one forward, a number that many
                at a time; `"auto"` packs where weights are offloaded or rows are small, and packs less when memory
                runs out. The results agree; packing needs more memory.
            guidance_parallel (`bool`, defaults to `False`):
                Whether the passes of a step are shared among the processes of `torch.distributed`, which all make the
                same call and get the same result.
            use_cross_timestep (`bool`, *optional*):
                Left out: right for the model's generation (method section 3).
            mask_video_from_reference, mask_reference_from_text (`bool`, defaults to `False`):
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
            freeze_audio (`bool`, defaults to `False`):
                Whether `audio_latents` are the finished sound that the picture is made for (method section 5).
            prompt_embeds, prompt_attention_mask (`torch.Tensor`, *optional*), and both with `negative_`:
                Outputs of [`~LTX2ConditionPipeline.encode_prompt`] instead of the texts.
            text_context ([`TextContext`], *optional*), negative_text_context ([`TextContext`], *optional*):
                Outputs of [`~LTX2IDLoRAPipeline.encode_text_context`] instead of the texts; text encoder and
                connectors are then not run.
            decode_timestep (`float` or `list[float]`, defaults to `0.0`), decode_noise_scale (*optional*):
                For video VAEs with timestep conditioning.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for un-normalised latents of both modalities, from which nothing
                is trimmed.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`LTX2PipelineOutput`] rather than a tuple.
            attention_kwargs (`dict`, *optional*):
                Given to the transformer; `{"scale": 0.5}` scales loaded LoRAs.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step; may return changed `latents` and
                `audio_latents`. Setting `pipe._interrupt = True` in it ends the loop early, and setting
                `pipe._guidance_scale` and the like changes the scales of the following steps.
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
            cfg_star=cfg_star,
        )
        windows = check_windows(guidance_windows)
        guider = identity_guider(identity_guidance_scale, identity_guidance, self.recommended_identity_guidance_scale)
        prompts = read_prompts(prompt)
        num_prompts = count_prompts(prompts, prompt_embeds, text_context)
        negative_prompts = read_negative_prompts(negative_prompt, num_prompts)
        sigmas = None if sigmas is None else check_sigmas(sigmas)
        stg_blocks = self.default_stg_blocks(spatio_temporal_guidance_blocks, scales)
        conditions = read_conditions(conditions)
        beginnings = {"image": image, "image_latents": image_latents, "continue_from": continue_from}
        check_given_once(**beginnings)
        first_frame = next((name for name, value in beginnings.items() if value is not None), None)
        check_given_once(reference_audio=reference_audio, reference_latents=reference_latents, speakers=speakers)
        images = read_images(image, num_prompts)
        clips = read_references(reference_audio, reference_audio_sampling_rate, num_prompts)
        turns = read_speakers(speakers, num_prompts)
        earlier_clips = read_earlier_clips(continue_from, num_prompts, frame_rate, self.output_sampling_rate)
        num_context_frames, num_trimmed_frames = self.trimmed_frames(earlier_clips, lead_in, frame_rate)
        height, width, num_frames = self.default_size(height, width, num_frames, images, earlier_clips, latents)
        num_frames = self.generated_frames(num_frames, num_trimmed_frames, latents)
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
            negative_text_context=negative_text_context,
            uses_text_guidance=scales.uses_text_guidance,
            conditions=conditions,
            first_frame=first_frame,
            mask_reference_from_text=mask_reference_from_text,
            clips=clips,
            turns=turns,
            num_trimmed_frames=num_trimmed_frames,
            image_crf=image_crf,
            frame_rate=frame_rate,
            motion_speed=motion_speed,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            sampler=sampler,
            sigma_shift_tokens=sigma_shift_tokens,
            freeze_audio=freeze_audio,
            identity_guidance_mode=identity_guidance_mode,
            noise_scale=noise_scale,
            num_videos_per_prompt=num_videos_per_prompt,
            max_sequence_length=max_sequence_length,
            generator=generator,
            output_type=output_type,
            guidance_batching=guidance_batching,
            num_prompts=num_prompts,
        )
        _, *first_frame_size = self._latent_size(height, width, 1)
        first_frames = split_latents(
            "image_latents",
            image_latents,
            num_prompts,
            (self.transformer.config.in_channels, 1, *first_frame_size),
        )
        references = split_latents("reference_latents", reference_latents, num_prompts, self._audio_latent_shape())

        group = guidance_group(self.transformer) if guidance_parallel else None

        self._keep_scales(scales)
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        self._current_timestep = None
        device = self._execution_device
        position_frame_rate = conditioning_frame_rate(frame_rate, motion_speed)

        # 2. Read the prompts: text encoder and connectors, once for all of them
        text_context, negative_text_context = self.prepare_contexts(
            prompts,
            negative_prompts if scales.uses_text_guidance else None,
            text_context,
            negative_text_context,
            (prompt_embeds, prompt_attention_mask),
            (negative_prompt_embeds, negative_prompt_attention_mask),
            max_sequence_length,
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
            num_frames += num_trimmed_frames
            self.check_times(num_frames, num_trimmed_frames, frame_rate, conditions, first_frame, turns, audio_latents)
        dtype = self.transformer.dtype
        context = text_context.to(device, dtype).repeat_rows(num_videos_per_prompt)
        negative_context = None
        if negative_text_context is not None:
            negative_context = negative_text_context.to(device, dtype).repeat_rows(num_videos_per_prompt)

        # 3. Encode the voices, the faces, and the clips that go on
        num_audio_tokens = (
            self.audio_length(num_frames, frame_rate) if audio_latents is None else audio_latents.shape[2]
        )
        if speakers is None:
            voices = self.prepare_references(clips, references)
        else:
            first_second = num_trimmed_frames / frame_rate
            voices = self.prepare_speakers(turns, first_second, num_audio_tokens, begins_early=not earlier_clips)
        voices = None if voices is None else voices.repeat_rows(num_videos_per_prompt)
        # A face given once for all prompts is one object, and is encoded once.
        faces = {id(face): face for face in images if face is not None}
        faces = {key: self.encode_image(face, height, width, image_crf) for key, face in faces.items()}
        first_frames = [faces.get(id(face), latents_of_it) for face, latents_of_it in zip(images, first_frames)]
        first_sounds = [None] * num_prompts
        if earlier_clips:
            encoded = {
                id(clip): (
                    self.encode_image(clip.last_frames(num_context_frames), height, width),
                    self.encode_earlier_sound(clip, num_context_frames, frame_rate),
                )
                for clip in {id(clip): clip for clip in earlier_clips}.values()
            }
            first_frames, first_sounds = zip(*(encoded[id(clip)] for clip in earlier_clips))

        # 4. Prepare latents
        noise_scale = (sigmas[0] if sigmas is not None else 1.0) if noise_scale is None else noise_scale
        num_trimmed = num_trimmed_frames // self.vae_temporal_compression_ratio
        latents, conditioning_mask, clean_latents, video_positions = self.prepare_video_tokens(
            place_conditions(conditions, self._num_latent_frames(num_frames) - num_trimmed, num_trimmed),
            [frame for frame in first_frames for _ in range(num_videos_per_prompt)],
            height,
            width,
            num_frames,
            position_frame_rate,
            noise_scale,
            generator,
            latents,
        )
        audio_latents, audio_conditioning_mask, clean_audio_latents, audio_positions = self.prepare_audio_tokens(
            [sound for sound in first_sounds for _ in range(num_videos_per_prompt)],
            num_audio_tokens,
            freeze_audio,
            noise_scale,
            generator,
            audio_latents,
        )
        if group is not None:
            latents, audio_latents = group.same_everywhere(latents), group.same_everywhere(audio_latents)

        # 5. Prepare the noise levels
        num_video_tokens = math.prod(self._latent_size(height, width, num_frames))
        scheduler = self.prepare_scheduler(
            num_inference_steps, sigmas, device, sigma_shift_tokens or num_video_tokens, sampler
        )
        # A scheduler counts its own steps, so each modality has one.
        audio_scheduler = copy.deepcopy(scheduler)
        timesteps = scheduler.timesteps
        self._num_timesteps = len(timesteps)

        # 6. Denoise
        with (
            self._hooks_freed_on_error(),
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
                # Without clean sound the mask would be nothing but zeros.
                audio_conditioning_mask=audio_conditioning_mask if audio_conditioning_mask.any() else None,
                use_cross_timestep=(
                    not is_first_generation(self.transformer) if use_cross_timestep is None else use_cross_timestep
                ),
                stg_blocks=stg_blocks,
                mask_video_from_reference=mask_video_from_reference,
                mask_reference_from_text=mask_reference_from_text,
                attention_kwargs=attention_kwargs,
                identity_guidance_mode=identity_guidance_mode,
                passes_per_forward=self.pass_packing(guidance_batching, latents, audio_latents),
                parallel=group,
                motion_speed=motion_speed,
            )
            plan, window = None, windows.get("identity", GuidanceWindow())
            # A sampler of second order predicts twice in a step.
            num_steps = math.ceil(len(timesteps) / scheduler.order)
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                step = i // scheduler.order
                guider.set_state(step=step, num_inference_steps=num_steps, timestep=t)
                scales = self._current_scales(negative_context).within(windows, step, num_steps)
                follows_voice = voices is not None and not freeze_audio and window.includes(step, num_steps)
                earlier, plan = plan, GuidancePlan.from_scales(scales, guider.scale if follows_voice else 0.0)
                if earlier is not None and earlier.passes != plan.passes and self.transformer.is_cache_enabled:
                    # A pass that begins again would go on from what it had cached before the gap.
                    self.transformer._reset_stateful_cache()
                sigma = scheduler.sigmas[i].to(device)
                video_x0, audio_x0 = denoiser.predict(plan, latents, audio_latents, sigma, t)

                latents = denoising_step(
                    scheduler, video_x0, latents, clean_latents, conditioning_mask, sigma, t, generator
                )
                audio_latents = denoising_step(
                    audio_scheduler,
                    audio_x0,
                    audio_latents,
                    clean_audio_latents,
                    audio_conditioning_mask,
                    sigma,
                    t,
                    generator,
                )
                if group is not None:
                    # A sampler may have added noise that the processes drew on their own.
                    latents, audio_latents = group.same_everywhere(latents), group.same_everywhere(audio_latents)

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
        with self._hooks_freed_on_error():
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
                first_frame=num_trimmed_frames,
                frame_rate=frame_rate,
            )
        self.maybe_free_model_hooks()
        if not return_dict:
            return (video, audio)
        return LTX2PipelineOutput(frames=video, audio=audio)

    @contextmanager
    def _hooks_freed_on_error(self) -> Iterator[None]:
        # Or a cache would go on in the next call from where this one broke off.
        try:
            yield
        except BaseException:
            self.maybe_free_model_hooks()
            raise

    def _current_scales(self, negative_context: TextContext | None) -> GuidanceScales:
        """The scales as a callback may have left them; without a negative prompt text guidance stays off."""
        scales = GuidanceScales(**{item.name: getattr(self, f"_{item.name}") for item in fields(GuidanceScales)})
        if negative_context is None:
            scales = replace(scales, guidance_scale=1.0, audio_guidance_scale=1.0)
        return scales

    def _keep_scales(self, scales: GuidanceScales) -> None:
        # Callbacks read these through the properties of `LTX2ConditionPipeline`.
        for item in fields(scales):
            setattr(self, f"_{item.name}", getattr(scales, item.name))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "LTX2IDLoRAPipeline":
        """
        The same components in this pipeline, in the dtypes they have: unless a `dtype` is given, nothing is cast
        (diffusers casts the shared modules to float32). Adapters and what they recommend come along. See
        [`DiffusionPipeline.from_pipe`].
        """
        if kwargs.get("dtype") is not None or kwargs.get("torch_dtype") is not None:
            new = super().from_pipe(pipeline, **kwargs)
        else:
            names, _ = cls._get_signature_keys(cls)
            components = {name: kwargs.get(name, pipeline.components.get(name)) for name in names}
            if unknown := sorted(set(kwargs) - set(components)):
                raise ValueError(f"`from_pipe` knows no {unknown}; the components are {sorted(components)}.")
            new = cls(**components)
        new._adapters.update(getattr(pipeline, "_adapters", {}))
        return new
