"""The tests, in the order of the files; then bad input to all of them.

    pytest test_3ml.py

A test compares with something independent (transformers, torch's own counts, scipy, scikit-learn, a
count by hand, a table of the paper), or holds two runs to a relation that a mistake would break. A
comparison whose library is absent is skipped. The patches in experiments/changes have tests beside
them; experiments/faults.py kills real processes, fills the disk, and lets two nodes disagree."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
import finetune as ft
import flops
import model as m
import train
from model import Corrupted, UserError, corrupt

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
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1 and "error: " in error and words in error


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
    short = torch.tensor([[0, 2, 2, 9, 2, 7, 2, MASK]]).repeat(50, 1)
    short = random_batch(short, 3 / 6, (2 / 3, 1 / 3, 0))
    assert all(row == [3, 5] for row in short.masked.tolist()) and short.predict.size(1) == 3


@BOTH_NORMS
@ALL_MODELS
def test_transformers_computes_the_same_states_losses_and_gradients(norm, decoder, tmp_path):
    """transformers reads our folder, and we read its own, in every format."""
    transformers = pytest.importorskip("transformers")
    net, batch = model_of(decoder=decoder, norm=norm, dropout=0.3), random_batch()
    (tmp_path / "ours").mkdir()
    torch.save({}, tmp_path / "ours/pytorch_model.bin")  # an old export, which must not win
    m.save_pretrained(net, tmp_path / "ours")
    auto = transformers.AutoModelForMaskedLM if decoder == "none" else transformers.AutoModel
    theirs, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert all("pooler" in name for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.attention_probs_dropout_prob == theirs.config.hidden_dropout_prob == 0.3
    base, (tokens, mask) = theirs.eval().base_model, padded_rows()
    states = base(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    close(net.encoder(tokens, attention_mask=mask)[mask], states[mask])
    if decoder == "none":  # it has no 3ML, so losses and gradients are vanilla MLM's
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
    shaken(theirs).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "theirs/config.json", tmp_path / "bin")
    torch.save(theirs.state_dict(), tmp_path / "bin/pytorch_model.bin")
    visible = batch.inputs.gather(1, batch.kept)  # 3ML's encoder sees these, at their positions
    for folder in ("theirs", "shards", "bin"):
        base = transformers.AutoModel.from_pretrained(tmp_path / folder).eval()
        states = base(input_ids=visible, position_ids=batch.kept + 2).last_hidden_state
        shape, encoder = m.load_pretrained(tmp_path / folder)
        assert asdict(shape) == asdict(replace(net.config, decoder="none"))
        close(encoder.eval()(visible, batch.kept), states)


@pytest.mark.parametrize("kind, times", [("none", 7), ("self", 14), ("cross", 18), ("class", 9)])
def test_dropout_is_everywhere_in_training_and_nowhere_else(kind, times, monkeypatch):
    """On embeddings, each sublayer's output, each attention map, and twice in the classifier."""
    used, real = [], F.scaled_dot_product_attention

    def attention(q, k, v, mask, dropout_p, *rest):
        used.append(dropout_p)
        return real(q, k, v, mask, dropout_p, *rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    net, batch = m.Classifier(config_of(dropout=0.3), 2), random_rows()
    if kind != "class":
        net, batch = model_of(decoder=kind, dropout=0.3), random_batch()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda x, *_: used.append(x.p if x.training else 0.0))
    for rate in (0.3, 0.0):
        net.train(rate > 0)(batch)
        assert used == [rate] * times
        used.clear()


@pytest.mark.parametrize("decoder", ["self", "cross"])
@BOTH_NORMS
def test_decoders_are_figure_2s(decoder, norm):
    """Written down for one row, in which every token is in its own place."""
    net, batch = model_of(decoder=decoder, norm=norm), random_batch()
    en, d = net.encoder, net.decoder
    assert all(block.norm_first == (norm == "pre") for block in d.transformer.layers)
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
def test_torch_compile_finds_one_graph(decoder):
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

TEXTS = ["A cat sat.\nOn a mat.", "A dog — barked.", "Grüße <mask> </s>\tand 你好", "1  or\n2"]


def prepared(folder, texts=TEXTS * 3, doc="blank", **options):
    source = Path(folder) / "text.txt"
    source.write_text("\n\n".join(texts) + "\n\n\n", encoding="utf-8")
    data.prepare([source], Path(folder) / doc, doc, **{"vocab_size": 300, **options})
    return data.Data(Path(folder) / doc)


def documents(d, split):
    """The texts of a token file, by its separators."""
    tokenizer, _ = data.load_tokenizer(d.directory / "tokenizer.json")
    ids = d.tokens[split].tolist()
    ends = [i for i, t in enumerate(ids) if t == m.EOS]
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in zip([-1, *ends], ends)]


@pytest.mark.parametrize("doc", ["blank", "line", "file"])
@pytest.mark.parametrize("limit", [6, 7, data.LIMIT])
def test_prepared_tokens_are_the_documents(doc, limit, tmp_path, monkeypatch, capsys):
    """In the order of the files, which have Windows line ends, a byte order mark, very many blank
    lines, and lines longer than what is read at once. Every third document is for validation."""
    monkeypatch.setattr(data, "LIMIT", limit)
    in_parts = limit < 10
    for i, text in enumerate(TEXTS):
        text = (text + "\n \n").replace("\n", "\n" if in_parts else "\r\n") + "\n" * 200_000
        (tmp_path / f"[{i}].txt").write_bytes(text.encode("utf-8" if i else "utf-8-sig"))
    files = f"{tmp_path}/[0].txt {tmp_path}/*[1-9]?.txt"  # a name with brackets, and a glob
    argv = f"--input {files} --doc {doc} --out {tmp_path}/out --vocab_size 300".split()
    data.main(argv)
    d = data.Data(tmp_path / "out")
    expected = "\n".join(TEXTS).split("\n") if doc == "line" else TEXTS
    assert documents(d, "val") == expected[::3]
    assert documents(d, "train") == [text for i, text in enumerate(expected) if i % 3]
    if not in_parts:  # the tokens of lines are those of whole documents
        tokenizer, _ = data.load_tokenizer(tmp_path / "out/tokenizer.json")
        whole = [[*tokenizer.encode(x, add_special_tokens=False).ids, m.EOS] for x in expected[::3]]
        assert d.tokens["val"].tolist() == sum(whole, [])
    before = (tmp_path / "out/train.bin").read_bytes()
    refused(capsys, "already prepared", data.main, argv)
    assert before == (tmp_path / "out/train.bin").read_bytes()


@pytest.mark.parametrize("size, dtype, hole", [(50265, "uint16", 0), (65530, "uint32", 9)])
def test_roberta_layout_wide_ids_and_holes(size, dtype, hole, tmp_path):
    """A given tokenizer.json is used as it is. V is its largest id + 1, even if ids before it are
    not used. Its special tokens need not be marked as such, and texts may contain their names."""
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
    assert ours.token_to_id("<mask>") == theirs.mask_token_id == size - 1
    assert size - 1 in theirs("<mask>")["input_ids"]  # in a corpus it is plain text:
    assert size - 1 not in ours.encode("<mask>").ids
    a, b = "the cat sat on the mat. ", "a dog barked at the moon. " * 3
    for pair in ((a, b), (b, a), (b, b + a), (b + a, b), (a,), (b, b)):
        for n in (8, 18, 30, 500):  # cut at the end of the longer text
            expected = theirs(*pair, truncation="longest_first", max_length=n)["input_ids"]
            ours.enable_truncation(n)
            assert ft.encode([pair], ours) == [expected]


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
    """forward() always, Appendix D's formulas where the masking rate makes all counts whole."""
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
    return ["--no-compile", *(x for k, v in given.items() for x in (f"--{k}", *map(str, v)))]


def log_of(out):
    """log.jsonl without its timings."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in ("tokens_per_s", "mfu")} for x in entries]


def trained(out):
    """The model of a run."""
    net = train.make_model(Namespace(**json.loads((out / "config.json").read_text()))).eval()
    net.load_state_dict(torch.load(out / "ckpt.pt")["model"])
    return net


@pytest.mark.parametrize("decoder, dropout", [("self", 0), ("cross", 0), ("self", 0.1)])
def test_division_of_work_changes_nothing(decoder, dropout, corpus, tmp_path):
    """One batch whole, in micro-batches of 3, 3 and 2, and by two processes: the same losses and
    gradient norms at every step. Weights would not show a wrong divisor, which Adam hides."""
    micro = dict(whole=2, two=2) if dropout else dict(whole=8, parts=3, two=2)  # it decides dropout
    for name, size in micro.items():
        changes = dict(decoder=decoder, dropout=dropout, micro_batch_size=size, lr=1e-5)
        argv = arguments(corpus, tmp_path / name, **changes)
        if name == "two":
            launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
            subprocess.run([*launch.split(), train.__file__, *argv], check=True)
        else:
            train.main(argv)
    whole, *others = (log_of(tmp_path / name) for name in micro)
    for a, b in [pair for other in others for pair in zip(whole, other, strict=True)]:
        assert a.keys() == b.keys()
        assert all(a[k] == b[k] or math.isclose(a[k], b[k], rel_tol=1e-4) for k in a)


@ALL_MODELS
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_resumed_run_ends_as_if_uninterrupted(decoder, dtype, corpus, tmp_path, monkeypatch):
    """From each of its checkpoints: the same state to the last bit, and the same log."""
    changes = dict(decoder=decoder, max_steps=7, dropout=0.1, save_every=2, dtype=dtype)
    changes |= dict(strategy=(0, 0.5, 0.5)) if decoder == "none" else {}  # no [MASK] at all
    save, whole = train.save_checkpoint, tmp_path / "whole"

    def save_and_copy(out, done, *state):
        save(out, done, *state)
        shutil.copytree(out, tmp_path / str(done))

    monkeypatch.setattr(train, "save_checkpoint", save_and_copy)
    train.main(arguments(corpus, whole, **changes))
    monkeypatch.undo()
    for out in (tmp_path / "2", tmp_path / "4", tmp_path / "6"):
        train.main(arguments(corpus, out, **changes))
        assert equal(*(torch.load(x / "ckpt.pt") for x in (whole, out)))
        assert equal(*(m.load_pretrained(x / "hf")[1].state_dict() for x in (whole, out)))
        assert log_of(whole) == log_of(out) and log_of(out)[-1]["step"] == 7


def test_a_finished_run_is_evaluated_and_not_changed(corpus, tmp_path, capsys):
    argv, path = arguments(corpus, tmp_path), tmp_path / "ckpt.pt"
    train.main(argv)
    before, entries = path.read_bytes(), log_of(tmp_path)
    lrs = [entry["lr"] for entry in entries if "loss" in entry]
    assert lrs == [train.lr_at(step, train.RECIPES["tiny"]["lr"], 0.06, 4) for step in range(4)]
    evaluate = ["--out", str(tmp_path), "--eval_only", "--device=cpu", "--dtype=fp32"]
    for again in (argv, [*argv, "--max_steps", "3"], [*argv, "--micro_batch_size=4"], evaluate):
        shutil.rmtree(tmp_path / "hf")  # which comes again
        train.main(again)
        assert (tmp_path / "hf/model.safetensors").exists()
        last = log_of(tmp_path)[-1]
        assert math.isclose(last["val_loss"], entries[-1]["val_loss"], rel_tol=1e-5)
        assert last["step"] == 4
        assert json.loads((tmp_path / "config.json").read_text())["eval_only"] is False
    other = dict(lr=0.5, decoder="cross", batch_size=4, strategy=(1, 0, 0), seed=1, mask_rate=0.4)
    other["data"] = prepared(tmp_path, tokenizer=corpus / "tokenizer.json").directory
    for field, value in other.items():
        changed = arguments(corpus, tmp_path, **{field: value})
        refused(capsys, f"its run has {field} ", train.main, changed)
    assert before == path.read_bytes()
    path.write_bytes(before[:-1000])
    refused(capsys, f"{path}: cannot be read", train.main, argv)
    with pytest.raises(MemoryError), m.reading(path):  # which says nothing about the file
        raise MemoryError
    path.unlink()  # whoever needs space may delete it
    refused(capsys, "no ckpt.pt", train.main, evaluate)
    assert (tmp_path / "hf/model.safetensors").exists()


def test_validation_is_the_mean_of_its_tokens(corpus, tmp_path):
    """The log's perplexities, from one undivided pass."""
    strategy = (0.5, 0.3, 0.2)
    changes = dict(micro_batch_size=7, strategy=strategy, mask_rate=0.5, dropout=0.1, seed=5)
    train.main(arguments(corpus, tmp_path, **changes))
    d, net, entry = data.Data(corpus), trained(tmp_path), log_of(tmp_path)[-1]
    rows = d.rows("val", range(d.n_rows("val", 16)), 16)
    for tag, rate in (("_15", 0.15), ("", 0.5)):
        masks = torch.Generator().manual_seed(0)
        batch = corrupt(rows, rate, strategy, vocab_size=300, mask_id=299, generator=masks)
        losses, n_m, n_r = net(batch), batch.masked.size(1), batch.n_replaced
        close(entry["val_loss" + tag], losses.mean().item())
        parts = losses.split([n_m, n_r, losses.size(1) - n_m - n_r], dim=1)
        for kind, nats in zip(("", "_masked", "_replaced", "_unchanged"), (losses, *parts)):
            ppl = entry[f"ppl{kind}{tag}"] or 1  # None where there is no such token
            close(math.log(ppl), nats.mean().nan_to_num().item())


def test_recipes_are_table_4(capsys):
    """Table 4's values, 125K steps from Table 3, --help, Adam, weight decay, and the schedule."""
    table = dict(
        n_layer=(24, 12), n_embd=(1024, 768), head_size=(64, 64), n_layer_dec=(2, 2),
        n_embd_dec=(None, None), dropout=(0.1, 0.1), norm=("pre", None), seq_len=(128, 512),
        n_positions=(128, 512), warmup=(0.06, 0.06), lr=(2e-3, 7e-4), batch_size=(4096, 2048),
        weight_decay=(0.01, 0.01), max_steps=(23_000, 125_000), grad_clip=(0, 0),
        mask_rate=(0.5, 0.4), decoder=("self",) * 2, strategy=([0.8, 0.1, 0.1],) * 2)  # fmt: skip
    for i, recipe in enumerate(("efficient-large", "longer-base")):
        args = vars(train.parse_flags(["--recipe", recipe]))
        assert {x: args[x] for x in table} == {x: values[i] for x, values in table.items()}
    with pytest.raises(SystemExit):
        train.main(["--recipe=longer-base", "--help"])
    assert "(default: 125000)" in " ".join(capsys.readouterr().out.split())
    optimizer = train.make_optimizer(model_of(), 0.01)
    matrices, rest = optimizer.param_groups
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.01, 0)
    adam = type(optimizer), matrices["betas"], matrices["eps"]
    assert adam == (torch.optim.AdamW, (0.9, 0.98), 1e-6)
    schedule = np.interp(np.arange(100), [-1, 9, 10, 100], [0, 1, 1, 0])
    assert np.allclose([train.lr_at(s, 1.0, 0.1, 100) for s in range(100)], schedule)


def test_init_starts_from_a_published_encoder(corpus, tmp_path, capsys):
    source = model_of(vocab_size=300, n_positions=40, norm="post")  # tiny is pre-LN
    m.save_pretrained(source, tmp_path / "hf")
    argv = arguments(corpus, tmp_path / "out", init=tmp_path / "hf", lr=0, max_steps=1)
    refused(capsys, "no flags of its shape", train.main, argv)
    train.main(" ".join(argv).replace("--n_layer 1 --n_embd 32 --head_size 16", "").split())
    encoder = m.load_pretrained(tmp_path / "out/hf")[1]
    assert equal(source.encoder.state_dict(), encoder.state_dict())


def test_fill_gives_the_likeliest_words(corpus, tmp_path, capsys):
    """Compared with the same model when its [MASK]s are reversed; the data may be gone."""
    folder, out = shutil.copytree(corpus, tmp_path / "data"), tmp_path / "out"
    train.main(arguments(folder, out, lr=0.01, dropout=0.5))
    shutil.rmtree(folder)
    tokenizer, mask = data.Tokenizer.from_file(str(out / "tokenizer.json")), 299
    ids = torch.tensor([tokenizer.encode("a <mask> on a <mask> and").ids])
    kept, masked = ((ids[0] == mask).eq(x).nonzero().T for x in (False, True))
    batch = Corrupted(ids, kept, masked.flip(1), masked.flip(1), masked.flip(1), 0)
    best = trained(out).logits(batch)[0].softmax(-1).flip(0).topk(5)
    train.main([f"--out={out}", "--fill=a <mask> on a <mask> and"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    for line, *words in zip(lines, best.indices, best.values.tolist(), strict=True):
        assert line == "  ".join(f"{tokenizer.decode([i])!r} {p:.1%}" for i, p in zip(*words))
    refused(capsys, "--fill: give one <mask>", train.main, [f"--out={out}", "--fill=no mask here"])


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_step_clips_the_gradient_and_not_what_fp16_scales(clip):
    p, grad = nn.Parameter(torch.zeros(3)), torch.tensor([2.0, -1.0, 2.0])  # its norm is 3
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * grad).sum()).backward()
    norm = train.update(nn.ParameterList([p]), torch.optim.SGD([p]), scaler, 0.1, clip)
    close(norm.item(), 3.0)
    close(p.detach(), -0.1 * grad * (clip / 3 if clip else 1))


def test_seed_and_step_decide_all_that_is_random(corpus, tmp_path):
    """Initial weights, masks, and dropout, which the micro-batch decides too. Rows: see data.py."""
    d, one, rows = data.Data(corpus), train.Machine("cpu", "fp32"), random_rows(8, 16)
    args = train.parse_flags(arguments(corpus, tmp_path, dropout=0.1, micro_batch_size=4))
    args.vocab_size, d.batch = d.vocab_size, lambda *_: rows
    other = Namespace(**vars(args) | dict(seed=1))
    net, batch = train.make_model(args), train.step_batch(d, args, 0, "cpu")
    assert not equal(net.state_dict(), train.make_model(other).state_dict())
    for changed in (train.step_batch(d, other, 0, "cpu"), train.step_batch(d, args, 1, "cpu")):
        assert not equal(batch.labels, changed.labels) and not equal(batch.masked, changed.masked)
    same = Corrupted(*(torch.cat([x[:4], x[:4]]) for x in batch[:-1]), batch.n_replaced)
    seen = []
    net.register_forward_hook(lambda _, inputs, losses: seen.append(losses.detach()))
    for flags, step in ((args, 0), (args, 0), (args, 1), (other, 0)):
        train.backward(net, same, flags, step, one, one.scaler())
    assert equal(seen[0], seen[2]) and equal(seen[1], seen[3])
    assert not any(equal(seen[0], seen[i]) for i in (1, 4, 6))  # micro-batch, step, seed


@pytest.mark.parametrize("step", [2, 3])
def test_divergence_stops_before_anything_is_saved(step, corpus, tmp_path, monkeypatch, capsys):
    """It is seen in the loss of the step to save, or in its gradient. fp16 leaves a step out."""
    real, changes = train.backward, dict(save_every=2, log_every=2)

    def spoilt(model, batch, args, at, *rest):
        loss = real(model, batch, args, at, *rest)
        if at == step:
            next(model.parameters()).grad.view(-1)[:1].fill_(math.inf)
        return loss

    monkeypatch.setattr(train, "backward", spoilt)
    refused(capsys, "step 4: diverged", train.main, arguments(corpus, tmp_path, **changes))
    assert torch.load(tmp_path / "ckpt.pt")["step"] == 2
    train.main(arguments(corpus, tmp_path / "fp16", dtype="fp16", **changes))
    assert torch.load(tmp_path / "fp16/ckpt.pt")["step"] == 4


# ------------------------------------------------------------------------------------ finetune.py


@pytest.mark.parametrize("n, ties", [(5, True), (50, False), (1000, True)])
def test_metrics_are_scipys_and_scikit_learns(n, ties):
    stats, sk = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    p, y = rng.integers(0, 2, (2, n))
    a, b = rng.integers(0, 4, (2, n)).astype(float) if ties else rng.normal(size=(2, n))
    theirs = dict(acc=sk.accuracy_score(y, p), f1=sk.f1_score(y, p), mcc=sk.matthews_corrcoef(y, p))
    correlations = dict(pearson=stats.pearsonr(a, b)[0], spearman=stats.spearmanr(a, b)[0])
    for name, expected in (theirs | correlations).items():
        ours = ft.METRICS[name](a, b) if name in correlations else ft.METRICS[name](p, y)
        assert math.isclose(ours, expected, abs_tol=1e-12), name
        assert name == "acc" or ft.METRICS[name](0 * p, y) == 0  # undefined


ODD = ['An "unbalanced quote', "caf\u00e9 \u4f60\u597d\x85next \u2028line", "a \x1c\r\x0b control"]
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
    rows = [(ODD[i], ODD[i - 1], labels[i % len(labels)]) for i in range(3)]
    write_task(tmp_path, name, rows)
    for file in (path, *(tmp_path / name / f for f in task.dev)):
        texts, found = ft.read_split(file, task)
        assert texts == [row[: len(task.texts)] for row in rows]
        numbers = [0, 3.2, 5] if name == "STS-B" else [i % len(labels) for i in range(3)]
        assert list(found) == numbers
    path.write_bytes(path.read_bytes() + b"one field\n")
    if name == "QQP":  # its training file has such rows; of a test file, none may be lost
        assert len(ft.read_split(path, task)[0]) == 3
    with pytest.raises(UserError, match=f"{path}: line {4 + bool(head)} has 1 fields"):
        ft.read_split(path, task, labelled=name != "QQP")
    write_task(tmp_path, name, 2 * [(*rows[0][:2], "what")])
    with pytest.raises(UserError, match=f"line {1 + bool(head)}: .* label must be"):
        ft.read_split(path, task)
    path.write_text("index\tsentence\n0\thi\n")  # CoLA's test file has a header, its others none
    if name == "CoLA":
        assert ft.read_split(path, task, labelled=False)[0] == [("hi",)]


@pytest.fixture(scope="session")
def encoder_folder(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train.main(arguments(corpus, out, seq_len=64))
    return out / "hf"


def test_a_run_of_a_task_starts_from_the_encoder_and_can_be_repeated(encoder_folder):
    ids = [[0, 5 + i % 2, *[7] * (i % 9), 2] for i in range(64)]  # one token decides
    split, (config, encoder) = (ids, np.arange(64) % 2 * 5.0), m.load_pretrained(encoder_folder)
    points = [dict(lr=lr, batch_size=8, epochs=10, seed=0) for lr in (2e-3, 2e-3, 0.0)]
    task, one = ft.TASKS["STS-B"], train.Machine("cpu", "fp32")
    runs = [ft.run_once("", task, [split, split], encoder, config, p, one) for p in points]
    (a, net), (_, same), (_, start) = runs
    assert a["score"] > 0.85 and equal(net.state_dict(), same.state_dict())
    assert equal(start.encoder.state_dict(), encoder.state_dict())
    alone = [ft.predict(net, [x], one)[0] for x in ids]  # without padding
    assert np.allclose(ft.predict(net.train(), ids, one), alone, atol=1e-4)


def test_a_tiny_encoder_learns_a_task_of_ones_own(encoder_folder, tmp_path, capsys):
    """One word decides. The first run diverges, and is flagged. The results belong to an encoder
    and to the files of the task."""
    rng, folder, answers = np.random.default_rng(0), tmp_path / "tasks/mine", {}
    folder.mkdir(parents=True)
    for part in ("train", "dev", "test"):
        answers[part] = rng.choice(["no", "yes"], 120)
        texts = [f"{rng.choice(WORDS)} {dict(no='bad', yes='good')[y]} end" for y in answers[part]]
        lines = [f"{y}\t{text}\n" for y, text in zip(answers[part], texts)]
        lines.append(f"no\tbad{' end' * 200}\n")  # longer than the encoder can take
        (folder / f"{part}.tsv").write_text("label\tsentence1\n" + "".join(lines))
    out, argv = tmp_path / "out", ["--task=mine", "--batch_size=8", f"--glue={tmp_path}/tasks"]
    argv += [f"--init={encoder_folder}", f"--out={out}"]
    ft.main([*argv, "--lr=1", "--epochs=1"])
    ft.main([*argv, "--lr=2e-3", "--epochs=15", "--predict"])
    summary = json.loads((out / "results.json").read_text())["summary"]["mine"]
    assert summary == dict(score=1.0, acc=1.0, seeds=1, collapsed=1)
    lines = ["index\tprediction", *(f"{i}\t{y}" for i, y in enumerate(answers["test"]))]
    assert (out / "predictions/mine.tsv").read_text().splitlines()[:-1] == lines
    refused(capsys, "choose another --out", ft.main, [*argv, "--max_len=16"])
    refused(capsys, "choose another --out", ft.main, [*argv, f"--init={out}/mine/hf"])
    (folder / "train.tsv").write_text((folder / "train.tsv").read_text().replace("yes\t", "aye\t"))
    refused(capsys, "choose another --out", ft.main, argv)


def test_an_interrupted_sweep_makes_each_run_exactly_once(encoder_folder, tmp_path, monkeypatch):
    """Interrupted in every third run, within and between tasks; STS-B starts from MNLI's model."""
    glue, out, calls, made, real = tmp_path / "glue", tmp_path / "out", [], [], ft.run_once
    for name, test in (("MNLI", "test_matched.tsv"), ("STS-B", "test.tsv")):
        rows = [(f"the cat {i}", "a dog", LAYOUTS[name][1][i % 3]) for i in range(12)]
        write_task(glue, name, rows)
        (glue / name / test).write_text("sentence1\tsentence2\n" + "the cat\ta dog\n" * 5)

    def interrupted(title, *rest):
        calls.append(title)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        run, model = real(title, *rest)
        made.append(title)
        if title.startswith("STS-B"):
            model.head_out.bias.data += 9  # beyond the largest score
        model.labels = [title, *model.labels[1:]]  # config.json then names the run
        return run, model

    monkeypatch.setattr(ft, "run_once", interrupted)
    argv = ["--task=all", f"--glue={glue}", f"--init={encoder_folder}", f"--out={out}", "--predict"]
    argv += "--lr 1e-3 2e-3 --epochs 1 --seed 0 1 2".split()
    for _ in range(6):  # 12 runs, and at most two between interruptions
        with suppress(SystemExit):
            ft.main(argv)
    assert len(made) == len(set(made)) == 2 * 3 * 2 < len(calls)
    results, scores = json.loads((out / "results.json").read_text()), []
    for name, start in (("MNLI", encoder_folder), ("STS-B", out / "MNLI/hf")):
        runs = ft.read_results(out / name / "results.jsonl")
        assert {run["start"] for run in runs} == {str(start)}
        seeds = [[r["score"] for r in runs if r["point"]["seed"] == seed] for seed in (0, 1, 2)]
        scores.append(np.median([max(values) for values in seeds]))
        assert math.isclose(results["summary"][name]["score"], scores[-1])
        best = max(runs, key=lambda run: run["score"])["point"]
        config = (out / name / "hf/config.json").read_text()
        assert f"{name} {best}" in config and '"hidden_dropout_prob": 0.1' in config  # Table 5
    assert math.isclose(results["average"], np.mean(scores))
    assert (out / "predictions/STS-B.tsv").read_text().count("\t5.000\n") == 5
    assert (out / "predictions/MNLI-m.tsv").exists()


def test_fine_tuning_follows_table_5(monkeypatch):
    """Warm-up over 6% of the steps, then down to 0; weight decay; epochs; batches; the grid."""
    steps = []
    monkeypatch.setattr(ft, "update", lambda *args: steps.append(args))
    point = dict(lr=1e-3, batch_size=2, epochs=10, seed=0)
    examples, labels = [[0, 5, 2]] * 20, np.array([0, 1] * 10)
    ft.fine_tune(m.Classifier(config_of(), 2), examples, labels, point, train.Machine("cpu"), "")
    lrs = np.interp(np.arange(100), [-1, 5, 6, 100], [0, 1e-3, 1e-3, 0])
    assert np.allclose([lr for *_, lr in steps], lrs)
    assert [group["weight_decay"] for group in steps[0][1].param_groups] == [0.1, 0.0]
    rng = np.random.default_rng(0)  # every example once an epoch, in another order, little padding
    lengths = rng.integers(5, 100, 1003)
    first, second = (ft.batches_of([[0] * n for n in lengths], 8, rng) for _ in range(2))
    assert sorted(np.concatenate(first)) == list(range(1003))
    assert not np.array_equal(first[0], second[0])
    assert sum(lengths[batch].max() * len(batch) for batch in first) / lengths.sum() < 1.15
    args = Namespace(sweep=True, seed=None, lr=None, batch_size=None, epochs=None)
    small = dict(lr={1e-5, 3e-5, 5e-5, 8e-5}, batch_size={16, 32}, epochs={3, 5, 10})
    large = dict(lr={5e-5, 8e-5}, batch_size={32}, epochs={3, 5})
    for name in ft.TASKS:
        points, table = ft.grid(name, args), large if name in ("QQP", "MNLI", "QNLI") else small
        assert len(points) == 5 * math.prod(map(len, table.values()))
        assert {x: {point[x] for point in points} for x in table} == table


# ------------------------------------------------------------------------ bad input, all commands

FILES = {
    "ok.txt": "a b\n\nc d\n\ne f\n", "empty.txt": "", "one.txt": "a document\n",
    "latin.txt": "one\n\ncaf\xe9 two\n", "bert/config.json": '{"model_type": "bert"}',
    "o/dev/results.jsonl": "{}\n", "label/train.tsv": "sentence1\tlabel\na\tx\nb\n",
    "RTE/train.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\n", "RTE/dev.tsv": "",
    "head/train.tsv": "text\tlabel\na\tx\nb\ty\n", "head/dev.tsv": "", "nan/dev.tsv": "",
    "dev/train.tsv": "sentence1\tlabel\na\tx\nb\ty\n", "dev/dev.tsv": "sentence1\tlabel\na\tz\n",
    "nan/train.tsv": "sentence1\tlabel\na\t1.5\nb\tnan\n", "few/dev.tsv": "sentence1\tlabel\n",
    "few/train.tsv": "sentence1\tlabel\na\tx\nb\ty\n",
}  # fmt: skip
# For each command, its usual arguments, and cases: what replaces some of them, what the error names
BAD = {
    data: ("--input=ok.txt --out=n", [
        ("--input none.txt", "none.txt"), ("--input empty.txt", "empty.txt: 0 doc"),
        ("--input latin.txt", "latin.txt: cannot"), ("--input one.txt", "one.txt: 1 document"),
        ("--out ok.txt/o", "ok.txt/o"), ("--vocab_size 3", "vocab_size 3: must be at least"),
        ("--tokenizer words.json", "words.json: loses some characters"),
    ]),
    train: ("--data=data --out=n --seq_len=16 --max_steps=1 --device=cpu --n_layer=1", [
        ("--data no", "no/meta.json"), ("--data short", "short: cannot be read"),
        ("--seq_len 5000", "has no row of 5000"), ("--n_positions 8", "--seq_len 16"),
        ("--lr -1", "--lr"), ("--out o", "o/ckpt.pt"), ("--eval_only", "n/config.json"),
        ("--init bert", "bert/config.json"), ("--init evil", "evil/py"), ("--mask_rate 0", "is 0"),
        ("--strategy 0.8 0.1 0.2", "strategy"), ("--n_embd 100", "--head_size 64"),
    ]),
    ft: ("--init=hf --out=n --glue=. --task=RTE", [
        ("--glue no --task all", "no:"), ("--task XYZ", "XYZ/train"), ("--init small", "small: "),
        ("--task RTE", "RTE/train.tsv: line 2"), ("--task label", "label/train.tsv"),
        ("--task head", "head/train.tsv: "), ("--task dev", "dev/dev.tsv: line 2"),
        ("--task nan --regression", "nan/train.tsv: line 3"),
        ("--task dev --out o", "dev/results.jsonl"), ("--task few", "few/dev.tsv: has fewer"),
    ]),
}  # fmt: skip
CASES = [(module, *case) for module, (_, cases) in BAD.items() for case in cases]


@pytest.mark.parametrize("module, text, names", CASES)
def test_bad_input_is_one_line_and_status_2(
    module, text, names, corpus, encoder_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text(content, encoding="latin-1")
    for name, source in dict(data=corpus, short=corpus, hf=encoder_folder).items():
        shutil.copytree(source, name)
    os.truncate("short/train.bin", 100)
    m.save_pretrained(model_of(), "small", "hf/tokenizer.json")  # too small for that tokenizer
    words = {word: i for i, word in enumerate([*data.SPECIAL, "a"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>")).save("words.json")
    shutil.copytree("hf", "evil", ignore=shutil.ignore_patterns("*.safetensors"))
    for path in ("evil/pytorch_model.bin", "o/ckpt.pt"):
        torch.save({"x": os.system}, path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    usual, argv = BAD[module][0].split(), text.split()
    argv = [x for x in usual if x.split("=")[0] not in argv] + argv
    refused(capsys, names, module.main, argv)
    unchanged = all(path.read_bytes() == content for path, content in before.items())
    assert unchanged and not list(tmp_path.rglob("*.tmp"))
