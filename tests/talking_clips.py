"""Real mp4 files with sound, and the tables that name them."""

import json

import numpy as np

from diffusers_idlora.demo_assets import demo_voice
from diffusers_idlora.media import write_video


NUM_FRAMES, FPS = 17, 25.0


def write_clip(path, seed=0, seconds=1.0, frame_rate=FPS, size=(64, 64), sound=True):
    """A real mp4 whose brightness grows with time and differs with the seed, and who says vowels."""
    frames = round(seconds * frame_rate)
    levels = (np.arange(frames) * (200 / frames) + 10 * seed).astype(np.uint8)
    pixels = np.broadcast_to(levels[:, None, None, None], (frames, size[1], size[0], 3))
    voice, sampling_rate = demo_voice(seconds, seed=seed)
    write_video(path, np.ascontiguousarray(pixels), frame_rate, voice if sound else None, sampling_rate)
    return path


def write_table(root, rows):
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
