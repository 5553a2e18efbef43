"""Adapters of the pipeline: checked before they are loaded, metadata kept, weights switched and restored."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer

from .lora import AdapterInfo, check_adapter, load_adapter, lora_config


logger = logging.get_logger(__name__)


class IDLoRALoaderMixin:
    """What [`LTX2IDLoRAPipeline`] adds to diffusers' `LTX2LoraLoaderMixin`, which comes after it among the bases."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Loads an adapter, in the released key format or in diffusers' own, from safetensors only.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A safetensors file, a folder, a Hub repository, or the tensors themselves.
            adapter_name (`str`, *optional*): What `set_adapters` will call it.
            hotswap (`bool`, defaults to `False`): Replace the weights of the adapter of that name in place.
            kwargs: Where to look, as in [`find_adapter_file`], and `low_cpu_mem_usage`.

        Raises:
            ValueError: If it is not a safetensors file, fits no module, or was made for the other model generation;
                diffusers would load nothing then and only log it.
        """
        loading = {name: kwargs.pop(name) for name in ("low_cpu_mem_usage",) if name in kwargs}
        state_dict, metadata = load_adapter(pretrained_model_name_or_path_or_dict, **kwargs)
        info = check_adapter(state_dict, metadata, self.transformer)
        self._warn_of_other_base(info)
        super().load_lora_weights(state_dict, adapter_name, hotswap, lora_config=lora_config(metadata), **loading)
        self._adapters[adapter_name or self.active_transformer_adapters()[-1]] = info

    def _warn_of_other_base(self, info: AdapterInfo) -> None:
        """Only where both are named as Hub repositories: a folder may have any name."""
        mine = str(self.config.get("_name_or_path") or "")
        if info.base_model and mine.count("/") == info.base_model.count("/") == 1 and mine != info.base_model:
            logger.warning(f"This adapter was made for {info.base_model}, and is loaded into {mine}.")

    @property
    def _adapters(self) -> dict[str, AdapterInfo]:
        # Kept with the transformer's pipeline only for its recommendations, so never saved.
        return self.__dict__.setdefault("_adapter_infos", {})

    def active_transformer_adapters(self) -> list[str]:
        """
        The adapters that act on the transformer. Unlike `get_active_adapters`, whose answer is about the text
        connectors where an adapter has weights for them.
        """
        layers = (module for module in self.transformer.modules() if isinstance(module, BaseTunerLayer))
        return next((list(layer.active_adapters) for layer in layers), [])

    @property
    def recommended_identity_guidance_scale(self) -> float | None:
        """The scale that the active adapters' own metadata recommend, the last one's if several do."""
        if not self._adapters:
            return None
        recommended = None
        for name in self.active_transformer_adapters():
            if name in self._adapters:
                block = self._adapters[name].metadata.get("recommended", {})
                recommended = block.get("identity_guidance_scale", recommended)
        return recommended

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: Any, *, lora_config: dict | None = None, **kwargs: Any
    ) -> Any:
        """As [`LTX2LoraLoaderMixin.lora_state_dict`]; `lora_config` is the configuration of weights in a dict."""
        output = super().lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        if lora_config is None or not kwargs.get("return_lora_metadata"):
            return output
        return output[0], lora_config

    @contextmanager
    def adapters_weighted(self, weights: Mapping[str, float | None]) -> Iterator[None]:
        """
        For the length of a `with` block only these adapters act, on the transformer and on the text connectors where
        they have weights for these; then everything is as it was, also after an exception.

        Args:
            weights (`Mapping[str, float | None]`): Adapters and their weights; `None` leaves the weight as it is.

        Raises:
            ValueError: If an adapter is fused into the weights, which can't be switched.
        """
        models = (self.transformer, self.connectors)
        layers = [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)]
        if any(layer.merged for layer in layers):
            raise ValueError("An adapter is fused into the weights; call `unfuse_lora`, so that it can be switched.")
        found = [(layer, list(layer.active_adapters), dict(layer.scaling)) for layer in layers]
        # peft makes the weights of active adapters trainable.
        trainable = [(weight, weight.requires_grad) for layer in layers for weight in layer.parameters()]
        try:
            for layer in layers:
                layer.set_adapter(list(weights))
                for name, weight in weights.items():
                    if weight is not None and name in layer.scaling:
                        layer.set_scale(name, weight)
            yield
        finally:
            for layer, active, scaling in found:
                layer.set_adapter(active)
                layer.scaling.update(scaling)
            for weight, requires_grad in trainable:
                weight.requires_grad_(requires_grad)
