"""Data sets: builders and the input pipeline."""
