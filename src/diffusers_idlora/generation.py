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
        """Names of the settings that differ from those of the record that is there; a seed left out fits any."""
        earlier, now = read_record(self.record)[1], self.settings.resolved()
        fits = {"seed"} if self.settings.seed is None else set()
        names = [item.name for item in dataclasses.fields(now) if item.name not in fits]
        return [name for name in names if getattr(earlier, name) != getattr(now, name)]

    def check(self, also_inputs: tuple[Path, ...] = ()) -> None:
        """
        Raises a `ValueError` where the clip cannot be made, or would cost the user a file.

        Args:
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
        self.settings.check()
        # Last, so that a mistake elsewhere leaves no new folder behind.
        check_output_path(self.output, create=True)


@in_the_users_words()
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
        index = LTX2IDLoRAPipeline.load_config(models.base, revision=models.base_revision)
        if "LTX2VideoTransformer3DModel" not in (index.get("transformer") or ()):
            raise OSError(f"it holds a {index.get('_class_name')} without an LTX-2 transformer")
        pipe = LTX2IDLoRAPipeline.from_pretrained(
            models.base, revision=models.base_revision, dtype=getattr(torch, models.dtype)
        )
    # Beside the first two, what the libraries raise on files that are whole but say something wrong.
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(
            f"`base` {models.base} cannot be loaded ({first_line(error)}); give a complete folder in diffusers layout "
            "or a Hub repository that can be reached."
        ) from error
    if models.lora is not None:
        pipe.load_lora_weights(models.lora, weight_name=models.lora_weight_name, adapter_name="id_lora")
        pipe.set_adapters("id_lora", models.lora_scale)
    place(pipe, models)
    if models.compile:
        # The kinds of passes in several sizes are more graphs than the 8 that torch allows a block by default.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
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
    settings = clip.settings.resolved()
    # Before the models run, so that the record speaks of the files that were read.
    hashes = file_hashes(models, settings)

    def after_step(pipe, step, timestep, tensors):
        report("Denoising", step + 1, pipe.num_timesteps)
        if step + 1 == pipe.num_timesteps:
            report("Decoding", 0, None)
        return tensors

    result = pipe(**settings.call_arguments(), callback_on_step_end=after_step)
    report("Decoding", 1, 1)
    frames, audio = result.frames[0], result.audio[0].float().cpu()
    facts = {
        "width": frames[0].width,
        "height": frames[0].height,
        "num_frames": len(frames),
        "seconds": len(frames) / settings.frame_rate,
        "sampling_rate": pipe.vocoder.config.output_sampling_rate,
    }
    record = {
        "notice": synthetic_notice()["comment"],
        "output": {"file": clip.output.name} | facts,
        "models": dataclasses.asdict(models)
        | {"device": models.device or default_device(), "base_revision": base_commit(models)},
        "settings": dataclasses.asdict(settings),
        "files": hashes,
        "versions": versions(),
    }
    write_result(clip, record, frames, audio, report)


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


def adapter_file(models: ModelSettings) -> Path | None:
    """The adapter's file on this machine, downloaded already or local; `None` without an adapter."""
    from .adapter_files import find_adapter_file

    if models.lora is None:
        return None
    return find_adapter_file(models.lora, weight_name=models.lora_weight_name, name="lora")


def file_hashes(models: ModelSettings, settings: ClipSettings) -> dict[str, list[dict[str, str]]]:
    """Path and SHA-256 of every file that a clip is made of, by setting: image, reference_audio, lora, base."""
    from .media import file_sha256

    files = settings.files()
    if (adapter := adapter_file(models)) is not None:
        files["lora"] = [adapter]
    hashes = {
        name: [{"path": str(path), "sha256": file_sha256(path)} for path in paths] for name, paths in files.items()
    }
    if os.path.isdir(models.base):
        hashes["base"] = [{"path": models.base, "sha256": checkpoint_sha256(Path(models.base))}]
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
