# Tangled from notebooks/24_speedrun.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Reading a run
import math
from pathlib import Path

from speedrun.config import config_from_json, schedule_of
from speedrun.lab.errors import UserError, quoted
from speedrun.lab.results import public_table
from speedrun.lab.metrics import read_metrics, series


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
SHOWN = ("4", "9", "12", "20", "39", "62", "89", "92")


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


def unit_of(run: dict) -> tuple[float, str]:
    """What a loss in nats a token is multiplied by for a page, and the unit: bits a byte where the bytes are known."""
    if run["bytes_per_token"]:
        return 1 / (run["bytes_per_token"] * math.log(2)), "bits a byte"
    return 1.0, f"nats a token ({run['data']['tokenizer']})"


def loss_figure(run: dict):
    """A run's validation loss against training time and against steps, with its target; public records beside it where they have read the same text."""
    import matplotlib.pyplot as plt

    factor, unit = unit_of(run)
    curves = {f"{run['preset']}, {run['world']} × {run['device']}": run["curve"]}
    if run["data"]["name"].startswith("FineWeb") and run["data"]["tokenizer"] == "gpt2":
        curves |= {f"record {number}": public_curves()[number] for number in SHOWN}
    told = {k: [p | {"val_loss": factor * p["val_loss"]} for p in c] for k, c in curves.items()}
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.2), sharey=True, layout="constrained")
    for axis, against in zip(axes, ("train_time_ms", "step")):
        draw_curves(axis, told, against)
        axis.axhline(factor * run["config"]["target"], color="0.5", lw=0.8, ls=":", label="target")
        axis.set_ylabel("")
    axes[0].set_ylabel(f"validation loss, {unit}")
    axes[0].legend(fontsize=8)
    first, last = (factor * run["curve"][i]["val_loss"] for i in (0, -1))
    figure.suptitle(f"{first:.2f} → {last:.2f} {unit} in {run['seconds']:.0f} s")
    return figure


def step_figure(run: dict):
    """How long the steps took: in order (left), and how often (right)."""
    import matplotlib.pyplot as plt

    steps = run["steps_ms"]
    middle, slow = quantile(steps, 0.5), quantile(steps, 0.99)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.6, 2.8), sharey=True, width_ratios=[2, 1], layout="constrained"
    )
    left.plot(steps, ".", ms=2)
    left.set_xlabel("step")
    left.set_ylabel("ms")
    left.set_ylim(0, 2 * slow)
    right.hist(steps, bins=60, range=(0, 2 * slow), orientation="horizontal")
    right.set_xlabel("number of steps")
    figure.suptitle(f"a step takes {middle:.1f} ms, one in a hundred over {slow:.1f}")
    return figure


# %% HTML report
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


import html
from string import Template

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root { color-scheme: light dark; --soft: #57606a; --line: #d8dee4; --box: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --soft: #9198a1; --line: #3d444d; --box: #151b23; } }
body { font: 16px/1.55 system-ui, sans-serif; margin: 0; }
main { max-width: 860px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.soft { color: var(--soft); margin: 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin: 1.4rem 0; }
.numbers div { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .8rem; }
.numbers dt, .numbers small { color: var(--soft); font-size: .85rem; } .numbers dd { margin: 0; }
.numbers b { display: block; font-size: 1.35rem; line-height: 1.3; }
.wide { overflow-x: auto; } img { width: 100%; min-width: 600px; height: auto; } table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid var(--line); padding: .25rem .8rem .25rem 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--soft); white-space: nowrap; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
</style></head><body><main>
<h1>$title</h1><p class="soft">$lead</p>
<dl class="numbers">$numbers</dl>
$figures
$sample
<h2>To repeat it</h2><pre>$command</pre>
<h2>The run</h2><table class="table">$facts</table>
<details><summary>All $count settings</summary><table class="table">$settings</table></details>
<h2>Its files</h2><p>$files</p>
</main></body></html>
""")


def rows_of(pairs) -> str:
    """Rows of an HTML table from pairs of texts."""
    told = [tuple(html.escape(str(each)) for each in pair) for pair in pairs]
    return "\n".join(f"<tr><td>{what}</td><td>{value}</td></tr>" for what, value in told)


def five_numbers(run: dict) -> list[tuple[str, str, str]]:
    """The five numbers of a run's page, as (what, number, what else)."""
    (factor, unit), loss = unit_of(run), run["curve"][-1]["val_loss"]
    steps, memory = run["steps_ms"], max(run["memory_mb"].items(), key=lambda item: item[1])
    slow, rate = quantile(steps, 0.9), run["flops_per_second"] / 1e12
    nats = f"{loss:.4f} nats a token ({run['data']['tokenizer']})"
    met = loss_lines(run)[-1]
    return [
        ("validation loss", f"{factor * loss:.4f}", unit if unit in nats else f"{unit}; {nats}"),
        ("training time", f"{run['seconds']:.1f} s", f"{met[0]}: {met[1]}"),
        ("a step", f"{quantile(steps, 0.5):.1f} ms", f"median; one in ten over {slow:.1f}"),
        ("tokens a second", f"{run['tokens'] / run['seconds']:,.0f}", f"{rate:.2f} TFLOP/s a rank"),
        ("memory", f"{memory[1] / 1024:.2f} GiB", f"{memory[0]}, at most"),
    ]


def pictures(draw, run: dict, alt: str) -> str:
    """A figure for a page, light and dark, as an HTML element that holds both."""
    import base64
    import io

    import matplotlib.pyplot as plt

    kinds = {}
    for kind, style in (("light", "default"), ("dark", "dark_background")):
        with plt.style.context(style), io.BytesIO() as file:
            figure = draw(run)
            figure.savefig(file, dpi=150, transparent=True)
            plt.close(figure)
            kinds[kind] = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{kinds["dark"]}">'
    image = f'<img alt="{html.escape(alt)}" src="{kinds["light"]}">'
    return f'<div class="wide"><picture>{dark}{image}</picture></div>'


import shlex

from speedrun.config import fields_of
from speedrun.lab.files import atomic_write
from speedrun.presets import as_arguments

FILES = {
    "speedrun.html": "the executed notebook as a page",
    "speedrun.ipynb": "the executed notebook",
    "log.txt": "the log",
    "metrics.jsonl": "all its numbers",
    "sample.txt": "the sample",
    "checkpoints": "the checkpoints",
}


def facts_of_run(run: dict, commit: str) -> list[tuple[str, str]]:
    """What a page says about a run beside its numbers."""
    stamp, text = run["stamp"], run["data"]
    versions = ", ".join(f"{what} {stamp[what]}" for what in ("torch", "triton", "python", "driver") if stamp.get(what))  # fmt: skip
    return [
        ("preset", f"{run['preset']}, {run['parameters']:,} parameters, {run['step']:,} steps"),
        ("text", f"{text['name']}: {run['tokens'] / 1e6:.1f}M tokens ({text['tokenizer']})"),
        ("machine", f"{run['world']} × {run['device']}; {stamp['cpu']}"),
        ("versions", versions),
        ("code", f"commit {commit}" if commit else "no commit known"),
        ("before the clock", f"{run['prepared_s']:.1f} s of compiling and warming up"),
    ]


def write_report(folder: Path) -> Path:
    """One page about the finished run in a folder, `report.html`, that needs no network; returns its path. Raises UserError if it has not ended."""
    run, first = read_run(folder), read_metrics(folder / "metrics.jsonl")[0]
    config, (factor, unit) = config_from_json(run["config"]), unit_of(run)
    boxes = [tuple(html.escape(each) for each in box) for box in five_numbers(run)]
    loss, place = factor * run["curve"][-1]["val_loss"], f"{run['world']} × {run['device']}"
    gpus = ["--gpus", str(run["world"])] if run["world"] > 1 else []
    texts = {
        "title": f"{run['preset']}: {loss:.3f} {unit} in {run['seconds']:.0f} s",
        "lead": f"{place}, {run['data']['name']}, {run['stamp']['date']}",
        "command": shlex.join(["python", "-m", "speedrun.launch", *gpus, *as_arguments(config)]),
        "count": str(len(fields_of(config))),
    }
    there = [(name, what) for name, what in FILES.items() if (folder / name).exists()]
    sample = folder / "sample.txt"
    written = html.escape(sample.read_text(encoding="utf-8")) if sample.exists() else ""
    page = PAGE.substitute(
        {name: html.escape(text) for name, text in texts.items()},
        numbers="".join(f"<div><dt>{what}</dt><dd><b>{number}</b><small>{more}</small></dd></div>" for what, number, more in boxes),
        figures=pictures(loss_figure, run, f"Validation loss of this run, down to {loss:.3f} {unit}, against time and against steps")
        + pictures(step_figure, run, "How long each step took, and how often"),
        sample=f"<h2>What it writes</h2><pre>{written}</pre>" if written else "",
        facts=rows_of(facts_of_run(run, first.get("commit") or "")),
        settings=rows_of(fields_of(config).items()),
        files=", ".join(f'<a href="{name}">{what}</a>' for name, what in there),
    )  # fmt: skip
    atomic_write(folder / "report.html", page)
    return folder / "report.html"
