"""AutoConfig knows the model type of fusedacl, without importing transformers before it is used.

transformers is imported in seconds. AutoConfig gets a stand-in as soon as it exists; the stand-in
imports the model when a configuration is made, and the model registers itself for the AutoClasses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register the model type now, or when AutoConfig is imported."""
    if _AUTO_CONFIG in sys.modules:
        _register_stand_in(sys.modules[_AUTO_CONFIG].AutoConfig)
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Adds the registration to the end of AutoConfig's module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _AUTO_CONFIG:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_stand_in(module.AutoConfig)

        loader.exec_module = execute_and_register
        return spec


def _register_stand_in(auto_config: Any) -> None:
    from transformers.configuration_utils import PretrainedConfig

    class MultiExitConfig(PretrainedConfig):
        """Stands in for the class of this name, to which every use of it is passed on."""

        model_type = "fusedacl_multi_exit"

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return _config_class()(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return _config_class().from_dict(config_dict, **kwargs)

    auto_config.register(MultiExitConfig.model_type, MultiExitConfig)


def _config_class() -> Any:
    return import_module(".multi_exit", __package__).MultiExitConfig
