"""The whole method of "Mask More and Mask Later" (3ML): from a row of tokens to its losses.

A vanilla masked language model sends [MASK]s, which carry no word, through all of its layers. 3ML's
encoder reads a row without them; a small decoder brings them back and predicts. In reading order:

    counts, corrupt     which tokens become [MASK], which are replaced, which are predicted
    Encoder             RoBERTa's, of torch's own Transformer layers: what pre-training is for
    NoDecoder           vanilla MLM, the baseline: the [MASK]s went through the encoder
    SelfDecoder         3MLself: the [MASK]s join the latents (section 2.2, Figure 2 left)
    CrossDecoder        3MLcross: the [MASK]s look at the latents (section 2.2, Figure 2 right)
    MaskedLM            encoder, decoder and prediction head

    batch = corrupt(torch.randint(4, 999, (8, 64)), 0.5, vocab_size=1000, mask_id=999)
    losses = MaskedLM(ModelConfig(vocab_size=1000, n_layer=2))(batch)  # (8, 31), near ln 1000 = 6.9

Then follow the classifier for fine-tuning, and Hugging Face folders. This file does not train.

Shapes: B rows of a batch | n tokens of a row | n_m of them [MASK] | n_en = n - n_m, the others
        k tokens of a row to predict | d_en, d_de widths of encoder and decoder | V vocabulary size
        T any number of tokens | d any width"""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

BOS, PAD, EOS, UNK = 0, 1, 2, 3  # RoBERTa's <s> <pad> </s> <unk>; <mask> differs by tokenizer
# torch's fused evaluation of its layers has another GELU on GPUs, and ignores a CPU's autocast.
torch.backends.mha.set_fastpath_enabled(False)


class UserError(ValueError):
    """Something that the user can put right; the scripts print it as one line."""


# ---- Corruption ----
class Corrupted(NamedTuple):
    """A batch of rows as MaskedLM takes it. All but n_replaced are int64 tensors."""

    inputs: torch.Tensor  # (B, n) tokens, with [MASK]s and random words in place
    kept: torch.Tensor  # (B, n_en) positions that are not [MASK], ascending
    masked: torch.Tensor  # (B, n_m) positions that are [MASK], ascending
    predict: torch.Tensor  # (B, k) positions of masked, replaced, unchanged, each ascending
    labels: torch.Tensor  # (B, k) the original tokens there
    n_replaced: int  # after the n_m masked positions in predict come n_replaced replaced ones


def counts(n, rate, strategy=(0.8, 0.1, 0.1)):
    """(k, n_m, n_replaced) of a row of n tokens: how many are predicted, and of those, how many are
    [MASK] and how many random. strategy: the shares of [MASK], random, unchanged (Table 2c).

    These are the same for all rows (fairseq draws for each token). So batches have one shape: no
    padding, no attention mask, one compiled graph; and a batch's mean loss is exactly the mean over
    its micro-batches and processes. Raises UserError for impossible values."""
    if abs(sum(strategy) - 1) > 1e-6:
        raise UserError(f"strategy is {strategy}, must be three shares that sum to 1")
    k = round(rate * (n - 2))  # <s> and </s> are never predicted
    if not 1 <= k <= n - 2:
        raise UserError(f"mask_rate is {rate}: {k} of a row's {n - 2} tokens would be predicted")
    n_m = round(strategy[0] * k)
    return k, n_m, round((strategy[0] + strategy[1]) * k) - n_m


def corrupt(tokens, rate, strategy=(0.8, 0.1, 0.1), *, vocab_size, mask_id, generator=None):
    """Choose k tokens of each row; n_m of these become [MASK], n_replaced random, the others stay.

    tokens (B, n) int64 -> Corrupted, on the device of tokens. Special tokens are never the random
    word, and chosen only where a row has fewer than k ordinary ones. Raises UserError (counts)."""
    k, n_m, n_replaced = counts(tokens.size(1), rate, strategy)
    special = (tokens <= UNK) | (tokens == mask_id)  # (B, n)
    # Sorting noise puts a row's positions in random order, its special tokens after the others.
    noise = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    order = noise.masked_fill(special, 2.0).argsort(dim=1)  # (B, n)
    kinds = order[:, :k].split([n_m, n_replaced, k - n_m - n_replaced], dim=1)
    masked, replaced, unchanged = (positions.sort().values for positions in kinds)
    kept = order[:, n_m:].sort().values  # replaced and unchanged tokens stay in the encoder's row
    words = torch.empty_like(replaced).random_(UNK + 1, vocab_size - 1, generator=generator)
    words += words >= mask_id  # skip <mask>: the draw was from V - 1 words
    inputs = tokens.scatter(1, masked, mask_id).scatter(1, replaced, words)
    predict = torch.cat([masked, replaced, unchanged], dim=1)
    return Corrupted(inputs, kept, masked, predict, tokens.gather(1, predict), n_replaced)


# ---- The Transformer ----
@dataclass
class ModelConfig:
    """The shape of a model."""

    vocab_size: int = 50265  # V; RoBERTa's
    n_positions: int = 512  # the longest row that the model can take
    n_layer: int = 12  # layers of the encoder
    n_embd: int = 768  # d_en, the encoder's width; the MLP is 4 times as wide
    head_size: int = 64  # size of an attention head, in encoder and decoder
    decoder: str = "self"  # a key of DECODERS
    n_layer_dec: int = 2  # layers of the decoder (Table 2a)
    n_embd_dec: int | None = None  # d_de, the decoder's width; None: half of n_embd (Table 2b)
    norm: str | None = None  # "pre" or "post" LN; None: pre for cross, else post (section 3.3)
    dropout: float = 0.1  # of hidden states and attention weights

    def __post_init__(self):
        self.n_embd_dec = self.n_embd_dec or self.n_embd // 2
        self.norm = self.norm or ("pre" if self.decoder == "cross" else "post")


def transformer(n_layer, d, config, cross=False):
    """torch's own Transformer: n_layer blocks of width d. With cross, they also attend to a memory.
    Pre-LN blocks do not normalize their output, so a last LayerNorm follows. Raises UserError."""
    if d % config.head_size:
        raise UserError(f"--head_size {config.head_size}: no divisor of {d}, a width of the model")
    pre, heads = config.norm == "pre", d // config.head_size
    layer = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    block = layer(d, heads, 4 * d, config.dropout, "gelu", batch_first=True, norm_first=pre)
    block.dropout = nn.Identity()  # RoBERTa has no dropout within the MLP
    norm = nn.LayerNorm(d) if pre else None
    if cross:
        return nn.TransformerDecoder(block, n_layer, norm)
    return nn.TransformerEncoder(block, n_layer, norm, enable_nested_tensor=False)


def init_weights(module):
    """N(0, 0.02) for embeddings, as in BERT; N(0, 0.02 sqrt(768 / d)) for the matrices of d inputs.
    That is BERT's 0.02 at BERT-base's width, and 0.05 at 128: with 0.02, so narrow a decoder hardly
    learns (experiments/init)."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02 * (768 / module.in_features) ** 0.5)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.MultiheadAttention):  # its matrices of q, k and v are one parameter
        nn.init.normal_(module.in_proj_weight, std=0.02 * (768 / module.embed_dim) ** 0.5)


class Encoder(nn.Module):
    """RoBERTa's encoder. In 3ML its tokens need not be neighbours, so their positions are given."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.tok = nn.Embedding(config.vocab_size, d)
        self.pos = nn.Embedding(config.n_positions, d)
        self.ln = nn.LayerNorm(d)
        self.drop = nn.Dropout(config.dropout)
        self.transformer = transformer(config.n_layer, d, config)
        self.apply(init_weights)

    def forward(self, tokens, positions=None, attention_mask=None):
        """tokens (B, T); positions (B, T), None: 0 to T - 1; attention_mask (B, T) bool, False at
        padding, None: no padding -> latents (B, T, d_en)."""
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.drop(self.ln(self.tok(tokens) + self.pos(positions)))  # (B, T, d_en)
        padding = None if attention_mask is None else ~attention_mask
        return self.transformer(x, src_key_padding_mask=padding)


# Decoders: from the encoder's latents to the states to predict from, (B, k, d_en), in the order of
# batch.predict. Each ends in its FC1, the first layer of the prediction head. To add one, write a
# class like these, which gets the latents of the kept tokens, and an entry of DECODERS.


def take_visible(x, batch):
    """x, the kept tokens' states first -> those of replaced and unchanged ones (B, k - n_m, d)."""
    positions = batch.predict[:, batch.masked.size(1) :].contiguous()  # as searchsorted wants it
    index = torch.searchsorted(batch.kept, positions)  # kept is ascending
    return x.take_along_dim(index.unsqueeze(-1), dim=1)


class NoDecoder(nn.Module):
    """Vanilla MLM: the encoder has seen all n tokens, [MASK]s among them."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, latents, batch):  # (B, n, d_en) -> (B, k, d_en)
        return self.fc1(latents.take_along_dim(batch.predict.unsqueeze(-1), dim=1))


class Decoder(nn.Module):
    """What 3ML's decoders share: a bridge from d_en to d_de; a learned [MASK] of width d_de that is
    no word embedding (section 2.2); positions of their own (section 3.3); blocks; and FC1."""

    def __init__(self, config, cross=False):
        super().__init__()
        d_en, d_de = config.n_embd, config.n_embd_dec
        self.bridge = nn.Linear(d_en, d_de) if d_en != d_de else nn.Identity()
        self.mask = nn.Parameter(0.02 * torch.randn(d_de))
        self.pos = nn.Embedding(config.n_positions, d_de)
        self.drop = nn.Dropout(config.dropout)
        self.transformer = transformer(config.n_layer_dec, d_de, config, cross)
        self.fc1 = nn.Linear(d_de, d_en)


class SelfDecoder(Decoder):
    """3MLself: ordinary blocks over latents and [MASK]s. The [MASK]s are appended, not sorted in:
    attention knows a token's position by its embedding alone, not by its place in the row."""

    def forward(self, latents, batch):  # (B, n_en, d_en) -> (B, k, d_en)
        latents = self.bridge(latents)  # (B, n_en, d_de)
        masks = self.mask.expand(*batch.masked.shape, -1)  # (B, n_m, d_de)
        positions = torch.cat([batch.kept, batch.masked], dim=1)  # (B, n)
        x = torch.cat([latents, masks], dim=1) + self.pos(positions)  # (B, n, d_de)
        x = self.transformer(self.drop(x))
        masked = x[:, latents.size(1) :]  # in the order of batch.masked, as batch.predict begins
        return self.fc1(torch.cat([masked, take_visible(x, batch)], dim=1))


class CrossDecoder(Decoder):
    """3MLcross: the [MASK]s attend to each other, and to the latents. The replaced and unchanged
    tokens, which no layer of the decoder sees, are predicted from the encoder's states by an FC1 of
    their own. (Eq. 4 counts two FC1s, so "the same prediction layer" of section 2.2 means FC2.)"""

    def __init__(self, config):
        super().__init__(config, cross=True)
        self.fc1_visible = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, latents, batch):  # (B, n_en, d_en) -> (B, k, d_en)
        masks = self.drop(self.mask + self.pos(batch.masked))  # (B, n_m, d_de)
        masks = self.transformer(masks, self.bridge(latents))
        return torch.cat([self.fc1(masks), self.fc1_visible(take_visible(latents, batch))], dim=1)


DECODERS = {"self": SelfDecoder, "cross": CrossDecoder, "none": NoDecoder}


class MaskedLM(nn.Module):
    """Encoder, decoder, and the prediction head that all three models share: FC1 (in the decoder),
    GELU, LayerNorm, and FC2, whose matrix is the word embedding (Appendix D)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = DECODERS[config.decoder](config).apply(init_weights)
        self.head_ln = nn.LayerNorm(config.n_embd)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def logits(self, batch):
        """Corrupted -> the scores of all words at batch.predict, (B, k, V)."""
        if self.config.decoder == "none":
            latents = self.encoder(batch.inputs)  # (B, n, d_en)
        else:
            tokens = batch.inputs.gather(1, batch.kept)  # (B, n_en): mask later
            latents = self.encoder(tokens, batch.kept)  # (B, n_en, d_en)
        states = self.decoder(latents, batch)  # (B, k, d_en)
        return F.linear(self.head_ln(F.gelu(states)), self.encoder.tok.weight, self.head_bias)

    def forward(self, batch):
        """Corrupted -> losses (B, k) in nats, in the order of batch.predict; computed in fp32."""
        logits = self.logits(batch).flatten(0, 1).float()  # (B * k, V)
        losses = F.cross_entropy(logits, batch.labels.flatten(), reduction="none")
        return losses.view_as(batch.labels)


# ---- Fine-tuning ----
class Classifier(nn.Module):
    """The encoder and RoBERTa's head on <s>, with PyTorch's default initialization, as in fairseq.
    One class means regression."""

    def __init__(self, config, n_classes):
        super().__init__()
        self.config = config
        self.labels = [str(i) for i in range(n_classes)]  # names of the classes, for config.json
        self.encoder = Encoder(config)
        self.drop = nn.Dropout(config.dropout)
        self.head_dense = nn.Linear(config.n_embd, config.n_embd)
        self.head_out = nn.Linear(config.n_embd, n_classes)

    def forward(self, tokens, attention_mask=None):
        """tokens (B, T), attention_mask (B, T) bool -> logits (B, n_classes)."""
        x = self.encoder(tokens, attention_mask=attention_mask)[:, 0]  # (B, d_en), the state of <s>
        return self.head_out(self.drop(torch.tanh(self.head_dense(self.drop(x)))))


# Hugging Face folders. A post-LN encoder is transformers' Roberta, a pre-LN one RobertaPreLayerNorm

HF_MODELS = {"post": "roberta", "pre": "roberta_prelayernorm"}
HF_NAMES = {  # parts of our parameters' names, and of transformers'; replaced in this order
    "transformer.layers.": "encoder.layer.", "transformer.norm.": "LayerNorm.",
    "self_attn.out_proj.": "attention.output.dense.", "linear1.": "intermediate.dense.",
    "linear2.": "output.dense.", "head_ln.": "lm_head.layer_norm.", "head_bias": "lm_head.bias",
    "decoder.fc1.": "lm_head.dense.", "head_dense.": "classifier.dense.",
    "head_out.": "classifier.out_proj.", "ln.": "embeddings.LayerNorm.",
    "tok.": "embeddings.word_embeddings.", "pos.": "embeddings.position_embeddings.",
}  # fmt: skip
HF_NORMS = {
    "post": {"norm1.": "attention.output.LayerNorm.", "norm2.": "output.LayerNorm."},
    "pre": {"norm1.": "attention.LayerNorm.", "norm2.": "intermediate.LayerNorm."},
}
HF_TOKEN_TYPE = "embeddings.token_type_embeddings.weight"  # of the one type that there is


def hf_names(name, norm, prefix):
    """transformers' names of a parameter of ours: one, or three where q, k and v are one parameter.
    Those of the encoder begin with the prefix."""
    name = name.replace("encoder.", prefix)
    for ours, theirs in (HF_NAMES | HF_NORMS[norm]).items():
        name = name.replace(ours, theirs)
    if "in_proj_" not in name:
        return [name]
    parts = ("query", "key", "value")
    return [name.replace("self_attn.in_proj_", f"attention.self.{x}.") for x in parts]


def hf_config(config):
    """transformers' config.json of an encoder. Its positions start at 2, behind <pad>'s id."""
    return dict(
        model_type=HF_MODELS[config.norm].replace("_", "-"), vocab_size=config.vocab_size,
        hidden_size=config.n_embd, intermediate_size=4 * config.n_embd, hidden_act="gelu",
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_embd // config.head_size,
        max_position_embeddings=config.n_positions + 2, pad_token_id=PAD, type_vocab_size=1,
        hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout,
        layer_norm_eps=1e-5)  # fmt: skip


def save_pretrained(model, directory, tokenizer_file=None):
    """Write a Hugging Face folder of a Classifier, or of a MaskedLM: 3ML's encoder alone, since
    transformers has no class for its decoder; vanilla MLM with its head. Raises OSError."""
    directory, config, settings = Path(directory), model.config, hf_config(model.config)
    state = model.state_dict()
    if isinstance(model, MaskedLM) and config.decoder != "none":
        state = model.encoder.state_dict(prefix="encoder.")
    state["encoder.pos.weight"] = F.pad(state["encoder.pos.weight"], (0, 0, 2, 0))
    prefix = HF_MODELS[config.norm] + "."
    weights = {prefix + HF_TOKEN_TYPE: torch.zeros(1, config.n_embd)}
    for name, p in state.items():
        names = hf_names(name, config.norm, prefix)
        weights |= zip(names, (part.float().cpu().clone() for part in p.chunk(len(names))))
    if isinstance(model, Classifier):
        settings["id2label"] = dict(enumerate(model.labels))
        settings["label2id"] = dict(zip(model.labels, settings["id2label"]))
    if tokenizer_file is not None:
        write(directory / "tokenizer.json", Path(tokenizer_file).read_bytes())
        tokenizer_config = dict(
            tokenizer_class="PreTrainedTokenizerFast", model_max_length=config.n_positions,
            bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
            pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")  # fmt: skip
        write_json(directory / "tokenizer_config.json", tokenizer_config)
    write(directory / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
    write_json(directory / "config.json", settings)


def load_pretrained(directory, n_classes=None):
    """Read a Hugging Face folder of type roberta or roberta-prelayernorm: (ModelConfig, Encoder)
    in fp32, or with n_classes (ModelConfig, Classifier). ModelConfig.decoder is "none". Raises
    UserError, which names what is missing or does not fit."""
    directory = Path(directory)
    with reading(directory / "config.json", "needs a RoBERTa encoder, such as a run's hf/"):
        hf = json.loads((directory / "config.json").read_bytes())
        config = ModelConfig(
            vocab_size=hf["vocab_size"], n_positions=hf["max_position_embeddings"] - 2,
            n_layer=hf["num_hidden_layers"], n_embd=hf["hidden_size"],
            head_size=hf["hidden_size"] // hf["num_attention_heads"], decoder="none",
            norm="pre" if "pre" in hf["model_type"] else "post",
            dropout=hf["hidden_dropout_prob"])  # fmt: skip
        for name, expected in hf_config(config).items():
            if hf.get(name, expected) != expected:
                raise ValueError(f"{name} is {hf[name]!r}, must be {expected!r}")
        model = Classifier(config, n_classes or 1)
    prefix, state = HF_MODELS[config.norm] + ".", {}  # a RobertaModel's weights lack that prefix
    weights = {name.removeprefix(prefix): p for name, p in read_weights(directory).items()}
    with reading(directory, "model.safetensors must fit config.json"):
        for name in model.state_dict():
            if n_classes or name.startswith("encoder."):
                names = hf_names(name, config.norm, prefix="")
                state[name] = torch.cat([weights[x].float() for x in names])
        # All tokens are of one type, so the embedding of that type belongs to every position.
        token_type = weights.get(HF_TOKEN_TYPE, torch.zeros(1, 1))
        state["encoder.pos.weight"] = state["encoder.pos.weight"][2:] + token_type
        model.load_state_dict(state, strict=False)
    return config, (model if n_classes else model.encoder)


def read_weights(directory):
    """{name: tensor} of a folder's weights, in one file or several. Of two formats, transformers
    takes safetensors, and so do we. Runs no code in them. Raises UserError."""
    files, weights = sorted(directory.glob("model[.-]*safetensors")), {}  # whole, or in shards
    for path in files or sorted(directory.glob("pytorch_model[.-]*bin")):
        with reading(path):
            if path.suffix == ".bin":
                weights |= torch.load(path, map_location="cpu", weights_only=True)
            else:
                weights |= safetensors.torch.load_file(path)
    return weights


# ---- Files ----
@contextmanager
def reading(path, advice="is it the right file?"):
    """Turns what a broken or foreign file raises into a UserError; a MemoryError stays one."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as e:  # of many types: of zipfile, pickle, json, safetensors, torch
        raise UserError(f"{path}: cannot be read ({e}); {advice}") from e


@contextmanager
def atomic(path):
    """Open a file to write bytes. It gets its name when all is on disk; otherwise it is removed."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except RuntimeError as e:  # torch.save's word for a full disk
        raise OSError(f"{path}: cannot be written ({e})") from e
    finally:
        temporary.unlink(missing_ok=True)


def write(path, content):
    """Write a file of bytes, whole or not at all."""
    with atomic(path) as f:
        f.write(content)


def write_json(path, value):
    write(path, json.dumps(value, indent=1).encode())
