"""Lead-in, clips that go on, and clips that are joined."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

from diffusers_idlora import LTX2IDLoRAPipeline, SpeakerTurn, join_clips
from diffusers_idlora.continuation import EarlierClip, context_frames, read_earlier_clip
from diffusers_idlora.demo_assets import demo_face, demo_voice
from diffusers_idlora.media import write_video
from diffusers_idlora.tiny import tiny_components


SMALL = {"prompt": "hello", "height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 2}
SMALL |= {"max_sequence_length": 16, "output_type": "np"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    pipe = LTX2IDLoRAPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def inputs():
    return {"reference_audio": demo_voice(2.5)}


@pytest.fixture(scope="module")
def first(pipe, inputs):
    return pipe(**inputs, **SMALL | {"num_frames": 33}, image=demo_face(64), generator=seeded())


def inputs_of_forwards(pipe, call):
    """Keyword arguments of every forward of the transformer."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    try:
        call()
    finally:
        hook.remove()
    return seen


def test_a_lead_in_is_generated_and_trimmed_from_picture_and_sound(pipe, inputs):
    rate = pipe.vocoder.config.output_sampling_rate
    whole = pipe(**inputs, **SMALL | {"num_frames": 33}, generator=seeded())
    trimmed = pipe(**inputs, **SMALL, lead_in=0.5, generator=seeded())
    # Half a second is 12.5 frames: two latent frames of 8.
    assert trimmed.frames.shape[1] == 17
    np.testing.assert_allclose(trimmed.frames, whole.frames[:, 16:], atol=1e-5)
    torch.testing.assert_close(trimmed.audio, whole.audio[..., round(16 / 25 * rate) :])


def test_a_lead_in_of_zero_changes_nothing(pipe, inputs):
    assert np.array_equal(
        pipe(**inputs, **SMALL, lead_in=0.0, generator=seeded()).frames,
        pipe(**inputs, **SMALL, generator=seeded()).frames,
    )


@pytest.mark.parametrize("index", [1, -2])
def test_a_condition_counts_from_the_clip_and_not_from_what_is_generated_before_it(pipe, inputs, first, index):
    further = LTX2VideoCondition(frames=demo_face(64), index=index, crf=0)
    earlier = (first.frames[0], first.audio[0])
    for before, num_trimmed in (({"lead_in": 0.5}, 16), ({"continue_from": earlier}, 24)):
        call = inputs_of_forwards(pipe, lambda before=before: pipe(**inputs, **SMALL, **before, conditions=further))[0]
        # Frame 1 of the clip is where its second latent frame begins.
        seconds = call["video_coords"][0, 0, -1, 0].item()
        assert seconds == pytest.approx((num_trimmed + 1) / 25)


def test_a_condition_at_the_beginning_is_the_first_frame_that_is_generated(pipe, inputs):
    face = demo_face(64)
    condition = LTX2VideoCondition(frames=face, index=0, crf=0)
    arguments = inputs | SMALL | {"lead_in": 0.3}
    image, conditioned = (
        pipe(**arguments, **given, generator=seeded()).frames for given in ({"image": face}, {"conditions": condition})
    )
    np.testing.assert_allclose(image, conditioned, atol=1e-5)


def test_a_condition_after_the_end_of_the_clip_is_an_error_with_a_lead_in_too(pipe):
    further = LTX2VideoCondition(frames=demo_face(64), index=3, crf=0)
    with pytest.raises(ValueError, match="3 latent frames; give an index from -3 to 2"):
        pipe(**SMALL, conditions=further, lead_in=0.5)


def test_the_first_speaker_is_heard_in_the_lead_in(pipe, inputs):
    voice = inputs["reference_audio"]
    arguments = SMALL | {"lead_in": 0.5, "output_type": "latent"}
    turns = pipe(**arguments, speakers=[SpeakerTurn(voice, 0.0, 10.0)], generator=seeded())
    plain = pipe(**arguments, reference_audio=voice, generator=seeded())
    torch.testing.assert_close(turns.audio, plain.audio, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turns.frames, plain.frames, atol=1e-4, rtol=1e-4)


def test_a_clip_that_ends_in_silence_goes_on(pipe, inputs, first):
    silent = torch.zeros_like(first.audio[0])
    output = pipe(**inputs, **SMALL, continue_from=(first.frames[0], silent), generator=seeded())
    assert output.frames.shape[1] == 17


def test_a_clip_in_bfloat16_goes_on(pipe, inputs, first):
    frames = torch.from_numpy(first.frames[0]).movedim(-1, 1).to(torch.bfloat16)
    earlier = read_earlier_clip((frames, first.audio[0].to(torch.bfloat16)), 25, 24000)
    assert abs(earlier.frames / 255 - first.frames[0]).max() < 0.01


def test_the_end_of_one_clip_for_several_prompts_is_encoded_once(pipe, first, monkeypatch):
    encoded = []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels: encoded.append(pixels) or encode(pixels))
    pipe(**SMALL | {"prompt": ["hello", "there"]}, continue_from=(first.frames[0], first.audio[0]))
    assert len(encoded) == 1


def test_the_end_of_an_earlier_clip_is_given_clean_at_every_step(pipe, inputs, first):
    rate = pipe.vocoder.config.output_sampling_rate
    earlier = (first.frames[0], (first.audio[0], rate))
    calls = inputs_of_forwards(pipe, lambda: pipe(**inputs, **SMALL, continue_from=earlier, generator=seeded()))
    # 25 frames are one second: 4 latent frames of 2 x 2 tokens, and 25 audio latents.
    for call in calls:
        num_references = call["audio_timestep"].shape[1] - round((17 + 24) / 25 * 25)
        assert (call["timestep"][0, :16] == 0).all() and (call["timestep"][0, 16:] > 0).all()
        target = call["audio_timestep"][0, num_references:]
        assert (target[:25] == 0).all() and (target[25:] > 0).all()
        assert (call["audio_sigma"] > 0).all()
        for name in ("hidden_states",):
            assert torch.equal(call[name][0, :16], calls[0][name][0, :16])
        assert torch.equal(
            call["audio_hidden_states"][0, num_references : num_references + 25],
            calls[0]["audio_hidden_states"][0, calls[0]["audio_timestep"].shape[1] - 41 :][:25],
        )


def test_the_result_has_the_frames_asked_for_and_begins_where_the_earlier_clip_ends(pipe, inputs, first):
    earlier = (first.frames[0], first.audio[0])
    second = pipe(**inputs, **SMALL, continue_from=earlier, generator=seeded(1))
    assert second.frames.shape == (1, 17, 64, 64, 3)
    rate = pipe.vocoder.config.output_sampling_rate
    frames, sound = join_clips(
        (list(first.frames[0]), first.audio[0]), (list(second.frames[0]), second.audio[0]), 25, rate
    )
    assert len(frames) == 33 + 16
    assert abs(sound.shape[-1] / rate - len(frames) / 25) < 0.05


def test_the_context_is_what_vae_and_audio_vae_make_of_the_end(pipe, first):
    earlier = read_earlier_clip((first.frames[0], first.audio[0]), 25, 24000)
    frames = pipe.encode_image(earlier.last_frames(25), 64, 64)
    assert frames.shape == (1, 8, 4, 2, 2)
    sound = pipe.encode_earlier_sound(earlier, 25, 25)
    assert sound.shape[2] == 25
    # The same sound given alone: the last second, up to the beginning of its last latent.
    start = round((33 - 25) / 25 * 24000)
    tail = first.audio[0][:, start : start + round(0.96 * 24000)]
    torch.testing.assert_close(sound, pipe.encode_reference_audio((tail, 24000)), atol=1e-5, rtol=1e-5)


def test_a_file_goes_on_as_its_frames_do(pipe, inputs, first, tmp_path):
    path = tmp_path / "first.mp4"
    write_video(path, list((first.frames[0] * 255).astype(np.uint8)), 25, first.audio[0], 24000)
    earlier = read_earlier_clip(path, 25, 24000)
    assert earlier.frames.shape == (33, 64, 64, 3)
    assert pipe(**inputs, **SMALL, continue_from=path).frames.shape[1] == 17


def test_rows_of_a_batch_go_on_from_clips_of_their_own(pipe, inputs, first):
    earlier = [(first.frames[0], first.audio[0]), (first.frames[0][:, ::-1].copy(), first.audio[0].flip(-1))]
    arguments = SMALL | {"prompt": ["hello", "there"]}
    both = pipe(**inputs, **arguments, continue_from=earlier, generator=[seeded(0), seeded(1)])
    for row in range(2):
        alone = pipe(
            **inputs,
            **SMALL | {"prompt": arguments["prompt"][row]},
            continue_from=earlier[row],
            generator=[seeded(row)],
        )
        np.testing.assert_allclose(both.frames[row], alone.frames[0], atol=1e-4)


def test_frames_of_every_output_type_are_read_alike(first):
    array = first.frames[0]
    as_uint8 = (array * 255).round().astype(np.uint8)
    for frames in (array, as_uint8, torch.from_numpy(array).movedim(-1, 1)):
        assert np.array_equal(read_earlier_clip((frames, first.audio[0]), 25, 24000).frames, as_uint8)


@pytest.mark.parametrize(("available", "rate", "expected"), [(121, 25, 25), (121, 50, 49), (17, 25, 17), (20, 25, 17)])
def test_about_a_second_becomes_context(available, rate, expected):
    clip = EarlierClip(np.zeros((available, 8, 8, 3), np.uint8), torch.zeros(1, 10), 24000)
    assert context_frames([clip], rate, 8) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"continue_from": 3}, "`continue_from` is a int"),
        ({"continue_from": (np.zeros((4, 64, 64, 3), np.uint8), torch.zeros(1, 4000))}, "has 4 frames"),
        ({"continue_from": ("x", torch.zeros(1, 4000))}, "frames of a kind"),
        ({"continue_from": (np.full((33, 64, 64, 3), 9.0), torch.zeros(1, 40000))}, "frames of float64 values"),
        ({"continue_from": (np.zeros((33, 64, 64, 3), np.int64), torch.zeros(1, 40000))}, "frames of int64 values"),
        (
            {"continue_from": (np.zeros((33, 64, 64, 3)), torch.full((1, 40000), torch.nan))},
            "`continue_from` has sound",
        ),
        (
            {"continue_from": (np.zeros((33, 64, 64, 3)), (torch.zeros(1, 40000), 44101))},
            "`continue_from` has a sampling rate of 44101",
        ),
        ({"continue_from": ([demo_face(64), demo_face(32)], torch.zeros(1, 4000))}, "frames of several sizes"),
        ({"continue_from": "missing.mp4"}, "`continue_from`"),
        ({"lead_in": -1.0}, "`lead_in` is -1.0"),
        (
            {"lead_in": 0.5, "continue_from": (np.zeros((33, 64, 64, 3), np.uint8), torch.zeros(1, 40000))},
            "`lead_in` is 0.5",
        ),
        (
            {"image": demo_face(64), "continue_from": (np.zeros((33, 64, 64, 3), np.uint8), torch.zeros(1, 40000))},
            "`image` and `continue_from`",
        ),
    ],
)
def test_what_cannot_go_on_is_said_before_any_model_runs(pipe, arguments, words):
    with pytest.raises(ValueError, match=words):
        pipe(**SMALL | arguments)
