"""The model written once more, with loops over rows, layers, heads and tokens, in float64. Shares no code with the package."""

import math

import torch


def root_mean_square(x):
    return x / torch.sqrt((x * x).sum() / len(x) + 1e-6)


def layer_norm(x, gain, bias):
    centred = x - x.sum() / len(x)
    return gain * centred / torch.sqrt((centred * centred).sum() / len(x) + 1e-5) + bias


def reference(weights, options, switches, inputs, targets):
    """The mean loss of rows of tokens. weights: by the names of the package's table."""
    losses = []
    for row, wanted in zip(inputs.tolist(), targets.tolist()):
        logits = logits_of(weights, options, switches, row)
        for scores, target in zip(logits, wanted):
            losses.append(torch.logsumexp(scores, 0) - scores[target])
    return sum(losses) / len(losses)


def logits_of(w, options, switches, tokens):
    block = switches.block

    def norm(x, name, layer=None):
        if block.norm == "rms":
            return root_mean_square(x)
        gain, bias = w[f"{name}_gain"], w[f"{name}_bias"]
        return layer_norm(x, *((gain, bias) if layer is None else (gain[layer], bias[layer])))

    def linear(x, name, layer):
        y = w[name][layer] @ x
        return y + w[f"{name}_bias"][layer] if block.biases else y

    stream = [w["token_embedding"][t] for t in tokens]
    if switches.rotary.positions == "learned":
        stream = [x + w["position_embedding"][i] for i, x in enumerate(stream)]
    for layer in range(options.layers):
        normed = [norm(x, "attention_norm", layer) for x in stream]
        qkv = [linear(x, "attention_qkv", layer) for x in normed]
        mixed = attention(qkv, options.heads, switches)
        stream = [x + linear(y, "attention_out", layer) for x, y in zip(stream, mixed)]
        for i, x in enumerate(stream):
            hidden = linear(norm(x, "mlp_norm", layer), "mlp_up", layer)
            stream[i] = x + linear(bend(hidden, block.activation), "mlp_down", layer)
    head = w["token_embedding"] if switches.head.tied == "tied" else w["head"].T
    return [bounded(head @ norm(x, "final_norm"), switches.head.cap) for x in stream]


def bounded(z, cap):
    if cap == "none":
        return z
    if cap == "sigmoid30":
        return 30 / (1 + torch.exp(-z / 7.5))
    if cap == "sigmoid23":
        return 23 / (1 + torch.exp(-(z + 5) / 7.5))
    bound = {"tanh30": 30, "tanh15": 15}[cap]
    up, down = torch.exp(z / bound), torch.exp(-z / bound)
    return bound * (up - down) / (up + down)


def bend(z, kind):
    if kind == "relu2":
        return torch.where(z > 0, z * z, torch.zeros_like(z))
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def angle_of(position, pair, half, rotary):
    """Radians by which one of `half` pairs is turned at a position."""
    if rotary.positions == "rotary":
        return position * rotary.base ** (-pair / half)
    slowest = half // 2 - 1
    return position * rotary.base ** (-pair / slowest) if pair <= slowest else 0.0


def turned(x, position, rotary):
    """A query or key with its pairs turned one by one."""
    if rotary.positions == "learned":
        return x
    half = len(x) // 2
    out = x.clone()
    for j in range(half):
        angle = angle_of(position, j, half, rotary)
        a, b = (j, j + half) if rotary.pairs == "halves" else (2 * j, 2 * j + 1)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
    return out


def attention(qkv, heads, switches):
    """Of every token its queries, keys and values, end to end; gives what its heads gather, end to end."""
    width = len(qkv[0]) // 3
    size = width // heads
    out = []
    for now in range(len(qkv)):
        gathered = []
        for head in range(heads):
            here = slice(head * size, (head + 1) * size)
            q = qkv[now][:width][here]
            keys = [past[width : 2 * width][here] for past in qkv[: now + 1]]
            if switches.block.qk_norm:
                q, keys = root_mean_square(q), [root_mean_square(k) for k in keys]
            q = turned(q, now, switches.rotary)
            keys = [turned(k, then, switches.rotary) for then, k in enumerate(keys)]
            scores = torch.stack([q @ k for k in keys]) / math.sqrt(size)
            shares = torch.exp(scores - scores.max())
            shares = shares / shares.sum()
            values = [past[2 * width :][here] for past in qkv[: now + 1]]
            gathered.append(sum(share * v for share, v in zip(shares, values)))
        out.append(torch.cat(gathered))
    return out
