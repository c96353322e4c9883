"""The training step and the evaluation, as pure functions of their state."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from xnor_jax import losses, masks, optim, weights
from xnor_jax.data import BLANK, Augment, Source
from xnor_jax.data.preprocess import augment, mixup, normalize
from xnor_jax.train import custom, network
from xnor_jax.train.devices import constrain_batch, constrain_replicated, replicate
from xnor_jax.train.optimizers import make_optimizer, make_schedule
from xnor_jax.train.pieces import Pieces, make_map
from xnor_jax.train.recipe import PARTS, Recipe

# For a program that runs once: the options of `jax_disable_most_optimizations`.
_FAST_COMPILE: Any = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


class TrainState(NamedTuple):
    """Everything that a step changes: the content of a checkpoint."""

    params: Any  # nnx.State of nnx.Param: the latent tree
    rest: Any  # nnx.State of everything else: BatchNorm statistics, dropout's keys
    opt_state: Any  # the optimizer's state
    step: jax.Array  # int32 [], steps taken


class Metrics(NamedTuple):
    """Means over an epoch's steps or a split's images."""

    loss: jax.Array | float  # cross entropy, float32 []
    accuracy: jax.Array | float  # float32 [], in [0, 1]


class Trainer(NamedTuple):
    """A recipe's network, optimizer and schedule: what a step does not change."""

    recipe: Recipe
    source: Source
    graphdef: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    inner: Any  # bool tree, from `network.counted_kernels`
    steps: int  # of the whole training
    # The teacher in evaluation mode: normalised images to logits.
    teacher: Callable[[jax.Array], jax.Array] | None = None


def create(
    recipe: Recipe,
    source: Source,
    *,
    image_shape: tuple[int, ...],
    classes: int,
    steps_per_epoch: int,
    backend: str = "auto",
    teacher: Callable[[jax.Array], jax.Array] | None = None,
    initial: Any = None,
    abstract: bool = False,
) -> tuple[Trainer, TrainState]:
    """Build a recipe's network and optimizer, and their state before the first step.

    Args:
      recipe: The recipe to train.
      source: The normalisation of pixels.
      image_shape: Height, width, channels.
      classes: The number of classes.
      steps_per_epoch: The number of steps per epoch.
      backend: The backend of the binary products; see `xnor_jax.nn.BinaryConv`.
      teacher: The trained network that the recipe's `teacher` names.
      initial: The parameters of the run that its `initial` names; None for random ones.
      abstract: Whether to return the state as shapes and dtypes only, which compiles
        nothing.

    Returns:
      The trainer and the initial state, its binary kernels centred and clamped.

    Raises:
      RecipeError: If the network cannot be built for such images, or a custom part
        fails when a step is traced.
    """
    build = network.builder(
        recipe, image_shape=image_shape, classes=classes, backend=backend
    )
    model = network.abstract(recipe, build, image_shape, classes)
    inner, binary = network.counted_kernels(model), network.binary_kernels(model)
    schedule = make_schedule(recipe, steps_per_epoch)
    links = make_optimizer(recipe, schedule)
    if recipe.binary_weights:
        scales, minimum = masks.norm_scales(model), recipe.scale_minimum
        # The layers apply the gradient rule, so the chain has none.
        links.append(optim.project(binary, scale_mask=scales, scale_minimum=minimum))
    links.append(optim.count_sign_flips(inner))
    optimizer = optax.chain(*links)
    steps = recipe.epochs * steps_per_epoch
    trainer = Trainer(
        recipe, source, nnx.graphdef(model), optimizer, schedule, inner, steps, teacher
    )

    def init(initial: Any = None) -> TrainState:
        _, params, rest = nnx.split(build(), nnx.Param, ...)
        params = params if initial is None else initial
        if recipe.binary_weights:
            params = weights.project(params, binary)
        step = jnp.zeros((), jnp.int32)
        return TrainState(params, rest, optimizer.init(params), step)

    _check_custom_parts(trainer, init, image_shape)
    if abstract:
        return trainer, jax.eval_shape(init)
    return trainer, jax.jit(init, compiler_options=_FAST_COMPILE)(initial)


def _check_custom_parts(
    trainer: Trainer, init: Callable[[], TrainState], image_shape: tuple[int, ...]
) -> None:
    """Trace a step of a recipe with custom parts, without data.

    Raises:
      RecipeError: If the trace fails.
    """
    recipe = trainer.recipe
    parts = [getattr(recipe, field) for field in PARTS if field != "dataset"]
    if not any(map(callable, parts)):
        return
    images = jax.ShapeDtypeStruct((recipe.batch_size, *image_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32)
    try:
        jax.eval_shape(
            partial(train_step, trainer), jax.eval_shape(init), images, labels
        )
    except Exception as error:  # custom parts may raise anything
        raise custom.RecipeError(
            f"a training step fails: {custom.reason(error)}"
        ) from error


def train_step(
    trainer: Trainer, state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, Metrics, Any]:
    """Take one training step on one batch.

    Args:
      trainer: The network, optimizer and schedule.
      state: The state before the step.
      images: Normalised, float `[batch, H, W, C]`.
      labels: int `[batch]`.

    Returns:
      The new state, the batch's metrics, and a tree of the kernels' flip ratios.
    """
    share = None
    if trainer.recipe.mixup:
        # Not the seed's own key, into which the feeds fold the epochs.
        key = jax.random.split(jax.random.key(trainer.recipe.seed))[0]
        images, share = mixup(images, jax.random.fold_in(key, state.step))

    def loss_fn(params):
        model = nnx.merge(trainer.graphdef, params, state.rest, copy=True)
        model.train()
        # A run of which a part depends on `progress` cannot be extended: add such a
        # part to `recipe.fixed_length`.
        progress = state.step / trainer.steps
        if trainer.recipe.surrogate == "tanh":
            network.set_temperature(model, progress)
        if trainer.recipe.weight_method == "recu":
            network.set_quantile(model, progress)
        logits = model(images)
        rest = nnx.split(model, nnx.Param, ...)[2]
        loss = batch_loss(trainer, images, logits, labels, share).mean()
        return loss, (rest, jnp.mean(logits.argmax(-1) == labels))

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (rest, accuracy)), grads = gradient(state.params)
    updates, opt_state = trainer.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    flips = optax.tree.get(opt_state, "flip_ratio")
    new = TrainState(params, rest, opt_state, state.step + 1)
    return new, Metrics(loss, accuracy), flips


def batch_loss(
    trainer: Trainer,
    images: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    share: jax.Array | None = None,
) -> jax.Array:
    """The loss of each image of a batch, against its label or the teacher's logits.

    `share` is that of each image's own label, if `preprocess.mixup` has mixed them.
    """
    if trainer.teacher is not None:
        return losses.distillation(logits, trainer.teacher(images))
    cross_entropy = partial(
        losses.cross_entropy, logits, smoothing=trainer.recipe.label_smoothing
    )
    own = cross_entropy(labels)
    if share is None:
        return own
    return share * own + (1 - share) * cross_entropy(labels[::-1])


def make_train_epoch(
    trainer: Trainer,
    on_steps: Callable[[int, Metrics], None] | None = None,
    *,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[TrainState, Metrics, Any]]:
    """Make an epoch: a shuffle, then its steps in compiled loops of bounded time.

    Args:
      trainer: The network, optimizer and schedule.
      on_steps: Called after each loop with the number of steps of the epoch so far and
        the means of their metrics, for a progress bar.
      mesh: The devices that share each batch; None for one.

    Returns:
      `epoch(state, images, labels, key) -> state, metrics, flip ratios`, the state
      donated. The images are uint8 `[N, H, W, C]`; the key determines the order and the
      augmentation; metrics and flip ratios are means over the epoch's steps.
    """
    batch_size = trainer.recipe.batch_size
    pieces = Pieces(make_train_steps(trainer, mesh=mesh))
    mean = jax.jit(means, static_argnums=1)

    @partial(jax.jit, static_argnums=0)
    def shuffle(count, key):
        order_key, augment_key = jax.random.split(key)
        order = jax.random.permutation(order_key, count)
        steps = count // batch_size
        batches = order[: steps * batch_size].reshape(steps, batch_size)
        return constrain_replicated((batches, augment_key), mesh)

    def on_piece(at, carry):
        if on_steps is not None:
            on_steps(at, means(carry[1][0], at))

    def epoch(state, images, labels, key):
        batches, augment_key = shuffle(len(labels), key)
        steps = len(batches)
        carry = state, replicate(zero_total(state), mesh)
        data = images, labels, batches, augment_key
        state, total = pieces(carry, steps, *data, on_piece=on_piece)
        return state, *mean(total, steps)

    return epoch


def make_train_steps(
    trainer: Trainer, *, mesh: Mesh | None = None
) -> Callable[..., tuple[TrainState, Any]]:
    """Make a compiled loop over a range of an epoch's steps.

    Returns:
      `steps((state, total), start, stop, images, labels, batches, key) -> state,
      total`, jitted, with state and total donated; other bounds do not recompile it.
      `batches` are the image indices of each step, int `[steps, batch]`; `total` is the
      sum of the metrics and the flip ratios over the steps so far, starting from
      `zero_total`; the key is for the augmentation.
    """
    recipe = trainer.recipe
    how = Augment(shift=recipe.shift, flip=recipe.flip)

    @partial(jax.jit, donate_argnums=0)
    def steps(carry, start, stop, images, labels, batches, key):
        def body(at, carry):
            state, total = carry
            index = constrain_batch(batches[at], mesh)
            picked = augment(how, images[index], jax.random.fold_in(key, at))
            x = normalize(trainer.source, picked)
            state, metrics, flips = train_step(trainer, state, x, labels[index])
            return state, jax.tree.map(jnp.add, total, (metrics, flips))

        carry = jax.lax.fori_loop(start, stop, body, carry)
        return constrain_replicated(carry, mesh)

    return steps


def make_train_batch(
    trainer: Trainer, *, mesh: Mesh | None = None
) -> Callable[..., tuple[TrainState, Any, Metrics]]:
    """Make a step on a given batch, which is already shuffled and augmented.

    Returns:
      `step(state, total, images, labels) -> state, total, metrics`, jitted, the state
      donated. The images are uint8 `[batch, H, W, C]`; `total` is the sum over steps of
      the metrics and the flip ratios, starting from `zero_total`; the metrics are the
      batch's.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state, total, images, labels):
        x = normalize(trainer.source, images)
        state, metrics, flips = train_step(trainer, state, x, labels)
        total = jax.tree.map(jnp.add, total, (metrics, flips))
        return constrain_replicated((state, total, metrics), mesh)

    return step


def zero_total(state: TrainState) -> tuple[Metrics, Any]:
    """The initial sums of the metrics and the flip ratios, which are 0."""
    flips = optax.tree.get(state.opt_state, "flip_ratio")
    return jax.tree.map(jnp.zeros_like, (Metrics(*2 * (jnp.zeros(()),)), flips))


def means(total: Any, steps: int) -> Any:
    """Divide sums over steps by the number of steps."""
    return jax.tree.map(lambda x: x / steps, total)


def make_evaluate(
    trainer: Trainer, batch_size: int = 500, *, mesh: Mesh | None = None
) -> Callable[[TrainState, jax.Array, jax.Array], Metrics]:
    """Make an evaluation: the mean loss and the accuracy over a whole split.

    Args:
      trainer: The network, optimizer and schedule.
      batch_size: Images per batch; with a mesh, rounded up to a multiple of its size.
      mesh: The devices that share each batch; None for one.

    Returns:
      `evaluate(state, images, labels) -> metrics`.
    """

    def rows(images: int) -> int:
        devices = 1 if mesh is None else mesh.size
        return -(-min(batch_size, images) // devices) * devices

    def batch(at, state, images, labels):
        index = at * rows(len(labels)) + jnp.arange(rows(len(labels)))
        # The last image pads the last batch and is masked out there.
        real = index < len(labels)
        index = constrain_batch(index, mesh)
        index = jnp.minimum(index, len(labels) - 1)
        return evaluate_batch(trainer, state, images[index], labels[index], real)

    batches = make_map(batch, mesh=mesh)

    @partial(jax.jit, static_argnums=0)
    def mean(count, losses, right):
        return Metrics(losses.sum() / count, right.sum() / count)

    def evaluate(state, images, labels):
        count = -(-len(labels) // rows(len(labels)))
        sums = batches(count, state, images, labels)
        return mean(len(labels), *sums)

    return evaluate


def trained_model(trainer: Trainer, state: TrainState) -> nnx.Module:
    """The network of a state, in evaluation mode."""
    model = nnx.merge(trainer.graphdef, state.params, state.rest, copy=True)
    model.eval()
    if trainer.recipe.weight_method == "recu":
        network.set_quantile(model, state.step / trainer.steps)
    return model


def evaluation_logits(
    trainer: Trainer, state: TrainState, images: jax.Array
) -> jax.Array:
    """The logits of images, uint8 `[N, H, W, C]`, in evaluation mode.

    Products of real numbers are computed in float32, as in a packed network: TF32, a
    GPU's default, changes signs.
    """
    with jax.default_matmul_precision("highest"):
        return trained_model(trainer, state)(normalize(trainer.source, images))


def evaluate_batch(
    trainer: Trainer,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    real: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sum the losses and count the correct predictions where `real` is true."""
    logits = evaluation_logits(trainer, state, images)
    each = losses.cross_entropy(logits, labels)
    right = logits.argmax(-1) == labels
    return jnp.sum(each * real), jnp.sum(right & real)


def make_evaluate_batch(
    trainer: Trainer, *, mesh: Mesh | None = None
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """Make an evaluation by batches: sums of losses, correct predictions and images.

    Returns:
      `evaluate(state, total, images, labels) -> total`, jitted; `total` is None at
      first. Images with the label `BLANK` are not counted.
    """

    @jax.jit
    def evaluate(state, total, images, labels):
        real = labels != BLANK
        label = jnp.where(real, labels, 0)
        sums = evaluate_batch(trainer, state, images, label, real)
        new = (*sums, jnp.sum(real))
        new = new if total is None else jax.tree.map(jnp.add, total, new)
        return constrain_replicated(new, mesh)

    return evaluate


def make_calibrate(
    trainer: Trainer, *, mesh: Mesh | None = None
) -> Callable[[TrainState, jax.Array, jax.Array], Any]:
    """Make a calibration: BatchNorm's statistics become means over training batches.

    Signs of binary kernels flip up to the last step, so the running averages mix the
    statistics of different networks.

    Returns:
      `calibrate(state, images, key) -> rest`.
    """
    recipe = trainer.recipe

    @partial(jax.jit, static_argnums=0)
    def choose(images, key):
        count = min(recipe.calibration_batches, images // recipe.batch_size)
        order = jax.random.permutation(key, images)[: count * recipe.batch_size]
        order = order.reshape(count, recipe.batch_size)
        return constrain_replicated(order, mesh)

    def batch(at, state, images, order):
        picked = images[constrain_batch(order[at], mesh)]
        return batch_statistics(trainer, state, picked)

    statistics = make_map(batch, mesh=mesh)

    @jax.jit
    def merge(rest, found):
        mean = jax.tree.map(lambda x: x.mean(0), found)
        return constrain_replicated(nnx.merge_state(rest, mean), mesh)

    def calibrate(state, images, key):
        order = choose(len(images), key)
        return merge(state.rest, statistics(len(order), state, images, order))

    return calibrate


def make_batch_statistics(
    trainer: Trainer, *, mesh: Mesh | None = None
) -> Callable[[TrainState, jax.Array], Any]:
    """Make a calibration by batches: `statistics(state, images)`, jitted."""

    @jax.jit
    def statistics(state, images):
        found = batch_statistics(trainer, state, images)
        return constrain_replicated(found, mesh)

    return statistics


@jax.jit
def merge_statistics(rest: Any, found: list[Any]) -> Any:
    """Return `rest` with the means of the batches' statistics."""
    return nnx.merge_state(rest, jax.tree.map(lambda *x: jnp.stack(x).mean(0), *found))


def batch_statistics(trainer: Trainer, state: TrainState, images: jax.Array) -> Any:
    """BatchNorm's state with the statistics of these images alone."""
    model = trained_model(trainer, state)
    model.set_attributes(
        nnx.BatchNorm,
        raise_if_not_found=False,
        use_running_average=False,
        momentum=0.0,
    )
    with jax.default_matmul_precision("highest"):  # as in `evaluation_logits`
        model(normalize(trainer.source, images))
    return nnx.state(model, nnx.BatchStat)
