"""Megatron NPR: language models that learn to reason in native parallel branches."""

__version__ = "0.1.0"
