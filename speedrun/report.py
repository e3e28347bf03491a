# Tangled from notebooks/24_speedrun.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Reading a run
import math
from pathlib import Path

from speedrun.lab.hardware import Problem
from speedrun.lab.results import public_table
from speedrun.lab.runlog import read_metrics, series


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def read_run(folder: Path) -> dict:
    """What a finished run's log says, as plain numbers: its curve, its steps, its rates. Times are of training only."""
    records = read_metrics(Path(folder) / "metrics.jsonl")
    first, last = records[0], records[-1]
    if last["kind"] != "end":
        raise Problem(f"the run in {folder} has not ended", f"python -m speedrun.launch --resume {folder}")
    config, stamp, tokens = first["config"], first["stamp"], last["step"] * first["config"]["data"]["step_tokens"]
    seconds = last["train_time_ms"] / 1000
    steps_ms = [duration for record in series(records, "step") for duration in record["steps_ms"]]
    curve = [{key: record[key] for key in ("step", "val_loss", "train_time_ms")} for record in series(records, "val")]
    prepared = sum(record["seconds"] for record in records if record["kind"] == "phase")
    device = stamp["gpu"].split("×", 1)[1] if first["device"].startswith("cuda") else "CPU"
    rate = tokens * first["flops_per_token"] / max(seconds, 1e-9) / first["world"]
    return {"preset": config["preset"], "config": config, "stamp": stamp, "data": first["data"], "world": first["world"], "device": device,
            "parameters": first["parameters"], "bytes_per_token": first["bytes_per_token"], "tokens": tokens, "curve": curve,
            "steps_ms": {name: quantile(steps_ms, share) for name, share in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99))},
            "train_loss": [[record["step"], record["train_loss"]] for record in series(records, "step")],
            "seconds": seconds, "prepared_s": prepared, "memory_mb": last["memory_mb"], "flops_per_second": rate, "step": last["step"]}  # fmt: skip


def summary(run: dict) -> list[tuple[str, str]]:
    """The lines of a report, as (what, value)."""
    loss, target, per_byte = run["curve"][-1]["val_loss"], run["config"]["target"], run["bytes_per_token"]
    reached = next((point for point in run["curve"] if point["val_loss"] <= target), None)
    lines = [
        ("run", f"preset {run['preset']}, {run['parameters']:,} parameters, {run['world']} × {run['device']}"),
        ("text", f"{run['data']['source']}, {run['tokens'] / 1e6:.1f}M tokens ({run['data']['tokenizer']})"),
        ("validation loss", f"{loss:.4f} nats a token"),
    ]
    if per_byte:
        lines.append(("", f"{loss / per_byte:.4f} nats a byte, {loss / per_byte / math.log(2):.4f} bits a byte"))
    when = f"after {reached['train_time_ms'] / 1000:.1f} s, step {reached['step']}" if reached else "not reached"
    return lines + [
        (f"target {target}", when),
        ("training time", f"{run['seconds']:.1f} s, after {run['prepared_s']:.1f} s of compiling and warming up"),
        ("step", f"{run['steps_ms']['p50']:.1f} ms (median), {run['steps_ms']['p10']:.1f} to {run['steps_ms']['p90']:.1f} (80% of steps)"),
        ("rate", f"{run['tokens'] / run['seconds']:,.0f} tokens/s, {run['flops_per_second'] / 1e12:.2f} TFLOP/s per rank"),
        ("peak memory", ", ".join(f"{amount:,} MiB {kind}" for kind, amount in run["memory_mb"].items())),
    ]


# %% Drawing it
SHOWN = ("4", "9", "12", "20", "39", "62", "89")


def public_curves() -> dict[str, list[dict]]:
    """Record → its public validation curve with times: dicts of step, val_loss and train_time_ms."""
    curves: dict[str, list[dict]] = {}
    for row in public_table("curves"):
        if row["train_time_ms"]:
            point = {"step": int(row["step"]), "val_loss": float(row["val_loss"]), "train_time_ms": float(row["train_time_ms"])}
            curves.setdefault(row["record"], []).append(point)
    return curves


def draw_curves(axis, curves: dict[str, list[dict]], against: str) -> None:
    """Validation loss against `step` or `train_time_ms` (drawn in seconds), one line per label."""
    for label, points in curves.items():
        later = [point for point in points if point[against] > 0]
        axis.plot([p[against] / (1000 if against == "train_time_ms" else 1) for p in later], [p["val_loss"] for p in later], "o-", ms=3, label=label)
    axis.set_xscale("log")
    axis.set_xlabel("training time (s)" if against == "train_time_ms" else "step")
    axis.set_ylabel("validation loss (nats/token)")


def loss_figure(runs: dict[str, dict]):
    """Our runs (left) and the public records (right), against time (above) and against steps (below)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8.6, 6.4), sharey="col")
    curves = public_curves()
    records = {f"record {number}": curves[number] for number in SHOWN if number in curves}
    for row, against in enumerate(("train_time_ms", "step")):
        draw_curves(axes[row][0], {label: run["curve"] for label, run in runs.items()}, against)
        draw_curves(axes[row][1], records, against)
        axes[row][1].set_ylim(3.2, 4.8)
        axes[row][1].axhline(3.28, color="0.4", lw=0.8, ls=":")
    text = next(iter(runs.values()))["data"]["source"]
    axes[0][0].set_title(f"here: {text}" if len(text) < 40 else "here")
    axes[0][1].set_title("the public ladder: FineWeb, 8×H100")
    for axis in axes[0]:
        axis.legend(fontsize=8)
    return figure


# %% The page that stays
OFFLINE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}{% block html_head_js_mermaidjs %}{% endblock %}"""


def write_html(notebook: Path) -> Path:
    """An executed notebook as one HTML file beside it, images inside, that needs no network."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab", raw_template=OFFLINE, embed_images=True)
    html, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4), {"metadata": {"name": notebook.stem}})
    path = notebook.with_suffix(".html")
    path.write_text(html, encoding="utf-8")
    return path
