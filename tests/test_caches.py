"""First Block Cache within calls of the pipeline: what it skips, and what it leaves as it was."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, LTX2VideoTransformer3DModel, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock

from conftest import families
from diffusers_idlora import IdentityGuidance, LTX2IDLoRAPipeline
from diffusers_idlora.caches import disable_first_block_cache, enable_first_block_cache
from diffusers_idlora.demo_assets import demo_face, demo_voice
from diffusers_idlora.tiny import tiny_components


NUM_STEPS = 4
batching = pytest.mark.parametrize("guidance_batching", ["sequential", "packed", 2])


@pytest.fixture(scope="module")
def face():
    return demo_face(64)


@pytest.fixture(scope="module")
def voice():
    return demo_voice(2.5)


@pytest.fixture
def pipe(family):
    components = tiny_components(family)
    # Three blocks: a first, a last, and one in between that is only passed through.
    torch.manual_seed(0)
    config = {**components["transformer"].config, "num_layers": 3}
    components["transformer"] = LTX2VideoTransformer3DModel.from_config(config).eval()
    pipe = LTX2IDLoRAPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def run(pipe, face, voice):
    """All guidance on: five passes a step."""

    def call(guidance_batching="sequential", **kwargs):
        arguments = {
            "prompt": "a",
            "image": face,
            "reference_audio": voice,
            "height": 64,
            "width": 64,
            "num_frames": 9,
            "num_inference_steps": NUM_STEPS,
            "max_sequence_length": 16,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(0),
        }
        output = pipe(**{**arguments, "guidance_batching": guidance_batching, **kwargs})
        return output.frames, output.audio

    return call


@pytest.fixture
def block_runs(pipe):
    """How often each block was computed; a hook of the cache that skips one never reaches its attention."""
    counts = [0] * len(pipe.transformer.transformer_blocks)

    def count(index):
        def hook(*_):
            counts[index] += 1

        return hook

    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.attn2.register_forward_pre_hook(count(index))
    return counts


def same(one, other):
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@families
@batching
@pytest.mark.parametrize("threshold", [0.0, 1e-9])
def test_a_threshold_of_zero_gives_the_result_without_a_cache(pipe, run, block_runs, guidance_batching, threshold):
    expected = run(guidance_batching)
    without = list(block_runs)
    enable_first_block_cache(pipe.transformer, threshold)
    assert same(run(guidance_batching), expected)
    assert block_runs == [2 * count for count in without]


@families
@batching
def test_a_large_threshold_skips_all_blocks_but_the_first_after_the_first_step(
    pipe, run, block_runs, guidance_batching
):
    enable_first_block_cache(pipe.transformer, threshold=1e9)
    cached = run(guidance_batching)
    forwards = {"sequential": 5, "packed": 1, 2: 3}[guidance_batching]
    assert block_runs == [forwards * NUM_STEPS, forwards, forwards]
    disable_first_block_cache(pipe.transformer)
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(cached, run(guidance_batching), strict=True))


@families
def test_a_skipped_step_adds_again_what_the_other_blocks_added_to_video_and_audio(pipe, run):
    transformer, first, final = pipe.transformer, [], []
    transformer.transformer_blocks[0].register_forward_hook(lambda module, args, output: first.append(output))
    for norm in (transformer.norm_out, transformer.audio_norm_out):
        norm.register_forward_pre_hook(lambda module, args: final.append(args[0]))
    off = {"guidance_scale": 1, "stg_scale": 0, "modality_scale": 1, "identity_guidance_scale": 0}
    run(num_inference_steps=2, **off)
    # The first step is computed with a cache too, so the second one begins with the same latents.
    enable_first_block_cache(transformer, threshold=1e9)
    run(num_inference_steps=2, **off)
    for modality in range(2):
        added = final[modality] - first[0][modality]
        skipped = final[3 * 2 + modality]
        torch.testing.assert_close(skipped, first[1][modality] + added, atol=1e-5, rtol=1e-5)
        assert (skipped - final[2 + modality]).abs().max() > 1e-4


@families
def test_calls_do_not_go_on_from_what_an_earlier_one_cached(pipe, run, voice):
    enable_first_block_cache(pipe.transformer, threshold=1e9)
    expected = run()
    # Of other lengths, and broken off.
    run(num_frames=17, reference_audio=(voice, voice))

    def fail(pipe, step, *_):
        if step == 1:
            raise RuntimeError("in a callback")

    with pytest.raises(RuntimeError, match="in a callback"):
        run(callback_on_step_end=fail)
    assert same(run(), expected)


@families
def test_a_call_does_not_go_on_from_one_that_failed_while_decoding(pipe, run, monkeypatch):
    enable_first_block_cache(pipe.transformer, threshold=1e9)
    expected = run()
    with monkeypatch.context() as patched:
        patched.setattr(pipe.vae, "decode", None)
        with pytest.raises(TypeError):
            run(output_type="pt")
    assert same(run(), expected)


@families
def test_a_pass_that_begins_late_is_computed_first(pipe, run, block_runs):
    enable_first_block_cache(pipe.transformer, threshold=1e9)
    run(identity_guidance=IdentityGuidance(start=0.5))
    # Four passes at steps 0 and 1, five at 2 and 3.
    assert block_runs == [4 + 4 + 5 + 5, 4 + 5, 4 + 5]


@families
def test_disabled_it_leaves_nothing_behind(pipe, run):
    expected = run()
    enable_first_block_cache(pipe.transformer, threshold=1e9)
    assert pipe.transformer.is_cache_enabled and not same(run(), expected)
    disable_first_block_cache(pipe.transformer)
    assert not pipe.transformer.is_cache_enabled and same(run(), expected)
    # Twice is once.
    disable_first_block_cache(pipe.transformer)
    enable_first_block_cache(pipe.transformer, threshold=0.0)
    assert same(run(), expected)


@families
def test_the_processors_of_the_transformer_are_put_back_after_a_cached_call(pipe, run):
    before = [block.audio_attn1.processor for block in pipe.transformer.transformer_blocks]
    enable_first_block_cache(pipe.transformer, threshold=1e9)
    run()
    assert [block.audio_attn1.processor for block in pipe.transformer.transformer_blocks] == before


# What it leaves as it is


@pytest.fixture(scope="module")
def transformer():
    return tiny_components("ltx-2.3")["transformer"]


def test_caches_that_would_be_wrong_on_this_transformer_are_still_refused(transformer):
    enable_first_block_cache(transformer)
    disable_first_block_cache(transformer)
    with pytest.raises(ValueError, match="not registered"):
        transformer.enable_cache(MagCacheConfig(num_inference_steps=4, calibrate=True))
    with pytest.raises(ValueError, match="not registered"):
        transformer.enable_cache(FirstBlockCacheConfig())
    assert not transformer.is_cache_enabled


def test_what_was_registered_for_the_block_before_is_registered_again(transformer, monkeypatch):
    other = TransformerBlockMetadata(0, 1)
    monkeypatch.setitem(TransformerBlockRegistry._registry, LTX2VideoTransformerBlock, other)
    enable_first_block_cache(transformer)
    disable_first_block_cache(transformer)
    assert TransformerBlockRegistry.get(LTX2VideoTransformerBlock) is other


def test_another_cache_is_neither_replaced_nor_taken_off(transformer):
    config = TaylorSeerCacheConfig()
    transformer.enable_cache(config)
    try:
        with pytest.raises(ValueError, match="already been enabled"):
            enable_first_block_cache(transformer)
        with pytest.raises(ValueError, match="`transformer` has a cache of the kind TaylorSeerCacheConfig"):
            disable_first_block_cache(transformer)
        assert transformer._cache_config is config
    finally:
        transformer.disable_cache()


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), "0.1", True])
def test_a_threshold_that_can_not_be_is_an_error_that_names_it(transformer, threshold):
    with pytest.raises(ValueError) as error:
        enable_first_block_cache(transformer, threshold)
    assert f"`threshold` is {threshold!r}" in str(error.value)
    assert not transformer.is_cache_enabled


def test_a_transformer_of_one_block_is_refused(transformer):
    single = LTX2VideoTransformer3DModel.from_config({**transformer.config, "num_layers": 1})
    with pytest.raises(ValueError, match="`transformer` has 1 block"):
        enable_first_block_cache(single)
