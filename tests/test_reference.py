from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from conftest import families
from diffusers_idlora.reference import (
    ReferenceBatch,
    ReferenceLayout,
    Turn,
    pack_reference_latents,
    reference_positions,
    reference_timesteps,
)
from diffusers_idlora.tiny import tiny_components


# A busy machine is no reason to fail.
untimed = settings(deadline=None)

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
LATENT_SECONDS = 0.04
FEATURES = 8

TRANSFORMER = tiny_components("ltx-2.3")["transformer"]
ROPE = TRANSFORMER.audio_rope

clip_lengths = st.lists(st.integers(1, 200), min_size=1, max_size=5)
# For each row of a batch the lengths of its clips; an empty row has no reference.
batch_lengths = st.lists(st.lists(st.integers(1, 12), max_size=3), min_size=1, max_size=4)


def recorded(name, *keys):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return [file.get_tensor(key) for key in keys]


def random_rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(length, FEATURES, generator=generator) for length in row] for row in lengths]


def split_clips(positions, lengths):
    return positions[0, 0].split(lengths)


# Positions -----------------------------------------------------------------------------------------------------------


@untimed
@given(clip_lengths)
def test_every_reference_latent_begins_and_ends_before_zero(lengths):
    positions = reference_positions(lengths, ROPE)
    assert positions.shape == (1, 1, sum(lengths), 2)
    assert positions.dtype == torch.float32
    assert (positions < 0).all()


@untimed
@given(clip_lengths)
def test_positions_rise_through_all_clips_without_overlap(lengths):
    starts, ends = reference_positions(lengths, ROPE)[0, 0].unbind(-1)
    assert (starts < ends).all()
    # Latents of one clip touch, up to the rounding of float32 some ten seconds before zero.
    assert (ends[:-1] <= starts[1:] + 1e-5).all()


@untimed
@given(clip_lengths)
def test_each_clip_keeps_the_spacing_that_it_would_have_as_a_target(lengths):
    for clip, length in zip(split_clips(reference_positions(lengths, ROPE), lengths), lengths, strict=True):
        target = ROPE.prepare_audio_coords(1, length, "cpu")[0, 0]
        torch.testing.assert_close(clip - clip[0, 0], target, rtol=0, atol=1e-5)


@untimed
@given(clip_lengths)
def test_the_reference_ends_exactly_one_latent_before_the_target_begins(lengths):
    target_start = ROPE.prepare_audio_coords(1, 1, "cpu")[0, 0, 0, 0]
    assert target_start == 0
    end = reference_positions(lengths, ROPE)[0, 0, -1, 1]
    assert (target_start - end).item() == pytest.approx(LATENT_SECONDS, abs=1e-6)


# Clips of up to 7 s in all: further from zero, float32 itself is no finer than the tolerance.
@untimed
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4))
def test_each_clip_ends_exactly_one_latent_before_the_next_begins(lengths):
    clips = split_clips(reference_positions(lengths, ROPE), lengths)
    for clip, following in zip(clips, clips[1:]):
        assert (following[0, 0] - clip[-1, 1]).item() == pytest.approx(LATENT_SECONDS, abs=1e-6)


@untimed
@given(clip_lengths)
def test_even_long_clips_keep_the_gap_as_well_as_float32_allows(lengths):
    positions = reference_positions(lengths, ROPE)
    resolution = positions[0, 0, 0, 0].abs().item() * torch.finfo(torch.float32).eps
    clips = split_clips(positions, lengths)
    for clip, following in zip(clips, clips[1:]):
        gap = (following[0, 0] - clip[-1, 1]).item()
        assert gap == pytest.approx(LATENT_SECONDS, abs=1e-6 + resolution)


@untimed
@given(clip_lengths, st.integers(1, 200))
def test_a_further_clip_in_front_moves_none_of_the_others(lengths, further):
    without = reference_positions(lengths, ROPE)
    assert torch.equal(reference_positions([further, *lengths], ROPE)[:, :, further:], without)


@pytest.mark.parametrize(
    ("name", "num_latents"), [("one_stage_ltx23", 5), ("one_stage_ltx2", 5), ("one_stage_ltx23_identity_only", 4)]
)
def test_positions_are_the_recorded_ones(name, num_latents):
    positions, latents = recorded(name, "audio_positions", "reference_latents")
    assert latents.shape[2] == num_latents
    assert torch.equal(reference_positions([num_latents], ROPE), positions[:, :, :num_latents])
    target = ROPE.prepare_audio_coords(1, positions.shape[2] - num_latents, "cpu")
    assert torch.equal(target, positions[:, :, num_latents:])


def test_positions_follow_the_rates_of_the_model():
    rope = type(ROPE)(
        dim=16, sampling_rate=48000, hop_length=240, scale_factors=[8], causal_offset=1, modality="audio"
    )
    latent_seconds = 8 * 240 / 48000
    assert reference_positions([3], rope)[0, 0, -1, 1].item() == pytest.approx(-latent_seconds, abs=1e-6)


# Batches -------------------------------------------------------------------------------------------------------------


@untimed
@given(batch_lengths)
def test_each_row_s_clips_stand_one_after_the_other_right_before_the_target(lengths):
    rows = random_rows(lengths)
    batch = ReferenceBatch.from_clips(rows, ROPE)
    if batch is None:
        assert not any(lengths)
        return
    assert batch.lengths == tuple(sum(row) for row in lengths)
    assert batch.num_tokens == max(batch.lengths)
    assert batch.tokens.shape == (len(rows), batch.num_tokens, FEATURES)
    assert batch.positions.shape == (len(rows), 1, batch.num_tokens, 2)
    for index, (row, length) in enumerate(zip(rows, batch.lengths)):
        padding = batch.num_tokens - length
        assert (batch.tokens[index, :padding] == 0).all()
        assert (batch.positions[index, :, :padding] == 0).all()
        if row:
            assert torch.equal(batch.tokens[index, padding:], torch.cat(row))
            expected = reference_positions([len(clip) for clip in row], ROPE)[0]
            assert torch.equal(batch.positions[index, :, padding:], expected)


@untimed
@given(batch_lengths, st.data())
def test_a_row_does_not_depend_on_the_other_rows(lengths, data):
    rows = random_rows(lengths)
    index = data.draw(st.integers(0, len(rows) - 1))
    batch, alone = ReferenceBatch.from_clips(rows, ROPE), ReferenceBatch.from_clips([rows[index]], ROPE)
    if alone is None:
        assert batch is None or batch.lengths[index] == 0
        return
    length = alone.num_tokens
    assert batch.lengths[index] == length
    assert torch.equal(batch.tokens[index, -length:], alone.tokens[0])
    assert torch.equal(batch.positions[index, :, -length:], alone.positions[0])


@pytest.mark.parametrize("rows", [[], [[]], [[], [], []]])
def test_a_batch_in_which_no_row_has_a_reference_is_none(rows):
    assert ReferenceBatch.from_clips(rows, ROPE) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_keep_their_dtype_and_positions_are_float32(dtype):
    batch = ReferenceBatch.from_clips([[torch.randn(3, FEATURES, dtype=dtype)], []], ROPE)
    assert batch.tokens.dtype == dtype
    assert batch.positions.dtype == torch.float32


@pytest.mark.parametrize("count", [1, 2, 3])
def test_repeated_rows_stand_next_to_each_other(count):
    batch = ReferenceBatch.from_clips(random_rows([[2], [], [3, 1]]), ROPE)
    repeated = batch.repeat_rows(count)
    order = [row for row in range(3) for _ in range(count)]
    assert repeated.lengths == tuple(batch.lengths[row] for row in order)
    assert torch.equal(repeated.tokens, batch.tokens[order])
    assert torch.equal(repeated.positions, batch.positions[order])


# Turns ---------------------------------------------------------------------------------------------------------------

# Ten target tokens of 0.04 s, the first of 0.01 s: they begin at 0, 0.01, 0.05, ... and end at 0.37.
NUM_TARGET = 10
TARGET_POSITIONS = ROPE.prepare_audio_coords(1, NUM_TARGET, "cpu")


def random_clips(*lengths):
    return [clip for (clip,) in random_rows([[length] for length in lengths])]


def test_each_speaker_s_reference_lies_before_zero_as_if_alone():
    one, other = random_clips(3, 5)
    batch = ReferenceBatch.from_turns([[Turn(one, 0.0, 0.2), Turn(other, 0.2, 0.4)]], ROPE, NUM_TARGET)
    assert batch.lengths == (8,)
    assert torch.equal(batch.tokens[0], torch.cat([one, other]))
    for positions, length in zip(split_clips(batch.positions, [3, 5]), (3, 5)):
        assert torch.equal(positions, reference_positions([length], ROPE)[0, 0])


def test_turns_with_the_same_tokens_are_one_speaker_s_whose_reference_stands_once():
    one, other = random_clips(3, 5)
    turns = [Turn(one, 0.0, 0.1), Turn(other, 0.1, 0.2), Turn(one, 0.2, 0.3), Turn(one.clone(), 0.3, 0.4)]
    batch = ReferenceBatch.from_turns([turns], ROPE, NUM_TARGET)
    assert batch.turns.speakers.tolist() == [[0] * 3 + [1] * 5 + [2] * 3]
    assert batch.turns.spans == (((0, 0.0, 0.1), (1, 0.1, 0.2), (0, 0.2, 0.3), (2, 0.3, 0.4)),)


def test_a_target_token_sees_the_references_of_the_turns_that_hold_its_middle():
    one, other = random_clips(1, 2)
    # The second token's middle is 0.03 s, the fourth's 0.11 s and the sixth's 0.19 s; at the fourth the turns overlap.
    turns = [Turn(one, 0.02, 0.12), Turn(other, 0.1, 0.2)]
    visible = ReferenceBatch.from_turns([turns], ROPE, NUM_TARGET).turns.audio_visibility(TARGET_POSITIONS)
    assert visible.shape == (1, 3 + NUM_TARGET, 3 + NUM_TARGET)
    expected = [[False] * 3] + [[True, False, False]] * 2 + [[True] * 3] + [[False, True, True]] * 2
    assert visible[0, 3:, :3].tolist() == expected + [[False] * 3] * 4
    assert visible[0, 3:, 3:].all()


def test_a_reference_token_sees_its_own_speaker_s_and_the_target():
    one, other = random_clips(1, 2)
    turns = [Turn(one, 0.0, 0.2), Turn(other, 0.2, 0.4)]
    visible = ReferenceBatch.from_turns([turns], ROPE, NUM_TARGET).turns.audio_visibility(TARGET_POSITIONS)
    assert visible[0, :3, :3].tolist() == [[True, False, False], [False, True, True], [False, True, True]]
    assert visible[0, :3, 3:].all()


def test_a_video_token_sees_the_references_of_its_time_and_the_whole_target():
    one, other = random_clips(1, 2)
    turns = [Turn(one, 0.0, 0.1), Turn(other, 0.1, 0.4)]
    positions = TRANSFORMER.rope.prepare_video_coords(1, 2, 2, 2, "cpu", fps=25.0)
    visible = ReferenceBatch.from_turns([turns], ROPE, NUM_TARGET).turns.video_visibility(positions, NUM_TARGET)
    assert visible.shape == (1, 8, 3 + NUM_TARGET)
    # The first latent frame is one picture of 0.04 s, the second holds the eight up to 0.36 s.
    assert visible[0, :, :3].tolist() == [[True, False, False]] * 4 + [[False, True, True]] * 4
    assert visible[0, :, 3:].all()


def test_rows_with_turns_stand_beside_rows_without_and_repeat_with_their_turns():
    one, other = random_clips(3, 2)
    rows = [[Turn(one, 0.0, 0.2), Turn(other, 0.2, 0.4)], [], [Turn(other, 0.1, 0.3)]]
    batch = ReferenceBatch.from_turns(rows, ROPE, NUM_TARGET)
    assert batch.lengths == (5, 0, 2)
    assert batch.turns.speakers.tolist() == [[0, 0, 0, 1, 1], [-1] * 5, [-1, -1, -1, 0, 0]]
    positions = TARGET_POSITIONS.expand(3, -1, -1, -1)
    visible = batch.turns.audio_visibility(positions)
    assert not visible[1, 5:, :5].any() and not visible[2, 5:, :3].any()
    repeated = batch.repeat_rows(2)
    order = [0, 0, 1, 1, 2, 2]
    assert torch.equal(repeated.turns.audio_visibility(positions[order]), visible[order])


@pytest.mark.parametrize("rows", [[], [[]], [[], []]])
def test_rows_without_turns_have_no_references(rows):
    assert ReferenceBatch.from_turns(rows, ROPE, NUM_TARGET) is None


@pytest.mark.parametrize(("start", "end"), [(0.2, 0.2), (0.3, 0.2), (float("nan"), 0.2), (0.1, float("nan"))])
def test_a_turn_that_ends_where_it_begins_or_earlier_is_an_error(start, end):
    with pytest.raises(ValueError, match="`start` of a turn .* has to be smaller than its `end`"):
        ReferenceBatch.from_turns([[Turn(torch.zeros(2, FEATURES), start, end)]], ROPE, NUM_TARGET)


@pytest.mark.parametrize(("start", "end"), [(5.0, 6.0), (0.115, 0.125), (-2.0, -1.0)])
def test_a_turn_that_holds_no_sound_of_the_clip_is_an_error(start, end):
    with pytest.raises(ValueError, match=rf"`start` {start} s and `end` {end} s holds no sound .* before 0.35 s"):
        ReferenceBatch.from_turns([[Turn(torch.zeros(2, FEATURES), start, end)]], ROPE, NUM_TARGET)


# Layout and timesteps ------------------------------------------------------------------------------------------------


@untimed
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 5))
def test_padding_is_what_stands_before_a_shorter_reference(lengths, spare, num_target_tokens):
    num_reference_tokens = max(lengths) + spare
    layout = ReferenceLayout(tuple(lengths), num_reference_tokens, num_target_tokens)
    padding = layout.is_padding()
    assert layout.num_tokens == num_reference_tokens + num_target_tokens
    assert padding.shape == (len(lengths), layout.num_tokens)
    assert padding.dtype == torch.bool
    assert layout.has_padding == padding.any().item()
    for row, length in zip(padding.tolist(), lengths):
        num_padding = num_reference_tokens - length
        assert row == [True] * num_padding + [False] * (length + num_target_tokens)


def test_a_layout_whose_rows_do_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"`lengths` \(3, 6\) exceed `num_reference_tokens` 5"):
        ReferenceLayout((3, 6), 5, 9)


def test_a_copy_stands_after_the_target_and_is_no_padding():
    layout = ReferenceLayout((3, 1), 3, 5, num_copy_tokens=5)
    assert layout.num_front_tokens == 3 + 5
    assert layout.num_tokens == 3 + 5 + 5
    assert layout.is_padding().tolist() == [[False] * 13, [True] * 2 + [False] * 11]


@pytest.mark.parametrize("num_reference_tokens", [0, 2])
def test_clean_target_tokens_have_timestep_0(num_reference_tokens):
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])[..., None]
    timesteps = reference_timesteps(torch.tensor([900.0, 250.5]), num_reference_tokens, 3, mask)
    reference = [0.0] * num_reference_tokens
    assert timesteps.tolist() == [[*reference, 0.0, 900.0, 900.0], [*reference, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("num_reference_tokens", [0, 4])
def test_reference_tokens_have_timestep_0_and_target_tokens_the_current_one(num_reference_tokens):
    timesteps = reference_timesteps(torch.tensor([900.0, 250.5]), num_reference_tokens, 3)
    reference = [0.0] * num_reference_tokens
    assert timesteps.tolist() == [reference + [900.0] * 3, reference + [250.5] * 3]


# Tokens --------------------------------------------------------------------------------------------------------------


@families
def test_latents_are_packed_first_and_then_normalised_per_packed_feature(family):
    audio_vae = tiny_components(family)["audio_vae"]
    mean, std = audio_vae.latents_mean, audio_vae.latents_std
    assert len(mean.unique()) == len(std.unique()) == mean.numel() == FEATURES
    latents = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    tokens = pack_reference_latents(latents, audio_vae)
    assert tokens.shape == (2, 5, FEATURES)
    for row, channel, time, mel in torch.cartesian_prod(*(torch.arange(size) for size in latents.shape)).tolist():
        feature = channel * 4 + mel
        expected = (latents[row, channel, time, mel] - mean[feature]) / std[feature]
        torch.testing.assert_close(tokens[row, time, feature], expected)


def test_tokens_that_are_the_vae_s_mean_become_zero():
    audio_vae = tiny_components("ltx-2.3")["audio_vae"]
    latents = audio_vae.latents_mean.reshape(1, 2, 1, 4).expand(1, 2, 7, 4)
    assert torch.equal(pack_reference_latents(latents, audio_vae), torch.zeros(1, 7, FEATURES))
