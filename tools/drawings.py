"""Draws each method's matrices to scale, and the README's picture, plot and table of results.

    python tools/drawings.py        writes docs/img, SVG for light and dark, and into README.md

Plot and table are of the GPU's results that are stored. What is drawn of a method is read from the
method table: grey are the base's kernels of one layer, their columns as wide and their rows as high
as they are in Llama-3.2-1B; blue are the adapter's columns A, orange its rows or matrices B, and
hatched the columns that repeat-and-add writes to. At rank 64 a matrix A is 1/32 of the model's
width.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flora_jax.adapters import METHODS, PRODUCTS, AdapterConfig
from flora_jax.adapters.leaves import adapter_leaves
from flora_jax.analysis.results import spread, table
from flora_jax.analysis.timing import claims, paired_ratio
from flora_jax.models.config import LlamaConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments/results/gpu/h100/nvidia_h100_80gb_hbm3"
APART = ("lora", "parallel")  # methods whose narrow products ride in no other
SHOWN = ("base", "lora", "ffba", "ffba_qg_add", "fpa", "zflora")
PRESET = "llama3.2-1b"
RANK = 64
FOLDER = ROOT / "docs/img"
_SCALE = 24  # channels a pixel
_GAP = 26
_TOP = 26  # room for the products' names
_STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #24292f }
.small { font-size: 11px }
.base { fill: #d0d7de } .A { fill: #0969da } .B { fill: #e36209 } .rep { fill: url(#rep) }
.line { stroke: #57606a; fill: none; stroke-width: 1.5 } .tip { fill: #57606a }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .base { fill: #3d444d } .A { fill: #4493f8 } .B { fill: #f0883e }
.line { stroke: #9198a1 } .tip { fill: #9198a1 }
}
</style>
<defs><pattern id="rep" width="6" height="6" patternUnits="userSpaceOnUse"
patternTransform="rotate(45)"><rect width="2" height="6" class="A"/></pattern></defs>"""


def svg(width: float, height: float, title: str, parts: list[str]) -> str:
    """The document."""
    frame = f"-4 0 {width + 8:g} {height + 4:g}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{frame}" role="img">'
    return "\n".join([head, f"<title>{title}</title>", _STYLE, *parts, "</svg>"]) + "\n"


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A matrix, or what is laid on one."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"/>'


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{text}</text>'


def method(name: str) -> str:
    """The four products of a layer with what the method puts in and beside them."""
    config = LlamaConfig.preset(PRESET)
    adapter = AdapterConfig(name, RANK)
    parts: list[str] = []
    x = lowest = 0.0
    for product in PRODUCTS:
        own = list(_product(config, adapter, product, x))
        parts += [part for _, _, part in own]
        lowest = max(lowest, *(bottom for _, bottom, _ in own))
        x = max(right for right, _, _ in own) + _GAP
    return svg(x - _GAP, lowest, f"{name}: the matrices of one layer", parts)


def _product(
    config: LlamaConfig, adapter: AdapterConfig, product: str, x: float
) -> Iterator[tuple[float, float, str]]:
    """The shapes of a product from `x` on, behind how far each reaches to the right and down."""
    names = PRODUCTS[product]
    height = config.widths[names[0]][0] / _SCALE
    widths = {name: config.widths[name][1] / _SCALE for name in names}
    width = sum(widths.values())
    slot = adapter.slots[product]
    leaves = adapter_leaves(adapter, product, config.widths) if adapter.row.reads else {}
    yield x, 0, words(x, 16, product, "small", "start")
    base = "base" if adapter.row.reads else "A"  # full fine-tuning trains them
    yield x + width, _TOP + height, box(x, _TOP, width, height, base)
    below = _TOP + height
    gap = 8 if adapter.method in APART else 0
    if slot.backward:
        rows = slot.backward_rank / _SCALE
        yield x + width, below + gap + rows, box(x, below + gap, width, rows, "B")
        below += rows
    if "A" in leaves:
        columns = leaves["A"].shape[1] / _SCALE
        yield x + width + gap + columns, below, box(x + width + gap, _TOP, columns, height, "A")
    left = x
    for name in names:
        if name in slot.matrix:  # a product of its own
            rows = leaves[f"{name}_B"].shape[0] / _SCALE
            yield left, below + 8 + rows, box(left, below + 8, widths[name] - 2, rows, "B")
        if name in slot.repeat:
            yield left, below, box(left, _TOP, widths[name] - 1, height, "rep")
        left += widths[name]


def fused() -> str:
    """LoRA's products beside FLoRA's, for the README."""
    arrow = '<path d="M{x1:g} {y1:g} L{x2:g} {y2:g}" class="line" marker-end="url(#tip)"/>'
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" class="tip"/></marker></defs>'
    )

    def line(x1: float, y1: float, x2: float, y2: float) -> str:
        return arrow.format(x1=x1, y1=y1, x2=x2, y2=y2)

    lora = [
        words(0, 16, "LoRA: three products for each of 7 projections", anchor="start"),
        words(8, 76, "x"),
        line(18, 72, 50, 72),
        box(54, 40, 64, 64, "base"),
        words(86, 77, "W"),
        line(122, 72, 196, 72),
        words(206, 77, "+"),
        line(216, 72, 250, 72),
        words(260, 76, "y"),
        line(18, 80, 50, 140),
        box(54, 118, 12, 64, "A"),
        words(60, 198, "A", "small"),
        line(70, 150, 104, 150),
        box(108, 144, 64, 12, "B"),
        words(140, 172, "B", "small"),
        line(176, 146, 202, 88),
    ]
    flora = [
        words(330, 16, "FLoRA: the products that the model runs anyway, 4 a layer", anchor="start"),
        words(338, 76, "x"),
        line(348, 72, 376, 72),
        box(380, 40, 92, 64, "base"),
        box(472, 40, 16, 64, "A"),
        words(426, 77, "Wq Wk Wv"),
        words(480, 120, "A", "small"),
        line(492, 60, 526, 60),
        words(562, 64, "attention"),
        line(492, 96, 526, 118),
        words(538, 128, "z"),
        line(598, 60, 622, 60),
        line(548, 124, 622, 112),
        box(626, 40, 64, 64, "base"),
        box(626, 104, 64, 16, "B"),
        words(658, 77, "Wo"),
        words(702, 116, "B", "small"),
        line(694, 72, 726, 72),
        words(736, 76, "y"),
        words(436, 172, "A: extra columns", "small"),
        words(658, 172, "B: extra rows", "small"),
    ]
    return svg(748, 206, "LoRA and FLoRA", [tip, *lora, *flora])


def measured() -> dict[str, dict[str, Any]]:
    """Time per token of each method that is shown: what its file holds, and ratios."""
    found = {}
    for name in SHOWN:
        path = RESULTS / f"latency-{PRESET}-{name}-b1-p128.json"
        one = json.loads(path.read_text(encoding="utf-8"))
        one["ratio"] = paired_ratio(one["tpot_ms"], one["base_tpot_ms"])
        found[name] = one
    return found


def results() -> str:
    """The README's table."""
    found = measured()
    lora = found["lora"]["ratio"]["median"]
    rows = []
    for name, one in found.items():
        less = None
        if name not in ("base", "lora"):
            less = claims(one["ratio"]["median"], lora)["less_than_lora"]
        rows.append(
            [
                f"`{name}`",
                str(one["rank"] or "–"),
                f"{one['bytes']:.3f}",
                f"{statistics.median(one['tpot_ms']):.2f}",
                spread(one["ratio"]),
                "–" if less is None else f"{less:.0%}",
            ]
        )
    heads = ["", "rank", "bytes over the base's", "ms a token", "over the base", "less than LoRA"]
    return "\n".join(table(heads, rows))


def plot() -> str:
    """Milliseconds a token by method, as bars with their quartiles."""
    parts = []
    for i, (name, one) in enumerate(measured().items()):
        low, middle, high = statistics.quantiles(one["tpot_ms"], n=4)
        y = 8 + 26 * i
        kind = {"base": "base", "lora": "B"}.get(name, "A")
        parts += [
            words(104, y + 14, name, anchor="end"),
            box(112, y, 180 * middle, 18, kind),
            f'<path d="M{112 + 180 * low:g} {y + 9} H{112 + 180 * high:g}" class="line"/>',
            words(118 + 180 * high, y + 14, f"{middle:.2f} ms", "small", "start"),
        ]
    return svg(680, 8 + 26 * len(SHOWN), "Time per token at Llama-3.2-1B shapes on an H100", parts)


def with_results(readme: str) -> str:
    """The README with the table of results between its marks."""
    marks = ("<!-- results: begin -->", "<!-- results: end -->")
    between = re.compile(rf"{marks[0]}.*{marks[1]}", re.DOTALL)
    text, count = between.subn(f"{marks[0]}\n{results()}\n{marks[1]}", readme)
    if count != 1:
        raise ValueError(f"README.md has no {marks[0]} … {marks[1]}")
    return text


def drawings() -> dict[str, str]:
    """All of them, by file name."""
    pictures = {"fused.svg": fused(), "tpot_h100.svg": plot()}
    return pictures | {f"{name}.svg": method(name) for name in METHODS}


def main() -> None:
    """The command."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in drawings().items():
        (FOLDER / name).write_text(text)
    readme = ROOT / "README.md"
    readme.write_text(with_results(readme.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{len(drawings())} drawings in {FOLDER}", file=sys.stderr)


if __name__ == "__main__":
    main()
