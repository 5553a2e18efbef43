"""The shipped checkpoint of the identity world: the voice follows the reference, and stops to where something is broken."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_idlora.identity_world import (
    SHIPPED_CHECKPOINT,
    IdentityWorld,
    Sampler,
    demonstrate,
    load_identity_model,
    make_references,
)
from diffusers_idlora.identity_world.world import TOKENS_PER_WORD
from diffusers_idlora.lora import inspect_adapter
from diffusers_idlora.media import file_sha256
from diffusers_idlora.reference import ReferenceBatch


ROOT = Path(__file__).parents[1]
NUM_CLIPS = 32
# Between a voice that follows, about 0.9, and one that doesn't, about 0; the mean of 32 cosines scatters by 0.06.
MARGIN = 0.5


@pytest.fixture(scope="module")
def world():
    return IdentityWorld()


@pytest.fixture(scope="module")
def model():
    return load_identity_model()


@pytest.fixture(scope="module")
def scenes(world):
    speakers = world.speakers(NUM_CLIPS, torch.Generator().manual_seed(11))
    return world.scenes(speakers, torch.Generator().manual_seed(12))


@pytest.fixture(scope="module")
def similarity(world, model, scenes):
    def measured(references, **settings):
        _, audio = Sampler(**settings)(model, scenes, references)
        return world.similarity(audio, scenes.reference_tokens).mean().item()

    return measured


@pytest.fixture(scope="module")
def without_reference(similarity):
    return similarity(None)


def test_the_generated_voice_follows_the_reference_and_says_the_prompts_words(world, model, scenes, without_reference):
    video, audio = Sampler()(model, scenes, make_references(model, scenes.reference_tokens))

    assert world.similarity(audio, scenes.reference_tokens).mean() > without_reference + MARGIN
    assert (world.heard_words(audio) == scenes.words).float().mean() > 0.9
    assert (world.heard_words(audio) == world.seen_words(video)).float().mean() > 0.9


def test_the_base_without_the_adapter_ignores_the_reference(world, scenes):
    base = load_identity_model(with_adapter=False)
    _, audio = Sampler()(base, scenes, make_references(base, scenes.reference_tokens))

    assert world.similarity(audio, scenes.reference_tokens).mean().abs() < MARGIN / 2


def test_a_reference_at_the_targets_own_positions_is_not_followed(model, scenes, similarity, without_reference):
    overlapping = make_references(model, scenes.reference_tokens, "overlapping")

    assert similarity(overlapping) < without_reference + MARGIN


def test_a_reference_whose_positions_are_off_by_a_word_is_not_followed(model, scenes, similarity, without_reference):
    references = make_references(model, scenes.reference_tokens)
    word = TOKENS_PER_WORD / model.audio_rope.audio_latents_per_second
    moved = ReferenceBatch(references.tokens, references.positions - word, references.lengths)

    assert similarity(moved) < without_reference + MARGIN


def test_padding_before_the_reference_changes_nothing_unless_the_mask_is_on_the_wrong_side(
    model, scenes, similarity, without_reference
):
    references = make_references(model, scenes.reference_tokens)
    padding = torch.zeros_like(references.tokens), torch.zeros_like(references.positions)
    # The mask hides the front. With the recording there and the padding behind it, the mask hides the recording.
    right = ReferenceBatch(
        torch.cat([padding[0], references.tokens], dim=1),
        torch.cat([padding[1], references.positions], dim=2),
        references.lengths,
    )
    wrong = ReferenceBatch(
        torch.cat([references.tokens, padding[0]], dim=1),
        torch.cat([references.positions, padding[1]], dim=2),
        references.lengths,
    )

    assert similarity(right) == pytest.approx(similarity(references), abs=1e-3)
    assert similarity(wrong) < without_reference + MARGIN


def test_identity_guidance_of_the_wrong_sign_turns_the_voice_away(model, scenes, similarity, without_reference):
    references = make_references(model, scenes.reference_tokens)

    assert similarity(references, identity_guidance_scale=1.0) > without_reference + MARGIN
    assert similarity(references, identity_guidance_scale=-2.0) < without_reference - MARGIN


def test_strong_identity_guidance_exaggerates_the_voice_and_costs_words(world, model, scenes):
    references = make_references(model, scenes.reference_tokens)
    strength = {}
    for scale in (0.0, 3.0):
        _, audio = Sampler(identity_guidance_scale=scale)(model, scenes, references)
        strength[scale] = world.heard_filters(audio).norm() / world.heard_filters(scenes.reference_tokens).norm()

    assert strength[0.0] == pytest.approx(0.9, abs=0.1)
    assert strength[3.0] > 1.5 * strength[0.0]
    assert (world.heard_words(audio) == scenes.words).float().mean() < 0.9


def test_somebody_elses_recording_does_not_give_the_speakers_voice(model, scenes, similarity):
    strangers = make_references(model, scenes.reference_tokens.roll(1, dims=0))

    assert abs(similarity(strangers)) < MARGIN / 2


def test_the_shipped_files_are_those_that_the_training_wrote():
    hashes = json.loads((SHIPPED_CHECKPOINT / "sha256.json").read_text())

    files = {path.relative_to(SHIPPED_CHECKPOINT).as_posix() for path in SHIPPED_CHECKPOINT.rglob("*.*")}
    assert files == {*hashes, "sha256.json"}
    assert {name: file_sha256(SHIPPED_CHECKPOINT / name) for name in hashes} == hashes


def test_the_shipped_adapter_is_an_id_lora_of_the_packages_own_format():
    info = inspect_adapter(SHIPPED_CHECKPOINT / "id_lora")

    assert info.generation == "ltx-2.3"
    assert info.touches_audio and all("audio" in module for module in info.modules)
    assert info.metadata["mask_video_from_reference"] is True and info.metadata["positions"] == "negative"


def test_the_demonstration_draws_the_voices_and_tells_both_similarities(tmp_path):
    with_reference, without = demonstrate(tmp_path / "new" / "demo.png")

    assert with_reference > without + MARGIN
    with Image.open(tmp_path / "new" / "demo.png") as picture:
        assert picture.format == "PNG" and len(picture.getcolors(maxcolors=100_000)) > 4


def test_the_demonstration_refuses_another_format(tmp_path):
    with pytest.raises(ValueError, match="`output_png` is .*demo.jpg"):
        demonstrate(tmp_path / "demo.jpg")


def test_a_recording_alone_tells_the_voice_only_if_it_is_read_in_time(world, scenes):
    recording = scenes.reference_tokens

    assert world.similarity(scenes.audio_tokens, recording).mean() > 0.95
    # The filter's signs sum to nothing, so that averaging a recording is of no use.
    sounds = world.sounds[scenes.reference_words].flatten(1, 2)
    assert (recording * sounds - 1).mean(dim=1).abs().mean() < 0.05


def test_an_unknown_placement_is_refused_by_name(model, scenes):
    with pytest.raises(ValueError, match="`placement` is 'later'"):
        make_references(model, scenes.reference_tokens, "later")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.identity_world import measuring, parts, report

    monkeypatch.setattr(measuring, "NUM_CLIPS", 4)
    threads = torch.get_num_threads()
    yield parts, report
    torch.set_num_threads(threads)


def test_a_run_that_broke_off_goes_on_with_what_is_not_finished(benchmark, tmp_path):
    parts, _ = benchmark
    schedule = parts.Schedule(2, 1e-3, batch_size=4)
    plan = parts.Plan(schedule, schedule, rank=4)
    steps = []

    for _ in range(2):
        for part in (parts.BASE, "no masks"):
            parts.run_part(tmp_path, plan, 0, part, lambda step, part=part: steps.append((part, step)))

    assert steps == [(parts.BASE, 1), (parts.BASE, 2), ("no masks", 1), ("no masks", 2)]
    assert set(parts.read_part(tmp_path, 0, "no masks")["tables"]["adapter"]) >= {"no reference", "reference"}
    assert parts.read_part(tmp_path, 1, parts.BASE) is None


def test_the_page_shows_the_numbers_of_the_results(benchmark):
    _, report = benchmark
    results = json.loads((ROOT / "benchmarks" / "identity_world" / "results.json").read_text())
    page = (ROOT / "docs" / "mechanism.md").read_text()

    for name, table in report.tables(results).items():
        assert report.insert(page, name, table) == page


def test_a_page_without_the_markers_of_a_table_is_refused(benchmark):
    _, report = benchmark

    assert report.insert("a\n<!-- b -->\nold\n<!-- /b -->\n", "b", "new") == "a\n<!-- b -->\n\nnew\n\n<!-- /b -->\n"
    with pytest.raises(ValueError, match="no markers for 'c'"):
        report.insert("a", "c", "new")
