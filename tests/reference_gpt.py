"""The model written once more, with loops over rows, layers, heads and tokens, in float64. Shares no code with the package."""

import math

import torch


def root_mean_square(x):
    return x / torch.sqrt((x * x).sum() / len(x) + 1e-6)


def layer_norm(x, gain, bias):
    centred = x - x.sum() / len(x)
    return gain * centred / torch.sqrt((centred * centred).sum() / len(x) + 1e-5) + bias


def reference(weights, config, inputs, targets):
    """The mean loss of rows of tokens. weights: by the names of the package's table."""
    losses = []
    for row, wanted in zip(inputs.tolist(), targets.tolist()):
        logits = logits_of(weights, config, row)
        for scores, target in zip(logits, wanted):
            losses.append(torch.logsumexp(scores, 0) - scores[target])
    return sum(losses) / len(losses)


def logits_of(w, config, tokens):
    block = config.block

    def norm(x, name, layer=None):
        if block.norm == "rms":
            return root_mean_square(x)
        gain, bias = w[f"{name}_gain"], w[f"{name}_bias"]
        return layer_norm(x, *((gain, bias) if layer is None else (gain[layer], bias[layer])))

    def linear(x, name, layer):
        y = w[name][layer] @ x
        return y + w[f"{name}_bias"][layer] if block.biases else y

    last = config.num_layers - 1
    no_attn = {"attn": last // 2 + 1 + last % 2, "both": last // 2 + 1 + last % 2}.get(
        config.layout.skip_sublayers, -1
    )
    no_mlp = 0 if config.layout.skip_sublayers in ("mlp", "both") else -1
    rank = {"attention": lambda n: n - (n > no_attn >= 0), "mlp": lambda n: n - (n > no_mlp >= 0)}
    stream = begun(w, config, tokens)
    start, outputs, first = list(stream), [], None
    for layer in range(config.num_layers):
        stream = entering(w, config.layout, config.num_layers, layer, stream, start, outputs)
        if layer != no_attn:
            at = rank["attention"](layer)
            normed = [norm(x, "attention_norm", at) for x in stream]
            qkv = [linear(x, "attention_qkv", at) for x in normed]
            wide = 2 * config.model_dim
            first = [x[wide:] for x in qkv] if first is None else first
            for i, x in enumerate(qkv):
                v = values(w, config, layer, no_attn, x[wide:], first[i], normed[i], tokens[i])
                qkv[i] = torch.cat([x[:wide], v])
            mixed = attention(qkv, config.num_heads, config)
            stream = [x + linear(y, "attention_out", at) for x, y in zip(stream, mixed)]
        for i, x in enumerate(stream):
            if layer != no_mlp:
                at = rank["mlp"](layer)
                hidden = linear(norm(x, "mlp_norm", at), "mlp_up", at)
                stream[i] = x + linear(bend(hidden, block.activation), "mlp_down", at)
        outputs.append(list(stream))
    if config.layout.backout:
        middle = {2: 0, 3: 1, 4: 2, 5: 3, 6: 4, 7: 4, 8: 5}[config.num_layers]
        stream = [x - w["backout_lambda"][0] * y for x, y in zip(stream, outputs[middle])]
    head = w["embed"] if config.head.tie == "tied" else w["lm_head"].T
    return [bounded(head @ norm(x, "final_norm"), config.head.softcap) for x in stream]


def logistic(z):
    return 1 / (1 + torch.exp(-z))


def begun(w, config, tokens):
    """The vectors with which the first layer begins."""
    lookup_value_embeds = [w["embed"][t] for t in tokens]
    stream = list(lookup_value_embeds)
    if config.embedding.smear:
        for i in range(1, len(tokens)):
            share = w["smear_lambda"][0] * logistic(
                (w["smear_gate"] * lookup_value_embeds[i][:12]).sum()
            )
            stream[i] = lookup_value_embeds[i] + share * lookup_value_embeds[i - 1]
    if config.rotary.pos == "learned":
        stream = [x + w["pos_embed"][i] for i, x in enumerate(stream)]
    return [root_mean_square(x) for x in stream] if config.embedding.norm else stream


def entering(w, layout, layers, layer, stream, start, outputs):
    """What a layer gets: skips first, then the beginning."""
    mirror = layers - 1 - layer
    if layout.skips in ("single", "single_gated"):  # 4 to 7 in twelve layers, 3 to 6 in eleven
        mirror = {2: {1: 0}, 4: {3: 1}, 8: {5: 2}, 11: {6: 3}, 12: {7: 4}}[layers].get(
            layer, layers
        )
    if layout.skips != "none" and mirror < layer:
        late = (
            [n for n in range(layers) if layers - 1 - n < n]
            if layout.skips in ("unet", "unet_sigmoid")
            else [layer]
        )
        weight = w["skip_lambdas"][late.index(layer)]
        if layout.skips != "unet":
            weight = logistic(weight)
        found = []
        for x, x0, y in zip(stream, start, outputs[mirror]):
            gate = (
                2 * logistic((w["skip_gate"][0] * x0[:12]).sum())
                if layout.skips == "single_gated"
                else 1
            )
            found.append(x + weight * gate * y)
        stream = found
    if layout.x0:
        a, b = w["resid_lambdas"][layer], w["x0_lambdas"][layer]
        stream = [a * x + b * x0 for x, x0 in zip(stream, start)]
    return stream


def table_of_layer(kind, layers, layer):
    """Which table, or "first", or None."""
    ends = {1: (0, 1), 2: (1, 1), 3: (1, 2), 4: (2, 2)}.get(layers, (2, 3))
    outer = min(3, layers // 2)
    if kind == "first":
        return "first" if layer else None
    if kind == "all":
        return layer
    if kind == "mirror":
        return layer if layer < layers / 2 else layers - 1 - layer
    if kind == "outer":
        return (
            layer
            if layer < outer
            else layer - (layers - outer)
            if layer >= layers - outer
            else None
        )
    if kind == "ends":
        return (
            layer
            if layer < ends[0]
            else layer - (layers - ends[1]) + ends[0]
            if layer >= layers - ends[1]
            else None
        )
    return None


def values(w, config, layer, no_attn, own, first, normed, token):
    """A token's values in a layer: its own, end to end, and what is mixed in."""
    embedding = config.embedding
    wanted = [
        None if n == no_attn else table_of_layer(embedding.values, config.num_layers, n)
        for n in range(config.num_layers)
    ]
    if wanted[layer] is None:
        return own
    used = sorted({n for n in wanted if isinstance(n, int)})
    if wanted[layer] == "first":
        other = first
    else:
        words = len(w["value_embeds"]) // len(used)
        other = w["value_embeds"][used.index(wanted[layer]) * words + token]
    at = [n for n in range(config.num_layers) if wanted[n] is not None].index(layer)
    if embedding.value_residual == "gate":
        size = len(own) // config.num_heads
        gates = [2 * logistic((row * normed[:12]).sum()) for row in w["ve_gate"][at]]
        return torch.cat(
            [
                own[h * size : (h + 1) * size] + g * other[h * size : (h + 1) * size]
                for h, g in enumerate(gates)
            ]
        )
    if embedding.value_residual == "lambdas":
        return w["ve_lambdas"][at][0] * own + w["ve_lambdas"][at][1] * other
    return (1 - w["ve_lambdas"][at]) * own + w["ve_lambdas"][at] * other


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
    if rotary.pos == "rope":
        return position * rotary.base ** (-pair / half)
    slowest = half // 2 - 1
    return position * rotary.base ** (-pair / slowest) if pair <= slowest else 0.0


def turned(x, position, rotary):
    """A query or key with its pairs turned one by one."""
    if rotary.pos == "learned":
        return x
    half = len(x) // 2
    out = x.clone()
    for j in range(half):
        angle = angle_of(position, j, half, rotary)
        a, b = (j, j + half) if not rotary.interleaved else (2 * j, 2 * j + 1)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
    return out


def attention(qkv, heads, config):
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
            if config.block.qk_norm:
                q, keys = root_mean_square(q), [root_mean_square(k) for k in keys]
            q = turned(q, now, config.rotary)
            keys = [turned(k, then, config.rotary) for then, k in enumerate(keys)]
            scores = torch.stack([q @ k for k in keys]) / math.sqrt(size)
            shares = torch.exp(scores - scores.max())
            shares = shares / shares.sum()
            values = [past[2 * width :][here] for past in qkv[: now + 1]]
            gathered.append(sum(share * v for share, v in zip(shares, values)))
        out.append(torch.cat(gathered))
    return out
