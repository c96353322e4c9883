import dataclasses
import itertools
import math
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import assert_full_precision

import xnor_jax as xnor
from xnor_jax import data, quantizers, weights
from xnor_jax.data import preprocess
from xnor_jax.registry import SURROGATES, WEIGHT_METHODS
from xnor_jax.train import network, pieces, step
from xnor_jax.train import recipe as recipes

SOURCE = data.SOURCES["digits"]
RECIPE = dataclasses.replace(recipes.get("digits-lenet5"), epochs=3, batch_size=8)


def make(**fields):
    recipe = dataclasses.replace(RECIPE, **fields)
    return step.create(
        recipe, SOURCE, image_shape=(16, 16, 1), classes=10, steps_per_epoch=4
    )


@cache
def images_and_labels(count=37):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 16, 16, 1)).astype(np.uint8)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, 10, count), jnp.int32)


def kernels(trainer, state):
    chosen = jax.tree.map(lambda m, p: p if m else None, trainer.inner, state.params)
    return jax.tree.leaves(chosen)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_epoch_matches_its_single_steps():
    # Adam would turn a gradient that is only rounding error into a full-size step.
    trainer, state = make(optimizer="sgd", learning_rate=0.1)
    images, labels = images_and_labels()
    key = jax.random.key(3)
    order_key, augment_key = jax.random.split(key)
    order = jax.random.permutation(order_key, len(labels))[:32].reshape(4, 8)
    one_step = jax.jit(lambda s, x, y: step.train_step(trainer, s, x, y))
    expected, losses = state, []
    augmentation = data.Augment(shift=trainer.recipe.shift, flip=trainer.recipe.flip)
    for i, index in enumerate(order):
        batch = preprocess.augment(
            augmentation, images[index], jax.random.fold_in(augment_key, i)
        )
        x = preprocess.normalize(SOURCE, batch)
        expected, metrics, _ = one_step(expected, x, labels[index])
        losses.append(metrics.loss)
    scanned, metrics, _ = step.make_train_epoch(trainer)(state, images, labels, key)
    np.testing.assert_allclose(metrics.loss, np.mean(losses), rtol=1e-5)
    assert int(scanned.step) == 4
    chex.assert_trees_all_close(scanned.params, expected.params, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_mixes_images_and_losses_anew_in_each_step(smoothing):
    trainer, state = make(mixup=True, label_smoothing=smoothing)
    images, labels = images_and_labels()
    x, y = preprocess.normalize(SOURCE, images[:8]), labels[:8]
    key = jax.random.split(jax.random.key(trainer.recipe.seed))[0]
    seen = []

    @jax.jit
    def run(state):
        mixed, share = preprocess.mixup(x, jax.random.fold_in(key, state.step))
        model = nnx.merge(trainer.graphdef, state.params, state.rest, copy=True)
        log_p = jax.nn.log_softmax(model(mixed))
        return share, log_p, step.train_step(trainer, state, x, y)[1]

    for at in (0, 1):
        share, log_p, metrics = run(state._replace(step=jnp.int32(at)))
        q = 0.0
        for part, label in ((share, y), (1 - share, y[::-1])):
            q += part[:, None] * jax.nn.one_hot(label, 10)
        q = (1 - smoothing) * q + smoothing / 10
        expected = -(q * log_p).sum(-1).mean()
        np.testing.assert_allclose(metrics.loss, expected, rtol=1e-5)
        right = (log_p.argmax(-1) == y).mean()
        np.testing.assert_allclose(metrics.accuracy, right, rtol=1e-6)
        seen.append(float(share[0]))
    assert seen[0] != seen[1]


def test_mixup_leaves_the_labels_to_a_teacher():
    def teacher(images):
        return 9 * images.mean((1, 2)) * jnp.arange(10.0)

    recipe = dataclasses.replace(RECIPE, mixup=True, teacher="run")
    trainer, state = step.create(
        recipe,
        SOURCE,
        image_shape=(16, 16, 1),
        classes=10,
        steps_per_epoch=4,
        teacher=teacher,
    )
    images, labels = images_and_labels()
    x, y = preprocess.normalize(SOURCE, images[:8]), labels[:8]
    key = jax.random.split(jax.random.key(recipe.seed))[0]

    @jax.jit
    def run(state):
        mixed, _ = preprocess.mixup(x, jax.random.fold_in(key, 0))
        model = nnx.merge(trainer.graphdef, state.params, state.rest, copy=True)
        p = jax.nn.softmax(teacher(mixed))
        expected = -(p * jax.nn.log_softmax(model(mixed))).sum(-1).mean()
        return expected, step.train_step(trainer, state, x, y)[1]

    expected, metrics = run(state)
    np.testing.assert_allclose(metrics.loss, expected, rtol=1e-5)


def test_step_compiles_once_and_keeps_kernels_centred_and_clamped():
    trainer, state = make()
    images, labels = images_and_labels()
    x = preprocess.normalize(SOURCE, images[:8])
    chex.clear_trace_counter()
    one_step = jax.jit(
        chex.assert_max_traces(
            lambda s: step.train_step(trainer, s, x, labels[:8]), n=1
        )
    )
    for _ in range(3):
        state, _, flips = one_step(state)
        for kernel in kernels(trainer, state):
            assert float(jnp.abs(kernel).max()) <= 1
            np.testing.assert_allclose(kernel.mean(-2), 0, atol=1e-6)
    assert all(0 <= float(ratio) < 0.5 for ratio in jax.tree.leaves(flips))


def test_epoch_donates_and_reports_progress():
    trainer, state = make()
    images, labels = images_and_labels()
    calls = []
    epoch = step.make_train_epoch(trainer, lambda *args: calls.append(args))
    before = jax.tree.leaves(state.params)[0]
    state, metrics, _ = epoch(state, images, labels, jax.random.key(0))
    assert before.is_deleted()
    assert calls[-1][0] == 4
    np.testing.assert_allclose(calls[-1][1].loss, metrics.loss, rtol=1e-6)


@pytest.mark.slow
def test_piece_length_changes_no_result_and_compiles_nothing(monkeypatch, compilations):
    trainer, state = make(shift=2, flip=True, calibration_batches=3)
    images, labels = images_and_labels()
    ends, results = [], []
    epoch = step.make_train_epoch(trainer, lambda end, _: ends.append(end))
    calibrate = step.make_calibrate(trainer)
    evaluate = step.make_evaluate(trainer, batch_size=8)
    for seconds in (0, math.inf, 0):
        monkeypatch.setattr(pieces, "SECONDS", seconds)
        before = compilations()
        new, *means = epoch(
            jax.tree.map(jnp.copy, state), images, labels, jax.random.key(3)
        )
        rest = calibrate(new, images, jax.random.key(4))
        test = evaluate(new._replace(rest=rest), images, labels)
        results.append((new, means, rest, test))
    assert ends == [1, 2, 3, 4, 1, 3, 4, 4]
    assert compilations() == before
    chex.assert_trees_all_equal(*results)


def test_recu_quantile_increases_during_training():
    trainer, state = make(weight_method="recu")
    taus = []

    def taus_at(progress):
        model = nnx.merge(trainer.graphdef, state.params, state.rest, copy=True)
        network.set_quantile(model, progress)
        methods = [model.block2.layer.weight_method, model.block3.layer.weight_method]
        return [method.keywords["tau"] for method in methods]

    for progress in (0.0, 0.5, 1.0):
        taus.append(taus_at(jnp.float32(progress)))
    middle = 0.85 + 0.14 * (math.sqrt(math.e) - 1) / (math.e - 1)
    wanted = np.repeat([[0.85], [middle], [0.99]], 2, 1)
    np.testing.assert_allclose(taus, wanted, rtol=1e-6)
    images, labels = images_and_labels()
    x = preprocess.normalize(SOURCE, images[:8])
    one_step = jax.jit(lambda s: step.train_step(trainer, s, x, labels[:8]))
    assert np.isfinite(one_step(state)[1].loss)


def test_recu_is_evaluated_at_the_quantile_of_the_step():
    trainer, state = make(weight_method="recu")
    images, _ = images_and_labels()
    for at, tau in ((0, 0.85), (trainer.steps, 0.99)):
        method = partial(weights.recu, tau=tau)
        other = trainer._replace(
            graphdef=make(weight_method=method)[0].graphdef,
            recipe=dataclasses.replace(trainer.recipe, weight_method="latent"),
        )
        now = state._replace(step=jnp.int32(at))
        for logits in (step.evaluation_logits, step.batch_statistics):
            found, wanted = (logits(t, now, images[:8]) for t in (trainer, other))
            chex.assert_trees_all_close(found, wanted, rtol=1e-5)
    early, late = (
        step.evaluation_logits(trainer, state._replace(step=jnp.int32(at)), images[:8])
        for at in (0, trainer.steps)
    )
    assert not np.allclose(early, late, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "name"),
    [
        *(("surrogate", name) for name in SURROGATES),
        *(("weight_method", name) for name in WEIGHT_METHODS),
    ],
)
def test_fixed_length_matches_dependence_on_the_step_count(field, name):
    trainer, state = make(schedule="steps", **{field: name})
    images, labels = images_and_labels()
    x = preprocess.normalize(SOURCE, images[:8])
    state = state._replace(step=jnp.array(2, jnp.int32))

    @jax.jit
    def run(steps):
        longer = trainer._replace(steps=steps)
        new = step.train_step(longer, state, x, labels[:8])[0]
        return jax.tree.leaves((new.params, new.opt_state))

    results = run(trainer.steps), run(2 * trainer.steps)
    same = all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    assert same == (recipes.fixed_length(trainer.recipe) is None)


def test_real_weights_are_not_projected():
    trainer, state = make(precision="32w1a")
    means = jnp.abs(
        jnp.concatenate([k.mean(-2).ravel() for k in kernels(trainer, state)])
    )
    assert float(means.max()) > 1e-3


def test_initial_kernels_are_projected_except_in_the_twin():
    trainer, state = make()
    for kernel in kernels(trainer, state):
        np.testing.assert_allclose(kernel.mean(-2), 0, atol=1e-6)
    twin_trainer, twin = make(binary=False)
    assert any(
        float(jnp.abs(k.mean(-2)).max()) > 1e-3 for k in kernels(twin_trainer, twin)
    )


@pytest.mark.slow
def test_float_twin_trains_with_real_weights():
    trainer, state = make(binary=False)
    images, labels = images_and_labels()
    x = preprocess.normalize(SOURCE, images[:8])
    model = nnx.merge(trainer.graphdef, state.params, state.rest)
    model.eval()
    doubled = nnx.merge(
        trainer.graphdef,
        jax.tree.map(lambda m, p: 2 * p if m else p, trainer.inner, state.params),
        state.rest,
    )
    doubled.eval()
    assert not np.allclose(model(x), doubled(x))
    one_step = jax.jit(lambda s: step.train_step(trainer, s, x, labels[:8]))
    first = one_step(state)[1]
    for _ in range(5):
        state, last, _ = one_step(state)
    assert last.loss < first.loss


@pytest.mark.slow
@pytest.mark.parametrize("count", [37, 8, 5])
def test_evaluation_is_exact_for_any_remainder_and_changes_nothing(count):
    trainer, state = make()
    images, labels = (part[:count] for part in images_and_labels())
    before = jax.tree.map(jnp.copy, state.params)
    metrics = step.make_evaluate(trainer, batch_size=8)(state, images, labels)
    model = nnx.merge(trainer.graphdef, state.params, state.rest)
    model.eval()
    logits = np.asarray(model(preprocess.normalize(SOURCE, images)), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    loss = -log_p[np.arange(count), labels].mean()
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    accuracy = (logits.argmax(-1) == np.asarray(labels)).mean()
    np.testing.assert_allclose(metrics.accuracy, accuracy, rtol=1e-6)
    chex.assert_trees_all_equal(state.params, before)


def test_calibration_averages_batch_statistics():
    trainer, state = make(calibration_batches=3)
    images, _ = images_and_labels()
    key = jax.random.key(5)
    rest = step.make_calibrate(trainer)(state, images, key)
    order = jax.random.permutation(key, len(images))[:24].reshape(3, 8)
    conv = nnx.merge(trainer.graphdef, state.params, state.rest).conv1
    outputs = [np.asarray(conv(preprocess.normalize(SOURCE, images[i]))) for i in order]
    stat = rest["norm1"]
    np.testing.assert_allclose(
        stat["mean"][...], np.mean([y.mean((0, 1, 2)) for y in outputs], 0), atol=1e-5
    )
    np.testing.assert_allclose(
        stat["var"][...], np.mean([y.var((0, 1, 2)) for y in outputs], 0), rtol=1e-4
    )
    chex.assert_trees_all_equal_structs(rest, state.rest)


def test_calibration_without_batch_norm_changes_nothing():
    class Net(nnx.Module):
        def __init__(self, *, image_shape, classes, rngs):
            self.dense1 = nnx.Linear(math.prod(image_shape), 8, rngs=rngs)
            self.dense2 = xnor.nn.BinaryLinear(8, 8, rngs=rngs)
            self.dense3 = nnx.Linear(8, classes, rngs=rngs)

        def __call__(self, x):
            x = self.dense1(x.reshape(len(x), -1))
            return self.dense3(self.dense2(x))

    trainer, state = make(model=Net, calibration_batches=2)
    images, _ = images_and_labels()
    rest = step.make_calibrate(trainer)(state, images, jax.random.key(0))
    chex.assert_trees_all_equal(rest, state.rest)


def test_kernels_of_plain_flax_layers_stay_real():
    class Net(nnx.Module):
        def __init__(self, *, image_shape, classes, rngs):
            sizes = (math.prod(image_shape), 8, 8, classes)
            self.layers = nnx.List(
                [nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)]
            )

        def __call__(self, x):
            x = x.reshape(len(x), -1)
            for layer in self.layers:
                x = nnx.relu(layer(x))
            return x

    _, state = make(model=Net)
    for leaf in jax.tree.leaves(state.params):
        if leaf.ndim == 2:
            assert jnp.abs(leaf.mean(0)).max() > 1e-3


@pytest.mark.slow
def test_tanh_temperature_follows_the_step():
    images, labels = images_and_labels()
    x = step.normalize(SOURCE, images[:8])
    trees = []
    # Step 6 is half of 3 epochs of 4 steps, where t = 10^0.
    for surrogate in ("tanh", partial(quantizers.tanh, temperature=1.0), "ste"):
        trainer, state = make(surrogate=surrogate)
        state = state._replace(step=jnp.int32(6))
        one_step = jax.jit(lambda s, t=trainer: step.train_step(t, s, x, labels[:8]))
        trees.append(one_step(state)[0].opt_state[1].mu["conv1"]["kernel"][...])
    np.testing.assert_allclose(trees[0], trees[1], rtol=1e-4, atol=1e-7)
    assert not np.allclose(trees[0], trees[2], rtol=1e-2)


def test_evaluation_is_not_rounded_to_a_devices_default():
    trainer, state = make()
    images, labels = images_and_labels()
    real = jnp.ones(len(labels), bool)
    evaluate = partial(step.evaluate_batch, trainer)
    assert_full_precision(evaluate, state, images, labels, real)
    calibrate = partial(step.batch_statistics, trainer)
    assert_full_precision(calibrate, state, images)
