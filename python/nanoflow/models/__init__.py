"""Model families: from a Hugging Face config to dimensions, traits and weight names."""

from nanoflow.models.config import CheckpointWeight, ModelConfig, WeightTarget
from nanoflow.models.registry import ModelAdapter, model_adapter, supported_architectures

__all__ = [
    "CheckpointWeight",
    "ModelAdapter",
    "ModelConfig",
    "WeightTarget",
    "model_adapter",
    "supported_architectures",
]
