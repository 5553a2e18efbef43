"""The res_2s scheduler: against the reference implementation, as a solver, and as diffusers' users know schedulers."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_idlora import LTX2IDLoRAPipeline
from diffusers_idlora.schedulers import LTX2Res2sScheduler
from diffusers_idlora.tiny import tiny_components
from golden import FOLDER, Recording


SIGMAS = [1.0, 0.9, 0.75, 0.5, 0.1]
LTX_CONFIG = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}


def scheduler_at(sigmas=SIGMAS, **config):
    scheduler = LTX2Res2sScheduler(**config)
    scheduler.set_timesteps(sigmas=sigmas)
    return scheduler


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bend(sample, sigma):
    """A denoiser without meaning, but not linear."""
    return torch.tanh((1 - sigma) * sample.roll(1, -1))


def denoise(scheduler, sample, denoiser=bend, put_back=None, noises=None, **kwargs):
    """The pipeline's loop. The same for Euler and for res_2s."""
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        x0 = denoiser(sample, sigma)
        if put_back is not None:
            x0 = put_back(x0)
        if noises is not None and i + 1 < len(scheduler.timesteps):
            kwargs["noise"] = noises[i]
        sample = scheduler.step((sample - x0) / sigma, t, sample, return_dict=False, **kwargs)[0]
        if put_back is not None:
            sample = put_back(sample)
    return sample


# Against the reference implementation


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_a_loop_with_the_recorded_noises_gives_the_recorded_sample(modality):
    recording = Recording.load("res2s_sampler")
    scheduler = scheduler_at(recording["sigmas"].tolist())
    torch.testing.assert_close(scheduler.sigmas[:-1], recording["model_call_sigmas"], atol=1e-6, rtol=0)
    noisy, clean, matrix = (recording[f"{modality}_{name}"] for name in ("mask", "clean", "matrix"))
    # Per step: substep and step, video and audio of each.
    noises = [recording[f"noise.{2 * i + (modality == 'audio'):03d}"] for i in range(10)]
    final = denoise(
        scheduler,
        recording[f"{modality}_initial"],
        lambda sample, sigma: torch.tanh((1 - sigma) * sample @ matrix),
        lambda tokens: tokens * noisy + clean * (1 - noisy),
        noises,
    )
    torch.testing.assert_close(final, recording[f"{modality}_final"], atol=1e-5, rtol=0)
    assert (noisy == 0).any() and (noisy == 1).any()


@pytest.mark.parametrize("changed", [{"bong_iterations": 0}, {"bong_max_step_size": 0.0}, {"bong_min_sigma": 1.0}])
def test_the_refinement_of_the_anchor_is_part_of_the_recorded_sample(changed):
    recording = Recording.load("res2s_sampler")
    sample, noises = recording["video_initial"], [recording[f"noise.{2 * i:03d}"] for i in range(10)]
    with_it, without = (
        denoise(scheduler_at(recording["sigmas"].tolist(), **config), sample, noises=noises)
        for config in ({}, changed)
    )
    assert (with_it - without).abs().max() > 1e-2


@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_anchor_after_some_refinements_is_that_of_the_written_out_iteration(count):
    scheduler = scheduler_at([0.9, 0.8], bong_iterations=count)
    anchor, first_x0, substep = (randn(2, 3, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    expected = anchor
    for _ in range(count):
        expected = substep - 0.2 * (first_x0 - expected)
    torch.testing.assert_close(scheduler._refine(anchor, first_x0, substep, 0.2), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("steps", "tokens"), [(8, 1024), (15, 4096), (30, 4096), (15, 15810)])
def test_every_other_noise_level_is_that_of_the_recorded_schedule(steps, tokens):
    schedules = json.loads((FOLDER / "sigma_schedules.json").read_text())["schedules"]
    scheduler = LTX2Res2sScheduler(**LTX_CONFIG)
    mu = (2.05 - 0.95) / (4096 - 1024) * (tokens - 1024) + 0.95
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    expected = [*schedules[f"{steps}@{tokens}"][:-1], scheduler.config.final_sigma]
    assert scheduler.sigmas[:-1:2].tolist() == pytest.approx(expected, abs=5e-6)


# Noise levels


def test_each_step_is_two_evaluations_and_a_plain_one_follows():
    scheduler = scheduler_at([0.8, 0.2])
    expected = [0.8, math.sqrt(0.8 * 0.2), 0.2, math.sqrt(0.2 * 0.0011), 0.0011, 0.0]
    assert scheduler.sigmas.tolist() == pytest.approx(expected)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in expected[:-1]])
    assert scheduler.num_inference_steps == 2 and scheduler.order == 2


@pytest.mark.parametrize("sigmas", [[1.0], [0.9, 0.4], np.array([0.9, 0.4]), torch.tensor([0.9, 0.4])])
def test_noise_levels_are_used_as_given_and_a_last_0_may_be_left_out(sigmas):
    given = [float(sigma) for sigma in sigmas]
    scheduler, with_zero = (LTX2Res2sScheduler(**LTX_CONFIG) for _ in range(2))
    scheduler.set_timesteps(sigmas=sigmas)
    with_zero.set_timesteps(sigmas=[*given, 0.0])
    assert scheduler.sigmas[:-2:2].tolist() == pytest.approx(given)
    assert torch.equal(scheduler.sigmas, with_zero.sigmas)


def test_a_last_noise_level_that_is_small_already_is_not_followed_by_a_larger_one():
    assert scheduler_at([0.5, 0.001]).sigmas.tolist() == pytest.approx([0.5, math.sqrt(0.0005), 0.001, 0.0])
    assert scheduler_at([0.0011]).sigmas.tolist() == pytest.approx([0.0011, 0.0])


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({"shift": 3.0}, {"num_inference_steps": 7}),
        (LTX_CONFIG, {"num_inference_steps": 7, "mu": 1.5}),
        (LTX_CONFIG, {"sigmas": [1.0, 0.6, 0.2], "mu": 2.05}),
        ({**LTX_CONFIG, "time_shift_type": "linear", "use_karras_sigmas": True}, {"num_inference_steps": 4, "mu": 2}),
    ],
)
def test_computed_noise_levels_are_those_of_euler(config, arguments):
    euler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler = LTX2Res2sScheduler.from_config(euler.config)
    euler.set_timesteps(**arguments)
    scheduler.set_timesteps(**arguments)
    torch.testing.assert_close(scheduler.sigmas[:-2:2], euler.sigmas[: len(scheduler.sigmas[:-2:2])])
    assert scheduler.num_inference_steps == len(euler.timesteps)


# As a solver


def gaussian(sample, sigma, mean=0.7, deviation=0.5):
    """The exact x0 for data that are normally distributed."""
    gain = (1 - sigma) * deviation**2 / ((1 - sigma) ** 2 * deviation**2 + sigma**2)
    return mean + gain * (sample - (1 - sigma) * mean)


def gaussian_solution(sample, sigma, target, mean=0.7, deviation=0.5):
    """Where the flow of `gaussian` takes a sample."""
    spreads = [math.hypot((1 - level) * deviation, level) for level in (sigma, target)]
    return (1 - target) * mean + (sample - (1 - sigma) * mean) / spreads[0] * spreads[1]


def error_of(scheduler_class, steps, evaluations_per_step, **config):
    sigmas = np.geomspace(0.99, 0.05, steps + 1)
    scheduler = scheduler_class(**config)
    scheduler.set_timesteps(sigmas=sigmas)
    sample = initial = randn(1, 6, 4, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps[: steps * evaluations_per_step]):
        velocity = (sample - gaussian(sample, scheduler.sigmas[i].item())) / scheduler.sigmas[i].item()
        sample = scheduler.step(velocity, t, sample, return_dict=False)[0].double()
    return (sample - gaussian_solution(initial, 0.99, 0.05)).abs().max().item()


@pytest.mark.parametrize("config", [{}, {"bong_iterations": 0}])
def test_without_noise_its_error_falls_with_the_square_of_the_step_size(config):
    errors = [error_of(LTX2Res2sScheduler, steps, 2, eta=0.0, **config) for steps in (8, 16, 32, 64)]
    orders = [math.log2(first / second) for first, second in zip(errors, errors[1:])]
    assert all(1.8 < order < 2.3 for order in orders[1:]), orders
    # Many fine Euler steps end at the same place, and are still less exact.
    assert errors[-1] < error_of(FlowMatchEulerDiscreteScheduler, 1000, 1) < 1e-2


def test_with_noise_samples_keep_the_distribution_that_the_denoiser_is_of():
    scheduler = scheduler_at(np.linspace(1.0, 0.05, 20))
    samples = denoise(scheduler, randn(1, 4000, 4), gaussian, generator=torch.Generator().manual_seed(1))
    assert samples.mean().item() == pytest.approx(0.7, abs=0.03)
    assert samples.std().item() == pytest.approx(0.5, abs=0.05)


# Batches, generators, clean tokens


@pytest.mark.parametrize("shape", [(5, 8), (3, 4, 6, 5)])
def test_each_row_of_a_batch_with_its_own_generator_equals_its_single_run(shape):
    initial = randn(3, *shape)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    batch = denoise(scheduler_at(), initial, generator=generators)
    for index in range(3):
        single = denoise(scheduler_at(), initial[index : index + 1], generator=torch.Generator().manual_seed(index))
        torch.testing.assert_close(batch[index : index + 1], single, atol=1e-6, rtol=0)


def test_the_generator_decides_the_sample():
    def run(seed, **config):
        generator = torch.Generator().manual_seed(seed)
        return denoise(scheduler_at(**config), randn(1, 6, 4), generator=generator)

    assert torch.equal(run(0), run(0))
    assert (run(0) - run(1)).abs().max() > 1e-2


def test_without_eta_nothing_is_drawn():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    outputs = [denoise(scheduler_at(eta=0.0), randn(1, 6, 4), generator=generator) for _ in range(2)]
    assert torch.equal(*outputs) and torch.equal(generator.get_state(), before)


def test_drawn_noise_has_mean_0_and_deviation_1_in_each_row():
    scheduler, sample = scheduler_at([0.8, 0.4]), torch.zeros(2, 5, 7, dtype=torch.float64)
    # At zero velocity nothing but the noise moves the sample.
    moved = scheduler.step(sample, scheduler.timesteps[0], sample, torch.Generator().manual_seed(0)).prev_sample
    expected = 0.5 * math.sqrt(0.8 * 0.4)
    torch.testing.assert_close(moved.mean((1, 2)), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(moved.std((1, 2)), torch.full((2,), expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_tokens_put_back_after_every_evaluation_do_not_disturb_the_others():
    clean, initial = randn(1, 6, 4, seed=1), randn(1, 6, 4)
    mask = torch.tensor([1.0, 1.0, 0, 0, 0, 0]).view(1, 6, 1)

    def put_back(tokens):
        return tokens * (1 - mask) + clean * mask

    noises = [randn(1, 6, 4, seed=10 + i, dtype=torch.float64) for i in range(10)]
    with_clean = denoise(scheduler_at(), put_back(initial), bend, put_back, noises)
    alone = denoise(scheduler_at(), initial[:, 2:], bend, None, [noise[:, 2:] for noise in noises])
    assert torch.equal(with_clean[:, :2], clean[:, :2])
    torch.testing.assert_close(with_clean[:, 2:], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_sample_keeps_its_dtype(dtype):
    scheduler, sample = scheduler_at([0.8, 0.4]), randn(1, 6, 4).to(dtype)
    for t in scheduler.timesteps:
        sample = scheduler.step(torch.zeros_like(sample), t, sample).prev_sample
        assert sample.dtype == dtype and sample.isfinite().all()


# State, configuration, files


def test_a_copy_made_within_a_step_goes_on_by_itself():
    scheduler = scheduler_at()
    noises = [randn(1, 6, 4, seed=10 + i, dtype=torch.float64) for i in range(10)]

    def rest(scheduler, sample, first):
        for i, t in list(enumerate(scheduler.timesteps))[first:]:
            velocity = (sample - bend(sample, scheduler.sigmas[i])) / scheduler.sigmas[i]
            noise = noises[i] if i < 10 else None
            sample = scheduler.step(velocity, t, sample, noise=noise, return_dict=False)[0]
            yield sample

    steps = rest(scheduler, randn(1, 6, 4), 0)
    for _ in range(3):
        sample = next(steps)
    copied = copy.deepcopy(scheduler)
    assert not copied.state_in_first_order
    *_, expected = steps
    *_, actual = rest(copied, sample, 3)
    assert torch.equal(actual, expected)


def test_set_timesteps_forgets_a_step_that_was_broken_off():
    expected = denoise(scheduler_at(), randn(1, 6, 4), generator=torch.Generator().manual_seed(0))
    scheduler = scheduler_at()
    scheduler.step(randn(1, 6, 4), scheduler.timesteps[0], randn(1, 6, 4))
    scheduler.set_timesteps(sigmas=SIGMAS)
    assert scheduler.state_in_first_order
    assert torch.equal(denoise(scheduler, randn(1, 6, 4), generator=torch.Generator().manual_seed(0)), expected)


def test_a_loop_may_begin_at_a_later_step():
    scheduler = scheduler_at()
    scheduler.set_begin_index(4)
    sample = scheduler.step(torch.zeros(1, 6, 4), scheduler.timesteps[4], randn(1, 6, 4)).prev_sample
    assert sample.isfinite().all() and scheduler.step_index == 5


def test_a_saved_scheduler_comes_back_the_same(tmp_path):
    scheduler = LTX2Res2sScheduler(**LTX_CONFIG, eta=0.25, bong_iterations=7, final_sigma=0.002)
    scheduler.save_pretrained(tmp_path)
    loaded = LTX2Res2sScheduler.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(scheduler.config)
    assert loaded.config.eta == 0.25 and loaded.config.shift_terminal == 0.1


def test_it_takes_euler_s_configuration_and_gives_it_back():
    euler = FlowMatchEulerDiscreteScheduler(**LTX_CONFIG, stochastic_sampling=True)
    scheduler = LTX2Res2sScheduler.from_config(euler.config, eta=0.3)
    assert {name: scheduler.config[name] for name in LTX_CONFIG} == LTX_CONFIG
    assert (scheduler.config.eta, scheduler.config.bong_iterations) == (0.3, 100)
    back = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    assert {name: back.config[name] for name in LTX_CONFIG} == LTX_CONFIG
    assert back.config.stochastic_sampling


def test_a_pipeline_is_saved_and_loaded_with_it(tmp_path):
    scheduler = LTX2Res2sScheduler(**LTX_CONFIG, eta=0.25)
    LTX2IDLoRAPipeline(**{**tiny_components("ltx-2.3"), "scheduler": scheduler}).save_pretrained(tmp_path)
    loaded = LTX2IDLoRAPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, LTX2Res2sScheduler) and loaded.scheduler.config.eta == 0.25


# Bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eta": -0.1}, "`eta` is -0.1"),
        ({"eta": 1.5}, "`eta` is 1.5"),
        ({"eta": math.nan}, "`eta` is nan"),
        ({"bong_iterations": -1}, "`bong_iterations` is -1"),
        ({"bong_iterations": 1.5}, "`bong_iterations` is 1.5"),
        ({"final_sigma": 0.0}, "`final_sigma` is 0.0"),
        ({"invert_sigmas": True}, "`invert_sigmas` is True"),
    ],
)
def test_a_configuration_that_can_not_be_is_an_error_that_names_it(config, message):
    with pytest.raises(ValueError) as error:
        LTX2Res2sScheduler(**config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`num_inference_steps` is None"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` is 2.5"),
        ({"num_inference_steps": 1, "mu": 1.0}, "`num_inference_steps` is 1"),
        ({"num_inference_steps": 4}, "`mu` must be passed"),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "`num_inference_steps` is 3, but `sigmas` are 2"),
        ({"sigmas": []}, "`sigmas` are []"),
        ({"sigmas": [0.0]}, "`sigmas` are []"),
        ({"sigmas": [0.5, 0.5]}, "`sigmas` are [0.5, 0.5]"),
        ({"sigmas": [0.5, 0.8]}, "`sigmas` are [0.5, 0.8]"),
        ({"sigmas": [1.5, 0.8]}, "`sigmas` are [1.5, 0.8]"),
        ({"sigmas": [1.0, math.nan]}, "`sigmas` are [1.0, nan]"),
        ({"sigmas": "many"}, "`sigmas` are 'many'"),
        ({"sigmas": 0.5}, "`sigmas` are 0.5"),
    ],
)
def test_noise_levels_that_can_not_be_are_an_error_that_shows_them(arguments, message):
    with pytest.raises(ValueError) as error:
        LTX2Res2sScheduler(**LTX_CONFIG).set_timesteps(**arguments)
    assert message in str(error.value)


def test_a_step_that_can_not_be_taken_is_an_error_that_says_why():
    sample = randn(1, 6, 4)
    with pytest.raises(ValueError, match="call `set_timesteps` first"):
        LTX2Res2sScheduler().step(sample, 1000.0, sample)
    scheduler = scheduler_at([0.8, 0.4])
    with pytest.raises(ValueError, match="`timestep` is 3; give one of"):
        scheduler.step(sample, 3, sample)
    with pytest.raises(ValueError, match="substep; begin with"):
        scheduler.step(sample, scheduler.timesteps[1], sample)
    scheduler.set_timesteps(sigmas=[0.8, 0.4])
    with pytest.raises(ValueError, match=r"`sample` has the shape \(6, 4\)"):
        scheduler.step(sample[0], scheduler.timesteps[0], sample[0])
    final = denoise(scheduler_at([0.8]), sample)
    assert final.isfinite().all()
    denoise(finished := scheduler_at([0.8]), sample)
    with pytest.raises(ValueError, match="after the last of `timesteps`"):
        finished.step(sample, finished.timesteps[-1], sample)
