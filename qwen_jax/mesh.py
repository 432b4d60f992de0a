# SPDX-License-Identifier: Apache-2.0
"""The device mesh, the rules that lay dims on it, and the ops that change a layout.

The mesh has six Explicit axes, always all of them (size 1 costs nothing): `data`
(replicas), `fsdp` (replicas that split the weights' `embed` dim and gather it where it
is used), `tensor` (heads, ffn and vocabulary), `expert` (replicas, too, that split the
experts and exchange tokens), `context` (splits the tokens of a row, in training) and
`stage` (stretches of the layers, see `train.pipeline`). `Rules` maps a dim's name to
axes; a planner's result is another `Rules`.

Tokens lie in the order of `zigzag` where they are split, and attention and the linear
layers alone look beyond a device's own; what decodes keeps rows whole (`Rules.whole`).

Under Explicit axes a sharding is part of an array's type, so every change of layout is
written in the code. All of them go through this file (`einsum`, `gather`, `reshard`,
`take`, `local`), which is where a sharding error is looked for. With no mesh set (a
notebook, one device) each op is its plain twin.

TPU slices that train together share only a slow network: they lie along `data`, whole,
so that what crosses it is the sum of gradients. Stages hand on less than anything else
inside a slice: they lie farther apart than all axes but `data`.

Units: `MeshConfig` sizes are counts of devices; -1 (one axis at most) takes the rest.
Raises: config.InputError for sizes that do not multiply to the devices at hand, for
slices that do not divide `data`, and for rules that lay two dims of one array on one
axis.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax import config

AXES = ("data", "fsdp", "tensor", "expert", "context", "stage")
# Neighbours in the network are, of later axes before earlier ones, those that wait for
# what they send; keys that go round travel while a device computes, and stages send
# little.
PLACED = ("data", "stage", "fsdp", "context", "tensor", "expert")
CONTEXT_WAYS = ("ring", "gather")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 means whatever is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1
    stage: int = 1

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Devices along each of `AXES` for `num_devices`, with -1 filled in."""
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(-1) > 1 or any(n == 0 or n < -1 for n in sizes):
            raise config.InputError(
                f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, and "
                "at most one is -1 (the rest of the devices)"
            )
        if -1 in sizes:
            fixed = -math.prod(sizes)
            if num_devices % fixed:
                raise config.InputError(
                    f"mesh {dict(zip(AXES, sizes, strict=True))}: {num_devices} "
                    f"devices are not a multiple of {fixed}; change --config.mesh.*"
                )
            sizes[sizes.index(-1)] = num_devices // fixed
        return tuple(sizes)


def make(mesh: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all), Explicit axes as in `AXES`.

    Raises:
      config.InputError: when the sizes need more or fewer devices than there are, or
        `data` is no multiple of the TPU slices that the devices belong to.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh.sizes(len(devices))
    if math.prod(sizes) != len(devices):
        raise config.InputError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes)} "
            f"devices, {len(devices)} are here; set one of --config.mesh.data, .fsdp, "
            ".tensor to -1 to take the rest"
        )
    placed = [sizes[AXES.index(axis)] for axis in PLACED]
    try:
        array = _arranged(placed, devices)
    except NotImplementedError:  # no axes of the TPU's torus multiply to these sizes
        array = _arranged(placed, devices, allow_split_physical_axes=True)
    array = array.transpose([PLACED.index(axis) for axis in AXES])
    return Mesh(array, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _arranged(sizes: list[int], devices: list[Any], **split: bool) -> Any:
    """`devices` as an array of `sizes` (of `PLACED`), neighbours in the network side by
    side."""
    # The devices of a GPU run tell of slices, too, one for each host. Those may split
    # weights between them, and the order of devices keeps hosts together.
    on_tpu = devices[0].platform == "tpu"
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if on_tpu else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, **split)
    if sizes[0] % slices:
        raise config.InputError(
            f"mesh {dict(zip(PLACED, sizes, strict=True))}: data must be a multiple of "
            f"the {slices} TPU slices, between which the network is slow; set "
            "--config.mesh.data=-1 and let the other axes divide the "
            f"{len(devices) // slices} devices of one slice"
        )
    inner, outer = [sizes[0] // slices, *sizes[1:]], [slices, *(1 for _ in sizes[1:])]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **split)


Axes = str | tuple[str, ...] | None


def names(axes: Axes) -> tuple[str, ...]:
    """The mesh axes of a rule, as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes each dim lies on; None keeps the dim whole.

    `embed` concerns weights only: activations keep their width whole. `tokens` concerns
    activations only, and lies whole where its axes have one device, so that a mesh
    without context parallelism says nothing of it. `context_attention` tells how keys
    reach queries on other devices: see kernels/ring_attention.py.
    """

    batch: Axes = ("data", "fsdp", "expert")
    embed: Axes = "fsdp"
    heads: Axes = "tensor"
    kv_heads: Axes = "tensor"
    ffn: Axes = "tensor"
    vocab: Axes = "tensor"
    layers: Axes = None
    experts: Axes = "expert"
    tokens: Axes = "context"
    context_attention: str = "ring"

    def __post_init__(self):
        way = self.context_attention
        if way not in CONTEXT_WAYS:
            hint = config.nearest(way, CONTEXT_WAYS)
            raise ValueError(f"context_attention={way!r}{hint}")
        for field in dataclasses.fields(self):
            if field.name == "context_attention":
                continue
            for axis in names(getattr(self, field.name)):
                if axis not in AXES:
                    hint = config.nearest(axis, AXES)
                    raise ValueError(f"{field.name}={axis!r}{hint}")

    @property
    def whole(self) -> "Rules":
        """These rules with a row's tokens on one device."""
        return dataclasses.replace(self, tokens=None)

    @property
    def split(self) -> tuple[str, ...]:
        """The axes that a row's tokens are split over on the mesh that is set."""
        return names(self.tokens) if axis_size(self.tokens) > 1 else ()

    @property
    def spread(self) -> tuple[str, ...]:
        """The axes over which tokens differ: gradients of weights are summed over."""
        return names(self.batch) + self.split

    def pspec(self, *dims: str | None) -> P:
        """("batch", None, "ffn") -> P(("data", "fsdp", "expert"), None, "tensor")."""
        axes = [None if dim is None else self._axes(dim) for dim in dims]
        flat = [a for ax in axes if ax for a in ((ax,) if isinstance(ax, str) else ax)]
        if len(set(flat)) != len(flat):
            raise config.InputError(
                f"dims {dims} lie on one mesh axis twice: {axes}; change "
                "--config.rules.*"
            )
        return P(*axes)

    def _axes(self, dim: str) -> Axes:
        if dim == "tokens" and not self.split:
            return None
        return getattr(self, dim)

    def gathered(self, *dims: str | None) -> P:
        """The spec of a weight where it is used: `embed` whole, the rest as it lies."""
        return self.pspec(
            *(None if dim in ("embed", "layers") else dim for dim in dims)
        )


def active() -> bool:
    """Whether a mesh is set (`jax.set_mesh`) where this is traced."""
    return not jax.sharding.get_abstract_mesh().empty


def platform() -> str:
    """cpu, gpu or tpu: of the mesh that is set, which a dry run makes of devices that
    are not here; of JAX's own choice with no mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def axis_size(axes: Axes) -> int:
    """Number of devices along `axes` of the mesh that is set; 1 with no mesh."""
    if axes is None or not active():
        return 1
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in names(axes))


def reshard(x: jax.Array, spec: P) -> jax.Array:
    """`x` laid out as `spec`: a gather, a slice or an all-to-all, as it falls."""
    return jax.sharding.reshard(x, spec) if active() else x


def gather(
    w: jax.Array,
    rules: Rules,
    *dims: str | None,
    dtype: Any = None,
    reduce_dtype: str = "compute",
) -> jax.Array:
    """A weight where it is used: in `dtype` (None: its own), `embed` whole, the rest as
    it lies.

    Its gradient is scattered back over the axes of `embed`, one after another, then
    summed over the other axes of the batch and of tokens. Left alone, the partitioner
    sums the whole gradient on every device and slices it: twice the traffic. One axis
    at a time, since TPUs scatter along a ring of chips but sum when the axis is a whole
    2-D slice.

    What crosses the axes is each device's part of the gradient, which its product has
    rounded to `dtype`. With "compute" the parts are summed in `dtype`, and only the sum
    takes the dtype of the weight: with bfloat16, half the traffic and a rounding at
    each addition. With "float32" they are widened before they are sent.
    """
    spread, embed = rules.spread, names(rules.embed)
    dtype = dtype or w.dtype
    alone = axis_size(spread) == 1 or nested()
    if alone or not set(embed) <= set(spread):
        return reshard(w.astype(dtype), rules.gathered(*dims))
    wide = (
        dtype if reduce_dtype == "compute" else jnp.promote_types(dtype, reduce_dtype)
    )
    return _gather(w, rules, dims, (dtype, wide, w.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(w, rules, dims, dtypes):
    spec = P(*rules.gathered(*dims), reduced=set(rules.spread))
    return jax.sharding.reshard(w.astype(dtypes[0]), spec)


def _gather_bwd(rules, dims, dtypes, _, grad):
    spread, embed = rules.spread, names(rules.embed)

    def scatter(g):
        for i in (i for i, dim in enumerate(dims) if dim == "embed"):
            for axis in embed:
                g = jax.lax.psum_scatter(g, axis, scatter_dimension=i, tiled=True)
        rest = set(spread) - set(embed if "embed" in dims else ())
        return jax.lax.psum(g, tuple(a for a in spread if a in rest)) if rest else g

    spec = P(*rules.gathered(*dims), unreduced=set(spread))
    run = local(scatter, inputs=spec, out=rules.pspec(*dims))
    _, wide, own = dtypes
    return (run(grad.astype(wide)).astype(own),)


_gather.defvjp(lambda w, *how: (_gather(w, *how), None), _gather_bwd)


def einsum(subscripts: str, *operands: jax.Array, out: P, **kwargs) -> jax.Array:
    """jnp.einsum whose result is laid out as `out`; a contraction over a sharded dim
    becomes a reduction over its axis."""
    if active():
        kwargs["out_sharding"] = out
    return jnp.einsum(subscripts, *operands, **kwargs)


@struct.dataclass
class Turned:
    """A weight [*i, *o] that lies as x [*o, *i], for `product` where no mesh is set.

    A CPU decodes faster so: 24 pairs of products of 512 and 1,536 take 12.9 ms instead
    of 20.8 with 8 rows, 6.9 instead of 8.8 with one, and no longer with 256.
    """

    x: jax.Array

    @property
    def ndim(self) -> int:
        return self.x.ndim

    @property
    def dtype(self) -> Any:
        return self.x.dtype

    def astype(self, dtype: Any) -> "Turned":
        return Turned(self.x.astype(dtype))


def turned(w: jax.Array, inner: int) -> Turned:
    """A weight [*i, *o] as `Turned`; `inner` counts the dims in i."""
    return Turned(w.transpose(*range(inner, w.ndim), *range(inner)))


def product(
    x: jax.Array, w: jax.Array | Turned, *, inner: int = 1, out: P
) -> jax.Array:
    """x [b, t, *i] times w [*i, *o] -> [b, t, *o] as ONE product of two matrices.

    `inner` counts the dims in i. Rows and tokens are merged first: the gradient of an
    einsum with both is a product over two dims, for which XLA on a CPU writes out a
    transposed copy of the activations (measured: 12-30 % of a training step).
    """
    rows = x.shape[0] * x.shape[1]
    if isinstance(w, Turned):
        new, width = w.x.shape[: w.ndim - inner], math.prod(x.shape[2:])
        w_oi, flat = w.x.reshape(-1, width), x.reshape(rows, width)
        if platform() == "cpu":
            y = (w_oi @ flat.T).T
        elif rows == 1 and (one := _one_row()).there(x.dtype):
            y = one.product(w_oi, flat[0])
        else:
            y = jax.lax.dot_general(flat, w_oi, (((1,), (1,)), ((), ())))
        return y.reshape(*x.shape[:2], *new)
    width, new = math.prod(w.shape[:inner]), w.shape[inner:]
    if out[1] is not None:
        # Rows and tokens that both lie split have no one dim to be merged in.
        return _unmerged(x, w, width, new, out)
    flat = _merged(x, (rows, width), (0, 2))
    w = _merged(w, (width, math.prod(new)), (0, inner))
    if not active():
        return (flat @ w).reshape(*x.shape[:2], *new)
    y = jnp.einsum("md,df->mf", flat, w, out_sharding=P(out[0], out[2]))
    return jax.lax.reshape(y, (*x.shape[:2], *new), out_sharding=out)


def _unmerged(x, w, width, new, out):
    """`product` of tokens that are split, over three dims."""
    x = _merged(x, (*x.shape[:2], width), (0, 1, 2))
    w = _merged(w, (width, math.prod(new)), (0, w.ndim - len(new)))
    y = jnp.einsum("btd,df->btf", x, w, out_sharding=P(*out[:3]))
    return jax.lax.reshape(y, (*x.shape[:2], *new), out_sharding=out)


def _one_row():
    from qwen_jax import one_row  # Pallas takes a while to import

    return one_row


def _merged(x: jax.Array, shape: tuple[int, ...], first: tuple[int, ...]) -> jax.Array:
    """`x` with neighbouring dims merged; the merged dim lies as its first dim did."""
    if x.shape == shape:
        return x
    if not active():
        return x.reshape(shape)
    spec = jax.typeof(x).sharding.spec
    lies = tuple(spec.partitions[i] for i in first)
    spec = P(*lies, reduced=spec.reduced)
    return jax.lax.reshape(x, shape, out_sharding=spec)


def split_first(x: jax.Array, *sizes: int) -> jax.Array:
    """`x` with its first dim, which lies whole, cut in several."""
    shape = (*sizes, *x.shape[1:])
    if not active():
        return x.reshape(shape)
    spec = jax.typeof(x).sharding.spec
    lies = P(*(None for _ in sizes), *spec[1:])
    return jax.lax.reshape(x, shape, out_sharding=lies)


def join_first(x: jax.Array) -> jax.Array:
    """`x` with its first two dims, which lie whole, made one; the rest as it lies."""
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    if not active():
        return x.reshape(shape)
    lies = P(None, *jax.typeof(x).sharding.spec[2:])
    return jax.lax.reshape(x, shape, out_sharding=lies)


def take(table_vd: jax.Array, ids_bt: jax.Array, rules: Rules) -> jax.Array:
    """Rows of an embedding table: [v, d], [b, t] -> [b, t, d] laid out by batch.

    The table stays split: each device looks up its slice of the width for the rows of
    its whole fsdp group, and one all-to-all turns slices of width into slices of batch.
    The traffic is activations, never the table.
    """
    if not active():
        return table_vd[ids_bt]
    width = names(rules.embed)
    rows, tokens = (
        tuple(axis for axis in axes if axis not in width) or None
        for axes in (names(rules.batch), rules.split)
    )
    ids_bt = reshard(ids_bt, P(rows, tokens))
    table_vd = reshard(table_vd, P(None, width or None))
    x_btd = table_vd.at[ids_bt].get(out_sharding=P(rows, tokens, width or None))
    return reshard(x_btd, rules.pspec("batch", "tokens", None))


def zigzag(t: int, ways: int) -> np.ndarray:
    """Places of a row's t tokens in the order that splits them over `ways` devices.

    A row is cut in 2 * ways pieces; device i has pieces i and 2 * ways - 1 - i, so that
    under a causal mask all have the same work. x[:, zigzag(t, ways)] is what is laid on
    the mesh, and np.argsort of it the way back.
    """
    if ways == 1:
        return np.arange(t)
    if t % (2 * ways):
        raise config.InputError(
            f"rows of {t} tokens over {ways} devices (mesh.context): wanted a multiple "
            f"of {2 * ways}; the nearest is {max(t // (2 * ways), 1) * 2 * ways}"
        )
    pieces = np.arange(t).reshape(2 * ways, -1)
    return np.stack([pieces[:ways], pieces[: ways - 1 : -1]], axis=1).reshape(-1)


def local(fn: Callable, *, inputs: Any, out: Any, checked: bool = True) -> Callable:
    """`fn` run on each device's own block (shard_map); plain `fn` with no mesh set.

    `checked` has JAX prove over which axes results differ; a kernel that does not say
    so of its own outputs must do without.
    """
    if not active():
        return fn
    here = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        fn,
        axis_names=set(here.axis_names) - set(here.manual_axes),
        in_specs=inputs,
        out_specs=out,
        check_vma=checked and not nested(),
    )


def nested() -> bool:
    """Whether this is inside a stage of a pipeline, where `local` proves nothing.

    JAX (0.10.2) cannot differentiate a checked shard_map inside another: residuals get
    a dim for each axis that they differ over, those of the outer one among them. In one
    that is not checked, the cotangent of a result that is the same along an axis comes
    in equal parts to the devices along it.
    """
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def staged(fn: Callable, *, inputs: Any, out: Any) -> Callable:
    """`fn` run by each stage of a pipeline: `inputs` and `out` name the axis `stage`
    alone; inside, the others are as they are outside. Wants a mesh that is set."""
    return jax.shard_map(
        fn, axis_names={"stage"}, in_specs=inputs, out_specs=out, check_vma=False
    )


def varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which `x` differs, inside `local`; empty elsewhere."""
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(getattr(kind, "vma", ()))


def vary(x: jax.Array, axes: frozenset[str] | tuple[str, ...]) -> jax.Array:
    """`x` marked, inside `local`, as varying over `axes`: its cotangent is summed over
    those it did not vary over before, once."""
    missing = tuple(sorted(set(axes) - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def sharding(mesh: Mesh, spec: P) -> NamedSharding:
    """NamedSharding of `spec` on `mesh`."""
    return NamedSharding(mesh, spec)
