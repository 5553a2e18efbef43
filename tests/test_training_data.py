"""The table of clips, pairs, what is read from a clip, and prepared samples."""

import os
import shlex
import sys
from collections import Counter
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_idlora.demo_assets import demo_voice
from diffusers_idlora.media import read_video, write_video
from diffusers_idlora.training.clips import (
    Bucket,
    ClipInfo,
    choose_bucket,
    probe_clip,
    read_frames,
    read_sound,
    read_voice,
)
from diffusers_idlora.training.manifest import Clip, Columns, VoiceSpan, find_dataset, read_manifest
from diffusers_idlora.training.pairs import choose_validation_voices, make_pairs
from diffusers_idlora.training.samples import (
    SampleFolder,
    TrainingSample,
    load_sample,
    read_sample_metadata,
    save_sample,
    write_index,
)
from talking_clips import FPS, NUM_FRAMES, write_clip, write_table


def make_sample(**changes):
    values = {
        "video_latents": torch.randn(8, 3, 2, 2),
        "audio_latents": torch.randn(2, 17, 4),
        "reference_latents": (torch.randn(2, 25, 4), torch.randn(2, 31, 4)),
        "video_prompt_embeds": torch.randn(16, 32),
        "audio_prompt_embeds": torch.randn(16, 16),
        "prompt_attention_mask": torch.ones(16, dtype=torch.uint8),
        "frame_rate": 25.0,
    }
    return TrainingSample(**{**values, **changes})


def make_sample_folder(root, count=2):
    (root / "samples").mkdir(parents=True)
    rows = []
    for index in range(count):
        file = f"samples/{index}.safetensors"
        save_sample(root / file, make_sample(), {"caption": "a"})
        split = "train" if index else "validation"
        rows.append({"id": str(index), "file": file, "shape": [3, 2, 2], "split": split})
    write_index(root, rows)
    return rows


class TestSamples:
    def test_a_sample_comes_back_as_it_was_saved(self, tmp_path):
        sample = make_sample(video_latents=torch.randn(8, 3, 2, 2).bfloat16())
        save_sample(tmp_path / "a.safetensors", sample, {"caption": "ü"})
        loaded = load_sample(tmp_path / "a.safetensors")
        for name in ("video_latents", "audio_latents", "video_prompt_embeds", "prompt_attention_mask"):
            torch.testing.assert_close(getattr(loaded, name), getattr(sample, name), rtol=0, atol=0)
        assert [clip.shape for clip in loaded.reference_latents] == [(2, 25, 4), (2, 31, 4)]
        assert loaded.frame_rate == 25.0
        assert read_sample_metadata(tmp_path / "a.safetensors") == {"caption": "ü", "frame_rate": 25.0}
        umask = os.umask(0)
        os.umask(umask)
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
        assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"video_latents": torch.zeros(1, 8, 3, 2, 2)},
            {"audio_latents": torch.zeros(2, 0, 4)},
            {"reference_latents": (torch.zeros(2, 25, 5),)},
            {"audio_prompt_embeds": torch.zeros(15, 16)},
            {"prompt_attention_mask": torch.zeros(1, 16)},
            {"frame_rate": 0.0},
        ],
    )
    def test_tensors_that_do_not_belong_together_are_refused(self, changes):
        with pytest.raises(ValueError, match=f"`{next(iter(changes))}`"):
            make_sample(**changes)

    def test_a_folder_knows_its_shapes_splits_and_content(self, tmp_path):
        rows = make_sample_folder(tmp_path, 3)
        folder = SampleFolder(tmp_path)
        assert len(folder) == 3 and folder.shapes == [(3, 2, 2)] * 3
        assert folder[2].audio_latents.shape == (2, 17, 4)
        assert [row["id"] for row in SampleFolder(tmp_path, split="train").rows] == ["1", "2"]
        write_index(tmp_path, rows[::-1])
        assert SampleFolder(tmp_path).fingerprint == folder.fingerprint
        write_index(tmp_path, [{**rows[0], "caption": "another"}, *rows[1:]])
        assert SampleFolder(tmp_path).fingerprint != folder.fingerprint

    def test_a_folder_without_samples_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="`instance_data_root` .* has no index.jsonl"):
            SampleFolder(tmp_path)
        write_index(tmp_path, [])
        with pytest.raises(ValueError, match="holds no sample"):
            SampleFolder(tmp_path)

    @pytest.mark.parametrize("file", ["../a.safetensors", "/a.safetensors", "b/../../a", "..\\a", "C:\\a", "", 3])
    def test_an_index_that_leads_out_of_its_folder_is_refused(self, tmp_path, file):
        write_index(tmp_path, [{"file": file, "shape": [3, 2, 2], "split": "train"}])
        with pytest.raises(ValueError, match="`file` must be a path inside the data set"):
            SampleFolder(tmp_path)

    def test_samples_may_be_links_as_in_the_cache_of_the_hub(self, tmp_path):
        rows = make_sample_folder(tmp_path / "blobs", 1)
        (tmp_path / "snapshot" / "samples").mkdir(parents=True)
        (tmp_path / "snapshot" / rows[0]["file"]).symlink_to(tmp_path / "blobs" / rows[0]["file"])
        write_index(tmp_path / "snapshot", rows)
        assert SampleFolder(tmp_path / "snapshot")[0].frame_rate == 25.0

    @pytest.mark.parametrize(
        "line", ["{", "[]", '{"file": "a"}', '{"file": "a", "shape": [0, 1, 1], "split": "train"}']
    )
    def test_a_damaged_index_names_its_line(self, tmp_path, line):
        (tmp_path / "index.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match="line 1 of"):
            SampleFolder(tmp_path)

    def test_a_damaged_sample_is_named(self, tmp_path):
        rows = make_sample_folder(tmp_path)
        (tmp_path / rows[0]["file"]).write_bytes(b"half")
        write_index(tmp_path, [rows[0], {**rows[1], "shape": [4, 2, 2]}])
        with pytest.raises(ValueError, match="0.safetensors' is damaged"):
            SampleFolder(tmp_path)[0]
        with pytest.raises(ValueError, match="inconsistent: .*1.safetensors"):
            SampleFolder(tmp_path)[1]


@st.composite
def speakers_and_clips(draw):
    speakers = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
    return [Clip(f"{i}.mp4", Path(f"/d/{i}.mp4"), "caption", speaker) for i, speaker in enumerate(speakers)]


class TestPairs:
    @settings(max_examples=60, deadline=None)
    @given(speakers_and_clips(), st.integers(1, 4), st.integers(0, 5))
    def test_a_clip_gets_other_clips_of_its_speaker(self, clips, pairs_per_clip, seed):
        pairs, dropped = make_pairs(clips, pairs_per_clip, seed)
        by_name = {clip.file_name: clip for clip in clips}
        sizes = Counter(clip.speaker_id for clip in clips)
        for pair in pairs:
            (reference,) = pair.references
            assert reference.file_name != pair.target.file_name
            assert by_name[reference.file_name].speaker_id == pair.target.speaker_id
        counts = Counter(pair.target.file_name for pair in pairs)
        for clip in clips:
            assert counts[clip.file_name] == min(pairs_per_clip, sizes[clip.speaker_id] - 1)
        assert {one.file_name for one in dropped} == {name for name in by_name if counts[name] == 0}
        assert len({pair.id for pair in pairs}) == len(pairs)

    @settings(max_examples=30, deadline=None)
    @given(speakers_and_clips(), st.integers(0, 5), st.randoms())
    def test_pairs_depend_on_the_seed_and_not_on_the_order(self, clips, seed, shuffler):
        shuffled = list(clips)
        shuffler.shuffle(shuffled)
        assert make_pairs(clips, 1, seed) == make_pairs(shuffled, 1, seed)

    def test_another_seed_gives_other_pairs(self):
        clips = [Clip(f"{i}.mp4", Path(f"{i}.mp4"), "c", "a") for i in range(20)]
        assert make_pairs(clips, seed=0) != make_pairs(clips, seed=1)

    def test_a_named_reference_comes_before_other_clips(self):
        voice = VoiceSpan("voice.wav", Path("voice.wav"), 1.0, 3.0)
        clips = [Clip(f"{i}.mp4", Path(f"{i}.mp4"), "c", "a", (voice,) * (i == 0)) for i in range(3)]
        pairs, _ = make_pairs(clips, 2)
        assert [pair.references for pair in pairs if pair.target is clips[0]] == [(voice,)]

    def test_an_only_clip_may_be_paired_with_the_rest_of_itself(self):
        clips = [Clip(f"{i}.mp4", Path(f"{i}.mp4"), "c", str(i)) for i in range(2)]
        pairs, dropped = make_pairs(clips, free_spans={"0.mp4": (4.84, 7.0)})
        assert [pair.references[0] for pair in pairs] == [VoiceSpan("0.mp4", Path("0.mp4"), 4.84, 7.0)]
        assert [(one.file_name, "too short" in one.reason) for one in dropped] == [("1.mp4", True)]

    def test_held_out_speakers_leave_some_to_train_on(self):
        clips = [Clip(f"{i}.mp4", Path(f"{i}.mp4"), "c", str(i // 2)) for i in range(8)]
        pairs, _ = make_pairs(clips)
        assert len(choose_validation_voices(pairs, 2, seed=0)) == 2
        assert len({frozenset(choose_validation_voices(pairs, 2, seed)) for seed in range(9)}) > 1
        with pytest.raises(ValueError, match="`validation_speakers` is 4, but of 4 speakers"):
            choose_validation_voices(pairs, 4)


class TestManifest:
    @pytest.fixture
    def root(self, tmp_path):
        for name in ("a.mp4", "b.mp4", "voice.wav"):
            (tmp_path / name).write_bytes(b"")
        return tmp_path

    @pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
    def test_tables_of_all_kinds_say_the_same(self, root, suffix):
        rows = [
            {"file_name": "a.mp4", "caption": "first", "speaker_id": "007", "reference_file_name": None},
            {"file_name": "b.mp4", "caption": "second", "speaker_id": None, "reference_file_name": "voice.wav"},
        ]
        table = datasets.Dataset.from_list([{**row, "reference_start": 0.5} for row in rows])
        getattr(table, {"jsonl": "to_json", "csv": "to_csv", "parquet": "to_parquet"}[suffix])(
            str(root / f"metadata.{suffix}")
        )
        first, second = read_manifest(root)[0]
        assert (first.caption, first.speaker_id, first.references) == ("first", "007", ())
        assert second.speaker_id is None
        assert second.references == (VoiceSpan("voice.wav", root / "voice.wav", 0.5, None),)

    def test_tables_in_subfolders_name_files_beside_them(self, root):
        (root / "more").mkdir()
        (root / "more" / "c.mp4").write_bytes(b"")
        write_table(root, [{"file_name": "a.mp4", "caption": "x", "speaker_id": 1}])
        write_table(root / "more", [{"file_name": "./c.mp4", "caption": "x", "speaker_id": 1}])
        assert [(clip.file_name, clip.speaker_id) for clip in read_manifest(root)[0]] == [
            ("a.mp4", "1"),
            ("more/c.mp4", "1"),
        ]

    def test_columns_may_have_other_names_and_captions_three_parts(self, root):
        write_table(root, [{"video": "a.mp4", "who": "x", "visual": "a man", "speech": "Hello."}])
        (clip,), _ = read_manifest(root, Columns(video="video", speaker_id="who"))
        assert clip.caption == "[VISUAL]: a man [SPEECH]: Hello." and clip.speaker_id == "x"

    def test_rows_that_cannot_be_used_are_dropped_with_their_reason(self, root):
        good = {"file_name": "a.mp4", "caption": "x", "speaker_id": "s", "reference_file_name": ["voice.wav", "b.mp4"]}
        others = [f"c{index}.mp4" for index in range(5)]
        for name in others:
            (root / name).write_bytes(b"")
        write_table(
            root,
            [
                {**good, "reference_start": [None, 1.0]},
                {**good, "caption": "again"},
                {**good, "file_name": "gone.mp4"},
                {**good, "file_name": None},
                {**good, "file_name": others[0], "reference_file_name": ["lost.wav"]},
                {**good, "file_name": others[1], "reference_start": [1.0]},
                {**good, "file_name": others[2], "reference_start": [2.0, 0.0], "reference_end": [1.0, 1.0]},
                {**good, "file_name": others[3], "caption": "[SPEECH]: a [SPEECH]: b"},
                {**good, "file_name": others[4], "speaker_id": " ", "reference_file_name": []},
            ],
        )
        clips, dropped = read_manifest(root)
        assert [[span.start for span in clip.references] for clip in clips] == [[None, 1.0]]
        reasons = {one.file_name: one.reason for one in dropped}
        assert "more than once" in reasons["a.mp4"]
        assert "doesn't exist" in reasons["gone.mp4"]
        assert any("`file_name` is empty" in reason for reason in reasons.values())
        expected = ("'lost.wav'", "2 references have 1 starts", "span from 2.0 to 1.0", "tag", "neither `speaker_id`")
        for name, part in zip(others, expected):
            assert part in reasons[name]

    @pytest.mark.parametrize(
        "row, sentence",
        [
            ({"caption": "x", "speaker_id": "s"}, "without the column 'file_name'"),
            ({"file_name": "a.mp4", "speaker_id": "s"}, "without the column 'caption' or 'visual'"),
            ({"file_name": "a.mp4", "caption": "x"}, "without the column 'speaker_id' or 'reference_file_name'"),
            ({"file_name": "../a.mp4", "caption": "x", "speaker_id": "s"}, "`file_name` must be a path inside"),
            (
                {"file_name": "a.mp4", "caption": "x", "reference_file_name": "./a.mp4"},
                "`reference_file_name` must be another recording .* is the target itself",
            ),
        ],
    )
    def test_a_wrong_table_is_one_sentence(self, root, row, sentence):
        write_table(root, [row])
        with pytest.raises(ValueError, match=sentence):
            read_manifest(root)

    def test_a_folder_without_one_readable_table_is_refused(self, root):
        with pytest.raises(ValueError, match="holds no metadata.jsonl"):
            read_manifest(root)
        (root / "metadata.jsonl").write_text("")
        with pytest.raises(ValueError, match="empty table|can't be read"):
            read_manifest(root)
        (root / "metadata.jsonl").write_text('{"file_name": \n')
        with pytest.raises(ValueError, match="can't be read"):
            read_manifest(root)
        (root / "metadata.csv").write_text("file_name,caption,speaker_id\n")
        with pytest.raises(ValueError, match="two tables"):
            read_manifest(root)

    def test_a_data_set_of_the_hub_is_found_in_its_cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        repository, commit = tmp_path / "datasets--someone--clips", "0" * 40
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        assert find_dataset("someone/clips", None) == repository / "snapshots" / commit
        with pytest.raises(ValueError, match="`dataset_name` 'someone/else' can't be downloaded"):
            find_dataset("someone/else", None)
        with pytest.raises(ValueError, match="either `dataset_name` or `instance_data_root`"):
            find_dataset(None, None)


class TestClips:
    @pytest.mark.parametrize("source_rate", [25.0, 30.0, 24.0, 50.0, 12.5])
    def test_frames_are_the_nearest_in_time(self, tmp_path, source_rate):
        path = write_clip(tmp_path / "a.mp4", seconds=0.8, frame_rate=source_rate)
        source = read_video(path)[0]
        frames = list(read_frames(path, NUM_FRAMES, FPS))
        distances = np.abs(np.arange(len(source))[None] / source_rate - np.arange(NUM_FRAMES)[:, None] / FPS)
        assert len(frames) == NUM_FRAMES
        for frame, nearest in zip(frames, distances.round(9).argmin(axis=1)):
            np.testing.assert_array_equal(frame, source[nearest])

    def test_a_video_that_ends_early_is_refused(self, tmp_path):
        path = write_clip(tmp_path / "a.mp4", seconds=0.6)
        with pytest.raises(ValueError, match="ends early"):
            list(read_frames(path, NUM_FRAMES, FPS))

    @pytest.mark.parametrize(
        "info, bucket",
        [
            (ClipInfo(1920, 1080, 9.0), "768x448x121"),
            (ClipInfo(1080, 1920, 9.0), "448x768x121"),
            (ClipInfo(1080, 1920, 4.0), "512x512x49"),
            (ClipInfo(500, 500, 3.0), "512x512x49"),
            (ClipInfo(500, 500, 4.83), "512x512x121"),
        ],
    )
    def test_a_clip_goes_to_the_bucket_of_its_aspect_that_it_fills(self, info, bucket):
        buckets = [
            Bucket.parse(text) for text in ("512x512x49", "512x512x121", "768x448x121", "448x768x121", "1024x1024x121")
        ]
        assert str(choose_bucket(info, buckets, FPS)) == bucket

    @pytest.mark.parametrize("text", ["512x512", "500x512x121", "512x512x120", "512x512x1", "0x32x9", "axbxc"])
    def test_buckets_off_the_grid_are_refused(self, text):
        with pytest.raises(ValueError, match="`resolution_buckets` must"):
            Bucket.parse(text)

    def test_a_clip_needs_picture_and_sound(self, tmp_path, voice_wav):
        assert probe_clip(write_clip(tmp_path / "a.mp4", seconds=0.8, size=(96, 64))) == ClipInfo(96, 64, 0.8)
        with pytest.raises(ValueError, match="no sound"):
            probe_clip(write_clip(tmp_path / "b.mp4", sound=False))
        with pytest.raises(ValueError, match="no picture"):
            probe_clip(voice_wav)

    def test_sound_is_cut_or_padded_to_the_picture(self, tmp_path):
        path = write_clip(tmp_path / "a.mp4", seconds=1.0)
        whole, sampling_rate = read_video(path)[2:]
        short, _ = read_sound(path, 0.5)
        long, _ = read_sound(path, 1.5)
        assert short.shape[1] == 0.5 * sampling_rate and long.shape[1] == 1.5 * sampling_rate
        torch.testing.assert_close(short, whole[:, : short.shape[1]])
        torch.testing.assert_close(long[:, : whole.shape[1]], whole)
        assert long[:, whole.shape[1] :].abs().max() == 0

    @pytest.mark.parametrize("seconds", [-0.2, 0.2])
    def test_sound_stays_in_time_with_a_picture_that_begins_earlier_or_later(self, tmp_path, seconds):
        path = write_clip(tmp_path / "a.mp4", seconds=1.0)
        whole, sampling_rate = read_video(path)[2:]
        late = "audio" if seconds > 0 else "video"
        with av.open(str(path)) as source, av.open(str(tmp_path / "b.mkv"), "w") as target:
            streams = {stream.type: target.add_stream_from_template(stream) for stream in source.streams}
            for packet in source.demux():
                if packet.dts is None:
                    continue
                if packet.stream.type == late:
                    packet.pts += round(abs(seconds) / packet.time_base)
                    packet.dts += round(abs(seconds) / packet.time_base)
                packet.stream = streams[packet.stream.type]
                target.mux(packet)
        shifted, _ = read_sound(tmp_path / "b.mkv", 1.0)
        samples = round(0.2 * sampling_rate)
        expected = torch.nn.functional.pad(whole, (samples, -samples) if seconds > 0 else (-samples, samples))
        # Matroska keeps times in milliseconds, and may drop or keep the codec's leading silence.
        lags = range(-1100, 1101, 4)
        inner = slice(samples + 1200, -samples - 1200)
        best = max(lags, key=lambda lag: (shifted.roll(lag, 1)[:, inner] * expected[:, inner]).sum().item())
        assert abs(best) <= 0.003 * sampling_rate

    def test_a_long_voice_is_cut_to_its_loudest_part(self, tmp_path):
        voice, sampling_rate = demo_voice(3.0)
        voice[:, : 2 * sampling_rate] *= 0.01
        path = write_clip(tmp_path / "a.mp4", seconds=3.0)
        write_video(path, read_video(path)[0], FPS, voice, sampling_rate)
        _, _, (start, end) = read_voice(VoiceSpan("a.mp4", path), 1.0)
        assert end - start == pytest.approx(1.0) and start == pytest.approx(2.0, abs=0.1)
        _, _, taken = read_voice(VoiceSpan("a.mp4", path, 0.5, 1.25), 1.0)
        assert taken == (0.5, 1.25)
        with pytest.raises(ValueError, match="`reference_start` is 4.0 s"):
            read_voice(VoiceSpan("a.mp4", path, 4.0), 1.0)

    def test_the_denoising_program_runs_without_a_shell(self, tmp_path, voice_wav):
        program = tmp_path / "halve.py"
        program.write_text(
            "import sys, wave, array\n"
            "source = wave.open(sys.argv[1])\n"
            "samples = array.array('h', source.readframes(source.getnframes()))\n"
            "assert sys.argv[3] == '; touch $HOME *', sys.argv\n"
            "out = wave.open(sys.argv[2], 'wb')\n"
            "out.setparams(source.getparams())\n"
            "out.writeframes(array.array('h', [s // 2 for s in samples]).tobytes())\n"
        )
        command = f"{shlex.quote(sys.executable)} {shlex.quote(str(program))} {{in}} {{out}} '; touch $HOME *'"
        span = VoiceSpan("voice.wav", voice_wav)
        plain, halved = read_voice(span, 9.0)[0], read_voice(span, 9.0, command)[0]
        torch.testing.assert_close(halved, plain / 2, atol=1e-3, rtol=0)
        with pytest.raises(ValueError, match="`denoise_command` failed with exit code 1: AssertionError"):
            read_voice(span, 9.0, command.replace("touch", "say"))
