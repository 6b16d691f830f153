"""The models of "Mask More and Mask Later" (3ML): one encoder, and three ways to predict masked tokens.

  * decoder="self"   3MLself (section 2.2, Figure 2 left): [MASK]s join the latents in a small decoder
  * decoder="cross"  3MLcross (Figure 2 right): [MASK]s attend to the latents in a small decoder
  * decoder="none"   vanilla MLM (BERT, RoBERTa, 24hBERT): [MASK]s go through the encoder; the baseline

    python -c "import model; print(model.MaskedLM(model.ModelConfig(n_layer=2, n_embd=128)))"

The classifier for fine-tuning, and Hugging Face folders, in and out, are at the end. This file does not
corrupt text (data.corrupt does), and does not deal with devices or optimizers (train.py does).

Shapes: B rows of a batch | n tokens of a row | n_m [MASK]s | n_en tokens that 3ML's encoder sees, n - n_m
        k tokens to predict | d_en, d_de widths of encoder and decoder | V vocabulary
        T, S any number of tokens | h, hs attention heads and their size"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError, atomic, write


@dataclass
class ModelConfig:
    """The shape of a model; vocab_size is V. Raises UserError if the fields do not fit together."""

    vocab_size: int = 50265
    n_positions: int = 512  # longest row that the model can take
    n_layer: int = 12  # layers of the encoder
    n_embd: int = 768  # width of the encoder; the MLP is 4 times as wide
    head_size: int = 64  # size of an attention head, in encoder and decoder
    decoder: Literal["self", "cross", "none"] = "self"  # 3ML's decoder; none is vanilla MLM
    n_layer_dec: int = 2  # layers of the decoder (Table 2a)
    n_embd_dec: int = None  # width of the decoder (default: half of n_embd, Table 2b)
    norm: Literal["post", "pre"] = None  # place of LayerNorm (default: pre for cross, else post)
    dropout: float = 0.1  # dropout of hidden states and attention weights

    def __post_init__(self):
        self.n_embd_dec = self.n_embd_dec or self.n_embd // 2
        self.norm = self.norm or ("pre" if self.decoder == "cross" else "post")  # section 3.3
        if self.dropout >= 1:
            raise UserError(f"dropout is {self.dropout}, must be below 1")
        for name in ["n_embd"] if self.decoder == "none" else ["n_embd", "n_embd_dec"]:
            if getattr(self, name) % self.head_size:
                raise UserError(f"{name}: {getattr(self, name)} is no multiple of head_size {self.head_size}")


class Dropout(nn.Dropout):
    """nn.Dropout, but three times as fast on a CPU: each random number decides about four elements."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        keep = bits[: x.numel()].view(x.shape) >= 2**16 * self.p - 2**15
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to a memory (3MLcross)."""

    def __init__(self, d, config):
        super().__init__()
        self.head_size, self.drop = config.head_size, Dropout(config.dropout)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))

    def heads(self, x):  # (B, T, d) -> (B, h, T, hs)
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def forward(self, x, memory=None, mask=None):
        """x (B, T, d), memory (B, S, d), mask (B, 1, 1, S) bool, False at padding -> (B, T, d)."""
        memory = x if memory is None else memory
        q, k, v = self.heads(self.q(x)), self.heads(self.k(memory)), self.heads(self.v(memory))
        p = self.drop.p if self.training else 0.0
        if p > 0 and x.device.type == "cpu":  # the same as SDPA, but with the faster dropout
            scores = (q * self.head_size**-0.5) @ k.transpose(-2, -1)  # (B, h, T, S)
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            x = self.drop(scores.softmax(-1)) @ v  # (B, h, T, hs)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)  # (B, h, T, hs)
        return self.out(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A Transformer block: self-attention, attention to a memory if `cross`, MLP; post-LN or pre-LN."""

    def __init__(self, d, config, cross=False):
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attn, self.ln1 = Attention(d, config), nn.LayerNorm(d)
        if cross:
            self.cross, self.ln_cross = Attention(d, config), nn.LayerNorm(d)
        self.fc1, self.fc2, self.ln2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.LayerNorm(d)
        self.drop = Dropout(config.dropout)

    def mlp(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

    def add(self, x, sublayer, ln, *args):
        """A sublayer with its residual connection, dropout and LayerNorm."""
        if self.pre_norm:
            return x + self.drop(sublayer(ln(x), *args))
        return ln(x + self.drop(sublayer(x, *args)))

    def forward(self, x, memory=None, mask=None):
        x = self.add(x, self.attn, self.ln1, None, mask)
        if memory is not None:
            x = self.add(x, self.cross, self.ln_cross, memory)
        return self.add(x, self.mlp, self.ln2)


class Transformer(nn.Module):
    """A stack of blocks. Pre-LN leaves their output unnormalised, so there it ends in one more LayerNorm."""

    def __init__(self, n_layer, d, config, cross=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(d, config, cross) for _ in range(n_layer))
        self.ln = nn.LayerNorm(d) if config.norm == "pre" else nn.Identity()

    def forward(self, x, memory=None, mask=None):
        for block in self.blocks:
            x = block(x, memory, mask)
        return self.ln(x)


class Encoder(nn.Module):
    """The part that is kept after pre-training: RoBERTa's encoder. Here its tokens need not be adjacent."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.tok = nn.Embedding(config.vocab_size, d)
        self.pos = nn.Embedding(config.n_positions, d)
        self.ln = nn.LayerNorm(d)
        self.drop = Dropout(config.dropout)
        self.transformer = Transformer(config.n_layer, d, config)
        self.apply(init_weights)

    def forward(self, tokens, positions=None, attention_mask=None):
        """tokens (B, T), their positions (B, T) (None: 0 to T-1), attention_mask (B, T) bool, False where a
        token is padding (None: no padding) -> latents (B, T, d_en)."""
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.drop(self.ln(self.tok(tokens) + self.pos(positions)))  # (B, T, d_en)
        return self.transformer(x, mask=None if attention_mask is None else attention_mask[:, None, None, :])


def take(x, index):
    """x (B, T, d) at index (B, k) -> (B, k, d)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.size(-1)))


def slots(batch):
    """(B, n): where each position of a row is in [kept, masked]; argsort inverts a permutation."""
    return torch.cat([batch.kept, batch.masked], dim=1).argsort(dim=1)


# A decoder turns the encoder's latents into the states to predict from, (B, k, d_en) in the order of
# batch.predict. It ends in the first layer of the prediction head (FC1). A new variant is one more class here
# and in DECODERS.


class NoDecoder(nn.Module):
    """Vanilla MLM: the latents (B, n, d_en) at the positions to predict."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, latents, batch):
        return self.fc1(take(latents, batch.predict))


class Decoder(nn.Module):
    """What 3ML's decoders share: a bridge from d_en to d_de, a learned [MASK] that is one of the latents, not
    a word embedding (section 2.2), position embeddings of their own (section 3.3), blocks, and FC1."""

    def __init__(self, config, cross=False):
        super().__init__()
        d_en, d_de = config.n_embd, config.n_embd_dec
        self.bridge = nn.Linear(d_en, d_de) if d_en != d_de else nn.Identity()
        self.mask = nn.Parameter(0.02 * torch.randn(d_de))
        self.pos = nn.Embedding(config.n_positions, d_de)
        self.drop = Dropout(config.dropout)
        self.transformer = Transformer(config.n_layer_dec, d_de, config, cross)
        self.fc1 = nn.Linear(d_de, d_en)


class SelfDecoder(Decoder):
    """3MLself: one sequence of latents and [MASK]s. The [MASK]s are appended, not sorted back in: attention
    knows a token's position by its embedding, not by its place in memory."""

    def forward(self, latents, batch):
        latents = self.bridge(latents)  # (B, n_en, d_de)
        masks = self.mask.expand(*batch.masked.shape, -1)  # (B, n_m, d_de)
        positions = torch.cat([batch.kept, batch.masked], dim=1)  # (B, n)
        x = torch.cat([latents, masks], dim=1) + self.pos(positions)  # (B, n, d_de)
        x = self.transformer(self.drop(x))
        return self.fc1(take(x, slots(batch).gather(1, batch.predict)))  # (B, k, d_en)


class CrossDecoder(Decoder):
    """3MLcross: the [MASK]s attend to each other and to the latents. The replaced and unchanged tokens are
    predicted from the encoder's own states, through an FC1 of their own (Eq. 4)."""

    def __init__(self, config):
        super().__init__(config, cross=True)
        self.fc1_visible = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, latents, batch):
        x = self.drop(self.mask + self.pos(batch.masked))  # (B, n_m, d_de)
        x = self.transformer(x, memory=self.bridge(latents))
        visible = batch.predict[:, x.size(1) :]  # (B, k - n_m): the replaced and unchanged
        visible = take(latents, slots(batch).gather(1, visible))  # (B, k - n_m, d_en)
        return torch.cat([self.fc1(x), self.fc1_visible(visible)], dim=1)  # (B, k, d_en)


DECODERS = {"self": SelfDecoder, "cross": CrossDecoder, "none": NoDecoder}


class MaskedLM(nn.Module):
    """Encoder, decoder, and the prediction head that all share: FC1 (in the decoder), GELU, LayerNorm, and
    FC2 tied to the word embedding (Appendix D)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = DECODERS[config.decoder](config).apply(init_weights)
        self.ln = nn.LayerNorm(config.n_embd)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def logits(self, batch):
        """batch: a data.Corrupted -> the scores of all words at batch.predict, (B, k, V)."""
        if self.config.decoder == "none":
            latents = self.encoder(batch.inputs)  # (B, n, d_en), [MASK]s among them
        else:
            visible = batch.inputs.gather(1, batch.kept)  # (B, n_en)
            latents = self.encoder(visible, batch.kept)  # (B, n_en, d_en)
        states = self.decoder(latents, batch)  # (B, k, d_en)
        return F.linear(self.ln(F.gelu(states)), self.encoder.tok.weight, self.bias)

    def forward(self, batch):
        """batch: a data.Corrupted -> the losses (B, k) in nats, in the order of batch.predict."""
        logits = self.logits(batch).flatten(0, 1).float()  # (B·k, V)
        return F.cross_entropy(logits, batch.labels.flatten(), reduction="none").view_as(batch.labels)


def init_weights(module):
    """BERT's initialisation: N(0, 0.02) for matrices and 0 for biases. LayerNorm keeps PyTorch's."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class Classifier(nn.Module):
    """The encoder and RoBERTa's classification head on <s>; n_classes = 1 is a regression. The head keeps
    PyTorch's default initialisation, as in fairseq."""

    def __init__(self, config, n_classes):
        super().__init__()
        self.config = config
        self.labels = [str(i) for i in range(n_classes)]  # names of the classes, for config.json
        self.encoder = Encoder(config)
        self.drop = Dropout(config.dropout)
        self.dense = nn.Linear(config.n_embd, config.n_embd)
        self.out = nn.Linear(config.n_embd, n_classes)

    def forward(self, tokens, attention_mask=None):
        """tokens (B, T), attention_mask (B, T) bool -> logits (B, n_classes)."""
        x = self.encoder(tokens, attention_mask=attention_mask)[:, 0]  # (B, d_en), the state of <s>
        return self.out(self.drop(torch.tanh(self.dense(self.drop(x)))))


# Hugging Face folders. A post-LN encoder is transformers' Roberta, a pre-LN one its RobertaPreLayerNorm.

HF_TYPES = {"post": "roberta", "pre": "roberta_prelayernorm"}
HF_NAMES = {  # parts of the names of our encoder's parameters, and what they are called in transformers
    "transformer.blocks.": "encoder.layer.", "transformer.ln.": "LayerNorm.", "ln.": "embeddings.LayerNorm.",
    "tok.": "embeddings.word_embeddings.", "pos.": "embeddings.position_embeddings.",
    "attn.q.": "attention.self.query.", "attn.k.": "attention.self.key.", "attn.v.": "attention.self.value.",
    "attn.out.": "attention.output.dense.", "fc1.": "intermediate.dense.", "fc2.": "output.dense.",
}  # fmt: skip
HF_NORMS = {
    "post": {"ln1.": "attention.output.LayerNorm.", "ln2.": "output.LayerNorm."},
    "pre": {"ln1.": "attention.LayerNorm.", "ln2.": "intermediate.LayerNorm."},
}
HF_HEADS = {  # our modules outside the encoder: the head of vanilla MLM, and the classifier's
    "decoder.fc1": "lm_head.dense", "ln": "lm_head.layer_norm", "": "lm_head",
    "dense": "classifier.dense", "out": "classifier.out_proj",
}  # fmt: skip


def hf_name(name, norm):
    """What transformers calls a parameter of ours."""
    module, _, kind = name.rpartition(".")
    if module in HF_HEADS:
        return f"{HF_HEADS[module]}.{kind}"
    name = name.removeprefix("encoder.")
    for ours, theirs in (HF_NAMES | HF_NORMS[norm]).items():
        name = name.replace(ours, theirs)
    return f"{HF_TYPES[norm]}.{name}"


def hf_config(config):
    """transformers' config.json of an encoder. Its positions start at 2, after the id of <pad>."""
    return dict(
        model_type=HF_TYPES[config.norm].replace("_", "-"), vocab_size=config.vocab_size, pad_token_id=1,
        hidden_size=config.n_embd, intermediate_size=4 * config.n_embd, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_embd // config.head_size, max_position_embeddings=config.n_positions + 2,
        hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout, hidden_act="gelu",
        layer_norm_eps=1e-5, type_vocab_size=1)  # fmt: skip


def save_pretrained(model, directory, tokenizer_file=None):
    """Write a Hugging Face folder: config.json, pytorch_model.bin and, given a tokenizer.json, the tokenizer.

    model: a MaskedLM (3ML: the encoder alone, since transformers has no class for the decoder; vanilla MLM:
    the head too, as ForMaskedLM), or a Classifier (as ForSequenceClassification). Raises OSError."""
    config, settings, labels = model.config, hf_config(model.config), getattr(model, "labels", [])
    part = "" if labels or config.decoder == "none" else "encoder."
    state = {name: p.float().cpu() for name, p in model.state_dict().items() if name.startswith(part)}
    state["encoder.pos.weight"] = F.pad(state["encoder.pos.weight"], (0, 0, 2, 0))
    weights = {hf_name(name, config.norm): p.clone() for name, p in state.items()}
    token_type = f"{HF_TYPES[config.norm]}.embeddings.token_type_embeddings.weight"
    weights[token_type] = torch.zeros(1, config.n_embd)
    with atomic(Path(directory) / "pytorch_model.bin") as f:
        torch.save(weights, f)
    if labels:
        settings["id2label"] = dict(enumerate(labels))
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    files = {"config.json": settings}
    if tokenizer_file is not None:
        write(Path(directory) / "tokenizer.json", Path(tokenizer_file).read_text(encoding="utf-8"))
        files["tokenizer_config.json"] = dict(
            tokenizer_class="PreTrainedTokenizerFast", model_max_length=config.n_positions,
            bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>",
            unk_token="<unk>", mask_token="<mask>")  # fmt: skip
    for name, content in files.items():
        write(Path(directory) / name, json.dumps(content, indent=1))


def load_pretrained(directory, n_classes=None):
    """Read a Hugging Face folder of type roberta or roberta-prelayernorm: (ModelConfig, Encoder) in fp32, or
    with n_classes (ModelConfig, Classifier). ModelConfig.decoder is "none", since such a folder contains no
    decoder. Raises UserError, naming the file that is missing or that does not fit."""
    path = Path(directory) / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        config = ModelConfig(
            hf["vocab_size"], hf["max_position_embeddings"] - 2, hf["num_hidden_layers"], hf["hidden_size"],
            hf["hidden_size"] // hf["num_attention_heads"], "none", dropout=hf["hidden_dropout_prob"],
            norm="pre" if "pre" in hf["model_type"] else "post")  # fmt: skip
        expected = hf_config(config)
        for name in ("model_type", "intermediate_size", "hidden_act", "layer_norm_eps", "pad_token_id"):
            if hf[name] != expected[name]:
                raise UserError(f"{name} is {hf[name]!r}, must be {expected[name]!r}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: not the config.json of a RoBERTa encoder ({e})") from e
    theirs, model = read_weights(Path(directory)), Classifier(config, n_classes or 1)
    prefix, state = HF_TYPES[config.norm] + ".", model.state_dict()
    try:
        theirs = {name.removeprefix(prefix): p.float() for name, p in theirs.items()}  # RobertaModel has none
        for name in state:
            if n_classes or name.startswith("encoder."):
                state[name] = theirs[hf_name(name, config.norm).removeprefix(prefix)]
        # there is one token type, so its embedding belongs to every position
        token_type = theirs.get("embeddings.token_type_embeddings.weight", torch.zeros(1, 1))[0]
        state["encoder.pos.weight"] = state["encoder.pos.weight"][2:] + token_type
        model.load_state_dict(state)
    except (KeyError, RuntimeError, AttributeError) as e:
        what = str(e).splitlines()[-1].strip()
        raise UserError(f"{directory}: the weights do not fit config.json ({what})") from e
    return config, model if n_classes else model.encoder


def read_weights(directory):
    """The tensors of pytorch_model.bin or model.safetensors; no code in them is run. Raises UserError."""
    path = directory / "pytorch_model.bin"
    try:
        if path.exists():
            return torch.load(path, map_location="cpu", weights_only=True)
        path = directory / "model.safetensors"
        from safetensors.torch import load_file

        return load_file(path)
    except ImportError as e:
        raise UserError(f"{path}: reading it needs `pip install safetensors`") from e
    except Exception as e:
        raise UserError(f"{path}: missing, or not a readable file of weights ({type(e).__name__})") from e
