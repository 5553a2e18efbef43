"""
The command line: `idlora generate`, `idlora inspect` and `idlora demo`; `chain`, `convert` and `push` are beside it.

torch and diffusers are imported inside the commands, so that help and mistakes are answered at once.
"""

import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from . import cli_adapters, cli_chain, prompts_file
from .cli_messages import (
    fail,
    in_one_sentence,
    is_out_of_memory,
    load,
    report_done,
    report_row,
    say_path,
    set_up_logging,
    silence_progress_bars,
    stages,
)
from .cli_options import (
    FORCE,
    GUIDANCE_PARALLEL,
    OVERWRITE,
    VERBOSE,
    Wanted,
    check_single,
    is_first_process,
    options_of,
    sharing_passes,
)
from .generation import Clip
from .settings import ClipSettings, ModelSettings
from .values import user_path


if TYPE_CHECKING:
    from .guidance_processes import OneProcess


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
            fail("interrupted; no half-made result was left behind.")
        sys.exit(code or 0)


app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A prompt, a face image and a short voice recording to one talking video, with ID-LoRA on LTX-2.",
)


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
    together: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --prompts-file: rows that go through each model together. (default: all with --offload model, "
            "which moves each model once, else 1)",
        ),
    ] = None,
    guidance_parallel: GUIDANCE_PARALLEL = False,
    overwrite: OVERWRITE = False,
    force: FORCE = False,
    verbose: VERBOSE = False,
    **given: Any,
) -> None:
    """Generate a talking video, or one for each row of a prompts file."""
    set_up_logging(verbose)
    if prompts_path is not None and record_path is not None:
        raise ValueError("`prompts_file` and `from` are both given; give one.")
    record = None if record_path is None else user_path("from", record_path)
    wanted = Wanted.from_options(given, record)
    if record is not None and output is None:
        output = str(record.with_suffix(".mp4"))
    if output is None:
        raise ValueError("`output` is missing; give `--output` with the mp4 to write.")
    if wanted.record is not None and "lines" in wanted.record:
        raise ValueError(f"`from` {record_path} is the record of chained clips; use `idlora chain --from`.")
    if prompts_path is None and together is not None:
        raise ValueError(f"`together` is {together}, which is for several clips; give `--prompts-file` too.")
    if prompts_path is None and not guidance_parallel and not is_first_process():
        return
    with sharing_passes(guidance_parallel, wanted.models) as processes:
        if prompts_path is not None:
            prompts, folder = user_path("prompts_file", prompts_path), user_path("output", output)
            rows = prompts_file.clips_of_file(prompts, wanted.settings, folder, overwrite)
            generate_rows(rows, wanted.models, prompts, together, processes)
            return
        clip = Clip(wanted.settings, user_path("output", output), overwrite)
        check_single(wanted, clip, force, processes)
        generate_one(wanted.models, clip, processes)


def generate_one(models: ModelSettings, clip: Clip, processes: "OneProcess") -> None:
    """Loads the models, makes one clip and says where it is."""
    with stages() as report:
        pipe = load(models, report, processes)
    for _, error in generate_clips(pipe, models, {0: clip}):
        if error is not None:
            raise error
    if processes.is_first:
        say_path(clip.output)


def generate_rows(
    rows: list[Clip | Exception],
    models: ModelSettings,
    prompts: Path,
    together: int | None,
    processes: "OneProcess",
) -> None:
    """
    Makes the clips of a prompts file, or of several processes' this one's share: skips what is there, reports what
    fails, ends in exit code 1 if any did.
    """
    sharing = prompts_file.RowSharing(alone=processes.shares_passes)
    if together is None:
        together = -(-len(rows) // sharing.num_processes) if models.offload == "model" else 1
    looked_at = processes.from_first(
        lambda: {
            index: look_at_row(index, row, models, prompts, is_own=True)
            for index, row in enumerate(rows)
            if sharing.is_own(index)
        }
    )
    failures, pipe = sum(isinstance(found, Exception) for found in looked_at.values()), None
    for portion in sharing.portions(len(rows), together):
        for index in set(portion) - set(looked_at):
            looked_at[index] = look_at_row(index, rows[index], models, prompts, is_own=False)
        clips = {index: looked_at[index] for index in portion if isinstance(looked_at[index], Clip)}
        if clips and pipe is None:
            models.check()
            with stages() as report:
                pipe = load(models, report, processes)
        for index, error in generate_clips(pipe, models, clips):
            if error is None and processes.is_first:
                say_path(clips[index].output)
            elif error is not None:
                failures += 1
                report_row(index, error, is_own=processes.is_first)
    sharing.finish(failures)
    if failures:
        raise typer.Exit(1)


def look_at_row(
    index: int, row: Clip | Exception, models: ModelSettings, prompts: Path, is_own: bool
) -> Clip | Exception | None:
    """The clip of a row that is to be made, `None` where it is there, or what is wrong; says both where `is_own`."""
    try:
        if isinstance(row, Exception):
            raise row
        if row.is_done and not row.overwrite:
            if is_own:
                report_done(index, row)
            return None
        row.check(models, also_inputs=(prompts,))
        return row
    except Exception as error:
        report_row(index, error, is_own)
        return error


def generate_clips(pipe: Any, models: ModelSettings, clips: dict[int, Clip]) -> Iterator[tuple[int, Exception | None]]:
    """As `batch.generate_clips`, which is imported only where there is something to do, with progress bars."""
    if clips:
        from . import batch

        yield from batch.generate_clips(pipe, models, clips, stages)


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
    """Run everything once at a tiny size, and show that a voice follows its reference: no download, no accelerator."""
    set_up_logging(verbose)
    typer.echo("The clip's weights are random: expect noise in picture and sound. It only shows that everything runs.")
    from .demo_assets import cached_demo_inputs
    from .identity_world import demonstrate

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
    picture = clip.output.with_suffix(".png")
    if os.path.lexists(picture) and not clip.overwrite:
        raise ValueError(
            f"`output` would also write {picture}, which is there; give another name or pass --overwrite."
        )
    with sharing_passes(False, models) as processes:
        generate_one(models, clip, processes)
    typer.echo(b"Play it with any player; its settings and hashes are in " + bytes(clip.record))
    typer.echo("Now a small trained model, in a world where a voice is 16 numbers.")
    with_reference, without = demonstrate(picture)
    typer.echo(
        "Similarity of generated voices to their references (1 is the same voice, 0 a stranger's): "
        f"{with_reference:.2f} with the reference, {without:.2f} without."
    )
    typer.echo(b"A few of them are drawn in " + bytes(picture))


def is_demo_result(clip: Clip) -> bool:
    """Whether the output there is an unchanged result of an earlier demo, so that nothing of the user's is lost."""
    from .demo_assets import cache_folder

    return clip.is_done and Path(str(clip.earlier()["models"]["base"])).is_relative_to(cache_folder())


cli_adapters.register(app)
cli_chain.register(app)


def main() -> None:
    """Entry point of `idlora`."""
    # A launcher ends its processes so; this way they remove what is half-made.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app()


if __name__ == "__main__":
    main()
