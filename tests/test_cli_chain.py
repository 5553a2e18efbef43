"""`idlora chain`: lines to clips that go on from each other, in one video."""

import json

import numpy as np
import pytest

from command_line import QUICK, assert_one_line_error, invoke, leftovers
from diffusers_idlora import LTX2IDLoRAPipeline, join_clips
from diffusers_idlora.chain import Chain, read_lines, settings_of_lines
from diffusers_idlora.generation import call_arguments, load_models, read_record
from diffusers_idlora.media import file_sha256, read_video, write_video
from diffusers_idlora.settings import ClipSettings


pytest_plugins = ["command_line_fixtures"]

TEXT = "Good evening.\n\n  [VISUAL]: a closed door [SPEECH]: And good night. \n"
LINES = ("Good evening.", "[VISUAL]: a closed door [SPEECH]: And good night.")


@pytest.fixture(scope="module")
def lines_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "lines.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def chained(inputs, lines_file, tmp_path_factory):
    """The mp4 of two lines."""
    output = tmp_path_factory.mktemp("chained") / "out.mp4"
    options = (*inputs, *QUICK, "--num-frames", 17, "--visual", "a face", "--sounds", "calm", "--seed", 5)
    result = invoke("chain", lines_file, *options, "--lead-in", 0.1, "-o", output)
    assert result.exit_code == 0, result.output
    assert (result.stdout, result.stderr) == (f"{output}\n", "")
    return output


def test_each_line_is_a_clip_that_goes_on_from_the_one_before(chained, tmp_path):
    models, settings, record = read_record(chained.with_suffix(".json"))
    assert tuple(record["lines"]) == LINES
    assert record["output"]["num_frames"] == 17 + 16
    pipe = load_models(models)
    plain = LTX2IDLoRAPipeline(**pipe.components)
    plain.set_progress_bar_config(disable=True)
    first, second = (call_arguments(pipe, models, clip) for clip in settings_of_lines(settings, LINES))
    assert (first["lead_in"], second["lead_in"], second["image"]) == (0.1, 0.0, None)
    assert str(first["prompt"]) == "[VISUAL]: a face [SPEECH]: Good evening. [SOUNDS]: calm"
    assert [item["generator"].initial_seed() for item in (first, second)] == [5, 6]
    clips = []
    for arguments in (first, second):
        earlier = {"continue_from": clips[0]} if clips else {}
        result = plain(**arguments | earlier)
        clips.append((result.frames[0], result.audio[0]))
    frames, sound = join_clips(*clips, 25, plain.output_sampling_rate)
    write_video(tmp_path / "expected.mp4", frames, 25, sound, plain.output_sampling_rate)
    for result, expected in zip(read_video(chained), read_video(tmp_path / "expected.mp4")):
        assert np.array_equal(result, expected)


def test_its_record_makes_it_again_and_a_single_clip_is_not_made_of_it(chained, tmp_path):
    again = tmp_path / "again.mp4"
    assert_one_line_error(invoke("generate", "--from", chained.with_suffix(".json"), "-o", again), "idlora chain")
    result = invoke("chain", "--from", chained.with_suffix(".json"), "-o", again)
    assert result.exit_code == 0, result.output
    assert file_sha256(again) == file_sha256(chained)
    assert leftovers(tmp_path) == ["again.json", "again.mp4"]


def test_what_is_there_is_kept_and_a_record_of_other_lines_is_not_replaced(chained, tmp_path):
    settings = read_record(chained.with_suffix(".json"))[1]
    with pytest.raises(ValueError, match="`output` .* is already there"):
        Chain(settings, chained, lines=LINES).check()
    alone = tmp_path / "out.mp4"
    alone.with_suffix(".json").write_bytes(chained.with_suffix(".json").read_bytes())
    assert Chain(settings, alone, lines=LINES).replaceable == [alone.with_suffix(".json")]
    assert Chain(settings, alone, lines=LINES[:1]).replaceable == []


def test_a_chain_of_two_stages_keeps_its_size(inputs, lines_file, tmp_path):
    options = (*inputs, *QUICK, "--recipe", "two-stage", "--distilled-lora", "none", "--stage-2-sigmas", 0.5)
    result = invoke("chain", lines_file, *options, "--visual", "a face", "-o", tmp_path / "out.mp4")
    assert result.exit_code == 0, result.output
    assert read_video(tmp_path / "out.mp4")[0].shape == (9 + 8, 64, 64, 3)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("\n \n", (), ["`LINES`", "no lines"]),
        (None, (), ["`LINES`", "missing.txt"]),
        ("a\n[SMELL]: roses", (), ["line 2:", "[SMELL]"]),
        ("a\nb [SPEECH]: c", (), ["line 2:", "`speech`"]),
        ("a", ("--speech", "b"), ["`speech`", "lines"]),
        ("a", ("--prompt", "b"), ["`prompt`", "lines"]),
        ("a", ("--from", "x.json"), ["`LINES`", "`--from`"]),
        ("a", ("--image", "missing.png"), ["line 1:", "`image`", "missing.png"]),
        ("a", ("--output", "LINES.mp4"), ["`output`", "input"]),
        ("a\nb", ("--num-frames", "1"), ["`num_frames` is 1", "at least 9"]),
    ],
)
def test_each_mistake_is_one_clear_sentence(text, options, words, inputs, tmp_path):
    source = tmp_path / ("missing.txt" if text is None else "lines.mp4")
    if text is not None:
        source.write_text(text)
    options = [str(source) if option == "LINES.mp4" else option for option in options]
    before = leftovers(tmp_path)
    result = invoke("chain", source, *inputs[:4], *QUICK, "-o", tmp_path / "out.mp4", *options)
    assert_one_line_error(result, *words)
    assert leftovers(tmp_path) == before


def test_a_record_of_one_clip_is_refused(chained, tmp_path):
    record = json.loads(chained.with_suffix(".json").read_text())
    del record["lines"]
    (tmp_path / "one.json").write_text(json.dumps(record))
    assert_one_line_error(invoke("chain", "--from", tmp_path / "one.json"), "`from`", "idlora generate")


def test_a_line_that_fails_in_the_model_leaves_nothing_behind(inputs, lines_file, tmp_path):
    options = (*inputs[:4], *QUICK, "--stg-blocks", 77, "--stg-scale", 1)
    result = invoke("chain", lines_file, *options, "-o", tmp_path / "out.mp4")
    assert_one_line_error(result, "line 1:", "`stg_blocks`", "77")
    assert leftovers(tmp_path) == []


def test_without_a_seed_the_clips_have_seeds_that_follow_each_other_once_it_is_settled():
    clips = settings_of_lines(ClipSettings().resolved(), LINES)
    assert clips[1].seed == clips[0].seed + 1


def test_only_line_feeds_separate_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffa\u2028b\r\n\nc".encode())
    assert read_lines(path) == ("a\u2028b", "c")
