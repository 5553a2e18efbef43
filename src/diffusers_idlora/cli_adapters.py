"""The commands for adapter files: `idlora convert` and `idlora push`."""

from pathlib import Path
from typing import Annotated

import typer


VERBOSE = Annotated[bool, typer.Option("--verbose", help="Show the libraries' messages, and tracebacks.")]


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Hub repository, folder or .safetensors file.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    to: Annotated[
        str | None, typer.Option(help="original (ComfyUI, released files) or diffusers; by default the other one.")
    ] = None,
    weight_name: Annotated[str | None, typer.Option(help="File in the repository or folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is already there.")] = False,
    verbose: VERBOSE = False,
) -> None:
    """Write an adapter in the other key format, without loss."""
    show_messages(verbose)
    if output.suffix != ".safetensors":
        raise ValueError(f"`OUT` is {str(output)!r}; give a file that ends in .safetensors.")
    if output.exists() and not overwrite:
        raise ValueError(f"`OUT` is {str(output)!r}, which is already there; give --overwrite to replace it.")
    from .adapter_conversion import CONVERSION_METADATA_KEY, convert_adapter
    from .adapter_files import save_adapter
    from .lora import load_adapter

    state_dict, metadata = load_adapter(source, name="IN", weight_name=weight_name)
    converted, new_metadata = convert_adapter(state_dict, metadata, to, name="IN")
    save_adapter(output, converted, new_metadata)
    if CONVERSION_METADATA_KEY in new_metadata and CONVERSION_METADATA_KEY not in metadata:
        typer.echo("Its alpha differs from its rank: the scale is folded into lora_B, which converting back undoes.")
    typer.echo(str(output))


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds the adapter.")],
    hub_model_id: Annotated[str, typer.Option(help="Repository on the Hub: USER/NAME, or NAME for your own.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else may see it.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Token with write access; by default HF_TOKEN or the stored one.")
    ] = None,
    path_in_repo: Annotated[str | None, typer.Option(help="Folder in the repository; by default its root.")] = None,
    verbose: VERBOSE = False,
) -> None:
    """Publish an adapter's folder on the Hub, or finish what a training run could not."""
    show_messages(verbose)
    from .training.hub import publish

    typer.echo(publish(folder, hub_model_id, private=private, token=token, path_in_repo=path_in_repo))


def show_messages(verbose: bool) -> None:
    """Shows messages as the other commands do."""
    # Imported here: `cli` imports this module.
    from .cli import set_up_logging

    set_up_logging(verbose)


def register(app: typer.Typer) -> None:
    """Adds the commands to `idlora`."""
    app.command()(convert)
    app.command()(push)
