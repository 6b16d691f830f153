"""Appendix D of the paper as code: the FLOPs of vanilla MLM and of 3ML, and their speed-ups.

    python flops.py        Table 3's speed-ups beside the paper's, and the curve of Figure 5

A multiply-add counts as two. What is not a matrix product is left out (under 1%). Symbols (Table
6): b batch size, u updates, l layers, n sequence length, d width, r masking rate, V vocabulary; _en
encoder, _de decoder. The formulas take r as a real number, as the paper does; `forward` takes the
whole numbers of tokens of a real batch, and is torch's FlopCounterMode exactly.

Where the paper's print and its own sums disagree, this file follows the sums: phi_out is printed
2n^2d, but 8nd^2 + 4n^2d needs 2nd^2; Eq. 4's last term belongs inside the bracket of 2bu(...), as
in Eq. 2 and 3; and in "n_de = 0.8nr and n_de = (1 - 0.8r)n" the second is n_en. Table 3 has 1.00
for vanilla MLM at 40%; Eq. 2 gives 0.96, since it predicts more."""


def msa(n, d):
    """Multi-head self-attention: projections 8nd^2, attention map and sum 4n^2d."""
    return 8 * n * d**2 + 4 * n**2 * d


def mlp(n, d):
    """Two layers, d to 4d and back."""
    return 16 * n * d**2


def block(n, d):
    """A Transformer block."""
    return msa(n, d) + mlp(n, d)


def mca(n_en, n_de, d_de):
    """Multi-head attention of n_de queries to n_en keys and values."""
    return 4 * n_en * d_de**2 + 4 * n_de * d_de**2 + 4 * n_en * n_de * d_de


def cross_block(n_en, n_de, d_de):
    """A Transformer block with self- and cross-attention."""
    return block(n_de, d_de) + mca(n_en, n_de, d_de)


def prediction_projected(n, r, d_en, d_de, V):
    """The prediction layer on a share r of n tokens: back to the encoder's width, then to words."""
    return 2 * n * r * (d_de * d_en + d_en * V)


def prediction(n, r, d, V):
    """The prediction layer after the encoder."""
    return prediction_projected(n, r, d, d, V)


def bridge(n_en, d_en, d_de):
    """The layer between the widths of encoder and decoder; there is none where these are equal."""
    return 2 * n_en * d_en * d_de if d_en != d_de else 0


# A training run, at 2 x forward as in the paper. masked: [MASK]'s share of the tokens to predict.


def roberta(b, u, l, n, d, r, V):
    """Eq. 2: vanilla MLM, all n tokens through the encoder."""
    return 2 * b * u * (l * block(n, d) + prediction(n, r, d, V))


def three_ml_self(b, u, l_en, l_de, n, d_en, d_de, r, V, masked=0.8):
    """Eq. 3: 3MLself."""
    n_en = n - masked * r * n
    encoder = l_en * block(n_en, d_en) + bridge(n_en, d_en, d_de)
    decoder = l_de * block(n, d_de) + prediction_projected(n, r, d_en, d_de, V)
    return 2 * b * u * (encoder + decoder)


def three_ml_cross(b, u, l_en, l_de, n, d_en, d_de, r, V, masked=0.8):
    """Eq. 4: 3MLcross; the replaced and unchanged tokens are predicted after the encoder."""
    n_de = masked * r * n
    n_en = n - n_de
    encoder = l_en * block(n_en, d_en) + bridge(n_en, d_en, d_de)
    visible = prediction(n_en, (r * n - n_de) / n_en, d_en, V)
    decoder = l_de * cross_block(n_en, n_de, d_de) + prediction_projected(n_de, 1, d_en, d_de, V)
    return 2 * b * u * (encoder + visible + decoder)


FORMULAS = {"self": three_ml_self, "cross": three_ml_cross}


def forward(config, n, n_masked, k):
    """Forward FLOPs of a row of n tokens, n_masked of them [MASK] and k predicted, through the
    MaskedLM of a ModelConfig: exactly those of its matrix products. None for a decoder that has no
    entry in FORMULAS. One row and half an update make the factor 2bu of the formulas 1."""
    c, r, V = config, k / n, config.vocab_size
    if c.decoder == "none":
        return round(roberta(1, 0.5, c.n_layer, n, c.n_embd, r, V))
    if c.decoder not in FORMULAS:
        return None
    shape = (c.n_layer, c.n_layer_dec, n, c.n_embd, c.n_embd_dec)
    return round(FORMULAS[c.decoder](1, 0.5, *shape, r, V, masked=n_masked / k))


# Updates of the baseline (vanilla MLM at 15%), layers, sequence length, width
SIZES = {"large": (23_000, 24, 128, 1024), "base": (125_000, 12, 512, 768)}
TABLE_3 = (  # size, decoder, masking rate, updates, the paper's speed-up
    ("large", "none", 0.4, 23_000, 1.00), ("large", "self", 0.4, 23_000, 1.34),
    ("large", "self", 0.5, 23_000, 1.47), ("large", "cross", 0.4, 23_000, 1.37),
    ("base", "self", 0.4, 125_000, 1.22), ("base", "self", 0.4, 153_000, 1.00),
    ("base", "self", 0.5, 125_000, 1.28), ("base", "self", 0.5, 160_000, 1.00),
    ("base", "cross", 0.4, 157_000, 1.00),
)  # fmt: skip


def speed_up(size, decoder, r, u):
    """FLOPs of the baseline of a size over those of another run, as the paper counts them."""
    updates, l, n, d = SIZES[size]
    baseline = roberta(1, updates, l, n, d, 0.15, V=50265)  # of one row: batches are equally large
    if decoder == "none":
        return baseline / roberta(1, u, l, n, d, r, V=50265)
    return baseline / FORMULAS[decoder](1, u, l, 2, n, d, d // 2, r, V=50265)


def main():
    print("Table 3: speed-up over vanilla MLM at 15%\nsize   decoder  rate  updates  ours  paper")
    for size, decoder, r, u, paper in TABLE_3:
        ours = speed_up(size, decoder, r, u)
        print(f"{size:<7}{decoder:<9}{r:.0%}{u:>10,}{ours:>6.2f}{paper:>7.2f}")
    print("\nFigure 5: the same for large models\nrate    self   cross")
    for percent in range(15, 85, 5):
        ours = [speed_up("large", decoder, percent / 100, 23_000) for decoder in FORMULAS]
        print(f"{percent}%  {ours[0]:>6.2f}{ours[1]:>8.2f}")


if __name__ == "__main__":
    main()
