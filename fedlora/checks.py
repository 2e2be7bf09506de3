"""What must hold between a run's settings and what was loaded for them, whatever engine drives it.

Reads model and data; trains nothing and opens no file.
"""

from __future__ import annotations

from fedlora.config import Config
from fedlora.data import Data
from fedlora.model import Model, longest_input
from fedlora.privacy.plan import check as check_privacy
from fedlora.privacy.plan import hides_evaluation
from fedlora.settings import names_training_file


def check_has_data(config: Config) -> None:
    """ValueError for a federation of nodes that bring their own data: there is nothing to read."""
    named = config.data.clients or names_training_file(config.data)
    if config.flower.clients and not named:
        raise ValueError(
            f"the nodes of flower.clients = {config.flower.clients} bring their own data: write a "
            "project with `fedlora flower init DIR CONFIG.toml` and start it with `flwr run DIR`"
        )


def check_loaded(config: Config, model: Model, data: Data | None) -> None:
    """ValueError, with the remedy, for settings of privacy that do not go together, inputs longer
    than the model reads, and private rows as the evaluation set.

    `data` is None on a node with rows of its own: what it evaluates on is its own matter.
    """
    check_privacy(config)
    if config.data.max_length > longest_input(model):
        raise ValueError(
            f"data.max_length = {config.data.max_length} is more than the model reads: "
            f"take at most {longest_input(model)}"
        )
    if data is not None and hides_evaluation(config, data):
        raise ValueError(
            "privacy.unit = 'example' needs data.evaluate, a public set: without it the clients' "
            "own held-out rows are scored; or let them be with privacy.share_metrics = true"
        )
