"""Collects the parts of a run, writes `results.json`, the tables of `docs/mechanism.md` and its plots."""

import json
import os
import platform
import re
import shutil
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from diffusers_idlora.adapter_files import read_safetensors, save_adapter
from diffusers_idlora.identity_world.checkpoint import ADAPTER_NAME, BASE_NAME, HASHES_NAME, SHIPPED_CHECKPOINT
from diffusers_idlora.media import file_sha256, replaced_when_complete

from .measuring import GUIDANCE_SCALES, NUM_CLIPS
from .parts import BASE, MAIN, RECIPES, SHORT, Plan, part_folder, read_part, write_json


PACKAGES = ("torch", "diffusers", "peft", "diffusers-idlora")
METRICS = ("similarity", "words", "agreement")
HALVES = tuple(f"{half} half, {who} speaker" for half in ("first", "second") for who in ("first", "second"))
COMPARISON = (*METRICS, "cosine", "norm ratio")


def collect(folder: Path, plan: Plan, seeds: list[int]) -> dict:
    """All that a run measured, with what one needs to judge it: machine, versions, seeds, times."""
    parts = {
        part: {str(seed): read_part(folder, seed, part) for seed in seeds if read_part(folder, seed, part)}
        for part in (BASE, *RECIPES)
    }
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, one for each model",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "seeds": seeds,
        "clips": NUM_CLIPS,
        "plan": asdict(plan),
        "steps": {part: plan.num_steps(part) for part in parts},
        "parts": parts,
    }


def write_report(results: dict, root: Path) -> list[Path]:
    """
    Writes what was found.

    Args:
        results (`dict`): As [`collect`] returns it.
        root (`pathlib.Path`): The repository's.

    Returns:
        `list[pathlib.Path]`: The files that were written.
    """
    numbers = root / "benchmarks" / "identity_world" / "results.json"
    write_json(numbers, results)
    page = root / "docs" / "mechanism.md"
    text = page.read_text("utf-8")
    for name, table in tables(results).items():
        text = insert(text, name, table)
    with replaced_when_complete(page) as temporary:
        temporary.write_text(text, "utf-8")
    return [numbers, page, *draw_plots(results, root / "docs" / "images")]


def insert(text: str, name: str, table: str) -> str:
    """Replaces what stands between the markers `<!-- name -->` and `<!-- /name -->`; they have to be there."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"`text` has no markers for {name!r}; put `<!-- {name} -->` and `<!-- /{name} -->` in it.")
    return pattern.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text)


def tables(results: dict) -> dict[str, str]:
    """The tables by the names of their markers, in Markdown; without those of parts that are not there."""
    of_adapters = {
        "positions": (MAIN, "overlapping positions"),
        "masks": (MAIN, "a2v mask only", "text mask only", "no masks"),
        "dropout": (MAIN, "reference dropout 0.1"),
    }
    of_parts = {
        "base": (BASE, "base", METRICS),
        "guidance": (MAIN, "guidance", METRICS),
        "guidance stopped early": (SHORT, "guidance", METRICS),
        "shared guidance": (MAIN, "shared guidance", COMPARISON),
        "references": (MAIN, "references", METRICS),
        "turns": (MAIN, "turns", (*HALVES, "words", "agreement")),
    }
    adapters = {name: table(adapter_rows(results, parts)) for name, parts in of_adapters.items()}
    others = {
        name: table(rows_of(results, part, of_part), metrics) for name, (part, of_part, metrics) in of_parts.items()
    }
    return {"run": run_line(results), **adapters, **others}


def adapter_rows(results: dict, parts: tuple[str, ...]) -> dict[str, dict[str, list[float]]]:
    """What every adapter is measured by, of several of them."""
    return {f"{part}: {row}": values for part in parts for row, values in rows_of(results, part, "adapter").items()}


def rows_of(results: dict, part: str, name: str) -> dict[str, dict[str, list[float]]]:
    """A table's rows, each metric as the values of all seeds."""
    seeds = [part_of_seed["tables"][name] for part_of_seed in results["parts"].get(part, {}).values()]
    if not seeds:
        return {}
    return {row: {metric: [seed[row][metric] for seed in seeds] for metric in seeds[0][row]} for row in seeds[0]}


def table(rows: dict[str, dict[str, list[float]]], metrics: tuple[str, ...] = METRICS) -> str:
    """A Markdown table of means and, after `±`, the standard deviations over the seeds."""
    lines = [f"| | {' | '.join(metrics)} |", f"|---|{'---|' * len(metrics)}"]
    for name, values in rows.items():
        cells = [spread(values[metric]) if metric in values else "" for metric in metrics]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """`mean ± standard deviation`; one value is itself."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def run_line(results: dict) -> str:
    """Some sentences about the run."""
    finished = [part for seeds in results["parts"].values() for part in seeds.values()]
    minutes = sum(part["cpu_seconds"] + part["measuring_cpu_seconds"] for part in finished) / 60
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    fewer = [
        f" Of {part!r} only these seeds are finished: {', '.join(seeds) or 'none'}."
        for part, seeds in results["parts"].items()
        if len(seeds) < len(results["seeds"])
    ]
    return (
        f"Run on {results['date']} ({results['machine']}; {versions}): seeds {', '.join(map(str, results['seeds']))},"
        f" {results['clips']} clips of unseen speakers for every number, {minutes:.0f} minutes of one core in all."
        f" Each cell is the mean over the seeds ± their standard deviation.{''.join(fewer)}"
    )


def draw_plots(results: dict, folder: Path) -> list[Path]:
    """The plots of the page."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "identity_world_similarity.png": _draw_similarity,
        "identity_world_guidance.png": _draw_guidance,
        "identity_world_losses.png": _draw_losses,
    }
    for name, draw in figures.items():
        figure, axes = pyplot.subplots(figsize=(6.4, 3.6), dpi=100)
        draw(axes, results)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.tight_layout()
        with replaced_when_complete(folder / name) as temporary:
            figure.savefig(temporary)
        pyplot.close(figure)
    return [folder / name for name in figures]


def _draw_similarity(axes, results: dict) -> None:
    bars = {
        "base": (BASE, "base", "no reference"),
        "base, given\na reference": (BASE, "base", "reference"),
        "ID-LoRA,\nno reference": (MAIN, "adapter", "no reference"),
        "ID-LoRA": (MAIN, "adapter", "reference"),
        "trained with\noverlapping\npositions": ("overlapping positions", "adapter", "reference"),
        "ID-LoRA,\npositions moved\nat inference": (MAIN, "adapter", "reference, overlapping at inference"),
    }
    values = [rows_of(results, part, name)[row]["similarity"] for part, name, row in bars.values()]
    axes.bar(range(len(bars)), [mean(value) for value in values], color="#88a9c9")
    for index, value in enumerate(values):
        axes.plot([index] * len(value), value, ".", color="#27425c")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(bars)), list(bars), fontsize=7)
    axes.set_ylabel("similarity to the reference's voice")


def _draw_guidance(axes, results: dict) -> None:
    for part, style in ((MAIN, "-"), (SHORT, "--")):
        rows = rows_of(results, part, "guidance")
        for metric, color in (("similarity", "#27425c"), ("words", "#b0572c")):
            values = [mean(rows[f"{scale:g}"][metric]) for scale in GUIDANCE_SCALES]
            label = metric if part == MAIN else f"{metric}, {part}"
            axes.plot(GUIDANCE_SCALES, values, linestyle=style, marker=".", color=color, label=label)
    axes.set_xlabel("scale of identity guidance")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, fontsize=8)


def _draw_losses(axes, results: dict) -> None:
    # The curves with one of the masks are those with both or none.
    for part, style in (
        (MAIN, "-"),
        ("no masks", "--"),
        ("overlapping positions", "-."),
        ("reference dropout 0.1", ":"),
    ):
        seeds = [values["losses"] for values in results["parts"][part].values()]
        if seeds:
            stretch = results["steps"][part] / len(seeds[0])
            losses = [mean(values) for values in zip(*seeds)]
            steps = [stretch * (index + 0.5) for index in range(len(losses))]
            axes.plot(steps, losses, linestyle=style, linewidth=1, label=part)
    axes.set_xlabel("training step")
    axes.set_ylabel("audio loss")
    axes.legend(frameon=False, fontsize=8)


def ship_checkpoint(folder: Path, seeds: list[int]) -> None:
    """Puts the first seed's base and adapter into the package, in bfloat16, with the hashes of their files."""
    seed = seeds[0]
    SHIPPED_CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".checkpoint.", dir=SHIPPED_CHECKPOINT.parent) as temporary:
        new = Path(temporary) / "new"
        base = part_folder(folder, seed, BASE) / BASE_NAME
        transformer = LTX2VideoTransformer3DModel.from_pretrained(base, dtype=torch.bfloat16)
        # Or the file would name a folder of the machine that it was made on.
        transformer.register_to_config(_name_or_path=None)
        transformer.save_pretrained(new / BASE_NAME)
        source = part_folder(folder, seed, MAIN) / ADAPTER_NAME / LORA_WEIGHT_NAME_SAFE
        weights, metadata = read_safetensors(source)
        weights = {key: tensor.bfloat16() for key, tensor in weights.items()}
        save_adapter(new / ADAPTER_NAME / LORA_WEIGHT_NAME_SAFE, weights, metadata)
        files = sorted(path for path in new.rglob("*") if path.is_file())
        hashes = {path.relative_to(new).as_posix(): file_sha256(path) for path in files}
        (new / HASHES_NAME).write_text(json.dumps(hashes, indent=1) + "\n", "utf-8")
        if SHIPPED_CHECKPOINT.exists():
            shutil.move(SHIPPED_CHECKPOINT, Path(temporary) / "old")
        shutil.move(new, SHIPPED_CHECKPOINT)
