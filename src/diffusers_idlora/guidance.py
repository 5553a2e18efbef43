"""Identity guidance, and the guidance terms of a step as data: which passes it needs and how they combine."""

import math
import numbers
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.guiders.guider_utils import logger as guider_logger
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import rescale_noise_cfg

from .recipes import ONE_STAGE


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}

# What a window can be given for.
GUIDANCE_TERMS = ("text", "identity", "stg", "modality")


def steps_between(start: float, stop: float, num_inference_steps: int) -> range:
    """The steps of a part of the denoising, from fractions of it; never empty."""
    first = int(start * num_inference_steps)
    return range(first, max(int(stop * num_inference_steps), first + 1))


def check_fractions(start: float, stop: float, names: tuple[str, str] = ("start", "stop")) -> None:
    """Raises a ValueError unless both are fractions of the steps and `start` is the smaller one."""
    for name, value in zip(names, (start, stop)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0.0 <= value <= 1.0:
            raise ValueError(f"`{name}` is {value!r}; give a fraction of the steps between 0 and 1.")
    if start >= stop:
        raise ValueError(
            f"`{names[0]}` ({start}) has to be smaller than `{names[1]}` ({stop}); 0.0 and 1.0 are all steps."
        )


@contextmanager
def _without_experimental_warning():
    # Every construction of a guider would print that guiders are experimental, so every call of the pipeline would.
    disabled, guider_logger.disabled = guider_logger.disabled, True
    try:
        yield
    finally:
        guider_logger.disabled = disabled


class IdentityGuidance(BaseGuidance):
    r"""
    How strongly the voice of the reference is followed, step by step (method section 4, the term `s_id (c - r)`).

    It is told of every scheduler step through [`~IdentityGuidance.set_state`] and answers with the scale for it, which
    the pipeline applies to the audio stream on target tokens only. Outside of its window the extra pass without the
    reference is not run.

    Args:
        scale (`float`, defaults to `3.0`):
            Weight of the difference between the predictions with and without the reference. 0 switches it off.
        start (`float`, defaults to `0.0`):
            Fraction of the steps after which it begins.
        stop (`float`, defaults to `1.0`):
            Fraction of the steps after which it ends; larger than `start`.
        schedule (`str` or `Callable[[float], float]`, defaults to `"constant"`):
            How the scale goes over the window: `"constant"`, `"linear"` (falls from `scale` towards 0), `"cosine"`
            (falls along half a cosine), or a function from the progress through the window, in `[0, 1)`, to a factor
            on `scale`. A function can't be saved.
        enabled (`bool`, defaults to `True`):
            Whether it acts at all.

    Example:
        ```py
        pipe(..., identity_guidance=IdentityGuidance(scale=3.0, start=0.0, stop=0.8, schedule="cosine"))
        ```
    """

    _input_predictions = ["pred_cond", "pred_no_reference"]

    @register_to_config
    def __init__(
        self,
        scale: float = 3.0,
        start: float = 0.0,
        stop: float = 1.0,
        schedule: str | Callable[[float], float] = "constant",
        enabled: bool = True,
    ):
        check_scale("scale", scale)
        check_fractions(start, stop)
        if not callable(schedule) and schedule not in SCHEDULES:
            raise ValueError(f"`schedule` is {schedule!r}; give one of {', '.join(SCHEDULES)} or a function.")
        with _without_experimental_warning():
            super().__init__(start, stop, enabled)
        self._factor = schedule if callable(schedule) else SCHEDULES[schedule]

    @property
    def scale(self) -> float:
        """The scale of the step last told by `set_state`; of the window's first step before any was told."""
        if not self._enabled:
            return 0.0
        if self._num_inference_steps is None:
            return self._scale_at(0.0)
        steps = steps_between(self._start, self._stop, self._num_inference_steps)
        if self._step not in steps:
            return 0.0
        return self._scale_at((self._step - steps.start) / len(steps))

    def _scale_at(self, progress: float) -> float:
        scale = self.config.scale * self._factor(progress)
        check_scale("schedule", scale)
        return scale

    def __repr__(self) -> str:
        if not callable(self.config.schedule):
            return super().__repr__()
        return f"{type(self).__name__}(scale={self.config.scale}, schedule={self.config.schedule!r})"

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Saves `guider_config.json`; see [`~ConfigMixin.save_config`]. A `schedule` function is a ValueError."""
        self._check_serialisable()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _check_serialisable(self) -> None:
        if callable(self.config.schedule):
            raise ValueError(
                f"`schedule` is the function {self.config.schedule!r}, which can't be written to a configuration file;"
                f" use one of {', '.join(SCHEDULES)} to save this guider."
            )

    def prepare_inputs(self, data: Mapping[str, Any]) -> list:
        """One batch per prediction, tagged with its name; see [`BaseGuidance`]."""
        return [
            self._prepare_batch(data, index, name)
            for index, name in enumerate(self._input_predictions[: self.num_conditions])
        ]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Mapping[str, Any]) -> list:
        """As `prepare_inputs`, from the block state of a modular pipeline."""
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, name)
            for index, name in enumerate(self._input_predictions[: self.num_conditions])
        ]

    def forward(self, pred_cond: torch.Tensor, pred_no_reference: torch.Tensor | None = None) -> GuiderOutput:
        """`pred_cond + scale * (pred_cond - pred_no_reference)`, or `pred_cond` where the scale is 0."""
        pred = pred_cond
        if pred_no_reference is not None:
            pred = pred_cond + self.scale * (pred_cond - pred_no_reference)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_no_reference)

    @property
    def is_conditional(self) -> bool:
        """Whether the batch prepared last is the one with the reference."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """Predictions needed at this step: 2, or 1 where the scale is 0."""
        return 1 if self.scale == 0.0 else 2


def check_scale(name: str, value: float) -> None:
    """Raises a ValueError unless `value` is a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"`{name}` is {value!r}; give a number that is 0 or larger.")


@dataclass(frozen=True)
class GuidanceWindow:
    """
    The steps at which a guidance term acts. At the others its extra pass is not run.

    Attributes:
        start (`float`, defaults to `0.0`): Fraction of the steps after which it begins.
        stop (`float`, defaults to `1.0`): Fraction of the steps after which it ends; larger than `start`.
        skip (`tuple[tuple[float, float], ...]`, defaults to `()`):
            Intervals `(start, stop)` of the same fractions in which it pauses.
        every (`int`, defaults to `1`): Only every so many-th step acts, counted from the window's first.

    Example:
        ```py
        GuidanceWindow(start=0.1, stop=0.9, skip=((0.4, 0.5),), every=2)
        ```
    """

    start: float = 0.0
    stop: float = 1.0
    skip: tuple[tuple[float, float], ...] = ()
    every: int = 1

    def __post_init__(self):
        check_fractions(self.start, self.stop)
        if not isinstance(self.skip, (list, tuple)) or not all(map(_is_pair, self.skip)):
            raise ValueError(f"`skip` is {self.skip!r}; give pairs of a start and a stop, as in `((0.4, 0.5),)`.")
        for index, interval in enumerate(self.skip):
            check_fractions(*interval, names=(f"skip[{index}][0]", f"skip[{index}][1]"))
        if isinstance(self.every, bool) or not isinstance(self.every, numbers.Integral) or self.every < 1:
            raise ValueError(f"`every` is {self.every!r}; give a whole number of at least 1.")
        object.__setattr__(self, "skip", tuple(tuple(interval) for interval in self.skip))

    def includes(self, step: int, num_inference_steps: int) -> bool:
        """
        Whether the term acts at a step. A window and a skipped interval are at least one step long each.

        Args:
            step (`int`): The step, from 0.
            num_inference_steps (`int`): How many there are.
        """
        steps = steps_between(self.start, self.stop, num_inference_steps)
        if step not in steps or (step - steps.start) % self.every:
            return False
        return not any(step in steps_between(*interval, num_inference_steps) for interval in self.skip)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2


def check_windows(
    windows: Mapping[str, GuidanceWindow | tuple[float, float]] | None,
) -> dict[str, GuidanceWindow]:
    """
    The windows of a call, each as a [`GuidanceWindow`].

    Args:
        windows (`Mapping[str, GuidanceWindow | tuple[float, float]]`, *optional*):
            By the names in `GUIDANCE_TERMS`; a pair is a start and a stop. A term left out acts at every step.

    Raises:
        ValueError: An unknown term, or what can't be a window.
    """
    if windows is None:
        return {}
    if not isinstance(windows, Mapping):
        raise ValueError(
            f"`guidance_windows` is {windows!r}; give a dictionary from {', '.join(GUIDANCE_TERMS)} to windows."
        )
    checked = {}
    for name, window in windows.items():
        if name not in GUIDANCE_TERMS:
            raise ValueError(f"`guidance_windows` has {name!r}; its terms are {', '.join(GUIDANCE_TERMS)}.")
        if not isinstance(window, GuidanceWindow):
            if not _is_pair(window):
                raise ValueError(
                    f"`guidance_windows[{name!r}]` is {window!r}; give a `GuidanceWindow` or a pair (start, stop)."
                )
            try:
                window = GuidanceWindow(*window)
            except ValueError as error:
                raise ValueError(f"`guidance_windows[{name!r}]` is {window!r}, where {error}") from None
        checked[name] = window
    return checked


@dataclass(frozen=True)
class GuidancePass:
    """
    One way to run the transformer in a step.

    Attributes:
        name (`str`): Its name, also that of its `cache_context`.
        negative (`bool`): With the negative prompt instead of the prompt.
        reference (`bool`): With the reference tokens before the target.
        perturbed (`bool`): With the self-attentions of the STG blocks perturbed.
        isolated (`bool`): With audio-to-video and video-to-audio attention off.
    """

    name: str
    negative: bool = False
    reference: bool = True
    perturbed: bool = False
    isolated: bool = False


CONDITIONAL = GuidancePass("cond")
NEGATIVE = GuidancePass("uncond", negative=True)
NO_REFERENCE = GuidancePass("uncond_identity", reference=False)
PERTURBED = GuidancePass("uncond_stg", perturbed=True)
ISOLATED = GuidancePass("uncond_modality", isolated=True)


@dataclass(frozen=True)
class GuidanceTerm:
    """A push away from another pass: `weight * (conditional - contrast)`, with a weight for each modality."""

    contrast: GuidancePass
    video_weight: float
    audio_weight: float

    @property
    def is_active(self) -> bool:
        """Whether the contrasting pass is needed."""
        return self.video_weight != 0 or self.audio_weight != 0


@dataclass(frozen=True)
class GuidanceScales:
    """
    The scales of a call, checked, with what was left out filled in. Text and modality guidance are off at 1,
    spatio-temporal guidance and rescaling at 0. Every number means itself: 0.0 is 0.0, not "left out".

    Attributes:
        guidance_scale (`float`, defaults to `3.0`): Text guidance on video.
        audio_guidance_scale (`float`, *optional*): On audio; 7.0, or `guidance_scale` where that is 1 or less.
        stg_scale (`float`, defaults to `1.0`): Spatio-temporal guidance on video.
        audio_stg_scale (`float`, *optional*): On audio; `stg_scale`.
        modality_scale (`float`, defaults to `3.0`): Modality guidance on video.
        audio_modality_scale (`float`, *optional*): On audio; `modality_scale`.
        guidance_rescale (`float`, defaults to `0.0`): Rescaling on video.
        audio_guidance_rescale (`float`, *optional*): On audio; `guidance_rescale`.
        cfg_star (`bool`, defaults to `False`): CFG-star for text guidance, see [`GuidancePlan`].
    """

    guidance_scale: float = 3.0
    audio_guidance_scale: float | None = None
    stg_scale: float = 1.0
    audio_stg_scale: float | None = None
    modality_scale: float = 3.0
    audio_modality_scale: float | None = None
    guidance_rescale: float = 0.0
    audio_guidance_rescale: float | None = None
    cfg_star: bool = False

    def __post_init__(self):
        if not isinstance(self.cfg_star, bool):
            raise ValueError(f"`cfg_star` is {self.cfg_star!r}; give `True` or `False`.")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "cfg_star" and (value is not None or item.default is not None):
                check_scale(item.name, value)
        text_default = ONE_STAGE["audio_guidance_scale"] if self.guidance_scale > 1 else self.guidance_scale
        for name, default in (
            ("audio_guidance_scale", text_default),
            ("audio_stg_scale", self.stg_scale),
            ("audio_modality_scale", self.modality_scale),
            ("audio_guidance_rescale", self.guidance_rescale),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    @property
    def uses_text_guidance(self) -> bool:
        """Whether the negative prompt is needed."""
        return self.guidance_scale != 1 or self.audio_guidance_scale != 1

    @property
    def uses_stg(self) -> bool:
        """Whether a perturbed pass is needed."""
        return self.stg_scale != 0 or self.audio_stg_scale != 0

    def within(self, windows: Mapping[str, GuidanceWindow], step: int, num_inference_steps: int) -> "GuidanceScales":
        """
        The scales for one step: those of terms whose window excludes it are off, on both modalities.

        Args:
            windows (`Mapping[str, GuidanceWindow]`):
                As [`check_windows`] gives them. That of `"identity"` is not looked at: its scale is not here.
            step (`int`): The step, from 0.
            num_inference_steps (`int`): How many there are.
        """
        off = {
            "text": {"guidance_scale": 1.0, "audio_guidance_scale": 1.0},
            "stg": {"stg_scale": 0.0, "audio_stg_scale": 0.0},
            "modality": {"modality_scale": 1.0, "audio_modality_scale": 1.0},
        }
        scales = self
        for name, neutral in off.items():
            if name in windows and not windows[name].includes(step, num_inference_steps):
                scales = replace(scales, **neutral)
        return scales


@dataclass(frozen=True)
class GuidancePlan:
    """
    The guidance of one step (method section 4): a sum of terms around the conditional prediction.

    Attributes:
        terms (`tuple[GuidanceTerm, ...]`): What is added to it.
        rescale (`float`, defaults to `0.0`), audio_rescale (`float`, defaults to `0.0`):
            How far the deviation of the sum is brought back to that of the conditional prediction.
        cfg_star (`bool`, defaults to `False`):
            CFG-star ([arXiv 2503.18886](https://huggingface.co/papers/2503.18886)): the negative prediction of each
            sample and modality is scaled by `<c, n> / <n, n>` before its term is formed.
    """

    terms: tuple[GuidanceTerm, ...]
    rescale: float = 0.0
    audio_rescale: float = 0.0
    cfg_star: bool = False

    @classmethod
    def from_scales(cls, scales: "GuidanceScales", identity_guidance_scale: float = 0.0) -> "GuidancePlan":
        """
        The method's four terms, without those that are off. Identity guidance acts on the audio alone.

        Args:
            scales (`GuidanceScales`): The scales of text, spatio-temporal and modality guidance.
            identity_guidance_scale (`float`, defaults to `0.0`): That of identity guidance at this step.
        """
        terms = (
            GuidanceTerm(NEGATIVE, scales.guidance_scale - 1, scales.audio_guidance_scale - 1),
            GuidanceTerm(NO_REFERENCE, 0.0, identity_guidance_scale),
            GuidanceTerm(PERTURBED, scales.stg_scale, scales.audio_stg_scale),
            GuidanceTerm(ISOLATED, scales.modality_scale - 1, scales.audio_modality_scale - 1),
        )
        return cls(
            tuple(term for term in terms if term.is_active),
            scales.guidance_rescale,
            scales.audio_guidance_rescale,
            scales.cfg_star,
        )

    @property
    def passes(self) -> tuple[GuidancePass, ...]:
        """The passes to run, the conditional one first."""
        return (CONDITIONAL, *(term.contrast for term in self.terms))

    def combine(
        self, predictions: Mapping[GuidancePass, tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            predictions (`Mapping[GuidancePass, tuple[torch.Tensor, torch.Tensor]]`):
                Video and audio x0 of every pass in `passes`, `[B, tokens, channels]` each, target tokens only.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The guided video and audio x0.
        """
        video, audio = predictions[CONDITIONAL]
        guided_video, guided_audio = video, audio
        for term in self.terms:
            contrast_video, contrast_audio = predictions[term.contrast]
            if self.cfg_star and term.contrast == NEGATIVE:
                contrast_video = scaled_towards(video, contrast_video)
                contrast_audio = scaled_towards(audio, contrast_audio)
            if term.video_weight != 0:
                guided_video = guided_video + term.video_weight * (video - contrast_video)
            if term.audio_weight != 0:
                guided_audio = guided_audio + term.audio_weight * (audio - contrast_audio)
        if self.rescale > 0:
            guided_video = rescale_noise_cfg(guided_video, video, self.rescale)
        if self.audio_rescale > 0:
            guided_audio = rescale_noise_cfg(guided_audio, audio, self.audio_rescale)
        return guided_video, guided_audio


def scaled_towards(conditional: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """
    The multiple of each sample's negative prediction that is nearest to the conditional one: CFG-star.

    Args:
        conditional (`torch.Tensor`): `[B, ...]`.
        negative (`torch.Tensor`): `[B, ...]`, of the same shape.

    Returns:
        `torch.Tensor`: `<c, n> / <n, n> n` of each sample; 0 where `negative` is 0.
    """
    dims = tuple(range(1, negative.ndim))
    product = (conditional * negative).sum(dims, keepdim=True)
    square = negative.square().sum(dims, keepdim=True)
    return product / square.clamp(min=torch.finfo(square.dtype).tiny) * negative
