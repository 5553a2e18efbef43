"""Samples of several shapes in one batch: the same losses and gradients as one by one."""

import subprocess

import pytest
import torch

from diffusers_idlora.attention_processor import ReferenceAttention
from diffusers_idlora.training.batches import BatchOrder, SampleDraw, collate
from training_run import launch, loaded_trainer, losses_of, make_samples, options


@pytest.fixture(scope="module")
def data(tiny_checkpoint, tmp_path_factory):
    """A prepared folder whose samples have two latent shapes in turn."""
    return make_samples(tmp_path_factory.mktemp("data"), tiny_checkpoint(), count=8)


def test_a_mixed_batch_has_the_mean_loss_and_gradients_of_its_samples(tiny_checkpoint, data, tmp_path):
    changed = {"train_batch_size": 3, "gradient_accumulation_steps": 2, "mix_lengths": True}
    trainer = loaded_trainer(options(tiny_checkpoint(), data, tmp_path, **changed))
    torch.manual_seed(1)
    for parameter in trainer.parameters:
        # A LoRA at its beginning has gradients in one of its two matrices only.
        torch.nn.init.normal_(parameter, std=0.1)
    order = BatchOrder([()] * 8, 3, trainer.arguments.seed).epoch(0)[:2]
    singles = [
        collate(
            [trainer.samples[index]],
            [SampleDraw.of(trainer.arguments.seed, number, row)],
            trainer.transformer.audio_rope,
            "cpu",
            torch.float32,
        )
        for number, indices in enumerate(order)
        for row, index in enumerate(indices)
    ]
    assert [len({trainer.samples.shapes[index] for index in indices}) for indices in order] == [2, 2]
    with ReferenceAttention(trainer.transformer) as attention:
        loss = trainer.accumulate_gradients(attention, trainer._batches(0))[0]
        gradients = [parameter.grad.clone() for parameter in trainer.parameters]
        trainer.optimizer.zero_grad()
        mean = sum(trainer.objective(trainer.model, attention, *single).total for single in singles) / 6
        mean.backward()
    torch.testing.assert_close(loss, mean.detach(), atol=1e-6, rtol=0)
    for parameter, gradient in zip(trainer.parameters, gradients):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=0)


def test_shapes_mix_only_where_they_may_and_every_epoch_visits_every_sample():
    shapes = [(1, 1, index % 2) for index in range(8)]
    for buckets, mixed in ((shapes, False), ([()] * 8, True)):
        batches = BatchOrder(buckets, batch_size=4, seed=0).epoch(3)
        assert sorted(index for batch in batches for index in batch) == list(range(8))
        assert any(len({shapes[index] for index in batch}) > 1 for batch in batches) == mixed


def test_a_mixed_run_goes_on_as_if_it_had_never_stopped(tiny_checkpoint, data, tmp_path):
    changed = {"mix_lengths": True, "train_batch_size": 3, "lr_scheduler": "constant"}

    def run(name, steps, **more):
        loaded_trainer(
            options(tiny_checkpoint(), data, tmp_path / name, max_train_steps=steps, **changed, **more)
        ).run()

    run("straight", 6)
    run("resumed", 4)
    run("resumed", 6, resume_from_checkpoint="latest")
    assert losses_of(tmp_path / "resumed") == losses_of(tmp_path / "straight")


@pytest.mark.slow
def test_two_processes_with_unlike_shapes_have_the_losses_of_one_with_twice_the_batch(tiny_checkpoint, data, tmp_path):
    changed = {"mix_lengths": True, "gradient_accumulation_steps": 2}
    loaded_trainer(options(tiny_checkpoint(), data, tmp_path / "one", train_batch_size=4, **changed)).run()
    arguments = options(tiny_checkpoint(), data, tmp_path / "two", train_batch_size=2, **changed)
    process = launch(arguments, processes=2, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors[-3000:]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-4)
