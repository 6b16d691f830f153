"""Draws experiments/figure2.svg, our Figure 2: one sentence through vanilla MLM, 3MLself and
3MLcross.

    python experiments/figure2.py"""

from pathlib import Path

BLUE, GREY, RED, GREEN, DARK = "#cfe2f3", "#eeeeee", "#f4b6b6", "#cdeac0", "#333333"
WORDS = ["<s>", "Let", "us", "agree", "to", "disagree", ".", "</s>"]
SEEN = ["<s>", "should", "us", "[M]", "to", "[M]", ".", "</s>"]  # "Let" replaced, two masked
MASKED = (3, 5)
CELL, GAP = 50, 4


def box(x, y, w, h, text, fill, size=13, bold=False):
    weight = ' font-weight="bold"' if bold else ""
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{fill}" stroke="{DARK}"/>'
        f'<text x="{x + w / 2}" y="{y + h / 2 + size / 3}" font-size="{size}" text-anchor="middle"'
        f'{weight} fill="{DARK}">{text}</text>'
    )


def label(x, y, text, size=13, anchor="middle"):
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{DARK}"'
    return f'<text x="{x}" y="{y}" {style}>{text}</text>'


def arrow(x, y1, y2):
    return (
        f'<line x1="{x}" y1="{y1}" x2="{x}" y2="{y2}" stroke="{DARK}" stroke-width="1.3" '
        'marker-end="url(#tip)"/>'
    )


def tokens(x, y, which, words, above=None):
    """A row of tokens with their positions, left to right."""
    parts = []
    for j, i in enumerate(which):
        fill = RED if i in MASKED else GREEN if words is SEEN and i == 1 else GREY
        parts.append(box(x + j * CELL, y, CELL - GAP, 26, words[i], fill, 11))
        parts.append(label(x + j * CELL + (CELL - GAP) / 2, y + 40, str(i), 10))
    return "".join(parts)


def main():
    kept = [i for i in range(8) if i not in MASKED]
    parts = []
    # vanilla MLM
    x, w = 20, 8 * CELL - GAP
    parts += [label(x + w / 2, 24, "vanilla MLM: all n tokens all the way", 15)]
    parts += [tokens(x, 330, range(8), SEEN)]
    parts += [box(x, 130, w, 160, "encoder, 12 or 24 layers, n tokens", BLUE, 14, True)]
    for i in range(8):
        parts.append(arrow(x + i * CELL + 23, 328, 293))
    for i in (1, 3, 5):
        parts.append(arrow(x + i * CELL + 23, 128, 88))
        parts.append(
            box(x + i * CELL - 4, 60, CELL + 4, 26, WORDS[i], GREEN if i == 1 else RED, 11)
        )
    # 3MLself
    x, w = 460, 6 * CELL - GAP
    parts += [label(x + 4 * CELL, 24, "3MLself: [MASK]s join a small decoder", 15)]
    parts += [tokens(x, 330, kept, SEEN)]
    parts += [box(x, 190, w, 100, "the same encoder, n_en tokens", BLUE, 14, True)]
    parts += [box(x, 112, 8 * CELL - GAP, 36, "decoder, 2 layers, half as wide", BLUE, 13, True)]
    for j in range(6):
        parts.append(arrow(x + j * CELL + 23, 328, 293))
        parts.append(arrow(x + j * CELL + 23, 188, 151))
    parts += [tokens(x + 6 * CELL, 200, MASKED, SEEN)]
    for j, i in ((1, 1), (6, 3), (7, 5)):
        if j > 1:
            parts.append(arrow(x + j * CELL + 23, 198, 151))
        parts.append(arrow(x + j * CELL + 23, 110, 88))
        parts.append(
            box(x + j * CELL - 1, 60, CELL - 2, 26, WORDS[i], GREEN if i == 1 else RED, 10)
        )
    # 3MLcross
    x = 900
    parts += [label(x + 4 * CELL, 24, "3MLcross: [MASK]s look at the latents", 15)]
    parts += [tokens(x, 330, kept, SEEN)]
    parts += [box(x, 190, w, 100, "the same encoder, n_en tokens", BLUE, 14, True)]
    parts += [box(x + 5 * CELL + 20, 112, 3 * CELL - GAP - 20, 50, "decoder", BLUE, 13, True)]
    for j in range(6):
        parts.append(arrow(x + j * CELL + 23, 328, 293))
    y = 137
    parts.append(
        f'<path d="M{x + 3 * CELL} 188 V{y} H{x + 5 * CELL + 16}" fill="none" stroke="{DARK}" '
        'stroke-width="1.3" marker-end="url(#tip)"/>'
    )
    parts += [label(x + 3 * CELL + 6, y - 8, "keys, values", 11, "start")]
    parts += [tokens(x + 6 * CELL, 210, MASKED, SEEN)]
    for j, i in ((6, 3), (7, 5)):
        parts.append(arrow(x + j * CELL + 23, 208, 165))
        parts.append(arrow(x + j * CELL + 23, 110, 88))
        parts.append(box(x + j * CELL - 1, 60, CELL - 2, 26, WORDS[i], RED, 10))
    parts.append(arrow(x + CELL + 23, 188, 88))
    parts.append(box(x + CELL - 4, 60, CELL + 2, 26, WORDS[1], GREEN, 11))
    parts += [label(460, 400, "grey: kept as it is", 12, "start")]
    parts += [
        label(620, 400, "green: replaced at random, predicted, kept in the encoder", 12, "start")
    ]
    parts += [label(1010, 400, "red: [MASK], predicted, not in 3ML's encoder", 12, "start")]
    parts += [label(20, 400, "numbers: positions", 12, "start")]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1320 415" font-family="sans-serif">'
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        f'<path d="M0,0 L6,3 L0,6 z" fill="{DARK}"/></marker></defs>'
        '<rect width="1320" height="415" fill="white"/>' + "\n".join(parts) + "</svg>\n"
    )
    Path(__file__).with_suffix(".svg").write_text(svg)


if __name__ == "__main__":
    main()
