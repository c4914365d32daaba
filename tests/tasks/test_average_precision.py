"""Tests of the mean average precision of boxes against torchmetrics, and of what it takes."""

import tracemalloc

import torch
from torchmetrics.detection import MeanAveragePrecision

from lightning_dist.tasks.average_precision import NAMES, BoxAveragePrecision


def boxes(count, generator):
    corners = 400 * torch.rand(count, 2, generator=generator)
    return torch.cat([corners, corners + 5 + 250 * torch.rand(count, 2, generator=generator)], 1)


def image(index, classes, most=12):
    """Return what was found in an image, and what is in it: boxes, or none in each eighth image."""
    generator = torch.Generator().manual_seed(index)
    count = 0 if index % 8 == 0 else int(torch.randint(1, most, (), generator=generator))

    def labels(number):
        return torch.randint(0, classes, (number,), generator=generator)

    target = {"boxes": boxes(count, generator), "labels": labels(count)}
    if index % 3:
        target["area"] = 20_000 * torch.rand(count, generator=generator)
    if index % 2:
        target["iscrowd"] = (torch.rand(count, generator=generator) < 0.2).long()
    near = target["boxes"].repeat(3, 1) + 8 * torch.rand(3 * count, 4, generator=generator)
    found = {
        "boxes": torch.cat([near, boxes(5, generator)]),
        "labels": torch.cat([target["labels"].repeat(3), labels(5)]),
        # Many scores are equal, so the order of the boxes matters.
        "scores": torch.rand(3 * count + 5, generator=generator).mul(9).round() / 9,
    }
    return found, target


def filled(metric, images, classes, most=12):
    for index in images:
        found, target = image(index, classes, most)
        metric.update([found], [target])
    return metric


def test_the_values_are_those_of_torchmetrics_to_the_last_bit():
    # The last class is found only once, and never in an image.
    metric, reference = (
        filled(x, range(60), classes=7)
        for x in (BoxAveragePrecision(), MeanAveragePrecision(backend="faster_coco_eval"))
    )
    stray = {"boxes": torch.ones(1, 4), "labels": torch.tensor([7]), "scores": torch.ones(1)}
    for one in (metric, reference):
        one.update([stray], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}])
    expected, found = reference.compute(), metric.compute()
    assert {name: found[name].item() for name in NAMES} == {
        name: expected[name].item() for name in NAMES
    }
    assert 0.01 < found["map_small"] < found["map_50"] < 0.99
    metric.reset()
    nothing = filled(metric, [0, 8], classes=7).compute()
    assert {value.item() for value in nothing.values()} == {-1.0}


def test_an_image_more_takes_the_memory_of_its_boxes_and_not_of_all_classes():
    peaks = []
    for count in (1, 30, 130):  # The first one imports modules.
        metric = filled(BoxAveragePrecision(), range(1, count + 1), classes=60)
        tracemalloc.start()
        metric.compute()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # About 25 boxes take 60 bytes each, twice. torchmetrics takes 27,000 bytes an image.
    assert (peaks[2] - peaks[1]) / 100 < 7000


def test_the_number_of_collectives_does_not_depend_on_the_number_of_images(tmp_path, monkeypatch):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    calls = []
    for name in ("barrier", "all_gather", "all_reduce", "broadcast", "all_gather_object"):
        original = getattr(torch.distributed, name)

        def counted(*args, original=original, **kwargs):
            calls[-1] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.distributed, name, counted)
    try:
        for count in (1, 2, 40):
            metric = filled(BoxAveragePrecision(), range(1, 1 + count), classes=3)
            calls.append(0)
            metric.compute()
    finally:
        torch.distributed.destroy_process_group()
    assert len(set(calls)) == 1
    assert 0 < calls[0] < 12
