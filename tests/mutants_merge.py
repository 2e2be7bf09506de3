"""Deliberate bugs of `fedlora merge`: adapter folders, their settings and files, the merge itself.

    python tests/mutants_merge.py [--list] [--only NAME]

Same form and same hunt as in mutants.py.
"""

from __future__ import annotations

import sys

import mutants

# fmt: off
MUTANTS = [mutants.Mutant(*entry[:5], tuple(entry[5].split())) for entry in [
    # ------------------------------------------------------------ settings and files
    ("rslora-ignored", "peft_settings.py", "return math.sqrt(rank) if rslora else float(rank)",
     "return float(rank)", "alpha / r where alpha / sqrt(r) is meant", "adapter_folder"),
    ("patterns-match-ends", "peft_settings.py", r'rf"(.*\.)?({pattern})$"', 'rf".*({pattern})$"',
     "a pattern for attn takes c_attn as well", "adapter_folder"),
    ("overlap-let-in", "tensorfile.py", "if entry.start != place:", "if entry.start > place:",
     "two tensors share their bytes", "adapter_folder"),
    ("names-twice-let-in", "tensorfile.py", "object_pairs_hook=_once", "object_pairs_hook=dict",
     "the last of two tensors of one name wins", "adapter_folder"),
    ("folded-part-lost", "adapter_folder.py",
     "yield name, factors if extra is None else stacked(factors, extra)", "yield name, factors",
     "what was folded is not saved", "adapter_folder frozen"),
    ("rank-of-the-file", "adapter_folder.py",
     "if A.shape[0] != rank or B.shape[1] != rank or", "if A.shape[0] != B.shape[1] or",
     "a config that lies about the rank gives another scaling", "adapter_folder"),
    ("nan-from-disk", "adapter_folder.py",
     'self._check_finite(tensor, f"layer {layer!r}, lora_{part}")', "tensor.sum()",
     "one broken adapter spoils the merged one", "adapter_folder"),
    # ------------------------------------------------------------ the merge
    ("weights-of-the-command-ignored", "merge_checks.py", "[value / total for value in given]",
     "[1 / count for value in given]", "--weights does nothing", "merge"),
    ("one-factor-rules-let-in", "merge_checks.py",
     '(("train", plan.trains), ("share", plan.shares))', '(("train", plan.trains),)',
     "fedsa merged from adapters that share nothing", "merge"),
    ("embedding-as-linear", "merge_checks.py",
     "entry.shape != want.shape or entry.embedding != want.embedding", "entry.shape != want.shape",
     "an embedding's factors are those of the transpose", "merge"),
    ("gauge-of-the-first", "merging.py", "scaling = scalings.pop() if len(scalings) == 1 else 1.0",
     "scaling = clients[0].scaling", "the order of the folders decides", "merge"),
    ("dropped-is-folded", "merging.py", 'or rule.residual[0] != "fold"',
     'or "fold" not in rule.residual', "an adapter larger than asked for", "merge"),
    ("rounding-not-counted", "merging.py", 'precise = converted(written, torch.float64, "cpu")',
     "precise = factors", "what float16 loses is not reported", "merge"),
    ("heads-unweighted", "merging.py", "total += weight * adapter.numbers(",
     "total += (1 / len(adapters)) * adapter.numbers(",
     "the head is another mean", "merge"),
    ("rank-ignored-by-folding-rules", "merging.py",
     "most = min(m, n, mixed.rank) if wanted is None else rank", "most = min(m, n, mixed.rank)",
     "--rank 2 gives rank 12, or nothing at all", "merge"),
    ("overflow-is-no-loss", "merging.py",
     '        _check_range(before, after, f"layer {name!r}")', "        pass",
     "a dry run says 100 % of what cannot be written", "merge"),
    ("head-overflow-in-a-dry-run", "merging.py",
     '_check_range(total, piece.copy_(total), f"tensor {name!r}")', "piece.copy_(total)",
     "the same for the head", "merge"),
    ("head-averaged-whole", "merging.py", "PIECE = 2**18", "PIECE = 2**40",
     "an output layer takes 35 bytes a number", "merge"),
    ("pieces-of-the-beginning", "adapter_folder.py", "whole.start + start * size,",
     "whole.start,", "every piece of a large head is the first one", "merge"),
    ("spectrum-of-another", "merging.py", "core = L.mT @ _gram(A) @ L",
     "core = L @ _gram(A) @ L.mT", "wrong spectra in large stacks", "merge"),
    ("dry-run-writes", "merge_command.py", "None if dry_run else out,", "out,",
     "--dry-run leaves a folder", "merge_cli"),
    ("one-folder-twice", "merge_command.py", "_check_distinct(adapters)\n", "pass\n",
     "m/a and m/a/ count as two adapters", "merge_cli"),
    ("run-directories-unknown", "adapter_folder.py", "_check_not_a_run(folder)\n", "pass\n",
     "a run directory is said to hold no adapter", "merge_cli"),
    ("paths-in-the-card", "merge_card.py", "_cell(adapter.folder.resolve().name)",
     "_cell(str(adapter.folder.resolve()))", "local paths leave with the adapter", "merge_cli"),
]]
# fmt: on

if __name__ == "__main__":
    mutants.MUTANTS = MUTANTS
    sys.exit(mutants.main())
