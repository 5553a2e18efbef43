"""What is measured of a trained model, on speakers that it was never trained on."""

from dataclasses import dataclass, replace

import torch
from diffusers import LTX2VideoTransformer3DModel

from diffusers_idlora.attention_processor import ReferenceAttention
from diffusers_idlora.identity_world.model import Sampler, make_references
from diffusers_idlora.identity_world.world import SENTENCE_TOKENS, WORDS_PER_REFERENCE, IdentityWorld, Scenes
from diffusers_idlora.reference import ReferenceBatch, Turn

from .training import Recipe, unseen_speakers


NUM_CLIPS = 128
GUIDANCE_SCALES = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)
STRONG_GUIDANCE = 3.0
MASKS = {"mask_video_from_reference": True, "mask_reference_from_text": True}

Row = dict[str, float]


@dataclass(frozen=True)
class Bench:
    """
    A model and the clips that it is measured on.

    Attributes:
        world ([`IdentityWorld`]): The world.
        transformer (`LTX2VideoTransformer3DModel`): The model.
        scenes ([`Scenes`]): Clips of unseen speakers, whose recordings say other words than the clips.
        placement (`str`, defaults to `"negative"`): Where references lie in time.
        seed (`int`, defaults to `0`): Of the noise that is denoised.
    """

    world: IdentityWorld
    transformer: LTX2VideoTransformer3DModel
    scenes: Scenes
    placement: str = "negative"
    seed: int = 0

    @property
    def references(self) -> ReferenceBatch:
        """The recordings as references."""
        return make_references(self.transformer, self.scenes.reference_tokens, self.placement)

    def generate(self, references: ReferenceBatch | None, scale: float = 0.0, **settings) -> tuple:
        """Video and audio tokens; the settings are those of [`Sampler`]."""
        sampler = Sampler(identity_guidance_scale=scale, seed=self.seed, **settings)
        return sampler(self.transformer, self.scenes, references)

    def row(self, references: ReferenceBatch | None, scale: float = 0.0, **settings) -> Row:
        """A row of the tables: means over the clips."""
        return self.measure(*self.generate(references, scale, **settings))

    def measure(self, video: torch.Tensor, audio: torch.Tensor) -> Row:
        """Similarity to the reference, accuracy of the words, and how often mouth and voice say the same."""
        heard, seen = self.world.heard_words(audio), self.world.seen_words(video)
        return {
            "similarity": self.world.similarity(audio, self.scenes.reference_tokens).mean().item(),
            "words": _share(heard == self.scenes.words),
            "agreement": _share(heard == seen),
        }


def make_bench(world: IdentityWorld, transformer: LTX2VideoTransformer3DModel, seed: int, **settings) -> Bench:
    """The same clips for every model of a seed; settings are those of [`Bench`]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    scenes = world.scenes(unseen_speakers(world, NUM_CLIPS), generator)
    return Bench(world, transformer, scenes, seed=seed, **settings)


def measure_base(bench: Bench) -> dict[str, Row]:
    """The base, which knows no references, without and with one."""
    scenes = bench.scenes
    return {
        "ceiling: the clips themselves": bench.measure(scenes.video_tokens, scenes.audio_tokens),
        "no reference": bench.row(None),
        "reference": bench.row(bench.references),
        f"reference, guidance {STRONG_GUIDANCE:g}": bench.row(bench.references, STRONG_GUIDANCE),
    }


def measure_adapter(bench: Bench, recipe: Recipe) -> dict[str, Row]:
    """What every adapter is measured by; masks are off as in the released inference, or as in training."""
    trained_masks = {name: getattr(recipe, name) for name in MASKS}
    rows = {
        "no reference": bench.row(None),
        "reference": bench.row(bench.references),
        f"guidance {STRONG_GUIDANCE:g}": bench.row(bench.references, STRONG_GUIDANCE),
    }
    if any(trained_masks.values()):
        rows["reference, masks as trained"] = bench.row(bench.references, **trained_masks)
    for placement in {"negative", "overlapping"} - {recipe.placement}:
        moved = make_references(bench.transformer, bench.scenes.reference_tokens, placement)
        rows[f"reference, {placement} at inference"] = bench.row(moved)
    return rows


def measure_guidance(bench: Bench) -> dict[str, Row]:
    """Scales of identity guidance, and one of the wrong sign."""
    rows = {f"{scale:g}": bench.row(bench.references, scale) for scale in GUIDANCE_SCALES}
    return {**rows, "-2 (wrong sign)": bench.row(bench.references, -2.0)}


def measure_shared_guidance(bench: Bench) -> dict[str, Row]:
    """Exact against shared identity guidance: the clips, and how alike the differences are that guidance adds."""
    rows = {}
    for masked in (False, True):
        mask = {"mask_video_from_reference": masked}
        where = "with the a2v mask" if masked else "without the a2v mask"
        for mode in ("exact", "shared"):
            options = {"identity_guidance_mode": mode}
            rows[f"{mode}, {where}"] = bench.row(bench.references, STRONG_GUIDANCE, options=options, **mask)
        rows[f"shared, {where}"].update(compare_guidance(bench, **mask))
    return rows


@torch.no_grad()
def compare_guidance(bench: Bench, sigma: float = 0.7, **mask) -> Row:
    """Cosine and ratio of lengths of the differences that exact and shared identity guidance add at a noise level."""
    scenes, references = bench.scenes, bench.references
    generator = torch.Generator().manual_seed(bench.seed)
    video, audio = (
        (1 - sigma) * tokens + sigma * torch.randn(tokens.shape, generator=generator)
        for tokens in (scenes.video_tokens, scenes.audio_tokens)
    )
    differences = []
    for mode in ("exact", "shared"):
        sampler = Sampler(1.0, options={"identity_guidance_mode": mode}, **mask)
        with ReferenceAttention(bench.transformer) as attention:
            denoiser = sampler.denoiser(bench.transformer, attention, scenes, references)
            level = torch.tensor(sigma)
            guided = denoiser.predict(sampler.plan, video, audio, level, 1000 * level)[1]
            plain = denoiser.predict(Sampler().plan, video, audio, level, 1000 * level)[1]
        differences.append((guided - plain).flatten(1))
    exact, shared = differences
    return {
        "cosine": torch.cosine_similarity(exact, shared, dim=1).mean().item(),
        "norm ratio": (shared.norm(dim=1) / exact.norm(dim=1)).mean().item(),
    }


def measure_references(bench: Bench) -> dict[str, Row]:
    """Other recordings: of other lengths, of the clip's own words, of somebody else; and bfloat16 positions."""
    rows = {}
    for factor in (0.5, 1, 2):
        generator = torch.Generator().manual_seed(2000 + bench.seed)
        scenes = bench.world.scenes(
            bench.scenes.filters, generator, reference_words=round(factor * WORDS_PER_REFERENCE)
        )
        rows[f"length {factor:g}x"] = _with_recordings(bench, scenes.reference_tokens)
    tokens = bench.scenes.reference_tokens
    generator = torch.Generator().manual_seed(3000 + bench.seed)
    own_words = bench.world.say(bench.scenes.words[:, :WORDS_PER_REFERENCE], bench.scenes.filters, generator)
    rows["the clip's own words"] = _with_recordings(bench, own_words)
    # Judged by the voice of the clip's own speaker.
    strangers = make_references(bench.transformer, tokens.roll(1, dims=0))
    rows["somebody else's recording"] = bench.row(strangers)
    rows["positions in bfloat16"] = measure_rounded_positions(bench)
    return rows


def measure_rounded_positions(bench: Bench) -> Row:
    """All audio positions rounded to bfloat16, as the reference implementation rounds them in a bfloat16 model."""
    references = bench.references
    rounded = replace(references, positions=references.positions.bfloat16().float())
    rope, num_rows = bench.transformer.audio_rope, len(bench.scenes.words)
    positions = rope.prepare_audio_coords(num_rows, SENTENCE_TOKENS, "cpu").bfloat16().float()
    return bench.row(rounded, options={"audio_positions": positions})


def measure_turns(bench: Bench) -> dict[str, Row]:
    """Two speakers by turns: the first half of each sentence is the clip's speaker, the second the next clip's."""
    first, second = bench.scenes.reference_tokens, bench.scenes.reference_tokens.roll(1, dims=0)
    rope = bench.transformer.audio_rope
    middle = rope.prepare_audio_coords(1, SENTENCE_TOKENS, "cpu")[0, 0, SENTENCE_TOKENS // 2, 0].item()
    turns = [[Turn(a, 0.0, middle), Turn(b, middle, 10.0)] for a, b in zip(first, second)]
    both = [[b, a] for a, b in zip(first, second)]
    references = {
        "by turns": ReferenceBatch.from_turns(turns, rope, SENTENCE_TOKENS),
        "both recordings, no turns": ReferenceBatch.from_clips(both, rope),
        "the first speaker's recording alone": bench.references,
    }
    rows = {}
    for name, batch in references.items():
        for scale in (0.0, STRONG_GUIDANCE):
            video, audio = bench.generate(batch, scale)
            label = name if scale == 0 else f"{name}, guidance {scale:g}"
            rows[label] = {**_halves(bench.world, audio, first, second), **_without_similarity(bench, video, audio)}
    return rows


def _halves(world: IdentityWorld, audio: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> Row:
    """Similarity of each half of the sentences to either speaker."""
    half = SENTENCE_TOKENS // 2
    swing = world.swing(SENTENCE_TOKENS)
    row = {}
    for name, part in (("first half", slice(0, half)), ("second half", slice(half, None))):
        heard = world.heard_filters(audio[:, part], swing[part])
        for speaker, recording in (("first speaker", first), ("second speaker", second)):
            known = world.heard_filters(recording)
            row[f"{name}, {speaker}"] = torch.cosine_similarity(heard, known, dim=1).mean().item()
    return row


def _without_similarity(bench: Bench, video: torch.Tensor, audio: torch.Tensor) -> Row:
    return {name: value for name, value in bench.measure(video, audio).items() if name != "similarity"}


def _with_recordings(bench: Bench, tokens: torch.Tensor) -> Row:
    """Judged by the bench's own recordings, which are the same for all."""
    return bench.row(make_references(bench.transformer, tokens, bench.placement))


def _share(matches: torch.Tensor) -> float:
    return matches.float().mean().item()
