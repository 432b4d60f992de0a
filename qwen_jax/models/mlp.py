# SPDX-License-Identifier: Apache-2.0
"""SwiGLU feed-forward (arXiv 2002.05202): y = (silu(x Wg) * (x Wu)) Wd.

Shapes: x_btd -> y_btd; weights gate_df, up_df, down_fd, stacked by layer with `l` in
front. The ffn dim lies on the `tensor` axis: the last product is reduced over it.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from qwen_jax import mesh
from qwen_jax.models import spec as spec_lib
from qwen_jax.params import Param, normal


def mlp_params(
    spec: spec_lib.Spec, layers: int, ffn_width: int | None = None
) -> dict[str, Param]:
    """Weights of `layers` feed-forward blocks, stacked."""
    d, f = spec.width, ffn_width or spec.ffn_width
    init = normal(spec.init_std)
    return {
        "gate_ldf": Param((layers, d, f), ("layers", "embed", "ffn"), init),
        "up_ldf": Param((layers, d, f), ("layers", "embed", "ffn"), init),
        "down_lfd": Param((layers, f, d), ("layers", "ffn", "embed"), init),
    }


def mlp(
    p: dict[str, jax.Array], x_btd: jax.Array, spec: spec_lib.Spec, rules: mesh.Rules
) -> jax.Array:
    """One layer's feed-forward; `p` has one layer's weights."""
    how = {"dtype": x_btd.dtype, "reduce_dtype": spec.reduce_dtype}
    inner = rules.pspec("batch", "tokens", "ffn")
    gate_df = mesh.gather(p["gate_ldf"], rules, "embed", "ffn", **how)
    up_df = mesh.gather(p["up_ldf"], rules, "embed", "ffn", **how)
    down_fd = mesh.gather(p["down_lfd"], rules, "ffn", "embed", **how)
    gate_btf = mesh.product(x_btd, gate_df, out=inner)
    up_btf = mesh.product(x_btd, up_df, out=inner)
    gate_btf = checkpoint_name(gate_btf, "mlp_gate")
    up_btf = checkpoint_name(up_btf, "mlp_up")

    # Autodiff would keep four arrays of [b, t, f] beside gate and up, all of them cheap
    # to compute again: a tenth of a step's time on a CPU goes into storing them.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def rest(gate_btf, up_btf, down_fd):
        hidden_btf = jax.nn.silu(gate_btf) * up_btf
        return mesh.product(
            hidden_btf, down_fd, out=rules.pspec("batch", "tokens", None)
        )

    return rest(gate_btf, up_btf, down_fd)
