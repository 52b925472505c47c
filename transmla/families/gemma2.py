"""Gemma 2: soft-capped attention logits, a window in every other layer, a scale of its own.

Norms around both blocks, GeGLU and the cap on the final logits belong to the trunk, which the student keeps.
"""

from transformers import Gemma2Config, PretrainedConfig

from transmla.families.family import NO_PLAN, Family


class MLAGemma2Config(Gemma2Config):
    """Gemma 2's configuration with MLA's dimensions."""

    model_type = "mla_gemma2"
    base_model_tp_plan = NO_PLAN


def refuse_bidirectional(config: PretrainedConfig) -> str | None:
    """Gemma models that were trained as encoders."""
    if config.use_bidirectional_attention:
        return "attention in both directions is not supported; use a causal model"
    return None


GEMMA2 = Family(
    model_type="gemma2",
    student_config=MLAGemma2Config,
    architecture="MLAGemma2ForCausalLM",
    qkv_bias=lambda config: config.attention_bias,
    output_bias=lambda config: config.attention_bias,
    refuse=refuse_bidirectional,
    inexpressible=lambda config: (
        "Gemma 2's trunk (norms behind each block, GeGLU, soft-capped logits) is not DeepSeek's"
    ),
    kernel="eager",  # PyTorch's fused attention has no cap on the logits
    plain_residual=False,
)
