"""The named recipes, and the options of a call that they are made of."""

import inspect

import pytest
import torch

from conftest import families
from diffusers_idlora import RECIPES, GuidanceWindow, LTX2IDLoRAPipeline, LTX2IDLoRATwoStagePipeline, SpeakerTurn
from diffusers_idlora.demo_assets import demo_voice
from diffusers_idlora.guidance import GuidanceScales
from diffusers_idlora.pipeline_steps import SAMPLERS
from diffusers_idlora.recipes import TWO_STAGE_RECIPES
from diffusers_idlora.schedulers import LTX2Res2sScheduler
from diffusers_idlora.tiny import tiny_components, tiny_latent_upsampler


SMALL = {"prompt": "hello", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
SMALL |= {"max_sequence_length": 16, "output_type": "latent"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_pipeline(family="ltx-2.3"):
    pipe = LTX2IDLoRAPipeline(**tiny_components(family))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def voice():
    return demo_voice(2.5)


def sigmas_and_passes(pipe, **arguments):
    """Noise level of every forward of a call."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["sigma"][0].item() / 1000), with_kwargs=True
    )
    try:
        pipe(**arguments)
    finally:
        hook.remove()
    return seen


def test_the_defaults_of_a_call_are_the_one_stage_recipe():
    parameters = inspect.signature(LTX2IDLoRAPipeline.__call__).parameters
    defaults = {name: parameters[name].default for name in RECIPES["one-stage"]}
    # The default of the sound's text guidance depends on that of the picture.
    defaults["audio_guidance_scale"] = GuidanceScales().audio_guidance_scale
    assert defaults == dict(RECIPES["one-stage"])


def test_the_defaults_of_a_two_stage_call_are_the_two_stage_recipe():
    parameters = inspect.signature(LTX2IDLoRATwoStagePipeline.__call__).parameters
    for name in set(RECIPES["two-stage"]) - set(RECIPES["one-stage"]):
        assert parameters[name].default == RECIPES["two-stage"][name]


@families
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs(name, family, voice):
    if name == "hq" and family == "ltx-2":
        pytest.skip("the HQ recipe is of LTX-2.3")
    components = tiny_components(family)
    arguments = SMALL | dict(RECIPES[name])
    arguments["num_inference_steps"] = 2
    if name in TWO_STAGE_RECIPES:
        pipe = LTX2IDLoRATwoStagePipeline(**components, latent_upsampler=tiny_latent_upsampler())
        arguments |= {"distilled_adapter": None}
    else:
        pipe = LTX2IDLoRAPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(**arguments, reference_audio=voice)
    assert torch.isfinite(output.frames).all() and torch.isfinite(output.audio).all()


def test_the_distilled_recipe_runs_two_passes_at_the_distilled_noise_levels(pipe, voice):
    sigmas = sigmas_and_passes(pipe, **SMALL | RECIPES["distilled"], reference_audio=voice)
    expected = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875]
    assert sigmas == pytest.approx([sigma for sigma in expected for _ in range(2)])


def test_a_recipe_can_be_changed_in_the_call(pipe, voice):
    sigmas = sigmas_and_passes(
        pipe, **SMALL | RECIPES["distilled"] | {"identity_guidance_scale": 0.0}, reference_audio=voice
    )
    assert len(sigmas) == 8


def test_res_2s_evaluates_twice_per_step_and_once_at_the_end(pipe):
    off = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}
    sigmas = sigmas_and_passes(pipe, **SMALL | off, sampler="res_2s")
    assert len(sigmas) == 5
    assert sigmas[1] == pytest.approx((sigmas[0] * sigmas[2]) ** 0.5, rel=1e-4)
    assert sigmas[-1] == pytest.approx(0.0011)


def test_the_pipelines_own_res_2s_scheduler_is_used_without_being_asked_for():
    pipe = make_pipeline()
    asked = pipe(**SMALL, sampler="res_2s", generator=seeded())
    pipe.scheduler = LTX2Res2sScheduler.from_config(pipe.scheduler.config)
    own = pipe(**SMALL, generator=seeded())
    assert torch.equal(asked.frames, own.frames)
    euler = pipe(**SMALL, sampler="euler", generator=seeded())
    assert torch.equal(euler.frames, make_pipeline()(**SMALL, generator=seeded()).frames)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_scheduler_of_the_pipeline_is_left_as_it_was(pipe, sampler):
    before, sigmas = pipe.scheduler, pipe.scheduler.sigmas.clone()
    pipe(**SMALL, sampler=sampler)
    assert pipe.scheduler is before and torch.equal(pipe.scheduler.sigmas, sigmas)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_clean_first_frame_stays_clean_with_every_sampler(pipe, sampler):
    first = torch.randn(1, 8, 1, 2, 2, generator=seeded(5))
    output = pipe(**SMALL, image_latents=first, sampler=sampler)
    torch.testing.assert_close(output.frames[:, :, :1], first, atol=1e-5, rtol=1e-5)


def test_res_2s_rows_equal_single_runs(pipe, voice):
    prompts = ["hello", "there"]
    arguments = SMALL | {"sampler": "res_2s", "cfg_star": True}
    both = pipe(**arguments | {"prompt": prompts}, reference_audio=voice, generator=[seeded(0), seeded(1)])
    for row, prompt in enumerate(prompts):
        alone = pipe(**arguments | {"prompt": prompt}, reference_audio=voice, generator=[seeded(row)])
        torch.testing.assert_close(both.frames[row], alone.frames[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(both.audio[row], alone.audio[0], atol=1e-4, rtol=1e-4)


def test_the_real_number_of_tokens_shifts_less_for_a_small_video(pipe):
    off = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "num_inference_steps": 4}
    fixed = sigmas_and_passes(pipe, **SMALL | off)
    real = sigmas_and_passes(pipe, **SMALL | off, sigma_shift_tokens=None)
    assert real == pytest.approx(sigmas_and_passes(pipe, **SMALL | off, sigma_shift_tokens=2 * 2 * 2))
    assert all(small < large for small, large in zip(real[1:-1], fixed[1:-1]))


def test_cfg_star_changes_the_result_and_nothing_without_text_guidance(pipe):
    plain, star = (pipe(**SMALL, cfg_star=value, generator=seeded()) for value in (False, True))
    assert not torch.allclose(plain.frames, star.frames)
    off = SMALL | {"guidance_scale": 1.0}
    plain, star = (pipe(**off, cfg_star=value, generator=seeded()) for value in (False, True))
    assert torch.equal(plain.frames, star.frames)


def test_guidance_windows_leave_out_the_passes_outside_of_them(pipe, voice):
    steps = {"num_inference_steps": 4, "reference_audio": voice}
    assert len(sigmas_and_passes(pipe, **SMALL | steps)) == 20
    windows = {
        "text": (0.0, 0.5),
        "stg": GuidanceWindow(0.5, 1.0),
        "modality": GuidanceWindow(every=2),
        "identity": GuidanceWindow(skip=((0.0, 0.75),)),
    }
    assert len(sigmas_and_passes(pipe, **SMALL | steps, guidance_windows=windows)) == 4 + 2 + 2 + 2 + 1


def test_shared_identity_guidance_runs_one_pass_less(pipe, voice):
    calls = sigmas_and_passes(pipe, **SMALL, reference_audio=voice, identity_guidance_mode="shared")
    assert len(calls) == 2 * 4
    exact, shared = (
        pipe(**SMALL, reference_audio=voice, identity_guidance_mode=mode, generator=seeded())
        for mode in ("exact", "shared")
    )
    assert torch.isfinite(shared.audio).all()
    assert not torch.equal(exact.audio, shared.audio)


@families
def test_shared_identity_guidance_without_a_reference_is_plain_generation(family):
    pipe = make_pipeline(family)
    exact, shared = (
        pipe(**SMALL, identity_guidance_mode=mode, generator=seeded()).audio for mode in ("exact", "shared")
    )
    assert torch.equal(exact, shared)


def test_automatic_batching_packs_small_rows_and_gives_the_same_result(pipe, voice):
    assert len(sigmas_and_passes(pipe, **SMALL, reference_audio=voice, guidance_batching="auto")) == 2
    plain, automatic = (
        pipe(**SMALL, reference_audio=voice, guidance_batching=mode, generator=seeded())
        for mode in ("sequential", "auto")
    )
    torch.testing.assert_close(plain.frames, automatic.frames, atol=1e-4, rtol=1e-4)


def test_speakers_by_turns_change_with_either_voice(pipe, voice):
    other = (0.1 * torch.randn(1, 24000, generator=seeded(1)), 16000)
    arguments = SMALL | {"num_frames": 17}

    def generate(first, second):
        speakers = [SpeakerTurn(first, 0.0, 0.3), SpeakerTurn(second, 0.3, 0.68)]
        return pipe(**arguments, speakers=speakers, generator=seeded()).audio

    both = generate(voice, other)
    assert not torch.allclose(both, generate(voice, voice))
    assert not torch.allclose(both, generate(other, other))


def test_one_turn_over_the_whole_clip_is_an_ordinary_reference(pipe, voice):
    turn = pipe(**SMALL, speakers=[SpeakerTurn(voice, 0.0, 10.0)], generator=seeded())
    plain = pipe(**SMALL, reference_audio=voice, generator=seeded())
    torch.testing.assert_close(turn.audio, plain.audio, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turn.frames, plain.frames, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sampler": "dpm"}, "`sampler` is 'dpm'"),
        ({"sigma_shift_tokens": 0}, "`sigma_shift_tokens` is 0"),
        ({"identity_guidance_mode": "fast"}, "`identity_guidance_mode` is 'fast'"),
        ({"freeze_audio": True}, "`freeze_audio` is set without `audio_latents`"),
        ({"guidance_windows": {"words": (0, 1)}}, "`guidance_windows` has 'words'"),
        ({"guidance_batching": "some"}, "`guidance_batching` is 'some'"),
        ({"cfg_star": 3}, "`cfg_star` is 3"),
        ({"speakers": []}, "`speakers` is"),
        ({"speakers": [1]}, "`speakers` holds"),
        ({"speakers": [SpeakerTurn("missing.wav", 0.0, 0.3)]}, "`speakers`.*missing.wav"),
        ({"speakers": [SpeakerTurn(torch.zeros(1, 8000), 0.0, 0.3)]}, "`speakers` has a waveform without its rate"),
        ({"speakers": [SpeakerTurn("a.wav", 1.0, 0.5)]}, "`speakers` has a turn"),
        ({"speakers": [SpeakerTurn("a.wav", "1", 2.0), SpeakerTurn("a.wav", 0.5, 1.0)]}, "`start` is '1'"),
        ({"speakers": [SpeakerTurn("a.wav", 0.0, 1.0), []]}, "`speakers` is a list of 2 for 1 prompt"),
        ({"speakers": [SpeakerTurn(demo_voice(2.5), 5.0, 6.0)]}, "`speakers` has a turn from 5.0 to 6.0 s"),
        ({"guidance_parallel": True}, "guidance_parallel"),
    ],
)
def test_what_the_options_cannot_be_is_said_before_any_model_runs(pipe, arguments, words):
    ran = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: ran.append(1))
        for module in (pipe.text_encoder.get_input_embeddings(), pipe.connectors, pipe.transformer)
    ]
    try:
        with pytest.raises(ValueError, match=words):
            pipe(**SMALL | arguments)
    finally:
        for hook in hooks:
            hook.remove()
    assert not ran


def test_speakers_of_several_prompts_are_a_list_for_each(pipe, voice):
    rows = [[SpeakerTurn(voice, 0.0, 0.5)], SpeakerTurn(voice, 0.0, 0.5)]
    with pytest.raises(ValueError, match="`speakers` holds SpeakerTurn; give"):
        pipe(**SMALL | {"prompt": ["hello", "there"]}, speakers=rows)


def test_a_turn_is_of_the_picture_at_the_time_that_it_is_played_at_any_motion_speed(pipe, voice):
    seen = []

    def after_step(pipe, step, timestep, tensors):
        # Video tokens by references and target, where the video reads the audio.
        mask = pipe.transformer.transformer_blocks[0].audio_to_video_attn.processor.edit.mask
        seen.append(mask[0, :, 0] == 0)
        return {}

    for speed in (1.0, 0.25):
        pipe(
            **SMALL | {"num_frames": 17, "num_inference_steps": 2},
            speakers=[SpeakerTurn(voice, 0.0, 0.3)],
            motion_speed=speed,
            callback_on_step_end=after_step,
            identity_guidance_scale=0.0,
        )
    assert torch.equal(seen[0], seen[-1])
    assert seen[0].any() and not seen[0].all()


def test_identity_guidance_runs_no_pass_for_sound_that_is_frozen(pipe, voice):
    frozen = {"audio_latents": torch.randn(1, 2, 9, 4, generator=seeded()), "freeze_audio": True}
    assert len(sigmas_and_passes(pipe, **SMALL, **frozen, reference_audio=voice)) == 2 * 4


def test_overlapping_turns_are_an_error(pipe, voice):
    with pytest.raises(ValueError, match="follow each other"):
        pipe(**SMALL, speakers=[SpeakerTurn(voice, 0.0, 0.3), SpeakerTurn(voice, 0.2, 0.5)])
