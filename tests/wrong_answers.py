"""Wrong answers to the exercises: (chapter, exercise) → (source, words that the check says). Executed after the solution, so that it can be used.

Each could be taken for right, and many passed an earlier form of the check.
"""

# fmt: off
WRONG = {
    ("00", 1): [
        ("half_life = lambda days, seconds: (days[-1] - days[0]) / math.log2(seconds[0] / seconds[-1])", "least-squares line"),
        ("""
def half_life(days, seconds):  # the regression of days on logarithms
    logs = [math.log2(second) for second in seconds]
    day, log = sum(days) / len(days), sum(logs) / len(logs)
    return -sum((x - day) * (y - log) for x, y in zip(days, logs)) / sum((y - log) ** 2 for y in logs)
""", "least-squares line"),
        ("truth = half_life; half_life = lambda days, seconds: -truth(days, seconds)", "halve in 10 days, not in -10"),
        ("truth = half_life; half_life = lambda days, seconds: truth(days, seconds) * math.log(2)", "halve in 10 days"),
    ],
    ("00", 2): [
        ("""
def share_by_area(ladder, gains):  # all to the first area
    shares = {}
    for row, gain in zip(ladder[1:], gains):
        area = row["technique_area"].split("+")[0]
        shares[area] = shares.get(area, 0.0) + gain / sum(gains)
    return shares
""", "half each"),
        ("""
def share_by_area(ladder, gains):  # all to each area, then divided by the sum
    shares = {}
    for row, gain in zip(ladder[1:], gains):
        for area in row["technique_area"].split("+"):
            shares[area] = shares.get(area, 0.0) + gain
    return {area: share / sum(shares.values()) for area, share in shares.items()}
""", "half each"),
        ("truth = share_by_area; share_by_area = lambda ladder, gains: truth([None, *ladder], gains)", "the first record has no gain"),
    ],
    ("01", 1): [
        ("z_rule = lambda s: (3.28 - s.mean) * math.sqrt(s.n) / s.sd > stats.t.ppf(0.99, s.n - 1)", "does not look at the sample's sd"),
        ("z_rule = lambda s: (3.28 - s.mean) * math.sqrt(s.n) / s.sd >= 0.004 / 0.0013", "sd 0.0026"),
        ("z_rule = lambda s: s.n >= 9", "the rule says"),
        ("implied_p = 2 * implied_p", "not 0.002"),
        ("implied_p = 1 - implied_p", "not 0.99"),
    ],
    ("01", 2): [
        ("wall = describe(float(run['train_time_ms']) / 1000 for run in runs)", "24 public runs"),
        ("wall = describe(float(run['train_time_ms']) for run in runs if run['folder'] == '2025-09-27_BF16CE')", "in seconds"),
        ("runs_for_time = runs_needed(0.5, wall.sd)", "takes 4 runs a side, not 5"),
        ("runs_for_time = runs_needed(0.05 * wall.mean, wall.sd)", "takes 4 runs a side"),
    ],
    ("02", 1): [
        ("truth = position_in_document; position_in_document = lambda tokens, document: truth(tokens, document) + 1", "not [1, 2, 3"),
        ("position_in_document = lambda tokens, document: np.arange(len(tokens))", "a 9 opens a document"),
        ("truth = position_in_document; position_in_document = lambda tokens, document: np.concatenate([[0], truth(tokens, document)[:-1]])", "positions in"),
    ],
    ("02", 2): [
        ("torn = lambda opens, lengths, seq_len: float((lengths > seq_len).mean())", "documents of [3, 3] tokens"),
        ("torn = lambda opens, lengths, seq_len: float((opens // seq_len != (opens + lengths) // seq_len).mean())", "are torn"),
        ("torn = lambda opens, lengths, seq_len: float((opens % seq_len != 0).mean())", "documents of [3, 3] tokens"),
        ("torn = lambda opens, lengths, seq_len: float(((opens + lengths - 1) // seq_len - opens // seq_len).mean())", "documents of [9, 3] tokens"),  # borders, not documents
    ],
    ("03", 1): [
        ("tokens_per_parameter = lambda tokens, parameters: parameters / tokens", "not 0.4"),
        ("tokens_per_parameter = lambda tokens, parameters: tokens // parameters", "2.5 a parameter, not 2"),
        ("tokens_per_parameter = lambda tokens, parameters: round(tokens / parameters, 1)", "0.125 a parameter, not 0.1"),
    ],
    ("03", 2): [
        ("attention_share = lambda o, v, n: 1 - flops_per_token(o, v, 0, False) / flops_per_token(o, v, n, False)", "causal"),
        ("attention_share = lambda o, v, n: flops_per_token(o, v, n) / flops_per_token(o, v, 0) - 1", "7.1%"),
        ("half_at = 4096", "half_at = 4096"),
        ("half_at = 13_000", "half_at = 13000"),
        ("truth = attention_share; attention_share = lambda o, v, n: 1 - truth(o, v, n)", "without a row"),
    ],
    ("04", 1): [
        ("smallest_square = lambda peak, size: math.ceil(size * peak.flops_s / peak.bytes_s)", "n is 30, not 20"),  # the result is written for nothing
        ("smallest_square = lambda peak, size: math.ceil(1.5 * peak.flops_s / peak.bytes_s)", "n is 30, not 15"),  # elements of one byte
        ("smallest_square = lambda peak, size: math.ceil(3 * size * peak.flops_s / peak.bytes_s)", "n is 30, not 60"),  # n³ FLOPs
        ("smallest_square = lambda peak, size: int(1.5 * size * peak.flops_s / peak.bytes_s) + 1", "n is 30, not 31"),
        ("smallest_square = lambda peak, size: int(1.5 * size * peak.flops_s / peak.bytes_s)", "n is 4, not 3"),
    ],
    ("04", 2): [
        ("idle_share = lambda spans: 1 - sum(end - begin for begin, end in spans) / (max(e for _, e in spans) - min(b for b, _ in spans))", "two streams at once"),
        ("idle_share = lambda spans: 1 - covered(spans) / max(end for _, end in spans)", "not in order, and not from 0"),
        ("""
def idle_share(spans):  # gaps between one kernel and the next by their begin
    spans = sorted(spans)
    gaps = sum(max(0.0, b[0] - a[1]) for a, b in zip(spans, spans[1:]))
    return gaps / (max(end for _, end in spans) - spans[0][0])
""", "a short kernel inside a long one"),
        ("truth = idle_share; idle_share = lambda spans: 1 - truth(spans)", "one after the other"),
    ],
    ("05", 1): [
        ("numbers_needed = lambda keys, share: max(1, math.ceil(math.log(keys * share / (1 - share)) ** 2))", "2 numbers, not 4"),
        ("truth = numbers_needed; numbers_needed = lambda keys, share: truth(keys, share) + 1", "49 numbers, not 50"),
        ("numbers_needed = lambda keys, share: max(1, round(math.log((keys - 1) * share / (1 - share)) ** 2))", "49 numbers, not 48"),
    ],
    ("05", 2): [
        ("rms_after = lambda kind, scale: activate(scale * torch.randn(1_000_000), kind).norm().item()", "root mean square of √1.5"),
        ("rms_after = lambda kind, scale: activate(scale * torch.randn(1_000_000), kind).std().item()", "√1.5 = 1.22, not 1.1"),
        ("rms_after = lambda kind, scale: activate(scale * torch.randn(1_000_000), kind).abs().mean().item()", "√1.5 = 1.22, not 0."),
        ("truth = rms_after; rms_after = lambda kind, scale: scale * truth(kind, 1.0)", "4 times"),
    ],
    ("06", 1): [
        ("truth = rotate_complex; rotate_complex = lambda x, positions, options: truth(x, torch.arange(x.shape[-2]), options)", "positions [5, 1, 8"),
        ("truth = rotate_complex; rotate_complex = lambda x, positions, options: truth(x, -positions, options)", "off by up to"),
        ("rotate_complex = lambda x, positions, options: apply_rotary(x, *[t[positions] for t in rotary_tables(9, 16, options)], 'halves')", "off by up to"),
        ("truth = rotate_complex; rotate_complex = lambda x, positions, options: truth(x, positions, FULL)", "HALF"),
    ],
    ("06", 2): [
        ("longest_period = lambda head_dim, options: 2 * math.pi / frequencies(head_dim, options).min().item() if options == FULL else math.inf", "not inf"),
        ("truth = longest_period; longest_period = lambda head_dim, options: truth(head_dim, options) / (2 * math.pi)", "6,434 tokens, not 1,024"),
        ("longest_period = lambda head_dim, options: 2 * math.pi / frequencies(head_dim, options).max().item()", "not 6"),
        ("truth = longest_period; longest_period = lambda head_dim, options: truth(head_dim, HALF)", "between 54,000"),
    ],
    ("07", 1): [
        ("head_hears = lambda layers: [1 + layers // 2] + [1] * layers", "the head hears"),
        ("truth = head_hears; head_hears = lambda layers: truth(layers)[::-1]", "the head hears"),
        ("head_hears = lambda layers: [1 + (layers + 1) // 2] + [1 + max(0, (layers + 1) // 2 - n) for n in range(layers)]", "5 layers"),
    ],
    ("07", 2): [
        ("weights_for = lambda column: column", "stays in the stream"),
        ("weights_for = lambda column: column.diff(prepend=torch.zeros(1, dtype=column.dtype))", "the layers hear"),
    ],
    ("08", 1): [
        ("least_loss = lambda top, vocab_size: math.log1p(vocab_size * math.exp(-top))", "all logits are equal"),
        ("least_loss = lambda top, vocab_size: math.log(vocab_size) * math.exp(-top)", "by your formula 10"),
        ("least_loss = lambda top, vocab_size: math.log(vocab_size) - top", "needs a top of 18"),
        ("least_loss = lambda top, vocab_size: math.log(vocab_size)", "by your formula None"),
    ],
    ("08", 2): [
        ("as_tanh = lambda top, shift, scale: (top / 2, shift, scale, top / 2)", "differ by up to"),
        ("as_tanh = lambda top, shift, scale: (top, shift, 2 * scale, 0.0)", "differ by up to"),
        ("as_tanh = lambda top, shift, scale: (top / 2, shift / 2, 2 * scale, top / 2)", "sigmoid23"),
    ],
    ("10", 1): [
        ("scale_that_keeps = lambda scale, old, new, product, head_dim: scale + math.log(new / old) / product", "ln p / (1 − p) was"),
        ("scale_that_keeps = lambda scale, old, new, product, head_dim: widened_scale(scale, old, new)", "ln p / (1 − p) was"),
        ("truth = scale_that_keeps; scale_that_keeps = lambda scale, old, new, product, head_dim: 2 * product / head_dim - truth(scale, old, new, product, head_dim)", "not the smaller solution"),
        ("truth = scale_that_keeps; scale_that_keeps = lambda scale, old, new, product, head_dim: min(truth(scale, old, new, product, head_dim), product / head_dim)", "inf, not 0.156"),
    ],
    ("10", 2): [
        ("smallest_window = lambda turning, pairs, fast=32.0: math.ceil(fast / turning.sort(descending=True).values[pairs - 1].item())", "1 pairs, 32 turns: a window of 32 keeps 0"),
        ("smallest_window = lambda turning, pairs, fast=32.0: math.ceil(2 * math.pi * fast / turning[pairs - 1].item())", "would do, too"),
        ("smallest_window = lambda turning, pairs, fast=32.0: math.ceil(2 * math.pi * fast / turning.sort(descending=True).values[pairs].item())", "would do, too"),
        ("truth = smallest_window; smallest_window = lambda turning, pairs, fast=32.0: truth(turning, pairs, fast) - 1", "keeps 0"),
    ],
    ("09", 1): [
        ("pairs_seen = lambda length, window: length * (window + 1)", "12 pairs, not 15"),
        ("pairs_seen = lambda length, window: length * (length + 1) // 2", "5 tokens, window 0"),
        ("truth = pairs_seen; pairs_seen = lambda length, window: truth(length, window - 1) if window else length", "5 tokens, window 2"),
        ("pairs_seen = lambda length, window: (window + 1) * (window + 2) // 2 + (length - window - 1) * (window + 1)", "3 tokens, window 7"),
    ],
    ("09", 2): [
        ("prefix_mask = lambda documents, begins_at, prefix: and_masks(document_mask(documents), causal)", "prefix 4"),
        ("prefix_mask = lambda documents, begins_at, prefix: and_masks(document_mask(documents), lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) | (kv_idx < prefix))", "of document 2"),
        ("prefix_mask = lambda documents, begins_at, prefix: lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) | (kv_idx - begins_at[kv_idx] < prefix)", "seen is False"),
        ("truth = prefix_mask; prefix_mask = lambda documents, begins_at, prefix: truth(documents, begins_at, prefix + 1)", "prefix 1"),
    ],
    ("11", 1): [
        ("tiles_needed = lambda borders, tokens, size: -(-tokens // size)", "7 are filled, not 5"),
        ("tiles_needed = lambda borders, tokens, size: sum(-(-(end - begin) // size) for begin, end in zip(borders, borders[1:]))", "7 are filled, not 5"),  # without the rest
        ("tiles_needed = lambda borders, tokens, size: -(-tokens // size) + len(borders)", "7 are filled, not 9"),  # the list's length
        ("tiles_needed = lambda borders, tokens, size: sum(max(1, -(-(end - begin) // size)) for begin, end in zip(borders, [*borders[1:], tokens]))", "7 are filled, not 8"),
        ("tiles_needed = lambda borders, tokens, size: sum((end - begin) // size + 1 for begin, end in zip(borders, [*borders[1:], tokens]) if end > begin)", "2 are filled, not 4"),
    ],
    ("11", 2): [
        ("lost_cosine = lambda scale, head_dim: max(-1.0, 1 - 24 * math.log(2) / (scale * head_dim))", "there still is a weight"),
        ("lost_cosine = lambda scale, head_dim: max(-1.0, 1 - 14 * math.log(2) / (scale * head_dim))", "there still is a weight"),  # the smallest normal number
        ("lost_cosine = lambda scale, head_dim: max(-1.0, -25 * math.log(2) / (scale * head_dim))", "the weight is zero, too"),  # without the bound
        ("lost_cosine = lambda scale, head_dim: 1 - 25 * math.log(2) / (scale * head_dim)", "no key of 128 numbers is lost"),
    ],
    ("12", 1): [
        ("iterations_needed = lambda coefficients, smallest, floor: math.ceil(math.log(floor / smallest) / math.log(coefficients[0]))", "8 iterations, not 6"),
        ("truth = iterations_needed; iterations_needed = lambda *arguments: truth(*arguments) + 1", "0 iterations, not 1"),
        ("truth = iterations_needed; iterations_needed = lambda coefficients, smallest, floor: truth(QUINTIC, smallest, floor)", "8 iterations"),
        ("truth = iterations_needed; iterations_needed = lambda coefficients, smallest, floor: truth((*coefficients[:2], 0.0), smallest, floor)", "1 iterations, not 3"),  # without the fifth power
    ],
    ("12", 2): [
        ("truth = steepest_by_rows; steepest_by_rows = lambda g: -truth(g)", "asks for"),
        ("steepest_by_rows = lambda g: -g / g.norm()", "asks for"),
        ("steepest_by_rows = lambda g: -g / g.norm(dim=-1, keepdim=True)", "nan"),
        ("steepest_by_rows = lambda g: -g / g.norm(dim=-1).max()", "asks for"),
    ],
    ("13", 1): [
        ("truth = quintics_needed; quintics_needed = lambda low, error: truth(low, error) + 1", "0 quintics, not 1"),
        ("""
def quintics_needed(low, error):  # as if the largest stayed at 1
    count, strays = 0, 1 - low
    while strays > error:
        *_, strays = best_quintic(low, 1.0)
        low, count = 1 - strays, count + 1
    return count
""", "quintics, not"),
        ("quintics_needed = lambda low, error: 5", "0 quintics, not 5"),
        ("""
def quintics_needed(low, error):  # with the record's margins
    sigma, count = np.geomspace(low, 1.0, 200_001), 0
    ends = sigma
    while np.abs(1 - ends).max() > error:
        count += 1
        ends = mapped(sigma, composed(low, count))
    return count
""", "0.12 of 1: 5 quintics, not 6"),
    ],
    ("13", 2): [
        ("truth = cautious_decay; cautious_decay = lambda w, u, decay: u + decay * w * (u * w < 0); at_rest.__globals__['cautious_decay'] = cautious_decay", "which weights does it spare"),
        ("cautious_decay = lambda w, u, decay: u + decay * w * (torch.rand(w.shape) < 0.5)", "which weights does it spare"),
        ("cautious_decay = lambda w, u, decay: u + decay / 2 * w", "which weights does it spare"),
        ("truth = at_rest; at_rest = lambda rate, decay, careful: truth(rate, decay, False)", "caution lets weights settle"),
        ("truth = at_rest; at_rest = lambda rate, decay, careful: truth(0.01, decay, careful)", "steps twice as long"),
        ("matching_decay = 0.005", "not at the plain decay's"),
        ("matching_decay = 0.0025", "not at the plain decay's"),
    ],
    ("14", 1): [
        ("best_batch = lambda noise_scale, fixed_ms, ms_per_token: noise_scale", "a search finds"),
        ("best_batch = lambda noise_scale, fixed_ms, ms_per_token: math.sqrt(noise_scale * ms_per_token / fixed_ms)", "a search finds"),
        ("truth = best_batch; costs = np.polyfit([*STEP_MS], [*STEP_MS.values()], 1); best_batch = lambda noise_scale, fixed_ms, ms_per_token: truth(noise_scale, costs[1], costs[0])", "2 times as large, not 1.00"),
        ("best_batch = lambda noise_scale, fixed_ms, ms_per_token: (noise_scale + fixed_ms / ms_per_token) / 2", "a search finds"),
    ],
    ("14", 2): [
        ("steps_to_pay = lambda lengths, cooldown: sum(lengths)", "7,000"),
        ("steps_to_pay = lambda lengths, cooldown: max(lengths)", "not 4,000"),
        ("steps_to_pay = lambda lengths, cooldown: (1 - cooldown) * lengths[-1] + cooldown * sum(lengths)", "in this order: 3,100"),
        ("steps_to_pay = lambda lengths, cooldown: max(lengths) + cooldown * sum(lengths)", "fall over 100%"),
    ],
    ("15", 1): [
        ("nearest_e4m3 = lambda value: max(-448.0, min(448.0, math.copysign(math.floor(abs(value) / 2.0 ** (max(math.frexp(value)[1] - 1, -6) - 3)) * 2.0 ** (max(math.frexp(value)[1] - 1, -6) - 3), value)))", "becomes"),  # truncated
        ("""
def nearest_e4m3(value):  # no subnormal numbers
    gap = 2.0 ** (math.frexp(value)[1] - 4)
    return max(-448.0, min(448.0, round(value / gap) * gap))
""", "becomes 0, not"),
        ("""
def nearest_e4m3(value):  # halves away from zero
    gap = 2.0 ** (max(math.frexp(value)[1] - 1, -6) - 3)
    return max(-448.0, min(448.0, math.copysign(math.floor(abs(value) / gap + 0.5) * gap, value)))
""", "becomes"),
        ("truth = nearest_e4m3; nearest_e4m3 = lambda value: truth(value) if abs(value) <= 448 else math.nan", "becomes 448, not nan"),
    ],
    ("15", 2): [
        ("late_scales = lambda largest, margin, start, exact: [start, *(margin * value / 448 for value in largest[:-1])]", "the first 1 exact"),
        ("late_scales = lambda largest, margin, start, exact: [margin * value / 448 for value in largest]", "not"),  # its own amax
        ("late_scales = lambda largest, margin, start, exact: [own / 448 if n < exact else (start if n == 0 else largest[n - 1] / 448) for n, own in enumerate(largest)]", "margin 1.5"),
        ("truth = late_scales; late_scales = lambda largest, margin, start, exact: [scale * (margin if n < exact else 1) for n, scale in enumerate(truth(largest, margin, start, exact))]", "the first 2 exact"),
    ],
    ("16", 1): [
        ("python_bound = lambda operators, us_each, gpu_ms: operators * us_each / 1000 + gpu_ms", "take 10 ms"),  # one after the other
        ("python_bound = lambda operators, us_each, gpu_ms: max(operators * us_each, gpu_ms)", "take 10 ms"),
        ("python_bound = lambda operators, us_each, gpu_ms: operators * us_each / 1000", "the GPU is the slower one"),
    ],
    ("16", 2): [
        ("""
def recordable_sgd(weights, grads, rate):  # the number is recorded
    told = [rate]
    return lambda: weights.sub_(told[0] * grads), lambda value: told.__setitem__(0, value)
""", "replayed at a rate of 0.5"),
        ("""
def recordable_sgd(weights, grads, rate):  # another tensor, which the tape does not know
    told = [torch.tensor(rate)]
    return lambda: weights.sub_(told[0] * grads), lambda value: told.__setitem__(0, torch.tensor(value))
""", "replayed at a rate of 0.5"),
        ("""
def recordable_sgd(weights, grads, rate):  # the gradient of now, and not of then
    stored, kept = torch.full((), rate), grads.clone()
    return lambda: weights.sub_(stored * kept), lambda value: stored.fill_(value)
""", "with gradients of 2"),
    ],
    ("17", 1): [
        ("bandwidth_ms = lambda read, written, tokens, bandwidth=4.8e12: 2 * (read + written) * tokens / bandwidth", "take a millisecond"),  # seconds
        ("bandwidth_ms = lambda read, written, tokens, bandwidth=4.8e12: 1000 * (read + written) * tokens / bandwidth", "take a millisecond"),  # numbers, not bytes
        ("bandwidth_ms = lambda read, written, tokens, bandwidth=4.8e12: 1000 * 4 * max(read, written) * tokens / bandwidth", "only reads"),
    ],
    ("17", 2): [
        ("norm_gradient = lambda grad, y, factor, unturn: unturn(grad) * factor[:, None]", "is off by"),  # the norm as a constant
        ("norm_gradient = lambda grad, y, factor, unturn: unturn((grad - (grad * y).sum(-1, keepdim=True) * y) * factor[:, None])", "is off by"),
        ("norm_gradient = lambda grad, y, factor, unturn: (grad - (grad * y).mean(-1, keepdim=True) * y) * factor[:, None]", "is off by"),  # not turned back
    ],
    ("18", 1): [
        ("kept_bytes = lambda tokens, width, hidden, version: tokens * {'plain': width + 2 * hidden, 'fused': width + hidden, 'fp8': width + hidden}[version] * (1 if version == 'fp8' else 2)", "the operator keeps"),
        ("kept_bytes = lambda tokens, width, hidden, version: tokens * {'plain': width + hidden, 'fused': width + hidden, 'fp8': width + 2 * hidden}[version] * (1 if version == 'fp8' else 2)", "of 36 numbers"),
        ("kept_bytes = lambda tokens, width, hidden, version: 2 * tokens * {'plain': width + 2 * hidden, 'fused': width + 2 * hidden, 'fp8': width / 2 + hidden}[version]", "without h"),
    ],
    ("18", 2): [
        ("clipped_steps = lambda largest, margin: sum(now >= margin * then for then, now in zip(largest, largest[1:]))", "exactly the margin"),
        ("clipped_steps = lambda largest, margin: sum(now > margin * max(largest[:n + 1]) for n, now in enumerate(largest[1:]))", "2 steps, not 1"),  # the largest so far
        ("clipped_steps = lambda largest, margin: sum(now > then for then, now in zip(largest, largest[1:]))", "2 steps, not 3"),
    ],
    ("19", 1): [
        ("expected_distinct = lambda counts, tokens: float(min(tokens, len(counts)))", "different words on average"),  # as if none came twice
        ("expected_distinct = lambda counts, tokens: float(len(counts) * (1 - (1 - 1 / len(counts)) ** tokens))", "different words on average"),  # all words alike
        ("expected_distinct = lambda counts, tokens: float((counts / counts.sum() * tokens).clip(0, 1).sum())", "different words on average"),
    ],
    ("19", 2): [
        ("largest_gain = lambda cap: 2.0 ** math.floor(math.log2(57_344 * 4))", "twice as much would fit"),  # the slope's maximum alone
        ("largest_gain = lambda cap: 2.0 ** math.ceil(math.log2(57_344 / max(math.exp(cap * n / 9999 - cap) * n / 9999 * (1 - n / 9999) for n in range(10_000))))", "is more than 57,344"),
    ],
    ("20", 1): [
        ("""
def makespan(jobs):  # gathers do not wait for sums that were begun before
    network = sums = gpu = 0.0
    for total, update, gather in jobs:
        sums += total
        gpu = max(gpu, sums) + update
        network = max(network, gpu) + gather
    return network
""", "waits for the second sum"),
        ("makespan = lambda jobs: sum(map(sum, jobs))", "all is over at 11, not 13"),
        ("""
def makespan(jobs):  # updates do not wait for each other
    network, arrived = 0.0, []
    for total, _, _ in jobs:
        network += total
        arrived.append(network)
    for ready, (_, update, gather) in zip(arrived, jobs):
        network = max(network, ready + update) + gather
    return network
""", "the worst 20"),
    ],
    ("20", 2): [
        ("worth_it = lambda width, world: 1.0", "its own number 8 more"),
        ("worth_it = lambda width, world: width * 2 / (width * 2 + 4)", "its own number 8 more"),
        ("worth_it = lambda width, world: width * 2 / (width * 2 + 8) * (world - 1) / world * 2 if world == 2 else width * 2 / (width * 2 + 8) * 7 / 8", "1,544 with its number"),
    ],
    ("21", 1): [
        ("truth = state_bytes; state_bytes = lambda table: truth(table) * 3 // 4", "not 2436"),
        ("truth = state_bytes; state_bytes = lambda table: truth([row for row in table if len(row.shape) > 1])", "3,248 bytes, not 3200"),
        ("state_bytes = lambda table: 16 * sum(sum(row.shape) for row in table)", "3,248 bytes"),
    ],
    ("21", 2): [
        ("count = lambda options, vocab_size: sum(math.prod(row.shape) for row in param_specs(options, vocab_size) if row.is_matmul)", "124,439,808 parameters, not 123,532,032"),
        ("count = lambda options, vocab_size: sum(math.prod(row.shape) for row in param_specs(options, 50_257))", "47 more rows"),
        ("truth = count; count = lambda options, vocab_size: truth(options, vocab_size) + (12 - options.num_heads)", "number of heads"),
    ],
    ("21", 3): [
        ("padding = lambda matrices, ranks: (ranks - matrices % ranks, (ranks - matrices % ranks) / (matrices + ranks - matrices % ranks))", "24 matrices on 8 ranks: 0 empty"),
        ("padding = lambda matrices, ranks: (-matrices % ranks, -matrices % ranks / matrices)", "of the bank with them"),
        ("padding = lambda matrices, ranks: (matrices % ranks, matrices % ranks / (matrices + matrices % ranks))", "not 6 and"),
        ("padding = lambda matrices, ranks: (-matrices % 8, -matrices % 8 / (matrices + -matrices % 8))", "20 matrices on 16 ranks: 12 empty"),
    ],
    ("22", 1): [
        ("truth = grid; grid = lambda config, changes: truth(config, dict(reversed(changes.items())))", "(rate, seed) should be"),
        ("grid = lambda config, changes: [vary(config, dict(zip(changes, values))) for values in zip(*changes.values())]", "(rate, seed) should be"),
        ("truth = grid; grid = lambda config, changes: truth(config, changes) if changes else []", "not 0 runs"),
    ],
    ("22", 2): [
        ("truth = difference; difference = lambda a, b: truth(b, a)", "layers and seed were changed"),
        ("truth = difference; difference = lambda a, b: dict([*truth(a, b).items()][:1])", "layers and seed were changed"),
        ("difference = lambda a, b: {name: (value, fields_of(b)[name]) for name, value in fields_of(a).items()}", "does not differ from itself"),
        ("difference = lambda a, b: {name: (value, fields_of(b)[name]) for name, value in fields_of(a).items() if value is not fields_of(b)[name]}", "read from its log"),
    ],
    ("23", 1): [
        ("truth = steady_ms; steady_ms = lambda steps_ms, skip: (min(steps_ms[skip:]), truth(steps_ms, skip)[1])", "without the first two is 2, not 1"),
        ("truth = steady_ms; steady_ms = lambda steps_ms, skip: (sorted(steps_ms[skip:])[1], truth(steps_ms, skip)[1])", "without the first two is 2, not 1"),
        ("truth = steady_ms; steady_ms = lambda steps_ms, skip: (truth(steps_ms, skip)[0], skip / len(steps_ms))", "20 of 26 ms"),
        ("truth = steady_ms; steady_ms = lambda steps_ms, skip: (sum(steps_ms) / len(steps_ms), truth(steps_ms, skip)[1])", "not 5.2"),
    ],
    ("23", 2): [
        ("shares = lambda micro_batches, ranks: [max(0, min(-(-micro_batches // ranks), micro_batches - -(-micro_batches // ranks) * n)) for n in range(ranks)]", "as evenly as possible: [2, 2, 1, 1, 1]"),
        ("shares = lambda micro_batches, ranks: [micro_batches // ranks] * (ranks - 1) + [micro_batches - micro_batches // ranks * (ranks - 1)]", "not [2, 2, 4]"),
        ("shares = lambda micro_batches, ranks: [micro_batches / ranks] * ranks", "8 micro-batches on 3 ranks"),
    ],
    ("24", 1): [
        ("""
def reached(curve, target):  # never at the first validation
    for a, b in zip(curve, curve[1:]):
        if b["val_loss"] <= target < a["val_loss"]:
            share = (a["val_loss"] - target) / (a["val_loss"] - b["val_loss"])
            return (a["train_time_ms"] + share * (b["train_time_ms"] - a["train_time_ms"])) / 1000
""", "first meet 4.0 at 0.0, not at None"),
        ("""
def reached(curve, target):  # the last crossing
    for a, b in reversed([*zip(curve, curve[1:])]):
        if b["val_loss"] <= target <= a["val_loss"]:
            share = (a["val_loss"] - target) / (a["val_loss"] - b["val_loss"])
            return (a["train_time_ms"] + share * (b["train_time_ms"] - a["train_time_ms"])) / 1000
""", "first meet 3.25 at 0.75, not at 2.25"),
        ("reached = lambda curve, target: next((p['train_time_ms'] / 1000 for p in curve if p['val_loss'] <= target), None)", "not at 1.0"),
        ("truth = reached; reached = lambda curve, target: truth(curve, target) and 1000 * truth(curve, target)", "not at 750"),
    ],
    ("24", 2): [
        ("truth = cost; cost = lambda seconds, gpus, dollars, watts: truth(seconds, 1, dollars, watts)", "6 dollars, not 1.5"),
        ("truth = cost; cost = lambda *a: (truth(*a)[0], truth(*a)[1] * 1000)", "1 kWh, not 1000"),
        ("truth = cost; cost = lambda seconds, gpus, dollars, watts: (truth(seconds, gpus, dollars, watts)[0], seconds / 3600 * watts / 1000)", "1 kWh, not 0.25"),
    ],
    ("25", 1): [
        ("truth = entropy; entropy = lambda logits, temperature: truth(logits, temperature) * math.log(2)", "0.811 bits, not 0.56"),
        ("truth = entropy; entropy = lambda logits, temperature: truth(logits, 1 / temperature)", "at a temperature of 10,000"),
        ("entropy = lambda logits, temperature: float(-(logits.double() / temperature).log_softmax(-1).max() / math.log(2))", "0.811 bits"),
        ("truth = entropy; entropy = lambda logits, temperature: float(-(logits.double().softmax(-1) * (logits.double() / temperature).log_softmax(-1)).sum() / math.log(2))", "almost 0 bits"),
    ],
    ("25", 2): [
        ("truth = bits_per_byte; bits_per_byte = lambda text, before=b'': truth(text)", "should help xz"),
        ("truth = bits_per_byte; bits_per_byte = lambda text, before=b'': truth(text, before) / 8", "8 bits each, not 1.0"),
        ("truth = bits_per_byte; bits_per_byte = lambda text, before=b'': truth(text, before) * len(text) / len(before + text)", "8 bits each, not 4.0"),
        ("bits_per_byte = lambda text, before=b'': 8 * len(lzma.compress(before + text)) / len(text)", "8 bits each, not 16"),
    ],
    ("31", 1): [
        ("truth = waves_of; waves_of = lambda matrices, size, triangle, rows=128, places=264: matrices * truth(1, size, triangle, rows, places)", "two waves and one"),
        ("""
def waves_of(matrices, size, triangle, rows=128, places=264):  # half of all blocks, without the diagonal
    across = -(-size // rows)
    return -(-matrices * (across * (across - 1) // 2 if triangle else across**2) // places)
""", "30 blocks on 8 places"),
        ("""
def waves_of(matrices, size, triangle, rows=128, places=264):  # rounded down, and one more
    across = -(-size // rows)
    return matrices * (across * (across + 1) // 2 if triangle else across**2) // places + 1
""", "expected (1, 1, 2)"),
    ],
    ("31", 2): [
        ("truth = symmetric_flops; symmetric_flops = lambda m, n, iterations=5, restarts=1, rows=128: truth(m, n, iterations, restarts, rows) / 2", "768 × 3,072 needs"),
        ("""
def symmetric_flops(m, n, iterations=5, restarts=1, rows=128):  # half, without the diagonal's other half
    parts = restarts + 1
    return 0.5 * (parts * 2 * m * m * n + (iterations + 3 * (iterations - parts)) * 2 * m**3) + parts * 2 * m * m * n
""", "768 × 3,072 needs"),
        ("""
def symmetric_flops(m, n, iterations=5, restarts=1, rows=128):  # the share of the record's shape, whatever the shape
    parts = restarts + 1
    return 21 / 36 * (parts * 2 * m * m * n + (iterations + 3 * (iterations - parts)) * 2 * m**3) + parts * 2 * m * m * n
""", "one block is its own triangle"),
    ],
    ("92", 1): [
        ("silent_for = lambda readings: readings[-1][0] - next(clock for clock, count in readings if count == readings[-1][1])", "silent for 8.0 s, not for 20.0"),
        ("silent_for = lambda readings: readings[-1][0] - max((clock for clock, count in readings if count != readings[-1][1]), default=readings[0][0])", "silent for 25.0 s, not for 35.0"),
        ("silent_for = lambda readings: readings[-1][0] - readings[0][0]", "silent for 25.0 s, not for 45.0"),
    ],
    ("92", 2): [
        ("truth = best_interval; best_interval = lambda save_s, between_s: truth(save_s, between_s) / 2**0.5", "loses less than 85"),
        ("best_interval = lambda save_s, between_s: between_s / 2", "loses less than 1800"),
        ("truth = best_interval; best_interval = lambda save_s, between_s: truth(save_s, between_s) / 60", "loses less than 2"),
    ],
    ("93", 1): [
        ("""
def swap(staged, folder):  # the old manifest stays until the end
    for path in sorted(staged.iterdir(), key=lambda path: path.name == "manifest.json"):
        os.replace(path, folder / path.name)
""", "leaves a manifest over another set's shards"),
        ("""
def swap(staged, folder):  # the manifest first
    for path in sorted(staged.iterdir()):
        path.rename(folder / path.name)
""", "a crash after the move of manifest.json"),
        ("""
def swap(staged, folder):  # the manifest is forgotten
    (folder / "manifest.json").unlink()
    for path in staged.glob("*.bin"):
        os.replace(path, folder / path.name)
""", "three files are to be moved"),
        ("""
def swap(staged, folder):  # copies, which a crash leaves half written
    for path in staged.iterdir():
        (folder / path.name).write_text(path.read_text())
""", "but 0 were"),
    ],
    ("93", 2): [
        ("""
def careless(path):  # the system decides who made it
    try:
        path.mkdir()
        return True
    except FileExistsError:
        return False
""", "leave time between"),
        ("careless = lambda path: path.mkdir(exist_ok=True) is None", "still believes"),
    ],
    ("94", 1): [
        ("""
def recited(train, val, length):  # each line once
    known = {line.strip() for text in train for line in text.split(b"\\n")}
    lines = {line.strip() for text in val for line in text.split(b"\\n")}
    lines = {line for line in lines if len(line) >= length}
    return len(lines & known) / max(1, len(lines))
""", "67% recited, not 50%"),
        ("truth = recited; recited = lambda train, val, length: truth(train, val, 0)", "67% recited, not 75%"),
        ("truth = recited; recited = lambda train, val, length: truth(val, train, length)", "50% recited, not 100%"),
        ("""
def recited(train, val, length):  # anywhere in a text
    lines = [line.strip() for text in val for line in text.split(b"\\n") if len(line.strip()) >= length]
    return sum(any(line in text for text in train) for line in lines) / max(1, len(lines))
""", "0% recited, not 100%"),
        ("""
def recited(train, val, length):  # with the spaces around them
    known = {line for text in train for line in text.split(b"\\n")}
    lines = [line for text in val for line in text.split(b"\\n") if len(line) >= length]
    return sum(line in known for line in lines) / max(1, len(lines))
""", "50% recited, not 0%"),
    ],
    ("95", 1): [
        ("setting_for = lambda gpus, need_gb: min((g for g in gpus if g.memory_gb >= need_gb), key=lambda g: g.memory_gb).uuid if any(g.memory_gb > need_gb for g in gpus) else ''", "-1"),
        ("setting_for = lambda gpus, need_gb: next((gpu.uuid for gpu in gpus if gpu.memory_gb >= need_gb), '-1')", "9 GB are to leave the GPU with 10"),  # the first
        ("setting_for = lambda gpus, need_gb: max(gpus, key=lambda gpu: gpu.memory_gb).uuid", "6 GB are to leave the GPU with 8"),
        ("truth = setting_for; setting_for = lambda gpus, need_gb: truth(gpus, need_gb + 1e-6)", "10 GB are to leave the GPU with 10"),
        ("truth = setting_for; setting_for = lambda gpus, need_gb: next((str(gpu.index) for gpu in gpus if gpu.uuid == truth(gpus, need_gb)), '-1')", "leaves [40"),  # a number is the first slice
    ],
    ("96", 1): [
        ("""
def resumed_at(records):  # strictly before
    steps, last = [], {}
    for record in records:
        if "step" in record:
            if record["step"] < last.get(record["kind"], -1):
                steps.append(record["step"])
                last = {}
            last[record["kind"]] = record["step"]
    return steps
""", "r v0 v10 r v10 v20: went on at [10], and not at []"),
        ("""
def resumed_at(records):  # whatever their kind
    steps = [record["step"] for record in records if "step" in record]
    return [after for before, after in zip(steps, steps[1:]) if after <= before]
""", "went on at []"),
        ("""
def resumed_at(records):  # kind by kind, in the same interruption
    steps, last = [], {}
    for record in records:
        if "step" in record:
            if record["step"] <= last.get(record["kind"], -1):
                steps.append(record["step"])
            last[record["kind"]] = record["step"]
    return steps
""", "went on at [10], and not at [10, 10]"),
        ("truth = resumed_at; resumed_at = lambda records: sorted(set(truth(records)))", "went on at [10, 10], and not at [10]"),
    ],
    ("96", 2): [
        ("""
def changed_functions(before, after):  # the text, comments and all
    functions = [{node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body} for source in (before, after)]
    return {name for name in functions[0] | functions[1] if functions[0].get(name) != functions[1].get(name)}
""", "a comment in area"),
        ("""
def changed_functions(before, after):  # those of both versions
    functions = [{node.name: code_hash(ast.unparse(node)) for node in ast.parse(source).body} for source in (before, after)]
    return {name for name in functions[0].keys() & functions[1] if functions[0][name] != functions[1][name]}
""", "twice is gone"),
        ("""
def changed_functions(before, after):  # what is new
    functions = [{code_hash(ast.unparse(node)): node.name for node in ast.parse(source).body} for source in (before, after)]
    return {functions[1][digest] for digest in functions[1].keys() - functions[0]}
""", "twice is gone"),
        ("truth = changed_functions; changed_functions = lambda before, after: truth(before, after) if code_hash(before) != code_hash(after) and len(before) == len(after) else set()", "another constant"),
    ],
}
# fmt: on
