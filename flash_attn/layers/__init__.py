"""Layers that other packages import by name."""
