"""The way from a recording to the audio VAE's input, on real files and against recorded values."""

import json
import math
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Audio, LTX2ConditionPipeline
from safetensors import safe_open

from diffusers_idlora import audio
from diffusers_idlora.audio import as_waveform, check_waveform, load_audio, log_mel_spectrogram, read_reference
from diffusers_idlora.inputs import read_references


# Recorded from the method's reference implementation.
GOLDEN = Path(__file__).parent / "fixtures" / "golden" / "audio_frontend.safetensors"
PEAK = 0.5


def sine(frequency: float, sampling_rate: int, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    time = np.arange(int(seconds * sampling_rate)) / sampling_rate
    return np.tile(PEAK * np.sin(2 * np.pi * frequency * time), (channels, 1)).astype(np.float32)


def dominant_frequency(waveform: torch.Tensor, sampling_rate: int) -> float:
    spectrum = torch.fft.rfft(waveform * torch.hann_window(len(waveform))).abs()
    return spectrum.argmax().item() * sampling_rate / len(waveform)


def write_sound(
    path: Path,
    waveform: np.ndarray,
    sampling_rate: int,
    codec: str,
    sample_format: str = "fltp",
    video: str | None = None,
) -> Path:
    """Writes planar float samples with PyAV; `sample_format` is what the encoder gets."""
    layout = {1: "mono", 2: "stereo", 4: "quad"}[waveform.shape[0]]
    with av.open(str(path), "w") as container:
        if video is not None:
            picture = container.add_stream(video, rate=10, width=64, height=64, pix_fmt="yuv420p")
        stream = container.add_stream(codec, rate=sampling_rate, layout=layout)
        stream.codec_context.format = sample_format
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = sampling_rate, 0
        for index in range(10 if video is not None else 0):
            image = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * index, np.uint8), format="rgb24")
            container.mux(picture.encode(image))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if video is not None:
            container.mux(picture.encode(None))
    return path


@pytest.fixture
def fresh_warnings(monkeypatch, caplog):
    monkeypatch.setattr(audio, "_warned_about_seconds", False)
    return caplog


# Golden values ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


@pytest.mark.parametrize("case", range(4))
def test_recorded_waveforms_give_the_recorded_log_mel(golden, case):
    tensors, metadata = golden
    sampling_rate = json.loads(metadata["cases"])[case][0]
    log_mel = log_mel_spectrogram(tensors[f"case{case}.waveform"], sampling_rate)
    torch.testing.assert_close(log_mel, tensors[f"case{case}.log_mel"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", range(4))
def test_recorded_waveforms_give_the_recorded_reference_tokens(golden, case):
    tensors, metadata = golden
    vae = AutoencoderKLLTX2Audio(**json.loads(metadata["audio_vae_config"]))
    weights = {key.removeprefix("audio_vae."): value for key, value in tensors.items() if key.startswith("audio_vae.")}
    missing = vae.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all(key.startswith("decoder.") for key in missing.missing_keys)

    log_mel = log_mel_spectrogram(
        tensors[f"case{case}.waveform"],
        json.loads(metadata["cases"])[case][0],
        target_sampling_rate=vae.config.sample_rate,
        hop_length=vae.config.mel_hop_length,
        mel_bins=vae.config.mel_bins,
    )
    with torch.no_grad():
        latents = vae.encode(log_mel).latent_dist.mode()
    packed = LTX2ConditionPipeline._pack_audio_latents(latents)
    tokens = LTX2ConditionPipeline._normalize_audio_latents(packed, vae.latents_mean, vae.latents_std)
    torch.testing.assert_close(tokens, tensors[f"case{case}.reference_tokens"], atol=1e-5, rtol=0)


# Decoding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("sampling_rate", [8000, 16000, 22050, 44100, 48000])
def test_a_wav_decodes_to_what_was_written(tmp_path, sampling_rate, channels):
    written = sine(440, sampling_rate, channels=channels)
    path = write_sound(tmp_path / "voice.wav", written, sampling_rate, "pcm_s16le", "s16")
    waveform, rate = load_audio(path)
    assert rate == sampling_rate and waveform.dtype == torch.float32
    assert waveform.shape == written.shape
    np.testing.assert_allclose(waveform.numpy(), written, atol=2**-14)


@pytest.mark.parametrize(
    ("codec", "sample_format", "step"),
    [
        ("pcm_u8", "u8", 2**-7),
        ("pcm_s16le", "s16", 2**-15),
        ("pcm_s16be_planar", "s16p", 2**-15),
        ("pcm_s24le", "s32", 2**-23),
        ("pcm_s32le", "s32", 2**-23),
        ("pcm_f32le", "flt", 2**-23),
        ("pcm_f64le", "dbl", 2**-23),
    ],
)
def test_every_sample_format_decodes_to_full_scale_one(tmp_path, codec, sample_format, step):
    suffix = ".nut" if codec.endswith("planar") else ".wav"
    written = np.concatenate([sine(440, 16000), 0.5 * sine(880, 16000)])
    path = write_sound(tmp_path / f"voice{suffix}", written, 16000, codec, sample_format)
    waveform, _ = load_audio(path)
    np.testing.assert_allclose(waveform.numpy(), written, atol=2 * step)


@pytest.mark.parametrize(
    ("file_name", "codec", "sample_format", "video"),
    [
        ("voice.flac", "flac", "s16", None),
        ("voice.mp3", "libmp3lame", "fltp", None),
        ("voice.m4a", "aac", "fltp", None),
        ("voice.ogg", "libopus", "flt", None),
        ("voice.mp4", "aac", "fltp", "libx264"),
        ("voice.mov", "aac", "fltp", "libx264"),
        ("voice.mkv", "aac", "fltp", "libx264"),
        ("voice.webm", "libopus", "flt", "libvpx-vp9"),
    ],
)
def test_compressed_and_video_files_decode_to_the_sine_that_was_written(
    tmp_path, file_name, codec, sample_format, video
):
    written = sine(440, 48000, seconds=1.0, channels=2)
    waveform, rate = load_audio(write_sound(tmp_path / file_name, written, 48000, codec, sample_format, video))
    assert rate == 48000 and waveform.shape[0] == 2
    assert abs(waveform.shape[1] - 48000) < 3000  # codecs add or lose a few blocks
    for channel in waveform:
        assert dominant_frequency(channel, rate) == pytest.approx(440, abs=2)
    assert waveform[:, 5000:40000].abs().max().item() == pytest.approx(PEAK, abs=0.05)


def test_the_padding_of_the_last_aac_block_is_cut(tmp_path):
    path = write_sound(tmp_path / "voice.m4a", sine(440, 16000, seconds=1.3), 16000, "aac")
    waveform, rate = load_audio(path)
    assert waveform.shape[1] == 1.3 * rate


def test_a_file_name_that_looks_like_a_protocol_is_read(tmp_path, monkeypatch):
    written = write_sound(tmp_path / "voice.wav", sine(440, 16000), 16000, "pcm_s16le", "s16")
    shutil.copy(written, tmp_path / "concat:2.wav")
    monkeypatch.chdir(tmp_path)
    assert load_audio("concat:2.wav")[0].shape == (1, 16000)


def test_tags_that_are_not_utf8_do_not_stop_the_decoding(tmp_path):
    path = tmp_path / "voice.wav"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "caf~"
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
    data = path.read_bytes()
    assert b"caf~" in data
    path.write_bytes(data.replace(b"caf~", "café".encode("latin-1")))
    assert load_audio(path)[0].shape == (1, 1600)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`reference_audio` must be an existing file.*no\.wav.*check the path"):
        read_reference(tmp_path / "no.wav")


def test_a_folder_is_not_a_recording(tmp_path):
    with pytest.raises(ValueError, match="must be an existing file"):
        load_audio(tmp_path)


@pytest.mark.parametrize("content", [b"this is no sound\n" * 50, b""])
def test_a_text_file_renamed_wav_is_refused(tmp_path, content):
    path = tmp_path / "voice.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`path` can't be decoded.*voice\.wav.*convert it"):
        load_audio(path)


def test_a_video_without_sound_is_refused(tmp_path):
    path = tmp_path / "silent.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, width=64, height=64, pix_fmt="yuv420p")
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"`reference_audio` has no sound.*silent\.mp4.*give a file with sound"):
        read_reference(path)


def test_a_truncated_m4a_is_refused(tmp_path):
    path = write_sound(tmp_path / "voice.m4a", sine(440, 48000), 48000, "aac")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="can't be decoded"):
        load_audio(path)


def test_a_truncated_wav_gives_the_part_that_is_there(tmp_path):
    path = write_sound(tmp_path / "voice.wav", sine(440, 16000), 16000, "pcm_s16le", "s16")
    path.write_bytes(path.read_bytes()[:16000])
    waveform, rate = load_audio(path)
    assert 7800 < waveform.shape[1] < 8000
    assert dominant_frequency(waveform[0], rate) == pytest.approx(440, abs=3)


def test_a_wav_without_samples_is_refused(tmp_path):
    path = write_sound(tmp_path / "voice.wav", sine(440, 16000), 16000, "pcm_s16le", "s16")
    data = path.read_bytes()
    header = data.index(b"data") + 4
    path.write_bytes(data[:header] + bytes(4))
    with pytest.raises(ValueError, match=r"`path` (is empty|can't be decoded)"):
        load_audio(path)


# Tensors and arrays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int16", ">i2", "int32", "float16", "float32", "float64", ">f4"])
def test_arrays_of_every_usual_dtype_mean_the_same_sound(dtype):
    samples = sine(440, 16000)[0]
    kind = np.dtype(dtype)
    scale = {"i2": 2**15, "i4": 2**31}.get(kind.str[1:], 1)
    waveform = as_waveform((samples.astype(np.float64) * scale).astype(kind))
    assert waveform.dtype == torch.float32 and waveform.shape == (1, 16000)
    np.testing.assert_allclose(waveform[0], samples, atol=5e-4)


def test_integer_tensors_are_scaled_and_channels_kept():
    samples = torch.tensor([[0, 16384], [-32768, 8192]], dtype=torch.int16)
    assert as_waveform(samples).tolist() == [[0.0, 0.5], [-1.0, 0.25]]


def test_reversed_and_read_only_arrays_are_taken():
    samples = sine(440, 16000)[0]
    samples.flags.writeable = False
    assert torch.equal(as_waveform(samples[::-1]).flip(1), as_waveform(samples))


@pytest.mark.parametrize(
    ("waveform", "sentence"),
    [
        (torch.zeros(1, 1, 16000), r"`reference_audio` must have the shape .*\[1, 1, 16000\]"),
        (torch.tensor(0.5), r"must have the shape"),
        (torch.rand(16000, 2), r"swap its axes"),
        (torch.rand(0), r"`reference_audio` is empty"),
        (torch.rand(1, 0), r"`reference_audio` is empty"),
        (torch.zeros(1, 16000), r"`reference_audio` is silent, its peak is 0 "),
        (torch.full((1, 16000), 5e-5), r"`reference_audio` is silent, its peak is 5e-05"),
        (torch.tensor([[0.1, math.nan] * 8000]), r"`reference_audio` holds NaN"),
        (torch.tensor([[0.1, -math.inf] * 8000]), r"`reference_audio` holds NaN or infinite"),
        (torch.rand(1, 1599), r"`reference_audio` is too short, 1599 samples at 16000 Hz"),
        (torch.rand(1, 16000) * 32767, r"pass 16-bit samples as int16"),
        (torch.ones(16000, dtype=torch.int64), r"dtype is torch\.int64"),
        (np.ones(16000, dtype=np.uint16), r"dtype is uint16"),
        (np.array(["a"] * 16000), r"must hold float, int16 or int32"),
        (np.array([None] * 16000), r"dtype is object"),
        ([0.1] * 16000, r"must be a path, .* but is a list"),
    ],
)
def test_an_unusable_waveform_gets_one_clear_sentence(waveform, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_waveform(waveform, 16000)


@pytest.mark.parametrize("rate", [0, -16000, 999, 768001, 16000.5, math.nan, math.inf, "16000", None, True])
def test_an_absurd_sampling_rate_is_refused(rate):
    with pytest.raises(ValueError, match="The sampling rate of `target` must be a whole number"):
        check_waveform(torch.rand(1, 768000), rate, "target")


@pytest.mark.parametrize("rate", [1000, 16000, 16000.0, np.int64(44100), 768000])
def test_usable_waveforms_pass(rate):
    check_waveform(torch.rand(2, 768000), rate)
    check_waveform(torch.rand(76800), rate)


# One reference clip -------------------------------------------------------------------------------------------------


def test_a_path_a_pair_and_a_bare_waveform_are_read_alike(tmp_path):
    path = write_sound(tmp_path / "voice.wav", sine(440, 16000, seconds=3), 16000, "pcm_s16le", "s16")
    waveform, rate = load_audio(path)
    sources = [
        (path, None),
        (str(path), None),
        ((waveform, rate), None),
        (waveform, rate),
        (waveform[0].numpy(), rate),
    ]
    for source, sampling_rate in sources:
        read, read_rate = read_reference(source, sampling_rate)
        assert torch.equal(read, waveform) and read_rate == 16000


def test_a_bare_waveform_without_its_rate_is_refused():
    with pytest.raises(ValueError, match="`reference_audio_sampling_rate` is required"):
        read_reference(torch.rand(1, 48000))


def test_a_sampling_rate_given_twice_is_refused(tmp_path):
    path = write_sound(tmp_path / "voice.wav", sine(440, 16000), 16000, "pcm_s16le", "s16")
    for source in (path, str(path), (torch.rand(1, 16000), 16000)):
        with pytest.raises(ValueError, match="`reference_audio_sampling_rate` is 16000.*leave"):
            read_reference(source, 16000)


def test_a_pair_with_three_entries_is_refused():
    with pytest.raises(ValueError, match="has 3 entries"):
        read_reference((torch.rand(1, 16000), 16000, 1))


@pytest.mark.parametrize("seconds", [1.0, 11.0])
def test_an_unusual_length_warns_once_per_process(fresh_warnings, seconds):
    clip = (torch.rand(1, int(16000 * seconds)), 16000)
    read_references(clip, None, num_prompts=1)
    read_references(clip, None, num_prompts=1)
    assert [record.levelname for record in fresh_warnings.records] == ["WARNING"]
    assert f"lasts {seconds} s" in fresh_warnings.text


@pytest.mark.parametrize("seconds", [2.0, 5.0, 10.0])
def test_a_usual_length_does_not_warn(fresh_warnings, seconds):
    read_references((torch.rand(1, int(16000 * seconds)), 16000), None, num_prompts=1)
    assert not fresh_warnings.records


def test_short_clips_that_are_long_enough_together_do_not_warn(fresh_warnings):
    clip = (torch.rand(1, 24000), 16000)
    read_references((clip, clip, clip), None, num_prompts=1)
    assert not fresh_warnings.records


# Log-mel ------------------------------------------------------------------------------------------------------------


def test_the_same_sound_at_two_rates_has_nearly_the_same_log_mel():
    low, high = (log_mel_spectrogram(sine(440, rate), rate) for rate in (16000, 44100))
    assert low.shape == high.shape == (1, 2, 101, 64)
    loudest = low[0, 0].mean(0).argmax()
    assert loudest == high[0, 0].mean(0).argmax()
    # Away from the ends, where the resampling filter reaches past the recording.
    torch.testing.assert_close(low[:, :, 10:90, loudest], high[:, :, 10:90, loudest], atol=0.01, rtol=0)


def test_a_higher_tone_lies_in_a_higher_band():
    bands = [log_mel_spectrogram(sine(tone, 16000), 16000)[0, 0].mean(0).argmax().item() for tone in (200, 800, 3000)]
    assert bands == sorted(set(bands))


def test_mono_becomes_two_equal_channels_and_stereo_stays():
    mono = log_mel_spectrogram(sine(440, 16000), 16000)
    assert torch.equal(mono[:, 0], mono[:, 1])
    stereo = log_mel_spectrogram(np.concatenate([sine(440, 16000), sine(880, 16000)]), 16000)
    assert torch.equal(stereo[:, 0], mono[:, 0]) and not torch.equal(stereo[:, 1], mono[:, 1])


def test_more_than_two_channels_are_averaged():
    parts = np.concatenate([sine(tone, 16000) for tone in (300, 600, 900, 1200)])
    surround = log_mel_spectrogram(parts, 16000)
    torch.testing.assert_close(surround, log_mel_spectrogram(parts.mean(axis=0), 16000), atol=1e-4, rtol=0)


def test_sizes_follow_the_audio_vae_config():
    log_mel = log_mel_spectrogram(sine(440, 16000), 16000, target_sampling_rate=8000, hop_length=100, mel_bins=8)
    assert log_mel.shape == (1, 2, 81, 8)


def test_autocast_and_half_precision_input_keep_float32():
    samples = torch.from_numpy(sine(440, 16000))
    plain = log_mel_spectrogram(samples, 16000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_mel_spectrogram(samples, 16000), plain)
    assert log_mel_spectrogram(samples.to(torch.bfloat16), 16000).dtype == torch.float32


def test_a_first_call_inside_inference_mode_does_not_break_later_gradients():
    samples = torch.from_numpy(sine(440, 16000))
    settings = {"hop_length": 160, "mel_bins": 32}  # not used elsewhere: the transform is built here
    with torch.inference_mode():
        log_mel_spectrogram(samples, 16000, **settings)
    samples.requires_grad_()
    log_mel_spectrogram(samples, 16000, **settings).sum().backward()
    assert samples.grad.abs().sum() > 0


def test_a_recording_shorter_than_half_a_window_is_refused():
    with pytest.raises(ValueError, match="`waveform` has 400 samples"):
        log_mel_spectrogram(torch.rand(1, 400), 16000)


def test_rates_that_would_need_gigabytes_to_resample_are_refused():
    with pytest.raises(ValueError, match="767999 Hz"):
        log_mel_spectrogram(torch.rand(1, 100000), 767999)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_log_mel_comes_back_on_its_device_and_equals_that_of_the_cpu():
    samples = torch.from_numpy(sine(440, 44100, channels=2))
    on_gpu = log_mel_spectrogram(samples.cuda(), 44100)
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_gpu.cpu(), log_mel_spectrogram(samples, 44100))
