"""From a folder of clips to prepared samples: in this process, in two, killed in between."""

import importlib.util
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT

from diffusers_idlora import LTX2IDLoRAPipeline
from diffusers_idlora.media import load_image, read_video
from diffusers_idlora.training.clips import Bucket
from diffusers_idlora.training.prepare import PreparationOptions, prepare_dataset
from diffusers_idlora.training.samples import (
    NEGATIVE_PROMPT_NAME,
    SampleFolder,
    load_sample,
    read_negative_prompt,
    read_sample_metadata,
    write_index,
)
from talking_clips import FPS, NUM_FRAMES, write_clip, write_table


SCRIPT = Path(__file__).parents[1] / "examples" / "train_idlora" / "prepare_dataset.py"
PREPARED_NAMES = ["index.jsonl", "negative_prompt.safetensors", "report.json", "samples"]
SPEAKERS = ["anna", "anna", "ben", "ben", "carl"]


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory):
    """Five clips of three speakers, of whom the last has one clip only."""
    root = tmp_path_factory.mktemp("clips")
    for index in range(len(SPEAKERS)):
        write_clip(root / f"{index}.mp4", index, 1.0 + 0.2 * index, (25.0, 30.0, 24.0, 25.0, 25.0)[index])
    write_table(
        root,
        [
            {"file_name": f"{index}.mp4", "caption": f"clip {index}", "speaker_id": speaker}
            for index, speaker in enumerate(SPEAKERS)
        ],
    )
    return root


@pytest.fixture
def own_clips(clips_folder, tmp_path):
    """A copy of the clips that a test may change."""
    root = tmp_path / "clips"
    root.mkdir()
    for file in clips_folder.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    return root


def options_for(checkpoint, root, output_dir, **changes):
    return PreparationOptions(
        **{
            "pretrained_model_name_or_path": str(checkpoint),
            "output_dir": output_dir,
            "instance_data_root": root,
            "resolution_buckets": (Bucket(64, 64, NUM_FRAMES),),
            "max_sequence_length": 16,
            "dtype": "fp32",
            **changes,
        }
    )


def script_arguments(checkpoint, root, output_dir):
    arguments = f"--resolution_buckets 64x64x{NUM_FRAMES} --max_sequence_length 16 --dtype fp32".split()
    arguments += ["--pretrained_model_name_or_path", checkpoint, "--output_dir", output_dir]
    return [str(argument) for argument in (*arguments, "--instance_data_root", root)]


@pytest.fixture(scope="module")
def prepared(tiny_checkpoint, clips_folder, tmp_path_factory):
    """The clips, prepared once: the folder and the report."""
    output_dir = tmp_path_factory.mktemp("prepared")
    return output_dir, prepare_dataset(options_for(tiny_checkpoint(), clips_folder, output_dir))


class TestPreparation:
    def test_a_folder_of_clips_becomes_samples(self, prepared, clips_folder):
        output_dir, report = prepared
        folder = SampleFolder(output_dir)
        assert [row["source"] for row in folder.rows] == [f"{index}.mp4" for index in range(4)]
        assert folder.shapes == [(3, 2, 2)] * 4
        for sample, row in zip(folder, folder.rows):
            (reference,) = row["reference"]
            assert row["speaker_id"] == SPEAKERS[int(reference["file_name"][0])] and row["split"] == "train"
            assert sample.audio_latents.shape[1] == row["audio_length"] == 17
            assert [clip.shape[1] for clip in sample.reference_latents] == row["reference_lengths"]
        metadata = read_sample_metadata(output_dir / folder.rows[0]["file"])
        assert {
            "num_frames",
            "height",
            "width",
            "caption",
            "source_sha256",
            "settings_hash",
            "package_version",
        } <= set(metadata)
        assert report == json.loads((output_dir / "report.json").read_text())
        assert (report["pairs"], report["speakers"], report["reused"]) == (4, 2, 0)
        assert report["hours"] == pytest.approx(4 * NUM_FRAMES / FPS / 3600)
        assert report["dropped"] == [{"file_name": "4.mp4", "reason": "its speaker 'carl' has no other clip"}]
        assert sorted(path.name for path in output_dir.iterdir()) == PREPARED_NAMES

    def test_datasets_loads_the_index(self, prepared, tmp_path):
        rows = datasets.load_dataset(
            "json", data_files=str(prepared[0] / "index.jsonl"), split="train", cache_dir=str(tmp_path)
        )
        assert rows["caption"] == [f"clip {index}" for index in range(4)]

    @torch.no_grad()
    def test_a_sample_is_what_the_pipeline_makes_of_the_same_sources(self, prepared, clips_folder, tiny_checkpoint):
        pipeline = LTX2IDLoRAPipeline.from_pretrained(tiny_checkpoint())
        folder = SampleFolder(prepared[0])
        sample, row = folder[0], folder.rows[0]
        frames, _, waveform, sampling_rate = read_video(clips_folder / row["source"])

        first = pipeline.encode_image(load_image(frames[0]), 64, 64)
        first = pipeline._normalize_latents(first, pipeline.vae.latents_mean, pipeline.vae.latents_std)
        torch.testing.assert_close(sample.video_latents[:, :1], first[0], atol=1e-5, rtol=1e-5)

        seconds = NUM_FRAMES / FPS
        sound = pipeline.encode_reference_audio((waveform[:, : round(seconds * sampling_rate)], sampling_rate))
        tokens = sound[0].permute(1, 0, 2).flatten(1)[:17]
        tokens = (tokens - pipeline.audio_vae.latents_mean) / pipeline.audio_vae.latents_std
        torch.testing.assert_close(sample.audio_latents.permute(1, 0, 2).flatten(1), tokens, atol=1e-5, rtol=1e-5)

        voice = read_video(clips_folder / row["reference"][0]["file_name"])[2:]
        reference = pipeline.prepare_references([[voice]], [None])
        torch.testing.assert_close(
            sample.reference_latents[0].permute(1, 0, 2).flatten(1), reference.tokens[0], atol=1e-5, rtol=1e-5
        )

        text = pipeline.encode_text_context([row["caption"]], max_sequence_length=16)
        torch.testing.assert_close(sample.video_prompt_embeds, text.video_embeds[0])
        torch.testing.assert_close(sample.audio_prompt_embeds, text.audio_embeds[0])
        assert sample.prompt_attention_mask.tolist() == [1] * 16

    def test_only_what_changed_is_prepared_again(self, own_clips, tiny_checkpoint, tmp_path):
        options = options_for(tiny_checkpoint("ltx-2"), own_clips, tmp_path / "out", dtype="bf16")
        prepare_dataset(options)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "samples").iterdir()}
        assert load_sample(next(iter(before))).video_latents.dtype == torch.bfloat16
        fingerprint = SampleFolder(tmp_path / "out").fingerprint

        assert prepare_dataset(options)["reused"] == 4
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert SampleFolder(tmp_path / "out").fingerprint == fingerprint

        table = own_clips / "metadata.jsonl"
        table.write_text(table.read_text().replace("clip 1", "clip one"))
        assert prepare_dataset(options)["reused"] == 3
        write_clip(own_clips / "0.mp4", seed=7)
        # As a target of its own and as the reference of its speaker's other clip.
        assert prepare_dataset(options)["reused"] == 2
        next(iter(before)).write_bytes(b"damaged")
        assert prepare_dataset(options)["reused"] == 3

    @torch.no_grad()
    def test_the_negative_prompt_is_stored_once_and_a_change_leaves_the_samples(
        self, prepared, own_clips, tiny_checkpoint, tmp_path
    ):
        pipeline = LTX2IDLoRAPipeline.from_pretrained(tiny_checkpoint())

        def assert_stored(folder, text):
            expected = pipeline.encode_text_context([text], max_sequence_length=16)
            found, metadata = read_negative_prompt(folder)
            assert metadata["negative_prompt"] == text and found.attention_mask is None
            torch.testing.assert_close(found.video_embeds, expected.video_embeds)
            torch.testing.assert_close(found.audio_embeds, expected.audio_embeds)

        assert_stored(prepared[0], DEFAULT_NEGATIVE_PROMPT)
        shutil.copytree(prepared[0], tmp_path / "out")
        path = tmp_path / "out" / NEGATIVE_PROMPT_NAME
        before, index = path.stat().st_mtime_ns, (tmp_path / "out" / "index.jsonl").read_text()
        options = options_for(tiny_checkpoint(), own_clips, tmp_path / "out")
        assert prepare_dataset(options)["reused"] == 4 and path.stat().st_mtime_ns == before
        path.write_bytes(b"damaged")
        with pytest.raises(ValueError, match="damaged negative prompt"):
            read_negative_prompt(tmp_path / "out")
        for changed in (options, replace(options, negative_prompt="a robot")):
            assert prepare_dataset(changed)["reused"] == 4
            assert_stored(tmp_path / "out", changed.negative_prompt)
        assert (tmp_path / "out" / "index.jsonl").read_text() == index

    def test_broken_clips_are_reported_and_do_not_stop_the_others(self, own_clips, tiny_checkpoint, tmp_path):
        (own_clips / "noise.mp4").write_bytes(random.Random(0).randbytes(5000))
        (own_clips / "copy.mp4").write_bytes((own_clips / "0.mp4").read_bytes())
        (own_clips / "noise.wav").write_bytes(b"RIFF....WAVE")
        write_clip(own_clips / "short.mp4", seconds=0.4)
        reference = {"noise.mp4": None, "copy.mp4": "0.mp4", "4.mp4": "noise.wav", "short.mp4": None}
        with open(own_clips / "metadata.jsonl", "a") as table:
            for name, voice in reference.items():
                if name == "4.mp4":
                    continue
                row = {"file_name": name, "caption": "x", "speaker_id": "dora", "reference_file_name": voice}
                table.write(json.dumps(row) + "\n")
        text = (own_clips / "metadata.jsonl").read_text()
        text = text.replace('"speaker_id": "carl"', '"speaker_id": "carl", "reference_file_name": "noise.wav"')
        (own_clips / "metadata.jsonl").write_text(text)

        report = prepare_dataset(options_for(tiny_checkpoint(), own_clips, tmp_path / "out"))
        reasons = {one["file_name"]: one["reason"] for one in report["dropped"]}
        assert report["pairs"] == 4 and set(reasons) == set(reference)
        assert "can't be decoded" in reasons["noise.mp4"] and "too short" in reasons["short.mp4"]
        assert reasons["copy.mp4"] == "its reference '0.mp4' is a copy of it"
        assert "`reference_file_name` can't be decoded" in reasons["4.mp4"]

    def test_speakers_are_held_out_whole_and_only_clips_paired_with_themselves(
        self, clips_folder, tiny_checkpoint, tmp_path
    ):
        options = options_for(
            tiny_checkpoint(), clips_folder, tmp_path, validation_speakers=1, allow_same_clip=True, seed=3
        )
        report = prepare_dataset(options)
        assert report["pairs"] == 5 and report["dropped"] == []
        held_out = {row["speaker_id"] for row in SampleFolder(tmp_path, split="validation").rows}
        assert len(held_out) == 1
        assert held_out.isdisjoint(row["speaker_id"] for row in SampleFolder(tmp_path, split="train").rows)
        (own,) = next(row for row in SampleFolder(tmp_path).rows if row["source"] == "4.mp4")["reference"]
        assert own["file_name"] == "4.mp4" and own["start"] >= NUM_FRAMES / FPS and own["end"] <= 1.8 + 0.05

    def test_two_processes_write_the_index_of_one(self, prepared, clips_folder, tiny_checkpoint, tmp_path):
        command = f"{sys.executable} -m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1".split()
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        done = subprocess.run(
            [*command, SCRIPT, *script_arguments(tiny_checkpoint(), clips_folder, tmp_path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Prepared data set") == 1 and "carl" in done.stdout
        assert (tmp_path / "index.jsonl").read_text() == (prepared[0] / "index.jsonl").read_text()
        for row, sample in zip(SampleFolder(tmp_path).rows, SampleFolder(tmp_path)):
            assert torch.equal(sample.video_latents, load_sample(prepared[0] / row["file"]).video_latents)

    def test_a_killed_run_is_finished_by_the_next(self, prepared, clips_folder, tiny_checkpoint, tmp_path):
        arguments = script_arguments(tiny_checkpoint(), clips_folder, tmp_path)
        write_index(tmp_path, SampleFolder(prepared[0]).rows[:1])
        process = subprocess.Popen([sys.executable, SCRIPT, *arguments], stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob(".work/*/*.safetensors"))) < 3:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(ValueError, match="to its end first"):
            SampleFolder(tmp_path)
        (tmp_path / "samples" / ".0123.safetensors").write_bytes(b"half")

        report = prepare_dataset(options_for(tiny_checkpoint(), clips_folder, tmp_path))
        assert report["pairs"] == 4
        assert (tmp_path / "index.jsonl").read_text() == (prepared[0] / "index.jsonl").read_text()
        assert sorted(path.name for path in tmp_path.iterdir()) == PREPARED_NAMES
        assert len(list((tmp_path / "samples").iterdir())) == 4

    def test_the_script_ends_with_one_sentence_and_a_code(self, own_clips, tiny_checkpoint, tmp_path, capsys):
        spec = importlib.util.spec_from_file_location("prepare_dataset", SCRIPT)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)

        def run(*more):
            arguments = script_arguments(tiny_checkpoint(), own_clips, tmp_path / "out")
            return script.main(script.parse_args([*arguments, *more])), capsys.readouterr().err

        for wrong, sentence in (
            (["--caption_column", "text"], "without the column 'text' or 'visual'"),
            (["--resolution_buckets", "60x64x17"], "`resolution_buckets` must have sides"),
            (["--max_sequence_length", "17"], "`max_sequence_length` must be a multiple of 8"),
            (["--pretrained_model_name_or_path", str(tmp_path)], "`pretrained_model_name_or_path`"),
            (["--validation_speakers", "2"], "`validation_speakers` is 2, but of 2 speakers"),
            (["--denoise_command", "cat {in}"], "`denoise_command` must have {out}"),
            (["--denoise_command", "no-such-program {in} {out}"], "'no-such-program', which isn't found"),
            (["--pairs_per_clip", "0"], "`pairs_per_clip` must be at least 1"),
            (["--fps", "0"], "`frame_rate`"),
            (["--instance_data_root", str(tmp_path / "none")], "`instance_data_root` must be a folder"),
        ):
            code, error = run(*wrong)
            assert code == 2 and sentence in error and "Loading pipeline" not in error and "Traceback" not in error
        code, _ = run("--resolution_buckets", "64x64x497")
        assert code == 1 and len(json.loads((tmp_path / "out" / "report.json").read_text())["dropped"]) == 5
