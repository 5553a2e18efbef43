import json
import math
import resource
import wave

import numpy as np
import pytest
import torch
from diffusers import LTX2ConditionPipeline
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import families
from diffusers_idlora.demo_assets import demo_face, demo_voice, write_demo_assets
from diffusers_idlora.tiny import save_tiny_adapter, save_tiny_checkpoint, tiny_components


FRAME_RATE = 25.0
LATENT_SECONDS = 0.04
ADAPTED_MODULES = {
    f"{attention}.{projection}"
    for attention in ("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    for projection in ("to_q", "to_k", "to_v", "to_out.0")
} | {"audio_ff.net.0.proj", "audio_ff.net.2"}


def load(directory):
    pipeline = LTX2ConditionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, **overrides):
    arguments = {
        "conditions": [LTX2VideoCondition(frames=demo_face(64), index=0)],
        "prompt": "a talking face",
        "negative_prompt": "noise",
        "height": 64,
        "width": 64,
        "num_frames": 17,
        "frame_rate": FRAME_RATE,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "audio_guidance_scale": 7.0,
        "stg_scale": 1.0,
        "audio_stg_scale": 1.0,
        "modality_scale": 3.0,
        "audio_modality_scale": 3.0,
        "guidance_rescale": 0.0,
        "audio_guidance_rescale": 0.0,
        "spatio_temporal_guidance_blocks": [2],
        "use_cross_timestep": pipeline.transformer.config.cross_attn_mod,
        "max_sequence_length": 16,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipeline(**(arguments | overrides))


def modules_of(components):
    return {name: module for name, module in components.items() if isinstance(module, torch.nn.Module)}


@families
def test_components_are_small_float32_modules_in_eval_mode(family):
    modules = modules_of(tiny_components(family))
    assert set(modules) == {"vae", "audio_vae", "text_encoder", "connectors", "transformer", "vocoder"}
    assert not any(module.training for model in modules.values() for module in model.modules())
    parameters = [parameter for model in modules.values() for parameter in model.parameters()]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert sum(parameter.numel() for parameter in parameters) < 600_000


@pytest.mark.parametrize(("spelling", "family"), [("ltx2", "ltx-2"), ("ltx23", "ltx-2.3")])
def test_a_family_may_be_spelled_without_punctuation(spelling, family):
    assert tiny_components(spelling)["transformer"].config == tiny_components(family)["transformer"].config


@pytest.mark.parametrize("family", ["ltx", "LTX-2", "", None])
def test_an_unknown_family_is_refused_and_nothing_is_written(family, tmp_path):
    with pytest.raises(ValueError, match=r"`family` is .*'ltx-2\.3'"):
        tiny_components(family)
    with pytest.raises(ValueError, match="`family` is"):
        save_tiny_checkpoint(tmp_path / "checkpoint", family)
    assert not list(tmp_path.iterdir())


@families
def test_the_seed_decides_every_weight(family):
    first, again, other = (modules_of(tiny_components(family, seed)) for seed in (3, 3, 4))
    for name, module in first.items():
        state, same, different = module.state_dict(), again[name].state_dict(), other[name].state_dict()
        assert all(torch.equal(state[key], same[key]) for key in state)
        assert any(not torch.equal(state[key], different[key]) for key in state)


@families
def test_building_leaves_the_global_random_state_alone(family):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    tiny_components(family)
    assert torch.equal(torch.rand(3), expected)


def test_the_generations_differ_as_the_released_ones_do():
    older, newer = (tiny_components(family) for family in ("ltx-2", "ltx-2.3"))
    for flag in ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod", "perturbed_attn"):
        assert not older["transformer"].config[flag]
        assert newer["transformer"].config[flag]
    assert older["transformer"].config.use_prompt_embeddings
    assert not newer["transformer"].config.use_prompt_embeddings
    assert not older["connectors"].config.per_modality_projections
    assert newer["connectors"].config.per_modality_projections


@families
def test_latent_statistics_are_far_from_zero_and_one(family):
    components = tiny_components(family)
    for vae in (components["vae"], components["audio_vae"]):
        assert len(set(vae.latents_mean.tolist())) == len(set(vae.latents_std.tolist())) == len(vae.latents_mean)
        assert vae.latents_mean.abs().mean() > 0.1
        assert 0.5 <= vae.latents_std.min() < vae.latents_std.max() <= 2.0


@families
def test_the_video_vae_compresses_32_times_in_space_and_8_times_in_time(family):
    components = tiny_components(family)
    vae = components["vae"]
    with torch.no_grad():
        latents = vae.encode(torch.rand(1, 3, 17, 64, 96) * 2 - 1).latent_dist.mode()
        video = vae.decode(latents).sample
    assert latents.shape[2:] == (3, 2, 3)
    assert video.shape == (1, 3, 17, 64, 96)
    assert (vae.temporal_compression_ratio, vae.spatial_compression_ratio) == (8, 32)
    assert tuple(components["transformer"].config.vae_scale_factors) == (8, 32, 32)


@families
@pytest.mark.parametrize("frames", [1, 4, 5, 16, 17, 50])
def test_the_audio_vae_compresses_4_times_in_time_and_in_mel(family, frames):
    audio_vae = tiny_components(family)["audio_vae"]
    mel_bins = audio_vae.config.mel_bins
    with torch.no_grad():
        latents = audio_vae.encode(torch.randn(1, 2, frames, mel_bins)).latent_dist.mode()
    channels = audio_vae.config.latent_channels
    assert latents.shape == (1, channels, math.ceil(frames / 4), mel_bins // 4)
    assert (audio_vae.config.sample_rate, audio_vae.config.mel_hop_length) == (16000, 160)
    assert audio_vae.latents_mean.shape == (channels * mel_bins // 4,)


@families
@pytest.mark.parametrize("frames", [1, 17, 100])
def test_the_vocoder_plays_in_real_time(family, frames):
    components = tiny_components(family)
    config = components["audio_vae"].config
    with torch.no_grad():
        waveform = components["vocoder"](torch.randn(2, 2, frames, config.mel_bins))
    rate = components["vocoder"].config.output_sampling_rate
    assert waveform.shape == (2, 2, frames * config.mel_hop_length * rate // config.sample_rate)


@families
def test_the_tokenizer_pads_on_the_left_and_knows_every_character(family):
    tokenizer = tiny_components(family)["tokenizer"]
    tokens = tokenizer("hé ~\n", padding="max_length", max_length=16, truncation=True)
    assert tokens["attention_mask"] == [0] * 9 + [1] * 7
    assert tokens["input_ids"][9] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens["input_ids"], skip_special_tokens=True) == "hé ~\n"
    assert tokenizer.unk_token_id not in tokens["input_ids"]
    assert len(tokenizer("a" * 500, padding="max_length", truncation=True)["input_ids"]) == 64


@families
@pytest.mark.parametrize("length", [16, 64])
def test_the_connectors_replace_padding_by_their_registers(family, length):
    connectors = tiny_components(family)["connectors"]
    width = connectors.config.caption_channels * connectors.config.text_proj_in_factor
    mask = torch.ones(1, length)
    mask[:, : length // 2] = 0
    states = torch.randn(1, length, width)
    other_padding = torch.where(mask.unsqueeze(-1).bool(), states, torch.randn(1, length, width))
    with torch.no_grad():
        video, audio, _ = connectors(states, mask, padding_side="left")
        video_again, audio_again, _ = connectors(other_padding, mask, padding_side="left")
        connectors.video_connector.learnable_registers.zero_()
        connectors.audio_connector.learnable_registers.zero_()
        video_without, audio_without, _ = connectors(states, mask, padding_side="left")
    torch.testing.assert_close(video, video_again, atol=1e-5, rtol=0)
    torch.testing.assert_close(audio, audio_again, atol=1e-5, rtol=0)
    assert (video - video_without).abs().max() > 1e-2
    assert (audio - audio_without).abs().max() > 1e-2


def test_the_scheduler_shifts_by_the_number_of_tokens_and_ends_at_a_tenth():
    scheduler = tiny_components()["scheduler"]
    sigmas = []
    for shift in (scheduler.config.base_shift, scheduler.config.max_shift):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4), mu=shift)
        sigmas.append(scheduler.sigmas)
    assert (scheduler.config.base_shift, scheduler.config.max_shift) == (0.95, 2.05)
    assert (scheduler.config.base_image_seq_len, scheduler.config.max_image_seq_len) == (1024, 4096)
    assert sigmas[0][-2].item() == sigmas[1][-2].item() == pytest.approx(0.1)
    assert sigmas[1][1] - sigmas[0][1] > 0.02


@families
def test_the_pipeline_makes_a_finite_video_with_sound_of_its_length(tiny_checkpoint, family):
    pipeline = load(tiny_checkpoint(family))
    output = generate(pipeline, output_type="np")
    assert output.frames.shape == (1, 17, 64, 64, 3)
    assert np.isfinite(output.frames).all()
    assert output.frames.std(axis=(2, 3)).min() > 0.02
    assert output.frames.std(axis=1).mean() > 0.01
    assert output.audio.shape[:2] == (1, 2)
    assert output.audio.isfinite().all()
    assert output.audio.std() > 0.005
    seconds = output.audio.shape[-1] / pipeline.vocoder.config.output_sampling_rate
    assert abs(seconds - 17 / FRAME_RATE) <= LATENT_SECONDS


@families
def test_the_pipeline_returns_finite_latents_that_depend_on_the_prompt(tiny_checkpoint, family):
    pipeline = load(tiny_checkpoint(family))
    output = generate(pipeline)
    other = generate(pipeline, prompt="a speaking one")
    assert output.frames.shape == (1, 8, 3, 2, 2)
    assert output.audio.shape == (1, 2, 17, 4)
    for latents, changed in ((output.frames, other.frames), (output.audio, other.audio)):
        assert latents.isfinite().all()
        assert (latents - changed).abs().max() > 1e-2


@families
def test_a_saved_checkpoint_generates_what_its_components_do(tmp_path, family):
    directory = save_tiny_checkpoint(tmp_path / "new" / "checkpoint", family, seed=5)
    reloaded = generate(load(directory))
    pipeline = LTX2ConditionPipeline(**tiny_components(family, seed=5))
    pipeline.set_progress_bar_config(disable=True)
    original = generate(pipeline)
    torch.testing.assert_close(reloaded.frames, original.frames, atol=1e-4, rtol=0)
    torch.testing.assert_close(reloaded.audio, original.audio, atol=1e-4, rtol=0)


def test_a_saved_checkpoint_stands_alone_and_does_not_name_where_it_was_made(tmp_path):
    directory = save_tiny_checkpoint(tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert json.loads((directory / "model_index.json").read_text())["_class_name"] == "LTX2ConditionPipeline"
    assert not [path for path in directory.rglob("*.json") if str(tmp_path) in path.read_text()]


def test_a_save_that_fails_midway_leaves_nothing_behind(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(Exception, match="(?i)file too large"):
            save_tiny_checkpoint(tmp_path / "checkpoint")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled_and_a_full_one_is_left_alone(tmp_path):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    assert (save_tiny_checkpoint(directory) / "model_index.json").exists()
    (directory / "model_index.json").write_text("mine")
    with pytest.raises(ValueError, match=r"`directory` '.*checkpoint' already exists"):
        save_tiny_checkpoint(directory)
    assert (directory / "model_index.json").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [directory]


@families
def test_an_adapter_has_the_released_keys_for_the_audio_modules_of_every_block(tiny_adapter, family):
    path = tiny_adapter(family)
    weights = load_file(path)
    prefix = "diffusion_model.transformer_blocks"
    assert set(weights) == {
        f"{prefix}.{block}.{module}.lora_{side}.weight"
        for block in range(3)
        for module in ADAPTED_MODULES
        for side in "AB"
    }
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert {weight.shape[0] for key, weight in weights.items() if "lora_A" in key} == {4}
    with safe_open(path, "pt") as file:
        assert not file.metadata()


@families
def test_an_adapter_changes_video_and_audio(tiny_checkpoint, tiny_adapter, family):
    pipeline = load(tiny_checkpoint(family))
    before = generate(pipeline)
    pipeline.load_lora_weights(tiny_adapter(family))
    after = generate(pipeline)
    assert (after.frames - before.frames).abs().max() > 0.05
    assert (after.audio - before.audio).abs().max() > 0.05


def test_an_adapter_of_one_generation_does_not_fit_the_other(tiny_checkpoint, tiny_adapter):
    pipeline = load(tiny_checkpoint("ltx-2.3"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        pipeline.load_lora_weights(tiny_adapter("ltx-2"))


def test_rank_and_seed_of_an_adapter_are_the_callers(tmp_path):
    transformer = tiny_components()["transformer"]
    key = "diffusion_model.transformer_blocks.0.audio_ff.net.2.lora_B.weight"
    first, again, other = (
        load_file(save_tiny_adapter(tmp_path / f"{index}.safetensors", transformer, rank=6, seed=seed))[key]
        for index, seed in enumerate((1, 1, 2))
    )
    assert first.shape == (16, 6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="`rank` is 0"):
        save_tiny_adapter(tmp_path / "none.safetensors", transformer, rank=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{index}.safetensors" for index in range(3)]


@pytest.mark.parametrize("size", [64, 512])
def test_the_demo_face_is_a_picture_with_several_colours(size):
    face = demo_face(size)
    assert face.size == (size, size)
    assert face.mode == "RGB"
    assert len(face.getcolors(maxcolors=size * size)) >= 6


@pytest.mark.parametrize("sampling_rate", [8000, 24000, 48000])
def test_the_demo_voice_is_a_voice_of_about_120_hz_with_pauses(sampling_rate):
    voice, rate = demo_voice(2.0, sampling_rate)
    assert rate == sampling_rate
    assert voice.shape == (1, 2 * sampling_rate)
    assert voice.abs().max().item() == pytest.approx(0.7)
    vowel = voice[0, round(0.1 * rate) : round(0.3 * rate)]
    spectrum = torch.fft.rfft(torch.nn.functional.pad(vowel, (0, len(vowel))))
    correlation = torch.fft.irfft(spectrum.abs() ** 2)
    lags = torch.arange(rate // 300, rate // 80)
    assert rate / lags[correlation[lags].argmax()].item() == pytest.approx(120, rel=0.05)
    assert voice[0, round(0.36 * rate) : round(0.42 * rate)].abs().max() < 1e-3


def test_the_demo_voice_says_different_vowels():
    voice, rate = demo_voice(5 * 0.43)
    spectra = voice[0].reshape(5, -1)[:, round(0.1 * rate) : round(0.3 * rate)]
    power = torch.fft.rfft(spectra, dim=-1).abs() ** 2
    frequencies = torch.linspace(0, rate / 2, power.shape[-1])
    band = (frequencies > 1700) & (frequencies < 2600)
    a, e, i, o, u = (power[:, band].sum(-1) / power.sum(-1)).tolist()
    assert min(e, i) > 3 * max(a, o, u)


def test_the_demo_voice_depends_on_its_seed_alone():
    torch.manual_seed(0)
    first, _ = demo_voice(1.0, seed=1)
    assert torch.equal(first, demo_voice(1.0, seed=1)[0])
    assert not torch.equal(first, demo_voice(1.0, seed=2)[0])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: demo_face(0), "size"),
        (lambda: demo_voice(0.0), "seconds"),
        (lambda: demo_voice(float("nan")), "seconds"),
        (lambda: demo_voice(1.0, 100), "sampling_rate"),
    ],
)
def test_impossible_demo_assets_are_refused(make, name):
    with pytest.raises(ValueError, match=f"`{name}` is"):
        make()


def test_demo_assets_are_files_that_open(tmp_path):
    face, voice = write_demo_assets(tmp_path / "assets", seconds=1.5)
    assert sorted(path.name for path in (tmp_path / "assets").iterdir()) == ["face.png", "voice.wav"]
    assert Image.open(face).size == (512, 512)
    with wave.open(str(voice)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    np.testing.assert_allclose(samples / 32767, demo_voice(1.5)[0][0].numpy(), atol=1e-4)


def test_the_shared_voice_is_three_seconds_and_the_shared_face_opens(voice_wav, face_png):
    with wave.open(str(voice_wav)) as file:
        assert file.getnframes() / file.getframerate() == 3.0
    assert Image.open(face_png).mode == "RGB"
