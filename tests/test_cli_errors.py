"""What the command line says of mistakes: one clear sentence, and nothing left behind."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from command_line import (
    QUICK,
    assert_one_line_error,
    invoke,
    leftovers,
    one_command,
    run,
)
from diffusers_idlora.settings import ClipSettings, ModelSettings


pytest_plugins = ["command_line_fixtures"]


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
            (["--reference-audio", __file__], ["`reference_audio`", "test_cli_errors.py"]),
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
        for command in ("generate", "chain", "demo", "inspect"):
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
