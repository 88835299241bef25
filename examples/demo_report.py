"""The demo's one-page report: tables, the loss curve, answers side by side; one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; vertical-align: top; padding: .4rem .6rem;
border-bottom: 1px solid #8884; } td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; background: white; } .note { opacity: .75; font-size: .9rem; }
"""


def write_report(state: dict[str, Any], path: Path) -> Path:
    """Write report.html from the results of the demo's stages.

    Args:
        state: as in demo.json.
        path: is replaced.

    Returns:
        The path.
    """
    donor, train, plan = state["donor"], state["train"], state["plan"]
    after = train["held_out"][-1][1]
    losses = [
        ("published start, step 0 (cross-attention copied, encoder opened)", state["published"]["loss"]),
        ("the donor, decoder-only", donor["loss"]),
        (f"lossless start, {state['adapt']['opened']}, step 0", donor["opened_loss"]),
        (f"the same after {len(train['losses'])} steps, wholly opened on the way", after),
    ]
    rows = "".join(f"<tr><td>{html.escape(n)}</td><td class=number>{v:.3f}</td></tr>" for n, v in losses)
    answers = "".join(
        f"<tr><td>{html.escape(q)}</td><td>{html.escape(d.strip())}</td><td>{html.escape(a.strip())}</td></tr>"
        for q, d, a in zip(
            state["answers"]["questions"], donor["answers"], state["answers"]["answers"], strict=True
        )
    )
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>twofold: SmolLM2-135M becomes an encoder-decoder</title><style>{_STYLE}</style>
<h1>SmolLM2-135M becomes an encoder-decoder</h1>
<p>{state["adapt"]["num_parameters"] / 1e6:.1f}M parameters, all taken from the donor: each decoder layer attends, in
one softmax, to its own tokens and to what the matching encoder layer reads. Trained for
{len(train["losses"])} steps ({train["tokens"]:,} tokens, {plan["precision"]}) on Python's documentation, PrefixLM:
read one half, write the other.</p>
<h2>Held-out loss</h2>
<table><tr><th>model</th><th>nats per token</th></tr>{rows}</table>
<p class="note">Over {state["text"]["held_out_characters"]:,} characters of topics that share no paragraph with the
training text. Part of the drop is what any model gains from seeing text of this kind; training the donor on the same
tokens is the control that a claim would need. Weights are de-quantised from 4 bits.</p>
<p><img alt="Loss over training steps" src="data:image/png;base64,{_plot(state)}"></p>
<h2>Answers</h2>
<table><tr><th>prompt</th><th>donor</th><th>encoder-decoder, trained</th></tr>{answers}</table>
<p class="note">Greedy, cut after 48 tokens. {html.escape(state["machine"])}; {state["seconds"]} s without set-up.</p>
</html>
""",
        encoding="utf-8",
    )
    return path


def _plot(state: dict[str, Any]) -> str:
    """The loss curve as a PNG, base64."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train, donor = state["train"], state["donor"]
    figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    axes.plot(
        range(1, len(train["losses"]) + 1),
        train["losses"],
        color="tab:blue",
        alpha=0.35,
        label="training batch",
    )
    steps, held_out = zip(*train["held_out"], strict=True)
    axes.plot(steps, held_out, "o-", color="tab:blue", label="held out")
    axes.axhline(donor["loss"], color="tab:gray", linestyle="--", label="donor, held out")
    axes.set(
        xlabel="step",
        ylabel="nats per token",
        title=f"published start: {state['published']['loss']:.1f}, off this scale",
    )
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()
