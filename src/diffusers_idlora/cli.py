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
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from . import generation
from .generation import Clip
from .settings import ClipSettings, ModelSettings, alternatives, with_absolute_models, with_absolute_paths


# Not by `__name__`, which is `__main__` under `python -m`.
logger = logging.getLogger(f"{__package__}.cli")
# Progress, warnings and errors; what a command answers goes to standard output.
console = Console(stderr=True)


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
        except RuntimeError as error:
            # Not by its class, which would import torch for every command.
            if type(error).__name__ != "OutOfMemoryError":
                raise
            fail("the accelerator's memory is full; use --offload group or sequential, or a smaller size.")
            code = 1
        if code == 130:
            fail("interrupted; nothing half-made was left behind.")
        sys.exit(code or 0)


def fail(message: str) -> int:
    """Prints the message as one line on standard error; returns the exit code for a user's mistake."""
    typer.echo(f"Error: {' '.join(message.split())}", err=True)
    return 2


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
    kind, _ = alternatives(item.type)
    if get_origin(kind) is tuple:
        kind = list[get_args(kind)[0]]
    default = item.metadata["shown"] or ("" if item.default in (None, ()) else str(item.default))
    name = "--" + item.name.replace("_", "-")
    option = typer.Option(
        f"{name}/--no-{name[2:]}" if kind is bool else name,
        help=f"{item.metadata['help']} (default: {default})" if default else item.metadata["help"],
        rich_help_panel=item.metadata["panel"],
        show_default=False,
    )
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def of_class(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `given` that belong to the settings class and that the user gave."""
    return {
        item.name: tuple(given[item.name]) if isinstance(given[item.name], list) else given[item.name]
        for item in dataclasses.fields(cls)
        if given.get(item.name) not in (None, [], ())
    }


VERBOSE = Annotated[bool, typer.Option("--verbose", help="Show the libraries' messages, and tracebacks.")]


@app.command()
@options_of(ModelSettings, ClipSettings)
def generate(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The mp4 to write; the folder with --prompts-file.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Make one clip for each row: JSON list or JSON Lines, keys like the options.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--from", help="Make the clip of this record again; other options replace its own.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are already there.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --from: accept input files that have changed.")] = False,
    verbose: VERBOSE = False,
    **given: Any,
) -> None:
    """Generate a talking video, or one for each row of a prompts file."""
    set_up_logging(verbose)
    if prompts_file is not None and record is not None:
        raise ValueError("`prompts_file` and `from` are both given; give one.")
    given_models = of_class(ModelSettings, given)
    given_settings = with_absolute_paths(of_class(ClipSettings, given), Path.cwd())
    models, settings, earlier = ModelSettings(), ClipSettings(), None
    if record is not None:
        models, settings, earlier = generation.read_record(record)
        output = output or record.with_suffix(".mp4")
    models = with_absolute_models(dataclasses.replace(models, **given_models))
    settings = settings.updated(given_settings)
    if output is None:
        raise ValueError("`output` is missing; give `--output` with the mp4 to write.")
    if prompts_file is not None:
        generate_rows(models, settings, prompts_file, output, overwrite)
        return
    clip = Clip(settings, output)
    models.check()
    clip.check(overwrite)
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
    typer.echo(str(clip.output))


def generate_rows(models: ModelSettings, settings: ClipSettings, prompts_file: Path, folder: Path, overwrite: bool):
    """Makes the clips of a prompts file: skips what is there, reports what fails, ends in exit code 1 if any did."""
    rows = generation.read_prompts_file(prompts_file)
    settings = settings.resolved()
    clips, failures, outputs = [], 0, set()
    for index, row in enumerate(rows):
        try:
            clip = generation.clip_of_row(row, index, settings, prompts_file.absolute().parent, folder)
            if clip.output in outputs:
                raise ValueError(f"`output` {clip.output.name!r} is also that of an earlier row; give another name.")
            outputs.add(clip.output)
            if clip.is_done and not overwrite:
                typer.echo(f"{clip.output} is already there")
                continue
            clip.check(overwrite, also_inputs=(prompts_file,))
            clips.append((index, clip))
        except ValueError as error:
            failures += report_row(index, error)
    if clips:
        models.check()
        with stages() as report:
            pipe = load(models, report)
        for index, clip in clips:
            try:
                with stages() as report:
                    generation.generate_clip(pipe, models, clip, report)
                typer.echo(str(clip.output))
            except Exception as error:
                logger.debug("Row %d failed.", index, exc_info=True)
                failures += report_row(index, error)
    if failures:
        raise typer.Exit(1)


def report_row(index: int, error: Exception) -> int:
    """Says on one line what is wrong with a row, counted from 0 as its seed and file name are; returns 1."""
    fail(f"row {index}: {error or type(error).__name__}")
    return 1


def warn_of_other_versions(record: Mapping[str, Any]) -> None:
    """Warns where the packages differ from those that made the record: the clip may then differ too."""
    before, now = record.get("versions", {}), generation.versions()
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

    info = inspect_adapter(adapter, weight_name=weight_name)
    table = Table(title=escape(adapter), show_header=False)
    for label, text in info.rows():
        table.add_row(label, escape(text))
    Console().print(table)
    typer.echo(f"Made for {info.made_for}.")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The mp4 to write.")] = Path("outputs/demo.mp4"),
    family: Annotated[str, typer.Option(help="Model generation: ltx-2.3 or ltx-2.")] = "ltx-2.3",
    verbose: VERBOSE = False,
) -> None:
    """Run the whole machinery once with a tiny random model: no download, no accelerator."""
    set_up_logging(verbose)
    typer.echo("The demo's weights are random: expect noise in picture and sound. It only shows that everything runs.")
    base, adapter, face, voice = demo_inputs(family)
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
    clip = Clip(settings, output)
    clip.check(overwrite=is_demo_result(clip))
    generate_one(models, clip)
    typer.echo(f"Play it with any player; its settings and hashes are in {clip.record}.")


def cache_folder() -> Path:
    """Where the demo keeps its tiny checkpoints: `XDG_CACHE_HOME`, or `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root).absolute() if root else Path.home() / ".cache") / "diffusers_idlora"


def demo_inputs(family: str) -> tuple[Path, Path, Path, Path]:
    """Checkpoint, adapter, face and voice of the demo, made on first use and kept."""
    from diffusers import LTX2VideoTransformer3DModel

    from .demo_assets import write_demo_assets
    from .tiny import normalize_family, save_tiny_adapter, save_tiny_checkpoint

    folder = cache_folder() / f"demo-{normalize_family(family)}-{version('diffusers-idlora')}"
    base, adapter = folder / "checkpoint", folder / "id_lora.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if not base.exists():
        save_tiny_checkpoint(base, family)
    if not adapter.exists():
        save_tiny_adapter(adapter, LTX2VideoTransformer3DModel.from_pretrained(base / "transformer"))
    return base, adapter, *write_demo_assets(folder)


def is_demo_result(clip: Clip) -> bool:
    """Whether the output there is an unchanged result of an earlier demo, so that nothing of the user's is lost."""
    from .media import file_sha256

    if not clip.is_done:
        return False
    try:
        models, _, record = generation.read_record(clip.record)
    except ValueError:
        return False
    own = Path(str(models.base)).is_relative_to(cache_folder())
    return own and record["output"]["sha256"] == file_sha256(clip.output)


def load(models: ModelSettings, report: generation.Report) -> Any:
    """The pipeline, loaded under a bar of ours instead of the libraries' own."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    report("Loading", 0, None)
    pipe = generation.load_models(models)
    report("Loading", 1, 1)
    return pipe


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
        console.print(text, soft_wrap=True, markup=False, highlight=False)


def set_up_logging(verbose: bool) -> None:
    """Shows our own warnings as one line each, and silences the libraries' unless `verbose`."""
    ours = logging.getLogger(__package__)
    ours.handlers = [OneLineMessages()]
    ours.setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        warnings.filterwarnings("ignore")
        for library in ("diffusers", "transformers"):
            # The variable counts where the library is imported later, the level where it is imported already.
            os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")
            logging.getLogger(library).setLevel(logging.ERROR)


def main() -> None:
    """Entry point of `idlora`."""
    app()


if __name__ == "__main__":
    main()
