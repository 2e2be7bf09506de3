"""Deliberate bugs of privacy: clipping, noise, sampling, charging, and what a server may see.

    python tests/mutants_privacy.py [--list] [--only NAME]

Same form and same hunt as in mutants.py.
"""

from __future__ import annotations

import sys

import mutants

# fmt: off
MUTANTS = [mutants.Mutant(*entry[:5], tuple(entry[5].split())) for entry in [
    # ------------------------------------------------------------ training
    ("noise-without-the-clip", "privacy/dpsgd.py", "noise = self.noise * self.clip",
     "noise = self.noise", "too little noise for clips above one", "dpsgd audit"),
    ("no-noise-for-an-empty-batch", "privacy/dpsgd.py", "noise = self.noise * self.clip",
     "noise = self.noise * self.clip if examples else 0.0",
     "that nobody was drawn shows itself", "dpsgd"),
    ("noise-of-the-batch-mean", "privacy/dpsgd.py",
     "noised = total[name] + noise * drawn.to(parameter.device, torch.float64)",
     "noised = total[name] + noise * drawn.to(parameter.device, torch.float64) / self.expected",
     "noise divided twice by the batch", "dpsgd audit"),
    ("clip-tensor-by-tensor", "privacy/dpsgd.py",
     "for g in each.values()]).sum(dim=0)", "for g in each.values()]).amax(dim=0)",
     "all tensors together are longer than the clip", "dpsgd"),
    ("mean-then-clip", "privacy/dpsgd.py", 'torch.einsum("i,i...->...", factors, g)',
     "g.mean(dim=0) * float(factors.min()) * examples",
     "the batch is clipped, not the example", "dpsgd audit"),
    ("odd-examples-kept", "privacy/dpsgd.py", "finite = torch.isfinite(squares)",
     "finite = torch.ones_like(squares, dtype=torch.bool)",
     "one NaN makes the sum NaN: it shows itself", "dpsgd"),
    ("batches-of-a-fixed-size", "privacy/dpsgd.py", "rows[uniform(len(rows)) < rate]",
     "rows[: round(rate * len(rows))]", "no sampling, whose amplification is claimed", "dpsgd"),
    ("gradients-of-the-mean-loss", "privacy/dpsgd.py", 'loss_reduction="sum"',
     'loss_reduction="mean"', "gradients times the batch, clipped nearly always", "dpsgd"),
    ("layers-without-gradients-pass", "privacy/dpsgd.py",
     "if found is None or len(found) != examples:", "if found is not None and not len(found):",
     "a layer that is not hooked is trained without privacy", "dpsgd"),
    ("noise-from-a-seed", "privacy/noise.py", "os.urandom(8 * count)",
     "np.random.default_rng(0).bytes(8 * count)", "whoever knows the seed subtracts it",
     "dpsgd private_runs"),
    ("one-round-planned", "privacy/example.py", "steps * rounds, rate", "steps, rate",
     "noise for one round, spent in all of them", "dpsgd private_runs"),
    ("losses-let-out", "client.py", "if losses and shares_metrics(config.privacy):", "if losses:",
     "the training loss is of private rows", "dpsgd private_runs"),
    ("heldout-let-out", "recording.py",
     "if data.heldout[client].size and shares_metrics(config.privacy):",
     "if data.heldout[client].size:", "scores of private rows", "private_runs"),
    # ------------------------------------------------------------ the ledger
    ("open-intents-are-free", "privacy/ledger.py",
     "every = [one for intent in self.intents for one in intent.mechanisms]",
     "every = [one for intent in self.intents if intent.closed for one in intent.mechanisms]",
     "a crash hides what was spent", "ledger private_runs"),
    ("one-step-too-far", "privacy/ledger.py", "if after > terms.epsilon:",
     "if ledger.spent > terms.epsilon:", "the last round goes beyond the budget", "ledger dpsgd"),
    ("hashes-not-looked-at", "privacy/ledger.py",
     'if entry["previous"] != before or entry["hash"] != _hash(rest):',
     'if entry["previous"] != before:', "an edited line passes", "ledger"),
    ("chain-not-looked-at", "privacy/ledger.py",
     'if entry["previous"] != before or entry["hash"] != _hash(rest):',
     'if entry["hash"] != _hash(rest):', "a line left out passes", "ledger"),
    ("terms-may-change", "privacy/ledger.py", "if before != value:", "if False:",
     "a larger budget by starting again", "ledger"),
    # ------------------------------------------------------------ a trusted server
    ("divided-by-who-answered", "privacy/client_level.py",
     "clip_factor(norm, clip) / self.noising.clients", "clip_factor(norm, clip) / len(results)",
     "one client more or less changes everybody's weight", "client_level"),
    ("broken-updates-kept", "privacy/client_level.py",
     "if not math.isfinite(norm):\n        return 0.0",
     "if not math.isfinite(norm):\n        return 1.0",
     "an update without a norm is not clipped", "client_level"),
    ("head-not-noised", "privacy/client_level.py",
     "total = before.double() + sigma * _gaussian_like(before.double())",
     "total = before.double()", "the head leaks", "client_level audit"),
    ("head-not-counted", "privacy/client_level.py",
     "norms += [float(tensor.norm()) for tensor in moved.dense.values()]", "pass",
     "layers within the clip, the head beyond it", "client_level"),
    ("noise-of-the-first-clip", "privacy/client_level.py",
     "sigma = self.noising.message_noise * clip / self.noising.clients",
     "sigma = self.noising.message_noise * self.noising.clip / self.noising.clients",
     "the clip grew and the noise did not", "client_level"),
    ("two-messages-for-one", "privacy/client_level.py",
     "found = [Mechanism(self.message_noise, EXCHANGES[self.design].messages)]",
     "found = [Mechanism(self.message_noise)]", "the second message is free", "client_level"),
    ("count-for-free", "privacy/client_level.py",
     "return found + ([Mechanism(self.count_noise)] if self.quantile else [])", "return found",
     "the clip's count is not charged", "client_level"),
    ("clip-runs-away", "privacy/client_level.py", "math.exp(-self.noising.rate",
     "math.exp(self.noising.rate", "adaptive clipping moves the wrong way", "client_level"),
    ("budget-of-raw-updates-logged", "privacy/client_level.py",
     "return ServerState(adapter, memory)",
     'return ServerState(adapter, {**memory, "norm": max(norms)})',
     "what was not noised is left in the state", "client_level"),
    # ------------------------------------------------------------ sums only
    ("guess-always-trusted", "sums.py",
     'if missed <= self.tolerance * float(total["test"].norm()):', "if True:",
     "unrelated subspaces are merged blindly", "sums"),
    ("weights-not-summed", "sums.py", "means = {n: (t / weight)", "means = {n: t",
     "sums taken for means", "sums"),
    ("bases-not-orthonormal", "sums.py", "return _basis(prev.A.mT)", "return prev.A.mT",
     "messages longer than their updates", "sums"),
]]
# fmt: on

if __name__ == "__main__":
    mutants.MUTANTS = MUTANTS
    sys.exit(mutants.main())
