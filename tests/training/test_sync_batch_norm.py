import logging
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sscloud.architecture import Architecture
from sscloud.unet import UNet
from training.sync_batch_norm import SyncBatchNorm2d, synchronise

CPU = torch.device("cpu")

_PROCESS = """
import sys, warnings
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training.sync_batch_norm import synchronise
from sscloud.architecture import Architecture
from sscloud.unet import UNet

warnings.simplefilter("error")
folder = sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo")
results = {}
for name, job in torch.load(f"{folder}/jobs.pt", weights_only=False).items():
    model = synchronise(job["model"].train(), device=torch.device("cpu"))
    model.checkpointing = job["checkpointing"]
    images = job["images"].split(job["sizes"])[dist.get_rank()].clone().requires_grad_()
    weights = job["weights"].split(job["sizes"])[dist.get_rank()]
    trained = DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        images.grad = None
        outputs = trained(images)
        (outputs * weights).sum().backward()
    results[name] = {
        "outputs": outputs.detach(),
        "images": images.grad,
        "parameters": {key: value.grad for key, value in model.named_parameters()},
        "state": model.state_dict(),
    }
torch.save(results, f"{folder}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def job(model: nn.Module, sizes: tuple[int, int], size_hw: tuple[int, int], **changes: Any) -> dict[str, Any]:
    """A model, and a batch for two processes; of images far from 0, where careless variances lose their digits."""
    generator = torch.Generator().manual_seed(2)
    images = 1e3 + torch.randn(sum(sizes), 3, *size_hw, generator=generator, dtype=torch.float64)
    images[0] += 3  # so that the processes' means differ
    weights = torch.randn(sum(sizes), 4, *size_hw, generator=generator, dtype=torch.float64)
    return {"model": model, "sizes": sizes, "images": images, "weights": weights, "checkpointing": False, **changes}


def plain(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3)).to(dtype)


def unet() -> UNet:
    torch.manual_seed(1)
    return UNet(Architecture(classes=4, base_width=2)).double()


@pytest.fixture(scope="module")
def jobs() -> dict[str, dict[str, Any]]:
    return {
        "equal": job(plain(), (2, 2), (6, 7)),
        "unequal": job(plain(), (3, 1), (6, 7)),
        "unet": job(unet(), (2, 1), (32, 32)),
        "recomputed": job(unet(), (2, 1), (32, 32), checkpointing=True),
    }


@pytest.fixture(scope="module")
def processes(jobs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes on the processor came to, by job."""
    folder = tmp_path_factory.mktemp("processes")
    torch.save(jobs, folder / "jobs.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(folder)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
                "RANK": str(rank),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["equal", "unequal", "unet", "recomputed"])
def test_two_processes_are_one_with_the_whole_batch(
    jobs: dict[str, Any], processes: list[dict[str, Any]], name: str
) -> None:
    job, results = jobs[name], [process[name] for process in processes]
    whole = job["model"].train()
    images = job["images"].clone().requires_grad_()
    for _ in range(2):
        whole.zero_grad()
        images.grad = None
        outputs = whole(images)
        (outputs * job["weights"]).sum().backward()

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)

    close(torch.cat([result["outputs"] for result in results]), outputs.detach())
    assert images.grad is not None
    close(torch.cat([result["images"] for result in results]), images.grad)
    for result in results:
        for key, value in whole.state_dict().items():
            close(result["state"][key], value)
        for key, parameter in whole.named_parameters():
            assert parameter.grad is not None
            close(2 * result["parameters"][key], parameter.grad)  # which are averaged over the processes


def test_names_values_and_parameters_stay() -> None:
    model = unet()
    before, parameters = dict(model.state_dict()), dict(model.named_parameters())

    synchronised = synchronise(model, device=CPU)

    assert synchronised is model
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value is parameters[name] for name, value in model.named_parameters())
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(layers) == 18
    assert all(type(layer) is SyncBatchNorm2d for layer in layers)


@pytest.mark.parametrize("training", [True, False])
def test_in_one_process_it_is_plain_batch_normalisation(training: bool) -> None:
    images = torch.rand(2, 3, 5, 6) + 1
    normal = plain(torch.float32).train(training)
    synchronised = synchronise(plain(torch.float32).train(training), device=CPU)

    assert torch.equal(synchronised(images), normal(images))
    for name, value in normal.state_dict().items():
        assert torch.equal(synchronised.state_dict()[name], value)


def test_a_single_layer_keeps_its_settings() -> None:
    layer = nn.BatchNorm2d(5, eps=1e-3, momentum=0.2).eval()

    synchronised = synchronise(layer, device=CPU)

    assert isinstance(synchronised, SyncBatchNorm2d)
    assert (synchronised.num_features, synchronised.eps, synchronised.momentum) == (5, 1e-3, 0.2)
    assert not synchronised.training


def test_half_precision_keeps_its_type_and_full_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    # A second process with the same batch has no say in the mean.
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.mul_(2))
    layer = SyncBatchNorm2d.of(nn.BatchNorm2d(3))
    images = (torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(4)) + 100).bfloat16()

    found = layer(images).detach()

    assert found.dtype == torch.bfloat16
    assert float(found.float().mean()) == pytest.approx(0, abs=1e-2)
    torch.testing.assert_close(layer.running_mean, 0.1 * images.float().mean((0, 2, 3)))


def test_on_a_gpu_it_is_the_library_s_own() -> None:
    model = synchronise(plain(), device=torch.device("cuda"))

    assert [type(layer) for layer in model.children()] == [nn.SyncBatchNorm, nn.Conv2d, nn.SyncBatchNorm]


def test_derived_layers_are_left_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class BatchNormAct(nn.BatchNorm2d):
        pass

    with caplog.at_level(logging.WARNING):
        model = synchronise(nn.Sequential(BatchNormAct(3), nn.BatchNorm2d(3)), device=CPU)

    assert [type(layer) for layer in model.children()] == [BatchNormAct, SyncBatchNorm2d]
    assert caplog.messages == ["BatchNormAct layers are normalised in each process by itself."]
