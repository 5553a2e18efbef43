"""Fixtures of the tests that run the command line."""

import logging
from contextlib import contextmanager

import pytest

from command_line import run


@pytest.fixture(autouse=True)
def logging_as_found():
    """The command line sets up logging for its process, which here is that of other tests too."""
    names = ("diffusers_idlora", "diffusers", "transformers")
    found = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    handlers = found[0][0].handlers[:]
    yield
    found[0][0].handlers = handlers
    for logger, level in found:
        logger.setLevel(level)


@pytest.fixture(scope="session")
def inputs(tiny_checkpoint, tiny_adapter, face_png, voice_wav):
    """The options that name models and files, for the newer generation."""
    models = ("--base", tiny_checkpoint("ltx-2.3"), "--lora", tiny_adapter("ltx-2.3"))
    return (*models, "--image", face_png, "--reference-audio", voice_wav)


@pytest.fixture(scope="session")
def generated(inputs, tmp_path_factory):
    """An mp4 made in a process of its own with every kind of guidance on."""
    output = tmp_path_factory.mktemp("generated") / "out.mp4"
    arguments = ("--visual", "a face", "--speech", "Hello.", "--num-frames", 17, "--steps", 2, "--seed", 7)
    size = ("--height", 64, "--width", 96, "--max-sequence-length", 16, "--dtype", "float32", "--device", "cpu")
    result = run("generate", *inputs, *arguments, *size, "-o", output)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(output)
    assert result.stderr == ""
    return output


@pytest.fixture(scope="session")
def reports():
    """What gives a report that nobody reads."""

    @contextmanager
    def no_report():
        yield lambda stage, done, total: None

    return no_report
