#!/usr/bin/env python3
"""Draws time against memory, docs/front.svg, from two files of JSON lines.

    tools/front.py OURS PEERS > docs/front.svg

OURS: lines of `bench --json`, each after the words SHAPE STRATEGY. PEERS: objects with shape, data, method, fwbw_ms
and fwbw_mib.
"""
import json
import math
import sys

PANELS = [("gemma2-2b", "flat"), ("gemma2-2b", "peaked"), ("llama3-8b", "flat"), ("llama3-8b", "peaked")]
COLOURS = {
    "recompute": "#1f6feb", "fused": "#8250df",
    "compile": "#d1242f", "apple_cce": "#bf8700", "liger_triton": "#1a7f37",
}
NAMES = {
    "recompute": "this crate, recomputed", "fused": "this crate, fused", "compile": "torch.compile",
    "apple_cce": "reference, cce", "liger_triton": "Liger-Kernel",
}
WIDTH, HEIGHT, LEFT, TOP = 330, 230, 60, 60
MEMORY, TIME = (1000, 6000), (18, 260)

points = []
for line in open(sys.argv[1]):
    shape, strategy, row = line.split(" ", 2)
    row = json.loads(row)
    if row["method"] != "mm":
        points.append((shape, row["test_data"], strategy, row["op_mem_mb"], row["runtime_ms"]))
for line in open(sys.argv[2]):
    row = json.loads(line)
    if "fwbw_ms" in row:
        points.append((row["shape"], row["data"], row["method"], row["fwbw_mib"], row["fwbw_ms"]))


def along(value, low, high):
    return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))


out = [
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * (WIDTH + LEFT) + 20}" height="{2 * (HEIGHT + TOP) + 40}" '
    'font-family="sans-serif" font-size="11">',
    '<rect width="100%" height="100%" fill="white"/>',
]
for i, (name, label) in enumerate(NAMES.items()):
    x = 20 + i * 155
    out.append(f'<circle cx="{x}" cy="16" r="4" fill="{COLOURS[name]}"/><text x="{x + 8}" y="20">{label}</text>')
for panel, (shape, data) in enumerate(PANELS):
    x0, y0 = LEFT + panel % 2 * (WIDTH + LEFT), TOP + panel // 2 * (HEIGHT + TOP)

    def place(memory, time):
        return x0 + along(memory, *MEMORY) * WIDTH, y0 + HEIGHT - along(time, *TIME) * HEIGHT

    out.append(f'<rect x="{x0}" y="{y0}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>')
    out.append(f'<text x="{x0}" y="{y0 - 8}" font-weight="bold">{shape}, {data}</text>')
    for memory in (1000, 1500, 2000, 3000, 4000, 6000):
        x, _ = place(memory, 20)
        out.append(f'<line x1="{x:.1f}" y1="{y0}" x2="{x:.1f}" y2="{y0 + HEIGHT}" stroke="#eee"/>')
        out.append(f'<text x="{x:.1f}" y="{y0 + HEIGHT + 14}" text-anchor="middle">{memory}</text>')
    for time in (20, 30, 50, 100, 200):
        _, y = place(1000, time)
        out.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + WIDTH}" y2="{y:.1f}" stroke="#eee"/>')
        out.append(f'<text x="{x0 - 5}" y="{y + 4:.1f}" text-anchor="end">{time}</text>')
    out.append(f'<text x="{x0 + WIDTH}" y="{y0 + HEIGHT + 28}" text-anchor="end">peak over inputs, MiB</text>')
    out.append(f'<text x="{x0 - 45}" y="{y0 - 8}">ms</text>')
    for name, colour in COLOURS.items():
        here = sorted({(m, t) for s, d, n, m, t in points if (s, d, n) == (shape, data, name)})
        at = [place(*point) for point in here]
        if len(at) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in at]
out.append("</svg>")
print("\n".join(out))
