"""From a recipe to the geometry: what it leaves open (`auto`) is filled in first."""

from __future__ import annotations

from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.geometry.mla_geometry import MLAGeometry, derive_with, head_dimension
from transmla.recipe.schema import Convert


def derive_geometry(config: PretrainedConfig, convert: Convert, freqfold: tuple[int, ...] | None = None) -> MLAGeometry:
    """Derive and check every dimension.

    Args:
        config: configuration of the source model.
        convert: the recipe's section.
        freqfold: one a layer, found by a search.

    Raises:
        RecipeError: a rank above what the model has, a rope dimension that is odd or above the head dimension, a
            collapse whose channels the head does not have, a freqfold that collapse does not divide, latents that
            heads or rank cannot be shared among.

    What is still `auto` gets a provisional value: the first of `candidates`, and one channel a band.
    """
    if "auto" in (convert.qk_rope_head_dim, convert.kv_lora_rank, convert.collapse):
        convert = candidates(config, convert)[0]
    return derive_with(config, convert, freqfold)


def candidates(config: PretrainedConfig, convert: Convert) -> list[Convert]:
    """All settings with dimensions and collapse filled in where they are `auto`, as far as the source allows them.

    Raises:
        RecipeError: there is none.
    """
    dim, values = head_dimension(config), convert.cached_values
    rope, latent = convert.qk_rope_head_dim, convert.kv_lora_rank
    if rope != "auto":
        ropes = [rope]
    elif latent != "auto":
        assert values is not None, "a recipe with one of them auto gives their sum"
        ropes = [values - latent]
    else:
        ropes = [n for n in range(min(8, dim), dim + 1, 2) if dim % n == 0]
    found, reason = [], None
    for rope in sorted(ropes, key=lambda n: abs(n - dim // 2)):
        if latent == "auto":
            assert values is not None, "a recipe with one of them auto gives their sum"
            rank = values - rope
        else:
            rank = latent
        most = max(1, dim // rope) if rope > 0 else 1
        for collapse in range(most, max(0, most - 3), -1) if convert.collapse == "auto" else [convert.collapse]:
            option = convert.model_copy(update={"qk_rope_head_dim": rope, "kv_lora_rank": rank, "collapse": collapse})
            try:
                if rope < 2 or rank < 1:
                    raise RecipeError(
                        "convert.cached_values", f"{values} is too little for rope {rope} + latent {rank}"
                    )
                derive_with(config, option, None)
            except RecipeError as error:
                reason = reason or error
            else:
                found.append(option)
    if not found:
        raise reason if reason is not None else RecipeError("convert.cached_values", f"{values} fits no rope head")
    return found
