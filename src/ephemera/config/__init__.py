"""The one source of settings: YAML files, `--set`, `--help` and saved runs all derive from these models."""

from ephemera.config.base import (
    DataSettings,
    LoraSettings,
    MixtureSettings,
    MixtureTask,
    ModelSettings,
    fill,
    source_of,
)
from ephemera.config.evaluate import METHODS, Analyse, Benchmark, BenchmarkData, Evaluate, Method, Survey, Variant
from ephemera.config.settings import Settings, check_config, dump_yaml, load_config
from ephemera.config.train import (
    AloneSettings,
    GeneratorSettings,
    JointSettings,
    ObjectiveSettings,
    OptimizerSettings,
    ScaleNetSettings,
    TrainGate,
    TrainGenerator,
    TrainLens,
    TrainScaleNet,
    TrainTaskLora,
)

__all__ = [
    "METHODS",
    "AloneSettings",
    "Analyse",
    "Benchmark",
    "BenchmarkData",
    "DataSettings",
    "Evaluate",
    "GeneratorSettings",
    "JointSettings",
    "LoraSettings",
    "Method",
    "MixtureSettings",
    "MixtureTask",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "ScaleNetSettings",
    "Settings",
    "Survey",
    "TrainGate",
    "TrainGenerator",
    "TrainLens",
    "TrainScaleNet",
    "TrainTaskLora",
    "Variant",
    "check_config",
    "dump_yaml",
    "fill",
    "load_config",
    "source_of",
]
