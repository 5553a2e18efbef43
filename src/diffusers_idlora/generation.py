"""
From settings to an mp4 and the JSON record beside it: what the command line does, without the command line.

Nothing heavy is imported before it is needed, so that help and mistakes are answered at once.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .settings import ClipSettings, ModelSettings, default_device, in_the_users_words
from .values import checked_value, checked_values, first_line


VERSIONED_PACKAGES = ("diffusers-idlora", "diffusers", "torch", "transformers", "peft")
ONE_STAGE_MODELS = ModelSettings()
# The second of two stages refines what the first has denoised at half the size.
DENOISING, REFINING = "Denoising", "Refining"
# Told the stage, how much of it is done, and of how much (`None` where that is unknown).
Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Clip:
    """
    One clip to make. Its record lies beside the mp4 under the same name.

    Args:
        settings (`ClipSettings`): What to make.
        output (`Path`): The mp4 to write.
        overwrite (`bool`, *optional*, defaults to `False`): Whether existing files may be replaced.
    """

    settings: ClipSettings
    output: Path
    overwrite: bool = False

    @property
    def record(self) -> Path:
        """The JSON beside the mp4."""
        return self.output.with_suffix(".json")

    @property
    def is_done(self) -> bool:
        """Whether mp4 and record are both there and belong together, so that nothing is left to make."""
        from .media import file_sha256

        if not os.path.isfile(self.output) or (record := self.earlier()) is None:
            return False
        return record["output"]["sha256"] == file_sha256(self.output)

    @property
    def replaceable(self) -> list[Path]:
        """
        What may be replaced: all with `overwrite`, else the record of this very clip whose mp4 is not there. The
        record appears first, so that is what a run leaves that was killed between the two.
        """
        if self.overwrite:
            return [self.record, self.output]
        alone = not os.path.lexists(self.output) and self.earlier() is not None
        return [self.record] if alone and not self.changed_settings() else []

    def earlier(self) -> dict | None:
        """The record that is there; `None` where there is none, or another file of that name."""
        try:
            return read_record(self.record)[2]
        except ValueError:
            return None

    def changed_settings(self) -> list[str]:
        """Names of the settings that differ from those of the record there; what is settled later fits any."""
        earlier, now = read_record(self.record)[1], self.settings.resolved()
        fits = {name for name in ("seed", "identity_guidance_scale") if getattr(self.settings, name) is None}
        names = [item.name for item in dataclasses.fields(now) if item.name not in fits]
        return [name for name in names if getattr(earlier, name) != getattr(now, name)]

    def check_settings(self, models: ModelSettings) -> None:
        """Raises a `ValueError` for settings that are wrong, alone or with these models."""
        self.settings.check()
        check_recipe(models, self.settings)

    def check(self, models: ModelSettings = ONE_STAGE_MODELS, also_inputs: tuple[Path, ...] = ()) -> None:
        """
        Raises a `ValueError` where the clip cannot be made, or would cost the user a file.

        Args:
            models (`ModelSettings`, *optional*): What it is to be made with.
            also_inputs (`tuple[Path, ...]`, *optional*): Further files that must never be written over.
        """
        from .media import check_output_path

        inputs = [path for paths in self.settings.files().values() for path in paths] + list(also_inputs)
        replaceable = self.replaceable
        for target in (self.output, self.record):
            if any(os.path.exists(target) and os.path.exists(path) and target.samefile(path) for path in inputs):
                raise ValueError(f"`output` would write over the input {target}; give another name.")
            if os.path.lexists(target) and target not in replaceable:
                stranger = "" if self.is_done else ", and mp4 and record do not belong together"
                raise ValueError(
                    f"`output` {target} is already there{stranger}; move it away, give another name or pass "
                    "--overwrite."
                )
        self.check_settings(models)
        # Last, so that a mistake elsewhere leaves no new folder behind.
        check_output_path(self.output, create=True)


def check_recipe(models: ModelSettings, settings: ClipSettings) -> None:
    """Raises a `ValueError` for settings that the recipe's pipeline does not have or cannot work with."""
    for name in ("stage_2_sigmas", "distilled_scales"):
        if getattr(settings, name) and not models.has_two_stages:
            raise ValueError(f"`{name}` is for two stages, but `recipe` is {models.recipe!r}; leave it out.")
    for name in ("height", "width"):
        size = getattr(settings, name)
        if models.has_two_stages and size is not None and size % 64:
            raise ValueError(
                f"`{name}` must be a multiple of 64 with `recipe` {models.recipe!r}, but it is {size}; take "
                f"{max(64, size // 64 * 64)}."
            )


@in_the_users_words()
def load_models(models: ModelSettings) -> Any:
    """
    The pipeline of the recipe with its adapters, placed as `models` says, and ready for many clips.

    Raises:
        ValueError: The checkpoint or the adapter cannot be loaded.
    """
    from .batch import BatchPipeline, BatchTwoStagePipeline
    from .memory import load_pipeline

    return load_pipeline(models, BatchTwoStagePipeline if models.has_two_stages else BatchPipeline)


def call_arguments(pipe: Any, models: ModelSettings, settings: ClipSettings) -> dict[str, Any]:
    """Keyword arguments of the call that makes the clip of settled settings."""
    arguments = settings.call_arguments()
    if models.has_two_stages:
        arguments["distilled_adapter"] = "distilled" if models.has_distilled_lora else None
    if pipe.processes.shares_passes:
        arguments["guidance_parallel"] = True
    return arguments


@in_the_users_words()
def generate_clip(pipe: Any, models: ModelSettings, clip: Clip, report: Report) -> None:
    """
    Makes one clip with loaded models and writes its record and its mp4, which appear whole and together.

    Args:
        pipe (`LTX2IDLoRAPipeline`): As `load_models` returns it.
        models (`ModelSettings`): What it was loaded from, for the record.
        clip (`Clip`): What to make and where to put it. Its seed is drawn here where it has none.
        report (`Report`): Told of each stage: Denoising, Decoding, Writing.

    Raises:
        ValueError: The pipeline refuses the settings, or the results cannot be written.
    """
    settings = clip.settings.resolved(pipe.recommended_identity_guidance_scale)
    # Before the models run, so that it speaks of the files that were read.
    record = make_record(models, settings)
    arguments = call_arguments(pipe, models, settings)
    result = pipe(**arguments, callback_on_step_end=step_reporter(models, report))
    finish_clip(pipe, clip, record, result.frames[0], result.audio[0], report)


def step_reporter(models: ModelSettings, report: Report) -> Callable:
    """A callback of the pipeline's steps that tells `report` of them, by the stages of the recipe."""
    ahead, begun = [DENOISING, REFINING] if models.has_two_stages else [DENOISING], []

    def after_step(pipe, step, timestep, tensors):
        if step == 0:
            begun.append(ahead.pop(0))
        report(begun[-1], step + 1, pipe.num_timesteps)
        if step + 1 == pipe.num_timesteps and not ahead:
            report("Decoding", 0, None)
        return tensors

    return after_step


def make_record(models: ModelSettings, settings: ClipSettings) -> dict:
    """The record of a clip with settled settings, but for what is only known once it is made."""
    return {
        "notice": synthetic_notice()["comment"],
        "output": {},
        "models": dataclasses.asdict(models)
        | {"device": models.device or default_device(), "base_revision": base_commit(models)},
        "settings": dataclasses.asdict(settings),
        "files": file_hashes(models, settings),
        "versions": versions(),
    }


def finish_clip(pipe: Any, clip: Clip, record: dict, frames: list, audio: Any, report: Report) -> None:
    """
    Completes the record of a clip, and writes it and the mp4.

    Args:
        pipe (`LTX2IDLoRAPipeline`): What made it.
        clip (`Clip`): Where to write.
        record (`dict`): As `make_record` returns it.
        frames (`list[PIL.Image.Image]`): The picture.
        audio (`torch.Tensor`): The sound, `[channels, samples]`.
        report (`Report`): Told of the stages Decoding and Writing.

    Raises:
        ValueError: They cannot be written.
    """
    report("Decoding", 1, 1)
    record["output"] = {
        "file": clip.output.name,
        "width": frames[0].width,
        "height": frames[0].height,
        "num_frames": len(frames),
        "seconds": len(frames) / record["settings"]["frame_rate"],
        "sampling_rate": pipe.vocoder.config.output_sampling_rate,
    }
    write_result(clip, record, frames, audio.float().cpu(), report)


def write_result(clip: Clip, record: dict, frames: list, audio: Any, report: Report) -> None:
    """
    Writes the record and the mp4 of a clip, which appear whole and together.

    Args:
        clip (`Clip`): Where to write, and what may be replaced.
        record (`dict`): The record, to which the hash of the mp4 is added.
        frames (`list[PIL.Image.Image]`): The picture.
        audio (`torch.Tensor`): The sound, `[channels, samples]`.
        report (`Report`): Told of each frame written.

    Raises:
        ValueError: They cannot be written, or a file has appeared that may not be replaced.
    """
    from av import FFmpegError

    from .media import appearing_together, file_sha256, write_video

    written = itertools.count(1)
    try:
        # The record first: alone it shows whose it is, and what to make again; an mp4 alone could be anybody's.
        with appearing_together([clip.record, clip.output], clip.replaceable) as (new_record, new_output):
            write_video(
                new_output,
                frames,
                record["settings"]["frame_rate"],
                audio=audio,
                audio_sampling_rate=record["output"]["sampling_rate"],
                metadata=synthetic_notice(),
                progress=lambda: report("Writing", next(written), len(frames)),
            )
            record["output"]["sha256"] = file_sha256(new_output)
            # ASCII, because names of files may hold bytes that are no text, which UTF-8 cannot carry.
            new_record.write_text(json.dumps(record, indent=2) + "\n", encoding="ascii")
    except FileExistsError as error:
        raise ValueError(
            f"`output` {clip.output} or its record has appeared meanwhile, and was left alone; give another name."
        ) from error
    except (OSError, FFmpegError) as error:
        raise ValueError(
            f"`output` {clip.output} cannot be written ({error.strerror or first_line(error)}); make room or choose "
            "another place."
        ) from error


def synthetic_notice() -> dict[str, str]:
    """The mp4's metadata, which says that nobody was filmed."""
    return {
        "title": "Synthetic talking video",
        "comment": f"Synthetic media: picture and sound were generated by diffusers_idlora "
        f"{version('diffusers-idlora')} with an LTX-2 model; no real event was recorded.",
    }


def adapter_files(models: ModelSettings) -> dict[str, list[Path]]:
    """The files of the adapters on this machine, downloaded already or local, by setting."""
    from .adapter_files import find_adapter_file

    found = {}
    if models.lora is not None:
        found["lora"] = [find_adapter_file(models.lora, weight_name=models.lora_weight_name, name="lora")]
    if models.has_distilled_lora:
        weight_name = models.distilled_weight_name
        found["distilled_lora"] = [
            find_adapter_file(models.distilled_lora, weight_name=weight_name, name="distilled_lora")
        ]
    return found


def file_hashes(models: ModelSettings, settings: ClipSettings) -> dict[str, list[dict[str, str]]]:
    """Path and SHA-256 of every file that a clip is made of, by setting: image, reference_audio, lora, base, ..."""
    from .media import file_sha256

    files = settings.files() | adapter_files(models)
    hashes = {
        name: [{"path": str(path), "sha256": file_sha256(path)} for path in paths] for name, paths in files.items()
    }
    if models.transformer_file is not None and os.path.isfile(models.transformer_file):
        path = models.transformer_file
        hashes["transformer_file"] = [{"path": path, "sha256": weights_sha256(Path(path))}]
    for name in ("base", "upsampler"):
        folder = getattr(models, name)
        if folder is not None and os.path.isdir(folder):
            hashes[name] = [{"path": folder, "sha256": checkpoint_sha256(Path(folder))}]
    return hashes


def checkpoint_sha256(folder: Path) -> str:
    """One SHA-256 for a checkpoint, quick for any size: of its JSON files, and of the sizes of its weight files."""
    from .media import file_sha256

    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".bin") and path.is_file():
            content = file_sha256(path) if path.suffix == ".json" else path.stat().st_size
            digest.update(os.fsencode(f"{path.relative_to(folder).as_posix()} {content}\n"))
    return digest.hexdigest()


def weights_sha256(file: Path) -> str:
    """One SHA-256 for a file of weights, quick for any size: of its beginning, which names them, and of its size."""
    with file.open("rb") as content:
        return hashlib.sha256(content.read(2**20) + str(file.stat().st_size).encode()).hexdigest()


def base_commit(models: ModelSettings) -> str | None:
    """The commit of a base checkpoint from the Hub as it lies in the cache; `None` for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.exists(models.base):
        return None
    cached = try_to_load_from_cache(models.base, "model_index.json", revision=models.base_revision)
    return Path(cached).parent.name if isinstance(cached, str) else models.base_revision


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result."""
    return {"python": platform.python_version()} | {name: version(name) for name in VERSIONED_PACKAGES}


def read_record(path: Path) -> tuple[ModelSettings, ClipSettings, dict]:
    """
    The settings of an earlier clip, and the whole record, from the JSON beside it.

    Raises:
        ValueError: The file is missing, is not such a record, or has settings that this version does not know.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        models = ModelSettings(**checked_values(ModelSettings, record["models"]))
        settings = ClipSettings(**checked_values(ClipSettings, record["settings"]))
        for files in record["files"].values():
            for file in files:
                checked_value("sha256", file["sha256"], str)
        checked_value("sha256", record["output"]["sha256"], str)
        record["versions"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"`from` {path} is not the record of a clip ({first_line(error)}); give the JSON beside an mp4."
        ) from error
    return models, settings, record


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
