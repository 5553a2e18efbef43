"""From a folder of talking clips to a folder of prepared samples."""

import functools
import inspect
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from diffusers import LTX2ConditionPipeline
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT
from diffusers.training_utils import free_memory
from diffusers.utils import logging
from rich.markup import escape
from rich.table import Table

from ..media import file_sha256, frame_rate_fraction, replaced_when_complete
from ..pipeline_ltx2_idlora import LTX2IDLoRAPipeline
from .clips import Bucket, check_denoise_command, choose_bucket, probe_clip
from .manifest import Columns, Dropped, find_dataset, read_manifest
from .pairs import Pair, choose_validation_voices, make_pairs
from .parts import STAGES, Part, PartStore, SoundPart, TextPart, VideoPart, VoicePart, content_hash
from .samples import (
    INDEX_NAME,
    TrainingSample,
    read_negative_prompt,
    read_sample_metadata,
    save_negative_prompt,
    save_sample,
    write_index,
)


logger = logging.get_logger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPORT_NAME = "report.json"
SHOWN_DROPPED = 20
SAMPLES_FOLDER, WORK_FOLDER = "samples", ".work"
# What is left of a clip beside the target must last this long to show a voice.
MIN_FREE_SECONDS = 1.0
# Counts up when the same settings and sources give other samples.
FORMAT_VERSION = 1
_COMPONENTS = tuple(inspect.signature(LTX2ConditionPipeline.__init__).parameters)[1:]


@dataclass(frozen=True)
class PreparationOptions:
    """
    What to prepare and how.

    Attributes:
        pretrained_model_name_or_path (`str`): The base model in the diffusers layout.
        output_dir (`str` or `os.PathLike`): The folder for the samples.
        dataset_name (`str`, *optional*): A data set on the Hub, or
        instance_data_root (`str` or `os.PathLike`, *optional*): a local folder.
        columns (`Columns`, *optional*): Names of the table's columns.
        revision (`str`, *optional*), variant (`str`, *optional*): Of the base model.
        resolution_buckets (`tuple[Bucket, ...]`, *optional*, defaults to one of 512x512x121): Sizes to choose from.
        fps (`float`, *optional*, defaults to `25.0`): Frames per second of the samples.
        pairs_per_clip (`int`, *optional*, defaults to `1`): See [`make_pairs`].
        allow_same_clip (`bool`, *optional*, defaults to `False`): Whether a speaker's only clip may be paired with
            a later part of itself.
        validation_speakers (`int`, *optional*, defaults to `0`): Speakers to hold out.
        reference_seconds (`float`, *optional*, defaults to `5.0`): Longer references are cut to their loudest part.
        denoise_command (`str`, *optional*): Run on each reference, for example `"denoise {in} {out}"`.
        max_sequence_length (`int`, *optional*, defaults to `1024`): Tokens of a caption.
        negative_prompt (`str`, *optional*, defaults to diffusers' `DEFAULT_NEGATIVE_PROMPT` for LTX-2):
            Stored once for the whole set; validation videos need it for text guidance.
        dtype (`str`, *optional*, defaults to `"bf16"`): `"bf16"`, `"fp16"` or `"fp32"`, of the models and the samples.
        limit (`int`, *optional*): Prepare only so many samples, for a trial.
        seed (`int`, *optional*, defaults to `0`): Of the pairs and the held out speakers.
    """

    pretrained_model_name_or_path: str
    output_dir: str | os.PathLike
    dataset_name: str | None = None
    instance_data_root: str | os.PathLike | None = None
    columns: Columns = field(default_factory=Columns)
    revision: str | None = None
    variant: str | None = None
    resolution_buckets: tuple[Bucket, ...] = (Bucket(512, 512, 121),)
    fps: float = 25.0
    pairs_per_clip: int = 1
    allow_same_clip: bool = False
    validation_speakers: int = 0
    reference_seconds: float = 5.0
    denoise_command: str | None = None
    max_sequence_length: int = 1024
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    dtype: str = "bf16"
    limit: int | None = None
    seed: int = 0

    @property
    def settings_hash(self) -> str:
        """SHA-256 over the settings that every sample depends on; its size and its sources are not among them."""
        model = (str(self.pretrained_model_name_or_path), self.revision, self.variant, self.dtype)
        reference = (self.reference_seconds, self.denoise_command)
        return content_hash(FORMAT_VERSION, model, self.fps, self.max_sequence_length, reference)

    def check(self) -> None:
        """
        Checks the options before any model loads.

        Raises:
            ValueError: If one is out of range, the base model isn't found or the output can't be written.
        """
        frame_rate_fraction(self.fps)
        if not self.resolution_buckets:
            raise ValueError("`resolution_buckets` is empty: give at least one, such as 512x512x121.")
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` is {self.dtype!r}: choose one of {', '.join(map(repr, DTYPES))}.")
        if not (math.isfinite(self.reference_seconds) and self.reference_seconds >= 0.5):
            raise ValueError(f"`reference_seconds` must be at least 0.5, but is {self.reference_seconds}.")
        for name, least in (("pairs_per_clip", 1), ("validation_speakers", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, but is {value}.")
        if self.denoise_command is not None:
            check_denoise_command(self.denoise_command)
        self._check_model()
        try:
            Path(self.output_dir, SAMPLES_FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"`output_dir` {str(self.output_dir)!r} can't be created ({error.strerror}): choose another."
            ) from error

    def _check_model(self) -> None:
        try:
            config = LTX2TextConnectors.load_config(
                self.pretrained_model_name_or_path, subfolder="connectors", revision=self.revision
            )
        except OSError as error:
            raise ValueError(
                f"`pretrained_model_name_or_path` {str(self.pretrained_model_name_or_path)!r} is no LTX-2 model in "
                f"the diffusers layout ({str(error).splitlines()[0]})."
            ) from error
        registers = config.get("video_connector_num_learnable_registers") or 1
        if self.max_sequence_length < 1 or self.max_sequence_length % registers:
            raise ValueError(
                f"`max_sequence_length` must be a multiple of {registers} for this base model, but is "
                f"{self.max_sequence_length}."
            )


@dataclass(frozen=True)
class PlannedSample:
    """
    A sample that is to be prepared.

    Attributes:
        pair (`Pair`): The clip and its voice.
        bucket (`Bucket`): Its size.
        split (`str`): `"train"` or `"validation"`.
    """

    pair: Pair
    bucket: Bucket
    split: str

    @property
    def file(self) -> str:
        """Its file, relative to the prepared folder."""
        return f"{SAMPLES_FOLDER}/{self.pair.id}.safetensors"


def plan_samples(root: Path, options: PreparationOptions) -> tuple[list[PlannedSample], list[Dropped]]:
    """
    Decides what to prepare, from the table and the headers of the files.

    Args:
        root (`pathlib.Path`): The data set.
        options (`PreparationOptions`): Which pairs and sizes are wanted.

    Returns:
        `tuple[list[PlannedSample], list[Dropped]]`: The samples in the order of their ids, and what is left out.

    Raises:
        ValueError: If the table is wrong or too few speakers would be left.
    """
    clips, dropped = read_manifest(root, options.columns)
    usable, buckets, free_spans = [], {}, {}
    for clip in clips:
        try:
            info = probe_clip(clip.path)
            bucket = choose_bucket(info, options.resolution_buckets, options.fps)
        except ValueError as error:
            dropped.append(Dropped(clip.file_name, str(error)))
            continue
        usable.append(clip)
        buckets[clip.file_name] = bucket
        target_end = bucket.num_frames / options.fps
        if info.seconds - target_end >= MIN_FREE_SECONDS:
            free_spans[clip.file_name] = (target_end, info.seconds)
    pairs, unpaired = make_pairs(
        usable, options.pairs_per_clip, options.seed, free_spans if options.allow_same_clip else None
    )
    held_out = choose_validation_voices(pairs, options.validation_speakers, options.seed)
    samples = [
        PlannedSample(pair, buckets[pair.target.file_name], "validation" if pair.voice in held_out else "train")
        for pair in pairs
    ]
    return samples[: options.limit], dropped + unpaired


@dataclass(frozen=True)
class Outcome:
    """
    What became of a planned sample.

    Attributes:
        file_name (`str`): The clip.
        row (`dict`, *optional*): The sample's row of the index.
        reason (`str`, *optional*): Why there is none.
        reused (`bool`): Whether it was there already.
    """

    file_name: str
    row: dict[str, Any] | None = None
    reason: str | None = None
    reused: bool = False


def prepare_samples(
    samples: Sequence[PlannedSample],
    options: PreparationOptions,
    device: torch.device | str,
    is_main_process: bool = True,
) -> list[Outcome]:
    """
    Encodes samples, each of which is written whole or not at all; those that are there already are left alone.

    Args:
        samples (`Sequence[PlannedSample]`): What to prepare.
        options (`PreparationOptions`): How.
        device (`torch.device` or `str`): Where the models run.
        is_main_process (`bool`, *optional*, defaults to `True`):
            Whether to encode the negative prompt too, and to show progress bars.

    Returns:
        `list[Outcome]`: One for each sample.
    """
    output_dir = Path(options.output_dir)
    sha256 = functools.cache(file_sha256)
    outcomes, missing = [], []
    for sample in samples:
        source = sha256(sample.pair.target.path)
        copies = [span for span in sample.pair.references if sha256(span.path) == source]
        if any(span.path != sample.pair.target.path for span in copies):
            reason = f"its reference {copies[0].file_name!r} is a copy of it"
            outcomes.append(Outcome(sample.pair.target.file_name, reason=reason))
            continue
        parts = _parts(sample, options, sha256)
        metadata = _metadata(sample, options, parts)
        row = _row_if_current(sample, output_dir, metadata)
        if row is None:
            missing.append((sample, parts, metadata))
        else:
            outcomes.append(Outcome(sample.pair.target.file_name, row, reused=True))

    store = PartStore(output_dir / WORK_FOLDER / options.settings_hash[:16], DTYPES[options.dtype])
    negative = _missing_negative_prompt(options) if is_main_process else None
    wanted = [part for _, parts, _ in missing for part in parts] + ([negative] if negative else [])
    failures = _encode_parts(wanted, store, options, device, is_main_process)
    if negative and negative in store:
        save_negative_prompt(output_dir, store.load(negative), _negative_prompt_metadata(options))
    for sample, parts, metadata in missing:
        reason = next((failures[part] for part in parts if part in failures), None)
        row = None if reason else _assemble(sample, parts, metadata, store, output_dir)
        outcomes.append(Outcome(sample.pair.target.file_name, row, reason))
    return outcomes


def _negative_prompt_metadata(options: PreparationOptions) -> dict[str, str]:
    return {"negative_prompt": options.negative_prompt, "settings_hash": options.settings_hash}


def _missing_negative_prompt(options: PreparationOptions) -> TextPart | None:
    try:
        found = read_negative_prompt(options.output_dir)
    except ValueError as error:
        logger.warning(f"{error} It is encoded again.")
        found = None
    if found is not None and found[1] == _negative_prompt_metadata(options):
        return None
    return TextPart(options.negative_prompt, options.max_sequence_length)


def _parts(sample: PlannedSample, options: PreparationOptions, sha256: Any) -> list[Part]:
    target, bucket = sample.pair.target, sample.bucket
    source = sha256(target.path)
    voices = [
        VoicePart(span, sha256(span.path), options.reference_seconds, options.denoise_command)
        for span in sample.pair.references
    ]
    return [
        TextPart(target.caption, options.max_sequence_length),
        VideoPart(target.path, source, bucket, options.fps),
        SoundPart(target.path, source, bucket.num_frames, options.fps),
        *voices,
    ]


def _metadata(sample: PlannedSample, options: PreparationOptions, parts: list[Part]) -> dict[str, Any]:
    target, bucket = sample.pair.target, sample.bucket
    return {
        "caption": target.caption,
        "speaker_id": sample.pair.voice,
        "source": target.file_name,
        "source_sha256": parts[1].sha256,
        "num_frames": bucket.num_frames,
        "height": bucket.height,
        "width": bucket.width,
        "settings_hash": options.settings_hash,
        "sample_hash": content_hash(options.settings_hash, sample.pair.voice, [part.key for part in parts]),
    }


def _row_if_current(sample: PlannedSample, output_dir: Path, metadata: dict[str, Any]) -> dict[str, Any] | None:
    if not (output_dir / sample.file).is_file():
        return None
    try:
        found = read_sample_metadata(output_dir / sample.file)
    except ValueError as error:
        logger.warning(f"{error} It is prepared again.")
        return None
    return _row(sample, found) if found.get("sample_hash") == metadata["sample_hash"] else None


def _row(sample: PlannedSample, metadata: dict[str, Any]) -> dict[str, Any]:
    row = {"id": sample.pair.id, "file": sample.file, "split": sample.split, **metadata}
    # The samples of two versions are one data set, with one fingerprint.
    row.pop("package_version")
    return row


@torch.no_grad()
def _encode_parts(
    parts: Sequence[Part],
    store: PartStore,
    options: PreparationOptions,
    device: torch.device | str,
    progress: bool,
) -> dict[Part, str]:
    failures = {}
    for name, kinds in STAGES:
        wanted = [part for part in dict.fromkeys(parts) if isinstance(part, kinds) and part not in store]
        if not wanted:
            continue
        pipeline = _load_pipeline(options, kinds[0].components, device)
        for part in logging.tqdm(wanted, desc=f"Encoding {name}", disable=not progress):
            try:
                store.save(part, part.encode(pipeline))
            except ValueError as error:
                failures[part] = str(error)
        del pipeline
        free_memory()
    return failures


def _load_pipeline(
    options: PreparationOptions, components: tuple[str, ...], device: torch.device | str
) -> LTX2IDLoRAPipeline:
    absent = dict.fromkeys(name for name in _COMPONENTS if name not in components)
    return LTX2IDLoRAPipeline.from_pretrained(
        options.pretrained_model_name_or_path,
        revision=options.revision,
        variant=options.variant,
        dtype=DTYPES[options.dtype],
        **absent,
    ).to(device)


def _assemble(
    sample: PlannedSample, parts: list[Part], metadata: dict[str, Any], store: PartStore, output_dir: Path
) -> dict[str, Any]:
    text, video, sound, *voices = (store.load(part) for part in parts)
    references = [voice["reference_latents"] for voice in voices]
    spans = [
        {"file_name": part.span.file_name, "sha256": part.sha256, "start": start, "end": end}
        for part, (start, end) in zip(parts[3:], (voice["span"].tolist() for voice in voices))
    ]
    metadata = {
        **metadata,
        "frame_rate": parts[1].frame_rate,
        "shape": list(video["video_latents"].shape[1:]),
        "audio_length": sound["audio_latents"].shape[1],
        "reference": spans,
        "reference_lengths": [clip.shape[1] for clip in references],
        "package_version": version("diffusers-idlora"),
    }
    prepared = TrainingSample(
        **text, **video, **sound, reference_latents=tuple(references), frame_rate=metadata["frame_rate"]
    )
    save_sample(output_dir / sample.file, prepared, metadata)
    return _row(sample, metadata)


def prepare_dataset(options: PreparationOptions) -> dict[str, Any]:
    """
    Prepares a data set. Under `accelerate launch` every process takes its share, and the first writes the index.

    It may be killed at any moment and started again: what is done is not done again. Clips that can't be used are
    reported.

    Args:
        options (`PreparationOptions`): What and how.

    Returns:
        `dict[str, Any]`: The report that is written to `report.json` too, in every process.

    Raises:
        ValueError: If an option or the table is wrong, before any model loads.
    """
    # Shares may differ by hours, which processes that wait must bear.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=7))
    options.check()
    with state.main_process_first():
        root = find_dataset(options.dataset_name, options.instance_data_root)
    samples, dropped = plan_samples(root, options)
    output_dir = Path(options.output_dir)
    if state.is_main_process:
        # Until the end it would name samples that are being replaced.
        (output_dir / INDEX_NAME).unlink(missing_ok=True)
    state.wait_for_everyone()
    with state.split_between_processes(samples) as share:
        outcomes = prepare_samples(share, options, state.device, state.is_main_process)
    outcomes = gather_object(outcomes)
    report = make_report(outcomes, dropped)
    if state.is_main_process:
        _finish(output_dir, outcomes, report)
    state.wait_for_everyone()
    return report


def _finish(output_dir: Path, outcomes: Sequence[Outcome], report: dict[str, Any]) -> None:
    rows = sorted((outcome.row for outcome in outcomes if outcome.row), key=lambda row: row["id"])
    if rows:
        write_index(output_dir, rows)
    with replaced_when_complete(output_dir / REPORT_NAME) as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    shutil.rmtree(output_dir / WORK_FOLDER, ignore_errors=True)
    # Left by runs that were killed while they wrote.
    for unfinished in (output_dir / SAMPLES_FOLDER).glob(".*.safetensors"):
        unfinished.unlink(missing_ok=True)


def make_report(outcomes: Sequence[Outcome], dropped: Sequence[Dropped]) -> dict[str, Any]:
    """
    Sums up a preparation.

    Args:
        outcomes (`Sequence[Outcome]`): Of all samples.
        dropped (`Sequence[Dropped]`): Clips that were left out before.

    Returns:
        `dict[str, Any]`: `pairs`, `clips`, `speakers`, `hours` (of all samples), `reused` (samples that were there
        already), `splits`, `sizes`, and `dropped`, a list of `file_name` and `reason`.
    """
    rows = [outcome.row for outcome in outcomes if outcome.row]
    failed = [Dropped(outcome.file_name, outcome.reason) for outcome in outcomes if outcome.reason]
    left_out = sorted({*dropped, *failed}, key=lambda one: (one.file_name, one.reason))
    return {
        "pairs": len(rows),
        "clips": len({row["source"] for row in rows}),
        "speakers": len({row["speaker_id"] for row in rows}),
        "hours": sum(row["num_frames"] / row["frame_rate"] for row in rows) / 3600,
        "reused": sum(outcome.reused for outcome in outcomes),
        "splits": dict(sorted(Counter(row["split"] for row in rows).items())),
        "sizes": dict(sorted(Counter(f"{row['width']}x{row['height']}x{row['num_frames']}" for row in rows).items())),
        "dropped": [asdict(one) for one in left_out],
    }


def report_table(report: dict[str, Any]) -> Table:
    """The report as a table for the terminal, with the first of the clips that were left out."""
    table = Table(title="Prepared data set", show_header=False)
    for name in ("pairs", "clips", "speakers", "reused"):
        table.add_row(name, str(report[name]))
    table.add_row("hours", f"{report['hours']:.2f}")
    for name in ("splits", "sizes"):
        table.add_row(name, ", ".join(f"{key}: {count}" for key, count in report[name].items()))
    for one in report["dropped"][:SHOWN_DROPPED]:
        table.add_row("left out", escape(f"{one['file_name']}: {one['reason']}"))
    if len(report["dropped"]) > SHOWN_DROPPED:
        table.add_row("", f"and {len(report['dropped']) - SHOWN_DROPPED} more, all in {REPORT_NAME}")
    return table
