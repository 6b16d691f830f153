"""The tests, in the order of the files; then bad input to all of them.

    pytest test_3ml.py

A test compares with something independent (transformers, torch's own counts, scipy, scikit-learn, a
count by hand, a table of the paper), or holds two runs to a relation that a mistake would break. A
comparison whose library is not installed is skipped. The patches in experiments/changes have tests
beside them; experiments/faults.py kills and starves real processes."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from importlib.metadata import metadata
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
from model import Corrupted, UserError, corrupt

HERE = Path(__file__).parent
V, MASK = 99, 98
data.VAL_EVERY = 3  # since the texts here are short
SHAPE = dict(vocab_size=V, n_positions=20, n_layer=2, n_embd=32, head_size=16, n_embd_dec=16)
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


def random_rows(B=4, n=20):
    rows = torch.randint(4, MASK, (B, n))
    rows[:, 0], rows[:, -1] = m.BOS, m.EOS
    return rows


def random_batch(rows=None, rate=0.5, strategy=(0.8, 0.1, 0.1), **kwargs):
    rows = random_rows() if rows is None else rows
    return corrupt(rows, rate, strategy, **{"vocab_size": V, "mask_id": MASK, **kwargs})


def padded_rows():
    """tokens and attention_mask of rows of different lengths."""
    tokens, mask = random_rows(), torch.arange(20) < torch.tensor([[20], [13], [7], [2]])
    return tokens.masked_fill(~mask, m.PAD), mask


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def equal(a, b):
    """Whether two nested states are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def refused(capsys, words, main, argv):
    """The command must end with status 2 and one line on stderr that has these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main(argv)
    errors = capsys.readouterr().err.strip().split("\n")
    assert e.value.code == 2 and "error: " in errors[-1] and words in errors[-1], errors
    assert len(errors) == 1 or not any("Traceback" in line for line in errors)


# --------------------------------------------------------------------------------------- model.py


@pytest.mark.parametrize("n", [6, 20, 128, 513])
@pytest.mark.parametrize("rate", [0.15, 0.4, 0.5, 1.0])
@pytest.mark.parametrize("strategy", [(0.8, 0.1, 0.1), (1, 0, 0), (0.8, 0.2, 0), (0, 0, 1)])
def test_corruption_has_exact_counts(n, rate, strategy):
    rows, k = random_rows(8, n), round(rate * (n - 2))
    batch = random_batch(rows, rate, strategy)
    n_m = round(strategy[0] * k)
    n_r = round((strategy[0] + strategy[1]) * k) - n_m
    assert batch.predict.shape == (8, k) and batch.n_replaced == n_r
    assert equal(batch.labels, rows.gather(1, batch.predict))
    for r in range(8):
        masked, replaced, unchanged = batch.predict[r].split([n_m, n_r, k - n_m - n_r])
        assert all(equal(x, x.unique()) for x in (masked, replaced, unchanged, batch.kept[r]))
        assert equal(masked, batch.masked[r]) and len(batch.predict[r].unique()) == k
        assert sorted(batch.kept[r].tolist() + masked.tolist()) == list(range(n))
        same = torch.ones(n, dtype=bool).index_fill(0, torch.cat([masked, replaced]), False)
        assert equal(batch.inputs[r][same], rows[r][same])
        assert (batch.inputs[r, masked] == MASK).all()


def test_positions_and_words_are_uniform_and_never_special():
    """How often each position, each pair of [MASK]s and each random word occurs, in standard
    deviations: the largest of many is neither too large nor, as with a fixed pattern, too small."""
    R, n, special = 20_000, 25, [0, 3, 7, 8, 24]
    rows = random_rows(1, n).repeat(R, 1)
    rows[:, 3], rows[:, 7], rows[:, 8] = m.EOS, m.UNK, m.PAD
    ordinary = [i for i in range(n) if i not in special]
    batch = random_batch(rows, 0.43, (0.5, 0.3, 0.2), generator=torch.Generator().manual_seed(1))

    def check(seen, trials, p):
        z = (seen - trials * p) / math.sqrt(trials * p * (1 - p))
        assert 1 < z.abs().max() < 4.5

    for positions in (batch.predict, *batch.predict.split([5, 3, 2], dim=1)):
        seen = torch.bincount(positions.flatten(), minlength=n)
        check(seen[ordinary], R, positions.size(1) / 20)
        assert (seen[special] == 0).all()
    chosen = torch.zeros(R, n).scatter_(1, batch.masked, 1)[:, ordinary]
    check((chosen.T @ chosen)[torch.triu(torch.ones(20, 20), 1) > 0], R, 5 * 4 / (20 * 19))
    seen = torch.bincount(batch.inputs.gather(1, batch.predict[:, 5:8]).flatten(), minlength=V)
    check(seen[4:98], 3 * R, 1 / 94)
    assert seen[4:98].sum() == 3 * R
    # <mask> need not be the last word; and a row may have too few ordinary tokens
    words = random_batch(torch.full((50, 20), 5), 1.0, (0, 1, 0), vocab_size=30, mask_id=12).inputs
    assert set(words.unique().tolist()) == set(range(4, 30)) - {12}
    assert not (random_batch(rows.index_fill(1, torch.tensor([9]), MASK)).predict == 9).any()
    short = random_batch(torch.tensor([[0, 2, 2, 9, 2, 7, 2, 2]]), 0.5, (1, 0, 0))
    assert {3, 5} <= set(short.masked[0].tolist()) and short.masked.shape == (1, 3)


@BOTH_NORMS
@ALL_MODELS
def test_transformers_computes_the_same_states_losses_and_gradients(norm, decoder, tmp_path):
    """transformers reads our folder, and we read its own, in every format. Losses and gradients are
    vanilla MLM's alone."""
    transformers = pytest.importorskip("transformers")
    net, batch = model_of(decoder=decoder, norm=norm, dropout=0.3), random_batch()
    (tmp_path / "ours").mkdir()
    torch.save({}, tmp_path / "ours/pytorch_model.bin")  # an old export, which must not win
    m.save_pretrained(net, tmp_path / "ours")
    assert not (tmp_path / "ours/pytorch_model.bin").exists()
    auto = transformers.AutoModelForMaskedLM if decoder == "none" else transformers.AutoModel
    theirs, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert all("pooler" in name for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.attention_probs_dropout_prob == theirs.config.hidden_dropout_prob == 0.3
    base, (tokens, mask) = theirs.eval().base_model, padded_rows()
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
            names = m.hf_names(name, norm, theirs.base_model_prefix + ".")
            grad = torch.cat([grads[x] for x in names])
            close(p.grad, grad[2:] if name == "encoder.pos.weight" else grad)

    shaken(theirs).save_pretrained(tmp_path / "theirs")
    shutil.copy(tmp_path / "ours/model.safetensors", tmp_path / "theirs/model_old.safetensors")
    shaken(theirs).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "theirs/config.json", tmp_path / "bin")
    torch.save(theirs.state_dict(), tmp_path / "bin/pytorch_model.bin")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    visible = batch.inputs.gather(1, batch.kept)  # 3ML's encoder sees these, at their positions
    for folder in ("theirs", "shards", "bin"):
        base = transformers.AutoModel.from_pretrained(tmp_path / folder).eval()
        states = base(input_ids=visible, position_ids=batch.kept + 2).last_hidden_state
        shape, encoder = m.load_pretrained(tmp_path / folder)
        assert asdict(shape) == asdict(replace(net.config, decoder="none"))
        close(encoder.eval()(visible, batch.kept), states)


@pytest.mark.parametrize("kind, states, maps", [
    ("none", 5, 2), ("self", 10, 4), ("cross", 12, 6), ("classifier", 7, 2)
])  # fmt: skip
def test_dropout_is_everywhere_in_training_and_nowhere_else(kind, states, maps, monkeypatch):
    """Of states: embeddings, and each sublayer's output; the classifier's head has two. Of
    attention maps: one a sublayer."""
    used, real = [], F.scaled_dot_product_attention

    def attention(q, k, v, mask, dropout_p, *rest):
        used.append(dropout_p)
        return real(q, k, v, mask, dropout_p, *rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    net, batch = m.Classifier(config_of(dropout=0.3), 2), random_rows()
    if kind != "classifier":
        net, batch = model_of(decoder=kind, dropout=0.3), random_batch()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda x, *_: used.append(x.p if x.training else 0.0))
    for rate in (0.3, 0.0):
        net.train(rate > 0)(batch)
        assert used == [x for x in used if x == rate] and len(used) == maps + states
        used.clear()


@pytest.mark.parametrize("decoder", ["self", "cross"])
@BOTH_NORMS
def test_decoders_are_figure_2s(decoder, norm):
    """Written down for one row, in which every token is in its own place."""
    net, batch = model_of(decoder=decoder, norm=norm), random_batch()
    en, d = net.encoder, net.decoder
    en.drop = d.drop = nn.Tanh()  # which shows where the dropout is
    logits = net.logits(batch)
    for r in range(4):
        kept, masked, latents = batch.kept[r], batch.masked[r], torch.zeros(20, 32)
        embedded = en.tok(batch.inputs[r, kept]) + en.pos(kept)
        latents[kept] = en.transformer(en.ln(embedded).tanh()[None])[0]
        x = d.mask.repeat(20, 1)
        if decoder == "self":
            x[kept] = d.bridge(latents[kept])
            states = d.fc1(d.transformer((x + d.pos.weight).tanh()[None])[0])
        else:
            queries = (x + d.pos.weight).tanh()[None, masked]
            memory = d.bridge(latents[kept])[None]
            states = d.fc1_visible(latents)
            states[masked] = d.fc1(d.transformer(queries, memory)[0])
        expected = F.linear(net.head_ln(F.gelu(states)), net.encoder.tok.weight, net.head_bias)
        close(logits[r], expected[batch.predict[r]])
    close(net(batch), F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none"))


@ALL_MODELS
def test_the_model_is_one_graph(decoder):
    """torch.compile finds no break in it, and changes nothing."""
    net, batch = model_of(decoder=decoder), random_batch()
    close(torch.compile(net, backend="eager", fullgraph=True)(batch), net(batch))


@ALL_MODELS
@pytest.mark.parametrize("l, d", [(24, 1024), (12, 768)])
def test_parameters_are_counted_by_hand(decoder, l, d):
    norm = "pre" if l == 24 else None
    with torch.device("meta"):
        net = m.MaskedLM(m.ModelConfig(n_layer=l, n_embd=d, decoder=decoder, norm=norm))
    P, e = 512, d // 2
    attention, mlp = 4 * d * d + 6 * d, 8 * d * d + 7 * d  # each with its LayerNorm
    attention_e, mlp_e = 4 * e * e + 6 * e, 8 * e * e + 7 * e
    final = 2 if l == 24 or decoder == "cross" else 0  # pre-LN's
    expected = 50265 * d + P * d + 2 * d + l * (attention + mlp) + final * d  # encoder
    expected += 2 * d + 50265 + (0 if decoder == "self" else d * d + d)  # prediction layer
    if decoder != "none":  # bridge, [MASK], positions, blocks, FC1
        expected += d * e + e + e + P * e + 2 * (attention_e + mlp_e) + final * e + e * d + d
    expected += 2 * attention_e if decoder == "cross" else 0
    assert sum(p.numel() for p in net.parameters()) == expected
    millions = {"none": (125, 355), "self": (128, 362), "cross": (130, 365)}[decoder]
    assert round(expected / 1e6) == millions[l == 24]


def test_weights_start_at_their_scales():
    """Embeddings and [MASK] at 0.02, matrices at a scale over sqrt(inputs), the rest at 0 or 1."""
    net = m.MaskedLM(config_of(n_embd=256, n_embd_dec=128, head_size=64, decoder="cross"))
    for name, p in net.named_parameters():
        embedding = re.search(r"(tok|pos)\.weight|decoder\.mask", name)
        std = 0.02 if embedding else 0.02 * math.sqrt(768 / p.shape[-1])
        if p.dim() == 2 or embedding:
            assert abs(p.mean()) < 5 * std / p.numel() ** 0.5, name
            assert math.isclose(p.detach().std(), std, rel_tol=0.3 if p.dim() == 1 else 0.05), name
        else:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name


@BOTH_NORMS
def test_saved_classifier_is_transformers(norm, tmp_path):
    transformers = pytest.importorskip("transformers")
    net = m.Classifier(config_of(decoder="none", norm=norm), 3)
    assert net.head_dense.weight.abs().max() <= 32**-0.5  # PyTorch's default
    shaken(net).labels = ("yes", "no", "perhaps")
    m.save_pretrained(net, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == {0: "yes", 1: "no", 2: "perhaps"}
    assert theirs.config.label2id == {"yes": 0, "no": 1, "perhaps": 2}
    tokens, mask = padded_rows()
    logits = theirs(tokens, attention_mask=mask.long()).logits
    for ours in (net, m.load_pretrained(tmp_path, 3)[1].eval()):
        close(ours(tokens, mask), logits)
    with pytest.raises(UserError, match="must fit config.json"):
        m.load_pretrained(tmp_path, 2)


# ---------------------------------------------------------------------------------------- data.py

TEXTS = ["The cat sat.\nOn the mat.", "A dog — barked.", "Grüße <mask> </s>\tand 你好",
         "one  or\nanother"]  # fmt: skip


def prepared(folder, texts=TEXTS * 3, doc="blank", **options):
    source = Path(folder) / "text.txt"
    source.write_text("\n\n".join(texts) + "\n\n\n", encoding="utf-8")
    data.prepare([source], Path(folder) / doc, doc, **{"vocab_size": 300, **options})
    return data.Data(Path(folder) / doc)


def documents(d, split):
    """The texts of a token file, by its separators."""
    tokenizer, _ = data.load_tokenizer(d.directory / "tokenizer.json")
    ids = d.tokens[split].tolist()
    assert ids[-1] == m.EOS
    ends = [i for i, t in enumerate(ids) if t == m.EOS]
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in zip([-1, *ends], ends)]


@pytest.mark.parametrize("doc", ["blank", "line", "file"])
@pytest.mark.parametrize("limit", [6, 7, data.LIMIT])
def test_prepared_tokens_are_the_documents(doc, limit, tmp_path, monkeypatch, capsys):
    """In the order of the files, which have Windows line ends, and one a byte order mark. Every
    third document is for validation, the first one included. Lines may be longer than what is read
    at once."""
    monkeypatch.setattr(data, "LIMIT", limit)
    for i, text in enumerate(TEXTS):
        ends = "\r\r\n" if limit > 7 else "\n"
        text = "\ufeff" * (i == 0) + text.replace("\n", ends) + f"{ends}\n \n"
        (tmp_path / f"[{i}].txt").write_bytes(text.encode())
    files = f"{tmp_path}/[0].txt {tmp_path}/*[1-9]?.txt"  # a name with brackets, and a glob
    argv = f"--input {files} --doc {doc} --out {tmp_path}/out --vocab_size 300".split()
    data.main(argv)
    d = data.Data(tmp_path / "out")
    expected = "\n".join(TEXTS).split("\n") if doc == "line" else TEXTS
    assert documents(d, "val") == expected[::3]
    assert documents(d, "train") == [text for i, text in enumerate(expected) if i % 3]
    if limit > 7:  # the tokens of lines are those of whole documents
        tokenizer, _ = data.load_tokenizer(tmp_path / "out/tokenizer.json")
        whole = [[*tokenizer.encode(x, add_special_tokens=False).ids, m.EOS] for x in expected[::3]]
        assert d.tokens["val"].tolist() == sum(whole, [])
    before = (tmp_path / "out/train.bin").read_bytes()
    refused(capsys, "already prepared", data.main, argv)
    assert before == (tmp_path / "out/train.bin").read_bytes()


def test_reading_takes_memory_and_time_of_a_line(tmp_path):
    """400,000 blank lines within a document, and a line of 5 MB, which comes in parts."""
    blank, long = tmp_path / "blank.txt", tmp_path / "long.txt"
    blank.write_text("a" + "\n" * 400_000 + "b")
    long.write_text("word " * 1_000_000)
    assert list(data.read_texts([blank], "file", "")) == ["a", "\nb", data.END]
    assert list(data.read_texts([blank], "blank", "")) == ["a", data.END, "b", data.END]
    *parts, end = data.read_texts([long], "line", "")
    assert end == data.END and "".join(parts) == "word " * 1_000_000
    assert max(map(len, parts)) <= data.LIMIT


@pytest.mark.parametrize("size, dtype, hole", [(50265, "uint16", 0), (65530, "uint32", 9)])
def test_roberta_layout_wide_ids_and_holes(size, dtype, hole, tmp_path):
    """A given tokenizer.json is used as it is. V is its largest id + 1, even if ids before it are
    not used. Its special tokens need not be marked as such, and texts may contain their names."""
    tokenizers = pytest.importorskip("tokenizers")
    words = [*data.SPECIAL[:4], *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    words += [f"w{i}" for i in range(len(words), size - 1)]
    ids = {word: i for i, word in enumerate(words)} | {"<mask>": size - 1 + hole}
    tokenizer = tokenizers.ByteLevelBPETokenizer(ids, [])
    tokenizer.add_tokens(list(data.SPECIAL))
    tokenizer.enable_truncation(2)  # which a corpus must not have
    tokenizer.save(str(tmp_path / "given.json"))
    d = prepared(tmp_path, tokenizer=tmp_path / "given.json")
    assert (d.vocab_size, d.mask_id) == (size + hole, size - 1 + hole) and d.meta["dtype"] == dtype
    assert sorted(documents(d, "train") + documents(d, "val")) == sorted(TEXTS * 3)


def test_autotokenizer_gives_our_ids_and_truncates_pairs_alike(encoder_folder):
    transformers = pytest.importorskip("transformers")
    ours, size = data.load_tokenizer(encoder_folder / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(encoder_folder)
    for text in ("the cat sat", "  Two  spaces\nand a dog barked.\n\n", "Grüße 你好 🎉", ""):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs(text)["input_ids"] == [m.BOS, *ids, m.EOS] and ours.decode(ids) == text
    mask = theirs.mask_token_id
    assert ours.token_to_id("<mask>") == mask == size - 1
    assert mask in theirs("the <mask> sat")["input_ids"]
    assert mask not in ours.encode("the <mask> sat").ids  # in a corpus it is plain text
    a, b = "the cat sat on the mat. ", "a dog barked at the moon. " * 3
    for pair in ((a, b), (b, a), (b, b + a), (b + a, b), (a,), (b, b)):
        for n in (8, 18, 30, 500):  # cut at the end of the longer text
            expected = theirs(*pair, truncation="longest_first", max_length=n)["input_ids"]
            ours.enable_truncation(n)
            assert ft.encode([pair], ours) == [expected]


def test_a_tokenizer_that_loses_text_or_reads_special_tokens_in_it_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate([*data.SPECIAL, "a"])}, "<unk>"
    ))  # fmt: skip
    drops = tokenizers.Tokenizer(tokenizers.models.BPE())  # knows "a", and drops all else
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=9, special_tokens=list(data.SPECIAL))
    drops.train_from_iterator(["a"], trainer)
    for tokenizer in (words, drops):
        tokenizer.save(str(tmp_path / "given.json"))
        with pytest.raises(UserError, match="given.json: loses some characters"):
            data.load_tokenizer(tmp_path / "given.json")


def test_the_default_corpus_is_the_long_strings_of_the_installed_python(tmp_path, monkeypatch):
    long = "word " * 39 + "end"
    for name in ("a.py", "site-packages/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(
            f'"""\n  {long}\n\n  {name}\n"""\nx = "{long}"\ny = "too short"\n'
        )
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: dict(stdlib=tmp_path))
    monkeypatch.setattr(np, "__path__", [])
    monkeypatch.setattr(torch, "__path__", [])
    data.write_python_docs(tmp_path / "corpus.txt")
    assert (tmp_path / "corpus.txt").read_text() == f"{long}\na.py\n\n{long}"


def test_rows_of_an_epoch_come_once_each_in_an_order_of_its_own(tmp_path):
    d, n, B = prepared(tmp_path, TEXTS * 9), 10, 4
    N = d.n_rows("train", n)
    assert len(d.tokens["train"]) // 8 == N and N > 3 * B
    everything = d.rows("train", range(N), n)
    assert (everything[:, 0] == m.BOS).all() and (everything[:, -1] == m.EOS).all()
    assert np.array_equal(everything[:, 1:-1].ravel(), d.tokens["train"][: N * 8])
    seen = torch.cat([d.batch(s, B, n, seed=5) for s in range(2 * N // B + 1)]).tolist()
    epochs = [seen[:N], seen[N : 2 * N]]
    assert all(sorted(epoch) == sorted(everything.tolist()) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != everything.tolist()
    assert d.batch(3, B, n, seed=5).tolist() == seen[3 * B : 4 * B]
    assert d.batch(3, B, n, seed=6).tolist() != seen[3 * B : 4 * B]
    assert not np.array_equal(data.permutation(99, 5, 1), data.permutation(99, 6, 0))


# --------------------------------------------------------------------------------------- flops.py


@ALL_MODELS
@pytest.mark.parametrize("k, n_m", [(5, 4), (10, 8), (10, 3)])
@pytest.mark.parametrize("d_de", [16, 32])
def test_flops_are_those_of_the_real_forward_pass(decoder, k, n_m, d_de):
    """For forward(), and for Appendix D's formulas where the masking rate makes all counts
    whole."""
    n, b, u, math_backend = 22, 7, 1000, nn.attention.SDPBackend.MATH
    net = model_of(decoder=decoder, n_positions=n, n_embd_dec=d_de, n_layer_dec=3)
    batch = random_batch(random_rows(1, n), k / 20, (n_m / k, 1 - n_m / k, 0))
    counter = FlopCounterMode(display=False)
    with nn.attention.sdpa_kernel(math_backend), counter:
        net(batch)
    real = counter.get_total_flops()
    assert real == flops.forward(net.config, n, n_m, k)
    if n_m == 0.8 * k:
        formula = dict(none=flops.roberta, **flops.FORMULAS)[decoder]
        shape = (2, n, 32) if decoder == "none" else (2, 3, n, 32, d_de)
        assert math.isclose(formula(b, u, *shape, k / n, V), 2 * b * u * real)


def test_table_3(capsys):
    """Speed-ups: ours, worked out by hand from Appendix D, and the paper's; Figure 5."""
    flops.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    ours, paper = zip(*(line[4:] for line in lines if line and line[0] in ("large", "base")))
    assert ours == ("0.96", "1.34", "1.46", "1.36", "1.22", "1.00", "1.28", "1.00", "1.00")
    assert paper == ("1.00", "1.34", "1.47", "1.37", "1.22", "1.00", "1.28", "1.00", "1.00")
    assert ["50%", "1.46", "1.48"] in lines


# --------------------------------------------------------------------------------------- train.py

WORDS = "the cat sat on a mat and dog barked at moon while bird sang over hill".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 60)) for _ in range(40)]
    return prepared(tmp_path_factory.mktemp("corpus"), texts).directory


def arguments(corpus, out, **changes):
    flags = dict(
        data=corpus, out=out, n_layer=1, n_embd=32, head_size=16, seq_len=16, batch_size=8,
        max_steps=4, micro_batch_size=8, eval_every=2, save_every=1, log_every=1,
        device="cpu", dtype="fp32")  # fmt: skip
    given = {k: v if isinstance(v, tuple) else [v] for k, v in (flags | changes).items()}
    return [x for k, v in given.items() for x in (f"--{k}", *map(str, v))]


def parsed(corpus, out, **changes):
    args = train.parse_flags(arguments(corpus, out, **changes))
    args.vocab_size = data.Data(corpus).vocab_size
    return args


def machine(world=1, dtype="fp32"):
    one = train.Machine("cpu", dtype)
    one.world = world
    return one


def log_of(out):
    """log.jsonl without its timings."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in ("tokens_per_s", "mfu")} for x in entries]


def trained(out):
    """The model of a run."""
    config = json.loads((out / "config.json").read_text())
    net = train.make_model(Namespace(**config)).eval()
    net.load_state_dict(torch.load(out / "ckpt.pt")["model"])
    return net


def during_step(step, action, monkeypatch):
    """Do something to the model when the gradients of a step are there."""
    real = train.backward

    def patched(model, batch, args, at, *rest):
        loss = real(model, batch, args, at, *rest)
        if at == step:
            action(model)
        return loss

    monkeypatch.setattr(train, "backward", patched)


def ends_as_if_uninterrupted(corpus, folder, **changes):
    """Resume the run in folder/cut, and compare its end with a run that nothing interrupts: the
    checkpoint and the exported encoder to the last bit, and the log."""
    cut, whole = folder / "cut", folder / "whole"
    for out in (cut, whole):
        train.main(arguments(corpus, out, **changes))
    assert equal(*(torch.load(out / "ckpt.pt") for out in (cut, whole)))
    assert equal(*(m.load_pretrained(out / "hf")[1].state_dict() for out in (cut, whole)))
    # Steps that were done again have the same entries again.
    entries = [sorted({json.dumps(entry) for entry in log_of(out)}) for out in (cut, whole)]
    assert entries[0] == entries[1] and "val_loss" in log_of(whole)[-1]
    steps = json.loads((whole / "config.json").read_text())["max_steps"]
    assert torch.load(whole / "ckpt.pt")["step"] == log_of(whole)[-1]["step"] == steps


@pytest.mark.parametrize("decoder, dropout", [("self", 0), ("cross", 0), ("self", 0.1)])
def test_division_of_work_changes_nothing(decoder, dropout, corpus, tmp_path):
    """One batch whole, in micro-batches of 3, 3 and 2, and by two processes: the same losses and
    gradient norms at every step. Weights would not show a wrong divisor, which Adam hides."""
    micro = dict(whole=2, two=2) if dropout else dict(whole=8, parts=3, two=2)  # it decides dropout
    for name, size in micro.items():
        changes = dict(decoder=decoder, dropout=dropout, micro_batch_size=size, lr=1e-5)
        argv = arguments(corpus, tmp_path / name, **changes)
        if name == "two":
            subprocess.run([*TORCHRUN, train.__file__, *argv], check=True)
        else:
            train.main(argv)
    whole, *others = (log_of(tmp_path / name) for name in micro)
    for a, b in [pair for other in others for pair in zip(whole, other, strict=True)]:
        assert a.keys() == b.keys()
        assert all(a[k] == b[k] or math.isclose(a[k], b[k], rel_tol=1e-4) for k in a)


@ALL_MODELS
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_interrupted_run_ends_as_if_uninterrupted(decoder, dtype, corpus, tmp_path):
    """To the last bit, wherever it stops; a step or two are done again."""
    changes = dict(decoder=decoder, max_steps=7, dropout=0.1, save_every=2, dtype=dtype)
    changes |= dict(strategy=(0, 0.5, 0.5)) if decoder == "none" else {}

    def interrupt(model):
        raise KeyboardInterrupt

    for step in range(2, 6):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e:
            during_step(step, interrupt, patch)
            train.main(arguments(corpus, tmp_path / "cut", **changes))
        assert e.value.code == 130
        assert torch.load(tmp_path / "cut/ckpt.pt")["step"] == step // 2 * 2
    ends_as_if_uninterrupted(corpus, tmp_path, **changes)


def test_processes_that_disagree_stop(corpus, tmp_path):
    """Two nodes, of which one has a checkpoint; then two whose data differ."""
    train.main(arguments(corpus, tmp_path / "0/out", max_steps=2))
    for folder in ("0", "1"):
        shutil.copytree(corpus, tmp_path / folder / "data")
    for _ in range(2):
        runs = []
        for rank in ("0", "1"):
            env = dict(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29713")
            settings = dict(cwd=tmp_path / rank, env=os.environ | env, text=True)
            command = [sys.executable, train.__file__, *arguments("data", "out")]
            runs.append(subprocess.Popen(command, stderr=subprocess.PIPE, **settings))
        for run in runs:
            errors = run.communicate(timeout=100)[1]
            assert run.returncode == 2 and "--data and --out differ between processes" in errors
        (tmp_path / "0/out/ckpt.pt").unlink(missing_ok=True)
        path = tmp_path / "1/data/meta.json"
        path.write_text(path.read_text().replace('"documents": ', '"documents": 1'))


def test_a_finished_run_is_evaluated_and_not_changed(corpus, tmp_path, capsys):
    argv = arguments(corpus, tmp_path)
    train.main(argv)
    before, entries = (tmp_path / "ckpt.pt").read_bytes(), log_of(tmp_path)
    lrs = [entry["lr"] for entry in entries if "loss" in entry]
    assert lrs == [train.lr_at(step, train.RECIPES["tiny"]["lr"], 0.06, 4) for step in range(4)]
    evaluate = ["--out", str(tmp_path), "--eval_only", "--device=cpu", "--dtype=fp32"]
    for again in (argv, [*argv, "--max_steps", "3"], [*argv, "--micro_batch_size=4"], evaluate):
        shutil.rmtree(tmp_path / "hf")  # which comes again
        train.main(again)
        assert (tmp_path / "hf/model.safetensors").exists()
        last = log_of(tmp_path)[-1]
        assert math.isclose(last["val_loss"], entries[-1]["val_loss"], rel_tol=1e-5)
        assert last["step"] == 4 and "true" not in (tmp_path / "config.json").read_text()
    assert [x["step"] for x in log_of(tmp_path) if "val_loss" in x] == [2, 4, 4, 4, 4, 4]
    other = dict(lr=0.5, decoder="cross", batch_size=4, strategy=(1, 0, 0), seed=1, mask_rate=0.4)
    for field, value in other.items():
        changed = arguments(corpus, tmp_path, **{field: value})
        refused(capsys, f"its run has {field} ", train.main, changed)
    other = prepared(tmp_path, ["the cat sat " * 50] * 9, tokenizer=corpus / "tokenizer.json")
    refused(capsys, "its run has data ", train.main, arguments(other.directory, tmp_path))
    assert before == (tmp_path / "ckpt.pt").read_bytes()
    encoder = (tmp_path / "hf/model.safetensors").read_bytes()
    (tmp_path / "ckpt.pt").unlink()  # whoever needs space may delete it: the encoder must stay
    refused(capsys, "no ckpt.pt", train.main, evaluate)
    assert encoder == (tmp_path / "hf/model.safetensors").read_bytes()


def test_validation_is_the_mean_of_its_tokens(corpus, tmp_path):
    """The log's perplexities, from one undivided pass."""
    strategy = (0.5, 0.3, 0.2)
    changes = dict(micro_batch_size=7, strategy=strategy, mask_rate=0.5, dropout=0.1, seed=5)
    train.main(arguments(corpus, tmp_path, **changes))
    d, net, entry = data.Data(corpus), trained(tmp_path), log_of(tmp_path)[-1]
    for tag, rate in (("_15", 0.15), ("", 0.5)):
        rows, masks = range(d.n_rows("val", 16)), torch.Generator().manual_seed(0)
        rows = d.rows("val", rows, 16)
        assert len(rows) % 7  # the last micro-batch is smaller
        ids = dict(vocab_size=d.vocab_size, mask_id=d.mask_id, generator=masks)
        batch = corrupt(rows, rate, strategy, **ids)
        losses, n_m, n_r = net(batch), batch.masked.size(1), batch.n_replaced
        close(entry["val_loss" + tag], losses.mean().item())
        parts = losses.split([n_m, n_r, losses.size(1) - n_m - n_r], dim=1)
        names = ("ppl", "ppl_masked", "ppl_replaced", "ppl_unchanged")
        for name, expected in zip(names, (losses, *parts)):
            assert (entry[name + tag] is None) == (expected.numel() == 0)
            if expected.numel():
                close(math.log(entry[name + tag]), expected.mean().item())


def test_recipes_are_table_4():
    """Table 4's values, Adam's settings, weight decay on matrices alone, and the schedule."""
    table = dict(
        n_layer=(24, 12), n_embd=(1024, 768), head_size=(64, 64), n_layer_dec=(2, 2),
        n_embd_dec=(None, None), dropout=(0.1, 0.1), norm=("pre", None), seq_len=(128, 512),
        n_positions=(128, 512), warmup=(0.06, 0.06), lr=(2e-3, 7e-4), batch_size=(4096, 2048),
        weight_decay=(0.01, 0.01), max_steps=(23_000, 125_000), grad_clip=(0, 0),
        mask_rate=(0.5, 0.4), decoder=("self",) * 2, strategy=([0.8, 0.1, 0.1],) * 2)  # fmt: skip
    for i, recipe in enumerate(("efficient-large", "longer-base")):
        args = vars(train.parse_flags(["--recipe", recipe]))
        assert {x: args[x] for x in table} == {x: values[i] for x, values in table.items()}
    norms = {x: m.ModelConfig(decoder=x).norm for x in m.DECODERS}
    assert norms == dict(self="post", none="post", cross="pre")
    assert m.ModelConfig(n_embd=768).n_embd_dec == 384
    matrices, rest = train.make_optimizer(model_of(), 0.01).param_groups
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.01, 0)
    assert (matrices["betas"], matrices["eps"]) == ((0.9, 0.98), 1e-6)
    assert type(train.make_optimizer(model_of(), 0.01)) is torch.optim.AdamW
    schedule = np.interp(np.arange(100), [-1, 9, 10, 100], [0, 1, 1, 0])
    assert np.allclose([train.lr_at(s, 1.0, 0.1, 100) for s in range(100)], schedule)
    assert train.lr_at(0, 1.0, 0.0, 100) == 1.0


def test_init_starts_from_a_published_encoder(corpus, tmp_path, capsys):
    size = data.Data(corpus).vocab_size
    source = shaken(m.MaskedLM(config_of(vocab_size=size, n_positions=40, norm="pre")))
    m.save_pretrained(source, tmp_path / "hf")
    argv = arguments(corpus, tmp_path / "out", init=tmp_path / "hf", lr=0, max_steps=1)
    refused(capsys, "no flags of its shape", train.main, argv)
    train.main(" ".join(argv).replace("--n_layer 1 --n_embd 32 --head_size 16", "").split())
    encoder = m.load_pretrained(tmp_path / "out/hf")[1]
    assert equal(source.encoder.state_dict(), encoder.state_dict())


def test_fill_gives_the_likeliest_words(corpus, tmp_path, capsys, monkeypatch):
    """Compared with the same model when its [MASK]s are reversed; the data may be gone."""
    transformers, text = pytest.importorskip("transformers"), "a <mask> on a <mask> and"
    folder = shutil.copytree(corpus, tmp_path / "data")
    train.main(arguments(folder, tmp_path / "out", lr=0.01, dropout=0.5))
    shutil.rmtree(folder)
    monkeypatch.chdir(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained("out/hf")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    kept, masked = (x.nonzero().T for x in (ids[0] < ids.max(), ids[0] == ids.max()))
    batch = Corrupted(ids, kept, masked.flip(1), masked.flip(1), masked.flip(1), 0)
    best = trained(Path("out")).logits(batch)[0].softmax(-1).flip(0).topk(5)
    capsys.readouterr()
    train.main(["--out=out", f"--fill={text}"])
    lines = capsys.readouterr().out.splitlines()
    for line, words, shares in zip(lines, best.indices, best.values, strict=True):
        expected = [f"{tokenizer.decode([i])!r} {p:.1%}" for i, p in zip(words, shares.tolist())]
        assert line.split("  ") == expected
    refused(capsys, "--fill: give one <mask>", train.main, ["--out=out", "--fill=no mask here"])


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


def test_seed_and_step_decide_all_that_is_random(corpus, tmp_path):
    """Initial weights, rows, masks, and dropout, which the micro-batch decides too."""
    args, d, one = parsed(corpus, tmp_path, dropout=0.1), data.Data(corpus), machine()
    args.micro_batch_size = 4
    seeds = [Namespace(**vars(args) | dict(seed=seed)) for seed in (0, 1)]
    net, other = (train.make_model(args) for args in seeds)
    assert not equal(net.state_dict(), other.state_dict())
    rows = random_rows(8, 16)
    d.batch = lambda *_: rows  # which rows a step has is tested with data.py
    batch = train.step_batch(d, args, 0, one.device)
    for seed, step in ((0, 1), (1, 0)):
        other = train.step_batch(d, seeds[seed], step, one.device)
        assert not equal(batch.labels, other.labels) and not equal(batch.masked, other.masked)
    same = Corrupted(*(torch.cat([x[:4], x[:4]]) for x in batch[:-1]), batch.n_replaced)
    seen, scaler = [], torch.amp.GradScaler("cpu", enabled=False)
    net.register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        train.backward(net, same, seeds[seed], step, one, scaler)
    assert equal(seen[0], seen[2]) and equal(seen[1], seen[3])
    assert not any(equal(seen[0], seen[i]) for i in (1, 4, 6))  # micro-batch, step, seed
    close(train.backward(net.eval(), batch, args, 0, one, scaler), net(batch).mean().detach())
    with pytest.raises(UserError, match="--batch_size 8"):
        train.run(args, machine(world=3))


def test_machines(monkeypatch, corpus, tmp_path):
    """What is chosen on a CPU, and on GPUs as torch would report them."""
    one, net, used = machine(dtype="bf16"), model_of(), []
    with one.autocast():
        assert net.encoder.transformer.layers[0].linear1(torch.ones(32)).dtype is torch.bfloat16
    assert one.device.type == "cpu" and one.peak is None
    torch.backends.cuda.enable_flash_sdp(True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name, major, dtype, peak in (
        ("NVIDIA H100 80GB HBM3", 9, torch.bfloat16, 989e12), ("Tesla T4", 7, torch.float16, None)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda major=major: (major, 0))
        gpu = train.Machine()
        assert (gpu.device.type, gpu.dtype, gpu.peak) == ("cuda", dtype, peak)
        speed = train.speed(2.0, net.config, parsed(corpus, tmp_path), gpu)
        work = 3 * 8 * flops.forward(net.config, 16, 6, 7)
        assert speed == dict(tokens_per_s=64, mfu=peak and pytest.approx(work / 2 / peak))
    assert used == [1, 1] and torch.backends.cuda.flash_sdp_enabled()
    assert train.Machine("cpu").device.type == "cpu"
    assert not torch.backends.cuda.flash_sdp_enabled()


def test_a_broken_checkpoint_is_named_and_a_lack_of_memory_is_not(corpus, tmp_path, capsys):
    argv, path = arguments(corpus, tmp_path), tmp_path / "ckpt.pt"
    train.main(argv)
    good = path.read_bytes()
    with pytest.raises(MemoryError), m.reading(path):
        raise MemoryError
    for bad in (good[:-1000], b"", b"text"):
        path.write_bytes(bad)
        refused(capsys, f"{path}: cannot be read", train.main, argv)
        assert path.read_bytes() == bad
    torch.save(dict(model={}, optimizer={}, iter_num=9, config={}), path)  # as nanoGPT's
    refused(capsys, "its run has seed None", train.main, argv)
    path.write_bytes(good)
    state = torch.load(path)
    state["settings"]["span"] = 3  # of a changed train.py
    torch.save(state, path)
    refused(capsys, "its run has span 3, not None", train.main, argv)


def test_divergence_stops_before_anything_is_saved(corpus, tmp_path, monkeypatch, capsys):
    def spoil(x):
        return lambda net: next(net.parameters()).grad.view(-1)[:1].fill_(x)

    nan = dict(save_every=2, log_every=2)
    for step in (3, 2):  # seen in the gradient of the saved step, and in its loss
        during_step(step, spoil(math.nan), monkeypatch)
        refused(capsys, "step 4: diverged", train.main, arguments(corpus, tmp_path / "cut", **nan))
        assert torch.load(tmp_path / "cut/ckpt.pt")["step"] == 2
        monkeypatch.undo()
    ends_as_if_uninterrupted(corpus, tmp_path, grad_clip=100, **nan)
    during_step(1, spoil(math.inf), monkeypatch)
    train.main(arguments(corpus, tmp_path / "fp16", dtype="fp16"))  # leaves that step out


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
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "ckpt.pt").read_bytes() == before


# ------------------------------------------------------------------------------------ finetune.py


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_are_scipys_and_scikit_learns(ties):
    stats, sk = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for n in (5, 50, 1000):
        p, y = rng.integers(0, 2, (2, n))
        a, b = rng.integers(0, 4, (2, n)).astype(float) if ties else rng.normal(size=(2, n))
        for name, ours, theirs in (
            ("acc", (p, y), sk.accuracy_score(y, p)), ("f1", (p, y), sk.f1_score(y, p)),
            ("mcc", (p, y), sk.matthews_corrcoef(y, p)),
            ("pearson", (a, b), stats.pearsonr(a, b)[0]),
            ("spearman", (a, b), stats.spearmanr(a, b)[0]),
        ):  # fmt: skip
            assert math.isclose(ft.METRICS[name](*ours), theirs, abs_tol=1e-12), name
        assert np.array_equal(ft.ranks(a), stats.rankdata(a))
    undefined = [ft.METRICS[name](0 * p, y) for name in ("f1", "mcc", "pearson", "spearman")]
    assert undefined == [0] * 4


ODD = ['An "unbalanced quote', "caf\u00e9 \u4f60\u597d\x85next \u2028line", "a \x1c\x0b control"]
# From GLUE's pages: each task's metrics, classes in the order of their numbers, the header line of
# its training file, and a row of it with texts a, b and label y
PAIR, MNLI = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
LAYOUTS = {
    "CoLA": (("mcc",), "01", None, "gj04\t{y}\t\t{a}"),
    "SST-2": (("acc",), "01", "sentence\tlabel", "{a} \t{y}"),
    "MRPC": (("f1", "acc"), "01", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
             "{y}\t1\t2\t{a}\t{b}"),
    "STS-B": (("pearson", "spearman"), ("0.000", "3.200", "5.000"),
              "index\tgenre\tfile\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
              "0\tmain\tMSRvid\t2012\t0001\tnone\tnone\t{a}\t{b}\t{y}"),
    "QQP": (("f1", "acc"), "01", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            "1\t2\t3\t{a}\t{b}\t{y}"),
    "MNLI": (("acc",), MNLI, "index\tpromptID\tpairID\tgenre\ts1b\ts2b\ts1p\ts2p\tsentence1\t"
             "sentence2\tlabel1\tgold_label", "0\tn\tn\tn\tn\tn\tn\tn\t{a}\t{b}\tn\t{y}"),
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
def test_readers_of_all_tasks(name, tmp_path):
    task, path = ft.TASKS[name], tmp_path / name / "train.tsv"
    metrics, labels, head, _ = LAYOUTS[name]
    assert task.metrics == metrics
    (tmp_path / "test").write_text("index\tsentence\n0\thi\n")
    assert name != "CoLA" or ft.read_split(tmp_path / "test", task, labelled=False)[0] == [("hi",)]
    rows = [(ODD[i], ODD[i - 1], labels[i % len(labels)]) for i in range(3)]
    write_task(tmp_path, name, rows)
    for file in (path, *(tmp_path / name / f for f in task.dev)):
        texts, found = ft.read_split(file, task)
        assert texts == [row[: len(task.texts)] for row in rows]
        assert list(found) == (
            [0, 3.2, 5] if name == "STS-B" else [i % len(labels) for i in range(3)]
        )
    old_mac = tmp_path / "old_mac.tsv"
    old_mac.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
    assert equal(ft.read_split(old_mac, task)[0], texts)
    path.write_bytes(path.read_bytes() + b"one field\n")
    if name == "QQP":  # its training file has such rows; of a test file, none may be lost
        assert len(ft.read_split(path, task)[0]) == 3
    with pytest.raises(UserError, match=f"{path}: line {4 + bool(head)} has 1 fields"):
        ft.read_split(path, task, labelled=name != "QQP")
    write_task(tmp_path, name, [*rows[:2], (*rows[2][:2], "what")])
    with pytest.raises(UserError, match="line 3|line 4"):
        ft.read_split(path, task)


@pytest.fixture(scope="session")
def encoder_folder(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train.main(arguments(corpus, out, seq_len=64))
    return out / "hf"


def test_a_run_of_a_task_starts_from_the_encoder_and_can_be_repeated(encoder_folder):
    ids = [
        [0, 5 + i % 2, *[7] * (i % 9), 2] for i in range(64)
    ]  # of many lengths; one token decides
    split, (config, encoder) = (ids, np.arange(64) % 2 * 5.0), m.load_pretrained(encoder_folder)
    points = [dict(lr=lr, batch_size=8, epochs=10, seed=0) for lr in (2e-3, 2e-3, 0.0)]
    task = "", ft.TASKS["STS-B"], [split, split], encoder, config
    (a, net), (_, same), (_, start) = (ft.run_once(*task, point, machine()) for point in points)
    assert a["score"] > 0.85 and equal(net.state_dict(), same.state_dict())
    assert equal(start.encoder.state_dict(), encoder.state_dict())
    alone = [ft.predict(net, [x], machine())[0] for x in ids]  # without padding
    assert np.allclose(ft.predict(net.train(), ids, machine()), alone, atol=1e-4)


def test_a_tiny_encoder_learns_a_task_of_ones_own(encoder_folder, tmp_path, capsys):
    """One word decides. The first run diverges, and is flagged. The results belong to an encoder,
    to texts, and to labels."""
    rng, folder, answers = np.random.default_rng(0), tmp_path / "tasks/mine", {}
    folder.mkdir(parents=True)
    for part in ("train", "dev", "test"):
        answers[part] = rng.choice(["no", "yes"], 120)
        texts = [f"{rng.choice(WORDS)} {dict(no='bad', yes='good')[y]} end" for y in answers[part]]
        lines = [f"{y}\t{text}\n" for y, text in zip(answers[part], texts)]
        (folder / f"{part}.tsv").write_text("label\tsentence1\n" + "".join(lines))
    other, out = shutil.copytree(encoder_folder, tmp_path / "hf"), tmp_path / "out"
    argv = f"--task=mine --glue={tmp_path}/tasks --init={other} --out={out} --batch_size=8".split()
    ft.main([*argv, "--lr=1", "--epochs=1"])
    ft.main([*argv, "--lr=2e-3", "--epochs=15", "--predict"])
    runs = [json.loads(line) for line in (out / "mine/results.jsonl").read_text().splitlines()]
    assert [run["collapsed"] for run in runs] == [True, False]
    summary = json.loads((out / "results.json").read_text())["summary"]
    assert summary["mine"]["acc"] == 1.0 and summary["mine"]["collapsed"] == 1
    lines = ["index\tprediction", *(f"{i}\t{y}" for i, y in enumerate(answers["test"]))]
    assert (out / "predictions/mine.tsv").read_text().splitlines() == lines
    refused(capsys, "choose another --out", ft.main, [*argv, "--max_len=16"])
    m.save_pretrained(m.MaskedLM(m.load_pretrained(other)[0]), other)
    refused(capsys, "choose another --out", ft.main, argv)
    shutil.copy(encoder_folder / "model.safetensors", other)
    ft.main([*argv, "--lr=2e-3", "--epochs=15"])
    text = (folder / "train.tsv").read_text()
    (folder / "train.tsv").write_text(text.replace("yes\t", "aye\t"))
    refused(capsys, "choose another --out", ft.main, argv)


def test_an_interrupted_sweep_makes_each_run_exactly_once(
    encoder_folder, tmp_path, monkeypatch, capsys
):
    """Interrupted in every third run, within and between tasks; RTE and STS-B start from MNLI's."""
    glue, out, calls, made, real = tmp_path / "glue", tmp_path / "out", [], [], ft.run_once
    for name in ("MNLI", "RTE", "STS-B"):
        labels = LAYOUTS[name][1]
        rows = [(f"the cat {i}", f"a dog {i}", labels[i % len(labels)]) for i in range(12)]
        write_task(glue, name, rows)
    (glue / "diagnostic").mkdir()
    for path in ("MNLI/test_matched", "RTE/test", "STS-B/test", "diagnostic/diagnostic"):
        text = "index\tsentence1\tsentence2\n" + "0\tthe cat\ta dog\n" * 5
        (glue / f"{path}.tsv").write_text(text)

    def interrupted(title, *rest):
        calls.append(title)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        run, model = real(title, *rest)
        made.append(title)
        model.head_out.bias.data += 9 * title.startswith("STS-B")  # beyond the largest score
        model.labels = [title, *model.labels[1:]]  # config.json then names the run
        return run, model

    monkeypatch.setattr(ft, "run_once", interrupted)
    argv = ["--task=all", f"--glue={glue}", f"--init={encoder_folder}", f"--out={out}", "--predict"]
    argv += "--lr 1e-3 2e-3 --epochs 1 --seed 0 1 2".split()
    while not (out / "results.json").exists():
        try:
            ft.main(argv)
        except SystemExit as e:
            assert e.code == 130
    assert len(made) == len(set(made)) == 3 * 3 * 2 < len(calls)
    results = json.loads((out / "results.json").read_text())
    for name, summary in results["summary"].items():
        lines = (out / name / "results.jsonl").read_text().splitlines()
        runs = [json.loads(line) for line in lines]
        start = encoder_folder if name == "MNLI" else out / "MNLI/hf"
        assert {run["start"] for run in runs} == {str(start)}
        seeds = [[r["score"] for r in runs if r["point"]["seed"] == seed] for seed in (0, 1, 2)]
        assert math.isclose(summary["score"], np.median([max(scores) for scores in seeds]))
        best = max(runs, key=lambda run: run["score"])["point"]
        config = (out / name / "hf/config.json").read_text()
        assert f"{name} {best}" in config and '"hidden_dropout_prob": 0.1' in config  # Table 5
        assert (out / name / "hf/tokenizer.json").exists()
    scores = [summary["score"] for summary in results["summary"].values()]
    assert len(scores) == 3 and math.isclose(results["average"], sum(scores) / 3)
    said, answers = capsys.readouterr().out, {}
    assert "average of 3 tasks" in said and "test_mismatched.tsv: missing" in said
    for path in (out / "predictions").iterdir():
        header, *lines = (line.split("\t") for line in path.read_text().splitlines())
        assert header == ["index", "prediction"] and [i for i, _ in lines] == list("01234")
        answers[path.stem] = {answer for _, answer in lines}
    assert answers.keys() == {"RTE", "STS-B", "AX", "MNLI-m"} and answers["STS-B"] == {"5.000"}
    assert answers["RTE"] <= set(PAIR) and answers["AX"] <= set(MNLI)
    # RTE's runs belong to MNLI's model: with another, or with none, they would be other runs
    other = ["--task=RTE", f"--glue={glue}", f"--init={out}/RTE/hf", f"--out={out}"]
    refused(capsys, "MNLI/hf: does not start from", ft.main, other)
    shutil.rmtree(out / "MNLI")
    refused(capsys, "choose another --out", ft.main, ["--task=RTE", *argv[1:]])


def test_fine_tuning_follows_table_5():
    """Warm-up over 6% of the steps, then down to 0; weight decay 0.1 on matrices; epochs; the
    grid."""
    seen = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(
        [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    ))  # fmt: skip
    point = dict(lr=1e-3, batch_size=2, epochs=10, seed=0)
    examples, labels = [[0, 5, 2]] * 20, np.array([0, 1] * 10)
    ft.fine_tune(m.Classifier(config_of(), 2), examples, labels, point, machine(), "")
    hook.remove()
    lrs = np.interp(np.arange(100), [-1, 5, 6, 100], [0, 1e-3, 1e-3, 0])
    assert np.allclose([matrices[0] for matrices, _ in seen], lrs)
    assert all((matrices[1], rest[1]) == (0.1, 0.0) for matrices, rest in seen)
    rng = np.random.default_rng(0)  # every example once an epoch, in another order, little padding
    lengths = rng.integers(5, 100, 1003)
    first, second = (ft.batches_of([[0] * n for n in lengths], 8, rng) for _ in range(2))
    assert sorted(np.concatenate(first)) == list(range(1003))
    assert not np.array_equal(first[0], second[0])
    assert sum(lengths[batch].max() * len(batch) for batch in first) / lengths.sum() < 1.15
    assert ft.FROM_MNLI == ("RTE", "STS-B", "MRPC")
    args = Namespace(sweep=True, seed=None, lr=None, batch_size=None, epochs=None)
    small = dict(lr={1e-5, 3e-5, 5e-5, 8e-5}, batch_size={16, 32}, epochs={3, 5, 10})
    large = dict(lr={5e-5, 8e-5}, batch_size={32}, epochs={3, 5})
    for name in ft.TASKS:
        points, table = ft.grid(name, args), large if name in ("QQP", "MNLI", "QNLI") else small
        assert len(points) == 5 * math.prod(map(len, table.values()))
        assert {x: {point[x] for point in points} for x in table} == table


# ------------------------------------------------------------------------ bad input, all commands


class Malice:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture
def rubbish(tmp_path, corpus, encoder_folder, monkeypatch):
    """A folder of things that go wrong, and the working directory of the case."""
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "evil", "bert", "heads", "words", "run"):
        shutil.copytree(encoder_folder, name)
    for name in ("data", "short", "meta", "val"):
        shutil.copytree(corpus, name)
    meta = Path("val/meta.json").read_text()
    Path("val/meta.json").write_text(re.sub(r'("val": )\d+', r"\g<1>9", meta))
    head, rows = "sentence1\tlabel\n", "a\tx\nb\ty\n"
    texts = {"ok.txt": "a b\n\nc d\n\ne f\n", "empty.txt": "", "one.txt": "a document\n",
             "wiki.txt": "one line\n" * 99 + "\nmore\n", "not.json": "{"}  # fmt: skip
    numbers = "".join(f"a\t{i / 7}\n" for i in range(999))
    tasks = {"RTE": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\n", "head": "text\tlabel\n" + rows,
             "label": head + "a\tx\nb\n", "dev": head + rows, "nan": head + "a\t1.5\nb\tnan\n",
             "none": head + "a\tx\nb\t\n", "float": head + numbers,
             "json": head + rows, "list": head + rows}  # fmt: skip
    for name, text in tasks.items():
        Path("glue", name).mkdir(parents=True)
        texts |= {f"glue/{name}/train.tsv": text, f"glue/{name}/dev.tsv": head + "a\tz\n"}
    for name, text in texts.items():
        Path(name).write_text(text)
    for name, text in dict(json="{}\n", list="[]\n").items():
        Path(f"glue/{name}/dev.tsv").write_text(head + rows)
        Path(f"o_{name}/{name}").mkdir(parents=True)
        Path(f"o_{name}/{name}/results.jsonl").write_text(text)
    Path("run/config.json").write_text("{}")
    Path("latin.txt").write_bytes(b"one\n\ncaf\xe9 two\n")
    Path("short/train.bin").write_bytes(Path("short/train.bin").read_bytes()[:-4])
    Path("meta/meta.json").write_text("{}")
    config = Path("hf/config.json").read_text()
    Path("bert/config.json").write_text(config.replace("roberta", "bert"))
    Path("heads/config.json").write_text(re.sub(r'(heads": )\d+', r"\g<1>0", config))
    tokenizer = data.Tokenizer.from_file("words/tokenizer.json")
    tokenizer.add_tokens(["<url>"])
    tokenizer.save("words/tokenizer.json")
    Path("evil/model.safetensors").unlink()
    for path in ("evil/pytorch_model.bin", "run/ckpt.pt"):
        torch.save({"x": Malice()}, path)
    return tmp_path


# For each command, its usual arguments, and cases: what replaces some of them, what the error names
BAD = {
    data: ("--input=ok.txt --out=n", [
        ("--input none.txt", "none.txt"), ("--input empty.txt", "empty.txt: 0 doc"),
        ("--input latin.txt", "latin.txt: cannot"), ("--input one.txt", "one.txt: 1 document"),
        ("--input wiki.txt", "wiki.txt: 2 documents"), ("--frob", "--frob"), ("--doc x", "--doc"),
        ("--out ok.txt/o", "ok"), ("--vocab_size 0", "--vocab_size"),
        ("--tokenizer not.json", "not.json"), ("--vocab_size 3", "vocab_size 3: must be at least"),
    ]),
    train: ("--data=data --out=n --seq_len=16 --max_steps=1 --device=cpu --n_layer=1", [
        ("--data no", "no/meta.json"), ("--data short", "short: cannot be read"),
        ("--data meta", "meta"), ("--seq_len 5000", "has no row of 5000"),
        ("--seq_len 2", "no row"), ("--n_positions 8", "--seq_len 16"), ("--lr -1", "--lr"),
        ("--data val", "val/val.bin: has no row of 16"),
        ("--init bert", "bert/config.json"), ("--init heads", "heads/config.json"),
        ("--dropout 2", "--dropout"), ("--warmup 6", "--warmup"), ("--mask_rate 2", "--mask_rate"),
        ("--mask_rate 0", "mask_rate is 0"), ("--strategy 0.8 0.1 0.2", "strategy"),
        ("--out run", "run/ckpt.pt"), ("--max_steps 0", "--max_steps"), ("--n_lay 2", "--n_lay"),
        ("--n_embd 100", "--head_size 64"), ("--eval_only", "n/config.json"),
        ("--fill a", "n/config.json"), ("--out run --fill a", "run/ckpt.pt"),
        ("--device abacus", "--device"), ("--init evil", "evil/py"),
    ]),
    ft: ("--init=hf --out=o --glue=glue --task=RTE", [
        ("--glue no --task all", "no:"), ("--task XYZ", "XYZ/train"), ("--max_len 0", "--max_len"),
        ("--task RTE", "RTE/train.tsv: line 2"), ("--task label", "label/train.tsv"),
        ("--task head", "head/train.tsv: "), ("--task dev", "dev/dev.tsv: line 2"),
        ("--task nan --regression", "nan/train.tsv: line 3"), ("--task none", "none/train.tsv"),
        ("--task float", "--regression"), ("--init words", "words: "), ("--lr x", "--lr"),
        ("--task json --out o_json", "json/results.jsonl"),
        ("--task list --out o_list", "list/results.jsonl"),
    ]),
}  # fmt: skip
CASES = [(module, usual, *case) for module, (usual, cases) in BAD.items() for case in cases]
NAMES = [f"{module.__name__} {text}" for module, _, text, _ in CASES]


@pytest.mark.parametrize("module, usual, text, names", CASES, ids=NAMES)
def test_bad_input_is_one_line_and_status_2(module, usual, text, names, rubbish, capsys):
    before = {path: path.read_bytes() for path in rubbish.rglob("*") if path.is_file()}
    argv = text.split()
    argv = [x for x in usual.split() if x.split("=")[0] not in argv] + argv
    refused(capsys, names, module.main, argv)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not Path("executed").exists() and not list(rubbish.rglob("*.tmp"))


@pytest.mark.parametrize("module", [data, train, ft])
def test_help_shows_the_recipe(module, capsys):
    argv = ["--recipe", "longer-base", "--help"] if module is train else ["--help"]
    with pytest.raises(SystemExit) as e:
        module.main(argv)
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and module.__doc__.split("\n")[0] in text
    assert module is not train or "(default: 125000)" in text


def test_the_readmes_python_can_install_the_requirements():
    oldest = re.search(r"Python (3\.\d+) or later", (HERE / "README.md").read_text())[1]
    specifiers = pytest.importorskip("packaging.specifiers")
    for line in (HERE / "requirements.txt").read_text().split():
        needed = metadata(line.split("==")[0]).get("Requires-Python", "")
        assert specifiers.SpecifierSet(needed).contains(oldest), line
