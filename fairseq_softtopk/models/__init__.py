"""Architectures that fairseq finds by name."""
