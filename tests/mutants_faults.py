"""Deliberate bugs of what must hold when things break: checkpoints, rounds, messages, nodes.

    python tests/mutants_faults.py [--list] [--only NAME]

Same form and same hunt as in mutants.py.
"""

from __future__ import annotations

import sys

import mutants

# fmt: off
MUTANTS = [mutants.Mutant(*entry[:5], tuple(entry[5].split())) for entry in [
    # ------------------------------------------------------------ checkpoints
    ("hash-not-looked-at", "checkpoint.py",
     "if hashlib.sha256(lengths + data[start:]).digest() != digest:", "if False:",
     "a flipped bit becomes a weight", "crash"),
    ("last-checkpoint-only", "checkpoint.py", "KEPT = 2", "KEPT = 1",
     "nothing to fall back on", "crash resume"),
    ("state-left-out", "checkpoint.py", "for client, own in progress.clients.items()",
     "for client, own in ()", "kept moments are lost in a crash", "crash resume"),
    ("carried-left-out", "checkpoint.py", "carried = Adapter({}, {}, state.carried)",
     "carried = Adapter({}, {}, {})", "what is owed is forgotten in a crash", "resume"),
    ("resumes-a-round-late", "simulation.py", "for round in range(done + 1, rounds + 1):",
     "for round in range(done + (2 if progress else 1), rounds + 1):", "a round is skipped",
     "resume"),
    ("log-not-cut-back", "resume.py", "log = log[: checkpoint.round + 1]", "pass",
     "rounds stand in the log twice", "resume crash"),
    ("changes-let-in", "resume.py", "if changed:", "if False:",
     "a run goes on as another", "resume"),
    ("two-in-one-run", "recording.py", "    with locked(job.folder):", "    if True:",
     "two processes append to one log", "resume status"),
    ("running-run-resumed", "resume.py", "    check_free(folder)\n", "",
     "a run is resumed under the process that is at it", "resume"),
    ("running-run-called-stopped", "runlog.py", "        check_free(folder)\n", "",
     "somebody is told to resume what runs", "resume"),
    ("cut-back-late", "resume.py", "if _log_size(folder) != self.size:", "if False:",
     "a log is cut back to where it was when it was read", "resume"),
    ("other-data-let-in", "resume.py", "    refuse_other_data(folder, own, versions)\n", "",
     "a run goes on with other rows, and says nothing", "resume"),
    ("digest-of-a-name", "digests.py", "    return _digest(path, state.st_size, state.st_mtime_ns)",
     "    return _digest(path, 0, 0)", "a file that changed is not read again", "resume"),
    ("lock-of-a-removed-file", "files.py",
     "if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):", "if True:",
     "two hold a lock: one of them that of a file which is gone", "files"),
    ("lock-left", "files.py", "path.unlink(missing_ok=True)  #", "pass  #",
     "a run directory holds what is no part of the run", "files run"),
    ("name-as-path", "runlog.py", 'if name in ("", ".", "..") or any(', "if False and any(",
     "a run's name writes outside runs/", "run_cli"),
    ("summary-first", "recording.py",
     "    card = model_card(config, summary, portable_name(config.model.name))",
     "    write_json(folder / 'summary.json', summary)\n"
     "    card = model_card(config, summary, portable_name(config.model.name))",
     "a run that died while saving says that it ended", "crash"),
    ("written-in-place", "files.py", "    temporary.replace(path)\n    sync",
     "    path.write_bytes(data)\n    temporary.unlink()\n    sync",
     "a file that is half old and half new", "crash peft_roundtrip"),
    # ------------------------------------------------------------ rounds
    ("too-few-merge", "rounds.py",
     "and len(good) < (policy.min_clients or len(opened.messages)):", "and not good:",
     "one reply of many makes a round", "flower_faults status"),
    ("failures-not-counted", "rounds.py", "count = state.memory.get(FAILED, 0.0) + 1", "count = 1",
     "a dead federation runs for ever", "flower_faults"),
    ("missing-not-named", "rounds.py", "sorted(opened.messages.keys() - answered)", "[]",
     "a silent client is in no log", "flower_faults"),
    ("no-examples-taken", "rounds.py", "if not 0 < reply.examples <= MOST:", "if False:",
     "a weight of zero, or below", "flower_faults"),
    ("first-answer-counts", "rounds.py", "results.pop(found.client, None)", "pass",
     "of two answers the order decides", "flower_faults"),
    # ------------------------------------------------------------ messages and nodes
    ("any-shape", "flower/wire.py", "if name in want and shape != want[name]:", "if False:",
     "what broadcasts is merged", "flower_faults"),
    ("any-size", "flower/wire.py",
     "if len(array.data) != 4 * count:", "if len(array.data) < 4 * count:",
     "a small array brings a large message", "flower_faults"),
    ("layout-unsorted", "flower/wire.py", "for name in sorted(layout)}", "for name in layout}",
     "numbers land in another layer", "wire"),
    ("stowaways", "flower/wire.py", "record.keys() - {PACKED}", "()",
     "a message brings what nobody looks at", "flower_faults"),
    ("any-form", "flower/wire.py", ' or array.stype != FORM', "",
     "whatever a client says it is, is read as numbers", "flower_faults"),
    ("stale-taken", "flower/wire.py", "if said != (run, opened.round, client):", "if False:",
     "last week's answer is merged", "flower_faults"),
    ("any-figure", "flower/wire.py",
     "if not isinstance(value, float) or not abs(value) < LARGEST:", "if False:",
     "NaN in a client's loss ends the server", "flower_faults"),
    ("limits-ignored", "flower/node.py", "if rule not in allowed:", "if False:",
     "a server talks a node into another rule", "flower_node"),
    ("any-base", "flower/node.py", "if order.base != node.loaded.base:", "if False:",
     "an adapter for another model is trained", "flower_node"),
    ("bases-not-compared", "flower/strategy.py", "if seen.base != self.base:", "if False:",
     "the mismatch shows after hours, or never", "flower_node"),
    ("state-of-this-round", "flower/node.py",
     'if int(path.stem.removeprefix("round-")) < round:', "if True:",
     "a repeated round starts where it ended", "flower_node flower_faults"),
    ("state-of-another-run", "flower/node.py",
     "if owner == run:", "if True:", "a new run begins with an old one's moments", "flower_node"),
    ("two-states-kept", "flower/node.py", "KEPT = 3", "KEPT = 2",
     "moments are lost where the last checkpoint is damaged", "flower_faults"),
    ("old-states-kept", "flower/node.py", ' if path <= own)[:-KEPT]', ")[:-KEPT]",
     "a new run loses its moments to those of a longer one", "flower_node"),
    ("asked-again-and-again", "flower/strategy.py", " - set(self.greeted.values())", "",
     "a node that hangs comes back to a heap of questions", "flower_faults"),
    ("flowers-word-unheard", "flower/strategy.py",
     "client = sent_to.get(message.metadata.reply_to_message_id, client)", "pass",
     "a node that is gone is called late", "flower_faults"),
    ("late-is-lost", "flower/strategy.py", "message.error.code == EXPIRED", "False",
     "the same lateness bears two names", "flower_faults"),
    ("rounds-from-one-again", "flower/strategy.py", "self.done_before + server_round,",
     "server_round,", "a resumed run repeats its first rounds", "flower_faults"),
]]
# fmt: on

if __name__ == "__main__":
    mutants.MUTANTS = MUTANTS
    sys.exit(mutants.main())
