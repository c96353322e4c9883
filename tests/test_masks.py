import copy
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import trees
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_close

import xnor_jax as xnor


def selected_paths(mask):
    """The paths that a mask selects, as `a/b/kernel`."""
    return {
        xnor.masks.path_string(path)
        for path, selected in jax.tree.leaves_with_path(mask)
        if selected
    }


def linear():
    return nnx.Linear(2, 2, rngs=nnx.Rngs(0))


class Named(nnx.Module):
    def __init__(self, *names):
        for name in names:
            setattr(self, name, linear())


def kernels(*names):
    return {f"{name}/kernel" for name in names}


def test_layer_order_is_definition_order_beyond_ten_layers():
    names = [f"conv{i}" for i in range(1, 12)]
    assert selected_paths(xnor.inner_kernels(Named(*names))) == kernels(*names[1:-1])


@given(st.permutations(["conv1", "conv2", "conv10", "Dense", "a", "head", "z"]))
def test_layer_order_is_definition_order_for_any_names(names):
    assert selected_paths(xnor.inner_kernels(Named(*names))) == kernels(*names[1:-1])


class Containers(nnx.Module):
    def __init__(self):
        self.stem = linear()
        for i in range(1, 12):
            setattr(self, f"conv{i}", linear())
        self.z = nnx.Dict(y=linear(), x=linear())
        self.body = nnx.List([nnx.Sequential(linear(), linear()), Named("q", "b")])
        self.a = nnx.Dict(tail=linear(), head=linear())


REBUILDS = {
    "merge": lambda model: nnx.merge(*nnx.split(model)),
    "clone": nnx.clone,
    "deepcopy": copy.deepcopy,
    "eval_shape": lambda model: nnx.eval_shape(Containers),
    "jit": lambda model: nnx.jit(Containers)(),
}


@pytest.mark.parametrize("rebuild", REBUILDS)
def test_rebuilt_models_keep_the_mask(rebuild):
    # Flax sorts the attributes of rebuilt modules.
    model = Containers()
    expected = selected_paths(xnor.inner_kernels(model))
    assert len(expected) == 20 - 2
    rebuilt = REBUILDS[rebuild](model)
    assert selected_paths(xnor.inner_kernels(rebuilt)) == expected


@pytest.mark.parametrize("rebuild", [lambda model: model, nnx.clone])
def test_a_plain_dict_of_modules_is_refused(rebuild):
    # JAX sorts a dict's keys: a rebuild loses the order of definition, and the wrong
    # kernels would be selected silently.
    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.data({name: linear() for name in ("b", "z", "a", "c")})

    with pytest.raises(ValueError, match=r"plain dict of modules \(.*use nnx.Dict"):
        xnor.inner_kernels(rebuild(Net()))


@pytest.mark.parametrize("container", ["List", "Sequential"])
def test_container_items_keep_their_order_beyond_ten(container):
    class Net(nnx.Module):
        def __init__(self):
            self.zeroth = linear()
            items = [linear() for _ in range(12)]
            if container == "List":
                self.body = nnx.List(items)
            else:
                self.body = nnx.Sequential(*items, nnx.relu)

    prefix = "body" if container == "List" else "body/layers"
    expected = kernels(*(f"{prefix}/{i}" for i in range(11)))
    assert selected_paths(xnor.inner_kernels(Net())) == expected


def test_sequential_is_accepted_as_a_model():
    model = nnx.Sequential(*(linear() for _ in range(12)))
    expected = kernels(*(f"layers/{i}" for i in range(1, 11)))
    assert selected_paths(xnor.inner_kernels(model)) == expected


def test_nested_containers_keep_definition_order():
    convs = [f"conv{i}" for i in range(1, 12)]
    body = ["body/0/layers/0", "body/0/layers/1", "body/1/q", "body/1/b"]
    inner = kernels(*convs, "z/y", "z/x", *body, "a/tail")
    assert selected_paths(xnor.inner_kernels(Containers())) == inner


def test_shared_module_counts_at_its_first_definition():
    class Net(nnx.Module):
        def __init__(self):
            shared = linear()
            self.b = linear()
            self.z = shared  # the tree's order reaches it first as `a`
            self.c = linear()
            self.d = linear()
            self.a = shared

    model = Net()
    mask = xnor.inner_kernels(model)
    # Second of four in order of definition, so inner, whatever its path in the state.
    assert selected_paths(mask) == kernels("a", "c")
    assert jax.tree.structure(mask) == jax.tree.structure(nnx.state(model, nnx.Param))


def test_self_referencing_module_terminates():
    class Loop(Named):
        def __init__(self):
            super().__init__("a", "b", "c")
            self.me = self

    assert selected_paths(xnor.inner_kernels(Loop())) == kernels("b")


def test_only_conv_and_dense_kernels_are_selected():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.first = nnx.Conv(2, 4, (3,), rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.middle = nnx.ConvTranspose(4, 4, (3, 3), rngs=rngs)
            self.last = nnx.Linear(4, 2, rngs=rngs)
            self.kernel = nnx.Param(jnp.ones(3))  # rank 1: not a kernel
            self.weight = nnx.Param(jnp.ones((3, 3)))
            self.size = 3

    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    mask = xnor.inner_kernels(model)
    assert selected_paths(mask) == kernels("middle")
    assert jax.tree.structure(mask) == jax.tree.structure(nnx.state(model, nnx.Param))


class Middle(nnx.Module):
    """A layer between two dense ones."""

    def __init__(self, make):
        self.first = linear()
        self.middle = make(nnx.Rngs(0))
        self.last = linear()


def middle_kernels(make):
    """The inner kernels of a `Middle` whose middle layer is built by `make`."""
    return selected_paths(xnor.inner_kernels(Middle(make)))


class CustomDense(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(rngs.params.normal((3, 5)))


class CustomDenseOfKnownRank(CustomDense):
    kernel_rank = 2


KNOWN_LAYOUTS = {
    "BinaryConv": lambda rngs: xnor.nn.BinaryConv(2, 4, (3, 3), rngs=rngs),
    "BinaryLinear": lambda rngs: xnor.nn.BinaryLinear(2, 4, rngs=rngs),
    "grouped": lambda rngs: nnx.Conv(4, 4, 3, feature_group_count=2, rngs=rngs),
    "transposed": lambda rngs: nnx.ConvTranspose(2, 4, (3, 3), rngs=rngs),
    "general": lambda rngs: nnx.LinearGeneral(2, 4, rngs=rngs),
    "LoRALinear": lambda rngs: nnx.LoRALinear(2, 4, lora_rank=1, rngs=rngs),
    "own": CustomDenseOfKnownRank,
}


@pytest.mark.parametrize("name", KNOWN_LAYOUTS)
def test_layers_with_known_layouts_are_selected(name):
    assert middle_kernels(KNOWN_LAYOUTS[name]) == {"middle/kernel"}


UNKNOWN_LAYOUTS = {
    "query": lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
    "several axes": lambda rngs: nnx.LinearGeneral(2, (3, 4), rngs=rngs),
    "batch axis": lambda rngs: nnx.LinearGeneral(2, 4, batch_axis={0: 3}, rngs=rngs),
    "Einsum": lambda rngs: nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=rngs),
    "transposed": lambda rngs: nnx.ConvTranspose(
        4, 4, (3,), transpose_kernel=True, rngs=rngs
    ),
    "own": CustomDense,
}


@pytest.mark.parametrize("name", UNKNOWN_LAYOUTS)
def test_layers_with_unknown_layouts_are_refused_by_path(name):
    path = "middle/query/kernel" if name == "query" else "middle/kernel"
    with pytest.raises(ValueError, match=rf"C_in, C_out\], got {path} of shape"):
        middle_kernels(UNKNOWN_LAYOUTS[name])


def test_mask_by_path_checks_the_layouts_of_a_module():
    def heads(path, leaf):
        return path == "middle/kernel"

    for make in KNOWN_LAYOUTS.values():
        mask = xnor.mask_by_path(model := Middle(make), heads)
        assert selected_paths(mask) == {"middle/kernel"}
        assert jax.tree.structure(mask) == jax.tree.structure(
            nnx.state(model, nnx.Param)
        )
    # Without a bias, its kernel of shape (2, 3, 4) could be that of a convolution.
    general = Middle(
        lambda rngs: nnx.LinearGeneral(2, (3, 4), use_bias=False, rngs=rngs)
    )
    with pytest.raises(
        ValueError, match=r"mask_by_path: .*middle/kernel of shape \(2,"
    ):
        xnor.mask_by_path(general, heads)
    bias_free = stack(lambda rngs: nnx.Linear(2, 3, use_bias=False, rngs=rngs), 4)
    with pytest.raises(ValueError, match="mask_by_path: .* rank 2 in Linear"):
        xnor.mask_by_path(Middle(bias_free), heads)
    mask = xnor.mask_by_path(general, lambda path, leaf: path == "first/kernel")
    assert selected_paths(mask) == {"first/kernel"}


@pytest.mark.parametrize("name", UNKNOWN_LAYOUTS)
def test_layers_with_unknown_layouts_can_stay_real(name):
    def make_real(rngs):
        layer = UNKNOWN_LAYOUTS[name](rngs)
        layer.keep_real = True
        return layer

    assert middle_kernels(make_real) == set()


def test_first_and_last_layers_may_have_any_layout():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.LinearGeneral(2, (3, 4), rngs=rngs)
            self.middle = linear()
            self.last = nnx.LinearGeneral((3, 4), 2, axis=(-2, -1), rngs=rngs)

    assert selected_paths(xnor.inner_kernels(Net(nnx.Rngs(0)))) == {"middle/kernel"}


def stack(make, count):
    """Stack `count` layers into one, as for `nnx.scan`."""
    return lambda rngs: nnx.vmap(make)(rngs.split(count))


STACKS = {
    "BinaryConv": lambda rngs: xnor.nn.BinaryConv(4, 5, (3, 2), rngs=rngs),
    "BinaryLinear": lambda rngs: xnor.nn.BinaryLinear(7, 5, rngs=rngs),
    "Conv": lambda rngs: nnx.Conv(4, 5, (3,), rngs=rngs),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacked_layers_have_separate_scales(name):
    model = Middle(stack(stack(STACKS[name], 3), 2))
    params = nnx.state(model, nnx.Param)
    out = xnor.binarize(params, xnor.inner_kernels(model))
    kernel = np.asarray(params["middle"]["kernel"])
    assert kernel.shape[:2] == (2, 3)
    expected = [[oracles.binarize(w) for w in layers] for layers in kernel]
    assert_close(out["middle"]["kernel"], np.asarray(expected))


AMBIGUOUS_STACKS = {
    "no bias": stack(lambda rngs: nnx.Linear(2, 3, use_bias=False, rngs=rngs), 4),
    # `nnx.LinearGeneral(4, (4, 3))` has the same shapes.
    "ambiguous": stack(lambda rngs: nnx.Linear(4, 3, rngs=rngs), 4),
}


@pytest.mark.parametrize("name", AMBIGUOUS_STACKS)
def test_ambiguous_stacks_are_refused(name):
    with pytest.raises(ValueError, match=r"of rank 2 in Linear, got middle/kernel of"):
        middle_kernels(AMBIGUOUS_STACKS[name])


@pytest.mark.parametrize("tree", [{"kernel": jnp.ones((2, 2))}, jnp.ones(3), None])
def test_non_module_errors_suggest_mask_by_path(tree):
    kind = type(tree).__name__
    with pytest.raises(TypeError, match=f"nnx.Module, got {kind}; .* mask_by_path"):
        xnor.inner_kernels(tree)


def test_binarize_accepts_the_mask():
    params = nnx.state(model := Named("a", "b", "c"), nnx.Param)
    out = xnor.binarize(params, xnor.inner_kernels(model))
    assert np.unique(np.abs(out["b"]["kernel"][..., 0])).size == 1
    assert jax.tree.leaves(out["a"])[1] is jax.tree.leaves(params["a"])[1]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_kernels_are_refused(count):
    model = Named(*"abc"[:count])
    with pytest.raises(ValueError, match=f"at least 3 .*kernels, got {count}"):
        xnor.inner_kernels(model)


def test_mask_leaves_are_plain_bools():
    leaves = jax.tree.leaves(xnor.inner_kernels(Named("a", "b", "c")))
    assert all(type(leaf) is bool for leaf in leaves)


PATHS = {
    "dict": {"first/kernel", "first/bias", "binary/0/kernel", "binary/0/bias"}
    | {"last/kernel"},
    "nnx": {"first/kernel", "first/bias", "binary/0/kernel", "binary/0/bias"}
    | {"last/kernel", "last/bias", "norm/scale", "norm/bias"},
    "linen": {
        f"{x}/{y}" for x in ("first", "binary", "last") for y in ("kernel", "bias")
    },
    "equinox": {
        f"{x}/{y}"
        for x in ("first", "binary", "last")
        for y in ("kernel", "bias", "count", "activation")
    },
}


@pytest.mark.parametrize("kind", PATHS)
def test_mask_by_path_visits_each_leaf_once(kind):
    params, expected = trees.make(kind)
    seen = {}

    def predicate(path, leaf):
        seen[path] = leaf
        return path.startswith("binary") and path.endswith("kernel")

    mask = xnor.mask_by_path(params, predicate)
    assert jax.tree.structure(mask) == jax.tree.structure(expected)
    assert jax.tree.leaves(mask) == jax.tree.leaves(expected)
    assert set(seen) == PATHS[kind]
    leaves = jax.tree.leaves(params)
    assert all(a is b for a, b in zip(seen.values(), leaves, strict=True))


def test_mask_by_path_of_an_array_has_an_empty_path():
    assert xnor.mask_by_path(jnp.ones((3, 2)), lambda path, leaf: path == "") is True


def test_mask_by_path_converts_numpy_bools():
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
    predicate: Any = lambda _, leaf: np.bool_(leaf.ndim > 1)  # noqa: E731
    mask = xnor.mask_by_path(params, predicate)
    assert mask == {"a": True, "b": False}
    assert type(mask["a"]) is bool


def test_empty_mask_by_path_is_refused_with_all_paths():
    params, _ = trees.make("dict")
    with pytest.raises(ValueError, match="selects no leaf") as caught:
        xnor.mask_by_path(params, lambda path, leaf: "kernle" in path)
    assert all(path in str(caught.value) for path in PATHS["dict"])
    with pytest.raises(ValueError, match="selects no leaf"):
        xnor.mask_by_path({}, lambda path, leaf: True)


def test_norm_scales_selects_batch_norm_scales():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(2, rngs=rngs)
            self.bare = nnx.BatchNorm(2, use_scale=False, rngs=rngs)
            self.layer = nnx.LayerNorm(2, rngs=rngs)
            self.blocks = nnx.List([nnx.BatchNorm(2, rngs=rngs), linear()])
            self.scale = nnx.Param(jnp.ones(2))

    model = Net(nnx.Rngs(0))
    mask = xnor.masks.norm_scales(model)
    assert selected_paths(mask) == {"norm/scale", "blocks/0/scale"}
    assert jax.tree.structure(mask) == jax.tree.structure(nnx.state(model, nnx.Param))
    chex.assert_trees_all_equal(mask, xnor.masks.norm_scales(nnx.clone(model)))


def test_norm_scales_counts_a_shared_batch_norm_once():
    class Net(nnx.Module):
        def __init__(self, rngs):
            norm = nnx.BatchNorm(2, rngs=rngs)
            self.z = norm
            self.a = norm

    assert selected_paths(xnor.masks.norm_scales(Net(nnx.Rngs(0)))) == {"a/scale"}
