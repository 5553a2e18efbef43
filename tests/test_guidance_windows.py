"""Windows of the guidance terms: at which steps each acts, and that no pass is run at the others."""

import itertools
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_idlora.guidance import (
    CONDITIONAL,
    GUIDANCE_TERMS,
    ISOLATED,
    NEGATIVE,
    PERTURBED,
    GuidancePlan,
    GuidanceScales,
    GuidanceWindow,
    IdentityGuidance,
    check_windows,
)


# A busy machine is no reason to fail.
untimed = settings(deadline=None)

PASS_OF_TERM = {"text": NEGATIVE, "stg": PERTURBED, "modality": ISOLATED}


def steps_of(window, num_steps=10):
    return [step for step in range(num_steps) if window.includes(step, num_steps)]


# Which steps


@pytest.mark.parametrize(
    ("window", "steps"),
    [
        (GuidanceWindow(), range(10)),
        (GuidanceWindow(start=0.2, stop=0.5), [2, 3, 4]),
        (GuidanceWindow(stop=0.05), [0]),
        (GuidanceWindow(start=0.95), [9]),
        (GuidanceWindow(skip=((0.2, 0.5),)), [0, 1, 5, 6, 7, 8, 9]),
        (GuidanceWindow(skip=((0.0, 0.1), (0.9, 1.0))), range(1, 9)),
        (GuidanceWindow(start=0.5, skip=((0.0, 0.7),)), [7, 8, 9]),
        (GuidanceWindow(every=3), [0, 3, 6, 9]),
        (GuidanceWindow(start=0.1, stop=0.8, every=2), [1, 3, 5, 7]),
        (GuidanceWindow(start=0.1, every=2, skip=((0.3, 0.6),)), [1, 7, 9]),
        (GuidanceWindow(skip=((0.0, 1.0),)), []),
    ],
)
def test_a_window_includes_its_steps_but_not_those_it_skips(window, steps):
    assert steps_of(window) == list(steps)


@pytest.mark.parametrize("skip", [0.3, 0.31, 0.39])
def test_a_skipped_interval_that_is_shorter_than_a_step_skips_that_step(skip):
    assert steps_of(GuidanceWindow(skip=((skip, skip + 0.001),))) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


@untimed
@given(st.floats(0.0, 0.999), st.floats(0.001, 1.0), st.integers(1, 60))
def test_a_window_counts_steps_as_identity_guidance_does(start, stop, num_steps):
    if start >= stop:
        start = 0.0
    guider, active = IdentityGuidance(start=start, stop=stop), []
    for step in range(num_steps):
        guider.set_state(step=step, num_inference_steps=num_steps, timestep=None)
        if guider.scale:
            active.append(step)
    assert steps_of(GuidanceWindow(start, stop), num_steps) == active


@untimed
@given(st.floats(0.0, 0.9), st.integers(1, 60), st.integers(1, 9))
def test_the_first_step_of_a_window_always_acts(start, num_steps, every):
    steps = steps_of(GuidanceWindow(start, 1.0, every=every), num_steps)
    assert steps[0] == int(start * num_steps)
    assert all(second - first == every for first, second in itertools.pairwise(steps))


def test_a_window_is_a_value():
    window = GuidanceWindow(0.1, 0.9, [[0.4, 0.5]], 2)
    assert window == GuidanceWindow(0.1, 0.9, ((0.4, 0.5),), 2) and len({window, GuidanceWindow()}) == 2
    with pytest.raises(FrozenInstanceError):
        window.start = 0.5


# What the windows do to a step's scales


@pytest.mark.parametrize("term", PASS_OF_TERM)
def test_outside_of_its_window_a_term_is_off_and_its_pass_is_not_run(term):
    windows = {term: GuidanceWindow(start=0.5)}
    scales = GuidanceScales(3.0, 7.0, 1.0, 2.0, 3.0, 4.0, 0.7, 0.5, cfg_star=True)
    before, within = (scales.within(windows, step, 2) for step in (0, 1))
    assert within == scales
    passes = {step: GuidancePlan.from_scales(found).passes for step, found in enumerate((before, within))}
    assert set(passes[1]) - set(passes[0]) == {PASS_OF_TERM[term]}
    assert (before.guidance_rescale, before.audio_guidance_rescale, before.cfg_star) == (0.7, 0.5, True)


def test_outside_of_all_windows_only_the_conditional_pass_is_left():
    windows = check_windows(dict.fromkeys(GUIDANCE_TERMS, (0.0, 0.5)))
    scales = GuidanceScales().within(windows, step=1, num_inference_steps=2)
    plan = GuidancePlan.from_scales(scales)
    predictions = {CONDITIONAL: (torch.ones(1, 2, 3), torch.ones(1, 4, 3))}
    assert plan.passes == (CONDITIONAL,)
    assert plan.combine(predictions) == predictions[CONDITIONAL]


def test_terms_without_a_window_and_that_of_identity_leave_the_scales_alone():
    scales = GuidanceScales()
    assert scales.within({}, 0, 2) == scales
    assert scales.within({"identity": GuidanceWindow(start=0.5)}, 0, 2) == scales


def test_each_term_follows_its_own_window():
    windows = check_windows({"text": (0.0, 0.5), "stg": GuidanceWindow(every=2), "modality": (0.25, 0.75)})
    steps = [GuidancePlan.from_scales(GuidanceScales().within(windows, step, 4)).passes[1:] for step in range(4)]
    assert steps == [(NEGATIVE, PERTURBED), (NEGATIVE, ISOLATED), (PERTURBED, ISOLATED), ()]


# The windows of a call


def test_a_pair_is_a_start_and_a_stop():
    given_windows = {"text": (0.1, 0.8), "identity": [0.0, 0.5], "stg": GuidanceWindow(every=2)}
    assert check_windows(given_windows) == {
        "text": GuidanceWindow(0.1, 0.8),
        "identity": GuidanceWindow(0.0, 0.5),
        "stg": GuidanceWindow(every=2),
    }
    assert check_windows(None) == check_windows({}) == {}


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (0.5, "`guidance_windows` is 0.5; give a dictionary from text, identity, stg, modality"),
        ([("text", (0, 1))], "`guidance_windows` is [('text', (0, 1))]; give a dictionary"),
        ({"cfg": (0, 1)}, "`guidance_windows` has 'cfg'; its terms are text, identity, stg, modality"),
        ({"text": 0.5}, "`guidance_windows['text']` is 0.5; give a `GuidanceWindow` or a pair"),
        ({"text": (0.1, 0.2, 0.3)}, "`guidance_windows['text']` is (0.1, 0.2, 0.3); give a `GuidanceWindow`"),
        ({"stg": (0.5, 1.5)}, "`guidance_windows['stg']` is (0.5, 1.5), where `stop` is 1.5; give a fraction"),
        ({"stg": (0.8, 0.2)}, "`guidance_windows['stg']` is (0.8, 0.2), where `start` (0.8) has to be smaller"),
        ({"stg": ("a", "b")}, "`guidance_windows['stg']` is ('a', 'b'), where `start` is 'a'; give a fraction"),
    ],
)
def test_windows_that_can_not_be_are_an_error_that_names_the_term(windows, message):
    with pytest.raises(ValueError) as error:
        check_windows(windows)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": -0.1}, "`start` is -0.1"),
        ({"stop": 2}, "`stop` is 2"),
        ({"stop": True}, "`stop` is True"),
        ({"start": float("nan")}, "`start` is nan"),
        ({"start": 0.5, "stop": 0.5}, "`start` (0.5) has to be smaller than `stop` (0.5)"),
        ({"every": 0}, "`every` is 0"),
        ({"every": 1.5}, "`every` is 1.5"),
        ({"every": True}, "`every` is True"),
        ({"skip": 0.5}, "`skip` is 0.5"),
        ({"skip": (0.4, 0.5)}, "`skip` is (0.4, 0.5); give pairs"),
        ({"skip": ((0.1, 0.2), (0.5, 0.4))}, "`skip[1][0]` (0.5) has to be smaller than `skip[1][1]` (0.4)"),
        ({"skip": ((0.4, 1.5),)}, "`skip[0][1]` is 1.5"),
    ],
)
def test_a_window_that_can_not_be_is_an_error_that_says_what(arguments, message):
    with pytest.raises(ValueError) as error:
        GuidanceWindow(**arguments)
    assert message in str(error.value)
