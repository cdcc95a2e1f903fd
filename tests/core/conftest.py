"""Hypothesis without deadlines: nothing here asserts a time, and machines are shared."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
