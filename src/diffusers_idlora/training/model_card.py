"""The model card of a trained adapter: front matter for the Hub, usage, recipe, results, and what it is not for."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from ..media import replaced_when_complete
from .hub import base_model_name, check_repository_name
from .record import TrainingRecord


CARD_NAME = "README.md"
# The first frame is given as an image; the Hub has no narrower task.
PIPELINE_TAG = "image-to-video"
TAGS = ("id-lora", "lora", "diffusers", "diffusers-training", "text-to-video", "text-to-audio-video", "voice-identity")
EXAMPLE_PROMPT = (
    "[VISUAL]: A person sits by a window and looks into the camera. "
    "[SPEECH]: I did not think the letter would ever arrive. "
    "[SOUNDS]: The voice is slow and warm; rain on the glass."
)
RECIPE_FRAME_RATE = 25.0

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

An [ID-LoRA](https://huggingface.co/papers/2603.10256) for {{ base }}: from a text prompt, one image of a face and
about five seconds of a voice, it makes a talking video whose face and voice are that person's.
{% if has_gallery %}
<Gallery />
{% endif %}
## Use

Needs the Python package `diffusers-idlora` ({{ record.package_version }} or later), and a picture `face.png` and a
recording `voice.wav` of a person who agreed to it.

```python
{{ usage }}
```
{% if record.recommended %}
The arguments {{ recommended }} are the ones recommended for this adapter.
{% endif %}
## Recipe

| | |
|---|---|
{% for label, text in recipe -%}
| {{ label }} | {{ text }} |
{% endfor %}
{%- if loss_plot %}
![Training loss](<{{ loss_plot }}>)
{% endif %}
{%- if samples %}
## Samples

{% for sample in samples -%}
- [{{ sample.path }}](<{{ sample.path }}>){% if sample.prompt %}: {{ sample.prompt }}{% endif %}
{% endfor %}
{%- endif %}
## Intended use

Talking videos of people who have agreed to it: dubbing and personal avatars, research on identity in audio-video
generation, fictional speakers.

## Limits

- It teaches the base model to follow a voice; the face comes from the image, and the picture's quality from the base
  model.
- It follows a recording of the voice, best of about five seconds with one speaker and little noise. Voices, languages
  and recording conditions unlike those of the training data are followed less well.
- It was trained for {{ generation }} and does not work with another generation of the model.
- What is said comes from the prompt: nothing checks that it is true, or that the person would say it.

## Consent

A face and a voice belong to a person. Use only those of people who have explicitly agreed to this use, or your own.
Don't use the adapter to impersonate, deceive, harass or defraud anybody, nor to get past voice or face recognition,
and tell viewers that what they see and hear is synthetic. The law where you are may ask for more.

{{ license }}
"""


def write_model_card(
    folder: str | os.PathLike,
    record: TrainingRecord,
    *,
    repo_id: str | None = None,
    prompts: Sequence[str] = (),
    samples: Sequence[str | os.PathLike] = (),
    loss_plot: str | os.PathLike | None = None,
) -> Path:
    """
    Writes `README.md`, the model card, into an adapter's folder. Files that lie elsewhere are copied into it.

    Args:
        folder (`str` or `os.PathLike`):
            The adapter's folder; created if it is missing.
        record ([`TrainingRecord`]):
            The run.
        repo_id (`str`, *optional*):
            The repository on the Hub that usage names; the folder's name by default.
        prompts (`Sequence[str]`, *optional*):
            Prompts to show: the first one in the usage, and each with the sample of its index.
        samples (`Sequence[str | os.PathLike]`, *optional*):
            Videos made with the adapter.
        loss_plot (`str` or `os.PathLike`, *optional*):
            A picture of the loss.

    Returns:
        `pathlib.Path`: The card.

    Raises:
        ValueError: If a file is missing, two have one name, or `repo_id` is no name of a repository.
    """
    if repo_id is not None:
        check_repository_name(repo_id)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _check_names(samples)
    paths = [_within(folder, path, "samples") for path in samples]
    prompts = [" ".join(prompt.split()) for prompt in prompts]
    shown = [{"path": path, "prompt": prompts[i] if i < len(prompts) else None} for i, path in enumerate(paths)]
    base, is_on_hub = base_model_name(record)
    card = ModelCard.from_template(
        _card_data(record, base if is_on_hub else None, shown),
        template_str=TEMPLATE,
        title=repo_id.split("/")[-1] if repo_id else folder.absolute().name,
        record=record,
        base=f"[{base}](https://huggingface.co/{base})" if is_on_hub else f"`{base}`",
        generation=record.generation.upper(),
        has_gallery=any(sample["prompt"] for sample in shown),
        usage=usage(record, repo_id or folder.absolute().name, next(filter(None, prompts), EXAMPLE_PROMPT)),
        recommended=", ".join(f"`{name}={value!r}`" for name, value in record.recommended.items()),
        recipe=recipe(record),
        loss_plot=None if loss_plot is None else _within(folder, loss_plot, "loss_plot"),
        samples=shown,
        license=_license(record),
    )
    populate_model_card(card, tags=[*TAGS, record.generation])
    with replaced_when_complete(folder / CARD_NAME) as temporary:
        card.save(temporary)
    return folder / CARD_NAME


def usage(record: TrainingRecord, adapter: str, prompt: str) -> str:
    """
    Returns Python code that makes a video with the adapter.

    Args:
        record ([`TrainingRecord`]): The run.
        adapter (`str`): Its repository or folder.
        prompt (`str`): What to generate.
    """
    base, _ = base_model_name(record)
    revision = f", revision={_quoted(record.base_revision)}" if record.base_revision else ""
    frame_rate = record.recommended.get("frame_rate", record.frame_rate or RECIPE_FRAME_RATE)
    arguments = {
        "prompt": _quoted(prompt),
        "image": '"face.png"',
        "reference_audio": '"voice.wav"',
        "negative_prompt": "DEFAULT_NEGATIVE_PROMPT",
    }
    if frame_rate != RECIPE_FRAME_RATE:
        arguments["frame_rate"] = repr(frame_rate)
    arguments |= {name: repr(value) for name, value in record.recommended.items()}
    arguments["generator"] = "torch.Generator().manual_seed(0)"
    return "\n".join(
        [
            "import torch",
            "from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT",
            "from diffusers_idlora import LTX2IDLoRAPipeline",
            "from diffusers_idlora.media import write_video",
            "",
            f"pipe = LTX2IDLoRAPipeline.from_pretrained({_quoted(base)}{revision}, dtype=torch.bfloat16)",
            f"pipe.load_lora_weights({_quoted(adapter)})",
            "if torch.accelerator.is_available():",
            "    pipe.enable_model_cpu_offload()",
            "output = pipe(",
            *(f"    {name}={value}," for name, value in arguments.items()),
            ")",
            "rate = pipe.vocoder.config.output_sampling_rate",
            f'write_video("video.mp4", output.frames[0], {frame_rate!r}, output.audio[0].float().cpu(), rate)',
        ]
    )


def recipe(record: TrainingRecord) -> list[tuple[str, str]]:
    """Returns the run's known facts as `(label, text)` rows of a table."""
    base, _ = base_model_name(record)
    modules = record.target_modules
    rows = [
        ("Base model", f"{base} ({record.generation.upper()})"),
        ("Base revision", record.base_revision),
        ("Kind", "DoRA" if record.use_dora else "LoRA"),
        ("Rank, alpha, dropout", f"{record.rank}, {record.alpha:g}, {record.lora_dropout:g}"),
        # A pattern may hold the character that ends a table's cell.
        ("Target modules", f"`{modules if isinstance(modules, str) else ', '.join(modules)}`".replace("|", "\\|")),
        ("Steps", f"{record.steps}"),
        ("Batch size", f"{record.batch_size}"),
        ("Learning rate", f"{record.learning_rate:g}"),
        ("Optimizer", record.optimizer),
        ("Schedule", record.lr_scheduler),
        ("Audio loss weight", f"{record.audio_loss_weight:g}"),
        ("Video masked from the reference", _yes(record.mask_video_from_reference)),
        ("Reference masked from the text", _yes(record.mask_reference_from_text)),
        ("Positions of the reference", record.positions),
        ("Mean length of the references", record.reference_seconds and f"{record.reference_seconds:.1f} s"),
        ("Reference dropout", f"{record.reference_dropout:g}"),
        ("First frame given", f"{record.first_frame_conditioning_p:g} of the samples"),
        ("Size", record.resolution),
        ("Frame rate", record.frame_rate and f"{record.frame_rate:g} fps"),
        ("Data set", record.dataset),
        ("Samples", f"{record.num_samples}"),
        ("Speakers", record.num_speakers and f"{record.num_speakers}"),
        ("Data fingerprint", record.data_fingerprint),
        ("Computed in", record.dtype),
        ("Seed", None if record.seed is None else f"{record.seed}"),
        ("Loss at the end", None if record.final_loss is None else f"{record.final_loss:.4f}"),
        ("Time", record.seconds and f"{record.seconds / 3600:.2f} h"),
        ("Machine", record.device),
        ("Package", f"diffusers-idlora {record.package_version}"),
    ]
    return [(label, text) for label, text in rows if text]


def _card_data(record: TrainingRecord, base_model: str | None, samples: list[dict]) -> ModelCardData:
    gallery = [{"text": item["prompt"], "output": {"url": item["path"]}} for item in samples if item["prompt"]]
    return ModelCardData(
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAG,
        license=record.license,
        datasets=[record.dataset] if record.dataset else None,
        widget=gallery or None,
    )


def _license(record: TrainingRecord) -> str:
    if record.license is None:
        return "The license of the base model applies."
    return f"License of the adapter: {record.license}. That of the base model applies too."


def _quoted(text: str) -> str:
    """The text as a Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _check_names(samples: Sequence[str | os.PathLike]) -> None:
    names = [Path(path).name for path in samples]
    if double := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"`samples` has several files named {double[0]!r}; give each a name of its own.")


def _within(folder: Path, path: str | os.PathLike, name: str) -> str:
    """The file's path relative to the folder, to which it is copied if it lies elsewhere."""
    source, folder = Path(path).absolute(), folder.absolute()
    if not source.is_file():
        raise ValueError(f"`{name}` has {str(path)!r}, which is no file; give a file that is there.")
    if not source.is_relative_to(folder):
        target = folder / (Path("samples") / source.name if name == "samples" else source.name)
        target.parent.mkdir(exist_ok=True)
        with replaced_when_complete(target) as temporary:
            shutil.copyfile(source, temporary)
        source = target
    return source.relative_to(folder).as_posix()
