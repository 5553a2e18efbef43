import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.guiders.guider_utils import logger as guider_logger
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.utils import hub_utils
from huggingface_hub import RepoUrl
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_idlora import IdentityGuidance
from diffusers_idlora.guidance import (
    CONDITIONAL,
    ISOLATED,
    NEGATIVE,
    NO_REFERENCE,
    PERTURBED,
    GuidancePlan,
    GuidanceScales,
)
from golden import Recording


# A busy machine is no reason to fail.
untimed = settings(deadline=None)

ALL_PASSES = (CONDITIONAL, NEGATIVE, NO_REFERENCE, PERTURBED, ISOLATED)
SCALE_NAMES = (
    "guidance_scale",
    "audio_guidance_scale",
    "stg_scale",
    "audio_stg_scale",
    "modality_scale",
    "audio_modality_scale",
    "guidance_rescale",
    "audio_guidance_rescale",
)
some_scale = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 20.0))
some_scales = st.builds(
    GuidanceScales,
    guidance_scale=some_scale,
    audio_guidance_scale=some_scale,
    stg_scale=some_scale,
    audio_stg_scale=some_scale,
    modality_scale=some_scale,
    audio_modality_scale=some_scale,
)


def scales_of(text, audio_text, stg, audio_stg, modality, audio_modality):
    return GuidanceScales(
        guidance_scale=text,
        audio_guidance_scale=audio_text,
        stg_scale=stg,
        audio_stg_scale=audio_stg,
        modality_scale=modality,
        audio_modality_scale=audio_modality,
    )


def needed_passes(scales, identity):
    """Text and modality guidance are off at 1, identity and spatio-temporal guidance at 0."""
    needed = {CONDITIONAL}
    if (scales.guidance_scale, scales.audio_guidance_scale) != (1, 1):
        needed.add(NEGATIVE)
    if identity != 0:
        needed.add(NO_REFERENCE)
    if (scales.stg_scale, scales.audio_stg_scale) != (0, 0):
        needed.add(PERTURBED)
    if (scales.modality_scale, scales.audio_modality_scale) != (1, 1):
        needed.add(ISOLATED)
    return needed


def random_predictions(passes=ALL_PASSES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        item: (
            torch.randn(2, 6, 4, generator=generator, dtype=torch.float64),
            torch.randn(2, 5, 3, generator=generator, dtype=torch.float64),
        )
        for item in passes
    }


def method_formula(predictions, scales, identity):
    """The method's guidance, term by term; every pass is there."""
    (c_v, c_a), (n_v, n_a), (_, r_a), (p_v, p_a), (i_v, i_a) = (predictions[item] for item in ALL_PASSES)
    video = (
        c_v
        + (scales.guidance_scale - 1) * (c_v - n_v)
        + scales.stg_scale * (c_v - p_v)
        + (scales.modality_scale - 1) * (c_v - i_v)
    )
    audio = (
        c_a
        + (scales.audio_guidance_scale - 1) * (c_a - n_a)
        + identity * (c_a - r_a)
        + scales.audio_stg_scale * (c_a - p_a)
        + (scales.audio_modality_scale - 1) * (c_a - i_a)
    )
    return video, audio


def close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# The plan of a step --------------------------------------------------------------------------------------------------


def test_every_combination_of_scales_0_and_1_runs_only_the_passes_it_needs_and_combines_them_by_the_formula():
    predictions = random_predictions()
    for *numbers, identity in itertools.product((0.0, 1.0), repeat=7):
        scales = scales_of(*numbers)
        plan = GuidancePlan.from_scales(scales, identity)
        assert plan.passes[0] == CONDITIONAL
        assert len(plan.passes) == len(set(plan.passes))
        assert set(plan.passes) == needed_passes(scales, identity)
        needed_only = {item: predictions[item] for item in plan.passes}
        close(plan.combine(needed_only), method_formula(predictions, scales, identity))


@untimed
@given(some_scales, some_scale, st.integers(0, 1000))
def test_any_scales_run_only_the_passes_they_need_and_combine_them_by_the_formula(scales, identity, seed):
    predictions = random_predictions(seed=seed)
    plan = GuidancePlan.from_scales(scales, identity)
    assert set(plan.passes) == needed_passes(scales, identity)
    needed_only = {item: predictions[item] for item in plan.passes}
    close(plan.combine(needed_only), method_formula(predictions, scales, identity))


@untimed
@given(some_scales, st.floats(0.0, 20.0))
def test_identity_guidance_never_changes_the_video(scales, identity):
    predictions = random_predictions()
    with_identity, _ = GuidancePlan.from_scales(scales, identity).combine(predictions)
    without_identity, _ = GuidancePlan.from_scales(scales, 0.0).combine(predictions)
    assert torch.equal(with_identity, without_identity)


def test_a_modality_whose_scale_is_off_is_not_pushed_by_the_other_modality_s_scale():
    predictions = random_predictions()
    video, audio = predictions[CONDITIONAL]
    only_video = GuidancePlan.from_scales(scales_of(3.0, 1.0, 1.0, 0.0, 3.0, 1.0)).combine(predictions)
    only_audio = GuidancePlan.from_scales(scales_of(1.0, 7.0, 0.0, 1.0, 1.0, 3.0), 3.0).combine(predictions)
    assert torch.equal(only_video[1], audio) and not torch.equal(only_video[0], video)
    assert torch.equal(only_audio[0], video) and not torch.equal(only_audio[1], audio)


def test_infinite_predictions_of_a_term_that_is_off_for_a_modality_do_not_reach_it():
    predictions = random_predictions()
    predictions[NEGATIVE] = (torch.full((2, 6, 4), math.inf, dtype=torch.float64), predictions[NEGATIVE][1])
    video, audio = GuidancePlan.from_scales(scales_of(1.0, 7.0, 0.0, 0.0, 1.0, 1.0)).combine(predictions)
    assert torch.isfinite(video).all() and torch.isfinite(audio).all()


def test_without_guidance_the_conditional_prediction_comes_back_as_it_is():
    plan = GuidancePlan.from_scales(scales_of(1.0, 1.0, 0.0, 0.0, 1.0, 1.0))
    predictions = random_predictions([CONDITIONAL])
    assert plan.passes == (CONDITIONAL,)
    assert plan.combine(predictions) == predictions[CONDITIONAL]


def test_each_pass_differs_from_the_conditional_one_in_the_one_thing_that_it_contrasts():
    switches = ("negative", "reference", "perturbed", "isolated")

    def differences(item):
        return {switch for switch in switches if getattr(item, switch) != getattr(CONDITIONAL, switch)}

    assert [differences(item) for item in ALL_PASSES] == [
        set(),
        {"negative"},
        {"reference"},
        {"perturbed"},
        {"isolated"},
    ]
    assert CONDITIONAL.reference
    # The names keep the passes' caches apart.
    assert len({item.name for item in ALL_PASSES}) == len(ALL_PASSES)


@pytest.mark.parametrize(("rescale", "audio_rescale"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.7), (0.3, 1.0)])
def test_rescaling_brings_each_row_s_deviation_back_towards_the_conditional_one(rescale, audio_rescale):
    predictions = random_predictions()
    plain = GuidancePlan.from_scales(GuidanceScales(), 3.0).combine(predictions)
    rescaled = GuidancePlan.from_scales(
        GuidanceScales(guidance_rescale=rescale, audio_guidance_rescale=audio_rescale), 3.0
    ).combine(predictions)
    for guided, conditional, factor, actual in zip(
        plain, predictions[CONDITIONAL], (rescale, audio_rescale), rescaled, strict=True
    ):
        ratio = conditional.flatten(1).std(dim=1) / guided.flatten(1).std(dim=1)
        torch.testing.assert_close(actual, guided * (1 + factor * (ratio - 1))[:, None, None])


# CFG-star ------------------------------------------------------------------------------------------------------------

TEXT_ONLY = {"stg_scale": 0.0, "modality_scale": 1.0}


def test_cfg_star_gives_the_recorded_delta_on_both_modalities():
    recording = Recording.load("cfg_star")
    scales = GuidanceScales(
        guidance_scale=float(recording.metadata["scale"]),
        audio_guidance_scale=float(recording.metadata["scale"]),
        cfg_star=True,
        **TEXT_ONLY,
    )
    conditional, negative = recording["cond"], recording["uncond"]
    predictions = {CONDITIONAL: (conditional, conditional), NEGATIVE: (negative, negative)}
    for guided in GuidancePlan.from_scales(scales).combine(predictions):
        torch.testing.assert_close(guided - conditional, recording["delta"], atol=1e-5, rtol=0)


def test_with_cfg_star_each_row_of_a_batch_equals_its_single():
    predictions = random_predictions()
    # Rows whose negative predictions need very different factors.
    stretch = torch.tensor([0.2, 5.0], dtype=torch.float64)[:, None, None]
    predictions[NEGATIVE] = tuple(tokens * stretch for tokens in predictions[NEGATIVE])
    plan = GuidancePlan.from_scales(GuidanceScales(cfg_star=True), 3.0)
    batch = plan.combine(predictions)
    for row in (slice(0, 1), slice(1, 2)):
        single = plan.combine({item: (video[row], audio[row]) for item, (video, audio) in predictions.items()})
        close([tokens[row] for tokens in batch], single)


def test_cfg_star_changes_the_negative_term_alone_and_does_not_feel_its_length():
    predictions = random_predictions()
    plain, star = (
        GuidancePlan.from_scales(GuidanceScales(cfg_star=cfg_star), 3.0).combine(predictions)
        for cfg_star in (False, True)
    )
    assert all((one - other).abs().max() > 0.1 for one, other in zip(plain, star))
    longer = predictions | {NEGATIVE: tuple(10 * tokens for tokens in predictions[NEGATIVE])}
    close(GuidancePlan.from_scales(GuidanceScales(cfg_star=True), 3.0).combine(longer), star)
    off = scales_of(1.0, 1.0, 1.0, 1.0, 3.0, 3.0)
    without_text = GuidancePlan.from_scales(off, 3.0).combine(predictions)
    close(GuidancePlan.from_scales(replace(off, cfg_star=True), 3.0).combine(predictions), without_text)


def test_cfg_star_takes_a_negative_prediction_of_zeros():
    predictions = random_predictions([CONDITIONAL])
    predictions[NEGATIVE] = tuple(torch.zeros_like(tokens) for tokens in predictions[CONDITIONAL])
    guided = GuidancePlan.from_scales(GuidanceScales(3.0, 7.0, cfg_star=True, **TEXT_ONLY)).combine(predictions)
    close(guided, [scale * tokens for scale, tokens in zip((3.0, 7.0), predictions[CONDITIONAL])])


@pytest.mark.parametrize("value", [1, 0.0, "yes", None])
def test_cfg_star_that_is_neither_true_nor_false_is_an_error_that_names_it(value):
    with pytest.raises(ValueError) as error:
        GuidanceScales(cfg_star=value)
    assert f"`cfg_star` is {value!r}" in str(error.value)


# The scales of a call ------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_released_recipe():
    assert GuidanceScales() == GuidanceScales(
        guidance_scale=3.0,
        audio_guidance_scale=7.0,
        stg_scale=1.0,
        audio_stg_scale=1.0,
        modality_scale=3.0,
        audio_modality_scale=3.0,
        guidance_rescale=0.0,
        audio_guidance_rescale=0.0,
        cfg_star=False,
    )
    assert set(GuidancePlan.from_scales(GuidanceScales(), 3.0).passes) == set(ALL_PASSES)


def test_guidance_scale_1_and_nothing_said_of_audio_is_no_text_guidance_on_either_modality():
    scales = GuidanceScales(guidance_scale=1.0)
    assert scales.audio_guidance_scale == 1.0
    assert not scales.uses_text_guidance
    assert NEGATIVE not in GuidancePlan.from_scales(scales, 3.0).passes


def test_identity_guidance_works_without_text_guidance():
    scales = GuidanceScales(guidance_scale=1.0, stg_scale=0.0, modality_scale=1.0)
    assert GuidancePlan.from_scales(scales, 3.0).passes == (CONDITIONAL, NO_REFERENCE)


@pytest.mark.parametrize(("video", "audio"), [(5.0, 7.0), (1.5, 7.0), (1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_audio_text_guidance_left_out_is_the_recipe_s_where_video_has_text_guidance(video, audio):
    assert GuidanceScales(guidance_scale=video).audio_guidance_scale == audio


@pytest.mark.parametrize("name", ["stg_scale", "modality_scale", "guidance_rescale"])
def test_an_audio_scale_left_out_is_the_video_s(name):
    assert getattr(GuidanceScales(**{name: 0.25}), f"audio_{name}") == 0.25


@pytest.mark.parametrize("name", [name for name in SCALE_NAMES if name.startswith("audio_")])
def test_an_audio_scale_of_0_means_0_whatever_the_video_s(name):
    video_name = name.removeprefix("audio_")
    scales = GuidanceScales(**{video_name: 2.0, name: 0.0})
    assert getattr(scales, name) == 0.0
    assert getattr(scales, video_name) == 2.0


@pytest.mark.parametrize(
    ("video", "audio", "used"), [(1.0, 1.0, False), (3.0, 1.0, True), (1.0, 7.0, True), (0.0, 1.0, True)]
)
def test_text_guidance_is_used_where_either_scale_is_not_1(video, audio, used):
    assert GuidanceScales(guidance_scale=video, audio_guidance_scale=audio).uses_text_guidance is used


@pytest.mark.parametrize(
    ("video", "audio", "used"), [(0.0, None, False), (0.0, 0.0, False), (1.0, 0.0, True), (0.0, 1.0, True)]
)
def test_stg_is_used_where_either_scale_is_not_0(video, audio, used):
    assert GuidanceScales(stg_scale=video, audio_stg_scale=audio).uses_stg is used


@pytest.mark.parametrize("name", SCALE_NAMES)
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "3", True])
def test_a_scale_that_is_negative_or_no_number_is_an_error_that_names_it(name, value):
    with pytest.raises(ValueError) as error:
        GuidanceScales(**{name: value})
    assert f"`{name}` is {value!r}" in str(error.value)


# Identity guidance over the steps ------------------------------------------------------------------------------------


def scale_of_each_step(guider, num_steps=10):
    """The scale, asked for after every step was told, as in the pipeline's loop."""
    scales = []
    for step, timestep in enumerate(torch.linspace(1000, 100, num_steps)):
        guider.set_state(step=step, num_inference_steps=num_steps, timestep=timestep)
        assert guider.num_conditions == (1 if guider.scale == 0.0 else 2)
        scales.append(guider.scale)
    return scales


def test_by_default_identity_guidance_is_the_recipe_s_at_every_step():
    guider = IdentityGuidance()
    assert guider.scale == 3.0
    assert scale_of_each_step(guider) == [3.0] * 10


@pytest.mark.parametrize(
    ("start", "stop", "active"),
    [
        (0.0, 1.0, range(0, 10)),
        (0.2, 0.5, range(2, 5)),
        (0.5, 1.0, range(5, 10)),
        (0.0, 0.1, range(0, 1)),
        (0.9, 1.0, range(9, 10)),
    ],
)
def test_outside_of_its_window_the_scale_is_0_and_the_extra_pass_is_not_needed(start, stop, active):
    guider = IdentityGuidance(scale=2.0, start=start, stop=stop)
    assert scale_of_each_step(guider) == [2.0 if step in active else 0.0 for step in range(10)]


@untimed
@given(st.floats(0.0, 0.999), st.floats(0.001, 1.0), st.integers(1, 60))
def test_any_window_is_one_run_of_steps_that_is_never_empty(start, stop, num_steps):
    if start >= stop:
        start, stop = 0.0, stop
    scales = scale_of_each_step(IdentityGuidance(start=start, stop=stop), num_steps)
    active = [step for step, scale in enumerate(scales) if scale != 0.0]
    assert active == list(range(active[0], active[-1] + 1))
    assert abs(active[0] - start * num_steps) < 1
    assert abs(active[-1] + 1 - stop * num_steps) <= 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4)]),
        (lambda progress: progress**2, [0.0, 0.0625, 0.25, 0.5625]),
    ],
    ids=["constant", "linear", "cosine", "function"],
)
def test_a_schedule_runs_over_its_window_from_progress_0(schedule, expected):
    guider = IdentityGuidance(scale=2.0, start=0.25, stop=0.75, schedule=schedule)
    expected = [0.0, 0.0, *(2.0 * factor for factor in expected), 0.0, 0.0]
    assert scale_of_each_step(guider, num_steps=8) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_schedule_falls_at_every_step_and_stays_above_0(schedule):
    scales = scale_of_each_step(IdentityGuidance(schedule=schedule), num_steps=30)
    assert scales[0] == 3.0
    assert all(first > second > 0 for first, second in itertools.pairwise(scales))


def test_a_guider_can_be_used_for_calls_with_different_numbers_of_steps():
    guider = IdentityGuidance(stop=0.5)
    assert scale_of_each_step(guider, 4) == [3.0, 3.0, 0.0, 0.0]
    assert scale_of_each_step(guider, 2) == [3.0, 0.0]


@pytest.mark.parametrize("guider", [IdentityGuidance(scale=0.0), IdentityGuidance(enabled=False)])
def test_a_guider_with_scale_0_or_not_enabled_never_needs_the_extra_pass(guider):
    assert scale_of_each_step(guider) == [0.0] * 10


def test_disable_switches_it_off_and_enable_on_again():
    guider = IdentityGuidance()
    guider.disable()
    assert scale_of_each_step(guider) == [0.0] * 10
    guider.enable()
    assert scale_of_each_step(guider) == [3.0] * 10


# Identity guidance as a diffusers guider -----------------------------------------------------------------------------

SETTINGS = {"scale": 2.5, "start": 0.1, "stop": 0.8, "schedule": "cosine", "enabled": True}


def settings_of(guider):
    return {name: guider.config[name] for name in SETTINGS}


def test_a_saved_guider_comes_back_the_same(tmp_path):
    guider = IdentityGuidance(**SETTINGS)
    guider.save_pretrained(tmp_path)
    loaded = IdentityGuidance.from_pretrained(tmp_path)
    assert settings_of(loaded) == SETTINGS
    assert scale_of_each_step(loaded) == scale_of_each_step(guider)


def test_what_is_saved_is_a_readable_configuration_file(tmp_path):
    IdentityGuidance(**SETTINGS).save_pretrained(tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == "guider_config.json"
    assert json.loads(file.read_text()).items() >= (SETTINGS | {"_class_name": "IdentityGuidance"}).items()


def test_what_is_pushed_to_the_hub_is_what_save_pretrained_saves(tmp_path, monkeypatch):
    uploaded = {}

    def keep(self, folder, repo_id, **kwargs):
        uploaded[repo_id] = {file.name: file.read_text() for file in Path(folder).iterdir()}

    monkeypatch.setattr(
        hub_utils, "create_repo", lambda repo_id, **kwargs: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    monkeypatch.setattr(IdentityGuidance, "_upload_folder", keep)
    guider = IdentityGuidance(**SETTINGS)
    guider.save_pretrained(tmp_path)
    # A subfolder gets no model card, which would need the network.
    guider.push_to_hub("somebody/guider", subfolder="guider")
    assert uploaded == {"somebody/guider": {"guider_config.json": (tmp_path / "guider_config.json").read_text()}}


def test_a_guider_whose_schedule_is_a_function_cannot_be_saved_and_leaves_no_file(tmp_path):
    guider = IdentityGuidance(schedule=lambda progress: 1.0)
    with pytest.raises(ValueError, match="`schedule` is the function .*constant, linear, cosine"):
        guider.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_new_copies_it_with_what_is_to_be_different():
    guider = IdentityGuidance(**SETTINGS)
    assert settings_of(guider.new()) == SETTINGS
    assert settings_of(guider.new(scale=1.0, schedule="linear")) == SETTINGS | {"scale": 1.0, "schedule": "linear"}
    assert settings_of(guider) == SETTINGS


def double(progress):
    return 2.0


def test_new_keeps_a_schedule_that_is_a_function():
    guider = IdentityGuidance(schedule=double).new(scale=1.0)
    assert guider.config.schedule is double
    assert scale_of_each_step(guider) == [2.0] * 10


def test_it_prepares_a_batch_for_each_prediction_and_combines_what_the_model_predicts():
    guider = IdentityGuidance(scale=2.0, stop=0.5)
    with_reference, without_reference, shared = torch.ones(1, 5), torch.zeros(1, 3), torch.full((1, 2), 7.0)
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(1000.0))
    batches = guider.prepare_inputs({"audio": (with_reference, without_reference), "text": shared})
    assert [batch.audio is tensor for batch, tensor in zip(batches, (with_reference, without_reference))] == [True] * 2
    assert all(batch.text is shared for batch in batches)

    is_conditional = []
    for batch, prediction in zip(batches, (3.0, 1.0), strict=True):
        guider.prepare_models(None)
        is_conditional.append(guider.is_conditional)
        batch.noise_pred = torch.full((1, 2), prediction)
    assert is_conditional == [True, False]

    output = guider(batches)
    assert torch.equal(output.pred, torch.full((1, 2), 3.0 + 2.0 * (3.0 - 1.0)))
    assert torch.equal(output.pred_cond, torch.full((1, 2), 3.0))
    assert torch.equal(output.pred_uncond, torch.full((1, 2), 1.0))


def test_outside_of_its_window_it_prepares_one_batch_and_gives_its_prediction_back():
    guider = IdentityGuidance(scale=2.0, stop=0.5)
    guider.set_state(step=1, num_inference_steps=2, timestep=torch.tensor(500.0))
    (batch,) = guider.prepare_inputs({"audio": (torch.ones(1, 5), torch.zeros(1, 3))})
    batch.noise_pred = torch.randn(1, 2)
    output = guider([batch])
    assert torch.equal(output.pred, batch.noise_pred)


def test_it_prepares_batches_from_the_block_state_of_a_modular_pipeline():
    guider = IdentityGuidance()
    state = BlockState(audio=torch.ones(1), target_only=torch.zeros(1))
    batches = guider.prepare_inputs_from_block_state(state, {"audio": ("audio", "target_only")})
    assert [batch.audio for batch in batches] == [state.audio, state.target_only]


def test_it_agrees_with_the_plan_s_identity_term():
    guider = IdentityGuidance(scale=2.0)
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(1000.0))
    predictions = random_predictions([CONDITIONAL, NO_REFERENCE])
    _, audio = GuidancePlan.from_scales(scales_of(1.0, 1.0, 0.0, 0.0, 1.0, 1.0), guider.scale).combine(predictions)
    output = guider.forward(predictions[CONDITIONAL][1], predictions[NO_REFERENCE][1])
    close([output.pred], [audio])


def test_constructing_one_does_not_warn_that_guiders_are_experimental(caplog):
    guider_logger.addHandler(caplog.handler)
    try:
        IdentityGuidance()
        IdentityGuidance().new()
        assert not caplog.records
        # What diffusers has to say otherwise is still said.
        guider_logger.warning("something else")
        assert {record.message for record in caplog.records} == {"something else"}
    finally:
        guider_logger.removeHandler(caplog.handler)


def test_a_failed_construction_leaves_diffusers_warnings_on():
    with pytest.raises(ValueError):
        IdentityGuidance(start=1.0, stop=1.0)
    assert not guider_logger.disabled


@pytest.mark.parametrize("name", ["scale", "start", "stop"])
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_a_number_that_cannot_be_is_an_error_that_names_it(name, value):
    with pytest.raises(ValueError) as error:
        IdentityGuidance(**{name: value})
    assert f"`{name}` is {value}" in str(error.value)


@pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (0.8, 0.2), (1.0, 1.0), (0.0, 0.0)])
def test_a_window_that_ends_where_it_begins_or_earlier_is_an_error(start, stop):
    with pytest.raises(ValueError) as error:
        IdentityGuidance(start=start, stop=stop)
    assert f"`start` ({start}) has to be smaller than `stop` ({stop})" in str(error.value)


@pytest.mark.parametrize("schedule", ["quadratic", "", None, 1.0])
def test_an_unknown_schedule_is_an_error_that_lists_the_schedules(schedule):
    with pytest.raises(ValueError) as error:
        IdentityGuidance(schedule=schedule)
    assert f"`schedule` is {schedule!r}; give one of constant, linear, cosine or a function" in str(error.value)


@pytest.mark.parametrize("factor", [math.nan, -1.0, "much"])
def test_a_schedule_that_gives_no_scale_is_refused_when_it_is_asked(factor):
    guider = IdentityGuidance(schedule=lambda progress: factor)
    guider.set_state(step=0, num_inference_steps=4, timestep=None)
    with pytest.raises((ValueError, TypeError)):
        _ = guider.scale


def test_a_guider_with_a_function_can_be_shown():
    assert "scale=2.0" in repr(IdentityGuidance(scale=2.0, schedule=lambda progress: 1.0))


def test_numbers_of_numpy_are_numbers():
    scales = GuidanceScales(guidance_scale=np.float32(3), stg_scale=np.int64(1))
    assert scales.guidance_scale == 3 and scales.audio_stg_scale == 1
