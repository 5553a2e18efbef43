"""Rows of one forward that differ in reference, perturbation and isolation give what each gives alone."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from diffusers import LTX2ConditionPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_ltx2 import LTX2Attention

from conftest import families
from diffusers_idlora.attention_processor import (
    CONTROLLED_ATTENTIONS,
    AttentionRules,
    LTX2IDLoRAAttnProcessor,
    ReferenceAttention,
)
from diffusers_idlora.reference import ReferenceBatch, ReferenceLayout, Turn, reference_timesteps
from diffusers_idlora.tiny import tiny_components
from golden import Recording


NUM_VIDEO, NUM_TARGET = 12, 9


@dataclass(frozen=True)
class Row:
    """What one row of a batch asks for."""

    seed: int
    reference: int = 0
    perturbed: bool = False
    isolated: bool = False


def run(transformer, rows, masks=None, stg_blocks=(1,), **kwargs):
    """Video and target audio velocities of rows in one forward; every row's inputs follow from its seed alone."""
    config = transformer.config

    def randn(*shape):
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(row.seed)) for row in rows])

    channels = config.audio_in_channels
    clips = [
        [torch.randn(row.reference, channels, generator=torch.Generator().manual_seed(row.seed + 1))]
        if row.reference
        else []
        for row in rows
    ]
    references = ReferenceBatch.from_clips(clips, transformer.audio_rope)
    audio = randn(NUM_TARGET, channels)
    positions = transformer.audio_rope.prepare_audio_coords(len(rows), NUM_TARGET, "cpu")
    num_references = 0 if references is None else references.num_tokens
    if references is not None:
        audio = torch.cat([references.tokens, audio], dim=1)
        positions = torch.cat([references.positions, positions], dim=2)
    timestep = torch.full((len(rows),), 700.0)
    if config.use_prompt_embeddings:
        text_dims = (config.caption_channels, config.caption_channels)
    else:
        text_dims = (config.cross_attention_dim, config.audio_cross_attention_dim)
    rules = AttentionRules(
        ReferenceLayout(tuple(row.reference for row in rows), num_references, NUM_TARGET),
        perturbed=tuple(row.perturbed for row in rows),
        isolated=tuple(row.isolated for row in rows),
        stg_blocks=stg_blocks,
        **(masks or {}),
    )
    with torch.no_grad(), ReferenceAttention(transformer) as attention:
        attention.apply(rules, "cpu", torch.float32)
        video, audio = transformer(
            hidden_states=randn(NUM_VIDEO, config.in_channels),
            audio_hidden_states=audio,
            encoder_hidden_states=randn(6, text_dims[0]),
            audio_encoder_hidden_states=randn(6, text_dims[1]),
            timestep=timestep[:, None].expand(-1, NUM_VIDEO),
            audio_timestep=reference_timesteps(timestep, num_references, NUM_TARGET),
            sigma=timestep,
            audio_sigma=timestep,
            num_frames=3,
            height=2,
            width=2,
            fps=25.0,
            audio_coords=positions,
            use_cross_timestep=config.cross_attn_mod,
            return_dict=False,
            **kwargs,
        )
    return video, audio[:, num_references:]


@pytest.fixture(scope="module")
def transformers():
    return {family: tiny_components(family)["transformer"] for family in ("ltx-2", "ltx-2.3")}


MIXED = (
    Row(0, reference=5),
    Row(0),
    Row(1, reference=3),
    Row(1, reference=3, perturbed=True),
    Row(2, reference=5, isolated=True),
    Row(3, perturbed=True, isolated=True),
)
MASKS = (
    {},
    {"mask_video_from_reference": True},
    {"mask_reference_from_text": True},
    {"mask_video_from_reference": True, "mask_reference_from_text": True},
)


@families
@pytest.mark.parametrize("masks", MASKS, ids=lambda masks: "+".join(masks) or "no masks")
def test_each_row_of_a_mixed_batch_equals_its_own_forward(transformers, family, masks):
    video, audio = run(transformers[family], MIXED, masks)
    for index, row in enumerate(MIXED):
        single_video, single_audio = run(transformers[family], [row], masks)
        torch.testing.assert_close(video[index], single_video[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(audio[index], single_audio[0], atol=1e-5, rtol=0)


@families
def test_reference_perturbation_isolation_and_masks_each_change_the_output(transformers, family):
    plain = run(transformers[family], [Row(0, reference=5)])
    for changed in (
        run(transformers[family], [Row(0)]),
        run(transformers[family], [Row(0, reference=5, perturbed=True)]),
        run(transformers[family], [Row(0, reference=5, isolated=True)]),
    ):
        assert (changed[0] - plain[0]).abs().max() > 1e-3
        assert (changed[1] - plain[1]).abs().max() > 1e-3
    masked_video, _ = run(transformers[family], [Row(0, reference=5)], {"mask_video_from_reference": True})
    assert (masked_video - plain[0]).abs().max() > 1e-3
    _, masked_audio = run(transformers[family], [Row(0, reference=5)], {"mask_reference_from_text": True})
    assert (masked_audio - plain[1]).abs().max() > 1e-5


def test_on_ltx23_a_perturbed_pass_is_that_of_diffusers(transformers):
    transformer = transformers["ltx-2.3"]
    ours = run(transformer, [Row(0, reference=5, perturbed=True)], stg_blocks=(0, 2))
    upstream = run(transformer, [Row(0, reference=5)], spatio_temporal_guidance_blocks=[0, 2])
    assert torch.equal(ours[0], upstream[0]) and torch.equal(ours[1], upstream[1])


@families
def test_an_isolated_pass_is_that_of_diffusers(transformers, family):
    ours = run(transformers[family], [Row(0, reference=5, isolated=True)])
    upstream = run(transformers[family], [Row(0, reference=5)], isolate_modalities=True)
    torch.testing.assert_close(ours, upstream, atol=1e-6, rtol=0)


def test_rows_alike_need_no_additive_mask(transformers):
    transformer = transformers["ltx-2.3"]
    layout = ReferenceLayout((4, 4), 4, NUM_TARGET)
    with ReferenceAttention(transformer) as attention:
        attention.apply(AttentionRules(layout, mask_video_from_reference=True), "cpu", torch.float32)
        block = transformer.transformer_blocks[0]
        edits = [getattr(block, name).processor.edit for name in CONTROLLED_ATTENTIONS]
        assert all(edit.mask is None for edit in edits)
        assert block.audio_to_video_attn.processor.edit.dropped_keys.shape[0] == 4


@pytest.mark.parametrize("name", ["training_ltx2", "training_ltx23_text_masked"])
def test_predictions_under_the_training_masks_are_the_recorded_ones(name):
    recording = Recording.load(name)
    transformer = recording.transformer()
    lora = {f"transformer.{k.removeprefix('diffusion_model.')}": v for k, v in recording.with_prefix("lora.").items()}
    transformer.load_lora_adapter(lora, network_alphas=None, prefix="transformer")
    pack = LTX2ConditionPipeline._pack_audio_latents
    references = ReferenceBatch.from_clips(
        [[tokens] for tokens in pack(recording["reference_latents"])], transformer.audio_rope
    )
    sigmas = recording["sigmas"][:, None, None]
    clean = torch.zeros(2, 12, 1)
    if recording.metadata["first_frame_conditioned"] == "True":
        clean[:, :4] = 1
    video_sigmas = sigmas * (1 - clean)
    video = LTX2ConditionPipeline._pack_latents(recording["video_latents"])
    video = (1 - video_sigmas) * video + video_sigmas * recording["video_noise"]
    audio = (1 - sigmas) * pack(recording["audio_latents"]) + sigmas * recording["audio_noise"]
    timestep = recording["sigmas"] * 1000
    mask = recording["prompt_attention_mask"]
    rules = AttentionRules(
        ReferenceLayout(references.lengths, references.num_tokens, audio.shape[1]),
        mask_video_from_reference=recording.metadata["mask_cross_attention_to_reference"] == "True",
        mask_reference_from_text=recording.metadata["mask_reference_from_text"] == "True",
    )
    with torch.no_grad(), ReferenceAttention(transformer) as attention:
        attention.apply(rules, "cpu", torch.float32)
        predictions = transformer(
            hidden_states=video,
            audio_hidden_states=torch.cat([references.tokens, audio], dim=1),
            encoder_hidden_states=recording["prompt_video"],
            audio_encoder_hidden_states=recording["prompt_audio"],
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask,
            timestep=timestep[:, None] * (1 - clean[..., 0]),
            audio_timestep=reference_timesteps(timestep, references.num_tokens, audio.shape[1]),
            sigma=timestep,
            audio_sigma=timestep,
            video_coords=transformer.rope.prepare_video_coords(2, 3, 2, 2, "cpu", fps=25.0),
            audio_coords=torch.cat(
                [references.positions, transformer.audio_rope.prepare_audio_coords(2, audio.shape[1], "cpu")], dim=2
            ),
            use_cross_timestep=transformer.config.cross_attn_mod,
            return_dict=False,
        )
    torch.testing.assert_close(predictions[0], recording["video_prediction"], atol=1e-5, rtol=0)
    torch.testing.assert_close(predictions[1], recording["audio_prediction"], atol=1e-5, rtol=0)


@families
def test_processors_are_restored_after_the_call_and_after_an_exception(transformers, family):
    transformer = transformers[family]
    modules = [module for module in transformer.modules() if isinstance(module, LTX2Attention)]
    before = [module.processor for module in modules]
    with ReferenceAttention(transformer):
        assert any(isinstance(module.processor, LTX2IDLoRAAttnProcessor) for module in modules)
    assert [module.processor for module in modules] == before
    with pytest.raises(RuntimeError, match="in the middle"), ReferenceAttention(transformer):
        raise RuntimeError("in the middle")
    assert [module.processor for module in modules] == before


def test_an_installation_that_fails_half_way_leaves_nothing_behind(transformers):
    transformer = transformers["ltx-2.3"]
    last = transformer.transformer_blocks[-1].video_to_audio_attn
    modules = [module for module in transformer.modules() if isinstance(module, LTX2Attention)]
    before = [module.processor for module in modules]
    del transformer.transformer_blocks[-1].video_to_audio_attn
    try:
        with pytest.raises(AttributeError), ReferenceAttention(transformer):
            pass
        assert [module.processor for module in modules] == before
    finally:
        transformer.transformer_blocks[-1].video_to_audio_attn = last


def test_threads_on_one_transformer_take_turns_and_leave_it_as_found(transformers):
    transformer = transformers["ltx-2.3"]
    before = [block.audio_attn1.processor for block in transformer.transformer_blocks]
    expected = [run(transformer, [Row(0, reference=5)]), run(transformer, [Row(1)])]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run, transformer, rows) for rows in ([Row(0, reference=5)], [Row(1)]) * 10]
    for index, job in enumerate(jobs):
        torch.testing.assert_close(job.result(), expected[index % 2], atol=1e-6, rtol=0)
    assert [block.audio_attn1.processor for block in transformer.transformer_blocks] == before


def test_blocks_nest_within_one_thread(transformers):
    transformer = transformers["ltx-2.3"]
    expected = run(transformer, MIXED)
    with ReferenceAttention(transformer):
        installed = transformer.transformer_blocks[0].attn1.processor
        inner = run(transformer, MIXED)
        assert transformer.transformer_blocks[0].attn1.processor is installed
    torch.testing.assert_close(inner, expected, atol=0, rtol=0)


def test_the_text_mask_is_refused_in_float16_where_it_would_do_nothing(transformers):
    layout = ReferenceLayout((4,), 4, NUM_TARGET)
    with (
        ReferenceAttention(transformers["ltx-2.3"]) as attention,
        pytest.raises(ValueError, match="`mask_reference_from_text` can't be had in float16"),
    ):
        attention.apply(AttentionRules(layout, mask_reference_from_text=True), "cpu", torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_the_text_mask_reference_tokens_attend_uniformly(dtype):
    transformer = tiny_components("ltx-2.3")["transformer"].to(dtype)
    attention_module = transformer.transformer_blocks[0].audio_attn2
    text = torch.randn(1, 6, attention_module.cross_attention_dim).to(dtype)
    audio = torch.randn(1, 4 + NUM_TARGET, attention_module.query_dim).to(dtype)
    with torch.no_grad(), ReferenceAttention(transformer) as attention:
        layout = ReferenceLayout((4,), 4, NUM_TARGET)
        attention.apply(AttentionRules(layout, mask_reference_from_text=True), "cpu", dtype)
        output = attention_module(audio, encoder_hidden_states=text)
        gates = 2 * torch.sigmoid(attention_module.to_gate_logits(audio))
        mean = attention_module.to_v(text).mean(dim=1, keepdim=True).unflatten(2, (attention_module.heads, -1))
        uniform = attention_module.to_out[0]((mean * gates.unsqueeze(-1)).flatten(2))
    torch.testing.assert_close(output[:, :4], uniform[:, :4], atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0)
    assert (output[:, 4:] - uniform[:, 4:]).abs().max() > 1e-3


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def attend(transformer, name, rules, tokens, keys=None):
    """One attention of the second block by itself, with audio positions for audio; keys are audio where given."""
    module = getattr(transformer.transformer_blocks[1], name)
    rotary = {}
    if name == "audio_attn1":
        rotary["query_rotary_emb"] = transformer.audio_rope(audio_positions(transformer, rules.layout))
    elif name == "audio_to_video_attn":
        video = transformer.rope.prepare_video_coords(1, 3, 2, 2, "cpu", fps=25.0)
        rotary["query_rotary_emb"] = transformer.cross_attn_rope(video[:, :1])
        rotary["key_rotary_emb"] = transformer.cross_attn_audio_rope(audio_positions(transformer, rules.layout))
    with ReferenceAttention(transformer) as attention:
        attention.apply(rules, "cpu", torch.float32)
        return module(tokens, encoder_hidden_states=keys, **rotary)


def audio_positions(transformer, layout):
    target = transformer.audio_rope.prepare_audio_coords(len(layout.lengths), layout.num_target_tokens, "cpu")
    return torch.cat(
        [target[:, :, : layout.num_reference_tokens] - 1, target, target[:, :, : layout.num_copy_tokens]], dim=2
    )


@families
def test_a_copy_attends_to_itself_alone_and_no_other_audio_attends_to_it(transformers, family):
    transformer = transformers[family]
    dim = transformer.transformer_blocks[1].audio_attn1.query_dim
    front, copy = randn(1, 4 + NUM_TARGET, dim), randn(1, NUM_TARGET, dim, seed=1)
    rules = [
        AttentionRules(ReferenceLayout((length,), num_references, NUM_TARGET, num_copies))
        for length, num_references, num_copies in ((3, 4, NUM_TARGET), (3, 4, 0), (0, 0, 0))
    ]
    together = attend(transformer, "audio_attn1", rules[0], torch.cat([front, copy], dim=1))
    # The first token is padding.
    alone = attend(transformer, "audio_attn1", rules[1], front)
    assert torch.equal(together[:, : 4 + NUM_TARGET], alone)
    assert torch.equal(together[:, 4 + NUM_TARGET :], attend(transformer, "audio_attn1", rules[2], copy))
    assert (alone - attend(transformer, "audio_attn1", AttentionRules(ReferenceLayout((4,), 4, NUM_TARGET)), front))[
        :, 4:
    ].abs().max() > 1e-4


@families
@pytest.mark.parametrize("masks", MASKS[:2], ids=["no masks", "mask_video_from_reference"])
@pytest.mark.parametrize("length", [4, 3], ids=["no padding", "padding"])
def test_video_does_not_attend_to_a_copy(transformers, family, masks, length):
    transformer = transformers[family]
    module = transformer.transformer_blocks[1].audio_to_video_attn
    video, audio = randn(1, NUM_VIDEO, module.query_dim), randn(1, 4 + 2 * NUM_TARGET, module.cross_attention_dim)
    with_copy, without = (
        attend(
            transformer,
            "audio_to_video_attn",
            AttentionRules(ReferenceLayout((length,), 4, NUM_TARGET, num_copies), **masks),
            video,
            audio[:, : 4 + NUM_TARGET + num_copies],
        )
        for num_copies in (NUM_TARGET, 0)
    )
    assert torch.equal(with_copy, without)


@families
@pytest.mark.parametrize("stg_blocks", [(1,), ()], ids=["perturbed", "not perturbed"])
def test_a_perturbed_row_stays_perturbed_beside_a_copy(transformers, family, stg_blocks):
    transformer = transformers[family]
    dim = transformer.transformer_blocks[1].audio_attn1.query_dim
    tokens = randn(2, 4 + 2 * NUM_TARGET, dim)
    with_copy, without = (
        attend(
            transformer,
            "audio_attn1",
            AttentionRules(
                ReferenceLayout((4, 4), 4, NUM_TARGET, num_copies), perturbed=(False, True), stg_blocks=stg_blocks
            ),
            tokens[:, : 4 + NUM_TARGET + num_copies],
        )
        for num_copies in (NUM_TARGET, 0)
    )
    assert torch.equal(with_copy[:, : 4 + NUM_TARGET], without)
    if stg_blocks:
        copy = tokens[:1, 4 + NUM_TARGET :]
        plain = attend(transformer, "audio_attn1", AttentionRules(ReferenceLayout((0,), 0, NUM_TARGET)), copy)
        torch.testing.assert_close(with_copy[:1, 4 + NUM_TARGET :], plain, atol=1e-6, rtol=0)
        assert (with_copy[1, 4 + NUM_TARGET :] - with_copy[0, 4 + NUM_TARGET :]).abs().max() > 1e-3


# Nine target tokens from 0 to 0.33 s: the first speaker's turn holds the second and third, the other's the fifth to
# the seventh; twelve video tokens: four of 0.04 s, and two times four of 0.32 s.
SPANS = ((0.01, 0.1), (0.14, 0.23))


def two_speakers(transformer):
    """References of 2 and 3 tokens and rules under which each is heard in its speaker's turn."""
    channels = transformer.config.audio_in_channels
    turns = [Turn(torch.randn(length, channels), *span) for length, span in zip((2, 3), SPANS)]
    batch = ReferenceBatch.from_turns([turns], transformer.audio_rope, NUM_TARGET)
    video = transformer.rope.prepare_video_coords(1, 3, 2, 2, "cpu", fps=25.0)
    return AttentionRules(
        ReferenceLayout(batch.lengths, batch.num_tokens, NUM_TARGET),
        audio_visibility=batch.turns.audio_visibility(
            transformer.audio_rope.prepare_audio_coords(1, NUM_TARGET, "cpu")
        ),
        video_visibility=batch.turns.video_visibility(video, NUM_TARGET),
    )


@families
@pytest.mark.parametrize(
    ("reference", "hearers"),
    [([0, 1], [0, 1, 5 + 1, 5 + 2]), ([2, 3, 4], [2, 3, 4, 5 + 4, 5 + 5, 5 + 6])],
    ids=["first speaker", "second speaker"],
)
def test_another_reference_changes_only_its_speaker_s_reference_and_turn(transformers, family, reference, hearers):
    transformer = transformers[family]
    rules = two_speakers(transformer)
    tokens = randn(1, 5 + NUM_TARGET, transformer.transformer_blocks[1].audio_attn1.query_dim)
    changed = tokens.clone()
    changed[:, reference] = randn(1, len(reference), tokens.shape[2], seed=1)
    outputs = [attend(transformer, "audio_attn1", rules, item) for item in (tokens, changed)]
    differences = (outputs[0] - outputs[1]).abs().amax(dim=(0, 2))
    others = [index for index in range(5 + NUM_TARGET) if index not in hearers]
    assert (differences[hearers] > 1e-4).all()
    assert (differences[others] == 0).all()


@families
def test_video_hears_the_reference_of_whose_turn_it_is(transformers, family):
    transformer = transformers[family]
    module = transformer.transformer_blocks[1].audio_to_video_attn
    rules = two_speakers(transformer)
    video, audio = randn(1, NUM_VIDEO, module.query_dim), randn(1, 5 + NUM_TARGET, module.cross_attention_dim)
    for reference, hearers in (([0, 1], range(4)), ([2, 3, 4], range(4, 8))):
        changed = audio.clone()
        changed[:, reference] = randn(1, len(reference), audio.shape[2], seed=1)
        outputs = [attend(transformer, "audio_to_video_attn", rules, video, item) for item in (audio, changed)]
        differences = (outputs[0] - outputs[1]).abs().amax(dim=(0, 2))
        assert (differences[list(hearers)] > 1e-5).all()
        assert (differences[[index for index in range(NUM_VIDEO) if index not in hearers]] == 0).all()


@pytest.fixture
def default_backend():
    """diffusers sets a backend for the whole process, and other tests compare to the last bit."""
    active = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(active)


def test_the_attention_backend_that_was_set_stays_in_force(default_backend):
    transformer = tiny_components("ltx-2.3")["transformer"]
    expected = run(transformer, MIXED)
    transformer.set_attention_backend("_native_math")
    backend = transformer.transformer_blocks[0].attn1.processor._attention_backend
    with ReferenceAttention(transformer):
        processors = [getattr(transformer.transformer_blocks[0], name).processor for name in CONTROLLED_ATTENTIONS]
        assert [processor._attention_backend for processor in processors] == [backend] * len(processors)
    torch.testing.assert_close(run(transformer, MIXED), expected, atol=1e-5, rtol=0)


@families
def test_no_mode_logs_that_attention_arguments_are_ignored(transformers, family, caplog):
    logging.getLogger("diffusers").propagate = True
    try:
        run(transformers[family], MIXED, MASKS[-1])
        run(transformers[family], [Row(0, reference=5, perturbed=True)])
    finally:
        logging.getLogger("diffusers").propagate = False
    assert not caplog.records


SEQUENTIAL = (
    [Row(0, reference=5)],
    [Row(0)],
    [Row(0, reference=5, perturbed=True)],
    [Row(0, reference=5, isolated=True)],
)


@families
@pytest.mark.parametrize("kinds", [SEQUENTIAL, [MIXED]], ids=["sequential", "packed"])
def test_compiled_blocks_have_no_graph_break_and_are_not_compiled_again(family, kinds):
    transformer = tiny_components(family)["transformer"]
    expected = [run(transformer, rows, MASKS[1]) for rows in kinds]
    torch._dynamo.reset()
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    for rows in kinds:
        run(transformer, rows, MASKS[1])
    # Every kind of pass has now been seen once; a second step may compile nothing.
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows, outputs in zip(kinds, expected):
            torch.testing.assert_close(run(transformer, rows, MASKS[1]), outputs, atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_gradients_reach_the_inputs_of_every_row_with_gradient_checkpointing():
    recording = Recording.load("training_ltx2")
    transformer = recording.transformer().train()
    transformer.enable_gradient_checkpointing()
    audio = torch.randn(2, 9, 128, requires_grad=True)
    timestep = torch.tensor([300.0, 700.0])
    with ReferenceAttention(transformer) as attention:
        attention.apply(
            AttentionRules(ReferenceLayout((2, 4), 4, 5), perturbed=(False, True), stg_blocks=(1,)),
            "cpu",
            torch.float32,
        )
        _, prediction = transformer(
            hidden_states=torch.randn(2, 12, 128),
            audio_hidden_states=audio,
            encoder_hidden_states=recording["prompt_video"],
            audio_encoder_hidden_states=recording["prompt_audio"],
            timestep=timestep[:, None].expand(-1, 12),
            audio_timestep=reference_timesteps(timestep, 4, 5),
            num_frames=3,
            height=2,
            width=2,
            audio_coords=transformer.audio_rope.prepare_audio_coords(2, 9, "cpu"),
            return_dict=False,
        )
        prediction[:, 4:].square().mean().backward()
    gradients = audio.grad.abs().sum(dim=-1)
    # Row 0 has two padding tokens in front, which nothing may attend to.
    assert (gradients[0, :2] == 0).all()
    assert (gradients[0, 2:] > 0).all() and (gradients[1] > 0).all()
