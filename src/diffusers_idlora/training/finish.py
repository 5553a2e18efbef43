"""What a run leaves behind: the adapter, its record and card, a plot of the loss, and a repository on the Hub."""

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.utils import logging

from ..lora import transformer_generation
from ..media import replaced_when_complete
from .arguments import TrainingArguments
from .hub import PublishError, publish, save_trained_adapter
from .model_card import write_model_card
from .record import TrainingRecord


if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.get_logger(__name__)

RECORD_NAME = "training_record.json"
PLOT_NAME = "loss.png"


def make_record(trainer: "Trainer") -> TrainingRecord:
    """The facts of a run that outlive it."""
    arguments, samples = trainer.arguments, trainer.samples
    rows = getattr(samples, "rows", [])
    latents_per_second = trainer.transformer.audio_rope.audio_latents_per_second
    lengths = [sum(row["reference_lengths"]) for row in rows if row.get("reference_lengths")]
    speakers = {row["speaker_id"] for row in rows if row.get("speaker_id")}
    losses = read_losses(trainer.output_dir / "loss.csv")
    at_the_end = [row["loss"] for row in losses[-averaged_steps(losses) :] if math.isfinite(row["loss"])]
    return TrainingRecord(
        base_model=arguments.pretrained_model_name_or_path,
        base_revision=arguments.revision,
        base_fingerprint=trainer.base_fingerprint,
        generation=transformer_generation(trainer.transformer),
        rank=arguments.rank,
        alpha=trainer.transformer.peft_config["default"].lora_alpha,
        target_modules=arguments.target_modules,
        steps=trainer.step,
        batch_size=trainer.global_batch_size * arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate,
        mask_video_from_reference=arguments.mask_video_from_reference,
        mask_reference_from_text=arguments.mask_reference_from_text,
        data_fingerprint=samples.fingerprint,
        num_samples=len(samples),
        num_speakers=len(speakers) or None,
        dataset=arguments.dataset_name,
        license=arguments.license,
        reference_seconds=sum(lengths) / len(lengths) / latents_per_second if lengths else None,
        reference_dropout=arguments.reference_dropout,
        first_frame_conditioning_p=arguments.first_frame_conditioning_p,
        audio_loss_weight=arguments.audio_loss_weight,
        lora_dropout=arguments.lora_dropout,
        use_dora=arguments.use_dora,
        optimizer=arguments.optimizer,
        lr_scheduler=arguments.lr_scheduler,
        seed=arguments.seed,
        resolution=_resolutions(trainer),
        frame_rate=samples[0].frame_rate,
        dtype=str(trainer.weight_dtype).removeprefix("torch."),
        device=_device_name(trainer),
        seconds=sum(row["seconds"] for row in losses),
        final_loss=sum(at_the_end) / len(at_the_end) if at_the_end else None,
        # The released recipe's scale; a run that measures a better one may say so.
        recommended={"identity_guidance_scale": 3.0},
    )


def _resolutions(trainer: "Trainer") -> str:
    temporal, vertical, horizontal = trainer.transformer.config.vae_scale_factors
    sizes = {(w * horizontal, h * vertical, (f - 1) * temporal + 1) for f, h, w in trainer.samples.shapes}
    return ", ".join("x".join(map(str, size)) for size in sorted(sizes))


def _device_name(trainer: "Trainer") -> str:
    device = trainer.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.accelerator.num_processes} x {name}"


def read_losses(table: Path) -> list[dict[str, float]]:
    """The rows of `loss.csv`."""
    with table.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def averaged_steps(losses: list[dict[str, float]]) -> int:
    """How many steps a mean loss is taken over: a twentieth of the run."""
    return max(1, len(losses) // 20)


def plot_losses(table: Path, picture: Path) -> None:
    """Draws `loss.csv` as a picture: both terms, and their mean over a twentieth of the run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = read_losses(table)
    steps = [row["step"] for row in rows]
    window = averaged_steps(rows)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for column, label in (("video_loss", "video"), ("audio_loss", "audio")):
        values = torch.tensor([row[column] for row in rows])
        (line,) = axes.plot(steps, values, alpha=0.25, linewidth=0.8)
        means = values.unfold(0, window, 1).nanmean(dim=1)
        axes.plot(steps[window - 1 :], means, color=line.get_color(), label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    figure.tight_layout()
    with replaced_when_complete(picture) as temporary:
        figure.savefig(temporary)
    pyplot.close(figure)


def finish(trainer: "Trainer", videos: list[Path]) -> str | None:
    """
    Saves the adapter with its record, card and plot, and publishes it if asked to. To be called by every process; the
    main one writes.

    Args:
        trainer (`Trainer`): The run, at its end.
        videos (`list[pathlib.Path]`): Validation videos for the card.

    Returns:
        `str` or `None`: The repository's address, if it was published. If the Hub can't be reached, the files are
        complete all the same, and the log says which command finishes the upload.
    """
    arguments, folder = trainer.arguments, trainer.output_dir
    state = trainer.adapter_state()
    if not trainer.accelerator.is_main_process:
        return None
    record = make_record(trainer)
    save_trained_adapter(
        folder,
        trainer.transformer,
        record,
        also_original_format=arguments.also_original_format,
        state_dict=state,
    )
    with replaced_when_complete(folder / RECORD_NAME) as temporary:
        temporary.write_text(record.to_json(), "utf-8")
    plot_losses(folder / "loss.csv", folder / PLOT_NAME)
    write_model_card(
        folder,
        record,
        repo_id=arguments.hub_model_id if arguments.hub_model_id and "/" in arguments.hub_model_id else None,
        prompts=[row.get("caption", "") for row in getattr(trainer.held_out, "rows", [])][: len(videos)],
        samples=videos,
        loss_plot=folder / PLOT_NAME,
    )
    return publish_folder(arguments, folder) if arguments.push_to_hub else None


def publish_folder(arguments: TrainingArguments, folder: Path, path_in_repo: str | None = None) -> str | None:
    """Publishes a folder; a Hub that can't be reached is logged, never an error that ends a run."""
    try:
        return publish(
            folder,
            arguments.hub_model_id or arguments.output_dir.rstrip("/").split("/")[-1],
            private=arguments.hub_private_repo,
            token=arguments.hub_token,
            path_in_repo=path_in_repo,
        )
    except PublishError as error:
        logger.error(str(error))
        return None
