"""
The encoded parts that samples are made of. Samples share them: a caption, a clip or a voice that several samples need
is encoded once, and what was encoded before a run was killed is there for the next.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition, retrieve_latents
from safetensors.torch import load_file, save

from ..media import replaced_when_complete
from ..pipeline_steps import LTX2IDLoRASteps
from ..reference import pack_reference_latents
from .clips import Bucket, read_frames, read_sound, read_voice
from .manifest import VoiceSpan


def content_hash(*values: object) -> str:
    """SHA-256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TextPart:
    """
    A caption after the connectors.

    Attributes:
        caption (`str`): The text.
        max_sequence_length (`int`): Its tokens, padding included.
    """

    components: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "connectors")

    caption: str
    max_sequence_length: int

    @property
    def key(self) -> str:
        """What the result depends on."""
        return content_hash("text", self.caption, self.max_sequence_length)

    def encode(self, pipeline: LTX2IDLoRASteps) -> dict[str, torch.Tensor]:
        """`video_prompt_embeds` `[S, Dv]`, `audio_prompt_embeds` `[S, Da]`, `prompt_attention_mask` `[S]`."""
        context = pipeline.encode_text_context([self.caption], max_sequence_length=self.max_sequence_length)
        mask = context.attention_mask
        mask = torch.ones(context.video_embeds.shape[1]) if mask is None else mask[0]
        return {
            "video_prompt_embeds": context.video_embeds[0],
            "audio_prompt_embeds": context.audio_embeds[0],
            "prompt_attention_mask": mask.to(torch.uint8),
        }


@dataclass(frozen=True)
class VideoPart:
    """
    The picture of a clip.

    Attributes:
        path (`pathlib.Path`): The video.
        sha256 (`str`): Of the file.
        bucket (`Bucket`): The wanted size.
        frame_rate (`float`): The wanted rate, in frames per second.
    """

    components: ClassVar[tuple[str, ...]] = ("vae",)

    path: Path
    sha256: str
    bucket: Bucket
    frame_rate: float

    @property
    def key(self) -> str:
        """What the result depends on."""
        return content_hash("video", self.sha256, str(self.bucket), self.frame_rate)

    def encode(self, pipeline: LTX2IDLoRASteps) -> dict[str, torch.Tensor]:
        """`video_latents` `[C, F, h, w]`, normalised per channel."""
        vae, bucket = pipeline.vae, self.bucket
        # Frame by frame, so that a long clip of a large size needs no memory for all of it. Resized and cropped as the
        # first frame is at inference.
        frames = [
            pipeline.preprocess_conditions(
                LTX2VideoCondition(frames=frame, index=0, crf=0), bucket.height, bucket.width, 1, vae.device
            )[0][0].to(vae.dtype)
            for frame in read_frames(self.path, bucket.num_frames, self.frame_rate)
        ]
        latents = retrieve_latents(vae.encode(torch.cat(frames, dim=2)), sample_mode="argmax").float()
        latents = pipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        return {"video_latents": latents[0]}


@dataclass(frozen=True)
class SoundPart:
    """
    The sound of a clip, as long as its picture.

    Attributes:
        path (`pathlib.Path`): The video.
        sha256 (`str`): Of the file.
        num_frames (`int`): Of the picture.
        frame_rate (`float`): Of the picture, in frames per second.
    """

    components: ClassVar[tuple[str, ...]] = ("audio_vae",)

    path: Path
    sha256: str
    num_frames: int
    frame_rate: float

    @property
    def key(self) -> str:
        """What the result depends on."""
        return content_hash("sound", self.sha256, self.num_frames, self.frame_rate)

    def encode(self, pipeline: LTX2IDLoRASteps) -> dict[str, torch.Tensor]:
        """`audio_latents` `[C, T, M]`, normalised per packed feature."""
        latents = pipeline.encode_reference_audio(read_sound(self.path, self.num_frames / self.frame_rate))
        # The spectrogram's last window reaches beyond the end and may begin one more latent.
        latents = latents[:, :, : pipeline.audio_length(self.num_frames, self.frame_rate)]
        return {"audio_latents": _normalized(latents, pipeline)}


@dataclass(frozen=True)
class VoicePart:
    """
    A recording of a voice.

    Attributes:
        span (`VoiceSpan`): What to take.
        sha256 (`str`): Of the file.
        max_seconds (`float`): What is longer is cut.
        denoise_command (`str`, *optional*): See [`read_voice`].
    """

    components: ClassVar[tuple[str, ...]] = ("audio_vae",)

    span: VoiceSpan
    sha256: str
    max_seconds: float
    denoise_command: str | None = None

    @property
    def key(self) -> str:
        """What the result depends on."""
        span = (self.span.start, self.span.end)
        return content_hash("voice", self.sha256, span, self.max_seconds, self.denoise_command)

    def encode(self, pipeline: LTX2IDLoRASteps) -> dict[str, torch.Tensor]:
        """`reference_latents` `[C, L, M]`, normalised per packed feature, and `span` `[2]` in seconds."""
        waveform, sampling_rate, span = read_voice(self.span, self.max_seconds, self.denoise_command)
        latents = pipeline.encode_reference_audio((waveform, sampling_rate))
        return {
            "reference_latents": _normalized(latents, pipeline),
            "span": torch.tensor(span, dtype=torch.float64),
        }


Part = TextPart | VideoPart | SoundPart | VoicePart
# Loaded one after the other, so that the largest alone must fit on the device.
STAGES = (("captions", (TextPart,)), ("videos", (VideoPart,)), ("sounds and voices", (SoundPart, VoicePart)))


def _normalized(latents: torch.Tensor, pipeline: LTX2IDLoRASteps) -> torch.Tensor:
    packed = pack_reference_latents(latents, pipeline.audio_vae)
    return pipeline._unpack_audio_latents(packed, latents.shape[2], num_mel_bins=latents.shape[3])[0]


class PartStore:
    """
    A folder of encoded parts.

    Args:
        root (`str` or `os.PathLike`): The folder, created if missing; for one base model and one dtype.
        dtype (`torch.dtype`): What latents and text are rounded to.
    """

    def __init__(self, root: str | os.PathLike, dtype: torch.dtype):
        self.root, self.dtype = Path(root), dtype
        self.root.mkdir(parents=True, exist_ok=True)

    def _path(self, part: Part) -> Path:
        return self.root / f"{part.key}.safetensors"

    def __contains__(self, part: Part) -> bool:
        return self._path(part).is_file()

    def save(self, part: Part, tensors: dict[str, torch.Tensor]) -> None:
        """Writes an encoded part, whole or not at all."""
        rounded = {
            name: tensor.to("cpu", self.dtype if tensor.dtype in _ROUNDED else tensor.dtype).contiguous()
            for name, tensor in tensors.items()
        }
        with replaced_when_complete(self._path(part)) as temporary:
            temporary.write_bytes(save(rounded))

    def load(self, part: Part) -> dict[str, torch.Tensor]:
        """Reads an encoded part."""
        return load_file(self._path(part))


# Not float64, in which times are kept.
_ROUNDED = (torch.float16, torch.bfloat16, torch.float32)
