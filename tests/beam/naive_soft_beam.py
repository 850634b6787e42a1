"""The paper's Algorithm 2 written as nested loops over one sentence.

Everything is done the slow way: full vocabulary, one hypothesis at a time, the plan by thousands of plain
Sinkhorn steps that autograd runs back through.  The decoders are in ``naive_decoders.py``.
"""

import math
from collections import Counter

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


def search(
    decoder,
    k,
    epsilon,
    steps,
    may_end,
    never,
    eos,
    num_candidates=None,
    backward_epsilon=None,
    detach="nothing",
    horizon=0,
):
    """The paper's Algorithm 2 for one un-padded sentence.

    ``decoder`` has a ``table`` of embeddings, a ``start`` state (a list of tensors), and a ``step`` of one
    hypothesis: embedding (E,), state -> log-probabilities (V,), state.

    Yields, for every step, the beams as (log-probabilities, new state, score s, path) and the candidates as
    (score, beam, token); a path is a list of (log-probabilities, token).
    """
    table = decoder.table
    beams = [(table[eos], decoder.start, torch.zeros(()), torch.zeros(()), [])]
    for step in range(steps):
        if horizon and step and step % horizon == 0:
            beams = [
                (embedding.detach(), [part.detach() for part in state], score, seen.detach(), path)
                for embedding, state, score, seen, path in beams
            ]
        outputs = [(*decoder.step(beam[0], beam[1]), beam[2], beam[4]) for beam in beams]
        allowed = [
            j for j in range(len(table)) if j not in never and (j != eos or (may_end and step + 1 == steps))
        ]
        candidates = [(out[2] + out[0][j], i, j) for i, out in enumerate(outputs) for j in allowed]
        candidates = sorted(candidates, key=lambda candidate: -candidate[0])[:num_candidates]
        yield outputs, candidates
        seen = torch.stack([beams[i][3] + outputs[i][0][j] for _, i, j in candidates])
        plan = plain_plan(seen, k, epsilon)
        if backward_epsilon is not None:
            softer = plain_plan(seen, k, backward_epsilon)
            plan = softer + (plan - softer).detach()
        beams = []
        for weight in plan.T:
            word_weight = weight.detach() if detach == "embeddings" else weight
            embedding = sum(w * table[j] for w, (_, _, j) in zip(word_weight, candidates, strict=True))
            state = [
                sum(w * outputs[i][1][part] for w, (_, i, _) in zip(weight, candidates, strict=True))
                for part in range(len(outputs[0][1]))
            ]
            best = int(weight.argmax())
            score, i, j = candidates[best]
            path = [*outputs[i][3], (outputs[i][0], j)]
            beams.append((embedding, state, score, score.detach() if detach == "scores" else seen[best], path))


def gold_loss(decoder, gold, k, epsilon, never, eos, eos_weight, smoothing, steps, **gradient):
    """Minus the gold's log-probability on the best path."""
    *_, (outputs, candidates) = search(decoder, k, epsilon, steps, steps == len(gold), never, eos, **gradient)
    at_end, _, _, path = outputs[max(candidates, key=lambda candidate: candidate[0])[1]]
    loss = 0.0
    for step, lprobs in enumerate([*(lprobs for lprobs, _ in path), at_end]):
        smooth = torch.full_like(lprobs, smoothing / (len(lprobs) - 1))
        smooth[gold[step]] = 1 - smoothing
        loss -= (eos_weight if step + 1 == len(gold) else 1.0) * (smooth * lprobs).sum()
    return loss


def bleu(hypothesis, reference):
    """BLEU+1 of two lists."""
    if not hypothesis:
        return float(not reference)
    logs = []
    for n in range(1, 5):
        ours, theirs = (
            Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
            for text in (hypothesis, reference)
        )
        matches, total = sum((ours & theirs).values()), max(len(hypothesis) - n + 1, 0)
        if n == 1 and matches == 0:
            return 0.0
        logs.append(math.log(matches / total if n == 1 else (matches + 1) / (total + 1)))
    return math.exp(sum(logs) / 4 + min(0.0, 1 - len(reference) / len(hypothesis)))


def risk(decoder, gold, k, epsilon, never, eos, hypotheses, temperature, steps, words=list, **gradient):
    """The expected 1 - BLEU of the best distinct hypotheses, any beam at any step, times the length.

    ``words`` makes words of a list of tokens.
    """
    finished = []
    for step, (outputs, _) in enumerate(search(decoder, k, epsilon, steps, False, never, eos, **gradient)):
        for lprobs, _, score, path in outputs:
            finished.append(((score + lprobs[eos]) / (step + 1), [token for _, token in path]))
    best = []
    for score, tokens in sorted(finished, key=lambda hypothesis: -hypothesis[0])[: 2 * hypotheses]:
        if tokens not in [others for _, others in best]:
            best.append((score, tokens))
    best = best[:hypotheses]
    probabilities = torch.softmax(torch.stack([score for score, _ in best]) / temperature, dim=0)
    costs = [1 - bleu(words(tokens), words(gold[:-1].tolist())) for _, tokens in best]
    return len(gold) * sum(p * cost for p, cost in zip(probabilities, costs, strict=True))
