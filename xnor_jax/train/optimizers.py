"""A recipe's optimizer and learning rate schedule, registered or custom."""

import optax

from xnor_jax.registry import OPTIMIZERS, SCHEDULES, describe
from xnor_jax.train import custom
from xnor_jax.train.custom import RecipeError
from xnor_jax.train.recipe import Recipe, schedule_options

Links = list[optax.GradientTransformation]


def make_optimizer(recipe: Recipe, schedule: optax.Schedule) -> Links:
    """Return the transformations of a recipe's optimizer, to be chained.

    Raises:
      RecipeError: If a custom function fails or returns something else.
    """
    if not callable(recipe.optimizer):
        return OPTIMIZERS[recipe.optimizer](recipe, schedule)
    with custom.errors("optimizer", recipe.optimizer):
        made = recipe.optimizer(schedule)
    if not (hasattr(made, "init") and hasattr(made, "update")):
        raise RecipeError(
            f"expected {describe(recipe.optimizer)} to return an "
            f"optax.GradientTransformation, got {type(made).__name__}",
            field="optimizer",
        )
    return [made]


def make_schedule(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate schedule; a registered one has a linear warm-up.

    Raises:
      RecipeError: If a custom function fails or returns something else.
    """
    if not callable(recipe.schedule):
        warmup = round(recipe.warmup_epochs * steps_per_epoch)
        after = SCHEDULES[recipe.schedule](recipe, steps_per_epoch, warmup)
        if not warmup:
            return after
        rise = optax.linear_schedule(0.0, recipe.learning_rate, warmup)
        return optax.join_schedules([rise, after], [warmup])
    options = schedule_options(recipe, steps_per_epoch)
    with custom.errors("schedule", recipe.schedule):
        taken = custom.arguments("schedule", recipe.schedule, options)
        made: optax.Schedule = recipe.schedule(**taken)
    if not callable(made):
        raise RecipeError(
            f"expected {describe(recipe.schedule)} to return an optax.Schedule, "
            f"got {type(made).__name__}",
            field="schedule",
        )
    return made


def adam(recipe: Recipe, schedule: optax.Schedule) -> Links:
    """Adam, with coupled or decoupled decay."""
    return _links(recipe, schedule, optax.scale_by_adam())


def adamw(recipe: Recipe, schedule: optax.Schedule) -> Links:
    """Adam with decoupled decay."""
    return _links(recipe, schedule, optax.scale_by_adam(), coupled=False)


def sgd(recipe: Recipe, schedule: optax.Schedule) -> Links:
    """Gradient descent with momentum 0.9, with coupled or decoupled decay."""
    return _links(recipe, schedule, optax.trace(0.9))


def cosine(recipe: Recipe, steps_per_epoch: int, warmup: int) -> optax.Schedule:
    """Cosine decay from the highest rate, after `warmup` steps, to 0 at the end."""
    steps = max(recipe.epochs * steps_per_epoch - warmup, 1)
    return optax.cosine_decay_schedule(recipe.learning_rate, steps)


def linear(recipe: Recipe, steps_per_epoch: int, warmup: int) -> optax.Schedule:
    """Linear decay from the highest rate, after `warmup` steps, to 0 at the end."""
    steps = max(recipe.epochs * steps_per_epoch - warmup, 1)
    return optax.linear_schedule(recipe.learning_rate, 0.0, steps)


def steps(recipe: Recipe, steps_per_epoch: int, warmup: int) -> optax.Schedule:
    """Multiply by `decay_factor` after each of `decay_epochs`; starts at `warmup`."""
    boundaries = {
        epoch * steps_per_epoch - warmup: recipe.decay_factor
        for epoch in recipe.decay_epochs
    }
    return optax.piecewise_constant_schedule(recipe.learning_rate, boundaries)


def _links(
    recipe: Recipe,
    schedule: optax.Schedule,
    scaling: optax.GradientTransformation,
    *,
    coupled: bool | None = None,
) -> Links:
    coupled = recipe.decay == "coupled" if coupled is None else coupled
    links = [scaling, optax.scale_by_learning_rate(schedule)]
    links.insert(0 if coupled else 1, optax.add_decayed_weights(recipe.weight_decay))
    return links
