"""Runnable examples on the embedded model."""
