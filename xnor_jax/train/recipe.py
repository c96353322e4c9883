"""What a run is: frozen recipes, and the presets of the papers."""

import dataclasses
import math
from types import MappingProxyType
from typing import Any, Literal

from xnor_jax.data import SOURCES, Fit
from xnor_jax.registry import RULES, expected


class RecipeError(ValueError):
    """A recipe with a field that cannot be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run's numbers."""

    dataset: Literal["digits", "mnist", "fashion", "cifar10", "imagenet", "folder"]
    """The images: the built-in digits, or a Hugging Face layout, or, of imagenet and
    folder, class folders; these two stay on disk."""
    model: Literal["lenet5", "nin", "resnet18"]
    """The network."""
    epochs: int
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step; what is left of an epoch waits for the next shuffle."""
    seed: int = 0
    """Of the initial weights, the order of the images, dropout and augmentation."""
    binary: bool = True
    """False trains the float twin: nothing signed, nothing projected."""
    rule: Literal["corrected", "paper", "exact", "ste"] = "corrected"
    """The gradient rule of the binary kernels."""
    multiplier: float = 1.0
    """A factor on the rule's gradient."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the operands of the products of signs: in bfloat16, for a GPU's tensor cores,
    the sums are the same integers, and gradients are rounded on their way back."""
    input_scale: bool = False
    """Whether to multiply by the paper's input scale K."""
    learning_rate: float = 0.01
    """Adam's, at its highest."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """Cosine to 0 at the end, or times decay_factor at each of decay_epochs."""
    decay_epochs: tuple[int, ...] = ()
    """After which epochs the steps schedule decays."""
    decay_factor: float = 0.1
    """What the steps schedule multiplies by."""
    weight_decay: float = 1e-5
    """L2 decay."""
    decay: Literal["coupled", "decoupled"] = "coupled"
    """Added to the gradient before Adam, as the reference does, or to its step."""
    scale_minimum: float = 0.01
    """The smallest affine BatchNorm scale."""
    calibration_batches: int = 0
    """Training batches to re-estimate BatchNorm's statistics from before each
    evaluation; 0 evaluates with the running averages."""
    shift: int = 0
    """Augmentation: translate each training image by up to this many pixels."""
    flip: bool = False
    """Augmentation: mirror half of the training images left to right."""
    image_size: int | None = None
    """The side that the pictures of imagenet and folder are given."""
    resize_crop: bool = False
    """Augmentation of these: a random part of 8 to 100 % of each picture, 3/4 to 4/3 as
    wide as high. The test then cuts the centre of pictures whose shorter side is 8/7 of
    image_size; without it, is image_size."""

    @property
    def fit(self) -> Fit | None:
        """How the test makes a picture of any size one of the network's, if it does."""
        if self.image_size is None:
            return None
        ratio = 8 / 7 if self.resize_crop else 1  # 256 for 224
        return Fit(self.image_size, round(self.image_size * ratio))


REFERENCE_STEPS = (15, 30, 45)

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
    """Return a preset.

    Raises:
      RecipeError: If none has that name; the message lists them.
    """
    if name not in PRESETS:
        raise RecipeError(f"unknown recipe {name!r}; {expected(name, PRESETS)}")
    return PRESETS[name]


def validate(recipe: Recipe) -> Recipe:
    """Return the recipe if every field can be.

    Raises:
      RecipeError: For the first field that cannot; the message names it and its range.
    """

    def require(holds: bool, field: str, expected: str) -> None:
        if not holds:
            raise RecipeError(
                f"{field}: expected {expected}, got {getattr(recipe, field)!r}"
            )

    def finite(field: str) -> bool:
        return math.isfinite(getattr(recipe, field))

    for field, lowest in (
        ("epochs", 1),
        ("batch_size", 2),
        ("seed", 0),
        ("calibration_batches", 0),
        ("shift", 0),
    ):
        require(getattr(recipe, field) >= lowest, field, f"a whole number ≥ {lowest}")
    require(recipe.seed < 2**32, "seed", "a whole number below 2³²")
    for field in ("learning_rate", "multiplier", "decay_factor"):
        require(finite(field) and getattr(recipe, field) > 0, field, "a number above 0")
    for field in ("weight_decay", "scale_minimum"):
        require(finite(field) and getattr(recipe, field) >= 0, field, "a number ≥ 0")
    rising = all(a < b for a, b in zip((0, *recipe.decay_epochs), recipe.decay_epochs))  # noqa: B905
    require(rising, "decay_epochs", "rising epochs, each at least 1")
    require(
        recipe.schedule == "steps" or not recipe.decay_epochs,
        "decay_epochs",
        "none with the cosine schedule",
    )
    require(recipe.dataset in SOURCES, "dataset", f"one of {', '.join(SOURCES)}")
    if SOURCES[recipe.dataset].streamed:
        size = recipe.image_size
        require(size is not None and size >= 1, "image_size", "a whole number ≥ 1")
    else:
        own = f"none for {recipe.dataset}, whose images have a size"
        require(recipe.image_size is None, "image_size", own)
        require(not recipe.resize_crop, "resize_crop", own)
    require(
        not (recipe.resize_crop and recipe.shift),
        "shift",
        "0 with resize_crop, which moves images itself",
    )
    require(
        recipe.compute_dtype in ("float32", "bfloat16"),
        "compute_dtype",
        "float32 or bfloat16",
    )
    require(
        recipe.binary or recipe.compute_dtype == "float32",
        "compute_dtype",
        "float32 with the float twin, whose products bfloat16 would round",
    )
    require(recipe.rule in RULES, "rule", f"one of {', '.join(RULES)}")
    return recipe


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON's types, tuples as lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(recipe).items()
    }


def from_json(fields: dict[str, Any]) -> Recipe:
    """The inverse of `to_json`.

    Raises:
      RecipeError: If a field is missing or unknown.
    """
    try:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return validate(Recipe(**values))
    except (TypeError, AttributeError) as error:
        raise RecipeError(f"not a recipe: {error}") from error
