"""The kinds of scores on which every operator must hold its marginals."""

import torch

KINDS = ["normal", "uniform", "lprobs", "ties", "constant", "outlier"]


def make_scores(kind: str, batch: int, n: int) -> torch.Tensor:
    """Float32 scores (batch, n) of a kind."""
    normal = torch.randn(batch, n)
    return {
        "normal": normal * 3,
        "uniform": torch.rand(batch, n),
        "lprobs": normal.mul(3).log_softmax(-1),
        "ties": torch.randint(0, 4, (batch, n)).float(),
        "constant": torch.full((batch, n), -1e3),
        "outlier": torch.cat([torch.full((batch, 1), 1e20), normal[:, 1:]], dim=1),
    }[kind]
