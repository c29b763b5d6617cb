"""Corpora in the layouts that people have them in, as rows of a manifest."""
