"""Registers the criterion and the architectures with fairseq, and mends what would go wrong in silence."""

import argparse
import logging
import os
import pickle
import sys
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils

from .criterions import soft_beam  # noqa: F401
from .models import topk_attention, topk_attention_transformer  # noqa: F401

logger = logging.getLogger(__name__)


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


def _warn_of_dropped_sentences(argv: list[str]) -> None:
    """Says so if fairseq is about to leave the last sentences of a data set out.

    After its version 0.12.2 it does, also where it validates or translates: the last batch of a data set, if
    its size is no multiple of ``--required-batch-size-multiple``, which is 8 by default.
    """
    program, *options = argv or [""]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--required-batch-size-multiple", nargs="?", default="8")
    parser.add_argument("--user-dir", nargs="?")
    given, _ = parser.parse_known_args(options)
    command = Path(program).stem.removeprefix("fairseq-")
    if command not in ("train", "validate", "generate") or given.user_dir is None:
        return  # a program of the user's own, or Hydra, whose options are not all in argv
    if given.required_batch_size_multiple == "1":
        return
    one = np.zeros(1, np.int64)
    if not data_utils.batch_by_size(one, None, one, required_batch_size_multiple=2):
        logger.warning(
            "this version of fairseq leaves the last sentences of a data set out, without a word, unless it is "
            "given --required-batch-size-multiple 1"
        )


_allow_checkpoint_classes()
_read_weights_only()
_name_broken_checkpoints()
_warn_of_dropped_sentences(sys.argv)
