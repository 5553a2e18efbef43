"""The pipeline as diffusers' users know pipelines, and a real batch of different people."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import LTX2ConditionPipeline, LTX2Pipeline, TaylorSeerCacheConfig
from diffusers.pipelines.ltx2.duration_head import LTX2DurationHead
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

from conftest import families
from diffusers_idlora import IdentityGuidance, IDLoRAPrompt, LTX2IDLoRAPipeline
from diffusers_idlora.demo_assets import demo_face, demo_voice
from diffusers_idlora.guidance import GuidanceScales
from diffusers_idlora.tiny import tiny_components


SMALL = {
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "num_inference_steps": 2,
    "max_sequence_length": 16,
    "output_type": "latent",
}


def make_pipeline(family="ltx-2.3", **replaced):
    pipe = LTX2IDLoRAPipeline(**{**tiny_components(family), **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes():
    return {family: make_pipeline(family) for family in ("ltx-2", "ltx-2.3")}


@pytest.fixture(scope="module")
def pipe(pipes):
    return pipes["ltx-2.3"]


@pytest.fixture(scope="module")
def face():
    return demo_face(64)


@pytest.fixture(scope="module")
def voice():
    return demo_voice(2.5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def other_voice(seconds, seed=1):
    """A recording with another spectrum: noise."""
    return 0.1 * torch.randn(1, round(seconds * 16000), generator=seeded(seed)), 16000


def assert_same(output, expected, atol=1e-5, row=slice(None)):
    # Latents of the tiny models reach 10, hence the relative part.
    torch.testing.assert_close(output.frames[row], expected.frames, atol=atol, rtol=1e-5)
    torch.testing.assert_close(output.audio[row], expected.audio, atol=atol, rtol=1e-5)


def passes_of(pipe, **kwargs):
    """The `cache_context` names of all forwards of a call, in order."""
    names = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: names.append(pipe.transformer._cache_name))
    original = pipe.transformer.cache_context

    def named(name):
        pipe.transformer._cache_name = name
        return original(name)

    pipe.transformer.cache_context = named
    try:
        pipe(**{"prompt": "a", **SMALL, **kwargs})
    finally:
        del pipe.transformer.cache_context, pipe.transformer._cache_name
        hook.remove()
    return names


# Loading and saving


@families
@pytest.mark.parametrize("saved_by", [LTX2Pipeline, LTX2ConditionPipeline, LTX2IDLoRAPipeline])
def test_loads_what_diffusers_pipelines_and_it_itself_saved(pipes, family, saved_by, tmp_path, face, voice):
    components = pipes[family].components
    if saved_by is LTX2Pipeline:
        components = {name: components[name] for name in LTX2Pipeline._get_signature_keys(LTX2Pipeline)[0]}
    saved_by(**components).save_pretrained(tmp_path)
    loaded = LTX2IDLoRAPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a", "image": face, "reference_audio": voice, **SMALL}
    assert_same(loaded(**arguments, generator=seeded()), pipes[family](**arguments, generator=seeded()))


def test_a_dtype_per_component_is_kept(tiny_checkpoint, face, voice):
    pipe = LTX2IDLoRAPipeline.from_pretrained(
        tiny_checkpoint("ltx-2.3"), dtype={"default": torch.bfloat16, "vocoder": torch.float32}
    )
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.vocoder.dtype == torch.float32
    output = pipe(prompt="a", image=face, reference_audio=voice, **{**SMALL, "output_type": "pt"})
    assert output.frames.isfinite().all() and output.audio.isfinite().all()


def test_bfloat16_stays_near_float32(face, voice):
    arguments = {"prompt": "a", "image": face, "reference_audio": voice, **SMALL, "guidance_scale": 1, "stg_scale": 0}
    arguments |= {"modality_scale": 1, "identity_guidance_scale": 0}
    expected = make_pipeline()(**arguments, generator=seeded())
    output = make_pipeline().to(torch.bfloat16)(**arguments, generator=seeded())
    assert_same(output, expected, atol=0.1)


def test_components_make_another_pipeline_and_from_pipe_casts_nothing(pipe, face):
    half = make_pipeline().to(torch.bfloat16)
    half.vocoder.to(torch.float32)
    shared = LTX2IDLoRAPipeline.from_pipe(half)
    assert shared.transformer is half.transformer and shared.transformer.dtype == torch.bfloat16
    assert shared.vocoder.dtype == torch.float32
    plain = LTX2ConditionPipeline(**half.components)
    assert LTX2IDLoRAPipeline.from_pipe(plain).vae is half.vae
    assert LTX2IDLoRAPipeline.from_pipe(half, vae=pipe.vae).vae is pipe.vae
    assert LTX2IDLoRAPipeline.from_pipe(make_pipeline(), dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


# A real batch


@families
@pytest.mark.parametrize("guidance_batching", ["sequential", "packed"])
def test_each_sample_of_a_batch_of_different_people_equals_its_single_run(pipes, family, guidance_batching, face):
    pipe = pipes[family]
    prompts = ["aa", "b", "c", "d"]
    images = [face, PIL.Image.effect_noise((96, 64), 60).convert("RGB"), None, face.rotate(180)]
    voices = [demo_voice(2.0), other_voice(4.0), other_voice(2.5, seed=2), None]
    arguments = {**SMALL, "guidance_batching": guidance_batching}
    batch = pipe(
        prompt=prompts,
        image=images,
        reference_audio=voices,
        negative_prompt=["n", "nn", "", "m"],
        generator=[seeded(seed) for seed in range(4)],
        **arguments,
    )
    for index, prompt in enumerate(prompts):
        single = pipe(
            prompt=prompt,
            image=images[index],
            reference_audio=voices[index],
            negative_prompt=["n", "nn", "", "m"][index],
            # Without any voice the single run has no identity pass; in the batch its difference is zero.
            generator=seeded(index),
            **arguments,
        )
        assert_same(batch, single, row=slice(index, index + 1))


def test_several_videos_of_several_prompts_each_keep_their_own_prompt(pipe, voice):
    prompts = ["a", "a longer one"]
    batch = pipe(
        prompt=prompts,
        reference_audio=voice,
        num_videos_per_prompt=2,
        generator=[seeded(seed) for seed in range(4)],
        **SMALL,
    )
    for index in range(4):
        single = pipe(prompt=prompts[index // 2], reference_audio=voice, generator=seeded(index), **SMALL)
        assert_same(batch, single, row=slice(index, index + 1))


def test_another_voice_changes_the_sound_and_another_face_the_picture(pipe, face, voice):
    def run(image, reference):
        return pipe(prompt="a", image=image, reference_audio=reference, generator=seeded(), **SMALL)

    base = run(face, voice)
    assert (run(face, other_voice(2.5)).audio - base.audio).abs().max() > 1e-2
    assert (run(face.rotate(180), voice).frames - base.frames).abs().max() > 1e-2


# The many ways to say the same


def test_latents_contexts_and_embeddings_stand_in_for_files_and_texts(pipe, face, voice):
    expected = pipe(prompt="a", negative_prompt="n", image=face, reference_audio=voice, generator=seeded(), **SMALL)
    context = pipe.encode_text_context(["a"], max_sequence_length=16)
    negative_context = pipe.encode_text_context(["n"], max_sequence_length=16)
    without_text = make_pipeline(
        text_encoder=None, tokenizer=None, transformer=pipe.transformer, connectors=pipe.connectors
    )
    output = without_text(
        text_context=context,
        negative_text_context=negative_context,
        image_latents=pipe.encode_image(face, 64, 64),
        reference_latents=pipe.encode_reference_audio(voice),
        generator=seeded(),
        **SMALL,
    )
    assert_same(output, expected)
    embeds, mask, negative_embeds, negative_mask = pipe.encode_prompt("a", "n", max_sequence_length=16)
    output = pipe(
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative_embeds,
        negative_prompt_attention_mask=negative_mask,
        image=face,
        reference_audio=voice,
        generator=seeded(),
        **SMALL,
    )
    assert_same(output, expected)


def test_a_voice_may_be_a_path_a_pair_or_a_tensor(pipe, voice_wav, voice):
    from diffusers_idlora.audio import load_audio

    waveform, sampling_rate = load_audio(voice_wav)
    outputs = [
        pipe(prompt="a", generator=seeded(), **kwargs, **SMALL)
        for kwargs in (
            {"reference_audio": str(voice_wav)},
            {"reference_audio": voice_wav},
            {"reference_audio": (waveform, sampling_rate)},
            {"reference_audio": waveform, "reference_audio_sampling_rate": sampling_rate},
            {"reference_audio": waveform[0].numpy(), "reference_audio_sampling_rate": sampling_rate},
        )
    ]
    for output in outputs[1:]:
        assert_same(output, outputs[0])


def test_several_clips_of_a_speaker_lie_on_one_negative_timeline(pipe, voice_wav):
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        pipe(prompt="a", reference_audio=(voice_wav, demo_voice(2.0)), **SMALL)
        one_by_one = [pipe._audio_tokens(pipe.encode_reference_audio(clip)) for clip in (voice_wav, demo_voice(2.0))]
    finally:
        hook.remove()
    tokens, (positions,) = seen[0]["audio_hidden_states"][0], seen[0]["audio_coords"][0]
    first, second = (clip.shape[0] for clip in one_by_one)
    torch.testing.assert_close(tokens[: first + second], torch.cat(one_by_one), atol=1e-6, rtol=0)
    assert positions[first + second - 1, 1].item() == pytest.approx(-0.04, abs=1e-6)
    assert (positions[first, 0] - positions[first - 1, 1]).item() == pytest.approx(0.04, abs=1e-5)
    assert (positions[: first + second] < 0).all() and positions[first + second, 0] == 0


def test_a_tagged_prompt_is_the_text_that_it_formats_to(pipe):
    prompt = IDLoRAPrompt(visual="v", speech="s", sounds="q")
    arguments = {**SMALL, "max_sequence_length": 48}
    assert_same(
        pipe(prompt=prompt, generator=seeded(), **arguments), pipe(prompt=str(prompt), generator=seeded(), **arguments)
    )


@pytest.mark.parametrize("kind", ["path", "array", "tensor"])
def test_an_image_may_be_a_path_an_array_or_a_tensor(pipe, face, kind, tmp_path):
    expected = pipe(prompt="a", image=face, generator=seeded(), **SMALL)
    array = np.asarray(face)
    if kind == "path":
        image = tmp_path / "face.png"
        face.save(image)
    else:
        image = array if kind == "array" else torch.from_numpy(array.copy()).permute(2, 0, 1)
    assert_same(pipe(prompt="a", image=image, generator=seeded(), **SMALL), expected)


# Guidance runs only what it needs


def test_passes_follow_from_the_scales(pipe, voice):
    off = {"guidance_scale": 1, "stg_scale": 0, "modality_scale": 1, "identity_guidance_scale": 0}
    every = ["cond", "uncond", "uncond_identity", "uncond_stg", "uncond_modality"]
    assert passes_of(pipe, reference_audio=voice) == every * 2
    assert passes_of(pipe) == [name for name in every if name != "uncond_identity"] * 2
    assert passes_of(pipe, reference_audio=voice, **off) == ["cond"] * 2
    assert passes_of(pipe, reference_audio=voice, **{**off, "identity_guidance_scale": 1.5}) == every[0:3:2] * 2
    assert passes_of(pipe, reference_audio=voice, **{**off, "audio_guidance_scale": 7.0}) == every[:2] * 2
    assert passes_of(pipe, reference_audio=voice, guidance_batching="packed") == ["+".join(every)] * 2


def test_identity_guidance_outside_of_its_window_costs_no_pass(pipe, voice):
    guider = IdentityGuidance(scale=3.0, start=0.25, stop=0.75)
    names = passes_of(pipe, reference_audio=voice, identity_guidance=guider, num_inference_steps=4, stg_scale=0)
    steps, current = [], []
    for name in names:
        if name == "cond" and current:
            steps.append(current)
            current = []
        current.append(name)
    steps.append(current)
    assert ["uncond_identity" in step for step in steps] == [False, True, True, False]


def test_a_guider_and_its_scale_agree_and_zero_equals_off(pipe, voice):
    def run(**kwargs):
        return pipe(prompt="a", reference_audio=voice, generator=seeded(), **kwargs, **SMALL)

    assert_same(run(identity_guidance=IdentityGuidance(scale=2.0)), run(identity_guidance_scale=2.0))
    assert_same(run(identity_guidance=IdentityGuidance(scale=3.0)), run())
    off = run(identity_guidance_scale=0.0)
    assert (run().audio - off.audio).abs().max() > 1e-2


def test_a_scale_of_zero_is_zero_for_audio_too(pipe, voice):
    def run(**kwargs):
        return pipe(prompt="a", reference_audio=voice, generator=seeded(), **kwargs, **SMALL)

    assert (run(audio_stg_scale=0.0).audio - run(audio_stg_scale=1.0).audio).abs().max() > 1e-3
    assert (run(audio_guidance_scale=0.0).audio - run(audio_guidance_scale=3.0).audio).abs().max() > 1e-3


def test_a_callback_may_change_the_scales_of_the_following_steps(pipe, voice):
    def text_off(pipe, step, timestep, tensors):
        if step == 0:
            pipe._guidance_scale = pipe._audio_guidance_scale = 1.0

    names = passes_of(pipe, reference_audio=voice, callback_on_step_end=text_off)
    assert names.count("uncond") == 1 and names.count("cond") == 2


# The loop as diffusers' users know it


def test_a_call_within_a_callback_disturbs_nothing(pipe, voice):
    arguments = {"prompt": "a", "reference_audio": voice, **SMALL, "num_inference_steps": 4}
    expected = pipe(**arguments, generator=seeded())

    def preview(pipe, step, timestep, tensors):
        pipe(prompt="b", **SMALL)
        pipe._keep_scales(GuidanceScales())

    assert_same(pipe(**arguments, generator=seeded(), callback_on_step_end=preview), expected)


def test_encoders_called_directly_keep_no_graph(pipe, face, voice):
    assert not pipe.encode_text_context(["a"], max_sequence_length=16).video_embeds.requires_grad
    assert not pipe.encode_reference_audio(voice).requires_grad
    assert not pipe.encode_image(face, 64, 64).requires_grad


def test_prompts_are_encoded_in_one_go_and_a_shared_face_and_voice_once(pipe, face, voice):
    counts = {}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: counts.__setitem__(name, counts.get(name, 0) + 1))
        for name, module in (
            ("text", pipe.text_encoder),
            ("face", pipe.vae.encoder),
            ("voice", pipe.audio_vae.encoder),
        )
    ]
    try:
        pipe(prompt=["a", "b", "c"], image=face, reference_audio=voice, num_videos_per_prompt=2, **SMALL)
    finally:
        for hook in hooks:
            hook.remove()
    assert counts == {"text": 1, "face": 1, "voice": 1}


def test_audio_latents_in_bfloat16_are_noised_in_float32(pipe, voice):
    latents = torch.randn(1, 2, 9, 4, generator=seeded(3)).bfloat16()
    outputs = [
        pipe(prompt="a", reference_audio=voice, audio_latents=given, generator=seeded(), **SMALL)
        for given in (latents, latents.float())
    ]
    assert_same(*outputs)


def test_callbacks_see_and_change_both_modalities(pipe, voice):
    steps = []

    def zero_the_latents(pipe, step, timestep, tensors):
        steps.append((step, sorted(tensors), pipe.guidance_scale, pipe.audio_stg_scale, pipe.num_timesteps))
        return {name: torch.zeros_like(tensors[name]) for name in ("latents", "audio_latents")} if step == 1 else {}

    output = pipe(
        prompt="a",
        reference_audio=voice,
        callback_on_step_end=zero_the_latents,
        callback_on_step_end_tensor_inputs=["latents", "audio_latents"],
        **SMALL,
    )
    assert steps == [(step, ["audio_latents", "latents"], 3.0, 1.0, 2) for step in range(2)]
    mean = pipe.vae.latents_mean.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(output.frames, mean.expand_as(output.frames))
    torch.testing.assert_close(pipe._pack_audio_latents(output.audio)[0, 0], pipe.audio_vae.latents_mean)


def test_interrupt_ends_the_loop_early(pipe, voice):
    steps = []

    def interrupt(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True

    pipe(prompt="a", reference_audio=voice, callback_on_step_end=interrupt, **{**SMALL, "num_inference_steps": 5})
    assert steps == [0]


def test_an_exception_in_the_loop_leaves_the_transformer_as_found(pipe, voice):
    before = [block.audio_attn1.processor for block in pipe.transformer.transformer_blocks]

    def fail(*_):
        raise RuntimeError("in a callback")

    with pytest.raises(RuntimeError, match="in a callback"):
        pipe(prompt="a", reference_audio=voice, callback_on_step_end=fail, **SMALL)
    assert [block.audio_attn1.processor for block in pipe.transformer.transformer_blocks] == before


@families
def test_the_same_seed_gives_the_same_clip_and_another_seed_another(pipes, family, voice):
    def run(seed):
        return pipes[family](prompt="a", reference_audio=voice, generator=seeded(seed), **SMALL)

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first.frames, again.frames) and torch.equal(first.audio, again.audio)
    assert not torch.allclose(first.frames, other.frames)


def test_output_types_and_tuples_hold_the_same_clip(pipe, face, voice):
    def run(output_type, **kwargs):
        arguments = {**SMALL, "output_type": output_type}
        return pipe(prompt="a", image=face, reference_audio=voice, generator=seeded(), **arguments, **kwargs)

    array = run("np")
    assert array.frames.shape == (1, 9, 64, 64, 3) and np.isfinite(array.frames).all()
    tensor, images = run("pt").frames, run("pil").frames
    torch.testing.assert_close(tensor.permute(0, 1, 3, 4, 2), torch.from_numpy(array.frames))
    assert images[0][0].size == (64, 64) and len(images[0]) == 9
    frames, audio = run("np", return_dict=False)
    assert np.array_equal(frames, array.frames) and torch.equal(audio, array.audio)
    duration = audio.shape[-1] / pipe.vocoder.config.output_sampling_rate
    assert duration == pytest.approx(9 / 25, abs=0.04)


def test_latents_of_a_call_can_be_taken_up_again(pipe, voice):
    context = {"prompt": "a", "reference_audio": voice, **SMALL}
    whole = pipe(**context, sigmas=[1.0, 0.6, 0.3], generator=seeded())
    states = []

    def keep(pipe, step, timestep, tensors):
        states.append(tensors)

    pipe(
        **context,
        sigmas=[1.0, 0.6, 0.3],
        generator=seeded(),
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents", "audio_latents"],
    )
    video, audio = pipe.decode_tokens(states[0]["latents"], states[0]["audio_latents"], 64, 64, 9, "latent")
    rest = pipe(**context, sigmas=[0.6, 0.3, 0.0], latents=video, audio_latents=audio, noise_scale=0.0)
    assert_same(rest, whole, atol=1e-4)


def test_size_and_length_left_out_follow_from_the_image_and_the_recipe(pipe, monkeypatch):
    calls = []
    monkeypatch.setattr(pipe, "check_inputs", lambda prompt, height, width, **kw: calls.append((height, width, kw)))
    monkeypatch.setattr(pipe, "encode_text_context", lambda *_, **__: 1 / 0)
    for image in (None, PIL.Image.new("RGB", (300, 400)), PIL.Image.new("RGB", (1600, 900))):
        with pytest.raises(ZeroDivisionError):
            pipe(prompt="a", image=image)
    assert [call[:2] for call in calls] == [(512, 512), (512, 384), (288, 512)]
    assert [call[2]["num_frames"] for call in calls] == [121] * 3


def test_a_duration_head_predicts_the_length_that_was_left_out(voice):
    pipe = make_pipeline()
    torch.manual_seed(0)
    head = LTX2DurationHead(
        video_cross_attention_dim=pipe.connectors.config.video_hidden_dim,
        audio_cross_attention_dim=pipe.connectors.config.audio_hidden_dim,
    )
    pipe.register_modules(duration_head=head.eval())
    arguments = {name: value for name, value in SMALL.items() if name != "num_frames"}
    output = pipe(prompt="a", reference_audio=voice, min_seconds=0.5, max_seconds=1.0, **arguments)
    frames = (output.frames.shape[2] - 1) * 8 + 1
    assert 0.5 * 25 - 8 <= frames <= 1.0 * 25 + 8
    assert output.audio.shape[2] == round(frames)


def test_a_last_frame_condition_holds_for_every_row_of_a_batch(pipe, face, voice):
    condition = LTX2VideoCondition(frames=face.rotate(90), index=-1, strength=1.0)
    arguments = {"conditions": condition, "reference_audio": voice, **SMALL}
    batch = pipe(prompt=["a", "b"], image=[face, None], generator=[seeded(0), seeded(1)], **arguments)
    for index, (prompt, image) in enumerate((("a", face), ("b", None))):
        single = pipe(prompt=prompt, image=image, generator=seeded(index), **arguments)
        assert_same(batch, single, row=slice(index, index + 1))
    without = pipe(prompt="a", image=face, reference_audio=voice, generator=seeded(0), **SMALL)
    assert (without.frames - batch.frames[:1]).abs().max() > 1e-2


# Memory and speed features of diffusers


@pytest.mark.parametrize(
    "enable",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        lambda pipe: pipe.enable_group_offload(
            torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        ),
        lambda pipe: pipe.vae.enable_tiling(),
        lambda pipe: pipe.transformer.set_attention_backend("native"),
    ],
    ids=["model offload", "group offload by leaf", "group offload by block", "tiling", "backend"],
)
def test_the_result_does_not_depend_on(enable, pipe, face, voice):
    arguments = {"prompt": "a", "image": face, "reference_audio": voice, **SMALL, "output_type": "np"}
    expected = pipe(**arguments, generator=seeded())
    changed = make_pipeline()
    enable(changed)
    for _ in range(2):
        output = changed(**arguments, generator=seeded())
        np.testing.assert_allclose(output.frames, expected.frames, atol=1e-5)
        torch.testing.assert_close(output.audio, expected.audio, atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="accelerate's sequential offload needs an accelerator")
def test_sequential_offload_gives_the_same_clip(pipe, face, voice):
    arguments = {"prompt": "a", "image": face, "reference_audio": voice, **SMALL}
    changed = make_pipeline()
    changed.enable_sequential_cpu_offload()
    assert_same(changed(**arguments, generator=seeded()), pipe(**arguments, generator=seeded()), atol=1e-2)


def test_layerwise_casting_runs(face, voice):
    pipe = make_pipeline()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    output = pipe(prompt="a", image=face, reference_audio=voice, **SMALL)
    assert output.frames.isfinite().all() and output.audio.isfinite().all()


def test_taylorseer_caches_each_kind_of_pass_on_its_own(pipe, face, voice):
    arguments = {"prompt": "a", "image": face, "reference_audio": voice, **SMALL, "num_inference_steps": 6}
    expected = pipe(**arguments, generator=seeded())
    cached = make_pipeline()
    config = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=3, max_order=1)
    cached.transformer.enable_cache(config)
    first, again = (cached(**arguments, generator=seeded()) for _ in range(2))
    assert torch.equal(first.frames, again.frames) and torch.equal(first.audio, again.audio)
    assert not torch.equal(first.frames, expected.frames)

    def fail(pipe, step, *_):
        if step == 3:
            raise RuntimeError("in a callback")

    with pytest.raises(RuntimeError):
        cached(**arguments, generator=seeded(), callback_on_step_end=fail)
    assert torch.equal(cached(**arguments, generator=seeded()).frames, first.frames)
    cached.transformer.disable_cache()
    assert_same(cached(**arguments, generator=seeded()), expected)


def test_compiled_blocks_give_the_same_clip(pipe, face, voice):
    arguments = {"prompt": "a", "image": face, "reference_audio": voice, **SMALL}
    expected = pipe(**arguments, generator=seeded())
    compiled = make_pipeline()
    torch._dynamo.reset()
    compiled.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert_same(compiled(**arguments, generator=seeded()), expected)
    # All steps after the first, and all later calls of the same size, compile nothing.
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(compiled(**arguments, generator=seeded()), expected)
    torch._dynamo.reset()


# Five kinds of passes in sizes that are first fixed and then variable are more than torch's default of 8 graphs.
@torch._dynamo.config.patch(recompile_limit=32)
def test_compiled_blocks_take_other_sizes_and_voices_without_end(pipe, face, voice):
    compiled = make_pipeline()
    torch._dynamo.reset()
    compiled.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")

    def run(which, reference, **size):
        arguments = {**SMALL, **size, "mask_video_from_reference": True}
        return which(prompt="a", image=face, reference_audio=reference, generator=seeded(), **arguments)

    for reference, size in (
        (voice, {}),
        (other_voice(3.5), {"width": 96}),
        (other_voice(2.2), {"height": 96, "width": 64, "num_frames": 17}),
    ):
        run(compiled, reference, **size)
    with torch.compiler.set_stance("fail_on_recompile"):
        size = {"height": 128, "width": 96, "num_frames": 25}
        assert_same(run(compiled, other_voice(4.1), **size), run(pipe, other_voice(4.1), **size), atol=1e-4)
    torch._dynamo.reset()


def test_the_pipeline_keeps_the_text_kernels_free_of_a_mask(pipe):
    assert pipe.encode_text_context(["a", "a longer prompt"], max_sequence_length=16).attention_mask is None
