"""Differentiable top-k by optimal transport, and what fairseq can do with it.

``fairseq_softtopk.ops`` needs only PyTorch.  Named as ``--user-dir`` of a fairseq command, the package
registers the criterion ``soft_beam`` (alias ``soft_beam_search``) and the architectures ``topk_attention``
and ``topk_attention_transformer``.
In a program of your own, ``import fairseq_softtopk.plugin`` does the same.
"""

import os
import sys
from importlib.util import find_spec

__version__ = "0.1.0"


def _accept_as_user_dir() -> None:
    """Lets ``--user-dir fairseq_softtopk`` find the package although it is imported already.

    fairseq compares the folder beside its own, in the spelling that it uses, with ``__path__``.
    """
    fairseq = find_spec("fairseq")
    if fairseq is not None and fairseq.origin is not None:
        __path__.append(os.path.join(os.path.dirname(fairseq.origin), "..", __name__))


_accept_as_user_dir()
if "fairseq" in sys.modules:
    from . import plugin  # noqa: F401
