"""Trains the base without references, and ID-LoRAs on it, with the package's own training step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import LTX2VideoTransformer3DModel
from peft import LoraConfig

from diffusers_idlora.attention_processor import ReferenceAttention
from diffusers_idlora.identity_world.model import make_references
from diffusers_idlora.identity_world.world import FRAME_RATE, LATENT_SIZE, IdentityWorld, Scenes
from diffusers_idlora.reference import ReferenceBatch
from diffusers_idlora.training.objective import (
    RECIPE_TARGET_MODULES,
    SHIFT_TOKENS,
    Objective,
    TrainingBatch,
    TrainingNoise,
    logit_normal_sigmas,
)


NUM_TRAINING_SPEAKERS = 512
FIRST_FRAME_CLEAN_PROBABILITY = 0.9
WARM_UP_STEPS = 50


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: AdamW with warm-up and linear decay, gradients clipped at 1 as in the recipe."""

    steps: int
    learning_rate: float
    batch_size: int = 32


@dataclass(frozen=True)
class Recipe:
    """
    What an adapter is trained with; the defaults are the released recipe.

    Attributes:
        placement (`str`, defaults to `"negative"`): Where the reference lies in time, see [`make_references`].
        mask_video_from_reference (`bool`), mask_reference_from_text (`bool`): See [`AttentionRules`].
        reference_dropout (`float`, defaults to `0.0`): Probability that a sample is trained without its reference.
        share_of_steps (`float`, defaults to `1.0`): For how many of a full training's steps.
    """

    placement: str = "negative"
    mask_video_from_reference: bool = True
    mask_reference_from_text: bool = True
    reference_dropout: float = 0.0
    share_of_steps: float = 1.0


def training_speakers(world: IdentityWorld) -> torch.Tensor:
    """The voices that are trained on, in every run the same."""
    return world.speakers(NUM_TRAINING_SPEAKERS, torch.Generator().manual_seed(1))


def unseen_speakers(world: IdentityWorld, count: int) -> torch.Tensor:
    """Voices that are never trained on."""
    return world.speakers(count, torch.Generator().manual_seed(2))


def add_lora(transformer: LTX2VideoTransformer3DModel, rank: int, seed: int) -> None:
    """Adds the recipe's LoRA to a base, which is frozen."""
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=RECIPE_TARGET_MODULES))


def train(
    transformer: LTX2VideoTransformer3DModel,
    world: IdentityWorld,
    schedule: Schedule,
    recipe: Recipe | None,
    seed: int,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """
    Trains whatever parameters of the model are trainable.

    Args:
        transformer (`LTX2VideoTransformer3DModel`): The base, or the base with its LoRA.
        world ([`IdentityWorld`]): Where the samples come from.
        schedule ([`Schedule`]): How long and how fast.
        recipe ([`Recipe`], *optional*): How references are used; without it there are none.
        seed (`int`): Of samples and noise.
        after_step (`Callable[[int], None]`, *optional*): Told of every step that is done.

    Returns:
        `list[float]`: The audio loss of every step.
    """
    objective = Objective()
    if recipe is not None:
        objective = Objective(recipe.mask_video_from_reference, recipe.mask_reference_from_text)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / schedule.steps)
    )
    generator = torch.Generator().manual_seed(seed)
    speakers = training_speakers(world)
    losses = []
    transformer.train()
    with ReferenceAttention(transformer) as attention:
        for step in range(schedule.steps):
            chosen = torch.randint(0, len(speakers), (schedule.batch_size,), generator=generator)
            scenes = world.scenes(speakers[chosen], generator)
            references = None if recipe is None else draw_references(transformer, scenes, recipe, generator)
            loss = objective(transformer, attention, as_batch(scenes, references), draw_noise(scenes, generator))
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            losses.append(loss.audio.mean().item())
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"The loss is {losses[-1]} at step {step + 1}; the run is of no use.")
            after_step(step + 1)
    transformer.eval()
    return losses


def as_batch(scenes: Scenes, references: ReferenceBatch | None) -> TrainingBatch:
    """The scenes as the training step takes them."""
    return TrainingBatch(scenes.video_tokens, scenes.audio_tokens, references, scenes.context, LATENT_SIZE, FRAME_RATE)


def draw_references(
    transformer: LTX2VideoTransformer3DModel, scenes: Scenes, recipe: Recipe, generator: torch.Generator
) -> ReferenceBatch:
    """The scenes' recordings where the recipe places them, without those that are dropped."""
    batch = make_references(transformer, scenes.reference_tokens, recipe.placement)
    if not recipe.reference_dropout:
        return batch
    kept = torch.rand(len(batch.lengths), generator=generator) >= recipe.reference_dropout
    return ReferenceBatch(
        batch.tokens * kept[:, None, None],
        batch.positions,
        tuple(length if keep else 0 for length, keep in zip(batch.lengths, kept.tolist())),
    )


def draw_noise(scenes: Scenes, generator: torch.Generator) -> TrainingNoise:
    """Noise and noise levels of a batch, distributed as in the recipe for its smallest clips."""
    num_rows = len(scenes.words)
    normal = torch.randn(num_rows, generator=generator)
    uniform = torch.rand(3, num_rows, generator=generator)
    return TrainingNoise(
        sigmas=logit_normal_sigmas(SHIFT_TOKENS[0], normal, uniform[0], uniform[1]),
        video=torch.randn(scenes.video_tokens.shape, generator=generator),
        audio=torch.randn(scenes.audio_tokens.shape, generator=generator),
        first_frame_clean=uniform[2] < FIRST_FRAME_CLEAN_PROBABILITY,
    )
