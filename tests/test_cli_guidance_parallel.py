"""`--guidance-parallel`: the clips of one command, each made by all processes of a launcher."""

import json

import pytest
import torch

from command_line import QUICK, assert_one_line_error, invoke, launch, leftovers
from diffusers_idlora.generation import call_arguments, load_models, read_record
from diffusers_idlora.guidance_processes import GuidanceProcesses, guidance_processes
from diffusers_idlora.media import file_sha256
from diffusers_idlora.settings import ClipSettings, ModelSettings


pytest_plugins = ["command_line_fixtures"]


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """The folder, output and errors of two processes with a prompts file: a good row, a bad one, one without a seed."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "prompts.json").write_text(
        json.dumps(
            [
                {"prompt": "a", "seed": 3, "guidance_scale": 2.0, "stg_scale": 1.0, "modality_scale": 2.0},
                {"prompt": "a", "image": "missing.png"},
                {"prompt": "a", "stg_scale": 1.0, "stg_blocks": [77]},
                {"prompt": "b", "sampler": "res_2s"},
            ]
        )
    )
    arguments = ("--prompts-file", folder / "prompts.json", "-o", folder / "clips", "--guidance-parallel")
    process = launch("generate", *inputs, *QUICK, *arguments)
    output, errors = process.communicate()
    return folder / "clips", process.returncode, output, errors


def test_each_row_is_made_once_and_what_is_wrong_is_said_once(run):
    folder, code, output, errors = run
    assert output.splitlines() == [str(folder / "0000.mp4"), str(folder / "0003.mp4")], errors
    assert leftovers(folder) == ["0000.json", "0000.mp4", "0003.json", "0003.mp4"]
    assert code != 0
    assert errors.count("Error: row 1: `image`") == errors.count("Error: row 2: `stg_blocks`") == 1
    assert errors.count("Error: row") == 2


@pytest.mark.parametrize("name", ["0000", "0003"])
def test_the_clips_are_those_of_one_process(name, run, tmp_path):
    record = run[0] / f"{name}.json"
    result = invoke("generate", "--from", record, "-o", tmp_path / "alone.mp4")
    assert result.exit_code == 0, result.output
    assert file_sha256(tmp_path / "alone.mp4") == file_sha256(record.with_suffix(".mp4"))
    assert read_record(record)[1].seed is not None


def test_the_processes_share_the_passes(inputs):
    models = ModelSettings(base=str(inputs[1]), lora=str(inputs[3]), dtype="float32", device="cpu")
    pipe, settings = load_models(models), ClipSettings(prompt="x", seed=0)
    assert "guidance_parallel" not in call_arguments(pipe, models, settings)
    pipe.processes = GuidanceProcesses()
    assert call_arguments(pipe, models, settings)["guidance_parallel"] is True


def test_what_goes_wrong_in_the_first_process_is_raised(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    with guidance_processes(torch.device("cpu")) as processes:
        assert processes.is_first and processes.from_first(lambda: 3) == 3
        with pytest.raises(KeyError):
            processes.from_first(lambda: {}["missing"])
        error = ValueError("a")
        assert processes.failure(error) is error and processes.failure(None) is None
    assert not torch.distributed.is_initialized()


def test_without_a_launcher_the_sentence_says_how_to_start_it(inputs, tmp_path):
    options = ("--prompt", "x", *QUICK, "--guidance-parallel", "-o", tmp_path / "out.mp4")
    assert_one_line_error(invoke("generate", *inputs, *options), "`guidance_parallel`", "torchrun")
    (tmp_path / "lines.txt").write_text("a")
    options = (tmp_path / "lines.txt", *QUICK, "--guidance-parallel", "-o", tmp_path / "out.mp4")
    assert_one_line_error(invoke("chain", *options, *inputs), "`guidance_parallel`", "torchrun")
