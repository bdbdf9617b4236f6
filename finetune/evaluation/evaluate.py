"""Evaluate a trained classifier on a labelled split."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.config import ClassifierConfig
from finetune.datasets import open_labelled, quick_look
from finetune.evaluation.class_matching import SelectedClasses, match_classes
from finetune.evaluation.trained_classifier import TrainedClassifier, load_classifier
from finetune.provenance import changed_settings, digest_of_weights, inputs_of, origin_of
from finetune.run_folder import check_scores_folder, data_to_evaluate, read_classifier_config
from finetune.scores import score, write_tables
from finetune.scoring_config import EvaluateConfig
from mae_et.checkpoints.layouts.timm_hub import require_checkpoint
from mae_et.checkpoints.preprocessing import report_preprocessing
from mae_et.checkpoints.source import recognise
from mae_et.config.data import STATISTICS, DataConfig, check_statistics
from mae_et.config.typed import typed
from mae_et.data.cores import worker_count
from mae_et.data.datasets import open_dataset
from mae_et.data.fingerprint import fingerprint
from mae_et.data.layout import WHOLE_ROOT, split_folder
from mae_et.data.sources.image_folder import classes_without_images
from mae_et.errors import UserError, listed
from mae_et.io.score_records import write_record
from mae_et.runtime.agreement import check_ranks_agree, fail_together
from mae_et.runtime.console import notify
from mae_et.runtime.precision import autocast_dtype
from mae_et.training.resume.same_ranks import check_same_start
from mae_et.training.session import distributed_session


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a classifier on the validation split, or on all images of a folder without splits.

    If the classifier was trained on a folder without splits, its held-out images are scored.

    Returns:
        `data`, the name of the data; `settings`, if any differ from the defaults; `top1` and `top5`
        (of more than five classes) in percent; `top1_standard_error`, in points; `val_loss`;
        `val_images`, the number scored; if the data have fewer classes than
        the checkpoint, `classes` and `classes_of_checkpoint`; and `provenance`: checkpoint, weights
        and all settings.

    Raises:
        UserError: the checkpoint is not a classifier, or does not fit the data.
    """
    config = typed(config, EvaluateConfig)
    with distributed_session(config, config) as (world, _):
        with fail_together(world):
            task = _open(config)
            digest = fingerprint(task.source)
        network, source, size = task.network, task.source, task.classifier.image_size
        facts = {"the number of images": len(source), "the digest of their names": digest}
        check_ranks_agree(facts, world)
        check_same_start(network, None, world)
        dtype = autocast_dtype(config.precision, world.device)
        workers = worker_count(config.num_workers, world)
        scores = score(
            network.to(world.device), source, task.data, size, world, dtype, config.batch_size,
            workers, task.indices,
        )  # fmt: skip
    if math.isnan(scores.loss):
        raise UserError(f"{config.checkpoint} gives logits that are not numbers (NaN)")
    results = {"data": str(task.data.root or task.data.source)} | task.changed | scores.summary()
    trained: Any = task.classifier.network
    if len(source.classes) < trained.num_classes:
        results |= {"classes": len(source.classes), "classes_of_checkpoint": trained.num_classes}
    results["provenance"] = {
        **origin_of(config.checkpoint),
        "weights_of": config.weights,
        **inputs_of(digest_of_weights(trained), task.data, size, config),
        "val_images": len(task.indices),
    }
    if config.output is not None and world.is_main:
        write_tables(config.output, scores, list(source.classes))
        write_record(config.output, results)
    return results


@dataclass(frozen=True)
class _Task:
    """A network, and the images to score it on: those of classes that it and the data share."""

    network: Any
    source: Any
    indices: Sequence[int]
    """Images of the source to score."""
    data: DataConfig
    classifier: TrainedClassifier
    """The checkpoint's, with all of its classes."""
    changed: dict[str, str]
    """Settings that differ from the defaults, as `settings`."""


def _open(config: EvaluateConfig) -> _Task:
    """Open the classifier and the data, and match their classes."""
    require_checkpoint(config.checkpoint)
    if config.output is not None:
        check_scores_folder(config.output)
    run = read_classifier_config(config.checkpoint)
    data, held_out = _all_images(data_to_evaluate(config, run), run)
    checkpoint = recognise(config.checkpoint, config.checkpoint_key, config.architecture)
    recorded = checkpoint.preprocessing()
    classifier = load_classifier(config, run)
    report_preprocessing(recorded, data, config.checkpoint)
    check_statistics(data, classifier.channels)
    source = open_labelled(data, "val", classifier.channels, "an evaluation", own_classes=True)
    if held_out:
        total = len(source) + len(open_dataset(data, "train", classifier.channels))
        notify(f"scoring the {len(source)} of {total} images that were held out in training")
    empty = classes_without_images(source)
    if run is not None and config.data in (None, run.data):
        empty = [name for name in classifier.classes or () if name not in source.classes] or empty
    if empty:
        raise UserError(f"the validation split has no image of {listed(empty)}")
    if config.weights == "best" and config.data in (None, run and run.data):
        notify("weights best were selected on these images: their top-1 is optimistic")
    network = classifier.network.eval()
    outputs = network.num_classes
    indices, match = match_classes(config.checkpoint, outputs, classifier.classes, source.classes)
    notify(f"classes {match}")
    if indices != list(range(outputs)):
        network = SelectedClasses(network, indices)
    usual = recorded or data
    changed = [(key, getattr(data, key), getattr(usual, key)) for key in STATISTICS]
    changed += [("weights", config.weights, "last"), ("max_images", config.max_images, None)]
    chosen = quick_look(source, "val", config.max_images)
    return _Task(network, source, chosen, data, classifier, changed_settings(changed))


def _all_images(data: DataConfig, run: ClassifierConfig | None) -> tuple[DataConfig, bool]:
    """Use the root as the split if there are no split folders.

    Returns:
        The data, and whether they are the run's own, in which case held-out images are scored.
    """
    if data.source != "folder" or data.root is None or not data.root.exists():
        return data, False
    if split_folder(data, "val") is not None:
        return data, False
    trained_on = run.data.root if run else None
    if trained_on is not None and trained_on.resolve() == data.root.resolve():
        return data, True
    notify(f"{data.root} has no split folders: scoring all of its images")
    return replace(data, val_split=WHOLE_ROOT), False
