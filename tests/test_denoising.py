"""The passes of a step: clean audio, shared identity guidance, packing that gives way to want of memory."""

import logging

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import LTX2VideoTransformer3DModel, TaylorSeerCacheConfig

from conftest import families
from denoising_case import IDENTITY_ONLY, PLAN, Case
from diffusers_idlora.denoising import SMALL_ROW_TOKENS, PassPacking, auto_passes_per_forward
from diffusers_idlora.guidance import CONDITIONAL, ISOLATED, NEGATIVE, NO_REFERENCE, PERTURBED
from diffusers_idlora.reference import ReferenceBatch, Turn
from diffusers_idlora.tiny import tiny_components


@pytest.fixture(scope="module")
def transformers():
    return {family: tiny_components(family)["transformer"] for family in ("ltx-2", "ltx-2.3")}


@pytest.fixture(scope="module")
def transformer(transformers):
    return transformers["ltx-2.3"]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


class Forwards:
    """Keyword arguments of the transformer's forwards inside of a `with` block; `edit` may change them."""

    def __init__(self, transformer, edit=None):
        self.transformer, self.edit, self.seen = transformer, edit, []

    def __enter__(self):
        self.hook = self.transformer.register_forward_pre_hook(self._record, with_kwargs=True)
        return self.seen

    def _record(self, module, args, kwargs):
        if self.edit is not None:
            kwargs = self.edit(kwargs)
        self.seen.append(kwargs)
        return args, kwargs

    def __exit__(self, *exception):
        self.hook.remove()


# Clean audio ---------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("clean_tokens", [range(9), range(3)], ids=["frozen", "beginning"])
def test_clean_audio_tokens_have_timestep_0_and_predict_themselves_while_sigma_stays(
    transformers, family, clean_tokens
):
    case = Case(transformers[family], (5, 3))
    mask = torch.zeros(2, 9, 1)
    mask[:, list(clean_tokens)] = 1
    with Forwards(case.transformer) as seen:
        _, audio = case.predict(audio_conditioning_mask=mask)
    for kwargs in seen:
        timesteps = kwargs["audio_timestep"][:, -9:]
        assert torch.equal(timesteps, 700.0 * (1 - mask[..., 0]))
        assert torch.equal(kwargs["audio_sigma"], torch.full((2,), 700.0))
    is_clean = mask[..., 0].bool()
    assert torch.equal(audio[is_clean], case.audio_latents[is_clean])
    assert (audio[~is_clean] != case.audio_latents[~is_clean]).any(dim=-1).all()


def test_clean_audio_changes_the_prediction_of_the_video_and_of_the_noisy_audio(transformer):
    case = Case(transformer)
    mask = torch.zeros(1, 9, 1)
    mask[:, :3] = 1
    (noisy,), (partly_clean,) = (case.run_passes([CONDITIONAL], audio_conditioning_mask=item) for item in (None, mask))
    assert (noisy[0] - partly_clean[0]).abs().max() > 1e-3
    assert (noisy[1] - partly_clean[1])[:, 3:].abs().max() > 1e-3


def test_a_mask_of_zeros_is_no_mask(transformer):
    case = Case(transformer, (5, 3))
    with_mask, without = (case.predict(audio_conditioning_mask=mask) for mask in (torch.zeros(2, 9, 1), None))
    assert torch.equal(with_mask[0], without[0]) and torch.equal(with_mask[1], without[1])


# Packed or one by one ------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("packed", [None, 2, 3, PassPacking(4)], ids=str)
@pytest.mark.parametrize("mode", ["exact", "shared"])
@pytest.mark.parametrize("frozen", [False, True], ids=["noisy audio", "frozen audio"])
def test_packed_passes_predict_what_they_predict_one_by_one(transformers, family, packed, mode, frozen):
    case = Case(transformers[family], (5, 0, 3))
    fields = {"identity_guidance_mode": mode, "audio_conditioning_mask": torch.ones(3, 9, 1) if frozen else None}
    one_by_one = case.predict(**fields)
    assert_close(case.predict(**fields, passes_per_forward=packed), one_by_one)


# Shared identity guidance --------------------------------------------------------------------------------------------


# Multiples of 16 tokens fill the vectors of the processor. What is left over beside them is computed by other
# instructions, with a rounding of its own, and which tokens are left over depends on how many there are in all.
WHOLE_VECTORS = {"num_video_tokens": 32, "num_audio_tokens": 16}


@families
@pytest.mark.parametrize("mask_video", [False, True], ids=["video hears reference", "video masked"])
@pytest.mark.parametrize("lengths", [(16,), (16, 16)], ids=["one row", "two rows"])
def test_the_copy_leaves_the_conditional_prediction_bit_identical(transformers, family, mask_video, lengths):
    case = Case(transformers[family], lengths, **WHOLE_VECTORS)
    fields = {"mask_video_from_reference": mask_video, "mask_reference_from_text": True}
    (plain,) = case.run_passes([CONDITIONAL], **fields)
    shared, _ = case.run_passes([CONDITIONAL, NO_REFERENCE], identity_guidance_mode="shared", **fields)
    assert torch.equal(plain[0], shared[0]) and torch.equal(plain[1], shared[1])


@families
def test_at_any_size_the_conditional_prediction_differs_by_rounding_only(transformers, family):
    case = Case(transformers[family], (5, 0, 3))
    (plain,) = case.run_passes([CONDITIONAL])
    shared, _ = case.run_passes([CONDITIONAL, NO_REFERENCE], identity_guidance_mode="shared")
    torch.testing.assert_close(shared, plain, atol=2e-6, rtol=0)


@families
def test_no_other_token_sees_anything_of_the_copy(transformers, family):
    case = Case(transformers[family], (5, 0, 3))

    def with_other_copy(kwargs):
        tokens = kwargs["audio_hidden_states"].clone()
        tokens[:, -9:] += 10 * torch.randn(tokens[:, -9:].shape)
        return {**kwargs, "audio_hidden_states": tokens}

    outputs = []
    for edit in (None, with_other_copy):
        with Forwards(case.transformer, edit):
            outputs.append(
                case.run_passes([CONDITIONAL, NO_REFERENCE, NEGATIVE, PERTURBED], identity_guidance_mode="shared")
            )
    (conditional, copy, *others), (edited_conditional, edited_copy, *edited_others) = outputs
    assert (copy[1] - edited_copy[1]).abs().max() > 0.1
    for plain, edited in zip((conditional, *others), (edited_conditional, *edited_others)):
        assert torch.equal(plain[0], edited[0]) and torch.equal(plain[1], edited[1])


@families
def test_the_copy_hears_no_reference_but_what_the_video_carries_of_it(transformers, family):
    # Isolated from the video, the copy can't know of the reference at all.
    transformer = transformers[family]
    case = Case(transformer, (5, 3))
    for block in transformer.transformer_blocks:
        block.video_to_audio_attn.to_out[0].register_forward_hook(_zero)
    try:
        (exact,) = case.run_passes([NO_REFERENCE])
        conditional, shared = case.run_passes([CONDITIONAL, NO_REFERENCE], identity_guidance_mode="shared")
    finally:
        for block in transformer.transformer_blocks:
            block.video_to_audio_attn.to_out[0]._forward_hooks.clear()
    assert_close(shared[1], exact[1])
    assert (shared[1] - conditional[1]).abs().max() > 1e-2
    assert torch.equal(shared[0], conditional[0])


def _zero(module, args, output):
    return torch.zeros_like(output)


@families
def test_the_copy_of_a_row_without_a_reference_predicts_what_the_row_does(transformers, family):
    case = Case(transformers[family], (5, 0))
    conditional, copy = case.run_passes([CONDITIONAL, NO_REFERENCE], identity_guidance_mode="shared")
    assert_close(copy[1][1], conditional[1][1])
    assert (copy[1][0] - conditional[1][0]).abs().max() > 1e-2


@families
def test_sharing_saves_one_forward_and_changes_the_sound_a_little_and_no_picture(transformers, family):
    case = Case(transformers[family])
    forwards, outputs = {}, {}
    for mode in ("exact", "shared"):
        with Forwards(case.transformer) as seen:
            outputs[mode] = case.predict(identity_guidance_mode=mode)
        forwards[mode] = len(seen)
    assert forwards == {"exact": 5, "shared": 4}
    assert_close(outputs["shared"][0], outputs["exact"][0])
    assert (outputs["shared"][1] - outputs["exact"][1]).abs().max() > 1e-3


def test_without_identity_guidance_no_copy_is_carried(transformer):
    case = Case(transformer)
    with Forwards(transformer) as seen, case.denoiser(identity_guidance_mode="shared") as denoiser:
        denoiser.run_passes([CONDITIONAL, NEGATIVE], *case.step)
        denoiser.run_passes([NO_REFERENCE], *case.step)
    assert [kwargs["audio_hidden_states"].shape[1] for kwargs in seen] == [5 + 9, 9]


@families
def test_the_video_mask_is_what_makes_sharing_close_to_exact(transformers, family):
    case = Case(transformers[family], (16,), num_video_tokens=32, num_audio_tokens=24)
    likeness = {}
    for mask_video in (False, True):
        deltas = []
        for mode in ("exact", "shared"):
            conditional, without = case.run_passes(
                [CONDITIONAL, NO_REFERENCE], identity_guidance_mode=mode, mask_video_from_reference=mask_video
            )
            deltas.append((conditional[1] - without[1]).flatten())
        likeness[mask_video] = torch.cosine_similarity(*deltas, dim=0).item()
    assert likeness[True] > 0.75
    assert likeness[True] > likeness[False] + 0.2


def test_clean_audio_stays_clean_in_the_copy(transformer):
    case = Case(transformer)
    mask = torch.zeros(1, 9, 1)
    mask[:, :3] = 1
    with Forwards(transformer) as seen:
        _, copy = case.run_passes(
            [CONDITIONAL, NO_REFERENCE], identity_guidance_mode="shared", audio_conditioning_mask=mask
        )
    timesteps = seen[0]["audio_timestep"]
    assert torch.equal(timesteps[:, -9:], timesteps[:, -18:-9])
    assert torch.equal(copy[1][:, :3], case.audio_latents[:, :3])


def test_an_unknown_mode_is_an_error_that_lists_the_modes(transformer):
    with pytest.raises(ValueError, match="`identity_guidance_mode` is 'approximate'; give one of exact, shared"):
        Case(transformer).predict(identity_guidance_mode="approximate")


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@families
def test_compiled_blocks_carry_the_copy_without_a_graph_break_or_a_second_compilation(family, fresh_compiler):
    case = Case(tiny_components(family)["transformer"])
    fields = {"identity_guidance_mode": "shared", "passes_per_forward": None, "mask_video_from_reference": True}
    expected = case.predict(**fields)
    case.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    case.predict(**fields)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(case.predict(**fields), expected)


def test_compiled_blocks_take_copies_of_other_lengths_without_end(transformer, fresh_compiler):
    # One block is enough: each is compiled by itself.
    config = {**transformer.config, "num_layers": 1}
    plain, compiled = (LTX2VideoTransformer3DModel.from_config(config).eval() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_repeated_blocks(fullgraph=True, backend="eager")
    fields = {"plan": IDENTITY_ONLY, "identity_guidance_mode": "shared", "mask_video_from_reference": True}
    for lengths, num_video_tokens, num_audio_tokens in (((5,), 12, 9), ((7,), 20, 11)):
        Case(compiled, lengths, num_video_tokens, num_audio_tokens).predict(**fields)
    with torch.compiler.set_stance("fail_on_recompile"):
        output = Case(compiled, (9,), 36, 21).predict(**fields)
    assert_close(output, Case(plain, (9,), 36, 21).predict(**fields))


# Memory --------------------------------------------------------------------------------------------------------------


def take_too_much(kwargs):
    torch.empty(2**55)


def raise_as_on_an_accelerator(kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def only_if_rows_exceed(limit, failure):
    def edit(kwargs):
        if len(kwargs["hidden_states"]) > limit:
            failure(kwargs)
        return kwargs

    return edit


def sizes(seen):
    return [len(kwargs["hidden_states"]) for kwargs in seen]


@pytest.mark.parametrize("failure", [take_too_much, raise_as_on_an_accelerator])
def test_where_memory_runs_out_smaller_packs_take_over_for_all_following_steps(transformer, failure):
    case = Case(transformer)
    expected = case.predict()
    packing = PassPacking(None, halve_on_out_of_memory=True)
    with (
        case.denoiser(passes_per_forward=packing) as denoiser,
        Forwards(transformer, only_if_rows_exceed(2, failure)) as seen,
    ):
        assert_close(denoiser.predict(PLAN, *case.step), expected)
        assert sizes(seen) == [2, 2, 1]
        assert_close(denoiser.predict(PLAN, *case.step), expected)
        assert sizes(seen) == [2, 2, 1] * 2
    assert packing.passes_per_forward == 2


def test_packs_are_halved_until_they_fit(transformer):
    case = Case(transformer)
    with Forwards(transformer, only_if_rows_exceed(1, raise_as_on_an_accelerator)) as seen:
        output = case.predict(passes_per_forward=PassPacking(4, halve_on_out_of_memory=True))
    assert sizes(seen) == [1] * 5
    assert_close(output, case.predict())


def test_shared_identity_guidance_gives_way_too_and_keeps_its_copy(transformer):
    case = Case(transformer)
    with Forwards(transformer, only_if_rows_exceed(2, raise_as_on_an_accelerator)) as seen:
        output = case.predict(
            identity_guidance_mode="shared", passes_per_forward=PassPacking(None, halve_on_out_of_memory=True)
        )
    assert sizes(seen) == [2, 2]
    assert_close(output, case.predict(identity_guidance_mode="shared"))


@pytest.mark.parametrize(
    ("packing", "limit"),
    [(PassPacking(1, halve_on_out_of_memory=True), 0), (PassPacking(2), 1), (2, 1), (None, 1)],
    ids=["a single pass", "halving off", "a number", "all"],
)
def test_want_of_memory_is_an_error_where_nothing_smaller_was_asked_for_or_is_possible(transformer, packing, limit):
    with (
        Forwards(transformer, only_if_rows_exceed(limit, raise_as_on_an_accelerator)),
        pytest.raises(torch.OutOfMemoryError),
    ):
        Case(transformer).predict(passes_per_forward=packing)


def test_another_error_is_not_taken_for_want_of_memory(transformer):
    def fail(kwargs):
        raise RuntimeError("shapes do not fit")

    with Forwards(transformer, fail), pytest.raises(RuntimeError, match="shapes do not fit"):
        Case(transformer).predict(passes_per_forward=PassPacking(None, halve_on_out_of_memory=True))


def test_giving_way_is_logged_once(transformer, caplog):
    with (
        caplog.at_level(logging.INFO, logger="diffusers_idlora"),
        Forwards(transformer, only_if_rows_exceed(2, raise_as_on_an_accelerator)),
    ):
        Case(transformer).predict(passes_per_forward=PassPacking(None, halve_on_out_of_memory=True))
    assert [record.message for record in caplog.records] == ["No memory for 5 passes in one forward; going on with 2."]


def test_a_forward_that_found_no_memory_leaves_nothing_in_the_caches():
    outputs = []
    for packing, limit in ((PassPacking(2), 5), (PassPacking(None, halve_on_out_of_memory=True), 2)):
        transformer = tiny_components("ltx-2.3")["transformer"]
        transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1))
        case = Case(transformer)
        with (
            case.denoiser(passes_per_forward=packing) as denoiser,
            Forwards(transformer, only_if_rows_exceed(limit, raise_as_on_an_accelerator)),
        ):
            for _ in range(4):
                output = denoiser.predict(PLAN, *case.step)
        outputs.append(output)
    assert_close(*outputs)


def test_small_rows_are_packed_and_large_ones_run_one_by_one(transformer):
    assert auto_passes_per_forward(transformer, SMALL_ROW_TOKENS, 5) is None
    assert auto_passes_per_forward(transformer, SMALL_ROW_TOKENS + 1, 5) == 1
    assert auto_passes_per_forward(transformer, 10, 1) == 1


@pytest.mark.parametrize(
    ("offload", "passes"),
    [
        (lambda model: model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"), None),
        (
            lambda model: model.enable_group_offload(
                torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
            ),
            None,
        ),
        (lambda model: cpu_offload(model, torch.device("cpu")), None),
        (lambda model: cpu_offload_with_hook(model, torch.device("cpu")), 1),
    ],
    ids=["group by leaf", "group by block", "sequential", "model"],
)
def test_large_rows_are_packed_where_every_forward_would_stream_the_weights(offload, passes):
    transformer = tiny_components("ltx-2.3")["transformer"]
    offload(transformer)
    assert auto_passes_per_forward(transformer, 5000, 5) == passes


def test_packs_become_smaller_under_group_offload(transformer):
    offloaded = tiny_components("ltx-2.3")["transformer"]
    offloaded.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    with Forwards(offloaded, only_if_rows_exceed(2, raise_as_on_an_accelerator)):
        output = Case(offloaded).predict(passes_per_forward=PassPacking(None, halve_on_out_of_memory=True))
    assert_close(output, Case(transformer).predict())


# Speaker turns -------------------------------------------------------------------------------------------------------


def turns_of(case, *rows):
    return ReferenceBatch.from_turns(rows, case.transformer.audio_rope, case.audio_latents.shape[1])


@families
def test_one_speaker_from_beginning_to_end_is_a_plain_reference(transformers, family):
    case = Case(transformers[family], (5,))
    (tokens,) = case.references.tokens
    turns = turns_of(case, [Turn(tokens, 0.0, 10.0)])
    for mode in ("exact", "shared"):
        assert_close(
            case.predict(references=turns, identity_guidance_mode=mode), case.predict(identity_guidance_mode=mode)
        )


@families
@pytest.mark.parametrize("mask_video", [False, True], ids=["video hears turns", "video masked"])
def test_rows_with_turns_are_packed_with_rows_that_have_no_reference(transformers, family, mask_video):
    case = Case(transformers[family], (5, 3, 0))
    one, other, _ = case.references.tokens
    rows = ([Turn(one, 0.0, 0.16), Turn(other[2:], 0.16, 1.0)], [Turn(other, 0.1, 0.2)], [])
    turns = turns_of(case, *rows)
    fields = {"mask_video_from_reference": mask_video, "references": turns}
    sequential = case.predict(**fields)
    assert_close(case.predict(**fields, passes_per_forward=None), sequential)
    (conditional, negative) = case.run_passes([CONDITIONAL, NEGATIVE], **fields)
    (plain,) = case.run_passes([CONDITIONAL], references=None)
    assert_close(conditional[1][2], plain[1][2])
    assert (conditional[1][0] - plain[1][0]).abs().max() > 1e-3


@families
def test_swapping_the_turns_of_two_speakers_changes_the_sound(transformers, family):
    case = Case(transformers[family], (5, 5))
    one, other = case.references.tokens
    single = Case(transformers[family], (5,))
    first, swapped = (
        single.run_passes([CONDITIONAL], references=turns_of(single, [Turn(one, *spans[0]), Turn(other, *spans[1])]))[
            0
        ]
        for spans in (((0.0, 0.16), (0.16, 0.4)), ((0.16, 0.4), (0.0, 0.16)))
    )
    assert (first[1] - swapped[1]).abs().max() > 1e-3
    assert (first[0] - swapped[0]).abs().max() > 1e-4


def test_the_isolated_and_perturbed_passes_hear_turns_as_the_others_do(transformer):
    case = Case(transformer, (5,))
    (tokens,) = case.references.tokens
    turns = turns_of(case, [Turn(tokens, 0.0, 10.0)])
    for item in (ISOLATED, PERTURBED):
        assert_close(case.run_passes([item], references=turns), case.run_passes([item]))
