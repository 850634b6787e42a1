"""One step of one hypothesis of one un-padded sentence, written out for each family of decoders."""

import torch


class NaiveLSTM:
    """State: the hidden vector of every layer, the cell of every layer, and the input feed."""

    def __init__(self, model, source_tokens):
        decoder = self.decoder = model.decoder
        self.table = decoder.embed_tokens.weight
        self.source, hiddens, cells, _ = model.encoder(source_tokens[None], torch.tensor([len(source_tokens)]))
        hiddens, cells = hiddens[:, 0], cells[:, 0]
        if decoder.encoder_hidden_proj is not None:
            hiddens, cells = decoder.encoder_hidden_proj(hiddens), decoder.encoder_cell_proj(cells)
        self.start = [*hiddens, *cells, hiddens.new_zeros(decoder.hidden_size)]

    def step(self, embedding, state):
        decoder, num_layers = self.decoder, len(self.decoder.layers)
        hiddens, cells, feed = state[:num_layers], state[num_layers:-1], state[-1]
        x = torch.cat([embedding, feed])[None]
        new_hiddens, new_cells = [], []
        for rnn, old_hidden, old_cell in zip(decoder.layers, hiddens, cells, strict=True):
            x, cell = rnn(x, (old_hidden[None], old_cell[None]))
            new_hiddens.append(x[0])
            new_cells.append(cell[0])
        if decoder.attention is not None:
            x, _ = decoder.attention(x, self.source, None)
        features = decoder.additional_fc(x) if hasattr(decoder, "additional_fc") else x
        return decoder.output_layer(features)[0].log_softmax(0), [*new_hiddens, *new_cells, x[0]]


class NaiveTransformer:
    """State: the keys (length, C) of every layer, then the values; post-norm, sinusoidal positions."""

    def __init__(self, model, source_tokens):
        self.decoder = model.decoder
        self.table = self.decoder.embed_tokens.weight
        encoder_out = model.encoder(source_tokens[None], torch.tensor([len(source_tokens)]))
        self.source = encoder_out["encoder_out"][0][:, 0]  # (srclen, C)
        self.start = [self.source.new_zeros(0, self.source.size(1))] * (2 * len(self.decoder.layers))

    def step(self, embedding, state):
        decoder, num_layers, length = self.decoder, len(self.decoder.layers), len(state[0])
        position = decoder.embed_positions.weights[decoder.padding_idx + 1 + length]
        x = len(embedding) ** 0.5 * embedding + position
        all_keys, all_values = [], []
        for layer, keys, values in zip(decoder.layers, state[:num_layers], state[num_layers:], strict=True):
            attention = layer.self_attn
            keys = torch.cat([keys, attention.k_proj(x)[None]])
            values = torch.cat([values, attention.v_proj(x)[None]])
            x = layer.self_attn_layer_norm(x + attend(attention, x, keys, values))
            attention = layer.encoder_attn
            keys_of_source, values_of_source = attention.k_proj(self.source), attention.v_proj(self.source)
            x = layer.encoder_attn_layer_norm(x + attend(attention, x, keys_of_source, values_of_source))
            x = layer.final_layer_norm(x + layer.fc2(layer.fc1(x).relu()))
            all_keys.append(keys)
            all_values.append(values)
        return decoder.output_projection(x).log_softmax(0), [*all_keys, *all_values]


def attend(attention, x, keys, values):
    """Multi-head attention of x (C,) to keys and values (length, C), one head after the other."""
    query, size = attention.q_proj(x), len(x) // attention.num_heads
    heads = []
    for begin in range(0, len(x), size):
        head = slice(begin, begin + size)
        weights = (keys[:, head] @ query[head] / size**0.5).softmax(0)
        heads.append(weights @ values[:, head])
    return attention.out_proj(torch.cat(heads))
