"""Which samples a step sees and which noise they get: pure functions of the seed, whatever the number of processes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import LTX2ConditionPipeline
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed

from ..denoising import TextContext
from ..reference import ReferenceBatch
from .objective import TrainingBatch, TrainingNoise, logit_normal_sigmas
from .samples import TrainingSample


@dataclass(frozen=True)
class BatchOrder:
    """
    The endless sequence of batches: every epoch visits every sample in a new order, batches hold one bucket.

    Attributes:
        buckets (`Sequence[tuple]`):
            Of every sample what it must share with the others of its batch, its shape; all alike, shapes mix.
        batch_size (`int`): Samples of a batch over all processes.
        seed (`int`): Of the run.
    """

    buckets: Sequence[tuple]
    batch_size: int
    seed: int

    def epoch(self, number: int) -> list[list[int]]:
        """
        The batches of one epoch, as sample numbers. The last batch of a bucket is filled up with samples of that
        bucket from its beginning, so that every batch is full.
        """
        random = np.random.default_rng([self.seed, number])
        by_bucket = defaultdict(list)
        for index in random.permutation(len(self.buckets)).tolist():
            by_bucket[tuple(self.buckets[index])].append(index)
        batches = []
        for indices in by_bucket.values():
            count = -(-len(indices) // self.batch_size) * self.batch_size
            filled = [indices[position % len(indices)] for position in range(count)]
            batches += [filled[start : start + self.batch_size] for start in range(0, count, self.batch_size)]
        return [batches[position] for position in random.permutation(len(batches))]

    @property
    def batches_per_epoch(self) -> int:
        """Batches in every epoch."""
        return len(self.epoch(0))

    def batches_from(self, start: int):
        """Yields the batches from number `start` of the whole sequence on, without an end."""
        epoch, position = divmod(start, self.batches_per_epoch)
        while True:
            yield from self.epoch(epoch)[position:]
            epoch, position = epoch + 1, 0


@dataclass(frozen=True)
class SampleDraw:
    """
    Everything random about one sample in one step.

    Attributes:
        normal (`float`), uniform (`float`), uniform_choice (`float`): For [`logit_normal_sigmas`].
        first_frame (`float`), dropout (`float`): Uniform numbers that decide about first frame and reference.
        generator (`torch.Generator`): For the noise.
    """

    normal: float
    uniform: float
    uniform_choice: float
    first_frame: float
    dropout: float
    generator: torch.Generator

    @classmethod
    def of(cls, seed: int, batch: int, row: int) -> "SampleDraw":
        """The draw of a row of a batch, both counted over all processes; it depends on nothing else."""
        random = np.random.default_rng([seed, batch, row])
        normal, uniforms = random.standard_normal(), random.random(4)
        generator = torch.Generator().manual_seed(int(random.integers(2**63)))
        return cls(float(normal), *(float(value) for value in uniforms), generator)


def groups_of_one_shape(samples: Sequence[TrainingSample]) -> list[list[int]]:
    """The positions of samples that fit into one forward together; groups stand in the order of their first sample."""
    groups = defaultdict(list)
    for position, sample in enumerate(samples):
        groups[_kind(sample)].append(position)
    return list(groups.values())


def _kind(sample: TrainingSample) -> tuple:
    return tuple(sample.video_latents.shape), tuple(sample.audio_latents.shape), sample.frame_rate


def collate(
    samples: Sequence[TrainingSample],
    draws: Sequence[SampleDraw],
    rope: LTX2AudioVideoRotaryPosEmbed,
    device: torch.device | str,
    dtype: torch.dtype,
    reference_dropout: float = 0.0,
    first_frame_conditioning_p: float = 0.9,
) -> tuple[TrainingBatch, TrainingNoise]:
    """
    Samples of one latent shape as a batch with its noise. References may differ in number and length.

    Args:
        samples (`Sequence[TrainingSample]`): The samples.
        draws (`Sequence[SampleDraw]`): Of each sample.
        rope (`LTX2AudioVideoRotaryPosEmbed`): The transformer's `audio_rope`.
        device (`torch.device`): Where the batch goes.
        dtype (`torch.dtype`): Of the captions; tokens and noise are float32.
        reference_dropout (`float`, defaults to `0.0`): Probability with which a sample loses its reference.
        first_frame_conditioning_p (`float`, defaults to `0.9`): Probability with which the first frame is given clean.

    Raises:
        ValueError: If the samples differ in latent shape, sound length or frame rate.
    """
    kinds = {_kind(sample) for sample in samples}
    if len(kinds) > 1:
        raise ValueError(f"`samples` of one batch must agree in shapes and frame rate, but are {sorted(kinds)}.")
    video = LTX2ConditionPipeline._pack_latents(torch.stack([sample.video_latents.float() for sample in samples]))
    audio = _pack_audio(torch.stack([sample.audio_latents.float() for sample in samples]))
    clips = [
        []
        if draw.dropout < reference_dropout
        else [_pack_audio(clip[None].float())[0].to(device) for clip in sample.reference_latents]
        for sample, draw in zip(samples, draws)
    ]
    sigmas = logit_normal_sigmas(
        video.shape[1],
        *(torch.tensor([getattr(draw, name) for draw in draws]) for name in ("normal", "uniform", "uniform_choice")),
    )
    batch = TrainingBatch(
        video_tokens=video.to(device),
        audio_tokens=audio.to(device),
        references=ReferenceBatch.from_clips(clips, rope),
        context=stack_contexts(samples, device, dtype),
        latent_size=tuple(samples[0].video_latents.shape[1:]),
        frame_rate=samples[0].frame_rate,
    )
    noise = TrainingNoise(
        sigmas=sigmas.to(device),
        video=torch.stack([torch.randn(video.shape[1:], generator=draw.generator) for draw in draws]).to(device),
        audio=torch.stack([torch.randn(audio.shape[1:], generator=draw.generator) for draw in draws]).to(device),
        first_frame_clean=torch.tensor([draw.first_frame < first_frame_conditioning_p for draw in draws]).to(device),
    )
    return batch, noise


def _pack_audio(latents: torch.Tensor) -> torch.Tensor:
    return LTX2ConditionPipeline._pack_audio_latents(latents)


def stack_contexts(samples: Sequence[TrainingSample], device: torch.device | str, dtype: torch.dtype) -> TextContext:
    """The captions of a batch; shorter ones are filled up with masked tokens."""
    length = max(len(sample.prompt_attention_mask) for sample in samples)

    def stack(name: str, to: torch.dtype) -> torch.Tensor:
        rows = [getattr(sample, name) for sample in samples]
        padded = [
            torch.cat([row, row.new_zeros(length - row.shape[0], *row.shape[1:])]).to(device, to) for row in rows
        ]
        return torch.stack(padded)

    mask = stack("prompt_attention_mask", dtype)
    return TextContext(
        stack("video_prompt_embeds", dtype), stack("audio_prompt_embeds", dtype), None if mask.all() else mask
    )
