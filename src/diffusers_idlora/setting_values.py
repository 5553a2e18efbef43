"""Single settings of the command line: what is refused, and texts such as `voice.wav:0:2.4` taken apart."""

import os
from typing import TYPE_CHECKING, Any

from .values import as_tuple, shortened


if TYPE_CHECKING:
    from .settings import ClipSettings


# Far above what a model can use, far below what brings a machine down before anything is said.
MOST = 10_000
MOST_PIXELS = 8192
MOST_FRAMES = 10_001
MOST_TOKENS = 16_384


def check_number(name: str, value: Any, most: float) -> None:
    """Raises a `ValueError` where a number, or one of several, is not a number from 0 to `most`."""
    for number in as_tuple(value):
        # The comparison is false for NaN too.
        if isinstance(number, (int, float)) and not 0 <= number <= most:
            raise ValueError(f"`{name}` must be a number from 0 to {most}, but it is {shortened(number)}.")


def check_text(name: str, value: Any) -> None:
    """Raises a `ValueError` where a text is no valid UTF-8, as odd terminals and JSON escapes can make it."""
    if isinstance(value, str) and (broken := value.encode("utf-8", "ignore").decode("utf-8")) != value:
        raise ValueError(f"`{name}` holds characters that are not valid UTF-8, near {broken[:40]!r}; type it again.")


def check_size(settings: "ClipSettings") -> None:
    """Raises a `ValueError` for sizes, lengths and counts that no LTX-2 model can make."""
    for name in ("height", "width"):
        value = getattr(settings, name)
        if value is not None and (value % 32 or not value):
            raise ValueError(
                f"`{name}` must be a multiple of 32, but it is {value}; take {max(32, value // 32 * 32)}."
            )
    frames = settings.num_frames
    if frames is not None and frames % 8 != 1:
        raise ValueError(f"`num_frames` must be 8k+1, but it is {frames}; take {max(0, frames - 1) // 8 * 8 + 1}.")
    for name in ("steps", "frame_rate", "motion_speed", "max_sequence_length", "guidance_batching"):
        if not getattr(settings, name):
            raise ValueError(f"`{name}` must be more than 0, but it is {getattr(settings, name)}.")


def check_base(base: str | None) -> None:
    """Raises a `ValueError` where `base` is neither a checkpoint folder nor the name of a Hub repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not base:
        raise ValueError("`base` is missing; give `--base` with a Hub repository or a folder in diffusers layout.")
    if os.path.exists(base):
        if not os.path.isfile(os.path.join(base, "model_index.json")):
            raise ValueError(f"`base` {base} has no model_index.json; give a folder in diffusers layout.")
        return
    try:
        validate_repo_id(base)
        missing = base.count("/") != 1 or base.startswith((".", "~"))
    except HFValidationError:
        missing = True
    if missing:
        raise ValueError(f"`base` {base} does not exist; give a folder in diffusers layout or a Hub repository.")


def path_and_rest(name: str, text: str) -> tuple[str, str]:
    """The path in the value of a setting, and what follows it: the times of a speaker."""
    if name != "speaker":
        return text, ""
    path, *times = text.rsplit(":", 2)
    if len(times) != 2 or not path:
        raise ValueError(f"`speaker` is {text!r}; give FILE:START:END, the times in seconds.")
    return path, "".join(f":{time}" for time in times)


def speaker_parts(text: str) -> tuple[str, float, float]:
    """
    File, start and end of a speaker's turn.

    Raises:
        ValueError: It is not FILE:START:END, or it ends before it begins.
    """
    path, times = path_and_rest("speaker", text)
    try:
        start, end = map(float, times.split(":")[1:])
    except ValueError:
        start = end = -1.0
    if not 0 <= start < end <= MOST:
        raise ValueError(f"`speaker` is {text!r}; give FILE:START:END with times in seconds that rise from 0.")
    return path, start, end


def guidance_window(name: str, text: str) -> Any:
    """
    The `GuidanceWindow` that a text such as `0:0.8,skip=0.4:0.5,every=2` describes.

    Raises:
        ValueError: It describes none.
    """
    from .guidance import GuidanceWindow

    try:
        span, *options = text.split(",")
        (start, stop), skip, every = _span(span), [], 1
        for option in options:
            key, _, value = option.strip().partition("=")
            if key == "skip":
                skip.append(_span(value))
            elif key == "every" and value.isdecimal():
                every = int(value)
            elif key == "every":
                raise ValueError(f"every is {value!r}, no whole number")
            else:
                raise ValueError(f"{key} is neither skip nor every")
        return GuidanceWindow(start, stop, tuple(skip), every)
    except ValueError as error:
        # Its names are those of other options here.
        reason = str(error).replace("`", "").rstrip(".")
        raise ValueError(
            f"`{name}` is {shortened(text)} ({reason}); give START:STOP from 0 to 1, then if need be ,skip=START:STOP "
            "and ,every=N."
        ) from error


def _span(text: str) -> tuple[float, float]:
    try:
        start, stop = map(float, text.split(":"))
    except ValueError:
        raise ValueError(f"{text!r} is not two numbers with a colon between them") from None
    return start, stop
