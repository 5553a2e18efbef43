"""Images in, mp4 out and back, on real files."""

import errno
import hashlib
import io
import math
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_idlora.media import (
    MP4_TAGS,
    appearing_together,
    check_output_path,
    file_sha256,
    fit_size,
    frame_rate_fraction,
    load_image,
    read_video,
    replaced_when_complete,
    write_video,
)


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters() -> np.ndarray:
    """An upright picture, 48 wide and 32 high: red, green / blue, white."""
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :24], picture[:16, 24:], picture[16:, :24], picture[16:, 24:] = RED, GREEN, BLUE, WHITE
    return picture


def corners(image: PIL.Image.Image) -> list[tuple]:
    width, height = image.size
    return [image.getpixel(at) for at in ((4, 4), (width - 5, 4), (4, height - 5), (width - 5, height - 5))]


def moving_frames(count: int = 25) -> np.ndarray:
    """Frames [count, 48, 64, 3] whose grey level rises, so that their order can be seen."""
    levels = np.linspace(20, 230, count).round().astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, 48, 64, 3)).copy()


def sine(frequency: float, sampling_rate: int, seconds: float) -> torch.Tensor:
    return (
        0.5 * torch.sin(2 * math.pi * frequency * torch.arange(round(seconds * sampling_rate)) / sampling_rate)[None]
    )


def dominant_frequency(waveform: torch.Tensor, sampling_rate: int) -> float:
    spectrum = torch.fft.rfft(waveform * torch.hann_window(len(waveform))).abs()
    return spectrum.argmax().item() * sampling_rate / len(waveform)


# Images -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_with_any_exif_rotation_comes_out_upright(tmp_path, orientation):
    upright = PIL.Image.fromarray(quarters())
    stored = {
        1: [],
        2: [PIL.Image.Transpose.FLIP_LEFT_RIGHT],
        3: [PIL.Image.Transpose.ROTATE_180],
        4: [PIL.Image.Transpose.FLIP_TOP_BOTTOM],
        5: [PIL.Image.Transpose.TRANSPOSE],
        6: [PIL.Image.Transpose.ROTATE_90],
        7: [PIL.Image.Transpose.TRANSVERSE],
        8: [PIL.Image.Transpose.ROTATE_270],
    }[orientation]
    image = upright
    for step in stored:
        image = image.transpose(step)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "face.jpg"
    image.save(path, exif=exif, quality=100, subsampling=0)

    for loaded in (load_image(path), load_image(str(path)), load_image(PIL.Image.open(path))):
        assert loaded.mode == "RGB" and loaded.size == (48, 32)
        np.testing.assert_allclose(corners(loaded), [RED, GREEN, BLUE, WHITE], atol=3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_transparency_is_flattened_on_white(tmp_path, mode):
    path = tmp_path / "face.png"
    if mode == "P":
        image = PIL.Image.new("P", (8, 8), 1)
        image.putpalette([10, 20, 30, 0, 0, 0])
        image.putpixel((0, 0), 0)
        image.save(path, transparency=1)
        expected = {(0, 0): (10, 20, 30), (5, 5): WHITE}
    elif mode == "RGB":
        image = PIL.Image.new("RGB", (8, 8), (1, 2, 3))
        image.putpixel((0, 0), RED)
        image.save(path, transparency=(1, 2, 3))
        expected = {(0, 0): RED, (5, 5): WHITE}
    else:
        clear, opaque, half = {
            "RGBA": ((0, 0, 0, 0), (10, 20, 30, 255), (0, 0, 0, 128)),
            "LA": ((0, 0), (40, 255), (0, 128)),
            "PA": ((0, 0), (1, 255), (0, 128)),
        }[mode]
        image = PIL.Image.new(mode, (8, 8), clear)
        if mode == "PA":
            image.putpalette([0, 0, 0, 40, 40, 40])
        image.putpixel((0, 0), opaque)
        image.putpixel((1, 0), half)
        expected = {(0, 0): opaque[:3] if mode == "RGBA" else (40, 40, 40), (1, 0): (127, 127, 127), (5, 5): WHITE}
        if mode == "PA":
            path = None
        else:
            image.save(path)
    loaded = load_image(image if path is None else path)
    assert loaded.mode == "RGB"
    for at, colour in expected.items():
        np.testing.assert_allclose(loaded.getpixel(at), colour, atol=1)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    PIL.Image.fromarray(values).save(tmp_path / "face.png")
    loaded = np.asarray(load_image(tmp_path / "face.png"))
    assert loaded[..., 0].tolist() == [[0, 100], [200, 255]] and loaded.shape == (2, 2, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_colour_modes_become_rgb(mode):
    image = PIL.Image.fromarray(quarters()).convert(mode)
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    np.testing.assert_allclose(np.asarray(loaded), np.asarray(image.convert("RGB")), atol=1)
    assert corners(loaded)[3] == WHITE


def test_arrays_and_tensors_of_one_picture_are_the_same_image():
    picture = quarters()
    scaled = torch.from_numpy(picture).permute(2, 0, 1) / 255
    sources = [
        picture,
        picture / 255,
        (picture / 255).astype(np.float32),
        np.concatenate([picture, np.full((32, 48, 1), 255, np.uint8)], axis=-1),
        torch.from_numpy(picture).permute(2, 0, 1),
        scaled,
        scaled[None],
        scaled.to(torch.bfloat16),
    ]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(load_image(source)), picture)


def test_grey_arrays_and_tensors_become_rgb():
    grey = np.array([[0, 51], [102, 255]], np.uint8)
    for source in (grey, grey[..., None], grey / 255, torch.from_numpy(grey)[None]):
        loaded = np.asarray(load_image(source))
        assert loaded.shape == (2, 2, 3) and loaded[..., 1].tolist() == grey.tolist()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (np.zeros((3, 32, 48), np.uint8), r"`image` must have the shape .*\[3, 32, 48\]"),
        (np.zeros((2, 32, 48, 3), np.uint8), "must have the shape"),
        (np.zeros((0, 48, 3), np.uint8), "must have the shape"),
        (np.zeros(3), "must have the shape"),
        (torch.zeros(32, 48, 3), r"`image` must have the shape \[1 \| 3 \| 4, height, width\]"),
        (torch.zeros(2, 3, 32, 48), "must have the shape"),
        (torch.zeros(32, 48), "must have the shape"),
        (torch.full((3, 8, 8), math.nan), r"`image` must have floating point values in 0\.\.1 without NaN"),
        (torch.rand(3, 8, 8) - 1, r"they lie in -"),
        (np.full((8, 8, 3), 200.0), r"they lie in 200\.\.200: .*pass 0\.\.255 as uint8"),
        (np.zeros((8, 8, 3), np.int64), "dtype is int64"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), "dtype is torch.bool"),
        (42, "`image` must be a path, a PIL image, an array or a tensor, but is a int"),
    ],
)
def test_unusable_pixels_get_one_clear_sentence(source, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_image(source)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`face` must be an existing file.*no\.png.*check the path"):
        load_image(tmp_path / "no.png", name="face")


def test_broken_image_files_are_refused(tmp_path):
    whole = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole, "png")
    contents = {"text.png": b"no picture", "empty.jpg": b"", "cut.png": whole.getvalue()[:4000]}
    for file_name, content in contents.items():
        (tmp_path / file_name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"`image` can't be decoded: .*{file_name}.*save it as png"):
            load_image(tmp_path / file_name)


def test_a_decompression_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    PIL.Image.new("1", (20000, 10000)).save(path)
    with pytest.raises(ValueError, match=r"`image` can't be decoded: .*bomb\.png.* too large"):
        load_image(path)


def test_floating_point_tiffs_are_refused(tmp_path):
    PIL.Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "face.tiff")
    with pytest.raises(ValueError, match="floating point pixels have no agreed range"):
        load_image(tmp_path / "face.tiff")


# Sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1000, 1000, (512, 512)),
        (1920, 1080, (288, 512)),
        (1080, 1920, (512, 288)),
        (400, 300, (384, 512)),
        (10000, 1, (32, 512)),
        (1, 1, (512, 512)),
    ],
)
def test_the_default_size_has_a_long_side_of_512(width, height, expected):
    assert fit_size(width, height) == expected


sides = st.integers(1, 20_000)


@given(sides, sides, st.integers(1, 3000), st.integers(64**2, 2048**2), st.sampled_from([8, 16, 32, 64]))
def test_sizes_stay_on_the_grid_and_within_the_area(width, height, long_side, max_pixels, multiple):
    rows, columns = fit_size(width, height, long_side=long_side, max_pixels=max_pixels, multiple=multiple)
    assert rows % multiple == columns % multiple == 0 and min(rows, columns) >= multiple
    assert rows * columns <= max_pixels
    assert max(rows, columns) <= max(multiple, long_side + multiple / 2)


@given(sides, sides)
def test_the_aspect_is_kept_to_half_a_grid_step(width, height):
    rows, columns = fit_size(width, height)
    assert max(rows, columns) == 512
    exact = 512 * min(width, height) / max(width, height)
    assert abs(min(rows, columns) - exact) <= 16 or (exact < 32 and min(rows, columns) == 32)


@given(sides, sides, st.integers(32, 2048), st.integers(64**2, 2048**2))
def test_a_turned_image_gets_the_turned_size(width, height, long_side, max_pixels):
    rows, columns = fit_size(width, height, long_side=long_side, max_pixels=max_pixels)
    turned = fit_size(height, width, long_side=long_side, max_pixels=max_pixels)
    assert turned == (columns, rows)


def test_a_small_area_limit_shrinks_both_sides():
    assert fit_size(1600, 900, long_side=2048, max_pixels=576 * 1024) == (576, 1024)
    assert fit_size(1000, 1000, long_side=2048, max_pixels=500 * 500) == (480, 480)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"width": 0, "height": 10}, "`width` must be at least 1, but is 0"),
        ({"width": 10, "height": -1}, "`height` must be at least 1"),
        ({"width": 10, "height": 10, "long_side": 0}, "`long_side`"),
        ({"width": 10, "height": 10, "multiple": 0}, "`multiple`"),
        ({"width": 10, "height": 10, "max_pixels": 1000}, "`max_pixels` must be at least 1024"),
    ],
)
def test_impossible_sizes_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit_size(**arguments)


# Videos -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame_rate", "exact"),
    [
        (25, Fraction(25)),
        (25.0, Fraction(25)),
        (24, Fraction(24)),
        (12.5, Fraction(25, 2)),
        (23.976, Fraction(24000, 1001)),
        (24000 / 1001, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
    ],
)
def test_frame_rates_are_the_ones_that_containers_use(frame_rate, exact):
    assert frame_rate_fraction(frame_rate) == exact


@pytest.mark.parametrize("frame_rate", [0, -25, math.nan, math.inf, 2000])
def test_impossible_frame_rates_are_refused(tmp_path, frame_rate):
    with pytest.raises(ValueError, match="`frame_rate` must be between 1 and 1000"):
        write_video(tmp_path / "out.mp4", moving_frames(), frame_rate)


@pytest.mark.parametrize("frame_rate", [25, 24, 23.976, 29.97])
def test_a_video_with_sound_comes_back_as_it_was_written(tmp_path, frame_rate):
    path, written = tmp_path / "out.mp4", moving_frames(25)
    seconds = 25 / frame_rate
    write_video(path, written, frame_rate, sine(440, 48000, seconds), 48000)
    frames, rate, waveform, sampling_rate = read_video(path)
    assert frames.shape == written.shape and frames.dtype == np.uint8
    np.testing.assert_allclose(frames.mean((1, 2, 3)), written.mean((1, 2, 3)), atol=3)
    assert rate == pytest.approx(frame_rate, abs=1e-3)
    assert sampling_rate == 48000 and waveform.shape[0] == 2
    assert waveform.shape[1] / sampling_rate == pytest.approx(seconds, abs=1e-3)
    for channel in waveform:
        assert dominant_frequency(channel, sampling_rate) == pytest.approx(440, abs=2)
    assert waveform.abs().max().item() == pytest.approx(0.5, abs=0.05)


def test_the_streams_are_h264_and_aac_and_start_fast(tmp_path):
    path = tmp_path / "out.mp4"
    write_video(path, moving_frames(), 25, sine(440, 48000, 1), 48000)
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert (video.codec.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (sound.codec.name, sound.layout.name) == ("aac", "stereo")
        assert float(sound.duration * sound.time_base) == pytest.approx(1.0, abs=1e-3)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_sound_lies_beside_its_frames_in_the_file(tmp_path):
    path = tmp_path / "out.mp4"
    write_video(path, moving_frames(400), 25, sine(440, 16000, 16), 16000)
    with av.open(str(path)) as container:
        packets = sorted((packet.pos, packet.stream.type) for packet in container.demux() if packet.size)
    kinds = [kind for _, kind in packets]
    # A player that has read a fifth of the pictures must have found about a fifth of the sound.
    assert kinds[: len(kinds) // 5].count("audio") / kinds.count("audio") == pytest.approx(0.2, abs=0.1)


def test_pictures_arrays_and_tensors_give_the_same_video(tmp_path):
    frames = np.stack([quarters()] * 5)
    sources = [frames, torch.from_numpy(frames), [PIL.Image.fromarray(frame) for frame in frames], iter(frames)]
    decoded = []
    for index, source in enumerate(sources):
        write_video(tmp_path / f"{index}.mp4", source, 25)
        decoded.append(read_video(tmp_path / f"{index}.mp4"))
    for video in decoded:
        np.testing.assert_array_equal(video[0], decoded[0][0])
        assert video[2:] == (None, None)


def test_colours_survive_and_are_tagged(tmp_path):
    path = tmp_path / "out.mp4"
    write_video(path, np.stack([quarters()] * 3), 25)
    loaded = PIL.Image.fromarray(read_video(path)[0][1])
    np.testing.assert_allclose(corners(loaded), [RED, GREEN, BLUE, WHITE], atol=12)
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)  # 1 is BT.709


def test_a_larger_crf_makes_a_smaller_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), np.uint8)
    write_video(tmp_path / "fine.mp4", noise, 25, crf=5)
    write_video(tmp_path / "coarse.mp4", noise, 25, crf=40)
    assert (tmp_path / "coarse.mp4").stat().st_size < (tmp_path / "fine.mp4").stat().st_size / 2


@pytest.mark.parametrize("sampling_rate", [8000, 11127, 16000, 24000, 96000])
def test_sound_of_any_rate_keeps_its_pitch_and_length(tmp_path, sampling_rate):
    path = tmp_path / "out.mp4"
    write_video(path, moving_frames(), 25, sine(440, sampling_rate, 1), sampling_rate)
    _, _, waveform, rate = read_video(path)
    assert rate == (48000 if sampling_rate == 11127 else sampling_rate)
    assert waveform.shape[1] / rate == pytest.approx(1.0, abs=0.005)
    assert dominant_frequency(waveform[0], rate) == pytest.approx(440, abs=2)


def test_stereo_keeps_its_sides_and_loud_sound_is_clipped(tmp_path):
    path = tmp_path / "out.mp4"
    stereo = torch.cat([sine(440, 48000, 1), 8 * sine(880, 48000, 1)])
    write_video(path, moving_frames(), 25, stereo, 48000)
    waveform = read_video(path)[2]
    assert [dominant_frequency(side, 48000) for side in waveform] == pytest.approx([440, 880], abs=2)
    assert waveform[1].abs().max() < 1.5


def test_int16_sound_is_scaled(tmp_path):
    path = tmp_path / "out.mp4"
    write_video(path, moving_frames(), 25, (sine(440, 48000, 1) * 32768).to(torch.int16), 48000)
    assert read_video(path)[2].abs().max().item() == pytest.approx(0.5, abs=0.05)


def test_every_allowed_tag_is_kept(tmp_path):
    path = tmp_path / "out.mp4"
    tags = {tag: f"{tag} ü 文" for tag in MP4_TAGS}
    write_video(path, moving_frames(2), 25, metadata=tags)
    with av.open(str(path)) as container:
        assert {tag: container.metadata.get(tag) for tag in MP4_TAGS} == tags


def test_progress_is_told_of_every_frame(tmp_path):
    calls = []
    write_video(tmp_path / "out.mp4", moving_frames(7), 25, progress=lambda: calls.append(1))
    assert len(calls) == 7


def test_a_failure_in_the_middle_leaves_no_file_and_an_older_file_untouched(tmp_path):
    path = tmp_path / "out.mp4"

    def broken_frames():
        yield from moving_frames(10)
        raise RuntimeError("decoder failed")

    with pytest.raises(RuntimeError, match="decoder failed"):
        write_video(path, broken_frames(), 25, sine(440, 48000, 1), 48000)
    assert list(tmp_path.iterdir()) == []

    path.write_bytes(b"older")
    with pytest.raises(RuntimeError):
        write_video(path, broken_frames(), 25)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_a_finished_video_replaces_the_older_file_with_usual_permissions(tmp_path):
    path, other = tmp_path / "out.mp4", tmp_path / "other"
    path.write_bytes(b"older")
    other.write_bytes(b"")
    path.chmod(0o600)
    write_video(path, moving_frames(3), 25)
    assert read_video(path)[0].shape[0] == 3
    assert path.stat().st_mode == other.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [other, path]


GOOD = {"frames": moving_frames(3), "frame_rate": 25}
SOUND = torch.rand(1, 4800)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"frames": []}, "`frames` is empty"),
        ({"frames": np.zeros((2, 48, 64, 3))}, "`frames` must be PIL images or uint8 .* float64"),
        ({"frames": [3]}, "`frames` must be PIL images .* but one is int"),
        ({"frames": np.zeros((2, 3, 48, 64), np.uint8)}, "`frames` must be PIL images or uint8"),
        ({"frames": np.zeros((2, 47, 64, 3), np.uint8)}, "`frames` must have even sides, but one is 64x47"),
        (
            {"frames": [np.zeros((48, 64, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)]},
            "`frames` must have one size, but frame 1 is 64x32 after 64x48",
        ),
        ({"audio": SOUND}, "`audio_sampling_rate` is required"),
        ({"audio": SOUND, "audio_sampling_rate": 0}, "The sampling rate of `audio` must be"),
        ({"audio": SOUND * math.nan, "audio_sampling_rate": 48000}, "`audio` holds NaN"),
        (
            {"audio": torch.rand(3, 4800), "audio_sampling_rate": 48000},
            r"`audio` must have the shape \[1 \| 2, samples\]",
        ),
        ({"audio": torch.rand(2, 0), "audio_sampling_rate": 48000}, "`audio` must have the shape"),
        ({"metadata": {"seed": "1"}}, r"`metadata` has tags that an mp4 doesn't keep, \['seed'\]"),
        ({"crf": 52}, "`crf` must be an integer from 0 to 51, but is 52"),
    ],
)
def test_what_can_not_be_written_gets_one_clear_sentence_and_no_file(tmp_path, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        write_video(tmp_path / "out.mp4", **(GOOD | arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_rotated_phone_video_is_read_upright(tmp_path):
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, pix_fmt="yuv420p")
        stored = np.ascontiguousarray(np.rot90(quarters(), -1))
        stream.height, stream.width = stored.shape[:2]
        stream.set_display_rotation(90)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode(None))
    frames = read_video(path)[0]
    assert frames.shape == (3, 32, 48, 3)
    np.testing.assert_allclose(corners(PIL.Image.fromarray(frames[0])), [RED, GREEN, BLUE, WHITE], atol=12)


def test_a_sound_file_is_not_a_video(tmp_path):
    path = tmp_path / "voice.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="`path` has no picture"):
        read_video(path)


def test_a_truncated_video_is_refused(tmp_path):
    path = tmp_path / "out.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), np.uint8), 25)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"`path` (can't be decoded|is empty).*out\.mp4"):
        read_video(path)


# Files --------------------------------------------------------------------------------------------------------------


def test_a_good_output_path_passes_and_nothing_is_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_output_path("out.mp4") == Path("out.mp4")
    assert check_output_path(tmp_path / "OUT.MP4") == tmp_path / "OUT.MP4"
    assert list(tmp_path.iterdir()) == []


def test_missing_folders_are_created_only_when_asked(tmp_path):
    path = tmp_path / "a" / "b" / "out.mp4"
    with pytest.raises(ValueError, match=r"`output` can't be written: the folder .*b' doesn't exist; create it"):
        check_output_path(path)
    assert not (tmp_path / "a").exists()
    check_output_path(path, create=True)
    assert (tmp_path / "a" / "b").is_dir()


def test_output_paths_that_can_not_be_written_are_refused(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match="`output` must be a file, .*folder.mp4' is a folder"):
        check_output_path(tmp_path / "folder.mp4")
    with pytest.raises(ValueError, match=r"`video` must end in \.mp4"):
        check_output_path(tmp_path / "out.avi", name="video")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="can't be created"):
        check_output_path(tmp_path / "file" / "b" / "out.mp4", create=True)
    with pytest.raises(ValueError, match="doesn't exist"):
        check_output_path(tmp_path / "file" / "out.mp4")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(ValueError, match="no permission for the folder"):
        check_output_path(folder / "out.mp4")


def test_a_file_is_replaced_only_when_the_block_succeeds(tmp_path):
    path = tmp_path / "settings.json"
    with replaced_when_complete(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.suffix == ".json"
    with pytest.raises(KeyboardInterrupt), replaced_when_complete(path) as temporary:
        temporary.write_text("second")
        raise KeyboardInterrupt
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_two_files_appear_together_or_not_at_all(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "a.mp4"]
    with appearing_together(paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
        assert not any(path.exists() for path in paths)
    assert sorted(tmp_path.iterdir()) == paths and paths[1].stat().st_nlink == 1

    others = [tmp_path / "b.json", tmp_path / "a.mp4"]
    with pytest.raises(FileExistsError), appearing_together(others) as temporaries:
        for temporary in temporaries:
            temporary.write_text("newer")
    assert sorted(tmp_path.iterdir()) == paths and paths[1].read_text() == "new"

    with appearing_together(others, replace=[paths[1]]) as temporaries:
        for temporary in temporaries:
            temporary.write_text("newer")
    assert others[0].read_text() == others[1].read_text() == "newer"


def test_where_links_are_unknown_a_file_is_still_not_replaced(tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        try:
            with appearing_together([path]) as (temporary,):
                temporary.write_text(text)
        except FileExistsError:
            assert text == "second"
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_name_that_no_folder_can_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`output` must have a name of at most 250 bytes"):
        check_output_path(tmp_path / "new" / ("x" * 300 + ".mp4"), create=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="`image` must be an existing file"):
        load_image(tmp_path / ("x" * 300))


def test_the_sha256_is_that_of_the_content(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"abc" * 100_000)
    assert file_sha256(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
