"""Networks of Hugging Face transformers, from a local folder or configuration."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import nn

from niwaki.errors import FileDamagedError, InputError, MissingExtraError, UnknownNameError
from niwaki.models import Built, ModelSource
from niwaki.models.hf_inputs import example_for

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@final
@dataclass(frozen=True)
class HuggingFace(ModelSource):
    """`hf:FOLDER` (config.json and, if there are any, weights) or `hf:FILE.json`; arguments change the configuration.

    The class is the one the configuration names in `architectures`, otherwise the base model of its type. Only classes
    of transformers itself: code that comes with a model is never run, and nothing is downloaded.

    Raises:
        InputError: no such place, a configuration that transformers does not know, or one whose code is elsewhere.
        FileDamagedError: configuration or weights that cannot be read, or weights that do not fill the model.
        MissingExtraError: transformers is not installed.
    """

    def build(self, *, stored: bool) -> Built:
        try:
            import transformers
        except ImportError as cause:
            do = 'pip install "niwaki[llm]"'
            raise MissingExtraError("hf: models need transformers", do=do) from cause
        place = Path(self.name).expanduser()
        file = place / "config.json" if place.is_dir() else place
        config, kind = self._config(transformers, file)
        has_weights = place.is_dir() and any((place / name).exists() for name in WEIGHTS)
        if stored and has_weights:
            model = self._stored(transformers, kind, place, config)
        else:
            try:
                model = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
            except Exception as cause:  # whatever a configuration can break
                raise self._refused(file, f"{type(cause).__name__}: {cause}") from cause
        model = model.eval()
        return Built(
            model, example_for(model, self.shape, f"hf:{self.name}"), _normalisation(place), stored and has_weights
        )

    def _config(self, transformers: Any, file: Path) -> tuple[Any, Any]:
        """The configuration object and the model class."""
        if not file.is_file():
            do = "name a folder with a config.json, or such a file; niwaki never downloads"
            raise InputError(f"model hf:{self.name}", found="no configuration", where=str(file), do=do)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            kind = values.pop("model_type", None)
            remote = values.pop("auto_map", None)
        except (OSError, ValueError, AttributeError, TypeError) as cause:
            do = "give the JSON object that transformers wrote"
            raise FileDamagedError("read a configuration", found=str(cause), where=str(file), do=do) from cause
        if kind not in transformers.CONFIG_MAPPING:
            known = "its code is elsewhere and is never run" if remote else "transformers does not know it"
            raise self._refused(file, f"model_type {kind!r}: {known}")
        if unknown := sorted(set(self.arguments) - set(values) - set(vars(transformers.CONFIG_MAPPING[kind]()))):
            raise UnknownNameError.of(f"setting of {kind}", unknown[0], sorted(values))
        try:
            config = transformers.AutoConfig.for_model(kind, **{**values, **self.arguments})
        except Exception as cause:
            raise self._refused(file, f"{type(cause).__name__}: {cause}") from cause
        for name in config.architectures or ():
            if isinstance(found := getattr(transformers, name, None), type) and issubclass(found, nn.Module):
                return config, found
        return config, transformers.AutoModel

    def _stored(self, transformers: Any, kind: Any, folder: Path, config: Any) -> nn.Module:
        try:
            with no_progress_bars(transformers):
                model, facts = kind.from_pretrained(
                    folder, config=config, local_files_only=True, output_loading_info=True, trust_remote_code=False
                )
        except Exception as cause:  # safetensors, torch and transformers each have their own
            found, do = f"{type(cause).__name__}: {cause}", "get the files again"
            raise FileDamagedError("read stored weights", found=found, where=str(folder), do=do) from cause
        if missing := sorted(facts["missing_keys"]):
            do = "use a folder with all weights, or one without weights"
            found = f"{len(missing)} tensors missing, such as {missing[0]}"
            raise FileDamagedError("read stored weights", found=found, where=str(folder), do=do)
        return model

    def _refused(self, file: Path, found: str) -> InputError:
        do = "give a configuration of a model that is part of the installed transformers"
        return InputError(f"model hf:{self.name}", found=found, where=str(file), do=do)


@contextmanager
def no_progress_bars(transformers: Any) -> Iterator[None]:
    """Inside, transformers draws no progress bars; afterwards it does as before."""
    logging = transformers.utils.logging
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _normalisation(place: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) of the picture processor that is stored beside a model."""
    file = place / "preprocessor_config.json"
    if not place.is_dir() or not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return tuple(map(float, values["image_mean"])), tuple(map(float, values["image_std"]))
    except (ValueError, KeyError, TypeError):
        return None  # a processor of something else, sound for example
