"""Fixtures shared by all test files: tiny checkpoints, a tiny adapter, a voice and a face."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from diffusers_idlora.demo_assets import write_demo_assets
from diffusers_idlora.tiny import FAMILIES, save_tiny_adapter, save_tiny_checkpoint, tiny_components


torch.set_num_threads(1)

# `@families` runs a test once per model generation, which it gets as `family`.
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """`tiny_checkpoint("ltx-2.3")` is the folder of a tiny checkpoint, saved once per family."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def checkpoint(family="ltx-2.3"):
        directory = folder / family
        return directory if directory.exists() else save_tiny_checkpoint(directory, family)

    return checkpoint


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory):
    """`tiny_adapter("ltx-2.3")` is a random ID-LoRA of the released key format, saved once per family."""
    folder = tmp_path_factory.mktemp("adapters")

    def adapter(family="ltx-2.3"):
        path = folder / family / "lora_weights.safetensors"
        return path if path.exists() else save_tiny_adapter(path, tiny_components(family)["transformer"])

    return adapter


@pytest.fixture(scope="session")
def demo_assets(tmp_path_factory):
    """The demo's face picture and voice recording."""
    return write_demo_assets(tmp_path_factory.mktemp("demo_assets"), seconds=3.0)


@pytest.fixture(scope="session")
def face_png(demo_assets):
    """Path of a 512x512 RGB picture."""
    return demo_assets[0]


@pytest.fixture(scope="session")
def voice_wav(demo_assets):
    """Path of a 3 s mono recording at 24 kHz."""
    return demo_assets[1]
