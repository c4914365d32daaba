"""`fill_num_classes`: find the number of classes of a run whose images have no labels."""

from pathlib import Path

from omegaconf import DictConfig

from lightning_dist.cli.errors import UserError
from lightning_dist.data.image_files import class_folders
from lightning_dist.teacher.loading import classes_of_weights


def fill_num_classes(config: DictConfig) -> None:
    """Set ``num_classes`` to the number of the teacher's classes, if the config leaves it open.

    Args:
        config: the composed config ``train``, which is changed in place.

    Raises:
        UserError: if there is no teacher, or if the number is not known.
    """
    if config.num_classes is not None:
        return
    teacher = config.teacher
    if teacher is None or config.distill.teacher is None:
        raise UserError(
            "these images have no labels, so only a teacher can teach: choose one, such as "
            "teacher=timm teacher.source=timm/resnet34.tv_in1k, and another distill than none"
        )
    number = None
    if teacher.get("source") is not None:
        named = {key: teacher.get(key) for key in ("source", "weights")}
        number = classes_of_weights(**named, pretrained=teacher.get("pretrained", True))
        if number is not None and "num_classes" in teacher:
            teacher.num_classes = number
    if config.data.get("val_root") is not None:
        number = len(class_folders(Path(config.data.val_root)))
    elif teacher.get("class_map") is not None:
        number = len(teacher.class_map)
    if number is None:
        raise UserError(
            "the number of the teacher's classes is not known: set num_classes to it (the student "
            "gets as many)"
        )
    config.num_classes = number
