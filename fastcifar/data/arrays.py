"""Data sets from arrays: a .npz file, or a folder of .npy files. Pickled objects are never loaded."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcifar.data import SPLITS
from fastcifar.data.image_set import ImageSet, Three, channel_statistics, three
from fastcifar.errors import DataError, reason


def read_arrays(path: Path, split: str) -> ImageSet:
    """Reads ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` and, if present, ``classes``.

    Images are uint8 (N, H, W, 3), of one size in both splits. Labels are integers (N,), from 0 to K - 1, where K counts
    the names in ``classes``, or else the different train labels; classes without names are called by their numbers.

    Returns:
        images uint8 (N, H, W, 3), contiguous; labels int64 (N,); mean and std of the train split.

    Raises:
        DataError: an array is missing, damaged, pickled, or has another type, shape or range; the sentence names it.
    """
    labels = {part: labels_of(path, part) for part in SPLITS}
    classes = load_array(path, "classes", np.unique(labels["train"]).astype(str))
    if classes.dtype.kind != "U" or classes.ndim != 1:
        found = f"classes of {path} are {classes.dtype} {classes.shape}"
        raise DataError(f"{found}; expected a name for each class, as strings of shape (K,).")
    count = len(classes)
    for part in SPLITS:
        low, high = labels[part].min(), labels[part].max()
        if not 0 <= low <= high < count:
            found = f"{part}_labels of {path} run from {low} to {high}"
            raise DataError(f"{found}; number the {count} classes 0 to {count - 1}.")
    train_images = images_of(path, "train")
    images = train_images if split == "train" else images_of(path, split)
    if images.shape[1:] != train_images.shape[1:]:
        sizes = f"{tuple(train_images.shape)} in train_images and {tuple(images.shape)} in {split}_images"
        raise DataError(f"{path} has images of different sizes, {sizes}; save them in one size.")
    if len(labels[split]) != len(images):
        found = f"{path} has {len(images)} {split}_images and {len(labels[split])} {split}_labels"
        raise DataError(f"{found}; save one label for each image.")
    mean, std = rounded_statistics(train_images, path)
    return ImageSet(images, torch.from_numpy(labels[split]), tuple(classes.tolist()), mean, std)


def load_array(path: Path, name: str, default: np.ndarray | None = None) -> np.ndarray:
    """Loads an array of any type and shape, but never unpickles; returns `default` where there is none."""
    if not path.is_dir() and not zipfile.is_zipfile(path):
        raise DataError(f"{path} is no .npz file, or a damaged one; write it anew with numpy.savez.")
    try:
        if path.is_dir():
            file = path / f"{name}.npy"
            array = np.load(file, allow_pickle=False) if file.exists() else default
        else:
            with np.load(path, allow_pickle=False) as arrays:
                array = np.asarray(arrays[name]) if name in arrays else default
    except Exception as error:  # on hostile bytes, numpy and zlib raise nearly anything
        found = f"{name} of {path} cannot be read ({reason(error)})"
        raise DataError(f"{found}; save it anew, as a plain array without objects.") from None
    if array is None:
        raise DataError(f"{path} lacks {name}; it needs train_images, train_labels, test_images and test_labels.")
    return array


def images_of(path: Path, split: str) -> Tensor:
    """Loads and checks the images: uint8 (N, H, W, 3), with N, H and W at least 1."""
    name = f"{split}_images"
    images = load_array(path, name)
    found = f"{name} of {path} are {images.dtype} {images.shape}"
    if images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1):
        height, width = images.shape[1:3]
        save = f"numpy.repeat({name}.reshape(-1, {height}, {width}, 1), 3, axis=3)"
        raise DataError(f"{found}, greyscale; save {save} in their place.")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        hint = f"{name}.transpose(0, 2, 3, 1)" if images.ndim == 4 and images.shape[1] == 3 else "bytes from 0 to 255"
        raise DataError(f"{found}; expected uint8 (N, H, W, 3), RGB: save {hint}.")
    if not images.size:
        raise DataError(f"{found}, which holds no pixels; save at least one image.")
    return torch.from_numpy(np.ascontiguousarray(images))


def labels_of(path: Path, split: str) -> np.ndarray:
    """Loads and checks the labels: int64 (N,), with N at least 1."""
    name = f"{split}_labels"
    labels = load_array(path, name)
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not labels.size:
        found = f"{name} of {path} are {labels.dtype} {labels.shape}"
        raise DataError(f"{found}; expected integers (N,), the class of each image.")
    return labels.astype(np.int64)


def rounded_statistics(images: Tensor, path: Path) -> tuple[Three, Three]:
    """Mean and standard deviation by channel of uint8 (N, H, W, 3), as fractions of 255, to four digits.

    Raises DataError where a channel is constant, so that it cannot be normalised.
    """
    mean, std = (three(round(value, 4) for value in values) for values in channel_statistics(images))
    if not all(std):
        raise DataError(f"the train images of {path} do not vary in every channel; give pictures in colour.")
    return mean, std
