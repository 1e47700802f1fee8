"""Bundled demo: a toy world, its captions, its judge, and the small cascade trained on it."""
