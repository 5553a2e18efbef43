"""Trains in the identity world, measures whether the voice follows the reference, and writes `docs/mechanism.md`."""
