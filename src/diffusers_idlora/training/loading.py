"""What a run starts from: samples, the frozen base, the LoRA on it, the optimizer."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from diffusers import LTX2VideoTransformer3DModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.utils import logging
from peft import LoraConfig, set_peft_model_state_dict
from torch.utils.data import Dataset

from ..lora import check_adapter, load_adapter, to_diffusers_keys
from ..memory import quantization_config
from .arguments import TrainingArguments
from .original_format import OriginalFormatFolder
from .samples import SampleFolder


logger = logging.get_logger(__name__)

# Of diffusers' schedules those that leave the steps of a warm-up out without a word.
WITHOUT_WARMUP = (SchedulerType.CONSTANT.value, SchedulerType.PIECEWISE_CONSTANT.value)


def check_before_loading(arguments: TrainingArguments) -> None:
    """
    Tries everything that needs no weights, so that a mistake is told before they are loaded: the LoRA on a transformer
    without memory, the adapter to start from, schedule, optimizer and tracker.

    Raises:
        ValueError: With the option, its value and the remedy.
    """
    make_schedule(make_optimizer([torch.nn.Parameter(torch.zeros(1))], arguments), arguments)
    if arguments.optimizer == "prodigy" and arguments.learning_rate <= 0.1:
        logger.warning(
            f"Prodigy finds the rate itself and takes `learning_rate` {arguments.learning_rate} as a factor of it; 1.0"
            " is the usual value."
        )
    if arguments.report_to is not None and not importlib.util.find_spec(arguments.report_to):
        raise ValueError(f"`report_to` {arguments.report_to!r} is not installed; pip install {arguments.report_to}.")
    try:
        re.compile(arguments.target_modules)
    except re.error as error:
        raise ValueError(
            f"`target_modules` {arguments.target_modules!r} is no regular expression ({error}); mend it."
        ) from error
    with _base_errors(arguments):
        config = LTX2VideoTransformer3DModel.load_config(
            arguments.pretrained_model_name_or_path, subfolder="transformer", revision=arguments.revision
        )
    with init_empty_weights():
        skeleton = LTX2VideoTransformer3DModel.from_config(config)
        add_lora(skeleton, arguments, with_weights=False)


@contextmanager
def _base_errors(arguments: TrainingArguments) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"`pretrained_model_name_or_path` is {arguments.pretrained_model_name_or_path!r}, from which the base"
            f" could not be loaded ({str(error).splitlines()[0]}); give a checkpoint in diffusers layout."
        ) from error


def load_samples(arguments: TrainingArguments, device: torch.device | str = "cpu") -> tuple[Dataset, Dataset | None]:
    """The samples to train on and, if there are any, those held out for validation."""
    if arguments.precomputed_format == "original":
        if arguments.validation_steps:
            raise ValueError(
                "`validation_steps` needs held-out samples, which `precomputed_format` original has none of; leave it"
                " out."
            )
        with _base_errors(arguments):
            connectors = LTX2TextConnectors.from_pretrained(
                arguments.pretrained_model_name_or_path,
                subfolder="connectors",
                revision=arguments.revision,
                variant=arguments.variant,
            )
        return OriginalFormatFolder(arguments.instance_data_root, connectors.to(device)), None
    samples = SampleFolder(arguments.instance_data_root, split="train")
    held_out = None
    if arguments.validation_steps:
        try:
            held_out = SampleFolder(arguments.instance_data_root, split="validation")
        except ValueError as error:
            raise ValueError(
                f"`validation_steps` is {arguments.validation_steps}, but {error} Prepare the data with"
                " `--validation_speakers`, or leave `validation_steps` out."
            ) from error
    return samples, held_out


def load_transformer(arguments: TrainingArguments, dtype: torch.dtype) -> LTX2VideoTransformer3DModel:
    """The frozen base transformer of a checkpoint in diffusers layout."""
    try:
        with _base_errors(arguments):
            transformer = LTX2VideoTransformer3DModel.from_pretrained(
                arguments.pretrained_model_name_or_path,
                subfolder="transformer",
                revision=arguments.revision,
                variant=arguments.variant,
                dtype=dtype,
                quantization_config=quantization_config(arguments.quantize_base, dtype, "quantize_base"),
            )
    except (ImportError, RuntimeError) as error:
        if arguments.quantize_base == "none":
            raise
        raise ValueError(
            f"`quantize_base` {arguments.quantize_base!r} can't be had here: {str(error).splitlines()[0]}"
        ) from error
    return transformer.requires_grad_(False)


def add_lora(
    transformer: LTX2VideoTransformer3DModel, arguments: TrainingArguments, with_weights: bool = True
) -> None:
    """
    Adds the trainable LoRA, its weights in float32 whatever the base is in. One that starts from an adapter has that
    adapter's rank and alpha.
    """
    alpha, state_dict = arguments.lora_alpha, None
    if arguments.lora_path is not None:
        state_dict, metadata = load_adapter(arguments.lora_path, name="lora_path")
        info = check_adapter(state_dict, metadata, transformer, name="lora_path")
        found = info.rank if info.alpha is None else info.alpha
        alpha = found if alpha is None else alpha
        if info.rank != arguments.rank or found != alpha:
            raise ValueError(
                f"`lora_path` {arguments.lora_path!r} has rank {info.rank} and alpha {found}, but the run has `rank`"
                f" {arguments.rank} and `lora_alpha` {alpha}; give the adapter's."
            )
    init = arguments.init_lora_weights
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.rank if alpha is None else alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.target_modules,
        use_dora=arguments.use_dora,
        init_lora_weights=True if init == "default" else init,
    )
    try:
        transformer.add_adapter(config)
    except ValueError as error:
        raise ValueError(
            f"`target_modules` {arguments.target_modules!r} fits no module of the transformer, or not with these LoRA"
            f" options ({str(error).splitlines()[0]})."
        ) from error
    if state_dict is not None and with_weights:
        state = {key.removeprefix("transformer."): value for key, value in to_diffusers_keys(state_dict).items()}
        mismatch = set_peft_model_state_dict(transformer, state)
        if mismatch.unexpected_keys:
            raise ValueError(
                f"`lora_path` {arguments.lora_path!r} adapts {mismatch.unexpected_keys[0]!r}, which `target_modules`"
                " does not; make them agree."
            )
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def make_optimizer(parameters: list[torch.nn.Parameter], arguments: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer of a run; the 8-bit one and Prodigy need packages of their own."""
    options = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "weight_decay": arguments.adam_weight_decay,
    }
    if arguments.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    package, name = {"adamw_8bit": ("bitsandbytes.optim", "AdamW8bit"), "prodigy": ("prodigyopt", "Prodigy")}[
        arguments.optimizer
    ]
    try:
        module = __import__(package, fromlist=[name])
    except ImportError as error:
        raise ValueError(
            f"`optimizer` {arguments.optimizer!r} needs a package that is not installed: pip install"
            f" {package.split('.')[0]}."
        ) from error
    return getattr(module, name)(parameters, **options)


def make_schedule(optimizer: torch.optim.Optimizer, arguments: TrainingArguments) -> torch.optim.lr_scheduler.LambdaLR:
    """
    The learning rate's schedule, one of diffusers'.

    Raises:
        ValueError: If there is none of that name, its step rules are missing, can't be read or have no use, or it has
            no warm-up and one is asked for.
    """
    known, rules = [kind.value for kind in SchedulerType], arguments.lr_step_rules
    if arguments.lr_scheduler not in known:
        raise ValueError(f"`lr_scheduler` is {arguments.lr_scheduler!r}; give one of {', '.join(known)}.")
    if (rules is not None) != (arguments.lr_scheduler == SchedulerType.PIECEWISE_CONSTANT.value):
        raise ValueError(
            f"`lr_step_rules` is {rules!r} and `lr_scheduler` is {arguments.lr_scheduler!r}; the rules go with"
            " piecewise_constant and with nothing else."
        )
    if rules is not None and not _are_step_rules(rules):
        raise ValueError(
            f"`lr_step_rules` is {rules!r}; write factors, each with the step that it lasts to, in their order, and a"
            " last factor: 1:10,0.1:20,0.01."
        )
    if arguments.lr_warmup_steps and arguments.lr_scheduler in WITHOUT_WARMUP:
        raise ValueError(
            f"`lr_warmup_steps` is {arguments.lr_warmup_steps}, but `lr_scheduler` {arguments.lr_scheduler} has no"
            " warm-up; leave it out, or take constant_with_warmup."
        )
    return get_scheduler(
        arguments.lr_scheduler,
        optimizer=optimizer,
        step_rules=rules,
        num_warmup_steps=arguments.lr_warmup_steps,
        num_training_steps=arguments.max_train_steps,
        num_cycles=arguments.lr_num_cycles,
        power=arguments.lr_power,
    )


_FACTOR = r"(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
_STEP_RULES = re.compile(rf"({_FACTOR}:\d+,)*{_FACTOR}")


def _are_step_rules(rules: str) -> bool:
    if not _STEP_RULES.fullmatch(rules):
        return False
    ends = [int(rule.split(":")[1]) for rule in rules.split(",")[:-1]]
    return ends == sorted(set(ends))
