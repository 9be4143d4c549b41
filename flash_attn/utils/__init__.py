"""Helpers by the names that other packages import."""
