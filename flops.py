"""Appendix D of the paper as code: the FLOPs of vanilla MLM and of 3ML, and the speed-ups they yield.

    python flops.py        Table 3's speed-ups beside the paper's, and the curve of Figure 5

A multiply-add counts as two. Biases, activations, LayerNorm, softmax, dropout and the embedding look-up are
left out (they are under 1%). Symbols (Table 6): b batch size, u updates, l layers, n sequence length, d
width, r masking rate, V vocabulary; _en encoder, _de decoder. The formulas take r as a real number, as the
paper does; `forward` takes a real batch's whole numbers of tokens, and is torch's FlopCounterMode exactly.

Where the paper's print and its own sums disagree, this file follows the sums: phi_out is printed 2n^2d, but
8nd^2 + 4n^2d needs 2nd^2; Eq. 4's last term belongs inside the bracket of 2bu(...), as in Eq. 2 and 3; and in
"n_de = 0.8nr and n_de = (1 - 0.8r)n" the second is n_en."""

import argparse


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


def prediction(n, r, d, V):
    """The prediction layer on a share r of n tokens."""
    return 2 * n * r * (d**2 + d * V)


def prediction_projected(n, r, d_en, d_de, V):
    """The prediction layer whose first part projects the decoder's width back to the encoder's."""
    return 2 * n * r * (d_de * d_en + d_en * V)


def row(decoder, n, n_masked, k, l_en, l_de, d_en, d_de, V):
    """Forward pass of one row, of which n_masked tokens are [MASK] and k are predicted: the brackets of Eq. 2
    ("none", vanilla MLM), Eq. 3 ("self") and Eq. 4 ("cross")."""
    if decoder == "none":
        return l_en * block(n, d_en) + prediction(k, 1, d_en, V)
    n_en = n - n_masked
    encoder = l_en * block(n_en, d_en) + (2 * n_en * d_en * d_de if d_en != d_de else 0)
    if decoder == "self":
        return encoder + l_de * block(n, d_de) + prediction_projected(k, 1, d_en, d_de, V)
    visible = prediction(k - n_masked, 1, d_en, V)  # the replaced and unchanged tokens
    masks = l_de * cross_block(n_en, n_masked, d_de) + prediction_projected(n_masked, 1, d_en, d_de, V)
    return encoder + masks + visible


def forward(config, n, n_masked, k):
    """Forward FLOPs of one row of n tokens, of which n_masked are [MASK] and k are predicted, through a
    model.MaskedLM of this model.ModelConfig: exactly those of its matrix products."""
    shape = (config.n_layer, config.n_layer_dec, config.n_embd, config.n_embd_dec, config.vocab_size)
    return row(config.decoder, n, n_masked, k, *shape)


# A training run. Forward and backward count as 2 x forward, as in the paper; for ratios it does not matter.


def roberta(b, u, l, n, d, r, V):
    """Eq. 2: vanilla MLM, all n tokens through the encoder."""
    return 2 * b * u * row("none", n, 0, r * n, l, 0, d, d, V)


def three_ml_self(b, u, l_en, l_de, n, d_en, d_de, r, V):
    """Eq. 3: 3MLself."""
    return 2 * b * u * row("self", n, 0.8 * r * n, r * n, l_en, l_de, d_en, d_de, V)


def three_ml_cross(b, u, l_en, l_de, n, d_en, d_de, r, V):
    """Eq. 4: 3MLcross; the 0.2rn replaced and unchanged tokens are predicted after the encoder."""
    return 2 * b * u * row("cross", n, 0.8 * r * n, r * n, l_en, l_de, d_en, d_de, V)


# The table

SIZES = {"large": (4096, 128, 24, 1024), "base": (2048, 512, 12, 768)}  # batch, row length, layers, width
TABLE_3 = (  # name, size, decoder, masking rate, updates, the paper's speed-up
    ("24hBERT-15%", "large", "none", 0.15, 23_000, 1.00),
    ("24hBERT-40%", "large", "none", 0.40, 23_000, 1.00),
    ("3MLself-40%", "large", "self", 0.40, 23_000, 1.34),
    ("3MLself-50%", "large", "self", 0.50, 23_000, 1.47),
    ("3MLcross-40%", "large", "cross", 0.40, 23_000, 1.37),
    ("RoBERTa", "base", "none", 0.15, 125_000, 1.00),
    ("3MLself-40%-125K", "base", "self", 0.40, 125_000, 1.22),
    ("3MLself-40%-153K", "base", "self", 0.40, 153_000, 1.00),
    ("3MLself-50%-125K", "base", "self", 0.50, 125_000, 1.28),
    ("3MLself-50%-160K", "base", "self", 0.50, 160_000, 1.00),
    ("3MLcross-40%-157K", "base", "cross", 0.40, 157_000, 1.00),
)


def run(size, decoder, r, u):
    """FLOPs of a run of Table 3, as the paper counts them."""
    b, n, l, d = SIZES[size]
    if decoder == "none":
        return roberta(b, u, l, n, d, r, 50265)
    formula = {"self": three_ml_self, "cross": three_ml_cross}[decoder]
    return formula(b, u, l, 2, n, d, d // 2, r, 50265)


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args(argv)
    print("Table 3: speed-up over vanilla MLM at 15%")
    print(f"{'model':<20}{'size':<7}{'updates':>8}{'ours':>7}{'paper':>7}")
    baseline = dict(large=run("large", "none", 0.15, 23_000), base=run("base", "none", 0.15, 125_000))
    for name, size, decoder, r, u, paper in TABLE_3:
        print(f"{name:<20}{size:<7}{u:>8,}{baseline[size] / run(size, decoder, r, u):>7.2f}{paper:>7.2f}")
    print("\nFigure 5: speed-up of the large models over vanilla MLM at 15%\nrate   3MLself  3MLcross")
    for percent in range(15, 85, 5):
        runs = [run("large", decoder, percent / 100, 23_000) for decoder in ("self", "cross")]
        print(f"{percent}%  {baseline['large'] / runs[0]:>8.2f}{baseline['large'] / runs[1]:>10.2f}")


if __name__ == "__main__":
    main()
