"""Attention processors that know where the reference tokens are, row by row."""

import threading
import weakref
from dataclasses import dataclass, field, replace

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import LTX2Attention, LTX2PerturbedAttnProcessor

from .reference import ReferenceLayout


# One lock for each transformer: processors are state of the model, so only one thread may have its own on it.
_locks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()

# `attn2`, where video reads the text, never meets a reference token and is left alone.
CONTROLLED_ATTENTIONS = ("attn1", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")


def transformer_lock(transformer: LTX2VideoTransformer3DModel) -> threading.RLock:
    """The lock to hold while the model is changed for a call: other threads wait, the same one may take it again."""
    with _locks_guard:
        return _locks.setdefault(transformer, threading.RLock())


def is_first_generation(transformer: LTX2VideoTransformer3DModel) -> bool:
    """Whether this is an LTX-2 (19B) transformer rather than LTX-2.3 or later (method section 3)."""
    return not transformer.config.cross_attn_mod


@dataclass(frozen=True)
class AttentionRules:
    """
    What the attentions of one forward must respect.

    Attributes:
        layout (`ReferenceLayout`): Where each row's reference tokens are.
        perturbed (`tuple[bool, ...]`, *optional*): Rows to which spatio-temporal guidance (STG) applies.
        isolated (`tuple[bool, ...]`, *optional*): Rows whose video and audio must not see each other.
        stg_blocks (`tuple[int, ...]`): Blocks whose self-attentions STG perturbs, video and audio together.
        mask_video_from_reference (`bool`): Video never attends to reference tokens (method section 6).
        mask_reference_from_text (`bool`):
            Reference tokens get the dtype's minimum added to all of their text logits, which makes them attend
            uniformly to all text tokens (method section 6: so were the released adapters trained).
        audio_visibility (`torch.Tensor`, *optional*):
            Boolean `[B, R + T, R + T]`: which keys each audio token sees in `audio_attn1`; `None` is all.
        video_visibility (`torch.Tensor`, *optional*):
            Boolean `[B, V, R + T]`: which audio tokens each video token sees; `None` is all. Not needed under
            `mask_video_from_reference`.
    """

    layout: ReferenceLayout
    perturbed: tuple[bool, ...] = ()
    isolated: tuple[bool, ...] = ()
    stg_blocks: tuple[int, ...] = ()
    mask_video_from_reference: bool = False
    mask_reference_from_text: bool = False
    audio_visibility: torch.Tensor | None = None
    video_visibility: torch.Tensor | None = None


@dataclass(frozen=True)
class AttentionEdit:
    """
    What one attention module does differently in the current forward. The default changes nothing.

    Attributes:
        dropped_keys (`torch.Tensor`, *optional*):
            As many keys and values as it is long are dropped at the front. A tensor, because a compiled block would be
            compiled again for every other number.
        copied_tokens (`torch.Tensor`, *optional*):
            As many audio tokens at the end as it is long are a copy: a self-attention attends to them from themselves
            alone, and from them to nothing else; a cross-attention drops them from its keys and values.
        mask (`torch.Tensor`, *optional*): Added to the logits, `[B, 1 or queries, keys]`, without those of the copy.
        attend (`torch.Tensor`, *optional*): `[B, 1, 1]`, 0 on rows whose values pass through unattended.
        keep (`torch.Tensor`, *optional*): `[B, 1, 1]`, 0 on rows to which the module adds nothing.
        all_pass_values (`bool`): No row attends, so logits are not computed.
        all_left_out (`bool`): The module adds nothing to any row, so it is not computed.
    """

    dropped_keys: torch.Tensor | None = None
    copied_tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    attend: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    all_pass_values: bool = False
    all_left_out: bool = False


NO_EDIT = AttentionEdit()


class LTX2IDLoRAAttnProcessor(LTX2PerturbedAttnProcessor):
    """
    diffusers' processor for LTX-2.X, applied to the keys, mask and rows that an [`AttentionEdit`] leaves.

    One class serves all attentions of both model generations; [`ReferenceAttention`] writes each module's `edit`
    before a forward. Nothing here depends on tensor values, so a compiled block has no graph break.
    """

    def __init__(self, attention_backend=None, parallel_config=None):
        super().__init__()
        self._attention_backend = attention_backend
        self._parallel_config = parallel_config
        self.edit = NO_EDIT

    def __call__(
        self,
        attn: LTX2Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        key_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        perturbation_mask: torch.Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> torch.Tensor:
        """Attention under `self.edit`; the arguments are those of [`LTX2PerturbedAttnProcessor`]."""
        edit = self.edit
        if edit.all_left_out:
            return torch.zeros_like(hidden_states)

        if edit.attend is not None or edit.all_pass_values:
            perturbation_mask, all_perturbed = edit.attend, edit.all_pass_values
        elif perturbation_mask is None:
            all_perturbed = False

        # Numbers rather than `slice` objects, which would make a compiled block one of a fixed size.
        num_copies = 0 if edit.copied_tokens is None else edit.copied_tokens.shape[0]
        copies = None
        if encoder_hidden_states is not None and (edit.dropped_keys is not None or edit.copied_tokens is not None):
            first_key = 0 if edit.dropped_keys is None else edit.dropped_keys.shape[0]
            end = encoder_hidden_states.shape[1] - num_copies
            encoder_hidden_states = encoder_hidden_states[:, first_key:end].contiguous()
            key_rotary_emb = _part(key_rotary_emb, first_key, end)
        elif encoder_hidden_states is None and edit.copied_tokens is not None:
            end = hidden_states.shape[1]
            first_copy = end - num_copies
            # Apart rather than under a mask: exact for all other tokens, and fused kernels keep working.
            copies = super().__call__(
                attn,
                hidden_states[:, first_copy:end].contiguous(),
                query_rotary_emb=_part(query_rotary_emb, first_copy, end),
                perturbation_mask=perturbation_mask,
                all_perturbed=all_perturbed,
            )
            hidden_states = hidden_states[:, :first_copy].contiguous()
            query_rotary_emb = _part(query_rotary_emb, 0, first_copy)
        if edit.mask is not None:
            attention_mask = self._add_mask(attention_mask, edit.mask, encoder_hidden_states)

        output = super().__call__(
            attn,
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            query_rotary_emb,
            key_rotary_emb,
            perturbation_mask,
            all_perturbed,
        )
        if copies is not None:
            output = torch.cat([output, copies], dim=1)
        return output if edit.keep is None else output * edit.keep

    @staticmethod
    def _add_mask(
        attention_mask: torch.Tensor | None, added: torch.Tensor, encoder_hidden_states: torch.Tensor | None
    ) -> torch.Tensor:
        if attention_mask is None:
            # A self-attention's mask already names every key.
            return added if encoder_hidden_states is None else added.expand(-1, -1, encoder_hidden_states.shape[1])
        # In float16 the sum of two masks may pass the minimum, and a row of infinities would become NaN.
        return (attention_mask + added).clamp(min=torch.finfo(added.dtype).min)


def _part(
    rotary_emb: tuple[torch.Tensor, torch.Tensor] | None, start: int, end: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The rotary embedding of some of the tokens."""
    return None if rotary_emb is None else tuple(part[..., start:end, :] for part in rotary_emb)


@dataclass
class ReferenceAttention:
    """
    Installs the processors on a transformer for the length of a `with` block and takes them off again, also after an
    exception. Inside, [`~ReferenceAttention.apply`] says what the next forward must respect. Blocks on one transformer
    exclude each other between threads, and nest within one.

    Args:
        transformer (`LTX2VideoTransformer3DModel`): The model; nothing but its processors is touched.

    Example:
        ```py
        with ReferenceAttention(transformer) as attention:
            attention.apply(AttentionRules(layout), device, dtype)
            transformer(...)
        ```
    """

    transformer: LTX2VideoTransformer3DModel
    _processors: list[dict[str, LTX2IDLoRAAttnProcessor]] = field(default_factory=list, init=False, repr=False)
    _found: list[tuple[LTX2Attention, object]] = field(default_factory=list, init=False, repr=False)

    def __enter__(self) -> "ReferenceAttention":
        self._lock = transformer_lock(self.transformer)
        self._lock.acquire()
        try:
            for block in self.transformer.transformer_blocks:
                self._processors.append({name: self._install(getattr(block, name)) for name in CONTROLLED_ATTENTIONS})
        except BaseException:
            self.__exit__()
            raise
        return self

    def _install(self, module: LTX2Attention) -> LTX2IDLoRAAttnProcessor:
        found = module.processor
        self._found.append((module, found))
        # What `set_attention_backend` and context parallelism left on the processor stays in force.
        processor = LTX2IDLoRAAttnProcessor(
            getattr(found, "_attention_backend", None), getattr(found, "_parallel_config", None)
        )
        module.set_processor(processor)
        return processor

    def __exit__(self, *exception) -> None:
        for module, processor in self._found:
            module.set_processor(processor)
        self._found.clear()
        self._processors.clear()
        self._lock.release()

    def apply(self, rules: AttentionRules, device: torch.device | str, dtype: torch.dtype) -> None:
        """
        Sets what the following forwards must respect.

        Args:
            rules (`AttentionRules`): The rules, one entry per row of the batch.
            device (`torch.device`): The device of the hidden states.
            dtype (`torch.dtype`): The dtype of the hidden states, for additive masks.
        """
        edits = _edits(rules, device, dtype)
        perturbation = _perturbation(rules.perturbed, is_first_generation(self.transformer), device, dtype)
        for index, processors in enumerate(self._processors):
            for name, processor in processors.items():
                processor.edit = edits.get(name, NO_EDIT)
                if index in rules.stg_blocks and name in ("attn1", "audio_attn1"):
                    processor.edit = replace(
                        perturbation, mask=processor.edit.mask, copied_tokens=processor.edit.copied_tokens
                    )


def check_text_mask(dtype: torch.dtype) -> None:
    """Raises a ValueError for float16, whose smallest number does not drown the logits it is added to."""
    if dtype == torch.float16:
        raise ValueError("`mask_reference_from_text` can't be had in float16; compute in bfloat16 or float32.")


def _edits(rules: AttentionRules, device: torch.device | str, dtype: torch.dtype) -> dict[str, AttentionEdit]:
    """Each attention's edit by its name in the block, STG aside."""
    layout, minimum = rules.layout, torch.finfo(dtype).min
    num_rows, num_references = len(layout.lengths), layout.num_reference_tokens
    keep = text_mask = copied = None
    if layout.num_copy_tokens:
        copied = torch.empty(layout.num_copy_tokens, 0, device=device)
    if any(rules.isolated) and not all(rules.isolated):
        keep = _rows_except(rules.isolated, device, dtype)
    cross_modal = AttentionEdit(keep=keep, all_left_out=bool(rules.isolated) and all(rules.isolated))
    if rules.mask_reference_from_text and num_references:
        check_text_mask(dtype)
        text_mask = torch.zeros(num_rows, layout.num_tokens, 1, device=device, dtype=dtype)
        text_mask[:, :num_references] = minimum
    if rules.mask_video_from_reference and num_references:
        dropped = torch.empty(num_references, 0, device=device)
        audio_to_video = replace(cross_modal, dropped_keys=dropped, copied_tokens=copied)
    else:
        mask = _key_mask(layout, rules.video_visibility, device, dtype)
        audio_to_video = replace(cross_modal, mask=mask, copied_tokens=copied)
    return {
        "audio_attn1": AttentionEdit(
            mask=_key_mask(layout, rules.audio_visibility, device, dtype), copied_tokens=copied
        ),
        "audio_attn2": AttentionEdit(mask=text_mask),
        "audio_to_video_attn": audio_to_video,
        "video_to_audio_attn": cross_modal,
    }


def _key_mask(
    layout: ReferenceLayout, visibility: torch.Tensor | None, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor | None:
    """`[B, 1 or queries, R + T]`: the minimum at padding and at what is not visible; `None` if all is seen."""
    if visibility is None and not layout.has_padding:
        return None
    hidden = layout.is_padding(device)[:, None, : layout.num_front_tokens]
    if visibility is not None:
        hidden = hidden | ~visibility.to(device)
    return torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)


def _perturbation(
    perturbed: tuple[bool, ...], left_out: bool, device: torch.device | str, dtype: torch.dtype
) -> AttentionEdit:
    """
    The edit of a self-attention in an STG block (method section 3): LTX-2 leaves the attention out, LTX-2.3 passes its
    values through.
    """
    if not any(perturbed):
        return NO_EDIT
    if all(perturbed):
        return AttentionEdit(all_left_out=True) if left_out else AttentionEdit(all_pass_values=True)
    rows = _rows_except(perturbed, device, dtype)
    return AttentionEdit(keep=rows) if left_out else AttentionEdit(attend=rows)


def _rows_except(rows: tuple[bool, ...], device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """`[B, 1, 1]`: 0 on the given rows, 1 elsewhere."""
    return 1 - torch.tensor(rows, device=device, dtype=dtype)[:, None, None]
