"""TransMLA: from a pretrained GQA model to DeepSeek-style multi-head latent attention.

Importing the package makes `AutoModelForCausalLM.from_pretrained` load a converted or recovered directory. The classes
themselves are registered when transformers' Auto classes are first asked (transmla.registration), so that the import
costs nothing.
"""

from transmla.registration import register_when_asked

__version__ = "0.1.0"

register_when_asked()
