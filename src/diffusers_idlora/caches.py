"""First Block Cache for LTX-2 and LTX-2.3, which diffusers 0.42 has for other transformers only."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import FirstBlockCacheConfig, LTX2VideoTransformer3DModel
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock

from .guidance import check_scale


def enable_first_block_cache(transformer: LTX2VideoTransformer3DModel, threshold: float = 0.05) -> None:
    """
    Skips all blocks but the first at steps that change little.

    Where the first block's residual differs by at most `threshold` from that of the last step that was computed, what
    the other blocks added in that step is added again, to video and audio alike. Only video tokens are compared. Each
    pass of a step (see [`GuidancePass`]) decides for itself; passes packed into one forward decide together. Where the
    passes change from one step to the next, as at the ends of a guidance window, the next step is computed.

    Calls of [`LTX2IDLoRAPipeline`] need nothing else. A transformer that is called directly needs
    `with transformer.cache_context(name):` around each call, and `transformer._reset_stateful_cache()` before it is
    used for another sample.

    This rests on private parts of diffusers 0.42 (`diffusers.hooks._helpers`), which another version may change. What
    diffusers knows of the transformer is extended for the length of this call only. So diffusers' other caches stay as
    they are: `TaylorSeerCacheConfig` works with `transformer.enable_cache`, and `MagCacheConfig`, `SeaCacheConfig`,
    `FasterCacheConfig` and `PyramidAttentionBroadcastConfig` stay unsupported (a Mag cache would leave the audio of a
    skipped step without the output of any block).

    Args:
        transformer (`LTX2VideoTransformer3DModel`): The model, of either generation.
        threshold (`float`, defaults to `0.05`):
            Mean absolute difference of the residuals, relative to their mean absolute value, up to which a step is
            skipped. 0 skips nothing; larger is faster and further from the result without a cache.

    Raises:
        ValueError: If `threshold` is negative or no number, the transformer has a single block, or a cache is enabled.

    Example:
        ```py
        enable_first_block_cache(pipe.transformer, threshold=0.1)
        output = pipe(prompt=prompt, image="face.png", reference_audio="voice.wav")
        disable_first_block_cache(pipe.transformer)
        ```
    """
    check_scale("threshold", threshold)
    num_blocks = len(transformer.transformer_blocks)
    if num_blocks < 2:
        raise ValueError(f"`transformer` has {num_blocks} block; a first block cache needs at least 2.")
    with _registered_block():
        transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))


def disable_first_block_cache(transformer: LTX2VideoTransformer3DModel) -> None:
    """
    Takes the cache of [`enable_first_block_cache`] off again.

    Args:
        transformer (`LTX2VideoTransformer3DModel`): The model; one without a cache is left as it is.

    Raises:
        ValueError: If the cache on it is another one.
    """
    config = transformer._cache_config
    if config is None:
        return
    if not isinstance(config, FirstBlockCacheConfig):
        raise ValueError(
            f"`transformer` has a cache of the kind {type(config).__name__}; call its `disable_cache` instead."
        )
    transformer.disable_cache()


class _VideoAndAudio(TransformerBlockMetadata):
    """
    A block's two streams. The cache keeps a residual for hidden states and for encoder hidden states, as blocks with
    separate text states have them; here the second stream is audio, and the text is only read.
    """

    def _get_parameter_from_args_kwargs(
        self, identifier: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # The hooks ask by this fixed name, whatever name the metadata give.
        name = "audio_hidden_states" if identifier == "encoder_hidden_states" else identifier
        return super()._get_parameter_from_args_kwargs(name, args, kwargs)


@contextmanager
def _registered_block() -> Iterator[None]:
    # Hooks look the metadata up once, when they are made. Left in place they would let other caches run that compute
    # something else on this transformer.
    registry = TransformerBlockRegistry._registry
    TransformerBlockRegistry._register()
    found = registry.get(LTX2VideoTransformerBlock)
    TransformerBlockRegistry.register(
        LTX2VideoTransformerBlock,
        _VideoAndAudio(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
    )
    try:
        yield
    finally:
        del registry[LTX2VideoTransformerBlock]
        if found is not None:
            registry[LTX2VideoTransformerBlock] = found
