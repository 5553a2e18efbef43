"""
From settings to an mp4 and the JSON record beside it: what the command line does, without the command line.

Nothing heavy is imported before it is needed, so that help and mistakes are answered at once.
"""

import dataclasses
import itertools
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

from .settings import (
    ClipSettings,
    ModelSettings,
    checked_value,
    checked_values,
    default_device,
    first_line,
    with_absolute_paths,
)


# Keys of the prompt lists that ID-LoRA's evaluation sets use, and what they are called here.
ROW_ALIASES = {"reference_path": "reference_audio", "first_frame_path": "image", "output_name": "output"}
VERSIONED_PACKAGES = ("diffusers-idlora", "diffusers", "torch", "transformers", "peft")
# Told the stage, how much of it is done, and of how much (`None` where that is unknown).
Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Clip:
    """One clip to make: its settings and its mp4. The record lies beside the mp4 under the same name."""

    settings: ClipSettings
    output: Path

    @property
    def record(self) -> Path:
        """The JSON beside the mp4."""
        return self.output.with_suffix(".json")

    @property
    def is_done(self) -> bool:
        """Whether mp4 and record are both there, so that nothing is left to make."""
        return self.output.exists() and self.record.exists()

    def check(self, overwrite: bool = False, also_inputs: tuple[Path, ...] = ()) -> None:
        """
        Raises a `ValueError` where the clip cannot be made, or would cost the user a file.

        Args:
            overwrite (`bool`, *optional*, defaults to `False`): Whether an earlier result may be replaced.
            also_inputs (`tuple[Path, ...]`, *optional*): Further files that must never be written over.
        """
        from .media import check_output_path

        inputs = [path for paths in self.settings.files().values() for path in paths] + list(also_inputs)
        for target in (self.output, self.record):
            if any(target.exists() and path.exists() and target.samefile(path) for path in inputs):
                raise ValueError(f"`output` would write over the input {target}; give another name.")
            if target.exists() and not overwrite:
                raise ValueError(f"`output` {target} is already there; give another name or pass --overwrite.")
        self.settings.check()
        # Last, so that a mistake elsewhere leaves no new folder behind.
        check_output_path(self.output, create=True)


def load_models(models: ModelSettings) -> Any:
    """
    The pipeline with its adapter, placed as `models` says.

    Raises:
        ValueError: The checkpoint or the adapter cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError

    from . import LTX2IDLoRAPipeline

    try:
        pipe = LTX2IDLoRAPipeline.from_pretrained(models.base, dtype=getattr(torch, models.dtype))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"`base` {models.base} cannot be loaded ({first_line(error)}); give a complete folder in diffusers layout "
            "or a Hub repository that can be reached."
        ) from error
    if models.lora is not None:
        pipe.load_lora_weights(models.lora, weight_name=models.lora_weight_name, adapter_name="id_lora")
        pipe.set_adapters("id_lora", models.lora_scale)
    place(pipe, models)
    if models.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def place(pipe: Any, models: ModelSettings) -> None:
    """Moves the pipeline to its device, or installs the offloading that `models` asks for."""
    import torch

    device = torch.device(models.device or default_device())
    if models.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif models.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif models.offload == "group":
        pipe.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=device.type == "cuda",
        )
    else:
        pipe.to(device)


def generate_clip(pipe: Any, models: ModelSettings, clip: Clip, report: Report) -> None:
    """
    Makes one clip with loaded models and writes its mp4, then its record; each appears whole or not at all.

    Args:
        pipe (`LTX2IDLoRAPipeline`): As `load_models` returns it.
        models (`ModelSettings`): What it was loaded from, for the record.
        clip (`Clip`): What to make and where to put it. Its seed is drawn here where it has none.
        report (`Report`): Told of each stage: Denoising, Decoding, Writing.
    """
    from .media import write_video

    clip = dataclasses.replace(clip, settings=clip.settings.resolved())
    # Before the models run, so that the record speaks of the files that were read.
    hashes = file_hashes(models, clip.settings)

    def after_step(pipe, step, timestep, tensors):
        report("Denoising", step + 1, pipe.num_timesteps)
        if step + 1 == pipe.num_timesteps:
            report("Decoding", 0, None)
        return tensors

    result = pipe(**clip.settings.call_arguments(), callback_on_step_end=after_step)
    report("Decoding", 1, 1)
    frames, audio = result.frames[0], result.audio[0].float().cpu()
    sampling_rate = pipe.vocoder.config.output_sampling_rate
    written = itertools.count(1)
    write_video(
        clip.output,
        frames,
        clip.settings.frame_rate,
        audio=audio,
        audio_sampling_rate=sampling_rate,
        metadata=synthetic_notice(),
        progress=lambda: report("Writing", next(written), len(frames)),
    )
    facts = {
        "width": frames[0].width,
        "height": frames[0].height,
        "num_frames": len(frames),
        "seconds": len(frames) / clip.settings.frame_rate,
        "sampling_rate": sampling_rate,
    }
    write_record(clip, models, hashes, facts)


def synthetic_notice() -> dict[str, str]:
    """The mp4's metadata, which says that nobody was filmed."""
    return {
        "title": "Synthetic talking video",
        "comment": f"Synthetic media: picture and sound were generated by diffusers_idlora "
        f"{version('diffusers-idlora')} with an LTX-2 model; no real event was recorded.",
    }


def adapter_file(models: ModelSettings) -> Path | None:
    """The adapter's file on this machine, downloaded already or local; `None` without an adapter."""
    from .adapter_files import find_adapter_file

    if models.lora is None:
        return None
    return find_adapter_file(models.lora, weight_name=models.lora_weight_name, name="lora")


def file_hashes(models: ModelSettings, settings: ClipSettings) -> dict[str, list[dict[str, str]]]:
    """Path and SHA-256 of every file that a clip is made of, by setting: image, reference_audio, lora."""
    from .media import file_sha256

    files = settings.files()
    if (adapter := adapter_file(models)) is not None:
        files["lora"] = [adapter]
    return {
        name: [{"path": str(path), "sha256": file_sha256(path)} for path in paths] for name, paths in files.items()
    }


def base_commit(base: str) -> str | None:
    """The commit of a base checkpoint from the Hub as it lies in the cache; `None` for a folder."""
    from huggingface_hub import try_to_load_from_cache

    cached = None if Path(base).exists() else try_to_load_from_cache(base, "model_index.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result."""
    return {"python": platform.python_version()} | {name: version(name) for name in VERSIONED_PACKAGES}


def write_record(clip: Clip, models: ModelSettings, hashes: dict, facts: dict) -> None:
    """Writes the JSON that says how the clip was made, whole or not at all."""
    from .media import file_sha256, replaced_when_complete

    record = {
        "notice": synthetic_notice()["comment"],
        "output": {"file": clip.output.name, "sha256": file_sha256(clip.output)} | facts,
        "models": dataclasses.asdict(models) | {"device": models.device or default_device()},
        "base_commit": base_commit(models.base),
        "settings": dataclasses.asdict(clip.settings),
        "files": hashes,
        "versions": versions(),
    }
    with replaced_when_complete(clip.record) as temporary:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(path: Path) -> tuple[ModelSettings, ClipSettings, dict]:
    """
    The settings of an earlier clip, and the whole record, from the JSON beside it.

    Raises:
        ValueError: The file is missing, is not such a record, or has settings that this version does not know.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        models, settings, _, _ = record["models"], record["settings"], record["files"], record["output"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`from` {path} is not the record of a clip ({first_line(error)}); give the JSON beside an mp4."
        ) from error
    return (
        ModelSettings(**checked_values(ModelSettings, models)),
        ClipSettings(**checked_values(ClipSettings, settings)),
        record,
    )


def check_unchanged(record: dict, models: ModelSettings, settings: ClipSettings, replaced: set[str]) -> None:
    """
    Raises a `ValueError` that names the first input file whose content differs from the record's.

    Args:
        record (`dict`): As `read_record` returns it.
        models (`ModelSettings`): The models now.
        settings (`ClipSettings`): The settings now.
        replaced (`set[str]`): Settings that the user gave anew, which may differ.
    """
    now = file_hashes(models, settings)
    for name, files in record["files"].items():
        if name in replaced:
            continue
        for before, after in zip(files, now.get(name, [])):
            if before["sha256"] != after["sha256"]:
                raise ValueError(
                    f"`{name}` {after['path']} has changed since the record was written; "
                    "restore it, give another file, or pass --force to use it as it is."
                )


def read_prompts_file(path: Path) -> list[Any]:
    """
    The rows of a prompts file: a JSON list, or JSON Lines. A line that is no JSON becomes its `ValueError`.

    Raises:
        ValueError: The file cannot be read, or has no rows.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json_line(line) for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`prompts_file` {path} cannot be read ({first_line(error)}); give a JSON list or JSON Lines."
        ) from error
    rows = [row for row in rows if row is not None]
    if not rows:
        raise ValueError(f"`prompts_file` {path} has no rows; give a JSON list or JSON Lines.")
    return rows


def json_line(line: str) -> Any:
    """The value on one line of JSON Lines: `None` for an empty line, a `ValueError` for what is no JSON."""
    try:
        return json.loads(line) if line.strip() else None
    except ValueError as error:
        return ValueError(f"the line {line[:40]!r} is not JSON ({first_line(error)}).")


def clip_of_row(row: Any, index: int, settings: ClipSettings, source: Path, folder: Path) -> Clip:
    """
    The clip that one row of a prompts file asks for.

    Args:
        row (`Any`): An object whose keys are named like the options, or like ID-LoRA's prompt lists.
        index (`int`): Its place in the file, from 0; added to the seed of `settings` where the row has none, and the
            name of its output where it gives none.
        settings (`ClipSettings`): What holds where the row says nothing; with a seed.
        source (`Path`): Folder that the row's paths are seen from.
        folder (`Path`): Folder of the results, which no row may leave.

    Raises:
        ValueError: The row is no object, or has unknown keys, values of the wrong type or an output outside `folder`.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f'a row must be an object such as {{"prompt": "..."}}, but it is {row!r}.')
    twice = [old for old, new in ROW_ALIASES.items() if old in row and new in row]
    if twice:
        raise ValueError(f"`{twice[0]}` and `{ROW_ALIASES[twice[0]]}` mean the same; give one.")
    given = {ROW_ALIASES.get(key, key): value for key, value in row.items()}
    name = checked_value("output", given.pop("output", f"{index:04d}.mp4"), str)
    given = {"seed": settings.seed + index} | checked_values(ClipSettings, given)
    return Clip(settings.updated(with_absolute_paths(given, source)), path_inside(folder, name))


def path_inside(folder: Path, name: str) -> Path:
    """`folder / name` as an mp4, or a `ValueError` where that could lie outside of `folder`."""
    # Windows' rules know both kinds of slashes and drives, so that a list is refused on every machine or on none.
    strict = PureWindowsPath(name)
    if not strict.name or strict.anchor or ".." in strict.parts:
        raise ValueError(f"`output` {name!r} must be a file name below the output folder, without '..'.")
    path = folder
    for part in Path(name if strict.suffix else f"{name}.mp4").parts:
        path = path / part
        if path.is_symlink():
            raise ValueError(f"`output` {name!r} goes through the symbolic link {path}; give another name.")
    return path
