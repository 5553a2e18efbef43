"""Schedulers that diffusers does not have."""

from .scheduling_res2s import LTX2Res2sScheduler


__all__ = ["LTX2Res2sScheduler"]
