"""The pipeline's independent oracle: the same functions without a pipeline.

Plain loops over microbatches and stages and one `jax.value_and_grad`; no schedule, no
collective, no slot. Signatures are those of `dualpipe_jax.executor.pipeline`.
"""

import jax
import jax.numpy as jnp


def _forward(stage_fn, embed_fn, params, inputs, num_stages):
    x = inputs if embed_fn is None else embed_fn(params.embed, inputs)
    for stage in range(num_stages):
        x = stage_fn(jax.tree.map(lambda leaf, s=stage: leaf[s], params.stages), x)
    return x


def reference_value_and_grad(stage_fn, loss_fn, *, schedule, embed_fn=None, **_):
    """What `pipeline_value_and_grad` must return; the mesh is not used."""

    def loss_of_all(params, inputs, targets):
        losses = []
        for m in range(schedule.num_microbatches):
            inputs_m, targets_m = jax.tree.map(lambda a, m=m: a[m], (inputs, targets))
            y = _forward(stage_fn, embed_fn, params, inputs_m, schedule.num_stages)
            losses.append(loss_fn(params.head, y, targets_m))
        losses = jnp.stack(losses)
        return losses.mean(), losses

    def step(params, inputs, targets):
        grads, losses = jax.grad(loss_of_all, has_aux=True)(params, inputs, targets)
        return (losses, None), grads

    return step


def reference_forward(stage_fn, *, schedule, embed_fn=None, **_):
    """What `pipeline_forward` must return; the mesh is not used."""

    def forward(params, inputs):
        outputs = [
            _forward(
                stage_fn,
                embed_fn,
                params,
                jax.tree.map(lambda a, m=m: a[m], inputs),
                schedule.num_stages,
            )
            for m in range(schedule.num_microbatches)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    return forward
