"""The options of the commands that generate: one for each setting, and what they, a record and a recipe come to."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from . import generation
from .cli_messages import logger, warn_of_other_versions
from .prompts_file import RowSharing
from .settings import ClipSettings, ModelSettings, with_absolute_models, with_absolute_paths
from .values import alternatives, checked_value


if TYPE_CHECKING:
    from .guidance_processes import OneProcess


OVERWRITE = Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace files that are already there.")]
FORCE = Annotated[bool, typer.Option("--force", metavar="", help="With --from: accept input files that have changed.")]
VERBOSE = Annotated[bool, typer.Option("--verbose", metavar="", help="Show the libraries' messages, and tracebacks.")]
GUIDANCE_PARALLEL = Annotated[
    bool,
    typer.Option(
        "--guidance-parallel",
        metavar="",
        help="Under torchrun or accelerate launch: all processes make each clip, sharing the passes of a step.",
    ),
]


def options_of(*classes: type) -> Callable:
    """
    Gives a command one option for each field of the settings classes, handed over in its `**given`.

    An option that the user did not give is `None`, so that a record or a prompts file can tell it from the default.
    """

    def decorate(command: Callable) -> Callable:
        own = [item for item in inspect.signature(command).parameters.values() if item.kind is not item.VAR_KEYWORD]
        parameters = own + [option_of(item) for cls in classes for item in dataclasses.fields(cls)]
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {item.name: item.annotation for item in parameters}
        return command

    return decorate


def option_of(item: dataclasses.Field) -> inspect.Parameter:
    """The command line option for one field of a settings class."""
    kinds, _ = alternatives(item.type)
    # Words, and numbers beside words, are told apart by `of_class`.
    kind = str if any(get_origin(part) is Literal for part in kinds) else kinds[0]
    part = get_args(kind)[0] if get_origin(kind) is tuple else kind
    default = item.metadata["shown"] or ("" if item.default in (None, ()) else str(item.default))
    name = "--" + item.name.replace("_", "-")
    option = typer.Option(
        f"{name}/--no-{name[2:]}" if kind is bool else name,
        help=f"{item.metadata['help']} (default: {default})" if default else item.metadata["help"],
        # Short ones: beside long ones the names of the options would be cut off in a terminal of 80 columns.
        metavar={int: "N", float: "X", bool: ""}.get(part, "TEXT"),
        rich_help_panel=item.metadata["panel"],
        show_default=False,
    )
    annotation = kind if kind is part else list[part]
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, option]
    )


def of_class(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `given` that belong to the settings class and that the user gave."""
    values = {}
    for item in dataclasses.fields(cls):
        value = given.get(item.name)
        if value not in (None, [], ()):
            is_number = int in alternatives(item.type)[0] and isinstance(value, str) and value.isdecimal()
            values[item.name] = checked_value(item.name, int(value) if is_number else value, item.type)
    return values


@dataclass(frozen=True)
class Wanted:
    """
    What a command is to make.

    Attributes:
        models (`ModelSettings`): The models.
        settings (`ClipSettings`): The settings.
        record (`dict`, *optional*): The record that they come from.
        replaced (`set[str]`): Settings that the user gave beside the record.
    """

    models: ModelSettings
    settings: ClipSettings
    record: dict | None
    replaced: set[str]

    @classmethod
    def from_options(cls, given: Mapping[str, Any], record_path: Path | None) -> "Wanted":
        """
        What the options come to, beside a record and the recipe: options win over the record, and both over what the
        recipe has.

        Raises:
            ValueError: Options contradict each other, or there is no such record.
        """
        given_models = of_class(ModelSettings, given)
        given_settings = with_absolute_paths(of_class(ClipSettings, given), Path.cwd())
        models, settings, record = ModelSettings(), ClipSettings(), None
        if record_path is not None:
            models, settings, record = generation.read_record(record_path)
        replaced = {*given_models, *given_settings}
        if "base" in given_models:
            # The recorded commit is one of the recorded base.
            given_models.setdefault("base_revision", None)
        if given_models.get("recipe", models.recipe) != models.recipe:
            settings = settings.with_recipe(models.recipe, given_models["recipe"])
            # What the new recipe has no use for would be refused.
            unused = dataclasses.replace(models, recipe=given_models["recipe"]).unused_models
            models = dataclasses.replace(models, **dict.fromkeys(unused))
        models = with_absolute_models(dataclasses.replace(models, **given_models))
        return cls(models, settings.updated(given_settings), record, replaced)


def is_first_process() -> bool:
    """Whether this process is to make a single clip; warns where others have nothing to do meanwhile."""
    sharing = RowSharing()
    if sharing.num_processes > 1 and sharing.rank == 0:
        logger.warning(
            "One clip is made by one of the %d processes; several clips are shared, and the passes of one are with "
            "--guidance-parallel.",
            sharing.num_processes,
        )
    return sharing.rank == 0


def check_single(
    wanted: Wanted, clip: generation.Clip, force: bool, processes: "OneProcess", also_inputs: tuple[Path, ...] = ()
) -> None:
    """Raises a `ValueError` where a clip cannot be made as it is wanted; warns of what is likely a mistake."""
    wanted.models.check()
    clip.check(wanted.models, also_inputs)
    if not processes.is_first:
        return
    if (wanted.settings.reference_audio or wanted.settings.speaker) and wanted.models.lora is None:
        logger.warning("`lora` is not given: without an ID-LoRA the voice will not follow `reference_audio`.")
    if wanted.record is not None and not force:
        generation.check_unchanged(wanted.record, wanted.models, wanted.settings, wanted.replaced)
        warn_of_other_versions(wanted.record)


def sharing_passes(guidance_parallel: bool, models: ModelSettings) -> "AbstractContextManager[OneProcess]":
    """For a `with` block this process alone, or with `guidance_parallel` those that the launcher has started."""
    from .guidance_processes import OneProcess, guidance_processes

    if not guidance_parallel:
        return nullcontext(OneProcess())
    return guidance_processes(models.checked_device())
