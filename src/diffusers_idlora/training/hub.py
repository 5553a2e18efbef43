"""A trained adapter's files, and the way of a folder to the Hub."""

import json
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, _pack_dict_with_prefix
from diffusers.utils import logging
from diffusers.utils.torch_utils import unwrap_module
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from ..adapter_conversion import convert_adapter
from ..adapter_files import find_adapter_file, save_adapter
from ..guidance import IdentityGuidance
from ..lora import IDLORA_METADATA_KEY
from ..media import replaced_when_complete
from .record import TrainingRecord


logger = logging.get_logger(__name__)

ORIGINAL_WEIGHT_NAME = "lora_weights.safetensors"
# What a training run leaves in its folder that is no part of the published adapter, nor safe to open for others.
NOT_PUBLISHED = (
    ".*",
    "*/.*",
    "checkpoint-*",
    "logs/*",
    "wandb/*",
    "*.log",
    "training_record.json",
    "*events.out.tfevents*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
)
# The facts that matter to who loads the file; the model card has them all.
METADATA_FACTS = (
    "base_revision",
    "generation",
    "mask_video_from_reference",
    "mask_reference_from_text",
    "positions",
    "reference_seconds",
    "reference_dropout",
    "recommended",
    "steps",
    "data_fingerprint",
    "package_version",
)

T = TypeVar("T")


class PublishError(OSError):
    """A folder did not reach the Hub; the message has the command that finishes it."""


def base_model_name(record: TrainingRecord) -> tuple[str, bool]:
    """
    Returns the base model's name as others may read it, and whether that is a repository on the Hub. Of a folder on
    this machine only the last part is told.
    """
    try:
        validate_repo_id(record.base_model)
        is_on_hub = not Path(record.base_model).exists()
    except HFValidationError:
        is_on_hub = False
    return (record.base_model if is_on_hub else Path(record.base_model).name), is_on_hub


def adapter_metadata(record: TrainingRecord, peft_config: LoraConfig) -> dict[str, str]:
    """
    The metadata of an adapter's file: how diffusers rebuilds the LoRA, and what this package says of it.

    Args:
        record ([`TrainingRecord`]): The run.
        peft_config (`LoraConfig`): The adapter's configuration.

    Returns:
        `dict[str, str]`: JSON under `lora_adapter_metadata`, as diffusers' training scripts write it, and under
        `idlora`.

    Raises:
        ValueError: If rank or alpha of the two differ.
    """
    for name, value in (("rank", peft_config.r), ("alpha", peft_config.lora_alpha)):
        if getattr(record, name) != value:
            raise ValueError(f"`record` has {name} {getattr(record, name)}, but the adapter has {value}: correct it.")
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in peft_config.to_dict().items()}
    block = {"base_model": base_model_name(record)[0]} | {fact: getattr(record, fact) for fact in METADATA_FACTS}
    return {
        LORA_ADAPTER_METADATA_KEY: json.dumps(_pack_dict_with_prefix(config, "transformer"), indent=2, sort_keys=True),
        IDLORA_METADATA_KEY: json.dumps(block),
    }


def save_trained_adapter(
    folder: str | os.PathLike,
    transformer: torch.nn.Module,
    record: TrainingRecord,
    adapter_name: str = "default",
    also_original_format: bool = False,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """
    Writes an adapter's files, each whole or not at all: `pytorch_lora_weights.safetensors` in diffusers' format,
    `guider_config.json` where the record recommends a scale of identity guidance, and on demand
    `lora_weights.safetensors` in the released key format, which ComfyUI reads.

    Args:
        folder (`str` or `os.PathLike`):
            Where to write; created if it is missing.
        transformer (`torch.nn.Module`):
            The transformer with its peft adapter, not wrapped for several processes.
        record ([`TrainingRecord`]):
            The run.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Which of its adapters.
        also_original_format (`bool`, *optional*, defaults to `False`):
            Whether to write the released key format too. Where alpha differs from the rank, the scale is folded into
            `lora_B` there, see [`~adapter_conversion.convert_adapter`].
        state_dict (`dict[str, torch.Tensor]`, *optional*):
            The transformer's whole state dict where its parameters are sharded over processes.
        dtype (`torch.dtype`, *optional*):
            Type of the saved weights; the one they have by default.

    Returns:
        `pathlib.Path`: The file in diffusers' format.

    Raises:
        ValueError: If rank or alpha differ from the record's, or the adapter has no form in the released format; the
            other files are written then.
    """
    folder = Path(folder)
    transformer = unwrap_module(transformer)
    layers = get_peft_model_state_dict(transformer, state_dict=state_dict, adapter_name=adapter_name)
    weights = _pack_dict_with_prefix(layers, "transformer")
    weights = {key: tensor.detach().to("cpu", dtype) for key, tensor in weights.items()}
    metadata = adapter_metadata(record, transformer.peft_config[adapter_name])
    path = save_adapter(folder / LORA_WEIGHT_NAME_SAFE, weights, metadata)
    if "identity_guidance_scale" in record.recommended:
        guider = IdentityGuidance(scale=record.recommended["identity_guidance_scale"])
        with replaced_when_complete(folder / guider.config_name) as temporary:
            temporary.write_text(guider.to_json_string(), encoding="utf-8")
    # Last, so that what has no form in this format, such as a DoRA, is safe in the other one.
    if also_original_format:
        save_adapter(folder / ORIGINAL_WEIGHT_NAME, *convert_adapter(weights, metadata, "original"))
    return path


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    path_in_repo: str | None = None,
    attempts: int = 5,
    wait: float = 1.0,
    commit_message: str = "Upload ID-LoRA",
) -> str:
    """
    Publishes a folder with an adapter as a model on the Hub, without checkpoints, logs and optimizer state. What fails
    for reasons of the network or the server is tried again, with twice the pause each time.

    Args:
        folder (`str` or `os.PathLike`):
            The folder; it holds an adapter.
        repo_id (`str`):
            `"user/name"`, or `"name"` for a repository of the token's user; created if it is missing.
        private (`bool`, *optional*, defaults to `False`):
            Whether others may not see it. An existing repository that is public is then refused.
        token (`str`, *optional*):
            Access token with write access; the stored one by default.
        path_in_repo (`str`, *optional*):
            Folder in the repository to upload to; its root by default.
        attempts (`int`, *optional*, defaults to 5):
            How often a step is tried.
        wait (`float`, *optional*, defaults to 1.0):
            Seconds before the second attempt.
        commit_message (`str`, *optional*, defaults to `"Upload ID-LoRA"`):
            Title of the commit.

    Returns:
        `str`: The repository's address.

    Raises:
        ValueError: If the folder holds no adapter, or `repo_id` is no name of a repository.
        PublishError: If the Hub refuses, or all attempts failed.
    """
    folder = Path(folder)
    check_repository_name(repo_id)
    if not folder.is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}, which is no folder: give the one that holds the adapter.")
    find_adapter_file(folder, name="folder")
    api = HfApi(token=token)
    finish = f"idlora push {shlex.quote(str(folder))} --hub-model-id {repo_id}"
    finish += f" --path-in-repo {shlex.quote(path_in_repo)}" if path_in_repo else ""
    finish += " --private" if private else ""

    def insist(step: Callable[[], T]) -> T:
        try:
            return _retried(step, attempts, wait)
        # Whatever the client raises, the caller learns how to finish.
        except Exception as error:
            raise PublishError(
                f"`{folder}` did not reach `{repo_id}` on the Hub ({_first_line(error)}); nothing is lost, finish it "
                f"with: {finish}"
            ) from error

    # `None` leaves the choice to the Hub: an organization may make its repositories private by default.
    repository = insist(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
    if private and not insist(lambda: api.repo_info(repository.repo_id)).private:
        raise PublishError(_is_public(repository.repo_id))
    insist(
        lambda: api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=commit_message,
            ignore_patterns=list(NOT_PUBLISHED),
        )
    )
    return str(repository)


def check_hub_access(
    repo_id: str, token: str | None = None, *, private: bool = False, attempts: int = 5, wait: float = 1.0
) -> None:
    """
    Checks, before any training, that [`publish`] may write to a repository. It changes nothing on the Hub.

    Args:
        repo_id (`str`):
            `"user/name"`, or `"name"` for a repository of the token's user; it need not exist yet.
        token (`str`, *optional*):
            Access token; the stored one by default.
        private (`bool`, *optional*, defaults to `False`):
            As for [`publish`].
        attempts (`int`, *optional*, defaults to 5), wait (`float`, *optional*, defaults to 1.0):
            As for [`publish`].

    Raises:
        ValueError: If there is no token, it is not valid or lacks write access there, or the Hub can't be reached.
    """
    check_repository_name(repo_id)
    api = HfApi(token=token)
    settings = "https://huggingface.co/settings/tokens"
    try:
        user = _retried(api.whoami, attempts, wait)
        if "/" not in repo_id:
            repo_id = f"{user['name']}/{repo_id}"
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError(f"`token` may only read; make one with write access at {settings}.")
        _check_repository(api, repo_id, user, private, attempts, wait)
    except LocalTokenNotFoundError as error:
        raise ValueError(
            "`token` is not given and none is stored; log in with `hf auth login`, or set HF_TOKEN to a token with "
            "write access."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise ValueError(f"`token` is not valid on the Hub; make one with write access at {settings}.") from error
        if error.response.status_code == 403:
            raise ValueError(
                f"`token` has no write access to `{repo_id}`; take a repository of your own, or a token with write "
                f"access from {settings}."
            ) from error
        raise ValueError(_unreachable(repo_id, error)) from error
    except (HTTPError, OSError) as error:
        raise ValueError(_unreachable(repo_id, error)) from error


def check_repository_name(repo_id: str) -> None:
    """Raises a ValueError unless `repo_id` can be the name of a repository on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"`repo_id` is {repo_id!r}, which can't be a repository on the Hub; give USER/NAME in letters, digits, "
            "`-`, `_` and `.`."
        ) from error


def _check_repository(api: HfApi, repo_id: str, user: dict, private: bool, attempts: int, wait: float) -> None:
    try:
        info = _retried(lambda: api.repo_info(repo_id), attempts, wait)
        _retried(lambda: api.auth_check(repo_id, write=True), attempts, wait)
    except RepositoryNotFoundError:
        namespace = repo_id.split("/")[0]
        if namespace not in [user["name"], *(org["name"] for org in user.get("orgs", []))]:
            raise ValueError(
                f"`repo_id` is {repo_id!r}, but the token belongs to {user['name']!r}, who is not part of "
                f"{namespace!r}; take a name that begins with {user['name'] + '/'!r}."
            ) from None
        return
    if private and not info.private:
        raise ValueError(_is_public(repo_id))


def _retried(step: Callable[[], T], attempts: int, wait: float) -> T:
    for attempt in range(1, attempts):
        try:
            return step()
        except Exception as error:
            if not _may_pass(error):
                raise
            pause = wait * 2 ** (attempt - 1)
            logger.warning(
                f"The Hub did not answer as expected ({_first_line(error)}); attempt {attempt + 1} of {attempts} "
                f"follows in {pause:g} s."
            )
            time.sleep(pause)
    return step()


def _may_pass(error: Exception) -> bool:
    """Whether an error of the Hub's client may be gone at the next attempt."""
    # A large file's transfer reports what went wrong as the cause of a RuntimeError, or in a bare one.
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # A server in trouble answers with a page where the client reads JSON.
    return isinstance(error, HTTPError | ConnectionError | TimeoutError | RuntimeError | json.JSONDecodeError)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _is_public(repo_id: str) -> str:
    return (
        f"`private` is True, but `{repo_id}` exists on the Hub and is public; make it private in its settings there, "
        "or take another name."
    )


def _unreachable(repo_id: str, error: Exception) -> str:
    return (
        f"`repo_id` is {repo_id!r}, but the Hub could not say whether it may be written ({_first_line(error)}); check "
        "the connection, or train without pushing and publish later with `idlora push`."
    )
