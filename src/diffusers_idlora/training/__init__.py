"""Training an ID-LoRA: the step as pure functions, data, checkpoints, publishing."""
