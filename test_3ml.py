"""The tests, in the order of the files: model, data, flops, train, finetune; then bad input to all of them.

    pytest test_3ml.py

A test compares with something independent (transformers, torch's own layers, scipy, scikit-learn,
FlopCounterMode, a count by hand, a table of the paper), or holds two runs to a relation that a mistake would
break. A comparison whose library is not installed is skipped."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
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
from data import Corrupted, Data, Vocab, corrupt

HERE = Path(__file__).parent
VOCAB = Vocab(size=99, mask=98)
SHAPE = dict(vocab_size=99, n_positions=20, n_layer=2, n_embd=32, head_size=16, n_embd_dec=16)
BOTH_NORMS = pytest.mark.parametrize("norm", ["post", "pre"])
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


def random_batch(rows=None, rate=0.5):
    return corrupt(random_rows() if rows is None else rows, rate, vocab=VOCAB)


def padded_rows():
    """tokens and attention_mask of rows of different lengths."""
    tokens, mask = random_rows(), torch.arange(20) < torch.tensor([[20], [13], [7], [2]])
    return tokens.masked_fill(~mask, VOCAB.pad), mask


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def refused(capsys, words, function, *args):
    """The call must end with status 2 and one line on stderr that has these words; ... stands for others."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        function(*args)
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert e.value.code == 2 and len(errors) == 1 and "Traceback" not in err
    assert all(part in errors[0] for part in words.split("...")), errors[0]


# ---------------------------------------------------------------------------------- model.py


@BOTH_NORMS
@ALL_MODELS
def test_transformers_computes_the_same_states_losses_and_gradients(norm, decoder, tmp_path):
    """transformers reads our folder, and we read its own. Losses and gradients are vanilla MLM's alone."""
    transformers = pytest.importorskip("transformers")
    net, batch = model_of(decoder=decoder, norm=norm, dropout=0.3), random_batch()
    tokens, mask = padded_rows()
    m.save_pretrained(net, tmp_path / "ours")
    auto = transformers.AutoModelForMaskedLM if decoder == "none" else transformers.AutoModel
    theirs, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert all("pooler" in name for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.attention_probs_dropout_prob == theirs.config.hidden_dropout_prob == 0.3
    base = theirs.eval().base_model
    states = base(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    close(net.encoder(tokens, attention_mask=mask)[mask], states[mask])
    if decoder == "none":
        labels = torch.full_like(batch.inputs, -100).scatter(1, batch.predict, batch.labels)
        out = theirs(input_ids=batch.inputs, labels=labels)
        losses = F.cross_entropy(out.logits.transpose(1, 2), labels, reduction="none")
        close(net(batch), losses.gather(1, batch.predict))
        out.loss.backward()
        net(batch).mean().backward()
        grads = {name: p.grad for name, p in theirs.named_parameters()}
        for name, p in net.named_parameters():
            grad = grads[m.hf_name(name, norm)]
            close(p.grad, grad[2:] if name == "encoder.pos.weight" else grad)

    shaken(theirs).save_pretrained(tmp_path / "theirs", safe_serialization=True)
    shape, encoder = m.load_pretrained(tmp_path / "theirs")
    assert asdict(shape) == asdict(replace(net.config, decoder="none"))
    visible = batch.inputs.gather(1, batch.kept)  # 3ML's encoder sees these alone, at their positions
    states = base(input_ids=visible, position_ids=batch.kept + 2).last_hidden_state
    close(encoder.eval()(visible, batch.kept), states)


@BOTH_NORMS
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 1e-9])  # with dropout, a CPU takes another way through attention
def test_block_is_torchs_transformer_layer(norm, cross, dropout):
    block = shaken(m.Block(32, config_of(norm=norm, dropout=dropout), cross)).train()
    layer = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    theirs = layer(32, 2, 128, 0.0, "gelu", 1e-5, batch_first=True, norm_first=norm == "pre")
    names = dict(self_attn="attn", linear1="fc1", linear2="fc2", norm1="ln1", norm2="ln2")
    if cross:
        names |= dict(multihead_attn="cross", norm2="ln_cross", norm3="ln2")
    for name, ours in names.items():
        weights, kinds = block.get_submodule(ours).state_dict(), ("weight", "bias")
        if ours in ("attn", "cross"):
            joined = {f"in_proj_{p}": torch.cat([weights[f"{x}.{p}"] for x in "qkv"]) for p in kinds}
            weights = joined | {f"out_proj.{p}": weights[f"out.{p}"] for p in kinds}
        theirs.get_submodule(name).load_state_dict(weights)
    block.drop = theirs.dropout1 = theirs.dropout2 = theirs.dropout3 = nn.Tanh()  # to see where dropout is
    block.attn.drop.register_forward_pre_hook(lambda _, x: close(x[0].sum(-1), torch.ones(3, 2, 7)))
    x, memory = torch.randn(3, 7, 32), torch.randn(3, 5, 32) if cross else None
    close(block(x, memory), theirs(x, memory) if cross else theirs(x))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_each_element_alone_and_is_everywhere(p):
    """Share, scale, gradient, and independence of neighbours, since one random number serves four."""
    x, drop = torch.ones(400_001, requires_grad=True), m.Dropout(p)
    y = drop(x)
    close(y[y > 0].unique(), torch.tensor([1 / (1 - p)]), 1e-4)
    z = ((y > 0).double() - (1 - p)) / math.sqrt(p * (1 - p))  # mean 0, variance 1
    for product in (z, z[1:] * z[:-1], z[2:] * z[:-2], z[3:] * z[:-3], z[4:] * z[:-4]):
        assert abs(product.mean()) < 4 / math.sqrt(len(x))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(m.Dropout(0.0)(x), x) and torch.equal(drop.eval()(x), x)
    for kind, places in dict(none=7, self=14, cross=18, classifier=9).items():
        net = (
            m.Classifier(config_of(dropout=p), 2)
            if kind == "classifier"
            else model_of(decoder=kind, dropout=p)
        )
        used = []  # embeddings; in each block attention's weights, its output, the MLP's; the head's two
        for module in net.train().modules():
            if isinstance(module, m.Dropout):
                module.register_forward_hook(lambda *_, used=used: used.append(1))
        net(random_rows() if kind == "classifier" else random_batch())
        assert len(used) == places


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_decoders_are_figure_2s(decoder):
    """Written down for one row, in which every token is in its own place."""
    net, batch = model_of(decoder=decoder), random_batch()
    d, logits = net.decoder, net.logits(batch)
    for r in range(4):
        kept, masked, latents = batch.kept[r], batch.masked[r], torch.zeros(20, 32)
        latents[kept] = net.encoder(batch.inputs[r : r + 1, kept], kept[None])[0]
        x = d.mask.repeat(20, 1)
        if decoder == "self":
            x[kept] = d.bridge(latents[kept])
            states = d.fc1(d.transformer((x + d.pos.weight)[None])[0])
        else:
            queries, memory = (x + d.pos.weight)[None, masked], d.bridge(latents[kept])[None]
            states = d.fc1_visible(latents)
            states[masked] = d.fc1(d.transformer(queries, memory)[0])
        expected = F.linear(net.ln(F.gelu(states)), net.encoder.tok.weight, net.bias)
        close(logits[r], expected[batch.predict[r]])


@ALL_MODELS
@pytest.mark.parametrize("l, d", [(24, 1024), (12, 768)])
def test_parameters_are_counted_by_hand(decoder, l, d):
    norm = "pre" if l == 24 or decoder == "cross" else "post"
    with torch.device("meta"):
        net = m.MaskedLM(m.ModelConfig(n_layer=l, n_embd=d, decoder=decoder, norm=norm))
    V, P, e = 50265, 512, d // 2
    attention, mlp = 4 * d * d + 4 * d + 2 * d, 8 * d * d + 5 * d + 2 * d  # each with its LayerNorm
    attention_e, mlp_e = 4 * e * e + 6 * e, 8 * e * e + 7 * e
    final = 2 if norm == "pre" else 0
    expected = V * d + P * d + 2 * d + l * (attention + mlp) + final * d  # encoder
    expected += 2 * d + V + (0 if decoder == "self" else d * d + d)  # prediction layer of visible tokens
    if decoder != "none":  # bridge, [MASK], positions, blocks, FC1
        expected += d * e + e + e + P * e + 2 * (attention_e + mlp_e) + final * e + e * d + d
    expected += 2 * attention_e if decoder == "cross" else 0
    assert sum(p.numel() for p in net.parameters()) == expected
    millions = {"none": (125, 355), "self": (128, 362), "cross": (130, 365)}[decoder]
    assert round(expected / 1e6) == millions[l == 24]


def test_weights_start_as_berts_do():
    net = m.MaskedLM(config_of(n_embd=256, n_embd_dec=128, head_size=64))
    for name, p in net.named_parameters():
        if name.endswith("weight") and p.dim() == 2 or name.endswith("decoder.mask"):
            assert abs(p.mean()) < 5 * 0.02 / p.numel() ** 0.5, name
            assert math.isclose(p.detach().std(), 0.02, rel_tol=0.3 if p.dim() == 1 else 0.05), name
        else:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name


@BOTH_NORMS
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_saved_classifier_is_transformers(norm, dropout, tmp_path):
    transformers = pytest.importorskip("transformers")
    net = shaken(m.Classifier(config_of(decoder="none", norm=norm, dropout=dropout), 3))
    net.labels = ("yes", "no", "perhaps")
    m.save_pretrained(net, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokens, mask = padded_rows()
    logits = theirs(tokens, attention_mask=mask.long()).logits
    assert theirs.config.id2label == {0: "yes", 1: "no", 2: "perhaps"}
    for ours in (net.train(), m.load_pretrained(tmp_path, 3)[1].eval()):
        close(ours(tokens, mask), logits)
    with pytest.raises(ValueError):
        m.load_pretrained(tmp_path, 2)


def test_autotokenizer_gives_our_ids_and_truncates_pairs_alike(encoder_folder):
    transformers = pytest.importorskip("transformers")
    ours, vocab = data.load_tokenizer(encoder_folder / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(encoder_folder)
    for text in ("the cat sat", "  Two  spaces\nand a dog barked.\n\n", "Grüße 你好 🎉", ""):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs(text)["input_ids"] == [vocab.bos, *ids, vocab.eos]
        assert ours.decode(ids) == text
    assert theirs.mask_token_id == vocab.mask == vocab.size - 1
    assert vocab.mask in theirs("the <mask> sat")["input_ids"]
    assert vocab.mask not in ours.encode("the <mask> sat").ids  # in a corpus it is plain text
    short, long = "the cat sat on the mat. ", "a dog barked at the moon. " * 3
    a, b = (ours.encode(text, add_special_tokens=False).ids for text in (short, long))
    for pair, whole in (((short, long), [0, *a, 2, 2, *b, 2]), ((long, short), [0, *b, 2, 2, *a, 2])):
        for n in (8, 17, len(whole) - 1, len(whole)):  # cut at the end of the longer text
            expected = theirs(*pair, truncation="longest_first", max_length=n)["input_ids"]
            assert ft.encode([pair], ours, n) == ([expected], n < len(whole))
        assert expected == whole


# ----------------------------------------------------------------------------------- data.py


@pytest.mark.parametrize("n", [6, 20, 128, 513])
@pytest.mark.parametrize("rate", [0.15, 0.4, 0.5, 1.0])
@pytest.mark.parametrize("strategy", [(0.8, 0.1, 0.1), (1, 0, 0), (0.8, 0.2, 0), (0.8, 0, 0.2), (0, 0, 1)])
def test_corruption_has_exact_counts(n, rate, strategy):
    rows, k = random_rows(8, n), round(rate * (n - 2))
    batch = corrupt(rows, rate, strategy, vocab=VOCAB)
    n_m = round(strategy[0] * k)
    n_r = round((strategy[0] + strategy[1]) * k) - n_m
    assert batch.predict.shape == (8, k) and batch.n_replaced == n_r
    assert torch.equal(batch.labels, rows.gather(1, batch.predict))
    assert torch.equal(batch.predict[:, :n_m], batch.masked)
    for r in range(8):
        masked, replaced, unchanged = batch.predict[r].split([n_m, n_r, k - n_m - n_r])
        assert all(torch.equal(x, x.unique()) for x in (masked, replaced, unchanged, batch.kept[r]))
        assert sorted(batch.kept[r].tolist() + masked.tolist()) == list(range(n))
        assert len(batch.predict[r].unique()) == k
        assert (batch.inputs[r, masked] == VOCAB.mask).all()
        same = torch.ones(n, dtype=bool)
        same[masked] = same[replaced] = False
        assert torch.equal(batch.inputs[r][same], rows[r][same])


def test_positions_and_words_are_uniform_and_never_special():
    """How often each position, each pair of [MASK]s and each random word occurs, in standard deviations: the
    largest deviation of many is neither too large nor, as with a fixed pattern, too small."""
    R, n, special = 20_000, 25, [0, 3, 7, 8, 24]
    rows = random_rows(1, n).repeat(R, 1)
    rows[:, 3], rows[:, 7], rows[:, 8] = VOCAB.eos, VOCAB.unk, VOCAB.pad
    ordinary = [i for i in range(n) if i not in special]
    batch = corrupt(rows, 0.43, (0.5, 0.3, 0.2), vocab=VOCAB, generator=torch.Generator().manual_seed(1))

    def check(seen, trials, p):
        assert 1 < ((seen - trials * p) / math.sqrt(trials * p * (1 - p))).abs().max() < 4.5

    for positions in (batch.predict, *batch.predict.split([5, 3, 2], dim=1)):
        seen = torch.bincount(positions.flatten(), minlength=n)
        check(seen[ordinary], R, positions.size(1) / 20)
        assert (seen[special] == 0).all()
    chosen = torch.zeros(R, n).scatter_(1, batch.masked, 1)[:, ordinary]
    check((chosen.T @ chosen)[torch.triu(torch.ones(20, 20), 1) > 0], R, 5 * 4 / (20 * 19))
    seen = torch.bincount(batch.inputs.gather(1, batch.predict[:, 5:8]).flatten(), minlength=99)
    check(seen[4:98], 3 * R, 1 / 94)
    assert seen[4:98].sum() == 3 * R
    with pytest.raises(ValueError, match="mask_rate"):
        corrupt(rows, 1.0, vocab=VOCAB)
    shuffled = Vocab(size=30, bos=29, pad=7, eos=3, unk=0, mask=12)  # another order of the special tokens
    words = corrupt(torch.full((50, 20), 5), 1.0, (0, 1, 0), vocab=shuffled).inputs.unique()
    assert set(words.tolist()) == set(range(30)) - {29, 7, 3, 0, 12}


TEXTS = ["The cat sat.\nOn the mat.", "A dog — barked.", "Grüße <mask> </s>\tand 你好", "one  or\nanother"]


def prepared(folder, texts=TEXTS * 3, doc="blank", **options):
    source = Path(folder) / "text.txt"
    source.write_text("\n\n".join(texts) + "\n\n\n", encoding="utf-8")
    data.prepare([source], Path(folder) / doc, doc, **{"vocab_size": 300, "val_every": 3, **options})
    return Data(Path(folder) / doc)


def test_a_prepared_folder_is_verified_and_not_prepared_again(tmp_path, capsys):
    folder = prepared(tmp_path).directory
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(capsys, "already prepared", prepared, tmp_path, ["other", "texts"])
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    data.main(["--verify", str(folder)])
    for name in ("train.bin", "val.bin", "tokenizer.json"):  # one bit
        good = before[name]
        (folder / name).write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
        refused(capsys, name, data.main, ["--verify", str(folder)])
        (folder / name).write_bytes(good)


def documents(d, part):
    """The texts of a token file, by its separators."""
    tokenizer, vocab = data.load_tokenizer(d.directory / "tokenizer.json")
    ids = d.tokens[part].tolist()
    assert ids[-1] == vocab.eos
    ends = [i for i, t in enumerate(ids) if t == vocab.eos]
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in zip([-1, *ends], ends)]


@pytest.mark.parametrize("doc", ["blank", "line", "file"])
@pytest.mark.parametrize("piece", [7, data.PIECE])
def test_prepared_tokens_are_the_documents(doc, piece, tmp_path, monkeypatch):
    """In the order of the files, which have Windows line ends, and one a byte order mark. Every third
    document is for validation, the first one included. Lines may be as long as a piece, or longer."""
    monkeypatch.setattr(data, "PIECE", piece)
    for i, text in enumerate(TEXTS):
        text = "\ufeff" * (i == 0) + text.replace("\n", "\r\n")
        (tmp_path / f"[{i}].txt").write_bytes(text.encode())
    inputs = f"--input {tmp_path}/[0].txt {tmp_path}/*[1-9]?.txt"  # a name with brackets, and a glob
    data.main(f"{inputs} --doc {doc} --out {tmp_path}/out --vocab_size 300 --val_every 3".split())
    d, expected = Data(tmp_path / "out"), "\n".join(TEXTS).split("\n") if doc == "line" else TEXTS
    assert documents(d, "val") == expected[::3]
    assert documents(d, "train") == [text for i, text in enumerate(expected) if i % 3]
    words, V = [token for token in d.tokens["train"].tolist() if token > 3], d.vocab.size
    shares = [(words.count(word) + 1) / (len(words) + V - 5) for word in range(4, V - 1)]
    assert np.allclose(d.frequencies(), [0, 0, 0, 0, *shares, 0])


@pytest.mark.parametrize("size, dtype", [(50265, "uint16"), (65537, "uint32")])
def test_roberta_layout_and_wide_ids(size, dtype, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    words += [f"w{i}" for i in range(len(words), size - 1)]
    ids = {word: i for i, word in enumerate([*words, "<mask>"])}
    tokenizer = tokenizers.ByteLevelBPETokenizer(ids, [])
    tokenizer.add_special_tokens([*special, "<mask>"])
    tokenizer.enable_truncation(2)  # which a corpus must not have
    tokenizer.save(str(tmp_path / "roberta.json"))
    d = prepared(tmp_path, tokenizer=tmp_path / "roberta.json")
    assert d.vocab == Vocab(size, 0, 1, 2, 3, size - 1) and d.meta["dtype"] == dtype
    assert sorted(documents(d, "train") + documents(d, "val")) == sorted(TEXTS * 3)


def test_rows_of_an_epoch_come_once_each_in_an_order_of_its_own(tmp_path):
    d, n, B = prepared(tmp_path, TEXTS * 9), 10, 4
    N = d.n_rows("train", n)
    assert len(d.tokens["train"]) // 8 == N and N > 3 * B
    everything = d.rows("train", np.arange(N), n, 1)
    assert (everything[:, 0] == 0).all() and (everything[:, -1] == 2).all()
    assert np.array_equal(everything[:, 1:-1].ravel(), d.tokens["train"][: N * 8])
    seen = torch.cat([d.batch(s, B, n, 1, seed=5) for s in range(2 * N // B + 1)]).tolist()
    epochs = [seen[:N], seen[N : 2 * N]]
    assert all(sorted(epoch) == sorted(everything.tolist()) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != everything.tolist()
    assert d.batch(3, B, n, 1, seed=5).tolist() == seen[3 * B : 4 * B]
    assert d.batch(3, B, n, 1, seed=6).tolist() != seen[3 * B : 4 * B]


def test_a_row_of_separators_gives_way_to_the_next(tmp_path, capsys):
    d = prepared(tmp_path, ["a"] * 40 + ["the cat sat on the mat; " * 20] * 2, doc="line")
    N = d.n_rows("train", 10)
    rows, got = (d.rows("train", np.arange(N), 10, k) for k in (0, 6))
    good = [i for i in range(N) if (rows[i] > 3).sum() >= 6]
    assert 0 < len(good) < N
    assert np.array_equal(got, rows[[min(good, key=lambda j: (j - i) % N) for i in range(N)]])
    refused(capsys, "mask_rate", d.rows, "train", np.arange(N), 10, 9)


# ---------------------------------------------------------------------------------- flops.py


@ALL_MODELS
@pytest.mark.parametrize("k, n_m", [(5, 4), (10, 8)])
@pytest.mark.parametrize("d_de", [16, 32])
def test_flops_are_those_of_the_real_forward_pass(decoder, k, n_m, d_de):
    """For forward(), and for Appendix D's formulas with a masking rate that makes all counts whole."""
    n, b, u, math_backend = 22, 7, 1000, nn.attention.SDPBackend.MATH
    net = model_of(decoder=decoder, n_positions=n, n_embd_dec=d_de, n_layer_dec=3)
    batch = random_batch(random_rows(1, n), k / 20)
    with nn.attention.sdpa_kernel(math_backend), FlopCounterMode(display=False) as counter, torch.no_grad():
        net(batch)
    real = counter.get_total_flops()
    assert real == flops.forward(net.config, n, n_m, k)
    formula = dict(none=flops.roberta, self=flops.three_ml_self, cross=flops.three_ml_cross)[decoder]
    shape = (2, n, 32) if decoder == "none" else (2, 3, n, 32, d_de)
    assert math.isclose(formula(b, u, *shape, k / n, 99), 2 * b * u * real)


def test_table_3(capsys):
    """Speed-ups: ours to two digits, worked out by hand from Appendix D, and the paper's. Figure 5 at 50%."""
    flops.main([])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    ours, paper = zip(*(line[3:] for line in lines if len(line) == 5 and line[0].startswith(("3ML", "Ro"))))
    assert ours == ("1.34", "1.46", "1.36", "1.00", "1.22", "1.00", "1.28", "1.00", "1.00")
    assert paper == ("1.34", "1.47", "1.37", "1.00", "1.22", "1.00", "1.28", "1.00", "1.00")
    assert ["50%", "1.46", "1.48"] in lines


# ---------------------------------------------------------------------------------- train.py

WORDS = "the cat sat on a mat and dog barked at moon while bird sang over hill".split()
ONE = train.Machine(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 60)) for _ in range(40)]
    return prepared(tmp_path_factory.mktemp("corpus"), texts, val_every=5).directory


def arguments(corpus, out, **changes):
    flags = dict(
        data=corpus, out=out, n_layer=1, n_embd=32, head_size=16, seq_len=16, batch_size=8, max_steps=4,
        micro_batch_size=8, eval_every=2, save_every=1, log_every=1, eval_rows=16, device="cpu", dtype="fp32",
    )  # fmt: skip
    given = {k: v if isinstance(v, tuple) else [v] for k, v in (flags | changes).items()}
    return [x for k, v in given.items() for x in (f"--{k}", *map(str, v))]


def log_of(out):
    """log.jsonl without its timings."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("tokens_per_s", "mfu")} for entry in entries]


def equal(a, b):
    """Whether two nested states are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):  # log_bytes depends on the digits of timings
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k != "log_bytes")
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list | tuple) else a == b


def trained(out):
    """The model of a run."""
    net = m.MaskedLM(train.Config(**json.loads((out / "config.json").read_text()))).eval()
    net.load_state_dict(torch.load(out / "ckpt.pt")["model"])
    return net


def during_step(step, action, monkeypatch):
    """Do something to the model when the gradients of a step are there."""
    real = train.backward

    def patched(model, batch, config, at, *rest):
        loss = real(model, batch, config, at, *rest)
        if at == step:
            action(model)
        return loss

    monkeypatch.setattr(train, "backward", patched)


def ends_as_if_uninterrupted(corpus, folder, **changes):
    """Resume the run in folder/cut, and compare its end with a run that nothing interrupts: parameters,
    optimizer and exported encoder to the last bit, and the log."""
    cut, whole = folder / "cut", folder / "whole"
    for out in (cut, whole):
        train.main(arguments(corpus, out, **changes))
    assert all(equal(torch.load(cut / f), torch.load(whole / f)) for f in ("ckpt.pt", "hf/pytorch_model.bin"))
    assert log_of(cut) == log_of(whole)


@pytest.mark.parametrize("decoder, dropout", [("self", 0), ("cross", 0), ("self", 0.1)])
def test_division_of_work_changes_nothing(decoder, dropout, corpus, tmp_path):
    """One batch whole, in micro-batches of 3, 3 and 2, and by two processes: the same losses and gradient
    norms at every step. Weights would not show a wrong divisor, which Adam hides."""
    micro = dict(whole=2, two=2) if dropout else dict(whole=8, parts=3, two=2)  # which dropout depends on
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, size in micro.items():
        changes = dict(decoder=decoder, dropout=dropout, micro_batch_size=size, lr=1e-5)
        argv = arguments(corpus, tmp_path / name, **changes)
        if name == "two":
            subprocess.run([*torchrun, train.__file__, *argv], check=True)
        else:
            train.main(argv)
    whole, *others = (log_of(tmp_path / name) for name in micro)
    for a, b in [pair for other in others for pair in zip(whole, other, strict=True)]:
        assert a.keys() == b.keys()
        assert all(a[k] == b[k] or math.isclose(a[k], b[k], rel_tol=1e-4) for k in a)


@ALL_MODELS
@pytest.mark.parametrize("number", [0, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_as_if_uninterrupted(decoder, number, corpus, tmp_path):
    """To the last bit. A signal finishes the step and saves it; an exception loses a step or two."""
    changes = dict(decoder=decoder, max_steps=7, dropout=0.1, save_every=100 if number else 2)
    changes |= dict(strategy=(0, 0.5, 0.5)) if decoder == "none" else {}

    def interrupt(model):
        if not number:
            raise KeyboardInterrupt  # nothing is saved
        os.kill(os.getpid(), number)

    for step in range(2, 6):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e:
            during_step(step, interrupt, patch)
            train.main(arguments(corpus, tmp_path / "cut", **changes))
        assert e.value.code == 128 + (number or signal.SIGINT)
        assert torch.load(tmp_path / "cut/ckpt.pt")["step"] == (step + 1 if number else step // 2 * 2)
        assert not number or signal.getsignal(number) == signal.SIG_DFL  # the same again stops at once
        if step == 3:  # as a kill between the two renamings leaves it
            (tmp_path / "cut/ckpt.pt").rename(tmp_path / "cut/ckpt.prev.pt")
    ends_as_if_uninterrupted(corpus, tmp_path, **changes)


def test_a_finished_run_is_evaluated_and_not_changed(corpus, tmp_path, capsys):
    argv = arguments(corpus, tmp_path)
    train.main(argv)
    before = (tmp_path / "ckpt.pt").read_bytes(), (tmp_path / "log.jsonl").read_bytes()
    last = capsys.readouterr().out.splitlines()[-3:]
    lrs = [entry["lr"] for entry in log_of(tmp_path) if "loss" in entry]
    assert lrs == [train.lr_at(step, train.Config(lr=4e-3, max_steps=4)) for step in range(4)]  # tiny's lr
    for again in (argv, [*argv, "--eval_only"], [*argv, "--max_steps", "3"]):
        shutil.rmtree(tmp_path / "hf")  # which comes again
        train.main(again)
        assert capsys.readouterr().out.splitlines()[-3:] == last
    with data.lock(tmp_path):
        refused(capsys, "another process", train.main, argv)
        refused(capsys, "another process", data.prepare, [], tmp_path)
    for field, value in dict(lr=0.5, eval_rows=8, decoder="cross", seed=1, strategy=(1, 0, 0)).items():
        refused(capsys, f"{field} ", train.main, arguments(corpus, tmp_path, **{field: value}))
    other = prepared(tmp_path, ["the cat sat " * 50] * 9, tokenizer=corpus / "tokenizer.json").directory
    refused(capsys, "data (SHA-256)", train.main, arguments(other, tmp_path))
    assert before == ((tmp_path / "ckpt.pt").read_bytes(), (tmp_path / "log.jsonl").read_bytes())


def test_validation_is_the_mean_of_its_tokens(corpus, tmp_path, capsys):
    """The log's perplexities, and that of word frequencies, from one undivided pass over the same rows."""
    changes = dict(micro_batch_size=2, eval_rows=5, strategy=(0.5, 0.3, 0.2), mask_rate=0.5, dropout=0.1)
    train.main(arguments(corpus, tmp_path, **changes))
    d, net, entry = Data(corpus), trained(tmp_path), log_of(tmp_path)[-1]
    for tag, rate in (("_15", 0.15), ("", 0.5)):
        rows = torch.from_numpy(d.rows("val", np.arange(5), 16, 1))
        masks = torch.Generator().manual_seed(0)
        batch = corrupt(rows, rate, (0.5, 0.3, 0.2), vocab=d.vocab, generator=masks)
        losses, n_m = net(batch), batch.masked.size(1)
        close(entry["val_loss" + tag], losses.mean().item())
        parts = losses.split([n_m, batch.n_replaced, losses.size(1) - n_m - batch.n_replaced], dim=1)
        for name, expected in zip(("ppl", "ppl_masked", "ppl_replaced", "ppl_unchanged"), (losses, *parts)):
            assert (entry[name + tag] is None) == (expected.numel() == 0)
            if expected.numel():
                close(math.log(entry[name + tag]), expected.mean().item())
    nats = -np.log(d.frequencies()[batch.labels[:, :n_m]]).mean()
    assert f"ppl_masked {math.exp(nats):.4g} " in capsys.readouterr().out.splitlines()[-2]


def test_recipes_are_table_4():
    """Table 4's values, Adam's settings, weight decay on matrices alone, and the learning-rate schedule."""

    def parsed(*argv):
        return data.parse_flags(train.Config, ["--recipe", *argv], "", train.presets)

    configs = parsed("efficient-large"), parsed("longer-base")
    table = {
        "n_layer": (24, 12), "n_embd": (1024, 768), "head_size": (64, 64), "n_layer_dec": (2, 2),
        "n_embd_dec": (512, 384), "dropout": (0.1, 0.1), "norm": ("pre", "post"), "seq_len": (128, 512),
        "n_positions": (128, 512), "warmup": (0.06, 0.06), "lr": (2e-3, 7e-4), "batch_size": (4096, 2048),
        "weight_decay": (0.01, 0.01), "max_steps": (23_000, 125_000), "grad_clip": (0, 0),
        "mask_rate": (0.5, 0.4), "decoder": ("self", "self"), "strategy": ((0.8, 0.1, 0.1),) * 2,
    }  # fmt: skip
    assert {field: tuple(getattr(config, field) for config in configs) for field in table} == table
    assert parsed("longer-base", "--decoder", "cross").norm == "pre"
    assert parsed("longer-base", "--decoder", "none").norm == "post"
    matrices, rest = train.make_optimizer(model_of(), configs[1]).param_groups
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.01, 0)
    assert (matrices["betas"], matrices["eps"]) == ((0.9, 0.98), 1e-6)
    config = train.Config(max_steps=100, warmup=0.1, lr=1.0)
    schedule = np.interp(np.arange(100), [-1, 9, 10, 100], [0, 1, 1, 0])
    assert np.allclose([train.lr_at(s, config) for s in range(100)], schedule)
    assert train.lr_at(0, replace(config, warmup=0.0)) == 1.0


def test_init_starts_from_a_published_encoder(corpus, tmp_path, capsys):
    source = shaken(m.MaskedLM(config_of(vocab_size=Data(corpus).vocab.size, n_positions=40, norm="pre")))
    m.save_pretrained(source, tmp_path / "hf")
    argv = arguments(corpus, tmp_path / "out", init=tmp_path / "hf", lr=0, max_steps=1)
    refused(capsys, "no flags for the encoder's shape", train.main, argv)
    train.main(" ".join(argv).replace("--n_layer 1 --n_embd 32 --head_size 16", "").split())
    assert equal(source.encoder.state_dict(), m.load_pretrained(tmp_path / "out/hf")[1].state_dict())


def test_fill_gives_the_likeliest_words(corpus, tmp_path, capsys):
    """Compared with the same model when its [MASK]s are reversed."""
    transformers = pytest.importorskip("transformers")
    train.main(arguments(corpus, tmp_path, lr=0.01, dropout=0.5))
    tokenizer, text = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), "a <mask> on a <mask> and"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    kept, masked = (ids[0] < ids.max()).nonzero().T, (ids[0] == ids.max()).nonzero().T.flip(1)
    logits = trained(tmp_path).logits(Corrupted(ids, kept, masked, masked, masked, 0))[0]
    best, words = logits.softmax(-1).flip(0).topk(5), train.fill(tmp_path, text)
    assert [[word for word, _ in x] for x in words] == [list(map(tokenizer.decode, x)) for x in best.indices]
    close(torch.tensor([[p for _, p in x] for x in words]), best.values)
    refused(capsys, "--fill: give one <mask>", train.main, [f"--out={tmp_path}", "--fill=no mask here"])
    train.main([f"--out={tmp_path}", "--fill=the <mask>"])
    assert capsys.readouterr().out.count("%") == 5


def test_clipping_divides_by_the_norm_and_fp16s_scaler_does_not_matter(corpus, tmp_path):
    """The norm in the log is the unclipped one."""
    grads = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: grads.append(
        torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])
    ))  # fmt: skip
    for i, changes in enumerate([{}, dict(grad_clip=0.01), dict(grad_clip=0.01, dtype="fp16")]):
        train.main(arguments(corpus, tmp_path / f"{i}", max_steps=1, **changes))
    hook.remove()
    free, clipped, half = grads
    close(clipped, free * 0.01 / free.norm(), 1e-6)
    norms = [log_of(tmp_path / i)[0]["grad_norm"] / float(free.norm()) for i in "012"]
    assert np.allclose(norms, 1, rtol=0.01) and np.allclose(norms[:2], 1, rtol=1e-5)
    assert (half - clipped).norm() < 0.05 * clipped.norm()


def test_seed_and_step_decide_all_that_is_random(corpus, tmp_path, capsys):
    """Initial weights, rows, masks, and dropout, which the micro-batch decides too and evaluation lacks."""
    argv, d = arguments(corpus, tmp_path, dropout=0.1, micro_batch_size=4), Data(corpus)
    config = data.parse_flags(train.Config, argv, "", train.presets)
    (_, net), (_, other) = (train.prepare_run(replace(config, seed=seed), ONE) for seed in (0, 1))
    assert not equal(net.state_dict(), other.state_dict())
    batch = train.step_batch(d, config, 0, ONE.device)
    for seed, step in ((0, 1), (1, 0)):
        other = train.step_batch(d, replace(config, seed=seed), step, ONE.device)
        assert not torch.equal(batch.labels, other.labels) and not torch.equal(batch.masked, other.masked)
    same = Corrupted(*(torch.cat([x[:4], x[:4]]) for x in batch[:-1]), batch.n_replaced)
    seen, scaler = [], torch.amp.GradScaler("cpu", enabled=False)
    net.register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        train.backward(net, same, replace(config, seed=seed), step, ONE, scaler)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not any(torch.equal(seen[0], seen[i]) for i in (1, 4, 6))  # another micro-batch, step, seed
    close(train.backward(net.eval(), batch, config, 0, ONE, scaler), net(batch).mean().detach())
    assert train.speed(2, config, ONE)["tokens_per_s"] == 8 * 16 / 2
    refused(capsys, "--batch_size 8", train.prepare_run, config, replace(ONE, world=3))
    with replace(ONE, dtype=torch.bfloat16).autocast():
        assert net.encoder.transformer.blocks[0].fc1(torch.ones(32)).dtype is torch.bfloat16


def test_a_damaged_checkpoint_gives_way_to_the_one_before(corpus, tmp_path, capsys):
    train.main(arguments(corpus, tmp_path / "cut", dtype="fp16"))
    path = tmp_path / "cut/ckpt.pt"
    assert torch.load(tmp_path / "cut/ckpt.prev.pt")["step"] == 3
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    ends_as_if_uninterrupted(corpus, tmp_path, dtype="fp16")
    assert f"warning: {path} is damaged" in capsys.readouterr().out
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        path.with_name(name).write_bytes(content[:-1000])
    refused(capsys, "ckpt.prev.pt", train.main, arguments(corpus, tmp_path / "cut"))


def test_divergence_stops_before_the_optimizer_moves(corpus, tmp_path, monkeypatch, capsys):
    during_step(2, lambda model: next(model.parameters()).grad.view(-1)[:1].fill_(math.nan), monkeypatch)
    refused(capsys, "step 3: loss ... --grad_clip 1", train.main, arguments(corpus, tmp_path / "cut"))
    assert torch.load(tmp_path / "cut/ckpt.pt")["step"] == 2
    monkeypatch.undo()
    ends_as_if_uninterrupted(corpus, tmp_path, grad_clip=100)
    train.stop_if_diverged(1.0, math.inf, torch.amp.GradScaler("cpu", 2.0), 0, 0.1)  # fp16 skips a step
    for loss, norm, scale in ((math.nan, 1.0, 2.0), (1.0, math.inf, 1e-5)):  # but not for ever
        scaler = torch.amp.GradScaler("cpu", scale)
        refused(capsys, "diverged", train.stop_if_diverged, loss, norm, scaler, 0, 0.1)


def test_a_full_disk_leaves_the_checkpoint_before(corpus, tmp_path):
    """In a process of its own whose files may not grow beyond half a checkpoint."""
    resource = pytest.importorskip("resource")
    argv = arguments(corpus, tmp_path, max_steps=2, log_every=100)
    train.main(argv)
    before = (tmp_path / "ckpt.pt").read_bytes()
    done = subprocess.run(
        [sys.executable, train.__file__, *argv, "--max_steps", "4"], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2),
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert "ckpt" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("patch", sorted(HERE.glob("experiments/changes/*.patch")), ids=lambda p: p.stem)
def test_the_readmes_changes_apply_and_learn(patch, corpus, tmp_path):
    for script in HERE.glob("*.py"):
        shutil.copy(script, tmp_path)
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    argv = arguments(corpus, tmp_path / "out", decoder="cross", max_steps=30, lr=0.01, eval_every=30)
    subprocess.run([sys.executable, "train.py", *argv], cwd=tmp_path, check=True)
    losses = [entry["loss"] for entry in log_of(tmp_path / "out") if "loss" in entry]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


# ------------------------------------------------------------------------------- finetune.py


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_are_scipys_and_scikit_learns(ties):
    stats, sk = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for n in (5, 50, 1000):
        p, y = rng.integers(0, 2, (2, n))
        a, b = rng.integers(0, 4, (2, n)).astype(float) if ties else rng.normal(size=(2, n))
        for name, ours, theirs in (
            ("acc", (p, y), sk.accuracy_score(y, p)), ("f1", (p, y), sk.f1_score(y, p)),
            ("mcc", (p, y), sk.matthews_corrcoef(y, p)), ("pearson", (a, b), stats.pearsonr(a, b)[0]),
            ("spearman", (a, b), stats.spearmanr(a, b)[0]),
        ):  # fmt: skip
            assert math.isclose(ft.METRICS[name](*ours), theirs, abs_tol=1e-12), name
        assert np.array_equal(ft.ranks(a), stats.rankdata(a))
    assert [ft.METRICS[name](0 * p, y) for name in ("f1", "mcc", "pearson", "spearman")] == [0] * 4


ODD = ['An "unbalanced quote', "caf\u00e9 \u4f60\u597d\x85next \u2028line", "a \x1c\x0b control"]
# From GLUE's pages: each task's metrics, classes in the order of their numbers, the header line of its
# training file, and a row of it with texts a, b and label y
PAIR, MNLI = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
LAYOUTS = {
    "CoLA": (("mcc",), "01", None, "gj04\t{y}\t\t{a}"),
    "SST-2": (("acc",), "01", "sentence\tlabel", "{a} \t{y}"),
    "MRPC": (("f1", "acc"), "01", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{y}\t1\t2\t{a}\t{b}"),
    "STS-B": (("pearson", "spearman"), ("0.000", "3.200", "5.000"),
              "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
              "0\tmain\tMSRvid\t2012\t0001\tnone\tnone\t{a}\t{b}\t{y}"),
    "QQP": (("f1", "acc"), "01",
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\t{a}\t{b}\t{y}"),
    "MNLI": (("acc",), MNLI,
             "index\tpromptID\tpairID\tgenre\ts1b\ts2b\ts1p\ts2p\tsentence1\tsentence2\tlabel1\tgold_label",
             "0\tn\tn\tn\tn\tn\tn\tn\t{a}\t{b}\tn\t{y}"),
    "QNLI": (("acc",), PAIR, "index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{y}"),
    "RTE": (("acc",), PAIR, "index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{y}"),
}  # fmt: skip


def write_task(folder, name, rows):
    """train and dev files of a task in its own format; rows of (a, b, label)."""
    _, _, head, row = LAYOUTS[name]
    (folder / name).mkdir(parents=True, exist_ok=True)
    for file in ("train.tsv", *ft.TASKS[name].dev):
        lines = [head] * bool(head) + [row.format(a=a, b=b, y=y) for a, b, y in rows]
        (folder / name / file).write_bytes("".join(x + "\n" for x in lines).encode())


@pytest.mark.parametrize("name", LAYOUTS)
def test_readers_of_all_tasks(name, tmp_path, capsys):
    task, path, (metrics, labels, head, _) = ft.TASKS[name], tmp_path / name / "train.tsv", LAYOUTS[name]
    assert task.metrics == metrics
    (tmp_path / "test").write_text("index\tsentence\n0\thi\n")
    assert name != "CoLA" or ft.read_split(tmp_path / "test", task, labelled=False)[0] == ["hi"]
    rows = [(ODD[i], ODD[i - 1], labels[i % len(labels)]) for i in range(3)]
    write_task(tmp_path, name, rows)
    for file in (path, *(tmp_path / name / f for f in task.dev)):
        texts, found, dropped = ft.read_split(file, task)
        assert texts == [(a, b) if task.b else a for a, b, _ in rows] and dropped == 0
        assert list(found) == ([0, 3.2, 5] if name == "STS-B" else [i % len(labels) for i in range(3)])
    path.write_bytes(path.read_bytes() + b"one field\n")
    if name == "QQP":
        assert ft.read_split(path, task)[2] == 1
    else:
        refused(capsys, f"{path}: line {4 + bool(head)} has 1 fields", ft.read_split, path, task)
    assert name != "RTE" or ft.own_task(path, False).b == "sentence2"
    write_task(tmp_path, name, [*rows[:2], (*rows[2][:2], "what")])
    refused(capsys, "label 'what'", ft.read_split, path, task)


@pytest.fixture(scope="session")
def encoder_folder(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train.main(arguments(corpus, out, seq_len=64))
    return out / "hf"


def test_a_run_of_a_task_starts_from_the_encoder_and_can_be_repeated(encoder_folder):
    ids = [[0, 5 + i % 2, *[7] * (i % 9), 2] for i in range(64)]  # of many lengths; one token decides
    split = ids, np.arange(64) % 2 * 5.0
    points = [dict(lr=lr, batch_size=8, epochs=10, seed=0) for lr in (2e-3, 2e-3, 0.0)]
    task = "", "STS-B", ft.TASKS["STS-B"], [split, split]
    (a, net), (_, same), (_, start) = (ft.run_once(*task, point, encoder_folder, ONE) for point in points)
    assert a["score"] > 0.85 and equal(net.state_dict(), same.state_dict())
    assert equal(start.encoder.state_dict(), m.load_pretrained(encoder_folder)[1].state_dict())
    assert {x.p for x in net.modules() if isinstance(x, m.Dropout)} == {0.1}  # Table 5
    alone = [ft.predict(net, [x], ONE)[0] for x in ids]  # without padding
    assert np.allclose(ft.predict(net.train(), ids, ONE), alone, atol=1e-4)


def test_a_tiny_encoder_learns_a_task_of_ones_own(encoder_folder, tmp_path, capsys):
    """One word decides. The first run diverges, and is flagged."""
    rng, folder, out, answers = np.random.default_rng(0), tmp_path / "tasks/mine", tmp_path / "out", {}
    folder.mkdir(parents=True)
    for part in ("train", "dev", "test"):
        answers[part] = rng.choice(["no", "yes"], 120)
        lines = [f"{y}\t{rng.choice(WORDS)} {dict(no='bad', yes='good')[y]} end\n" for y in answers[part]]
        (folder / f"{part}.tsv").write_text("label\tsentence1\n" + "".join(lines))
    argv = f"--task=mine --glue={tmp_path}/tasks --init={encoder_folder} --out={out} --dtype=fp32".split()
    argv += ["--predict", "--batch_size=8"]
    ft.main([*argv, "--lr=1e30", "--epochs=1"])
    ft.main([*argv, "--lr=2e-3", "--epochs=15"])
    results = json.loads((out / "results.json").read_text())
    assert [run["collapsed"] for run in results["runs"]] == [True, False]
    assert results["summary"]["mine"]["metrics"]["acc"] == 1.0
    header, *predicted = (out / "predictions/mine.tsv").read_text().splitlines()
    assert header == "index\tprediction" and predicted == [f"{i}\t{y}" for i, y in enumerate(answers["test"])]
    refused(capsys, "--max_len: the runs", ft.main, [*argv, "--max_len=16"])


def test_an_interrupted_sweep_makes_each_run_exactly_once(encoder_folder, tmp_path, monkeypatch, capsys):
    """Interrupted in every third run, within and between tasks; RTE and STS-B start from MNLI's model."""
    glue, out, calls, made, real = tmp_path / "glue", tmp_path / "out", [], [], ft.run_once
    for name in ("MNLI", "RTE", "STS-B"):
        labels = LAYOUTS[name][1]
        write_task(glue, name, [(f"the cat {i}", f"a dog {i}", labels[i % len(labels)]) for i in range(12)])
    (glue / "diagnostic").mkdir()
    for path in ("MNLI/test_matched.tsv", "RTE/test.tsv", "STS-B/test.tsv", "diagnostic/diagnostic.tsv"):
        (glue / path).write_text("index\tsentence1\tsentence2\n" + "0\tthe cat\ta dog\n" * 5)

    def interrupted(title, name, *rest):
        calls.append(title)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        line, model = real(title, name, *rest)
        made.append((title, name, line["start"]))
        model.out.bias.data += 9 * (name == "STS-B")  # beyond the largest score
        model.labels = [title, *model.labels[1:]]  # config.json then names the run
        return line, model

    monkeypatch.setattr(ft, "run_once", interrupted)
    argv = ["--task=all", f"--glue={glue}", f"--init={encoder_folder}", f"--out={out}", "--dtype=fp32"]
    while not (out / "results.json").exists():
        with suppress(SystemExit):
            ft.main([*argv, *"--predict --lr 1e-3 2e-3 --epochs 1 --seed 0 1 2".split()])
    assert len(made) == len(set(made)) == 3 * 3 * 2 < len(calls)
    for _, name, start in made:
        assert start == str(encoder_folder if name == "MNLI" else out / "MNLI/hf")
    results = json.loads((out / "results.json").read_text())
    tasks = [task["score"] for task in results["summary"].values()]
    scores = np.reshape([run["score"] for run in results["runs"]], (3, 3, 2))  # tasks, seeds, learning rates
    assert np.allclose(tasks, np.median(scores.max(axis=2), axis=1))
    assert math.isclose(results["average"], sum(tasks) / 3)
    for name in results["summary"]:
        runs = [run for run in results["runs"] if run["task"] == name]
        best = max(runs, key=lambda run: (not run["collapsed"], run["score"]))
        assert best["title"] in (out / name / "hf/config.json").read_text()
        assert (out / name / "hf/tokenizer.json").exists()
    said = capsys.readouterr().out
    for words in ("QNLI/train.tsv is missing", "average of 3 tasks", "test_mismatched.tsv is missing"):
        assert words in said
    answers = {}
    for path in (out / "predictions").iterdir():
        header, *lines = (line.split("\t") for line in path.read_text().splitlines())
        assert header == ["index", "prediction"] and [i for i, _ in lines] == list("01234")
        answers[path.stem] = {answer for _, answer in lines}
    assert answers.keys() == {"RTE", "STS-B", "AX", "MNLI-m"}
    assert answers["RTE"] <= set(PAIR) and answers["AX"] <= set(MNLI)
    assert answers["STS-B"] == {"5.000"}


def test_fine_tuning_follows_table_5():
    """Warm-up over 6% of the steps, then down to 0; weight decay 0.1 on matrices; epochs; and the grid."""
    seen = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(
        [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    ))  # fmt: skip
    point = dict(lr=1e-3, batch_size=2, epochs=10, seed=0)
    ft.fine_tune(m.Classifier(config_of(), 2), [[0, 5, 2]] * 20, np.array([0, 1] * 10), point, ONE)
    hook.remove()
    lrs = np.interp(np.arange(100), [-1, 5, 6, 100], [0, 1e-3, 1e-3, 0])
    assert np.allclose([matrices[0] for matrices, _ in seen], lrs)
    assert all((matrices[1], rest[1]) == (0.1, 0.0) for matrices, rest in seen)
    rng = np.random.default_rng(0)  # every example once an epoch, in another order, with little padding
    lengths = rng.integers(5, 100, 1003)
    first, second = (ft.batches_of([[0] * n for n in lengths], 8, rng) for _ in range(2))
    assert sorted(np.concatenate(first)) == list(range(1003)) and not np.array_equal(first[0], second[0])
    assert sum(lengths[batch].max() * len(batch) for batch in first) / lengths.sum() < 1.15
    flags = data.parse_flags(ft.Flags, "--task all --glue x --init x --out x --sweep".split(), "")
    small = dict(lr={1e-5, 3e-5, 5e-5, 8e-5}, batch_size={16, 32}, epochs={3, 5, 10})
    large = dict(lr={5e-5, 8e-5}, batch_size={32}, epochs={3, 5})
    for name in ft.TASKS:
        points, table = ft.grid(name, flags).values(), large if name in ("QQP", "MNLI", "QNLI") else small
        assert len(points) == 5 * math.prod(map(len, table.values()))
        assert {x: {point[x] for point in points} for x in table} == table


# ------------------------------------------------------------------- bad input, all commands


class Malice:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture
def rubbish(tmp_path, corpus, encoder_folder, monkeypatch):
    """A folder of things that go wrong, and the working directory of the case."""
    monkeypatch.chdir(tmp_path)
    for name in ("data", "short", "ids", "hf", "evil", "bert", "run"):
        shutil.copytree(corpus if name in ("data", "short", "ids") else encoder_folder, name)
    texts = {"ok.txt": "a b\n\nc d\n\ne f\n", "empty.txt": "", "null.txt": "text\nmore\0text\n",
             "one.txt": "a single document\n", "not.json": "{"}  # fmt: skip
    tasks = {"RTE": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\n", "head": "text\tlabel\na\tx\nb\ty\n",
             "label": "sentence1\tlabel\na\tx\nb\n", "dev": "sentence1\tlabel\na\tx\nb\ty\n",
             "nan": "sentence1\tlabel\na\t1.5\nb\tnan\n"}  # fmt: skip
    for name, text in tasks.items():
        Path("glue", name).mkdir(parents=True)
        texts |= {f"glue/{name}/train.tsv": text, f"glue/{name}/dev.tsv": "sentence1\tlabel\na\tz\n"}
    for name, text in texts.items():
        Path(name).write_text(text)
    Path("latin.txt").write_bytes(b"one\n\ncaf\xe9 two\n")
    Path("short/train.bin").write_bytes(Path("short/train.bin").read_bytes()[:-5])
    Path("ids/train.bin").write_bytes(b"\xff" * Path("ids/train.bin").stat().st_size)
    Path("bert/config.json").write_text(Path("hf/config.json").read_text().replace("roberta", "bert"))
    for path in ("evil/pytorch_model.bin", "run/ckpt.pt"):
        torch.save({"x": Malice()}, path)
    return tmp_path


# For each command, its usual arguments, and cases: what replaces some of these, and what the error must name
BAD = {
    data: ("--input=ok.txt --out=o", [
        ("--input none.txt", "none.txt"), ("--input empty.txt", "empty.txt: 0 doc"), ("--frob", "--frob"),
        ("--input null.txt", "null.txt: not UTF-8"), ("--input latin.txt", "latin.txt: not UTF-8"),
        ("--input one.txt", "one.txt: 1 document"), ("--doc page", "--doc"), ("--val_every 0", "--val_every"),
        ("--out ok.txt/o", "ok.txt"), ("--tokenizer not.json", "not.json"), ("--verify no", "no/meta.json"),
    ]),
    train: ("--data=data --out=o --seq_len=16 --max_steps=1 --device=cpu --n_layer=1 --n_embd=128", [
        ("--data no", "no/meta.json"), ("--data short", "short/train"), ("--data ids", "ids/train.bin"),
        ("--seq_len 5000", "val.bin: no row"), ("--n_positions 8", "--seq_len 16"), ("--init bert", "bert/"),
        ("--dropout 1", "dropout is 1"), ("--mask_rate 2", "mask_rate is 2"), ("--eval_only", "--eval_only"),
        ("--mask_rate 0", "mask_rate is 0"), ("--strategy 0.8 0.1 0.2", "strategy"), ("--out run", "run/"),
        ("--n_embd 30", "n_embd: 30"), ("--device abacus", "--device"), ("--init evil", "evil/pytorch_model"),
    ]),
    ft: ("--init=hf --out=o --glue=glue --task=RTE", [
        ("--glue nothing", "nothing"), ("--task XYZ", "XYZ/train.tsv"), ("--max_len 500", "--max_len 500"),
        ("--task RTE", "RTE/train.tsv: line 2"), ("--task label", "label/train.tsv"), ("--lr x", "--lr"),
        ("--task head", "head/train.tsv: line 1"), ("--task dev", "dev/dev.tsv: line 2"),
        ("--task nan --regression", "nan/train.tsv: line 3"),
    ]),
}  # fmt: skip
CASES = [(module, usual, text, names) for module, (usual, cases) in BAD.items() for text, names in cases]


@pytest.mark.parametrize("module, usual, text, names", CASES, ids=[f"{c[0].__name__} {c[2]}" for c in CASES])
def test_bad_input_is_one_line_and_status_2(module, usual, text, names, rubbish, capsys):
    before = {path: path.read_bytes() for path in rubbish.rglob("*") if path.is_file()}
    argv = text.split()
    refused(capsys, names, module.main, [x for x in usual.split() if x.split("=")[0] not in argv] + argv)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not Path("executed").exists() and not list(rubbish.rglob("*.tmp"))


def test_every_field_is_a_flag(capsys):
    """The help of a flag is the comment after its field: one that a formatter moved away would be lost."""
    for module, fields in ((data, data.Flags), (train, train.Config), (ft, ft.Flags)):
        with pytest.raises(SystemExit):
            module.main(["--help"])
        flags = capsys.readouterr().out.count("\n  --")
        assert flags == len(fields.__dataclass_fields__) - (module is train)  # vocab_size is none
