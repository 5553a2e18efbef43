"""The command line, end to end on tiny checkpoints: files in, an mp4 and its record out."""

import dataclasses
import inspect
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

from command_line import (
    LATENT_SECONDS,
    QUICK,
    assert_one_line_error,
    copied,
    generated_base,
    invoke,
    leftovers,
    quick_record,
    run,
)
from conftest import families
from diffusers_idlora import LTX2IDLoRAPipeline
from diffusers_idlora.adapter_files import save_adapter
from diffusers_idlora.generation import Clip, checkpoint_sha256, generate_clip, load_models, read_record
from diffusers_idlora.media import file_sha256, load_image, read_video
from diffusers_idlora.settings import ClipSettings, ModelSettings
from diffusers_idlora.values import checked_values


pytest_plugins = ["command_line_fixtures"]


class TestGenerate:
    def test_mp4_has_the_frames_the_size_and_the_rate_that_were_asked_for(self, generated):
        frames, frame_rate, _, _ = read_video(generated)
        assert frames.shape == (17, 64, 96, 3)
        assert frame_rate == 25.0

    def test_sound_is_as_long_as_the_video_to_within_one_latent(self, generated):
        with av.open(str(generated)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            seconds = [float(stream.duration * stream.time_base) for stream in (video, audio)]
        assert abs(seconds[0] - seconds[1]) <= LATENT_SECONDS
        assert read_video(generated)[2].abs().max() > 0

    def test_mp4_says_that_it_is_synthetic(self, generated):
        with av.open(str(generated)) as container:
            comment = container.metadata["comment"]
        assert comment.startswith("Synthetic media") and "diffusers_idlora" in comment and "LTX-2" in comment

    def test_record_holds_settings_seed_versions_and_hashes(self, generated, inputs):
        record = json.loads(generated.with_suffix(".json").read_text())
        assert set(record["settings"]) == {field.name for field in dataclasses.fields(ClipSettings)}
        assert set(record["models"]) == {field.name for field in dataclasses.fields(ModelSettings)}
        assert record["settings"]["seed"] == 7
        assert record["settings"]["negative_prompt"].startswith("blurry")
        assert record["models"]["base"] == str(inputs[1])
        assert set(record["versions"]) == {
            "python",
            "diffusers-idlora",
            "diffusers",
            "torch",
            "transformers",
            "peft",
        }
        paths = {"lora": inputs[3], "image": inputs[5], "reference_audio": inputs[7]}
        expected = {name: [{"path": str(path), "sha256": file_sha256(path)}] for name, path in paths.items()}
        assert len(record["files"].pop("base")) == 1
        assert record["files"] == expected
        assert record["output"]["sha256"] == file_sha256(generated)
        assert (record["output"]["num_frames"], record["output"]["width"], record["output"]["height"]) == (17, 96, 64)

    def test_nothing_else_is_left_in_the_folder(self, generated):
        assert {"out.json", "out.mp4"} <= set(leftovers(generated.parent))
        assert not [name for name in leftovers(generated.parent) if name.startswith(".")]

    def test_from_its_record_the_clip_is_made_again_bit_for_bit(self, generated, tmp_path):
        again = tmp_path / "again.mp4"
        result = run("generate", "--from", generated.with_suffix(".json"), "-o", again)
        assert result.returncode == 0, result.stderr
        for first, second in zip(read_video(generated), read_video(again)):
            assert np.array_equal(first, second)

    def test_an_option_beside_the_record_replaces_its_own(self, generated, tmp_path):
        other = tmp_path / "other.mp4"
        record = generated.with_suffix(".json")
        result = invoke("generate", "--from", record, "-o", other, *QUICK[-6:], "--num-frames", 9, "--seed", 8)
        assert result.exit_code == 0, result.output
        settings = json.loads(other.with_suffix(".json").read_text())["settings"]
        assert (settings["seed"], settings["num_frames"], settings["speech"]) == (8, 9, "Hello.")

    def test_a_changed_input_is_named_and_accepted_only_with_force(self, generated, face_png, tmp_path):
        face = shutil.copy(face_png, tmp_path / "face.png")
        record = json.loads(generated.with_suffix(".json").read_text())
        record["settings"] |= {"image": str(face), "num_frames": 9, "stg_scale": 0.0, "modality_scale": 1.0}
        path = tmp_path / "record.json"
        path.write_text(json.dumps(record))
        PIL.Image.new("RGB", (64, 64), "green").save(face)
        arguments = ("generate", "--from", path, "-o", tmp_path / "out.mp4")
        assert_one_line_error(invoke(*arguments), "`image`", str(face), "--force")
        result = invoke(*arguments, "--force")
        assert result.exit_code == 0, result.output

    def test_an_existing_result_is_replaced_only_when_asked_to(self, inputs, tmp_path):
        output = tmp_path / "mine.mp4"
        output.write_bytes(b"mine")
        arguments = ("generate", *inputs, "--prompt", "a face", *QUICK, "-o", output)
        assert_one_line_error(invoke(*arguments), "`output`", str(output), "--overwrite")
        assert leftovers(tmp_path) == ["mine.mp4"] and output.read_bytes() == b"mine"
        result = invoke(*arguments, "--overwrite")
        assert result.exit_code == 0, result.output
        assert len(read_video(output)[0]) == 9

    def test_from_a_record_whose_mp4_is_gone_the_mp4_is_made_beside_it(self, generated, tmp_path):
        path = quick_record(generated, tmp_path)
        result = invoke("generate", "--from", path)
        assert result.exit_code == 0, result.output
        assert leftovers(tmp_path) == ["again.json", "again.mp4"]
        assert Clip(read_record(path)[1], tmp_path / "again.mp4").is_done
        assert_one_line_error(invoke("generate", "--from", path), "`output`", "already there", "--overwrite")

    def test_a_record_of_other_settings_is_not_replaced(self, generated, tmp_path):
        path = quick_record(generated, tmp_path)
        before = path.read_bytes()
        assert_one_line_error(invoke("generate", "--from", path, "--seed", 8), "again.json is already there")
        assert path.read_bytes() == before

    def test_a_file_that_appears_meanwhile_is_left_alone(self, inputs, tmp_path):
        models = ModelSettings(base=str(inputs[1]), dtype="float32", device="cpu")
        settings = ClipSettings(prompt="x", height=64, width=64, num_frames=9, steps=2, max_sequence_length=16)
        clip = Clip(settings, tmp_path / "out.mp4")
        clip.check()

        def report(stage, done, total):
            if stage == "Writing":
                clip.output.write_bytes(b"mine")

        with pytest.raises(ValueError, match="`output` .*out.mp4 or its record has appeared meanwhile"):
            generate_clip(load_models(models), models, clip, report)
        assert leftovers(tmp_path) == ["out.mp4"] and clip.output.read_bytes() == b"mine"

    def test_a_full_disk_is_one_clear_sentence_that_names_the_output(self, inputs, tmp_path):
        found = resource.getrlimit(resource.RLIMIT_FSIZE)
        arguments = ("generate", *inputs[:4], "--prompt", "x", *QUICK, "-o", tmp_path / "out.mp4")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, found[1]))
        try:
            result = invoke(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, found)
        assert_one_line_error(result, "`output`", str(tmp_path / "out.mp4"), "cannot be written")
        assert leftovers(tmp_path) == []

    def test_a_dangling_link_is_already_there(self, inputs, tmp_path):
        output = tmp_path / "out.mp4"
        output.symlink_to(tmp_path / "nowhere.mp4")
        assert_one_line_error(invoke("generate", *inputs, "--prompt", "x", "-o", output), "`output`", "already there")
        assert output.is_symlink()

    def test_names_that_are_not_text_are_kept_as_they_are(self, inputs, tmp_path):
        face = Path(shutil.copy(inputs[5], os.path.join(tmp_path, "f\udcff.png")))
        folder = tmp_path / "clips\udcff"
        arguments = (*inputs[:4], *inputs[6:], "--image", face, "--prompt", "x", *QUICK, "-o", folder / "o\udcff.mp4")
        result = invoke("generate", *arguments)
        assert result.exit_code == 0, result.output
        assert result.stdout_bytes.endswith(b"clips\xff/o\xff.mp4\n")
        assert read_record(folder / "o\udcff.json")[1].image == str(face)

    def test_a_home_folder_is_understood_in_every_path(self, inputs, generated, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        copied(generated, tmp_path)
        (tmp_path / "base").symlink_to(inputs[1])
        for path in (inputs[3], inputs[5]):
            shutil.copy(path, tmp_path)
        arguments = ("--base", "~/base", "--lora", f"~/{inputs[3].name}", "--image", f"~/{inputs[5].name}", *QUICK)
        result = invoke("generate", *arguments, "--prompt", "x", "-o", "~/new/x.mp4")
        assert result.exit_code == 0, result.output
        assert leftovers(tmp_path / "new") == ["x.json", "x.mp4"]
        assert_one_line_error(invoke("generate", "--from", "~/out.json"), str(tmp_path / "out.mp4"))
        assert_one_line_error(invoke("generate", "--prompts-file", "~/no.jsonl", "-o", "~/x"), str(tmp_path))

    def test_words_and_numbers_are_told_apart_where_both_will_do(self, inputs, tmp_path):
        output = tmp_path / "out.mp4"
        options = ("--guidance-batching", 2, "--image-crf", "default")
        result = invoke("generate", *inputs, "--prompt", "x", *QUICK, *options, "-o", output)
        assert result.exit_code == 0, result.output
        settings = read_record(output.with_suffix(".json"))[1]
        assert (settings.guidance_batching, settings.image_crf) == (2, "default")
        assert settings.call_arguments()["image_crf"] is None

    def test_a_changed_base_is_noticed(self, generated, inputs, tmp_path):
        base = Path(shutil.copytree(inputs[1], tmp_path / "base"))
        assert checkpoint_sha256(base) == checkpoint_sha256(inputs[1])
        record = json.loads(generated.with_suffix(".json").read_text())
        record["models"]["base"] = str(base)
        path = tmp_path / "record.json"
        path.write_text(json.dumps(record))
        config = base / "scheduler" / "scheduler_config.json"
        config.write_text(config.read_text().replace("0.95", "0.96"))
        result = invoke("generate", "--from", path, "-o", tmp_path / "out.mp4")
        assert_one_line_error(result, "`base`", str(base), "has changed", "--force")

    def test_the_recorded_commit_of_the_base_is_the_one_that_is_loaded(self, generated, tmp_path):
        record = json.loads(generated.with_suffix(".json").read_text())
        record["models"] |= {"base": "nobody/nothing", "base_revision": "0" * 40}
        path = tmp_path / "record.json"
        path.write_text(json.dumps(record))
        cache = tmp_path / "hub" / "models--nobody--nothing" / "snapshots" / ("0" * 40)
        shutil.copytree(generated_base(generated), cache)
        result = run(
            *("generate", "--from", path, *QUICK[-6:], "-o", tmp_path / "out.mp4"),
            HF_HUB_CACHE=str(tmp_path / "hub"),
            HF_HUB_OFFLINE="1",
        )
        assert result.returncode == 0, result.stderr
        assert read_record(tmp_path / "out.json")[0].base_revision == "0" * 40

    def test_an_input_is_never_written_over(self, generated, inputs, tmp_path):
        video = shutil.copy(generated, tmp_path / "voice.mp4")
        result = invoke(
            "generate", *inputs[:6], "--reference-audio", video, "--prompt", "x", "-o", video, "--overwrite"
        )
        assert_one_line_error(result, "`output`", "input")
        assert file_sha256(video) == file_sha256(generated)

    def test_several_clips_of_one_speaker_are_taken_together(self, inputs, voice_wav, tmp_path):
        output = tmp_path / "out.mp4"
        second = shutil.copy(voice_wav, tmp_path / "second.wav")
        result = invoke("generate", *inputs, "--reference-audio", second, "--prompt", "a face", *QUICK, "-o", output)
        assert result.exit_code == 0, result.output
        files = json.loads(output.with_suffix(".json").read_text())["files"]["reference_audio"]
        assert [file["path"] for file in files] == [str(voice_wav), str(second)]

    def test_a_random_seed_is_recorded(self, inputs, tmp_path):
        result = invoke("generate", *inputs[:4], "--prompt", "a face", *QUICK, "-o", tmp_path / "out.mp4")
        assert result.exit_code == 0, result.output
        assert isinstance(json.loads((tmp_path / "out.json").read_text())["settings"]["seed"], int)

    def test_interrupted_it_leaves_nothing_behind(self, inputs, tmp_path):
        arguments = ("generate", *inputs, "--prompt", "a face", *QUICK, "--steps", 5000, "--verbose")
        process = subprocess.Popen(
            [sys.executable, "-m", "diffusers_idlora.cli", *map(str, arguments), "-o", str(tmp_path / "out.mp4")],
            stderr=subprocess.PIPE,
            text=True,
            # A shell that runs the tests in the background lets its children ignore the signal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        for line in process.stderr:
            if "Denoising: 1 of 5000" in line:
                break
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate()
        assert process.returncode == 130
        assert "Traceback" not in rest
        assert leftovers(tmp_path) == []


class TestInspect:
    @families
    def test_shows_what_an_adapter_is(self, family, tiny_adapter):
        result = invoke("inspect", tiny_adapter(family))
        assert result.exit_code == 0, result.output
        assert "audio_attn1.to_q (3)" in result.stdout
        assert "Rank" in result.stdout and "4" in result.stdout
        assert "Made for" in result.stdout.splitlines()[-1]

    @pytest.mark.parametrize(("widths", "words"), [((4096, 2048), "LTX-2 or LTX-2.3"), ((4096, 1024), "not name")])
    def test_says_where_the_shapes_fit_both_generations(self, widths, words, tmp_path):
        weights = {}
        for module, width in zip(("attn1", "audio_attn1"), widths):
            for side, shape in (("A", (2, width)), ("B", (width, 2))):
                weights[f"diffusion_model.transformer_blocks.0.{module}.to_q.lora_{side}.weight"] = torch.ones(shape)
        path = save_adapter(tmp_path / "lora.safetensors", weights)
        assert words in invoke("inspect", path).stdout.splitlines()[-1]

    def test_a_file_that_is_no_adapter_is_one_clear_sentence(self, voice_wav):
        assert_one_line_error(invoke("inspect", voice_wav), str(voice_wav), "safetensors")


class TestDemo:
    def test_in_a_fresh_place_it_makes_a_video_and_may_repeat_it(self, tmp_path):
        output = tmp_path / "outputs" / "demo.mp4"
        result = run("demo", "-o", output, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert result.returncode == 0, result.stderr
        assert "random" in result.stdout and str(output) in result.stdout
        frames, frame_rate, waveform, sampling_rate = read_video(output)
        assert frames.shape[1:] == (128, 128, 3) and frames.std() > 0
        assert abs(len(frames) / frame_rate - waveform.shape[1] / sampling_rate) < 0.1
        assert result.stderr == ""
        with_reference, without = map(
            float, re.search(r"stranger's\): (\S+) with .* (\S+) without", result.stdout).groups()
        )
        assert with_reference > 0.7 and abs(without) < 0.3
        assert load_image(output.with_suffix(".png")).size[0] > 300
        for weights in (tmp_path / "cache").rglob("*.safetensors"):
            weights.write_bytes(b"damaged")
        again = invoke("demo", "-o", output, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert again.exit_code == 0, again.output
        assert len(leftovers(tmp_path / "cache" / "diffusers_idlora")) == 1

    def test_two_first_runs_at_once_share_one_cache(self, tmp_path):
        with ThreadPoolExecutor(2) as pool:
            results = pool.map(
                lambda name: run("demo", "-o", tmp_path / name, XDG_CACHE_HOME=str(tmp_path / "cache")),
                ("a.mp4", "b.mp4"),
            )
        for result in results:
            assert result.returncode == 0, result.stderr
        assert len(leftovers(tmp_path / "cache" / "diffusers_idlora")) == 1

    def test_a_cache_that_cannot_be_written_is_one_clear_sentence(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        result = invoke("demo", "-o", tmp_path / "demo.mp4", XDG_CACHE_HOME=str(tmp_path / "file"))
        assert_one_line_error(result, str(tmp_path / "file"), "XDG_CACHE_HOME")

    def test_the_older_generation_runs_too_and_what_is_not_its_own_is_kept(self, tmp_path):
        output, cache = tmp_path / "demo.mp4", str(tmp_path / "cache")
        result = invoke("demo", "--family", "ltx2", "-o", output, XDG_CACHE_HOME=cache)
        assert result.exit_code == 0, result.output
        output.write_bytes(b"mine")
        result = invoke("demo", "--family", "ltx2", "-o", output, XDG_CACHE_HOME=cache)
        assert result.exit_code == 2 and "already there" in result.stderr
        assert output.read_bytes() == b"mine"
        result = invoke("demo", "--family", "ltx2", "--overwrite", "-o", output, XDG_CACHE_HOME=cache)
        assert result.exit_code == 0, result.output

    def test_a_picture_of_that_name_is_kept(self, tmp_path):
        (tmp_path / "demo.png").write_bytes(b"mine")
        result = invoke("demo", "-o", tmp_path / "demo.mp4", XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert_one_line_error(result, "demo.png", "--overwrite")
        assert (tmp_path / "demo.png").read_bytes() == b"mine" and not (tmp_path / "demo.mp4").exists()

    def test_an_unknown_family_is_one_clear_sentence(self, tmp_path):
        result = invoke(
            "demo", "--family", "ltx-9", "-o", tmp_path / "demo.mp4", XDG_CACHE_HOME=str(tmp_path / "cache")
        )
        assert_one_line_error(result, "`family`", "ltx-9")
        assert leftovers(tmp_path) == []


class TestSettings:
    def test_defaults_are_those_of_the_pipeline(self):
        parameters = inspect.signature(LTX2IDLoRAPipeline.__call__).parameters
        for field in dataclasses.fields(ClipSettings):
            if field.metadata["in_call"]:
                default = parameters[field.metadata["argument"] or field.name].default
                assert (None if field.default == () else field.default) == default, field.name

    def test_no_number_of_the_pipeline_is_out_of_reach(self):
        arguments = {field.metadata["argument"] or field.name for field in dataclasses.fields(ClipSettings)}
        parameters = inspect.signature(LTX2IDLoRAPipeline.__call__).parameters.values()
        numbers = {parameter.name for parameter in parameters if type(parameter.default) in (int, float, bool)}
        # The last is an option of the run.
        assert numbers - arguments == {"num_videos_per_prompt", "return_dict", "freeze_audio", "guidance_parallel"}

    def test_json_round_trip_is_exact(self):
        settings = ClipSettings(prompt="a", sigmas=(1.0, 0.1), stg_blocks=(1, 2), reference_audio=("a", "b"), seed=3)
        record = json.loads(json.dumps(dataclasses.asdict(settings)))
        assert ClipSettings(**checked_values(ClipSettings, record)) == settings

    def test_a_prompt_replaces_the_parts_and_a_part_replaces_the_prompt(self):
        parts = ClipSettings(visual="a", speech="b")
        assert str(parts.updated({"speech": "c"}).full_prompt()) == "[VISUAL]: a [SPEECH]: c"
        assert parts.updated({"prompt": "whole"}).full_prompt() == "whole"
        assert str(ClipSettings(prompt="whole").updated({"sounds": "d"}).full_prompt()) == "[SOUNDS]: d"

    def test_the_record_lies_beside_the_clip(self, tmp_path):
        clip = Clip(ClipSettings(), tmp_path / "a.mp4")
        assert clip.record == tmp_path / "a.json" and not clip.is_done
