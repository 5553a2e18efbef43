"""The training loop: everything that a step is made of lies in pure functions; here are devices, files and logs."""

import csv
import dataclasses
import json
import math
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers.utils import logging
from peft import set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..attention_processor import ReferenceAttention
from ..denoising import TextContext
from ..media import read_video, replaced_when_complete
from .arguments import OPTION_DEFAULTS, TrainingArguments
from .batches import BatchOrder, SampleDraw, collate, groups_of_one_shape
from .checkpoints import check_same_run, find_checkpoint, save_checkpoint
from .fingerprint import model_fingerprint, model_folder
from .finish import make_record, publish_folder
from .hub import check_hub_access, save_trained_adapter
from .loading import add_lora, check_before_loading, load_samples, load_transformer, make_optimizer, make_schedule
from .objective import Objective, TrainingBatch, TrainingNoise
from .offload import FrozenLinearsInMainMemory
from .samples import TrainingSample, read_negative_prompt
from .sharding import (
    check_sharding,
    is_fsdp,
    load_sharded_state,
    save_sharded_state,
    shard_block_by_block,
    whole_tensor,
)
from .validation import load_validation_pipeline, validation_losses, validation_videos


logger = logging.get_logger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAPTER_STATE_NAME = "adapter.safetensors"
LOSS_COLUMNS = ("step", "loss", "video_loss", "audio_loss", "learning_rate", "gradient_norm", "seconds")


class BadSteps(RuntimeError):
    """Too many steps whose loss or gradient was not finite."""


class Trainer:
    """
    A training run.

    Args:
        arguments (`TrainingArguments`): What to do.

    Raises:
        ValueError: On settings or data that can't work, before the model is loaded.
    """

    def __init__(self, arguments: TrainingArguments):
        self.arguments = arguments
        self.objective = Objective(
            arguments.mask_video_from_reference, arguments.mask_reference_from_text, arguments.audio_loss_weight
        )
        self.weight_dtype = WEIGHT_DTYPES[arguments.mixed_precision]
        self.output_dir = Path(arguments.output_dir)
        check_before_loading(arguments)
        self.accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            log_with=arguments.report_to,
            project_config=ProjectConfiguration(str(self.output_dir), logging_dir=str(self.output_dir / "logs")),
            step_scheduler_with_optimizer=False,
            # The others wait while the main process makes validation videos or uploads.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
        )
        check_sharding(self.accelerator, arguments)
        if arguments.offload_frozen_blocks and self.accelerator.num_processes > 1:
            raise ValueError(
                f"`offload_frozen_blocks` is for one process, but there are {self.accelerator.num_processes}; start"
                " one, or leave it out."
            )
        self.samples, self.held_out = load_samples(arguments, self.accelerator.device)
        self.negative_context = self._read_negative_prompt()
        self.resumed = find_checkpoint(self.output_dir, arguments.resume_from_checkpoint)
        self._check_resumed()
        # Only now, so that no process finds another's first files and takes them for an earlier run's.
        self.accelerator.wait_for_everyone()
        self.step = 0
        self.bad_steps = 0
        self._stop_requested = threading.Event()
        self._validation_pipeline = None
        self._cleanup = ExitStack()
        self._validated_step, self._videos = None, []

    def _check_resumed(self) -> None:
        """Takes the base's fingerprint, and refuses a checkpoint of a run with other settings, data or base."""
        arguments = self.arguments
        folder = model_folder(arguments.pretrained_model_name_or_path, "transformer", arguments.revision)
        self.base_fingerprint = None if folder is None else model_fingerprint(folder, arguments.variant)
        if self.resumed is not None:
            state = self.resumed[1]
            # An option that the checkpoint does not know came later, and its run had the default.
            state = {**state, "fixed": {**OPTION_DEFAULTS, **state["fixed"]}}
            check_same_run(state, self.fixed, self.samples.fingerprint, self.base_fingerprint)

    def _read_negative_prompt(self) -> TextContext | None:
        if self.held_out is None or not self.arguments.validation_inference_steps:
            return None
        found = read_negative_prompt(self.arguments.instance_data_root)
        if found is None:
            logger.warning(
                "The data hold no negative prompt, so validation videos are made without text guidance; prepare them"
                " again to add it, which keeps the samples."
            )
            return None
        return found[0]

    def check_hub(self) -> None:
        """Raises a ValueError if the run is to be published and the Hub would not take it."""
        arguments = self.arguments
        if (arguments.push_to_hub or arguments.push_checkpoints) and self.accelerator.is_main_process:
            repository = arguments.hub_model_id or self.output_dir.name
            check_hub_access(repository, arguments.hub_token, private=arguments.hub_private_repo)

    @property
    def fixed(self) -> dict:
        """The settings that a continuation must share; processes and batch count by their product."""
        return {**self.arguments.fixed, "samples_per_forward": self.global_batch_size}

    @property
    def global_batch_size(self) -> int:
        """Samples of one forward over all processes."""
        return self.arguments.train_batch_size * self.accelerator.num_processes

    def load_model(self) -> None:
        """Loads the transformer, adds the LoRA in float32 and prepares optimizer and schedule."""
        arguments = self.arguments
        self.transformer = load_transformer(arguments, self.weight_dtype)
        if self.base_fingerprint is None:
            # A base on the Hub had still to be downloaded.
            self._check_resumed()
        self._check_latents()
        # Right before the adapter's initialisation, whatever loading the base may have drawn.
        set_seed(arguments.seed)
        add_lora(self.transformer, arguments)
        if arguments.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if arguments.offload_frozen_blocks:
            self._cleanup.enter_context(FrozenLinearsInMainMemory(self.transformer, self.accelerator.device))
        if is_fsdp(self.accelerator):
            shard_block_by_block(self.accelerator, self.transformer)
            if self.resumed is not None:
                # Before the weights are taken apart, each process has the whole adapter.
                self._load_adapter_state([], str(self.resumed[0]))
        elif not arguments.quantize_base.startswith("bnb"):
            # bitsandbytes has put its weights on the device itself, and refuses to move them.
            self.transformer.to(self.accelerator.device)
        if arguments.compile:
            self.transformer.compile_repeated_blocks(fullgraph=True)
        optimizer = make_optimizer(self._trained_parameters(), arguments)
        schedule = make_schedule(optimizer, arguments)
        self.accelerator.register_save_state_pre_hook(self._save_adapter_state)
        self.accelerator.register_load_state_pre_hook(self._load_adapter_state)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(self.transformer, optimizer, schedule)
        # Sharding has put others in their place.
        self.parameters = self._trained_parameters()
        self.model.train()
        if arguments.report_to is not None:
            settings = {name: value for name, value in dataclasses.asdict(arguments).items() if name != "hub_token"}
            self.accelerator.init_trackers("train-id-lora", {name: str(value) for name, value in settings.items()})

    def _trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapter's weights by their names in the model, whole and in main memory; called by every process."""
        trained = [item for item in self.transformer.named_parameters() if item[1].requires_grad]
        return {name: whole_tensor(parameter.detach()).cpu() for name, parameter in trained}

    def _check_latents(self) -> None:
        sample, config = self.samples[0], self.transformer.config
        features = sample.audio_latents.shape[0] * sample.audio_latents.shape[2]
        found = (sample.video_latents.shape[0], features)
        wanted = (config.in_channels, config.audio_in_channels)
        if found != wanted:
            raise ValueError(
                f"`instance_data_root` has latents of {found[0]} video channels and {found[1]} audio features, but"
                f" `pretrained_model_name_or_path` takes {wanted[0]} and {wanted[1]}; prepare the data with this base."
            )

    def _save_adapter_state(self, models: list, weights: list, folder: str) -> None:
        # The base never changes, so only the adapter is kept; popped weights are not saved by accelerate.
        weights.clear()
        state = get_peft_model_state_dict(self.transformer, state_dict=self.adapter_state())
        if self.accelerator.is_main_process:
            save_file(state, Path(folder) / ADAPTER_STATE_NAME)

    def _load_adapter_state(self, models: list, folder: str) -> None:
        models.clear()
        state = load_file(Path(folder) / ADAPTER_STATE_NAME)
        mismatch = set_peft_model_state_dict(self.transformer, state)
        if mismatch.unexpected_keys:
            raise ValueError(
                f"`resume_from_checkpoint` {folder!r} has weights for modules that this run does not adapt, such as"
                f" {mismatch.unexpected_keys[0]!r}; give the run's own `target_modules`."
            )

    def _save_state(self, folder: Path) -> None:
        if is_fsdp(self.accelerator):
            # accelerate would write the base, too.
            self._save_adapter_state([], [], str(folder))
            save_sharded_state(self.accelerator, self.model, self.optimizer.optimizer, self.schedule, folder)
        else:
            self.accelerator.save_state(str(folder), safe_serialization=True)

    def _load_state(self, folder: Path) -> None:
        if is_fsdp(self.accelerator):
            load_sharded_state(self.accelerator, self.model, self.optimizer.optimizer, self.schedule, folder)
        else:
            self.accelerator.load_state(str(folder))

    def run(self) -> None:
        """Trains to the last step, or until the process is asked to stop; then saves and returns."""
        arguments = self.arguments
        if self.resumed is not None:
            folder, state = self.resumed
            self._load_state(folder)
            self.step, self.bad_steps = state["step"], state["bad_steps"]
            follow_schedule(self.schedule.scheduler)
            if self.accelerator.is_main_process:
                drop_later_rows(self.output_dir / "validation.jsonl", self.step)
            logger.info(f"Going on from {folder} at step {self.step}.")
        previous = {number: signal.signal(number, self._request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        log = LossLog(self.output_dir / "loss.csv", self.step) if self.accelerator.is_main_process else None
        batches = self._batches(self.step * arguments.gradient_accumulation_steps)
        try:
            with (
                ReferenceAttention(self.transformer) as attention,
                tqdm(
                    total=arguments.max_train_steps,
                    initial=self.step,
                    desc="Training",
                    disable=not self.accelerator.is_local_main_process,
                ) as bar,
            ):
                while self.step < arguments.max_train_steps and not self._stop_requested_anywhere():
                    started = time.monotonic()
                    row = self._train_step(attention, batches)
                    self.step += 1
                    row |= {"step": self.step, "seconds": time.monotonic() - started}
                    if log is not None:
                        log.write(row)
                    self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=self.step)
                    bar.update()
                    bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{row['learning_rate']:.2e}")
                    if self.step % arguments.checkpointing_steps == 0:
                        self._publish_checkpoint(self.save())
                    if arguments.validation_steps and self.step % arguments.validation_steps == 0:
                        self.validate(attention)
            if self.step % arguments.checkpointing_steps:
                self.save()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if log is not None:
                log.close()

    def _batches(self, start: int) -> Iterator[tuple[TrainingBatch, TrainingNoise]]:
        """
        The part of this process of the batches from number `start` on, on its device; one whose samples differ in
        shape comes as several, one for each shape.
        """
        buckets = [()] * len(self.samples) if self.arguments.mix_lengths else self.samples.buckets
        order = BatchOrder(buckets, self.global_batch_size, self.arguments.seed)
        first = self.accelerator.process_index * self.arguments.train_batch_size
        rows = range(first, first + self.arguments.train_batch_size)
        for number, indices in enumerate(order.batches_from(start), start=start):
            samples = [self.samples[indices[row]] for row in rows]
            draws = [SampleDraw.of(self.arguments.seed, number, row) for row in rows]
            for group in groups_of_one_shape(samples):
                yield collate(
                    [samples[position] for position in group],
                    [draws[position] for position in group],
                    self.transformer.audio_rope,
                    self.accelerator.device,
                    self.weight_dtype,
                    self.arguments.reference_dropout,
                    self.arguments.first_frame_conditioning_p,
                )

    def accumulate_gradients(self, attention: ReferenceAttention, batches: Iterator) -> torch.Tensor:
        """
        Adds up the gradients of one optimizer step, shape after shape and batch after batch.

        Args:
            attention (`ReferenceAttention`): The processors installed on the model.
            batches (`Iterator`): From [`~Trainer._batches`].

        Returns:
            `torch.Tensor`: Loss, video term and audio term `[3]`, each the mean over the samples of all processes.
        """
        wanted = self.arguments.train_batch_size * self.arguments.gradient_accumulation_steps
        done, sums = 0, torch.zeros(3, device=self.accelerator.device)
        while done < wanted:
            batch, noise = next(batches)
            share = len(noise.sigmas) / wanted
            done += len(noise.sigmas)
            # Gradients are exchanged with the last part only, of which every process has one, however many shapes
            # its samples have.
            with nullcontext() if done == wanted else self.accelerator.no_sync(self.model):
                loss = self.objective(self.model, attention, batch, noise)
                self.accelerator.backward(loss.total * share)
            sums += torch.stack([loss.total, loss.video.mean(), loss.audio.mean()]).detach().float() * share
        return self.accelerator.reduce(sums, reduction="mean")

    def _train_step(self, attention: ReferenceAttention, batches: Iterator) -> dict[str, float]:
        """One optimizer step; a loss or gradient that is not finite leaves the weights as they were."""
        sums = self.accumulate_gradients(attention, batches)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.arguments.max_grad_norm)
        learning_rate = self.schedule.get_last_lr()[0]
        # With fp16 the loss scaler finds infinite gradients by itself, skips the step and lowers its scale.
        scaled = self.accelerator.scaler is not None
        finite = bool(torch.isfinite(sums).all()) and (scaled or math.isfinite(norm))
        if finite or scaled:
            self.optimizer.step()
        if not finite:
            self._count_bad_step()
        self.schedule.step()
        self.optimizer.zero_grad()
        total, video, audio = sums.tolist()
        return {
            "loss": total,
            "video_loss": video,
            "audio_loss": audio,
            "learning_rate": learning_rate,
            "gradient_norm": float(norm),
        }

    def _count_bad_step(self) -> None:
        self.bad_steps += 1
        logger.warning(f"Step {self.step + 1} is skipped: loss or gradient is not finite ({self.bad_steps} so far).")
        if self.bad_steps >= self.arguments.max_bad_steps:
            raise BadSteps(
                f"{self.bad_steps} steps had a loss or gradient that is not finite; lower `learning_rate`, or use"
                " `mixed_precision` bf16 or no. The last checkpoint is intact."
            )

    def _publish_checkpoint(self, checkpoint: Path) -> None:
        arguments = self.arguments
        if not arguments.push_checkpoints:
            return
        state = self.adapter_state()
        if not self.accelerator.is_main_process:
            return
        with tempfile.TemporaryDirectory() as folder:
            save_trained_adapter(folder, self.transformer, make_record(self), state_dict=state)
            publish_folder(arguments, Path(folder), path_in_repo=checkpoint.name)

    @property
    def was_stopped(self) -> bool:
        """Whether the run was asked to stop before its last step."""
        return self.step < self.arguments.max_train_steps

    def validate(self, attention: ReferenceAttention | None = None) -> list[Path]:
        """
        Logs losses on held-out samples, with and without the reference, and writes their videos.

        Args:
            attention (`ReferenceAttention`, *optional*): The processors installed on the model, if they are.

        Returns:
            `list[pathlib.Path]`: The videos; none without `validation_steps` or held-out samples.
        """
        arguments = self.arguments
        if not arguments.validation_steps or self.held_out is None:
            return []
        if self._validated_step == self.step:
            return self._videos
        videos = []
        if self.accelerator.is_main_process or is_fsdp(self.accelerator):
            # A sharded model runs in all processes or in none.
            samples = [self.held_out[i] for i in range(min(arguments.num_validation_samples, len(self.held_out)))]
            with nullcontext(attention) if attention else ReferenceAttention(self.transformer) as installed:
                losses = validation_losses(
                    installed, self.objective, samples, self.accelerator.device, self.weight_dtype
                )
            self.accelerator.log(losses, step=self.step)
            if self.accelerator.is_main_process:
                append_json_line(self.output_dir / "validation.jsonl", {"step": self.step, **losses})
            if arguments.validation_inference_steps:
                videos = self._validation_videos(samples)
        self._validated_step, self._videos = self.step, videos
        self.accelerator.wait_for_everyone()
        return videos

    def _validation_videos(self, samples: list[TrainingSample]) -> list[Path]:
        arguments = self.arguments
        if self._validation_pipeline is None:
            self._validation_pipeline = load_validation_pipeline(
                arguments.pretrained_model_name_or_path,
                self.transformer,
                self.weight_dtype,
                arguments.revision,
                arguments.variant,
            )
        videos = validation_videos(
            self._validation_pipeline,
            samples,
            self.output_dir / "validation" / f"step-{self.step}" if self.accelerator.is_main_process else None,
            arguments.validation_inference_steps,
            identity_guidance_scale=3.0,
            negative_context=self.negative_context,
        )
        log_videos(self.accelerator, videos, self.step)
        return videos

    def end(self) -> None:
        """Closes trackers, gives offloaded layers back as they were and waits for all processes."""
        self._cleanup.close()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def save(self) -> Path:
        """Writes a checkpoint of the current step."""
        return save_checkpoint(
            self.output_dir,
            self.step,
            {
                "fixed": self.fixed,
                "data_fingerprint": self.samples.fingerprint,
                "base_fingerprint": self.base_fingerprint,
                "bad_steps": self.bad_steps,
            },
            self._save_state,
            is_main_process=self.accelerator.is_main_process,
            wait=self.accelerator.wait_for_everyone,
            total_limit=self.arguments.checkpoints_total_limit,
        )

    def _request_stop(self, number: int, frame: object) -> None:
        logger.warning(f"Asked to stop ({signal.Signals(number).name}): saving after this step.")
        self._stop_requested.set()

    def _stop_requested_anywhere(self) -> bool:
        # All processes must leave the loop at the same step, or the others would wait for ever.
        asked = torch.tensor(float(self._stop_requested.is_set()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, reduction="sum") > 0)


def follow_schedule(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """
    Sets the learning rate of the schedule's current step, which a checkpoint has from its own schedule: they differ
    where `max_train_steps` was changed.
    """
    rates = [base * rule(schedule.last_epoch) for base, rule in zip(schedule.base_lrs, schedule.lr_lambdas)]
    for group, rate in zip(schedule.optimizer.param_groups, rates):
        group["lr"] = rate
    schedule._last_lr = rates


def drop_later_rows(path: Path, step: int) -> None:
    """Drops rows of a JSON Lines file that a broken-off run wrote after `step`."""
    if not path.is_file():
        return
    lines = [line for line in path.read_text("utf-8").splitlines() if json.loads(line)["step"] <= step]
    with replaced_when_complete(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), "utf-8")


def append_json_line(path: Path, row: dict) -> None:
    """Appends a row to a JSON Lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def log_videos(accelerator: Accelerator, videos: list[Path], step: int) -> None:
    """Hands validation videos to the trackers: pictures and sound to TensorBoard, whole files to the others."""
    for tracker in accelerator.trackers:
        for index, path in enumerate(videos):
            name = f"validation/{index}"
            if tracker.name == "tensorboard":
                frames, _, sound, sampling_rate = read_video(path)
                tracker.writer.add_images(name, frames[:: max(1, len(frames) // 4)], step, dataformats="NHWC")
                if sound is not None:
                    tracker.writer.add_audio(name, sound.mean(dim=0), step, sample_rate=sampling_rate)
            elif tracker.name in ("wandb", "trackio"):
                video_class = __import__(tracker.name).Video
                tracker.log({name: video_class(str(path))}, step=step)


class LossLog:
    """
    `loss.csv`: one row for each step. Rows after `step`, of a run that was broken off, are dropped.

    Args:
        path (`pathlib.Path`): The file.
        step (`int`): Steps that are already done.
    """

    def __init__(self, path: Path, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if step and path.is_file():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if row.get("seconds") and int(row["step"]) <= step]
        with replaced_when_complete(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, LOSS_COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, LOSS_COLUMNS)

    def write(self, row: dict[str, float]) -> None:
        """Appends a row and hands it to the system at once, so that it outlives the process."""
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
