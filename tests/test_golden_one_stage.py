"""The whole one-stage sampler against the reference implementation, through the public pipeline."""

import json

import pytest
import torch

from diffusers_idlora import LTX2IDLoRAPipeline
from diffusers_idlora.guidance import CONDITIONAL, ISOLATED, NEGATIVE, NO_REFERENCE, PERTURBED
from diffusers_idlora.tiny import tiny_components
from golden import FOLDER, Recording, call_arguments, normalize_audio, normalize_video, pipeline_for


CASES = ("one_stage_ltx23", "one_stage_ltx23_identity_only", "one_stage_ltx2")
PASSES = {
    "cond": CONDITIONAL,
    "negative": NEGATIVE,
    "noref": NO_REFERENCE,
    "stg": PERTURBED,
    "isolated": ISOLATED,
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    recording = Recording.load(request.param)
    pipe = pipeline_for(recording)
    return recording, pipe, call_arguments(recording, pipe)


def difference(recording, pipe, output) -> float:
    video = normalize_video(pipe, output.frames) - recording["video_latents"]
    audio = normalize_audio(pipe, output.audio) - recording["audio_latents"]
    return max(video.abs().max().item(), audio.abs().max().item())


def test_every_pass_of_the_first_step_is_the_recorded_one(case):
    recording, pipe, arguments = case
    seen = {}

    def record(module, args, kwargs, output):
        # The hook is the only addition: inputs and outputs are those of the pipeline's own forwards.
        seen[len(seen)] = (kwargs, output)

    hook = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    try:
        pipe(**arguments, sigmas=recording["sigmas"].tolist())
    finally:
        hook.remove()
    names = recording.setting("passes")
    # The pipeline runs the passes in the order of its plan.
    order = [name for name in ("cond", "negative", "noref", "stg", "isolated") if name in names]
    assert len(seen) == len(names) * (len(recording["sigmas"]) - 1)
    for index, name in enumerate(order):
        kwargs, (video_velocity, audio_velocity) = seen[index]
        for tokens, velocity, timestep, key in (
            ("hidden_states", video_velocity, "timestep", "video_x0"),
            ("audio_hidden_states", audio_velocity, "audio_timestep", "audio_x0"),
        ):
            x0 = kwargs[tokens] - kwargs[timestep][..., None] / 1000 * velocity
            torch.testing.assert_close(x0, recording[f"step0.{name}.{key}"], atol=1e-5, rtol=0)


def test_positions_and_tokens_are_the_recorded_ones(case):
    recording, pipe, arguments = case
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        pipe(**arguments, sigmas=recording["sigmas"].tolist())
    finally:
        hook.remove()
    conditional = seen[0]
    torch.testing.assert_close(conditional["audio_coords"], recording["audio_positions"], atol=1e-6, rtol=0)
    torch.testing.assert_close(conditional["video_coords"], recording["video_positions"], atol=1e-6, rtol=0)
    num_references = recording["reference_tokens"].shape[1]
    torch.testing.assert_close(
        conditional["audio_hidden_states"][:, :num_references], recording["reference_tokens"], atol=1e-5, rtol=0
    )
    assert (conditional["audio_timestep"][:, :num_references] == 0).all()
    assert (conditional["timestep"][0, :4] == 0).all()


@pytest.mark.parametrize("guidance_batching", ["sequential", "packed", 2])
def test_the_loop_with_the_recorded_sigmas_gives_the_recorded_latents(case, guidance_batching):
    recording, pipe, arguments = case
    output = pipe(**arguments, sigmas=recording["sigmas"].tolist(), guidance_batching=guidance_batching)
    assert difference(recording, pipe, output) < 1e-4


def test_the_loop_with_the_pipelines_own_schedule_is_close_to_the_recorded_latents(case):
    recording, pipe, arguments = case
    output = pipe(**arguments, num_inference_steps=recording.setting("steps"))
    assert difference(recording, pipe, output) < 5e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"use_cross_timestep": "flipped"},
        {"stg_scale": 0.0},
        {"identity_guidance_scale": 0.0},
        {"reference_latents": None},
        {"mask_video_from_reference": True},
        {"mask_reference_from_text": True},
    ],
)
@pytest.mark.parametrize("name", ["one_stage_ltx23", "one_stage_ltx2"])
def test_each_part_of_the_method_is_visible_in_the_recorded_latents(name, wrong):
    recording = Recording.load(name)
    pipe = pipeline_for(recording)
    if "use_cross_timestep" in wrong:
        wrong = {"use_cross_timestep": not pipe.transformer.config.cross_attn_mod}
    output = pipe(**{**call_arguments(recording, pipe), **wrong}, sigmas=recording["sigmas"].tolist())
    assert difference(recording, pipe, output) > 1e-2


def test_sigma_schedules_are_the_recorded_ones():
    recorded = json.loads((FOLDER / "sigma_schedules.json").read_text())["schedules"]
    pipe = LTX2IDLoRAPipeline(**tiny_components("ltx-2.3"))
    for key, sigmas in recorded.items():
        steps, _, num_tokens = key.partition("@")
        scheduler = (
            pipe.prepare_scheduler(int(steps), num_tokens=int(num_tokens))
            if num_tokens
            else pipe.prepare_scheduler(int(steps))
        )
        # In float32 the terms of the stretch cancel more the larger the shift.
        atol = 1e-5 if num_tokens else 1e-6
        torch.testing.assert_close(scheduler.sigmas, torch.tensor(sigmas), atol=atol, rtol=0)


def test_given_sigmas_are_used_as_they_are():
    pipe = LTX2IDLoRAPipeline(**tiny_components("ltx-2.3"))
    scheduler = pipe.prepare_scheduler(30, [0.909375, 0.725, 0.421875])
    assert torch.equal(scheduler.sigmas, torch.tensor([0.909375, 0.725, 0.421875, 0.0]))
    assert pipe.scheduler.config.use_dynamic_shifting
