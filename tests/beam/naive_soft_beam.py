"""The paper's Algorithm 2 written as nested loops over one sentence.

Everything is done the slow way: full vocabulary, one hypothesis at a time, the plan by thousands of plain
Sinkhorn steps that autograd runs back through.  The decoders are in ``naive_decoders.py``.
"""

import torch


def plain_plan(scores, k, epsilon, steps=1500):
    """n x k sorted soft top-k of un-scaled costs, by log-domain Sinkhorn."""
    n = len(scores)
    log_kernel = -((scores[:, None] - torch.arange(k, -1, -1)) ** 2) / epsilon
    log_mass = torch.tensor([1.0] * k + [n - k], dtype=scores.dtype).log()
    zeta = torch.zeros(k + 1, dtype=scores.dtype)
    for _ in range(steps):
        rows = log_kernel + zeta
        zeta = zeta + log_mass - (rows - rows.logsumexp(1, keepdim=True)).logsumexp(0)
    return torch.softmax(log_kernel + zeta, dim=1)[:, :k]


def soft_beam_loss(decoder, gold, k, epsilon, pad, bos, eos, eos_weight, smoothing):
    """Minus the gold's log-probability on the best path, for one un-padded sentence.

    ``decoder`` has a ``table`` of embeddings, a ``start`` state (a list of tensors), and a ``step`` of one
    hypothesis: embedding (E,), state -> log-probabilities (V,), state.
    """
    table = decoder.table
    beams = [(table[eos], decoder.start, 0.0, 0.0)]  # embedding, state, score s, gold log-probability so far
    for step, token in enumerate(gold):
        last = step + 1 == len(gold)
        candidates, outputs = [], []
        for i, (embedding, state, score, gold_so_far) in enumerate(beams):
            lprobs, new_state = decoder.step(embedding, state)
            smooth = torch.full_like(lprobs, smoothing / (len(lprobs) - 1))
            smooth[token] = 1 - smoothing
            gained = (eos_weight if last else 1.0) * (smooth * lprobs).sum()
            outputs.append((lprobs, new_state, gold_so_far + gained))
            for j in range(len(lprobs)):
                if j not in (pad, bos) and (j != eos or last):
                    candidates.append((score + lprobs[j], i, j))
        scores = torch.stack([score for score, _, _ in candidates])
        if last:
            return -outputs[candidates[int(scores.argmax())][1]][2]
        plan = plain_plan(scores, k, epsilon)
        beams = []
        for rank in range(k):
            weight = plan[:, rank]
            embedding = sum(w * table[j] for w, (_, _, j) in zip(weight, candidates, strict=True))
            state = [
                sum(w * outputs[i][1][part] for w, (_, i, _) in zip(weight, candidates, strict=True))
                for part in range(len(new_state))
            ]
            score, i, _ = candidates[int(weight.argmax())]
            beams.append((embedding, state, score, outputs[i][2]))
    raise AssertionError("a sentence has at least its eos")
