"""Which recording of the voice goes with which clip, and which speakers are held out."""

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from .manifest import Clip, Dropped, VoiceSpan


@dataclass(frozen=True)
class Pair:
    """
    A clip and the recordings that say whose voice it is.

    Attributes:
        target (`Clip`): What is to be generated.
        references (`tuple[VoiceSpan, ...]`): The voice.
    """

    target: Clip
    references: tuple[VoiceSpan, ...]

    @property
    def id(self) -> str:
        """A file name, the same on every machine."""
        names = [self.target.file_name, [(span.file_name, span.start, span.end) for span in self.references]]
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
        readable = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(self.target.file_name).stem)[:40]
        return f"{readable}-{digest}"

    @property
    def voice(self) -> str:
        """Who speaks: the speaker, or the reference where the table names no speaker."""
        return self.references[0].file_name if self.target.speaker_id is None else self.target.speaker_id


def make_pairs(
    clips: Sequence[Clip],
    pairs_per_clip: int = 1,
    seed: int = 0,
    free_spans: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[list[Pair], list[Dropped]]:
    """
    Gives every clip its voice: the references that the table names, or else other clips of the same speaker.

    Args:
        clips (`Sequence[Clip]`): The clips, in any order: the pairs don't depend on it.
        pairs_per_clip (`int`, *optional*, defaults to `1`): Pairs of each clip, each with another clip of the speaker;
            fewer where the speaker has fewer clips.
        seed (`int`, *optional*, defaults to `0`): Seed of the choice. Other speakers have no influence on it.
        free_spans (`Mapping[str, tuple[float, float]]`, *optional*): By file name, the seconds of a clip that it does
            not use as a target; a speaker's only clip is then paired with that part of itself.

    Returns:
        `tuple[list[Pair], list[Dropped]]`: The pairs in the order of their ids, and the clips that found no voice.

    Raises:
        ValueError: If `pairs_per_clip` is less than 1.
    """
    if pairs_per_clip < 1:
        raise ValueError(f"`pairs_per_clip` must be at least 1, but is {pairs_per_clip}.")
    speakers: dict[str, list[Clip]] = {}
    for clip in sorted(clips, key=lambda clip: clip.file_name):
        if clip.speaker_id is not None:
            speakers.setdefault(clip.speaker_id, []).append(clip)
    pairs, dropped = [], []
    for clip in clips:
        others = [other for other in speakers.get(clip.speaker_id, ()) if other.file_name != clip.file_name]
        if clip.references:
            pairs.append(Pair(clip, clip.references))
        elif others:
            choice = random.Random(f"{seed}:{clip.file_name}").sample(others, min(pairs_per_clip, len(others)))
            pairs += [Pair(clip, (VoiceSpan(other.file_name, other.path),)) for other in choice]
        elif free_spans is None:
            dropped.append(Dropped(clip.file_name, f"its speaker {clip.speaker_id!r} has no other clip"))
        elif clip.file_name not in free_spans:
            reason = (
                f"its speaker {clip.speaker_id!r} has no other clip and it is too short for a reference of its own"
            )
            dropped.append(Dropped(clip.file_name, reason))
        else:
            span = VoiceSpan(clip.file_name, clip.path, *free_spans[clip.file_name])
            pairs.append(Pair(clip, (span,)))
    return sorted(pairs, key=lambda pair: pair.id), sorted(dropped, key=astuple)


def choose_validation_voices(pairs: Sequence[Pair], count: int, seed: int = 0) -> set[str]:
    """
    Chooses speakers to hold out whole, so that validation hears voices that training never heard.

    Args:
        pairs (`Sequence[Pair]`): All pairs.
        count (`int`): How many speakers.
        seed (`int`, *optional*, defaults to `0`): Seed of the choice.

    Returns:
        `set[str]`: Their [`~Pair.voice`].

    Raises:
        ValueError: If no speaker would be left to train on.
    """
    voices = sorted({pair.voice for pair in pairs})
    if count < 0 or (voices and count >= len(voices)):
        raise ValueError(
            f"`validation_speakers` is {count}, but of {len(voices)} speakers at least one must be left to train on."
        )
    return set(random.Random(f"{seed}:validation").sample(voices, min(count, len(voices))))
