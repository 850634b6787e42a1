"""Registers the criterion and the architecture with fairseq, and lets its checkpoints be read."""

import argparse
import os

import fairseq
import numpy as np
import torch

import fairseq_softtopk

from .criterions import soft_beam  # noqa: F401
from .models import topk_attention  # noqa: F401


def _accept_as_user_dir() -> None:
    """Lets ``--user-dir fairseq_softtopk`` find the package although it is imported already.

    fairseq compares the folder that it looked the name up in with ``__path__``, as strings.
    """
    beside_fairseq = os.path.join(os.path.dirname(fairseq.__file__), "..", fairseq_softtopk.__name__)
    if beside_fairseq not in fairseq_softtopk.__path__:
        fairseq_softtopk.__path__.append(beside_fairseq)


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
            np.dtypes.Int64DType,
            np.dtypes.Float64DType,
            multiarray.multiarray._reconstruct,
            multiarray.multiarray.scalar,
        ]
    )


_accept_as_user_dir()
_allow_checkpoint_classes()
