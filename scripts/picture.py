#!/usr/bin/env python3
"""Draws what a command printed as a terminal window: python3 scripts/picture.py TITLE < output.txt > docs/picture.svg"""

import html
import sys

WIDTH, LINE, LEFT, TOP = 8.43, 19, 20, 62


def colour(line):
    if line.startswith("$"):
        return "#e6edf3", "bold"
    if line.startswith("---") or line.startswith("task") or line.startswith("split"):
        return "#79c0ff", "normal"
    if "bit for bit" in line or line.startswith("done"):
        return "#7ee787", "bold"
    if line.startswith("unisono:"):
        return "#ff7b72", "normal"
    return "#c9d1d9", "normal"


def main():
    title = sys.argv[1]
    lines = [line.rstrip("\n").expandtabs() for line in sys.stdin]
    while lines and not lines[-1].strip():
        lines.pop()
    width = int(max(len(line) for line in lines) * WIDTH) + 2 * LEFT
    height = TOP + LINE * len(lines) + 10
    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
          f'role="img" aria-label="{html.escape(title)}">')
    print(f'<rect width="{width}" height="{height}" rx="10" fill="#0d1117"/>')
    for x, fill in ((22, "#ff5f56"), (44, "#ffbd2e"), (66, "#27c93f")):
        print(f'<circle cx="{x}" cy="22" r="6.5" fill="{fill}"/>')
    print(f'<text x="{width / 2:.0f}" y="27" fill="#8b949e" text-anchor="middle" '
          f'font-family="sans-serif" font-size="13">{html.escape(title)}</text>')
    print('<g font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace" font-size="14" xml:space="preserve">')
    for number, line in enumerate(lines):
        if line.strip():
            fill, weight = colour(line)
            print(f'<text x="{LEFT}" y="{TOP + LINE * number}" fill="{fill}" font-weight="{weight}" '
                  f'textLength="{len(line) * WIDTH:.1f}">{html.escape(line)}</text>')
    print("</g>\n</svg>")


if __name__ == "__main__":
    main()
