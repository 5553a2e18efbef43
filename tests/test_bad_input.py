"""Input that can't work is refused with one sentence, before any model runs."""

import logging
import math
import re
import shutil
import wave

import av
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

from diffusers_idlora import IdentityGuidance, LTX2IDLoRAPipeline, TextContext, audio


NAN, INFINITY = math.nan, math.inf
RATE = 16000
FACE = PIL.Image.new("RGB", (64, 64), "gray")
# Shapes that fit the tiny checkpoint and a video of 64 x 64 and 9 frames.
VIDEO_LATENTS, IMAGE_LATENTS = torch.zeros(1, 8, 2, 2, 2), torch.zeros(1, 8, 1, 2, 2)
AUDIO_LATENTS = torch.zeros(1, 2, 9, 4)

SCALES = (
    "guidance_scale",
    "audio_guidance_scale",
    "identity_guidance_scale",
    "stg_scale",
    "audio_stg_scale",
    "modality_scale",
    "audio_modality_scale",
    "guidance_rescale",
    "audio_guidance_rescale",
    "noise_scale",
)


def voice(seconds=3.0, channels=1):
    times = torch.arange(round(seconds * RATE)) / RATE
    return (0.5 * torch.sin(2 * math.pi * 220 * times)).expand(channels, -1)


def write_wav(path, samples):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", "not compressed"))
        file.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())


def write_video_without_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def media(tmp_path_factory, voice_wav, face_png):
    """A folder of good and bad files."""
    folder = tmp_path_factory.mktemp("media")
    shutil.copy(voice_wav, folder / "voice.wav")
    shutil.copy(face_png, folder / "face.png")
    (folder / "text.wav").write_text("This is not a recording.")
    (folder / "no_bytes.wav").touch()
    (folder / "text.png").write_text("This is not a picture.")
    (folder / "half.png").write_bytes(face_png.read_bytes()[:200])
    write_video_without_sound(folder / "no_sound.mp4")
    write_wav(folder / "no_samples.wav", [])
    write_wav(folder / "silent.wav", np.zeros(RATE))
    write_wav(folder / "short.wav", voice(0.05)[0])
    return folder


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    pipeline = LTX2IDLoRAPipeline.from_pretrained(tiny_checkpoint("ltx-2.3"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def models_run(pipe):
    """The names of the models that ran, filled as they do."""
    models = {
        "text_encoder": pipe.text_encoder,
        "connectors": pipe.connectors,
        "transformer": pipe.transformer,
        "vae.encoder": pipe.vae.encoder,
        "vae.decoder": pipe.vae.decoder,
        "audio_vae.encoder": pipe.audio_vae.encoder,
        "audio_vae.decoder": pipe.audio_vae.decoder,
        "vocoder": pipe.vocoder,
    }
    names = []
    hooks = [
        model.register_forward_pre_hook(lambda *_, name=name: names.append(name)) for name, model in models.items()
    ]
    yield names
    for hook in hooks:
        hook.remove()


def generate(pipe, **arguments):
    defaults = {
        "prompt": "a",
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 2,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    return pipe(**(defaults | arguments))


def shows(message, value):
    """Whether a value stands in a message by itself, not as a part of a longer word or number."""
    return re.search(rf"(?<![\w.-]){re.escape(value)}(?!\w)", message) is not None


# For each case: what is given, the arguments that the sentence names, and the offending value as it shows it.
RECORDINGS = {
    "missing recording": ({"reference_audio": "missing.wav"}, ["reference_audio"], "'missing.wav'"),
    "folder as recording": ({"reference_audio": "."}, ["reference_audio"], "'.'"),
    "undecodable recording": ({"reference_audio": "text.wav"}, ["reference_audio"], "'text.wav'"),
    "recording of no bytes": ({"reference_audio": "no_bytes.wav"}, ["reference_audio"], "'no_bytes.wav'"),
    "video without sound": ({"reference_audio": "no_sound.mp4"}, ["reference_audio"], "'no_sound.mp4'"),
    "file of no samples": ({"reference_audio": "no_samples.wav"}, ["reference_audio"], "empty"),
    "silent file": ({"reference_audio": "silent.wav"}, ["reference_audio"], "silent"),
    "file too short": ({"reference_audio": "short.wav"}, ["reference_audio"], "0.05"),
    "bad clip among good ones": (
        {"reference_audio": ("voice.wav", "missing.wav")},
        ["reference_audio"],
        "'missing.wav'",
    ),
    "bad recording of the second prompt": (
        {"prompt": ["a", "b"], "reference_audio": ["voice.wav", "text.wav"]},
        ["reference_audio"],
        "'text.wav'",
    ),
    "no clips": ({"reference_audio": ()}, ["reference_audio"], "empty"),
    "empty recording": ({"reference_audio": (torch.zeros(1, 0), RATE)}, ["reference_audio"], "[1, 0]"),
    "silent recording": ({"reference_audio": (torch.zeros(1, RATE), RATE)}, ["reference_audio"], "silent"),
    "NaN recording": ({"reference_audio": (voice() * NAN, RATE)}, ["reference_audio"], "NaN"),
    "infinite recording": ({"reference_audio": (voice() * INFINITY, RATE)}, ["reference_audio"], "infinite"),
    "recording too short": ({"reference_audio": (voice(0.05), RATE)}, ["reference_audio"], "0.05"),
    "recording of integers cast to float": (
        {"reference_audio": (voice() * 40000, RATE)},
        ["reference_audio"],
        "20000",
    ),
    "recording with a batch axis": ({"reference_audio": (voice()[None], RATE)}, ["reference_audio"], "[1, 1, 48000]"),
    "recording of another type": ({"reference_audio": 5}, ["reference_audio"], "'5'"),
    "sampling rate 0": ({"reference_audio": (voice(), 0)}, ["reference_audio"], "0"),
    "negative sampling rate": ({"reference_audio": (voice(), -RATE)}, ["reference_audio"], "-16000"),
    "NaN sampling rate": ({"reference_audio": (voice(), NAN)}, ["reference_audio"], "nan"),
    "absurd sampling rate": ({"reference_audio": (voice(), 10**9)}, ["reference_audio"], "1000000000"),
    "absurd sampling rate of a tensor": (
        {"reference_audio": voice(), "reference_audio_sampling_rate": 1},
        ["reference_audio"],
        "1",
    ),
    "tensor without a rate": (
        {"reference_audio": voice()},
        ["reference_audio", "reference_audio_sampling_rate"],
        None,
    ),
    "rate without a tensor": (
        {"reference_audio_sampling_rate": RATE},
        ["reference_audio", "reference_audio_sampling_rate"],
        "16000",
    ),
    "rate of a file": (
        {"reference_audio": "voice.wav", "reference_audio_sampling_rate": 8000},
        ["reference_audio", "reference_audio_sampling_rate"],
        "8000",
    ),
    "reference given twice": (
        {"reference_audio": "voice.wav", "reference_latents": AUDIO_LATENTS},
        ["reference_audio", "reference_latents"],
        None,
    ),
    "more recordings than prompts": ({"reference_audio": ["voice.wav"] * 3}, ["reference_audio"], "3"),
    "fewer recordings than prompts": (
        {"prompt": ["a", "b", "c"], "reference_audio": ["voice.wav", None]},
        ["reference_audio"],
        "2",
    ),
}

IMAGES = {
    "missing image": ({"image": "missing.png"}, ["image"], "'missing.png'"),
    "undecodable image": ({"image": "text.png"}, ["image"], "'text.png'"),
    "half an image": ({"image": "half.png"}, ["image"], "'half.png'"),
    "recording as image": ({"image": "voice.wav"}, ["image"], "'voice.wav'"),
    "image of another type": ({"image": 5}, ["image"], "'5'"),
    "image tensor above 1": ({"image": torch.full((3, 64, 64), 1.5)}, ["image"], "1.5..1.5"),
    "image tensor below 0": ({"image": torch.full((3, 64, 64), -0.5)}, ["image"], "-0.5..-0.5"),
    "NaN image": ({"image": torch.full((3, 64, 64), NAN)}, ["image"], "NaN"),
    "image of five channels": ({"image": torch.zeros(5, 64, 64)}, ["image"], "[5, 64, 64]"),
    "image and its latents": ({"image": FACE, "image_latents": IMAGE_LATENTS}, ["image", "image_latents"], None),
    "image and a first condition": (
        {"image": FACE, "conditions": LTX2VideoCondition(frames=FACE, index=0)},
        ["image", "conditions"],
        "0",
    ),
    "image and a first condition among others": (
        {"image": FACE, "conditions": [LTX2VideoCondition(frames=FACE, index=index) for index in (-1, 0)]},
        ["image", "conditions"],
        "0",
    ),
    "more images than prompts": ({"image": [FACE, FACE]}, ["image"], "2"),
    "fewer images than prompts": ({"prompt": ["a", "b"], "image": [FACE]}, ["image"], "1"),
}

PROMPTS = {
    "no prompt": ({"prompt": None}, ["prompt", "prompt_embeds", "text_context"], None),
    "prompt given twice": ({"prompt_embeds": torch.zeros(1, 16, 96)}, ["prompt", "prompt_embeds"], None),
    "embeddings without a mask": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 96)},
        ["prompt_embeds", "prompt_attention_mask"],
        None,
    ),
    "empty prompt": ({"prompt": " "}, ["prompt"], "' '"),
    "no prompts": ({"prompt": []}, ["prompt"], "empty"),
    "an empty prompt among others": ({"prompt": ["a", ""]}, ["prompt"], "''"),
    "prompt of another type": ({"prompt": 5}, ["prompt"], "int"),
    "prompts in a tuple": ({"prompt": ("a", "b")}, ["prompt"], "tuple"),
    "unknown tag": ({"prompt": "[VISUAL]: a desk [MUSIC]: piano"}, ["prompt"], "[MUSIC]"),
    "repeated tag": ({"prompt": "[SPEECH]: yes [SPEECH]: no"}, ["prompt"], "[SPEECH]"),
    "text before the tags": ({"prompt": "a desk [SPEECH]: yes"}, ["prompt"], "'a desk'"),
    "more negative prompts than prompts": ({"negative_prompt": ["x", "y"]}, ["negative_prompt"], "2"),
    "negative prompt of another type": ({"negative_prompt": 5}, ["negative_prompt"], None),
    "max_sequence_length 0": ({"max_sequence_length": 0}, ["max_sequence_length"], "0"),
    "negative max_sequence_length": ({"max_sequence_length": -16}, ["max_sequence_length"], "-16"),
    # The tiny connectors have eight learnable registers.
    "max_sequence_length that the registers don't divide": (
        {"max_sequence_length": 12},
        ["max_sequence_length"],
        "12",
    ),
}

SIZES = {
    "height not a multiple of 32": ({"height": 70}, ["height"], "70"),
    "width not a multiple of 32": ({"width": 48}, ["width"], "48"),
    "height 0": ({"height": 0}, ["height"], "0"),
    "negative width": ({"width": -64}, ["width"], "-64"),
    "height without width": ({"width": None}, ["height", "width"], "64"),
    "num_frames not 8k+1": ({"num_frames": 10}, ["num_frames"], "10"),
    "num_frames 8k": ({"num_frames": 16}, ["num_frames"], "16"),
    "num_frames 0": ({"num_frames": 0}, ["num_frames"], "0"),
    "negative num_frames": ({"num_frames": -7}, ["num_frames"], "-7"),
    "num_frames no whole number": ({"num_frames": 9.0}, ["num_frames"], "9.0"),
    "frame_rate 0": ({"frame_rate": 0}, ["frame_rate"], "0"),
    "negative frame_rate": ({"frame_rate": -25.0}, ["frame_rate"], "-25.0"),
    "NaN frame_rate": ({"frame_rate": NAN}, ["frame_rate"], "nan"),
    "motion_speed 0": ({"motion_speed": 0.0}, ["motion_speed"], "0.0"),
    "min_seconds above max_seconds": (
        {"min_seconds": 20.0, "max_seconds": 1.0},
        ["min_seconds", "max_seconds"],
        "20.0",
    ),
    "num_videos_per_prompt 0": ({"num_videos_per_prompt": 0}, ["num_videos_per_prompt"], "0"),
}

LATENTS = {
    "packed latents": ({"latents": torch.zeros(1, 8, 8)}, ["latents"], "(1, 8, 8)"),
    "packed audio latents": ({"audio_latents": torch.zeros(1, 9, 8)}, ["audio_latents"], "(1, 9, 8)"),
    "latents of more videos": ({"latents": VIDEO_LATENTS.repeat(2, 1, 1, 1, 1)}, ["latents"], "2"),
    "audio latents of more videos": ({"audio_latents": AUDIO_LATENTS.repeat(3, 1, 1, 1)}, ["audio_latents"], "3"),
    "latents of another size": ({"latents": torch.zeros(1, 8, 2, 3, 2)}, ["latents", "height", "width"], "96"),
    "latents of another length": ({"latents": torch.zeros(1, 8, 3, 2, 2)}, ["latents", "num_frames"], "17"),
    "latents of other channels": ({"latents": torch.zeros(1, 7, 2, 2, 2)}, ["latents"], None),
    "audio latents of other channels": ({"audio_latents": torch.zeros(1, 3, 9, 4)}, ["audio_latents"], None),
    "audio latents of other mel bins": ({"audio_latents": torch.zeros(1, 2, 9, 5)}, ["audio_latents"], None),
    "image latents without a batch axis": ({"image_latents": torch.zeros(8, 1, 2, 2)}, ["image_latents"], None),
    "image latents of another size": ({"image_latents": torch.zeros(1, 8, 1, 3, 2)}, ["image_latents"], None),
    "image latents of other channels": ({"image_latents": torch.zeros(1, 7, 1, 2, 2)}, ["image_latents"], None),
    "image latents of more prompts": (
        {"image_latents": IMAGE_LATENTS.repeat(2, 1, 1, 1, 1)},
        ["image_latents"],
        "2",
    ),
    "packed reference latents": ({"reference_latents": torch.zeros(1, 5, 8)}, ["reference_latents"], "(1, 5, 8)"),
    "reference latents of other channels": (
        {"reference_latents": torch.zeros(1, 3, 5, 4)},
        ["reference_latents"],
        None,
    ),
    "reference latents of other mel bins": (
        {"reference_latents": torch.zeros(1, 2, 5, 5)},
        ["reference_latents"],
        None,
    ),
    "NaN latents": ({"latents": VIDEO_LATENTS * NAN}, ["latents"], None),
    "image latents of two frames": (
        {"image_latents": torch.zeros(1, 8, 2, 2, 2)},
        ["image_latents"],
        "(1, 8, 2, 2, 2)",
    ),
    "empty reference latents": ({"reference_latents": torch.zeros(1, 2, 0, 4)}, ["reference_latents"], "(1, 2, 0, 4)"),
    "latents of another type": ({"latents": [1.0]}, ["latents"], "list"),
    "NaN reference latents": ({"reference_latents": AUDIO_LATENTS * NAN}, ["reference_latents"], None),
    "fewer reference latents than prompts": (
        {"prompt": ["a", "b"], "reference_latents": [AUDIO_LATENTS]},
        ["reference_latents"],
        "1",
    ),
}

SAMPLING = {
    "num_inference_steps 0": ({"num_inference_steps": 0}, ["num_inference_steps"], "0"),
    "num_inference_steps 1": ({"num_inference_steps": 1}, ["num_inference_steps", "sigmas"], "1"),
    "num_inference_steps no whole number": ({"num_inference_steps": 2.5}, ["num_inference_steps"], "2.5"),
    "rising sigmas": ({"sigmas": [0.5, 0.9]}, ["sigmas"], "[0.5, 0.9]"),
    "repeated sigmas": ({"sigmas": [0.9, 0.9]}, ["sigmas"], "[0.9, 0.9]"),
    "sigmas above 1": ({"sigmas": [1.5, 0.5]}, ["sigmas"], "[1.5, 0.5]"),
    "negative sigmas": ({"sigmas": [0.5, -0.5]}, ["sigmas"], "[0.5, -0.5]"),
    "NaN sigmas": ({"sigmas": [1.0, NAN]}, ["sigmas"], "[1.0, nan]"),
    "no sigmas": ({"sigmas": []}, ["sigmas"], "[]"),
    "one number as sigmas": ({"sigmas": 0.5}, ["sigmas"], "0.5"),
    "a word as sigmas": ({"sigmas": "abc"}, ["sigmas"], "'abc'"),
    "one number as STG blocks": ({"spatio_temporal_guidance_blocks": 2}, ["spatio_temporal_guidance_blocks"], "2"),
    "generator of another type": ({"generator": 5}, ["generator"], "int"),
    "condition outside of the video": (
        {"conditions": LTX2VideoCondition(frames=FACE, index=2)},
        ["conditions"],
        "index 2",
    ),
    "image and a condition at the first index from behind": (
        {"image": FACE, "conditions": LTX2VideoCondition(frames=FACE, index=-2)},
        ["image", "conditions"],
        "-2",
    ),
    "condition with a strength above 1": (
        {"conditions": LTX2VideoCondition(frames=FACE, index=-1, strength=2.0)},
        ["conditions", "strength"],
        "2.0",
    ),
    "condition with a NaN strength": (
        {"conditions": LTX2VideoCondition(frames=FACE, index=-1, strength=NAN)},
        ["conditions", "strength"],
        "nan",
    ),
    "condition given as a path": ({"conditions": LTX2VideoCondition(frames="face.png")}, ["conditions"], "str"),
    "negative context of another length": (
        {
            "prompt": None,
            "text_context": TextContext(torch.zeros(1, 16, 32), torch.zeros(1, 16, 16)),
            "negative_text_context": TextContext(torch.zeros(1, 8, 32), torch.zeros(1, 8, 16)),
        },
        ["text_context", "negative_text_context"],
        "[8, 16]",
    ),
    "too short for any sound": ({"num_frames": 1, "frame_rate": 60.0}, ["num_frames", "frame_rate"], "60.0"),
    "condition of another type": ({"conditions": 5}, ["conditions"], "int"),
    "image_crf out of range": ({"image": FACE, "image_crf": 99}, ["image_crf"], "99"),
    "a rate that can't be resampled": ({"reference_audio": (voice(), 767957)}, ["reference_audio"], "767957"),
    "a scale left empty": ({"stg_scale": None}, ["stg_scale"], "None"),
    "only the last sigma": ({"sigmas": [0.0]}, ["sigmas"], "[0.0]"),
    "unknown output_type": ({"output_type": "mp4"}, ["output_type"], "'mp4'"),
    "unknown guidance_batching": ({"guidance_batching": "all"}, ["guidance_batching"], "'all'"),
    "guidance_batching 0": ({"guidance_batching": 0}, ["guidance_batching"], "0"),
    "unknown callback tensor": (
        {"callback_on_step_end_tensor_inputs": ["latents", "noise_pred"]},
        ["callback_on_step_end_tensor_inputs"],
        "'noise_pred'",
    ),
    "more generators than videos": ({"generator": [torch.Generator(), torch.Generator()]}, ["generator"], "2"),
    "fewer generators than videos": (
        {"num_videos_per_prompt": 2, "generator": [torch.Generator()]},
        ["generator"],
        "1",
    ),
    "STG block above the last": (
        {"spatio_temporal_guidance_blocks": [1, 3]},
        ["spatio_temporal_guidance_blocks"],
        "[1, 3]",
    ),
    "negative STG block": ({"spatio_temporal_guidance_blocks": [-1]}, ["spatio_temporal_guidance_blocks"], "[-1]"),
    "no STG blocks": ({"spatio_temporal_guidance_blocks": []}, ["spatio_temporal_guidance_blocks"], "[]"),
    "identity guidance given twice": (
        {"identity_guidance": IdentityGuidance(), "identity_guidance_scale": 2.0},
        ["identity_guidance", "identity_guidance_scale"],
        "2.0",
    ),
    "identity guidance of another type": ({"identity_guidance": 3.0}, ["identity_guidance"], "float"),
}

SCALE_VALUES = {
    f"{name} {value}": ({name: value}, [name], repr(value)) for name in SCALES for value in (-1.0, NAN, INFINITY)
}

CASES = RECORDINGS | IMAGES | PROMPTS | SIZES | LATENTS | SAMPLING | SCALE_VALUES


@pytest.mark.parametrize(("arguments", "names", "value"), CASES.values(), ids=CASES)
def test_bad_input_is_refused_in_one_sentence_before_any_model_runs(
    pipe, models_run, media, monkeypatch, arguments, names, value
):
    monkeypatch.chdir(media)
    with pytest.raises(ValueError) as error:
        generate(pipe, **arguments)
    message = str(error.value)
    assert models_run == []
    assert "\n" not in message
    for name in names:
        assert f"`{name}`" in message
    assert value is None or shows(message, value)


@pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (0.8, 0.2)])
def test_identity_guidance_that_stops_before_it_starts_is_refused_before_any_model_runs(pipe, models_run, start, stop):
    with pytest.raises(ValueError) as error:
        generate(pipe, reference_audio=(voice(), RATE), identity_guidance=IdentityGuidance(start=start, stop=stop))
    message = str(error.value)
    assert models_run == []
    assert "`start`" in message and "`stop`" in message
    assert shows(message, str(start)) and shows(message, str(stop))


def test_a_missing_negative_context_is_refused_where_no_text_encoder_could_make_it(pipe):
    components = {**pipe.components, "text_encoder": None, "tokenizer": None}
    context = TextContext(torch.zeros(1, 16, 32), torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match="`negative_text_context` is missing"):
        generate(LTX2IDLoRAPipeline(**components), prompt=None, text_context=context)


def test_good_input_runs_every_model(pipe, models_run, media, monkeypatch):
    # The opposite of the table above: it shows that a model that runs is noticed.
    monkeypatch.chdir(media)
    generate(pipe, image="face.png", reference_audio="voice.wav", output_type="pt")
    assert set(models_run) == {
        "text_encoder",
        "connectors",
        "transformer",
        "vae.encoder",
        "vae.decoder",
        "audio_vae.encoder",
        "audio_vae.decoder",
        "vocoder",
    }


GOOD = {
    "blocks nobody perturbs": {"spatio_temporal_guidance_blocks": [], "stg_scale": 0.0},
    "one step with its sigma": {"sigmas": [1.0], "num_inference_steps": 1},
    "sigmas with the last 0": {"sigmas": [1.0, 0.5, 0.0]},
    "every scale 0": dict.fromkeys(SCALES, 0.0),
    "the shortest recording": {"reference_audio": (voice(0.1), RATE)},
    "image tensor at its limits": {"image": torch.linspace(0, 1, 3 * 64 * 64).reshape(3, 64, 64)},
    "image and another condition": {"image": FACE, "conditions": LTX2VideoCondition(frames=FACE, index=-1, crf=0)},
    "latents of every kind": {
        "latents": VIDEO_LATENTS,
        "audio_latents": AUDIO_LATENTS,
        "image_latents": IMAGE_LATENTS,
        "reference_latents": AUDIO_LATENTS,
    },
    "a value for some prompts only": {
        "prompt": ["a", "b"],
        "image": [FACE, None],
        "reference_audio": [None, (voice(), RATE)],
        "negative_prompt": ["x", "y"],
        "generator": [torch.Generator().manual_seed(seed) for seed in (0, 1)],
    },
}


@pytest.mark.parametrize("arguments", GOOD.values(), ids=GOOD)
def test_input_just_inside_of_what_is_allowed_is_taken(pipe, arguments):
    output = generate(pipe, **arguments)
    assert torch.isfinite(output.frames).all()
    assert torch.isfinite(output.audio).all()


def test_a_refused_call_changes_nothing_for_the_next_one(pipe):
    def run():
        return generate(pipe, reference_audio=(voice(), RATE), generator=torch.Generator().manual_seed(0))

    before = run()
    for arguments in ({"guidance_scale": NAN}, {"num_frames": 10}, {"reference_latents": torch.zeros(1, 5, 8)}):
        with pytest.raises(ValueError):
            generate(pipe, **arguments)
    after = run()
    assert torch.equal(before.frames, after.frames)
    assert torch.equal(before.audio, after.audio)


# Recordings of unusual length ----------------------------------------------------------------------------------------


@pytest.fixture
def warnings_of_a_fresh_process(monkeypatch, caplog):
    monkeypatch.setattr(audio, "_warned_about_seconds", False)
    caplog.set_level(logging.WARNING)
    return lambda: [record.message for record in caplog.records if "reference_audio" in record.message]


@pytest.mark.parametrize(("seconds", "shown"), [(1.0, "1.0"), (15.0, "15.0")])
def test_an_unusually_short_or_long_reference_warns_at_the_first_call_only(
    pipe, warnings_of_a_fresh_process, seconds, shown
):
    generate(pipe, reference_audio=(voice(seconds), RATE))
    (message,) = warnings_of_a_fresh_process()
    assert "`reference_audio`" in message and shows(message, shown)
    generate(pipe, reference_audio=(voice(seconds), RATE))
    generate(pipe, reference_audio=(voice(16.0 - seconds), RATE))
    assert len(warnings_of_a_fresh_process()) == 1


@pytest.mark.parametrize("seconds", [2.0, 5.0, 10.0])
def test_a_reference_of_a_usual_length_does_not_warn(pipe, warnings_of_a_fresh_process, seconds):
    generate(pipe, reference_audio=(voice(seconds), RATE))
    assert warnings_of_a_fresh_process() == []
