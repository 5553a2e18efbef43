"""
The command line: `idlora generate`, `idlora inspect` and `idlora demo`.

torch and diffusers are imported inside the commands, so that help and mistakes are answered at once.
"""

import dataclasses
import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from . import cli_adapters, generation, prompts_file
from .generation import Clip
from .settings import ClipSettings, ModelSettings, with_absolute_models, with_absolute_paths
from .values import alternatives, checked_value, user_path


# Not by `__name__`, which is `__main__` under `python -m`.
logger = logging.getLogger(f"{__package__}.cli")
# Progress, warnings and errors; what a command answers goes to standard output.
console = Console(stderr=True)
# The libraries that are silenced, and what their environment variables begin with.
LIBRARIES = {"diffusers": "DIFFUSERS", "transformers": "TRANSFORMERS", "huggingface_hub": "HF_HUB"}


class OneLineErrors(TyperGroup):
    """Commands whose mistakes end in one line on standard error and exit code 2, without a traceback."""

    def main(self, args=None, prog_name=None, complete_var=None, standalone_mode=True, **extra):
        """Runs a command and ends the program."""
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except typer.TyperException as error:
            code = fail(error.format_message())
        except (ValueError, OSError) as error:
            if "--verbose" in args:
                traceback.print_exc()
            code = fail(str(error))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fail(in_one_sentence(error))
            code = 1
        if code == 130:
            fail("interrupted; nothing half-made was left behind.")
        sys.exit(code or 0)


def fail(message: str) -> int:
    """Prints the message as one line on standard error; returns the exit code for a user's mistake."""
    typer.echo(f"Error: {' '.join(message.split())}", err=True)
    return 2


def is_out_of_memory(error: Exception) -> bool:
    """Whether main memory or an accelerator's memory ran out."""
    # Not by its class, which would import torch for every command; torch has none for main memory.
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return named or isinstance(error, MemoryError)


def in_one_sentence(error: Exception) -> str:
    """What to tell the user of an error."""
    if is_out_of_memory(error):
        return "the memory is full; use --offload group or sequential, or a smaller size or length."
    return str(error) or type(error).__name__


app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A prompt, a face image and a short voice recording to one talking video, with ID-LoRA on LTX-2.",
)


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


OVERWRITE = Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace files that are already there.")]
VERBOSE = Annotated[bool, typer.Option("--verbose", metavar="", help="Show the libraries' messages, and tracebacks.")]


@app.command()
@options_of(ModelSettings, ClipSettings)
def generate(
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="PATH", help="The mp4, or with --prompts-file the folder.")
    ] = None,
    prompts_path: Annotated[
        str | None,
        typer.Option(
            "--prompts-file", metavar="PATH", help="One clip per row: JSON list or JSON Lines, keys like the options."
        ),
    ] = None,
    record_path: Annotated[
        str | None,
        typer.Option("--from", metavar="PATH", help="Make a record's clip again; other options replace its own."),
    ] = None,
    overwrite: OVERWRITE = False,
    force: Annotated[
        bool, typer.Option("--force", metavar="", help="With --from: accept input files that have changed.")
    ] = False,
    verbose: VERBOSE = False,
    **given: Any,
) -> None:
    """Generate a talking video, or one for each row of a prompts file."""
    set_up_logging(verbose)
    if prompts_path is not None and record_path is not None:
        raise ValueError("`prompts_file` and `from` are both given; give one.")
    given_models = of_class(ModelSettings, given)
    given_settings = with_absolute_paths(of_class(ClipSettings, given), Path.cwd())
    models, settings, earlier = ModelSettings(), ClipSettings(), None
    if record_path is not None:
        record = user_path("from", record_path)
        models, settings, earlier = generation.read_record(record)
        output = str(record.with_suffix(".mp4")) if output is None else output
    if "base" in given_models:
        # The recorded commit is one of the recorded base.
        given_models.setdefault("base_revision", None)
    models = with_absolute_models(dataclasses.replace(models, **given_models))
    settings = settings.updated(given_settings)
    if output is None:
        raise ValueError("`output` is missing; give `--output` with the mp4 to write.")
    if prompts_path is not None:
        folder = user_path("output", output)
        generate_rows(models, settings, user_path("prompts_file", prompts_path), folder, overwrite)
        return
    clip = Clip(settings, user_path("output", output), overwrite)
    models.check()
    clip.check()
    if settings.reference_audio and models.lora is None:
        logger.warning("`lora` is not given: without an ID-LoRA the voice will not follow `reference_audio`.")
    if earlier is not None and not force:
        generation.check_unchanged(earlier, models, settings, replaced={*given_models, *given_settings})
        warn_of_other_versions(earlier)
    generate_one(models, clip)


def generate_one(models: ModelSettings, clip: Clip) -> None:
    """Loads the models, makes one clip and says where it is."""
    with stages() as report:
        pipe = load(models, report)
        generation.generate_clip(pipe, models, clip, report)
    say_path(clip.output)


def say_path(path: Path) -> None:
    """Prints a path as the bytes that it is made of, which need not be text."""
    typer.echo(bytes(path))


def generate_rows(models: ModelSettings, settings: ClipSettings, prompts: Path, folder: Path, overwrite: bool) -> None:
    """Makes the clips of a prompts file: skips what is there, reports what fails, ends in exit code 1 if any did."""
    clips, failures, records = [], 0, set()
    for index, row in enumerate(prompts_file.read_prompts_file(prompts)):
        # Whatever is wrong with one row, the others go on.
        try:
            clip = prompts_file.clip_of_row(row, index, settings, prompts.absolute().parent, folder)
            clip = dataclasses.replace(clip, overwrite=overwrite)
            if clip.record in records:
                raise ValueError(f"`output` {clip.output.name!r} is also that of an earlier row; give another name.")
            records.add(clip.record)
            if clip.is_done and not overwrite:
                report_done(index, clip)
                continue
            clip.check(also_inputs=(prompts,))
            clips.append((index, clip))
        except Exception as error:
            failures += report_row(index, error)
    if clips:
        models.check()
        with stages() as report:
            pipe = load(models, report)
        for index, clip in clips:
            try:
                with stages() as report:
                    generation.generate_clip(pipe, models, clip, report)
                say_path(clip.output)
            except Exception as error:
                failures += report_row(index, error)
    if failures:
        raise typer.Exit(1)


def report_done(index: int, clip: Clip) -> None:
    """Says that a row's clip is already there, and warns where the row has changed since."""
    typer.echo(bytes(clip.output) + b" is already there")
    if changed := clip.changed_settings():
        logger.warning(
            "row %d: %s was made with other settings (%s); pass --overwrite to make it again.",
            index,
            clip.output,
            ", ".join(changed),
        )


def report_row(index: int, error: Exception) -> int:
    """Says on one line what is wrong with a row, counted from 0 as its seed and file name are; returns 1."""
    logger.debug("Row %d failed.", index, exc_info=error)
    fail(f"row {index}: {in_one_sentence(error)}")
    return 1


def warn_of_other_versions(record: Mapping[str, Any]) -> None:
    """Warns where the packages differ from those that made the record: the clip may then differ too."""
    before, now = record["versions"], generation.versions()
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        logger.warning("Other versions than in the record: %s.", ", ".join(changed))


@app.command("inspect")
def inspect_command(
    adapter: Annotated[str, typer.Argument(help="Hub repository, folder or .safetensors file.")],
    weight_name: Annotated[str | None, typer.Option(help="File in the repository or folder.")] = None,
    verbose: VERBOSE = False,
) -> None:
    """Show what an adapter is, and which model generation it fits."""
    set_up_logging(verbose)
    from .lora import inspect_adapter

    info = inspect_adapter(adapter, weight_name=weight_name, name="ADAPTER")
    table = Table(title=escape(adapter), show_header=False)
    for label, text in info.rows():
        table.add_row(label, escape(text))
    Console().print(table)
    typer.echo(f"Made for {info.made_for}.")


@app.command()
def demo(
    output: Annotated[str, typer.Option("--output", "-o", metavar="PATH", help="The mp4.")] = "outputs/demo.mp4",
    family: Annotated[str, typer.Option(metavar="NAME", help="Model generation: ltx-2.3 or ltx-2.")] = "ltx-2.3",
    overwrite: OVERWRITE = False,
    verbose: VERBOSE = False,
) -> None:
    """Run the whole machinery once with a tiny random model: no download, no accelerator."""
    set_up_logging(verbose)
    typer.echo("The demo's weights are random: expect noise in picture and sound. It only shows that everything runs.")
    from .demo_assets import cached_demo_inputs

    silence_progress_bars()
    base, adapter, face, voice = cached_demo_inputs(family)
    models = ModelSettings(base=str(base), lora=str(adapter), dtype="float32", device="cpu")
    settings = ClipSettings(
        visual="A drawn face looks into the camera.",
        speech="Hello, this is a demonstration.",
        sounds="A calm synthetic voice.",
        image=str(face),
        reference_audio=(str(voice),),
        height=128,
        width=128,
        num_frames=49,
        steps=4,
        max_sequence_length=64,
        seed=0,
    )
    clip = Clip(settings, user_path("output", output))
    clip = dataclasses.replace(clip, overwrite=overwrite or is_demo_result(clip))
    clip.check()
    generate_one(models, clip)
    typer.echo(b"Play it with any player; its settings and hashes are in " + bytes(clip.record))


def is_demo_result(clip: Clip) -> bool:
    """Whether the output there is an unchanged result of an earlier demo, so that nothing of the user's is lost."""
    from .demo_assets import cache_folder

    return clip.is_done and Path(str(clip.earlier()["models"]["base"])).is_relative_to(cache_folder())


def load(models: ModelSettings, report: generation.Report) -> Any:
    """The pipeline, loaded under a bar of ours instead of the libraries' own."""
    silence_progress_bars()
    report("Loading", 0, None)
    pipe = generation.load_models(models)
    report("Loading", 1, 1)
    return pipe


def silence_progress_bars() -> None:
    """Switches the libraries' own bars off."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def stages() -> Iterator[generation.Report]:
    """Progress bars, one for each stage of a run, shown in a terminal while the `with` block lasts."""
    columns = SpinnerColumn(), TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        tasks = {}

        def report(stage: str, done: int, total: int | None) -> None:
            logger.debug("%s: %d of %s", stage, done, total or "?")
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield report


class OneLineMessages(logging.Handler):
    """Prints each message on one line, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints `record`."""
        text = f"{record.levelname.capitalize()}: {self.format(record)}"
        if record.exc_info is None:
            text = " ".join(text.split())
        console.print(text, soft_wrap=True, markup=False, highlight=False)


def set_up_logging(verbose: bool) -> None:
    """Shows our own warnings as one line each, and silences the libraries' unless `verbose`."""
    ours = logging.getLogger(__package__)
    ours.handlers = [OneLineMessages()]
    ours.setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        warnings.filterwarnings("ignore")
        for library, variable in LIBRARIES.items():
            # The variable counts where the library is imported later, the level where it is imported already.
            os.environ.setdefault(f"{variable}_VERBOSITY", "error")
            logging.getLogger(library).setLevel(logging.ERROR)


cli_adapters.register(app)


def main() -> None:
    """Entry point of `idlora`."""
    app()


if __name__ == "__main__":
    main()
