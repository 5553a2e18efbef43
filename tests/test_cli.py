"""The command line, end to end on tiny checkpoints: files in, an mp4 and its record out."""

import dataclasses
import inspect
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from conftest import families
from diffusers_idlora import LTX2IDLoRAPipeline
from diffusers_idlora.cli import app
from diffusers_idlora.generation import Clip, clip_of_row, path_inside
from diffusers_idlora.media import file_sha256, read_video
from diffusers_idlora.settings import ClipSettings, ModelSettings, checked_values


# Small and quick: 2 steps and one pass each, but the real main path.
QUICK = ("--dtype", "float32", "--device", "cpu", "--height", 64, "--width", 64, "--num-frames", 9, "--steps", 2)
QUICK += ("--guidance-scale", 1, "--stg-scale", 0, "--modality-scale", 1, "--max-sequence-length", 16)
LATENT_SECONDS = 0.04


def run(*arguments, **environment):
    """The command in a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "diffusers_idlora.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def invoke(*arguments, **environment):
    """The command in this process, which is quicker."""
    return CliRunner(env=environment).invoke(app, [str(argument) for argument in arguments])


def assert_one_line_error(result, *words):
    """Exit code 2, one line on standard error that holds the words, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def logging_as_found():
    """The command line sets up logging for its process, which here is that of other tests too."""
    names = ("diffusers_idlora", "diffusers", "transformers")
    found = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    handlers = found[0][0].handlers[:]
    yield
    found[0][0].handlers = handlers
    for logger, level in found:
        logger.setLevel(level)


@pytest.fixture(scope="session")
def inputs(tiny_checkpoint, tiny_adapter, face_png, voice_wav):
    """The options that name models and files, for the newer generation."""
    models = ("--base", tiny_checkpoint("ltx-2.3"), "--lora", tiny_adapter("ltx-2.3"))
    return (*models, "--image", face_png, "--reference-audio", voice_wav)


@pytest.fixture(scope="session")
def generated(inputs, tmp_path_factory):
    """An mp4 made in a process of its own with every kind of guidance on."""
    output = tmp_path_factory.mktemp("generated") / "out.mp4"
    arguments = ("--visual", "a face", "--speech", "Hello.", "--num-frames", 17, "--steps", 2, "--seed", 7)
    size = ("--height", 64, "--width", 96, "--max-sequence-length", 16, "--dtype", "float32", "--device", "cpu")
    result = run("generate", *inputs, *arguments, *size, "-o", output)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(output)
    assert result.stderr == ""
    return output


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


class TestPromptsFile:
    def test_both_shapes_of_rows_run_and_a_bad_row_does_not_stop_the_others(self, inputs, tmp_path):
        face, voice = (Path(shutil.copy(inputs[index], tmp_path)) for index in (5, 7))
        rows = [
            {"prompt": "a face", "image": face.name, "output": "first.mp4", "seed": 3},
            {"prompt": "a face", "image": "missing.png"},
            {"prompt": "b", "reference_path": voice.name, "first_frame_path": face.name, "output_name": "sub/last"},
        ]
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder = tmp_path / "clips"
        arguments = ("generate", *inputs[:4], *QUICK, "--seed", 10, "--prompts-file", prompts, "-o", folder)

        result = invoke(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: row 1: `image`") and result.stderr.count("\n") == 1
        assert leftovers(folder) == ["first.json", "first.mp4", "sub"]
        assert leftovers(folder / "sub") == ["last.json", "last.mp4"]
        first, last = (json.loads((folder / name).read_text()) for name in ("first.json", "sub/last.json"))
        assert (first["settings"]["seed"], last["settings"]["seed"]) == (3, 12)
        assert last["settings"]["reference_audio"] == [str(voice)]

        before = file_sha256(folder / "first.mp4")
        rerun = invoke(*arguments, "--seed", 99)
        assert rerun.exit_code == 1
        assert rerun.stdout.count("is already there") == 2
        assert file_sha256(folder / "first.mp4") == before

    def test_a_row_that_fails_in_the_model_does_not_stop_the_others(self, inputs, tmp_path):
        rows = [{"prompt": "a", "stg_blocks": [77], "stg_scale": 1.0}, {"prompt": "b"}]
        prompts = tmp_path / "prompts.json"
        prompts.write_text(json.dumps(rows))
        folder = tmp_path / "clips"
        result = invoke("generate", *inputs[:4], *QUICK, "--prompts-file", prompts, "-o", folder)
        assert result.exit_code == 1
        assert "row 0" in result.stderr and "77" in result.stderr
        assert leftovers(folder) == ["0001.json", "0001.mp4"]

    @pytest.mark.parametrize("name", ["/tmp/x.mp4", "../x.mp4", "a/../../x.mp4", "..\\x.mp4", "C:\\x.mp4", "", "."])
    def test_an_output_outside_of_the_folder_is_refused(self, name, tmp_path):
        with pytest.raises(ValueError, match="`output`"):
            path_inside(tmp_path, name)

    def test_an_output_through_a_symbolic_link_is_refused(self, tmp_path):
        (tmp_path / "clips").mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "clips" / "link").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="symbolic link"):
            path_inside(tmp_path / "clips", "link/x.mp4")

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ({"prompt": "a", "stepz": 3}, "unknown key `stepz`"),
            ({"prompt": "a", "steps": "3"}, "`steps` must be of type int, but it is '3'"),
            ({"prompt": "a", "identity_schedule": "fast"}, "`identity_schedule` must be one of constant"),
            ({"prompt": "a", "speech": "b"}, "`prompt` and `speech`"),
            ({"image": "a.png", "first_frame_path": "b.png"}, "`first_frame_path` and `image`"),
            (["a"], "a row must be an object"),
        ],
    )
    def test_a_wrong_row_is_one_clear_sentence(self, row, words, tmp_path):
        with pytest.raises(ValueError, match=words):
            clip_of_row(row, 0, ClipSettings(seed=0), tmp_path, tmp_path)

    def test_two_rows_may_not_write_the_same_file(self, inputs, tmp_path):
        prompts = tmp_path / "prompts.json"
        prompts.write_text(json.dumps([{"prompt": "", "output": "a"}, {"prompt": "b", "output": "a.mp4"}]))
        result = invoke("generate", *inputs[:4], "--prompts-file", prompts, "-o", tmp_path / "clips")
        assert result.exit_code == 1
        assert "earlier row" in result.stderr.splitlines()[1]


class TestErrors:
    def test_a_mistake_is_one_line_and_exit_code_2_in_a_process_of_its_own(self, tmp_path):
        result = run("generate", "--base", tmp_path / "nowhere", "--prompt", "x", "-o", tmp_path / "out.mp4")
        assert result.returncode == 2
        assert result.stderr.startswith("Error: `base`") and result.stderr.count("\n") == 1
        assert leftovers(tmp_path) == []

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--height", 50], ["`height`", "50", "32"]),
            (["--num-frames", 10], ["`num_frames`", "10", "take 9"]),
            (["--guidance-scale", -1], ["`guidance_scale`", "-1"]),
            (["--stg-scale", "nan"], ["`stg_scale`", "nan"]),
            (["--steps", 0], ["`steps`", "0"]),
            (["--frame-rate", 0], ["`frame_rate`", "0"]),
            (["--sigmas", 0.5, "--sigmas", 0.9], ["`sigmas`", "0.9"]),
            (["--identity-start", 0.5, "--identity-stop", 0.4], ["`start`", "0.5", "0.4"]),
            (["--image", "missing.png"], ["`image`", "missing.png"]),
            (["--reference-audio", "missing.wav"], ["`reference_audio`", "missing.wav"]),
            (["--reference-audio", __file__], ["`reference_audio`", "test_cli.py"]),
            (["--speech", "Hello."], ["`prompt`", "`speech`"]),
            (["--prompt", "[SMELL]: roses"], ["[SMELL]"]),
            (["--device", "abacus"], ["`device`", "abacus"]),
            (["--device", "cpu", "--offload", "model"], ["`offload`", "cpu"]),
            (["--offload", "moon"], ["--offload", "moon"]),
            (["--lora", "missing.safetensors"], ["`lora`", "missing.safetensors"]),
            (["--base", "nobody/nothing"], ["`base`", "nobody/nothing"]),
            (["--output", "out.avi"], ["`output`", "out.avi", ".mp4"]),
            (["--nonsense"], ["--nonsense"]),
        ],
    )
    def test_each_wrong_input_is_one_clear_sentence(self, arguments, words, inputs, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = invoke("generate", *inputs[:4], "--prompt", "x", *QUICK[:4], "-o", "out.mp4", *arguments)
        assert_one_line_error(result, *words)
        assert leftovers(tmp_path) == []

    def test_what_is_missing_is_named(self, inputs, tmp_path):
        output = tmp_path / "out.mp4"
        assert_one_line_error(invoke("generate", *inputs, "--prompt", "x"), "`output`")
        assert_one_line_error(invoke("generate", *inputs, "-o", output), "`prompt`", "--prompt")
        assert_one_line_error(invoke("generate", "--prompt", "x", "-o", output), "`base`", "--base")
        assert_one_line_error(invoke("generate", "--from", tmp_path / "none.json"), "`from`", "none.json")
        assert_one_line_error(
            invoke("generate", "--prompts-file", tmp_path / "no.json", "-o", tmp_path), "`prompts_file`", "no.json"
        )

    def test_a_damaged_checkpoint_is_one_clear_sentence(self, inputs, tmp_path):
        base = Path(shutil.copytree(inputs[1], tmp_path / "base"))
        weights = next((base / "transformer").glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:1000])
        arguments = ("generate", "--base", base, "--prompt", "x", *QUICK, "-o", tmp_path / "out.mp4")
        assert_one_line_error(invoke(*arguments), "`base`", str(base))

    def test_a_reference_without_an_adapter_is_a_warning(self, inputs, tmp_path):
        output = tmp_path / "out.mp4"
        result = invoke("generate", *inputs[:2], *inputs[4:], "--prompt", "x", *QUICK, "-o", output)
        assert result.exit_code == 0, result.output
        assert result.stderr.startswith("Warning: `lora` is not given") and result.stderr.count("\n") == 1

    def test_an_adapter_of_the_other_generation_is_refused(self, inputs, tiny_adapter, tmp_path):
        arguments = (*inputs[:2], "--lora", tiny_adapter("ltx-2"), "--prompt", "x", *QUICK, "-o", tmp_path / "out.mp4")
        assert_one_line_error(invoke("generate", *arguments), "made for")


class TestInspect:
    @families
    def test_shows_what_an_adapter_is(self, family, tiny_adapter):
        result = invoke("inspect", tiny_adapter(family))
        assert result.exit_code == 0, result.output
        assert "audio_attn1.to_q (3)" in result.stdout
        assert "Rank" in result.stdout and "4" in result.stdout
        assert "Made for" in result.stdout.splitlines()[-1]

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
        again = invoke("demo", "-o", output, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert again.exit_code == 0, again.output

    def test_the_older_generation_runs_too_and_what_is_not_its_own_is_kept(self, tmp_path):
        output, cache = tmp_path / "demo.mp4", str(tmp_path / "cache")
        result = invoke("demo", "--family", "ltx2", "-o", output, XDG_CACHE_HOME=cache)
        assert result.exit_code == 0, result.output
        output.write_bytes(b"mine")
        result = invoke("demo", "--family", "ltx2", "-o", output, XDG_CACHE_HOME=cache)
        assert result.exit_code == 2 and "already there" in result.stderr
        assert output.read_bytes() == b"mine"

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
        assert numbers - arguments == {"num_videos_per_prompt", "return_dict"}

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
