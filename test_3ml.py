"""The tests, in the order of the files: model, data, flops, train, finetune.

    pytest test_3ml.py

Each compares with something independent (transformers, torch's own layers, scipy,
FlopCounterMode, a count by hand) or holds two runs to a relation that a mistake would break. A
comparison whose library is not installed is skipped."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import data
import finetune as ft
import flops
import model as m
import train
from data import Corrupted, Data, Vocab, corrupt, counts
from experiments.faults import equal as same_state
from experiments.faults import log_of, same_end, untimed

VOCAB = Vocab(size=99, mask=98)
SHAPE = dict(vocab_size=99, n_positions=20, n_layer=2, n_embd=32, head_size=16, n_embd_dec=16)
BOTH_NORMS = pytest.mark.parametrize("norm", ["post", "pre"])
BOTH_DECODERS = pytest.mark.parametrize("decoder", ["self", "cross"])
ALL_MODELS = pytest.mark.parametrize("decoder", ["self", "cross", "none"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def config_of(**changes):
    return m.ModelConfig(**{**SHAPE, "dropout": 0.0, **changes})


def shaken(module):
    """No parameter at a value, such as 0 or 1, that would hide its absence or exchange."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return module.eval()


def model_of(**changes):
    return shaken(m.MaskedLM(config_of(**changes)))


def random_rows(B=4, n=20, vocab=VOCAB):
    rows = torch.randint(4, vocab.size - 1, (B, n))
    rows[:, 0], rows[:, -1] = vocab.bos, vocab.eos
    return rows


def random_batch(B=4, n=20, rate=0.5, seed=0, rows=None):
    rows = random_rows(B, n) if rows is None else rows
    g = torch.Generator().manual_seed(seed)
    return corrupt(rows, rate, vocab=VOCAB, generator=g)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------- model.py


def hf_model(norm, head, **changes):
    """A random `transformers` RoBERTa (post-LN) or RobertaPreLayerNorm of SHAPE's shape."""
    transformers = pytest.importorskip("transformers")
    name = {"post": "Roberta", "pre": "RobertaPreLayerNorm"}[norm]
    hf_config = getattr(transformers, f"{name}Config")(
        vocab_size=99, max_position_embeddings=22, num_hidden_layers=2, hidden_size=32,
        num_attention_heads=2, intermediate_size=128, type_vocab_size=1, layer_norm_eps=1e-5,
        **changes,
    )  # fmt: skip
    return shaken(getattr(transformers, f"{name}{head}")(hf_config))


@BOTH_NORMS
def test_vanilla_mlm_is_transformers_in_losses_and_gradients(norm, tmp_path):
    theirs = hf_model(norm, "ForMaskedLM")
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    pytest.importorskip("safetensors")
    _, encoder = m.load_pretrained(tmp_path)
    ours = model_of(decoder="none", norm=norm)
    ours.encoder.load_state_dict(encoder.state_dict())
    head = dict(theirs.lm_head.named_parameters())
    ours.decoder.fc1.load_state_dict(theirs.lm_head.dense.state_dict())
    ours.ln.load_state_dict(theirs.lm_head.layer_norm.state_dict())
    ours.bias.data.copy_(theirs.lm_head.decoder.bias)

    batch = random_batch()
    labels = torch.full_like(batch.inputs, -100).scatter(1, batch.predict, batch.labels)
    out = theirs(input_ids=batch.inputs, labels=labels)
    losses = F.cross_entropy(out.logits.transpose(1, 2), labels, reduction="none")
    close(ours(batch), losses.gather(1, batch.predict))

    out.loss.backward()
    ours(batch).mean().backward()
    close(ours.decoder.fc1.weight.grad, head["dense.weight"].grad)
    close(ours.ln.bias.grad, head["layer_norm.bias"].grad)
    close(ours.bias.grad, theirs.lm_head.decoder.bias.grad)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    prefix = "roberta." if norm == "post" else "roberta_prelayernorm."
    for name, names in m.hf_names(ours.config, prefix):
        grad = torch.cat([grads[x] for x in names])
        grad = grad[2:] if name == "pos.weight" else grad
        close(ours.encoder.get_parameter(name).grad, grad)


@BOTH_NORMS
def test_encoder_on_kept_tokens_is_transformers_with_their_positions(norm, tmp_path):
    theirs = hf_model(norm, "Model")
    theirs.save_pretrained(tmp_path)
    pytest.importorskip("safetensors")
    _, encoder = m.load_pretrained(tmp_path)
    batch = random_batch()
    tokens = batch.inputs.gather(1, batch.kept)
    expected = theirs(input_ids=tokens, position_ids=batch.kept + 2).last_hidden_state
    close(encoder.eval()(tokens, batch.kept), expected)


@BOTH_NORMS
@pytest.mark.parametrize("cross", [False, True])
def test_block_is_torchs_transformer_layer(norm, cross):
    block = shaken(m.Block(32, config_of(norm=norm), cross))
    layer = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    theirs = layer(32, 2, 128, 0.0, "gelu", 1e-5, batch_first=True, norm_first=norm == "pre").eval()
    names = dict(self_attn="attn", linear1="fc1", linear2="fc2", norm1="ln1", norm2="ln2")
    if cross:
        names |= dict(multihead_attn="cross", norm2="ln_cross", norm3="ln2")
    for name, ours in names.items():
        weights = block.get_submodule(ours).state_dict()
        if ours in ("attn", "cross"):
            weights = {
                k.replace("qkv.", "in_proj_").replace("out.", "out_proj."): v
                for k, v in weights.items()
            }
        theirs.get_submodule(name).load_state_dict(weights)
    x, memory = torch.randn(3, 7, 32), torch.randn(3, 5, 32) if cross else None
    with torch.enable_grad():  # torch's fast path is another program
        close(block(x, memory), theirs(x, memory) if cross else theirs(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_cross_entropy_is_torchs_in_losses_and_gradients(dtype):
    """Over more rows than it takes at once, each with a weight of its own in the mean."""
    logits = (5 * torch.randn(230, 50_000)).to(dtype).requires_grad_()
    labels, upstream = torch.randint(50_000, (230,)), torch.rand(230).to(m.exact(logits).dtype)
    expected = F.cross_entropy(m.exact(logits), labels, reduction="none")
    (grad,) = torch.autograd.grad(expected, logits, upstream)
    losses = m.CrossEntropy.apply(logits, labels)
    (ours,) = torch.autograd.grad(losses, logits, upstream)
    close(losses, expected)
    assert ours.dtype == dtype and len(list(m.CrossEntropy.split(logits, labels))) > 2
    rounding = {torch.bfloat16: 2**-7, torch.float32: 1e-4, torch.float64: 1e-9}[dtype]
    torch.testing.assert_close(ours, grad, rtol=rounding, atol=1e-9)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_a_fair_coin_per_element(p):
    """Share, scale, independence of neighbours (four share a draw) and gradient, as F.dropout has
    them."""
    stats = pytest.importorskip("scipy.stats")
    x = torch.ones(400_001, requires_grad=True)
    y = m.dropout(x, p)
    kept = (y > 0).long()
    assert (
        torch.equal(y[kept > 0].unique(), y[kept > 0][:1])
        and abs(float(y.detach().max()) - 1 / (1 - p)) < 1e-4
    )
    assert stats.binomtest(int(kept.sum()), len(x), 1 - p).pvalue > 1e-4
    for lag in (1, 2, 3, 4):
        pairs = torch.bincount(kept[:-lag] * 2 + kept[lag:], minlength=4).reshape(2, 2)
        assert stats.chi2_contingency(pairs.numpy()).pvalue > 1e-4
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(m.dropout(x, 0.0), x) and m.Dropout(p).eval()(x) is not None


def test_attention_on_a_cpu_drops_weights_not_keys():
    """Its expectation is attention without dropout, padding stays unseen: against SDPA, by
    averaging."""
    net, x = shaken(m.Attention(32, 16, 0.5)), torch.randn(1, 6, 32)
    mask = torch.tensor([1, 1, 1, 1, 0, 0], dtype=bool)[None, None, None]
    expected = net(x, mask=mask)
    net.train()
    samples = torch.stack([net(x, mask=mask) for _ in range(4000)])
    assert ((samples.mean(0) - expected).abs() < 5 * samples.std(0) / 4000**0.5 + 1e-6).all()
    changed = x.clone()
    changed[:, 4:] = 9
    torch.manual_seed(1)
    a = net(x, mask=mask)
    torch.manual_seed(1)
    assert torch.equal(a[:, :4], net(changed, mask=mask)[:, :4])


@BOTH_DECODERS
@BOTH_NORMS
def test_what_a_mask_hides_never_reaches_the_model(decoder, norm):
    rows = random_rows()
    batch = random_batch(rows=rows)
    other = rows.scatter(1, batch.masked, (rows.gather(1, batch.masked) + 7) % 90 + 4)
    changed = random_batch(rows=other)
    n_m = batch.masked.size(1)
    assert torch.equal(batch.inputs, changed.inputs) and torch.equal(batch.predict, changed.predict)
    assert (batch.labels[:, :n_m] != changed.labels[:, :n_m]).all()
    net = model_of(decoder=decoder, norm=norm)
    assert torch.equal(net.logits(batch), net.logits(changed))


@BOTH_DECODERS
def test_order_in_memory_is_nothing_and_position_is_all(decoder):
    net, batch = model_of(decoder=decoder), random_batch()
    logits = net.logits(batch)  # (B, k, V)
    n_m, k = batch.masked.size(1), batch.predict.size(1)
    # [MASK]s, and what is to be predicted of them, in another order: the outputs follow
    order = torch.randperm(n_m)
    predict = torch.cat([batch.masked[:, order], batch.predict[:, n_m:]], dim=1)
    moved = net.logits(batch._replace(masked=batch.masked[:, order], predict=predict))
    close(moved, logits[:, torch.cat([order, torch.arange(n_m, k)])])
    assert not torch.allclose(moved, logits, atol=1e-3)
    # kept tokens, with their positions, in another order: nothing changes
    close(
        net.logits(batch._replace(kept=batch.kept[:, torch.randperm(batch.kept.size(1))])), logits
    )
    # two kept words exchange places: everything may change
    a, b = batch.kept[0, 2], batch.kept[0, 5]
    inputs = batch.inputs.clone()
    inputs[0, a], inputs[0, b] = batch.inputs[0, b], batch.inputs[0, a]
    changed = (net.logits(batch._replace(inputs=inputs)) - logits).abs().amax(dim=(1, 2)) > 1e-3
    assert changed.tolist() == [True, False, False, False]


def test_encoder_states_depend_on_kept_tokens_alone():
    """Eight more tokens, all masked: 3ML's encoder sees the same, vanilla MLM's does not."""
    short = random_batch(n=12)
    longer = torch.cat([short.masked, torch.arange(12, 20).expand(4, -1)], dim=1)
    inputs = torch.cat([short.inputs, torch.full((4, 8), VOCAB.mask)], dim=1)
    k = torch.cat([longer, short.predict[:, short.masked.size(1) :]], dim=1)
    long = Corrupted(inputs, short.kept, longer, k, k, short.n_replaced)
    for decoder, same in (("self", True), ("cross", True), ("none", False)):
        net, seen = model_of(decoder=decoder), []
        net.encoder.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        net.logits(short), net.logits(long)
        if decoder == "none":
            seen = [x.gather(1, short.kept.unsqueeze(-1).expand(-1, -1, 32)) for x in seen]
        assert torch.equal(*seen) == same


def copy_rule(B, h, vocab):
    """Rows whose second half repeats the first. Of each pair of twins one may be masked, the
    other is kept; a quarter of the pairs stay whole, and one of their twins is predicted,
    unchanged."""
    half = torch.randint(4, vocab.size - 1, (B, h))
    rows = torch.cat([half, half], dim=1)
    order, side = torch.rand(B, h).argsort(1), torch.randint(2, (B, h))
    chosen, n_m = order + h * side, h * 3 // 4
    masked, unchanged = chosen[:, :n_m].sort().values, chosen[:, n_m:].sort().values
    kept = torch.ones(B, 2 * h).scatter_(1, masked, 0).argsort(dim=1, descending=True, stable=True)
    kept = kept[:, : 2 * h - n_m]
    predict = torch.cat([masked, unchanged], dim=1)
    inputs = rows.scatter(1, masked, vocab.mask)
    return Corrupted(inputs, kept, masked, predict, rows.gather(1, predict), 0)


@pytest.mark.parametrize(
    "decoder, norm",
    [("self", "post"), ("self", "pre"), ("cross", "pre"), ("none", "post"), ("none", "pre")],
)
def test_learns_a_rule_of_position_under_fresh_masks(decoder, norm):
    """Chance is ln 12 = 2.5 nats; only positions and labels that belong together bring it near
    0."""
    vocab, h = Vocab(size=17, mask=16), 6
    net = m.MaskedLM(m.ModelConfig(17, 2 * h, 2, 48, 24, decoder, 2, 48, norm, 0.0))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(1200):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 100) * (1 - step / 1300)
        loss = net(copy_rule(32, h, vocab)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49 and loss < 0.02:
            break
    net.eval()
    losses = net(copy_rule(512, h, vocab))
    assert losses.mean() < 0.05
    assert losses.mean(0).max() < 0.15  # masked and unchanged alike


@pytest.mark.parametrize("decoder, l, d, millions", [
    ("none", 24, 1024, 355), ("self", 24, 1024, 362), ("cross", 24, 1024, 365),
    ("none", 12, 768, 125), ("self", 12, 768, 128), ("cross", 12, 768, 130),
])  # fmt: skip
def test_parameters_are_counted_by_hand(decoder, l, d, millions):
    norm = "pre" if l == 24 or decoder == "cross" else "post"
    with torch.device("meta"):
        net = m.MaskedLM(m.ModelConfig(n_layer=l, n_embd=d, decoder=decoder, norm=norm))
    V, P, e = 50265, 512, d // 2

    def block(d, cross=False):
        attention = 4 * d * d + 4 * d
        return (1 + cross) * (attention + 2 * d) + 8 * d * d + 5 * d + 2 * d

    final = 2 if norm == "pre" else 0
    expected = V * d + P * d + 2 * d + l * block(d) + final * d  # encoder
    expected += 2 * d + V  # LayerNorm and bias of the prediction layer
    if decoder == "none":
        expected += d * d + d
    else:
        expected += d * e + e + e + P * e + 2 * block(e, decoder == "cross") + final * e + e * d + d
    if decoder == "cross":
        expected += d * d + d
    assert sum(p.numel() for p in net.parameters()) == expected
    assert round(expected / 1e6) == millions


TEXT = "the cat sat on the mat; a dog barked. "


def tokenizer_file(folder, vocab_size=300, text=TEXT):
    path = Path(folder) / "tokenizer.json"
    data.train_bpe([text * 20, "Grüße, 你好\n  <mask> indeed\n" * 5], vocab_size, path)
    return path


@BOTH_NORMS
@ALL_MODELS
def test_hf_folder_is_transformers_model(norm, decoder, tmp_path):
    transformers = pytest.importorskip("transformers")
    net = model_of(decoder=decoder, norm=norm)
    m.save_pretrained(net, tmp_path)
    auto = transformers.AutoModelForMaskedLM if decoder == "none" else transformers.AutoModel
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert all("pooler" in name for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    theirs.eval()
    tokens, mask = random_rows(), torch.arange(20) < torch.tensor([[20], [13], [7], [2]])
    tokens[~mask] = VOCAB.pad
    states = net.encoder(tokens, attention_mask=mask)
    base = theirs.base_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    close(states[mask], base[mask])
    if decoder == "none":
        batch = random_batch()
        close(
            net.logits(batch),
            theirs(batch.inputs).logits.gather(1, batch.predict[..., None].expand(-1, -1, 99)),
        )
    shape, encoder = m.load_pretrained(tmp_path)
    assert asdict(shape) == asdict(
        replace(net.config, decoder="none", n_embd_dec=16, n_layer_dec=2)
    )
    for name, p in net.encoder.state_dict().items():
        assert torch.equal(p, encoder.state_dict()[name]), name


def test_autotokenizer_gives_our_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    m.save_pretrained(model_of(), tmp_path / "hf", tokenizer_file(tmp_path))
    ours, vocab = data.load_tokenizer(tmp_path / "hf" / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("the cat sat", "  Two  spaces\nand a dog barked.\n\n", "Grüße 你好 🎉", ""):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs(text)["input_ids"] == [vocab.bos, *ids, vocab.eos]
        assert ours.decode(ids) == text
    pair = theirs("the cat", "a dog")["input_ids"]
    a, b = (ours.encode(t, add_special_tokens=False).ids for t in ("the cat", "a dog"))
    assert pair == [0, *a, 2, 2, *b, 2]
    assert theirs.mask_token_id == vocab.mask == vocab.size - 1
    assert vocab.mask in theirs("the <mask> sat")["input_ids"]
    assert vocab.mask not in ours.encode("the <mask> sat").ids  # in a corpus it is mere text


# ----------------------------------------------------------------------------------- data.py


@pytest.mark.parametrize("n", [4, 20, 128, 513])
@pytest.mark.parametrize("rate", [0.15, 0.4, 0.5, 1.0])
@pytest.mark.parametrize(
    "strategy", [(0.8, 0.1, 0.1), (1, 0, 0), (0.8, 0.2, 0), (0.8, 0, 0.2), (0, 0, 1)]
)
def test_corruption_has_exact_counts(n, rate, strategy):
    if round(rate * (n - 2)) == 0:
        with pytest.raises(ValueError):
            counts(n, rate, strategy)
        return
    rows = random_rows(8, n)
    batch = corrupt(rows, rate, strategy, vocab=VOCAB)
    k = round(rate * (n - 2))
    n_m = round(strategy[0] * k)
    n_r = round((strategy[0] + strategy[1]) * k) - n_m
    assert batch.predict.shape == batch.labels.shape == (8, k) and batch.n_replaced == n_r
    assert batch.masked.shape == (8, n_m) and batch.kept.shape == (8, n - n_m)
    assert torch.equal(batch.labels, rows.gather(1, batch.predict))
    for r in range(8):
        masked, replaced, unchanged = batch.predict[r].split([n_m, n_r, k - n_m - n_r])
        assert (
            torch.equal(masked, batch.masked[r]) and (batch.inputs[r, masked] == VOCAB.mask).all()
        )
        assert all(
            torch.equal(x, x.sort().values) for x in (masked, replaced, unchanged, batch.kept[r])
        )
        assert sorted(batch.kept[r].tolist() + masked.tolist()) == list(range(n))
        assert len(set(batch.predict[r].tolist())) == k
        same = torch.ones(n, dtype=bool)
        same[masked] = same[replaced] = False
        assert torch.equal(batch.inputs[r][same], rows[r][same])


def test_specials_are_never_chosen_and_never_drawn():
    rows = random_rows(64, 20)
    rows[:, 3], rows[:, 7], rows[:, 8] = VOCAB.eos, VOCAB.unk, VOCAB.pad
    batch = corrupt(rows, 0.8, (0.2, 0.8, 0.0), vocab=VOCAB)
    assert not (batch.predict[..., None] == torch.tensor([0, 3, 7, 8, 19])).any()
    words = batch.inputs.gather(1, batch.predict[:, batch.masked.size(1) :])
    assert words.min() == 4 and words.max() == 97
    with pytest.raises(ValueError, match="mask_rate"):
        corrupt(rows, 1.0, vocab=VOCAB)


def test_masks_and_words_are_uniform_and_independent():
    stats = pytest.importorskip("scipy.stats")
    R, n = 20_000, 22
    rows = random_rows(1, n).expand(R, n)
    batch = corrupt(
        rows, 0.5, (0.5, 0.3, 0.2), vocab=VOCAB, generator=torch.Generator().manual_seed(1)
    )
    n_m, n_r, slots = batch.masked.size(1), batch.n_replaced, n - 2

    def p_value(positions):
        """Chi-square of how often each slot occurs when every row has exactly q of the 20."""
        q = positions.size(1)
        seen = torch.bincount(positions.flatten(), minlength=n)[1:-1].double()
        p = q / slots
        x = ((seen - R * p) ** 2).sum() / (R * p * (1 - p)) * (slots - 1) / slots
        return stats.chi2.sf(float(x), slots - 1)

    parts = batch.predict.split([n_m, n_r, batch.predict.size(1) - n_m - n_r], dim=1)
    assert all(1e-4 < p_value(x) < 1 - 1e-4 for x in (batch.predict, *parts))
    chosen = torch.zeros(R, n).scatter_(1, batch.masked, 1)[:, 1:-1]
    together = (chosen.T @ chosen)[torch.triu(torch.ones(slots, slots), 1) > 0].double()
    p = n_m * (n_m - 1) / (slots * (slots - 1))
    assert ((together - R * p) / math.sqrt(R * p * (1 - p))).abs().max() < 4.5  # of 190 pairs
    all_sets = math.comb(slots, n_m)  # rows differ as much as random sets of slots do
    expected = all_sets * (1 - (1 - 1 / all_sets) ** R)
    assert abs(len(torch.unique(chosen, dim=0)) / expected - 1) < 0.03
    words = torch.bincount(batch.inputs.gather(1, parts[1]).flatten(), minlength=99)[4:98]
    assert 1e-4 < stats.chisquare(words.numpy()).pvalue < 1 - 1e-4


def test_same_generator_state_same_masks():
    rows = random_rows()
    a, b, c = (random_batch(rows=rows, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1]))
    assert not torch.equal(a.predict, c.predict)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_shuffled_is_a_permutation_that_its_key_decides(n):
    a, b = (data.shuffled(np.arange(n), n, (key,)) for key in (1, 2))
    assert sorted(a) == sorted(b) == list(range(n))
    assert n < 16 or (a != b).sum() > n / 2
    assert n < 16 or (a[data.shuffled(np.arange(n // 2), n, (9,))] != a[: n // 2]).any()
    assert np.array_equal(data.shuffled(np.arange(n - 1, n), n, (1,)), a[-1:])


def test_shuffled_sends_an_element_anywhere():
    stats = pytest.importorskip("scipy.stats")
    seen = Counter((int(data.shuffled(np.array([3]), 10, (key,))[0])) for key in range(4000))
    assert stats.chisquare([seen[i] for i in range(10)]).pvalue > 1e-4


TEXTS = [
    "The cat sat.\nOn the mat.",
    "A dog barked — twice.",
    "Grüße <mask> </s>\tand 你好",
    "one\ntwo  three",
]


def prepared(folder, texts=TEXTS * 3, doc="blank", **options):
    source = Path(folder) / "text.txt"
    source.write_text("\n\n".join(texts) + "\n\n\n", encoding="utf-8")
    options = {"vocab_size": 300, "val": 0.3, **options}
    data.prepare([source], Path(folder) / doc, doc, **options)
    return Data(Path(folder) / doc)


def test_no_changed_bit_of_meta_json_is_believed(tmp_path, capsys):
    d = prepared(tmp_path)
    path = d.directory / "meta.json"
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for at, bit in zip(rng.integers(len(good), size=200), rng.integers(8, size=200)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
        try:
            assert data.read_meta(d.directory) == d.meta  # as where a space became a newline
        except SystemExit as e:
            assert e.code == 2 and "meta.json: damaged" in capsys.readouterr().err


def test_other_words_in_as_many_bytes_are_other_files(tmp_path, capsys):
    prepared(tmp_path)
    prepared(tmp_path)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        prepared(tmp_path, [text.replace("cat", "dog") for text in TEXTS * 3])
    assert "other files" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_what_was_there(error, tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(error), data.atomic(tmp_path / "file", "w") as f:
        f.write("half")
        raise error
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_a_refusal_removes_its_own_folder_and_no_other(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    for name in ("theirs", "link", "ours"):
        with pytest.raises(SystemExit), data.lock(tmp_path / name):
            data.fail("refused")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "theirs"]


def documents(d, part):
    """The texts of a token file, by its separators."""
    tokenizer, vocab = data.load_tokenizer(d.tokenizer)
    ids = d.tokens[part].tolist()
    assert ids[-1] == vocab.eos
    ends = [i for i, t in enumerate(ids) if t == vocab.eos]
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in zip([-1, *ends], ends)]


@pytest.mark.parametrize("doc", ["blank", "line", "file"])
def test_prepared_tokens_are_the_documents_shuffled(doc, tmp_path):
    d = prepared(tmp_path, doc=doc, **({"val": 0.3})) if doc != "file" else None
    if doc == "file":
        for i, text in enumerate(TEXTS):
            (tmp_path / f"{i}.txt").write_bytes(
                b"\xef\xbb\xbf" * (i == 0) + text.replace("\n", "\r\n").encode()
            )
        data.main(
            [
                "--input",
                str(tmp_path / "?.txt"),
                "--doc",
                "file",
                "--out",
                str(tmp_path / "file"),
                "--vocab_size",
                "300",
            ]
        )
        d, expected = Data(tmp_path / "file"), TEXTS
    else:
        expected = TEXTS * 3 if doc == "blank" else [x for t in TEXTS * 3 for x in t.split("\n")]
    found = documents(d, "val") + documents(d, "train")
    assert sorted(found) == sorted(expected)
    assert doc == "file" or found != expected
    assert d.meta["documents"]["val"] == len(documents(d, "val")) >= 1


def test_long_documents_are_cut_between_lines(tmp_path, monkeypatch):
    text = "\n".join(f"line {i}: caf\u00e9 \u4f60\u597d" * (i % 7 + 1) for i in range(500))
    (tmp_path / "wide").mkdir()
    whole = prepared(tmp_path / "wide", [text, "end"])
    monkeypatch.setattr(data, "PIECE", 101)
    monkeypatch.setattr(data, "CHUNK", 150)
    cut = prepared(tmp_path, [text, "end"])
    for part in ("train", "val"):
        assert documents(cut, part) == documents(whole, part)


def test_roberta_layout_and_wide_ids(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    specials = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    for size, dtype in ((50265, "uint16"), (65537, "uint32")):
        words = {**specials, **{c: i + 4 for i, c in enumerate(letters)}}
        words |= {f"w{i}": i for i in range(len(words), size - 1)}
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab={**words, "<mask>": size - 1}, merges=[])
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        tokenizer.save(str(tmp_path / "roberta.json"))
        (tmp_path / dtype).mkdir()
        d = prepared(tmp_path / dtype, tokenizer=tmp_path / "roberta.json")
        assert d.vocab == Vocab(size, 0, 1, 2, 3, size - 1) and d.meta["dtype"] == dtype
        assert sorted(documents(d, "train") + documents(d, "val")) == sorted(TEXTS * 3)


def test_rows_of_an_epoch_come_once_each_in_an_order_of_its_own(tmp_path):
    d, n, B = prepared(tmp_path, TEXTS * 9), 10, 4
    N = d.n_rows("train", n)
    assert len(d.tokens["train"]) // 8 == N and N > 3 * B
    everything = d.rows("train", np.arange(N), n)
    assert (everything[:, 0] == 0).all() and (everything[:, -1] == 2).all()
    assert np.array_equal(everything[:, 1:-1].ravel(), d.tokens["train"][: N * 8])
    steps = 2 * N // B + 1
    seen = torch.cat([d.batch(s, B, n, 1, seed=5) for s in range(steps)]).tolist()
    epochs = [seen[:N], seen[N : 2 * N]]
    for epoch in epochs:
        assert sorted(epoch) == sorted(everything.tolist())
    assert epochs[0] != epochs[1] and epochs[0] != everything.tolist()
    assert d.batch(3, B, n, 1, seed=5).tolist() == seen[3 * B : 4 * B]
    assert d.batch(3, B, n, 1, seed=6).tolist() != seen[3 * B : 4 * B]


def test_a_row_of_separators_gives_way_to_the_next(tmp_path):
    d = prepared(tmp_path, ["a"] * 40 + ["the cat sat on the mat; " * 20] * 2, doc="line")
    rows, N = d.rows("train", np.arange(d.n_rows("train", 10)), 10), d.n_rows("train", 10)
    words = (rows > 3).sum(1)
    assert words.min() < 6 <= words.max()
    got = d.full_rows("train", np.arange(N), 10, 6)
    assert ((got > 3).sum(1) >= 6).all()
    assert np.array_equal(got[words >= 6], rows[words >= 6])
    with pytest.raises(SystemExit):
        d.full_rows("train", np.arange(N), 10, 9)


# ---------------------------------------------------------------------------------- flops.py


@ALL_MODELS
@pytest.mark.parametrize("rate", [0.15, 0.5])
@pytest.mark.parametrize("d_de", [16, 32])
def test_flops_are_those_of_the_real_forward_pass(decoder, rate, d_de):
    net, batch = (
        model_of(decoder=decoder, n_embd_dec=d_de, n_layer_dec=3),
        random_batch(B=1, rate=rate),
    )
    with (
        torch.no_grad(),
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        net(batch)
    n_m, k = batch.masked.size(1), batch.predict.size(1)
    assert counter.get_total_flops() == flops.forward(net.config, 20, n_m, k)


def test_formulas_of_appendix_d_from_their_parts():
    """A second derivation: products of matrices (rows, inner, columns), 2 FLOPs a multiply-add."""

    def product(*sizes):
        return 2 * math.prod(sizes)

    rng = np.random.default_rng(0)
    for _ in range(20):
        b, u, l, l_de = rng.integers(1, 30, 4).tolist()
        n, d, e, V = rng.integers(8, 4000, 4).tolist()
        r = rng.uniform(0.05, 0.95)
        n_m, n_e, k = 0.8 * r * n, n - 0.8 * r * n, r * n

        def attention(q, kv, d):
            return 2 * product(q, d, d) + 2 * product(kv, d, d) + 2 * product(q, kv, d)

        def layer(t, d):
            return attention(t, t, d) + 2 * product(t, d, 4 * d)

        head = product(k, d, V)
        vanilla = l * layer(n, d) + product(k, d, d) + head
        encoder = l * layer(n_e, d) + product(n_e, d, e) + head
        self_ = encoder + l_de * layer(n, e) + product(k, e, d)
        cross = encoder + l_de * (layer(n_m, e) + attention(n_m, n_e, e))
        cross += product(n_m, e, d) + product(k - n_m, d, d)
        assert math.isclose(flops.roberta(b, u, l, n, d, r, V), 2 * b * u * vanilla)
        args = (b, u, l, l_de, n, d, e, r, V)
        assert math.isclose(flops.three_ml_self(*args), 2 * b * u * self_)
        assert math.isclose(flops.three_ml_cross(*args), 2 * b * u * cross)


def test_table_3(capsys):
    flops.main([])
    rows = [
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("3ML", "Ro"))
    ]
    assert [row[4] for row in rows] == [
        "1.34",
        "1.46",
        "1.36",
        "1.00",
        "1.22",
        "1.00",
        "1.28",
        "1.00",
        "1.00",
    ]
    assert [row[5] for row in rows] == [
        "1.34",
        "1.47",
        "1.37",
        "1.00",
        "1.22",
        "1.00",
        "1.28",
        "1.00",
        "1.00",
    ]


# ---------------------------------------------------------------------------------- train.py

WORDS = "the cat sat on a mat and dog barked at moon while bird sang over hill".split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    return prepared(folder, [" ".join(rng.choice(WORDS, 60)) for _ in range(40)], val=0.2).directory


ONE = train.Machine(0, 1, torch.device("cpu"), torch.float32)


def arguments(corpus, out, **changes):
    flags = dict(
        data=corpus, out=out, n_layer=1, n_embd=32, head_size=16, seq_len=16, batch_size=8,
        max_steps=4,
        micro_batch_size=8, eval_every=2, save_every=1, log_every=1, eval_rows=16, device="cpu",
        dtype="fp32",
    ) | changes  # fmt: skip
    return [x for k, v in flags.items() for x in (f"--{k}", str(v))]


def run_and_capture(argv, path):
    """train.main, with the gradients that the optimizer sees at each step saved to `path`."""
    grads = []

    def hook(optimizer, *_):
        groups = optimizer.param_groups
        grads.append([p.grad.clone() for group in groups for p in group["params"]])

    handle = register_optimizer_step_pre_hook(hook)
    try:
        train.main(argv)
    finally:
        handle.remove()
    torch.save(grads, path)


def one_of_two(rank, port, argv, path):
    os.environ |= dict(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="localhost",
        MASTER_PORT=port,
    )
    torch.set_num_threads(1)
    run_and_capture(argv, f"{path}.{rank}")


@pytest.mark.parametrize("decoder, dropout", [("self", 0), ("cross", 0), ("self", 0.1)])
def test_division_of_work_changes_nothing(decoder, dropout, corpus, tmp_path):
    """One batch whole, in four micro-batches, and by two processes with two each: the same
    gradients before every optimizer step, and the same log, in float64. Adam would hide a wrong
    divisor."""

    def argv(name, micro):
        return arguments(
            corpus,
            tmp_path / name,
            decoder=decoder,
            dropout=dropout,
            dtype="fp64",
            micro_batch_size=micro,
        )

    # dropout is the same for the same micro-batches, whoever does them
    run_and_capture(argv("whole", 2 if dropout else 8), tmp_path / "whole.pt")
    run_and_capture(argv("four", 2), tmp_path / "four.pt")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    torch.multiprocessing.spawn(one_of_two, (port, argv("two", 2), tmp_path / "two"), nprocs=2)
    whole, log = torch.load(tmp_path / "whole.pt"), untimed(log_of(tmp_path / "whole"))
    for other, path in (("four", "four.pt"), ("two", "two.0"), ("two", "two.1")):
        for a, b in zip(whole, torch.load(tmp_path / path), strict=True):
            for x, y in zip(a, b, strict=True):
                close(x, y, 1e-10)
        for a, b in zip(log, untimed(log_of(tmp_path / other)), strict=True):
            assert a.keys() == b.keys() and a.get("rows") == b.get("rows")
            assert all(a[k] == b[k] or math.isclose(a[k], b[k], rel_tol=1e-10) for k in a)


@ALL_MODELS
def test_resume_after_any_step_is_bit_identical(decoder, corpus, tmp_path, monkeypatch):
    """A run of five steps with dropout on, against runs that go on from each of its checkpoints."""
    real = train.save_checkpoint

    def keep(path, state):
        real(path, state)
        shutil.copytree(path.parent, tmp_path / f"after{state['step']}")

    def argv(name):
        return arguments(corpus, tmp_path / name, decoder=decoder, max_steps=5, dropout=0.1)

    monkeypatch.setattr(train, "save_checkpoint", keep)
    train.main(argv("whole"))
    monkeypatch.setattr(train, "save_checkpoint", real)
    end = torch.load(tmp_path / "whole/ckpt.pt")
    assert end["step"] == 5 and end["config"]["dropout"] == 0.1
    for step in range(1, 5):
        train.main(argv(f"after{step}"))
        assert same_state(torch.load(tmp_path / f"after{step}/ckpt.pt"), end)
        assert untimed(log_of(tmp_path / f"after{step}")) == untimed(log_of(tmp_path / "whole"))
    first = torch.load(tmp_path / "after1/ckpt.prev.pt")
    assert not same_state(first["model"], end["model"])


def test_a_finished_run_is_not_started_over(corpus, tmp_path, capsys):
    argv = arguments(corpus, tmp_path)
    train.main(argv)
    before = (tmp_path / "ckpt.pt").read_bytes(), (tmp_path / "log.jsonl").read_bytes()
    train.main(argv)
    assert "finished" in capsys.readouterr().out
    assert before == ((tmp_path / "ckpt.pt").read_bytes(), (tmp_path / "log.jsonl").read_bytes())
    with pytest.raises(SystemExit):
        train.main([*argv, "--lr", "0.5"])
    assert "--lr 0.5" in capsys.readouterr().err
    train.main([*argv, "--eval_only"])
    assert "validation perplexity" in capsys.readouterr().out


def test_validation_is_the_mean_of_its_tokens(corpus, tmp_path):
    """The log's perplexities, from one undivided pass over the same rows and masks."""
    train.main(
        arguments(
            corpus, tmp_path, micro_batch_size=2, eval_rows=5, strategy="0.5,0.3,0.2", mask_rate=0.5
        )
    )
    d, state = Data(corpus), torch.load(tmp_path / "ckpt.pt")
    config = train.Config(**{**state["config"], "strategy": (0.5, 0.3, 0.2)})
    net = m.MaskedLM(train.model_config(config, d.vocab.size)).eval()
    net.load_state_dict(state["model"])
    entry = [e for e in log_of(tmp_path) if "val_loss" in e][-1]
    for tag, rate in (("", 0.5), ("_15", 0.15)):
        rows = torch.from_numpy(d.rows("val", np.arange(5), 16))
        batch = corrupt(
            rows, rate, config.strategy, vocab=d.vocab, generator=torch.Generator().manual_seed(0)
        )
        losses = net(batch)
        kind = torch.zeros(batch.predict.shape)
        kind[:, batch.masked.size(1) :] = 1
        kind[:, batch.masked.size(1) + batch.n_replaced :] = 2
        close(math.log(entry["ppl" + tag]), losses.mean().item())
        close(entry["val_loss" + tag], losses.mean().item())
        for i, name in enumerate(["ppl_masked", "ppl_replaced", "ppl_unchanged"]):
            expected = losses[kind == i]
            assert (entry[name + tag] is None) == (len(expected) == 0)
            if len(expected):
                close(math.log(entry[name + tag]), expected.mean().item())


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_the_report_has_a_row_for_each_rate(rate, corpus, tmp_path, capsys):
    train.main(arguments(corpus, tmp_path, mask_rate=rate, decoder="none"))
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(",")[0] for line in lines if "of tokens predicted" in line]
    assert rows == ["vanilla MLM", "unigram"] * (1 if rate == 0.15 else 2)


def test_recipes_are_table_4():
    parsed = {
        name: train.parse(["--recipe", name])[0] for name in ("efficient-large", "longer-base")
    }
    table = {
        "n_layer": (24, 12), "n_embd": (1024, 768), "head_size": (64, 64), "n_layer_dec": (2, 2),
        "dropout": (0.1, 0.1), "norm": ("pre", "post"), "seq_len": (128, 512), 
        "n_positions": (128, 512),
        "warmup": (0.06, 0.06), "lr": (2e-3, 7e-4), "batch_size": (4096, 2048), 
        "weight_decay": (0.01, 0.01),
        "max_steps": (23_000, 125_000), "grad_clip": (0, 0), "mask_rate": (0.5, 0.4), 
        "decoder": ("self",) * 2,
    }  # fmt: skip
    for field, values in table.items():
        assert tuple(getattr(c, field) for c in parsed.values()) == values, field
    widths = [train.model_config(c, 99).n_embd_dec for c in parsed.values()]
    assert widths == [512, 384]
    assert train.parse(["--recipe", "longer-base", "--decoder", "cross"])[0].norm == "pre"
    assert train.parse(["--recipe", "longer-base", "--decoder", "none"])[0].norm == "post"
    optimizer = train.make_optimizer(model_of(), parsed["longer-base"])
    matrices, rest = optimizer.param_groups
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.01, 0)
    assert (matrices["betas"], matrices["eps"]) == ((0.9, 0.98), 1e-6)


def test_learning_rate_rises_and_falls():
    config = train.Config(max_steps=100, warmup=0.1, lr=1.0)
    lrs = [train.lr_at(s, config) for s in range(100)]
    points = np.interp(np.arange(100), [-1, 9, 10, 100], [0, 1, 1, 0])
    assert np.allclose(lrs, points)
    assert train.lr_at(0, replace(config, warmup=0.0)) == 1.0


def test_init_starts_from_a_published_encoder(corpus, tmp_path):
    size = Data(corpus).vocab.size
    source = shaken(m.MaskedLM(config_of(vocab_size=size, n_positions=40, norm="pre")))
    m.save_pretrained(source, tmp_path / "hf")
    argv = arguments(corpus, tmp_path / "out", init=tmp_path / "hf", n_layer=2, lr=0, max_steps=1)
    train.main(argv)
    _, encoder = m.load_pretrained(tmp_path / "out/hf")
    for name, p in source.encoder.state_dict().items():
        assert torch.equal(p, encoder.state_dict()[name])
    with pytest.raises(SystemExit):
        train.main([*argv, "--n_layer", "3"])


def test_init_of_a_run_stays_what_it_was(corpus, encoder_folder, tmp_path, capsys):
    """Left out, or given to a run that had none, it is refused; and the shape is its."""
    argv = arguments(corpus, tmp_path / "plain")
    train.main(argv)
    with pytest.raises(SystemExit):
        train.main([*argv, "--max_steps", "6", "--init", str(tmp_path / "plain/hf")])
    assert f"--init {tmp_path / 'plain/hf'}" in capsys.readouterr().err
    started = arguments(corpus, tmp_path / "started", seq_len=12)
    for name in ("n_layer", "n_embd", "head_size"):
        at = started.index(f"--{name}")
        del started[at : at + 2]
    init = ["--init", str(tmp_path / "plain/hf")]
    train.main([*started, *init])
    with pytest.raises(SystemExit):
        train.main([*started, "--max_steps", "6"])
    assert "--init missing" in capsys.readouterr().err
    train.main([*started, *init, "--max_steps", "6"])
    assert torch.load(tmp_path / "started/ckpt.pt")["step"] == 6
    again = [*started, *init, "--out", str(tmp_path / "again"), "--max_steps", "6"]
    (tmp_path / "again").mkdir()  # killed when its first checkpoint was almost in place
    shutil.copy(tmp_path / "plain/ckpt.pt", tmp_path / "again/ckpt.new.pt")
    train.main(again)
    fresh = [*started, *init, "--out", str(tmp_path / "fresh"), "--max_steps", "6"]
    train.main(fresh)
    assert same_end(tmp_path / "again", tmp_path / "fresh")
    shutil.rmtree(tmp_path / "plain")
    train.main(["--out", str(tmp_path / "started"), "--eval_only", "--device", "cpu"])


def first_gradients(argv, path):
    run_and_capture(argv, path)
    return torch.cat([g.flatten() for g in torch.load(path)[0]])


def test_clipping_divides_by_the_norm(corpus, tmp_path):
    """And nothing else: the norm that the log has is the unclipped one."""
    free = first_gradients(arguments(corpus, tmp_path / "a"), tmp_path / "a.pt")
    argv = arguments(corpus, tmp_path / "b", grad_clip=0.01)
    clipped = first_gradients(argv, tmp_path / "b.pt")
    close(clipped, free * 0.01 / free.norm(), 1e-6)
    assert math.isclose(log_of(tmp_path / "b")[0]["grad_norm"], free.norm(), rel_tol=1e-5)


def test_fp16s_scaler_does_not_change_the_clipped_gradients(corpus, tmp_path):
    plain = first_gradients(arguments(corpus, tmp_path / "a", grad_clip=0.01), tmp_path / "a.pt")
    argv = arguments(corpus, tmp_path / "b", grad_clip=0.01, dtype="fp16")
    scaled = first_gradients(argv, tmp_path / "b.pt")
    assert (scaled - plain).norm() < 0.05 * plain.norm()


def test_dropout_is_on_in_training_off_in_evaluation_and_fresh(corpus, tmp_path):
    config = train.parse(arguments(corpus, tmp_path, dropout=0.1, micro_batch_size=4))[0]
    net = m.MaskedLM(train.model_config(config, Data(corpus).vocab.size))
    batch = train.step_batch(Data(corpus), config, 0, torch.device("cpu"))
    seen = {}
    for step, at in ((0, 0), (0, 4), (1, 0)):
        net.zero_grad()
        same = Corrupted(*(torch.cat([x[:4], x[:4]]) for x in batch[:-1]), batch.n_replaced)
        seen[step, at] = []
        net.register_forward_hook(lambda _, args, out, s=seen: s["last"].append(out.detach()))
        seen["last"] = []
        train.backward(net, same, config, step, ONE)
        seen[step, at] = seen["last"][:2]
    first, second = seen[0, 0]
    assert not torch.equal(first, second)  # two micro-batches of the same rows
    assert torch.equal(first, seen[0, 4][0]) and not torch.equal(first, seen[1, 0][0])
    net.eval()
    assert torch.equal(net(batch), net(batch))
    for rate in (0.0, 0.3):  # attention, hidden states, and the head's input
        drop = m.Classifier(config_of(dropout=rate), 2).train()
        x = random_rows()
        assert torch.equal(drop(x), drop(x)) == (rate == 0)
        block = m.Block(32, config_of(dropout=rate), cross=True).train()
        x, memory = torch.randn(2, 2, 5, 32)
        for part in (block.attn, block.cross):
            assert torch.equal(part(x, memory), part(x, memory)) == (rate == 0)


def test_weights_start_as_berts_do():
    net = m.MaskedLM(config_of(n_embd=256, n_embd_dec=128, head_size=64))
    for name, p in net.named_parameters():
        if name.endswith("weight") and p.dim() == 2 or name.endswith("bridge.mask"):
            assert abs(p.mean()) < 5 * 0.02 / p.numel() ** 0.5, name
            assert math.isclose(p.detach().std(), 0.02, rel_tol=0.3 if p.dim() == 1 else 0.05), name
        else:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name


def test_a_damaged_checkpoint_gives_way_to_the_one_before(corpus, tmp_path, capsys):
    train.main(arguments(corpus, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "bad")
    path = tmp_path / "bad/ckpt.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    train.main(arguments(corpus, tmp_path / "bad"))
    assert "warning: " in capsys.readouterr().out
    states = [torch.load(tmp_path / f"{x}/ckpt.pt") for x in ("whole", "bad")]
    assert same_state(*states)
    assert untimed(log_of(tmp_path / "bad")) == untimed(log_of(tmp_path / "whole"))
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        (tmp_path / "bad" / name).write_bytes(content[:-1000])
    with pytest.raises(SystemExit):
        train.main(arguments(corpus, tmp_path / "bad"))
    assert "ckpt.prev.pt" in capsys.readouterr().err


def test_divergence_stops_before_the_optimizer_moves(corpus, tmp_path, monkeypatch, capsys):
    real, stepped = train.backward, []

    def bad(model, batch, config, step, *rest):
        loss = real(model, batch, config, step, *rest)
        if step == 2:
            next(model.parameters()).grad.view(-1)[0] = math.nan
        return loss

    monkeypatch.setattr(train, "backward", bad)
    hook = register_optimizer_step_pre_hook(lambda *_: stepped.append(1))
    with pytest.raises(SystemExit) as e:
        train.main(arguments(corpus, tmp_path))
    hook.remove()
    err = capsys.readouterr().err
    assert e.value.code == 2 and "step 3, lr" in err and "--grad_clip 1" in err
    assert len(stepped) == 2 and torch.load(tmp_path / "ckpt.pt")["step"] == 2
    monkeypatch.setattr(train, "backward", real)
    train.main(arguments(corpus, tmp_path, grad_clip=1))  # the advice can be followed
    assert torch.load(tmp_path / "ckpt.pt")["step"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_the_run_goes_on(number, corpus, tmp_path, monkeypatch):
    train.main(arguments(corpus, tmp_path / "whole"))
    real = train.backward

    def interrupted(model, batch, config, step, *rest):
        if step == 1:
            os.kill(os.getpid(), number)
        return real(model, batch, config, step, *rest)

    argv = arguments(corpus, tmp_path / "cut", save_every=100)
    monkeypatch.setattr(train, "backward", interrupted)
    with pytest.raises(SystemExit) as e:
        train.main(argv)
    assert e.value.code == 128 + number
    assert torch.load(tmp_path / "cut/ckpt.pt")["step"] == 2
    monkeypatch.setattr(train, "backward", real)
    train.main(argv)
    states = [torch.load(tmp_path / f"{x}/ckpt.pt") for x in ("whole", "cut")]
    assert same_state(*states)
    assert untimed(log_of(tmp_path / "cut")) == untimed(log_of(tmp_path / "whole"))


def test_a_full_disk_leaves_the_checkpoint_before(corpus, tmp_path):
    """In a process of its own whose files may not grow beyond half a checkpoint."""
    resource = pytest.importorskip("resource")
    argv = arguments(corpus, tmp_path, max_steps=2)
    train.main([*argv, "--log_every", "100"])
    before = (tmp_path / "ckpt.pt").read_bytes()
    limit = len(before) // 2
    done = subprocess.run(
        [sys.executable, Path(train.__file__), *argv, "--max_steps", "4"],
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "ckpt" in done.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_out_of_memory_names_the_flag_that_helps(corpus, tmp_path):
    """In a process of its own with a gigabyte: too little for all rows at once, enough in parts."""
    resource = pytest.importorskip("resource")
    if sys.platform != "linux":
        pytest.skip("no such limit")
    argv = arguments(corpus, tmp_path, batch_size=64_000, max_steps=1)
    done = [
        subprocess.run(
            [sys.executable, Path(train.__file__), *argv, "--micro_batch_size", rows],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (10**9, 10**9)),
        )
        for rows in ("64000", "1000")
    ]  # fmt: skip
    errors = [line for line in done[0].stderr.splitlines() if line.startswith("error: ")]
    assert done[0].returncode == 2 and "Traceback" not in done[0].stderr and len(errors) == 1
    assert "out of memory" in errors[0] and "--micro_batch_size" in errors[0]
    assert done[1].returncode == 0


def test_kill_9_while_a_checkpoint_is_written(corpus, tmp_path):
    """The short form of experiments/faults.py, with a real process."""
    whole, cut = arguments(corpus, tmp_path / "whole"), arguments(corpus, tmp_path / "cut")
    train.main(whole)
    process = subprocess.Popen([sys.executable, Path(train.__file__), *cut], stdout=subprocess.PIPE)
    while not list((tmp_path / "cut").glob("ckpt*")):
        assert process.poll() is None
    process.kill()
    process.wait()
    train.main(cut)
    assert same_end(tmp_path / "whole", tmp_path / "cut")


def test_ctrl_c_saves_when_it_also_kills_the_reader(corpus, tmp_path):
    """As `python train.py 2>&1 | tee log` has it."""
    argv = arguments(corpus, tmp_path, max_steps=100_000, save_every=100_000, eval_every=100_000)
    process = subprocess.Popen(
        [sys.executable, Path(train.__file__), *argv], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while "step" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and torch.load(tmp_path / "ckpt.pt")["step"] >= 1


def test_a_silent_process_ends_the_others(corpus, tmp_path):
    """The second of two never answers: the first gives up after --timeout, in one line."""
    code = (
        "import sys, time, torch.distributed as dist, train; dist.init_process_group('gloo'); "
        "time.sleep(60)"
    )
    with socket.socket() as s:
        s.bind(("localhost", 0))
        place = dict(MASTER_ADDR="localhost", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE="2")
    argv = arguments(corpus, tmp_path, timeout=0.05)
    commands = [[sys.executable, train.__file__, *argv], [sys.executable, "-c", code]]
    first, second = (
        subprocess.Popen(
            command, cwd=Path(train.__file__).parent, stderr=subprocess.PIPE, text=True,
            env=os.environ | place | {"RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i, command in enumerate(commands)
    )  # fmt: skip
    err = first.communicate(timeout=50)[1]
    second.kill()
    second.communicate()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert first.returncode == 2 and len(errors) == 1 and "silent for 0.05 minutes" in errors[0]
    assert "Traceback" not in err


def test_a_second_run_on_the_same_folder_is_refused(corpus, tmp_path, capsys):
    with data.lock(tmp_path), pytest.raises(SystemExit):
        train.main(arguments(corpus, tmp_path))
    assert "another process" in capsys.readouterr().err
    train.main(arguments(corpus, tmp_path))


def test_a_strategy_without_masks_and_a_missing_tokenizers(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    train.main(arguments(corpus, tmp_path, decoder="none", strategy="0,0.5,0.5"))
    out = capsys.readouterr().out
    assert "of masked tokens -" in out and "pip install tokenizers" in out and "FLOPs" in out


# ------------------------------------------------------------------------------- finetune.py


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_are_scipys_and_scikit_learns(ties):
    stats = pytest.importorskip("scipy.stats")
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for n in (5, 50, 1000):
        p, y = rng.integers(0, 2, (2, n))
        assert math.isclose(ft.accuracy(p, y), sk.accuracy_score(y, p), abs_tol=1e-12)
        assert math.isclose(ft.f1(p, y), sk.f1_score(y, p), abs_tol=1e-12)
        assert math.isclose(ft.matthews(p, y), sk.matthews_corrcoef(y, p), abs_tol=1e-12)
        a, b = rng.integers(0, 4, (2, n)).astype(float) if ties else rng.normal(size=(2, n))
        assert math.isclose(ft.pearson(a, b), stats.pearsonr(a, b)[0], abs_tol=1e-12)
        assert math.isclose(ft.spearman(a, b), stats.spearmanr(a, b)[0], abs_tol=1e-12)
        assert np.array_equal(ft.ranks(a), stats.rankdata(a))
    same, y = np.zeros(4), np.array([0, 1, 0, 1])
    assert (
        ft.matthews(same, y) == ft.pearson(same, y) == ft.spearman(same, y) == ft.f1(same, y) == 0
    )


ODD = ['An "unbalanced quote', "caf\u00e9 \u4f60\u597d\x85next \u2028line", "a \x1c\x0b control"]
# What a line of each task's train file looks like: header, and a row with texts a, b and label
# filled in
LAYOUTS = {
    "CoLA": (None, "gj04\t{y}\t\t{a}"),
    "SST-2": ("sentence\tlabel", "{a} \t{y}"),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{y}\t1\t2\t{a}\t{b}"),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSRvid\t2012\t0001\tnone\tnone\t{a}\t{b}\t{y}",
    ),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\t{a}\t{b}\t{y}"),
    "MNLI": (
        "index\tpromptID\tpairID\tgenre\ts1bp\ts2bp\ts1p\ts2p\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\tn\tn\tn\tn\tn\tn\tn\t{a}\t{b}\tn\t{y}",
    ),
    "QNLI": ("index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{y}"),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{y}"),
}


def write_task(folder, name, rows):
    """train and dev files of a task in its own format; rows of (a, b, label)."""
    head, row = LAYOUTS[name]
    (folder / name).mkdir(parents=True, exist_ok=True)
    for part in ("train", *ft.TASKS[name].dev):
        lines = [head] * bool(head) + [row.format(a=a, b=b, y=y) for a, b, y in rows]
        (folder / name / f"{part}.tsv").write_bytes("".join(x + "\n" for x in lines).encode())


@pytest.mark.parametrize("name", LAYOUTS)
def test_readers_of_all_tasks(name, tmp_path, capsys):
    task = ft.TASKS[name]
    labels = task.labels or ("0.000", "3.200", "5.000")
    rows = [(ODD[i], ODD[i - 1], labels[i % len(labels)]) for i in range(3)]
    write_task(tmp_path, name, rows)
    train, devs = ft.read_task(name, tmp_path)
    for split in (train, *devs.values()):
        assert split.a == [a for a, _, _ in rows]
        assert split.b == (None if task.columns[1] is None else [b for _, b, _ in rows])
        assert list(split.labels) == (
            [0, 3.2, 5] if task.labels is None else [i % len(labels) for i in range(3)]
        )
    path = tmp_path / name / "train.tsv"
    path.write_bytes(path.read_bytes() + b"one field\n")
    if name == "QQP":
        assert ft.read_task(name, tmp_path)[0].dropped == 1
    else:
        with pytest.raises(SystemExit):
            ft.read_task(name, tmp_path)
        assert f"{path}: line {len(rows) + 1 + task.header} has 1 fields" in capsys.readouterr().err
    write_task(tmp_path, name, [*rows[:2], (rows[2][0], rows[2][1], "what")])
    with pytest.raises(SystemExit):
        ft.read_task(name, tmp_path)
    assert "label 'what'" in capsys.readouterr().err


def classifier_of(n_classes=3, **changes):
    return shaken(m.Classifier(config_of(decoder="none", **changes), n_classes))


def test_padding_and_order_never_change_a_logit():
    rng = np.random.default_rng(0)
    examples = [[0, *rng.integers(4, 98, k).tolist(), 2] for k in rng.integers(1, 17, 30)]
    net = classifier_of()
    together = ft.predict(net, examples, VOCAB, ONE, batch_size=7)
    alone = np.concatenate([net(torch.tensor([x])).detach().numpy() for x in examples])
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(ft.predict(net, examples[::-1], VOCAB, ONE)[::-1] - alone).max() < 1e-5


def test_every_example_comes_once_an_epoch_and_little_is_padded():
    lengths = np.random.default_rng(0).integers(5, 100, 1003)
    batches = ft.epoch_batches(lengths, 8, seed=1, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(1003))
    padded = sum(lengths[b].max() * len(b) for b in batches) / lengths.sum()
    assert padded < 1.1
    assert not np.array_equal(batches[0], ft.epoch_batches(lengths, 8, seed=1, epoch=1)[0])


def test_truncation_takes_from_the_longer_text(tmp_path):
    tokenizer, vocab = data.load_tokenizer(tokenizer_file(tmp_path))
    words = [tokenizer.encode(TEXT * k, add_special_tokens=False).ids for k in (1, 3, 9)]
    texts = [tokenizer.decode(w) for w in words]
    for (x, a), (y, b) in [
        ((words[i], texts[i]), (words[j], texts[j])) for i in range(3) for j in range(3)
    ]:
        for max_len in (8, 16, 17, 64, 400):
            x1, y1 = list(x), list(y)
            while len(x1) + len(y1) > max_len - 4:  # the field's "longest first", a token at a time
                (x1 if len(x1) > len(y1) else y1).pop()
            (ids,), cut = ft.encode(ft.Split([a], [b], None), tokenizer, vocab, max_len)
            assert len(ids) == len(x1) + len(y1) + 4 <= max_len
            assert ids == [0, *x1, 2, 2, *y1, 2] and cut == (len(x) + len(y) > max_len - 4)
        (ids,), cut = ft.encode(ft.Split([a], None, None), tokenizer, vocab, 16)
        assert ids == [0, *x[:14], 2] and cut == (len(x) > 14)


@BOTH_NORMS
def test_saved_classifier_is_transformers(norm, tmp_path):
    transformers = pytest.importorskip("transformers")
    net = classifier_of(norm=norm)
    net.labels = ("yes", "no", "perhaps")
    m.save_pretrained(net, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokens, mask = random_rows(), torch.arange(20) < torch.tensor([[20], [13], [7], [2]])
    tokens[~mask] = VOCAB.pad
    close(net(tokens, mask), theirs(tokens, attention_mask=mask.long()).logits)
    assert theirs.config.id2label == {0: "yes", 1: "no", 2: "perhaps"}
    close(m.load_classifier(tmp_path, 3).eval()(tokens, mask), net(tokens, mask))
    with pytest.raises(ValueError):
        m.load_classifier(tmp_path, 2)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    path = tokenizer_file(folder, 400, "the cat sat on the mat; a dog barked. good bad yes no ")
    vocab = data.load_tokenizer(path)[1]
    torch.manual_seed(0)
    net = m.MaskedLM(config_of(vocab_size=vocab.size, n_positions=40, norm="pre"))
    m.save_pretrained(net, folder / "hf", path)
    return folder / "hf"


def own_files(folder, rows=120):
    rng = np.random.default_rng(0)
    for part in ("train", "dev", "test"):
        lines = ["label\tsentence1"]
        for _ in range(rows):
            y = rng.integers(2)
            words = rng.choice(["the cat", "a dog", "on the mat", "barked"], 3)
            lines.append(
                f"{['n', 'y'][y]}\t{' '.join(words)} {['bad', 'good'][y]} {' '.join(words[:1])}"
            )
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return [f"--{p}={folder / p}.tsv" for p in ("train", "dev", "test")]


def test_a_tiny_encoder_learns_a_task_of_ones_own(encoder_folder, tmp_path, capsys):
    files = own_files(tmp_path)
    argv = [*files, f"--init={encoder_folder}", f"--out={tmp_path / 'out'}"]
    argv += "--lr=2e-3 --epochs=15 --batch_size=8 --device=cpu --dtype=fp32".split()
    ft.main(argv)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["summary"]["train"]["metrics"]["acc"] == 1.0
    predicted = (tmp_path / "out/predictions/test.tsv").read_text().splitlines()
    truth = [line.split("\t")[0] for line in (tmp_path / "test.tsv").read_text().splitlines()[1:]]
    assert predicted == ["index\tprediction", *(f"{i}\t{y}" for i, y in enumerate(truth))]


def glue_folder(folder):
    for name in ("MNLI", "RTE", "STS-B", "CoLA"):
        labels = ft.TASKS[name].labels or ("0.0", "2.5", "5.0")
        rows = [(f"the cat {i}", f"a dog {i}", labels[i % len(labels)]) for i in range(12)]
        write_task(folder, name, rows)
    (folder / "RTE/test.tsv").write_text("index\ts1\ts2\n" + "0\tthe cat\ta dog\n" * 5)
    (folder / "CoLA/test.tsv").write_text("index\tsentence\n" + "0\tthe cat\n" * 4)
    (folder / "STS-B/test.tsv").write_text(
        "\t".join("abcdefghi") + "\n" + "\t".join("abcdefghi") + "\n"
    )
    (folder / "diagnostic").mkdir()
    (folder / "diagnostic/diagnostic.tsv").write_text("index\ts1\ts2\n" + "0\tthe cat\ta dog\n" * 3)
    return folder


def test_a_killed_sweep_runs_each_point_exactly_once(encoder_folder, tmp_path, monkeypatch, capsys):
    """Killed after every second run, within and between tasks; and MNLI's model is where others
    start."""
    glue, out, calls = glue_folder(tmp_path / "glue"), tmp_path / "out", []
    argv = [
        "--task=all",
        f"--glue={glue}",
        f"--init={encoder_folder}",
        f"--out={out}",
        "--lr",
        "1e-3",
        "2e-3",
    ]
    argv += ["--epochs=1", "--seed", "0", "1", "--device=cpu", "--dtype=fp32", "--predict"]
    real = ft.run_once

    def killed(name, examples, settings, init, *rest):
        if len(calls) % 3 == 2:
            calls.append(None)
            raise KeyboardInterrupt
        calls.append((name, *settings.values(), Path(init)))
        return real(name, examples, settings, init, *rest)

    monkeypatch.setattr(ft, "run_once", killed)
    for _ in range(20):
        try:
            ft.main(argv)
            break
        except KeyboardInterrupt:
            continue
    made = [c for c in calls if c]
    assert len(made) == len(set(made)) == 4 * 4 and None in calls
    for name, *_, init in made:
        assert init == (out / "MNLI/hf" if name in ("RTE", "STS-B") else encoder_folder)
    results = json.loads((out / "results.json").read_text())
    assert len(results["runs"]) == 16
    for name in ("MNLI", "RTE", "STS-B", "CoLA"):
        runs = [r for r in results["runs"] if r["task"] == name]
        best = [max(r["score"] for r in runs if r["seed"] == s) for s in (0, 1)]
        assert math.isclose(results["summary"][name]["score"], sum(best) / 2)
    mean = sum(results["summary"][t]["score"] for t in ("MNLI", "RTE", "STS-B", "CoLA")) / 4
    assert math.isclose(results["summary"]["average"]["score"], mean)
    said = capsys.readouterr().out
    assert (
        "QNLI     missing" in said
        and "4 of 8 tasks" in said
        and "test_matched.tsv: missing" in said
    )
    files = {p.name: p.read_text().splitlines() for p in (out / "predictions").iterdir()}
    assert {k: len(v) for k, v in files.items()} == {
        "RTE.tsv": 6,
        "CoLA.tsv": 5,
        "STS-B.tsv": 2,
        "AX.tsv": 4,
    }
    assert all(lines[0] == "index\tprediction" for lines in files.values())
    assert {line.split("\t")[1] for line in files["RTE.tsv"][1:]} <= {
        "entailment",
        "not_entailment",
    }
    assert {line.split("\t")[1] for line in files["AX.tsv"][1:]} <= {
        "entailment",
        "not_entailment",
        "neutral",
        "contradiction",
    }
    assert 0 <= float(files["STS-B.tsv"][1].split("\t")[1]) <= 5


def test_fine_tuning_follows_table_5(encoder_folder):
    """Warm-up over 6% of the steps, then down to 0; decay 0.1 on matrices."""
    seen = []

    def hook(optimizer, *_):
        seen.append([(g["lr"], g["weight_decay"]) for g in optimizer.param_groups])

    settings = dict(lr=1.0, batch_size=2, epochs=10, seed=0)
    handle = register_optimizer_step_pre_hook(hook)
    net = ft.build(encoder_folder, False, 2, None, 0, 0.1)
    settings["lr"] = 1e-3
    assert ft.fine_tune(net, [[0, 5, 2]] * 20, np.array([0, 1] * 10), settings, VOCAB, ONE)
    handle.remove()
    lrs = np.interp(np.arange(100), [-1, 5, 6, 100], [0, 1e-3, 1e-3, 0])
    assert np.allclose([x[0][0] for x in seen], lrs)
    assert all((x[0][1], x[1][1]) == (0.1, 0.0) for x in seen)


def test_results_of_another_encoder_and_divergence(encoder_folder, tmp_path, capsys):
    files = own_files(tmp_path, rows=20)
    argv = [*files[:2], f"--init={encoder_folder}", f"--out={tmp_path / 'out'}", "--device=cpu"]
    ft.main([*argv, "--dtype=fp32", "--batch_size=4", "--epochs=1", "--lr", "1e30", "1e-3"])
    runs = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert [r["diverged"] for r in runs] == [True, False] and runs[0]["score"] == 0
    with pytest.raises(SystemExit):
        ft.main([*argv, "--reinit"])
    assert "--reinit True" in capsys.readouterr().err


def test_results_of_other_texts_or_weights_are_not_taken_for_these(
    tmp_path, encoder_folder, capsys
):
    """The same command, after a file that it names has changed."""
    files, encoder = own_files(tmp_path, rows=20), tmp_path / "hf"
    shutil.copytree(encoder_folder, encoder)
    argv = [*files[:2], f"--init={encoder}", f"--out={tmp_path / 'out'}", "--device=cpu"]
    argv += ["--dtype=fp32", "--epochs=1"]
    ft.main(argv)
    before = (tmp_path / "out/results.json").read_bytes()
    for path, name in ((tmp_path / "dev.tsv", "other texts"), (encoder, "--init")):
        file = path if path.is_file() else path / "pytorch_model.bin"
        kept = file.read_bytes()
        if path.is_file():
            file.write_bytes(kept.replace(b"good", b"fine"))
        else:
            torch.save({k: v + 1 for k, v in torch.load(file).items()}, file)
        with pytest.raises(SystemExit) as e:
            ft.main(argv)
        assert e.value.code == 2 and name in capsys.readouterr().err
        file.write_bytes(kept)
    ft.main(argv)
    assert (tmp_path / "out/results.json").read_bytes() == before


def test_a_second_sweep_on_the_same_folder_is_refused(encoder_folder, tmp_path, capsys):
    argv = [*own_files(tmp_path, rows=20), f"--init={encoder_folder}", f"--out={tmp_path / 'out'}"]
    with data.lock(tmp_path / "out"), pytest.raises(SystemExit):
        ft.main([*argv, "--device=cpu"])
    assert "another process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_model_no_predictions(encoder_folder, tmp_path, capsys):
    argv = [*own_files(tmp_path, rows=20), f"--init={encoder_folder}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as e:
        ft.main([*argv, "--device=cpu", "--dtype=fp32", "--epochs=2", "--lr", "1e30"])
    assert e.value.code == 2 and "no predictions for" in capsys.readouterr().err


def test_tables_grid_is_table_5():
    args = ft.parse(["--task=all", "--glue=x", "--init=x", "--out=x", "--sweep"])
    for name in ft.TASKS:
        points = ft.grid(name, args)
        large = name in ("QQP", "MNLI", "QNLI")
        assert len(points) == 5 * (2 * 1 * 2 if large else 4 * 2 * 3)
        assert {p["lr"] for p in points} == ({5e-5, 8e-5} if large else {1e-5, 3e-5, 5e-5, 8e-5})
        assert {p["epochs"] for p in points} == ({3, 5} if large else {3, 5, 10})
        assert {p["batch_size"] for p in points} == ({32} if large else {16, 32})


GLUE = Path(__file__).resolve().parent.parent / "shared/data/glue"


@pytest.mark.skipif(not GLUE.is_dir(), reason="no GLUE files here")
@pytest.mark.parametrize("name, rows, dev", [
    ("CoLA", (2528, 6023), 1043), ("SST-2", (29780, 37569), 872), ("MRPC", (1194, 2474), 408),
    ("RTE", (1249, 1241), 277), ("QQP", (10127, 6085), 4000), ("MNLI", (3213, 3326, 3349), 6238),
    ("STS-B", 5749, 1500),
])  # fmt: skip
def test_official_files_are_read_whole(name, rows, dev):
    """Label counts from the files' own description."""
    train_split, devs = ft.read_task(name, GLUE)
    if name == "STS-B":
        assert (
            len(train_split.labels) == rows
            and train_split.labels.min() == 0
            and train_split.labels.max() == 5
        )
    else:
        assert tuple(np.bincount(train_split.labels)) == (
            rows if name != "MNLI" else (3213, 3326, 3349)
        )
    assert len(next(iter(devs.values())).a) == dev


# ------------------------------------------------------------------- bad input, all commands


class Malice:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture
def rubbish(tmp_path, corpus, encoder_folder, monkeypatch):
    """A folder of things that go wrong, and the working directory of the case."""
    monkeypatch.chdir(tmp_path)
    texts = {
        "empty.txt": b"", "binary.txt": b"text\nmore\0text\n",
        "latin.txt": b"one\n\ncaf\xe9 two\n",
        "cut.txt": b"one\n\ntwo \xe4\xbd", "one.txt": b"a single document\n",
        "ok.txt": b"a b\n\nc d\n\ne f\n", "not.json": b"{",
        "no_label.tsv": b"sentence1\tlabel\na\tx\nb\n", "header.tsv": b"text\tlabel\na\tx\n",
        "one_class.tsv": b"sentence1\tlabel\na\tx\nb\tx\n",
        "ok.tsv": b"sentence1\tlabel\na\tx\nb\ty\n", "other.tsv": b"sentence1\tlabel\na\tz\n",
        "number.tsv": b"sentence1\tlabel\na\t1.5\nb\tnan\n",
    }  # fmt: skip
    for name, content in texts.items():
        Path(name).write_bytes(content)
    for name in ("glue/RTE", "badglue/RTE", "nodata"):
        Path(name).mkdir(parents=True)
    for name, line in (("glue", "0\ta\tb\tentailment\n"), ("badglue", "0\ta\tb\n")):
        for part in ("train", "dev"):
            Path(f"{name}/RTE/{part}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + line)
    shutil.copytree(corpus, "data")
    for name, file in (("short", "train.bin"), ("meta", "meta.json"), ("tok", "tokenizer.json")):
        shutil.copytree(corpus, name)
        Path(name, file).write_bytes(Path(name, file).read_bytes()[:-5])
    shutil.copytree(corpus, "ids")
    Path("ids/train.bin").write_bytes(b"\xff" * Path("ids/train.bin").stat().st_size)
    shutil.copytree(encoder_folder, "hf")
    shutil.copytree(encoder_folder, "hf_big")
    tokenizer_file("hf_big", 900, text=data.__doc__)
    shutil.copytree(encoder_folder, "evil")
    torch.save({"x": Malice()}, "evil/pytorch_model.bin")
    shutil.copytree(encoder_folder, "shapes")
    changed = json.loads(Path("shapes/config.json").read_text()) | {"vocab_size": 77}
    Path("shapes/config.json").write_text(json.dumps(changed))
    shutil.copytree(encoder_folder, "bert")
    Path("bert/config.json").write_text(json.dumps(changed | {"model_type": "bert"}))
    Path("run").mkdir()
    torch.save({"x": Malice()}, "run/ckpt.pt")
    return tmp_path


# command, arguments, what the line on stderr must name
BAD = [
    ("data", "--input none.txt --out o", "none.txt"),
    ("data", "--input empty.txt --out o", "empty.txt"),
    ("data", "--input binary.txt --out o", "binary.txt: line 2"),
    ("data", "--input latin.txt --out o", "latin.txt: line 3"),
    ("data", "--input cut.txt --out o", "cut.txt: line 3"),
    ("data", "--input one.txt --out o", "one.txt: 1 document"),
    ("data", "--input ok.txt", "--out"),
    ("data", "--input ok.txt --out o --doc page", "--doc"),
    ("data", "--input ok.txt --out o --vocab_size 100", "--vocab_size 100"),
    ("data", "--input ok.txt --out o --val 2", "--val 2"),
    ("data", "--input ok.txt --out o --val nan", "--val nan"),
    ("data", "--input ok.txt --out o --tokenizer none.json", "none.json"),
    ("data", "--input ok.txt --out o --tokenizer not.json", "not.json"),
    ("data", "--input ok.txt --out ok.tsv/o", "ok.tsv"),
    ("data", "--input ok.txt --out o --frob", "--frob"),
    ("data", "--verify nodata", "nodata/meta.json"),
    ("data", "--verify short", "short/train.bin"),
    ("train", "--data none", "none/meta.json"),
    ("train", "--data short", "short/train.bin"),
    ("train", "--data meta", "meta/meta.json"),
    ("train", "--data tok", "tok/tokenizer.json"),
    ("train", "--data ids", "ids/train.bin"),
    ("train", "--frob 1", "--frob"),
    ("train", "--recipe huge", "--recipe"),
    ("train", "--seq_len 2", "--seq_len 2"),
    ("train", "--seq_len 5000", "train.bin"),
    ("train", "--seq_len 32 --n_positions 16", "--seq_len 32"),
    ("train", "--mask_rate 0", "mask_rate is 0"),
    ("train", "--mask_rate 1.5", "mask_rate is 1.5"),
    ("train", "--mask_rate -1", "mask_rate"),
    ("train", "--mask_rate nan", "mask_rate is nan"),
    ("train", "--strategy 0.8,0.1,0.2", "strategy"),
    ("train", "--strategy 0,0.5,0.5", "--strategy"),
    ("train", "--strategy a,b,c", "--strategy"),
    ("train", "--lr -1", "--lr -1"),
    ("train", "--lr nan", "--lr nan"),
    ("train", "--max_steps 0", "--max_steps 0"),
    ("train", "--n_embd 30", "n_embd is 30"),
    ("train", "--decoder both", "decoder is 'both'"),
    ("train", "--norm mid", "norm is 'mid'"),
    ("train", "--dropout 1", "dropout is 1"),
    ("train", "--batch_size 9 --micro_batch_size 2", "--batch_size 9"),
    ("train", "--dtype int8", "--dtype int8"),
    ("train", "--device abacus", "--device abacus"),
    ("train", "--warmup 2", "--warmup 2"),
    ("train", "--timeout 0", "--timeout 0"),
    ("train", "--seq_len 5", "--seq_len 5"),
    ("train", "--eval_only", "--eval_only"),
    ("train", "--out run", "run/ckpt.pt"),
    ("train", "--init none", "none/config.json"),
    ("train", "--init bert", "bert/config.json"),
    ("train", "--init shapes", "shapes"),
    ("train", "--init evil", "evil/pytorch_model.bin"),
    ("finetune", "--task RTE --glue glue", "--init"),
    ("finetune", "--task RTE --glue nothing --init hf", "nothing"),
    ("finetune", "--task RTE --init hf", "--glue"),
    ("finetune", "--init hf", "--task"),
    ("finetune", "--task XYZ --glue glue --init hf", "--task"),
    ("finetune", "--task RTE --glue badglue --init hf", "badglue/RTE/train.tsv: line 2"),
    ("finetune", "--task RTE --glue glue --init none", "none"),
    ("finetune", "--task RTE --glue glue --init evil", "evil/pytorch_model.bin"),
    ("finetune", "--task RTE --glue glue --init hf --max_len 500", "--max_len 500"),
    ("finetune", "--task RTE --glue glue --init hf_big", "hf_big"),
    ("finetune", "--task RTE --glue glue --init hf --regression", "--regression"),
    ("finetune", "--train ok.tsv --dev ok.tsv --init hf --predict", "--train"),
    ("finetune", "--task RTE --glue glue --init hf --lr 0", "--lr"),
    ("finetune", "--train ok.tsv --init hf", "--dev"),
    ("finetune", "--train none.tsv --dev ok.tsv --init hf", "none.tsv"),
    ("finetune", "--train no_label.tsv --dev ok.tsv --init hf", "no_label.tsv"),
    ("finetune", "--train header.tsv --dev ok.tsv --init hf", "header.tsv: line 1"),
    ("finetune", "--train one_class.tsv --dev ok.tsv --init hf", "one_class.tsv"),
    ("finetune", "--train ok.tsv --dev other.tsv --init hf", "other.tsv: line 2"),
    ("finetune", "--train ok.tsv --dev ok.tsv --init hf --regression", "ok.tsv: line 2"),
    ("finetune", "--train number.tsv --dev ok.tsv --init hf --regression", "number.tsv: line 3"),
]  # fmt: skip


def bad_arguments(command, text):
    """A case's arguments: what is right, then what is wrong."""
    argv = text.split()
    if command == "train":
        usual = dict(
            x.split("=")
            for x in "--data=data --out=o --n_layer=1 --n_embd=32 --head_size=16".split()
        )
        usual |= {"--seq_len": "16", "--batch_size": "8", "--max_steps": "1", "--device": "cpu"}
        if "--init" in argv:
            usual = {k: usual[k] for k in ("--data", "--out", "--seq_len", "--max_steps")}
        return [x for k, v in usual.items() if k not in argv for x in (k, v)] + argv
    return argv + ["--out", "o"] * (command == "finetune")


@pytest.mark.parametrize("command, text, names", BAD, ids=[f"{c} {t}" for c, t, _ in BAD])
def test_bad_input_is_one_line_and_status_2(command, text, names, rubbish, capsys):
    before = {p for p in rubbish.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as e:
        {"data": data, "train": train, "finetune": ft}[command].main(bad_arguments(command, text))
    err = capsys.readouterr().err
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert e.value.code == 2 and len(last) == 1 and names in last[0] and "Traceback" not in err
    left = {p for p in rubbish.rglob("*") if p.is_file()} - before
    # a wrong id is seen when it is read; the checkpoint that cannot be lay in a folder of its own
    allowed = {".lock", "config.json", "log.jsonl"} if {"ids", "run"} & set(text.split()) else set()
    assert {p.name for p in left} <= allowed
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "command, text, names",
    [next(case for case in BAD if case[0] == command) for command in ("data", "train", "finetune")],
)
def test_bad_input_to_the_real_commands(command, text, names, rubbish):
    script = Path(__file__).with_name(f"{command}.py")
    done = subprocess.run(
        [sys.executable, script, *bad_arguments(command, text)], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and names in done.stderr
    )
