"""Interpretability of a trained model: activations, attention, logit lens and interventions.

    seen = probe.observe(model, tokens, capture=("attention", "residual"))
    seen.captured["attention"]  # [L, B, N, T, S]

Hook points and their axes are in `gptjax.layers.hooks`: L layers, B batch, T query positions, S key
positions, N heads, H head dim, D width of the residual stream, F MLP dim, V vocabulary.
"""

from gptjax.layers.hooks import Intervention, hook_points
from gptjax.probe.heads import (
    HeadScores,
    entropy,
    head_scores,
    mean_distance,
    repeated_sequences,
    rollout,
)
from gptjax.probe.interventions import (
    ablate_heads,
    ablate_mlp,
    add,
    patch_heads,
    patch_positions,
    replace,
    replace_each,
    where,
    zero,
)
from gptjax.probe.logits import Attribution, attribution, logit_lens, token_loss
from gptjax.probe.observation import Activations, observe
from gptjax.probe.over_training import history
from gptjax.probe.weights import TopAttention, attention, by_word

__all__ = [
    "Activations",
    "Attribution",
    "HeadScores",
    "Intervention",
    "TopAttention",
    "ablate_heads",
    "ablate_mlp",
    "add",
    "attention",
    "attribution",
    "by_word",
    "entropy",
    "head_scores",
    "history",
    "hook_points",
    "logit_lens",
    "mean_distance",
    "observe",
    "patch_heads",
    "patch_positions",
    "repeated_sequences",
    "replace",
    "replace_each",
    "rollout",
    "token_loss",
    "where",
    "zero",
]
