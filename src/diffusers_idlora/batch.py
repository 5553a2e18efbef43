"""Many clips with one load of the models: what clips share is encoded once, and models need not be moved per clip."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .audio import read_reference
from .denoising import TextContext
from .generation import Clip, Report, call_arguments, finish_clip, generate_clip, make_record, step_reporter
from .guidance_processes import OneProcess
from .media import replaced_when_complete
from .pipeline_ltx2_idlora import LTX2IDLoRAPipeline
from .pipeline_two_stage import UPSAMPLING, LTX2IDLoRATwoStagePipeline
from .settings import ClipSettings, ModelSettings, in_the_users_words


# Prompts, faces and voices that are kept: a prompt takes about 25 MB of main memory at the released size.
KEPT_ENCODINGS = 64


class _EncodedError(Exception):
    """Breaks a call off once it has encoded what it was to encode."""


@dataclass(frozen=True)
class DenoisedClip:
    """
    What is left to decode of a call.

    Attributes:
        arguments (`dict[str, Any]`): Those of [`~LTX2IDLoRAPipeline.decode_tokens`].
    """

    arguments: dict[str, Any]

    def save(self, path: Path, record: dict) -> None:
        """Writes it to a safetensors file, whole or not at all, with the record of the clip that it is of."""
        tensors = {name: value.cpu() for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in self.arguments.items() if name not in tensors}
        tensors["generator"] = others.pop("generator").get_state()
        others["dtype"] = str(others["dtype"]).removeprefix("torch.")
        with replaced_when_complete(path) as temporary:
            save_file(tensors, temporary, metadata={"arguments": json.dumps(others), "record": json.dumps(record)})

    @classmethod
    def load(cls, path: Path) -> "tuple[DenoisedClip, dict] | None":
        """What [`~DenoisedClip.save`] wrote, and the record; `None` where there is no such file."""
        try:
            with safe_open(path, framework="pt") as file:
                arguments = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
            generator = torch.Generator()
            generator.set_state(arguments["generator"])
            arguments |= json.loads(metadata["arguments"])
            arguments |= {"generator": generator, "dtype": getattr(torch, arguments["dtype"])}
            return cls(arguments), json.loads(metadata["record"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            return None


class BatchSteps:
    """
    Steps of a pipeline for calls that have prompts, faces and voices in common. It stands before the pipeline among
    the bases of a class. Results are those of the pipeline alone, bit for bit.
    """

    processes = OneProcess()
    # Clips that are made together, for all of whose encodings there must be room.
    num_clips = 1
    _encodes_only: Literal["texts", "all"] | None = None
    _decodes_later = False
    _models_stay = False

    def encode(self, what: Literal["texts", "all"], arguments: Mapping[str, Any]) -> None:
        """
        Encodes what a call needs, for the call to find it done.

        Args:
            what (`str`): `"texts"`, or `"all"`: voice and face too.
            arguments (`Mapping[str, Any]`): Those of the call.
        """
        self._encodes_only = what
        try:
            self(**arguments)
        except _EncodedError:
            pass
        finally:
            self._encodes_only = None

    def denoise(self, arguments: Mapping[str, Any]) -> DenoisedClip:
        """A call up to where it would decode; `arguments` are those of the call."""
        self._decodes_later = True
        try:
            return self(**arguments).frames
        finally:
            self._decodes_later = False

    def decode(self, clip: DenoisedClip) -> tuple[Any, torch.Tensor]:
        """The rest of the call: frames and sound."""
        device = self._execution_device
        arguments = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in clip.arguments.items()
        }
        with torch.no_grad():
            return self.decode_tokens(**arguments)

    @contextmanager
    def models_stay(self) -> Iterator[None]:
        """Under model offload, calls within the `with` block leave their models on the device until its end."""
        self._models_stay = True
        try:
            yield
        finally:
            self._models_stay = False
            self.maybe_free_model_hooks()

    def maybe_free_model_hooks(self) -> None:
        """As the pipeline's, but for [`~BatchSteps.models_stay`]."""
        if not self._models_stay:
            super().maybe_free_model_hooks()
            return
        for component in self.components.values():
            if hasattr(component, "_reset_stateful_cache"):
                component._reset_stateful_cache()

    def encode_text_context(
        self,
        prompt: list[str] | None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int = 1024,
        device: torch.device | None = None,
    ) -> TextContext:
        """As the pipeline's, but texts that were encoded before are not encoded again."""
        encode = super().encode_text_context
        if prompt is None:
            return encode(None, prompt_embeds, prompt_attention_mask, max_sequence_length, device)
        # Together, because the numbers of a batch differ from those of its rows alone in the last digits.
        key = ("texts", *prompt, max_sequence_length)
        return self._kept(key, lambda: encode(prompt, max_sequence_length=max_sequence_length, device=device))

    def encode_reference_audio(self, reference_audio: Any, sampling_rate: int | None = None) -> torch.Tensor:
        """As the pipeline's, but a recording that was encoded before is not encoded again."""
        if self._encodes_only == "texts":
            raise _EncodedError
        encode = super().encode_reference_audio
        waveform, rate = read_reference(reference_audio, sampling_rate)
        return self._kept(("sound", _digest([waveform.numpy()]), rate), lambda: encode((waveform, rate)))

    def encode_image(self, image: PIL.Image.Image | list[PIL.Image.Image], *size: int, **options: Any) -> torch.Tensor:
        """As the pipeline's, but an image that was encoded before is not encoded again."""
        if self._encodes_only == "texts":
            raise _EncodedError
        encode = super().encode_image
        images = image if isinstance(image, list) else [image]
        key = ("image", _digest([np.asarray(item) for item in images]), size, tuple(sorted(options.items())))
        return self._kept(key, lambda: encode(image, *size, **options))

    def prepare_video_tokens(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        """As the pipeline's, unless the call was only to encode."""
        if self._encodes_only is not None:
            raise _EncodedError
        return super().prepare_video_tokens(*arguments, **options)

    def decode_tokens(self, *arguments: Any, **options: Any) -> tuple[Any, torch.Tensor | None]:
        """As the pipeline's, unless the call was only to denoise."""
        decode = super().decode_tokens
        given = inspect.signature(decode).bind(*arguments, **options)
        given.apply_defaults()
        if self._decodes_later and given.arguments["output_type"] != "latent":
            return DenoisedClip(dict(given.arguments)), None
        return decode(*arguments, **options)

    def _kept(self, key: tuple, encode: Callable[[], Any]) -> Any:
        kept = self.__dict__.setdefault("_encodings", {})
        if key in kept:
            # At the end again, as the latest one used.
            kept[key] = value = kept.pop(key)
            return value.to(self._execution_device)
        value = encode()
        kept[key] = value.to("cpu")
        while len(kept) > KEPT_ENCODINGS * self.num_clips:
            kept.pop(next(iter(kept)))
        return value


class BatchPipeline(BatchSteps, LTX2IDLoRAPipeline):
    """[`LTX2IDLoRAPipeline`] for calls that have prompts, faces and voices in common."""

    # The connectors stay beside the text encoder, which otherwise would make room for them after each prompt.
    model_cpu_offload_seq = LTX2IDLoRAPipeline.model_cpu_offload_seq.replace("connectors->", "")


class BatchTwoStagePipeline(BatchSteps, LTX2IDLoRATwoStagePipeline):
    """[`LTX2IDLoRATwoStagePipeline`] for calls that have prompts, faces and voices in common."""

    # The upsampler is small, and the transformer need not make room for it between the stages.
    model_cpu_offload_seq = BatchPipeline.model_cpu_offload_seq

    def encode_image(self, image: PIL.Image.Image | list[PIL.Image.Image], *size: int, **options: Any) -> torch.Tensor:
        """As the pipeline's; a call that is only to encode encodes for the second stage too."""
        if self._encodes_only == "all":
            height, width, *rest = size
            super().encode_image(image, height * UPSAMPLING, width * UPSAMPLING, *rest, **options)
        return super().encode_image(image, *size, **options)


def _digest(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}\n".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def generate_clips(
    pipe: BatchSteps,
    models: ModelSettings,
    clips: Mapping[int, Clip],
    stages: Callable[[], AbstractContextManager[Report]],
) -> Iterator[tuple[int, Exception | None]]:
    """
    Makes clips: a single one at once, several step by step together. Then all of them are encoded, denoised and
    decoded before the next step begins, so that each model is moved once; what is denoised is kept in files beside the
    outputs, with which the next run goes on if this one breaks off, be it with a single clip.

    Args:
        pipe (`BatchSteps`): As `load_models` returns it.
        models (`ModelSettings`): What it was loaded from.
        clips (`Mapping[int, Clip]`): The clips, by what they are called here.
        stages (`Callable`): Gives a context manager with the `Report` of one clip.

    Returns:
        An iterator over the clips that are done or have failed, the latter with their error.
    """
    processes = pipe.processes
    is_at_once = len(clips) == 1 and models.offload != "model" and not processes.shares_passes
    if is_at_once and not any(_latents_file(clip).exists() for clip in clips.values()):
        for index, clip in clips.items():
            yield index, _error_of(lambda report, clip=clip: generate_clip(pipe, models, clip, report), stages)
        return
    together = _ClipsTogether(pipe, models, clips)
    steps = (together.begin, together.read_texts, together.encode, together.denoise, together.decode)
    for step in steps:
        with pipe.models_stay():
            for index in list(together.open):
                error = _error_of(lambda report, step=step, index=index: step(index, report), stages)
                error = processes.failure(error)
                if error is not None:
                    together.open.remove(index)
                if error is not None or step is steps[-1]:
                    yield index, error


def _latents_file(clip: Clip) -> Path:
    """Where a clip is kept between denoising and decoding."""
    return clip.output.with_name(f".{clip.output.stem}.latents.safetensors")


def _error_of(
    step: Callable[[Report], None], stages: Callable[[], AbstractContextManager[Report]]
) -> Exception | None:
    try:
        with stages() as report:
            in_the_users_words()(step)(report)
    except Exception as error:
        return error
    return None


class _ClipsTogether:
    """The steps of clips that are made together, each for one clip."""

    def __init__(self, pipe: BatchSteps, models: ModelSettings, clips: Mapping[int, Clip]):
        self.pipe, self.models, self.clips = pipe, models, clips
        self.open = list(clips)
        self.settings: dict[int, ClipSettings] = {}
        self.records: dict[int, dict] = {}
        self.denoised: set[int] = set()
        pipe.num_clips = len(clips)

    def latents_file(self, index: int) -> Path:
        """Where a clip is kept between denoising and decoding."""
        return _latents_file(self.clips[index])

    def begin(self, index: int, report: Report) -> None:
        """Settles seed and record, which are those of an earlier run where that has denoised this very clip."""
        settled = self.pipe.processes.from_first(lambda: self._settled(index))
        self.settings[index], self.records[index], is_denoised = settled
        if is_denoised:
            self.denoised.add(index)

    def _settled(self, index: int) -> tuple[ClipSettings, dict, bool]:
        settings = self.clips[index].settings
        settled = settings.resolved(self.pipe.recommended_identity_guidance_scale)
        record = make_record(self.models, settled)
        earlier = DenoisedClip.load(self.latents_file(index))
        if earlier is None:
            return settled, record, False
        found = earlier[1]["settings"] if settings.seed is None else {}
        now = json.loads(json.dumps(record))
        now["settings"]["seed"] = found.get("seed", now["settings"]["seed"])
        return (settled, earlier[1], True) if now == earlier[1] else (settled, record, False)

    def read_texts(self, index: int, report: Report) -> None:
        """The texts of a clip."""
        self._encode("texts", index, report)

    def encode(self, index: int, report: Report) -> None:
        """The voice and the face of a clip."""
        self._encode("all", index, report)

    def _encode(self, what: str, index: int, report: Report) -> None:
        if index not in self.denoised:
            report("Encoding", 0, None)
            self.pipe.encode(what, call_arguments(self.pipe, self.models, self.settings[index]))
            report("Encoding", 1, 1)

    def denoise(self, index: int, report: Report) -> None:
        """Denoises a clip and puts it into its file."""
        if index not in self.denoised:
            arguments = call_arguments(self.pipe, self.models, self.settings[index])
            denoised = self.pipe.denoise(arguments | {"callback_on_step_end": step_reporter(self.models, report)})
            if self.pipe.processes.is_first:
                denoised.save(self.latents_file(index), self.records[index])

    def decode(self, index: int, report: Report) -> None:
        """Decodes a clip from its file, writes it and removes the file; of several processes the first."""
        if not self.pipe.processes.is_first:
            return
        report("Decoding", 0, None)
        denoised, _ = DenoisedClip.load(self.latents_file(index))
        frames, audio = self.pipe.decode(denoised)
        finish_clip(self.pipe, self.clips[index], self.records[index], frames[0], audio[0], report)
        self.latents_file(index).unlink(missing_ok=True)
