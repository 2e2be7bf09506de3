"""Deliberate bugs of the merge rules and of the policies around them.

    python tests/mutants_rules.py [--list] [--only NAME]

Same form and same hunt as in mutants.py. Many are shipped bugs of published code.
"""

from __future__ import annotations

import sys

import mutants

# fmt: off
MUTANTS = [mutants.Mutant(*entry[:5], tuple(entry[5].split())) for entry in [
    # ------------------------------------------------------------ rules
    ("fedex-drops-scaling", "rules/fedex.py", "_apart(rescaled(client, prev.scaling), mean)",
     "_apart(client, mean)", "s_k not folded into B_k before the residual", "conformance"),
    ("fedex-uniform-residual", "rules/fedex.py", "mix(spread, weights, prev.scaling)",
     "mix(spread, [1 / len(clients)] * len(clients), prev.scaling)",
     "the residual of another mean", "conformance"),
    ("flora-keeps-b", "rules/flora.py", "prev.B.new_zeros(prev.B.shape)", "prev.B",
     "clients fold the stack and train on with the old B on top", "conformance"),
    ("momentum-forgets-tau", "rules/fedmomentum.py", ", energy=tau)", ")",
     "tau does nothing", "rules_known"),
    ("rolora-both", "rules/rolora.py", 'part: Part = "B" if round % 2 else "A"', 'part: Part = "B"',
     "A never has its turn", "rules_run rules_known"),
    ("rolora-moves-by-rounding", "rules/rolora.py", "prev.A if same_A else mean.A", "mean.A",
     "what nobody trained changes in the last digit", "rules_known"),
    ("hetlora-flat-weights", "rules/hetlora.py", "raised = weights * torch", "raised = 0 * torch",
     "weights do not follow the updates", "rules_known"),
    ("hetlora-norm-of-the-adapter", "rules/hetlora.py",
     "frobenius(change(start, end))", "frobenius(end)",
     "an idle client with a large adapter counts most", "rules_known"),
    ("raflora-plain-weights", "rules/raflora.py", "w * share[: c.rank].to(c.B)", "w",
     "rank-agnostic weights: collapse to the smallest rank", "rules_known"),
    ("fedsvd-balanced", "rules/fedsvd.py", 'gauge="orthonormal"', 'gauge="balanced"',
     "noise on B is amplified by A's length", "rules_known"),
    ("fedrot-one-side", "rules/fedrot.py", "Factors(Q.mT @ client.A, client.B @ Q, client.scaling)",
     "Factors(Q.mT @ client.A, client.B, client.scaling)", "A is turned and B is not",
     "conformance"),
    ("fedrot-reflects", "rules/fedrot.py", "U[:, -1] *= torch.linalg.det(U @ Vh).sign()", "pass",
     "half of the way to a reflection there is nothing", "conformance rules_known"),
    ("lorafair-wrong-side", "rules/lorafair.py", "mean.B + correction", "mean.B - correction",
     "the correction leads away", "rules_known"),
    ("florana-swapped", "rules/florana.py", "cross.mT @ new_b", "cross @ new_b",
     "a is fitted to b's equations", "rules_known"),
    ("fedrpca-all-amplified", "rules/fedrpca.py", "(beta - 1) * (sparse @", "(beta - 1) * (D @",
     "the common part is amplified too", "rules_known"),
    # ------------------------------------------------------------ policies
    ("residual-forgotten", "server.py",
     "frozen, cut = pressed.factors, frobenius(pressed.residual)",
     "cut = frobenius(pressed.residual)", "nothing is ever folded", "policy"),
    ("fold-forgets-the-past", "server.py", "whole = stacked(_precise(frozen), whole)", "pass",
     "each round's residual replaces the last", "policy"),
    ("cap-ignored", "server.py", "return compress(whole, cap or None)", "return compress(whole)",
     "the folded increment grows without end", "policy"),
    ("carry-forgotten", "server.py",
     "factors.append(_precise(carried))\n        weights = torch.cat("
     "[weights, weights.new_ones(1)])", "pass", "what is owed is never paid", "policy"),
    ("frozen-not-sent", "server.py", 'plan.receives | {"frozen"})', "plan.receives)",
     "late joiners train on another model", "policy rules_run"),
    ("frozen-not-used", "model.py", "return output + linear(", "return output + 0 * linear(",
     "clients train against a model without what was folded", "frozen"),
    ("cut-forgets-scaling", "adapter.py", "root = math.sqrt(part.scaling / scaling)", "root = 1.0",
     "alpha 16, rank 16 to 4: four times too much", "adapter policy"),
    ("client-keeps-global-scaling", "model.py",
     'model.lora_layers[name].scaling["default"] = factors.scaling', "pass",
     "a client of smaller rank trains another model than it sends", "frozen"),
    ("server-step-full", "policy.py", "used = policy.server_lr * used", "pass",
     "the coefficients no longer sum to one", "policy"),
    ("clipped-weight-lost", "policy.py",
     "return [Term(*term) for term in each] + _remainders(sent, rest, receivers)",
     "return [Term(*term) for term in each]",
     "clipping shrinks the adapter instead of the update", "policy robust"),
    ("krum-keeps-the-far", "robust.py",
     "argsort(stable=True)", "argsort(stable=True, descending=True)",
     "the outliers are kept", "robust"),
    ("krum-counts-itself", "robust.py", ".values[:, 1 : clients - bad - 1]",
     ".values[:, : clients - bad - 2]", "each client is its own nearest neighbour", "robust"),
    ("clipping-stretches", "robust.py",
     "torch.where(norms > limit, limit / norms, torch.ones_like(norms))",
     "limit / norms", "small updates are blown up to the bound", "robust"),
    ("gram-without-head", "robust.py", "gram += (moved @ moved.mT).triu()", "pass",
     "an attack on the head is not seen", "robust"),
    ("moments-not-turned", "moments.py",
     'turned[place] = _turned(kept[place], turn, rows=part == "lora_A")',
     "pass", "transport keeps the moments of other coordinates", "moments"),
    ("moments-turned-back", "moments.py",
     "(turn.mT @ moment[:r].double())", "(turn @ moment[:r].double())",
     "A's moments are turned the wrong way", "moments"),
    ("prox-pushes", "client.py", "alpha=prox)", "alpha=-prox)", "the pull is a push", "moments"),
    ("ranks-ignored", "modes.py", "if rank != model.rank", "if False", "client.ranks does nothing",
     "rules_run policy"),
    ("foreign-file-runs", "rules/__init__.py",
     'if name not in _RULES and ".py:" in name and name not in _FILES:', "if False:",
     "the refusal says nothing of files", "rules_run"),
    ("aligned-backwards", "lowrank.py",
     "return Factors(Q.mT @ factors.A, factors.B @ Q, factors.scaling)",
     "return Factors(Q @ factors.A, factors.B @ Q.mT, factors.scaling)",
     "turned away from the reference", "lowrank"),
    ("fill-not-orthonormal", "lowrank.py", "rows = torch.linalg.qr(full.A[known:].mT)[0].mT",
     "rows = full.A[known:]", "fedsvd's A is orthonormal in most rounds only",
     "lowrank rules_known"),
]]
# fmt: on

if __name__ == "__main__":
    mutants.MUTANTS = MUTANTS
    sys.exit(mutants.main())
