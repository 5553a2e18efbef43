"""Two stages: the clip at half size with the ID-LoRA, then upsampled and refined with the distilled LoRA."""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import (
    LTX2DurationHead,
    LTX2LatentUpsamplerModel,
    LTX2TextConnectors,
    LTX2Vocoder,
    LTX2VocoderWithBWE,
)
from diffusers.pipelines.ltx2.pipeline_output import LTX2PipelineOutput
from transformers import (
    Gemma3ForConditionalGeneration,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedForConditionalGeneration,
    GemmaTokenizer,
    GemmaTokenizerFast,
    ProcessorMixin,
)

from .attention_processor import transformer_lock
from .continuation import EarlierClip
from .denoising import TextContext
from .guidance import check_scale
from .inputs import check_sigmas
from .pipeline_ltx2_idlora import LTX2IDLoRAPipeline
from .recipes import TWO_STAGE


UPSAMPLING = 2
# What stage 2 takes over from stage 1; guidance, voice and prompt have done their work by then.
SHARED_ARGUMENTS = (
    "image",
    "continue_from",
    "lead_in",
    "conditions",
    "frame_rate",
    "motion_speed",
    "sampler",
    "use_cross_timestep",
    "image_crf",
    "num_videos_per_prompt",
    "generator",
    "decode_timestep",
    "decode_noise_scale",
    "attention_kwargs",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    # Every process draws the noise of stage 2 too.
    "guidance_parallel",
)
NO_GUIDANCE = {
    "guidance_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "identity_guidance_scale": 0.0,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
}


class LTX2IDLoRATwoStagePipeline(LTX2IDLoRAPipeline):
    r"""
    [`LTX2IDLoRAPipeline`] in two stages (method section 5). The first makes the clip at half the size with the
    ID-LoRA; its picture is upsampled in latent space and refined in a few steps with the distilled LoRA instead of the
    ID-LoRA, while its sound stays as it is. Adapters are switched by their weights: the transformer is loaded once.

    Args:
        latent_upsampler ([`LTX2LatentUpsamplerModel`], *optional*):
            The x2 upsampler, in the folder `latent_upsampler` of the LTX-2 repositories.
        others: The components of [`LTX2ConditionPipeline`].

    Example:
        ```py
        upsampler = LTX2LatentUpsamplerModel.from_pretrained(
            "diffusers/LTX-2.3-Diffusers", subfolder="latent_upsampler", dtype=torch.bfloat16
        )
        pipe = LTX2IDLoRATwoStagePipeline.from_pretrained(
            "diffusers/LTX-2.3-Diffusers", latent_upsampler=upsampler, dtype=torch.bfloat16
        )
        pipe.load_lora_weights("path/to/ltx-2.3-distilled-lora.safetensors", adapter_name="distilled")
        pipe.load_lora_weights("AviadDahan/LTX-2.3-ID-LoRA-CelebVHQ-3K", adapter_name="id_lora")
        output = pipe(prompt=prompt, image="face.png", reference_audio="voice.wav", height=1024, width=1024)
        ```
    """

    model_cpu_offload_seq = LTX2IDLoRAPipeline.model_cpu_offload_seq.replace(
        "transformer->", "transformer->latent_upsampler->"
    )
    _optional_components = [*LTX2IDLoRAPipeline._optional_components, "latent_upsampler"]

    # Spelled out, because the list of components is read from the signature.
    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLLTX2Video,
        audio_vae: AutoencoderKLLTX2Audio,
        text_encoder: Gemma3ForConditionalGeneration | Gemma4UnifiedForConditionalGeneration,
        tokenizer: GemmaTokenizer | GemmaTokenizerFast,
        connectors: LTX2TextConnectors,
        transformer: LTX2VideoTransformer3DModel,
        vocoder: LTX2Vocoder | LTX2VocoderWithBWE,
        audio_scheduler: FlowMatchEulerDiscreteScheduler | None = None,
        processor: ProcessorMixin | None = None,
        prompt_enhancer: Gemma4ForConditionalGeneration | None = None,
        duration_head: LTX2DurationHead | None = None,
        latent_upsampler: LTX2LatentUpsamplerModel | None = None,
    ):
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            audio_vae=audio_vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            connectors=connectors,
            transformer=transformer,
            vocoder=vocoder,
            audio_scheduler=audio_scheduler,
            processor=processor,
            prompt_enhancer=prompt_enhancer,
            duration_head=duration_head,
        )
        self.register_modules(latent_upsampler=latent_upsampler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        reference_audio: Any = None,
        negative_prompt: Any = None,
        *,
        height: int | None = None,
        width: int | None = None,
        distilled_adapter: str | None = "distilled",
        distilled_scales: tuple[float, float] = TWO_STAGE["distilled_scales"],
        stage_2_sigmas: Sequence[float] = TWO_STAGE["stage_2_sigmas"],
        output_type: str = "pil",
        return_dict: bool = True,
        **stage_1: Any,
    ) -> LTX2PipelineOutput | tuple:
        r"""
        Generates talking videos in two stages.

        Args:
            prompt, image, reference_audio, negative_prompt: See [`~LTX2IDLoRAPipeline.__call__`].
            height (`int`, *optional*), width (`int`, *optional*):
                Of the result, in pixels, multiples of 64. Left out: as the clip that goes on, or from the first
                image's aspect, 1024 on its long side; 1024 x 1024 without an image.
            distilled_adapter (`str`, *optional*, defaults to `"distilled"`):
                The name under which the distilled LoRA was loaded; `None` for a distilled checkpoint.
            distilled_scales (`tuple[float, float]`, defaults to `(0.0, 0.8)`):
                Its weight in stage 1, beside the active adapters, and in stage 2, alone.
            stage_2_sigmas (`Sequence[float]`, defaults to `(0.909375, 0.725, 0.421875)`):
                The noise levels of stage 2.
            output_type (`str`, defaults to `"pil"`), return_dict (`bool`, defaults to `True`):
                See [`~LTX2IDLoRAPipeline.__call__`].
            stage_1:
                Every other argument of [`~LTX2IDLoRAPipeline.__call__`]. Those of guidance, voice and schedule are of
                stage 1; stage 2 has no guidance, and the same `sampler`.

        Returns:
            [`LTX2PipelineOutput`] or `tuple`: As [`~LTX2IDLoRAPipeline.__call__`].

        Raises:
            ValueError: On input that can't work, before any model runs.
        """
        stage_1 = {"image": image, **stage_1}
        stage_2_sigmas = check_sigmas(stage_2_sigmas, name="stage_2_sigmas")
        # Adapters are switched for the length of the call, so calls of other threads on this transformer wait.
        with transformer_lock(self.transformer):
            adapters = self.check_stages(height, width, distilled_adapter, distilled_scales, stage_1, output_type)
            stage_1_scale, stage_2_scale = distilled_scales
            beside = {distilled_adapter: stage_1_scale} if distilled_adapter and stage_1_scale else {}
            try:
                with self.adapters_weighted(dict.fromkeys(adapters) | beside):
                    latents, audio_latents = super().__call__(
                        prompt,
                        reference_audio=reference_audio,
                        negative_prompt=negative_prompt,
                        height=None if height is None else height // UPSAMPLING,
                        width=None if width is None else width // UPSAMPLING,
                        output_type="latent",
                        return_dict=False,
                        **stage_1,
                    )
                text_context, _ = self._text_contexts
                with self.adapters_weighted({distilled_adapter: stage_2_scale} if distilled_adapter else {}):
                    return super().__call__(
                        text_context=text_context,
                        latents=self.upsample(latents),
                        audio_latents=audio_latents,
                        freeze_audio=True,
                        sigmas=stage_2_sigmas,
                        output_type=output_type,
                        return_dict=return_dict,
                        **NO_GUIDANCE,
                        **{name: stage_1[name] for name in SHARED_ARGUMENTS if name in stage_1},
                    )
            finally:
                self._text_contexts = None

    def check_stages(
        self,
        height: int | None,
        width: int | None,
        distilled_adapter: str | None,
        distilled_scales: tuple[float, float],
        stage_1: dict[str, Any],
        output_type: str,
    ) -> list[str]:
        """
        The adapters of stage 1, but for the distilled one. Raises a ValueError where the stages can't work; the
        arguments are those of [`~LTX2IDLoRATwoStagePipeline.__call__`].
        """
        if self.latent_upsampler is None:
            raise ValueError(
                "`latent_upsampler` is missing; give it to `from_pretrained`, from the folder of that name in the"
                " LTX-2 repositories, or use `LTX2IDLoRAPipeline` for one stage."
            )
        grid = UPSAMPLING * self.vae_spatial_compression_ratio
        for name, value in (("height", height), ("width", width)):
            if value is not None and (not isinstance(value, int) or value < grid or value % grid):
                raise ValueError(f"`{name}` is {value!r}; give a multiple of {grid}, twice that of stage 1.")
        if stage_1.get("image_latents") is not None:
            raise ValueError("`image_latents` are of one size, and each stage has its own; give the `image`.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}; give one of 'pil', 'np', 'pt', 'latent'.")
        if not isinstance(distilled_scales, (tuple, list)) or len(distilled_scales) != 2:
            raise ValueError(f"`distilled_scales` is {distilled_scales!r}; give a weight for each of the two stages.")
        for scale in distilled_scales:
            check_scale("distilled_scales", scale)
        loaded = self.get_list_adapters().get("transformer", [])
        if distilled_adapter is not None and distilled_adapter not in loaded:
            raise ValueError(
                f"`distilled_adapter` is {distilled_adapter!r}, and the adapters are {loaded}; load the distilled LoRA"
                " under that name, or give `None` for a distilled checkpoint."
            )
        adapters = [name for name in self.active_transformer_adapters() if name != distilled_adapter]
        others = [name for name in loaded if name != distilled_adapter]
        if others and not adapters:
            raise ValueError(
                f"Of the adapters {loaded} none but `distilled_adapter` is active (loading one deactivates the"
                f" others); call `set_adapters({others})`."
            )
        return adapters

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
        As [`LTX2IDLoRAPipeline`] fills it in, but stage 1 has half the size of a clip that goes on. Stage 2 has the
        size of its `latents`.
        """
        if height is None and width is None and latents is None and earlier_clips:
            grid = self.vae_spatial_compression_ratio
            sizes = earlier_clips[0].frames.shape[1:3]
            height, width = (max(grid, size // (UPSAMPLING * grid) * grid) for size in sizes)
        return super().default_size(height, width, num_frames, images, earlier_clips, latents)

    def prepare_contexts(self, *arguments: Any) -> tuple[TextContext, TextContext | None]:
        """As [`LTX2IDLoRAPipeline`] does it, and kept for stage 2."""
        self._text_contexts = super().prepare_contexts(*arguments)
        return self._text_contexts

    def upsample(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Latents of twice the height and width.

        Args:
            latents (`torch.Tensor`): Un-normalised, `[B, C, F, h, w]`.

        Returns:
            `torch.Tensor`: Un-normalised, `[B, C, F, 2 h, 2 w]`, float32.
        """
        return self.latent_upsampler(latents.to(self._execution_device, self.latent_upsampler.dtype)).float()
