"""The paper's Algorithm 2 written as nested loops over one sentence, for fairseq's LSTM.

Everything is done the slow way: full vocabulary, one hypothesis at a time, the plan by thousands of plain
Sinkhorn steps that autograd runs back through.
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


def decoder_step(decoder, embedding, state, source):
    """One step of one hypothesis: (E,), (hiddens, cells, feed) -> log-probabilities (V,), new state."""
    hiddens, cells, feed = state
    x = torch.cat([embedding, feed])[None]
    new_hiddens, new_cells = [], []
    for layer, rnn in enumerate(decoder.layers):
        hidden, cell = rnn(x, (hiddens[layer][None], cells[layer][None]))
        new_hiddens.append(hidden[0])
        new_cells.append(cell[0])
        x = hidden
    if decoder.attention is not None:
        x, _ = decoder.attention(x, source, None)
    features = decoder.additional_fc(x) if hasattr(decoder, "additional_fc") else x
    return decoder.output_layer(features)[0].log_softmax(0), (new_hiddens, new_cells, x[0])


def soft_beam_loss(model, source_tokens, gold, k, epsilon, pad, bos, eos, eos_weight, smoothing):
    """Minus the gold's log-probability on the best path, for one un-padded sentence."""
    decoder, table = model.decoder, model.decoder.embed_tokens.weight
    source, hiddens, cells, _ = model.encoder(source_tokens[None], torch.tensor([len(source_tokens)]))
    hiddens, cells = hiddens[:, 0], cells[:, 0]
    if decoder.encoder_hidden_proj is not None:
        hiddens, cells = decoder.encoder_hidden_proj(hiddens), decoder.encoder_cell_proj(cells)
    start = (list(hiddens), list(cells), hiddens.new_zeros(decoder.hidden_size))

    beams = [(table[eos], start, 0.0, 0.0)]  # embedding, state, score s, gold log-probability so far
    for step, token in enumerate(gold):
        last = step + 1 == len(gold)
        candidates, outputs = [], []
        for i, (embedding, state, score, gold_so_far) in enumerate(beams):
            lprobs, new_state = decoder_step(decoder, embedding, state, source)
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
            state = tuple(
                [
                    sum(w * outputs[i][1][part][layer] for w, (_, i, _) in zip(weight, candidates, strict=True))
                    for layer in range(len(decoder.layers))
                ]
                for part in (0, 1)
            )
            feed = sum(w * outputs[i][1][2] for w, (_, i, _) in zip(weight, candidates, strict=True))
            score, i, _ = candidates[int(weight.argmax())]
            beams.append((embedding, (*state, feed), score, outputs[i][2]))
    raise AssertionError("a sentence has at least its eos")
