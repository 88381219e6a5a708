"""Figures: one function a result, drawn without touching matplotlib's global state."""
