"""A reference block: the clean audio tokens of somebody's voice, their negative positions and their zero timesteps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKLLTX2Audio, LTX2ConditionPipeline
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed


def pack_reference_latents(latents: torch.Tensor, audio_vae: AutoencoderKLLTX2Audio) -> torch.Tensor:
    """
    Turns audio latents into normalised reference tokens: packed first, then normalised, because the VAE's statistics
    are per packed feature (method section 1).

    Args:
        latents (`torch.Tensor`): Un-normalised audio latents of shape `[B, C, L, M]`.
        audio_vae (`AutoencoderKLLTX2Audio`): The VAE whose `latents_mean` and `latents_std` (`[C * M]`) are used.

    Returns:
        `torch.Tensor`: Tokens of shape `[B, L, C * M]`.
    """
    return LTX2ConditionPipeline._normalize_audio_latents(
        LTX2ConditionPipeline._pack_audio_latents(latents), audio_vae.latents_mean, audio_vae.latents_std
    )


def reference_positions(
    clip_lengths: Sequence[int], rope: LTX2AudioVideoRotaryPosEmbed, device: torch.device | str | None = None
) -> torch.Tensor:
    """
    Positions of one or several reference clips, laid wholly before zero (offset RoPE, method section 2).

    Each clip keeps the spacing that it would have as a target; the last one ends one latent duration before the
    target begins, and each earlier one ends one latent duration before the next begins.

    Args:
        clip_lengths (`Sequence[int]`): Latents in each clip, in the order in which they stand in the sequence.
        rope (`LTX2AudioVideoRotaryPosEmbed`): The transformer's `audio_rope`, which knows the rates.
        device (`torch.device`, *optional*): Where the positions are made.

    Returns:
        `torch.Tensor`: `[start, end)` in seconds, float32, of shape `[1, 1, sum(clip_lengths), 2]`.
    """
    gap = rope.scale_factors[0] * rope.hop_length / rope.sampling_rate
    next_start = 0.0
    clips = []
    for length in reversed(clip_lengths):
        # The upstream positions are an expanded view, so this must not be done in place.
        clip = rope.prepare_audio_coords(1, length, device or "cpu")
        clip = clip - clip[:, :, -1:, 1:] + next_start - gap
        next_start = clip[0, 0, 0, 0].item()
        clips.insert(0, clip)
    return torch.cat(clips, dim=2)


@dataclass(frozen=True)
class ReferenceLayout:
    """
    Where the reference tokens of every row stand in one audio sequence, `[padding | reference | target | copy]`.

    Attributes:
        lengths (`tuple[int, ...]`): Reference tokens of each row; 0 for a row without a reference.
        num_reference_tokens (`int`): Tokens before the target in every row; shorter references are padded to this.
        num_target_tokens (`int`): Tokens of the target in every row.
        num_copy_tokens (`int`, defaults to `0`):
            Tokens of a copy of the target that hears no reference: among audio it attends to itself alone, and no
            other token attends to it. 0 where there is none.
    """

    lengths: tuple[int, ...]
    num_reference_tokens: int
    num_target_tokens: int
    num_copy_tokens: int = 0

    def __post_init__(self):
        if max(self.lengths, default=0) > self.num_reference_tokens:
            raise ValueError(f"`lengths` {self.lengths} exceed `num_reference_tokens` {self.num_reference_tokens}.")

    @property
    def num_tokens(self) -> int:
        """Length of the whole audio sequence."""
        return self.num_front_tokens + self.num_copy_tokens

    @property
    def num_front_tokens(self) -> int:
        """Length without the copy."""
        return self.num_reference_tokens + self.num_target_tokens

    @property
    def has_padding(self) -> bool:
        """Whether some row is shorter than the sequence, so that a mask is needed."""
        return any(length < self.num_reference_tokens for length in self.lengths)

    def is_padding(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Boolean `[B, num_tokens]`: True at the tokens that fill up the front of shorter rows."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(self.num_tokens, device=device) < self.num_reference_tokens - lengths[:, None]


@dataclass(frozen=True)
class Turn:
    """
    One speaker's stretch of the target.

    Attributes:
        tokens (`torch.Tensor`):
            The speaker's reference, normalised, `[L, C * M]`. Turns with the same tensor object are one speaker's.
        start (`float`): Where the stretch begins, in seconds of the target.
        end (`float`): Where it ends, itself excluded.
    """

    tokens: torch.Tensor
    start: float
    end: float


@dataclass(frozen=True)
class SpeakerTurns:
    """
    Which of a row's speakers is heard when (experimental).

    Attributes:
        speakers (`torch.Tensor`): Whose each reference token is, counted within its row, `[B, R]`; -1 on padding.
        spans (`tuple[tuple[tuple[int, float, float], ...], ...]`): The turns of each row: speaker, start and end.
    """

    speakers: torch.Tensor
    spans: tuple[tuple[tuple[int, float, float], ...], ...]

    def heard(self, positions: torch.Tensor) -> torch.Tensor:
        """
        Args:
            positions (`torch.Tensor`): `[start, end)` of tokens in seconds of the target, `[B, Q, 2]`.

        Returns:
            `torch.Tensor`: Boolean `[B, Q, R]`: whether the token's middle lies in a turn of the reference's speaker.
        """
        middles = positions.mean(dim=-1)
        speakers = self.speakers.to(positions.device)
        heard = torch.zeros(*middles.shape, speakers.shape[1], dtype=torch.bool, device=positions.device)
        for row, spans in enumerate(self.spans):
            for speaker, start, end in spans:
                during = (middles[row] >= start) & (middles[row] < end)
                heard[row] |= during[:, None] & (speakers[row] == speaker)
        return heard

    def audio_visibility(self, target_positions: torch.Tensor) -> torch.Tensor:
        """
        Args:
            target_positions (`torch.Tensor`): `[B, 1, T, 2]`.

        Returns:
            `torch.Tensor`: Boolean `[B, R + T, R + T]`: which keys an audio token sees. A reference sees its own
            speaker's and the target, the target itself and the references that are heard at its time.
        """
        speakers = self.speakers.to(target_positions.device)
        own = speakers[:, :, None] == speakers[:, None, :]
        references = torch.cat([own, self.heard(target_positions[:, 0])], dim=1)
        target = references.new_ones(*references.shape[:2], target_positions.shape[2])
        return torch.cat([references, target], dim=2)

    def video_visibility(self, video_positions: torch.Tensor, num_target_tokens: int) -> torch.Tensor:
        """
        Args:
            video_positions (`torch.Tensor`): `[B, 3, V, 2]`, whose first axis is the time.
            num_target_tokens (`int`): Audio tokens of the target, which all video sees.

        Returns:
            `torch.Tensor`: Boolean `[B, V, R + T]`: which audio tokens a video token sees.
        """
        references = self.heard(video_positions[:, 0])
        return torch.cat([references, references.new_ones(*references.shape[:2], num_target_tokens)], dim=2)

    def repeat_rows(self, count: int) -> "SpeakerTurns":
        """Each row `count` times in a row: `[a, b]` becomes `[a, a, b, b]`."""
        return SpeakerTurns(
            self.speakers.repeat_interleave(count, dim=0), tuple(row for row in self.spans for _ in range(count))
        )


@dataclass(frozen=True)
class ReferenceBatch:
    """
    The reference blocks of a batch, ready to stand before the target tokens.

    Attributes:
        tokens (`torch.Tensor`): Normalised tokens `[B, R, C * M]`, zeros where a row is padded at the front.
        positions (`torch.Tensor`): `[B, 1, R, 2]` in seconds.
        lengths (`tuple[int, ...]`): Real tokens of each row.
        turns (`SpeakerTurns`, *optional*): Which speaker is heard when; `None` if the whole target hears all of them.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: tuple[int, ...]
    turns: SpeakerTurns | None = None

    @classmethod
    def from_clips(
        cls, rows: Sequence[Sequence[torch.Tensor]], rope: LTX2AudioVideoRotaryPosEmbed
    ) -> "ReferenceBatch | None":
        """
        Args:
            rows (`Sequence[Sequence[torch.Tensor]]`):
                For each row its clips, each normalised tokens of shape `[L, C * M]`; an empty row has no reference.
            rope (`LTX2AudioVideoRotaryPosEmbed`): The transformer's `audio_rope`.

        Returns:
            `ReferenceBatch`, or `None` when no row has a reference.
        """
        clip_lengths = [[clip.shape[0] for clip in row] for row in rows]
        return cls._from_blocks(
            [
                (row, reference_positions(lengths, rope)) if any(lengths) else None
                for row, lengths in zip(rows, clip_lengths)
            ]
        )

    @classmethod
    def from_turns(
        cls, rows: Sequence[Sequence[Turn]], rope: LTX2AudioVideoRotaryPosEmbed, num_target_tokens: int
    ) -> "ReferenceBatch | None":
        """
        Several speakers in one clip (experimental): each speaker's reference lies before zero as if it were the only
        one, and is heard in that speaker's turns only. Where turns overlap, both speakers are heard.

        Args:
            rows (`Sequence[Sequence[Turn]]`): For each row its turns; an empty row has no reference.
            rope (`LTX2AudioVideoRotaryPosEmbed`): The transformer's `audio_rope`.
            num_target_tokens (`int`): Audio tokens of the target, in which every turn has to have a part.

        Returns:
            `ReferenceBatch`, or `None` when no row has a turn.

        Raises:
            ValueError: A turn ends where it begins or earlier, or holds no token of the target.
        """
        middles = rope.prepare_audio_coords(1, num_target_tokens, "cpu")[0, 0].mean(dim=-1)
        for turn in (turn for row in rows for turn in row):
            _check_turn(turn, middles)
        blocks, spans = [], []
        for row in rows:
            clips = list({id(turn.tokens): turn.tokens for turn in row}.values())
            numbers = {id(clip): number for number, clip in enumerate(clips)}
            positions = [reference_positions([len(clip)], rope) for clip in clips]
            blocks.append((clips, torch.cat(positions, dim=2)) if row else None)
            spans.append(tuple((numbers[id(turn.tokens)], float(turn.start), float(turn.end)) for turn in row))
        batch = cls._from_blocks(blocks)
        if batch is None:
            return None
        speakers = torch.full(batch.tokens.shape[:2], -1, device=batch.tokens.device)
        for index, block in enumerate(blocks):
            if block is not None:
                whose = [number for number, clip in enumerate(block[0]) for _ in range(len(clip))]
                speakers[index, -len(whose) :] = torch.tensor(whose, device=speakers.device)
        return replace(batch, turns=SpeakerTurns(speakers, tuple(spans)))

    @classmethod
    def _from_blocks(
        cls, blocks: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor] | None]
    ) -> "ReferenceBatch | None":
        """From each row's clips and their positions together; `None` for a row without."""
        lengths = tuple(0 if block is None else block[1].shape[2] for block in blocks)
        if not any(lengths):
            return None
        example = next(block[0][0] for block in blocks if block is not None)
        tokens = example.new_zeros(len(blocks), max(lengths), example.shape[1])
        positions = torch.zeros(len(blocks), 1, max(lengths), 2, device=example.device)
        for index, (block, length) in enumerate(zip(blocks, lengths)):
            if length:
                tokens[index, -length:] = torch.cat(list(block[0]))
                positions[index, :, -length:] = block[1][0]
        return cls(tokens, positions, lengths)

    @property
    def num_tokens(self) -> int:
        """Reference tokens before the target, padding included."""
        return self.tokens.shape[1]

    def repeat_rows(self, count: int) -> "ReferenceBatch":
        """Each row `count` times in a row: `[a, b]` becomes `[a, a, b, b]`."""
        return ReferenceBatch(
            self.tokens.repeat_interleave(count, dim=0),
            self.positions.repeat_interleave(count, dim=0),
            tuple(length for length in self.lengths for _ in range(count)),
            None if self.turns is None else self.turns.repeat_rows(count),
        )


def _check_turn(turn: Turn, middles: torch.Tensor) -> None:
    """Raises a ValueError unless the turn holds one of the target tokens, whose middles are given in seconds."""
    # Written so that a number that is none fails too.
    if not turn.start < turn.end:
        raise ValueError(f"`start` of a turn ({turn.start} s) has to be smaller than its `end` ({turn.end} s).")
    if not ((middles >= turn.start) & (middles < turn.end)).any():
        raise ValueError(
            f"A turn with `start` {turn.start} s and `end` {turn.end} s holds no sound of the clip; make it longer,"
            f" and begin it before {middles[-1].item():.2f} s."
        )


def reference_timesteps(
    timestep: torch.Tensor,
    num_reference_tokens: int,
    num_target_tokens: int,
    conditioning_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Timestep of every audio token: 0 on the reference, which stays clean at every step, the current one on the target.

    Args:
        timestep (`torch.Tensor`): The current timestep of each row, `[B]`.
        num_reference_tokens (`int`): Tokens before the target.
        num_target_tokens (`int`): Tokens of the target.
        conditioning_mask (`torch.Tensor`, *optional*):
            `[B, num_target_tokens, 1]`, 1 on clean target tokens, whose timestep is 0 too; `None` if all are noisy.

    Returns:
        `torch.Tensor`: `[B, num_reference_tokens + num_target_tokens]`.
    """
    reference = timestep.new_zeros(timestep.shape[0], num_reference_tokens)
    target = timestep[:, None].expand(-1, num_target_tokens)
    if conditioning_mask is not None:
        target = target * (1 - conditioning_mask[..., 0])
    return torch.cat([reference, target], dim=1)
