"""Recipes, two stages, windows, speakers and clips that go on, on the command line."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from command_line import QUICK, assert_one_line_error, invoke, leftovers
from conftest import families
from diffusers_idlora import RECIPES, GuidanceWindow, LTX2IDLoRATwoStagePipeline, SpeakerTurn
from diffusers_idlora.batch import generate_clips
from diffusers_idlora.cli_options import Wanted
from diffusers_idlora.demo_assets import demo_face, demo_voice
from diffusers_idlora.generation import Clip, call_arguments, generate_clip, load_models, read_record
from diffusers_idlora.media import file_sha256, read_video, write_video
from diffusers_idlora.memory import load_upsampler
from diffusers_idlora.prompts_file import clip_of_row
from diffusers_idlora.recipes import TWO_STAGE_RECIPES
from diffusers_idlora.settings import ClipSettings, ModelSettings
from diffusers_idlora.tiny import save_tiny_adapter, tiny_components


pytest_plugins = ["command_line_fixtures"]

WITHOUT_STEPS = (*QUICK[:-10], *QUICK[-8:])
assert "--steps" not in WITHOUT_STEPS


@pytest.fixture(scope="session")
def distilled_lora(tmp_path_factory):
    """`distilled_lora("ltx-2.3")` is the file of a random "distilled LoRA"."""
    folder = tmp_path_factory.mktemp("distilled")

    def file(family="ltx-2.3"):
        path = folder / family / "distilled.safetensors"
        return path if path.exists() else save_tiny_adapter(path, tiny_components(family)["transformer"], seed=1)

    return file


@pytest.fixture(scope="session")
def inputs_of(tiny_checkpoint, tiny_adapter, face_png, voice_wav):
    """`inputs_of("ltx-2")` are the options that name models and files of that generation."""

    def inputs(family="ltx-2.3"):
        models = ("--base", tiny_checkpoint(family), "--lora", tiny_adapter(family))
        return (*models, "--image", face_png, "--reference-audio", voice_wav)

    return inputs


class TestRecipes:
    @pytest.mark.parametrize(
        ("recipe", "family"),
        [("two-stage", "ltx-2"), ("two-stage", "ltx-2.3"), ("hq", "ltx-2.3"), ("distilled", "ltx-2")],
    )
    def test_each_makes_a_clip_and_its_record_makes_it_again(
        self, recipe, family, inputs_of, distilled_lora, tmp_path
    ):
        options = WITHOUT_STEPS if recipe == "distilled" else QUICK
        options = (*inputs_of(family), *options, "--recipe", recipe, "--distilled-lora", distilled_lora(family))
        result = invoke("generate", *options, "--prompt", "a face", "--seed", 3, "-o", tmp_path / "out.mp4")
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        assert read_video(tmp_path / "out.mp4")[0].shape == (9, 64, 64, 3)
        record = json.loads((tmp_path / "out.json").read_text())
        assert (record["models"]["recipe"], record["settings"]["sampler"]) == (
            recipe,
            "res_2s" if recipe == "hq" else None,
        )
        assert record["files"]["distilled_lora"][0]["sha256"] == file_sha256(distilled_lora(family))
        before = file_sha256(tmp_path / "out.mp4")
        (tmp_path / "out.mp4").unlink()
        again = invoke("generate", "--from", tmp_path / "out.json")
        assert again.exit_code == 0, again.output
        assert file_sha256(tmp_path / "out.mp4") == before

    def test_without_a_distilled_lora_the_base_is_taken_to_be_distilled(self, inputs_of, tmp_path):
        options = (*inputs_of(), "--prompt", "a face", "--recipe", "distilled", *WITHOUT_STEPS)
        result = invoke("generate", *options, "-o", tmp_path / "out.mp4")
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / "out.json").read_text())
        assert len(record["settings"]["sigmas"]) == 8 and record["settings"]["identity_guidance_scale"] == 1.0

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_the_call_has_what_the_recipe_says(self, recipe):
        settings = ClipSettings(prompt="a", seed=0).with_recipe("one-stage", recipe)
        arguments = settings.call_arguments()
        arguments["identity_guidance_scale"] = arguments["identity_guidance"].config.scale
        for name, value in RECIPES[recipe].items():
            # 7.0 is what the pipeline itself takes.
            if (name, value) != ("audio_guidance_scale", 7.0):
                assert arguments[name] == (list(value) if name == "sigmas" else value), name

    def test_its_names_are_those_of_the_recipes_in_python(self):
        assert [name for name in RECIPES if ModelSettings(recipe=name).has_two_stages] == ["two-stage", "hq"]
        assert {"two-stage", "hq"} == TWO_STAGE_RECIPES
        kinds = {field.name: field.type for field in dataclasses.fields(ModelSettings)}
        assert set(kinds["recipe"].__args__) == set(RECIPES)

    def test_options_and_rows_win_over_the_recipe(self, tmp_path):
        settings = ClipSettings().with_recipe("one-stage", "hq").updated({"prompt": "a", "steps": 4})
        assert (settings.steps, settings.sampler, settings.stg_scale) == (4, "res_2s", 0.0)
        row = clip_of_row({"stg_scale": 1.5, "sampler": "euler"}, 0, settings, tmp_path, tmp_path).settings
        assert (row.steps, row.sampler, row.stg_scale, row.cfg_star) == (4, "euler", 1.5, True)

    def test_another_recipe_changes_what_a_record_has_from_its_own_and_nothing_else(self):
        record = ClipSettings(prompt="a").with_recipe("one-stage", "hq").updated({"guidance_scale": 5.0})
        settings = record.with_recipe("hq", "distilled")
        assert (settings.prompt, settings.guidance_scale) == ("a", 5.0)
        assert (settings.sampler, settings.sigma_shift_tokens, settings.stage_2_sigmas) == (None, 4096, ())
        assert len(settings.sigmas) == 8
        assert settings.with_recipe("distilled", "hq") == record

    def test_the_models_of_a_recipe_that_is_replaced_are_not_asked_for(self, inputs_of, distilled_lora, tmp_path):
        options = (
            *inputs_of(),
            "--prompt",
            "a",
            *QUICK,
            "--recipe",
            "two-stage",
            "--distilled-lora",
            distilled_lora(),
        )
        result = invoke("generate", *options, "-o", tmp_path / "two.mp4")
        assert result.exit_code == 0, result.output
        result = invoke("generate", "--from", tmp_path / "two.json", "--recipe", "one-stage", "-o", tmp_path / "a.mp4")
        assert result.exit_code == 0, result.output
        models, settings, _ = read_record(tmp_path / "a.json")
        assert (models.recipe, models.distilled_lora, settings.stage_2_sigmas) == ("one-stage", None, ())
        wanted = Wanted.from_options({"recipe": "hq"}, tmp_path / "two.json")
        assert wanted.models.distilled_lora == str(distilled_lora())
        assert (wanted.settings.sampler, wanted.settings.steps) == ("res_2s", 2)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--recipe", "fast"], ["`recipe`", "fast", "two-stage"]),
            (["--recipe", "hq"], ["`distilled_lora` is missing", "'hq'", "none"]),
            (["--distilled-lora", "none"], ["`distilled_lora`", "'one-stage'", "leave it out"]),
            (["--recipe", "distilled", "--upsampler", "x"], ["`upsampler`", "'distilled'", "leave it out"]),
            (["--recipe", "hq", "--distilled-lora", "nowhere.safetensors"], ["`distilled_lora`", "nowhere"]),
            (["--recipe", "distilled", "--distilled-lora", "VOICE"], ["`distilled_lora`", "safetensors"]),
            (["--recipe", "two-stage", "--distilled-lora", "none", "--upsampler", "."], ["`upsampler`"]),
            (["--recipe", "two-stage", "--distilled-lora", "none", "--upsampler", "TRANSFORMER"], ["`upsampler`"]),
            (["--recipe", "two-stage", "--distilled-lora", "none", "--height", 96], ["`height`", "64", "96"]),
            (["--stage-2-sigmas", 0.5], ["`stage_2_sigmas`", "'one-stage'", "leave it out"]),
            (["--distilled-scales", 0.5], ["`distilled_scales`", "two stages"]),
            (["--recipe", "distilled", "--steps", 4], ["`steps` is 4", "`sigmas`", "8"]),
        ],
    )
    def test_what_does_not_go_together_is_one_clear_sentence(self, arguments, words, inputs_of, tmp_path):
        inputs = inputs_of()
        paths = {"VOICE": inputs[7], "TRANSFORMER": inputs[1] / "transformer"}
        arguments = [paths.get(argument, argument) for argument in arguments]
        result = invoke("generate", *inputs, "--prompt", "x", *WITHOUT_STEPS, *arguments, "-o", tmp_path / "out.mp4")
        assert_one_line_error(result, *words)
        assert leftovers(tmp_path) == []

    def test_a_base_without_an_upsampler_takes_one_from_elsewhere(self, inputs_of, tmp_path):
        base = shutil.copytree(inputs_of()[1], tmp_path / "base")
        shutil.move(base / "latent_upsampler", tmp_path / "upsampler")
        models = ModelSettings(base=str(base), recipe="hq", distilled_lora="none", device="cpu", dtype="float32")
        with pytest.raises(ValueError, match="`base` .* has no latent upsampler; give `upsampler`"):
            models.check()
        for place in (tmp_path / "upsampler", inputs_of()[1]):
            other = dataclasses.replace(models, upsampler=str(place))
            other.check()
            assert load_upsampler(other, None).config.in_channels == 8

    @families
    def test_the_distilled_lora_acts_beside_the_id_lora_in_one_stage(self, family, inputs_of, distilled_lora):
        inputs = inputs_of(family)
        models = ModelSettings(base=str(inputs[1]), lora=str(inputs[3]), lora_scale=0.7, device="cpu")
        models = dataclasses.replace(models, recipe="distilled", distilled_lora=str(distilled_lora(family)))
        pipe = load_models(models)
        layer = pipe.transformer.transformer_blocks[0].audio_attn1.to_q
        assert sorted(pipe.get_active_adapters()) == ["distilled", "id_lora"]
        assert (layer.scaling["distilled"], layer.scaling["id_lora"]) == (1.0, 0.7)


class TestTwoStageFiles:
    @pytest.fixture(scope="class")
    def models(self, inputs_of, distilled_lora):
        inputs = inputs_of()
        files = {"base": str(inputs[1]), "lora": str(inputs[3]), "distilled_lora": str(distilled_lora())}
        return ModelSettings(**files, recipe="two-stage", dtype="float32", device="cpu")

    @pytest.fixture
    def settings(self, inputs_of):
        """Two clips with one face and one voice."""
        shared = {"image": str(inputs_of()[5]), "reference_audio": (str(inputs_of()[7]),), "height": 64, "width": 64}
        shared |= {"num_frames": 9, "steps": 2, "stg_scale": 0.0, "modality_scale": 1.0, "max_sequence_length": 16}
        shared |= {"guidance_scale": 1.0, "stage_2_sigmas": (0.9, 0.4), "distilled_scales": (0.2, 0.6)}
        return [ClipSettings(prompt=prompt, seed=seed, **shared) for seed, prompt in enumerate(("a", "b"))]

    def test_together_each_encoder_has_one_turn_and_the_clips_are_those_of_single_runs(
        self, models, settings, tmp_path, reports
    ):
        single = {index: Clip(item, tmp_path / f"single{index}.mp4") for index, item in enumerate(settings)}
        pipe = load_models(models)
        for index, clip in single.items():
            pipe.__dict__.pop("_encodings", None)
            assert list(generate_clips(pipe, models, {index: clip}, reports)) == [(index, None)]
        pipe.__dict__.pop("_encodings")
        parts = {"text encoder": pipe.text_encoder, "denoiser": pipe.transformer, "upsampler": pipe.latent_upsampler}
        parts |= {"face": pipe.vae.encoder, "voice": pipe.audio_vae.encoder, "picture": pipe.vae.decoder}
        runs = []
        for name, module in parts.items():
            module.register_forward_pre_hook(lambda *_, name=name: runs.append(name) if runs[-1:] != [name] else None)
        clips = {index: Clip(item, tmp_path / f"{index}.mp4") for index, item in enumerate(settings)}
        assert list(generate_clips(pipe, models, clips, reports)) == [(0, None), (1, None)]
        assert runs == ["text encoder", "voice", "face", *["denoiser", "upsampler"] * 2, "denoiser", "picture"]
        for index, clip in clips.items():
            assert file_sha256(clip.output) == file_sha256(single[index].output)
        assert leftovers(tmp_path) == sorted(
            f"{name}.{kind}" for name in ("0", "1", "single0", "single1") for kind in ("json", "mp4")
        )

    def test_the_clip_is_that_of_the_pipeline_called_with_the_same_settings(self, models, settings, tmp_path):
        clip = Clip(settings[0], tmp_path / "out.mp4")
        pipe, stages = load_models(models), []
        generate_clip(pipe, models, clip, lambda *stage: stages.append(stage))
        assert [stage for stage in stages if stage[0] != "Writing"] == [
            ("Denoising", 1, 2),
            ("Denoising", 2, 2),
            ("Refining", 1, 2),
            ("Refining", 2, 2),
            ("Decoding", 0, None),
            ("Decoding", 1, 1),
        ]
        plain = LTX2IDLoRATwoStagePipeline(**pipe.components)
        plain.set_progress_bar_config(disable=True)
        made = plain(**call_arguments(pipe, models, settings[0].resolved()))
        write_video(tmp_path / "expected.mp4", made.frames[0], 25, made.audio[0], plain.output_sampling_rate)
        for result, wanted in zip(read_video(clip.output), read_video(tmp_path / "expected.mp4")):
            assert np.array_equal(result, wanted)

    def test_under_model_offload_the_transformer_does_not_make_room_between_the_stages(self, models):
        pipe = load_models(models)
        assert "latent_upsampler" not in pipe.model_cpu_offload_seq and "connectors" not in pipe.model_cpu_offload_seq


class TestNewSettings:
    def test_windows_and_speakers_reach_the_pipeline(self, inputs_of, voice_wav, tmp_path):
        other = shutil.copy(voice_wav, tmp_path / "other.wav")
        speakers = ("--speaker", f"{voice_wav}:0:0.16", "--speaker", f"{other}:0.16:0.36")
        windows = ("--text-window", "0:0.5", "--identity-window", "0:1,skip=0.2:0.4,every=2", "--guidance-scale", 2)
        more = ("--lead-in", 0.1, "--sampler", "res_2s", "--sigma-shift-tokens", "real", "--cfg-star")
        options = (*inputs_of()[:6], "--prompt", "x", *QUICK, *speakers, *windows, *more)
        result = invoke("generate", *options, "-o", tmp_path / "out.mp4")
        assert result.exit_code == 0, result.output
        settings, record = read_record(tmp_path / "out.json")[1:]
        arguments = settings.call_arguments()
        assert arguments["guidance_windows"] == {
            "text": GuidanceWindow(0.0, 0.5),
            "identity": GuidanceWindow(0.0, 1.0, ((0.2, 0.4),), 2),
        }
        assert arguments["speakers"] == [
            SpeakerTurn(str(voice_wav), 0.0, 0.16),
            SpeakerTurn(other.as_posix(), 0.16, 0.36),
        ]
        assert (arguments["sigma_shift_tokens"], arguments["sampler"], arguments["cfg_star"]) == (None, "res_2s", True)
        assert [file["sha256"] for file in record["files"]["speaker"]] == [file_sha256(voice_wav)] * 2
        assert read_video(tmp_path / "out.mp4")[0].shape[0] == 9

    def test_an_earlier_clip_goes_on(self, inputs_of, tmp_path):
        earlier = tmp_path / "earlier.mp4"
        write_video(earlier, [demo_face(64)] * 17, 25, *demo_voice(0.68))
        options = (*inputs_of()[:4], "--prompt", "x", *QUICK, "--continue-from", earlier)
        result = invoke("generate", *options, "-o", tmp_path / "out.mp4")
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / "out.json").read_text())
        assert record["files"]["continue_from"] == [{"path": str(earlier), "sha256": file_sha256(earlier)}]
        assert record["output"]["num_frames"] == 9

    def test_rows_give_speakers_as_objects_or_texts_and_windows_as_pairs(self, voice_wav, tmp_path):
        shutil.copy(voice_wav, tmp_path / "a.wav")
        row = {
            "prompt": "x",
            "speakers": [{"reference_audio": "a.wav", "start": 0, "end": 1.5}, f"{voice_wav}:2:3"],
            "stg-window": [0, 0.8],
        }
        settings = clip_of_row(row, 0, ClipSettings(reference_audio=("b.wav",)), tmp_path, tmp_path).settings
        assert settings.speaker == (f"{tmp_path / 'a.wav'}:0:1.5", f"{voice_wav}:2:3")
        assert (settings.stg_window, settings.reference_audio) == ("0:0.8", ())
        settings.check()

    def test_a_face_replaces_the_clip_that_goes_on_and_a_voice_the_speakers(self):
        settings = ClipSettings(continue_from="a.mp4", speaker=("a.wav:0:1",))
        other = settings.updated({"image": "a.png", "reference_audio": ("b.wav",)})
        assert (other.continue_from, other.speaker) == (None, ())
        assert other.updated({"continue_from": "a.mp4"}).image is None

    def test_what_is_not_given_of_identity_guidance_is_what_the_adapter_recommends(self):
        assert ClipSettings().resolved(0.5).identity_guidance().config.scale == 0.5
        assert ClipSettings().resolved().identity_guidance_scale == 3.0
        assert ClipSettings(identity_guidance_scale=2.0).resolved(0.5).identity_guidance_scale == 2.0

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--speaker", "a.wav"], ["`speaker` is 'a.wav'", "FILE:START:END"]),
            (["--speaker", "a.wav:2:1"], ["`speaker`", "a.wav:2:1", "rise"]),
            (["--speaker", "a.wav:x:1"], ["`speaker`", "a.wav:x:1"]),
            (["--speaker", "missing.wav:0:1"], ["missing.wav"]),
            (["--speaker", "VOICE:0:1", "--speaker", "VOICE:0.5:2"], ["`speaker`", "0.5"]),
            (["--speaker", "VOICE:0:1", "--reference-audio", "VOICE"], ["`reference_audio`", "`speaker`"]),
            (["--text-window", "0.5:0.2"], ["`text_window`", "0.5:0.2", "smaller"]),
            (["--stg-window", "0.5"], ["`stg_window`", "('0.5' is not two numbers with a colon", "START:STOP"]),
            (["--stg-window", "a:1"], ["`stg_window`", "('a:1' is not two numbers", "START:STOP"]),
            (["--text-window", "0:1,skip=0.4"], ["`text_window`", "('0.4' is not two numbers", "START:STOP"]),
            (["--text-window", "0:1,every"], ["`text_window`", "every is '', no whole number"]),
            (["--modality-window", "0:1,jump=3"], ["`modality_window`", "jump"]),
            (["--identity-window", "0:1,every=0"], ["`identity_window`", "every"]),
            (["--continue-from", "missing.mp4"], ["`continue_from`", "missing.mp4"]),
            (["--continue-from", "VOICE", "--image", "FACE"], ["`image`", "`continue_from`"]),
            (["--continue-from", "VOICE", "--lead-in", 1], ["`lead_in`", "`continue_from`"]),
            (["--sampler", "ddim"], ["`sampler`", "res_2s"]),
            (["--sigma-shift-tokens", "many"], ["`sigma_shift_tokens`", "real"]),
            (["--identity-guidance-mode", "quick"], ["`identity_guidance_mode`", "shared"]),
        ],
    )
    def test_each_wrong_input_is_one_clear_sentence(self, arguments, words, inputs_of, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        inputs = inputs_of()
        for name, path in (("VOICE", inputs[7]), ("FACE", inputs[5])):
            arguments = [str(argument).replace(name, str(path)) for argument in arguments]
        result = invoke("generate", *inputs[:4], "--prompt", "x", *QUICK, "-o", tmp_path / "out.mp4", *arguments)
        assert_one_line_error(result, *words)
        assert leftovers(tmp_path) == []
