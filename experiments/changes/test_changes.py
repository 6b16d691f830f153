"""Each patch of this folder changes what it says, and the changed model learns.

pytest experiments/changes"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
import flops  # noqa: E402
import model as m  # noqa: E402
import test_3ml as t  # noqa: E402

corpus = t.corpus  # a fixture


def spans(changed):
    """[MASK]s come in longer runs: 1 / (1 - 0.4) of independent ones are 1.7."""

    def mean_run(corrupt):
        batch = corrupt(t.random_rows(500, 128), 0.5, vocab_size=t.V, mask_id=t.MASK)
        chosen = torch.zeros(500, 128).scatter(1, batch.masked, 1)
        return chosen.sum() / (chosen.diff(dim=1) > 0).sum()

    assert mean_run(m.corrupt) < 1.8 and mean_run(changed.corrupt) > 2.4


def only_latents(changed):
    """A [MASK] is predicted as if there were no other."""
    for model, alike in ((changed, True), (m, False)):
        net, batch = t.shaken(model.MaskedLM(t.config_of(decoder="cross"))), t.random_batch()
        one = batch.masked[:, :1]
        alone = batch._replace(masked=one, predict=one, labels=one, n_replaced=0)
        assert torch.allclose(net.logits(alone)[:, 0], net.logits(batch)[:, 0], atol=1e-5) == alike


def sinusoids(changed):
    """The product of two positions depends on their distance alone, and nothing trains them."""
    positions = changed.MaskedLM(t.config_of()).encoder.pos.weight
    products = positions @ positions.T
    t.close(products[1:, 1:], products[:-1, :-1])
    assert not positions.requires_grad and products[0, 0] > products[0, 9]


def neighbours(changed):
    """Each state is FC1 of the two neighbours' latents; and no other decoder's FLOPs are taken."""
    net, batch = changed.NeighbourDecoder(t.config_of()), t.random_batch()
    latents = torch.randn(4, 13, 32)
    states = net(latents, batch)
    assert flops.forward(changed.ModelConfig(decoder="near"), 16, 6, 7) is None
    for r, i in np.ndindex(*batch.predict.shape):
        at, kept = batch.predict[r, i], batch.kept[r]
        left, right = latents[r, kept < at][-1], latents[r, kept > at][0]
        t.close(states[r, i], net.fc1(torch.cat([left, right])))


EFFECTS = dict(span_masking=spans, masks_see_only_latents=only_latents,
               sinusoidal_positions=sinusoids, neighbour_decoder=neighbours)  # fmt: skip


@pytest.mark.parametrize("name", [path.stem for path in HERE.glob("*.patch")])
def test_the_readmes_changes_do_what_they_say_and_learn(name, corpus, tmp_path):
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    patch = HERE / f"{name}.patch"
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location("changed", tmp_path / "model.py")
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    EFFECTS[name](changed)
    decoder = "near" if name == "neighbour_decoder" else "cross"
    flags = dict(decoder=decoder, max_steps=30, lr=0.01, eval_every=30)
    argv = t.arguments(corpus, tmp_path / "out", **flags)
    subprocess.run([sys.executable, "train.py", *argv], cwd=tmp_path, check=True)
    losses = [entry["loss"] for entry in t.log_of(tmp_path / "out") if "loss" in entry]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
