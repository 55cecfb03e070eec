"""From a model name or path to filled weights and what a tokenizer is built from."""

from nanoflow.loading.checkpoint import Checkpoint, open_checkpoint
from nanoflow.loading.loader import load_weights
from nanoflow.loading.ranks import RankStores

__all__ = ["Checkpoint", "RankStores", "load_weights", "open_checkpoint"]
