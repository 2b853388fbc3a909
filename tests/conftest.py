"""Compiling makes millions of objects that stay: Python's collector need not look through them again and again."""

import gc

gc.set_threshold(50_000, 20, 20)
