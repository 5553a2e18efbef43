"""Publishing: the files of a trained adapter, its card, and the way to the Hub and back through the real client."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import typer
import yaml
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from typer.testing import CliRunner

from conftest import families
from diffusers_idlora import IdentityGuidance, LTX2IDLoRAPipeline, cli_adapters
from diffusers_idlora.adapter_conversion import CONVERSION_METADATA_KEY, convert_adapter
from diffusers_idlora.adapter_files import read_safetensors, save_adapter
from diffusers_idlora.cli import OneLineErrors
from diffusers_idlora.lora import inspect_adapter, load_adapter, lora_config
from diffusers_idlora.tiny import save_tiny_adapter, tiny_components
from diffusers_idlora.training.hub import (
    PublishError,
    adapter_metadata,
    check_hub_access,
    publish,
    save_trained_adapter,
)
from diffusers_idlora.training.model_card import write_model_card
from diffusers_idlora.training.record import TrainingRecord
from hub_server import HubServer
from test_lora import predictions


TARGETS = r"transformer_blocks\.\d+\.(audio_attn1|audio_to_video_attn)\.(to_q|to_out\.0)"
DIFFUSERS_FILE, ORIGINAL_FILE = "pytorch_lora_weights.safetensors", "lora_weights.safetensors"


def record(**changes):
    facts = {
        "base_model": "tester/tiny-base",
        "generation": "ltx-2.3",
        "rank": 4,
        "alpha": 8.0,
        "target_modules": TARGETS,
        "steps": 20,
        "batch_size": 2,
        "learning_rate": 2e-4,
        "mask_video_from_reference": True,
        "mask_reference_from_text": False,
        "data_fingerprint": "0123abcd",
        "num_samples": 12,
        "num_speakers": 3,
        "reference_seconds": 5.0,
        "recommended": {"identity_guidance_scale": 2.5},
    }
    return TrainingRecord(**(facts | changes))


def trained_transformer(family="ltx-2.3", rank=4, alpha=8.0, adapter_name="default", **config):
    """A tiny transformer with an adapter that changes its output, in bfloat16 values."""
    transformer = tiny_components(family)["transformer"]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, **config)
    transformer.add_adapter(config, adapter_name)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.copy_(noise.bfloat16())
    return transformer


def saved(folder, **arguments):
    save_trained_adapter(folder, trained_transformer(), record(), **arguments)
    return folder


def loaded_predictions(source, family="ltx-2.3"):
    pipe = LTX2IDLoRAPipeline(**tiny_components(family))
    pipe.load_lora_weights(source)
    return predictions(pipe.transformer)


def assert_equal(first, second):
    assert torch.equal(first, second)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback that the client in this process talks to, with a token and a cache of its own."""
    with HubServer() as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # Made at import, as the constants are.
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", "write")
        yield server


# The files of a trained adapter


@families
def test_a_saved_adapter_loads_to_exactly_what_was_trained(family, tmp_path):
    transformer = trained_transformer(family)
    path = save_trained_adapter(tmp_path, transformer, record(generation=family))
    assert path == tmp_path / DIFFUSERS_FILE
    trained = predictions(transformer)
    assert_equal(loaded_predictions(tmp_path, family), trained)
    transformer.disable_adapters()
    assert (predictions(transformer) - trained).abs().max() > 0.1


def test_the_file_says_how_it_was_made(tmp_path):
    saved(tmp_path)
    info = inspect_adapter(tmp_path)
    assert (info.generation, info.base_model, info.rank, info.alpha) == ("ltx-2.3", "tester/tiny-base", 4, 8)
    assert info.metadata["recommended"] == {"identity_guidance_scale": 2.5}
    assert info.metadata["mask_video_from_reference"] and not info.metadata["mask_reference_from_text"]
    assert info.metadata["positions"] == "negative" and info.metadata["reference_seconds"] == 5.0
    assert {"steps", "data_fingerprint", "package_version", "reference_dropout"} <= info.metadata.keys()
    assert lora_config(load_adapter(tmp_path)[1])["transformer.target_modules"] == TARGETS


def test_the_metadata_does_not_tell_the_folder_of_a_local_base(tmp_path):
    (tmp_path / "my-base").mkdir()
    metadata = adapter_metadata(record(base_model=str(tmp_path / "my-base")), LoraConfig(r=4, lora_alpha=8))
    assert json.loads(metadata["idlora"])["base_model"] == "my-base"


def test_a_record_that_contradicts_the_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`record` has alpha 4, but the adapter has 8"):
        save_trained_adapter(tmp_path, trained_transformer(), record(alpha=4))
    assert list(tmp_path.iterdir()) == []


def test_the_recommended_guidance_is_saved_as_a_guider(tmp_path):
    saved(tmp_path)
    assert IdentityGuidance.from_pretrained(tmp_path).config.scale == 2.5


def test_another_adapter_name_and_type_can_be_saved(tmp_path):
    transformer = trained_transformer(adapter_name="voice")
    path = save_trained_adapter(tmp_path, transformer, record(), "voice", dtype=torch.bfloat16)
    weights = load_file(path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    layers = get_peft_model_state_dict(transformer, adapter_name="voice")
    # The values were bfloat16 numbers, so nothing is lost.
    assert all(torch.equal(weights[f"transformer.{key}"].float(), tensor) for key, tensor in layers.items())


def test_a_record_survives_json_and_rejects_what_it_does_not_know():
    assert TrainingRecord.from_json(record().to_json()) == record()
    with pytest.raises(ValueError, match="'colour', which no record"):
        TrainingRecord.from_json(record().to_json().replace('"rank"', '"colour"'))
    with pytest.raises(ValueError, match="lacks base_model"):
        TrainingRecord.from_json("{}")
    with pytest.raises(ValueError, match="`recommended` is .* JSON"):
        record(recommended={"sigmas": torch.ones(1)})


# Conversion


def test_the_original_format_acts_the_same_where_alpha_is_taken_as_the_rank(tmp_path):
    saved(tmp_path, also_original_format=True)
    weights, metadata = read_safetensors(tmp_path / ORIGINAL_FILE)
    assert all(re.fullmatch(r"diffusion_model\..+\.lora_[AB]\.weight", key) for key in weights)
    assert "lora_B holds the scale" in metadata[CONVERSION_METADATA_KEY]
    # As a tool does that knows of no metadata.
    assert_equal(loaded_predictions(weights), predictions(trained_transformer()))
    assert_equal(loaded_predictions(tmp_path / ORIGINAL_FILE), predictions(trained_transformer()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [4, 8, 2, 5])
def test_to_the_original_format_and_back_loses_nothing(alpha, dtype, tmp_path):
    save_trained_adapter(tmp_path, trained_transformer(alpha=alpha), record(alpha=alpha), dtype=dtype)
    weights, metadata = read_safetensors(tmp_path / DIFFUSERS_FILE)
    original, original_metadata = convert_adapter(weights, metadata)
    save_adapter(tmp_path / "original.safetensors", original, original_metadata)
    back, back_metadata = convert_adapter(*read_safetensors(tmp_path / "original.safetensors"))
    assert back_metadata == metadata
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) and back[key].dtype == dtype for key in weights)


def test_alphas_that_differ_by_module_are_folded_one_by_one(tmp_path):
    transformer = trained_transformer(alpha_pattern={"audio_attn1.to_q": 2.0}, use_rslora=True)
    path = save_trained_adapter(tmp_path, transformer, record())
    original, metadata = convert_adapter(*read_safetensors(path), to="original")
    query, output = (
        f"diffusion_model.transformer_blocks.0.audio_attn1.{name}.lora_B.weight" for name in ("to_q", "to_out.0")
    )
    before = {key.replace("transformer.", "diffusion_model.", 1): value for key, value in load_file(path).items()}
    assert torch.equal(original[query], before[query] * (2 / 2))
    assert torch.equal(original[output], before[output] * (8 / 2))
    assert inspect_adapter(save_adapter(tmp_path / "o.safetensors", original, metadata)).alpha == 4


def test_a_released_file_survives_the_way_to_diffusers_and_back(tmp_path):
    weights, metadata = load_adapter(save_tiny_adapter(tmp_path / "a.safetensors", tiny_components()["transformer"]))
    converted, _ = convert_adapter(weights, metadata)
    assert all(key.startswith("transformer.") for key in converted)
    back, _ = convert_adapter(converted)
    assert list(back) == list(weights) and all(torch.equal(back[key], weights[key]) for key in weights)


def test_a_dora_has_no_original_format_but_is_kept_in_that_of_diffusers(tmp_path):
    transformer = trained_transformer(use_dora=True)
    with pytest.raises(ValueError, match="lora_magnitude_vector.*keep a DoRA"):
        save_trained_adapter(tmp_path, transformer, record(use_dora=True), also_original_format=True)
    assert sorted(os.listdir(tmp_path)) == ["guider_config.json", DIFFUSERS_FILE]
    assert torch.equal(loaded_predictions(tmp_path), predictions(transformer))


# The model card


def card_of(folder, **arguments):
    path = write_model_card(folder, arguments.pop("record", record()), **arguments)
    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---")[1]), text


def test_the_front_matter_says_what_the_hub_needs(tmp_path):
    (tmp_path / "somewhere").mkdir()
    video = tmp_path / "somewhere" / "one.mp4"
    video.write_bytes(b"video")
    facts = record(license="apache-2.0", dataset="tester/clips")
    front, text = card_of(
        tmp_path / "out", record=facts, repo_id="tester/voices", prompts=["A  long\nprompt"], samples=[video]
    )
    assert front["base_model"] == "tester/tiny-base" and front["base_model_relation"] == "adapter"
    assert front["library_name"] == "diffusers" and front["pipeline_tag"] == "image-to-video"
    assert {"id-lora", "lora", "diffusers", "ltx-2.3", "text-to-audio-video"} <= set(front["tags"])
    assert front["license"] == "apache-2.0" and front["datasets"] == ["tester/clips"]
    assert front["widget"] == [{"text": "A long prompt", "output": {"url": "samples/one.mp4"}}]
    assert (tmp_path / "out/samples/one.mp4").read_bytes() == b"video" and "<Gallery />" in text


def test_the_card_has_recipe_plot_limits_and_consent(tmp_path):
    (tmp_path / "loss.png").write_bytes(b"png")
    front, text = card_of(tmp_path, loss_plot=tmp_path / "loss.png", prompts=[""])
    assert "| Rank, alpha, dropout | 4, 8, 0 |" in text and "| Steps | 20 |" in text
    assert "| Target modules | `" + TARGETS.replace("|", "\\|") + "` |" in text
    assert "![Training loss](<loss.png>)" in text and 'prompt="[VISUAL]: ' in text
    assert all(f"\n## {title}\n" in text for title in ("Use", "Recipe", "Intended use", "Limits", "Consent"))
    assert "None" not in text and "## Samples" not in text and "widget" not in front and "license" not in front


def test_the_card_of_a_local_base_tells_no_folder(tmp_path):
    (tmp_path / "my-base").mkdir()
    front, text = card_of(tmp_path / "out", record=record(base_model=str(tmp_path / "my-base")))
    assert "base_model" not in front and "`my-base`" in text and str(tmp_path) not in text


def test_a_card_with_a_missing_or_doubled_sample_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`samples` has .*gone.mp4', which is no file"):
        write_model_card(tmp_path, record(), samples=[tmp_path / "gone.mp4"])
    with pytest.raises(ValueError, match="several files named 'a.mp4'"):
        write_model_card(tmp_path, record(), samples=["x/a.mp4", "y/a.mp4"])
    assert not (tmp_path / "README.md").exists()


def test_the_usage_of_a_published_adapter_runs_as_pasted(
    hub, tmp_path, monkeypatch, tiny_checkpoint, face_png, voice_wav
):
    api = huggingface_hub.HfApi()
    api.create_repo("tester/tiny-base")
    api.upload_folder(repo_id="tester/tiny-base", folder_path=tiny_checkpoint())
    small = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}
    small |= {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "identity_guidance_scale": 2.5}
    facts = record(recommended=small, frame_rate=24)
    folder = tmp_path / "out"
    save_trained_adapter(folder, trained_transformer(), facts)
    write_model_card(folder, facts, repo_id="tester/voices", prompts=['[VISUAL]: She says "hi". [SPEECH]: Hi.'])
    publish(folder, "tester/voices")

    card = huggingface_hub.ModelCard.load("tester/voices")
    (code,) = re.findall(r"```python\n(.+?)```", card.text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("face.png").symlink_to(face_png)
    Path("voice.wav").symlink_to(voice_wav)
    exec(code, {})
    assert Path("video.mp4").stat().st_size > 0
    assert hub.asked("HEAD /tester/voices/resolve/.*pytorch_lora_weights.safetensors")


# To the Hub and back


def test_a_published_folder_loads_from_the_hub(hub, tmp_path):
    folder = saved(tmp_path / "out", also_original_format=True)
    write_model_card(folder, record(), repo_id="tester/voices")
    for leftover in ("checkpoint-10/optimizer.bin", "checkpoint-10/a.safetensors", "logs/run/events.out.tfevents.1",
                     "random_states_0.pkl", ".tmp.safetensors", "loss.csv"):  # fmt: skip
        (folder / leftover).parent.mkdir(parents=True, exist_ok=True)
        (folder / leftover).write_bytes(b"x")
    assert publish(folder, "tester/voices") == f"{hub.endpoint}/tester/voices"
    files = hub.repositories["tester/voices"].files
    assert files.keys() == {DIFFUSERS_FILE, ORIGINAL_FILE, "README.md", "guider_config.json", "loss.csv"}
    assert files[DIFFUSERS_FILE].is_large and not files["README.md"].is_large
    assert files[DIFFUSERS_FILE].content == (folder / DIFFUSERS_FILE).read_bytes()
    assert not hub.repositories["tester/voices"].private
    assert_equal(loaded_predictions("tester/voices"), predictions(trained_transformer()))


def test_a_large_file_travels_in_parts(hub, tmp_path):
    folder = saved(tmp_path / "out")
    hub.part_size = 5000
    publish(folder, "tester/voices")
    assert len(hub.asked(r"PUT /storage/\w+/\d+")) == -(-(folder / DIFFUSERS_FILE).stat().st_size // 5000) > 1
    assert hub.repositories["tester/voices"].files[DIFFUSERS_FILE].content == (folder / DIFFUSERS_FILE).read_bytes()


def test_a_name_alone_is_a_repository_of_the_user_and_a_folder_in_it_can_be_the_target(hub, tmp_path):
    publish(saved(tmp_path / "out"), "voices", path_in_repo="checkpoint-10")
    assert f"checkpoint-10/{DIFFUSERS_FILE}" in hub.repositories["tester/voices"].files


@pytest.mark.parametrize(
    "kind, request_",
    [(503, "repos/create"), ("drop", "repos/create"), (500, "/commit/"), ("drop", "/commit/"), (502, "validate-yaml")],
)
def test_what_fails_for_a_while_is_tried_again(hub, tmp_path, kind, request_):
    folder = saved(tmp_path / "out")
    write_model_card(folder, record())
    hub.fail(kind, 2, request_)
    publish(folder, "tester/voices", wait=0.01)
    assert DIFFUSERS_FILE in hub.repositories["tester/voices"].files
    assert len(hub.asked(request_)) >= 3 and hub.faults[0].times == 0


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, tmp_path):
    hub.fail("lose", 1, "/commit/")
    publish(saved(tmp_path / "out"), "tester/voices", wait=0.01)
    assert len(hub.repositories["tester/voices"].commits) == 2


def test_a_large_file_that_the_storage_drops_is_sent_again(hub, tmp_path):
    folder = saved(tmp_path / "out")
    hub.fail("drop", 1, "PUT /storage")
    publish(folder, "tester/voices", wait=0.01)
    assert hub.repositories["tester/voices"].files[DIFFUSERS_FILE].content == (folder / DIFFUSERS_FILE).read_bytes()


def test_a_download_that_was_cut_still_loads_whole(hub, tmp_path):
    publish(saved(tmp_path / "out"), "tester/voices")
    hub.fail("cut", 1, "GET /storage")
    assert_equal(loaded_predictions("tester/voices"), predictions(trained_transformer()))
    assert len(hub.asked("GET /storage")) == 2


def test_the_last_failure_says_how_to_finish(hub, tmp_path):
    folder = saved(tmp_path / "my run")
    hub.fail(503, 100)
    with pytest.raises(PublishError) as error:
        publish(folder, "tester/voices", private=True, attempts=3, wait=0.01)
    assert f"with: idlora push '{folder}' --hub-model-id tester/voices --private" in str(error.value)
    assert "503" in str(error.value) and "\n" not in str(error.value)
    assert len(hub.asked("repos/create")) == 3


def test_what_cannot_get_better_is_not_tried_again(hub, tmp_path):
    with pytest.raises(PublishError, match="idlora push"):
        publish(saved(tmp_path / "out"), "tester/voices", token="read")
    assert len(hub.asked("repos/create")) == 1


def test_a_storage_that_refuses_is_not_asked_again(hub, tmp_path):
    hub.fail(403, 100, "PUT /storage")
    with pytest.raises(PublishError, match="idlora push"):
        publish(saved(tmp_path / "out"), "tester/voices", wait=0.01)
    assert len(hub.asked("PUT /storage")) == 1


def test_offline_mode_is_said_at_once(hub, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="offline mode is enabled"):
        publish(saved(tmp_path / "out"), "tester/voices", wait=0.01)
    assert hub.requests == [] and "attempt 2" not in caplog.text


def test_a_private_repository_stays_private_and_a_public_one_is_refused(hub, tmp_path):
    folder = saved(tmp_path / "out")
    publish(folder, "tester/voices", private=True)
    assert hub.repositories["tester/voices"].private
    publish(folder, "tester/open")
    commits = len(hub.repositories["tester/open"].commits)
    with pytest.raises(PublishError, match="`tester/open` exists on the Hub and is public"):
        publish(folder, "tester/open", private=True)
    assert len(hub.repositories["tester/open"].commits) == commits


def test_a_folder_without_an_adapter_or_a_wrong_name_reaches_no_network(hub, tmp_path):
    (tmp_path / "notes.txt").write_text("private")
    with pytest.raises(ValueError, match="`folder` is .*the adapter's .safetensors file"):
        publish(tmp_path, "tester/voices")
    with pytest.raises(ValueError, match="`folder` is .*which is no folder"):
        publish(tmp_path / "gone", "tester/voices")
    with pytest.raises(ValueError, match="`repo_id` is 'a/b/c', which can't be"):
        publish(tmp_path, "a/b/c")
    assert hub.requests == []


# Before training


def test_access_is_granted_to_what_publishing_may_write(hub, tmp_path):
    hub.fail(503, 1, "whoami")
    check_hub_access("tester/voices", wait=0.01)
    check_hub_access("voices")
    publish(saved(tmp_path), "tester/voices")
    check_hub_access("tester/voices")
    assert hub.repositories.keys() == {"tester/voices"}


@pytest.mark.parametrize(
    "token, repo_id, sentence",
    [
        ("read", "tester/voices", "`token` may only read"),
        ("nonsense", "tester/voices", "`token` is not valid on the Hub"),
        ("write", "somebody/new", "who is not part of 'somebody'"),
        ("other", "tester/voices", "`token` has no write access to `tester/voices`"),
    ],
)
def test_missing_access_is_one_sentence(hub, tmp_path, token, repo_id, sentence):
    publish(saved(tmp_path), "tester/voices")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_hub_access(repo_id, token)


def test_a_missing_token_an_unreachable_hub_and_a_public_repository_are_said(hub, tmp_path, monkeypatch):
    publish(saved(tmp_path), "tester/voices")
    with pytest.raises(ValueError, match="is public"):
        check_hub_access("tester/voices", private=True)
    hub.fail("drop", 2)
    with pytest.raises(ValueError, match="could not say .* `idlora push`"):
        check_hub_access("tester/voices", attempts=2, wait=0.01)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="`token` is not given and none is stored"):
        check_hub_access("tester/voices")


# The commands


def invoke(*arguments):
    app = typer.Typer(cls=OneLineErrors)
    cli_adapters.register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_convert_goes_both_ways_and_says_what_it_folds(tmp_path):
    saved(tmp_path)
    result = invoke("convert", tmp_path / DIFFUSERS_FILE, tmp_path / "o.safetensors")
    assert result.exit_code == 0, result.output
    assert "folded into lora_B" in result.output
    assert inspect_adapter(tmp_path / "o.safetensors").format == "original"
    result = invoke("convert", tmp_path / "o.safetensors", tmp_path / "d.safetensors", "--to", "diffusers")
    assert result.exit_code == 0, result.output
    weights, metadata = read_safetensors(tmp_path / "d.safetensors")
    first_weights, first_metadata = read_safetensors(tmp_path / DIFFUSERS_FILE)
    assert metadata == first_metadata and weights.keys() == first_weights.keys()
    assert all(torch.equal(weights[key], first_weights[key]) for key in weights)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["a.safetensors", "b.safetensors", "--to", "comfy"], "`to` is 'comfy'"),
        (["a.safetensors", "b.bin"], "ends in .safetensors"),
        (["a.safetensors", "a.safetensors"], "already there"),
        (["gone.safetensors", "b.safetensors"], "`IN` is 'gone.safetensors'"),
    ],
)
def test_a_conversion_that_cannot_work_is_one_line(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    save_tiny_adapter(Path("a.safetensors"), tiny_components()["transformer"])
    result = invoke("convert", *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr and result.stderr.count("\n") == 1
    assert os.listdir() == ["a.safetensors"]


SCRIPT = """
import sys
import typer
from diffusers_idlora import cli_adapters
from diffusers_idlora.adapter_files import find_adapter_file
from diffusers_idlora.cli import OneLineErrors

app = typer.Typer(cls=OneLineErrors)
cli_adapters.register(app)
try:
    app(["push", sys.argv[1], "--hub-model-id", "tester/voices", "--private"])
except SystemExit as end:
    assert end.code == 0, end.code
print(find_adapter_file("tester/voices").resolve())
"""


def test_push_and_download_work_with_hf_endpoint_alone(tmp_path):
    folder = saved(tmp_path / "out")
    settings = {
        "HF_TOKEN": "write",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    with HubServer() as hub:
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder)],
            capture_output=True,
            text=True,
            env=os.environ | settings | {"HF_ENDPOINT": hub.endpoint, "OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.stderr
        address, path = result.stdout.split()
        assert address == f"{hub.endpoint}/tester/voices"
        assert Path(path).read_bytes() == (folder / DIFFUSERS_FILE).read_bytes()
        assert hub.repositories["tester/voices"].private


def test_a_push_that_fails_is_one_line(hub, tmp_path):
    result = invoke("push", saved(tmp_path / "out"), "--hub-model-id", "tester/voices", "--token", "read")
    assert result.exit_code == 2
    assert "idlora push" in result.stderr and "Error:" in result.stderr.splitlines()[-1]
