"""Two stages: one call, one transformer, adapters switched by weight; and the recorded second stage."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from conftest import families
from diffusers_idlora import RECIPES, LTX2IDLoRAPipeline, LTX2IDLoRATwoStagePipeline, TextContext
from diffusers_idlora.demo_assets import demo_face, demo_voice
from diffusers_idlora.tiny import save_tiny_adapter, tiny_components, tiny_latent_upsampler
from golden import Recording, denormalize_audio, denormalize_video, normalize_audio, normalize_video, pipeline_for


SMALL = {
    "prompt": "hello",
    "num_frames": 9,
    "num_inference_steps": 2,
    "max_sequence_length": 16,
    "output_type": "latent",
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """An ID-LoRA and a "distilled LoRA" of each generation."""
    folder = tmp_path_factory.mktemp("adapters")

    def files(family):
        transformer = tiny_components(family)["transformer"]
        return [
            save_tiny_adapter(folder / family / f"{name}.safetensors", transformer, seed=seed)
            for seed, name in enumerate(("id_lora", "distilled"))
        ]

    return files


def make_pipeline(adapters, family="ltx-2.3"):
    pipe = LTX2IDLoRATwoStagePipeline(**tiny_components(family), latent_upsampler=tiny_latent_upsampler())
    id_lora, distilled = adapters(family)
    pipe.load_lora_weights(distilled, adapter_name="distilled")
    pipe.load_lora_weights(id_lora, adapter_name="id_lora")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(adapters):
    return make_pipeline(adapters)


@pytest.fixture(scope="module")
def inputs():
    return {"image": demo_face(128), "reference_audio": demo_voice(2.5)}


def adapter_state(pipe, model="transformer"):
    return [
        (list(layer.active_adapters), dict(layer.scaling), [weight.requires_grad for weight in layer.parameters()])
        for layer in getattr(pipe, model).modules()
        if isinstance(layer, BaseTunerLayer)
    ]


def test_the_recorded_second_stage_comes_out_of_the_public_call():
    recording = Recording.load("stage2_ltx23")
    pipe = pipeline_for(recording)
    sigmas = recording["sigmas"].tolist()
    height, width, num_frames = (recording.setting(key) for key in ("height", "width", "num_frames"))
    noised = pipe._unpack_latents(recording["initial_video_tokens"], *pipe._latent_size(height, width, num_frames))
    audio_latents = denormalize_audio(pipe, recording["audio_latents"])
    output = pipe(
        text_context=TextContext(recording["prompt_video"], recording["prompt_audio"]),
        image_latents=denormalize_video(pipe, recording["image_latents"]),
        latents=denormalize_video(pipe, noised),
        audio_latents=audio_latents,
        freeze_audio=True,
        noise_scale=0.0,
        sigmas=sigmas,
        frame_rate=recording.setting("frame_rate"),
        guidance_scale=1.0,
        stg_scale=0.0,
        modality_scale=1.0,
        identity_guidance_scale=0.0,
        output_type="latent",
    )
    video = normalize_video(pipe, output.frames)
    torch.testing.assert_close(video, recording["video_latents"], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        normalize_audio(pipe, output.audio), recording["final_audio_latents"], atol=1e-5, rtol=0
    )


@families
def test_a_call_makes_twice_the_size_and_keeps_the_sound_of_stage_one(adapters, inputs, family):
    pipe = make_pipeline(adapters, family)
    output = pipe(**inputs, **SMALL, height=128, width=192, generator=seeded())
    assert output.frames.shape[-2:] == (128 // 32, 192 // 32)
    stage_1 = LTX2IDLoRAPipeline(**{k: v for k, v in pipe.components.items() if k != "latent_upsampler"})
    stage_1.set_progress_bar_config(disable=True)
    expected = stage_1(**inputs, **SMALL, height=64, width=96, generator=seeded())
    torch.testing.assert_close(output.audio, expected.audio, atol=1e-5, rtol=1e-5)


def test_stage_two_equals_the_stages_called_by_hand(pipe, inputs):
    output = pipe(**inputs, **SMALL, height=128, width=128, generator=seeded())
    single = LTX2IDLoRAPipeline(**{k: v for k, v in pipe.components.items() if k != "latent_upsampler"})
    single.set_progress_bar_config(disable=True)
    generator = seeded()
    single.set_adapters("id_lora", 1.0)
    first = single(**inputs, **SMALL, height=64, width=64, generator=generator)
    single.set_adapters("distilled", 0.8)
    second = single(
        **SMALL,
        image=inputs["image"],
        latents=pipe.upsample(first.frames),
        audio_latents=first.audio,
        freeze_audio=True,
        sigmas=[0.909375, 0.725, 0.421875],
        guidance_scale=1.0,
        stg_scale=0.0,
        modality_scale=1.0,
        generator=generator,
    )
    single.set_adapters("id_lora", 1.0)
    torch.testing.assert_close(output.frames, second.frames, atol=1e-4, rtol=1e-4)


def test_the_distilled_lora_acts_in_the_stages_that_have_a_weight_for_it(pipe, inputs):
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, _: seen.append(
            next(
                (tuple(layer.active_adapters), layer.scaling["distilled"])
                for layer in module.modules()
                if isinstance(layer, BaseTunerLayer)
            )
        )
    )
    try:
        pipe(**inputs, **SMALL | RECIPES["hq"] | {"num_inference_steps": 2}, height=128, width=128)
    finally:
        hook.remove()
    stages = [state for index, state in enumerate(seen) if index == 0 or state != seen[index - 1]]
    assert stages == [(("id_lora", "distilled"), 0.25), (("distilled",), 0.5)]


@pytest.mark.parametrize("fails", [False, True])
def test_adapters_are_as_they_were_after_a_call_and_after_an_error(pipe, inputs, fails):
    pipe.set_adapters(["id_lora"], [0.7])
    before = adapter_state(pipe)

    def callback(pipe, step, timestep, tensors):
        if fails and pipe.num_timesteps == 3:
            raise RuntimeError("stop")
        return tensors

    try:
        if fails:
            with pytest.raises(RuntimeError, match="stop"):
                pipe(**inputs, **SMALL, height=128, width=128, callback_on_step_end=callback)
        else:
            pipe(**inputs, **SMALL, height=128, width=128, callback_on_step_end=callback)
        assert adapter_state(pipe) == before
        assert pipe._text_contexts is None
    finally:
        pipe.set_adapters("id_lora", 1.0)


def test_without_a_distilled_adapter_stage_two_is_the_bare_model(pipe, inputs):
    bare = LTX2IDLoRATwoStagePipeline(**tiny_components("ltx-2.3"), latent_upsampler=tiny_latent_upsampler())
    bare.set_progress_bar_config(disable=True)
    arguments = {**inputs, **SMALL, "height": 128, "width": 128, "distilled_adapter": None}
    output = pipe(**arguments, generator=seeded())
    other = bare(**arguments, generator=seeded())
    assert not torch.allclose(output.audio, other.audio)
    active = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, _: active.append(pipe.get_active_adapters()))
    pipe(**arguments)
    hook.remove()
    assert active[0] == ["id_lora"] and active[-1] == []


def test_a_clip_goes_on_at_its_own_size(pipe, inputs):
    earlier = (torch.rand(17, 3, 128, 192), torch.zeros(1, 24000))
    arguments = {"reference_audio": inputs["reference_audio"], **SMALL | {"output_type": "pt"}}
    assert pipe(**arguments, continue_from=earlier).frames.shape[-2:] == (128, 192)


@pytest.fixture
def with_connectors(adapters, tmp_path):
    """A pipeline whose distilled LoRA has weights for the text connectors too."""
    pipe = LTX2IDLoRATwoStagePipeline(**tiny_components(), latent_upsampler=tiny_latent_upsampler())
    pipe.set_progress_bar_config(disable=True)
    id_lora, distilled = adapters("ltx-2.3")
    weights = {f"transformer.{k.removeprefix('diffusion_model.')}": v for k, v in load_file(distilled).items()}
    linear = pipe.connectors.video_text_proj_in
    for name, shape in (("A", (4, linear.in_features)), ("B", (linear.out_features, 4))):
        weights[f"connectors.video_text_proj_in.lora_{name}.weight"] = torch.ones(shape)
    pipe.load_lora_weights(weights, adapter_name="distilled")
    pipe.load_lora_weights(id_lora, adapter_name="id_lora")
    return pipe


def test_a_distilled_lora_with_weights_for_the_connectors_is_switched_off_there_too(with_connectors, inputs):
    pipe = with_connectors
    assert pipe.get_list_adapters()["connectors"] == ["distilled"]
    assert pipe.active_transformer_adapters() == ["id_lora"]
    before = adapter_state(pipe) + adapter_state(pipe, "connectors")
    switched = pipe(**inputs, **SMALL, height=128, width=128, generator=seeded())
    assert adapter_state(pipe) + adapter_state(pipe, "connectors") == before
    for layer in pipe.connectors.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter([])
    without = pipe(**inputs, **SMALL, height=128, width=128, generator=seeded())
    assert torch.equal(switched.audio, without.audio)


def test_from_pipe_takes_what_the_adapters_recommend_along(adapters):
    pipe = make_pipeline(adapters)
    metadata = {"recommended": {"identity_guidance_scale": 1.5}}
    pipe._adapters["id_lora"] = replace(pipe._adapters["id_lora"], metadata=metadata)
    assert pipe.recommended_identity_guidance_scale == 1.5
    assert LTX2IDLoRAPipeline.from_pipe(pipe).recommended_identity_guidance_scale == 1.5


def test_lead_in_is_trimmed_once_at_the_end(pipe, inputs):
    rate = pipe.vocoder.config.output_sampling_rate
    output = pipe(**inputs, **SMALL | {"output_type": "np"}, lead_in=0.3, height=128, width=128)
    assert output.frames.shape == (1, 9, 128, 128, 3)
    assert abs(output.audio.shape[-1] / rate - 9 / 25) < 0.05


def test_it_saves_and_loads_with_its_upsampler(adapters, tmp_path):
    pipe = LTX2IDLoRATwoStagePipeline(**tiny_components(), latent_upsampler=tiny_latent_upsampler(seed=3))
    pipe.save_pretrained(tmp_path)
    loaded = LTX2IDLoRATwoStagePipeline.from_pretrained(tmp_path)
    for name, weight in pipe.latent_upsampler.state_dict().items():
        assert torch.equal(weight, loaded.latent_upsampler.state_dict()[name])


def test_the_upsampler_of_a_checkpoint_folder_joins_its_components(tiny_checkpoint):
    folder = tiny_checkpoint()
    upsampler = LTX2LatentUpsamplerModel.from_pretrained(folder, subfolder="latent_upsampler")
    pipe = LTX2IDLoRATwoStagePipeline.from_pretrained(folder, latent_upsampler=upsampler)
    assert pipe.latent_upsampler is upsampler
    assert LTX2IDLoRATwoStagePipeline.from_pretrained(folder).latent_upsampler is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"height": 96, "width": 96}, "`height` is 96"),
        ({"distilled_adapter": "other"}, "`distilled_adapter` is 'other'"),
        ({"distilled_scales": 0.8}, "`distilled_scales` is 0.8"),
        ({"distilled_scales": (0.0, -1.0)}, "`distilled_scales` is -1.0"),
        ({"stage_2_sigmas": [0.1, 0.5]}, "`stage_2_sigmas`"),
        ({"image_latents": torch.zeros(1)}, "`image_latents`"),
        ({"output_type": "gif"}, "`output_type`"),
    ],
)
def test_what_the_stages_cannot_do_is_said_before_any_model_runs(pipe, arguments, words):
    ran = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(ValueError, match=words):
            pipe(**SMALL | arguments)
    finally:
        hook.remove()
    assert not ran


def test_an_id_lora_that_loading_another_adapter_switched_off_is_an_error(adapters):
    pipe = make_pipeline(adapters)
    pipe.set_adapters("distilled")
    with pytest.raises(ValueError, match="set_adapters"):
        pipe(**SMALL)


def test_without_an_upsampler_the_error_says_where_it_is():
    with pytest.raises(ValueError, match="`latent_upsampler` is missing"):
        LTX2IDLoRATwoStagePipeline(**tiny_components())(**SMALL)


def test_calls_of_two_threads_on_one_transformer_take_turns(pipe, inputs):
    arguments = {**inputs, **SMALL, "height": 128, "width": 128}
    alone = [pipe(**arguments, generator=seeded(seed)) for seed in range(2)]
    other = LTX2IDLoRATwoStagePipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(which, **arguments, generator=seeded(seed)) for seed, which in enumerate((pipe, other))]
    for expected, call in zip(alone, calls):
        assert torch.equal(call.result().frames, expected.frames)
