"""The command `idlora chain`: a list of lines to one video."""

from typing import Annotated, Any

import typer

from .chain import Chain, generate_chain, read_lines
from .cli_messages import load, say_path, set_up_logging, stages
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
from .settings import ClipSettings, ModelSettings
from .values import checked_value, user_path


@options_of(ModelSettings, ClipSettings)
def chain(
    lines_path: Annotated[
        str | None,
        typer.Argument(metavar="LINES", help="Text file: each line is spoken in a clip, or is its tagged prompt."),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="PATH", help="The mp4.")] = None,
    record_path: Annotated[
        str | None,
        typer.Option("--from", metavar="PATH", help="Make a record's chain again; other options replace its own."),
    ] = None,
    guidance_parallel: GUIDANCE_PARALLEL = False,
    overwrite: OVERWRITE = False,
    force: FORCE = False,
    verbose: VERBOSE = False,
    **given: Any,
) -> None:
    """Generate a clip for each line of a text file, each going on from the one before, as one video."""
    set_up_logging(verbose)
    record = None if record_path is None else user_path("from", record_path)
    if (lines_path is None) == (record is None):
        raise ValueError("`LINES` or `--from` is to say what is spoken; give one of them.")
    wanted = Wanted.from_options(given, record)
    if record is None:
        source = user_path("LINES", lines_path)
        lines, inputs = read_lines(source), (source,)
    else:
        if "lines" not in wanted.record:
            raise ValueError(f"`from` {record_path} is the record of one clip; use `idlora generate --from`.")
        lines, inputs = checked_value("lines", wanted.record["lines"], tuple[str, ...]), ()
        output = str(record.with_suffix(".mp4")) if output is None else output
    if output is None:
        raise ValueError("`output` is missing; give `--output` with the mp4 to write.")
    if not guidance_parallel and not is_first_process():
        return
    clips = Chain(wanted.settings, user_path("output", output), overwrite, lines)
    with sharing_passes(guidance_parallel, wanted.models) as processes:
        check_single(wanted, clips, force, processes, also_inputs=inputs)
        with stages() as report:
            pipe = load(wanted.models, report, processes)
        generate_chain(pipe, wanted.models, clips, stages)
        if processes.is_first:
            say_path(clips.output)


def register(app: typer.Typer) -> None:
    """Adds the command to `idlora`."""
    app.command()(chain)
