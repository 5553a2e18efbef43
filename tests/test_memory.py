"""Fewer bits for the weights, idle weights elsewhere, tiles: each with an adapter loaded, near the plain result."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import QUICK, assert_one_line_error, invoke
from conftest import families
from diffusers_idlora import LTX2IDLoRAPipeline
from diffusers_idlora.batch import BatchTwoStagePipeline
from diffusers_idlora.generation import read_record
from diffusers_idlora.memory import TILE_FRAMES, check_memory, load_pipeline, place, tile_decoding
from diffusers_idlora.settings import ModelSettings
from diffusers_idlora.tiny import tiny_components


pytest_plugins = ["command_line_fixtures"]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUANTIZED_HERE = ("fp8_casting", "torchao_int8", "torchao_fp8")
# From the names of the released transformers to those of diffusers.
RELEASED_NAMES = {
    "audio_time_embed.": "audio_adaln_single.",
    "time_embed.": "adaln_single.",
    "prompt_adaln.": "prompt_adaln_single.",
    "audio_proj_in.": "audio_patchify_proj.",
    "proj_in.": "patchify_proj.",
    "av_cross_attn_video_scale_shift.": "av_ca_video_scale_shift_adaln_single.",
    "av_cross_attn_video_a2v_gate.": "av_ca_a2v_gate_adaln_single.",
    "av_cross_attn_audio_scale_shift.": "av_ca_audio_scale_shift_adaln_single.",
    "av_cross_attn_audio_v2a_gate.": "av_ca_v2a_gate_adaln_single.",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "norm_q.": "q_norm.",
    "norm_k.": "k_norm.",
}


@pytest.fixture
def load(tiny_checkpoint, tiny_adapter):
    """`load(family, with_adapter, **settings)` is a pipeline in bfloat16."""

    def load(family="ltx-2.3", with_adapter=True, pipeline_class=LTX2IDLoRAPipeline, **settings):
        lora = str(tiny_adapter(family)) if with_adapter else None
        models = ModelSettings(base=str(tiny_checkpoint(family)), lora=lora, device="cpu", **settings)
        models.check()
        return load_pipeline(models, pipeline_class)

    return load


def run(pipe):
    """Latents of both modalities, in one row."""
    output = pipe(
        "a face",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=1.0,
        stg_scale=0.0,
        modality_scale=1.0,
        max_sequence_length=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    return torch.cat([output.frames.flatten().float(), output.audio.flatten().float()])


def distance(result, expected):
    return ((result - expected).norm() / expected.norm()).item()


def weights_dtypes(model, is_adapter):
    return {item.dtype for name, item in model.named_parameters() if ("lora_" in name) == is_adapter and item.ndim > 1}


def released_name(name):
    for ours, theirs in RELEASED_NAMES.items():
        name = re.sub(rf"(?<![a-z0-9_]){ours}" if ours.endswith(".") and "norm" not in ours else ours, theirs, name)
    return f"model.diffusion_model.{name}"


class TestQuantizedTransformer:
    @pytest.mark.parametrize("kind", QUANTIZED_HERE)
    def test_an_adapter_loads_scales_and_unloads_without_fusing(self, kind, load):
        base = run(load(with_adapter=False, quantize=kind))
        pipe = load(quantize=kind)
        adapted = run(pipe)
        assert weights_dtypes(pipe.transformer, is_adapter=True) == {torch.bfloat16}
        assert distance(adapted, base) > 0.1
        assert distance(adapted, run(load())) < 0.05
        pipe.set_adapters("id_lora", 0.0)
        assert torch.equal(run(pipe), base)
        pipe.set_adapters("id_lora", 1.0)
        assert torch.equal(run(pipe), adapted)
        pipe.unload_lora_weights()
        assert torch.equal(run(pipe), base)

    @families
    def test_casting_keeps_weights_in_float8_and_is_near_the_plain_result(self, family, load):
        pipe = load(family, quantize="fp8_casting")
        assert torch.float8_e4m3fn in weights_dtypes(pipe.transformer, is_adapter=False)
        assert pipe.transformer.dtype == torch.bfloat16
        assert 0 < distance(run(pipe), run(load(family))) < 0.05

    @pytest.mark.parametrize("kind", QUANTIZED_HERE)
    def test_the_text_encoder_can_be_quantized_too(self, kind, load):
        pipe, plain = load(quantize_text_encoder=kind), load()
        sizes = [
            sum(item.untyped_storage().nbytes() for item in model.parameters())
            for model in (pipe.text_encoder, plain.text_encoder)
        ]
        assert kind != "fp8_casting" or sizes[0] < sizes[1]
        assert 0 < distance(run(pipe), run(plain)) < 0.05

    def test_through_the_command_line_it_is_recorded_and_made_again(self, inputs, tmp_path):
        arguments = (*inputs, "--prompt", "x", *QUICK, "--dtype", "bfloat16", "--quantize", "torchao_int8")
        result = invoke("generate", *arguments, "--vae-tiling", "-o", tmp_path / "out.mp4")
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        models = read_record(tmp_path / "out.json")[0]
        assert (models.quantize, models.vae_tiling) == ("torchao_int8", True)
        (tmp_path / "out.mp4").unlink()
        assert invoke("generate", "--from", tmp_path / "out.json").exit_code == 0


class TestTransformerFile:
    @families
    def test_a_safetensors_file_with_the_released_names_takes_the_place_of_the_bases(self, family, load, tmp_path):
        weights = tiny_components(family, seed=1)["transformer"].state_dict()
        save_file({released_name(name): weight for name, weight in weights.items()}, tmp_path / "t.safetensors")
        pipe = load(family, transformer_file=str(tmp_path / "t.safetensors"), dtype="float32")
        expected = tiny_components(family, seed=1)["transformer"].state_dict()
        base_names = {name.replace(".base_layer", ""): name for name in pipe.transformer.state_dict()}
        for name, weight in expected.items():
            assert torch.equal(pipe.transformer.state_dict()[base_names[name]], weight), name

    @pytest.mark.parametrize("named", ["released", "diffusers"])
    def test_a_gguf_file_is_near_the_plain_weights_and_takes_an_adapter(self, named, load, tmp_path):
        write_gguf(tmp_path / "t.gguf", released_name if named == "released" else str)
        pipe = load(transformer_file=str(tmp_path / "t.gguf"))
        base = run(load(with_adapter=False, transformer_file=str(tmp_path / "t.gguf")))
        adapted = run(pipe)
        assert type(pipe.transformer.transformer_blocks[0].attn1.to_q).__name__ == "GGUFLinear"
        assert distance(adapted, base) > 0.1
        assert 0 < distance(adapted, run(load())) < 0.05
        pipe.set_adapters("id_lora", 0.0)
        assert torch.equal(run(pipe), base)
        pipe.unload_lora_weights()
        assert torch.equal(run(pipe), base)

    @pytest.mark.parametrize("change", ["other generation", "missing weight", "damaged"])
    def test_a_file_that_does_not_fit_is_one_clear_sentence(self, change, load, tmp_path):
        path = tmp_path / "t.safetensors"
        weights = tiny_components("ltx-2" if change == "other generation" else "ltx-2.3")["transformer"].state_dict()
        if change == "missing weight":
            weights.pop("transformer_blocks.1.attn1.to_q.weight")
        save_file(weights, path)
        if change == "damaged":
            path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match="`transformer_file` .*t.safetensors") as caught:
            load(transformer_file=str(path))
        assert "http" not in str(caught.value) and "\n" not in str(caught.value)

    def test_a_changed_file_is_noticed(self, inputs, tmp_path):
        path = tmp_path / "t.safetensors"
        shutil.copy(next((Path(inputs[1]) / "transformer").glob("*.safetensors")), path)
        arguments = (*inputs, "--prompt", "x", *QUICK, "--transformer-file", path)
        result = invoke("generate", *arguments, "-o", tmp_path / "out.mp4")
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / "out.json").read_text())
        assert record["files"]["transformer_file"][0]["path"] == str(path)
        save_file(load_file(path), path, metadata={"changed": "yes"})
        result = invoke("generate", "--from", tmp_path / "out.json", "-o", tmp_path / "again.mp4")
        assert_one_line_error(result, "`transformer_file`", str(path), "--force")


def write_gguf(path, name_of):
    """The tiny transformer with its linear weights in 8 bits; those of LTX-2 are too small for blocks of 32."""
    gguf = pytest.importorskip("gguf")
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(path), "ltxv")
    for name, weight in tiny_components("ltx-2.3")["transformer"].state_dict().items():
        array = weight.float().numpy()
        if array.ndim == 2 and array.shape[1] % 32 == 0 and "table" not in name:
            writer.add_tensor(name_of(name), gguf.quants.quantize(array, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name_of(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestOffload:
    @pytest.mark.parametrize("kind", ["none", *QUANTIZED_HERE])
    def test_groups_give_the_plain_result_with_an_adapter(self, kind, load):
        pipe = load(quantize=kind)
        expected = run(pipe)
        pipe = load(quantize=kind)
        place(pipe, ModelSettings(offload="group", stream=False), CPU)
        assert torch.equal(run(pipe), expected)
        assert torch.equal(run(pipe), expected)

    @pytest.mark.parametrize("kind", ["none", *QUANTIZED_HERE])
    def test_whole_models_give_the_plain_result_with_an_adapter(self, kind, load):
        pipe = load(quantize=kind)
        expected = run(pipe)
        place(pipe, ModelSettings(offload="model"), CPU)
        assert torch.equal(run(pipe), expected)
        assert torch.equal(run(pipe), expected)

    @pytest.mark.parametrize("kind", ["none", "fp8_casting"])
    @pytest.mark.parametrize("offload", ["group", "model"])
    def test_two_stages_give_the_plain_result_with_both_adapters(self, offload, kind, load, tiny_adapter):
        settings = {"recipe": "two-stage", "distilled_lora": str(tiny_adapter()), "quantize": kind}
        plain, pipe = (load(pipeline_class=BatchTwoStagePipeline, **settings) for _ in range(2))
        place(pipe, ModelSettings(offload=offload, stream=False if offload == "group" else None), CPU)
        expected = run(plain)
        assert expected.isfinite().all()
        assert torch.equal(run(pipe), expected)


class TestTiles:
    def test_frames_before_the_first_seam_are_those_without_tiles(self):
        vae = tiny_components()["vae"]
        latents = torch.randn(1, 8, 13, 2, 2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            plain = vae.decode(latents, return_dict=False)[0]
            tile_decoding(vae)
            tiled = vae.decode(latents, return_dict=False)[0]
        assert tiled.shape == plain.shape
        difference = (tiled - plain).abs()
        # Random weights carry a seam far, which those of a trained decoder do not.
        assert difference[:, :, : TILE_FRAMES // 4].max() < 1e-3 < difference[:, :, TILE_FRAMES:].max()

    def test_a_clip_of_one_tile_is_as_without(self, load):
        arguments = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0}
        arguments |= {"stg_scale": 0.0, "modality_scale": 1.0, "max_sequence_length": 16, "output_type": "pt"}
        results = [
            load(vae_tiling=tiling)("x", generator=torch.Generator().manual_seed(0), **arguments).frames
            for tiling in (False, True)
        ]
        assert torch.equal(*results)


class TestChecks:
    @pytest.mark.parametrize(
        ("settings", "device", "words"),
        [
            ({"offload": "group"}, CPU, "`offload` 'group' needs an accelerator"),
            ({"stream": True}, CUDA, "`stream` belongs to `offload` group"),
            ({"stream": False, "offload": "model"}, CUDA, "`stream` belongs to `offload` group"),
            ({"stream": True, "offload": "group"}, torch.device("mps"), "`stream` needs a CUDA device"),
            ({"quantize": "torchao_int8", "offload": "sequential"}, CUDA, "`offload` 'sequential'.* use group"),
            ({"quantize_text_encoder": "torchao_int8", "offload": "sequential"}, CUDA, "`quantize_text_encoder`"),
            ({"compile": True, "offload": "group"}, CUDA, "`compile` does not work with `offload` 'group'"),
            ({"compile": True, "offload": "sequential"}, CUDA, "`compile` does not work with `offload`"),
            ({"compile": True, "quantize": "fp8_casting"}, CPU, "`compile` does not work with `quantize`"),
            ({"quantize": "torchao_fp8"}, torch.device("meta"), "`quantize` 'torchao_fp8' needs float8"),
            ({"transformer_file": "x.bin"}, CPU, "`transformer_file` is 'x.bin'"),
            ({"transformer_file": "x.safetensors"}, CPU, "`transformer_file` 'x.safetensors' does not exist"),
            ({"transformer_file": "/no/such/x.safetensors"}, CPU, "`transformer_file`.* does not exist"),
        ],
    )
    def test_what_cannot_work_is_one_clear_sentence(self, settings, device, words):
        with pytest.raises(ValueError, match=words):
            check_memory(ModelSettings(**settings), device)

    @pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
    @pytest.mark.parametrize("option", ["--quantize", "--quantize-text-encoder"])
    def test_a_missing_package_is_one_sentence_with_the_command_that_installs_it(self, option, inputs, tmp_path):
        arguments = ("generate", *inputs[:4], "--prompt", "x", "-o", tmp_path / "a.mp4", option, "bnb_4bit")
        name = option.removeprefix("--").replace("-", "_")
        assert_one_line_error(invoke(*arguments), f"`{name}`", "pip install bitsandbytes")

    @pytest.mark.skipif(importlib.util.find_spec("gguf") is not None, reason="gguf is installed")
    def test_a_missing_reader_of_gguf_is_one_sentence_with_the_command_that_installs_it(self, tmp_path):
        (tmp_path / "t.gguf").touch()
        with pytest.raises(ValueError, match="pip install gguf"):
            check_memory(ModelSettings(transformer_file=str(tmp_path / "t.gguf")), CPU)

    @pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
    @pytest.mark.parametrize("settings", [{"quantize": "torchao_int8"}, {"offload": "sequential"}])
    def test_what_does_not_go_with_a_gguf_file_is_one_clear_sentence(self, settings, tmp_path):
        (tmp_path / "t.gguf").touch()
        with pytest.raises(ValueError, match="quantized already|.gguf file"):
            check_memory(ModelSettings(transformer_file=str(tmp_path / "t.gguf"), **settings), CUDA)

    def test_of_several_processes_each_has_its_own_gpu(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert ModelSettings(device="cuda").process_device() == torch.device("cuda:3")
        assert ModelSettings(device="cuda:1").process_device() == torch.device("cuda:1")
        assert ModelSettings(device="cpu").process_device() == CPU
