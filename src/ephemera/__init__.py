"""Ephemera: an adapter for every prompt, gone after the answer."""

from ephemera.inits import ZeroInit
from ephemera.lora import LoraBatch
from ephemera.model import Adaptation, AdaptiveLM
from ephemera.rates import AveragedRate, FixedRate, ScaleNet, load_rate

__version__ = "0.1.0"
__all__ = ["Adaptation", "AdaptiveLM", "AveragedRate", "FixedRate", "LoraBatch", "ScaleNet", "ZeroInit", "load_rate"]
