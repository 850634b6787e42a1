"""Registers the criterion and the architecture with fairseq, and lets its checkpoints be read."""

import argparse
import os
import pickle
from functools import wraps
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils

from .criterions import soft_beam  # noqa: F401
from .models import topk_attention, topk_attention_transformer  # noqa: F401


def _allow_checkpoint_classes() -> None:
    """Names the harmless classes in fairseq's checkpoints to ``torch.load(weights_only=True)``.

    Without them fairseq-fixed cannot read a checkpoint of stock ``lstm`` back (``argparse.Namespace``),
    nor one that ``--eval-bleu`` has written (numpy scalars).
    """
    multiarray = getattr(np, "_core", None) or np.core
    torch.serialization.add_safe_globals(
        [
            argparse.Namespace,
            np.ndarray,
            np.dtype,
            type(np.dtype("int64")),
            type(np.dtype("float64")),
            multiarray.multiarray._reconstruct,
            multiarray.multiarray.scalar,
        ]
    )


def _read_weights_only() -> None:
    """Makes PyTorch before 2.6 read files without running what they ask it to run, as later ones do by default.

    It does so for the whole process, and for callers that ask otherwise;
    ``TORCH_FORCE_WEIGHTS_ONLY_LOAD=0`` in the environment leaves it as it was.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")


def _name_broken_checkpoints() -> None:
    """Gives a message to what PyTorch raises at an empty file or at text, such as an ``EOFError`` without any.

    A run that is killed while it copies a checkpoint leaves an empty file.
    """
    read = checkpoint_utils.load_checkpoint_to_cpu

    @wraps(read)
    def naming(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return read(path, *args, **kwargs)
        except (OSError, RuntimeError, pickle.UnpicklingError):
            raise  # they say what they are
        except Exception as error:
            raise pickle.UnpicklingError(f"{path} is not a checkpoint, or was cut off: {error!r}") from error

    checkpoint_utils.load_checkpoint_to_cpu = naming


_allow_checkpoint_classes()
_read_weights_only()
_name_broken_checkpoints()
