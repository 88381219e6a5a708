"""Attention whose derivatives, first and second, take memory linear in the length."""
