"""Criterions that fairseq finds by name."""
