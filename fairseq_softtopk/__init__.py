"""Differentiable top-k by optimal transport, and what fairseq can do with it.

``fairseq_softtopk.ops`` needs only PyTorch.  Named as ``--user-dir`` of a fairseq command, the package
registers the criterion ``soft_beam`` (alias ``soft_beam_search``) and the architecture ``topk_attention``.
"""

import sys

__version__ = "0.1.0"

if "fairseq" in sys.modules:
    from . import plugin  # noqa: F401
