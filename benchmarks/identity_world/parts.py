"""The parts of a run: each trains one model and measures it, and keeps both, so that a run that broke off goes on."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from diffusers_idlora.identity_world import model, world
from diffusers_idlora.identity_world.checkpoint import ADAPTER_NAME, BASE_NAME, load_id_lora, load_identity_model
from diffusers_idlora.identity_world.model import build_transformer
from diffusers_idlora.identity_world.world import FRAME_RATE, TOKENS_PER_WORD, WORDS_PER_REFERENCE, IdentityWorld
from diffusers_idlora.lora import transformer_generation
from diffusers_idlora.media import replaced_when_complete
from diffusers_idlora.training.hub import save_trained_adapter
from diffusers_idlora.training.objective import RECIPE_TARGET_MODULES
from diffusers_idlora.training.record import TrainingRecord

from . import measuring, training
from .training import FIRST_FRAME_CLEAN_PROBABILITY, NUM_TRAINING_SPEAKERS, Recipe, Schedule, add_lora, train


BASE = "base"
MAIN = "negative positions"
SHORT = "stopped early"
RECIPES = {
    MAIN: Recipe(),
    "overlapping positions": Recipe(placement="overlapping"),
    SHORT: Recipe(share_of_steps=0.4),
    "no masks": Recipe(mask_video_from_reference=False, mask_reference_from_text=False),
    "reference dropout 0.1": Recipe(reference_dropout=0.1),
    "a2v mask only": Recipe(mask_reference_from_text=False),
    "text mask only": Recipe(mask_video_from_reference=False),
}
TRAINED_NAME = "trained.json"
RECOMMENDED_GUIDANCE = 1.0


@dataclass(frozen=True)
class Plan:
    """How the models of a run are trained."""

    base: Schedule
    adapter: Schedule
    rank: int

    def adapter_schedule(self, recipe: Recipe) -> Schedule:
        """That of an adapter that is trained for the recipe's share of the steps."""
        return replace(self.adapter, steps=round(self.adapter.steps * recipe.share_of_steps))

    def num_steps(self, part: str) -> int:
        """Training steps of a part."""
        return self.base.steps if part == BASE else self.adapter_schedule(RECIPES[part]).steps

    @property
    def fingerprint(self) -> str:
        """Of the plan and the code that decide what a model is: other models have another folder."""
        settings = {"plan": asdict(self), "recipes": {name: asdict(recipe) for name, recipe in RECIPES.items()}}
        return _hash(json.dumps(settings), *(_source(module) for module in (world, model, training)))


FULL_PLAN = Plan(Schedule(1500, 4e-3), Schedule(900, 6e-3), rank=32)
# Shows that everything runs; its numbers mean nothing.
QUICK_PLAN = Plan(Schedule(20, 4e-3), Schedule(20, 6e-3), rank=32)


def part_folder(folder: Path, seed: int, part: str) -> Path:
    """Where a part keeps its model and its numbers."""
    return folder / f"seed-{seed}" / part.replace(" ", "_")


def read_part(folder: Path, seed: int, part: str) -> dict | None:
    """What a finished part measured; `None` if it is not finished, or if other things are measured by now."""
    path = part_folder(folder, seed, part) / _measured_name()
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def run_part(
    folder: Path, plan: Plan, seed: int, part: str, after_step: Callable[[int], None] = lambda step: None
) -> None:
    """
    Trains and measures one model; what was done before is not done again.

    Args:
        folder (`pathlib.Path`): Of the run.
        plan ([`Plan`]): How to train.
        seed (`int`): Of weights, samples and noise.
        part (`str`): `BASE`, or the name of one of `RECIPES`, for which the seed's base has to be there.
        after_step (`Callable[[int], None]`, *optional*): Told of every training step that is done.
    """
    # So small a model is slower with more threads than one; the processes share the cores.
    torch.set_num_threads(1)
    target, base = part_folder(folder, seed, part), part_folder(folder, seed, BASE)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part.", dir=target.parent) as temporary:
            new = Path(temporary) / "new"
            _train_part(new, base, plan, seed, part, after_step)
            os.replace(new, target)
    if read_part(folder, seed, part) is None:
        started = time.process_time()
        tables = _measure_part(target, base, seed, part)
        trained = json.loads((target / TRAINED_NAME).read_text("utf-8"))
        measured = {**trained, "measuring_cpu_seconds": time.process_time() - started, "tables": tables}
        write_json(target / _measured_name(), measured)


def _train_part(new: Path, base: Path, plan: Plan, seed: int, part: str, after_step: Callable[[int], None]) -> None:
    started = time.process_time()
    if part == BASE:
        transformer = build_transformer(seed)
        losses = train(transformer, IdentityWorld(), plan.base, None, 100 + seed, after_step)
        transformer.save_pretrained(new / BASE_NAME)
    else:
        recipe, transformer = RECIPES[part], load_identity_model(base, with_adapter=False)
        add_lora(transformer, plan.rank, seed)
        schedule = plan.adapter_schedule(recipe)
        losses = train(transformer, IdentityWorld(), schedule, recipe, 200 + seed, after_step)
        save_trained_adapter(new / ADAPTER_NAME, transformer, make_record(transformer, plan, recipe, seed))
    write_json(new / TRAINED_NAME, {"cpu_seconds": time.process_time() - started, "losses": _thinned(losses)})


def _measure_part(target: Path, base: Path, seed: int, part: str) -> dict[str, dict]:
    """What is measured is what was saved, loaded as a user loads it."""
    transformer = load_identity_model(base, with_adapter=False)
    if part == BASE:
        return {"base": measuring.measure_base(measuring.make_bench(IdentityWorld(), transformer, seed))}
    load_id_lora(transformer, target / ADAPTER_NAME)
    recipe = RECIPES[part]
    bench = measuring.make_bench(IdentityWorld(), transformer, seed, placement=recipe.placement)
    tables = {"adapter": measuring.measure_adapter(bench, recipe)}
    if part in (MAIN, SHORT):
        tables["guidance"] = measuring.measure_guidance(bench)
    if part == MAIN:
        tables["shared guidance"] = measuring.measure_shared_guidance(bench)
        tables["references"] = measuring.measure_references(bench)
        tables["turns"] = measuring.measure_turns(bench)
    return tables


def make_record(transformer: torch.nn.Module, plan: Plan, recipe: Recipe, seed: int) -> TrainingRecord:
    """The facts of a training, for the adapter's metadata; only the recipe's own positions can be recorded."""
    rope = transformer.audio_rope
    return TrainingRecord(
        base_model="the identity world's base",
        generation=transformer_generation(transformer),
        rank=plan.rank,
        alpha=plan.rank,
        target_modules=RECIPE_TARGET_MODULES,
        steps=plan.adapter_schedule(recipe).steps,
        batch_size=plan.adapter.batch_size,
        learning_rate=plan.adapter.learning_rate,
        mask_video_from_reference=recipe.mask_video_from_reference,
        mask_reference_from_text=recipe.mask_reference_from_text,
        data_fingerprint=_hash(_source(world)),
        num_samples=plan.adapter_schedule(recipe).steps * plan.adapter.batch_size,
        num_speakers=NUM_TRAINING_SPEAKERS,
        dataset=None,
        license="apache-2.0",
        reference_seconds=TOKENS_PER_WORD * WORDS_PER_REFERENCE / rope.audio_latents_per_second,
        reference_dropout=recipe.reference_dropout,
        first_frame_conditioning_p=FIRST_FRAME_CLEAN_PROBABILITY,
        optimizer="adamw",
        lr_scheduler="linear",
        seed=seed,
        frame_rate=FRAME_RATE,
        dtype="float32",
        device="cpu",
        recommended={"identity_guidance_scale": RECOMMENDED_GUIDANCE},
    )


def _thinned(losses: list[float], count: int = 60) -> list[float]:
    """The means of equal stretches."""
    stretch = max(1, len(losses) // count)
    values = torch.tensor(losses[: len(losses) // stretch * stretch])
    return [round(value, 4) for value in values.view(-1, stretch).mean(dim=1).tolist()]


def _measured_name() -> str:
    return f"measured-{_hash(_source(measuring))}.json"


def _source(module: ModuleType) -> str:
    return Path(module.__file__).read_text("utf-8")


def _hash(*texts: str) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:12]


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_when_complete(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
