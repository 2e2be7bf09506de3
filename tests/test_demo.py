"""The built-in run from the command line to an adapter that PEFT loads, with the real MiniLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from fedlora.base import MINILM, model_source
from fedlora.data import encode
from fedlora.evaluate import predict
from fedlora.predictor import load_predictor
from fedlora.tables import label_ids, read_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "fedlora", "demo", "--set", f"run.out={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("round 6/6")]
    assert any(line.split() == ["adapter", str(folder / "adapter")] for line in lines)
    assert any(line.split() == ["figure", str(folder / "report.png")] for line in lines)
    return folder


def test_the_demo_learns_what_carries_over_to_unseen_words(demo: Path) -> None:
    """Evaluation words do not occur in training: chance is .5, the frozen features give less."""
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["final"]["examples"] == 600
    assert summary["final"]["accuracy"] > 0.75


def test_the_demo_leaves_figure_table_card_and_log(demo: Path) -> None:
    for name in ("report.png", "report.svg", "report.md", "adapter/README.md", "versions.json"):
        assert (demo / name).stat().st_size > 300, name
    records = [json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == list(range(7))
    assert all(len(record["clients"]) == 3 for record in records[1:])


# PEFT asks transformers 5 for `is_gradient_checkpointing` while it loads; nothing of ours
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_demo_adapter_with_the_same_logits_to_the_last_bit(demo: Path) -> None:
    config, model = load_predictor(demo)
    table = read_table("builtin:reviews:evaluate", config.data)
    ids = label_ids(table, config.data.labels)
    examples = encode(table, ids, model.tokenizer, config.data.max_length)
    rows = np.arange(64)
    ours = predict(model, examples, rows, batch=64)

    base = AutoModelForSequenceClassification.from_pretrained(model_source(MINILM), num_labels=2)
    theirs = PeftModel.from_pretrained(base, demo / "adapter").eval()
    order = np.argsort(examples.lengths[rows], kind="stable")
    inputs, _ = examples.batch(rows[order], torch.device("cpu"))
    with torch.inference_mode():
        logits = theirs(**inputs).logits
    assert torch.equal(logits, ours[torch.from_numpy(order)])


def test_the_same_demo_gives_the_same_bits(demo: Path, tmp_path: Path) -> None:
    """Two rounds twice, in two processes."""
    found = []
    for name in ("a", "b"):
        folder = tmp_path / name
        sets = ["run.rounds=2", "client.steps=2", "evaluate.every=2", "evaluate.limit=20"]
        words = [word for entry in [*sets, f"run.out={folder}"] for word in ("--set", entry)]
        command = [sys.executable, "-m", "fedlora", "demo", *words]
        subprocess.run(command, check=True, capture_output=True)
        found.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
