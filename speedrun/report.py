# Tangled from notebooks/24_speedrun.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Reading a run
import math
from pathlib import Path

from speedrun.config import config_from_json, schedule_of
from speedrun.lab.errors import UserError, quoted
from speedrun.lab.results import public_table
from speedrun.lab.runlog import read_metrics, series


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def curve_of(records: list[dict]) -> list[dict]:
    """The validation curve of a log's records: step, val_loss (nats a token), train_time_ms."""
    return [
        {key: r[key] for key in ("step", "val_loss", "train_time_ms")}
        for r in series(records, "val")
    ]


def read_run(folder: Path) -> dict:
    """What a finished run's log says, as plain numbers. Times are of training only; rates are per rank."""
    records = read_metrics(Path(folder) / "metrics.jsonl")
    first, last = records[0], records[-1]
    if last["kind"] != "end":
        raise UserError(
            f"the run in {folder} has not ended",
            f"python -m speedrun.launch --resume {quoted(folder)}",
        )
    config, stamp, seconds = first["config"], first["stamp"], last["train_time_ms"] / 1000
    tokens = schedule_of(config_from_json(config)).tokens_before(last["step"])
    gpu = stamp["gpu"].split("×", 1)[1] if first["device"].startswith("cuda") else None
    return {
        **{"preset": config["preset"], "config": config, "stamp": stamp},
        **{key: first[key] for key in ("data", "world", "parameters", "bytes_per_token")},
        "device": gpu or "CPU",
        "tokens": tokens,
        "step": last["step"],
        "curve": curve_of(records),
        "steps_ms": sum((record["steps_ms"] for record in series(records, "step")), []),
        "seconds": seconds,
        "prepared_s": sum(record["seconds"] for record in records if record["kind"] == "phase"),
        "memory_mb": last["memory_mb"],
        "flops_per_second": tokens * first["flops_per_token"] / max(seconds, 1e-9) / first["world"],
    }


def loss_lines(run: dict) -> list[tuple[str, str]]:
    """The loss in nats a token and, where the bytes of the text are known, in nats and bits a byte (bits per byte, bpb); and the target."""
    loss, target, per_token = (
        run["curve"][-1]["val_loss"],
        run["config"]["target"],
        run["bytes_per_token"],
    )
    lines = [("validation loss", f"{loss:.4f} nats a token")]
    if per_token:
        nats = loss / per_token
        lines.append(("", f"{nats:.4f} nats a byte, {nats / math.log(2):.4f} bits a byte"))
    met = next((point for point in run["curve"] if point["val_loss"] <= target), None)
    when = (
        f"met after {met['train_time_ms'] / 1000:.1f} s, step {met['step']}" if met else "not met"
    )
    return [*lines, (f"target {target}", when)]


def summary(run: dict) -> list[tuple[str, str]]:
    """The lines of a report, as (what, value)."""
    steps, text = run["steps_ms"], run["data"]["name"]
    low, middle, high = (quantile(steps, share) for share in (0.1, 0.5, 0.9))
    return [
        (
            "run",
            f"preset {run['preset']}, {run['parameters']:,} parameters, {run['world']} × {run['device']}",
        ),
        ("text", f"{text}, {run['tokens'] / 1e6:.1f}M tokens ({run['data']['tokenizer']})"),
        *loss_lines(run),
        (
            "training time",
            f"{run['seconds']:.1f} s, after {run['prepared_s']:.1f} s of compiling and warming up",
        ),
        ("step", f"{middle:.1f} ms (median), {low:.1f} to {high:.1f} (80% of steps)"),
        (
            "rate",
            f"{run['tokens'] / run['seconds']:,.0f} tokens/s, {run['flops_per_second'] / 1e12:.2f} TFLOP/s a rank",
        ),
        (
            "memory",
            ", ".join(f"{amount:,} MiB {kind}" for kind, amount in run["memory_mb"].items()),
        ),
    ]


# %% Drawing it
SHOWN = ("4", "9", "12", "20", "39", "62", "89")


def public_curves() -> dict[str, list[dict]]:
    """Record → its public validation curve with times: dicts of step, val_loss and train_time_ms."""
    curves: dict[str, list[dict]] = {}
    for row in public_table("curves"):
        if row["train_time_ms"]:
            point = {key: float(row[key]) for key in ("step", "val_loss", "train_time_ms")}
            curves.setdefault(row["record"], []).append(point)
    return curves


def draw_curves(axis, curves: dict[str, list[dict]], against: str, style: str = "o-") -> None:
    """Validation loss against `step` or `train_time_ms` (drawn in seconds), a line per label; both axes are marked."""
    from matplotlib.ticker import LogLocator

    unit = 1000 if against == "train_time_ms" else 1
    for label, points in curves.items():
        later = [
            (point[against] / unit, point["val_loss"]) for point in points if point["step"] > 0
        ]
        axis.plot(*zip(*later), style, ms=3, label=label)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.minorticks_off()
    axis.set_xlabel("training time (s)" if unit > 1 else "step")
    axis.set_ylabel("validation loss (nats/token)")


def loss_figure(run: dict):
    """A run (left) beside public records (right), against time (above) and against steps (below)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8.6, 6.2), sharey="col")
    ours = {f"{run['preset']}, {run['world']} × {run['device']}": run["curve"]}
    records = {f"record {number}": public_curves()[number] for number in SHOWN}
    for row, against in zip(axes, ("train_time_ms", "step")):
        draw_curves(row[0], ours, against)
        draw_curves(row[1], records, against)
        row[1].set_ylim(3.2, 4.8)
        row[1].axhline(3.28, color="0.4", lw=0.8, ls=":")
    first, last = (run["curve"][i]["val_loss"] for i in (0, -1))
    axes[0][0].set_title(f"this run: {first:.2f} → {last:.2f} in {run['seconds']:.0f} s")
    axes[0][1].set_title("the public ladder: FineWeb, 8×H100")
    for axis in axes[0]:
        axis.legend(fontsize=8)
    return figure


def step_figure(run: dict):
    """How long the steps took: in order (left), and how often (right)."""
    import matplotlib.pyplot as plt

    steps = run["steps_ms"]
    middle, slow = quantile(steps, 0.5), quantile(steps, 0.99)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 2.8), sharey=True, width_ratios=[2, 1])
    left.plot(steps, ".", ms=2)
    left.set_xlabel("step")
    left.set_ylabel("ms")
    left.set_ylim(0, 2 * slow)
    right.hist(steps, bins=60, range=(0, 2 * slow), orientation="horizontal")
    right.set_xlabel("steps")
    kind, most = max(run["memory_mb"].items(), key=lambda item: item[1])
    left.set_title(f"a step takes {middle:.1f} ms, one in a hundred over {slow:.1f}")
    right.set_title(f"{most / 1024:.1f} GiB {kind}")
    return figure


# %% The page that stays
OFFLINE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}"""


def write_html(notebook: Path) -> Path:
    """An executed notebook as one HTML file beside it, images inside, that needs no network."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab", raw_template=OFFLINE, embed_images=True)
    named = {"metadata": {"name": notebook.stem}}
    html, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4), named)
    path = notebook.with_suffix(".html")
    path.write_text(html, encoding="utf-8")
    return path
