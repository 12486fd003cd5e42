#!/usr/bin/env python3
"""Draws the loss curves of runs of the example finetune beside each other, docs/convergence.svg.

    tools/curves.py TITLE STATE.. [-- TITLE STATE..] > docs/convergence.svg

STATE: the state.json of a run's last checkpoint. Training loss, the mean of ten steps; points: validation.
"""
import json
import sys

COLOURS = {"exact": "#1f6feb", "baseline": "#d1242f", "cce-kahan-full-c": "#8250df", "cce": "#bf8700"}
WIDTH, HEIGHT, LEFT, TOP = 330, 240, 60, 60
MEAN = 10

panels, arguments = [], sys.argv[1:]
while arguments:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    panels.append((arguments[0], [json.load(open(path)) for path in arguments[1:end]]))
    arguments = arguments[end + 1 :]

out = [
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(panels) * (WIDTH + LEFT) + 20}" height="{HEIGHT + TOP + 50}" '
    'font-family="sans-serif" font-size="11">',
    '<rect width="100%" height="100%" fill="white"/>',
]
for i, (name, colour) in enumerate(COLOURS.items()):
    x = 20 + i * 140
    out.append(f'<circle cx="{x}" cy="16" r="4" fill="{colour}"/><text x="{x + 8}" y="20">{name}</text>')
for number, (title, states) in enumerate(panels):
    x0, y0 = LEFT + number * (WIDTH + LEFT), TOP
    curves = {}
    for state in states:
        losses = [loss for _, loss in state["train"]]
        means = [
            (step, sum(losses[max(0, step - MEAN) : step]) / min(step, MEAN)) for step in range(1, len(losses) + 1)
        ]
        curves[state["run"]["loss"]] = (means, state["validation"])
    steps = max(means[-1][0] for means, _ in curves.values())
    values = [value for means, validation in curves.values() for _, value in means + validation]
    low, high = int(min(values)), int(max(values)) + 1

    def place(step, value):
        return x0 + step / steps * WIDTH, y0 + (high - value) / (high - low) * HEIGHT

    out.append(f'<rect x="{x0}" y="{y0}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>')
    out.append(f'<text x="{x0}" y="{y0 - 8}" font-weight="bold">{title}</text>')
    for value in range(low, high + 1):
        y = place(0, value)[1]
        out.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + WIDTH}" y2="{y:.1f}" stroke="#eee"/>')
        out.append(f'<text x="{x0 - 5}" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
    for step in range(0, steps + 1, steps // 5):
        out.append(f'<text x="{place(step, 0)[0]:.1f}" y="{y0 + HEIGHT + 14}" text-anchor="middle">{step}</text>')
    out.append(f'<text x="{x0 + WIDTH}" y="{y0 + HEIGHT + 30}" text-anchor="end">step</text>')
    for name, (means, validation) in curves.items():
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in means)
        out.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.2"/>')
        for point in validation:
            x, y = place(*point)
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{COLOURS[name]}"/>')
out.append("</svg>")
print("\n".join(out))
