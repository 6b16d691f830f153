"""The models of "Mask More and Mask Later" (3ML): one encoder, three ways to predict the masked.

    python -c "import model; print(model.MaskedLM(model.ModelConfig(n_layer=2, n_embd=128)))"

  * decoder="self"   3MLself (section 2.2, Figure 2 left): [MASK]s join the latents in the decoder
  * decoder="cross"  3MLcross (Figure 2 right): [MASK]s attend to the latents
  * decoder="none"   vanilla MLM (BERT, RoBERTa, 24hBERT): all through the encoder; the control

The file ends with the classifier for fine-tuning and with Hugging Face folders, in and out. It does
not corrupt text (data.corrupt does) and knows nothing of devices and optimizers (train.py does).

Shapes:
  B       rows of a batch            n       tokens of a row
  n_en    tokens the encoder sees    n_m     [MASK]s; n_en + n_m = n
  k       tokens to predict: the [MASK]s, the replaced, the unchanged
  d_en, d_de  widths of encoder and decoder     l_en, l_de  their layers
  V       vocabulary                 T, S    any number of tokens      h, hs  heads and their size
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

DECODERS, NORMS = ("self", "cross", "none"), ("post", "pre")


@dataclass
class ModelConfig:
    """The shape of a model. Raises ValueError where the fields contradict each other."""

    vocab_size: int = 50265  # V, RoBERTa's
    n_positions: int = 512  # longest row
    n_layer: int = 12  # l_en
    n_embd: int = 768  # d_en; the MLP is 4 times as wide
    head_size: int = 64  # of every attention head, in encoder and decoder
    decoder: str = "self"  # "self", "cross", or "none" for vanilla MLM
    n_layer_dec: int = 2  # l_de; 2 and 4 work best (Table 2a)
    n_embd_dec: int | None = None  # d_de; None: half of n_embd (Table 2b)
    norm: str = "post"  # where LayerNorm stands: "post" as in BERT, "pre" as in 24hBERT
    dropout: float = 0.1  # of hidden states and attention weights

    def __post_init__(self):
        if self.n_embd_dec is None:
            self.n_embd_dec = self.n_embd // 2
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder is {self.decoder!r}, not one of {', '.join(DECODERS)}")
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}, not one of {', '.join(NORMS)}")
        for name in ("vocab_size", "n_positions", "n_layer", "n_embd", "head_size", "n_layer_dec"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, must be in [0, 1)")
        for name in ("n_embd",) if self.decoder == "none" else ("n_embd", "n_embd_dec"):
            width = getattr(self, name)
            if width < 1 or width % self.head_size:
                raise ValueError(
                    f"{name} is {width}, must be a multiple of head_size {self.head_size}"
                    + " (it is half of n_embd where not given)" * (name == "n_embd_dec")
                )


def dropout(x, p):
    """F.dropout. On a CPU it is a seventh of a training step, since torch draws 32 serial random
    bits for each element; here 16 decide, four elements to a draw, so p is within 1e-5 of what
    was asked."""
    if p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    seed = int(torch.randint(2**63 - 1, ()))
    bits = np.random.SFC64(seed).random_raw((x.numel() + 3) // 4).view(np.int16)
    drop = min(round(p * 2**16), 2**16 - 1)
    keep = torch.from_numpy(bits)[: x.numel()].view(x.shape) >= drop - 2**15  # bits are signed
    return x * keep.to(x.dtype).mul_(2**16 / (2**16 - drop))


class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p if self.training else 0.0)


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to the memory y (3MLcross)."""

    def __init__(self, d, head_size, dropout):
        super().__init__()
        self.head_size, self.dropout = head_size, dropout
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)

    def forward(self, x, y=None, mask=None):
        d = x.size(-1)
        if y is None:
            q, k, v = self.qkv(x).split(d, dim=-1)  # (B, T, d) each
        else:
            (w_q, w_kv), (b_q, b_kv) = (p.split([d, 2 * d]) for p in self.qkv.parameters())
            q = F.linear(x, w_q, b_q)  # (B, T, d)
            k, v = F.linear(y, w_kv, b_kv).split(d, dim=-1)  # (B, S, d) each
        q, k, v = (z.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for z in (q, k, v))
        p = self.dropout if self.training else 0.0
        if p > 0 and x.device.type == "cpu":  # SDPA's own steps there, but for the dropout
            scores = (q * self.head_size**-0.5) @ k.transpose(-2, -1)  # (B, h, T, S)
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            x = dropout(scores.softmax(-1), p) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, mask, p)  # (B, h, T, hs)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, d)


class Block(nn.Module):
    """A Transformer block: self-attention, attention to a memory if `cross`, MLP; post- or
    pre-LN."""

    def __init__(self, d, config, cross=False):
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attn = Attention(d, config.head_size, config.dropout)
        self.ln1 = nn.LayerNorm(d)
        if cross:
            self.cross = Attention(d, config.head_size, config.dropout)
            self.ln_cross = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, 4 * d)
        self.fc2 = nn.Linear(4 * d, d)
        self.ln2 = nn.LayerNorm(d)
        self.drop = Dropout(config.dropout)

    def mlp(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

    def add(self, x, sublayer, ln, *args):
        """Residual connection, dropout and LayerNorm around one sublayer."""
        if self.pre_norm:
            return x + self.drop(sublayer(ln(x), *args))
        return ln(x + self.drop(sublayer(x, *args)))

    def forward(self, x, memory=None, mask=None):
        x = self.add(x, self.attn, self.ln1, None, mask)
        if memory is not None:
            x = self.add(x, self.cross, self.ln_cross, memory)
        return self.add(x, self.mlp, self.ln2)


def final_norm(d, config):
    """Pre-LN leaves a block's output unnormalised: a stack of such blocks ends in one more
    LayerNorm."""
    return nn.LayerNorm(d) if config.norm == "pre" else nn.Identity()


class Encoder(nn.Module):
    """The part that is kept after pre-training; a RoBERTa whose tokens need not be neighbours."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.tok = nn.Embedding(config.vocab_size, d)
        self.pos = nn.Embedding(config.n_positions, d)
        self.ln = nn.LayerNorm(d)
        self.drop = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(d, config) for _ in range(config.n_layer))
        self.ln_f = final_norm(d, config)
        self.apply(init_weights)

    def forward(self, tokens, positions=None, attention_mask=None):
        """tokens (B, T); their positions (B, T), None: 0 … T-1; attention_mask (B, T) bool, False
        where a token is padding, None: no padding. Returns the latents (B, T, d_en)."""
        pos = self.pos.weight[: tokens.size(1)] if positions is None else self.pos(positions)
        x = self.drop(self.ln(self.tok(tokens) + pos))  # (B, T, d_en)
        mask = None if attention_mask is None else attention_mask[:, None, None, :]  # (B, 1, 1, T)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.ln_f(x)


def take(x, index):
    """x (B, T, d) at index (B, k) -> (B, k, d)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.size(-1)))


def slots(batch):
    """Where each of the n positions stands in (kept, masked), one after the other: (B, n). The
    argsort of a permutation is its inverse."""
    return torch.cat([batch.kept, batch.masked], dim=1).argsort(dim=1)


# A decoder turns the encoder's latents into the states to predict from, (B, k, d_en), and ends in
# the first layer of the prediction head (FC1). A new variant is one more class like these, named
# in MaskedLM.


class NoDecoder(nn.Module):
    """Vanilla MLM: the latents (B, n, d_en) at the positions to predict."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, latents, batch):
        return self.fc1(take(latents, batch.predict))


class Bridge(nn.Module):
    """What both decoders begin with: latents to the decoder's width, a [MASK] that lives there
    and not in the word embedding (section 2.2), and position embeddings untied from the encoder's
    (section 3.3)."""

    def __init__(self, config):
        super().__init__()
        d_en, d_de = config.n_embd, config.n_embd_dec
        self.fc = nn.Linear(d_en, d_de) if d_en != d_de else nn.Identity()
        self.mask = nn.Parameter(torch.empty(d_de))
        self.pos = nn.Embedding(config.n_positions, d_de)
        self.drop = Dropout(config.dropout)

    def forward(self, latents):
        return self.fc(latents)  # (B, n_en, d_de)

    def add_positions(self, x, positions):
        return self.drop(x + self.pos(positions))


class SelfDecoder(nn.Module):
    """3MLself: latents and [MASK]s in one sequence of n. What tells attention where a token
    stands is its position embedding, not its place in memory: so the [MASK]s are appended, not
    sorted back in."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd_dec
        self.bridge = Bridge(config)
        self.blocks = nn.ModuleList(Block(d, config) for _ in range(config.n_layer_dec))
        self.ln_f = final_norm(d, config)
        self.fc1 = nn.Linear(d, config.n_embd)

    def forward(self, latents, batch):
        latents = self.bridge(latents)
        masks = self.bridge.mask.to(latents.dtype).expand(*batch.masked.shape, -1)  # (B, n_m, d_de)
        x = torch.cat([latents, masks], dim=1)  # (B, n, d_de)
        x = self.bridge.add_positions(x, torch.cat([batch.kept, batch.masked], dim=1))
        for block in self.blocks:
            x = block(x)
        x = take(x, slots(batch).gather(1, batch.predict))  # (B, k, d_de)
        return self.fc1(self.ln_f(x))  # (B, k, d_en)


class CrossDecoder(nn.Module):
    """3MLcross: the [MASK]s attend to each other and to the latents. The replaced and unchanged
    tokens are predicted after the encoder, through a first layer of their own (Eq. 4)."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd_dec
        self.bridge = Bridge(config)
        self.blocks = nn.ModuleList(Block(d, config, True) for _ in range(config.n_layer_dec))
        self.ln_f = final_norm(d, config)
        self.fc1 = nn.Linear(d, config.n_embd)
        self.fc1_visible = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, latents, batch):
        memory = self.bridge(latents)
        x = self.bridge.add_positions(self.bridge.mask, batch.masked)  # (B, n_m, d_de)
        for block in self.blocks:
            x = block(x, memory)
        visible = slots(batch).gather(1, batch.predict[:, x.size(1) :])  # (B, k - n_m)
        visible = self.fc1_visible(take(latents, visible))  # (B, k - n_m, d_en)
        return torch.cat([self.fc1(self.ln_f(x)), visible], dim=1)  # (B, k, d_en)


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy(logits.float(), labels, reduction="none") of logits (T, V) and labels (T,),
    without (T, V) numbers in fp32: a few rows at a time, as many as a cache takes, and the gradient
    along with the loss, so that exp is taken once."""

    @staticmethod
    def split(logits, *others):
        rows = max(1, (1 << 18 if logits.device.type == "cpu" else 1 << 28) // logits.size(1))
        return zip(*(x.split(rows) for x in (logits, *others)))

    @staticmethod
    def forward(ctx, logits, labels):
        learning = ctx.needs_input_grad[0]
        losses, grad = [], torch.empty_like(logits) if learning else logits  # (T, V)
        for x, y, g in CrossEntropy.split(logits, labels.unsqueeze(1), grad):
            x = exact(x)
            p = x.softmax(1)
            log_sum_exp = x.amax(1, True) - p.amax(1, True).log()
            losses.append(log_sum_exp - x.gather(1, y))
            if learning:
                g.copy_(p.scatter_add_(1, y, p.new_full(y.shape, -1.0)))
        ctx.save_for_backward(grad)
        return torch.cat(losses).squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors  # scaled in place: torch refuses a second backward
        for g, scale in CrossEntropy.split(grad, upstream.unsqueeze(1)):
            torch.mul(g, scale, out=g)  # in fp32, then rounded
        return grad, None


def exact(x):
    """x in fp32, or fp64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MaskedLM(nn.Module):
    """Encoder, decoder and the prediction head they share: FC1 (in the decoder), GELU, LayerNorm,
    and FC2 tied to the word embedding (Appendix D)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        decoders = {"none": NoDecoder, "self": SelfDecoder, "cross": CrossDecoder}
        self.decoder = decoders[config.decoder](config)
        self.ln = nn.LayerNorm(config.n_embd)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder.apply(init_weights)

    def logits(self, batch):
        """batch: a data.Corrupted. Returns the scores of every word at batch.predict, (B, k, V)."""
        if self.config.decoder == "none":
            latents = self.encoder(batch.inputs)  # (B, n, d_en), [MASK]s among them
        else:
            visible = batch.inputs.gather(1, batch.kept)  # (B, n_en)
            latents = self.encoder(visible, batch.kept)  # (B, n_en, d_en)
        states = self.decoder(latents, batch)  # (B, k, d_en)
        return F.linear(self.ln(F.gelu(states)), self.encoder.tok.weight, self.bias)

    def forward(self, batch):
        """batch: a data.Corrupted. Returns the losses (B, k) in nats, in the order of
        batch.predict."""
        logits = self.logits(batch).flatten(0, 1)  # (B·k, V)
        # a compiler fuses the same of itself; fp16's gradients need their scale before rounding
        if torch.compiler.is_compiling() or logits.dtype == torch.float16:
            losses = F.cross_entropy(exact(logits), batch.labels.flatten(), reduction="none")
        else:
            losses = CrossEntropy.apply(logits, batch.labels.flatten())
        return losses.view_as(batch.labels)


def init_weights(module):
    """BERT's: N(0, 0.02) for every matrix and for the [MASK] vector, 0 for biases, 1 for
    LayerNorm's scale (PyTorch's default)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, Bridge):
        nn.init.normal_(module.mask, std=0.02)


class Classifier(nn.Module):
    """The encoder and RoBERTa's classification head on <s>; n_classes = 1 for regression. The
    head keeps PyTorch's initialisation, as fairseq's does."""

    def __init__(self, config, n_classes):
        super().__init__()
        self.config, self.n_classes = config, n_classes
        self.labels = None  # the words of the classes, for config.json
        self.encoder = Encoder(config)
        self.drop = Dropout(config.dropout)
        self.dense = nn.Linear(config.n_embd, config.n_embd)
        self.out = nn.Linear(config.n_embd, n_classes)

    def forward(self, tokens, attention_mask=None):
        """tokens (B, T), attention_mask (B, T) bool -> logits (B, n_classes)."""
        x = self.encoder(tokens, attention_mask=attention_mask)[:, 0]  # (B, d_en), the state of <s>
        return self.out(self.drop(torch.tanh(self.dense(self.drop(x)))))


# Hugging Face folders. A post-LN encoder is `transformers`' RoBERTa, a pre-LN one its
# RobertaPreLayerNorm.

MODEL_TYPES = {"post": "roberta", "pre": "roberta-prelayernorm"}
CLASS_NAMES = {"post": "Roberta", "pre": "RobertaPreLayerNorm"}
PAD = 1  # <pad>'s id in RoBERTa's vocabulary; transformers' positions begin after it, at 2


def hf_names(config, prefix):
    """Pairs of a parameter of Encoder and the one or three of transformers' that make it up."""
    pre = config.norm == "pre"
    pairs = [("ln", ["embeddings.LayerNorm"]), *([("ln_f", ["LayerNorm"])] if pre else [])]
    for i in range(config.n_layer):
        theirs = f"encoder.layer.{i}."
        for a, b in (
            ("attn.qkv", ("attention.self.query", "attention.self.key", "attention.self.value")),
            ("attn.out", ("attention.output.dense",)),
            ("ln1", ("attention.LayerNorm" if pre else "attention.output.LayerNorm",)),
            ("fc1", ("intermediate.dense",)),
            ("fc2", ("output.dense",)),
            ("ln2", ("intermediate.LayerNorm" if pre else "output.LayerNorm",)),
        ):
            pairs.append((f"blocks.{i}.{a}", [theirs + name for name in b]))
    yield "tok.weight", [f"{prefix}embeddings.word_embeddings.weight"]
    yield "pos.weight", [f"{prefix}embeddings.position_embeddings.weight"]
    for ours, theirs in pairs:
        for p in ("weight", "bias"):
            yield f"{ours}.{p}", [f"{prefix}{name}.{p}" for name in theirs]


def save_pretrained(model, directory, tokenizer_file=None):
    """Write a Hugging Face folder: config.json, pytorch_model.bin and, given a tokenizer.json,
    the tokenizer.

    model is a MaskedLM (3ML: its encoder alone, since transformers has no class for the decoder;
    vanilla MLM: with its head, as ForMaskedLM), or a Classifier (as ForSequenceClassification).
    Each file is written under a temporary name and then renamed."""
    config, kind = model.config, MODEL_TYPES[model.config.norm]
    prefix, d = kind.replace("-", "_") + ".", config.n_embd
    ours = {k: v.detach().float().cpu() for k, v in model.encoder.state_dict().items()}
    ours["pos.weight"] = torch.cat([torch.zeros(PAD + 1, d), ours["pos.weight"]])
    theirs = {f"{prefix}embeddings.token_type_embeddings.weight": torch.zeros(1, d)}
    for name, names in hf_names(config, prefix):
        theirs.update(zip(names, (p.clone() for p in ours[name].chunk(len(names)))))
    head, heads = "Model", {}
    if isinstance(model, Classifier):
        head = "ForSequenceClassification"
        heads = {"classifier.dense": model.dense, "classifier.out_proj": model.out}
    elif config.decoder == "none":
        head = "ForMaskedLM"
        heads = {"lm_head.dense": model.decoder.fc1, "lm_head.layer_norm": model.ln}
        theirs["lm_head.bias"] = model.bias.detach().float().cpu()
        theirs["lm_head.decoder.bias"] = theirs["lm_head.bias"]
        theirs["lm_head.decoder.weight"] = theirs[f"{prefix}embeddings.word_embeddings.weight"]
    for name, module in heads.items():
        theirs[f"{name}.weight"] = module.weight.detach().float().cpu()
        theirs[f"{name}.bias"] = module.bias.detach().float().cpu()
    hf_config = dict(
        architectures=[CLASS_NAMES[config.norm] + head], model_type=kind,
        vocab_size=config.vocab_size, max_position_embeddings=config.n_positions + PAD + 1,
        num_hidden_layers=config.n_layer, hidden_size=d, intermediate_size=4 * d,
        num_attention_heads=d // config.head_size, hidden_act="gelu", layer_norm_eps=1e-5,
        hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout,
        type_vocab_size=1, initializer_range=0.02, bos_token_id=0, pad_token_id=PAD, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    if isinstance(model, Classifier):
        labels = model.labels or [f"LABEL_{i}" for i in range(model.n_classes)]
        hf_config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        hf_config["label2id"] = {label: i for i, label in enumerate(labels)}
    tokenizer_config = dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=config.n_positions,
        bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>",
    )  # fmt: skip
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)

    def write(name, writer):
        try:
            writer(directory / f"{name}.tmp")
        except RuntimeError as e:  # what torch.save makes of a full disk
            raise OSError(f"{directory / name}: cannot be written ({first_line(e)})") from e
        os.replace(directory / f"{name}.tmp", directory / name)

    def write_json(name, what):
        write(name, lambda path: path.write_text(json.dumps(what, indent=1)))

    write("pytorch_model.bin", lambda path: torch.save(theirs, path))
    if tokenizer_file is not None:
        write("tokenizer.json", lambda path: shutil.copyfile(tokenizer_file, path))
        write_json("tokenizer_config.json", tokenizer_config)
    write_json("config.json", hf_config)


def read_weights(directory):
    """The tensors of pytorch_model.bin or model.safetensors; nothing in them is executed."""
    path = directory / "pytorch_model.bin"
    if path.exists():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:
            raise ValueError(f"{path}: not a readable file of weights ({first_line(e)})") from e
    path = directory / "model.safetensors"
    if not path.exists():
        raise ValueError(f"{directory}: holds neither pytorch_model.bin nor model.safetensors")
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise ValueError(f"{path}: reading it needs `pip install safetensors`") from e
    try:
        return load_file(path)
    except Exception as e:
        raise ValueError(f"{path}: not a readable file of weights ({first_line(e)})") from e


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def load_pretrained(directory):
    """Read a Hugging Face folder of type roberta or roberta-prelayernorm: (ModelConfig, Encoder),
    fp32.

    ModelConfig.decoder is "none": such a folder holds no decoder. Raises ValueError, in one line
    that names the file, where something is missing or is not the encoder that this file can
    build."""
    directory = Path(directory)
    path = directory / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        d, heads, pad = hf["hidden_size"], hf["num_attention_heads"], hf.get("pad_token_id", PAD)
        kind, eps, act = hf["model_type"], hf.get("layer_norm_eps"), hf.get("hidden_act", "gelu")
        if kind not in MODEL_TYPES.values():
            raise ValueError(f"model_type is {kind!r}, not one of {[*MODEL_TYPES.values()]}")
        if (eps, act, hf["intermediate_size"]) != (1e-5, "gelu", 4 * d):
            raise ValueError(
                "needs layer_norm_eps 1e-05, hidden_act gelu, intermediate_size 4 * hidden_size; "
                f"has {eps}, {act}, {hf['intermediate_size']}"
            )
        config = ModelConfig(
            hf["vocab_size"], hf["max_position_embeddings"] - pad - 1, hf["num_hidden_layers"], d,
            head_size=d // heads, decoder="none", norm="post" if kind == "roberta" else "pre",
            dropout=hf.get("hidden_dropout_prob", 0.1),
        )  # fmt: skip
    except KeyError as e:
        raise ValueError(f"{path}: has no {e.args[0]!r}") from e
    except (OSError, ValueError, TypeError) as e:
        reason = "no such file" if isinstance(e, FileNotFoundError) else first_line(e)
        raise ValueError(f"{path}: {reason}; a Hugging Face RoBERTa folder is needed") from e
    theirs = read_weights(directory)
    prefix = kind.replace("-", "_") + "."
    if not any(name.startswith(prefix) for name in theirs):
        prefix = ""  # saved from the bare RobertaModel
    encoder = Encoder(config)
    ours = encoder.state_dict()
    for name, names in hf_names(config, prefix):
        missing = [x for x in names if x not in theirs]
        if missing:
            raise ValueError(f"{directory}: the weights have no {missing[0]!r}")
        weight = torch.cat([theirs[x].float() for x in names])
        if name == "pos.weight":  # one token type only, so its row belongs to every position
            types = theirs.get(f"{prefix}embeddings.token_type_embeddings.weight")
            weight = weight[pad + 1 :] + (0 if types is None else types[0].float())
        if weight.shape != ours[name].shape:
            raise ValueError(
                f"{directory}: {names[0]!r} has shape {tuple(weight.shape)}, config.json makes it "
                f"{tuple(ours[name].shape)}"
            )
        ours[name] = weight
    encoder.load_state_dict(ours)
    return config, encoder


def load_classifier(directory, n_classes):
    """A Classifier with its head, from a folder that save_pretrained wrote of one. Raises
    ValueError."""
    config, encoder = load_pretrained(directory)
    model, weights = Classifier(config, n_classes), read_weights(Path(directory))
    model.encoder.load_state_dict(encoder.state_dict())
    for module, name in ((model.dense, "classifier.dense"), (model.out, "classifier.out_proj")):
        if weights.get(f"{name}.weight", torch.empty(0)).shape != module.weight.shape:
            raise ValueError(f"{directory}: holds no classifier of {n_classes} classes")
        module.load_state_dict({p: weights[f"{name}.{p}"] for p in ("weight", "bias")})
    return model
