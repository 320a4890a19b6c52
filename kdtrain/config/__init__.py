"""The configuration of a run: schema, checks and YAML recipes.

It never imports torch, so that the command line starts fast.
"""

from kdtrain.config.fields import ConfigError
from kdtrain.config.networks import HeadConfig, ModelConfig
from kdtrain.config.schema import (
    RUN_SETTINGS,
    SETTINGS,
    AugmentConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimConfig,
    Phase,
    TrainConfig,
    TripletConfig,
    named_runs,
    run_folder,
)
from kdtrain.config.settings import build, read_recipe
from kdtrain.config.target import TARGETS, TargetConfig, TeacherConfig

__all__ = [
    "RUN_SETTINGS",
    "SETTINGS",
    "TARGETS",
    "AugmentConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "HeadConfig",
    "ModelConfig",
    "OptimConfig",
    "Phase",
    "TargetConfig",
    "TeacherConfig",
    "TrainConfig",
    "TripletConfig",
    "build",
    "named_runs",
    "read_recipe",
    "run_folder",
]
