"""Tests of a teacher that FSDP2 shards, with one process; test_distributed has two processes."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import DistillModule, Teacher
from lightning_dist.teacher import EnsembleTeacher, shard_teacher


@pytest.fixture
def mesh():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def new_network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def is_sharded(teacher: Teacher) -> bool:
    kinds = {isinstance(parameter, DTensor) for parameter in teacher.network.parameters()}
    assert len(kinds) == 1
    return kinds.pop()


def test_a_sharded_teacher_is_whole_while_it_is_called_and_no_longer(mesh):
    teacher, inputs = Teacher(new_network()), torch.randn(5, 4)
    shard_teacher(teacher, mesh)
    teacher.to("cpu")
    whole = []
    teacher.network[2].register_forward_hook(lambda *_: whole.append(not is_sharded(teacher)))
    assert is_sharded(teacher)
    torch.testing.assert_close(teacher(inputs), new_network()(inputs))
    assert whole == [True]
    assert is_sharded(teacher)


def test_a_part_of_a_sharded_teacher_can_be_asked(mesh):
    teacher, inputs = Teacher(new_network()), torch.randn(5, 4)
    shard_teacher(teacher, mesh)
    torch.testing.assert_close(teacher.ask("0", (inputs,), {}), new_network()[0](inputs))
    assert is_sharded(teacher)


def test_every_teacher_of_an_ensemble_is_sharded(mesh):
    ensemble, inputs = EnsembleTeacher([new_network(), new_network()]), torch.randn(5, 4)
    shard_teacher(ensemble, mesh)
    assert is_sharded(ensemble)
    torch.testing.assert_close(ensemble(inputs), new_network()(inputs).log_softmax(1))
    torch.testing.assert_close(ensemble.ask("1.0", (inputs,), {}), new_network()[0](inputs))
    assert is_sharded(ensemble)


def test_a_sharded_teacher_needs_fsdp2(make_trainer):
    module = DistillModule(nn.Linear(4, 3), new_network(), shard_teacher=True)
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.zeros(8).long()), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"shard_teacher needs .*trainer=fsdp2"):
        make_trainer().fit(module, data)
