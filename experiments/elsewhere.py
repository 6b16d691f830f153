"""Opens the folders that train.py and finetune.py leave with the libraries where people work.

    pip install transformers sentence-transformers datasets accelerate
    python experiments/elsewhere.py ENCODER VANILLA_MLM CLASSIFIER > experiments/elsewhere.log

Takes the hf/ of a pre-training run, of one with --decoder none, and of a fine-tuning run. At the
end it trains a SentenceTransformer further, saves it, and reads it again."""

import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import load_pretrained  # noqa: E402

encoder, vanilla, classifier = sys.argv[1:]
text = "Return a list of the names."
inputs = AutoTokenizer.from_pretrained(encoder)(text, return_tensors="pt")
print("AutoModel", AutoModel.from_pretrained(encoder)(**inputs).last_hidden_state.shape)
inputs = AutoTokenizer.from_pretrained(classifier)(text, return_tensors="pt")
model = AutoModelForSequenceClassification.from_pretrained(classifier)
print("AutoModelForSequenceClassification", model(**inputs).logits.shape, model.config.id2label)
words = pipeline("fill-mask", vanilla)("Return a <mask> of the names.")
print("fill-mask", [(x["token_str"], round(x["score"], 3)) for x in words])
sentences = SentenceTransformer(encoder)
a, b = ["Return the list.", "an array of integers"] * 8, ["Returns a list.", "integer array"] * 8
pairs, folder = Dataset.from_dict({"a": a, "b": b}), tempfile.mkdtemp()
print("SentenceTransformer", sentences.similarity(*sentences.encode([a[0], b[0]])).item())
loss = losses.MultipleNegativesRankingLoss(sentences)
args = SentenceTransformerTrainingArguments(output_dir=folder)
SentenceTransformerTrainer(sentences, args, pairs, loss=loss).train()
sentences.save_pretrained(folder)
again = SentenceTransformer(folder)
print("trained, saved, read", again.similarity(*again.encode([a[0], b[0]])).item())
print("load_pretrained", load_pretrained(folder)[0])
