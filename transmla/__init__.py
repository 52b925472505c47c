"""TransMLA: from a pretrained GQA model to DeepSeek-style multi-head latent attention.

Importing the package registers the student classes with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained` loads a converted or recovered directory.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from transmla.families import FAMILIES

__version__ = "0.1.0"

for _family in FAMILIES.values():
    for _config, _model in (
        (_family.student_config, _family.student_model),
        (_family.source_config, _family.source_model),
    ):
        if _config is not None:
            AutoConfig.register(_config.model_type, _config, exist_ok=True)
            AutoModelForCausalLM.register(_config, _model, exist_ok=True)
