"""One training step against the reference implementation: predictions, losses, gradients, noise levels."""

import json

import pytest
import torch
from diffusers import LTX2ConditionPipeline
from peft import LoraConfig

from conftest import families
from diffusers_idlora import TextContext
from diffusers_idlora.attention_processor import ReferenceAttention
from diffusers_idlora.reference import ReferenceBatch
from diffusers_idlora.tiny import tiny_components
from diffusers_idlora.training.objective import (
    RECIPE_TARGET_MODULES,
    Objective,
    TrainingBatch,
    TrainingNoise,
    logit_normal_sigmas,
)
from golden import FOLDER, Recording


CASES = ("training_ltx23", "training_ltx2", "training_ltx23_text_masked")


def load_case(name):
    """Transformer with its recorded LoRA, batch, noise and objective of a recording."""
    recording = Recording.load(name)
    transformer = recording.transformer()
    lora = {f"transformer.{k.removeprefix('diffusion_model.')}": v for k, v in recording.with_prefix("lora.").items()}
    transformer.load_lora_adapter(lora, network_alphas=None, prefix="transformer", adapter_name="default")
    for parameter_name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    pack = LTX2ConditionPipeline._pack_audio_latents
    batch = TrainingBatch(
        video_tokens=LTX2ConditionPipeline._pack_latents(recording["video_latents"]),
        audio_tokens=pack(recording["audio_latents"]),
        references=ReferenceBatch.from_clips(
            [[tokens] for tokens in pack(recording["reference_latents"])], transformer.audio_rope
        ),
        context=TextContext(
            recording["prompt_video"], recording["prompt_audio"], recording["prompt_attention_mask"].float()
        ),
        latent_size=tuple(recording["video_latents"].shape[2:]),
        frame_rate=recording.setting("frame_rate"),
    )
    noise = TrainingNoise(
        recording["sigmas"],
        recording["video_noise"],
        recording["audio_noise"],
        torch.full((2,), recording.metadata["first_frame_conditioned"] == "True"),
    )
    objective = Objective(
        mask_video_from_reference=recording.metadata["mask_cross_attention_to_reference"] == "True",
        mask_reference_from_text=recording.metadata["mask_reference_from_text"] == "True",
    )
    return recording, transformer, batch, noise, objective


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_predictions_losses_and_gradients_are_the_recorded_ones(name, gradient_checkpointing):
    recording, transformer, batch, noise, objective = load_case(name)
    if gradient_checkpointing:
        transformer.train()
        transformer.enable_gradient_checkpointing()
    with ReferenceAttention(transformer) as attention:
        loss = objective(transformer, attention, batch, noise)
        loss.total.backward()
    torch.testing.assert_close(loss.video_velocity, recording["video_prediction"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.audio_velocity, recording["audio_prediction"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.total, recording["loss"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.video.mean(), recording["video_loss"][0], atol=1e-5, rtol=0)
    gradients = recording.with_prefix("grad.diffusion_model.")
    parameters = {k.replace(".default.weight", ".weight"): v for k, v in transformer.named_parameters()}
    assert gradients
    for key, gradient in gradients.items():
        torch.testing.assert_close(parameters[key].grad, gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda recording, batch, noise, objective: (batch, noise, Objective(mask_video_from_reference=False)),
        lambda recording, batch, noise, objective: (
            batch,
            noise,
            Objective(mask_reference_from_text=not objective.mask_reference_from_text),
        ),
        lambda recording, batch, noise, objective: (
            batch,
            TrainingNoise(noise.sigmas, noise.video, noise.audio, ~noise.first_frame_clean),
            objective,
        ),
    ],
    ids=["without the mask of video", "the other mask of text", "the other first frame"],
)
def test_each_switch_shows_in_the_predictions(wrong):
    recording, transformer, batch, noise, objective = load_case("training_ltx23")
    batch, noise, objective = wrong(recording, batch, noise, objective)
    with torch.no_grad(), ReferenceAttention(transformer) as attention:
        loss = objective(transformer, attention, batch, noise)
    num_references = batch.references.num_tokens
    predicted = torch.cat([loss.video_velocity.flatten(), loss.audio_velocity[:, num_references:].flatten()])
    recorded = torch.cat(
        [recording["video_prediction"].flatten(), recording["audio_prediction"][:, num_references:].flatten()]
    )
    assert (predicted - recorded).abs().max() > 3e-5


def test_a_batch_has_the_mean_loss_of_its_samples_whatever_their_references():
    _, transformer, batch, noise, objective = load_case("training_ltx23")
    clips = list(batch.references.tokens)

    def loss_of(indices):
        references = ReferenceBatch.from_clips([rows[i] for i in indices], transformer.audio_rope)
        part = TrainingBatch(
            batch.video_tokens[indices],
            batch.audio_tokens[indices],
            references,
            TextContext(batch.context.video_embeds[indices], batch.context.audio_embeds[indices]),
            batch.latent_size,
            batch.frame_rate,
        )
        first_frame_clean = torch.tensor([True, False])[indices]
        part_noise = TrainingNoise(
            noise.sigmas[indices], noise.video[indices], noise.audio[indices], first_frame_clean
        )
        with torch.no_grad(), ReferenceAttention(transformer) as attention:
            return objective(transformer, attention, part, part_noise).total

    for rows in ([[clips[0]], [clips[1][:3]]], [[clips[0]], []]):  # noqa: B007 - `loss_of` reads it
        torch.testing.assert_close(loss_of([0, 1]), (loss_of([0]) + loss_of([1])) / 2, atol=1e-5, rtol=0)


def test_noise_levels_have_the_recorded_quantiles():
    recorded = json.loads((FOLDER / "timestep_quantiles.json").read_text())
    generator = torch.Generator().manual_seed(0)
    count = 400_000
    for num_video_tokens, quantiles in recorded["by_video_tokens"].items():
        sigmas = logit_normal_sigmas(
            int(num_video_tokens),
            torch.randn(count, generator=generator),
            torch.rand(count, generator=generator),
            torch.rand(count, generator=generator),
        )
        assert sigmas.min() >= 1e-3 and sigmas.max() <= 1.0
        measured = torch.quantile(sigmas, torch.tensor(recorded["quantiles"]))
        # Of 400,000 samples; the recorded ones come from a million.
        torch.testing.assert_close(measured, torch.tensor(quantiles), atol=3e-3, rtol=0)


@families
def test_on_one_fixed_batch_the_audio_loss_falls_by_forty_percent(family):
    transformer = tiny_components(family)["transformer"].requires_grad_(False)
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=RECIPE_TARGET_MODULES))
    config = transformer.config
    text_dims = (
        (config.caption_channels,) * 2
        if config.use_prompt_embeddings
        else (config.cross_attention_dim, config.audio_cross_attention_dim)
    )
    batch = TrainingBatch(
        video_tokens=torch.randn(2, 12, config.in_channels),
        audio_tokens=torch.randn(2, 9, config.audio_in_channels),
        references=ReferenceBatch.from_clips(
            [[torch.randn(length, config.audio_in_channels)] for length in (4, 6)], transformer.audio_rope
        ),
        context=TextContext(torch.randn(2, 6, text_dims[0]), torch.randn(2, 6, text_dims[1])),
        latent_size=(3, 2, 2),
        frame_rate=25.0,
    )
    noise = TrainingNoise(
        torch.tensor([0.4, 0.8]),
        torch.randn(2, 12, config.in_channels),
        torch.randn_like(batch.audio_tokens),
        torch.tensor([True, False]),
    )
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    with ReferenceAttention(transformer) as attention:
        for _ in range(200):
            loss = Objective()(transformer, attention, batch, noise)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            losses.append(loss.audio.mean().item())
    assert losses[-1] < 0.6 * losses[0]
