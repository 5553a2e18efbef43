"""ID-LoRA for LTX-2 in diffusers."""
