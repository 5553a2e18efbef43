"""What a training run was, as facts: the source of an adapter's metadata and of its model card."""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import version
from typing import Any


GENERATIONS = ("ltx-2", "ltx-2.3")


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """
    The facts of a training run that outlive it.

    Args:
        base_model (`str`):
            The checkpoint trained on: a repository on the Hub, or a folder.
        generation (`str`):
            `"ltx-2"` or `"ltx-2.3"`, as [`~lora.transformer_generation`] tells it.
        rank (`int`):
            Rank of the LoRA.
        alpha (`float`):
            Its alpha: the LoRA acts with `alpha / rank`.
        target_modules (`str` or `list[str]`):
            The adapted modules as peft takes them: a regular expression for whole names, or a list of name endings.
        steps (`int`):
            Optimizer steps done.
        batch_size (`int`):
            Samples per optimizer step, over all processes and accumulated batches.
        learning_rate (`float`):
            The highest one of the schedule.
        mask_video_from_reference (`bool`), mask_reference_from_text (`bool`):
            Which attention masks were on (method section 6).
        data_fingerprint (`str`):
            Hash of the prepared data.
        num_samples (`int`):
            Samples in the prepared data.
        base_revision (`str`, *optional*):
            Branch, tag or commit of the base model.
        base_fingerprint (`str`, *optional*):
            Hash of the base transformer's configuration, weight headers and the beginnings of its tensors.
        num_speakers (`int`, *optional*):
            Speakers in the data, where they are known.
        dataset (`str`, *optional*):
            The data set's repository on the Hub, if it has one.
        license (`str`, *optional*):
            The adapter's license as the Hub names it, such as `"apache-2.0"`. Left out: that of the base model.
        positions (`str`, defaults to `"negative"`):
            Where the reference lies in time; negative positions are the only kind (method section 2).
        reference_seconds (`float`, *optional*):
            Mean length of the references in the data.
        reference_dropout (`float`, defaults to `0.0`):
            Probability with which a sample was trained without its reference.
        first_frame_conditioning_p (`float`, defaults to `0.9`):
            Probability with which a sample's first frame was given clean.
        audio_loss_weight (`float`, defaults to `1.0`):
            Weight of the audio term of the loss.
        lora_dropout (`float`, defaults to `0.0`):
            Dropout within the LoRA.
        use_dora (`bool`, defaults to `False`):
            Whether it is a DoRA.
        optimizer (`str`, *optional*), lr_scheduler (`str`, *optional*):
            Their names, such as `"adamw"` and `"linear"`.
        seed (`int`, *optional*):
            The run's seed.
        resolution (`str`, *optional*):
            Width x height x frames, such as `"512x512x121"`; several are joined by commas.
        frame_rate (`float`, *optional*):
            Of the videos, in frames per second.
        dtype (`str`, *optional*):
            What the base model computed in, such as `"bfloat16"`.
        device (`str`, *optional*):
            The machine in words, such as `"1 x NVIDIA H200"`.
        seconds (`float`, *optional*):
            Time of all its steps together.
        final_loss (`float`, *optional*):
            Mean training loss at the end.
        recommended (`dict`, *optional*):
            Arguments of the pipeline's call to use with this adapter, such as `{"identity_guidance_scale": 3.0}`.
        package_version (`str`, *optional*):
            Version of this package; that of the installed one by default.

    Raises:
        ValueError: If a value has no meaning, or can't be written as JSON.
    """

    base_model: str
    generation: str
    rank: int
    alpha: float
    target_modules: str | list[str]
    steps: int
    batch_size: int
    learning_rate: float
    mask_video_from_reference: bool
    mask_reference_from_text: bool
    data_fingerprint: str
    num_samples: int
    base_revision: str | None = None
    base_fingerprint: str | None = None
    num_speakers: int | None = None
    dataset: str | None = None
    license: str | None = None
    positions: str = "negative"
    reference_seconds: float | None = None
    reference_dropout: float = 0.0
    first_frame_conditioning_p: float = 0.9
    audio_loss_weight: float = 1.0
    lora_dropout: float = 0.0
    use_dora: bool = False
    optimizer: str | None = None
    lr_scheduler: str | None = None
    seed: int | None = None
    resolution: str | None = None
    frame_rate: float | None = None
    dtype: str | None = None
    device: str | None = None
    seconds: float | None = None
    final_loss: float | None = None
    recommended: dict[str, Any] = field(default_factory=dict)
    package_version: str = field(default_factory=lambda: version("diffusers-idlora"))

    def __post_init__(self):
        if self.generation not in GENERATIONS:
            raise ValueError(f"`generation` is {self.generation!r}; give one of {', '.join(GENERATIONS)}.")
        if self.positions != "negative":
            raise ValueError(f"`positions` is {self.positions!r}; negative positions are the only kind, so leave it.")
        for name in ("rank", "alpha", "batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; give a number larger than 0.")
        for item in fields(self):
            try:
                json.dumps(getattr(self, item.name), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"`{item.name}` is {getattr(self, item.name)!r}, which JSON can't hold; give a plain value."
                ) from error

    def to_json(self) -> str:
        """Returns the record as a JSON object; [`~TrainingRecord.from_json`] reads it back to an equal one."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TrainingRecord":
        """
        Reads a record that [`~TrainingRecord.to_json`] wrote.

        Args:
            text (`str`): The JSON object.

        Raises:
            ValueError: If it is no JSON object, lacks a fact, or has one that this version does not know.
        """
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise ValueError(f"`text` is {text[:80]!r}, which is no JSON object; give a record that `to_json` wrote.")
        known = {item.name: item for item in fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(
                f"`text` has {unknown[0]!r}, which no record of this version has; read it with the package's version "
                f"{values.get('package_version', 'that wrote it')}."
            )
        required = [name for name, item in known.items() if item.default is item.default_factory is MISSING]
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"`text` lacks {', '.join(missing)}; give a whole record, as `to_json` wrote it.")
        return cls(**values)
