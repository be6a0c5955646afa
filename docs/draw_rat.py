"""Draws docs/rat.png: what a token of RAT reads, with chunks of four tokens."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

CHUNK, CHUNKS, AT = 4, 4, 14  # tokens a chunk, chunks, the token whose reading is drawn
BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"


def arrow(axes, start, end, colour, bend=0.0):
    """An arrow between two points."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.3)
    )


def box(axes, x, y, width, colour, label, faint=False):
    """A labelled box with its lower left corner at (x, y)."""
    face = colour + ("22" if faint else "55")
    axes.add_patch(FancyBboxPatch((x, y), width, 0.5, boxstyle="round,pad=0.02", facecolor=face, edgecolor=colour))
    axes.text(x + width / 2, y + 0.25, label, ha="center", va="center", fontsize=9)


def main():
    """Writes the picture beside this file."""
    figure, axes = plt.subplots(figsize=(9, 3.4))
    for t in range(CHUNK * CHUNKS):
        x = t + 0.35 * (t // CHUNK)
        faint = t > AT
        box(axes, x, 0, 0.8, BLUE, f"$x_{{{t}}}$", faint)
        box(axes, x, 1.1, 0.8, BLUE, r"$\tilde{k},\tilde{v}$", faint)
        arrow(axes, (x + 0.4, 0.55), (x + 0.4, 1.08), GREY)
        if t % CHUNK:
            arrow(axes, (x - 0.18, 1.35), (x - 0.02, 1.35), BLUE)
    query = AT + 0.35 * (AT // CHUNK) + 0.4
    box(axes, query - 0.4, 2.75, 0.8, ORANGE, f"$y_{{{AT}}}$")
    for chunk in range(AT // CHUNK):
        last = (chunk + 1) * CHUNK - 1 + 0.35 * chunk + 0.4
        arrow(axes, (last, 1.65), (query - 0.25, 2.73), ORANGE, -0.12)
    arrow(axes, (query, 1.65), (query, 2.73), ORANGE)
    axes.text(0, 2.9, "softmax attention: last pair of every earlier chunk, and the token's own", color=ORANGE)
    axes.text(0, 2.5, "gated recurrence inside each chunk, from zero at its start", color=BLUE)
    axes.set(xlim=(-0.2, CHUNK * CHUNKS + 0.35 * CHUNKS), ylim=(-0.15, 3.4))
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(f"{__file__.rsplit('/', 1)[0]}/rat.png", dpi=130)


if __name__ == "__main__":
    main()
