"""A model's configuration through a stage: trl and transformers write their own special tokens into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def unchanged_configuration(*models: PreTrainedModel | None) -> Iterator[None]:
    """Models leave with the configuration and the generation configuration that they came with.

    What a stage saves is then the source's: its end token stops text, and its padding token alone (where it names one)
    is the row of the embedding that no gradient reaches, whichever stages ran before.
    """
    kept = []
    for model in models:
        if model is not None:
            kept.append((model, copy.deepcopy(vars(model.config)), model.generation_config))
            model.generation_config = copy.deepcopy(model.generation_config)
    try:
        yield
    finally:
        for model, fields, generation in kept:
            model.generation_config = generation
            own = vars(model.config)
            for name in set(own) - set(fields):
                del own[name]
            own.update({name: value for name, value in fields.items() if name not in own or own[name] != value})
