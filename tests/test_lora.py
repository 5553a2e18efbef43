"""Adapter files: both key formats, what loading them does to the transformer, and the sentences for what does not fit."""

import json

import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from conftest import families
from diffusers_idlora import LTX2IDLoRAPipeline
from diffusers_idlora.adapter_files import find_adapter_file, save_adapter
from diffusers_idlora.lora import (
    IDLORA_METADATA_KEY,
    check_adapter,
    inspect_adapter,
    load_adapter,
    to_diffusers_keys,
    to_original_keys,
)
from diffusers_idlora.tiny import save_tiny_adapter, tiny_components


ID_LORA_MODULES = {
    f"{attention}.{layer}": 3
    for attention in ("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    for layer in ("to_q", "to_k", "to_v", "to_out.0")
} | {"audio_ff.net.0.proj": 3, "audio_ff.net.2": 3}
AUDIO_QUERY = "transformer_blocks.0.audio_attn1.to_q"


def pipeline(family):
    return LTX2IDLoRAPipeline(**tiny_components(family))


def load(pipe, source, adapter_name="default", hotswap=False):
    pipe.load_lora_weights(source, adapter_name=adapter_name, hotswap=hotswap)


@torch.no_grad()
def predictions(transformer):
    """Video and audio velocities for fixed random inputs: 2x2x2 video tokens, 5 audio tokens, 6 text tokens."""
    generator = torch.Generator().manual_seed(0)
    config = transformer.config
    if config.use_prompt_embeddings:
        text_dim = audio_text_dim = config.caption_channels
    else:
        text_dim, audio_text_dim = config.cross_attention_dim, config.audio_cross_attention_dim
    sigma = torch.tensor([0.5])
    output = transformer(
        hidden_states=torch.randn(1, 8, config.in_channels, generator=generator),
        audio_hidden_states=torch.randn(1, 5, config.audio_in_channels, generator=generator),
        encoder_hidden_states=torch.randn(1, 6, text_dim, generator=generator),
        audio_encoder_hidden_states=torch.randn(1, 6, audio_text_dim, generator=generator),
        timestep=sigma[:, None].expand(1, 8) * 1000,
        audio_timestep=sigma[:, None].expand(1, 5) * 1000,
        sigma=sigma * 1000,
        audio_sigma=sigma * 1000,
        num_frames=2,
        height=2,
        width=2,
        audio_num_frames=5,
    )
    return torch.cat([output.sample.flatten(), output.audio_sample.flatten()])


def random_lora(layers, rank=4, prefix="diffusion_model."):
    """A LoRA of `{module: (inputs, outputs)}`."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for module, (inputs, outputs) in layers.items():
        weights[f"{prefix}{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        weights[f"{prefix}{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    return weights


def layer_sizes(transformer, *modules):
    targets = {module: transformer.get_submodule(module) for module in modules}
    return {module: (target.in_features, target.out_features) for module, target in targets.items()}


def audio_query_lora(transformer, **kwargs):
    return random_lora(layer_sizes(transformer, AUDIO_QUERY), **kwargs)


# Round trips


@families
def test_a_released_file_loads_and_changes_the_output(family, tiny_adapter):
    pipe = pipeline(family)
    base = predictions(pipe.transformer)
    load(pipe, tiny_adapter(family))
    assert (predictions(pipe.transformer) - base).abs().max() > 1e-2
    assert pipe.get_list_adapters() == {"transformer": ["default"]}


@families
def test_released_to_diffusers_to_released_is_bit_identical(family, tiny_adapter):
    original = load_file(tiny_adapter(family))
    back = to_original_keys(to_diffusers_keys(original))
    assert list(back) == list(original)
    assert all(torch.equal(back[key], original[key]) for key in original)


@families
def test_both_formats_give_the_same_output(family, tiny_adapter, tmp_path):
    outputs = []
    converted = save_adapter(tmp_path / "diffusers.safetensors", to_diffusers_keys(load_file(tiny_adapter(family))))
    for path in (tiny_adapter(family), converted):
        pipe = pipeline(family)
        load(pipe, path)
        outputs.append(predictions(pipe.transformer))
    assert torch.equal(*outputs)


@families
def test_a_file_that_diffusers_saved_keeps_its_alpha(family, tmp_path):
    pipe = pipeline(family)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.audio_attn1\.to_[qk]", init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    expected = predictions(pipe.transformer)
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        **_collate_lora_metadata({"transformer": pipe.transformer}),
    )

    info = inspect_adapter(tmp_path)
    assert (info.format, info.rank, info.alpha) == ("diffusers", 4, 8)
    other = pipeline(family)
    load(other, tmp_path)
    assert other.transformer.get_submodule(AUDIO_QUERY).scaling["default"] == 2.0
    torch.testing.assert_close(predictions(other.transformer), expected, atol=1e-6, rtol=0)


def test_renamed_modules_are_refused_by_the_released_format_and_read_from_it():
    weights = random_lora({"patchify_proj": (8, 8)})
    converted = to_diffusers_keys(weights)
    assert list(converted) == ["transformer.proj_in.lora_A.weight", "transformer.proj_in.lora_B.weight"]
    with pytest.raises(ValueError, match="`transformer.proj_in.lora_A.weight`.*released format"):
        to_original_keys(converted)


@pytest.mark.parametrize("rename", [to_diffusers_keys, to_original_keys])
def test_keys_without_a_known_prefix_or_with_the_same_new_name_are_not_renamed(rename):
    bare = random_lora({AUDIO_QUERY: (4, 4)}, prefix="")
    with pytest.raises(ValueError, match=f"`state_dict` has the key `{AUDIO_QUERY}"):
        rename(bare)
    both = random_lora({AUDIO_QUERY: (4, 4)}) | random_lora({AUDIO_QUERY: (4, 4)}, prefix="transformer.")
    with pytest.raises(ValueError, match="no name of its own"):
        rename(both)


# Alpha stored as tensors


def test_alpha_tensors_become_the_scale_of_each_module(tiny_adapter):
    pipe = pipeline("ltx-2.3")
    weights = load_file(tiny_adapter("ltx-2.3"))
    for key in [key for key in weights if key.endswith("lora_A.weight")]:
        block = int(key.split(".")[2])
        if block < 2:
            weights[key.replace("lora_A.weight", "alpha")] = torch.tensor([8.0, 2.0][block])
    state_dict, metadata = load_adapter(weights)
    assert not [key for key in state_dict if key.endswith("alpha")]
    assert check_adapter(state_dict, metadata, pipe.transformer).alpha == (2.0, 4, 8.0)

    load(pipe, weights)
    blocks = pipe.transformer.transformer_blocks
    assert [block.audio_attn1.to_q.scaling["default"] for block in blocks] == [2.0, 0.5, 1.0]
    assert [block.audio_ff.net[2].scaling["default"] for block in blocks] == [2.0, 0.5, 1.0]


def test_lora_down_and_up_with_one_alpha_load_as_the_same_lora_scaled():
    pipe, expected = pipeline("ltx-2"), pipeline("ltx-2")
    weights = audio_query_lora(pipe.transformer)
    kohya = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value for key, value in weights.items()}
    load(pipe, kohya | {f"diffusion_model.{AUDIO_QUERY}.alpha": torch.tensor(2.0)})
    load(expected, {key: value / 2 if "lora_B" in key else value for key, value in weights.items()})
    torch.testing.assert_close(predictions(pipe.transformer), predictions(expected.transformer), atol=1e-6, rtol=0)


def test_mixed_ranks_are_reported_and_loaded_unscaled():
    pipe = pipeline("ltx-2.3")
    weights = audio_query_lora(pipe.transformer, rank=4)
    weights |= random_lora(layer_sizes(pipe.transformer, "transformer_blocks.1.audio_attn2.to_k"), rank=2)
    info = inspect_adapter(weights)
    assert (info.rank, info.alpha, info.num_blocks) == ((2, 4), None, 2)
    load(pipe, weights)
    assert pipe.transformer.transformer_blocks[1].audio_attn2.to_k.scaling["default"] == 1.0


# Adapters in use


@families
def test_scale_zero_unfuse_and_unload_give_the_base_model(family, tiny_adapter):
    pipe = pipeline(family)
    base = predictions(pipe.transformer)
    load(pipe, tiny_adapter(family), "voice")
    loaded = predictions(pipe.transformer)

    pipe.set_adapters("voice", 0.0)
    assert torch.equal(predictions(pipe.transformer), base)
    pipe.set_adapters("voice", 1.0)
    assert torch.equal(predictions(pipe.transformer), loaded)

    pipe.fuse_lora()
    torch.testing.assert_close(predictions(pipe.transformer), loaded, atol=1e-5, rtol=0)
    pipe.unfuse_lora()
    torch.testing.assert_close(predictions(pipe.transformer), loaded, atol=1e-5, rtol=0)
    pipe.unload_lora_weights()
    torch.testing.assert_close(predictions(pipe.transformer), base, atol=1e-5, rtol=0)
    assert pipe.get_list_adapters() == {}


@families
def test_two_adapters_act_together_and_each_alone(family, tiny_adapter, tmp_path):
    pipe = pipeline(family)
    second = save_tiny_adapter(tmp_path / "second.safetensors", pipe.transformer, rank=2, seed=1)
    alone = []
    for path in (tiny_adapter(family), second):
        single = pipeline(family)
        load(single, path)
        alone.append(predictions(single.transformer))

    load(pipe, tiny_adapter(family), "a")
    load(pipe, second, "b")
    for name, expected in zip("ab", alone):
        pipe.set_adapters(name)
        torch.testing.assert_close(predictions(pipe.transformer), expected, atol=1e-6, rtol=0)
    pipe.set_adapters(["a", "b"], [1.0, 1.0])
    both = predictions(pipe.transformer)
    assert min((both - expected).abs().max() for expected in alone) > 1e-2


@families
def test_hot_swapping_equals_a_fresh_load(family, tiny_adapter, tmp_path):
    pipe, fresh = pipeline(family), pipeline(family)
    second = save_tiny_adapter(tmp_path / "second.safetensors", pipe.transformer, rank=4, seed=1)
    pipe.enable_lora_hotswap(target_rank=4)
    load(pipe, tiny_adapter(family), "voice")
    load(pipe, second, "voice", hotswap=True)
    load(fresh, second)
    torch.testing.assert_close(predictions(pipe.transformer), predictions(fresh.transformer), atol=1e-6, rtol=0)


# What an adapter is


@families
def test_inspecting_says_the_same_of_both_formats(family, tiny_adapter):
    transformer = tiny_components(family)["transformer"]
    original = load_file(tiny_adapter(family))
    info, converted = inspect_adapter(tiny_adapter(family)), inspect_adapter(to_diffusers_keys(original))
    assert (info.format, converted.format) == ("original", "diffusers")
    assert {**vars(info), "format": None} == {**vars(converted), "format": None}

    config = transformer.config
    assert info.modules == ID_LORA_MODULES
    assert (info.rank, info.alpha, info.dtype, info.num_blocks) == (4, None, "bfloat16", 3)
    assert info.num_parameters == sum(tensor.numel() for tensor in original.values())
    assert info.video_dim == config.num_attention_heads * config.attention_head_dim
    assert info.audio_dim == config.audio_num_attention_heads * config.audio_attention_head_dim
    assert info.touches_audio
    assert (info.generation, info.base_model, info.metadata) == (None, None, {})
    rows = dict(info.rows())
    assert rows["Rank"] == "4" and rows["Alpha"] == "not stored: equal to the rank"
    assert f"audio width {info.audio_dim}" in rows["Made for"] and "audio_ff.net.2 (3)" in rows["Modules"]


def test_metadata_survives_saving_and_names_the_base(tiny_adapter, tmp_path):
    block = {"generation": "ltx-2.3", "base_model": "somebody/base", "steps": 3000}
    weights, _ = load_adapter(tiny_adapter("ltx-2.3"))
    path = save_adapter(tmp_path / "new" / "a.safetensors", weights, {IDLORA_METADATA_KEY: json.dumps(block)})
    info = inspect_adapter(path)
    assert (info.generation, info.base_model, info.metadata) == ("ltx-2.3", "somebody/base", block)
    assert "somebody/base, LTX-2.3" in info.made_for
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_modules_that_only_the_second_generation_has_show_it():
    assert (
        inspect_adapter(random_lora({"transformer_blocks.0.audio_attn1.to_gate_logits": (8, 2)})).generation
        == "ltx-2.3"
    )


# What does not fit


def expect_error(state_dict, transformer, *parts, metadata=None):
    with pytest.raises(ValueError) as error:
        check_adapter(state_dict, metadata, transformer)
    assert "`adapter`" in str(error.value) and "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("own, other", [("ltx-2", "ltx-2.3"), ("ltx-2.3", "ltx-2")])
def test_an_adapter_of_the_other_generation_is_refused_with_the_base_it_was_made_for(own, other, tiny_adapter):
    transformer = tiny_components(other)["transformer"]
    state_dict, metadata = load_adapter(tiny_adapter(own))
    info = inspect_adapter(state_dict)
    here = {"ltx-2": "LTX-2 (", "ltx-2.3": "LTX-2.3 ("}[other]
    made_for = (
        f"made for a base that the file does not name (video width {info.video_dim}, audio width {info.audio_dim})"
    )
    expect_error(
        state_dict, transformer, "audio_attn1.to_k", "features", made_for, f"made for {here}", metadata=metadata
    )

    block = {IDLORA_METADATA_KEY: json.dumps({"generation": own, "base_model": "somebody/base"})}
    expect_error(state_dict, transformer, f"made for somebody/base, {own.upper()} (", metadata=block)


def test_a_gated_adapter_is_refused_by_a_transformer_without_gates():
    transformer = tiny_components("ltx-2")["transformer"]
    weights = audio_query_lora(transformer) | random_lora({"transformer_blocks.0.audio_attn1.to_gate_logits": (8, 2)})
    expect_error(weights, transformer, "to_gate_logits", "made for LTX-2.3", "made for LTX-2 (")


def test_metadata_of_another_generation_is_a_warning_when_everything_fits(tiny_adapter, caplog):
    state_dict, _ = load_adapter(tiny_adapter("ltx-2"))
    metadata = {IDLORA_METADATA_KEY: json.dumps({"generation": "ltx-2.3"})}
    check_adapter(state_dict, metadata, tiny_components("ltx-2")["transformer"])
    assert "made for LTX-2.3" in caplog.text and "loaded into LTX-2 (" in caplog.text


def test_an_adapter_that_fits_is_silent_also_beside_another_one(tiny_adapter, caplog):
    pipe = pipeline("ltx-2.3")
    load(pipe, tiny_adapter("ltx-2.3"), "a")
    load(pipe, tiny_adapter("ltx-2.3"), "b")
    assert [record for record in caplog.records if record.name.startswith("diffusers_idlora")] == []


def test_a_file_without_lora_weights_is_refused():
    transformer = tiny_components("ltx-2")["transformer"]
    expect_error({}, transformer, "no LoRA", "nothing at all")
    expect_error(
        {"transformer.proj_in.weight": torch.zeros(2, 2)}, transformer, "no LoRA", "`transformer.proj_in.weight`"
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "base_model.model."])
def test_keys_under_an_unknown_prefix_are_refused_with_the_prefixes_that_are_read(prefix):
    transformer = tiny_components("ltx-2")["transformer"]
    weights = audio_query_lora(transformer, prefix=prefix)
    expect_error(weights, transformer, f"`{prefix}{AUDIO_QUERY}", "`diffusion_model.`", "`transformer.`", "rename")


def test_an_adapter_whose_modules_do_not_exist_is_refused():
    transformer = tiny_components("ltx-2")["transformer"]
    expect_error(
        random_lora({"single_blocks.0.linear": (4, 4)}), transformer, "`single_blocks.0.linear`", "does not have"
    )


def test_blocks_beyond_the_last_one_are_refused():
    transformer = tiny_components("ltx-2")["transformer"]
    weights = {key.replace("blocks.0", "blocks.47"): value for key, value in audio_query_lora(transformer).items()}
    expect_error(weights, transformer, "`transformer_blocks.47.audio_attn1.to_q`", "has 3 blocks")


def test_an_incomplete_or_misshapen_pair_is_refused():
    transformer = tiny_components("ltx-2")["transformer"]
    weights = audio_query_lora(transformer)
    half = {key: value for key, value in weights.items() if "lora_A" in key}
    expect_error(half, transformer, "only `lora_A`", AUDIO_QUERY, "incomplete")
    bad = {key: value[:, :3] if "lora_B" in key else value for key, value in weights.items()}
    expect_error(bad, transformer, "not the (rank, inputs)", AUDIO_QUERY)


def test_tensors_that_are_no_lora_weights_are_refused():
    transformer = tiny_components("ltx-2")["transformer"]
    weights = audio_query_lora(transformer) | {f"diffusion_model.{AUDIO_QUERY}.diff_b": torch.zeros(4)}
    expect_error(weights, transformer, "1 tensors that are no LoRA weights", "diff_b")


def test_alpha_tensors_beside_a_stored_configuration_are_refused(tmp_path):
    weights = random_lora({AUDIO_QUERY: (8, 8)}) | {f"diffusion_model.{AUDIO_QUERY}.alpha": torch.tensor(2.0)}
    path = save_adapter(tmp_path / "a.safetensors", weights, {"lora_adapter_metadata": "{}"})
    with pytest.raises(ValueError, match="`adapter` has .*alpha.*stored LoRA configuration.*save_lora_weights"):
        load_adapter(path)


def test_a_plain_video_lora_warns_that_the_voice_will_not_follow(caplog):
    transformer = tiny_components("ltx-2.3")["transformer"]
    weights = random_lora(layer_sizes(transformer, "transformer_blocks.0.attn1.to_q"))
    info = check_adapter(weights, {}, transformer)
    assert not info.touches_audio and info.audio_dim is None
    assert "voice will not follow" in caplog.text
    assert dict(info.rows())["Audio modules"].startswith("none")


def test_modules_and_keys_that_will_not_load_are_counted_and_named(caplog):
    transformer = tiny_components("ltx-2")["transformer"]
    weights = audio_query_lora(transformer)
    unknown = {f"transformer_blocks.0.extra_{index}": (4, 4) for index in range(5)}
    check_adapter(weights | random_lora(unknown), {}, transformer)
    assert "without 5 modules" in caplog.text and "`transformer_blocks.0.extra_0`" in caplog.text
    caplog.clear()
    check_adapter(weights | audio_query_lora(transformer, prefix=""), {}, transformer)
    assert "without 2 keys" in caplog.text and f"`{AUDIO_QUERY}.lora_A.weight`" in caplog.text


# Finding and reading files


@pytest.mark.parametrize("filename", ["a.bin", "a.pt", "a.ckpt", "a.pth"])
def test_pickle_files_are_refused(filename, tmp_path):
    torch.save(random_lora({AUDIO_QUERY: (4, 4)}), tmp_path / filename)
    with pytest.raises(ValueError, match=f"`adapter` is '{filename}', a pickle file.*convert it to .safetensors"):
        load_adapter(tmp_path / filename)
    with pytest.raises(ValueError, match=f"`weight_name` is '{filename}', a pickle file"):
        load_adapter(tmp_path, weight_name=filename)
    with pytest.raises(ValueError, match=f"among .*{filename}: say which"):
        load_adapter(tmp_path)


def test_a_pickle_under_a_safetensors_name_and_a_truncated_file_are_refused(tiny_adapter, tmp_path):
    pickle, truncated = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    torch.save(random_lora({AUDIO_QUERY: (4, 4)}), pickle)
    truncated.write_bytes(tiny_adapter("ltx-2").read_bytes()[:-100])
    for path in (pickle, truncated):
        with pytest.raises(ValueError, match=f"`--lora` is '{path}', which can't be read .*fetch it again"):
            load_adapter(path, name="--lora")


def test_a_folder_gives_the_usual_file_else_its_only_one(tmp_path):
    weights = random_lora({AUDIO_QUERY: (4, 4)})
    for name in ("only", "lora_weights", "pytorch_lora_weights"):
        save_adapter(tmp_path / f"{name}.safetensors", weights)
        assert find_adapter_file(tmp_path).name == f"{name}.safetensors"
    assert find_adapter_file(tmp_path, weight_name="only.safetensors").name == "only.safetensors"
    assert find_adapter_file(tmp_path.parent, subfolder=tmp_path.name).name == "pytorch_lora_weights.safetensors"


def test_a_folder_that_leaves_a_choice_or_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`adapter` is .*no files"):
        load_adapter(tmp_path)
    for name in ("a.safetensors", "b.safetensors", "notes.txt"):
        save_file(random_lora({AUDIO_QUERY: (4, 4)}), tmp_path / name)
    with pytest.raises(ValueError, match="a.safetensors, b.safetensors, notes.txt: say which file with `weight_name`"):
        load_adapter(tmp_path)
    with pytest.raises(ValueError, match="'c.safetensors' was looked for among a.safetensors"):
        load_adapter(tmp_path, weight_name="c.safetensors")
    with pytest.raises(ValueError, match="`weight_name` is 'notes.txt'"):
        load_adapter(tmp_path, weight_name="notes.txt")


@pytest.mark.parametrize("source", ["missing.safetensors", "./missing", "/missing/folder", "one/two/three"])
def test_a_missing_path_is_one_sentence(source):
    with pytest.raises(ValueError, match=f"`adapter` is '{source}', where there is no file or folder: check the path"):
        load_adapter(source)


@pytest.mark.parametrize("options", [{}, {"weight_name": "lora_weights.safetensors"}])
def test_a_repository_that_was_never_downloaded_is_one_sentence_offline(options, tmp_path):
    with pytest.raises(
        ValueError, match="`adapter` is 'somebody/nothing', .*check the name and the connection"
    ) as error:
        load_adapter("somebody/nothing", cache_dir=tmp_path, local_files_only=True, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"weight_name": "lora_weights.safetensors"}])
def test_a_downloaded_repository_is_read_offline_and_a_released_one_knows_its_base(options, tmp_path):
    repository = tmp_path / "models--AviadDahan--ID-LoRA-TalkVid"
    save_adapter(repository / "snapshots" / "abc" / "lora_weights.safetensors", random_lora({AUDIO_QUERY: (4, 4)}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    info = inspect_adapter("AviadDahan/ID-LoRA-TalkVid", cache_dir=tmp_path, local_files_only=True, **options)
    assert (info.generation, info.base_model) == ("ltx-2", "Lightricks/LTX-2")


def test_anything_else_than_a_place_or_tensors_is_refused():
    with pytest.raises(ValueError, match="`adapter` is 3: give a safetensors file"):
        load_adapter(3)


# Writing files


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = save_adapter(tmp_path / "a.safetensors", random_lora({AUDIO_QUERY: (4, 4)}))
    before = path.read_bytes()
    shared = torch.zeros(4, 4)
    with pytest.raises(RuntimeError):
        save_adapter(path, {"x": shared, "y": shared})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_could_not_be_read_again_is_refused(tmp_path):
    weights = random_lora({AUDIO_QUERY: (4, 4)})
    with pytest.raises(ValueError, match="`path` is .*a.pt.*safetensors"):
        save_adapter(tmp_path / "a.pt", weights)
    with pytest.raises(ValueError, match="`state_dict` is empty"):
        save_adapter(tmp_path / "a.safetensors", {})
    with pytest.raises(ValueError, match="`metadata` has 3 under `steps`"):
        save_adapter(tmp_path / "a.safetensors", weights, {"steps": 3})
    assert list(tmp_path.iterdir()) == []


def test_metadata_that_is_no_json_is_refused(tmp_path):
    path = save_adapter(tmp_path / "a.safetensors", random_lora({AUDIO_QUERY: (4, 4)}), {IDLORA_METADATA_KEY: "{"})
    with pytest.raises(ValueError, match="`adapter` has '{' as its `idlora` metadata"):
        inspect_adapter(path)
