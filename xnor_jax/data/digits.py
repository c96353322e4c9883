"""The digits bundled with scikit-learn, as images of MNIST's size."""

from typing import Any

import numpy as np

from xnor_jax.data.sets import Dataset, Source, Split


def read(source: Source) -> Dataset:
    """Load the digits, with a fixed fifth of each class as the test split."""
    # Imported here: only this function needs it, and the import takes two seconds.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    # 8×8 in 0…16 becomes 28×28 in 0…255: each pixel repeated 3×3, then padding of 2.
    images = np.repeat(np.repeat(digits.images, 3, axis=1), 3, axis=2)
    images = np.pad(images * (255 / 16), ((0, 0), (2, 2), (2, 2))).round()
    parts: list[Any] = train_test_split(
        images.astype(np.uint8)[..., None],
        digits.target.astype(np.int32),
        test_size=0.2,
        random_state=0,
        stratify=digits.target,
    )
    train_images, test_images, train_labels, test_labels = parts
    return Dataset(
        Split(train_images, train_labels),
        Split(test_images, test_labels),
        tuple(str(name) for name in digits.target_names),
        source,
    )
