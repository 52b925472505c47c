"""TransMLA: from a pretrained GQA model to DeepSeek-style multi-head latent attention.

Importing the package registers the student classes with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained` loads a converted or recovered directory.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from transmla.families import FAMILIES

__version__ = "0.1.0"

for _family in FAMILIES.values():
    AutoConfig.register(_family.student_config.model_type, _family.student_config, exist_ok=True)
    AutoModelForCausalLM.register(_family.student_config, _family.student_model, exist_ok=True)
