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
    """

    layout: ReferenceLayout
    perturbed: tuple[bool, ...] = ()
    isolated: tuple[bool, ...] = ()
    stg_blocks: tuple[int, ...] = ()
    mask_video_from_reference: bool = False
    mask_reference_from_text: bool = False


@dataclass(frozen=True)
class AttentionEdit:
    """
    What one attention module does differently in the current forward. The default changes nothing.

    Attributes:
        dropped_keys (`torch.Tensor`, *optional*):
            As many keys and values as it is long are dropped at the front. A tensor, because a compiled block would be
            compiled again for every other number.
        mask (`torch.Tensor`, *optional*): Added to the logits, `[B, 1 or queries, keys]`.
        attend (`torch.Tensor`, *optional*): `[B, 1, 1]`, 0 on rows whose values pass through unattended.
        keep (`torch.Tensor`, *optional*): `[B, 1, 1]`, 0 on rows to which the module adds nothing.
        all_pass_values (`bool`): No row attends, so logits are not computed.
        all_left_out (`bool`): The module adds nothing to any row, so it is not computed.
    """

    dropped_keys: torch.Tensor | None = None
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

        if edit.dropped_keys is not None:
            first_key = edit.dropped_keys.shape[0]
            encoder_hidden_states = encoder_hidden_states[:, first_key:]
            key_rotary_emb = tuple(part[..., first_key:, :] for part in key_rotary_emb)
        if edit.mask is not None:
            attention_mask = self._add_mask(attention_mask, edit.mask, encoder_hidden_states)
        if edit.attend is not None or edit.all_pass_values:
            perturbation_mask, all_perturbed = edit.attend, edit.all_pass_values
        elif perturbation_mask is None:
            all_perturbed = False

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
        with _locks_guard:
            self._lock = _locks.setdefault(self.transformer, threading.RLock())
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
                    processor.edit = replace(perturbation, mask=processor.edit.mask)


def check_text_mask(dtype: torch.dtype) -> None:
    """Raises a ValueError for float16, whose smallest number does not drown the logits it is added to."""
    if dtype == torch.float16:
        raise ValueError("`mask_reference_from_text` can't be had in float16; compute in bfloat16 or float32.")


def _edits(rules: AttentionRules, device: torch.device | str, dtype: torch.dtype) -> dict[str, AttentionEdit]:
    """Each attention's edit by its name in the block, STG aside."""
    layout, minimum = rules.layout, torch.finfo(dtype).min
    num_rows, num_references = len(layout.lengths), layout.num_reference_tokens
    padding_mask = keep = text_mask = None
    if layout.has_padding:
        padding_mask = torch.zeros(num_rows, 1, layout.num_tokens, device=device, dtype=dtype)
        padding_mask.masked_fill_(layout.is_padding(device)[:, None], minimum)
    if any(rules.isolated) and not all(rules.isolated):
        keep = _rows_except(rules.isolated, device, dtype)
    cross_modal = AttentionEdit(keep=keep, all_left_out=bool(rules.isolated) and all(rules.isolated))
    if rules.mask_reference_from_text and num_references:
        check_text_mask(dtype)
        text_mask = torch.zeros(num_rows, layout.num_tokens, 1, device=device, dtype=dtype)
        text_mask[:, :num_references] = minimum
    if rules.mask_video_from_reference and num_references:
        audio_to_video = replace(cross_modal, dropped_keys=torch.empty(num_references, 0, device=device))
    else:
        audio_to_video = replace(cross_modal, mask=padding_mask)
    return {
        "audio_attn1": AttentionEdit(mask=padding_mask),
        "audio_attn2": AttentionEdit(mask=text_mask),
        "audio_to_video_attn": audio_to_video,
        "video_to_audio_attn": cross_modal,
    }


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
