"""The options of the training script, in one dataclass: named as in diffusers' LoRA training scripts."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

from .objective import RECIPE_TARGET_MODULES


# What may change between a run and its continuation; with anything else changed it would be another run.
MAY_CHANGE_ON_RESUME = (
    ("pretrained_model_name_or_path", "revision", "variant", "instance_data_root", "dataset_name")
    + ("lora_path", "output_dir", "max_train_steps", "max_bad_steps", "train_batch_size")
    + ("gradient_checkpointing", "offload_frozen_blocks", "compile")
    + ("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint")
    + ("validation_steps", "num_validation_samples", "validation_inference_steps")
    + ("also_original_format", "push_to_hub", "push_checkpoints", "hub_model_id", "hub_private_repo", "hub_token")
    + ("license", "report_to")
)
INITIALISATIONS = ("default", "gaussian", "orthogonal")


def option(default, help: str):
    """A field with its help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainingArguments:
    """What a training run is. Each field's `help` says what it does; the defaults are the released LTX-2.3 recipe."""

    # Model
    pretrained_model_name_or_path: str = option("", "Base checkpoint in diffusers layout: Hub repository or folder.")
    revision: str | None = option(None, "Branch, tag or commit of the base checkpoint.")
    variant: str | None = option(None, "Variant of its files, such as fp16.")

    # Data
    instance_data_root: str = option("", "Folder that prepare_dataset.py wrote, or an original preprocessed set.")
    precomputed_format: Literal["idlora", "original"] = option("idlora", "Layout of the data.")
    dataset_name: str | None = option(None, "Hub repository of the data, for the model card.")
    mix_lengths: bool = option(
        False, "Let samples of several shapes share a batch; each shape gets its own forward, which takes longer."
    )

    # Adapter
    rank: int = option(128, "Rank of the LoRA.")
    lora_alpha: float | None = option(None, "Alpha of the LoRA; the rank if left out.")
    lora_dropout: float = option(0.0, "Dropout within the LoRA.")
    target_modules: str = option(RECIPE_TARGET_MODULES, "Regular expression for the adapted modules.")
    use_dora: bool = option(False, "Train a DoRA.")
    init_lora_weights: str = option("default", "How peft initialises the LoRA: default, gaussian or orthogonal.")
    lora_path: str | None = option(None, "Adapter to start from: file, folder or Hub repository.")

    # Objective
    mask_video_from_reference: bool = option(True, "Video never attends to reference tokens.")
    mask_reference_from_text: bool = option(True, "Reference tokens attend uniformly to the text.")
    reference_dropout: float = option(0.0, "Probability of training a sample without its reference.")
    first_frame_conditioning_p: float = option(0.9, "Probability of giving the first frame clean.")
    audio_loss_weight: float = option(1.0, "Weight of the audio term of the loss.")

    # Optimisation
    output_dir: str = option("id-lora", "Where everything is written.")
    seed: int = option(42, "Seed of order, noise and initialisation.")
    train_batch_size: int = option(1, "Samples per process and forward.")
    gradient_accumulation_steps: int = option(4, "Forwards per optimizer step.")
    max_train_steps: int = option(3000, "Optimizer steps.")
    learning_rate: float = option(2e-4, "The schedule's highest learning rate.")
    lr_scheduler: str = option("linear", "Any schedule of diffusers' get_scheduler.")
    lr_warmup_steps: int = option(0, "Steps of warm-up, of schedules that have one.")
    lr_num_cycles: int = option(1, "Hard restarts of cosine_with_restarts.")
    lr_power: float = option(1.0, "Power of polynomial.")
    lr_step_rules: str | None = option(
        None, 'Of piecewise_constant: "1:10,0.1:20,0.01" is the full rate to step 10, a tenth to 20, then a hundredth.'
    )
    optimizer: Literal["adamw", "adamw_8bit", "prodigy"] = option("adamw", "The optimizer.")
    adam_beta1: float = option(0.9, "First moment's decay.")
    adam_beta2: float = option(0.999, "Second moment's decay.")
    adam_epsilon: float = option(1e-8, "Epsilon.")
    adam_weight_decay: float = option(0.01, "Weight decay.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    max_bad_steps: int = option(10, "Stop after this many steps whose loss was not finite.")

    # Memory and speed
    mixed_precision: Literal["no", "fp16", "bf16"] = option("bf16", "What the base computes in.")
    quantize_base: Literal["none", "torchao_int8", "bnb_8bit", "bnb_4bit"] = option(
        "none", "Keep the frozen base in fewer bits; needs torchao or bitsandbytes."
    )
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward pass.")
    offload_frozen_blocks: bool = option(
        False, "Keep the blocks' frozen weights in main memory; slow, for a base that is larger than the GPU's memory."
    )
    compile: bool = option(False, "Compile the transformer's blocks.")

    # Checkpoints
    checkpointing_steps: int = option(500, "Save a checkpoint every so many steps.")
    checkpoints_total_limit: int | None = option(None, "Keep at most this many checkpoints.")
    resume_from_checkpoint: str | None = option(None, 'A checkpoint folder, or "latest".')

    # Validation
    validation_steps: int | None = option(None, "Validate every so many steps.")
    num_validation_samples: int = option(2, "Held-out samples that are validated.")
    validation_inference_steps: int = option(30, "Denoising steps of a validation video; 0 for losses only.")

    # Publishing and logs
    also_original_format: bool = option(False, "Also save in the released key format, which ComfyUI reads.")
    push_to_hub: bool = option(False, "Publish the adapter at the end.")
    push_checkpoints: bool = option(False, "Publish every checkpoint's adapter too.")
    hub_model_id: str | None = option(None, "Repository to publish to; the output folder's name if left out.")
    hub_private_repo: bool = option(False, "Make a new repository private.")
    hub_token: str | None = option(None, "Hub token; the one stored by `hf auth login` if left out.")
    license: str | None = option(None, "License of the adapter for the model card.")
    report_to: str | None = option(None, "Tracker: tensorboard, wandb, trackio; none if left out.")

    def __post_init__(self):
        for name in ("pretrained_model_name_or_path", "instance_data_root"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing; give `--{name}`.")
        for name in (
            "rank",
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "checkpointing_steps",
            "max_bad_steps",
            "lr_num_cycles",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give a whole number of at least 1.")
        for name in ("checkpoints_total_limit", "validation_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give at least 1, or leave it out.")
        if self.validation_inference_steps < 0 or self.validation_inference_steps == 1:
            raise ValueError(
                f"`validation_inference_steps` is {self.validation_inference_steps}; give at least 2, or 0 for losses"
                " only."
            )
        if self.lr_warmup_steps < 0:
            raise ValueError(f"`lr_warmup_steps` is {self.lr_warmup_steps}; give at least 0.")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon", "lr_power"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"`{name}` is {getattr(self, name)}; give a number above 0.")
        for name in ("reference_dropout", "first_frame_conditioning_p", "lora_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give a probability between 0 and 1.")
        if not (math.isfinite(self.audio_loss_weight) and self.audio_loss_weight >= 0):
            raise ValueError(f"`audio_loss_weight` is {self.audio_loss_weight}; give a number that is 0 or larger.")
        if self.init_lora_weights not in INITIALISATIONS:
            raise ValueError(
                f"`init_lora_weights` is {self.init_lora_weights!r}; give one of {', '.join(INITIALISATIONS)}, for"
                " peft's other ways need data or change the base, which the adapter would then not fit."
            )
        if self.use_dora and self.also_original_format:
            raise ValueError("`also_original_format` has no form for a DoRA; leave it out, or `use_dora`.")
        if self.offload_frozen_blocks:
            self._check_offload()
        if self.mixed_precision == "fp16" and self.mask_reference_from_text:
            raise ValueError(
                "`mask_reference_from_text` can't be had in float16; take `mixed_precision` bf16, or switch it off."
            )
        if self.hub_token is not None and self.report_to == "wandb":
            raise ValueError("`hub_token` would be sent to wandb with the settings; run `hf auth login` instead.")

    def _check_offload(self) -> None:
        if not self.gradient_checkpointing:
            raise ValueError(
                "`offload_frozen_blocks` needs `gradient_checkpointing`, without which every weight would stay on the"
                " device until the backward pass; switch that on too."
            )
        for name, off in (("quantize_base", "none"), ("use_dora", False), ("compile", False)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"`offload_frozen_blocks` does not go together with `{name}` {getattr(self, name)}; leave one of"
                    " the two out."
                )

    @property
    def fixed(self) -> dict:
        """The options that a resumed run must share with the run that it goes on with."""
        names = [item.name for item in dataclasses.fields(self) if item.name not in MAY_CHANGE_ON_RESUME]
        return {name: getattr(self, name) for name in names}


OPTION_DEFAULTS = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainingArguments:
    """
    Reads the command line; `--config file.yaml` gives defaults that other options override.

    Args:
        arguments (`Sequence[str]`, *optional*): Instead of the process's own.

    Raises:
        ValueError: If an option's value can't work, or the file has an unknown key.
    """
    parser = HfArgumentParser(TrainingArguments, description="Train an ID-LoRA for LTX-2.")
    parser.add_argument("--config", type=Path, help="YAML file with these options by their names.")
    given = list(sys.argv[1:] if arguments is None else arguments)
    early, _ = parser.parse_known_args(given)
    # The file's options go through the same checks as those of the command line, which come last and win.
    from_file = [] if early.config is None else _read_config(early.config)
    values = vars(parser.parse_args([*from_file, *given]))
    values.pop("config")
    return TrainingArguments(**values)


def _read_config(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"`config` is {str(path)!r}, where there is no file; check the path.")
    values = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"`config` {str(path)!r} is no YAML mapping; write options as `name: value`.")
    names = {item.name for item in dataclasses.fields(TrainingArguments)}
    tokens = []
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"`config` {str(path)!r} has the unknown option {name!r}; see --help for their names.")
        if isinstance(value, (list, dict)):
            raise ValueError(f"`config` {str(path)!r} has {value!r} for `{name}`; give a single value.")
        if value is not None:
            # YAML 1.1 reads a bare `no` as false.
            value = "no" if name == "mixed_precision" and value is False else value
            tokens += [f"--{name}", str(value)]
    return tokens
