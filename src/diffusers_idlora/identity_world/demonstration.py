"""Shows in a picture and two numbers that a generated voice follows its reference, with the shipped checkpoint."""

import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ..media import replaced_when_complete
from .checkpoint import load_identity_model
from .model import Sampler, make_references
from .world import AUDIO_CHANNELS, IdentityWorld


NUM_CLIPS = 64
# Not those of the training, nor those of the benchmark.
SPEAKERS_SEED = 3

_NUM_DRAWN = 5
_ROWS = ("reference", "generated with", "generated without")
_BAR, _CELL_GAP, _LABEL_WIDTH, _CELL_HEIGHT, _TOP = 8, 24, 150, 120, 44
_INK, _GREY = (40, 40, 40), (190, 190, 190)
_COLOURS = ((39, 66, 92), (62, 124, 87), (176, 87, 44))


def demonstrate(output_png: str | os.PathLike, seed: int = 0) -> tuple[float, float]:
    """
    Generates clips of speakers that the shipped checkpoint was never trained on, with their recording as the reference
    and, from the same noise, without, and draws the voices of a few.

    Args:
        output_png (`str` or `os.PathLike`): The picture; an existing one is replaced, missing folders are created.
        seed (`int`, *optional*, defaults to `0`): Of the sentences and the noise.

    Returns:
        `tuple[float, float]`: Mean similarity (cosine) of the generated voice to the recording's, with the reference
        and without. 1 is the same voice, 0 a stranger's.

    Raises:
        ValueError: If `output_png` is no PNG file.
    """
    output_png = Path(output_png)
    if output_png.suffix.lower() != ".png":
        raise ValueError(f"`output_png` is {str(output_png)!r}: the picture is a PNG, so give that ending.")
    world, transformer = IdentityWorld(), load_identity_model()
    speakers = world.speakers(NUM_CLIPS, torch.Generator().manual_seed(SPEAKERS_SEED))
    scenes = world.scenes(speakers, torch.Generator().manual_seed(seed))
    sampler = Sampler(seed=seed)
    references = make_references(transformer, scenes.reference_tokens)
    _, with_reference = sampler(transformer, scenes, references)
    _, without_reference = sampler(transformer, scenes, None)
    recordings = (scenes.reference_tokens, with_reference, without_reference)
    similarities = [world.similarity(tokens, scenes.reference_tokens) for tokens in recordings]
    picture = draw_voices([world.heard_filters(tokens) for tokens in recordings], similarities)
    output_png.parent.mkdir(parents=True, exist_ok=True)
    with replaced_when_complete(output_png) as temporary:
        picture.save(temporary)
    return similarities[1].mean().item(), similarities[2].mean().item()


def draw_voices(filters: list[torch.Tensor], similarities: list[torch.Tensor]) -> Image.Image:
    """
    Draws voices as bars, one for each channel: a column for each speaker, and below each other the reference and what
    was generated with it and without.

    Args:
        filters (`list[torch.Tensor]`): Those of the three rows, `[B, AUDIO_CHANNELS]` each.
        similarities (`list[torch.Tensor]`): To the reference, `[B]` each.

    Returns:
        `PIL.Image.Image`: An RGB picture.
    """
    cell = AUDIO_CHANNELS * _BAR + _CELL_GAP
    size = (_LABEL_WIDTH + _NUM_DRAWN * cell, _TOP + len(_ROWS) * _CELL_HEIGHT)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=13)
    draw.text((8, 8), "Five unseen voices, as the filter of each: does it follow the reference?", _INK, font)
    for row, (name, colour) in enumerate(zip(_ROWS, _COLOURS)):
        middle = _TOP + row * _CELL_HEIGHT + _CELL_HEIGHT // 2
        draw.text((8, middle - 16), name, _INK, font)
        if row:
            draw.text((8, middle + 2), f"mean similarity {similarities[row].mean():.2f}", colour, font)
        for column in range(_NUM_DRAWN):
            left = _LABEL_WIDTH + column * cell
            _draw_bars(draw, left, middle, filters[row][column].tolist(), colour)
            if row:
                draw.text((left, middle + 40), f"{similarities[row][column]:.2f}", colour, font)
    return image


def _draw_bars(draw: ImageDraw.ImageDraw, left: int, middle: int, values: list[float], colour: tuple) -> None:
    draw.line((left, middle, left + len(values) * _BAR, middle), fill=_GREY)
    for index, value in enumerate(values):
        height = round(36 * max(-1.0, min(1.0, value)))
        x = left + index * _BAR
        draw.rectangle((x + 1, min(middle, middle - height), x + _BAR - 2, max(middle, middle - height)), fill=colour)
