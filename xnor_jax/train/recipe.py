"""Recipes, which define runs, and presets."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from xnor_jax.data import SOURCES, Fit, Holdout, load
from xnor_jax.registry import (
    MODELS,
    OPTIMIZERS,
    RULES,
    SCHEDULES,
    SURROGATES,
    WEIGHT_METHODS,
    Precision,
    describe,
    suggestion,
)
from xnor_jax.train import custom
from xnor_jax.train.custom import RecipeError

# The fields that take a registered name or a custom callable.
PARTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "dataset": SOURCES,
        "model": MODELS,
        "rule": RULES,
        "surrogate": SURROGATES,
        "weight_method": WEIGHT_METHODS,
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that determine the result of a run.

    Fields that take a callable also take a registered name; on the command line,
    MODULE:NAME imports a callable.
    """

    dataset: str | Callable[[], Any]
    """The data set: the built-in digits, or a folder in the Hugging Face layout or of
    class folders; imagenet and folder stay on disk. Or a function () -> (train_images,
    train_labels, test_images, test_labels): uint8 [N, H, W, C] and integers [N]."""
    model: str | Callable[..., Any]
    """The network. Or a class or function `(*, image_shape, classes, rngs, **options)
    -> nnx.Module`, called with those of the options binary, rule, surrogate,
    multiplier, precision, weight_method, input_scale, compute_dtype and backend that
    its signature takes."""
    epochs: int
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step; the incomplete last batch of an epoch is dropped."""
    seed: int = 0
    """Determines initial weights, order of images, dropout and augmentation."""
    binary: bool = True
    """False trains the float twin: no signs and no projection. Rule, surrogate,
    multiplier, precision, weight method, input scale and scale minimum then have no
    effect."""
    rule: str | Callable[[Any, Any], Any] = "corrected"
    """The gradient rule of the binary kernels. Or a function (kernel, grad) -> grad."""
    surrogate: str | Callable[[Any, Any], Any] = "ste"
    """The surrogate gradient of the activations' sign; the temperature of tanh rises
    from 0.1 to 10 over the training. Or a function (x, grad) -> grad."""
    multiplier: float = 1.0
    """A factor on the rule's gradient."""
    precision: Precision = "1w1a"
    """Bits of weights and activations of the binary layers: 1w32a is a
    Binary-Weight-Network, where the surrogate has no effect; 32w1a is the first of two
    stages, whose run is given to the second as initial, where rule, multiplier and
    scale minimum have none. Only 1w1a can be packed."""
    weight_method: str | Callable[[Any], Any] = "latent"
    """What is binarized: the latent kernels, IR-Net's balanced and standardised ones,
    or those of ReCU's rectified clamp, whose τ rises from 0.85 to 0.99. Or a function
    of the latent kernel."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the operands of sign products. With bfloat16, for a GPU's tensor cores,
    the sums are the same integers, and the backward pass rounds gradients."""
    input_scale: bool = False
    """Whether to multiply by the paper's input scale K."""
    optimizer: str | Callable[[Any], Any] = "adam"
    """The optimizer; the momentum of sgd is 0.9. Or a function (learning_rate:
    optax.Schedule) -> optax.GradientTransformation, which decays weights itself."""
    learning_rate: float = 0.01
    """The highest learning rate."""
    schedule: str | Callable[..., Any] = "cosine"
    """The learning rate schedule: cosine or linear decay to 0, or steps, multiplied by
    decay_factor after each of decay_epochs. Or a function -> optax.Schedule, called
    with those of the keyword arguments learning_rate, steps_per_epoch and epochs that
    its signature takes."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up of the learning rate from 0; may be fractional."""
    decay_epochs: tuple[int, ...] = ()
    """The epochs after which the steps schedule decays."""
    decay_factor: float = 0.1
    """The factor of the steps schedule."""
    weight_decay: float = 1e-5
    """L2 decay."""
    decay: Literal["coupled", "decoupled"] = "coupled"
    """Whether decay is added to the gradient (coupled), as in the public PyTorch code,
    or to the optimizer's step (decoupled); adamw's is always decoupled."""
    label_smoothing: float = 0.0
    """The share in [0, 1) of each training label that is spread over all classes."""
    teacher: str | None = None
    """The folder of a run, such as the float twin's: the loss is the distillation loss
    against its network's logits, without the labels."""
    initial: str | None = None
    """The folder of a run of the same network, such as one with real weights: its
    trained parameters are the initial ones."""
    scale_minimum: float = 0.01
    """The smallest affine BatchNorm scale."""
    calibration_batches: int = 0
    """Training batches from which BatchNorm's statistics are re-estimated before each
    evaluation; 0 evaluates with the running averages."""
    shift: int = 0
    """Augmentation: translate each training image by up to this many pixels."""
    flip: bool = False
    """Augmentation: mirror half of the training images left to right."""
    mixup: bool = False
    """Augmentation: mix each training image with another of its batch, and their
    labels, in shares that are uniform in [0, 1]. The training accuracy is then that of
    the labels with the larger shares."""
    validation_share: float = 0.0
    """For class folders without a split, CLASS/*: the share of each class that is held
    out for the test, chosen by the seed. 0 for a folder with train and validation."""
    image_size: int | None = None
    """The side in pixels of the images made from pictures of imagenet and folder."""
    resize_crop: bool = False
    """Augmentation for imagenet and folder: a random crop of 8 to 100 % of each
    picture's area, with an aspect ratio of 3/4 to 4/3. Test pictures are cropped at the
    centre, after a resize of the shorter side to 8/7 of image_size; without this, to
    image_size."""

    @property
    def binary_weights(self) -> bool:
        """Whether the kernels of the binary layers have one bit per weight."""
        return self.binary and self.precision != "32w1a"

    @property
    def fit(self) -> Fit | None:
        """How test pictures are resized and cropped; None without `image_size`."""
        if self.image_size is None:
            return None
        ratio = 8 / 7 if self.resize_crop else 1  # 256 for 224
        return Fit(self.image_size, round(self.image_size * ratio))

    @property
    def holdout(self) -> Holdout | None:
        """The test split of class folders; None without `validation_share`."""
        if not self.validation_share:
            return None
        return Holdout(self.validation_share, self.seed)


REFERENCE_STEPS = (15, 30, 45)

_CIFAR10: Mapping[str, Any] = MappingProxyType(
    {
        "surrogate": "approx",
        "optimizer": "adamw",
        "learning_rate": 0.005,
        "warmup_epochs": 1.0,
        "weight_decay": 0.0,
        "calibration_batches": 20,
        "shift": 4,
        "flip": True,
    }
)
_IMAGENET: Mapping[str, Any] = MappingProxyType(
    {
        "dataset": "imagenet",
        "batch_size": 256,
        "flip": True,
        "image_size": 224,
        "resize_crop": True,
    }
)
# From the public code of Bi-Real Net and ReActNet.
_BIREAL: Mapping[str, Any] = MappingProxyType(
    {"rule": "ste", "surrogate": "approx", "schedule": "linear", "weight_decay": 0.0}
)

PRESETS = MappingProxyType(
    {
        "digits-lenet5": Recipe(
            dataset="digits", model="lenet5", epochs=40, batch_size=64, shift=2
        ),
        "mnist-lenet5": Recipe(
            dataset="mnist",
            model="lenet5",
            epochs=60,
            learning_rate=0.005,
            calibration_batches=20,
            shift=1,
        ),
        "mnist-lenet5-reference": Recipe(
            dataset="mnist",
            model="lenet5",
            epochs=60,
            schedule="steps",
            decay_epochs=REFERENCE_STEPS,
        ),
        "fashion-lenet5": Recipe(
            dataset="fashion",
            model="lenet5",
            epochs=20,
            learning_rate=0.005,
            calibration_batches=20,
            shift=1,
            flip=True,
        ),
        "cifar10-nin": Recipe(
            dataset="cifar10",
            model="nin",
            epochs=320,
            calibration_batches=20,
            shift=4,
            flip=True,
        ),
        "cifar10-nin-reference": Recipe(
            dataset="cifar10",
            model="nin",
            epochs=320,
            schedule="steps",
            decay_epochs=(120, 200, 240, 280),
        ),
        "cifar10-resnet20": Recipe(
            dataset="cifar10", model="resnet20", epochs=60, **_CIFAR10
        ),
        "cifar10-vggsmall": Recipe(
            dataset="cifar10", model="vggsmall", epochs=300, **_CIFAR10
        ),
        "cifar10-resnet18": Recipe(
            dataset="cifar10", model="resnet18-cifar", epochs=300, **_CIFAR10
        ),
        "imagenet-alexnet": Recipe(
            model="alexnet",
            epochs=100,
            learning_rate=0.001,
            multiplier=1e9,
            schedule="steps",
            decay_epochs=(30, 60, 90),
            **{**_IMAGENET, "image_size": 227},
        ),
        "imagenet-resnet18": Recipe(
            model="resnet18",
            epochs=58,
            learning_rate=0.001,
            calibration_batches=20,
            **_IMAGENET,
        ),
        "imagenet-birealnet18": Recipe(
            model="birealnet18",
            epochs=256,
            learning_rate=0.001,
            label_smoothing=0.1,
            **{**_IMAGENET, **_BIREAL, "batch_size": 512},
        ),
        "imagenet-reactneta": Recipe(
            model="reactneta",
            epochs=256,
            learning_rate=0.0005,
            **{**_IMAGENET, **_BIREAL},
        ),
        "folder-lenet5": Recipe(
            dataset="folder",
            model="lenet5",
            epochs=60,
            batch_size=16,
            learning_rate=0.005,
            calibration_batches=5,
            image_size=32,
            shift=2,
        ),
        "folder-nin": Recipe(
            dataset="folder",
            model="nin",
            epochs=90,
            calibration_batches=20,
            flip=True,
            image_size=64,
            resize_crop=True,
        ),
    }
)


def get(name: str) -> Recipe:
    """Return a preset, or the recipe that MODULE:NAME names.

    Raises:
      RecipeError: If there is none; the message lists the presets.
    """
    if custom.is_reference(name):
        found = custom.find(name)
        if not isinstance(found, Recipe):
            kind = type(found).__name__
            raise RecipeError(f"{name}: expected an xnor_jax.train.Recipe, got {kind}")
        return found
    if name not in PRESETS:
        raise RecipeError(
            f"unknown recipe {name!r}; expected one of {', '.join(PRESETS)}, or "
            f"MODULE:NAME{suggestion(name, PRESETS)}"
        )
    return PRESETS[name]


def validate(recipe: Recipe) -> Recipe:
    """Return the recipe if every field is valid.

    Callables are checked by their signatures; no data are read and no network is built.

    Raises:
      RecipeError: For the first invalid field; the message names it and its range.
    """

    def require(holds: bool, field: str, expected: str) -> None:
        if not holds:
            got = _plain(getattr(recipe, field))
            raise RecipeError(f"expected {expected}, got {got!r}", field=field)

    def number(field: str, least: float = -math.inf) -> bool:
        value = getattr(recipe, field)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        return real and math.isfinite(value) and value >= least

    def whole(field: str, least: int) -> bool:
        return type(getattr(recipe, field)) is int and getattr(recipe, field) >= least

    for field, names in PARTS.items():
        value = getattr(recipe, field)
        if not (callable(value) or (isinstance(value, str) and value in names)):
            got = repr(value) if isinstance(value, str) else type(value).__name__
            if field == "optimizer" and hasattr(value, "update"):
                got = "a transformation; expected a function of the learning rate"
            raise RecipeError(
                f"expected one of {', '.join(names)}, or a callable (on the command "
                f"line, MODULE:NAME), got {got}"
                f"{suggestion(value, names) if isinstance(value, str) else ''}",
                field=field,
            )
    for field, lowest in (
        ("epochs", 1),
        ("batch_size", 2),
        ("seed", 0),
        ("calibration_batches", 0),
        ("shift", 0),
    ):
        require(whole(field, lowest), field, f"a whole number ≥ {lowest}")
    for field in ("binary", "input_scale", "flip", "mixup", "resize_crop"):
        truth = isinstance(getattr(recipe, field), bool)
        require(truth, field, "True or False")
    require(recipe.seed < 2**32, "seed", "a whole number below 2³²")
    for field in ("learning_rate", "multiplier", "decay_factor"):
        positive = number(field) and getattr(recipe, field) > 0
        require(positive, field, "a number above 0")
    for field in ("weight_decay", "scale_minimum", "warmup_epochs"):
        require(number(field, 0), field, "a number ≥ 0")
    smoothing = number("label_smoothing", 0) and recipe.label_smoothing < 1
    require(smoothing, "label_smoothing", "a number in [0, 1)")
    for field in ("teacher", "initial"):
        value = getattr(recipe, field)
        named = value is None or (isinstance(value, str) and value != "")
        require(named, field, "a run's folder")
    require(
        not (recipe.teacher and recipe.label_smoothing),
        "label_smoothing",
        "0 with a teacher, which replaces the labels",
    )
    epochs: Any = recipe.decay_epochs
    rising = (
        isinstance(epochs, tuple | list)
        and all(type(epoch) is int for epoch in epochs)
        and all(a < b for a, b in itertools.pairwise((0, *epochs)))
    )
    require(rising, "decay_epochs", "rising whole numbers, each at least 1")
    require(
        recipe.schedule == "steps" or not recipe.decay_epochs,
        "decay_epochs",
        f"none with the {_plain(recipe.schedule)} schedule",
    )
    if isinstance(recipe.schedule, str) and not recipe.decay_epochs:
        factor = Recipe.decay_factor
        own_factor = f"{factor}, its default, without decay_epochs"
        require(recipe.decay_factor == factor, "decay_factor", own_factor)
    first = recipe.decay_epochs[0] if recipe.decay_epochs else recipe.epochs
    require(recipe.warmup_epochs < first, "warmup_epochs", f"fewer than {first} epochs")
    source = SOURCES.get(recipe.dataset) if isinstance(recipe.dataset, str) else None
    if source is not None and source.streamed:
        require(whole("image_size", 1), "image_size", "a whole number ≥ 1")
    else:
        own_size = f"none for {_plain(recipe.dataset)}, whose images have a fixed size"
        require(recipe.image_size is None, "image_size", own_size)
        require(not recipe.resize_crop, "resize_crop", own_size)
    share = number("validation_share", 0) and recipe.validation_share < 1
    require(share, "validation_share", "a number in [0, 1)")
    folders = source is not None and source.streamed and source.hub is None
    require(
        folders or not recipe.validation_share,
        "validation_share",
        f"0 for {_plain(recipe.dataset)}, which has a test split",
    )
    require(
        not (recipe.resize_crop and recipe.shift),
        "shift",
        "0 with resize_crop, which already moves images",
    )
    require(
        recipe.compute_dtype in ("float32", "bfloat16"),
        "compute_dtype",
        "float32 or bfloat16",
    )
    require(
        (recipe.binary and recipe.precision == "1w1a")
        or recipe.compute_dtype == "float32",
        "compute_dtype",
        f"float32 with {recipe.precision if recipe.binary else 'the float twin'}, "
        "whose products bfloat16 would round",
    )
    precisions = get_args(Precision)
    require(
        recipe.precision in precisions, "precision", f"one of {', '.join(precisions)}"
    )
    require(
        not (recipe.input_scale and recipe.precision == "1w32a"),
        "input_scale",
        "False with 1w32a, whose activations are not binarized",
    )
    require(
        recipe.weight_method == "latent" or recipe.precision != "32w1a",
        "weight_method",
        "latent with 32w1a, whose weights are real",
    )
    require(recipe.decay in ("coupled", "decoupled"), "decay", "coupled or decoupled")
    _check_callables(recipe)
    return recipe


def with_seeds(recipe: Recipe, seeds: Sequence[int]) -> list[Recipe]:
    """Copy the recipe once per seed.

    Raises:
      RecipeError: If the recipe or a seed is invalid, or seeds are empty or repeated.
    """
    # Those of an array are NumPy's, which a recipe refuses.
    given: Sequence[Any] = seeds
    seeds = [seed.item() if hasattr(seed, "item") else seed for seed in given]
    if not seeds or len(set(seeds)) < len(seeds):
        raise RecipeError(
            f"expected at least one seed, without duplicates, got {seeds}",
            field="seeds",
        )
    validate(recipe)
    each = [dataclasses.replace(recipe, seed=seed) for seed in seeds]
    try:
        return [*map(validate, each)]
    except RecipeError as error:
        message = str(error).removeprefix("seed: ")
        raise RecipeError(message, field="seeds") from error


def check_machine(recipe: Recipe, devices: int | None, workers: int) -> None:
    """Check the numbers of devices and of processes that prepare batches.

    Raises:
      RecipeError: If there are no devices, or workers are negative or for a data set in
        memory.
    """
    if devices is not None and devices < 1:
        raise RecipeError(
            f"expected a number of at least 1, got {devices}", field="devices"
        )
    if workers < 0:
        raise RecipeError(
            f"expected a number of at least 0, got {workers}", field="workers"
        )
    if workers and recipe.image_size is None:
        raise RecipeError(
            f"expected 0 for {to_json(recipe)['dataset']}, whose images are in memory, "
            f"got {workers}",
            field="workers",
        )


def load_data(
    recipe: Recipe, data_dir: str | Path | None, *, train: bool = True
) -> Any:
    """Read or open a recipe's data set with `xnor_jax.data.load`."""
    return load(recipe.dataset, data_dir, recipe.fit, recipe.holdout, train=train)


def model_options(recipe: Recipe) -> dict[str, Any]:
    """The keyword arguments that a recipe offers its network's constructor."""
    fields = (
        "binary",
        "rule",
        "surrogate",
        "multiplier",
        "precision",
        "weight_method",
        "input_scale",
        "compute_dtype",
    )
    return {field: getattr(recipe, field) for field in fields}


def schedule_options(recipe: Recipe, steps_per_epoch: int) -> dict[str, Any]:
    """The keyword arguments that a recipe offers a custom schedule."""
    return {
        "learning_rate": recipe.learning_rate,
        "steps_per_epoch": steps_per_epoch,
        "epochs": recipe.epochs,
    }


def fixed_length(recipe: Recipe) -> str | None:
    """Name a part of a recipe that depends on the number of epochs; None without one.

    Without such a part, more epochs do not change the earlier ones.
    """
    if recipe.binary and recipe.surrogate == "tanh":
        return "the temperature of its surrogate tanh"
    if recipe.binary and recipe.weight_method == "recu":
        return "the quantile τ of its weight method recu"
    if callable(recipe.schedule):
        offered = schedule_options(recipe, steps_per_epoch=1)
        fixed = "epochs" in custom.arguments("schedule", recipe.schedule, offered)
    else:
        fixed = recipe.schedule != "steps"
    return f"its schedule {_plain(recipe.schedule)}" if fixed else None


def to_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON types: tuples as lists, callables as `module:qualname`."""
    return {
        field.name: _plain(getattr(recipe, field.name))
        for field in dataclasses.fields(recipe)
    }


def from_json(fields: dict[str, Any], base: Recipe | None = None) -> Recipe:
    """Invert `to_json`; missing fields have their defaults.

    Args:
      fields: A JSON object.
      base: A recipe whose callables are used if their descriptions match, such as
        lambdas, which cannot be imported.

    Raises:
      RecipeError: If a field is unknown, missing without a default, or invalid, or
        names something that cannot be imported.
    """

    def value(name: str, written: Any) -> Any:
        if isinstance(written, list):
            return tuple(written)
        if name in PARTS and isinstance(written, str) and custom.is_reference(written):
            given = getattr(base, name, None)
            if callable(given) and describe(given) == written:
                return given
            try:
                return custom.find(written)
            except RecipeError as error:
                raise RecipeError(str(error), field=name) from error
        return written

    try:
        values = {name: value(name, written) for name, written in fields.items()}
        return validate(Recipe(**values))
    except (TypeError, AttributeError) as error:
        raise RecipeError(f"not a recipe: {error}") from error


def _plain(value: Any) -> Any:
    if callable(value):
        return describe(value)
    return list(value) if isinstance(value, tuple) else value


def _check_callables(recipe: Recipe) -> None:
    def unused(field: str, by: str) -> None:
        """Reject a field that would have no effect."""
        default = Recipe.__dataclass_fields__[field].default
        if getattr(recipe, field) != default:
            got = _plain(getattr(recipe, field))
            taker = _plain(getattr(recipe, by))
            raise RecipeError(
                f"expected {_plain(default)!r} with the {by} {taker}, which takes no "
                f"{field}, got {got!r}",
                field=field,
            )

    if callable(recipe.dataset):
        custom.check_signature("dataset", recipe.dataset)
    for field, argument in (("rule", "kernel"), ("surrogate", "x")):
        if callable(getattr(recipe, field)):
            custom.check_signature(field, getattr(recipe, field), argument, "grad")
    if callable(recipe.weight_method):
        custom.check_signature("weight_method", recipe.weight_method, "kernel")
    if callable(recipe.optimizer):
        custom.check_signature("optimizer", recipe.optimizer, "learning_rate")
        for field in ("weight_decay", "decay"):
            unused(field, by="optimizer")
    if callable(recipe.schedule):
        offered = schedule_options(recipe, steps_per_epoch=1)
        taken = custom.arguments("schedule", recipe.schedule, offered)
        if "learning_rate" not in taken:
            unused("learning_rate", by="schedule")
        for field in ("warmup_epochs", "decay_factor"):
            unused(field, by="schedule")
    if callable(recipe.model):
        offered = {"image_shape": (), "classes": 0, "rngs": None, "backend": "auto"}
        options = model_options(recipe)
        taken = custom.arguments("model", recipe.model, {**offered, **options})
        for field in [field for field in options if field not in taken]:
            unused(field, by="model")
