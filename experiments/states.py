"""What the states of trained models tell.

    python experiments/states.py RUN [RUN ...] [--to PATH]      writes PATH.json and PATH.svg

RUN is the folder of a train.py run. First, where the identity of [MASK] is restored (section 4.2,
Figure 4): as in the paper, after Voita et al. (2019), the states at masked positions of frequent
tokens are clustered by k-means, after each layer, and what counts is the mutual information of
cluster and original token, in bits. The paper took 5 million states of 1,000 tokens and 10,000
clusters. A sample has some information even where there is none: that of shuffled tokens is in the
file as "chance". Second, how much the encoder's states vary between unmasked rows: their standard
deviation at <s>, from which fine-tuning predicts, and on average at the other tokens; before
training too."""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import mutual_info_score

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402
from data import Data  # noqa: E402

TOKENS, CLUSTERS, MASKS = 100, 200, 16  # MASKS: how many masks each validation row gets


def masked_states(model, rows, frequent, args, data):
    """(tokens (N,), [states (N, d) of layer 0, 1, ...]) at the masked positions of frequent tokens.
    The layers are the encoder's in vanilla MLM, else the decoder's; layer 0 is what they get."""
    part = model.encoder if args.decoder == "none" else model.decoder
    outputs, tokens, states = [], [], []
    for layer in (part.drop, *part.transformer.layers):
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for seed in range(MASKS):
        batch = train.corrupt_rows(rows, args.mask_rate, args, data, seed)
        n_m = batch.masked.size(1)
        outputs.clear()
        model(batch)
        wanted = torch.isin(batch.labels[:, :n_m], frequent)  # (B, n_m)
        tokens.append(batch.labels[:, :n_m][wanted])
        if args.decoder == "none":  # a row has all tokens; in 3ML, it ends with the [MASK]s
            outputs[:] = [x.take_along_dim(batch.masked.unsqueeze(-1), 1) for x in outputs]
        states.append([x[:, -n_m:][wanted].numpy() for x in outputs])
    return torch.cat(tokens).numpy(), [np.concatenate(layer) for layer in zip(*states)]


def information(tokens, states):
    """Mutual information of tokens and clusters of their states, and that by chance, in bits."""
    clusters = MiniBatchKMeans(CLUSTERS, max_iter=20, batch_size=4096, n_init=1, random_state=0)
    clusters = clusters.fit_predict(states)
    shuffled = np.random.default_rng(0).permutation(tokens)
    return [mutual_info_score(x, clusters) / math.log(2) for x in (tokens, shuffled)]


def spread(model, rows):
    """Standard deviation over rows of the encoder's states, at <s> and at other tokens."""
    deviations = model.encoder(rows).std(0).mean(-1)  # (n,)
    return deviations[0].item(), deviations[1:-1].mean().item()


@torch.no_grad()
def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--to", default=str(HERE / "states"), metavar="PATH")
    given, results = parser.parse_args(), {}
    for folder in given.runs:
        args = train.parse_flags(["--out", folder, "--eval_only"])
        data, model = Data(args.data), train.make_model(args).eval()
        rows = data.rows("val", range(min(1024, data.n_rows("val", args.seq_len))), args.seq_len)
        frequency = np.bincount(data.tokens["train"])
        frequency[:4] = 0  # special tokens
        frequent = torch.tensor(frequency.argsort()[-TOKENS:].copy())
        before = spread(model, rows)
        model.load_state_dict(train.load_checkpoint(folder)["model"])
        tokens, layers = masked_states(model, rows, frequent, args, data)
        bits, chance = zip(*(information(tokens, states) for states in layers))
        entropy = mutual_info_score(tokens, tokens) / math.log(2)
        result = dict(bits=bits, chance=chance, entropy=entropy, states=len(tokens))
        result |= dict(spread=spread(model, rows), spread_before=before)
        name = Path(folder).name.partition(".")[0]
        results[name] = result
        print(name, result, flush=True)
        plt.plot(bits, ".-", label=name)
    Path(f"{given.to}.json").write_text(json.dumps(results, indent=1))
    plt.gcf().set_size_inches(6, 3.2)
    plt.xlabel("layer (of the encoder for vanilla MLM, of the decoder for 3ML)")
    plt.ylabel("mutual information (bits)")
    plt.grid(alpha=0.3)
    plt.legend()
    plt.savefig(f"{given.to}.svg", bbox_inches="tight")


if __name__ == "__main__":
    main()
