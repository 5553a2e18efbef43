"""The authors' preprocessed data sets: every published layout, and files that would run code."""

import pickle
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from conftest import families
from diffusers_idlora.tiny import tiny_components
from diffusers_idlora.training.original_format import OriginalFormatFolder


def save_original(
    root, name, connectors=None, family="ltx-2.3", names=("{}", "{}"), reference="reference_audio_latents"
):
    """Writes one sample as the authors' preprocessing did; returns what the pipeline's own connectors make of the text."""
    connectors = connectors or tiny_components(family)["connectors"]
    torch.manual_seed(0)
    mask = torch.tensor([0] * 5 + [1] * 11)
    seen = {}
    hooks = [
        getattr(connectors, f"{kind}_connector").register_forward_pre_hook(
            lambda module, args, kind=kind: seen.update({kind: args[0][0]})
        )
        for kind in ("video", "audio")
    ]
    with torch.no_grad():
        expected = connectors(torch.randn(1, 16, 32 * 3), mask[None], padding_side="left")
    for hook in hooks:
        hook.remove()
    latent, condition = (pattern.format(name) + ".pt" for pattern in names)
    audio = {"latents": torch.randn(2, 17, 4), "num_time_steps": 17, "frequency_bins": 4, "duration": 0.68}
    contents = {
        f"latents/{latent}": {
            "latents": torch.randn(8, 3, 2, 4),
            "num_frames": 3,
            "height": 2,
            "width": 4,
            "fps": 25.0,
        },
        f"audio_latents/{latent}": audio,
        f"{reference}/{latent}": {"latents": torch.randn(2, 25, 4)},
        f"conditions/{condition}": {
            "video_prompt_embeds": seen["video"],
            "audio_prompt_embeds": seen["audio"],
            "prompt_attention_mask": mask,
        },
    }
    for file, content in contents.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, root / file)
    return expected


def change_original(file, **changes):
    content = {**torch.load(file, weights_only=True), **changes}
    torch.save({name: value for name, value in content.items() if value is not None}, file)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestOriginalFormat:
    @families
    @pytest.mark.parametrize("names", [("{}", "{}"), ("latent_{}", "condition_{}")])
    @pytest.mark.parametrize("reference", ["reference_audio_latents", "audio_latents_clean"])
    def test_text_goes_through_the_connectors(self, tmp_path, family, names, reference):
        video, audio, mask = save_original(tmp_path, "7", family=family, names=names, reference=reference)
        folder = OriginalFormatFolder(tmp_path, tiny_components(family)["connectors"])
        (sample,) = folder
        torch.testing.assert_close(sample.video_prompt_embeds, video[0])
        torch.testing.assert_close(sample.audio_prompt_embeds, audio[0])
        assert sample.prompt_attention_mask.tolist() == mask[0].tolist()
        assert folder.shapes == [(3, 2, 4)] and sample.frame_rate == 25.0
        assert [clip.shape for clip in sample.reference_latents] == [(2, 25, 4)]
        assert not sample.video_prompt_embeds.requires_grad

    def test_connectors_without_registers_see_the_padding_too(self, tmp_path):
        config = dict(tiny_components()["connectors"].config)
        config |= {f"{kind}_connector_num_learnable_registers": None for kind in ("video", "audio")}
        connectors = LTX2TextConnectors.from_config(config).eval()
        video, audio, mask = save_original(tmp_path, "7", connectors)
        (sample,) = OriginalFormatFolder(tmp_path, connectors)
        torch.testing.assert_close(sample.video_prompt_embeds, video[0])
        torch.testing.assert_close(sample.audio_prompt_embeds, audio[0])
        assert sample.prompt_attention_mask.tolist() == mask[0].tolist()

    def test_legacy_layouts_are_read(self, tmp_path):
        save_original(tmp_path, "7", family="ltx-2")
        connectors = tiny_components("ltx-2")["connectors"]
        (new,) = OriginalFormatFolder(tmp_path, connectors)
        tokens = new.video_latents.permute(1, 2, 3, 0).reshape(-1, 8)
        change_original(tmp_path / "latents" / "7.pt", latents=tokens, num_frames=torch.tensor(3))
        features = torch.load(tmp_path / "conditions" / "7.pt", weights_only=True)["video_prompt_embeds"]
        change_original(
            tmp_path / "conditions" / "7.pt",
            prompt_embeds=features,
            video_prompt_embeds=None,
            audio_prompt_embeds=None,
        )
        (old,) = OriginalFormatFolder(tmp_path, connectors)
        assert torch.equal(old.video_latents, new.video_latents)
        assert torch.equal(old.audio_prompt_embeds, new.audio_prompt_embeds)

    def test_incomplete_samples_are_left_out(self, tmp_path):
        for name in ("1", "sub/2", "3"):
            save_original(tmp_path, name)
        (tmp_path / "conditions" / "3.pt").unlink()
        folder = OriginalFormatFolder(tmp_path, tiny_components()["connectors"])
        assert folder.names == ["1", "sub/2"] and len(folder) == 2
        fingerprint = folder.fingerprint
        (tmp_path / "latents" / "1.pt").unlink()
        assert OriginalFormatFolder(tmp_path, folder.connectors).fingerprint != fingerprint
        (tmp_path / "latents" / "sub" / "2.pt").unlink()
        with pytest.raises(ValueError, match="holds no complete sample"):
            OriginalFormatFolder(tmp_path, folder.connectors)
        with pytest.raises(ValueError, match="lacks the folder"):
            OriginalFormatFolder(tmp_path / "latents", folder.connectors)

    @pytest.mark.parametrize("folder", ["latents", "audio_latents", "reference_audio_latents", "conditions"])
    @pytest.mark.parametrize("plain_pickle", [False, True])
    def test_a_file_that_would_run_code_is_refused(self, tmp_path, folder, plain_pickle):
        save_original(tmp_path, "7")
        touched = tmp_path / "touched"
        with open(tmp_path / folder / "7.pt", "wb") as file:
            (pickle.dump if plain_pickle else torch.save)({"latents": Payload(touched)}, file)
        samples = OriginalFormatFolder(tmp_path, tiny_components()["connectors"])
        with pytest.raises(ValueError, match=f"{folder}/7.pt.*not made of plain tensors"):
            samples[0]
        assert not touched.exists()

    @pytest.mark.parametrize(
        "file, changes, sentence",
        [
            ("latents", {"fps": None}, "`fps` is missing"),
            ("latents", {"latents": torch.zeros(23, 8)}, "23 tokens, but the size is \\[3, 2, 4\\]"),
            ("audio_latents", {"latents": None}, "`latents` is missing"),
            ("audio_latents", {"latents": torch.zeros(2, 17, 5)}, "`reference_latents` of the shape"),
            ("conditions", {"prompt_attention_mask": torch.ones(1, 16)}, "must be \\[tokens, features\\]"),
            ("conditions", {"audio_prompt_embeds": torch.zeros(16, 5)}, "don't fit the base model's connectors"),
        ],
    )
    def test_a_wrong_sample_is_named_in_one_sentence(self, tmp_path, file, changes, sentence):
        save_original(tmp_path, "7")
        change_original(tmp_path / file / "7.pt", **changes)
        with pytest.raises(ValueError, match=f"wrong sample '7': .*{sentence}"):
            OriginalFormatFolder(tmp_path, tiny_components()["connectors"])[0]
