"""The command line as the tests run it, and clips that it has made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import typer
from typer.testing import CliRunner

from diffusers_idlora.cli import OneLineErrors, app
from diffusers_idlora.generation import read_record


# Small and quick: 2 steps and one pass each, but the real main path.
QUICK = ("--dtype", "float32", "--device", "cpu", "--height", 64, "--width", 64, "--num-frames", 9, "--steps", 2)
QUICK += ("--guidance-scale", 1, "--stg-scale", 0, "--modality-scale", 1, "--max-sequence-length", 16)
LATENT_SECONDS = 0.04


def run(*arguments, **environment):
    """The command in a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "diffusers_idlora.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def launch(*arguments):
    """The command in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "-m", "diffusers_idlora.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def invoke(*arguments, **environment):
    """The command in this process, which is quicker."""
    return CliRunner(env=environment).invoke(app, [str(argument) for argument in arguments])


def assert_one_line_error(result, *words):
    """Exit code 2, one line on standard error that holds the words, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def one_command(function):
    """A command line of the same kind that only runs the function."""
    other = typer.Typer(cls=OneLineErrors)
    other.callback()(lambda: None)
    other.command("run")(lambda: function() and None)
    return other


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def copied(generated, folder, with_mp4=True):
    """The generated clip's record, and its mp4 too, under the same names in another folder."""
    if with_mp4:
        shutil.copy(generated, folder)
    return Path(shutil.copy(generated.with_suffix(".json"), folder))


def generated_base(generated):
    return read_record(generated.with_suffix(".json"))[0].base


def quick_record(generated, folder):
    """The record of a clip as quick to make as `QUICK`, beside no mp4."""
    record = json.loads(generated.with_suffix(".json").read_text())
    record["settings"] |= {"num_frames": 9, "width": 64, "guidance_scale": 1.0, "audio_guidance_scale": 1.0}
    record["settings"] |= {"stg_scale": 0.0, "modality_scale": 1.0}
    path = folder / "again.json"
    path.write_text(json.dumps(record))
    return path
