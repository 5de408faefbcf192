"""Readers of archives that CVAT exports."""
