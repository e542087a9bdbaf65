"""The on-disk forms that question sets come in: one module each, all read through ``Form``."""
