"""The command line, end to end on tiny checkpoints: files in, an mp4 and its record out."""

import dataclasses
import inspect
import json
import logging
import os
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
import typer
from typer.testing import CliRunner

from conftest import families
from diffusers_idlora import LTX2IDLoRAPipeline
from diffusers_idlora.adapter_files import save_adapter
from diffusers_idlora.cli import OneLineErrors, app
from diffusers_idlora.generation import Clip, checkpoint_sha256, generate_clip, load_models, read_record
from diffusers_idlora.media import file_sha256, read_video
from diffusers_idlora.prompts_file import clip_of_row, path_inside, read_prompts_file
from diffusers_idlora.settings import ClipSettings, ModelSettings
from diffusers_idlora.values import checked_values


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


def one_command(function):
    """A command line of the same kind that only runs the function."""
    other = typer.Typer(cls=OneLineErrors)
    other.callback()(lambda: None)
    other.command("run")(lambda: function() and None)
    return other


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


def copied(generated, folder, with_mp4=True):
    """The generated clip's record, and its mp4 too, under the same names in another folder."""
    if with_mp4:
        shutil.copy(generated, folder)
    return Path(shutil.copy(generated.with_suffix(".json"), folder))


def generated_base(generated):
    return read_record(generated.with_suffix(".json"))[0].base


def quick_record(generated, folder):
    """The record of a clip as quick to make as `QUICK`, beside no mp4."""
    record = json.loads(generated.with_suffix(".json").read_text())
    record["settings"] |= {"num_frames": 9, "width": 64, "guidance_scale": 1.0, "audio_guidance_scale": 1.0}
    record["settings"] |= {"stg_scale": 0.0, "modality_scale": 1.0}
    path = folder / "again.json"
    path.write_text(json.dumps(record))
    return path


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

    def test_rows_that_cannot_even_be_looked_at_do_not_stop_the_others(self, inputs, tmp_path):
        rows = [
            json.dumps({"prompt": "a", "output_name": "x" * 300}),
            '{"prompt": "a", "guidance_scale": 1' + "0" * 400 + "}",
            '{"prompt": "a", "seed": 1' + "0" * 400 + "}",
            "[" * 100_000,
            "null",
            json.dumps({"prompt": "a", "output_name": "\0"}),
            json.dumps({"prompt": "a", "output_name": "\ud800"}),
            json.dumps({"prompt": "a", "image": "x" * 300}),
            json.dumps({"prompt": "\ud800"}),
            json.dumps({"prompt": "a\u2028b\u0085c", "num-frames": 9, "output": "v1.0"}, ensure_ascii=False),
        ]
        prompts = tmp_path / "prompts.jsonl"
        # The deep row must not stand first, where it would look like a JSON list.
        prompts.write_text("\n".join(rows))
        folder = tmp_path / "clips"
        result = invoke("generate", *inputs[:4], *QUICK, "--prompts-file", prompts, "-o", folder)
        assert result.exit_code == 1
        lines = result.stderr.splitlines()
        assert [line.split(":")[1].strip() for line in lines] == [f"row {index}" for index in range(9)]
        for line, word in zip(
            lines, ("output", "guidance_scale", "seed", "JSON", "None", "output", "output", "image")
        ):
            assert word in line and len(line) < 1000
        assert "`prompt`" in lines[8] and "UTF-8" in lines[8]
        assert leftovers(folder) == ["v1.0.json", "v1.0.mp4"]
        assert read_record(folder / "v1.0.json")[1].prompt == "a\u2028b\u0085c"

    def test_an_mp4_without_a_matching_record_is_taken_for_the_users(self, generated, inputs, tmp_path):
        prompts = tmp_path / "prompts.json"
        prompts.write_text(json.dumps([{"prompt": "a", "output": "out"}]))
        folder = tmp_path / "clips"
        folder.mkdir()
        copied(generated, folder)
        (folder / "out.mp4").write_bytes(b"mine")
        result = invoke("generate", *inputs[:4], "--prompts-file", prompts, "-o", folder)
        assert result.exit_code == 1
        for word in ("row 0", "out.mp4 is already there", "move it away", "--overwrite"):
            assert word in result.stderr
        assert (folder / "out.mp4").read_bytes() == b"mine"

    def test_a_run_killed_between_record_and_mp4_is_finished_by_the_next(self, inputs, tmp_path):
        prompts = tmp_path / "prompts.json"
        prompts.write_text(json.dumps([{"prompt": "a", "output": "out"}]))
        folder = tmp_path / "clips"
        arguments = ("generate", *inputs[:4], *QUICK, "--prompts-file", prompts, "-o", folder)
        assert invoke(*arguments).exit_code == 0
        (folder / "out.mp4").unlink()
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        assert leftovers(folder) == ["out.json", "out.mp4"]
        assert invoke(*arguments).stdout == f"{folder / 'out.mp4'} is already there\n"

    def test_a_changed_row_that_is_already_there_is_a_warning(self, generated, inputs, tmp_path):
        prompts = tmp_path / "prompts.json"
        prompts.write_text(json.dumps([{"prompt": "a", "output": "out"}]))
        folder = tmp_path / "clips"
        folder.mkdir()
        copied(generated, folder)
        result = invoke("generate", *inputs[:4], "--steps", 9, "--prompts-file", prompts, "-o", folder)
        assert result.exit_code == 0 and "is already there" in result.stdout
        assert result.stderr.startswith("Warning: row 0") and result.stderr.count("\n") == 1
        for word in ("steps", "prompt", "--overwrite"):
            assert word in result.stderr
        assert "seed" not in result.stderr

    def test_only_line_feeds_separate_rows_and_blank_lines_are_no_rows(self, tmp_path):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\r\n  \nnull\n'.encode())
        assert read_prompts_file(prompts) == [{"prompt": "a\u2028b"}, None]

    def test_a_row_that_fails_in_the_model_does_not_stop_the_others(self, inputs, tmp_path):
        rows = [{"prompt": "a", "stg_blocks": [77], "stg_scale": 1.0}, {"prompt": "b"}]
        prompts = tmp_path / "prompts.json"
        prompts.write_text(json.dumps(rows))
        folder = tmp_path / "clips"
        result = invoke("generate", *inputs[:4], *QUICK, "--prompts-file", prompts, "-o", folder)
        assert result.exit_code == 1
        assert "row 0: `stg_blocks`" in result.stderr and "77" in result.stderr
        assert leftovers(folder) == ["0001.json", "0001.mp4"]

    @pytest.mark.parametrize(
        "name", ["/tmp/x.mp4", "../x.mp4", "a/../../x.mp4", "..\\x.mp4", "C:\\x.mp4", "", ".", "~/x"]
    )
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
            ({"image": "a.png", "first_frame_path": "b.png"}, "`image` is given twice, once as `first_frame_path`"),
            ({"prompt": "a", "num-frames": 9, "num_frames": 9}, "`num_frames` is given twice"),
            ({"prompt": "a", "guidance_batching": "fast"}, "`guidance_batching` must be one of sequential, packed or"),
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
        prompts.write_text(json.dumps([{"prompt": "", "output": "s.mp4"}, {"prompt": "b", "output": "s.MP4"}]))
        result = invoke("generate", *inputs[:4], "--prompts-file", prompts, "-o", tmp_path / "clips")
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
            (["--frame-rate", 2000], ["`frame_rate`", "1000", "2000"]),
            (["--height", 10**9], ["`height`", "8192"]),
            (["--num-frames", 8 * 10**9 + 1], ["`num_frames`", "10001"]),
            (["--steps", 10**14], ["`steps`", "10000"]),
            (["--max-sequence-length", 8 * 10**10], ["`max_sequence_length`", "16384"]),
            (["--seed", 2**63], ["`seed`"]),
            (["--lora-scale", "nan"], ["`lora_scale`", "nan"]),
            (["--image-crf", 52], ["`image_crf`", "51"]),
            (["--image-crf", "best"], ["`image_crf`", "default"]),
            (["--guidance-batching", 0], ["`guidance_batching`", "0"]),
            (["--identity-stop", 1.5], ["`identity_stop`", "1.5"]),
            (["--prompt", "a\udcff"], ["`prompt`", "UTF-8"]),
            (["--device", "meta"], ["`device`", "meta"]),
            (["--lora", ""], ["`lora`", "empty"]),
            (["--lora", "x" * 300], ["`lora`"]),
            (["--image", "x" * 300], ["`image`"]),
            (["--output", ""], ["`output`", "''"]),
            (["--output", "x" * 300 + ".mp4"], ["`output`", "250"]),
            (["--sigmas", 0.5, "--sigmas", 0.9], ["`sigmas`", "0.9"]),
            (["--identity-start", 0.5, "--identity-stop", 0.4], ["`identity_start`", "`identity_stop`", "0.5", "0.4"]),
            (["--image", "missing.png"], ["`image`", "missing.png"]),
            (["--reference-audio", "missing.wav"], ["`reference_audio`", "missing.wav"]),
            (["--reference-audio", __file__], ["`reference_audio`", "test_cli.py"]),
            (["--speech", "Hello."], ["`prompt`", "`speech`"]),
            (["--prompt", "[SMELL]: roses"], ["[SMELL]"]),
            (["--device", "abacus"], ["`device`", "abacus"]),
            (["--device", "cpu", "--offload", "model"], ["`offload`", "cpu"]),
            (["--offload", "moon"], ["`offload`", "moon", "sequential"]),
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

    def test_a_pipeline_of_another_class_is_one_clear_sentence(self, inputs, tmp_path):
        base = Path(shutil.copytree(inputs[1], tmp_path / "base"))
        index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
        (base / "model_index.json").write_text(json.dumps(index))
        result = invoke("generate", "--base", base, "--prompt", "x", *QUICK, "-o", tmp_path / "out.mp4")
        assert_one_line_error(result, "`base`", str(base), "StableDiffusionPipeline")

    def test_an_adapter_is_called_what_the_command_calls_it(self, inputs, tiny_adapter, tmp_path):
        base, lora = inputs[1], tiny_adapter("ltx-2")
        result = invoke("generate", "--base", base, "--lora", lora, "--prompt", "x", "-o", tmp_path / "a.mp4")
        assert_one_line_error(result, "`lora`")
        folder = tmp_path / "several"
        folder.mkdir()
        for name in ("a", "b"):
            shutil.copy(lora, folder / f"{name}.safetensors")
        result = invoke("generate", "--base", base, "--lora", folder, "--prompt", "x", "-o", tmp_path / "a.mp4")
        assert_one_line_error(result, "`lora_weight_name`")
        assert_one_line_error(invoke("inspect", folder), "`ADAPTER`", "`weight_name`")

    @pytest.mark.parametrize(
        "change",
        [
            {"models": None},
            {"settings": {"steps": "many"}},
            {"settings": {"unknown": 1}},
            {"files": {"image": [{"path": "a"}]}},
            {"files": [1]},
            {"output": {}},
            {"versions": None},
        ],
    )
    def test_a_malformed_record_is_one_clear_sentence_that_names_it(self, change, generated, tmp_path):
        record = json.loads(generated.with_suffix(".json").read_text())
        path = tmp_path / "record.json"
        path.write_text(json.dumps(record | change))
        assert_one_line_error(invoke("generate", "--from", path, "-o", tmp_path / "o.mp4"), "`from`", str(path))
        path.write_text("[" * 100_000)
        assert_one_line_error(invoke("generate", "--from", path, "-o", tmp_path / "o.mp4"), "`from`", str(path))

    @pytest.mark.parametrize("allocate", [lambda: bytearray(2**62), lambda: torch.empty(2**50)])
    def test_memory_that_runs_out_is_one_line_and_exit_code_1(self, allocate):
        result = CliRunner().invoke(one_command(allocate), ["run"])
        assert result.exit_code == 1
        assert "memory is full" in result.stderr and result.stderr.count("\n") == 1

    def test_help_cuts_no_name_of_an_option_in_a_terminal_of_80_columns(self):
        for command in ("generate", "demo", "inspect"):
            result = invoke(command, "--help", COLUMNS="80", TERMINAL_WIDTH="80")
            assert result.exit_code == 0 and "…" not in result.stdout
        words = invoke("generate", "--help", COLUMNS="80", TERMINAL_WIDTH="80").stdout.split()
        for field in (*dataclasses.fields(ModelSettings), *dataclasses.fields(ClipSettings)):
            assert f"--{field.name.replace('_', '-')}" in words

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
