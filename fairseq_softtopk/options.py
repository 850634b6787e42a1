"""How the dataclasses of options are written."""

from dataclasses import field
from typing import Any


def with_help(default: Any, text: str) -> Any:
    """A field of a ``FairseqDataclass``: an option with a default and a help text."""
    return field(default=default, metadata={"help": text})
