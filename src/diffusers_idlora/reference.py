"""A reference block: the clean audio tokens of somebody's voice, their negative positions and their zero timesteps."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    Where the reference tokens of every row stand in one audio sequence, `[padding | reference | target]`.

    Attributes:
        lengths (`tuple[int, ...]`): Reference tokens of each row; 0 for a row without a reference.
        num_reference_tokens (`int`): Tokens before the target in every row; shorter references are padded to this.
        num_target_tokens (`int`): Tokens of the target in every row.
    """

    lengths: tuple[int, ...]
    num_reference_tokens: int
    num_target_tokens: int

    def __post_init__(self):
        if max(self.lengths, default=0) > self.num_reference_tokens:
            raise ValueError(f"`lengths` {self.lengths} exceed `num_reference_tokens` {self.num_reference_tokens}.")

    @property
    def num_tokens(self) -> int:
        """Length of the whole audio sequence."""
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
class ReferenceBatch:
    """
    The reference blocks of a batch, ready to stand before the target tokens.

    Attributes:
        tokens (`torch.Tensor`): Normalised tokens `[B, R, C * M]`, zeros where a row is padded at the front.
        positions (`torch.Tensor`): `[B, 1, R, 2]` in seconds.
        lengths (`tuple[int, ...]`): Real tokens of each row.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: tuple[int, ...]

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
        lengths = tuple(sum(clip.shape[0] for clip in row) for row in rows)
        if not any(lengths):
            return None
        example = next(clip for row in rows for clip in row)
        tokens = example.new_zeros(len(rows), max(lengths), example.shape[1])
        positions = torch.zeros(len(rows), 1, max(lengths), 2, device=example.device)
        for index, (row, length) in enumerate(zip(rows, lengths)):
            if length:
                tokens[index, -length:] = torch.cat(list(row))
                positions[index, :, -length:] = reference_positions(
                    [clip.shape[0] for clip in row], rope, example.device
                )[0]
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
        )


def reference_timesteps(timestep: torch.Tensor, num_reference_tokens: int, num_target_tokens: int) -> torch.Tensor:
    """
    Timestep of every audio token: 0 on the reference, which stays clean at every step, the current one on the target.

    Args:
        timestep (`torch.Tensor`): The current timestep of each row, `[B]`.
        num_reference_tokens (`int`): Tokens before the target.
        num_target_tokens (`int`): Tokens of the target.

    Returns:
        `torch.Tensor`: `[B, num_reference_tokens + num_target_tokens]`.
    """
    reference = timestep.new_zeros(timestep.shape[0], num_reference_tokens)
    return torch.cat([reference, timestep[:, None].expand(-1, num_target_tokens)], dim=1)
