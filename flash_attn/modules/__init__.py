"""Modules of transformers."""
