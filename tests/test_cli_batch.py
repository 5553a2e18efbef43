"""Prompts files on the command line: many clips, shared encodings, several processes."""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from command_line import QUICK, assert_one_line_error, copied, invoke, launch, leftovers
from diffusers_idlora.batch import generate_clips
from diffusers_idlora.generation import Clip, load_models, read_record
from diffusers_idlora.media import file_sha256
from diffusers_idlora.prompts_file import RowSharing, clip_of_row, path_inside, read_prompts_file
from diffusers_idlora.settings import ClipSettings, ModelSettings


pytest_plugins = ["command_line_fixtures"]


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
            ({"prompt": "a", "recipe": "hq"}, "`recipe` is for all rows; .* give `--recipe`"),
            ({"prompt": "a", "distilled-lora": "x"}, "`distilled_lora` is for all rows; .* give `--distilled-lora`"),
            ({"prompt": "a", "steps": "3"}, "`steps` must be of type int, but it is '3'"),
            ({"prompt": "a", "identity_schedule": "fast"}, "`identity_schedule` must be one of constant"),
            ({"prompt": "a", "speech": "b"}, "`prompt` and `speech`"),
            ({"image": "a.png", "first_frame_path": "b.png"}, "`image` is given twice, once as `first_frame_path`"),
            ({"prompt": "a", "num-frames": 9, "num_frames": 9}, "`num_frames` is given twice"),
            (
                {"prompt": "a", "guidance_batching": "fast"},
                "`guidance_batching` must be one of sequential, packed, auto or",
            ),
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


@contextmanager
def no_report():
    yield lambda stage, done, total: None


@pytest.fixture(scope="module")
def models(inputs):
    return ModelSettings(base=str(inputs[1]), lora=str(inputs[3]), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def pipe(models):
    return load_models(models)


@pytest.fixture(scope="module")
def settings(inputs):
    """Three clips: one face and one voice, and two of them one prompt."""
    shared = {"image": str(inputs[5]), "reference_audio": (str(inputs[7]),), "height": 64, "width": 64}
    shared |= {"num_frames": 9, "steps": 2, "stg_scale": 0.0, "modality_scale": 1.0, "max_sequence_length": 16}
    return [ClipSettings(prompt=prompt, seed=seed, **shared) for seed, prompt in enumerate(("a", "b", "a"))]


@pytest.fixture(scope="module")
def single_runs(models, settings, tmp_path_factory):
    """SHA-256 of each clip, made with models of its own."""
    folder, hashes = tmp_path_factory.mktemp("single"), []
    for item in settings:
        clip = Clip(item, folder / f"{item.seed}.mp4")
        assert list(generate_clips(load_models(models), models, {0: clip}, no_report)) == [(0, None)]
        hashes.append(file_sha256(clip.output))
    return hashes


@pytest.fixture
def parts_run(pipe):
    """Which parts of the models run, in their order; a part that runs several times in a row counts once."""
    parts = {"text encoder": pipe.text_encoder, "connectors": pipe.connectors, "transformer": pipe.transformer}
    parts |= {"face": pipe.vae.encoder, "voice": pipe.audio_vae.encoder, "picture": pipe.vae.decoder}
    parts |= {"sound": pipe.vocoder}
    runs = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: runs.append(name) if runs[-1:] != [name] else None)
        for name, module in parts.items()
    ]
    pipe.__dict__.pop("_encodings", None)
    yield runs
    for hook in hooks:
        hook.remove()


def clips_in(folder, settings):
    return {index: Clip(item, folder / f"{index}.mp4") for index, item in enumerate(settings)}


def hashes_of(clips):
    return [file_sha256(clip.output) for clip in clips.values()]


class TestSharedEncodings:
    def test_one_by_one_what_clips_share_is_encoded_once_and_the_clips_are_those_of_single_runs(
        self, pipe, models, settings, single_runs, parts_run, tmp_path
    ):
        clips = clips_in(tmp_path, settings)
        for index, clip in clips.items():
            assert list(generate_clips(pipe, models, {index: clip}, no_report)) == [(index, None)]
        assert hashes_of(clips) == single_runs
        rest = ["transformer", "picture", "sound"]
        assert parts_run == [
            "text encoder",
            "connectors",
            "voice",
            "face",
            *rest,
            "text encoder",
            "connectors",
            *rest,
            *rest,
        ]

    def test_together_each_model_has_one_turn_and_the_clips_are_those_of_single_runs(
        self, pipe, models, settings, single_runs, parts_run, tmp_path
    ):
        clips = clips_in(tmp_path, settings)
        assert list(generate_clips(pipe, models, clips, no_report)) == [(0, None), (1, None), (2, None)]
        assert hashes_of(clips) == single_runs
        texts = ["text encoder", "connectors"] * 2
        assert parts_run == [*texts, "voice", "face", "transformer", *["picture", "sound"] * 3]
        assert leftovers(tmp_path) == ["0.json", "0.mp4", "1.json", "1.mp4", "2.json", "2.mp4"]

    def test_under_model_offload_the_text_encoder_does_not_make_room_for_the_connectors(self, pipe):
        assert "connectors" not in pipe.model_cpu_offload_seq
        order = ["text_encoder", "transformer", "vae", "audio_vae", "vocoder"]
        assert [name for name in pipe.model_cpu_offload_seq.split("->") if name in order] == order

    def test_a_run_that_breaks_off_after_denoising_is_finished_by_the_next_without_denoising_again(
        self, pipe, models, settings, single_runs, parts_run, tmp_path
    ):
        clips = clips_in(tmp_path, settings)
        run = generate_clips(pipe, models, clips, no_report)
        assert next(run) == (0, None)
        run.close()
        assert leftovers(tmp_path) == [".1.latents.safetensors", ".2.latents.safetensors", "0.json", "0.mp4"]
        parts_run.clear()
        rest = {index: clips[index] for index in (1, 2)}
        assert list(generate_clips(pipe, models, rest, no_report)) == [(1, None), (2, None)]
        assert "transformer" not in parts_run
        assert hashes_of(clips) == single_runs

    def test_the_last_clip_of_a_run_that_broke_off_is_finished_without_denoising_again_too(
        self, pipe, models, settings, single_runs, parts_run, tmp_path
    ):
        clips = clips_in(tmp_path, settings[:2])
        run = generate_clips(pipe, models, clips, no_report)
        assert next(run) == (0, None)
        run.close()
        parts_run.clear()
        assert list(generate_clips(pipe, models, {1: clips[1]}, no_report)) == [(1, None)]
        assert "transformer" not in parts_run
        assert hashes_of(clips) == single_runs[:2]
        assert leftovers(tmp_path) == ["0.json", "0.mp4", "1.json", "1.mp4"]

    def test_what_other_settings_or_nobody_denoised_is_denoised_again(
        self, pipe, models, settings, single_runs, parts_run, tmp_path
    ):
        clips = clips_in(tmp_path, settings)
        of_other_settings = {0: clips[0], 1: Clip(settings[2], clips[1].output)}
        run = generate_clips(pipe, models, of_other_settings, no_report)
        next(run)
        run.close()
        (tmp_path / ".2.latents.safetensors").write_bytes(b"damaged")
        rest = {index: clips[index] for index in (1, 2)}
        parts_run.clear()
        assert list(generate_clips(pipe, models, rest, no_report)) == [(1, None), (2, None)]
        assert "transformer" in parts_run
        assert hashes_of(rest) == single_runs[1:]

    def test_a_random_seed_is_that_of_the_run_that_denoised(self, pipe, models, settings, tmp_path):
        clips = clips_in(tmp_path, [ClipSettings(**vars(item) | {"seed": None}) for item in settings[:2]])
        run = generate_clips(pipe, models, clips, no_report)
        next(run)
        run.close()
        again = {1: clips[1], 2: Clip(clips[1].settings, tmp_path / "2.mp4")}
        parts = []
        hook = pipe.transformer.register_forward_pre_hook(lambda *_: parts.append("transformer"))
        assert list(generate_clips(pipe, models, again, no_report)) == [(1, None), (2, None)]
        hook.remove()
        assert len(parts) == 2 * 3
        seeds = {read_record(clip.record)[1].seed for clip in again.values()}
        assert len(seeds) == 2

    def test_together_a_row_that_fails_does_not_stop_the_others(self, inputs, tmp_path):
        rows = [{"prompt": "a", "stg_blocks": [77], "stg_scale": 1.0}, {"prompt": "b"}, {"prompt": "c"}]
        prompts = tmp_path / "prompts.json"
        prompts.write_text(json.dumps(rows))
        folder = tmp_path / "clips"
        arguments = ("generate", *inputs[:4], *QUICK, "--prompts-file", prompts, "-o", folder, "--together", 2)
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: row 0: `stg_blocks`") and result.stderr.count("\n") == 1
        assert result.stdout.splitlines() == [str(folder / "0001.mp4"), str(folder / "0002.mp4")]
        assert leftovers(folder) == ["0001.json", "0001.mp4", "0002.json", "0002.mp4"]

    def test_together_without_a_prompts_file_is_one_clear_sentence(self, inputs, tmp_path):
        arguments = ("generate", *inputs[:4], "--prompt", "x", "-o", tmp_path / "a.mp4", "--together", 2)
        assert_one_line_error(invoke(*arguments), "`together`", "--prompts-file")


class TestSeveralProcesses:
    @pytest.fixture
    def process(self, monkeypatch):
        """`process(rank)` is the sharing as one of two processes sees it."""

        def process(rank, **environment):
            for name, value in ({"RANK": rank, "WORLD_SIZE": 2} | environment).items():
                monkeypatch.setenv(name, str(value))
            return RowSharing()

        return process

    def test_one_process_has_all_rows(self):
        assert [list(portion) for portion in RowSharing().portions(5, 2)] == [[0, 1], [2, 3], [4]]

    def test_without_a_launcher_each_row_has_one_process(self, process):
        shares = [[list(portion) for portion in process(rank).portions(5, 2)] for rank in (0, 1)]
        assert shares == [[[0, 2], [4]], [[1, 3]]]

    def test_with_a_launcher_whoever_is_free_takes_the_next_rows(self, process):
        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        first, second = (process(rank, **launcher).portions(5, 1) for rank in (0, 1))
        taken = [next(first), next(second), next(second), next(second), next(first)]
        assert [index for portion in taken for index in portion] == [0, 1, 2, 3, 4]
        assert not [*first, *second]

    def test_a_single_clip_is_made_by_one_process(self, inputs, tmp_path, monkeypatch):
        arguments = ("generate", *inputs, "--prompt", "x", *QUICK, "-o", tmp_path / "a.mp4")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        assert (invoke(*arguments).exit_code, leftovers(tmp_path)) == (0, [])
        monkeypatch.setenv("RANK", "0")
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        assert leftovers(tmp_path) == ["a.json", "a.mp4"]
        assert result.stderr.startswith("Warning: One clip") and result.stderr.count("\n") == 1

    def test_the_rows_of_a_killed_process_are_made_by_the_next_run_each_once(self, inputs, tmp_path):
        rows = [{"prompt": "a"}] * 6 + [{"prompt": "a", "image": "missing.png"}]
        prompts = tmp_path / "prompts.json"
        prompts.write_text(json.dumps(rows))
        folder = tmp_path / "clips"
        arguments = ("generate", *inputs[:4], *QUICK, "--seed", 0, "--prompts-file", prompts, "-o", folder)
        expected = [str(folder / f"{index:04d}.mp4") for index in range(6)]

        process = launch(*arguments)
        made = [process.stdout.readline().strip()]
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) == 2
        os.kill(int(workers[-1]), signal.SIGKILL)
        output, _ = process.communicate()
        made += output.split()
        assert process.returncode != 0
        assert set(made) <= set(expected) and len(made) == len(set(made))
        hashes = {name: file_sha256(name) for name in made}

        rerun = launch(*arguments)
        output, errors = rerun.communicate()
        lines = output.splitlines()
        there = [line.removesuffix(" is already there") for line in lines if line.endswith(" is already there")]
        remade = [line for line in lines if not line.endswith(" is already there")]
        assert set(made) <= set(there)
        assert sorted(there + remade) == expected
        assert rerun.returncode != 0
        assert errors.count("Error: row 6: `image`") == 1
        assert {name: file_sha256(name) for name in made} == hashes
        assert [name for name in leftovers(folder) if not name.startswith(".")] == sorted(
            f"{index:04d}.{suffix}" for index in range(6) for suffix in ("json", "mp4")
        )
