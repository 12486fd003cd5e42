#!/usr/bin/env python3
"""Draws docs/filter.svg: where training ends with each filter, relative to exact gradients with the same seed.

    tools/filter.py < FIGURES > docs/filter.svg

FIGURES: lines `panel,filter,seed,perplexity`, the filter `exact`, which every panel has, `averaged_THRESHOLD` or
`dropped_THRESHOLD`.
"""
import sys

COLOURS = {"averaged": "#1f6feb", "dropped": "#d1242f"}
WIDTH, HEIGHT, LEFT, TOP = 300, 200, 60, 50

panels = {}
for line in sys.stdin.read().split():
    panel, name, seed, perplexity = line.split(",")
    panels.setdefault(panel, {}).setdefault(name, {})[seed] = float(perplexity)

out = [
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(panels) * (WIDTH + LEFT) + 20}" height="{HEIGHT + TOP + 40}" '
    'font-family="sans-serif" font-size="11">',
    '<rect width="100%" height="100%" fill="white"/>',
    f'<text x="{LEFT}" y="16">final validation perplexity, exact gradients with the same seed = 1</text>',
]
for i, (name, colour) in enumerate(COLOURS.items()):
    x = LEFT + WIDTH + 100 + i * 100
    out.append(f'<circle cx="{x}" cy="12" r="4" fill="{colour}"/><text x="{x + 8}" y="16">{name} below</text>')
for number, (title, filters) in enumerate(panels.items()):
    exact = filters.pop("exact")
    ratios = {name: {seed: p / exact[seed] for seed, p in by_seed.items()} for name, by_seed in filters.items()}
    values = [ratio for by_seed in ratios.values() for ratio in by_seed.values()]
    low, high = min(0.95, *values) - 0.03, max(1.05, *values) + 0.03
    x0, y0 = LEFT + number * (WIDTH + LEFT), TOP

    def place(ratio):
        return y0 + (high - ratio) / (high - low) * HEIGHT

    out.append(f'<rect x="{x0}" y="{y0}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>')
    out.append(f'<text x="{x0}" y="{y0 - 8}" font-weight="bold">{title.replace("_", " ")}</text>')
    for percent in range(int(low * 20) + 1, int(high * 20) + 1):
        y = place(percent / 20)
        colour = "#333" if percent == 20 else "#eee"
        out.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + WIDTH}" y2="{y:.1f}" stroke="{colour}"/>')
        out.append(f'<text x="{x0 - 5}" y="{y + 4:.1f}" text-anchor="end">{percent / 20:.2f}</text>')
    for i, (name, by_seed) in enumerate(ratios.items()):
        x = x0 + (i + 0.5) * WIDTH / len(ratios)
        out.append(f'<text x="{x:.1f}" y="{y0 + HEIGHT + 16}" text-anchor="middle">{name.split("_")[1]}</text>')
        colour = COLOURS[name.split("_")[0]]
        for j, ratio in enumerate(by_seed.values()):
            out.append(f'<circle cx="{x + 8 * (j - (len(by_seed) - 1) / 2):.1f}" cy="{place(ratio):.1f}" r="3.5" fill="{colour}"/>')
out.append("</svg>")
print("\n".join(out))
