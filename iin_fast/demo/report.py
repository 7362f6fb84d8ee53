"""The page that shows the whole demo to a person: one HTML file with its pictures inside."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ..page import card, page, picture
from .throughput import MEASUREMENTS

__all__ = ["write_report"]


def write_report(path: Path, metrics: dict, throughput: dict, run: dict) -> None:
    """Writes the page to ``path``; the pictures are taken from its folder.

    Args:
        path: the HTML file.
        metrics: as in ``metrics.json``.
        throughput: as in ``throughput.json``.
        run: as in ``run.json``.
    """
    sections = [
        _opening(metrics, throughput),
        _swaps(path.parent, metrics),
        _interpolation(path.parent),
        _samples(path.parent, metrics),
        _speed(throughput),
        _making(path.parent, metrics, run),
    ]
    path.write_text(page("iin-fast: swapping digit and color", sections))


def _opening(metrics: dict, throughput: dict) -> str:
    step = throughput["training_step"]
    return f"""
<h1>One latent space, taken apart into digit, color and the rest</h1>
<p class="lead">A small autoencoder learned to draw colored handwritten digits. Its latent vector z mixes everything up.
An invertible network T (IIN) translates z, without loss, into separate factors, so that the digit or the color of one
image can be given to another. All pictures show images that no network saw in training.</p>
<div class="cards">
{
        card(
            f"{metrics['swap_digit_accuracy']:.1%}",
            f"of digit swaps read as the donor's digit ({metrics['baseline_swap_digit_accuracy']:.1%} without IIN)",
        )
    }
{
        card(
            f"{metrics['swap_color_accuracy']:.1%}",
            f"of color swaps keep their digit ({metrics['baseline_swap_color_accuracy']:.1%} without IIN)",
        )
    }
{card(f"{metrics['judge_accuracy']:.1%}", "of the original images are read right by the judge: the bound")}
{card(f"{step['speedup']:.1f}×", "training steps per second, relative to the published composition on this machine")}
</div>"""


def _swaps(folder: Path, metrics: dict) -> str:
    rows = [
        ("Digit swap: judge reads the donor's digit", "swap_digit_accuracy", "reconstruction_accuracy", max),
        ("Digit swap: change of color", "swap_digit_color_error", "reconstruction_color_error", min),
        ("Color swap: judge still reads the digit", "swap_color_accuracy", "reconstruction_accuracy", max),
        ("Color swap: distance to the donor's color", "swap_color_error", "reconstruction_color_error", min),
    ]
    body = ""
    for text, key, bound, better in rows:
        ours, other = metrics[key], metrics[f"baseline_{key}"]
        form = "{:.1%}" if better is max else "{:.3f}"
        cells = "".join(
            f'<td class="{"best" if ours != other and value == better(ours, other) else ""}">{form.format(value)}</td>'
            for value in (ours, other)
        )
        body += f"<tr><td>{text}</td>{cells}<td>{form.format(metrics[bound])}</td></tr>"
    dims = metrics["factor_dims"]
    sizes = ", ".join(f"{name} {size}" for name, size in dims.items())
    return f"""
<h2>Swapping one factor</h2>
<p>Each row keeps everything of its image at the left except for one factor, and each column gives that factor from its
image at the top. The {sum(dims.values())} dimensions were shared out by estimate: {sizes}.</p>
<div class="pair">
{picture(folder / "swap_digit.png", "grid of digit swaps", "Down a column: the same digit, in each row's color.")}
{picture(folder / "swap_color.png", "grid of color swaps", "Along a row: the same digit, in each column's color.")}
</div>
<table>
<tr><th></th><th>IIN</th><th>class-mean shift, no IIN</th><th>bound: only encode and decode</th></tr>
{body}
</table>
<p class="small">A separately trained classifier, the judge, reads the digits. Colors are read as the mean RGB of the
ink and compared as the mean absolute difference, 0 to 1. The baseline adds to z the difference between the mean z of
two digits (for colors, along the least-squares line); it is told the true digits and colors of the held-out images,
while the IIN sees nothing but z. Every donor shows another digit.</p>"""


def _interpolation(folder: Path) -> str:
    return f"""
<h2>From one image to another, one factor at a time</h2>
<p>At the left and the right, two held-out images. Between them, the first one walks towards the second in its digit
alone, in its color alone, and in all factors together. The last row mixes z directly.</p>
{picture(folder / "interpolation.png", "interpolation between two images, by factor")}"""


def _samples(folder: Path, metrics: dict) -> str:
    return f"""
<h2>New images</h2>
<p>Without pairs, the same network learns how z is distributed, and then draws new z. The autoencoder's own assumption,
that z is a standard normal, fits its latents badly: {metrics["normal_nll_nats_per_dim"]:.2f} nats per dimension on
held-out latents, against {metrics["unsupervised_nll_nats_per_dim"]:.2f} of the unsupervised IIN (lower is better;
{metrics["nll_nats_per_dim"]:.2f} for the IIN with factors).</p>
{picture(folder / "samples.png", "samples of the unsupervised IIN beside samples without it")}"""


def _speed(throughput: dict) -> str:
    longest = max(throughput[m][who]["median_ms"] for m in MEASUREMENTS for who in ("published_eager", "iin_fast"))
    rows = ""
    for name in MEASUREMENTS:
        for who, label, kind in (("published_eager", "published, layer by layer", ""), ("iin_fast", "iin-fast", "iin")):
            times = throughput[name][who]
            width = 100 * times["median_ms"] / longest
            heading = name.replace("_", " ") if kind == "" else ""
            speedup = f"{throughput[name]['speedup']:.1f}×" if kind else ""
            rows += (
                f'<tr class="{"" if kind else "first"}"><td>{heading}</td><td>{label}</td>'
                f'<td class="track"><div class="bar {kind}" style="width:{width:.1f}%"></div></td>'
                f"<td>{times['median_ms']:.1f} ms</td>"
                f'<td class="small">{times["min_ms"]:.1f} – {times["max_ms"]:.1f}</td><td><b>{speedup}</b></td></tr>'
            )
    size, environment = throughput["size"], throughput["environment"]
    return f"""
<h2>Speed on this machine</h2>
<p>A flow of the published size ({size["n_flows"]} blocks of {size["hidden_dim"]} hidden units, {size["dim"]}
dimensions), batch {throughput["batch"]}, computed in the published way and by iin-fast, with the same weights, taking
turns in the same run. Bars show the median of {throughput["forward"]["iin_fast"]["repeats"]} calls, the numbers behind
it the fastest and the slowest.</p>
<table class="bars">{rows}</table>
<p class="small">{escape(environment["CPU"])} ({escape(environment["CPU instruction set"])}), torch
{escape(environment["torch"])}, iin-fast {escape(environment["iin-fast"])}, commit
{escape(environment["commit"])}.</p>"""


def _making(folder: Path, metrics: dict, run: dict) -> str:
    times = ", ".join(f"{name} {value:.0f} s" for name, value in run["seconds"].items() if name != "total")
    plan = run["plan"]
    return f"""
<h2>How it was made</h2>
<p>scikit-learn's 1797 handwritten digits, enlarged to 32×32 and colored at random, a quarter of them held out. The IIN
({plan["n_flows"]} blocks of {plan["hidden_dim"]} hidden units) saw only pairs of images and which concept each pair
shares: the digit, or the color. It never saw a label or a color value.</p>
{picture(folder / "loss.png", "loss of each training over its steps")}
<p class="small">Translating z there and back changes it by at most {metrics["invertibility_error"]:.1e}. Seed
{metrics["seed"]}. {run["seconds"]["total"] / 60:.1f} minutes in all: {times}. The same numbers are in
<code>metrics.json</code>, <code>throughput.json</code> and <code>run.json</code> beside this page. The method: Esser,
Rombach, Ommer, “A Disentangling Invertible Interpretation Network for Explaining Latent Representations”, CVPR
2020.</p>"""
